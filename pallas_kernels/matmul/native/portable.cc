// For any processor, in plain C++: slower than XLA's own products, and a second opinion in tests.

#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "product.h"
#include "rows.inc"
#include "store.h"

namespace octavo {
namespace {

void Multiply(const Product& p) {
  const auto low = [](uint32_t pair) { return Widened(static_cast<uint16_t>(pair)); };
  for (int64_t block = 0; block < p.blocks; ++block) {
    for (int64_t row = 0; row < p.rows; ++row) {
      float sums[kColumns] = {};
      const uint32_t* x = p.x + row * p.words;
      const uint32_t* w = p.w + block * kColumns * p.words;
      for (int64_t k = 0; k < p.words; ++k, w += kColumns) {
        float even = low(x[k]);
        float odd = low(x[k] >> 16);
        for (int n = 0; n < kColumns; ++n) sums[n] += even * low(w[n]) + odd * low(w[n] >> 16);
      }
      StoreBlock(p, row, block, sums);
    }
  }
}

void MultiplyInt8(const Product& p) {
  for (int64_t block = 0; block < p.blocks; ++block) {
    for (int64_t row = 0; row < p.rows; ++row) {
      int32_t sums[2][kColumns] = {};
      for (int part = 0; part < 2; ++part) {
        const auto* x = reinterpret_cast<const int8_t*>(p.x + (2 * row + part) * p.words);
        const auto* w = reinterpret_cast<const int8_t*>(p.w + block * kColumns * p.words);
        for (int64_t k = 0; k < 4 * p.words; k += 4, w += 4 * kColumns) {
          for (int n = 0; n < 4 * kColumns; ++n) sums[part][n / 4] += x[k + n % 4] * w[n];
        }
      }
      StoreBlock(p, row, block, sums[0], sums[1]);
    }
  }
}

}  // namespace

const Kernel kPortable = {Multiply, MultiplyInt8, Normalise, Activate, FindBest, Quantise};

}  // namespace octavo
