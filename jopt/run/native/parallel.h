// How outputs are shared out among threads.
#pragma once

#include "common.h"

namespace jopt {

// Work is counted in multiply-adds of bytes; one of floats takes as long as three, rounding a float to
// a byte as eight, and picking what an entry is multiplied by as ten.
constexpr int64_t kOfFloats = 3, kOfRounding = 8, kOfPicking = 10;
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
