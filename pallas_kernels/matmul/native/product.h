// What every instruction set's kernel computes.
//
// Each kernel is a translation unit of its own, compiled for its instructions. None may use
// anything inline of a library: the linker keeps one copy, and it may be the one with instructions
// that another processor lacks.

#pragma once

#include <cstdint>

namespace octavo {

constexpr int kColumns = 16;  // of a block of packed weights

// y = x @ w for one matrix. x and w are in words of four bytes, which are what instructions take
// of a row at once: two entries in bfloat16, whose products are summed in float32; or four in int8,
// summed in int32, which holds them exactly.
struct Product {
  const uint32_t* x;  // [rows, words]
  const uint32_t* w;  // [columns / 16, words, 16]
  void* y;            // float32[rows, columns], or bfloat16
  int64_t rows, words, columns;
  bool is_float32;    // y
  // Of int8 alone: what one stands for in each row of x and each column of w, and what each row of
  // x adds up to.
  const float* x_scales;
  const float* w_scales;
  const int32_t* x_sums;
};

// Computes the blocks [first, last) of columns.
using Multiply = void (*)(const Product&, int64_t first, int64_t last);

// A row in int8: each entry by its ratio to the largest, of which `scale` is a 127th, rounded to
// nearest even; `sum` is of the results. A row with anything in it that isn't finite has a scale
// that isn't a number, and one of zeros, or as good as zeros, has zero.
struct Quantised {
  float scale;
  int32_t sum;
};
using Quantise = Quantised (*)(const void* x, bool is_float32, int64_t depth, int8_t* out);

struct Kernels {
  Multiply bfloat16, int8;
  Quantise quantise;
};

Kernels PortableKernels();
#if defined(__x86_64__)
Kernels Avx2Kernels();
Kernels Avx512Kernels();  // AVX512-BF16 and VNNI
Kernels AmxKernels();
#endif

}  // namespace octavo
