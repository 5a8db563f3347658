// Thread pools for checks of native code.
#pragma once

#include <functional>
#include <thread>
#include <vector>

struct Serial {
  int64_t num_threads() const { return 1; }
  template <class F>
  void Schedule(F&& f) {
    f();
  }
};

// Tasks that run late, or never until the end: a caller that waited for them would hang.
struct Late {
  std::vector<std::function<void()>> tasks;
  int64_t num_threads() const { return 3; }
  template <class F>
  void Schedule(F&& f) {
    tasks.push_back(std::forward<F>(f));
  }
  ~Late() {
    for (auto& task : tasks) task();
  }
};

struct Threads {
  std::vector<std::thread> threads;
  int64_t num_threads() const { return 3; }
  template <class F>
  void Schedule(F&& f) {
    threads.emplace_back(std::forward<F>(f));
  }
  ~Threads() {
    for (auto& thread : threads) thread.join();
  }
};
