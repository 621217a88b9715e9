// What every instruction set's kernel computes.
//
// Each kernel is a translation unit of its own, compiled for its instructions. None may use
// anything inline of a library: the linker keeps one copy, and it may be the one with instructions
// that another processor lacks.

#pragma once

#include <cstdint>

namespace octavo {

constexpr int kColumns = 16;  // of a block of packed weights

// y = x @ w for one matrix, in bfloat16 with float32 sums.
struct Product {
  const uint16_t* x;  // bfloat16[rows, depth]
  const uint16_t* w;  // bfloat16[columns / 16, depth / 2, 16, 2]
  void* y;            // float32[rows, columns], or bfloat16
  int64_t rows, depth, columns;
  bool is_float32;    // y
};

// Computes the blocks [first, last) of columns.
using Multiply = void (*)(const Product&, int64_t first, int64_t last);

void MultiplyPortable(const Product&, int64_t first, int64_t last);
#if defined(__x86_64__)
void MultiplyAvx2(const Product&, int64_t first, int64_t last);
void MultiplyAvx512(const Product&, int64_t first, int64_t last);  // AVX512-BF16
void MultiplyAmx(const Product&, int64_t first, int64_t last);
#endif

}  // namespace octavo
