// From sums to results, for kernels whose instructions don't round to bfloat16.

#pragma once

#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "product.h"

namespace octavo {
namespace {  // each kernel has its own, compiled for its instructions

inline void StoreBlock(const Product& p, int64_t row, int64_t block, const float* sums) {
  int64_t at = row * p.columns + block * kColumns;
  if (p.is_float32) {
    memcpy(static_cast<float*>(p.y) + at, sums, kColumns * sizeof(float));
  } else {
    for (int n = 0; n < kColumns; ++n) static_cast<uint16_t*>(p.y)[at + n] = Rounded(sums[n]);
  }
}

inline void StoreBlock(const Product& p, int64_t row, int64_t block, const int32_t* sums) {
  float scaled[kColumns];
  for (int n = 0; n < kColumns; ++n) {
    scaled[n] = static_cast<float>(sums[n]) * p.x_scales[row] * p.w_scales[block * kColumns + n];
  }
  StoreBlock(p, row, block, scaled);
}

}  // namespace
}  // namespace octavo
