// What products in panels share: how rows are gone through, sums of floats, and how sums are written.
// A tile sums T rows by the 16 outputs of a panel.
// Included by kernels.h, after wide.h.

namespace jopt {

constexpr int64_t kAheadBytes = 16384;  // by which prefetches of weights run ahead

// Sums that do not wait for each other: of few rows more than one for each output.
template <int T>
constexpr int kSums = T >= 4 ? 1 : T == 1 ? 4 : 2;

template <class Vector, int S, int T>
JOPT_INLINE void join_sums(Vector (&sum)[S][T]) {
  JOPT_UNROLL for (int s = S - 1; s > 0; --s)
    JOPT_UNROLL for (int t = 0; t < T; ++t) sum[s / 2][t] = w_add(sum[s / 2][t], sum[s][t]);
}

JOPT_INLINE void put(WF values, int64_t count, float* y) {
  if (count == kPanel) return wf_store(y, values);
  float all[kPanel];
  wf_store(all, values);
  std::memcpy(y, all, count * sizeof(float));
}

// Ends some outputs of some rows, which were just written; `more` is what is added to the same rows.
JOPT_APART void end_outputs(const After& after, int64_t first, int64_t count, int64_t rows,
                            int64_t stride, const float* more, float* y) {
  int64_t n = 0;
  for (; n + kPanel <= count; n += kPanel) {
    const WF less = after.less ? wf_load(after.less + first + n) : wf_set(0);
    const WF times = after.times ? wf_load(after.times + first + n) : wf_set(1);
    const WF plus = after.plus ? wf_load(after.plus + first + n) : wf_set(0);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row * stride + first + n;
      WF value = wf_fma(wf_sub(wf_load(y + at), less), times, plus);
      if (more) value = w_add(value, wf_load(more + at));
      wf_store(y + at, wf_within(value, after.low, after.high));
    }
  }
  for (; n < count; ++n)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row * stride + first + n;
      float value = y[at];
      if (after.less) value -= after.less[first + n];
      if (after.times) value *= after.times[first + n];
      if (after.plus) value += after.plus[first + n];
      if (more) value += more[at];
      y[at] = after.low > value ? after.low : after.high < value ? after.high : value;
    }
}

// Which outputs tiles write, and what becomes of them; `before` rows of y lie before the first.
struct Outputs {
  const After& after;
  int64_t first, count, stride;
  float* y;
  int64_t before = 0;

  JOPT_INLINE_MEMBER void end(int64_t row, int64_t rows) const {
    if (after.none()) return;
    const float* more = after.more ? after.more + (before + row) * stride : nullptr;
    end_outputs(after, first, count, rows, stride, more, y + (before + row) * stride);
  }
};

// T rows at a time, then half as many, down to one.
template <int T, class Tile>
JOPT_INLINE void over_rows(Range rows, const Tile& tile, const Outputs& outputs) {
  for (; rows.begin + T <= rows.end; rows.begin += T) {
    tile.template run<T>(rows.begin);
    outputs.end(rows.begin, T);
  }
  if constexpr (T > 1) over_rows<T / 2>(rows, tile, outputs);
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
  Scratch<float> weights;

  FloatPanel(int64_t first, int64_t outputs, int64_t inputs)
      : first(first), count(least(kPanel, outputs - first)), weights(scratch<float>(inputs * kPanel)) {}
};

// Rows of floats: each is `runs` runs of memory, of one length. Those of a matrix are one run, the
// windows of an image one for each row of the kernel.
struct Runs {
  const float* data;
  int64_t stride;  // from one row to the next
  int64_t runs, length, jump;
};

JOPT_INLINE Runs one_run(const Floats& x) { return {x.data, x.stride, 1, x.inputs, 0}; }

// T rows by W panels: a number that is spread over lanes serves them all.
template <int W>
struct FloatTile {
  Runs x;
  const FloatPanel* panels;
  int64_t outputs;
  float* y;

  template <int T>
  JOPT_INLINE_MEMBER void run(int64_t m) const {
    const float* weights[W];
    const float* in[T];
    WF sum[T][W];
    JOPT_UNROLL for (int w = 0; w < W; ++w) weights[w] = panels[w].weights.get();
    JOPT_UNROLL for (int t = 0; t < T; ++t) {
      in[t] = x.data + (m + t) * x.stride;
      JOPT_UNROLL for (int w = 0; w < W; ++w) sum[t][w] = wf_set(0);
    }
    for (int64_t run = 0; run < x.runs; ++run) {
      for (int64_t k = 0; k < x.length; ++k) {
        WF column[W];
        JOPT_UNROLL for (int w = 0; w < W; ++w) {
          column[w] = wf_load(weights[w]);
          weights[w] += kPanel;
        }
        JOPT_UNROLL for (int t = 0; t < T; ++t) {
          const WF spread = wf_set(in[t][k]);
          JOPT_UNROLL for (int w = 0; w < W; ++w)
            sum[t][w] = wf_fma(column[w], spread, sum[t][w]);
        }
      }
      JOPT_UNROLL for (int t = 0; t < T; ++t) in[t] += x.jump;
    }
    JOPT_UNROLL for (int t = 0; t < T; ++t) JOPT_UNROLL for (int w = 0; w < W; ++w)
      put(sum[t][w], panels[w].count, y + (m + t) * outputs + panels[w].first);
  }
};

constexpr int64_t kAheadRows = 12;  // no stream: rows lie apart

static FloatPanel float_pack(const FloatWeights& w, int64_t inputs, int64_t first) {
  FloatPanel panel(first, w.outputs, inputs);
  float* to = panel.weights.get();
  for (int64_t k = 0; k < inputs; ++k, to += kPanel) {
    const float* from = w.kernel + k * w.outputs + first;
    prefetch(from + kAheadRows * w.outputs);
    if (panel.count == kPanel)
      wf_store(to, wf_load(from));
    else
      for (int64_t n = 0; n < kPanel; ++n) to[n] = n < panel.count ? from[n] : 0.0f;
  }
  return panel;
}

constexpr int64_t kHeldFloats = 24576;  // of panels that are made together: they stay near

// Calls body(panels) with some panels of the outputs after others, as many as stay near.
template <class Pack, class Body>
JOPT_INLINE void over_panels(Range outputs, int64_t inputs, const Pack& pack, const Body& body) {
  const int64_t several = kHeldFloats / (inputs * kPanel + 1) / kFloatPanels * kFloatPanels;
  const int64_t step = (several < kFloatPanels ? kFloatPanels : several) * kPanel;
  for (int64_t from = outputs.begin; from < outputs.end; from += step) {
    std::vector<FloatPanel> panels;
    for (int64_t n = from; n < least(from + step, outputs.end); n += kPanel) panels.push_back(pack(n));
    body(panels);
  }
}

// Rows by panels, as many of these together as sums fit in registers; `before` rows of y lie before the
// first.
JOPT_INLINE void by_panels(const Runs& x, const std::vector<FloatPanel>& panels, const After& after,
                           int64_t outputs, Range rows, float* y, int64_t before = 0) {
  const FloatPanel* at = panels.data();
  const FloatPanel* end = at + panels.size();
  float* to = y + before * outputs;
  if constexpr (kFloatPanels == 2)
    for (; at + 1 < end; at += 2)
      over_rows<kFloatRows>(rows, FloatTile<2>{x, at, outputs, to},
                            {after, at->first, kPanel + at[1].count, outputs, y, before});
  for (; at < end; ++at)
    over_rows<kFloatRows>(rows, FloatTile<1>{x, at, outputs, to},
                          {after, at->first, at->count, outputs, y, before});
}

constexpr int64_t kRowsNear = 48;  // that go by all panels before the next: a multiple of kFloatRows

// Rows by panels that `pack(first)` makes.
template <class Pack>
static void by_floats(const Floats& x, const Pack& pack, const After& after, int64_t count,
                      Range rows, Range outputs, float* y) {
  over_panels(outputs, x.inputs, pack, [&](const std::vector<FloatPanel>& panels) {
    const int64_t step = panels.size() > kFloatPanels ? kRowsNear : rows.end - rows.begin;
    for (int64_t m = rows.begin; m < rows.end; m += step)
      by_panels(one_run(x), panels, after, count, {m, least(m + step, rows.end)}, y);
  });
}

// A convolution of all channels, whose panels `pack(first)` makes. Rows are those of the outputs'
// images, counted over the batch; the input is padded, so that every window lies inside it: it is as
// high as `s` says, and as wide.
template <class Pack>
static void convolution(const float* x, const Pack& pack, const After& after, int64_t count,
                        const Window& s, Range rows, Range outputs, float* y) {
  const int64_t length = s.columns * s.channels, line = s.width * s.channels;
  over_panels(outputs, s.rows * length, pack, [&](const std::vector<FloatPanel>& panels) {
    for (int64_t at = rows.begin; at < rows.end; ++at) {
      const int64_t top = at / s.out_rows * s.height + at % s.out_rows * s.stride_rows;
      const Runs in{x + top * line, s.stride_columns * s.channels, s.rows, length, line};
      by_panels(in, panels, after, count, {0, s.out_columns}, y, at * s.out_columns);
    }
  });
}

}  // namespace jopt
