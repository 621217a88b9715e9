// AMX: `tdpbf16ps` multiplies 16 rows by 16 columns, 32 deep. A block of packed weights is, 32 deep,
// just a tile as the instruction wants it.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "product.h"
#include "rows.inc"

namespace octavo {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileDepth = 32;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 to 5 rows of x, 6 to 7 weights.
void Configure(int first_rows, int second_rows) {
  TileConfig config;
  const int rows[8] = {first_rows, first_rows, second_rows, second_rows,
                       first_rows, second_rows, kTileRows, kTileRows};
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(rows[tile] ? rows[tile] : 1);
  }
  // GCC 12 takes the instruction to read eight bytes, and may leave out what was stored after them.
  asm volatile("" : : "m"(config));
  _tile_loadconfig(&config);
}

void Store(const Product& p, int64_t row, int rows, int64_t block, const float* sums) {
  for (int m = 0; m < rows; ++m) {
    const int64_t at = (row + m) * p.stride + block * kColumns;
    __m512 of_row = _mm512_load_ps(sums + m * kColumns);
    if (p.is_float32) {
      if (p.add) of_row = _mm512_add_ps(_mm512_loadu_ps(p.add + at), of_row);
      _mm512_storeu_ps(static_cast<float*>(p.y) + at, of_row);
    } else {
      __m256bh rounded = _mm512_cvtneps_pbh(of_row);
      memcpy(static_cast<uint16_t*>(p.y) + at, &rounded, sizeof rounded);
    }
  }
}

// Up to 16 rows by four blocks of columns. Tiles 4 is x, 5 to 7 weights in turn.
template <int kBlocks>
void FewRows(const Product& p, int64_t row, int rows, int64_t block) {
  const uint16_t* x = p.x + row * p.depth;
  const uint16_t* w = p.w + block * kColumns * p.depth;
  const int64_t stride = kColumns * p.depth;
  _tile_zero(0);
  if (kBlocks > 1) _tile_zero(1);
  if (kBlocks > 2) _tile_zero(2);
  if (kBlocks > 3) _tile_zero(3);
  for (int64_t k = 0; k < p.depth; k += kTileDepth) {
    const uint16_t* at = w + k * kColumns;
    _tile_loadd(4, x + k, p.depth * 2);
    _tile_loadd(6, at, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kBlocks > 1) {
      _tile_loadd(7, at + stride, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kBlocks > 2) {
      _tile_loadd(6, at + 2 * stride, 64);
      _tile_dpbf16ps(2, 4, 6);
    }
    if (kBlocks > 3) {
      _tile_loadd(7, at + 3 * stride, 64);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  alignas(64) float sums[kTileRows * kColumns];
  _tile_stored(0, sums, 64);
  Store(p, row, rows, block, sums);
  if (kBlocks > 1) {
    _tile_stored(1, sums, 64);
    Store(p, row, rows, block + 1, sums);
  }
  if (kBlocks > 2) {
    _tile_stored(2, sums, 64);
    Store(p, row, rows, block + 2, sums);
  }
  if (kBlocks > 3) {
    _tile_stored(3, sums, 64);
    Store(p, row, rows, block + 3, sums);
  }
}

// 16 rows, and up to 16 more, by two blocks of columns: each tile that is loaded serves two products.
// Rows pass by the nearest cache, which keeps the weights for those that follow.
void ManyRows(const Product& p, int64_t row, int second_rows, int64_t block) {
  const uint16_t* x = p.x + row * p.depth;
  const uint16_t* w = p.w + block * kColumns * p.depth;
  const int64_t below = kTileRows * p.depth, beside = kColumns * p.depth;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < p.depth; k += kTileDepth) {
    _tile_stream_loadd(4, x + k, p.depth * 2);
    _tile_loadd(6, w + k * kColumns, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + beside + k * kColumns, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, x + below + k, p.depth * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[4][kTileRows * kColumns];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  Store(p, row, kTileRows, block, sums[0]);
  Store(p, row, kTileRows, block + 1, sums[1]);
  Store(p, row + kTileRows, second_rows, block, sums[2]);
  Store(p, row + kTileRows, second_rows, block + 1, sums[3]);
}

void Columns(const Product& p, int64_t row, int rows) {
  int64_t block = 0;
  for (; block + 4 <= p.blocks; block += 4) FewRows<4>(p, row, rows, block);
  switch (p.blocks - block) {
    case 3: return FewRows<3>(p, row, rows, block);
    case 2: return FewRows<2>(p, row, rows, block);
    case 1: return FewRows<1>(p, row, rows, block);
  }
}

void Multiply(const Product& p) {
  // Rows go by pairs of tiles, of which the last may be smaller; up to 16 may be left over.
  constexpr int64_t kPair = 2 * kTileRows;
  const int64_t left = p.rows % kPair;
  const int64_t paired = left > kTileRows ? p.rows : p.rows - left;
  int64_t block = 0;
  for (; paired && block + 2 <= p.blocks; block += 2) {
    for (int64_t row = 0; row < paired; row += kPair) {
      const int64_t second = paired - row < kPair ? paired - row - kTileRows : kTileRows;
      if (row == 0 || second < kTileRows) Configure(kTileRows, static_cast<int>(second));
      ManyRows(p, row, static_cast<int>(second), block);
    }
  }
  for (int64_t row = 0; block < p.blocks && row < paired; row += kTileRows) {  // an odd block
    const int rows = static_cast<int>(paired - row < kTileRows ? paired - row : kTileRows);
    if (row == 0 || rows < kTileRows) Configure(rows, rows);
    FewRows<1>(p, row, rows, block);
  }
  if (paired < p.rows) {
    const int rows = static_cast<int>(p.rows - paired);
    Configure(rows, rows);
    Columns(p, paired, rows);
  }
  _tile_release();
}

}  // namespace

const Kernel kAmx = {Multiply, Normalise, Activate, FindBest};

}  // namespace octavo
