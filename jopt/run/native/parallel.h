// A parallel loop that cannot deadlock: the caller takes chunks too, and never waits for a task
// that has not begun. Tasks that begin after the last chunk was taken return at once.
#pragma once

#include "common.h"

namespace jopt {

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
#endif
  }
  if (loop->done.load() == chunks) return;
  std::unique_lock<std::mutex> lock(loop->mutex);
  loop->finished.wait(lock, [&] { return loop->done.load() == chunks; });
}

// Work is counted in multiply-adds of bytes; one of floats takes as long as three, rounding a float to
// a byte as eight.
constexpr int64_t kOfFloats = 3, kOfRounding = 8;
constexpr int64_t kWorthwhile = 600000;  // work that a thread is woken for

// Calls body(range) over ranges of outputs, in one piece where there is little work.
template <class Pool, class Body>
void over_ranges(Pool& pool, int64_t outputs, int64_t grain, int64_t work, const Body& body) {
  if (outputs <= 0) return;
  const int64_t parts = work < kWorthwhile ? 1 : 4 * pool.num_threads();
  const int64_t step = round_up((outputs + parts - 1) / (parts < 1 ? 1 : parts), grain);
  if (parts <= 1 || step >= outputs) return body(Range{0, outputs});
  parallel_for(pool, (outputs + step - 1) / step, [&](int64_t chunk) {
    body(Range{chunk * step, least((chunk + 1) * step, outputs)});
  });
}

// Calls body(rows, outputs) over blocks of both: outputs by whole panels, and rows too where those are
// too few to go round; a block has at least `many` rows, or all, and whole panels of `step` outputs.
template <class Pool, class Body>
void over_blocks(Pool& pool, int64_t rows, int64_t many, int64_t outputs, int64_t work,
                 const Body& body, int64_t step = kPanel) {
  if (rows <= 0 || outputs <= 0) return;
  const int64_t parts = work < kWorthwhile ? 1 : 4 * pool.num_threads();
  const int64_t panels = (outputs + step - 1) / step;
  const int64_t wide = (panels < parts ? 1 : panels / parts) * step;
  const int64_t down = least((parts + panels - 1) / panels, rows / many + 1);
  const int64_t high = (rows + down - 1) / down;
  const int64_t columns = (outputs + wide - 1) / wide, chunks = columns * ((rows + high - 1) / high);
  parallel_for(pool, chunks, [&](int64_t chunk) {
    const int64_t n = chunk % columns * wide, m = chunk / columns * high;
    body(Range{m, least(m + high, rows)}, Range{n, least(n + wide, outputs)});
  });
}

}  // namespace jopt
