// The thread pool that XLA runs a call in, as `parallel_for` takes it.
#pragma once

#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jopt {

struct Pool {
  xla::ffi::ThreadPool& pool;
  int64_t num_threads() const { return pool.num_threads(); }
  template <class F>
  void Schedule(F&& function) {
    pool.Schedule(std::forward<F>(function));
  }
};

// For calls of `parallel_for` within another one.
struct Alone {
  int64_t num_threads() const { return 1; }
  template <class F>
  void Schedule(F&&) {}
};

}  // namespace jopt
