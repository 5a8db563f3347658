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

constexpr int64_t kLanes = 16;  // rows whose sums are added up together
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

JOPT_INLINE F lanes_zero(F) { return f_zero(); }
JOPT_INLINE F lanes_add(F a, F b) { return f_add(a, b); }
JOPT_INLINE F lanes_fma(float a, const float* b, F c) { return f_fma(f_set(a), f_load(b), c); }
JOPT_INLINE WF lanes_zero(WF) { return wf_set(0); }
JOPT_INLINE WF lanes_add(WF a, WF b) { return w_add(a, b); }
JOPT_INLINE WF lanes_fma(float a, const float* b, WF c) { return wf_fma(wf_set(a), wf_load(b), c); }

// Adds to the sums of a vector of rows, 8 or 16; x lies transposed, (inputs, rows). Chains hide the
// latency.
template <class Lanes, class Column>
JOPT_INLINE Lanes sparse_tile(Lanes total, const float* values, const Column* columns, int64_t count,
                              const float* x) {
  constexpr int64_t kRows = sizeof(Lanes) / sizeof(float);
  constexpr int kChains = 4;
  Lanes sum[kChains];
  JOPT_UNROLL for (int c = 0; c < kChains; ++c) sum[c] = c ? lanes_zero(Lanes()) : total;
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains)
    JOPT_UNROLL for (int c = 0; c < kChains; ++c)
      sum[c] = lanes_fma(values[i + c], x + (uint64_t)columns[i + c] * kRows, sum[c]);
  for (; i < count; ++i) sum[0] = lanes_fma(values[i], x + (uint64_t)columns[i] * kRows, sum[0]);
  return lanes_add(lanes_add(sum[0], sum[1]), lanes_add(sum[2], sum[3]));
}

// A vector of rows by some outputs: one block of inputs after the other, which so stays in the first
// level of the cache.
template <class Lanes, class Column>
JOPT_INLINE void sparse_rows(const float* x, const SparseWeights& w, Range range, int64_t left,
                             float* y) {
  constexpr int64_t kRows = sizeof(Lanes) / sizeof(float), kOutputs = 128;
  Lanes held[kOutputs];
  for (int64_t from = range.begin; from < range.end; from += kOutputs) {
    const int64_t size = least(kOutputs, range.end - from);
    for (int64_t i = 0; i < size; ++i) held[i] = lanes_zero(Lanes());
    for (int64_t block = 0; block < w.blocks; ++block)
      for (int64_t i = 0; i < size; ++i) {
        const int32_t* starts = w.starts + (from + i) * w.blocks + block;
        held[i] = sparse_tile<Lanes>(held[i], w.values + starts[0], (const Column*)w.columns + starts[0],
                                     starts[1] - starts[0], x);
      }
    const float* sums = (const float*)held;
    for (int64_t row = 0; row < left; ++row)
      for (int64_t i = 0; i < size; ++i) y[row * w.outputs + from + i] = sums[i * kRows + row];
  }
}

template <class Column>
static bool sparse_outputs(const Floats& x, const SparseWeights& w, Range range, float* y) {
  const Column* columns = (const Column*)w.columns;
  const int64_t first = w.starts[range.begin * w.blocks], last = w.starts[range.end * w.blocks];
  if (!columns_fit(columns + first, last - first, x.inputs)) return false;
  if (x.stride == 1) {
    for (int64_t n = range.begin; n < range.end; ++n) {
      const int64_t start = w.starts[n * w.blocks], end = w.starts[(n + 1) * w.blocks];
      y[n] = sparse_dot(w.values + start, columns + start, end - start, x.data);
    }
    return true;
  }
  for (int64_t m = 0; m < x.rows; m += x.stride) {
    const float* in = x.data + m * x.inputs;
    const int64_t left = least(x.stride, x.rows - m);
    float* out = y + m * w.outputs;
    if (x.stride == kFloats) sparse_rows<F, Column>(in, w, range, left, out);
    else sparse_rows<WF, Column>(in, w, range, left, out);
  }
  return true;
}

// Returns false, and reads nothing of x, where a column is not below the number of inputs.
static bool sparse(const Floats& x, const SparseWeights& w, Range range, float* y) {
  return w.wide ? sparse_outputs<uint32_t>(x, w, range, y)
                : sparse_outputs<uint16_t>(x, w, range, y);
}

}  // namespace jopt
