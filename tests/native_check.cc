// Drives every native kernel with random shapes and values, and compares with sums in double.
// Built with sanitizers by test_run_native.py: buffers are exactly as long as they are said to be.

#include "run.h"
#include "pools.h"

#include <cstdio>
#include <random>
#include <thread>

using namespace jopt;

static std::mt19937 source(1);
static int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(source);
}
static float normal() { return std::normal_distribution<float>()(source); }
static std::vector<float> normals(int64_t count) {
  std::vector<float> out(count);
  for (float& value : out) value = normal();
  return out;
}

static long wrong = 0;
static void compare(const char* what, double got, double want, double size) {
  if (std::fabs(got - want) <= 2e-5 * size + 1e-30) return;
  if (++wrong < 10) std::printf("%s: %g, not %g\n", what, got, want);
}

// A sum and the sum of its magnitudes.
struct Sum {
  double value = 0, size = 0;
  void add(double term) {
    value += term;
    size += std::fabs(term);
  }
};

// Rows rounded as the kernels round them.
struct Rows {
  int64_t rows, inputs;
  std::vector<float> data;
  std::vector<double> step;
  std::vector<int> codes;

  Rows(int64_t rows, int64_t inputs) : rows(rows), inputs(inputs), data(normals(rows * inputs)) {
    step.resize(rows);
    codes.resize(rows * inputs);
    for (int64_t m = 0; m < rows; ++m) {
      float most = 0;
      for (int64_t i = 0; i < inputs; ++i) most = std::fmax(most, std::fabs(data[m * inputs + i]));
      const float unit = most / 127.0f;
      step[m] = unit;
      for (int64_t i = 0; i < inputs; ++i)
        codes[m * inputs + i] = unit > 0 ? (int)std::nearbyint(data[m * inputs + i] * (1.0f / unit)) : 0;
    }
  }
  double rounded(int64_t m, int64_t i) const { return step[m] * codes[m * inputs + i]; }
};

// What becomes of outputs, each part of it there or not.
struct Ending {
  std::vector<float> less, times, plus, more;
  After after;

  Ending() = default;
  Ending(int64_t rows, int64_t outputs)
      : less(normals(outputs)), times(normals(outputs)), plus(normals(outputs)),
        more(normals(rows * outputs)) {
    if (pick(0, 3) == 0) return;
    if (pick(0, 1)) after.less = less.data();
    if (pick(0, 1)) after.times = times.data();
    if (pick(0, 1)) after.plus = plus.data();
    if (pick(0, 1)) after.more = more.data();
    if (pick(0, 1)) after.low = normal() - 1;
    if (pick(0, 1)) after.high = std::fmax(after.low, normal() + 1);
  }
  Sum operator()(Sum sum, int64_t at, int64_t n) const {
    if (after.less) sum.add(-(double)less[n]);
    if (after.times) sum = {sum.value * times[n], sum.size * std::fabs(times[n])};
    if (after.plus) sum.add(plus[n]);
    if (after.more) sum.add(more[at]);
    return {std::fmin(after.high, std::fmax(after.low, sum.value)), sum.size};
  }
};

template <class Weight>
static void expect(const char* what, const Rows& x, int64_t outputs, bool rounded,
                   const std::vector<float>& y, const Weight& weight,
                   const Ending& ending = Ending()) {
  for (int64_t m = 0; m < x.rows; ++m)
    for (int64_t n = 0; n < outputs; ++n) {
      Sum sum;
      for (int64_t i = 0; i < x.inputs; ++i)
        sum.add((rounded ? x.rounded(m, i) : x.data[m * x.inputs + i]) * weight(n, i));
      sum = ending(sum, m * outputs + n, n);
      compare(what, y[m * outputs + n], sum.value, sum.size);
    }
}

// Rows of words of four bytes, (outputs, words, 4), to panels, (panels, words, 16, 4).
template <class T>
static std::vector<T> in_panels(const std::vector<T>& rows, int64_t outputs, int64_t words,
                                int64_t item = 4) {
  std::vector<T> panels(round_up(outputs, kPanel) * words * item);
  for (int64_t n = 0; n < outputs; ++n)
    for (int64_t i = 0; i < words; ++i)
      for (int64_t b = 0; b < item; ++b)
        panels[((n / kPanel * words + i) * kPanel + n % kPanel) * item + b] =
            rows[(n * words + i) * item + b];
  return panels;
}

// int8 codes (outputs, inputs), filled up to whole words.
static std::vector<int8_t> in_panels8(const std::vector<int8_t>& codes, int64_t outputs,
                                      int64_t inputs) {
  const int64_t wide = round_up(inputs, kBytes);
  std::vector<int8_t> rows(outputs * wide);
  for (int64_t n = 0; n < outputs; ++n)
    for (int64_t i = 0; i < inputs; ++i) rows[n * wide + i] = codes[n * inputs + i];
  return in_panels(rows, outputs, wide / kWord);
}

template <class Pool>
static void check_int8(Pool& pool, const Rows& x, int64_t outputs) {
  std::vector<int8_t> codes(outputs * x.inputs);
  for (int8_t& code : codes) code = (int8_t)pick(-128, 127);
  const std::vector<float> scale = normals(outputs), zero = normals(outputs);
  const std::vector<int8_t> panels = in_panels8(codes, outputs, x.inputs);
  const int64_t words = round_up(x.inputs, kBytes) / kWord;
  for (bool shifted : {false, true}) {
    const Int8Weights w{panels.data(), scale.data(), shifted ? zero.data() : nullptr, words, outputs};
    auto weight = [&](int64_t n, int64_t i) {
      return (double)scale[n] * (codes[n * x.inputs + i] - (shifted ? zero[n] : 0.0f));
    };
    std::vector<float> y(x.rows * outputs);
    const Ending ending(x.rows, outputs);
    run_int8(pool, x.data.data(), x.rows, x.inputs, nullptr, w, ending.after, y.data());
    expect("int8 x int8", x, outputs, true, y, weight, ending);
    run_int8_float(pool, x.data.data(), x.rows, x.inputs, w, ending.after, y.data());
    expect("int8 x float", x, outputs, false, y, weight, ending);
  }
}

template <class Pool>
static void check_int4(Pool& pool, const Rows& x, int64_t outputs) {
  const int64_t inputs = x.inputs, width = round_up(inputs, kPair) / 2;
  const int64_t sizes[] = {32, 64, 128, round_up(inputs ? inputs : 1, 64)};
  const int64_t group = sizes[pick(0, 3)], groups = inputs ? (inputs + group - 1) / group : 1;
  std::vector<uint8_t> packed(outputs * width, 0x88);
  std::vector<int> codes(outputs * inputs);
  for (int64_t n = 0; n < outputs; ++n)
    for (int64_t i = 0; i < inputs; ++i) {
      const int code = codes[n * inputs + i] = (int)pick(0, 15);
      uint8_t& byte = packed[n * width + i / 64 * 32 + i % 32];
      byte = i % 64 < 32 ? (byte & 0xf0) | code : (byte & 0x0f) | code << 4;
    }
  const std::vector<float> scale = normals(outputs * groups), zero = normals(outputs * groups);
  const bool shifted = pick(0, 1);
  const std::vector<uint8_t> panels = in_panels(packed, outputs, width / kWord);
  const std::vector<float> scales = in_panels(scale, outputs, groups, 1);
  const std::vector<float> zeros = in_panels(zero, outputs, groups, 1);
  const Int4Weights even{panels.data(), scales.data(), shifted ? zeros.data() : nullptr,
                         width / kWord, groups,        group,
                         outputs};
  std::vector<float> y(x.rows * outputs);
  auto level = [&](int64_t n, int64_t i) {
    const int64_t at = n * groups + i / group;
    return (double)scale[at] * (codes[n * inputs + i] - 8 - (shifted ? zero[at] : 0.0f));
  };
  const Ending ending(x.rows, outputs);
  run_int4(pool, x.data.data(), x.rows, inputs, even, ending.after, y.data());
  expect("int4 x int8", x, outputs, true, y, level, ending);
  run_int4_float(pool, x.data.data(), x.rows, inputs, even, ending.after, y.data());
  expect("int4 x float", x, outputs, false, y, level, ending);
  if (!outputs) return;
  const int64_t tables = pick(0, 1) ? 1 : outputs;
  const std::vector<float> table = normals(tables * 16);
  const bool scaled = pick(0, 1);
  const Codebook looked{packed.data(), width,        scaled ? scale.data() : nullptr, groups,
                        group,         table.data(), tables,                          outputs};
  auto at = [&](int64_t n, int64_t i) {
    return (double)(scaled ? scale[n * groups + i / group] : 1.0f);
  };
  auto entry = [&](int64_t n, int64_t i) {
    return table[(tables > 1 ? 16 * n : 0) + codes[n * inputs + i]];
  };
  run_codebook_float(pool, x.data.data(), x.rows, inputs, looked, y.data());
  expect("codebook x float", x, outputs, false, y,
         [&](int64_t n, int64_t i) { return at(n, i) * entry(n, i); });
  run_codebook(pool, x.data.data(), x.rows, inputs, looked, y.data());
  expect("codebook x int8", x, outputs, true, y, [&](int64_t n, int64_t i) {
    float most = 0;
    for (int k = 0; k < 16; ++k)
      most = std::fmax(most, std::fabs(table[(tables > 1 ? 16 * n : 0) + k]));
    const float unit = most / 127.0f;
    return at(n, i) * unit * std::nearbyint(entry(n, i) * (1.0f / unit));
  });
}

template <class Pool>
static void check_bits(Pool& pool, const Rows& x, int64_t outputs) {
  const int64_t width = (x.inputs + 31) / 32 * 4;
  auto filled = [&](int64_t rows) {
    std::vector<uint8_t> bits(rows * width);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < x.inputs; ++i)
        if (pick(0, 1)) bits[r * width + i / 8] |= 1 << (i % 8);
    return bits;
  };
  auto sign = [&](const std::vector<uint8_t>& bits, int64_t row, int64_t i) {
    return bits[row * width + i / 8] >> (i % 8) & 1 ? 1 : -1;
  };
  const std::vector<uint8_t> bits = filled(outputs), other = filled(x.rows);
  const std::vector<float> scale = normals(outputs);
  const BitWeights w{bits.data(), width, scale.data(), outputs};
  std::vector<float> y(x.rows * outputs);
  run_signs(pool, x.data.data(), x.rows, x.inputs, w, y.data());
  expect("signs x float", x, outputs, false, y,
         [&](int64_t n, int64_t i) { return (double)scale[n] * sign(bits, n, i); });
  run_binary(pool, other.data(), nullptr, x.rows, x.inputs, w, y.data());
  for (int64_t m = 0; m < x.rows; ++m)
    for (int64_t n = 0; n < outputs; ++n) {
      int64_t sum = 0;
      for (int64_t i = 0; i < x.inputs; ++i) sum += sign(other, m, i) * sign(bits, n, i);
      const double want = (double)scale[n] * sum;
      compare("binary", y[m * outputs + n], want, std::fabs(want));
    }
}

template <class Pool>
static void check_sparse(Pool& pool, const Rows& x, int64_t outputs) {
  std::vector<float> dense(outputs * x.inputs), values;
  std::vector<int8_t> codes;
  std::vector<uint8_t> columns;
  std::vector<int32_t> starts{0};
  const bool coded = pick(0, 1), scaled = pick(0, 1), round = coded && pick(0, 1);
  const std::vector<float> scale = normals(outputs);
  const int64_t size = kSparseBlock, blocks = round_up(x.inputs, size) / size;
  for (int64_t n = 0; n < outputs; ++n)
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t i = block * size; i < least((block + 1) * size, x.inputs); ++i)
        if (pick(0, 4) == 0) {
          codes.push_back((int8_t)pick(-128, 127));
          values.push_back(normal());
          dense[n * x.inputs + i] = (coded ? codes.back() : values.back()) * (scaled ? scale[n] : 1);
          columns.push_back((uint8_t)(i % size));
        }
      starts.push_back((int32_t)values.size());
    }
  const SparseWeights w{coded ? (const void*)codes.data() : (const void*)values.data(),
                        coded,
                        scaled ? scale.data() : nullptr,
                        columns.data(),
                        starts.data(),
                        outputs,
                        blocks,
                        (int64_t)values.size()};
  std::vector<float> y(x.rows * outputs);
  if (!run_sparse(pool, x.data.data(), x.rows, x.inputs, round, w, y.data())) ++wrong;
  expect(round ? "sparse x int8" : "sparse x float", x, outputs, round, y,
         [&](int64_t n, int64_t i) { return (double)dense[n * x.inputs + i]; });
  if (values.empty() || !x.rows) return;
  columns[pick(0, values.size() - 1)] = 255;  // beyond the inputs lies nothing but zeros
  if (!run_sparse(pool, x.data.data(), x.rows, x.inputs, round, w, y.data())) ++wrong;
  starts[pick(0, outputs * blocks)] = (int32_t)(pick(-5, 100000) * 1000 + 1);  // read or refused
  run_sparse(pool, x.data.data(), x.rows, x.inputs, round, w, y.data());
}

template <class Pool>
static void check_floats(Pool& pool, const Rows& x, int64_t outputs) {
  const std::vector<float> kernel = normals(x.inputs * outputs);
  std::vector<float> y(x.rows * outputs);
  const Ending ending(x.rows, outputs);
  run_floats(pool, x.data.data(), x.rows, x.inputs, {kernel.data(), outputs}, ending.after, y.data());
  expect("floats", x, outputs, false, y,
         [&](int64_t n, int64_t i) { return (double)kernel[i * outputs + n]; }, ending);
}

// Windows that hang over edges, or lie inside.
template <class Pool>
static void check_windows(Pool& pool, int kind) {
  const bool depthwise = kind == 0, coded = kind == 2;
  const int64_t outputs = pick(1, 40), large = pick(0, 1) ? 40 : 9;
  Window s{pick(0, 2), pick(1, large), pick(1, 30), pick(1, depthwise ? 50 : 9), pick(1, 5),
           pick(1, 5), pick(1, 3),     pick(1, 3),  pick(0, 6),                  pick(0, 6), 0, 0};
  if (pick(0, 2) == 0) s.top = s.left = 0;
  const int64_t rows = s.height + s.top + pick(0, 6) - s.rows;
  const int64_t columns = s.width + s.left + pick(0, 6) - s.columns;
  s.out_rows = rows < 0 ? 0 : rows / s.stride_rows + 1;
  s.out_columns = columns < 0 ? 0 : columns / s.stride_columns + 1;
  const int64_t last = depthwise ? s.channels : outputs;
  const std::vector<float> x = normals(s.batch * s.height * s.width * s.channels);
  const int64_t inputs = s.rows * s.columns * s.channels;
  std::vector<float> kernel = normals(inputs * (depthwise ? 1 : last));
  std::vector<float> y(s.batch * s.out_rows * s.out_columns * last);
  const Ending ending(s.batch * s.out_rows * s.out_columns, last);
  if (depthwise)
    run_depthwise(pool, x.data(), kernel.data(), ending.after, s, y.data());
  else if (!coded)
    run_convolution(pool, x.data(), {kernel.data(), outputs}, ending.after, s, y.data());
  else {
    std::vector<int8_t> codes(inputs * outputs);
    const std::vector<float> scale = normals(outputs), zero = normals(outputs);
    const bool shifted = pick(0, 1);
    for (int64_t n = 0; n < outputs; ++n)
      for (int64_t k = 0; k < inputs; ++k) {
        codes[n * inputs + k] = (int8_t)pick(-128, 127);
        kernel[k * outputs + n] = scale[n] * (codes[n * inputs + k] - (shifted ? zero[n] : 0.0f));
      }
    const std::vector<int8_t> panels = in_panels8(codes, outputs, inputs);
    const int64_t words = round_up(inputs, kBytes) / kWord;
    const Int8Weights w{panels.data(), scale.data(), shifted ? zero.data() : nullptr, words, outputs};
    run_int8_convolution(pool, x.data(), w, ending.after, s, y.data());
  }
  size_t at = 0;
  for (int64_t image = 0; image < s.batch; ++image)
    for (int64_t r = 0; r < s.out_rows; ++r)
      for (int64_t c = 0; c < s.out_columns; ++c)
        for (int64_t n = 0; n < last; ++n) {
          Sum sum;
          for (int64_t i = 0; i < s.rows; ++i)
            for (int64_t j = 0; j < s.columns; ++j) {
              const int64_t row = r * s.stride_rows - s.top + i;
              const int64_t column = c * s.stride_columns - s.left + j;
              if (row < 0 || column < 0 || row >= s.height || column >= s.width) continue;
              const float* in = &x[((image * s.height + row) * s.width + column) * s.channels];
              const float* weights = &kernel[(i * s.columns + j) * s.channels * (depthwise ? 1 : last)];
              if (depthwise) sum.add((double)in[n] * weights[n]);
              for (int64_t k = 0; !depthwise && k < s.channels; ++k)
                sum.add((double)in[k] * weights[k * last + n]);
            }
          sum = ending(sum, at, n);
          compare(depthwise ? "depthwise" : "convolution", y[at++], sum.value, sum.size);
        }
}

template <class Pool>
static void round_of(int64_t most) {
  Pool pool;
  // Few rows, those from which on panels serve, and now and then enough to be cut into blocks.
  const int64_t kind = pick(0, 20), rows = kind ? kind % 3 ? pick(0, 9) : pick(8, 60) : 300;
  const Rows x(rows, rows < 300 ? pick(0, most) : pick(30, 60));
  const int64_t outputs = rows < 300 ? pick(0, 2 * most) : pick(20, 60);
  switch (pick(0, 6)) {
    case 0: return check_int8(pool, x, outputs);
    case 1: return check_int4(pool, x, outputs);
    case 2: return check_bits(pool, x, outputs);
    case 3: return check_sparse(pool, x, outputs);
    case 4: return check_floats(pool, x, outputs);
    default: return check_windows(pool, (int)pick(0, 2));
  }
}

int main(int count, char** words) {
  const int rounds = count > 1 ? std::atoi(words[1]) : 100;
  for (int i = 0; i < rounds; ++i) {
    round_of<Serial>(140);
    round_of<Late>(140);
    if (i % 4 == 0) round_of<Threads>(300);
  }
  std::printf("%s: %ld wrong\n", kInstructions, wrong);
  return wrong != 0;
}
