// AMX: `tdpbf16ps` and `tdpbssd` multiply 16 rows by 16 columns, 16 words deep. A block of packed
// weights is, so deep, just a tile as the instructions want it.

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "product.h"
#include "rows.inc"
#include "store512.h"

namespace octavo {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileWords = 16;

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

struct Bf16 {
  static constexpr int kParts = 1;  // of a row
  static void Save(const Product& p, int64_t row, int64_t block, const uint32_t* sums) {
    Store(p, row, block, _mm512_load_ps(sums));
  }
};

struct Int8 {
  static constexpr int kParts = 2;
  static void Save(const Product& p, int64_t row, int64_t block, const uint32_t* sums) {
    Store(p, row, block, _mm512_load_si512(sums), _mm512_load_si512(sums + kColumns));
  }
};

// Which tiles it takes is written into the instruction, so this can't be a function.
#define OCTAVO_MULTIPLY_ADD(sums, x, w)          \
  if constexpr (std::is_same_v<Kind, Int8>) {    \
    _tile_dpbssd(sums, x, w);                    \
  } else {                                       \
    _tile_dpbf16ps(sums, x, w);                  \
  }

// A tile's rows are parts of rows.
template <typename Kind>
void StoreTile(const Product& p, int64_t row, int rows, int64_t block, const uint32_t* sums) {
  for (int m = 0; m < rows; m += Kind::kParts) {
    Kind::Save(p, (row + m) / Kind::kParts, block, sums + m * kColumns);
  }
}

// Up to 16 rows by four blocks of columns. Tiles 4 is x, 5 to 7 weights in turn.
template <typename Kind, int kBlocks>
void FewRows(const Product& p, int64_t row, int rows, int64_t block) {
  const uint32_t* x = p.x + row * p.words;
  const uint32_t* w = p.w + block * kColumns * p.words;
  const int64_t stride = kColumns * p.words;
  _tile_zero(0);
  if (kBlocks > 1) _tile_zero(1);
  if (kBlocks > 2) _tile_zero(2);
  if (kBlocks > 3) _tile_zero(3);
  for (int64_t k = 0; k < p.words; k += kTileWords) {
    const uint32_t* at = w + k * kColumns;
    _tile_loadd(4, x + k, p.words * 4);
    _tile_loadd(6, at, 64);
    OCTAVO_MULTIPLY_ADD(0, 4, 6);
    if (kBlocks > 1) {
      _tile_loadd(7, at + stride, 64);
      OCTAVO_MULTIPLY_ADD(1, 4, 7);
    }
    if (kBlocks > 2) {
      _tile_loadd(6, at + 2 * stride, 64);
      OCTAVO_MULTIPLY_ADD(2, 4, 6);
    }
    if (kBlocks > 3) {
      _tile_loadd(7, at + 3 * stride, 64);
      OCTAVO_MULTIPLY_ADD(3, 4, 7);
    }
  }
  alignas(64) uint32_t sums[kTileRows * kColumns];
  _tile_stored(0, sums, 64);
  StoreTile<Kind>(p, row, rows, block, sums);
  if (kBlocks > 1) {
    _tile_stored(1, sums, 64);
    StoreTile<Kind>(p, row, rows, block + 1, sums);
  }
  if (kBlocks > 2) {
    _tile_stored(2, sums, 64);
    StoreTile<Kind>(p, row, rows, block + 2, sums);
  }
  if (kBlocks > 3) {
    _tile_stored(3, sums, 64);
    StoreTile<Kind>(p, row, rows, block + 3, sums);
  }
}

// 16 rows, and up to 16 more, by two blocks of columns: each tile that is loaded serves two products.
// Rows pass by the nearest cache, which keeps the weights for those that follow.
template <typename Kind>
void ManyRows(const Product& p, int64_t row, int second_rows, int64_t block) {
  const uint32_t* x = p.x + row * p.words;
  const uint32_t* w = p.w + block * kColumns * p.words;
  const int64_t below = kTileRows * p.words, beside = kColumns * p.words;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < p.words; k += kTileWords) {
    _tile_stream_loadd(4, x + k, p.words * 4);
    _tile_loadd(6, w + k * kColumns, 64);
    OCTAVO_MULTIPLY_ADD(0, 4, 6);
    _tile_loadd(7, w + beside + k * kColumns, 64);
    OCTAVO_MULTIPLY_ADD(1, 4, 7);
    _tile_stream_loadd(5, x + below + k, p.words * 4);
    OCTAVO_MULTIPLY_ADD(2, 5, 6);
    OCTAVO_MULTIPLY_ADD(3, 5, 7);
  }
  alignas(64) uint32_t sums[4][kTileRows * kColumns];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  StoreTile<Kind>(p, row, kTileRows, block, sums[0]);
  StoreTile<Kind>(p, row, kTileRows, block + 1, sums[1]);
  StoreTile<Kind>(p, row + kTileRows, second_rows, block, sums[2]);
  StoreTile<Kind>(p, row + kTileRows, second_rows, block + 1, sums[3]);
}

template <typename Kind>
void Columns(const Product& p, int64_t row, int rows) {
  int64_t block = 0;
  for (; block + 4 <= p.blocks; block += 4) FewRows<Kind, 4>(p, row, rows, block);
  switch (p.blocks - block) {
    case 3: return FewRows<Kind, 3>(p, row, rows, block);
    case 2: return FewRows<Kind, 2>(p, row, rows, block);
    case 1: return FewRows<Kind, 1>(p, row, rows, block);
  }
}

template <typename Kind>
void Multiply(const Product& p) {
  // Rows go by pairs of tiles, of which the last may be smaller; up to 16 may be left over.
  constexpr int64_t kPair = 2 * kTileRows;
  const int64_t all = p.rows * Kind::kParts, left = all % kPair;
  const int64_t paired = left > kTileRows ? all : all - left;
  int64_t block = 0;
  for (; paired && block + 2 <= p.blocks; block += 2) {
    for (int64_t row = 0; row < paired; row += kPair) {
      const int64_t second = paired - row < kPair ? paired - row - kTileRows : kTileRows;
      if (row == 0 || second < kTileRows) Configure(kTileRows, static_cast<int>(second));
      ManyRows<Kind>(p, row, static_cast<int>(second), block);
    }
  }
  for (int64_t row = 0; block < p.blocks && row < paired; row += kTileRows) {  // an odd block
    const int rows = static_cast<int>(paired - row < kTileRows ? paired - row : kTileRows);
    if (row == 0 || rows < kTileRows) Configure(rows, rows);
    FewRows<Kind, 1>(p, row, rows, block);
  }
  if (paired < all) {
    const int rows = static_cast<int>(all - paired);
    Configure(rows, rows);
    Columns<Kind>(p, paired, rows);
  }
  _tile_release();
}

// Most of a tile's rows in vain take longer than memory does. In int8 the sums stay the same.
void MultiplyInt8(const Product& p) {
  p.rows == 1 ? kAvx512.multiply_int8(p) : Multiply<Int8>(p);
}

}  // namespace

const Kernel kAmx = {Multiply<Bf16>, MultiplyInt8, Normalise, Activate, FindBest, Quantise};

}  // namespace octavo
