// What all native code that XLA calls shares: memory, and a parallel loop that cannot deadlock.
#pragma once

#include <array>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#define JOPT_INLINE static inline __attribute__((always_inline))

namespace jopt {

constexpr int64_t kLine = 64;  // bytes of a line of the cache

JOPT_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
JOPT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory that is not set, from the beginning of a cache line on: vectors that lie across two of them
// take twice as long to read.
struct Release {
  void operator()(void* at) const { ::operator delete(at, std::align_val_t(kLine)); }
};
template <class T>
using Scratch = std::unique_ptr<T[], Release>;
template <class T>
Scratch<T> scratch(int64_t size) {
  const std::size_t bytes = (size > 0 ? size : 1) * sizeof(T);
  return Scratch<T>((T*)::operator new(bytes, std::align_val_t(kLine)));
}

// A parallel loop: the caller takes chunks too, and never waits for a task that has not begun. Tasks
// that begin after the last chunk was taken return at once.
template <class Body>
struct Loop {
  const Body* body;  // alive while a chunk is out, since the caller waits for those
  int64_t chunks;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;

  void work() {
    for (int64_t chunk; (chunk = next.fetch_add(1)) < chunks;) {
      (*body)(chunk);
      if (done.fetch_add(1) + 1 == chunks) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }
};

// Calls body(chunk) for each chunk; `pool` has num_threads() and Schedule(function).
template <class Pool, class Body>
void parallel_for(Pool& pool, int64_t chunks, const Body& body) {
  const int64_t helpers = least(pool.num_threads(), chunks) - 1;
  if (helpers <= 0) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
    return;
  }
  auto loop = std::make_shared<Loop<Body>>();
  loop->body = &body;
  loop->chunks = chunks;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([loop] { loop->work(); });
  loop->work();
  for (int spin = 0; spin < 2000 && loop->done.load() < chunks; ++spin) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  if (loop->done.load() == chunks) return;
  std::unique_lock<std::mutex> lock(loop->mutex);
  loop->finished.wait(lock, [&] { return loop->done.load() == chunks; });
}

}  // namespace jopt
