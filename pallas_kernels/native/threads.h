// Work shared with XLA's own threads: no pool of ours competes with theirs for the cores.

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace octavo {

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A number of phases, each begun when the one before it is done: calls work(phase, i) once for each
// i of [0, counts[phase]), on this thread and on those of the pool that come before it is done,
// `most` in all. A thread that comes late finds nothing left, so nobody waits for it: a pool whose
// threads are all busy costs no more than one thread does.
template <size_t kPhases, typename Work>
void ParallelPhases(xla::ffi::ThreadPool& pool, int64_t most,
                    const std::array<int64_t, kPhases>& counts, const Work& work) {
  most = std::min(
      {most, *std::max_element(counts.begin(), counts.end()), pool.num_threads()});
  if (most <= 1) {
    for (size_t phase = 0; phase < kPhases; ++phase) {
      for (int64_t i = 0; i < counts[phase]; ++i) work(phase, i);
    }
    return;
  }
  struct Phase {  // a cache line each: who takes work does not wait for who reports it
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  // A late thread may look at it after this function has returned; at `work` it does not.
  auto shared = std::make_shared<std::array<Phase, kPhases>>();
  auto take = [shared, counts, &work] {
    for (size_t phase = 0; phase < kPhases; ++phase) {
      const int64_t count = counts[phase];
      Phase& here = (*shared)[phase];
      for (int64_t i; (i = here.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        work(phase, i);
        here.done.fetch_add(1, std::memory_order_release);
      }
      // What is left is short, unless a thread that took some of it was put aside: let it run then.
      constexpr int kSpins = 2000;
      for (int spins = 0; here.done.load(std::memory_order_acquire) < count; ++spins) {
        if (spins < kSpins) {
          Pause();
        } else {
          std::this_thread::yield();
        }
      }
    }
  };
  for (int64_t i = 1; i < most; ++i) pool.Schedule(std::function<void()>(take));
  take();
}

// One phase: calls work(i) once for each i of [0, count).
template <typename Work>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t most, int64_t count, const Work& work) {
  ParallelPhases(pool, most, std::array<int64_t, 1>{count}, [&](size_t, int64_t i) { work(i); });
}

}  // namespace octavo
