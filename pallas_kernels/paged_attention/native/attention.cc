// Paged attention as a call of XLA's: writes a step's keys and values to the pool, in place, and
// attends from each of its tokens.

#include "attention.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "export.h"
#include "processor.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace octavo {
namespace {

namespace ffi = xla::ffi;

struct Kernel {
  Attend attend;
  Merge merge;
  int64_t most_queries = kMaxQueries;  // of an item
  int64_t shared_queries = 0;          // below which an item takes more KV heads than one
};

Kernel KernelFor(const Attention& a, Instructions instructions) {
#if defined(__x86_64__)
  if (instructions >= Instructions::kAmx && FitsAmx(a)) {
    return {AttendAmx, MergeAvx512, kMaxQueriesAmx, kLanes};
  }
  if (instructions >= Instructions::kAvx512) return {AttendAvx512, MergeAvx512};
  if (instructions >= Instructions::kAvx2) return {AttendAvx2, MergeAvx2};
#else
  (void)a, (void)instructions;
#endif
  return {AttendPortable, MergePortable};
}

ffi::Error Refuse(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, what);
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

// A context is split where a row is too short to occupy several threads with its tokens: always at
// the same positions, so that a result depends neither on the threads nor on other rows.
constexpr int64_t kSplit = 512;
// Positions times KV heads of all tokens, below which no other thread is worth waking.
constexpr int64_t kWorkOfOneThread = 512;
// Items are taken in so many runs a thread at least: the last one may keep the others waiting.
constexpr int64_t kRunsOfAThread = 8;

// What may be read of a row's table, and the tokens that read it.
struct Row {
  int64_t first_token, last_token;
  int64_t start, stop;  // positions that some token sees
};

// The rows of a batch, once nothing that they name lies outside of what is there.
//
// A value that is out of range fails the step before anything is written. XLA would clamp it, and
// answer with what another sequence holds.
const char* CheckRows(const Attention& a, int64_t tokens, int64_t rows, int64_t blocks,
                      const int32_t* row_of, const int32_t* starts, std::vector<Row>* found) {
  if (starts[0] != 0) return "query_starts must begin with 0";
  for (int64_t row = 0; row < rows; ++row) {
    if (starts[row] > starts[row + 1] || starts[row + 1] > tokens) {
      return "a row's tokens lie outside of the step's";
    }
    Row of{starts[row], starts[row + 1], INT64_MAX, 0};
    for (int64_t token = of.first_token; token < of.last_token; ++token) {
      const int64_t position = a.positions[token];
      if (row_of[token] != row) return "token_rows and query_starts differ about a token's row";
      if (position < 0 || position / a.block_size >= a.table_width) {
        return "a token's position lies outside of its row's blocks";
      }
      const int64_t first = position + 1 > a.window ? position + 1 - a.window : 0;
      of.start = std::min(of.start, first);
      of.stop = std::max(of.stop, position + 1);
    }
    if (of.first_token == of.last_token) continue;
    const int32_t* table = a.block_tables + row * a.table_width;
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int64_t i = of.start / a.block_size; i <= (of.stop - 1) / a.block_size; ++i) {
      least = std::min(least, table[i]);
      most = std::max(most, table[i]);
    }
    if (least < 0 || a.first_block + least < 0 || a.first_block + most >= blocks) {
      return "a row's block lies outside of the pool";
    }
    found->push_back(of);
  }
  for (int64_t token = starts[rows]; token < tokens; ++token) {
    if (row_of[token] < rows) return "token_rows and query_starts differ about a token's row";
  }
  return nullptr;
}

// The work of a step: items, the longest first, and which of them are parts to be merged.
struct Plan {
  struct Split {
    Item first;
    int64_t count;
  };
  std::vector<Item> items;
  std::vector<Split> splits;
  std::unique_ptr<float[]> parts;
  int64_t work = 0;  // positions times KV heads, of all tokens
};

void PlanRows(const Attention& a, const Kernel& kernel, const std::vector<Row>& rows,
              const int32_t* row_of, Plan* plan) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t tile = std::max<int64_t>(1, kernel.most_queries / group);
  int64_t part_floats = 0;
  for (const Row& row : rows) {
    const int64_t index = row_of[row.first_token];
    const int64_t first_split = row.start / kSplit, last_split = (row.stop - 1) / kSplit;
    const bool is_split = row.last_token - row.first_token <= tile && first_split < last_split;
    const int64_t together = std::max<int64_t>(
        1, kernel.shared_queries / ((row.last_token - row.first_token) * group));
    for (int64_t head = 0; head < a.kv_heads; head += together) {
      const int64_t heads = std::min(together, a.kv_heads - head);
      for (int64_t token = row.first_token; token < row.last_token; token += tile) {
        const int64_t last = std::min(token + tile, row.last_token);
        if (!is_split) {
          const int64_t stop = a.positions[last - 1] + int64_t{1};
          plan->items.push_back({index, token, last, head, heads, 0, row.stop, true, nullptr});
          plan->work += (last - token) * heads * (stop - std::max<int64_t>(0, stop - a.window));
          continue;
        }
        const Item whole{index, token, last, head, heads, row.start, row.stop, true, nullptr};
        plan->splits.push_back({whole, last_split - first_split + 1});
        part_floats += (last_split - first_split + 1) * PartSize(a, whole);
        plan->work += (last - token) * heads * (row.stop - row.start);
      }
    }
  }
  plan->parts.reset(part_floats ? new float[part_floats] : nullptr);
  float* part = plan->parts.get();
  for (Plan::Split& split : plan->splits) {
    const int64_t size = PartSize(a, split.first), first = split.first.start / kSplit;
    split.first.part = part;
    for (int64_t i = 0; i < split.count; ++i, part += size) {
      Item item = split.first;
      item.start = (first + i) * kSplit;
      item.stop = std::min(item.start + kSplit, split.first.stop);
      item.has_sinks = i == 0;
      item.part = part;
      plan->items.push_back(item);
    }
  }
  const auto cost = [&](const Item& item) {
    const int64_t stop = std::min(item.stop, a.positions[item.last_token - 1] + int64_t{1});
    return Queries(a, item) * std::min(stop - item.start, a.window);
  };
  std::stable_sort(plan->items.begin(), plan->items.end(),
                   [&](const Item& x, const Item& y) { return cost(x) > cost(y); });
}

bool Has(const ffi::AnyBuffer& buffer, const ffi::AnyBuffer& other) {  // the same shape and type
  const auto one = buffer.dimensions(), two = other.dimensions();
  return buffer.element_type() == other.element_type() && one.size() == two.size() &&
         std::equal(one.begin(), one.end(), two.begin());
}

bool IsOneOf(size_t count, size_t a, size_t b) { return count == a || count == b; }

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
  a.heads = of_q[1];
  a.head_dim = of_q[2];
  a.kv_heads = of_pool[1];
  a.block_size = of_pool[2];
  a.table_width = of_tables[1];
  if (a.heads < 1 || a.kv_heads < 1 || a.block_size < 1 || a.heads % a.kv_heads) {
    return Refuse("query heads must be a multiple of KV heads, and blocks hold a token or more");
  }
  if (a.head_dim < 1 || a.head_dim % kLanes || a.head_dim > kMaxHeadDim) {
    return Refuse("the head dim must be a multiple of 16, and at most 256");
  }
  if (of_pool[3] != 2 * a.head_dim || of_new[0] != tokens || of_new[1] != a.kv_heads ||
      of_new[2] != of_pool[3] || kv_new.element_type() != pool.element_type()) {
    return Refuse("new keys and values must be [tokens, KV heads, 2 * head dim], as the pool's");
  }
  if (!Has(*out, q) || !Has(*pool_out, pool)) {
    return Refuse("results must have the shapes and types of the queries and of the pool");
  }
  if (token_rows.element_count() != static_cast<size_t>(tokens) ||
      positions.element_count() != static_cast<size_t>(tokens) ||
      query_starts.element_count() != static_cast<size_t>(rows + 1)) {
    return Refuse("token_rows and positions must be [tokens], query_starts [rows + 1]");
  }
  if (first_block.element_count() != 1 || window.element_count() != 1) {
    return Refuse("first_block and window must be scalars");
  }
  if (!IsOneOf(sinks.element_count(), 0, a.heads) ||
      !IsOneOf(k_scales.element_count(), 0, a.kv_heads) ||
      !IsOneOf(v_scales.element_count(), 0, a.kv_heads)) {
    return Refuse("sinks must be [query heads] or empty, scales [KV heads] or empty");
  }
  a.q = q.untyped_data();
  a.out = out->untyped_data();
  auto* held = static_cast<char*>(pool.untyped_data());
  a.pool = held;
  a.positions = positions.typed_data();
  a.block_tables = block_tables.typed_data();
  a.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  a.k_scales = k_scales.element_count() ? k_scales.typed_data() : nullptr;
  a.v_scales = v_scales.element_count() ? v_scales.typed_data() : nullptr;
  a.first_block = first_block.typed_data()[0];
  a.window = window.typed_data()[0];
  a.scale = scale;
  a.softcap = softcap;
  if (a.window < 1) return Refuse("the window must be at least 1");

  const int32_t* row_of = token_rows.typed_data();
  std::vector<Row> found;
  const char* wrong =
      CheckRows(a, tokens, rows, blocks, row_of, query_starts.typed_data(), &found);
  if (wrong) return Refuse(wrong);

  const int64_t entry = of_pool[3] * ItemSize(a.pool_type);
  const auto* fresh = static_cast<const char*>(kv_new.untyped_data());
  for (int64_t token = 0; token < tokens && row_of[token] < rows; ++token) {
    const int64_t position = a.positions[token];
    const int64_t column = position / a.block_size;
    const int64_t block = a.first_block + a.block_tables[row_of[token] * a.table_width + column];
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const int64_t at = (block * a.kv_heads + head) * a.block_size + position % a.block_size;
      memcpy(held + at * entry, fresh + (token * a.kv_heads + head) * entry, entry);
    }
  }

  // Padded tokens come after all others.
  const int64_t real = found.empty() ? 0 : found.back().last_token;
  const int64_t of_token = a.heads * a.head_dim * ItemSize(a.type);
  memset(static_cast<char*>(a.out) + real * of_token, 0, (tokens - real) * of_token);
  const Instructions here = MostInstructions();
  const Kernel kernel =
      KernelFor(a, most < static_cast<int32_t>(here) ? static_cast<Instructions>(most) : here);
  Plan plan;
  PlanRows(a, kernel, found, row_of, &plan);
  const int64_t most_threads = 1 + plan.work / kWorkOfOneThread;
  // A thread takes some that follow each other, so that it knows what comes next.
  const int64_t items = static_cast<int64_t>(plan.items.size());
  const int64_t run = std::max<int64_t>(1, items / (kRunsOfAThread * threads.num_threads()));
  ParallelFor(threads, most_threads, (items + run - 1) / run, [&](int64_t index) {
    const int64_t end = std::min(items, (index + 1) * run);
    for (int64_t i = index * run; i < end; ++i) {
      kernel.attend(a, plan.items[i], i + 1 < end ? &plan.items[i + 1] : nullptr);
    }
  });
  ParallelFor(threads, most_threads, static_cast<int64_t>(plan.splits.size()), [&](int64_t index) {
    kernel.merge(a, plan.splits[index].first, plan.splits[index].count);
  });
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
