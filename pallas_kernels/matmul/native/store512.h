// From sums to results, for kernels with AVX512.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "product.h"

namespace octavo {
namespace {  // each kernel has its own, compiled for its instructions

inline void Store(const Product& p, int64_t row, int64_t block, __m512 sums) {
  const int64_t at = row * p.stride + block * kColumns;
  if (p.is_float32) {
    if (p.add) sums = _mm512_add_ps(_mm512_loadu_ps(p.add + at), sums);
    _mm512_storeu_ps(static_cast<float*>(p.y) + at, sums);
  } else {
    __m256bh rounded = _mm512_cvtneps_pbh(sums);
    memcpy(static_cast<uint16_t*>(p.y) + at, &rounded, sizeof rounded);
  }
}

// Sums in int8, of a row's first part and of its rest.
inline void Store(const Product& p, int64_t row, int64_t block, __m512i first, __m512i rest) {
  __m512 sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(rest), _mm512_set1_ps(1.0f / kSteps),
                                _mm512_cvtepi32_ps(first));
  sums = _mm512_mul_ps(sums, _mm512_set1_ps(p.x_scales[row]));
  sums = _mm512_mul_ps(sums, _mm512_loadu_ps(p.w_scales + block * kColumns));
  asm volatile("" : "+v"(sums));  // rounded, before anything is added
  Store(p, row, block, sums);
}

}  // namespace
}  // namespace octavo
