// Products with signs: exact counts with binary activations, sums of +-x with float ones.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

// The dot product of two rows of signs is inputs - 2 * popcount(a ^ b).
static void binary(const uint8_t* x, const float* x_scale, int64_t rows, int64_t inputs,
                   const BitWeights& w, Range range, float* y) {
  const int64_t whole = w.width / kBytes * kBytes;
  for (int64_t n = range.begin; n < range.end; ++n) {
    const uint8_t* bits = w.bits + n * w.width;
    uint8_t tail[kBytes] = {0};
    if (whole < w.width) std::memcpy(tail, bits + whole, w.width - whole);
    for (int64_t m = 0; m < rows; ++m) {
      const uint8_t* other = x + m * w.width;
      C differing = c_zero();
      for (int64_t b = 0; b < whole; b += kBytes)
        differing = c_add(differing, b_counts(b_load(bits + b), b_load(other + b)));
      if (whole < w.width) {
        uint8_t other_tail[kBytes] = {0};
        std::memcpy(other_tail, other + whole, w.width - whole);
        differing = c_add(differing, b_counts(b_load(tail), b_load(other_tail)));
      }
      const float sum = (float)(inputs - 2 * c_sum(differing));
      y[m * w.outputs + n] = (x_scale ? x_scale[m] : 1.0f) * (w.scale[n] * sum);
    }
  }
}

// R outputs by T rows; the activations are padded to whole words of 32.
template <int R, int T>
JOPT_INLINE void signs_tile(const Floats& x, const BitWeights& w, int64_t n, int64_t m, float* y) {
  F sum[R][T];
  JOPT_UNROLL for (int r = 0; r < R; ++r) JOPT_UNROLL for (int t = 0; t < T; ++t)
    sum[r][t] = f_zero();
  for (int64_t b = 0; b < w.width; b += 4) {
    uint32_t word[R];
    JOPT_UNROLL for (int r = 0; r < R; ++r) std::memcpy(&word[r], w.bits + (n + r) * w.width + b, 4);
    JOPT_UNROLL for (int i = 0; i < 32; i += kFloats) {
      JOPT_UNROLL for (int t = 0; t < T; ++t) {
        const F in = f_load(x.data + (m + t) * x.stride + 8 * b + i);
        JOPT_UNROLL for (int r = 0; r < R; ++r)
          sum[r][t] = f_add(sum[r][t], f_signed(in, word[r], i));
      }
    }
  }
  JOPT_UNROLL for (int r = 0; r < R; ++r) JOPT_UNROLL for (int t = 0; t < T; ++t)
    y[(m + t) * w.outputs + n + r] = w.scale[n + r] * f_sum(sum[r][t]);
}

static void signs(const Floats& x, const BitWeights& w, Range range, float* y) {
  int64_t n = range.begin;
  for (; n + 4 <= range.end; n += 4)
    for (int64_t m = 0; m < x.rows; ++m) signs_tile<4, 1>(x, w, n, m, y);
  for (; n < range.end; ++n)
    for (int64_t m = 0; m < x.rows; ++m) signs_tile<1, 1>(x, w, n, m, y);
}

}  // namespace jopt
