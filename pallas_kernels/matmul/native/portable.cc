// For any processor, in plain C++: slower than XLA's own products, and a second opinion in tests.

#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "product.h"
#include "quantise.h"
#include "rounding.h"

namespace octavo {
namespace {

struct Bf16 {
  using Sum = float;
  static float Multiply(uint32_t x, uint32_t w) {
    const auto low = [](uint32_t pair) { return Widened(static_cast<uint16_t>(pair)); };
    return low(x) * low(w) + low(x >> 16) * low(w >> 16);
  }
};

struct Int8 {
  using Sum = int32_t;
  static int32_t Multiply(uint32_t x, uint32_t w) {
    int8_t of_x[4], of_w[4];
    memcpy(of_x, &x, sizeof x);
    memcpy(of_w, &w, sizeof w);
    return of_x[0] * of_w[0] + of_x[1] * of_w[1] + of_x[2] * of_w[2] + of_x[3] * of_w[3];
  }
};

template <typename Kind>
void MultiplyBlocks(const Product& p, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    for (int64_t row = 0; row < p.rows; ++row) {
      typename Kind::Sum sums[kColumns] = {};
      const uint32_t* x = p.x + row * p.words;
      const uint32_t* w = p.w + block * kColumns * p.words;
      for (int64_t k = 0; k < p.words; ++k, w += kColumns) {
        for (int n = 0; n < kColumns; ++n) sums[n] += Kind::Multiply(x[k], w[n]);
      }
      StoreBlock(p, row, block, sums);
    }
  }
}

}  // namespace

Kernels PortableKernels() {
  return {MultiplyBlocks<Bf16>, MultiplyBlocks<Int8>, QuantiseAny};
}

}  // namespace octavo
