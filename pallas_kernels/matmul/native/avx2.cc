// AVX2 and FMA: bfloat16 is widened in registers, as half of a pair is a shift and the other a mask.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "product.h"
#include "rounding.h"

namespace octavo {
namespace {

__m256 Even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }

__m256 Odd(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
}

// Some rows by one block of columns, two registers of sums a row.
template <int kRows>
void Tile(const Product& p, int64_t row, int64_t block) {
  __m256 low[kRows], high[kRows];
  for (int m = 0; m < kRows; ++m) low[m] = high[m] = _mm256_setzero_ps();
  const uint16_t* x = p.x + row * p.depth;
  const uint16_t* w = p.w + block * kColumns * p.depth;
  for (int64_t k = 0; k < p.depth; k += 2, w += 2 * kColumns) {
    __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + kColumns));
    for (int m = 0; m < kRows; ++m) {
      int32_t pair;
      memcpy(&pair, x + m * p.depth + k, sizeof pair);
      __m256i entries = _mm256_set1_epi32(pair);
      low[m] = _mm256_fmadd_ps(Even(entries), Even(first), low[m]);
      high[m] = _mm256_fmadd_ps(Even(entries), Even(second), high[m]);
      low[m] = _mm256_fmadd_ps(Odd(entries), Odd(first), low[m]);
      high[m] = _mm256_fmadd_ps(Odd(entries), Odd(second), high[m]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    alignas(32) float sums[kColumns];
    _mm256_store_ps(sums, low[m]);
    _mm256_store_ps(sums + 8, high[m]);
    StoreBlock(p, row + m, block, sums);
  }
}

}  // namespace

void MultiplyAvx2(const Product& p, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) Tile<4>(p, row, block);
    for (; row < p.rows; ++row) Tile<1>(p, row, block);
  }
}

}  // namespace octavo
