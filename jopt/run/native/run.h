// Each product from plain arrays to plain arrays: activations are prepared, then outputs are shared
// out over the pool. Nothing here knows XLA, so that a fuzzer can drive it.
#pragma once

#include "parallel.h"
#include "kernels.h"

namespace jopt {

constexpr int64_t kGrain = 16;  // outputs of one chunk: a whole number of cache lines

struct Rounded {
  Scratch<int8_t> codes;
  Scratch<double> scale;
  Scratch<int32_t> total;
  Codes8 view;
};

inline double total_of(const float* values, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}

// Room for rows rounded to int8, and for sums of their codes by groups, of which there may be none.
inline Rounded room(int64_t rows, int64_t inputs, int64_t groups, int64_t step = kPair) {
  Rounded out;
  const int64_t stride = round_up(inputs, step);
  out.codes = scratch<int8_t>(rows * stride);
  out.scale = scratch<double>(rows);
  out.total = scratch<int32_t>(rows * groups);
  out.view = {out.codes.get(), out.scale.get(), out.total.get(), rows, inputs, stride};
  return out;
}

// Rounds some rows; `group` codes are summed up together.
inline void round_rows(const Rounded& out, const float* x, const float* fixed, int64_t groups,
                       int64_t group, Range rows) {
  const int64_t inputs = out.view.inputs, stride = out.view.stride;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    int8_t* codes = &out.codes[m * stride];
    out.scale[m] = quantize(x + m * inputs, inputs, stride, fixed, codes);
    for (int64_t g = 0; g < groups; ++g)
      out.total[m * groups + g] =
          sum_codes(codes + g * group, least((g + 1) * group, stride) - g * group);
  }
}

template <class Pool>
Rounded rounded(Pool& pool, const float* x, int64_t rows, int64_t inputs, const float* fixed,
                int64_t groups, int64_t group, int64_t step = kPair) {
  Rounded out = room(rows, inputs, groups, step);
  over_ranges(pool, rows, 1, kOfRounding * rows * inputs,
              [&](Range range) { round_rows(out, x, fixed, groups, group, range); });
  return out;
}

struct Padded {
  Scratch<float> data;
  Floats view;
};

// Rows of floats, copied only where their length is not a multiple of `step` already.
inline Padded padded(const float* x, int64_t rows, int64_t inputs, int64_t step = kPair) {
  Padded out;
  const int64_t stride = round_up(inputs, step);
  if (stride == inputs) {
    out.view = {x, nullptr, rows, inputs, stride};
    return out;
  }
  out.data = scratch<float>(rows * stride);
  std::memset(out.data.get(), 0, rows * stride * sizeof(float));
  for (int64_t m = 0; m < rows; ++m)
    std::memcpy(&out.data[m * stride], x + m * inputs, inputs * sizeof(float));
  out.view = {out.data.get(), nullptr, rows, inputs, stride};
  return out;
}

// Blocks of rows that are added up together, each transposed, (inputs, rows), and filled up with zeros:
// all but the last are full. Inputs are filled up to whole blocks.
inline Padded transposed(const float* x, int64_t rows, int64_t inputs) {
  const int64_t whole = round_up(inputs, kSparseBlock);
  Padded out;
  const int64_t last = rows % 32 ? rows_together(rows % 32) : 0;
  out.data = scratch<float>((rows / 32 * 32 + last) * whole);
  out.view = {out.data.get(), nullptr, rows, whole, whole};
  for (int64_t m = 0, some; m < rows; m += some) {
    some = rows_together(rows - m);
    const int64_t real = least(some, rows - m);
    float* to = &out.data[m * whole];
    transpose(x + m * inputs, real, inputs, inputs, to, some);
    for (int64_t k = 0; k < inputs; ++k)
      for (int64_t row = real; row < some; ++row) to[k * some + row] = 0;
    std::memset(to + inputs * some, 0, (whole - inputs) * some * sizeof(float));
  }
  return out;
}

// Rows of floats as they are, for panels.
inline Floats unpadded(const float* x, int64_t rows, int64_t inputs) {
  return {x, nullptr, rows, inputs, inputs};
}

constexpr int64_t kFloatStep = kFloatPanels * kPanel;  // outputs whose sums are added up together
constexpr int64_t kManyFloatRows = 16;  // from which on panels of floats pay
constexpr int64_t kRowsOfBlock = 64;   // for which packing panels anew takes little time
constexpr int64_t kManyBlocks = 8;      // of rows for each thread

// Whether rows alone are shared out: each thread then writes outputs that lie in one piece.
template <class Pool>
bool are_many(const Pool& pool, int64_t rows) {
  return rows >= kManyBlocks * kRowsNear * pool.num_threads();
}

// Rows by panels of floats that `pack(first)` makes.
template <class Pool, class Pack>
void run_packed(Pool& pool, const Floats& x, const Pack& pack, const After& after, int64_t outputs,
                float* y) {
  const int64_t work = kOfFloats * x.rows * x.inputs * outputs;
  auto body = [&](Range m, Range n) { by_floats(x, pack, after, outputs, m, n, y); };
  if (!are_many(pool, x.rows))
    return over_blocks(pool, x.rows, kRowsOfBlock, outputs, work, body, kFloatStep);
  over_ranges(pool, x.rows, kRowsNear, work, [&](Range m) { body(m, {0, outputs}); });
}

// Rounds rows, and calls body(view, rows, outputs) over blocks. Of many rows some are rounded, go by all
// outputs, and then the next.
template <class Pool, class Body>
void over_rounded(Pool& pool, const float* x, int64_t rows, int64_t inputs, const float* fixed,
                  int64_t groups, int64_t group, int64_t outputs, const Body& body) {
  const int64_t work = rows * inputs * outputs;
  if (!are_many(pool, rows)) {
    const Rounded in = rounded(pool, x, rows, inputs, fixed, groups, group);
    return over_blocks(pool, rows, kInt8Rows, outputs, work,
                       [&](Range m, Range n) { body(in.view, m, n); });
  }
  const Rounded in = room(rows, inputs, groups);
  over_ranges(pool, rows, kRowsNear, work, [&](Range range) {
    for (int64_t m = range.begin; m < range.end; m += kRowsNear) {
      const Range some{m, least(m + kRowsNear, range.end)};
      round_rows(in, x, fixed, groups, group, some);
      body(in.view, some, Range{0, outputs});
    }
  });
}

template <class Pool>
void run_int8(Pool& pool, const float* x, int64_t rows, int64_t inputs, const float* fixed,
              const Int8Weights& w, const After& after, float* y) {
  over_rounded(pool, x, rows, inputs, fixed, w.zero || kShift ? 1 : 0, round_up(inputs, kPair),
               w.outputs,
               [&](const Codes8& in, Range m, Range n) { int8(in, w, after, m, n, y); });
}

template <class Pool>
void run_int8_float(Pool& pool, const float* x, int64_t rows, int64_t inputs, const Int8Weights& w,
                    const After& after, float* y) {
  Floats in = unpadded(x, rows, inputs);
  auto unpack = [&](int64_t first) { return int8_unpack(w, inputs, first); };
  if (rows >= kManyFloatRows) return run_packed(pool, in, unpack, after, w.outputs, y);
  const auto total = scratch<double>(w.zero ? rows : 0);
  for (int64_t m = 0; w.zero && m < rows; ++m) total[m] = total_of(x + m * inputs, inputs);
  in.total = total.get();
  over_blocks(pool, rows, rows, w.outputs, kOfFloats * rows * inputs * w.outputs,
              [&](Range m, Range n) { int8_float(in, w, after, m, n, y); });
}

template <class Pool>
void run_int4(Pool& pool, const float* x, int64_t rows, int64_t inputs, const Int4Weights& w,
              const After& after, float* y) {
  over_rounded(pool, x, rows, inputs, nullptr, w.groups, w.group, w.outputs,
               [&](const Codes8& in, Range m, Range n) { int4(in, w, after, m, n, y); });
}

template <class Pool>
void run_int4_float(Pool& pool, const float* x, int64_t rows, int64_t inputs, const Int4Weights& w,
                    const After& after, float* y) {
  auto unpack = [&](int64_t first) { return int4_unpack(w, inputs, first); };
  run_packed(pool, unpadded(x, rows, inputs), unpack, after, w.outputs, y);
}

template <class Pool>
void run_codebook(Pool& pool, const float* x, int64_t rows, int64_t inputs, const Codebook& w,
                  float* y) {
  const Rounded in = rounded(pool, x, rows, inputs, nullptr, kShift ? w.groups : 0, w.group);
  const int64_t work = rows * inputs * w.outputs;
  if (rows >= kManyRows)
    return over_blocks(pool, rows, kRowsOfBlock, w.outputs, work,
                       [&](Range m, Range n) { codebook8_panels(in.view, w, m, n, y); });
  over_ranges(pool, w.outputs, kGrain, work, [&](Range range) { codebook8(in.view, w, range, y); });
}

template <class Pool>
void run_codebook_float(Pool& pool, const float* x, int64_t rows, int64_t inputs, const Codebook& w,
                        float* y) {
  auto unpack = [&](int64_t first) { return codebook_unpack(w, inputs, first); };
  if (rows >= 2 * kManyFloatRows)  // entries take longer to look up than codes to widen
    return run_packed(pool, unpadded(x, rows, inputs), unpack, After(), w.outputs, y);
  const Padded in = padded(x, rows, inputs);
  const int64_t work = kOfFloats * rows * inputs * w.outputs;
  over_ranges(pool, w.outputs, kGrain, work, [&](Range range) { codebook(in.view, w, range, y); });
}

template <class Pool>
void run_floats(Pool& pool, const float* x, int64_t rows, int64_t inputs, const FloatWeights& w,
                const After& after, float* y) {
  auto pack = [&](int64_t first) { return float_pack(w, inputs, first); };
  run_packed(pool, unpadded(x, rows, inputs), pack, after, w.outputs, y);
}

// The signs of rows of floats as bits, 1 where x >= 0; `width` bytes a row.
template <class Pool>
Scratch<uint8_t> packed_signs(Pool& pool, const float* x, int64_t rows, int64_t inputs,
                              int64_t width) {
  auto out = scratch<uint8_t>(rows * width);
  over_ranges(pool, rows, 1, kOfRounding * rows * inputs, [&](Range range) {
    for (int64_t m = range.begin; m < range.end; ++m)
      for (int64_t byte = 0; byte < width; ++byte) {
        const float* in = x + m * inputs + 8 * byte;
        const int64_t count = least(8, inputs - 8 * byte);
        unsigned bits = 0;
        for (int64_t i = 0; i < count; ++i) bits |= (unsigned)(in[i] >= 0) << i;
        out[m * width + byte] = (uint8_t)bits;
      }
  });
  return out;
}

template <class Pool>
void run_binary(Pool& pool, const uint8_t* x, const float* x_scale, int64_t rows,
                int64_t inputs, const BitWeights& w, float* y) {
  over_ranges(pool, w.outputs, kGrain, rows * w.width * w.outputs,
              [&](Range range) { binary(x, x_scale, rows, inputs, w, range, y); });
}

template <class Pool>
void run_signs(Pool& pool, const float* x, int64_t rows, int64_t inputs,
               const BitWeights& w, float* y) {
  const Padded in = padded(x, rows, inputs);
  over_ranges(pool, w.outputs, kGrain, kOfFloats * rows * inputs * w.outputs,
              [&](Range range) { signs(in.view, w, range, y); });
}

// Returns false where the starts do not rise from 0 to the number of entries at most; y is then not to
// be used. Rows are rounded only for codes.
template <class Pool>
bool run_sparse(Pool& pool, const float* x, int64_t rows, int64_t inputs, bool round,
                const SparseWeights& w, float* y) {
  std::atomic<bool> right{true};
  auto over_outputs = [&](auto body) {
    const int64_t work = w.entries * (kOfPicking + kOfFloats * rows);
    over_ranges(pool, w.outputs, kGrain, work, [&](Range range) {
      if (!body(range)) right = false;
    });
  };
  if (round) {
    const Rounded in = rounded(pool, x, rows, inputs, nullptr, 0, 0, kSparseBlock);
    over_outputs([&](Range range) { return sparse8(in.view, w, range, y); });
  } else {
    const Padded in =
        rows == 1 ? padded(x, rows, inputs, kSparseBlock) : transposed(x, rows, inputs);
    over_outputs([&](Range range) { return sparse(in.view, w, range, y); });
  }
  return right;
}

// The image with its edges, or as it is where it has none: what `s` says of it becomes true of that.
template <class Pool>
Padded with_edges(Pool& pool, const float* x, Window& s) {
  Padded out;
  const int64_t height = (s.out_rows - 1) * s.stride_rows + s.rows;
  const int64_t width = (s.out_columns - 1) * s.stride_columns + s.columns;
  out.view.data = x;
  if (!s.top && !s.left && height <= s.height && width <= s.width) return out;
  const int64_t line = width * s.channels, from = least(s.left, width);
  const int64_t count = least(s.width, width - from) * s.channels;
  out.data = scratch<float>(s.batch * height * line);
  over_ranges(pool, s.batch * height, 1, kOfFloats * s.batch * height * line, [&](Range range) {
    for (int64_t at = range.begin; at < range.end; ++at) {
      const int64_t row = at % height - s.top;
      float* to = &out.data[at * line];
      std::memset(to, 0, line * sizeof(float));
      if (row < 0 || row >= s.height) continue;
      const float* image = x + at / height * s.height * s.width * s.channels;
      std::memcpy(to + from * s.channels, image + row * s.width * s.channels, count * sizeof(float));
    }
  });
  out.view.data = out.data.get();
  s.height = height;
  s.width = width;
  return out;
}

template <class Pool, class Pack>
void run_windows(Pool& pool, const float* x, const Pack& pack, const After& after, int64_t outputs,
                 Window s, float* y) {
  const int64_t rows = s.batch * s.out_rows;
  if (rows <= 0 || s.out_columns <= 0) return;
  const Padded in = with_edges(pool, x, s);
  const int64_t work = kOfFloats * rows * s.out_columns * s.rows * s.columns * s.channels * outputs;
  const int64_t many = kRowsOfBlock / s.out_columns + 1;
  auto body = [&](Range m, Range n) {
    convolution(in.view.data, pack, after, outputs, s, m, n, y);
  };
  over_blocks(pool, rows, many, outputs, work, body, kFloatStep);
}

template <class Pool>
void run_convolution(Pool& pool, const float* x, const FloatWeights& w, const After& after,
                     const Window& s, float* y) {
  const int64_t inputs = s.rows * s.columns * s.channels;
  auto pack = [&](int64_t first) { return float_pack(w, inputs, first); };
  run_windows(pool, x, pack, after, w.outputs, s, y);
}

template <class Pool>
void run_int8_convolution(Pool& pool, const float* x, const Int8Weights& w, const After& after,
                          const Window& s, float* y) {
  const int64_t inputs = s.rows * s.columns * s.channels;
  auto pack = [&](int64_t first) { return int8_unpack(w, inputs, first); };
  run_windows(pool, x, pack, after, w.outputs, s, y);
}

template <class Pool>
void run_depthwise(Pool& pool, const float* x, const float* kernel, const After& after,
                   const Window& s, float* y) {
  const int64_t work =
      kOfFloats * s.batch * s.out_rows * s.out_columns * s.channels * s.rows * s.columns;
  over_ranges(pool, s.batch * s.out_rows, 1, work,
              [&](Range range) { depthwise(x, kernel, after, s, range, y); });
}

}  // namespace jopt
