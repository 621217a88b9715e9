// What every instruction set's attention computes. As in matmul/native, each is a translation unit
// of its own, which uses nothing inline of a library.

#pragma once

#include <cstdint>

namespace octavo {

enum class Type { kFloat32, kBfloat16, kInt8, kFloat8 };

// A step's batch on one device; the arrays are those of `pallas_kernels.paged_attention`.
struct Attention {
  const void* q;      // [tokens, heads, head_dim]
  void* out;          // the same
  Type type;          // of both: kFloat32 or kBfloat16
  const char* pool;   // [blocks, kv_heads, block_size, 2 * head_dim], this step's entries written
  Type pool_type;
  const int32_t* positions;    // [tokens]
  const int32_t* block_tables; // [rows, table_width]
  const float* sinks;          // [heads], or null
  const float* k_scales;       // [kv_heads], or null
  const float* v_scales;       // [kv_heads], or null
  int64_t heads, kv_heads, head_dim, block_size, table_width;
  int64_t first_block;         // of the layer
  int64_t window;              // positions that a token sees
  float scale, softcap;        // no softcap: 0
};

// Some tokens of one row, with `kv_heads` heads from `kv_head` on, over positions [start, stop) as
// far as they see them.
struct Item {
  int64_t row, first_token, last_token, kv_head, kv_heads;
  int64_t start, stop;
  bool has_sinks;  // a sink counts once, however many parts a context has
  // Null where the item is all of a context. Else what it came to, for each token and head:
  // head_dim weighted sums, the highest score, and the total of the weights.
  float* part;
};

constexpr int kLanes = 16;         // of a vector
constexpr int kMaxQueries = 48;    // of an item, one for each token and head: three vectors
constexpr int kMaxQueriesAmx = 128;
constexpr int64_t kMaxHeadDim = 256;

namespace {  // each unit has its own

inline int64_t ItemSize(Type type) {
  return type == Type::kFloat32 ? 4 : type == Type::kBfloat16 ? 2 : 1;
}

inline int64_t Queries(const Attention& a, const Item& item) {
  return (item.last_token - item.first_token) * (a.heads / a.kv_heads) * item.kv_heads;
}

inline int64_t PartSize(const Attention& a, const Item& item) {  // floats
  return Queries(a, item) * (a.head_dim + 2);
}

}  // namespace

// `next` is an item that the thread will take then, or null.
using Attend = void (*)(const Attention&, const Item&, const Item* next);
// The output of an item's tokens from `count` parts of its context, which lie one after the other.
using Merge = void (*)(const Attention&, const Item& first, int64_t count);

void AttendPortable(const Attention&, const Item&, const Item* next);
void MergePortable(const Attention&, const Item& first, int64_t count);
#if defined(__x86_64__)
void AttendAvx2(const Attention&, const Item&, const Item* next);
void MergeAvx2(const Attention&, const Item& first, int64_t count);
void AttendAvx512(const Attention&, const Item&, const Item* next);
void MergeAvx512(const Attention&, const Item& first, int64_t count);
bool FitsAmx(const Attention&);
void AttendAmx(const Attention&, const Item&, const Item* next);
#endif

}  // namespace octavo
