// Products of one x with several packed matrices, as a call of XLA's.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "export.h"
#include "processor.h"
#include "product.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace octavo {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kChunkBytes = 1 << 16;  // of weights: long enough to be worth a thread's coming

Kernels KernelsFor(Instructions instructions) {
#if defined(__x86_64__)
  switch (instructions) {
    case Instructions::kAmx:
      return AmxKernels();
    case Instructions::kAvx512:
      return Avx512Kernels();
    case Instructions::kAvx2:
      return Avx2Kernels();
    default:
      return PortableKernels();
  }
#else
  return PortableKernels();
#endif
}

ffi::Error Refuse(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, what);
}

// Rows of x in int8, as a product takes them.
struct Int8Rows {
  Int8Rows(int64_t rows, int64_t depth)
      : entries(new int8_t[static_cast<size_t>(rows * depth)]), scales(rows), sums(rows) {}
  std::unique_ptr<int8_t[]> entries;
  std::vector<float> scales;
  std::vector<int32_t> sums;
};

Int8Rows InInt8(ffi::ThreadPool& pool, Quantise quantise, const ffi::AnyBuffer& x) {
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1];
  const bool is_float32 = x.element_type() == ffi::F32;
  const int64_t row_bytes = depth * (is_float32 ? 4 : 2);
  Int8Rows result(rows, depth);
  const int64_t rows_a_chunk = kChunkBytes / row_bytes + 1;
  const int64_t chunks = (rows + rows_a_chunk - 1) / rows_a_chunk;
  ParallelFor(pool, chunks, chunks, [&](int64_t chunk) {
    const int64_t last = std::min(rows, (chunk + 1) * rows_a_chunk);
    for (int64_t row = chunk * rows_a_chunk; row < last; ++row) {
      const auto* from = static_cast<const char*>(x.untyped_data()) + row * row_bytes;
      auto [scale, sum] = quantise(from, is_float32, depth, result.entries.get() + row * depth);
      result.scales[row] = scale;
      result.sums[row] = sum;
    }
  });
  return result;
}

// The matrices lie in stacks, bfloat16[layers, columns / 16, depth / 2, 16, 2], or each of
// int8[layers, columns / 16, depth / 4, 16, 4] and followed by its columns' scales, float32[layers,
// columns]; the call computes with one layer of each, in place.
ffi::Error MultiplyAll(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> layer,
                    ffi::RemainingArgs stacks, ffi::RemainingRets results, int32_t most) {
  // A program that was compiled on another processor may come out of a cache.
  const Instructions here = MostInstructions();
  const Kernels kernels =
      KernelsFor(most < static_cast<int32_t>(here) ? static_cast<Instructions>(most) : here);
  if (x.dimensions().size() != 2 || layer.dimensions().size() != 0) {
    return Refuse("x must be a matrix, and the layer a scalar");
  }
  const bool is_int8 =
      stacks.size() > 0 && stacks.get<ffi::AnyBuffer>(0)->element_type() == ffi::S8;
  if (x.element_type() != ffi::BF16 && !(is_int8 && x.element_type() == ffi::F32)) {
    return Refuse("x must be bfloat16, or with int8 weights float32");
  }
  const size_t args_a_stack = is_int8 ? 2 : 1;
  if (stacks.size() != results.size() * args_a_stack) return Refuse("a result for each stack");
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1];
  const int64_t entries_a_word = is_int8 ? 4 : 2, words = depth / entries_a_word;
  if (depth == 0 || depth % (16 * entries_a_word)) {
    return Refuse("the depth must be a multiple of a tile's, 32 or in int8 64");
  }
  const int64_t index = layer.typed_data()[0];

  std::vector<Product> products(results.size());
  std::vector<int64_t> ends(results.size());  // of each product's chunks
  // In fours, which kernels take at once.
  const int64_t at_least = kChunkBytes / (kColumns * words * 4);
  const int64_t blocks_a_chunk = at_least < 4 ? 4 : (at_least + 3) / 4 * 4;
  int64_t chunks = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    auto stack = stacks.get<ffi::AnyBuffer>(i * args_a_stack);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!stack.has_value() || !result.has_value()) return Refuse("not a buffer");
    auto of_stack = stack->dimensions();
    ffi::AnyBuffer y = **result;
    if (stack->element_type() != (is_int8 ? ffi::S8 : ffi::BF16) || of_stack.size() != 5 ||
        of_stack[2] != words || of_stack[3] != kColumns || of_stack[4] != entries_a_word) {
      return Refuse(
          "a stack must be bfloat16[layers, columns / 16, depth / 2, 16, 2] or "
          "int8[layers, columns / 16, depth / 4, 16, 4], all of one kind");
    }
    const int64_t columns = of_stack[1] * kColumns;
    auto of_y = y.dimensions();
    if (of_y.size() != 2 || of_y[0] != rows || of_y[1] != columns ||
        (y.element_type() != ffi::F32 && y.element_type() != ffi::BF16)) {
      return Refuse("a result must be float32 or bfloat16 [rows, columns]");
    }
    if (index < 0 || index >= of_stack[0]) return Refuse("no such layer");
    Product& product = products[i];
    product.w = static_cast<const uint32_t*>(stack->untyped_data()) + index * columns * words;
    product.y = y.untyped_data();
    product.rows = rows, product.words = words, product.columns = columns;
    product.is_float32 = y.element_type() == ffi::F32;
    if (is_int8) {
      auto scales = stacks.get<ffi::Buffer<ffi::F32, 2>>(i * args_a_stack + 1);
      if (!scales.has_value() || scales->dimensions()[0] != of_stack[0] ||
          scales->dimensions()[1] != columns) {
        return Refuse("an int8 stack's scales must be float32[layers, columns]");
      }
      product.w_scales = scales->typed_data() + index * columns;
    }
    chunks += (of_stack[1] + blocks_a_chunk - 1) / blocks_a_chunk;
    ends[i] = chunks;
  }
  std::optional<Int8Rows> x_in_int8;
  if (is_int8) x_in_int8 = InInt8(pool, kernels.quantise, x);
  const void* x_data = is_int8 ? x_in_int8->entries.get() : x.untyped_data();
  for (Product& product : products) {
    product.x = static_cast<const uint32_t*>(x_data);
    product.x_scales = is_int8 ? x_in_int8->scales.data() : nullptr;
    product.x_sums = is_int8 ? x_in_int8->sums.data() : nullptr;
  }
  const Multiply multiply = is_int8 ? kernels.int8 : kernels.bfloat16;
  ParallelFor(pool, chunks, chunks, [&](int64_t chunk) {
    size_t i = 0;
    while (chunk >= ends[i]) ++i;
    const int64_t first = (chunk - (i ? ends[i - 1] : 0)) * blocks_a_chunk;
    const int64_t blocks = products[i].columns / kColumns;
    multiply(products[i], first, first + blocks_a_chunk < blocks ? first + blocks_a_chunk : blocks);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace octavo

OCTAVO_EXPORT XLA_FFI_Error* OctavoMatmul(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(OctavoMatmul, octavo::MultiplyAll,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("most"));
