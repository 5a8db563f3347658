// Products with 4-bit weights and int8 activations: evenly spaced codes and codebooks.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

// Codes 0..15 stand for -8..7: the 8 is taken away by a sum that starts at -8 * sum(x).
struct Nibbles {
  static constexpr bool kOffset = true;
  JOPT_INLINE_MEMBER I pair(I sum, B packed, B x_low, B x_high) const {
    return dot4(sum, b_low(packed), x_low, b_high(packed), x_high);
  }
  JOPT_INLINE_MEMBER I below(I sum, B packed, B x) const {
    return dot4(sum, b_low(packed), x, b_none(), b_none());
  }
  JOPT_INLINE_MEMBER I above(I sum, B packed, B x) const {
    return dot4(sum, b_none(), b_none(), b_high(packed), x);
  }
};

// Codes are looked up in a table of int8.
struct Lookup {
  static constexpr bool kOffset = false;
  B table;
  JOPT_INLINE_MEMBER I pair(I sum, B packed, B x_low, B x_high) const {
    return above(below(sum, packed, x_low), packed, x_high);
  }
  JOPT_INLINE_MEMBER I below(I sum, B packed, B x) const {
    return dot8(sum, b_lookup(table, b_low(packed)), x);
  }
  JOPT_INLINE_MEMBER I above(I sum, B packed, B x) const {
    return dot8(sum, b_lookup(table, b_high(packed)), x);
  }
};

JOPT_INLINE float scale_of(const Int4Weights& w, int64_t n, int64_t g) {
  return w.scale ? w.scale[n * w.groups + g] : 1.0f;
}

// Scales of an output that comes later, once for each cache line: no stream of them is long enough
// for the processor to foresee it.
JOPT_INLINE void prefetch_scale(const Int4Weights& w, int64_t n, int64_t g) {
  if (g % 16 == 0 && w.scale) prefetch(w.scale + n * w.groups + g);
}

template <int R, int T, class Decode>
JOPT_INLINE void int4_tile(const Codes8& x, const GroupSums& sums, const Int4Weights& w,
                           const Decode* decode, const float* unit, int64_t n, int64_t m,
                           float* y) {
  const uint8_t* packed[R];
  const int8_t* in[T];
  F total[R][T];
  JOPT_UNROLL for (int r = 0; r < R; ++r) {
    packed[r] = w.packed + (n + r) * w.width;
    JOPT_UNROLL for (int t = 0; t < T; ++t) total[r][t] = f_zero();
  }
  JOPT_UNROLL for (int t = 0; t < T; ++t) in[t] = x.codes + (m + t) * x.stride;
  auto start = [&](int t, int64_t g) __attribute__((always_inline)) {
    return Decode::kOffset ? i_load(sums.offset + 8 * ((m + t) * w.groups + g)) : i_zero();
  };
  if (w.group == kBytes) {  // each half of a block is a group
    for (int64_t b = 0; b < w.width; b += kBytes) {
      const int64_t g = 2 * b / kBytes;
      JOPT_UNROLL for (int r = 0; r < R; ++r) {
        prefetch(packed[r] + b + 2 * R * w.width);
        const B block = b_load(packed[r] + b);
        prefetch_scale(w, n + r + 2 * R, g);
        const F scale = f_set(scale_of(w, n + r, g));
        JOPT_UNROLL for (int t = 0; t < T; ++t) {
          const I sum = decode[r].below(start(t, g), block, b_load(in[t] + 2 * b));
          total[r][t] = f_fma(scale, i_float(sum), total[r][t]);
        }
        if (g + 1 == w.groups) continue;
        const F other = f_set(scale_of(w, n + r, g + 1));
        JOPT_UNROLL for (int t = 0; t < T; ++t) {
          const I sum = decode[r].above(start(t, g + 1), block, b_load(in[t] + 2 * b + kBytes));
          total[r][t] = f_fma(other, i_float(sum), total[r][t]);
        }
      }
    }
  } else if (w.group == kPair) {  // a block is a group
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t b = g * kBytes;
      B block[R];
      F scale[R];
      JOPT_UNROLL for (int r = 0; r < R; ++r) {
        prefetch(packed[r] + b + 2 * R * w.width);
        block[r] = b_load(packed[r] + b);
        prefetch_scale(w, n + r + 2 * R, g);
        scale[r] = f_set(scale_of(w, n + r, g));
      }
      JOPT_UNROLL for (int t = 0; t < T; ++t) {
        const B low = b_load(in[t] + 2 * b), high = b_load(in[t] + 2 * b + kBytes);
        const I first = start(t, g);
        JOPT_UNROLL for (int r = 0; r < R; ++r)
          total[r][t] = f_fma(scale[r], i_float(decode[r].pair(first, block[r], low, high)),
                              total[r][t]);
      }
    }
  } else {
    for (int64_t g = 0; g < w.groups; ++g) {
      I sum[R][T];
      JOPT_UNROLL for (int r = 0; r < R; ++r) JOPT_UNROLL for (int t = 0; t < T; ++t)
        sum[r][t] = start(t, g);
      const int64_t end = least((g + 1) * (w.group / 2), w.width);
      for (int64_t b = g * (w.group / 2); b < end; b += kBytes) {
        JOPT_UNROLL for (int r = 0; r < R; ++r) {
          prefetch(packed[r] + b + 2 * R * w.width);
          const B block = b_load(packed[r] + b);
          JOPT_UNROLL for (int t = 0; t < T; ++t)
            sum[r][t] = decode[r].pair(sum[r][t], block, b_load(in[t] + 2 * b),
                                       b_load(in[t] + 2 * b + kBytes));
        }
      }
      JOPT_UNROLL for (int r = 0; r < R; ++r) {
        prefetch_scale(w, n + r + 2 * R, g);
        const F scale = f_set(scale_of(w, n + r, g));
        JOPT_UNROLL for (int t = 0; t < T; ++t)
          total[r][t] = f_fma(scale, i_float(sum[r][t]), total[r][t]);
      }
    }
  }
  float whole[R][T];
  sum_each(total, whole);
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) {
      double value = whole[r][t];
      if (w.zero) {
        const int64_t at = (n + r) * w.groups;
        for (int64_t g = 0; g < w.groups; ++g)
          value -= (double)w.scale[at + g] * w.zero[at + g] * sums.sum[(m + t) * w.groups + g];
      }
      y[(m + t) * w.outputs + n + r] = (float)(x.scale[m + t] * (value * unit[r]));
    }
  }
}

template <int R, class Decode>
JOPT_INLINE void int4_rows(const Codes8& x, const GroupSums& sums, const Int4Weights& w,
                           const Decode* decode, const float* unit, int64_t n, float* y) {
  int64_t m = 0;
  constexpr int kTogether = R < 2 ? R : 2;
  for (; m + 4 <= x.rows; m += 4)
    for (int r = 0; r < R; r += kTogether)
      int4_tile<kTogether, 4>(x, sums, w, decode + r, unit + r, n + r, m, y);
  for (; m < x.rows; ++m) int4_tile<R, 1>(x, sums, w, decode, unit, n, m, y);
}

static void int4(const Codes8& x, const GroupSums& sums, const Int4Weights& w, Range range,
                 float* y) {
  const Nibbles decode[4] = {};
  const float unit[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  int64_t n = range.begin;
  for (; n + 4 <= range.end; n += 4) int4_rows<4>(x, sums, w, decode, unit, n, y);
  for (; n < range.end; ++n) int4_rows<1>(x, sums, w, decode, unit, n, y);
}

// Rounds a table of 16 to int8 and returns the unit: an entry is wrong by half a unit at most.
static float round_table(const float* table, B* rounded) {
  int8_t codes[kBytes];
  float padded[kBytes] = {0};
  std::memcpy(padded, table, 16 * sizeof(float));
  const double unit = quantize(padded, kBytes, kBytes, nullptr, codes);
  *rounded = b_table(codes);
  return (float)unit;
}

static void codebook8(const Codes8& x, const GroupSums& sums, const Int4Weights& w, Range range,
                      float* y) {
  Lookup decode[4];
  float unit[4];
  const int64_t step = w.tables > 1 ? 1 : 0;
  auto rounded = [&](int64_t n, int count) {
    if (step == 0 && n > range.begin) return;
    for (int r = 0; r < count; ++r) unit[r] = round_table(w.table + step * 16 * (n + r), &decode[r].table);
  };
  int64_t n = range.begin;
  for (; n + 4 <= range.end; n += 4) {
    rounded(n, 4);
    int4_rows<4>(x, sums, w, decode, unit, n, y);
  }
  for (; n < range.end; ++n) {
    rounded(n, 1);
    int4_rows<1>(x, sums, w, decode, unit, n, y);
  }
}

}  // namespace jopt
