// AVX512-BF16: `vdpbf16ps` multiplies 16 columns by a pair of a row's entries.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "product.h"
#include "rows.inc"

namespace octavo {
namespace {

void Store(const Product& p, int64_t row, int64_t block, __m512 sums) {
  const int64_t at = row * p.stride + block * kColumns;
  if (p.is_float32) {
    if (p.add) sums = _mm512_add_ps(_mm512_loadu_ps(p.add + at), sums);
    _mm512_storeu_ps(static_cast<float*>(p.y) + at, sums);
  } else {
    __m256bh rounded = _mm512_cvtneps_pbh(sums);
    memcpy(static_cast<uint16_t*>(p.y) + at, &rounded, sizeof rounded);
  }
}

// Some rows by two blocks of columns, or by one: as many sums as hide the latency of a product.
template <int kRows, int kBlocks>
void Tile(const Product& p, int64_t row, int64_t block) {
  __m512 sums[kRows][kBlocks];
  for (auto& of_row : sums) {
    for (auto& sum : of_row) sum = _mm512_setzero_ps();
  }
  const uint16_t* x = p.x + row * p.depth;
  const uint16_t* w = p.w + block * kColumns * p.depth;
  for (int64_t k = 0; k < p.depth; k += 2, w += 2 * kColumns) {
    __m512bh columns[kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      columns[b] = (__m512bh)_mm512_loadu_si512(w + b * kColumns * p.depth);
    }
    for (int m = 0; m < kRows; ++m) {
      int32_t pair;
      memcpy(&pair, x + m * p.depth + k, sizeof pair);
      __m512bh entries = (__m512bh)_mm512_set1_epi32(pair);
      for (int b = 0; b < kBlocks; ++b) {
        sums[m][b] = _mm512_dpbf16_ps(sums[m][b], entries, columns[b]);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int b = 0; b < kBlocks; ++b) Store(p, row + m, block + b, sums[m][b]);
  }
}

template <int kBlocks>
void Rows(const Product& p, int64_t block) {
  int64_t row = 0;
  for (; row + 8 <= p.rows; row += 8) Tile<8, kBlocks>(p, row, block);
  if (row + 4 <= p.rows) {
    Tile<4, kBlocks>(p, row, block);
    row += 4;
  }
  switch (p.rows - row) {
    case 3: return Tile<3, kBlocks>(p, row, block);
    case 2: return Tile<2, kBlocks>(p, row, block);
    case 1: return Tile<1, kBlocks>(p, row, block);
  }
}

void Multiply(const Product& p) {
  int64_t block = 0;
  if (p.rows == 1) {  // each sum waits for the one before it: more of them at once
    for (; block + 8 <= p.blocks; block += 8) Tile<1, 8>(p, 0, block);
    if (block + 4 <= p.blocks) {
      Tile<1, 4>(p, 0, block);
      block += 4;
    }
    if (block + 3 == p.blocks) return Tile<1, 3>(p, 0, block);
  }
  for (; block + 2 <= p.blocks; block += 2) Rows<2>(p, block);
  if (block < p.blocks) Rows<1>(p, block);
}

}  // namespace

const Kernel kAvx512 = {Multiply, Normalise, Activate, FindBest};

}  // namespace octavo
