// AVX2 and FMA. bfloat16 is widened in registers, as half of a pair is a shift and the other a mask;
// int8 is multiplied in pairs.

#include <immintrin.h>

#include <cstdint>

#include "product.h"
#include "quantise.h"
#include "rounding.h"

namespace octavo {
namespace {

struct Bf16 {
  using Sum = __m256;
  using Entry = float;
  static Sum Zero() { return _mm256_setzero_ps(); }
  static Sum MultiplyAdd(Sum sum, __m256i entries, __m256i columns) {
    sum = _mm256_fmadd_ps(Even(entries), Even(columns), sum);
    return _mm256_fmadd_ps(Odd(entries), Odd(columns), sum);
  }
  static void Save(Entry* to, Sum sum) { _mm256_store_ps(to, sum); }

 private:
  static __m256 Even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static __m256 Odd(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
  }
};

// `vpmaddubsw` takes one side without a sign, so the sign of x goes to the weights; 2 * 127 * 127
// fits 16 bits.
struct Int8 {
  using Sum = __m256i;
  using Entry = int32_t;
  static Sum Zero() { return _mm256_setzero_si256(); }
  static Sum MultiplyAdd(Sum sum, __m256i entries, __m256i columns) {
    __m256i pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8(entries), _mm256_sign_epi8(columns, entries));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static void Save(Entry* to, Sum sum) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), sum); }
};

// Some rows by some blocks of columns, two registers of sums for each: as many as hide the latency
// of a product, as each sum waits for the one before it.
template <typename Kind, int kRows, int kBlocks>
void Tile(const Product& p, int64_t row, int64_t block) {
  typename Kind::Sum low[kRows][kBlocks], high[kRows][kBlocks];
  for (int m = 0; m < kRows; ++m) {
    for (int b = 0; b < kBlocks; ++b) low[m][b] = high[m][b] = Kind::Zero();
  }
  const uint32_t* x = p.x + row * p.words;
  const uint32_t* w = p.w + block * kColumns * p.words;
  for (int64_t k = 0; k < p.words; ++k, w += kColumns) {
    for (int b = 0; b < kBlocks; ++b) {
      const auto* at = reinterpret_cast<const __m256i*>(w + b * kColumns * p.words);
      __m256i first = _mm256_loadu_si256(at);
      __m256i second = _mm256_loadu_si256(at + 1);
      for (int m = 0; m < kRows; ++m) {
        __m256i entries = _mm256_set1_epi32(static_cast<int>(x[m * p.words + k]));
        low[m][b] = Kind::MultiplyAdd(low[m][b], entries, first);
        high[m][b] = Kind::MultiplyAdd(high[m][b], entries, second);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int b = 0; b < kBlocks; ++b) {
      alignas(32) typename Kind::Entry sums[kColumns];
      Kind::Save(sums, low[m][b]);
      Kind::Save(sums + 8, high[m][b]);
      StoreBlock(p, row + m, block + b, sums);
    }
  }
}

// One row: blocks side by side are all that there is to do at once.
template <typename Kind>
void Row(const Product& p, int64_t row, int64_t first, int64_t last) {
  int64_t block = first;
  for (; block + 4 <= last; block += 4) Tile<Kind, 1, 4>(p, row, block);
  switch (last - block) {
    case 3: return Tile<Kind, 1, 3>(p, row, block);
    case 2: return Tile<Kind, 1, 2>(p, row, block);
    case 1: return Tile<Kind, 1, 1>(p, row, block);
  }
}

template <typename Kind>
void MultiplyBlocks(const Product& p, int64_t first, int64_t last) {
  const int64_t fours = p.rows / 4 * 4, left = p.rows - fours;
  for (int64_t block = first; block < last; ++block) {
    for (int64_t row = 0; row < fours; row += 4) Tile<Kind, 4, 1>(p, row, block);
    if (left == 3) Tile<Kind, 3, 1>(p, fours, block);
    if (left == 2) Tile<Kind, 2, 1>(p, fours, block);
  }
  if (left == 1) Row<Kind>(p, fours, first, last);
}

}  // namespace

Kernels Avx2Kernels() { return {MultiplyBlocks<Bf16>, MultiplyBlocks<Int8>, QuantiseAny}; }

}  // namespace octavo
