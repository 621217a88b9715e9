// What the calls of XLA's share: how they take their arguments, and which kernel runs.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "processor.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace octavo {

namespace ffi = xla::ffi;

constexpr int64_t kRowsAtATime = 16;  // of those that a thread makes ready for products

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
  const uint32_t* w;
  const float* scales;  // of its columns in int8, or null
  int64_t words, blocks;
};

// Finds layer `index` of a stack, or says what is wrong. The stack is bfloat16[layers, blocks, depth /
// 2, 16, 2], and its scales are empty; or int8[layers, blocks, depth / 4, 16, 4], and they are
// float32[layers, blocks * 16].
inline const char* Find(const ffi::AnyBuffer& stack, const ffi::AnyBuffer& scales, int64_t index,
                        int64_t depth, Layer* found) {
  const auto shape = stack.dimensions();
  const bool is_int8 = stack.element_type() == ffi::S8;
  const int64_t entries = is_int8 ? 4 : 2;  // of a word
  if ((!is_int8 && stack.element_type() != ffi::BF16) || shape.size() != 5 ||
      shape[2] * entries != depth || shape[3] != kColumns || shape[4] != entries) {
    return "a stack must be bfloat16[layers, columns / 16, depth / 2, 16, 2] or "
           "int8[layers, columns / 16, depth / 4, 16, 4]";
  }
  if (depth == 0 || shape[2] % 16) return "the depth must be a multiple of a tile's: 32, in int8 64";
  if (index < 0 || index >= shape[0]) return "no such layer";
  const int64_t columns = shape[1] * kColumns;
  if (is_int8 && !IsMatrix(scales, ffi::F32, shape[0], columns)) {
    return "a stack in int8 comes with scales, float32[layers, columns]";
  }
  *found = {static_cast<const uint32_t*>(stack.untyped_data()) + index * columns * shape[2],
            is_int8 ? static_cast<const float*>(scales.untyped_data()) + index * columns : nullptr,
            shape[2], shape[1]};
  return nullptr;
}

// What some rows and blocks of a product are; the last ones may lie beyond its own.
inline Product Part(const Product& p, int64_t row, int64_t last_row, int64_t block,
                    int64_t last_block) {
  Product part = p;
  const int64_t at = row * p.stride + block * kColumns;
  part.x += row * p.words * (p.w_scales ? 2 : 1);
  part.w += block * kColumns * p.words;
  part.y = static_cast<char*>(p.y) + at * (p.is_float32 ? 4 : 2);
  if (p.add) part.add += at;
  if (p.w_scales) {
    part.w_scales += block * kColumns;
    part.x_scales += row;
    part.x_sums += 2 * row;
  }
  part.rows = std::min(last_row, p.rows) - row;
  part.blocks = std::min(last_block, p.blocks) - block;
  return part;
}

inline void Run(const Kernel& kernel, const Product& p) {
  p.w_scales ? kernel.multiply_int8(p) : kernel.multiply(p);
}

// The RMS norm that goes before a product: float32[rows, width] to bfloat16, with one layer's scale.
struct Norm {
  const float* x;
  const uint16_t* scale;
  float epsilon;
  int64_t rows, width;
  uint16_t* y;

  void Compute(const Kernel& kernel, int64_t first, int64_t last) const {
    kernel.normalise(x + first * width, scale, epsilon, last - first, width, y + first * width);
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

// The rows that products multiply, which may have to be normed before, or put into int8.
class Rows {
 public:
  // x: bfloat16[rows, depth]; what `norm` makes if it isn't null.
  Rows(const uint16_t* x, int64_t rows, int64_t depth, bool is_int8, const Norm* norm)
      : x_(x), rows_(rows), depth_(depth), norm_(norm) {
    if (!is_int8) return;
    int8_.reset(new int8_t[static_cast<size_t>(2 * rows * depth)]);
    scales_.resize(static_cast<size_t>(rows));
    sums_.resize(static_cast<size_t>(2 * rows));
  }

  int64_t Count() const {
    return norm_ || int8_ ? (rows_ + kRowsAtATime - 1) / kRowsAtATime : 0;
  }

  void Compute(const Kernel& kernel, int64_t i) {
    const int64_t first = i * kRowsAtATime, last = std::min(first + kRowsAtATime, rows_);
    if (norm_) norm_->Compute(kernel, first, last);
    for (int64_t row = first; int8_ && row < last; ++row) {
      scales_[row] = kernel.quantise(x_ + row * depth_, depth_, int8_.get() + 2 * row * depth_,
                                     &sums_[2 * row]);
    }
  }

  // Their product with a layer's matrix, whose rows of results lie beside each other.
  Product With(const Layer& matrix, void* y, const float* add, bool is_float32) const {
    const void* x = int8_ ? static_cast<const void*>(int8_.get()) : x_;
    return {static_cast<const uint32_t*>(x), matrix.w, y, add, rows_, matrix.words, matrix.blocks,
            matrix.blocks * kColumns, is_float32, matrix.scales, scales_.data(), sums_.data()};
  }

 private:
  const uint16_t* x_;
  int64_t rows_, depth_;
  const Norm* norm_;
  std::unique_ptr<int8_t[]> int8_;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
};

}  // namespace octavo
