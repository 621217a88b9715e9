// A row of x in int8, in plain C++ that compilers make vector instructions of, the same results
// whichever they are: nothing is summed but integers.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bfloat16.h"
#include "product.h"

namespace octavo {
namespace {  // each kernel has its own, compiled for its instructions

inline float Wide(uint16_t value) { return Widened(value); }
inline float Wide(float value) { return value; }

template <typename Entry>
Quantised QuantiseRow(const Entry* x, int64_t depth, int8_t* out) {
  // The bits of absolute values are in their order, and what isn't finite has the largest.
  uint32_t largest = 0;
  for (int64_t k = 0; k < depth; ++k) {
    const float wide = Wide(x[k]);
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float most;
  memcpy(&most, &largest, sizeof most);
  const bool is_finite = largest < 0x7f800000;
  if (!is_finite || most < 1e-30f) {  // below it, 127 / most might overflow
    memset(out, 0, static_cast<size_t>(depth));
    return {is_finite ? 0.0f : std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const float ratio = 127.0f / most;
  int32_t sum = 0;
  for (int64_t k = 0; k < depth; ++k) {
    const auto rounded = static_cast<int32_t>(__builtin_rintf(Wide(x[k]) * ratio));
    out[k] = static_cast<int8_t>(rounded);
    sum += rounded;
  }
  return {most * (1.0f / 127.0f), sum};
}

inline Quantised QuantiseAny(const void* x, bool is_float32, int64_t depth, int8_t* out) {
  if (is_float32) return QuantiseRow(static_cast<const float*>(x), depth, out);
  return QuantiseRow(static_cast<const uint16_t*>(x), depth, out);
}

}  // namespace
}  // namespace octavo
