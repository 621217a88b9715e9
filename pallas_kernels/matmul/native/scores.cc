// Scores of all tokens as a call of XLA's, and each row's best token, found while they are at hand:
// read again, a step's scores come from memory.

#include <cstdint>
#include <cstring>

#include "call.h"
#include "export.h"
#include "threads.h"

namespace octavo {
namespace {

// The table is followed by its columns' scales, which are empty unless it is in int8.
// What a thread computes at a time. The scores of a row lie a multiple of some large power of two after
// the row before, so that all rows would fight for the same few places of a cache: they are computed
// close together, and copied.
constexpr int64_t kBlocks = 16;
constexpr int64_t kRows = 64;

// highest and indices, [chunks, rows], are there for the call alone.
ffi::Error Score(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::AnyBuffer table,
                 ffi::AnyBuffer of_columns, ffi::Result<ffi::AnyBuffer> scores,
                 ffi::Result<ffi::Buffer<ffi::S32>> best, ffi::Result<ffi::AnyBuffer> highest,
                 ffi::Result<ffi::AnyBuffer> indices, int32_t most) {
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
  const int64_t chunks = (matrix.blocks + kBlocks - 1) / kBlocks;
  if (!IsMatrix(*highest, ffi::F32, chunks, rows) || !IsMatrix(*indices, ffi::S32, chunks, rows) ||
      best->element_count() != static_cast<size_t>(rows)) {
    return Refuse("the best must be int32[rows], and parts of it [chunks of 16 blocks, rows]");
  }
  auto* to = static_cast<float*>(scores->untyped_data());
  auto* values = static_cast<float*>(highest->untyped_data());
  auto* places = static_cast<int32_t*>(indices->untyped_data());
  Rows x_rows(static_cast<const uint16_t*>(x.untyped_data()), rows, depth,
              matrix.scales != nullptr, nullptr);
  const Product whole = x_rows.With(matrix, to, nullptr, true);
  const auto of_chunk = [&](int64_t chunk) {
    const int64_t first = chunk * kBlocks, column = first * kColumns;
    const int64_t width = std::min(kBlocks * kColumns, columns - column);
    alignas(64) float close[kRows * kBlocks * kColumns];
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t last = std::min(row + kRows, rows);
      Product part = Part(whole, row, last, first, first + kBlocks);
      part.y = close;
      part.stride = width;
      Run(kernel, part);
      for (int64_t m = row; m < last; ++m) {
        const float* of_row = close + (m - row) * width;
        const Best found = kernel.best(of_row, width);
        values[chunk * rows + m] = found.score;
        places[chunk * rows + m] = static_cast<int32_t>(column) + found.index;
        memcpy(to + m * columns + column, of_row, static_cast<size_t>(width) * sizeof(float));
      }
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
