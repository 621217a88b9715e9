// What every kernel does with an item: finds its positions, and leaves its output.

#pragma once

#include <cstdint>
#include <cstring>

#include "attention.h"
#include "vectors.h"

namespace octavo {
namespace {

constexpr float kMasked = -1e30f;  // finite, so that a query that sees nothing yet makes no NaN

inline Floats Capped(const Attention& a, Floats scores) {
  return a.softcap > 0 ? Tanh(scores * Splat(1.0f / a.softcap)) * a.softcap : scores;
}

// Where `count` positions of a row lie, from one on: a key and a value each.
inline void Find(const Attention& a, const Item& item, int64_t position, int count,
                 const char** entries) {
  const int64_t entry_size = 2 * a.head_dim * ItemSize(a.pool_type);
  const int32_t* table = a.block_tables + item.row * a.table_width;
  for (int i = 0; i < count;) {
    const int64_t column = (position + i) / a.block_size, in_block = (position + i) % a.block_size;
    const int64_t block = a.first_block + table[column];
    const char* entry =
        a.pool + ((block * a.kv_heads + item.kv_head) * a.block_size + in_block) * entry_size;
    for (int64_t j = in_block; j < a.block_size && i < count; ++j, ++i, entry += entry_size) {
      entries[i] = entry;
    }
  }
}

// Whose query is the item's n-th: KV head by KV head, in each token by token, and then by head.
struct Query {
  int64_t token, head, kv_head;
};

inline Query QueryOf(const Attention& a, const Item& item, int64_t query) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t of_kv_head = (item.last_token - item.first_token) * group;
  const int64_t kv_head = item.kv_head + query / of_kv_head;
  return {item.first_token + query % of_kv_head / group, kv_head * group + query % group, kv_head};
}

// The output of one query: what was summed, divided by the total.
inline void Finish(const Attention& a, Query query, const float* sums, float total) {
  const float v_scale = a.v_scales ? a.v_scales[query.kv_head] : 1.0f;
  const float by = v_scale / (total < 1e-30f ? 1e-30f : total);  // NaN stays NaN
  const int64_t at = (query.token * a.heads + query.head) * a.head_dim;
  for (int64_t h = 0; h < a.head_dim; h += kLanes) {
    const Floats value = Load(sums + h) * by;
    if (a.type == Type::kFloat32) {
      Store(static_cast<float*>(a.out) + at + h, value);
    } else {
      StoreRounded(static_cast<uint16_t*>(a.out) + at + h, value);
    }
  }
}

// One query's sums, to the output or to its place in the item's part.
inline void Keep(const Attention& a, const Item& item, int64_t query, const float* sums, float top,
                 float total) {
  if (item.part == nullptr) return Finish(a, QueryOf(a, item, query), sums, total);
  float* to = item.part + query * (a.head_dim + 2);
  memcpy(to, sums, static_cast<size_t>(a.head_dim) * sizeof(float));
  to[a.head_dim] = top;
  to[a.head_dim + 1] = total;
}

}  // namespace
}  // namespace octavo
