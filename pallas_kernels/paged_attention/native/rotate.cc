// Rotary positions as a call of XLA's, whose own loops over halves of heads take ten times as long.

#include "rotate.h"

#include <algorithm>
#include <cstdint>

#include "export.h"
#include "processor.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace octavo {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kTokens = 32;  // that a thread takes at a time

Rotate KernelFor(int32_t most) {
#if defined(__x86_64__)
  const int32_t instructions = std::min(most, static_cast<int32_t>(MostInstructions()));
  if (instructions >= static_cast<int32_t>(Instructions::kAvx512)) return RotateAvx512;
  if (instructions >= static_cast<int32_t>(Instructions::kAvx2)) return RotateAvx2;
#else
  (void)most;
#endif
  return RotatePortable;
}

bool Is(const ffi::AnyBuffer& buffer, ffi::DataType type, int64_t tokens, int64_t heads,
        int64_t width) {
  const auto shape = buffer.dimensions();
  return buffer.element_type() == type && shape.size() == 3 && shape[0] == tokens &&
         shape[1] == heads && shape[2] == width;
}

ffi::Error RotateAll(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                     ffi::Result<ffi::AnyBuffer> turned, ffi::Result<ffi::AnyBuffer> entries,
                     int32_t most) {
  const auto shape = q.dimensions(), of_keys = k.dimensions();
  const ffi::DataType type = q.element_type();
  if (shape.size() != 3 || of_keys.size() != 3 || shape[2] % 2 ||
      (type != ffi::F32 && type != ffi::BF16)) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      "queries and keys must be float32 or bfloat16 [tokens, heads, even head dim]");
  }
  const int64_t tokens = shape[0], heads = shape[1], dim = shape[2], kv_heads = of_keys[1];
  if (!Is(k, type, tokens, kv_heads, dim) || !Is(v, type, tokens, kv_heads, dim) ||
      !Is(*turned, type, tokens, heads, dim) || !Is(*entries, type, tokens, kv_heads, 2 * dim) ||
      cos.element_count() * 2 != static_cast<size_t>(tokens * dim) ||
      sin.element_count() != static_cast<size_t>(tokens * dim)) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      "keys, values, angles and results must fit the queries");
  }
  const Rotation r = {q.untyped_data(), k.untyped_data(), v.untyped_data(),
                      cos.typed_data(), sin.typed_data(), turned->untyped_data(),
                      entries->untyped_data(),
                      type == ffi::F32 ? Type::kFloat32 : Type::kBfloat16, heads, kv_heads, dim};
  const Rotate rotate = KernelFor(most);
  const int64_t chunks = (tokens + kTokens - 1) / kTokens;
  ParallelFor(pool, chunks, chunks, [&](int64_t i) {
    rotate(r, i * kTokens, std::min((i + 1) * kTokens, tokens));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace octavo

OCTAVO_EXPORT XLA_FFI_Error* OctavoRotate(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(OctavoRotate, octavo::RotateAll,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int32_t>("most"));
