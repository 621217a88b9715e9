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
  const float* float8;         // what each of the 256 values of kFloat8 means
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

// Some tokens of one row, with one KV head.
struct Item {
  int64_t row, first_token, last_token, kv_head;
};

constexpr int kLanes = 16;         // of a vector
constexpr int kMaxQueries = 48;    // of an item, one for each token and head: three vectors
constexpr int64_t kMaxHeadDim = 256;

using Attend = void (*)(const Attention&, const Item&);

void AttendPortable(const Attention&, const Item&);
#if defined(__x86_64__)
void AttendAvx2(const Attention&, const Item&);
void AttendAvx512(const Attention&, const Item&);
#endif

}  // namespace octavo
