// For any processor, in plain C++: slower than XLA's own products, and a second opinion in tests.

#include <cstdint>

#include "bfloat16.h"
#include "product.h"
#include "rows.inc"
#include "store.h"

namespace octavo {
namespace {

void Multiply(const Product& p) {
  for (int64_t block = 0; block < p.blocks; ++block) {
    for (int64_t row = 0; row < p.rows; ++row) {
      float sums[kColumns] = {};
      const uint16_t* x = p.x + row * p.depth;
      const uint16_t* w = p.w + block * kColumns * p.depth;
      for (int64_t k = 0; k < p.depth; k += 2, w += 2 * kColumns) {
        float even = Widened(x[k]);
        float odd = Widened(x[k + 1]);
        for (int n = 0; n < kColumns; ++n) {
          sums[n] += even * Widened(w[2 * n]) + odd * Widened(w[2 * n + 1]);
        }
      }
      StoreBlock(p, row, block, sums);
    }
  }
}

}  // namespace

const Kernel kPortable = {Multiply, Normalise, Activate, FindBest};

}  // namespace octavo
