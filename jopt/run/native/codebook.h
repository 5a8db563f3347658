// Products with 4-bit codebooks: entries of tables as they are with float activations, rounded to
// int8 with int8 ones. Few rows are multiplied as codes lie, by output; for many they are packed into
// panels. Included by kernels.h, after panels.h.

namespace jopt {

JOPT_INLINE float scale_of(const Codebook& w, int64_t n, int64_t g) {
  return w.scale ? w.scale[n * w.groups + g] : 1.0f;
}

// 32 codes of an output from input k on, a multiple of 32.
JOPT_INLINE B codes_of(const Codebook& w, int64_t n, int64_t k) {
  const B block = b_load(w.packed + n * w.width + k / kPair * kBytes);
  return k % kPair ? b_high(block) : b_low(block);
}

// --- Floats ---------------------------------------------------------------------------------------

// T rows of activations by one output. 32 codes lie in one group, so that an entry is scaled once for
// all rows.
template <int T>
JOPT_INLINE void codebook_tile(const Floats& x, const Codebook& w, int64_t n, int64_t m, float* y) {
  const Table table = t_load(w.table + (w.tables > 1 ? 16 * n : 0));
  const float* in[T];
  F sum[T];
  JOPT_UNROLL for (int t = 0; t < T; ++t) {
    in[t] = x.data + (m + t) * x.stride;
    sum[t] = f_zero();
  }
  uint8_t index[kBytes];
  for (int64_t k = 0; k < x.inputs; k += kBytes) {
    b_store(index, codes_of(w, n, k));
    prefetch(w.packed + (n + 1) * w.width + k / 2);
    const F scale = f_set(scale_of(w, n, k / w.group));
    JOPT_UNROLL for (int i = 0; i < kBytes; i += kFloats) {
      const F values = f_mul(scale, t_lookup(table, index + i));
      JOPT_UNROLL for (int t = 0; t < T; ++t)
        sum[t] = f_fma(values, f_load(in[t] + k + i), sum[t]);
    }
  }
  JOPT_UNROLL for (int t = 0; t < T; ++t) y[(m + t) * w.outputs + n] = f_sum(sum[t]);
}

static void codebook(const Floats& x, const Codebook& w, Range range, float* y) {
  for (int64_t n = range.begin; n < range.end; ++n) {
    int64_t m = 0;
    for (; m + 8 <= x.rows; m += 8) codebook_tile<8>(x, w, n, m, y);
    for (; m + 2 <= x.rows; m += 2) codebook_tile<2>(x, w, n, m, y);
    for (; m < x.rows; ++m) codebook_tile<1>(x, w, n, m, y);
  }
}

// Transposes 8 outputs by 8 words at a time into a panel: `from(n, k)` yields 8 words of an output from
// input k on, kStep inputs.
template <int64_t kStep, class From>
JOPT_INLINE void pack(const From& from, int64_t outputs, int64_t inputs, int64_t first, void* panel) {
  for (int64_t half = 0; half < kPanel; half += 8) {
    uint8_t* to = (uint8_t*)panel + half * kWord;
    for (int64_t k = 0; k < inputs; k += kStep, to += 8 * kPanel * kWord) {
      B words[8];
      for (int64_t r = 0; r < 8; ++r) {
        const int64_t n = first + half + r;
        words[r] = n < outputs ? from(n, k) : b_none();
      }
      b_transpose(words);
      JOPT_UNROLL for (int i = 0; i < 8; ++i) b_store(to + i * kPanel * kWord, words[i]);
    }
  }
}

// A panel as floats.
static FloatPanel codebook_unpack(const Codebook& w, int64_t inputs, int64_t first) {
  FloatPanel panel(first, w.outputs, round_up(inputs, kFloats));
  auto entries = [&](int64_t n, int64_t k) __attribute__((always_inline)) {
    uint64_t eight;
    std::memcpy(&eight, w.packed + n * w.width + k / kPair * kBytes + k % kBytes, kFloats);
    eight = (k % kPair < kBytes ? eight : eight >> 4) & 0x0f0f0f0f0f0f0f0f;
    uint8_t index[kFloats];
    std::memcpy(index, &eight, kFloats);
    const Table table = t_load(w.table + (w.tables > 1 ? 16 * n : 0));
    return f_bytes(f_mul(f_set(scale_of(w, n, k / w.group)), t_lookup(table, index)));
  };
  pack<kFloats>(entries, w.outputs, inputs, first, panel.weights.get());
  return panel;
}

// --- int8 -----------------------------------------------------------------------------------------

// Tables rounded to int8, one for each output, and what a step of each stands for: an entry is wrong
// by half a step at most.
template <int N>
struct Tables {
  B entries[N];
  float unit[N] = {0};

  Tables(const Codebook& w, int64_t first) {
    for (int64_t n = 0; n < (w.tables > 1 ? least(N, w.outputs - first) : N); ++n) {
      int8_t codes[kBytes];
      float padded[kBytes] = {0};
      std::memcpy(padded, w.table + (w.tables > 1 ? 16 * (first + n) : 0), 16 * sizeof(float));
      unit[n] = (float)quantize(padded, kBytes, kBytes, nullptr, codes);
      entries[n] = b_table(codes);
    }
  }
};

// R outputs by T rows: the codes of an output are read once for all T.
template <int R, int T>
JOPT_INLINE void lookup_tile(const Codes8& x, const Codebook& w, const Tables<4>& tables, int64_t n,
                             int64_t m, float* y) {
  F total[R][T];
  JOPT_UNROLL for (int r = 0; r < R; ++r) JOPT_UNROLL for (int t = 0; t < T; ++t)
    total[r][t] = f_zero();
  for (int64_t g = 0; g < w.groups; ++g) {
    I sum[R][T];
    JOPT_UNROLL for (int r = 0; r < R; ++r) JOPT_UNROLL for (int t = 0; t < T; ++t)
      sum[r][t] = i_zero();
    for (int64_t k = g * w.group; k < least((g + 1) * w.group, x.stride); k += kBytes) {
      JOPT_UNROLL for (int r = 0; r < R; ++r) {
        prefetch(w.packed + (n + r + 2 * R) * w.width + k / 2);
        const B entries = b_lookup(tables.entries[r], codes_of(w, n + r, k));
        JOPT_UNROLL for (int t = 0; t < T; ++t)
          sum[r][t] = dot8(sum[r][t], entries, b_load(x.codes + (m + t) * x.stride + k));
      }
    }
    JOPT_UNROLL for (int r = 0; r < R; ++r) {
      const F scale = f_set(scale_of(w, n + r, g));
      JOPT_UNROLL for (int t = 0; t < T; ++t)
        total[r][t] = f_fma(scale, i_float(sum[r][t]), total[r][t]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t)
      y[(m + t) * w.outputs + n + r] =
          (float)(x.scale[m + t] * ((double)f_sum(total[r][t]) * tables.unit[r]));
}

template <int R>
JOPT_INLINE void lookup_rows(const Codes8& x, const Codebook& w, const Tables<4>& tables, int64_t n,
                             float* y) {
  int64_t m = 0;
  for (; m + 2 <= x.rows; m += 2) lookup_tile<R, 2>(x, w, tables, n, m, y);
  for (; m < x.rows; ++m) lookup_tile<R, 1>(x, w, tables, n, m, y);
}

static void codebook8(const Codes8& x, const Codebook& w, Range range, float* y) {
  const Tables<4> shared(w, range.begin);
  int64_t n = range.begin;
  for (; n + 4 <= range.end; n += 4)
    lookup_rows<4>(x, w, w.tables > 1 ? Tables<4>(w, n) : shared, n, y);
  for (; n < range.end; ++n) lookup_rows<1>(x, w, Tables<4>(w, n), n, y);
}

// A panel of entries as int8, and what scales the sums of its groups, (groups, 16).
struct EntryPanel {
  int64_t first, count;
  Scratch<uint8_t> words;
  Scratch<float> scales;
};

static EntryPanel entries_pack(const Codebook& w, int64_t stride, int64_t first) {
  EntryPanel panel{first, least(kPanel, w.outputs - first), scratch<uint8_t>(stride * kPanel),
                   scratch<float>(w.groups * kPanel)};
  std::memset(panel.scales.get(), 0, w.groups * kPanel * sizeof(float));
  const Tables<kPanel> tables(w, first);
  auto entries = [&](int64_t n, int64_t k) __attribute__((always_inline)) {
    return b_shifted(b_lookup(tables.entries[n - first], codes_of(w, n, k)));
  };
  pack<kBytes>(entries, w.outputs, stride, first, panel.words.get());
  for (int64_t n = 0; n < panel.count; ++n)
    for (int64_t g = 0; g < w.groups; ++g)
      panel.scales[g * kPanel + n] = tables.unit[n] * scale_of(w, first + n, g);
  return panel;
}

struct EntryTile {
  const Codes8& x;
  const Codebook& w;
  const EntryPanel& panel;
  float* y;

  template <int T>
  JOPT_INLINE_MEMBER void run(int64_t m) const {
    const uint8_t* words = panel.words.get();
    const int8_t* in[T];
    WF total[T];
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      in[t] = x.codes + (m + t) * x.stride;
      total[t] = wf_set(0);
    }
    for (int64_t g = 0; g < w.groups; ++g) {
      WI sum[T];
      JOPT_UNROLL for (int t = 0; t < T; ++t)
        sum[t] = wi_set(kShift ? -kShift * x.total[(m + t) * w.groups + g] : 0);
      const int64_t end = least((g + 1) * w.group, x.stride);
      for (int64_t k = g * w.group; k < end; k += kWord, words += kPanel * kWord) {
        const WB codes = wb_load(words);
        JOPT_UNROLL for (int t = 0; t < T; ++t)
          sum[t] = wi_dot_shifted(sum[t], codes, wb_spread(in[t] + k));
      }
      const WF scale = wf_load(panel.scales.get() + g * kPanel);
      JOPT_UNROLL for (int t = 0; t < T; ++t)
        total[t] = wf_fma(scale, wi_float(sum[t]), total[t]);
    }
    JOPT_UNROLL for (int t = 0; t < T; ++t)
      put(wf_mul(wf_set((float)x.scale[m + t]), total[t]), panel.count,
          y + (m + t) * w.outputs + panel.first);
  }
};

static void codebook8_panels(const Codes8& x, const Codebook& w, Range rows, Range outputs, float* y) {
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel) {
    const EntryPanel panel = entries_pack(w, x.stride, n);
    over_rows<kInt8Rows>(rows, EntryTile{x, w, panel, y}, {After(), n, panel.count, w.outputs, y});
  }
}

}  // namespace jopt
