// What Python calls: writers and readers by handle, arrays by pointer. Every size is checked before
// a pointer is touched; a call returns 0, or why it did nothing.
#include <new>
#include <stdexcept>

#include "grids.h"

namespace {

using jopt::Grid;
using jopt::Reader;
using jopt::Writer;

enum Outcome { kDone = 0, kRefused = 1, kNoMemory = 2 };

constexpr int64_t kMostAxes = 64, kMostLags = 8, kFarthest = 255;
constexpr int64_t kLargest = int64_t{1} << 40;

template <class Action>
int guarded(Action action) {
  try {
    return action();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (const std::length_error&) {
    return kNoMemory;
  }
}

// rows, cols, size, is_table, the number of axes, of steps up and of steps to the left, then these.
bool read_grid(const int64_t* words, int64_t count, Grid& grid) {
  if (count < 7) return false;
  int64_t axes = words[4], up = words[5], left = words[6];
  if (axes < 0 || axes > kMostAxes || up < 0 || left < 0 || up > kMostLags || left > kMostLags ||
      count != 7 + 2 * axes + up + left) {
    return false;
  }
  grid.rows = words[0], grid.cols = words[1], grid.size = words[2], grid.table = words[3] != 0;
  const int64_t most = int64_t{1} << 31;
  if (grid.rows < 1 || grid.cols < 1 || grid.rows > kLargest || grid.cols > kLargest ||
      (grid.rows > most && grid.cols > most) || grid.rows > kLargest / grid.cols ||
      grid.size > grid.rows * grid.cols || grid.size <= (grid.rows - 1) * grid.cols) {
    return false;
  }
  const int64_t* at = words + 7;
  for (; axes; --axes, at += 2) {
    if (at[0] < 1 || at[1] < 1 || at[1] > grid.size) return false;
    grid.axes.push_back({at[0], at[1]});
  }
  for (int64_t i = 0; i < up + left; ++i, ++at) {
    if (*at < 1 || *at > kFarthest) return false;
    (i < up ? grid.up : grid.left).push_back(*at);
  }
  return true;
}

template <class Coder>
int flags(Coder* coder, uint8_t* flags, const int64_t* words, int64_t count, double base,
          int period) {
  return guarded([&] {
    Grid grid;
    if (!coder || !flags || !read_grid(words, count, grid) || period < 1 || !(base > -16) ||
        !(base < 16)) {
      return kRefused;
    }
    jopt::code_flags(*coder, flags, grid, base, period);
    return kDone;
  });
}

template <class Coder>
int values(Coder* coder, int16_t* values, const uint8_t* flags, const int64_t* words,
           int64_t count, int depth) {
  return guarded([&] {
    Grid grid;
    if (!coder || !values || !flags || !read_grid(words, count, grid) || depth < 0 || depth > 8) {
      return kRefused;
    }
    jopt::code_values(*coder, values, flags, grid, depth);
    return kDone;
  });
}

template <class Coder>
int histogram(Coder* coder, uint8_t* symbols, int64_t count, int alphabet, int64_t gain) {
  return guarded([&] {
    if (!coder || count < 0 || (count && !symbols) || alphabet < 2 || alphabet > 256 || gain < 1 ||
        gain > 1024) {
      return kRefused;
    }
    if (!Coder::kReads) {
      for (int64_t at = 0; at < count; ++at) {
        if (symbols[at] >= alphabet) return kRefused;
      }
    }
    jopt::code_histogram(*coder, symbols, count, alphabet, gain);
    return kDone;
  });
}

}  // namespace

extern "C" {

int jopt_tables(const double* squash, int64_t squashes, const double* logs, int64_t count) {
  if (squashes != 2 * jopt::kLimit + 1 || count != jopt::kLogs) return kRefused;
  std::copy(squash, squash + squashes, jopt::tables().squash);
  std::copy(logs, logs + count, jopt::tables().logs);
  return kDone;
}

void* jopt_writer() { return new (std::nothrow) Writer(); }
void jopt_writer_free(void* writer) { delete static_cast<Writer*>(writer); }

// Encodes what was taken; returns the number of words, or -1 where memory is short.
int64_t jopt_writer_finish(void* writer) {
  int64_t found = -1;
  guarded([&] {
    found = static_cast<Writer*>(writer)->finish();
    return kDone;
  });
  return found;
}
void jopt_writer_words(void* writer, uint32_t* words) {
  const auto& made = static_cast<Writer*>(writer)->words();
  std::copy(made.begin(), made.end(), words);
}

void* jopt_reader(const uint32_t* words, int64_t count) {
  void* found = nullptr;
  if (count < 0 || (count && !words)) return found;
  guarded([&] {
    found = new Reader(words, count);
    return kDone;
  });
  return found;
}
void jopt_reader_free(void* reader) { delete static_cast<Reader*>(reader); }
int64_t jopt_reader_bits(void* reader) { return static_cast<Reader*>(reader)->bits_left(); }
int jopt_reader_empty(void* reader) { return static_cast<Reader*>(reader)->empty(); }

int jopt_write_flags(void* writer, uint8_t* truth, const int64_t* grid, int64_t count,
                     double base, int period) {
  return flags(static_cast<Writer*>(writer), truth, grid, count, base, period);
}
int jopt_read_flags(void* reader, uint8_t* found, const int64_t* grid, int64_t count, double base,
                    int period) {
  return flags(static_cast<Reader*>(reader), found, grid, count, base, period);
}
int jopt_write_values(void* writer, int16_t* truth, const uint8_t* flags, const int64_t* grid,
                      int64_t count, int depth) {
  return values(static_cast<Writer*>(writer), truth, flags, grid, count, depth);
}
int jopt_read_values(void* reader, int16_t* found, const uint8_t* flags, const int64_t* grid,
                     int64_t count, int depth) {
  return values(static_cast<Reader*>(reader), found, flags, grid, count, depth);
}
int jopt_write_histogram(void* writer, uint8_t* truth, int64_t count, int alphabet, int64_t gain) {
  return histogram(static_cast<Writer*>(writer), truth, count, alphabet, gain);
}
int jopt_read_histogram(void* reader, uint8_t* found, int64_t count, int alphabet, int64_t gain) {
  return histogram(static_cast<Reader*>(reader), found, count, alphabet, gain);
}
}
