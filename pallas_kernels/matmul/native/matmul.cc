// Products of one x with several packed matrices, as a call of XLA's.

#include <cstdint>
#include <cstring>
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

Multiply KernelFor(Instructions instructions) {
#if defined(__x86_64__)
  switch (instructions) {
    case Instructions::kAmx:
      return MultiplyAmx;
    case Instructions::kAvx512:
      return MultiplyAvx512;
    case Instructions::kAvx2:
      return MultiplyAvx2;
    default:
      return MultiplyPortable;
  }
#else
  return MultiplyPortable;
#endif
}

ffi::Error Refuse(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, what);
}

// The matrices lie in stacks, bfloat16[layers, columns / 16, depth / 2, 16, 2]; the call computes
// with one layer of each, in place.
ffi::Error MultiplyAll(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::S32> layer,
                    ffi::RemainingArgs stacks, ffi::RemainingRets results, int32_t most) {
  // A program that was compiled on another processor may come out of a cache.
  const Instructions here = MostInstructions();
  const Multiply multiply =
      KernelFor(most < static_cast<int32_t>(here) ? static_cast<Instructions>(most) : here);
  if (x.dimensions().size() != 2 || layer.dimensions().size() != 0) {
    return Refuse("x must be a matrix, and the layer a scalar");
  }
  if (stacks.size() != results.size()) return Refuse("a result for each stack");
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1];
  if (depth == 0 || depth % 32) return Refuse("the depth must be a multiple of 32, a tile's");
  const int64_t index = layer.typed_data()[0];

  std::vector<Product> products(stacks.size());
  std::vector<int64_t> ends(stacks.size());  // of each product's chunks
  // In fours, which kernels take at once.
  const int64_t at_least = kChunkBytes / (kColumns * depth * 2);
  const int64_t blocks_a_chunk = at_least < 4 ? 4 : (at_least + 3) / 4 * 4;
  int64_t chunks = 0;
  for (size_t i = 0; i < stacks.size(); ++i) {
    auto stack = stacks.get<ffi::AnyBuffer>(i);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!stack.has_value() || !result.has_value()) return Refuse("not a buffer");
    auto of_stack = stack->dimensions();
    ffi::AnyBuffer y = **result;
    if (stack->element_type() != ffi::BF16 || of_stack.size() != 5 || of_stack[2] * 2 != depth ||
        of_stack[3] != kColumns || of_stack[4] != 2) {
      return Refuse("a stack must be bfloat16[layers, columns / 16, depth / 2, 16, 2]");
    }
    const int64_t columns = of_stack[1] * kColumns;
    auto of_y = y.dimensions();
    if (of_y.size() != 2 || of_y[0] != rows || of_y[1] != columns ||
        (y.element_type() != ffi::F32 && y.element_type() != ffi::BF16)) {
      return Refuse("a result must be float32 or bfloat16 [rows, columns]");
    }
    if (index < 0 || index >= of_stack[0]) return Refuse("no such layer");
    const auto* w = static_cast<const uint16_t*>(stack->untyped_data()) + index * columns * depth;
    products[i] = {static_cast<const uint16_t*>(x.untyped_data()), w, y.untyped_data(),
                   rows, depth, columns, y.element_type() == ffi::F32};
    chunks += (of_stack[1] + blocks_a_chunk - 1) / blocks_a_chunk;
    ends[i] = chunks;
  }
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
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("most"));
