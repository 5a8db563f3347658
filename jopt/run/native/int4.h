// Products with evenly spaced 4-bit weights: exact sums of groups with int8 activations, or floats.
// Included by kernels.h, after panels.h.

namespace jopt {

struct Int4Tile {
  const Codes8& x;
  const Int4Weights& w;
  int64_t first;
  float* y;
  int64_t count = least(kPanel, w.outputs - first);

  template <int T, int V>
  using Sums = I[kSums<T>][T][V];

  // Adds a block of 64 inputs, or the half of it that lies below or above.
  template <int T, int V, bool kBelow = true, bool kAbove = true>
  JOPT_INLINE_MEMBER void add(const uint8_t* words, const int8_t* const* in, Sums<T, V>& sum) const {
    JOPT_UNROLL for (int i = 0; i < kBlock; ++i, words += kPanel * kWord) {
      B low[V], high[V];
      if (kBelow) prefetch(words + kAheadBytes);
      JOPT_UNROLL for (int v = 0; v < V; ++v) {
        const B codes = b_load(words + v * kBytes);
        low[v] = b_low(codes);
        high[v] = b_high(codes);
      }
      JOPT_UNROLL for (int t = 0; t < T; ++t) {
        const B below = b_spread(in[t] + i * kWord), above = b_spread(in[t] + kBytes + i * kWord);
        JOPT_UNROLL for (int v = 0; v < V; ++v) {
          I& one = sum[i % kSums<T>][t][v];
          if constexpr (kBelow && kAbove)
            one = dot4(one, low[v], below, high[v], above);
          else
            one = dot4(one, kBelow ? low[v] : high[v], kBelow ? below : above);
        }
      }
    }
  }

  template <int T, int V>
  JOPT_INLINE_MEMBER void run(int64_t m) const {
    constexpr int S = kSums<T>;
    const uint8_t* words = w.panel(first);
    const float* scales = w.scale + first * w.groups;
    const float* zeros = w.zero ? w.zero + first * w.groups : nullptr;
    const int8_t* in[T];
    F total[T][V];
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      in[t] = x.codes + (m + t) * x.stride;
      JOPT_UNROLL for (int v = 0; v < V; ++v) total[t][v] = f_zero();
    }
    auto start = [&](Sums<T, V>& sum, int64_t g) __attribute__((always_inline)) {
      JOPT_UNROLL for (int s = 0; s < S; ++s) JOPT_UNROLL for (int t = 0; t < T; ++t)
        JOPT_UNROLL for (int v = 0; v < V; ++v)
          sum[s][t][v] = i_set(s ? 0 : -8 * x.total[(m + t) * w.groups + g]);
    };
    auto finish = [&](Sums<T, V>& sum, int64_t g) __attribute__((always_inline)) {
      join_sums(sum);
      JOPT_UNROLL for (int v = 0; v < V; ++v) {
        const F scale = f_load(scales + g * kPanel + v * kFloats);
        JOPT_UNROLL for (int t = 0; t < T; ++t)
          total[t][v] = f_fma(scale, i_float(sum[0][t][v]), total[t][v]);
        if (!zeros) continue;
        const F shift = f_mul(scale, f_load(zeros + g * kPanel + v * kFloats));
        JOPT_UNROLL for (int t = 0; t < T; ++t) {
          const F less = f_set((float)-x.total[(m + t) * w.groups + g]);
          total[t][v] = f_fma(shift, less, total[t][v]);
        }
      }
    };
    auto block = [&](int64_t b) __attribute__((always_inline)) {
      JOPT_UNROLL for (int t = 0; t < T; ++t) in[t] = x.codes + (m + t) * x.stride + b * kPair;
      return words + b * kBlock * kPanel * kWord;
    };
    const int64_t blocks = w.words / kBlock;
    if (w.group == kBytes) {
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* at = block(b);
        Sums<T, V> sum;
        start(sum, 2 * b);
        add<T, V, true, false>(at, in, sum);
        finish(sum, 2 * b);
        if (2 * b + 1 == w.groups) break;
        start(sum, 2 * b + 1);
        add<T, V, false, true>(at, in, sum);
        finish(sum, 2 * b + 1);
      }
    } else {
      const int64_t each = w.group / kPair;
      for (int64_t g = 0; g < w.groups; ++g) {
        Sums<T, V> sum;
        start(sum, g);
        for (int64_t b = g * each; b < least((g + 1) * each, blocks); ++b) {
          const uint8_t* at = block(b);
          add<T, V>(at, in, sum);
        }
        finish(sum, g);
      }
    }
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      const F step = f_set((float)x.scale[m + t]);
      JOPT_UNROLL for (int v = 0; v < V; ++v) total[t][v] = f_mul(step, total[t][v]);
      put<V>(total[t], count, y + (m + t) * w.outputs + first);
    }
  }
};

static void int4(const Codes8& x, const Int4Weights& w, Range rows, Range outputs, float* y) {
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel)
    over_rows<kInt4Rows>(rows, Int4Tile{x, w, n, y});
}

// A panel as floats.
static FloatPanel int4_unpack(const Int4Weights& w, int64_t inputs, int64_t first) {
  FloatPanel panel(first, w.outputs, round_up(inputs, kPair));
  const uint8_t* words = w.panel(first);
  const float* scales = w.scale + first * w.groups;
  for (int64_t i = 0; i < w.words; ++i, words += kPanel * kWord)
    for (int above = 0; above < 2; ++above) {
      const int64_t k = i / kBlock * kPair + i % kBlock * kWord + above * kBytes;
      if (k >= inputs) continue;
      const int64_t at = k / w.group * kPanel;
      for (int half = 0; half < 2; ++half) {
        const B codes = b_load(words + half * kBytes);
        const B nibbles = above ? b_high(codes) : b_low(codes);
        const F scale = f_load(scales + at + half * kFloats);
        F zero = f_set(8.0f);
        if (w.zero) zero = f_add(zero, f_load(w.zero + first * w.groups + at + half * kFloats));
        JOPT_UNROLL for (int j = 0; j < kWord; ++j)
          f_store(panel.weights.get() + (k + j) * kPanel + half * kFloats,
                  f_mul(scale, f_sub(i_float(i_byte(nibbles, j)), zero)));
      }
    }
  return panel;
}

}  // namespace jopt
