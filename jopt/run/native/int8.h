// Products with int8 weights: exact sums with int8 activations, or floats with float ones.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

// A sum of codes times activations, less what the zero point of the output adds to it.
template <class Total>
JOPT_INLINE double less_zero(const Total* total, const float* zero, int64_t m, int64_t n,
                             double sum) {
  return zero ? sum - (double)zero[n] * total[m] : sum;
}

JOPT_INLINE float v_sum(F v) { return f_sum(v); }
JOPT_INLINE int32_t v_sum(I v) { return i_sum(v); }

// The sums of vectors of floats or of integers.
template <class Vector, class Sum, int R, int T>
JOPT_INLINE void sum_each(const Vector (&from)[R][T], Sum (&to)[R][T]) {
  if constexpr (R == 4 && T == 1) {
    v_sum4(&from[0][0], &to[0][0]);
  } else {
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) to[r][t] = v_sum(from[r][t]);
  }
}

// R outputs by T rows of activations: the codes of an output are read once for all T.
template <int R, int T>
JOPT_INLINE void int8_tile(const Codes8& x, const Int8Weights& w, int64_t n, int64_t m, float* y) {
  const int64_t whole = x.inputs / kBytes * kBytes;
  const int8_t* codes[R];
  const int8_t* in[T];
  I sum[R][T];
  JOPT_UNROLL for (int r = 0; r < R; ++r) {
    codes[r] = w.codes + (n + r) * x.inputs;
    JOPT_UNROLL for (int t = 0; t < T; ++t) sum[r][t] = i_zero();
  }
  JOPT_UNROLL for (int t = 0; t < T; ++t) in[t] = x.codes + (m + t) * x.stride;
  for (int64_t k = 0; k < whole; k += kBytes) {
    B each[T];
    JOPT_UNROLL for (int t = 0; t < T; ++t) each[t] = b_load(in[t] + k);
    JOPT_UNROLL for (int r = 0; r < R; ++r) {
      prefetch(codes[r] + k + 2 * R * x.inputs);
      const B block = b_shifted(b_load(codes[r] + k));
      JOPT_UNROLL for (int t = 0; t < T; ++t) sum[r][t] = dot_shifted(sum[r][t], block, each[t]);
    }
  }
  if (whole < x.inputs) {
    JOPT_UNROLL for (int r = 0; r < R; ++r) {
      int8_t tail[kBytes] = {0};
      std::memcpy(tail, codes[r] + whole, x.inputs - whole);
      const B block = b_shifted(b_load(tail));
      JOPT_UNROLL for (int t = 0; t < T; ++t)
        sum[r][t] = dot_shifted(sum[r][t], block, b_load(in[t] + whole));
    }
  }
  int32_t sums[R][T];
  sum_each(sum, sums);
  JOPT_UNROLL for (int r = 0; r < R; ++r) JOPT_UNROLL for (int t = 0; t < T; ++t) {
    const int32_t exact = sums[r][t] - (kShift ? kShift * x.total[m + t] : 0);
    y[(m + t) * w.outputs + n + r] =
        (float)(x.scale[m + t] * ((double)w.scale[n + r] *
                                  less_zero(x.total, w.zero, m + t, n + r, exact)));
  }
}

template <int R>
JOPT_INLINE void int8_rows(const Codes8& x, const Int8Weights& w, int64_t n, float* y) {
  int64_t m = 0;
  if (x.rows == 1) return int8_tile<R, 1>(x, w, n, 0, y);
  for (; m + 4 <= x.rows; m += 4)
    for (int r = 0; r < R; r += 2) int8_tile<R < 2 ? R : 2, 4>(x, w, n + r, m, y);
  for (; m < x.rows; ++m) int8_tile<R, 1>(x, w, n, m, y);
}

static void int8(const Codes8& x, const Int8Weights& w, Range range, float* y) {
  int64_t n = range.begin;
  for (; n + 4 <= range.end; n += 4) int8_rows<4>(x, w, n, y);
  for (; n < range.end; ++n) int8_rows<1>(x, w, n, y);
}

template <int R, int T>
JOPT_INLINE void int8_float_tile(const Floats& x, const Int8Weights& w, int64_t n, int64_t m,
                                 float* y) {
  const int64_t whole = x.inputs / kFloats * kFloats;
  const int8_t* codes[R];
  const float* in[T];
  F sum[R][T];
  JOPT_UNROLL for (int r = 0; r < R; ++r) {
    codes[r] = w.codes + (n + r) * x.inputs;
    JOPT_UNROLL for (int t = 0; t < T; ++t) sum[r][t] = f_zero();
  }
  JOPT_UNROLL for (int t = 0; t < T; ++t) in[t] = x.data + (m + t) * x.stride;
  for (int64_t k = 0; k < whole; k += kFloats) {
    JOPT_UNROLL for (int r = 0; r < R; ++r) {
      const F block = widen8(codes[r] + k);
      JOPT_UNROLL for (int t = 0; t < T; ++t) sum[r][t] = f_fma(block, f_load(in[t] + k), sum[r][t]);
    }
  }
  if (whole < x.inputs) {
    JOPT_UNROLL for (int r = 0; r < R; ++r) {
      int8_t tail[kFloats] = {0};
      std::memcpy(tail, codes[r] + whole, x.inputs - whole);
      const F block = widen8(tail);
      JOPT_UNROLL for (int t = 0; t < T; ++t)
        sum[r][t] = f_fma(block, f_load(in[t] + whole), sum[r][t]);
    }
  }
  JOPT_UNROLL for (int r = 0; r < R; ++r) JOPT_UNROLL for (int t = 0; t < T; ++t)
    y[(m + t) * w.outputs + n + r] =
        (float)(w.scale[n + r] * less_zero(x.total, w.zero, m + t, n + r, f_sum(sum[r][t])));
}

template <int R>
JOPT_INLINE void int8_float_rows(const Floats& x, const Int8Weights& w, int64_t n, float* y) {
  int64_t m = 0;
  for (; m + 4 <= x.rows; m += 4)
    for (int r = 0; r < R; r += 2) int8_float_tile<R < 2 ? R : 2, 4>(x, w, n + r, m, y);
  for (; m < x.rows; ++m) int8_float_tile<R, 1>(x, w, n, m, y);
}

static void int8_float(const Floats& x, const Int8Weights& w, Range range, float* y) {
  int64_t n = range.begin;
  for (; n + 4 <= range.end; n += 4) int8_float_rows<4>(x, w, n, y);
  for (; n < range.end; ++n) int8_float_rows<1>(x, w, n, y);
}

}  // namespace jopt
