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

}  // namespace
}  // namespace octavo
