// For any processor, in plain C++: slower than XLA's own products, and a second opinion in tests.

#include <cstdint>

#include "bfloat16.h"
#include "product.h"
#include "rounding.h"

namespace octavo {

void MultiplyPortable(const Product& p, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
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

}  // namespace octavo
