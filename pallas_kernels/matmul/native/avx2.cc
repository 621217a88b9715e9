// AVX2 and FMA. bfloat16 is widened in registers, as half of a pair is a shift and the other a mask;
// int8 is multiplied in pairs.

#include <immintrin.h>

#include <cstdint>

#include "product.h"
#include "rows.inc"
#include "store.h"

namespace octavo {
namespace {

__m256 Even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }

__m256 Odd(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
}

struct Bf16 {
  using Sum = __m256;
  static constexpr int kParts = 1;  // of a row
  static Sum Zero() { return _mm256_setzero_ps(); }
  static Sum MultiplyAdd(Sum sum, __m256i entries, __m256i columns) {
    sum = _mm256_fmadd_ps(Even(entries), Even(columns), sum);
    return _mm256_fmadd_ps(Odd(entries), Odd(columns), sum);
  }
  static void Save(const Product& p, int64_t row, int64_t block, const Sum (&sums)[1][2]) {
    alignas(32) float of_row[kColumns];
    _mm256_store_ps(of_row, sums[0][0]);
    _mm256_store_ps(of_row + 8, sums[0][1]);
    StoreBlock(p, row, block, of_row);
  }
};

// `vpmaddubsw` takes one side without a sign, so the sign of x goes to the weights; 2 * 127 * 127
// fits 16 bits.
struct Int8 {
  using Sum = __m256i;
  static constexpr int kParts = 2;
  static Sum Zero() { return _mm256_setzero_si256(); }
  static Sum MultiplyAdd(Sum sum, __m256i entries, __m256i columns) {
    __m256i pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8(entries), _mm256_sign_epi8(columns, entries));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static void Save(const Product& p, int64_t row, int64_t block, const Sum (&sums)[2][2]) {
    alignas(32) int32_t of_row[2][kColumns];
    for (int part = 0; part < 2; ++part) {
      auto* to = reinterpret_cast<__m256i*>(of_row[part]);
      _mm256_store_si256(to, sums[part][0]);
      _mm256_store_si256(to + 1, sums[part][1]);
    }
    StoreBlock(p, row, block, of_row[0], of_row[1]);
  }
};

// Some rows, or parts of rows, by some blocks of columns, two registers of sums for each: as many as
// hide the latency of a product, as each sum waits for the one before it.
template <typename Kind, int kRows, int kBlocks>
void Tile(const Product& p, int64_t row, int64_t block) {
  using Sum = typename Kind::Sum;
  Sum sums[kBlocks][kRows][2];
  for (auto& of_block : sums) {
    for (auto& of_row : of_block) of_row[0] = of_row[1] = Kind::Zero();
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
        sums[b][m][0] = Kind::MultiplyAdd(sums[b][m][0], entries, first);
        sums[b][m][1] = Kind::MultiplyAdd(sums[b][m][1], entries, second);
      }
    }
  }
  constexpr int kParts = Kind::kParts;
  for (int m = 0; m < kRows; m += kParts) {
    for (int b = 0; b < kBlocks; ++b) {
      const auto& of_row = reinterpret_cast<const Sum(&)[kParts][2]>(sums[b][m]);
      Kind::Save(p, (row + m) / kParts, block + b, of_row);
    }
  }
}

// One row: blocks side by side are all that there is to do at once.
template <typename Kind>
void Row(const Product& p, int64_t row) {
  constexpr int kRows = Kind::kParts, kBlocks = 4 / kRows;
  int64_t block = 0;
  for (; block + kBlocks <= p.blocks; block += kBlocks) Tile<Kind, kRows, kBlocks>(p, row, block);
  for (; block < p.blocks; ++block) Tile<Kind, kRows, 1>(p, row, block);
}

template <typename Kind>
void Multiply(const Product& p) {
  constexpr int kParts = Kind::kParts;
  const int64_t rows = p.rows * kParts, fours = rows / 4 * 4, left = rows - fours;
  for (int64_t block = 0; block < p.blocks; ++block) {
    for (int64_t row = 0; row < fours; row += 4) Tile<Kind, 4, 1>(p, row, block);
    if constexpr (kParts == 1) {
      if (left == 3) Tile<Kind, 3, 1>(p, fours, block);
      if (left == 2) Tile<Kind, 2, 1>(p, fours, block);
    }
  }
  if (left == kParts) Row<Kind>(p, fours);
}

}  // namespace

const Kernel kAvx2 = {Multiply<Bf16>, Multiply<Int8>, Normalise, Activate, FindBest, Quantise};

}  // namespace octavo
