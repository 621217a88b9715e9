// Paged attention as a call of XLA's: writes a step's keys and values to the pool, in place, and
// attends from each of its tokens.

#include "attention.h"

#include <climits>
#include <cstdint>
#include <cstring>
#include <vector>

#include "export.h"
#include "processor.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace octavo {
namespace {

namespace ffi = xla::ffi;

Attend KernelFor(Instructions instructions) {
#if defined(__x86_64__)
  if (instructions >= Instructions::kAvx512) return AttendAvx512;
  if (instructions >= Instructions::kAvx2) return AttendAvx2;
#else
  (void)instructions;
#endif
  return AttendPortable;
}

ffi::Error Refuse(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, what);
}

// Of e4m3fn: four bits of exponent, biased by 7, three of mantissa, no infinity.
const float* Float8() {
  static const std::vector<float> values = [] {
    std::vector<float> of(256);
    for (int bits = 0; bits < 256; ++bits) {
      const int exponent = bits >> 3 & 15, mantissa = bits & 7;
      float value = exponent ? 1.0f + mantissa / 8.0f : mantissa / 8.0f;
      for (int power = exponent ? exponent : 1; power < 7; ++power) value /= 2;
      for (int power = 7; power < exponent; ++power) value *= 2;
      if (exponent == 15 && mantissa == 7) value = __builtin_nanf("");
      of[bits] = bits & 128 ? -value : value;
    }
    return of;
  }();
  return values.data();
}

bool TypeOf(ffi::DataType given, Type* type) {
  switch (given) {
    case ffi::F32:
      *type = Type::kFloat32;
      return true;
    case ffi::BF16:
      *type = Type::kBfloat16;
      return true;
    case ffi::S8:
      *type = Type::kInt8;
      return true;
    case ffi::U8:
      *type = Type::kFloat8;  // XLA's CPU has no such type: the pool holds its bits
      return true;
    default:
      return false;
  }
}

int64_t ItemSize(Type type) {
  return type == Type::kFloat32 ? 4 : type == Type::kBfloat16 ? 2 : 1;
}

// k_scales, v_scales and sinks are empty where there are none; the window is INT_MAX then.
ffi::Error AttendAll(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::AnyBuffer kv_new,
                     ffi::AnyBuffer pool, ffi::Buffer<ffi::S32> token_rows,
                     ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> query_starts,
                     ffi::Buffer<ffi::S32> block_tables, ffi::Buffer<ffi::S32> first_block,
                     ffi::Buffer<ffi::S32> window, ffi::Buffer<ffi::F32> sinks,
                     ffi::Buffer<ffi::F32> k_scales, ffi::Buffer<ffi::F32> v_scales,
                     ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> pool_out,
                     float scale, float softcap, int32_t most) {
  const auto of_q = q.dimensions(), of_pool = pool.dimensions(), of_new = kv_new.dimensions();
  const auto of_tables = block_tables.dimensions();
  if (of_q.size() != 3 || of_pool.size() != 4 || of_new.size() != 3 || of_tables.size() != 2) {
    return Refuse("arguments of other ranks were expected");
  }
  if (pool.untyped_data() != pool_out->untyped_data()) {
    return Refuse("the pool must be written in place");
  }
  Attention a{};
  if (!TypeOf(q.element_type(), &a.type) || !TypeOf(pool.element_type(), &a.pool_type) ||
      ItemSize(a.type) == 1) {
    return Refuse("a type that attention has no code for");
  }
  const int64_t tokens = of_q[0], rows = of_tables[0], blocks = of_pool[0];
  a.q = q.untyped_data();
  a.out = out->untyped_data();
  auto* held = static_cast<char*>(pool.untyped_data());
  a.pool = held;
  a.float8 = Float8();
  a.positions = positions.typed_data();
  a.block_tables = block_tables.typed_data();
  a.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  a.k_scales = k_scales.element_count() ? k_scales.typed_data() : nullptr;
  a.v_scales = v_scales.element_count() ? v_scales.typed_data() : nullptr;
  a.heads = of_q[1];
  a.head_dim = of_q[2];
  a.kv_heads = of_pool[1];
  a.block_size = of_pool[2];
  a.table_width = of_tables[1];
  a.first_block = first_block.typed_data()[0];
  a.window = window.typed_data()[0];
  a.scale = scale;
  a.softcap = softcap;
  if (of_pool[3] != 2 * a.head_dim || of_new[0] != tokens || of_new[1] != a.kv_heads ||
      of_new[2] != of_pool[3] || kv_new.element_type() != pool.element_type() ||
      a.head_dim % kLanes || a.head_dim > kMaxHeadDim || a.heads % a.kv_heads ||
      query_starts.element_count() != static_cast<size_t>(rows + 1) ||
      token_rows.element_count() != static_cast<size_t>(tokens)) {
    return Refuse("shapes don't fit each other");
  }

  const int64_t entry = of_pool[3] * ItemSize(a.pool_type);
  const auto* fresh = static_cast<const char*>(kv_new.untyped_data());
  const int32_t* row_of = token_rows.typed_data();
  for (int64_t token = 0; token < tokens; ++token) {
    if (row_of[token] >= rows) continue;  // padding
    const int64_t position = a.positions[token];
    const int64_t column = position / a.block_size;
    if (row_of[token] < 0 || position < 0 || column >= a.table_width) {
      return Refuse("a token lies outside of its row");
    }
    const int64_t block =
        a.first_block + a.block_tables[row_of[token] * a.table_width + column];
    if (block < 0 || block >= blocks) return Refuse("a block lies outside of the pool");
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const int64_t at = (block * a.kv_heads + head) * a.block_size + position % a.block_size;
      memcpy(held + at * entry, fresh + (token * a.kv_heads + head) * entry, entry);
    }
  }

  const int64_t group = a.heads / a.kv_heads;
  const int64_t tile = kMaxQueries / group > 1 ? kMaxQueries / group : 1;
  const int32_t* starts = query_starts.typed_data();
  std::vector<Item> items;
  int64_t real = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (starts[row] < 0 || starts[row] > starts[row + 1] || starts[row + 1] > tokens) {
      return Refuse("a row's tokens lie outside of the step's");
    }
    for (int64_t token = starts[row]; token < starts[row + 1]; token += tile) {
      const int64_t last = token + tile < starts[row + 1] ? token + tile : starts[row + 1];
      for (int64_t head = 0; head < a.kv_heads; ++head) items.push_back({row, token, last, head});
    }
    real = starts[row + 1] > real ? starts[row + 1] : real;
  }
  // Padded tokens come after all others.
  const int64_t of_token = a.heads * a.head_dim * ItemSize(a.type);
  memset(static_cast<char*>(a.out) + real * of_token, 0, (tokens - real) * of_token);
  const Instructions here = MostInstructions();
  const Attend attend =
      KernelFor(most < static_cast<int32_t>(here) ? static_cast<Instructions>(most) : here);
  ParallelFor(threads, static_cast<int64_t>(items.size()),
              [&](int64_t index) { attend(a, items[index]); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace octavo

OCTAVO_EXPORT XLA_FFI_Error* OctavoAttention(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(OctavoAttention, octavo::AttendAll,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int32_t>("most"));
