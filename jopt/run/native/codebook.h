// Products with 4-bit codebooks and float activations: the entries of the tables as they are.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

// T rows of activations by one output. Each half of a block lies in one group, so that an entry is
// scaled once for all rows.
template <int T>
JOPT_INLINE void codebook_tile(const Floats& x, const Int4Weights& w, int64_t n, int64_t m,
                               float* y) {
  const uint8_t* packed = w.packed + n * w.width;
  const Table table = t_load(w.table + (w.tables > 1 ? 16 * n : 0));
  const float* in[T];
  F sum[T];
  JOPT_UNROLL for (int t = 0; t < T; ++t) {
    in[t] = x.data + (m + t) * x.stride;
    sum[t] = f_zero();
  }
  uint8_t index[kPair];
  for (int64_t half = 0; half * kBytes < x.inputs; ++half) {
    const B block = b_load(packed + half / 2 * kBytes);
    prefetch(packed + half / 2 * kBytes + w.width);
    b_store(index, half % 2 ? b_high(block) : b_low(block));
    const F scale = f_set(scale_of(w, n, half * kBytes / w.group));
    JOPT_UNROLL for (int i = 0; i < kBytes; i += kFloats) {
      const F values = f_mul(scale, t_lookup(table, index + i));
      JOPT_UNROLL for (int t = 0; t < T; ++t)
        sum[t] = f_fma(values, f_load(in[t] + half * kBytes + i), sum[t]);
    }
  }
  JOPT_UNROLL for (int t = 0; t < T; ++t) y[(m + t) * w.outputs + n] = f_sum(sum[t]);
}

static void codebook(const Floats& x, const Int4Weights& w, Range range, float* y) {
  for (int64_t n = range.begin; n < range.end; ++n) {
    int64_t m = 0;
    for (; m + 8 <= x.rows; m += 8) codebook_tile<8>(x, w, n, m, y);
    for (; m + 2 <= x.rows; m += 2) codebook_tile<2>(x, w, n, m, y);
    for (; m < x.rows; ++m) codebook_tile<1>(x, w, n, m, y);
  }
}

}  // namespace jopt
