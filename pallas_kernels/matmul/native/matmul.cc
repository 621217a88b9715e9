// Products of one x with several packed matrices, as a call of XLA's.

#include <cstdint>
#include <vector>

#include "call.h"
#include "export.h"
#include "threads.h"

namespace octavo {
namespace {

constexpr int64_t kChunkBytes = 1 << 16;  // of weights: long enough to be worth a thread's coming

// Products of x, or of its norm; with a sum added to the only one of them.
//
// scales and add are empty where there are none, and normed is then. Each stack is followed by its
// columns' scales, which are empty unless it is in int8, as all are or none.
ffi::Error MultiplyAll(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> layer,
                       ffi::AnyBuffer scales, ffi::AnyBuffer add, ffi::RemainingArgs stacks,
                       ffi::Result<ffi::AnyBuffer> normed, ffi::RemainingRets results,
                       float epsilon, int32_t most) {
  const Kernel& kernel = KernelFor(most);
  const auto shape = x.dimensions();
  if (shape.size() != 2 || layer.dimensions().size() != 0) {
    return Refuse("x must be a matrix, and the layer a scalar");
  }
  if (stacks.size() != 2 * results.size()) return Refuse("scales and a result for each stack");
  const bool adds = add.element_count() > 0;
  if (adds && results.size() != 1) return Refuse("a sum is added to one product");
  const int64_t rows = shape[0], depth = shape[1];
  const int64_t index = layer.typed_data()[0];

  Norm norm{};
  const auto* entries = static_cast<const uint16_t*>(x.untyped_data());
  if (scales.element_count() > 0) {
    if (const char* wrong = Find(x, scales, index, epsilon, *normed, &norm)) return Refuse(wrong);
    entries = norm.y;
  } else if (x.element_type() != ffi::BF16) {
    return Refuse("x must be bfloat16, unless its norm is multiplied");
  }

  auto first_stack = stacks.get<ffi::AnyBuffer>(0);
  const bool is_int8 = first_stack.has_value() && first_stack->element_type() == ffi::S8;
  Rows x_rows(entries, rows, depth, is_int8, norm.y ? &norm : nullptr);
  std::vector<Product> products(results.size());
  std::vector<int64_t> ends(results.size());  // of each product's chunks
  // In fours, which kernels take at once.
  const int64_t at_least = kChunkBytes / (kColumns * (depth ? depth : 1) * (is_int8 ? 1 : 2));
  const int64_t blocks_a_chunk = at_least < 4 ? 4 : (at_least + 3) / 4 * 4;
  int64_t chunks = 0;
  for (size_t i = 0; i < products.size(); ++i) {
    auto stack = stacks.get<ffi::AnyBuffer>(2 * i), of_columns = stacks.get<ffi::AnyBuffer>(2 * i + 1);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!stack.has_value() || !of_columns.has_value() || !result.has_value()) {
      return Refuse("not a buffer");
    }
    Layer matrix{};
    if (const char* wrong = Find(*stack, *of_columns, index, depth, &matrix)) return Refuse(wrong);
    if (is_int8 != (matrix.scales != nullptr)) return Refuse("all stacks must be of one dtype");
    ffi::AnyBuffer y = **result;
    const bool is_float32 = y.element_type() == ffi::F32;
    const int64_t columns = matrix.blocks * kColumns;
    if (!IsMatrix(y, is_float32 ? ffi::F32 : ffi::BF16, rows, columns)) {
      return Refuse("a result must be float32 or bfloat16 [rows, columns]");
    }
    if (adds && !(is_float32 && IsMatrix(add, ffi::F32, rows, columns))) {
      return Refuse("what is added must be float32 and shaped as the result, which is too");
    }
    const auto* added = adds ? static_cast<const float*>(add.untyped_data()) : nullptr;
    products[i] = x_rows.With(matrix, y.untyped_data(), added, is_float32);
    chunks += (matrix.blocks + blocks_a_chunk - 1) / blocks_a_chunk;
    ends[i] = chunks;
  }
  const std::array<int64_t, 2> counts = {x_rows.Count(), chunks};
  ParallelPhases(pool, chunks, counts, [&](size_t phase, int64_t i) {
    if (phase == 0) return x_rows.Compute(kernel, i);
    size_t of = 0;
    while (i >= ends[of]) ++of;
    const int64_t first = (i - (of ? ends[of - 1] : 0)) * blocks_a_chunk;
    Run(kernel, Part(products[of], 0, rows, first, first + blocks_a_chunk));
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
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<float>("epsilon")
                                  .Attr<int32_t>("most"));
