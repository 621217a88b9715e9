// What every instruction set's kernel computes.
//
// Each kernel is a translation unit of its own, compiled for its instructions. None may use
// anything inline of a library: the linker keeps one copy, and it may be the one with instructions
// that another processor lacks.

#pragma once

#include <cstdint>

namespace octavo {

constexpr int kColumns = 16;  // of a block of packed weights

// y = x @ w, or add + x @ w, for some columns of a matrix.
//
// x and w are in words of four bytes, what instructions multiply at once: two entries in bfloat16,
// whose sums are float32; or four in int8, whose sums are int32, which holds them exactly. In int8 a
// row of x is two: entry i is x_scales[row] * (first[i] + second[i] / kSteps). Else rounding it would
// cost several times what rounding the weights does.
struct Product {
  const uint32_t* x;  // [rows, words], or in int8 [rows, 2, words]
  const uint32_t* w;  // [blocks, words, 16]
  void* y;            // float32[rows, blocks * 16] or bfloat16, a row `stride` after the last one
  const float* add;   // as y lies, which is float32 then; or null
  int64_t rows, words, blocks, stride;
  bool is_float32;    // y
  // In int8 alone, else null.
  const float* w_scales;  // what one stands for in each column
  const float* x_scales;
  const int32_t* x_sums;  // of each of the two rows
};

constexpr float kSteps = 254.0f;  // that the rest of an entry is counted in, of one of the first's

struct Best {
  float score;
  int32_t index;
};

struct Kernel {
  void (*multiply)(const Product&);       // bfloat16
  void (*multiply_int8)(const Product&);
  // RMS norm of float32 rows: y[i] = x[i] / sqrt(mean(x ** 2) + epsilon) * scale[i].
  void (*normalise)(const float* x, const uint16_t* scale, float epsilon, int64_t rows,
                    int64_t width, uint16_t* y);
  // y[i] = silu(gate[i]) * up[i].
  void (*activate)(const float* gate, const float* up, int64_t count, uint16_t* y);
  // Finds the first of the highest scores, and any of them where some are not numbers.
  Best (*best)(const float* scores, int64_t count);
  // A row in int8, as `Product` has it: y is [2, depth], `sums` has two entries; returns the scale.
  // That isn't a number if anything in the row isn't finite, and zero for a row of zeros, or for
  // what might as well be zeros.
  float (*quantise)(const uint16_t* x, int64_t depth, int8_t* y, int32_t* sums);
};

extern const Kernel kPortable;
#if defined(__x86_64__)
extern const Kernel kAvx2;
extern const Kernel kAvx512;  // AVX512-BF16 and VNNI
extern const Kernel kAmx;
#endif

}  // namespace octavo
