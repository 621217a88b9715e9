// AVX512: `vdpbf16ps` multiplies 16 columns by a pair of a row's entries in bfloat16, `vpdpbusd` by
// four in int8.

#include <immintrin.h>

#include <cstdint>

#include "product.h"
#include "quantise.h"
#include "store512.h"

namespace octavo {
namespace {

struct Bf16 {
  using Sum = __m512;
  static Sum Start(const Product&, int64_t) { return _mm512_setzero_ps(); }
  static __m512i Columns(__m512i words) { return words; }
  static Sum MultiplyAdd(Sum sum, __m512i entries, __m512i columns) {
    return _mm512_dpbf16_ps(sum, (__m512bh)entries, (__m512bh)columns);
  }
};

// The instruction takes one side without a sign. So weights are moved up by 128 as they are read,
// and sums start 128 times the sum of x below zero; they may wrap round on the way.
struct Int8 {
  using Sum = __m512i;
  static Sum Start(const Product& p, int64_t row) { return _mm512_set1_epi32(-128 * p.x_sums[row]); }
  static __m512i Columns(__m512i words) {
    return _mm512_xor_si512(words, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static Sum MultiplyAdd(Sum sum, __m512i entries, __m512i columns) {
    return _mm512_dpbusd_epi32(sum, columns, entries);
  }
};

// Some rows by two blocks of columns, or by one: as many sums as hide the latency of a product.
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
  for (int m = 0; m < kRows; ++m) {
    for (int b = 0; b < kBlocks; ++b) Store(p, row + m, block + b, sums[m][b]);
  }
}

template <typename Kind, int kBlocks>
void Rows(const Product& p, int64_t block) {
  int64_t row = 0;
  for (; row + 8 <= p.rows; row += 8) Tile<Kind, 8, kBlocks>(p, row, block);
  if (row + 4 <= p.rows) {
    Tile<Kind, 4, kBlocks>(p, row, block);
    row += 4;
  }
  switch (p.rows - row) {
    case 3: return Tile<Kind, 3, kBlocks>(p, row, block);
    case 2: return Tile<Kind, 2, kBlocks>(p, row, block);
    case 1: return Tile<Kind, 1, kBlocks>(p, row, block);
  }
}

template <typename Kind>
void MultiplyBlocks(const Product& p, int64_t first, int64_t last) {
  int64_t block = first;
  if (p.rows == 1) {  // each sum waits for the one before it: more of them at once
    for (; block + 8 <= last; block += 8) Tile<Kind, 1, 8>(p, 0, block);
    if (block + 4 <= last) {
      Tile<Kind, 1, 4>(p, 0, block);
      block += 4;
    }
    if (block + 3 == last) return Tile<Kind, 1, 3>(p, 0, block);
  }
  for (; block + 2 <= last; block += 2) Rows<Kind, 2>(p, block);
  if (block < last) Rows<Kind, 1>(p, block);
}

}  // namespace

Kernels Avx512Kernels() { return {MultiplyBlocks<Bf16>, MultiplyBlocks<Int8>, QuantiseAny}; }

}  // namespace octavo
