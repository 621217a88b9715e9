// From float32 sums to a result, for kernels whose instructions don't round to bfloat16.

#pragma once

#include <cstdint>

#include "bfloat16.h"
#include "product.h"

namespace octavo {
namespace {  // each kernel has its own, compiled for its instructions

inline void StoreBlock(const Product& p, int64_t row, int64_t block, const float* sums) {
  const int64_t at = row * p.stride + block * kColumns;
  if (!p.is_float32) {
    for (int n = 0; n < kColumns; ++n) static_cast<uint16_t*>(p.y)[at + n] = Rounded(sums[n]);
    return;
  }
  float* y = static_cast<float*>(p.y) + at;
  for (int n = 0; n < kColumns; ++n) y[n] = p.add ? p.add[at + n] + sums[n] : sums[n];
}

// Sums in int8, of a row's first part and of its rest.
inline void StoreBlock(const Product& p, int64_t row, int64_t block, const int32_t* first,
                       const int32_t* rest) {
  float sums[kColumns];
  for (int n = 0; n < kColumns; ++n) {
    const float sum = __builtin_fmaf(static_cast<float>(rest[n]), 1.0f / kSteps,
                                     static_cast<float>(first[n]));
    sums[n] = sum * p.x_scales[row] * p.w_scales[block * kColumns + n];
  }
  asm volatile("" : "+m"(sums));  // rounded, before anything is added
  StoreBlock(p, row, block, sums);
}

}  // namespace
}  // namespace octavo
