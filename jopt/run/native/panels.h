// Products of many rows. Weights are packed into panels of 16 outputs that lie side by side, so that
// sums lie in lanes and none is added up across a vector; a panel serves all rows of a block.
// Included by kernels.h, after the vectors of the instruction set and the products of few rows.

namespace jopt {

constexpr int64_t kWord = 4;  // bytes of an output that lie together: a float, or four codes
constexpr int kFloatRows = 6;  // rows whose sums of floats fit in registers, two vectors each

// Weights of one panel: (inputs / 4, 16, 4) codes, or (inputs, 16) floats or codes. Of the 16 outputs
// `count` are in truth; scales and zero points of the others are 0.
struct Panel {
  int64_t first, count;
  std::unique_ptr<uint8_t[]> weights;
  float scale[kPanel] = {0}, zero[kPanel] = {0};
  std::unique_ptr<float[]> scales, shifts;  // by groups: (groups, 16)

  Panel(int64_t first, int64_t outputs, int64_t words)
      : first(first),
        count(least(kPanel, outputs - first)),
        weights(new uint8_t[words * kPanel * kWord + 1]) {}
};

// --- Packing --------------------------------------------------------------------------------------

// A source yields kStep inputs of an output as 8 words: `whole` where all of them are there, `edge`
// anywhere, with zeros for what there is not.

struct Int8Codes {
  static constexpr int64_t kStep = kBytes;
  const Int8Weights& w;
  int64_t inputs;
  JOPT_INLINE_MEMBER const int8_t* at(int64_t n, int64_t k) const { return w.codes + n * inputs + k; }
  JOPT_INLINE_MEMBER B whole(int64_t n, int64_t k) const { return b_shifted(b_load(at(n, k))); }
  JOPT_INLINE_MEMBER B edge(int64_t n, int64_t k) const {
    int8_t codes[kStep] = {0};
    if (n < w.outputs) std::memcpy(codes, at(n, k), least(kStep, inputs - k));
    return b_shifted(b_load(codes));
  }
};

// Codes 0 to 15, as they are.
struct Int4Codes {
  static constexpr int64_t kStep = kBytes;
  const Int4Weights& w;
  JOPT_INLINE_MEMBER B whole(int64_t n, int64_t k) const {
    const B block = b_load(w.packed + n * w.width + k / kPair * kBytes);
    return k % kPair ? b_high(block) : b_low(block);
  }
  JOPT_INLINE_MEMBER B edge(int64_t n, int64_t k) const {
    return n < w.outputs ? whole(n, k) : b_none();
  }
};

// Codes looked up in a table of int8, one for each output of a panel.
struct Int8Entries {
  static constexpr int64_t kStep = kBytes;
  const Int4Weights& w;
  int64_t first;
  B tables[kPanel];
  JOPT_INLINE_MEMBER B whole(int64_t n, int64_t k) const {
    return b_shifted(b_lookup(tables[n - first], Int4Codes{w}.whole(n, k)));
  }
  JOPT_INLINE_MEMBER B edge(int64_t n, int64_t k) const {
    return n < w.outputs ? whole(n, k) : b_none();
  }
};

// Entries of tables of floats, scaled.
struct FloatEntries {
  static constexpr int64_t kStep = kFloats;
  const Int4Weights& w;
  JOPT_INLINE_MEMBER B whole(int64_t n, int64_t k) const {
    uint64_t eight;
    std::memcpy(&eight, w.packed + n * w.width + k / kPair * kBytes + k % kBytes, kFloats);
    eight = (k % kPair < kBytes ? eight : eight >> 4) & 0x0f0f0f0f0f0f0f0f;
    uint8_t index[kFloats];
    std::memcpy(index, &eight, kFloats);
    const Table table = t_load(w.table + (w.tables > 1 ? 16 * n : 0));
    return f_bytes(f_mul(f_set(scale_of(w, n, k / w.group)), t_lookup(table, index)));
  }
  JOPT_INLINE_MEMBER B edge(int64_t n, int64_t k) const {
    return n < w.outputs ? whole(n, k) : b_none();
  }
};

// Packs a panel: 8 outputs by 8 words at a time, read by outputs and written by words.
template <class Source>
JOPT_INLINE void pack(const Source& from, int64_t inputs, Panel& panel) {
  for (int64_t half = 0; half < kPanel; half += 8) {
    uint8_t* to = panel.weights.get() + half * kWord;
    for (int64_t k = 0; k < inputs; k += Source::kStep, to += 8 * kPanel * kWord) {
      const int64_t n = panel.first + half;
      B words[8];
      if (half + 8 <= panel.count && k + Source::kStep <= inputs) {
        JOPT_UNROLL for (int r = 0; r < 8; ++r) words[r] = from.whole(n + r, k);
      } else {
        JOPT_UNROLL for (int r = 0; r < 8; ++r) words[r] = from.edge(n + r, k);
      }
      b_transpose(words);
      JOPT_UNROLL for (int i = 0; i < 8; ++i) b_store(to + i * kPanel * kWord, words[i]);
    }
  }
}

// Packs codes as they are, input by input.
static void pack_columns(const Int8Weights& w, int64_t inputs, Panel& panel) {
  uint8_t* to = panel.weights.get();
  for (int64_t k = 0; k < inputs; k += kBytes, to += kBytes * kPanel) {
    const int8_t* from = w.codes + panel.first * inputs + k;
    B rows[kPanel];
    if (panel.count == kPanel && k + kBytes <= inputs) {
      JOPT_UNROLL for (int n = 0; n < kPanel; ++n) rows[n] = b_load(from + n * inputs);
    } else {
      for (int64_t n = 0; n < kPanel; ++n) {
        int8_t codes[kBytes] = {0};
        if (n < panel.count) std::memcpy(codes, from + n * inputs, least(kBytes, inputs - k));
        rows[n] = b_load(codes);
      }
    }
    b_columns(rows, to);
  }
}

// In words as dot_shifted takes them, or by columns.
static Panel int8_pack(const Int8Weights& w, int64_t inputs, int64_t first, bool columns) {
  Panel panel(first, w.outputs, round_up(inputs, kBytes) / kWord);
  if (columns)
    pack_columns(w, inputs, panel);
  else
    pack(Int8Codes{w, inputs}, inputs, panel);
  std::memcpy(panel.scale, w.scale + first, panel.count * sizeof(float));
  if (w.zero) std::memcpy(panel.zero, w.zero + first, panel.count * sizeof(float));
  return panel;
}

// `unit`: what each output's scales are multiplied by.
template <class Source>
static Panel int4_pack(const Source& from, const Int4Weights& w, int64_t inputs, int64_t first,
                       const float* unit) {
  Panel panel(first, w.outputs, round_up(inputs, kPair) / kWord);
  pack(from, round_up(inputs, kPair), panel);
  panel.scales.reset(new float[w.groups * kPanel]());
  if (w.zero) panel.shifts.reset(new float[w.groups * kPanel]());
  for (int64_t n = 0; n < panel.count; ++n)
    for (int64_t g = 0; g < w.groups; ++g) {
      const float scale = unit[n] * scale_of(w, first + n, g);
      panel.scales[g * kPanel + n] = scale;
      if (w.zero) panel.shifts[g * kPanel + n] = scale * w.zero[(first + n) * w.groups + g];
    }
  return panel;
}

// Codes less their zero points, as floats.
static Panel int8_pack_floats(const Int8Weights& w, int64_t inputs, int64_t first) {
  const Panel codes = int8_pack(w, inputs, first, true);
  Panel panel(first, w.outputs, inputs);
  std::memcpy(panel.scale, codes.scale, sizeof codes.scale);
  const int8_t* from = (const int8_t*)codes.weights.get();
  float* to = (float*)panel.weights.get();
  float less[kPanel];
  for (int64_t n = 0; n < kPanel; ++n) less[n] = -codes.zero[n];
  for (int64_t i = 0; i < inputs * kPanel; i += kFloats)
    f_store(to + i, f_add(widen8(from + i), f_load(less + i % kPanel)));
  return panel;
}

constexpr int64_t kAheadRows = 12;  // no stream: rows lie apart

static Panel float_pack(const FloatWeights& w, int64_t inputs, int64_t first) {
  Panel panel(first, w.outputs, inputs);
  float* to = (float*)panel.weights.get();
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
  for (float& scale : panel.scale) scale = 1.0f;
  return panel;
}

// --- Sums: T rows by a panel, or by its first half where V is 1 -----------------------------------

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

struct Int8Tile {
  const Codes8& x;
  const Int8Weights& w;
  const Panel& panel;
  float* y;

  template <int T, int V>
  JOPT_INLINE_MEMBER void run(int64_t m) const {
    const uint8_t* words = panel.weights.get();
    const int8_t* in[T];
    I sum[T][V];
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      in[t] = x.codes + (m + t) * x.stride;
      JOPT_UNROLL for (int v = 0; v < V; ++v)
        sum[t][v] = i_set(kShift ? -kShift * x.total[m + t] : 0);
    }
    for (int64_t k = 0; k < x.inputs; k += kWord, words += kPanel * kWord) {
      B codes[V];
      JOPT_UNROLL for (int v = 0; v < V; ++v) codes[v] = b_load(words + v * kBytes);
      JOPT_UNROLL for (int t = 0; t < T; ++t) {
        const B spread = b_spread(in[t] + k);
        JOPT_UNROLL for (int v = 0; v < V; ++v)
          sum[t][v] = dot_shifted(sum[t][v], codes[v], spread);
      }
    }
    JOPT_UNROLL for (int t = 0; t < T; ++t) finish<V>(m + t, sum[t]);
  }

  template <int V>
  JOPT_INLINE_MEMBER void finish(int64_t m, const I* sum) const {
    float* out = y + m * w.outputs + panel.first;
    if (w.zero) {
      int32_t lanes[V * kFloats];
      JOPT_UNROLL for (int v = 0; v < V; ++v) i_store(lanes + v * kFloats, sum[v]);
      for (int64_t n = 0; n < panel.count; ++n)
        out[n] = (float)(x.scale[m] * ((double)panel.scale[n] *
                                       (lanes[n] - (double)panel.zero[n] * x.total[m])));
      return;
    }
    // In the order in which no product is too large or too small for a float unless the last is.
    const F step = f_set((float)x.scale[m]);
    const bool large = x.scale[m] >= 1;
    F values[V];
    JOPT_UNROLL for (int v = 0; v < V; ++v) {
      const F scale = f_load(panel.scale + v * kFloats), value = i_float(sum[v]);
      values[v] = large ? f_mul(f_mul(value, scale), step) : f_mul(f_mul(value, step), scale);
    }
    put<V>(values, panel.count, out);
  }
};

// Evenly spaced codes 0 to 15 are 8 too high, others kShift: that is taken away where a group begins.
struct Spaced {
  static constexpr int32_t kHigh = 8;
  JOPT_INLINE I dot(I sum, B codes, B x, B more, B x_more) {
    return dot4(sum, codes, x, more, x_more);
  }
};
struct Shifted {
  static constexpr int32_t kHigh = kShift;
  JOPT_INLINE I dot(I sum, B codes, B x, B more, B x_more) {
    return dot_shifted(dot_shifted(sum, codes, x), more, x_more);
  }
};

template <class Codes>
struct Int4Tile {
  const Codes8& x;
  const GroupSums& sums;
  const Int4Weights& w;
  const Panel& panel;
  float* y;

  template <int T, int V>
  JOPT_INLINE_MEMBER void run(int64_t m) const {
    const uint8_t* words = panel.weights.get();
    const int8_t* in[T];
    F total[T][V];
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      in[t] = x.codes + (m + t) * x.stride;
      JOPT_UNROLL for (int v = 0; v < V; ++v) total[t][v] = f_zero();
    }
    for (int64_t g = 0; g < w.groups; ++g) {
      I sum[T][V];
      JOPT_UNROLL for (int t = 0; t < T; ++t) {
        const float of_group = sums.sum[(m + t) * w.groups + g];
        JOPT_UNROLL for (int v = 0; v < V; ++v) sum[t][v] = i_set(-Codes::kHigh * (int32_t)of_group);
      }
      const int64_t end = least((g + 1) * w.group, x.stride);
      for (int64_t k = g * w.group; k < end; k += 2 * kWord, words += 2 * kPanel * kWord) {
        B codes[V], more[V];
        JOPT_UNROLL for (int v = 0; v < V; ++v) {
          codes[v] = b_load(words + v * kBytes);
          more[v] = b_load(words + kPanel * kWord + v * kBytes);
        }
        JOPT_UNROLL for (int t = 0; t < T; ++t) {
          const B spread = b_spread(in[t] + k), next = b_spread(in[t] + k + kWord);
          JOPT_UNROLL for (int v = 0; v < V; ++v)
            sum[t][v] = Codes::dot(sum[t][v], codes[v], spread, more[v], next);
        }
      }
      const float* scales = panel.scales.get() + g * kPanel;
      JOPT_UNROLL for (int v = 0; v < V; ++v) {
        const F scale = f_load(scales + v * kFloats);
        JOPT_UNROLL for (int t = 0; t < T; ++t)
          total[t][v] = f_fma(scale, i_float(sum[t][v]), total[t][v]);
      }
      if (w.zero) {
        const float* shifts = panel.shifts.get() + g * kPanel;
        JOPT_UNROLL for (int t = 0; t < T; ++t) {
          const F less = f_set(-sums.sum[(m + t) * w.groups + g]);
          JOPT_UNROLL for (int v = 0; v < V; ++v)
            total[t][v] = f_fma(f_load(shifts + v * kFloats), less, total[t][v]);
        }
      }
    }
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      const F step = f_set((float)x.scale[m + t]);
      JOPT_UNROLL for (int v = 0; v < V; ++v) total[t][v] = f_mul(step, total[t][v]);
      put<V>(total[t], panel.count, y + (m + t) * w.outputs + panel.first);
    }
  }
};

// Rows of floats: each is `runs` runs of memory, of one length. Those of a matrix are one run, the
// windows of an image one for each row of the kernel.
struct Runs {
  const float* data;
  int64_t stride;  // from one row to the next
  int64_t runs, length, jump;
};

// `Weight` is float, or int8_t for codes that are widened as they are read.
JOPT_INLINE F widened(const float* p) { return f_load(p); }
JOPT_INLINE F widened(const int8_t* p) { return widen8(p); }

template <class Weight>
struct FloatTile {
  Runs x;
  int64_t outputs;
  const double* total;  // the sum of each row, where weights have zero points
  const Panel& panel;
  float* y;

  template <int T, int V>
  JOPT_INLINE_MEMBER void run(int64_t m) const {
    const Weight* weights = (const Weight*)panel.weights.get();
    const float* in[T];
    F sum[T][V];
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      in[t] = x.data + (m + t) * x.stride;
      JOPT_UNROLL for (int v = 0; v < V; ++v) sum[t][v] = f_zero();
    }
    for (int64_t run = 0; run < x.runs; ++run) {
      for (int64_t k = 0; k < x.length; ++k, weights += kPanel) {
        F column[V];
        JOPT_UNROLL for (int v = 0; v < V; ++v) column[v] = widened(weights + v * kFloats);
        JOPT_UNROLL for (int t = 0; t < T; ++t) {
          const F spread = f_set(in[t][k]);
          JOPT_UNROLL for (int v = 0; v < V; ++v) sum[t][v] = f_fma(column[v], spread, sum[t][v]);
        }
      }
      JOPT_UNROLL for (int t = 0; t < T; ++t) in[t] += x.jump;
    }
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      float* out = y + (m + t) * outputs + panel.first;
      if (total) {
        float lanes[V * kFloats];
        JOPT_UNROLL for (int v = 0; v < V; ++v) f_store(lanes + v * kFloats, sum[t][v]);
        for (int64_t n = 0; n < panel.count; ++n)
          out[n] = (float)(panel.scale[n] * (lanes[n] - (double)panel.zero[n] * total[m + t]));
      } else {
        JOPT_UNROLL for (int v = 0; v < V; ++v)
          sum[t][v] = f_mul(f_load(panel.scale + v * kFloats), sum[t][v]);
        put<V>(sum[t], panel.count, out);
      }
    }
  }
};

template <int T, int V, class Tile>
JOPT_INLINE void rows_from(int64_t m, int64_t end, const Tile& tile) {
  for (; m + T <= end; m += T) tile.template run<T, V>(m);
  if constexpr (T > 1) rows_from<T / 2, V>(m, end, tile);
}

// T rows at a time, then half as many, down to one.
template <int T, class Tile>
JOPT_APART void over_rows(Range rows, Tile tile) {
  if (tile.panel.count > kFloats) return rows_from<T, 2>(rows.begin, rows.end, tile);
  rows_from<T, 1>(rows.begin, rows.end, tile);
}

// --- Blocks of rows and outputs -------------------------------------------------------------------

static void int8_panels(const Codes8& x, const Int8Weights& w, Range rows, Range outputs, float* y) {
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel) {
    const Panel panel = int8_pack(w, x.inputs, n, false);
    over_rows<kInt8Rows>(rows, Int8Tile{x, w, panel, y});
  }
}

JOPT_INLINE Runs one_run(const Floats& x) { return {x.data, x.stride, 1, x.inputs, 0}; }

static void int8_float_panels(const Floats& x, const Int8Weights& w, Range rows, Range outputs,
                              float* y) {
  const Runs in = one_run(x);
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel) {
    const Panel panel = int8_pack(w, x.inputs, n, true);
    const double* total = w.zero ? x.total : nullptr;
    over_rows<kFloatRows>(rows, FloatTile<int8_t>{in, w.outputs, total, panel, y});
  }
}

static void int4_panels(const Codes8& x, const GroupSums& sums, const Int4Weights& w, Range rows,
                        Range outputs, float* y) {
  float unit[kPanel];
  for (float& each : unit) each = 1.0f;
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel) {
    const Panel panel = int4_pack(Int4Codes{w}, w, x.inputs, n, unit);
    over_rows<kInt4Rows>(rows, Int4Tile<Spaced>{x, sums, w, panel, y});
  }
}

static void codebook8_panels(const Codes8& x, const GroupSums& sums, const Int4Weights& w,
                             Range rows, Range outputs, float* y) {
  Int8Entries from{w, 0, {}};
  float unit[kPanel];
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel) {
    from.first = n;
    for (int64_t r = 0; r < least(kPanel, w.outputs - n); ++r)
      unit[r] = round_table(w.table + (w.tables > 1 ? 16 * (n + r) : 0), &from.tables[r]);
    const Panel panel = int4_pack(from, w, x.inputs, n, unit);
    over_rows<kInt4Rows>(rows, Int4Tile<Shifted>{x, sums, w, panel, y});
  }
}

static void codebook_panels(const Floats& x, const Int4Weights& w, Range rows, Range outputs,
                            float* y) {
  const Runs in = one_run(x);
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel) {
    Panel panel(n, w.outputs, round_up(x.inputs, kFloats));
    pack(FloatEntries{w}, round_up(x.inputs, kFloats), panel);
    for (float& scale : panel.scale) scale = 1.0f;
    over_rows<kFloatRows>(rows, FloatTile<float>{in, w.outputs, nullptr, panel, y});
  }
}

static void float_panels(const Floats& x, const FloatWeights& w, Range rows, Range outputs,
                         float* y) {
  const Runs in = one_run(x);
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel) {
    const Panel panel = float_pack(w, x.inputs, n);
    over_rows<kFloatRows>(rows, FloatTile<float>{in, w.outputs, nullptr, panel, y});
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
    const Panel panel = pack(n);
    for (int64_t at = rows.begin; at < rows.end; ++at) {
      const int64_t top = at / s.out_rows * s.height + at % s.out_rows * s.stride_rows;
      const Runs in{x + top * line, s.stride_columns * s.channels, s.rows, length, line};
      float* out = y + at * s.out_columns * count;
      over_rows<kFloatRows>(Range{0, s.out_columns}, FloatTile<float>{in, count, nullptr, panel, out});
    }
  }
}

}  // namespace jopt
