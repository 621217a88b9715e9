// Zeros that take memory only where they are written, as a cache that is not full yet should.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "export.h"
#include "xla/ffi/api/ffi.h"

namespace octavo {
namespace {

namespace ffi = xla::ffi;

// The pages that lie wholly in the result go back to the system, which gives zeros for them when
// they are next touched: XLA takes its memory from malloc, so they are this process's own and no
// file's. What shares a page with others is written.
ffi::Error Zero(ffi::Result<ffi::AnyBuffer> result) {
  auto* begin = static_cast<char*>(result->untyped_data());
  char* end = begin + result->size_bytes();
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  auto* first = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + page - 1) & -page);
  auto* last = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(end) & -page);
  if (first >= last || madvise(first, last - first, MADV_DONTNEED) != 0) {
    std::memset(begin, 0, end - begin);  // it is small, or locked in memory
    return ffi::Error::Success();
  }
  std::memset(begin, 0, first - begin);
  std::memset(last, 0, end - last);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace octavo

OCTAVO_EXPORT XLA_FFI_Error* OctavoZeros(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(OctavoZeros, octavo::Zero,
                              xla::ffi::Ffi::Bind().Ret<xla::ffi::AnyBuffer>());
