// Products with sparse weights, in compressed rows by output and, within those, by blocks of inputs.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

template <class Column>
static bool columns_fit(const Column* columns, int64_t count, int64_t inputs) {
  constexpr int64_t kStep = kBytes / sizeof(Column);
  B largest = b_none();
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) largest = b_larger(largest, b_load(columns + i), Column{});
  Column lanes[kStep], most = 0;
  b_store(lanes, largest);
  for (Column lane : lanes) most = lane > most ? lane : most;
  for (; i < count; ++i) most = columns[i] > most ? columns[i] : most;
  return count == 0 || (int64_t)most < inputs;
}

constexpr int64_t kAhead = 1024;  // entries by which prefetches run ahead, over the rows that follow

template <class Column>
JOPT_INLINE float sparse_dot(const float* values, const Column* columns, int64_t count,
                             const float* x) {
  float sum[8] = {0};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    prefetch(values + i + kAhead);
    prefetch(columns + i + kAhead);
    JOPT_UNROLL for (int lane = 0; lane < 8; ++lane)
      sum[lane] += values[i + lane] * x[columns[i + lane]];
  }
  for (; i < count; ++i) sum[0] += values[i] * x[columns[i]];
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// to[column * to_stride + row] = from[row * from_stride + column]
static void transpose(const float* from, int64_t rows, int64_t columns, int64_t from_stride,
                      float* to, int64_t to_stride) {
  int64_t row = 0;
  for (; row + kFloats <= rows; row += kFloats) {
    int64_t column = 0;
    for (; column + kFloats <= columns; column += kFloats) {
      B square[kFloats];
      JOPT_UNROLL for (int i = 0; i < kFloats; ++i)
        square[i] = b_load(from + (row + i) * from_stride + column);
      b_transpose(square);
      JOPT_UNROLL for (int i = 0; i < kFloats; ++i)
        b_store(to + (column + i) * to_stride + row, square[i]);
    }
    for (; column < columns; ++column)
      for (int64_t i = row; i < row + kFloats; ++i)
        to[column * to_stride + i] = from[i * from_stride + column];
  }
  for (; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column)
      to[column * to_stride + row] = from[row * from_stride + column];
}

// How many rows are added up together of those that are left.
JOPT_INLINE int64_t rows_together(int64_t left) {
  return left > 16 ? 32 : left > 8 ? 16 : 8;
}

// Sums of rows that are added up together: 8, 16 or 32, whose inputs lie side by side.
struct Rows8 {
  static constexpr int kChains = 4;  // that hide the latency
  F sum = f_zero();
  JOPT_INLINE_MEMBER void add(const Rows8& other) { sum = f_add(sum, other.sum); }
  JOPT_INLINE_MEMBER void add(float value, const float* x) {
    sum = f_fma(f_set(value), f_load(x), sum);
  }
};
template <int V>
struct Rows16 {
  static constexpr int kChains = 4 / V;
  WF sum[V];
  JOPT_INLINE_MEMBER Rows16() { JOPT_UNROLL for (int v = 0; v < V; ++v) sum[v] = wf_set(0); }
  JOPT_INLINE_MEMBER void add(const Rows16& other) {
    JOPT_UNROLL for (int v = 0; v < V; ++v) sum[v] = w_add(sum[v], other.sum[v]);
  }
  JOPT_INLINE_MEMBER void add(float value, const float* x) {
    const WF spread = wf_set(value);
    JOPT_UNROLL for (int v = 0; v < V; ++v)
      sum[v] = wf_fma(spread, wf_load(x + v * kPanel), sum[v]);
  }
};

// Adds the products of some entries; x lies transposed, (inputs, rows).
template <class Sums, class Column>
JOPT_INLINE void sparse_tile(const float* values, const Column* columns, int64_t count,
                             const float* x, Sums& total) {
  constexpr int64_t kRows = sizeof(Sums) / sizeof(float);
  constexpr int kChains = Sums::kChains;
  Sums sum[kChains];
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains)
    JOPT_UNROLL for (int c = 0; c < kChains; ++c)
      sum[c].add(values[i + c], x + (uint64_t)columns[i + c] * kRows);
  for (; i < count; ++i) sum[0].add(values[i], x + (uint64_t)columns[i] * kRows);
  JOPT_UNROLL for (int c = 0; c < kChains; ++c) total.add(sum[c]);
}

// Some rows by some outputs: one block of inputs after the other, which so stays near.
template <class Sums, class Column>
JOPT_INLINE void sparse_rows(const float* x, const SparseWeights& w, Range range, int64_t rows,
                             float* y) {
  constexpr int64_t kRows = sizeof(Sums) / sizeof(float), kOutputs = 128;
  for (int64_t from = range.begin; from < range.end; from += kOutputs) {
    const int64_t size = least(kOutputs, range.end - from);
    Sums held[kOutputs];
    for (int64_t block = 0; block < w.blocks; ++block)
      for (int64_t i = 0; i < size; ++i) {
        const int32_t* starts = w.starts + (from + i) * w.blocks + block;
        sparse_tile(w.values + starts[0], (const Column*)w.columns + starts[0], starts[1] - starts[0],
                    x, held[i]);
      }
    transpose((const float*)held, size, rows, kRows, y + from, w.outputs);
  }
}

// Whether the columns of some outputs are below the number of inputs.
template <class Column>
JOPT_INLINE bool outputs_fit(const SparseWeights& w, Range range, int64_t inputs) {
  const int64_t first = w.starts[range.begin * w.blocks], last = w.starts[range.end * w.blocks];
  return columns_fit((const Column*)w.columns + first, last - first, inputs);
}

// Columns of one output are read from memory once: looked at, then used.
template <class Column>
static bool sparse_row(const Floats& x, const SparseWeights& w, Range range, float* y) {
  for (int64_t n = range.begin; n < range.end; ++n) {
    if (!outputs_fit<Column>(w, {n, n + 1}, x.inputs)) return false;
    const int64_t start = w.starts[n * w.blocks], end = w.starts[(n + 1) * w.blocks];
    y[n] = sparse_dot(w.values + start, (const Column*)w.columns + start, end - start, x.data);
  }
  return true;
}

template <class Column>
static bool sparse_outputs(const Floats& x, const SparseWeights& w, Range range, float* y) {
  if (x.rows == 1) return sparse_row<Column>(x, w, range, y);
  if (!outputs_fit<Column>(w, range, x.inputs)) return false;
  for (int64_t m = 0, some; m < x.rows; m += some) {
    some = rows_together(x.rows - m);
    const float* in = x.data + m * x.inputs;
    const int64_t left = least(some, x.rows - m);
    float* out = y + m * w.outputs;
    if (some == 32) sparse_rows<Rows16<2>, Column>(in, w, range, left, out);
    else if (some == 16) sparse_rows<Rows16<1>, Column>(in, w, range, left, out);
    else sparse_rows<Rows8, Column>(in, w, range, left, out);
  }
  return true;
}

// Returns false, and reads nothing beyond x, where a column is not below the number of inputs.
static bool sparse(const Floats& x, const SparseWeights& w, Range range, float* y) {
  return w.wide ? sparse_outputs<uint32_t>(x, w, range, y)
                : sparse_outputs<uint16_t>(x, w, range, y);
}

}  // namespace jopt
