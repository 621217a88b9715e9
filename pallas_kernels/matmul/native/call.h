// What the calls of XLA's share: how they take their arguments, and which kernel runs.

#pragma once

#include <algorithm>
#include <cstdint>

#include "processor.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace octavo {

namespace ffi = xla::ffi;

constexpr int64_t kRowsOfNorm = 16;  // that a thread takes at a time

// `most`: the most instructions that may be used. A program that was compiled on another processor
// may come out of a cache: what this one lacks isn't.
inline const Kernel& KernelFor(int32_t most) {
#if defined(__x86_64__)
  switch (std::min(most, static_cast<int32_t>(MostInstructions()))) {
    case static_cast<int32_t>(Instructions::kAmx):
      return kAmx;
    case static_cast<int32_t>(Instructions::kAvx512):
      return kAvx512;
    case static_cast<int32_t>(Instructions::kAvx2):
      return kAvx2;
  }
#else
  (void)most;
#endif
  return kPortable;
}

inline ffi::Error Refuse(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, what);
}

inline bool IsMatrix(const ffi::AnyBuffer& buffer, ffi::DataType type, int64_t rows,
                     int64_t columns) {
  const auto shape = buffer.dimensions();
  return buffer.element_type() == type && shape.size() == 2 && shape[0] == rows &&
         shape[1] == columns;
}

// A matrix of a stack, which stays as it is: a slice would be a copy.
struct Layer {
  const uint16_t* w;
  int64_t blocks;
};

// Finds layer `index` of a stack, bfloat16[layers, blocks, depth / 2, 16, 2], or says what is wrong.
inline const char* Find(const ffi::AnyBuffer& stack, int64_t index, int64_t depth, Layer* found) {
  const auto shape = stack.dimensions();
  if (stack.element_type() != ffi::BF16 || shape.size() != 5 || shape[2] * 2 != depth ||
      shape[3] != kColumns || shape[4] != 2) {
    return "a stack must be bfloat16[layers, columns / 16, depth / 2, 16, 2]";
  }
  if (depth == 0 || depth % 32) return "the depth must be a multiple of 32, a tile's";
  if (index < 0 || index >= shape[0]) return "no such layer";
  const int64_t size = shape[1] * kColumns * depth;
  *found = {static_cast<const uint16_t*>(stack.untyped_data()) + index * size, shape[1]};
  return nullptr;
}

// What some rows and blocks of a product are; the last ones may lie beyond its own.
inline Product Part(const Product& p, int64_t row, int64_t last_row, int64_t block,
                    int64_t last_block) {
  Product part = p;
  const int64_t at = row * p.stride + block * kColumns;
  part.x += row * p.depth;
  part.w += block * kColumns * p.depth;
  part.y = static_cast<char*>(p.y) + at * (p.is_float32 ? 4 : 2);
  if (p.add) part.add += at;
  part.rows = std::min(last_row, p.rows) - row;
  part.blocks = std::min(last_block, p.blocks) - block;
  return part;
}

// The RMS norm that goes before a product: float32[rows, width] to bfloat16, with one layer's scale.
struct Norm {
  const float* x;
  const uint16_t* scale;
  float epsilon;
  int64_t rows, width;
  uint16_t* y;

  int64_t Count() const { return (rows + kRowsOfNorm - 1) / kRowsOfNorm; }

  void Compute(const Kernel& kernel, int64_t i) const {
    const int64_t first = i * kRowsOfNorm, count = std::min(kRowsOfNorm, rows - first);
    kernel.normalise(x + first * width, scale, epsilon, count, width, y + first * width);
  }
};

// Finds the norm of x, or says what is wrong. `scales` is bfloat16[layers, width].
inline const char* Find(const ffi::AnyBuffer& x, const ffi::AnyBuffer& scales, int64_t index,
                        float epsilon, const ffi::AnyBuffer& normed, Norm* found) {
  const auto shape = x.dimensions(), of_scales = scales.dimensions();
  if (shape.size() != 2 || x.element_type() != ffi::F32 ||
      !IsMatrix(normed, ffi::BF16, shape[0], shape[1])) {
    return "what is normed must be a float32 matrix, and its norm bfloat16";
  }
  if (of_scales.size() != 2 || !IsMatrix(scales, ffi::BF16, of_scales[0], shape[1])) {
    return "a norm's scales must be bfloat16[layers, width]";
  }
  if (index < 0 || index >= of_scales[0]) return "no such layer";
  const auto* scale = static_cast<const uint16_t*>(scales.untyped_data()) + index * shape[1];
  *found = {static_cast<const float*>(x.untyped_data()), scale,    epsilon,
            shape[0], shape[1], static_cast<uint16_t*>(normed.untyped_data())};
  return nullptr;
}

}  // namespace octavo
