// bfloat16 for kernels whose instructions don't round to it.

#pragma once

#include <cstdint>
#include <cstring>

namespace octavo {
namespace {  // each kernel has its own, compiled for its instructions

inline uint16_t Rounded(float value) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float Widened(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

}  // namespace
}  // namespace octavo
