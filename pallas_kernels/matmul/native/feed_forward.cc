// A decoder's feed-forward layer as one call of XLA's: x + (silu(n @ gate) * (n @ up)) @ down, where
// n is the norm of x. As calls of their own its parts would wait for threads three times, and what
// lies between them would be read and written once more.

#include <cstdint>

#include "call.h"
#include "export.h"
#include "threads.h"

namespace octavo {
namespace {

// What a thread takes at a time: so few rows that gate and up stay in its cache.
constexpr int64_t kRows = 128;
constexpr int64_t kBlocks = 4;  // of columns, which kernels take at once

int64_t Parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// hidden and normed are there for the call alone. Each stack is followed by its columns' scales, which
// are empty unless it is in int8, as all three are or none.
ffi::Error FeedForward(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> layer,
                       ffi::AnyBuffer scales, ffi::AnyBuffer gate, ffi::AnyBuffer gate_scales,
                       ffi::AnyBuffer up, ffi::AnyBuffer up_scales, ffi::AnyBuffer down,
                       ffi::AnyBuffer down_scales, ffi::Result<ffi::AnyBuffer> out,
                       ffi::Result<ffi::AnyBuffer> normed, ffi::Result<ffi::AnyBuffer> hidden,
                       float epsilon, int32_t most) {
  const Kernel& kernel = KernelFor(most);
  if (layer.dimensions().size() != 0) return Refuse("the layer must be a scalar");
  const int64_t index = layer.typed_data()[0];
  Norm norm{};
  if (const char* wrong = Find(x, scales, index, epsilon, *normed, &norm)) return Refuse(wrong);
  const int64_t rows = norm.rows, width = norm.width;
  Layer of_gate{}, of_up{}, of_down{};
  if (const char* wrong = Find(gate, gate_scales, index, width, &of_gate)) return Refuse(wrong);
  if (const char* wrong = Find(up, up_scales, index, width, &of_up)) return Refuse(wrong);
  const int64_t ffn = of_gate.blocks * kColumns;
  if (const char* wrong = Find(down, down_scales, index, ffn, &of_down)) return Refuse(wrong);
  if (of_up.blocks != of_gate.blocks || of_down.blocks * kColumns != width) {
    return Refuse("gate and up must be [width, ffn], and down [ffn, width]");
  }
  const bool is_int8 = of_gate.scales != nullptr;
  if (is_int8 != (of_up.scales != nullptr) || is_int8 != (of_down.scales != nullptr)) {
    return Refuse("all stacks must be of one dtype");
  }
  if (!IsMatrix(*out, ffi::F32, rows, width) || !IsMatrix(*hidden, ffi::BF16, rows, ffn)) {
    return Refuse("the result must be float32 and shaped as x, and hidden bfloat16 [rows, ffn]");
  }
  auto* between = static_cast<uint16_t*>(hidden->untyped_data());
  Rows of_x(norm.y, rows, width, is_int8, &norm), of_hidden(between, rows, ffn, is_int8, nullptr);
  const Product gate_and_up[2] = {of_x.With(of_gate, between, nullptr, false),
                                  of_x.With(of_up, between, nullptr, false)};
  const Product of_down_whole = of_hidden.With(of_down, out->untyped_data(), norm.x, true);

  // Chunks of rows follow each other with the same columns, whose weights are still at hand.
  const int64_t row_chunks = Parts(rows, kRows);
  const std::array<int64_t, 4> counts = {of_x.Count(), row_chunks * Parts(of_gate.blocks, kBlocks),
                                         of_hidden.Count(),
                                         row_chunks * Parts(of_down.blocks, kBlocks)};
  ParallelPhases(pool, counts[1], counts, [&](size_t phase, int64_t i) {
    if (phase == 0) return of_x.Compute(kernel, i);
    if (phase == 2) return of_hidden.Compute(kernel, i);
    const int64_t row = i % row_chunks * kRows, block = i / row_chunks * kBlocks;
    const int64_t last_row = std::min(row + kRows, rows);
    if (phase == 3) {
      return Run(kernel, Part(of_down_whole, row, last_row, block, block + kBlocks));
    }
    alignas(64) float sums[2][kRows * kBlocks * kColumns];
    const int64_t blocks = std::min(kBlocks, of_gate.blocks - block), columns = blocks * kColumns;
    for (int which = 0; which < 2; ++which) {
      Product part = Part(gate_and_up[which], row, last_row, block, block + blocks);
      part.y = sums[which], part.stride = columns, part.is_float32 = true;
      Run(kernel, part);
    }
    for (int64_t m = 0; m < last_row - row; ++m) {
      kernel.activate(sums[0] + m * columns, sums[1] + m * columns, columns,
                      between + (row + m) * ffn + block * kColumns);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace octavo

OCTAVO_EXPORT XLA_FFI_Error* OctavoFeedForward(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(OctavoFeedForward, octavo::FeedForward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("epsilon")
                                  .Attr<int32_t>("most"));
