// The steps of attention on AMX (amx.cc) that know how tiles lie.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "attention.h"
#include "items.h"

namespace octavo {
namespace {

constexpr int kRows = 16;    // of a tile, and its columns of four bytes
constexpr int kDepth = 32;   // bfloat16 in a row of a tile
constexpr int kTile = 1024;  // bytes
constexpr int kChunk = 64;   // positions at a time

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void Configure() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = kRows;
  }
  // GCC 12 takes the instruction to read eight bytes, and may leave out what was stored after them.
  asm volatile("" : : "m"(config));
  _tile_loadconfig(&config);
}

// 16 by 16 words of 32 bits.
inline void Transpose(__m512i* rows) {
  __m512i pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {  // a quarter of each is one of the results, which lie four apart
    const __m512i a = fours[i], b = fours[i + 4], c = fours[i + 8], d = fours[i + 12];
    const __m512i even_ab = _mm512_shuffle_i32x4(a, b, 0x88);
    const __m512i odd_ab = _mm512_shuffle_i32x4(a, b, 0xdd);
    const __m512i even_cd = _mm512_shuffle_i32x4(c, d, 0x88);
    const __m512i odd_cd = _mm512_shuffle_i32x4(c, d, 0xdd);
    rows[i] = _mm512_shuffle_i32x4(even_ab, even_cd, 0x88);
    rows[i + 4] = _mm512_shuffle_i32x4(odd_ab, odd_cd, 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(even_ab, even_cd, 0xdd);
    rows[i + 12] = _mm512_shuffle_i32x4(odd_ab, odd_cd, 0xdd);
  }
}

// Entries that are asked for before their turn comes, a few at each step of other work. A block of
// a head is about a page, where the processor's own reading ahead ends, and the next lies anywhere.
// Asking for all of them at once would only wait for those in front.
struct Ahead {
  static constexpr int kLines = 4;
  const char* tiles[kChunk / kRows * kRows];
  int64_t size = 0;  // bytes of a tile
  int count = 0, tile = 0;
  int64_t at = 0;

  void Ask() {
    if (tile >= count) return;
    for (int i = 0; i < kLines; ++i) _mm_prefetch(tiles[tile] + at + i * 64, _MM_HINT_T1);
    at += kLines * 64;
    if (at < size) return;
    at = 0;
    ++tile;
  }

  // What comes next: a chunk of positions from one on, or the first one of the next item.
  void Begin(const Attention& a, const Item& item, const Item* next, int64_t position,
             int64_t stop) {
    count = tile = 0;
    at = 0;
    const Item* of = &item;
    if (position >= stop) {
      if (next == nullptr) return;
      of = next;
      const int64_t seen = a.positions[of->first_token] + int64_t{1};
      const int64_t in_window = seen > a.window ? seen - a.window : 0;
      position = (in_window > of->start ? in_window : of->start) / kRows * kRows;
      stop = seen < of->stop ? seen : of->stop;
    }
    size = kRows * 4 * a.head_dim;
    for (int64_t i = position; i < position + kChunk && i < stop; i += kRows) {
      const char* first;
      Find(a, *of, i, 1, &first);
      for (int64_t head = 0; head < of->kv_heads; ++head) {
        tiles[count++] = first + head * a.block_size * 4 * a.head_dim;
      }
    }
  }
};

// Values of a chunk by pairs of positions. Of 32 dimensions, the first tile has 0 to 3, 8 to 11, 16
// to 19 and 24 to 27, and the second the others. Positions outside of [start, stop) may hold
// anything, and count as zeros.
void Interleave(const char* const* tiles, int64_t entry, int64_t dim, int64_t position, int count,
                int64_t start, int64_t stop, char* values, Ahead& ahead) {
  const int64_t step = dim / kRows * kTile;  // of 32 positions
  for (int i = 0; i < count; i += 2) {
    if (i & 2) ahead.Ask();
    const int64_t at = position + i;
    const bool has_even = start <= at && at < stop, has_odd = start <= at + 1 && at + 1 < stop;
    const char* even = tiles[i / kRows] + i % kRows * entry;
    char* to = values + i / kDepth * step + i % kDepth / 2 * 64;
    for (int64_t h = 0; h < dim; h += kDepth, to += 2 * kTile) {
      const __m512i none = _mm512_setzero_si512();
      const __m512i a = has_even ? _mm512_loadu_si512(even + h * 2) : none;
      const __m512i b = has_odd ? _mm512_loadu_si512(even + entry + h * 2) : none;
      _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + kTile, _mm512_unpackhi_epi16(a, b));
    }
  }
}

// Scores of one tile of queries with four of keys. `queries` holds dim / 32 tiles for each head.
void ScoreOne(const char* const* keys, int64_t head_size, int64_t entry, int64_t heads,
              int64_t dim, const char* queries, float* scores, Ahead& ahead) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t h = 0; h < dim; h += kDepth, queries += kTile) {
      const int64_t at = head * head_size + h * 2;
      ahead.Ask();
      _tile_loadd(6, queries, 64);
      _tile_loadd(4, keys[0] + at, entry);
      _tile_dpbf16ps(0, 4, 6);
      ahead.Ask();
      _tile_loadd(5, keys[1] + at, entry);
      _tile_dpbf16ps(1, 5, 6);
      ahead.Ask();
      _tile_loadd(4, keys[2] + at, entry);
      _tile_dpbf16ps(2, 4, 6);
      ahead.Ask();
      _tile_loadd(5, keys[3] + at, entry);
      _tile_dpbf16ps(3, 5, 6);
    }
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + 256, 64);
  _tile_stored(2, scores + 512, 64);
  _tile_stored(3, scores + 768, 64);
}

// Scores of two tiles of queries, dim / 32 tiles each, with two of keys.
void ScoreTwo(const char* const* keys, int64_t entry, int64_t dim, const char* queries,
              float* scores, float* second_scores) {
  const char* second = queries + dim / kDepth * kTile;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t h = 0; h < dim; h += kDepth, queries += kTile, second += kTile) {
    _tile_loadd(4, keys[0] + h * 2, entry);
    _tile_loadd(6, queries, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, keys[1] + h * 2, entry);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, second, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + 256, 64);
  _tile_stored(2, second_scores, 64);
  _tile_stored(3, second_scores + 256, 64);
}

// Weights times values, two tiles of dimensions: `steps` tiles deep.
void SumOne(const char* weights, const char* values, int64_t value_step, int steps, float* sums,
            int64_t dim, Ahead& ahead) {
  _tile_zero(0);
  _tile_zero(1);
  for (int i = 0; i < steps; ++i, weights += kTile, values += value_step) {
    ahead.Ask();
    _tile_loadd(4, weights, 64);
    _tile_loadd(6, values, 64);
    _tile_dpbf16ps(0, 4, 6);
    ahead.Ask();
    _tile_loadd(7, values + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, sums, dim * 4);
  _tile_stored(1, sums + kRows, dim * 4);
}

// The same of two tiles of queries.
void SumTwo(const char* weights, const char* second, const char* values, int64_t value_step,
            int steps, float* sums, float* second_sums, int64_t dim) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < steps; ++i, weights += kTile, second += kTile, values += value_step) {
    _tile_loadd(4, weights, 64);
    _tile_loadd(6, values, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, values + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, second, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, dim * 4);
  _tile_stored(1, sums + kRows, dim * 4);
  _tile_stored(2, second_sums, dim * 4);
  _tile_stored(3, second_sums + kRows, dim * 4);
}

// Undoes for 32 sums what Interleave does to dimensions.
inline void Order(float* sums) {
  static constexpr int32_t kLow[16] = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
  static constexpr int32_t kHigh[16] = {8,  9,  10, 11, 24, 25, 26, 27,
                                        12, 13, 14, 15, 28, 29, 30, 31};
  const __m512 a = _mm512_load_ps(sums), b = _mm512_load_ps(sums + kLanes);
  _mm512_store_ps(sums, _mm512_permutex2var_ps(a, _mm512_loadu_si512(kLow), b));
  _mm512_store_ps(sums + kLanes, _mm512_permutex2var_ps(a, _mm512_loadu_si512(kHigh), b));
}

// A tile's queries as the right side of a product: dim / 32 tiles. `rows` are null where none is.
void PackQueries(const uint16_t* const* rows, int64_t dim, char* to) {
  for (int64_t h = 0; h < dim; h += kDepth, to += kTile) {
    __m512i tile[kRows];
    for (int i = 0; i < kRows; ++i) {
      tile[i] = rows[i] ? _mm512_loadu_si512(rows[i] + h) : _mm512_setzero_si512();
    }
    Transpose(tile);
    for (int i = 0; i < kRows; ++i) _mm512_store_si512(to + i * 64, tile[i]);
  }
}

}  // namespace
}  // namespace octavo
