// Depthwise convolution, (batch, height, width, channels), as shifted multiply-adds.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

// T outputs along the width by one vector of channels; the window lies inside the image.
template <int T>
JOPT_INLINE void window_tile(const float* x, const float* kernel, int64_t rows, int64_t columns,
                             int64_t channels, int64_t width, int64_t kernel_columns, int64_t step,
                             float* y) {
  F sum[T];
  JOPT_UNROLL for (int t = 0; t < T; ++t) sum[t] = f_zero();
  for (int64_t i = 0; i < rows; ++i) {
    const float* in = x + i * width * channels;
    const float* weights = kernel + i * kernel_columns * channels;
    for (int64_t j = 0; j < columns; ++j, in += channels, weights += channels) {
      const F weight = f_load(weights);
      JOPT_UNROLL for (int t = 0; t < T; ++t)
        sum[t] = f_fma(weight, f_load(in + t * step), sum[t]);
    }
  }
  JOPT_UNROLL for (int t = 0; t < T; ++t) f_store(y + t * channels, sum[t]);
}

static void window_tail(const float* x, const float* kernel, int64_t rows, int64_t columns,
                        int64_t channels, int64_t width, int64_t kernel_columns, int64_t count,
                        float* y) {
  for (int64_t c = 0; c < count; ++c) {
    float sum = 0;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        sum += x[(i * width + j) * channels + c] * kernel[(i * kernel_columns + j) * channels + c];
    y[c] = sum;
  }
}

// Rows of outputs, counted over the batch. A window that hangs over an edge is cut to the image.
static void depthwise(const float* x, const float* kernel, const Window& s, Range range, float* y) {
  const int64_t whole = s.channels / kFloats * kFloats, step = s.stride_columns * s.channels;
  for (int64_t at = range.begin; at < range.end; ++at) {
    const int64_t top = at % s.out_rows * s.stride_rows - s.top;
    const int64_t skip = least(s.rows, top < 0 ? -top : 0);
    const int64_t rows = least(s.rows, s.height - top) - skip;
    const float* image = x + at / s.out_rows * s.height * s.width * s.channels;
    float* out = y + at * s.out_columns * s.channels;
    for (int64_t column = 0; column < s.out_columns;) {
      const int64_t left = column * s.stride_columns - s.left;
      const int64_t cut = least(s.columns, left < 0 ? -left : 0);
      const int64_t columns = least(s.columns, s.width - left) - cut;
      int64_t tile = 1;
      while (tile < 8 && columns == s.columns && column + 2 * tile <= s.out_columns &&
             left + (2 * tile - 1) * s.stride_columns + s.columns <= s.width)
        tile *= 2;
      float* to = out + column * s.channels;
      if (rows <= 0 || columns <= 0) {
        std::memset(to, 0, tile * s.channels * sizeof(float));
      } else {
        const float* in = image + ((top + skip) * s.width + left + cut) * s.channels;
        const float* weights = kernel + (skip * s.columns + cut) * s.channels;
        for (int64_t c = 0; c < whole; c += kFloats) {
          auto run = tile == 8   ? window_tile<8>
                     : tile == 4 ? window_tile<4>
                     : tile == 2 ? window_tile<2>
                                 : window_tile<1>;
          run(in + c, weights + c, rows, columns, s.channels, s.width, s.columns, step, to + c);
        }
        for (int64_t t = 0; whole < s.channels && t < tile; ++t)
          window_tail(in + whole + t * step, weights + whole, rows, columns, s.channels, s.width,
                      s.columns, s.channels - whole, to + whole + t * s.channels);
      }
      column += tile;
    }
  }
}

}  // namespace jopt
