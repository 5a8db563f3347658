// Depthwise convolution, (batch, height, width, channels), as shifted multiply-adds.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

// T outputs along the width by one vector of channels, for windows of kColumns that move by kStride
// and lie inside the image: what several of them see is loaded once.
template <int T, int kColumns, int kStride>
static void window_tile(const float* x, const float* kernel, int64_t rows, int64_t channels,
                        int64_t width, float* y) {
  F sum[T];
  JOPT_UNROLL for (int t = 0; t < T; ++t) sum[t] = f_zero();
  for (int64_t i = 0; i < rows; ++i, x += width * channels, kernel += kColumns * channels) {
    F weight[kColumns];
    JOPT_UNROLL for (int j = 0; j < kColumns; ++j) weight[j] = f_load(kernel + j * channels);
    JOPT_UNROLL_LONG for (int p = 0; p < (T - 1) * kStride + kColumns; ++p) {
      const F value = f_load_once(x + p * channels);
      JOPT_UNROLL for (int j = 0; j < kColumns; ++j)
        if (p >= j && (p - j) % kStride == 0 && (p - j) / kStride < T)
          sum[(p - j) / kStride] = f_fma(weight[j], value, sum[(p - j) / kStride]);
    }
  }
  JOPT_UNROLL for (int t = 0; t < T; ++t) f_store(y + t * channels, sum[t]);
}

// One output by V vectors of channels, for any part of any window.
template <int V>
JOPT_INLINE void window_part(const float* x, const float* kernel, int64_t rows, int64_t columns,
                             int64_t channels, int64_t width, int64_t kernel_columns, float* y) {
  F sum[V];
  JOPT_UNROLL for (int v = 0; v < V; ++v) sum[v] = f_zero();
  for (int64_t i = 0; i < rows; ++i) {
    const float* in = x + i * width * channels;
    const float* weights = kernel + i * kernel_columns * channels;
    for (int64_t j = 0; j < columns; ++j, in += channels, weights += channels)
      JOPT_UNROLL for (int v = 0; v < V; ++v)
        sum[v] = f_fma(f_load(weights + v * kFloats), f_load(in + v * kFloats), sum[v]);
  }
  JOPT_UNROLL for (int v = 0; v < V; ++v) f_store(y + v * kFloats, sum[v]);
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

using WindowTile = void (*)(const float*, const float*, int64_t, int64_t, int64_t, float*);

// The tile for T outputs of a convolution, or null where there is none for its sizes.
template <int T>
static WindowTile tile_for(const Window& s) {
  if (s.columns == 3 && s.stride_columns == 1) return window_tile<T, 3, 1>;
  if (s.columns == 5 && s.stride_columns == 1) return window_tile<T, 5, 1>;
  if (s.columns == 3 && s.stride_columns == 2) return window_tile<T, 3, 2>;
  if (s.columns == 5 && s.stride_columns == 2) return window_tile<T, 5, 2>;
  return nullptr;
}

// Rows of outputs, counted over the batch. A window that hangs over an edge is cut to the image.
static void depthwise(const float* x, const float* kernel, const After& after, const Window& s,
                      Range range, float* y) {
  const int64_t whole = s.channels / kFloats * kFloats;
  const WindowTile tiles[] = {tile_for<8>(s), tile_for<4>(s), tile_for<2>(s)};
  for (int64_t at = range.begin; at < range.end; ++at) {
    const int64_t top = at % s.out_rows * s.stride_rows - s.top;
    const int64_t skip = least(s.rows, top < 0 ? -top : 0);
    const int64_t rows = least(s.rows, s.height - top) - skip;
    const float* image = x + at / s.out_rows * s.height * s.width * s.channels;
    float* out = y + at * s.out_columns * s.channels;
    const Outputs outputs{after, 0, s.channels, s.channels, y, at * s.out_columns};
    for (int64_t column = 0; column < s.out_columns;) {
      const int64_t left = column * s.stride_columns - s.left;
      const int64_t cut = least(s.columns, left < 0 ? -left : 0);
      const int64_t columns = least(s.columns, s.width - left) - cut;
      float* to = out + column * s.channels;
      if (rows <= 0 || columns <= 0) {
        std::memset(to, 0, s.channels * sizeof(float));
        outputs.end(column++, 1);
        continue;
      }
      const float* in = image + ((top + skip) * s.width + left + cut) * s.channels;
      const float* weights = kernel + (skip * s.columns + cut) * s.channels;
      int64_t count = 1;
      WindowTile tile = nullptr;
      for (int64_t i = 0; columns == s.columns && !tile && i < 3; ++i) {
        const int64_t several = 8 >> i, last = left + (several - 1) * s.stride_columns;
        if (column + several > s.out_columns || last + s.columns > s.width) continue;
        tile = tiles[i];
        count = tile ? several : 1;
      }
      int64_t c = 0;
      for (; tile && c < whole; c += kFloats)
        tile(in + c, weights + c, rows, s.channels, s.width, to + c);
      for (; c + 4 * kFloats <= whole; c += 4 * kFloats)
        window_part<4>(in + c, weights + c, rows, columns, s.channels, s.width, s.columns, to + c);
      for (; c < whole; c += kFloats)
        window_part<1>(in + c, weights + c, rows, columns, s.channels, s.width, s.columns, to + c);
      for (int64_t t = 0; whole < s.channels && t < count; ++t)
        window_tail(in + whole + t * s.stride_columns * s.channels, weights + whole, rows, columns,
                    s.channels, s.width, s.columns, s.channels - whole, to + whole + t * s.channels);
      outputs.end(column, count);
      column += count;
    }
  }
}

}  // namespace jopt
