#include "processor.h"

#include "export.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace octavo {
namespace {

#if defined(__x86_64__)
// The system keeps a process's tiles only if it asks; it may be told no, such as in an emulator.
bool HasAmx() {
#if defined(__linux__)
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // for bfloat16, tiles, int8
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Instructions Find() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return Instructions::kPortable;
  }
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vnni") &&
                          __builtin_cpu_supports("avx512bf16");
  if (!has_avx512) return Instructions::kAvx2;
  return HasAmx() ? Instructions::kAmx : Instructions::kAvx512;
#else
  return Instructions::kPortable;
#endif
}

}  // namespace

Instructions MostInstructions() {
  static const Instructions found = Find();
  return found;
}

}  // namespace octavo

// The number of `Instructions` that this processor runs, counted from the portable ones on.
OCTAVO_EXPORT int OctavoMostInstructions() { return static_cast<int>(octavo::MostInstructions()); }
