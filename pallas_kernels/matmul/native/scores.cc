// Scores of all tokens as a call of XLA's, and each row's best token, found while they are at hand:
// read again, a step's scores come from memory.

#include <cstdint>

#include "call.h"
#include "export.h"
#include "threads.h"

namespace octavo {
namespace {

// The table is followed by its columns' scales, which are empty unless it is in int8.
// highest and indices, [chunks, rows], are there for the call alone; they say how many chunks.
ffi::Error Score(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::AnyBuffer table,
                 ffi::AnyBuffer of_columns, ffi::Result<ffi::AnyBuffer> scores, ffi::Result<ffi::Buffer<ffi::S32>> best,
                 ffi::Result<ffi::AnyBuffer> highest, ffi::Result<ffi::AnyBuffer> indices,
                 int32_t most) {
  const Kernel& kernel = KernelFor(most);
  const auto shape = x.dimensions();
  if (shape.size() != 2) return Refuse("x must be a matrix");
  const int64_t rows = shape[0], depth = shape[1];
  Layer matrix{};
  if (const char* wrong = Find(table, of_columns, 0, depth, &matrix)) return Refuse(wrong);
  const int64_t columns = matrix.blocks * kColumns;
  if (!IsMatrix(*scores, ffi::F32, rows, columns) || columns > INT32_MAX) {
    return Refuse("the scores must be float32[rows, columns]");
  }
  const auto of_parts = highest->dimensions();
  const int64_t chunks = of_parts.size() ? of_parts[0] : 0;
  if (chunks < 1 || chunks > matrix.blocks || !IsMatrix(*highest, ffi::F32, chunks, rows) ||
      !IsMatrix(*indices, ffi::S32, chunks, rows) ||
      best->element_count() != static_cast<size_t>(rows)) {
    return Refuse("the best must be int32[rows], and parts of it [chunks, rows]");
  }
  const int64_t blocks = (matrix.blocks + chunks - 1) / chunks;
  auto* to = static_cast<float*>(scores->untyped_data());
  auto* values = static_cast<float*>(highest->untyped_data());
  auto* places = static_cast<int32_t*>(indices->untyped_data());
  Rows x_rows(static_cast<const uint16_t*>(x.untyped_data()), rows, depth,
              matrix.scales != nullptr, nullptr);
  const Product whole = x_rows.With(matrix, to, nullptr, true);
  const auto of_chunk = [&](int64_t chunk) {
    const int64_t first = chunk * blocks, last = std::min(first + blocks, matrix.blocks);
    if (first < last) Run(kernel, Part(whole, 0, rows, first, last));
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t count = std::max<int64_t>(last - first, 0) * kColumns;
      const Best found = kernel.best(to + row * columns + first * kColumns, count);
      values[chunk * rows + row] = found.score;
      places[chunk * rows + row] = static_cast<int32_t>(first * kColumns) + found.index;
    }
  };
  const auto of_rows = [&] {
    for (int64_t row = 0; row < rows; ++row) {
      int64_t at = row;
      for (int64_t i = row; i < chunks * rows; i += rows) {
        if (values[i] > values[at]) at = i;
      }
      best->typed_data()[row] = places[at];
    }
  };
  const std::array<int64_t, 3> counts = {x_rows.Count(), chunks, 1};
  ParallelPhases(pool, chunks, counts, [&](size_t phase, int64_t i) {
    if (phase == 0) return x_rows.Compute(kernel, i);
    return phase == 1 ? of_chunk(i) : of_rows();
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace octavo

OCTAVO_EXPORT XLA_FFI_Error* OctavoScores(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(OctavoScores, octavo::Score,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int32_t>("most"));
