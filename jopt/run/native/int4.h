// Products with evenly spaced 4-bit weights: exact sums of groups with int8 activations, or floats.
// Included by kernels.h, after panels.h.

namespace jopt {

struct Int4Tile {
  const Codes8& x;
  const Int4Weights& w;
  int64_t first;
  float* y;

  template <int T>
  using Sums = WI[kSums<T>][T];

  // Adds a block of 64 inputs, or the half of it that lies below or above.
  template <int T, bool kBelow = true, bool kAbove = true>
  JOPT_INLINE_MEMBER void add(const uint8_t* words, const int8_t* const* in, Sums<T>& sum) const {
    JOPT_UNROLL for (int i = 0; i < kBlock; ++i, words += kPanel * kWord) {
      if (kBelow) prefetch(words + kAheadBytes);
      const WB codes = wb_load_once(words), low = wb_low(codes), high = wb_high(codes);
      JOPT_UNROLL for (int t = 0; t < T; ++t) {
        const WB below = wb_spread(in[t] + i * kWord), above = wb_spread(in[t] + kBytes + i * kWord);
        WI& one = sum[i % kSums<T>][t];
        if constexpr (kBelow && kAbove)
          one = wi_dot4(one, low, below, high, above);
        else
          one = wi_dot4(one, kBelow ? low : high, kBelow ? below : above);
      }
    }
  }

  template <int T>
  JOPT_INLINE_MEMBER void run(int64_t m) const {
    constexpr int S = kSums<T>;
    const float* scale = w.scale + first * w.groups;
    const float* zero = w.zero ? w.zero + first * w.groups : nullptr;
    const int8_t* in[T];
    const int32_t* sums[T];
    WF total[T];
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      in[t] = x.codes + (m + t) * x.stride;
      sums[t] = x.total + (m + t) * w.groups;
      total[t] = wf_set(0);
    }
    auto start = [&](Sums<T>& sum) __attribute__((always_inline)) {
      JOPT_UNROLL for (int s = 0; s < S; ++s)
        JOPT_UNROLL for (int t = 0; t < T; ++t) sum[s][t] = wi_set(s ? 0 : -8 * *sums[t]);
    };
    auto finish = [&](Sums<T>& sum) __attribute__((always_inline)) {
      join_sums(sum);
      const WF by = wf_load(scale);
      JOPT_UNROLL for (int t = 0; t < T; ++t) total[t] = wf_fma(by, wi_float(sum[0][t]), total[t]);
      if (zero) {
        const WF shift = wf_mul(by, wf_load(zero));
        JOPT_UNROLL for (int t = 0; t < T; ++t)
          total[t] = wf_fma(shift, wf_set((float)-*sums[t]), total[t]);
        zero += kPanel;
      }
      scale += kPanel;
      JOPT_UNROLL for (int t = 0; t < T; ++t) ++sums[t];
    };
    auto next = [&] __attribute__((always_inline)) {
      JOPT_UNROLL for (int t = 0; t < T; ++t) in[t] += kPair;
    };
    const uint8_t* words = w.panel(first);
    constexpr int64_t kBlockBytes = kBlock * kPanel * kWord;
    const uint8_t* end = words + w.words * kPanel * kWord;
    if (w.group == kBytes) {
      for (int64_t g = 0; words < end; words += kBlockBytes, next()) {
        Sums<T> sum;
        start(sum);
        add<T, true, false>(words, in, sum);
        finish(sum);
        if (++g == w.groups) break;
        start(sum);
        add<T, false, true>(words, in, sum);
        finish(sum);
        ++g;
      }
    } else {
      const int64_t bytes = w.group / kPair * kBlockBytes;
      while (words < end) {
        const uint8_t* stop = end - words < bytes ? end : words + bytes;
        Sums<T> sum;
        start(sum);
        for (; words < stop; words += kBlockBytes, next()) add<T>(words, in, sum);
        finish(sum);
      }
    }
    const int64_t count = least(kPanel, w.outputs - first);
    JOPT_UNROLL for (int t = 0; t < T; ++t)
      put(wf_mul(wf_set((float)x.scale[m + t]), total[t]), count,
          y + (m + t) * w.outputs + first);
  }
};

static void int4(const Codes8& x, const Int4Weights& w, const After& after, Range rows, Range outputs,
                 float* y) {
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel)
    over_rows<kInt4Rows>(rows, Int4Tile{x, w, n, y},
                         {after, n, least(kPanel, w.outputs - n), w.outputs, y});
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
      const WB codes = wb_load(words), nibbles = above ? wb_high(codes) : wb_low(codes);
      const WF scale = wf_load(scales + at);
      WF zero = wf_set(8.0f);
      if (w.zero) zero = w_add(zero, wf_load(w.zero + first * w.groups + at));
      JOPT_UNROLL for (int j = 0; j < kWord; ++j)
        wf_store(panel.weights.get() + (k + j) * kPanel,
                 wf_mul(scale, wf_sub(wi_float(wi_byte(nibbles, j)), zero)));
    }
  return panel;
}

}  // namespace jopt
