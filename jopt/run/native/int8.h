// Products with int8 weights: exact sums with int8 activations, or floats with float ones.
// Included by kernels.h, after panels.h.

namespace jopt {

struct Int8Tile {
  const Codes8& x;
  const Int8Weights& w;
  const Ends& ends;
  float* y;
  int64_t count = ends.count;

  template <int T, int V>
  JOPT_INLINE_MEMBER void run(int64_t m) const {
    constexpr int S = kSums<T>;
    const int8_t* words = w.panel(ends.first);
    const int8_t* in[T];
    I sum[S][T][V];
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      in[t] = x.codes + (m + t) * x.stride;
      JOPT_UNROLL for (int s = 0; s < S; ++s) JOPT_UNROLL for (int v = 0; v < V; ++v)
        sum[s][t][v] = i_set(kShift && s == 0 ? -kShift * x.total[m + t] : 0);
    }
    for (int64_t k = 0; k < w.words * kWord; k += S * kWord) {
      JOPT_UNROLL for (int s = 0; s < S; ++s, words += kPanel * kWord) {
        B codes[V];
        prefetch(words + kAheadBytes);
        JOPT_UNROLL for (int v = 0; v < V; ++v) codes[v] = b_shifted(b_load(words + v * kBytes));
        JOPT_UNROLL for (int t = 0; t < T; ++t) {
          const B spread = b_spread(in[t] + k + s * kWord);
          JOPT_UNROLL for (int v = 0; v < V; ++v)
            sum[s][t][v] = dot_shifted(sum[s][t][v], codes[v], spread);
        }
      }
    }
    join_sums(sum);
    JOPT_UNROLL for (int t = 0; t < T; ++t) finish<V>(m + t, sum[0][t]);
  }

  template <int V>
  JOPT_INLINE_MEMBER void finish(int64_t m, const I* sum) const {
    float* out = y + m * w.outputs + ends.first;
    if (w.zero) {
      int32_t lanes[V * kFloats];
      JOPT_UNROLL for (int v = 0; v < V; ++v) i_store(lanes + v * kFloats, sum[v]);
      for (int64_t n = 0; n < count; ++n)
        out[n] = (float)(x.scale[m] * ((double)ends.scale[n] *
                                       (lanes[n] - (double)ends.zero[n] * x.total[m])));
      return;
    }
    // In the order in which no product is too large or too small for a float unless the last is.
    const F step = f_set((float)x.scale[m]);
    const bool large = x.scale[m] >= 1;
    F values[V];
    JOPT_UNROLL for (int v = 0; v < V; ++v) {
      const F scale = f_load(ends.scale + v * kFloats), value = i_float(sum[v]);
      values[v] = large ? f_mul(f_mul(value, scale), step) : f_mul(f_mul(value, step), scale);
    }
    put<V>(values, count, out);
  }
};

static void int8(const Codes8& x, const Int8Weights& w, Range rows, Range outputs, float* y) {
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel)
    over_rows<kInt8Rows>(rows, Int8Tile{x, w, Ends(n, w.outputs, w.scale, w.zero), y});
}

// Float activations: codes are widened as they are read.
struct Int8FloatTile {
  const Floats& x;
  const Int8Weights& w;
  const Ends& ends;
  float* y;
  int64_t count = ends.count;

  template <int T, int V>
  JOPT_INLINE_MEMBER void run(int64_t m) const {
    constexpr int S = kSums<T>;
    const int8_t* words = w.panel(ends.first);
    const float* in[T];
    F sum[S][T][V];
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      in[t] = x.data + (m + t) * x.stride;
      JOPT_UNROLL for (int s = 0; s < S; ++s)
        JOPT_UNROLL for (int v = 0; v < V; ++v) sum[s][t][v] = f_zero();
    }
    auto add = [&](const B* codes, int64_t k, int j) __attribute__((always_inline)) {
      JOPT_UNROLL for (int v = 0; v < V; ++v) {
        const F column = i_float(i_byte(codes[v], j));
        JOPT_UNROLL for (int t = 0; t < T; ++t)
          sum[j % S][t][v] = f_fma(column, f_set(in[t][k + j]), sum[j % S][t][v]);
      }
    };
    int64_t k = 0;
    for (; k < x.inputs; k += kWord, words += kPanel * kWord) {
      B codes[V];
      prefetch(words + kAheadBytes);
      JOPT_UNROLL for (int v = 0; v < V; ++v) codes[v] = b_load(words + v * kBytes);
      JOPT_UNROLL for (int j = 0; j < kWord; ++j)
        if (j == 0 || k + j < x.inputs) add(codes, k, j);
    }
    join_sums(sum);
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      float* out = y + (m + t) * w.outputs + ends.first;
      float lanes[V * kFloats];
      JOPT_UNROLL for (int v = 0; v < V; ++v) f_store(lanes + v * kFloats, sum[0][t][v]);
      for (int64_t n = 0; n < count; ++n) {
        const double less = w.zero ? (double)ends.zero[n] * x.total[m + t] : 0;
        out[n] = (float)(ends.scale[n] * (lanes[n] - less));
      }
    }
  }
};

static void int8_float(const Floats& x, const Int8Weights& w, Range rows, Range outputs, float* y) {
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel)
    over_rows<4>(rows, Int8FloatTile{x, w, Ends(n, w.outputs, w.scale, w.zero), y});
}

// A panel as floats.
static FloatPanel int8_unpack(const Int8Weights& w, int64_t inputs, int64_t first) {
  FloatPanel panel(first, w.outputs, round_up(inputs, kWord));
  const Ends ends(first, w.outputs, w.scale, w.zero);
  const int8_t* words = w.panel(first);
  float* to = panel.weights.get();
  for (int64_t k = 0; k < inputs; k += kWord, words += kPanel * kWord, to += kPanel * kWord)
    for (int half = 0; half < 2; ++half) {
      const B codes = b_load(words + half * kBytes);
      const F scale = f_load(ends.scale + half * kFloats);
      const F zero = f_load(ends.zero + half * kFloats);
      JOPT_UNROLL for (int j = 0; j < kWord; ++j)
        f_store(to + j * kPanel + half * kFloats, f_mul(scale, f_sub(i_float(i_byte(codes, j)), zero)));
    }
  return panel;
}

}  // namespace jopt
