// Products with sparse weights, in compressed rows by output.
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

// V vectors of rows at once; x lies transposed, (inputs, stride). Two chains hide the latency.
template <int V, class Column>
JOPT_INLINE void sparse_tile(const float* values, const Column* columns, int64_t count,
                             const float* x, int64_t stride, float* out) {
  F even[V], odd[V];
  JOPT_UNROLL for (int v = 0; v < V; ++v) even[v] = odd[v] = f_zero();
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    const F a = f_set(values[i]), b = f_set(values[i + 1]);
    const float *p = x + columns[i] * stride, *q = x + columns[i + 1] * stride;
    JOPT_UNROLL for (int v = 0; v < V; ++v) {
      even[v] = f_fma(a, f_load(p + v * kFloats), even[v]);
      odd[v] = f_fma(b, f_load(q + v * kFloats), odd[v]);
    }
  }
  if (i < count) {
    const float* p = x + columns[i] * stride;
    JOPT_UNROLL for (int v = 0; v < V; ++v)
      even[v] = f_fma(f_set(values[i]), f_load(p + v * kFloats), even[v]);
  }
  JOPT_UNROLL for (int v = 0; v < V; ++v) f_store(out + v * kFloats, f_add(even[v], odd[v]));
}

template <class Column>
static bool sparse_outputs(const Floats& x, const SparseWeights& w, Range range, float* y) {
  const Column* columns = (const Column*)w.columns;
  const int64_t first = w.starts[range.begin], last = w.starts[range.end];
  if (!columns_fit(columns + first, last - first, x.inputs)) return false;
  constexpr int64_t kBlock = 16;
  float held[kBlock][32];
  for (int64_t from = range.begin; from < range.end; from += kBlock) {
    const int64_t size = least(kBlock, range.end - from);
    for (int64_t m = 0; m < x.rows; m += 32) {
      const int64_t left = least(32, x.rows - m);
      for (int64_t i = 0; i < size; ++i) {
        const int64_t start = w.starts[from + i], count = w.starts[from + i + 1] - start;
        const float* values = w.values + start;
        const Column* in = columns + start;
        if (x.rows == 1) held[i][0] = sparse_dot(values, in, count, x.data);
        else if (left <= 8) sparse_tile<1>(values, in, count, x.data + m, x.stride, held[i]);
        else if (left <= 16) sparse_tile<2>(values, in, count, x.data + m, x.stride, held[i]);
        else sparse_tile<4>(values, in, count, x.data + m, x.stride, held[i]);
      }
      for (int64_t row = 0; row < left; ++row)
        for (int64_t i = 0; i < size; ++i) y[(m + row) * w.outputs + from + i] = held[i][row];
    }
  }
  return true;
}

// Returns false, and reads nothing of x, where a column is not below the number of inputs.
static bool sparse(const Floats& x, const SparseWeights& w, Range range, float* y) {
  return w.wide ? sparse_outputs<uint32_t>(x, w, range, y)
                : sparse_outputs<uint16_t>(x, w, range, y);
}

}  // namespace jopt
