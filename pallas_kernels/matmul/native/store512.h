// From sums to results, for kernels with AVX512.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "product.h"

namespace octavo {
namespace {  // each kernel has its own, compiled for its instructions

inline void Store(const Product& p, int64_t row, int64_t block, __m512 sums) {
  int64_t at = row * p.columns + block * kColumns;
  if (p.is_float32) {
    _mm512_storeu_ps(static_cast<float*>(p.y) + at, sums);
  } else {
    __m256bh rounded = _mm512_cvtneps_pbh(sums);
    memcpy(static_cast<uint16_t*>(p.y) + at, &rounded, sizeof rounded);
  }
}

inline void Store(const Product& p, int64_t row, int64_t block, __m512i sums) {
  __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(p.x_scales[row]));
  Store(p, row, block, _mm512_mul_ps(scaled, _mm512_loadu_ps(p.w_scales + block * kColumns)));
}

}  // namespace
}  // namespace octavo
