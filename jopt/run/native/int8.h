// Products with int8 weights: exact sums with int8 activations, or floats with float ones.
// Included by kernels.h, after panels.h.

namespace jopt {

struct Int8Tile {
  const Codes8& x;
  const Int8Weights& w;
  const Ends& ends;
  float* y;

  template <int T>
  JOPT_INLINE_MEMBER void run(int64_t m) const {
    constexpr int S = kSums<T>;
    const int8_t* words = w.panel(ends.first);
    const int8_t* in[T];
    WI sum[S][T];
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      in[t] = x.codes + (m + t) * x.stride;
      JOPT_UNROLL for (int s = 0; s < S; ++s)
        sum[s][t] = wi_set(kShift && s == 0 ? -kShift * x.total[m + t] : 0);
    }
    for (int64_t k = 0; k < w.words * kWord; k += S * kWord) {
      JOPT_UNROLL for (int s = 0; s < S; ++s, words += kPanel * kWord) {
        prefetch(words + kAheadBytes);
        const WB codes = wb_shifted(wb_load(words));
        JOPT_UNROLL for (int t = 0; t < T; ++t)
          sum[s][t] = wi_dot_shifted(sum[s][t], codes, wb_spread(in[t] + k + s * kWord));
      }
    }
    join_sums(sum);
    JOPT_UNROLL for (int t = 0; t < T; ++t) finish(m + t, sum[0][t]);
  }

  JOPT_INLINE_MEMBER void finish(int64_t m, WI sum) const {
    float* out = y + m * w.outputs + ends.first;
    if (w.zero) {
      int32_t lanes[kPanel];
      wi_store(lanes, sum);
      for (int64_t n = 0; n < ends.count; ++n)
        out[n] = (float)(x.scale[m] * ((double)ends.scale[n] *
                                       (lanes[n] - (double)ends.zero[n] * x.total[m])));
      return;
    }
    // In the order in which no product is too large or too small for a float unless the last is.
    const WF step = wf_set((float)x.scale[m]), scale = wf_load(ends.scale), value = wi_float(sum);
    const bool large = x.scale[m] >= 1;
    put(large ? wf_mul(wf_mul(value, scale), step) : wf_mul(wf_mul(value, step), scale), ends.count,
        out);
  }
};

static void int8(const Codes8& x, const Int8Weights& w, const After& after, Range rows, Range outputs,
                 float* y) {
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel) {
    const Ends ends(n, w.outputs, w.scale, w.zero);
    over_rows<kInt8Rows>(rows, Int8Tile{x, w, ends, y}, {after, n, ends.count, w.outputs, y});
  }
}

// Float activations: codes are widened as they are read.
struct Int8FloatTile {
  const Floats& x;
  const Int8Weights& w;
  const Ends& ends;
  float* y;

  template <int T>
  JOPT_INLINE_MEMBER void run(int64_t m) const {
    constexpr int S = kSums<T>;
    const int8_t* words = w.panel(ends.first);
    const float* in[T];
    WF sum[S][T];
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      in[t] = x.data + (m + t) * x.stride;
      JOPT_UNROLL for (int s = 0; s < S; ++s) sum[s][t] = wf_set(0);
    }
    for (int64_t k = 0; k < x.inputs; k += kWord, words += kPanel * kWord) {
      prefetch(words + kAheadBytes);
      const WB codes = wb_load(words);
      JOPT_UNROLL for (int j = 0; j < kWord; ++j) {
        if (j && k + j >= x.inputs) break;
        const WF column = wi_float(wi_byte(codes, j));
        JOPT_UNROLL for (int t = 0; t < T; ++t)
          sum[j % S][t] = wf_fma(column, wf_set(in[t][k + j]), sum[j % S][t]);
      }
    }
    join_sums(sum);
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      float* out = y + (m + t) * w.outputs + ends.first;
      float lanes[kPanel];
      wf_store(lanes, sum[0][t]);
      for (int64_t n = 0; n < ends.count; ++n) {
        const double less = w.zero ? (double)ends.zero[n] * x.total[m + t] : 0;
        out[n] = (float)(ends.scale[n] * (lanes[n] - less));
      }
    }
  }
};

static void int8_float(const Floats& x, const Int8Weights& w, const After& after, Range rows,
                       Range outputs, float* y) {
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel) {
    const Ends ends(n, w.outputs, w.scale, w.zero);
    over_rows<4>(rows, Int8FloatTile{x, w, ends, y}, {after, n, ends.count, w.outputs, y});
  }
}

// A panel as floats.
static FloatPanel int8_unpack(const Int8Weights& w, int64_t inputs, int64_t first) {
  FloatPanel panel(first, w.outputs, round_up(inputs, kWord));
  const Ends ends(first, w.outputs, w.scale, w.zero);
  const int8_t* words = w.panel(first);
  float* to = panel.weights.get();
  const WF scale = wf_load(ends.scale), zero = wf_load(ends.zero);
  for (int64_t k = 0; k < inputs; k += kWord, words += kPanel * kWord, to += kPanel * kWord) {
    const WB codes = wb_load(words);
    JOPT_UNROLL for (int j = 0; j < kWord; ++j)
      wf_store(to + j * kPanel, wf_mul(scale, wf_sub(wi_float(wi_byte(codes, j)), zero)));
  }
  return panel;
}

}  // namespace jopt
