// AVX512: `vdpbf16ps` multiplies 16 columns by a pair of a row's entries in bfloat16, `vpdpbusd` by
// four in int8.

#include <immintrin.h>

#include <cstdint>

#include "product.h"
#include "rows.inc"
#include "store512.h"

namespace octavo {
namespace {

struct Bf16 {
  using Sum = __m512;
  static constexpr int kParts = 1;  // of a row
  static Sum Start(const Product&, int64_t) { return _mm512_setzero_ps(); }
  static __m512i Columns(__m512i words) { return words; }
  static Sum MultiplyAdd(Sum sum, __m512i entries, __m512i columns) {
    return _mm512_dpbf16_ps(sum, (__m512bh)entries, (__m512bh)columns);
  }
  static void Save(const Product& p, int64_t row, int64_t block, Sum sum, Sum) {
    Store(p, row, block, sum);
  }
};

// The instruction takes one side without a sign. So weights are moved up by 128 as they are read,
// and sums start 128 times the sum of x below zero; they may wrap round on the way.
struct Int8 {
  using Sum = __m512i;
  static constexpr int kParts = 2;
  static Sum Start(const Product& p, int64_t row) { return _mm512_set1_epi32(-128 * p.x_sums[row]); }
  static __m512i Columns(__m512i words) {
    return _mm512_xor_si512(words, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static Sum MultiplyAdd(Sum sum, __m512i entries, __m512i columns) {
    return _mm512_dpbusd_epi32(sum, columns, entries);
  }
  static void Save(const Product& p, int64_t row, int64_t block, Sum first, Sum rest) {
    Store(p, row, block, first, rest);
  }
};

// Some rows, or parts of rows, by two blocks of columns, or by one: as many sums as hide the latency
// of a product.
template <typename Kind, int kRows, int kBlocks>
void Tile(const Product& p, int64_t row, int64_t block) {
  typename Kind::Sum sums[kRows][kBlocks];
  for (int m = 0; m < kRows; ++m) {
    for (auto& sum : sums[m]) sum = Kind::Start(p, row + m);
  }
  const uint32_t* x = p.x + row * p.words;
  const uint32_t* w = p.w + block * kColumns * p.words;
  for (int64_t k = 0; k < p.words; ++k, w += kColumns) {
    __m512i columns[kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      columns[b] = Kind::Columns(_mm512_loadu_si512(w + b * kColumns * p.words));
    }
    for (int m = 0; m < kRows; ++m) {
      __m512i entries = _mm512_set1_epi32(static_cast<int>(x[m * p.words + k]));
      for (int b = 0; b < kBlocks; ++b) {
        sums[m][b] = Kind::MultiplyAdd(sums[m][b], entries, columns[b]);
      }
    }
  }
  constexpr int kParts = Kind::kParts;
  for (int m = 0; m < kRows; m += kParts) {
    for (int b = 0; b < kBlocks; ++b) {
      Kind::Save(p, (row + m) / kParts, block + b, sums[m][b], sums[m + kParts - 1][b]);
    }
  }
}

template <typename Kind, int kBlocks>
void Rows(const Product& p, int64_t block) {
  const int64_t rows = p.rows * Kind::kParts;
  int64_t row = 0;
  for (; row + 8 <= rows; row += 8) Tile<Kind, 8, kBlocks>(p, row, block);
  if (row + 4 <= rows) {
    Tile<Kind, 4, kBlocks>(p, row, block);
    row += 4;
  }
  if (row + 2 <= rows) {
    Tile<Kind, 2, kBlocks>(p, row, block);
    row += 2;
  }
  if constexpr (Kind::kParts == 1) {
    if (row < rows) Tile<Kind, 1, kBlocks>(p, row, block);
  }
}

// One row, for which the kernel is as quick as memory: each sum waits for the one before it, so there
// are more of them at once.
template <typename Kind>
void Row(const Product& p) {
  constexpr int kRows = Kind::kParts;
  int64_t block = 0;
  for (; block + 8 <= p.blocks; block += 8) Tile<Kind, kRows, 8>(p, 0, block);
  if (block + 4 <= p.blocks) {
    Tile<Kind, kRows, 4>(p, 0, block);
    block += 4;
  }
  switch (p.blocks - block) {
    case 3: return Tile<Kind, kRows, 3>(p, 0, block);
    case 2: return Tile<Kind, kRows, 2>(p, 0, block);
    case 1: return Tile<Kind, kRows, 1>(p, 0, block);
  }
}

template <typename Kind>
void Multiply(const Product& p) {
  if (p.rows == 1) return Row<Kind>(p);
  int64_t block = 0;
  for (; block + 2 <= p.blocks; block += 2) Rows<Kind, 2>(p, block);
  if (block < p.blocks) Rows<Kind, 1>(p, block);
}

}  // namespace

const Kernel kAvx512 = {Multiply<Bf16>, Multiply<Int8>, Normalise,
                        Activate,       FindBest,       Quantise};

}  // namespace octavo
