// What every instruction set's kernel computes.
//
// Each kernel is a translation unit of its own, compiled for its instructions. None may use
// anything inline of a library: the linker keeps one copy, and it may be the one with instructions
// that another processor lacks.

#pragma once

#include <cstdint>

namespace octavo {

constexpr int kColumns = 16;  // of a block of packed weights

// y = x @ w, or add + x @ w, for some columns of a matrix; in bfloat16 with float32 sums.
struct Product {
  const uint16_t* x;  // bfloat16[rows, depth]
  const uint16_t* w;  // bfloat16[blocks, depth / 2, 16, 2]
  void* y;            // float32[rows, blocks * 16] or bfloat16, a row `stride` after the last one
  const float* add;   // as y lies, which is float32 then; or null
  int64_t rows, depth, blocks, stride;
  bool is_float32;    // y
};

struct Best {
  float score;
  int32_t index;
};

struct Kernel {
  void (*multiply)(const Product&);
  // RMS norm of float32 rows: y[i] = x[i] / sqrt(mean(x ** 2) + epsilon) * scale[i].
  void (*normalise)(const float* x, const uint16_t* scale, float epsilon, int64_t rows,
                    int64_t width, uint16_t* y);
  // y[i] = silu(gate[i]) * up[i].
  void (*activate)(const float* gate, const float* up, int64_t count, uint16_t* y);
  // Finds the first of the highest scores, and any of them where some are not numbers.
  Best (*best)(const float* scores, int64_t count);
};

extern const Kernel kPortable;
#if defined(__x86_64__)
extern const Kernel kAvx2;
extern const Kernel kAvx512;  // AVX512-BF16
extern const Kernel kAmx;
#endif

}  // namespace octavo
