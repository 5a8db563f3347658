// Writes and reads random arrays through the calls that Python makes, and reads damaged streams.
// Built with sanitizers by test_codec_native.py: buffers are as long as they are said to be.

#include "codec.cc"

#include <cstdio>
#include <cstdlib>
#include <random>

static std::mt19937 source(1);
static int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(source);
}

static std::vector<uint32_t> finished(void* writer) {
  std::vector<uint32_t> words(jopt_writer_finish(writer));
  jopt_writer_words(writer, words.data());
  jopt_writer_free(writer);
  return words;
}

static std::vector<int64_t> random_grid() {
  int64_t rows = pick(1, 30), cols = pick(1, 30), size = rows * cols - pick(0, cols - 1);
  int64_t axes = pick(0, 3), up = pick(0, 8), left = pick(0, 8);
  std::vector<int64_t> words{rows, cols, size, pick(0, 1), axes, up, left};
  for (; axes; --axes) {
    words.push_back(pick(1, 40));
    words.push_back(pick(1, size));
  }
  for (int64_t at = 0; at < up + left; ++at) words.push_back(pick(1, pick(0, 3) ? 30 : 255));
  return words;
}

struct Case {
  std::vector<int64_t> grid = random_grid();
  std::vector<uint8_t> flags, symbols;
  std::vector<int16_t> values;
  double base = pick(-128, 127) / 12.0;
  int period = pick(0, 1) ? 1 : 8, depth = pick(0, 7), alphabet = pick(2, 256), gain = 4;

  Case() : flags(grid[2]), symbols(pick(0, 500)), values(grid[2]) {
    int often = pick(1, 20);
    for (size_t at = 0; at < flags.size(); ++at) {
      flags[at] = !pick(0, often);
      int value = pick(1, 1 << depth);
      values[at] = flags[at] ? (pick(0, 1) ? value : -value) : 0;
    }
    for (uint8_t& symbol : symbols) symbol = pick(0, alphabet - 1);
  }

  std::vector<uint32_t> write() {
    void* writer = jopt_writer();
    int64_t count = grid.size();
    int outcome = jopt_write_flags(writer, flags.data(), grid.data(), count, base, period);
    outcome |= jopt_write_values(writer, values.data(), flags.data(), grid.data(), count, depth);
    outcome |= jopt_write_histogram(writer, symbols.data(), symbols.size(), alphabet, gain);
    auto words = finished(writer);
    return outcome ? std::vector<uint32_t>{} : words;
  }

  // Returns whether what is read is what was written.
  bool read(const std::vector<uint32_t>& words) {
    void* reader = jopt_reader(words.data(), words.size());
    std::vector<uint8_t> flags_read(flags.size()), symbols_read(symbols.size());
    std::vector<int16_t> values_read(values.size());
    int64_t count = grid.size();
    int outcome = jopt_read_flags(reader, flags_read.data(), grid.data(), count, base, period);
    outcome |= jopt_read_values(reader, values_read.data(), flags_read.data(), grid.data(), count,
                                depth);
    outcome |= jopt_read_histogram(reader, symbols_read.data(), symbols.size(), alphabet, gain);
    bool whole = jopt_reader_empty(reader) && !jopt_reader_bits(reader);
    jopt_reader_free(reader);
    return !outcome && whole && flags_read == flags && values_read == values &&
           symbols_read == symbols;
  }
};

int main(int argc, char** argv) {
  std::vector<double> squash(2 * jopt::kLimit + 1), logs(jopt::kLogs);
  for (size_t at = 0; at < squash.size(); ++at) {
    double odds = (static_cast<double>(at) - jopt::kLimit) / 256;
    squash[at] = std::clamp(std::floor(65536 / (1 + std::exp(-odds))), 1.0, 65535.0);
  }
  for (size_t at = 0; at < logs.size(); ++at) {
    logs[at] = std::floor(256 * std::log(1 + at / 2048.0));
  }
  int wrong = jopt_tables(squash.data(), squash.size(), logs.data(), logs.size());
  const int cases = argc > 1 ? std::atoi(argv[1]) : 400;
  for (int at = 0; at < cases; ++at) {
    Case each;
    auto words = each.write();
    wrong += !each.read(words);
    if (words.empty()) continue;
    words[pick(0, words.size() - 1)] ^= 1u << pick(0, 31);
    if (pick(0, 1)) words.resize(pick(0, words.size()));
    each.read(words);  // whatever it finds, it stays inside its arrays
    each.grid[pick(0, each.grid.size() - 1)] = pick(-3, 300);
    Case other;
    other.grid = each.grid;
    if (other.grid[2] > 0 && other.grid[2] <= 900) {
      other.flags.assign(other.grid[2], 1), other.values.assign(other.grid[2], 1);
      other.write();  // a grid that is none is refused
    }
  }
  std::printf("%d cases: %d wrong\n", cases, wrong);
  return wrong != 0;
}
