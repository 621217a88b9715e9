// AVX2 and FMA: bfloat16 is widened in registers, as half of a pair is a shift and the other a mask.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "product.h"
#include "rows.inc"
#include "store.h"

namespace octavo {
namespace {

__m256 Even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }

__m256 Odd(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
}

// Some rows by some blocks of columns, two registers of sums for each: as many as hide the latency
// of a product, as each sum waits for the one before it.
template <int kRows, int kBlocks>
void Tile(const Product& p, int64_t row, int64_t block) {
  __m256 low[kRows][kBlocks], high[kRows][kBlocks];
  for (int m = 0; m < kRows; ++m) {
    for (int b = 0; b < kBlocks; ++b) low[m][b] = high[m][b] = _mm256_setzero_ps();
  }
  const uint16_t* x = p.x + row * p.depth;
  const uint16_t* w = p.w + block * kColumns * p.depth;
  for (int64_t k = 0; k < p.depth; k += 2, w += 2 * kColumns) {
    for (int b = 0; b < kBlocks; ++b) {
      const uint16_t* at = w + b * kColumns * p.depth;
      __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
      __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + kColumns));
      for (int m = 0; m < kRows; ++m) {
        int32_t pair;
        memcpy(&pair, x + m * p.depth + k, sizeof pair);
        __m256i entries = _mm256_set1_epi32(pair);
        low[m][b] = _mm256_fmadd_ps(Even(entries), Even(first), low[m][b]);
        high[m][b] = _mm256_fmadd_ps(Even(entries), Even(second), high[m][b]);
        low[m][b] = _mm256_fmadd_ps(Odd(entries), Odd(first), low[m][b]);
        high[m][b] = _mm256_fmadd_ps(Odd(entries), Odd(second), high[m][b]);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int b = 0; b < kBlocks; ++b) {
      alignas(32) float sums[kColumns];
      _mm256_store_ps(sums, low[m][b]);
      _mm256_store_ps(sums + 8, high[m][b]);
      StoreBlock(p, row + m, block + b, sums);
    }
  }
}

// One row: blocks side by side are all that there is to do at once.
void Row(const Product& p, int64_t row) {
  int64_t block = 0;
  for (; block + 4 <= p.blocks; block += 4) Tile<1, 4>(p, row, block);
  switch (p.blocks - block) {
    case 3: return Tile<1, 3>(p, row, block);
    case 2: return Tile<1, 2>(p, row, block);
    case 1: return Tile<1, 1>(p, row, block);
  }
}

void Multiply(const Product& p) {
  const int64_t fours = p.rows / 4 * 4, left = p.rows - fours;
  for (int64_t block = 0; block < p.blocks; ++block) {
    for (int64_t row = 0; row < fours; row += 4) Tile<4, 1>(p, row, block);
    if (left == 3) Tile<3, 1>(p, fours, block);
    if (left == 2) Tile<2, 1>(p, fours, block);
  }
  if (left == 1) Row(p, fours);
}

}  // namespace

const Kernel kAvx2 = {Multiply, Normalise, Activate, FindBest};

}  // namespace octavo
