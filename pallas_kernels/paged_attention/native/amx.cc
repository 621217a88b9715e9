// AMX, for bfloat16 queries and pools: `tdpbf16ps` multiplies 16 rows by 16 columns, 32 deep.
//
// Keys go in as they lie in the pool: a tile is 16 positions by 32 dimensions. So scores come out
// with a row for each position and a column for each query, and the softmax runs along the queries,
// 16 in a vector. The weights, rounded to bfloat16, are transposed on their way to the second
// product, for which values are interleaved by pairs of positions.
//
// A prompt's columns are queries of one KV head. A token that is decoded has few of them: there one
// tile takes those of several KV heads. What a head's keys add to the columns of another is zero
// times the keys, and so nothing, unless a key is no number. Nor is a value that a query does not
// see nothing then: where an output is no number, the whole item is done again as without AMX.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "attention.h"
#include "items.h"
#include "tiles.h"
#include "vectors.h"

namespace octavo {
namespace {

constexpr int kMaxTiles = kMaxQueriesAmx / kRows;
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// 2 ** x, within three units in the last place; 0 for minus infinity, and NaN for NaN.
inline __m512 Power(__m512 x) {
  const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 sum = _mm512_set1_ps(1.8775767e-3f);
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(8.9893397e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.5826318e-2f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.4015361e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.9315308e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.9999994e-1f));
  return _mm512_scalef_ps(sum, x);
}

// One tile's queries as they go through the context: a column of scores each.
struct Columns {
  __m512i first, last;  // position that each sees; none where it is no query
  __m512 top, total;    // the highest score, in powers of two, and what the weights add up to
  int64_t start, stop;  // positions that some see
  int64_t full_start, full_stop;  // and that all see
};

// The weights of a chunk's scores, a row for each position, as tiles of 16 queries by 32 positions.
// By `shrink` what was summed before has to be multiplied.
void Weigh(const Attention& a, Columns& c, float by, int64_t position, int count, float* scores,
           char* weights, float* shrink, Ahead& ahead) {
  const bool is_seen = c.full_start <= position && position + count <= c.full_stop;
  if (!is_seen || a.softcap > 0 || by < 0) {
    for (int i = 0; i < count; ++i) {
      Floats score = Load(scores + i * kRows) * by;
      if (a.softcap > 0) score = Capped(a, score * kLn2) * kLog2E;
      const __m512i at = _mm512_set1_epi32(static_cast<int32_t>(position + i));
      const __mmask16 seen =
          _mm512_cmple_epi32_mask(c.first, at) & _mm512_cmple_epi32_mask(at, c.last);
      const __m512 none = _mm512_set1_ps(-__builtin_inff());
      _mm512_store_ps(scores + i * kRows,
                      _mm512_mask_mov_ps(none, seen, (__m512)score.part[0]));
    }
    by = 1.0f;
  }
  // A maximum's second operand stays if one of them is no number.
  __m512 most[2] = {_mm512_set1_ps(-__builtin_inff()), _mm512_set1_ps(-__builtin_inff())};
  for (int i = 0; i < count; i += 2) {
    if (i & 2) ahead.Ask();
    most[0] = _mm512_max_ps(_mm512_load_ps(scores + i * kRows), most[0]);
    most[1] = _mm512_max_ps(_mm512_load_ps(scores + (i + 1) * kRows), most[1]);
  }
  const __m512 scale = _mm512_set1_ps(by);
  const __m512 top = _mm512_max_ps(_mm512_mul_ps(_mm512_max_ps(most[0], most[1]), scale), c.top);
  const __m512 shrunk = Power(_mm512_sub_ps(c.top, top));
  _mm512_store_ps(shrink, shrunk);
  __m512 total[2] = {_mm512_mul_ps(c.total, shrunk), _mm512_setzero_ps()};
  static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                               21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                               11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_loadu_si512(kInterleave);
  for (int first = 0; first < count; first += kDepth, weights += kTile) {
    __m512i rows[kRows];
    for (int i = 0; i < kRows; ++i) {
      ahead.Ask();
      const float* of = scores + (first + 2 * i) * kRows;
      if (first + 2 * i >= count) {  // half a tile
        rows[i] = _mm512_setzero_si512();
        continue;
      }
      const __m512 even = Power(_mm512_fmsub_ps(_mm512_load_ps(of), scale, top));
      const __m512 odd = Power(_mm512_fmsub_ps(_mm512_load_ps(of + kRows), scale, top));
      total[0] = _mm512_add_ps(total[0], even);
      total[1] = _mm512_add_ps(total[1], odd);
      rows[i] = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    }
    Transpose(rows);
    for (int i = 0; i < kRows; ++i) _mm512_store_si512(weights + i * 64, rows[i]);
  }
  c.top = top;
  c.total = _mm512_add_ps(total[0], total[1]);
}

// What was summed before, shrunk, and what a chunk adds: for some rows of a tile.
void Accumulate(float* sums, const float* added, const float* shrink, int from, int to,
                int64_t dim, Ahead& ahead) {
  for (int row = from; row < to; ++row) {
    ahead.Ask();
    ahead.Ask();
    const __m512 by = _mm512_set1_ps(shrink[row]);
    for (int64_t h = row * dim; h < (row + 1) * dim; h += kLanes) {
      _mm512_store_ps(sums + h, _mm512_fmadd_ps(_mm512_load_ps(sums + h), by,
                                                _mm512_load_ps(added + h)));
    }
  }
}

// The item without AMX, in pieces that it takes.
void AttendAgain(const Attention& a, const Item& item) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t tile = kMaxQueries / group > 1 ? kMaxQueries / group : 1;
  Item piece = item;
  piece.kv_heads = 1;
  for (; piece.kv_head < item.kv_head + item.kv_heads; ++piece.kv_head) {
    piece.first_token = item.first_token;
    while (piece.first_token < item.last_token) {
      const int64_t last = piece.first_token + tile;
      piece.last_token = last < item.last_token ? last : item.last_token;
      AttendAvx512(a, piece, nullptr);
      if (piece.part) piece.part += PartSize(a, piece);
      piece.first_token = piece.last_token;
    }
  }
}

}  // namespace

bool FitsAmx(const Attention& a) {
  return a.type == Type::kBfloat16 && a.pool_type == Type::kBfloat16 && a.head_dim % kDepth == 0 &&
         a.block_size % kRows == 0 && a.heads / a.kv_heads <= kMaxQueriesAmx;
}

void AttendAmx(const Attention& a, const Item& item, const Item* next) {
  const int64_t dim = a.head_dim, heads = item.kv_heads;
  const int64_t entry = 4 * dim, head_size = a.block_size * entry;  // bytes
  const int64_t packed = dim / kDepth * kTile;                      // of a tile of queries
  const int64_t value_step = dim / kRows * kTile;
  const int queries = static_cast<int>(Queries(a, item));
  const int tiles = (queries + kRows - 1) / kRows;
  const int of_head = queries / static_cast<int>(heads);
  const float by = a.scale * kLog2E;

  alignas(64) char query[kMaxTiles > kRows ? kMaxTiles : kRows][kMaxHeadDim / kDepth * kTile];
  alignas(64) char values[kChunk * kMaxHeadDim * 2];
  alignas(64) char weights[2][kChunk / kDepth * kTile];
  alignas(64) float scores[2][kChunk * kRows], shrink[2][kRows];
  alignas(64) float added[2][kRows * kMaxHeadDim];
  alignas(64) float sums[kMaxTiles * kRows * kMaxHeadDim];
  char* query_at = query[0];
  Columns columns[kMaxTiles];
  int64_t start = item.stop, stop = item.start;
  for (int tile = 0; tile < tiles; ++tile) {
    alignas(64) int32_t first[kRows], last[kRows];
    alignas(64) float top[kRows], total[kRows];
    const uint16_t* rows[kRows];
    Columns& c = columns[tile];
    c = Columns{};
    c.start = INT64_MAX;
    c.full_stop = INT64_MAX;
    for (int i = 0; i < kRows; ++i) {
      const int index = tile * kRows + i;
      first[i] = 0;
      last[i] = -1;
      top[i] = kMasked;
      total[i] = 0.0f;
      rows[i] = nullptr;
      if (index >= queries) continue;
      const Query of = QueryOf(a, item, index);
      rows[i] = static_cast<const uint16_t*>(a.q) + (of.token * a.heads + of.head) * dim;
      const int64_t seen = a.positions[of.token] + int64_t{1};
      const int64_t in_window = seen > a.window ? seen - a.window : 0;
      first[i] = static_cast<int32_t>(in_window);
      last[i] = static_cast<int32_t>(seen - 1);
      c.start = in_window < c.start ? in_window : c.start;
      c.stop = seen > c.stop ? seen : c.stop;
      c.full_start = in_window > c.full_start ? in_window : c.full_start;
      c.full_stop = seen < c.full_stop ? seen : c.full_stop;
      if (item.has_sinks && a.sinks) {
        top[i] = a.sinks[of.head] * kLog2E;
        total[i] = 1.0f;
      }
    }
    c.first = _mm512_load_si512(first);
    c.last = _mm512_load_si512(last);
    c.top = _mm512_load_ps(top);
    c.total = _mm512_load_ps(total);
    start = c.start < start ? c.start : start;
    stop = c.stop > stop ? c.stop : stop;
    if (heads == 1) {
      PackQueries(rows, dim, query_at + tile * packed);
      continue;
    }
    for (int64_t head = 0; head < heads; ++head) {  // a tile each, where the others' are zeros
      const uint16_t* own[kRows] = {};
      for (int64_t i = head * of_head; i < (head + 1) * of_head; ++i) own[i] = rows[i];
      PackQueries(own, dim, query_at + head * packed);
    }
  }
  memset(sums, 0, static_cast<size_t>(tiles * kRows * dim) * sizeof(float));
  start = start > item.start ? start : item.start;
  stop = stop < item.stop ? stop : item.stop;

  Ahead ahead;
  Configure();
  for (int64_t position = start / kRows * kRows; position < stop; position += kChunk) {
    const char* keys[kChunk / kRows];
    const int left = static_cast<int>(stop - position < kChunk ? stop - position : kChunk);
    ahead.Begin(a, item, next, position + kChunk, stop);
    const int count = (left + kRows - 1) / kRows * kRows, steps = (count + kDepth - 1) / kDepth;
    for (int i = 0; i < kChunk; i += kRows) {
      if (i < count) {
        Find(a, item, position + i, 1, keys + i / kRows);
      } else {
        keys[i / kRows] = keys[i / kRows - 1];
      }
    }
    if (heads == 1) {
      const char* at[kChunk / kRows];
      for (int i = 0; i < kChunk / kRows; ++i) at[i] = keys[i] + 2 * dim;
      Interleave(at, entry, dim, position, steps * kDepth, start, stop, values, ahead);
    }
    const auto is_seen = [&](int tile) {
      return columns[tile].start < position + count && position < columns[tile].stop;
    };
    for (int tile = 0; tile < tiles; tile += 2) {
      const bool has_second = tile + 1 < tiles;
      if (!is_seen(tile) && !(has_second && is_seen(tile + 1))) continue;
      float* of = sums + tile * kRows * dim;
      if (!has_second) {
        ScoreOne(keys, head_size, entry, heads, dim, query_at + tile * packed, scores[0],
                 ahead);
        Weigh(a, columns[tile], by, position, count, scores[0], weights[0], shrink[0],
              ahead);
        for (int64_t head = 0; head < heads; ++head) {
          if (heads > 1) {
            const char* at[kChunk / kRows];
            for (int i = 0; i < kChunk / kRows; ++i) at[i] = keys[i] + head * head_size + 2 * dim;
            Interleave(at, entry, dim, position, steps * kDepth, start, stop, values, ahead);
          }
          for (int64_t h = 0; h < dim; h += kDepth) {
            SumOne(weights[0], values + h / kRows * kTile, value_step, steps, added[0] + h, dim,
                   ahead);
          }
          const int from = static_cast<int>(head) * of_head;
          Accumulate(of, added[0], shrink[0], from, heads == 1 ? kRows : from + of_head, dim,
                     ahead);
        }
        continue;
      }
      for (int i = 0; i < count; i += 2 * kRows) {
        ScoreTwo(keys + i / kRows, entry, dim, query_at + tile * packed, scores[0] + i * kRows,
                 scores[1] + i * kRows);
      }
      for (int i = 0; i < 2; ++i) {
        Weigh(a, columns[tile + i], by, position, count, scores[i], weights[i], shrink[i],
              ahead);
      }
      for (int64_t h = 0; h < dim; h += kDepth) {
        SumTwo(weights[0], weights[1], values + h / kRows * kTile, value_step, steps,
               added[0] + h, added[1] + h, dim);
      }
      for (int i = 0; i < 2; ++i) {
        Accumulate(of + i * kRows * dim, added[i], shrink[i], 0, kRows, dim, ahead);
      }
    }
  }
  _tile_release();

  bool is_number = true;
  for (int query = 0; query < queries && is_number; ++query) {
    float* of = sums + query * dim;
    __mmask16 wrong = 0;
    for (int64_t h = 0; h < dim; h += kDepth) {
      Order(of + h);
      const __m512 a = _mm512_load_ps(of + h), b = _mm512_load_ps(of + h + kLanes);
      wrong |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
    }
    const Columns& c = columns[query / kRows];
    alignas(64) float top[kRows], total[kRows];
    _mm512_store_ps(top, c.top);
    _mm512_store_ps(total, c.total);
    const float highest = top[query % kRows] * kLn2, weight = total[query % kRows];
    is_number = !wrong && weight == weight && highest < __builtin_inff();
    if (is_number) Keep(a, item, query, of, highest, weight);
  }
  if (!is_number) AttendAgain(a, item);
}

}  // namespace octavo
