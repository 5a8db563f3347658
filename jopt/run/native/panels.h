// What products in panels share: how rows are gone through, sums of floats, and how sums are written.
// A tile sums T rows by the 16 outputs of a panel, or by its first 8 where V is 1.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

constexpr int kFloatRows = 6;     // rows whose sums of floats fit in registers, two vectors each
constexpr int64_t kAheadBytes = 16384;  // by which prefetches of weights run ahead

// Sums that do not wait for each other: of few rows more than one for each output.
template <int T>
constexpr int kSums = T >= 4 ? 1 : T == 1 ? 4 : 2;

template <class Vector, int S, int T, int V>
JOPT_INLINE void join_sums(Vector (&sum)[S][T][V]) {
  JOPT_UNROLL for (int s = S - 1; s > 0; --s) JOPT_UNROLL for (int t = 0; t < T; ++t)
    JOPT_UNROLL for (int v = 0; v < V; ++v)
      sum[s / 2][t][v] = v_add(sum[s / 2][t][v], sum[s][t][v]);
}

template <int V>
JOPT_INLINE void put(const F* values, int64_t count, float* y) {
  if (count >= V * kFloats) {
    JOPT_UNROLL for (int v = 0; v < V; ++v) f_store(y + v * kFloats, values[v]);
    return;
  }
  float all[V * kFloats];
  JOPT_UNROLL for (int v = 0; v < V; ++v) f_store(all + v * kFloats, values[v]);
  std::memcpy(y, all, count * sizeof(float));
}

template <int T, int V, class Tile>
JOPT_INLINE void rows_from(int64_t m, int64_t end, const Tile& tile) {
  for (; m + T <= end; m += T) tile.template run<T, V>(m);
  if constexpr (T > 1) rows_from<T / 2, V>(m, end, tile);
}

// T rows at a time, then half as many, down to one.
template <int T, class Tile>
JOPT_INLINE void over_rows(Range rows, Tile tile) {
  if (tile.count > kFloats) return rows_from<T, 2>(rows.begin, rows.end, tile);
  rows_from<T, 1>(rows.begin, rows.end, tile);
}

// What outputs of a panel come with, and how many there are: of the others it is 0.
struct Ends {
  int64_t first, count;
  float scale[kPanel] = {0}, zero[kPanel] = {0};

  Ends(int64_t first, int64_t outputs, const float* scales, const float* zeros)
      : first(first), count(least(kPanel, outputs - first)) {
    if (scales) std::memcpy(scale, scales + first, count * sizeof(float));
    if (zeros) std::memcpy(zero, zeros + first, count * sizeof(float));
  }
};

// --- Floats ---------------------------------------------------------------------------------------

// A panel of floats, (inputs, 16).
struct FloatPanel {
  int64_t first, count;
  std::unique_ptr<float[]> weights;

  FloatPanel(int64_t first, int64_t outputs, int64_t inputs)
      : first(first), count(least(kPanel, outputs - first)), weights(new float[inputs * kPanel + 1]) {}
};

// Rows of floats: each is `runs` runs of memory, of one length. Those of a matrix are one run, the
// windows of an image one for each row of the kernel.
struct Runs {
  const float* data;
  int64_t stride;  // from one row to the next
  int64_t runs, length, jump;
};

JOPT_INLINE Runs one_run(const Floats& x) { return {x.data, x.stride, 1, x.inputs, 0}; }

struct FloatTile {
  Runs x;
  const FloatPanel& panel;
  int64_t outputs;
  float* y;
  int64_t count = panel.count;

  template <int T, int V>
  JOPT_INLINE_MEMBER void run(int64_t m) const {
    const float* weights = panel.weights.get();
    const float* in[T];
    F sum[T][V];
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      in[t] = x.data + (m + t) * x.stride;
      JOPT_UNROLL for (int v = 0; v < V; ++v) sum[t][v] = f_zero();
    }
    for (int64_t run = 0; run < x.runs; ++run) {
      for (int64_t k = 0; k < x.length; ++k, weights += kPanel) {
        F column[V];
        JOPT_UNROLL for (int v = 0; v < V; ++v) column[v] = f_load(weights + v * kFloats);
        JOPT_UNROLL for (int t = 0; t < T; ++t) {
          const F spread = f_set(in[t][k]);
          JOPT_UNROLL for (int v = 0; v < V; ++v) sum[t][v] = f_fma(column[v], spread, sum[t][v]);
        }
      }
      JOPT_UNROLL for (int t = 0; t < T; ++t) in[t] += x.jump;
    }
    JOPT_UNROLL for (int t = 0; t < T; ++t)
      put<V>(sum[t], count, y + (m + t) * outputs + panel.first);
  }
};

constexpr int64_t kAheadRows = 12;  // no stream: rows lie apart

static FloatPanel float_pack(const FloatWeights& w, int64_t inputs, int64_t first) {
  FloatPanel panel(first, w.outputs, inputs);
  float* to = panel.weights.get();
  for (int64_t k = 0; k < inputs; ++k, to += kPanel) {
    const float* from = w.kernel + k * w.outputs + first;
    prefetch(from + kAheadRows * w.outputs);
    if (panel.count == kPanel) {
      f_store(to, f_load(from));
      f_store(to + kFloats, f_load(from + kFloats));
    } else {
      for (int64_t n = 0; n < kPanel; ++n) to[n] = n < panel.count ? from[n] : 0.0f;
    }
  }
  return panel;
}

// Rows by panels that `pack(first)` makes.
template <class Pack>
JOPT_INLINE void by_floats(const Floats& x, const Pack& pack, int64_t count, Range rows,
                           Range outputs, float* y) {
  const Runs in = one_run(x);
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel) {
    const FloatPanel panel = pack(n);
    over_rows<kFloatRows>(rows, FloatTile{in, panel, count, y});
  }
}

// A convolution of all channels, whose panels `pack(first)` makes. Rows are those of the outputs'
// images, counted over the batch; the input is padded, so that every window lies inside it: it is as
// high as `s` says, and as wide.
template <class Pack>
static void convolution(const float* x, const Pack& pack, int64_t count, const Window& s, Range rows,
                        Range outputs, float* y) {
  const int64_t length = s.columns * s.channels, line = s.width * s.channels;
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel) {
    const FloatPanel panel = pack(n);
    for (int64_t at = rows.begin; at < rows.end; ++at) {
      const int64_t top = at / s.out_rows * s.height + at % s.out_rows * s.stride_rows;
      const Runs in{x + top * line, s.stride_columns * s.channels, s.rows, length, line};
      float* out = y + at * s.out_columns * count;
      over_rows<kFloatRows>(Range{0, s.out_columns}, FloatTile{in, panel, count, out});
    }
  }
}

}  // namespace jopt
