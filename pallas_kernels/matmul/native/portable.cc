// For any processor, in plain C++: slower than XLA's own products, and a second opinion in tests.

#include <cstdint>
#include <cstring>

#include "product.h"
#include "rounding.h"

namespace octavo {
namespace {

float FromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

void MultiplyPortable(const Product& p, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    for (int64_t row = 0; row < p.rows; ++row) {
      float sums[kColumns] = {};
      const uint16_t* x = p.x + row * p.depth;
      const uint16_t* w = p.w + block * kColumns * p.depth;
      for (int64_t k = 0; k < p.depth; k += 2, w += 2 * kColumns) {
        float even = FromBits(static_cast<uint32_t>(x[k]) << 16);
        float odd = FromBits(static_cast<uint32_t>(x[k + 1]) << 16);
        for (int n = 0; n < kColumns; ++n) {
          uint32_t pair;
          memcpy(&pair, w + 2 * n, sizeof pair);
          sums[n] += even * FromBits(pair << 16) + odd * FromBits(pair & 0xffff0000);
        }
      }
      StoreBlock(p, row, block, sums);
    }
  }
}

}  // namespace octavo
