// Rotary positions: what every instruction set computes.

#pragma once

#include <cstdint>

#include "attention.h"

namespace octavo {

// Turns queries and keys, and lays keys and values beside each other, as the pool holds them. All are
// float32 or bfloat16.
struct Rotation {
  const void *q, *k, *v;  // [tokens, heads, head_dim], and two of [tokens, kv_heads, head_dim]
  const float* cos;       // [tokens, head_dim / 2]
  const float* sin;       // [tokens, head_dim]: the first half negated
  void* turned;           // as q
  void* entries;          // [tokens, kv_heads, 2 * head_dim]
  Type type;
  int64_t heads, kv_heads, head_dim;
};

using Rotate = void (*)(const Rotation&, int64_t first_token, int64_t last_token);

void RotatePortable(const Rotation&, int64_t first_token, int64_t last_token);
#if defined(__x86_64__)
void RotateAvx2(const Rotation&, int64_t first_token, int64_t last_token);
void RotateAvx512(const Rotation&, int64_t first_token, int64_t last_token);
#endif

}  // namespace octavo
