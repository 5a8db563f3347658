// Products with sparse weights, in compressed rows by output and, within those, by blocks of inputs.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

constexpr int64_t kAhead = 1024;  // entries by which prefetches run ahead, over the rows that follow

JOPT_INLINE F f_values(const float* p) { return f_load(p); }
JOPT_INLINE F f_values(const int8_t* p) { return f_codes(p); }

// What eight entries are multiplied by. Eight loads are faster than one gather on most machines.
JOPT_INLINE F f_picked(const float* x, const uint16_t* c) {
  return f_of(x[c[0]], x[c[1]], x[c[2]], x[c[3]], x[c[4]], x[c[5]], x[c[6]], x[c[7]]);
}

template <class Value>
JOPT_INLINE float sparse_dot(const Value* values, const uint16_t* columns, int64_t count,
                             const float* x) {
  F sum[2] = {f_zero(), f_zero()};
  int64_t i = 0;
  for (; i + 2 * kFloats <= count; i += 2 * kFloats) {
    prefetch(values + i + kAhead);
    JOPT_UNROLL for (int c = 0; c < 2; ++c) {
      const int64_t at = i + c * kFloats;
      sum[c] = f_fma(f_values(values + at), f_picked(x, columns + at), sum[c]);
    }
  }
  float rest = 0;
  for (; i < count; ++i) rest += (float)values[i] * x[columns[i]];
  return f_sum(f_add(sum[0], sum[1])) + rest;
}

// to[column * to_stride + row] = from[row * from_stride + column]
static void transpose(const float* from, int64_t rows, int64_t columns, int64_t from_stride,
                      float* to, int64_t to_stride) {
  int64_t row = 0;
  for (; row + kFloats <= rows; row += kFloats) {
    int64_t column = 0;
    for (; column + kFloats <= columns; column += kFloats) {
      B square[kFloats];
      JOPT_UNROLL for (int i = 0; i < kFloats; ++i)
        square[i] = b_load(from + (row + i) * from_stride + column);
      b_transpose(square);
      JOPT_UNROLL for (int i = 0; i < kFloats; ++i)
        b_store(to + (column + i) * to_stride + row, square[i]);
    }
    for (; column < columns; ++column)
      for (int64_t i = row; i < row + kFloats; ++i)
        to[column * to_stride + i] = from[i * from_stride + column];
  }
  for (; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column)
      to[column * to_stride + row] = from[row * from_stride + column];
}

// How many rows are added up together of those that are left.
JOPT_INLINE int64_t rows_together(int64_t left) {
  return left > 16 ? 32 : left > 8 ? 16 : 8;
}

// Sums of rows that are added up together: 8, 16 or 32, whose inputs lie side by side.
struct Rows8 {
  static constexpr int kChains = 4;  // that hide the latency
  F sum = f_zero();
  JOPT_INLINE_MEMBER void add(const Rows8& other) { sum = f_add(sum, other.sum); }
  JOPT_INLINE_MEMBER void scale(float by) { sum = f_mul(sum, f_set(by)); }
  JOPT_INLINE_MEMBER void add(float value, const float* x) {
    sum = f_fma(f_set(value), f_load(x), sum);
  }
};
template <int V>
struct Rows16 {
  static constexpr int kChains = 4 / V;
  WF sum[V];
  JOPT_INLINE_MEMBER Rows16() { JOPT_UNROLL for (int v = 0; v < V; ++v) sum[v] = wf_set(0); }
  JOPT_INLINE_MEMBER void add(const Rows16& other) {
    JOPT_UNROLL for (int v = 0; v < V; ++v) sum[v] = w_add(sum[v], other.sum[v]);
  }
  JOPT_INLINE_MEMBER void scale(float by) {
    JOPT_UNROLL for (int v = 0; v < V; ++v) sum[v] = wf_mul(sum[v], wf_set(by));
  }
  JOPT_INLINE_MEMBER void add(float value, const float* x) {
    const WF spread = wf_set(value);
    JOPT_UNROLL for (int v = 0; v < V; ++v)
      sum[v] = wf_fma(spread, wf_load(x + v * kPanel), sum[v]);
  }
};

// Adds the products of some entries; x lies transposed, (inputs, rows).
template <class Sums, class Value, class Column>
JOPT_INLINE void sparse_tile(const Value* values, const Column* columns, int64_t count,
                             const float* x, Sums& total) {
  constexpr int64_t kRows = sizeof(Sums) / sizeof(float);
  constexpr int kChains = Sums::kChains;
  Sums sum[kChains];
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains)
    JOPT_UNROLL for (int c = 0; c < kChains; ++c)
      sum[c].add((float)values[i + c], x + (uint64_t)columns[i + c] * kRows);
  for (; i < count; ++i) sum[0].add((float)values[i], x + (uint64_t)columns[i] * kRows);
  JOPT_UNROLL for (int c = 0; c < kChains; ++c) total.add(sum[c]);
}

// Whether the starts of some outputs rise within the entries.
JOPT_INLINE bool starts_rise(const SparseWeights& w, Range range) {
  const int32_t* starts = w.starts + range.begin * w.blocks;
  const int64_t segments = (range.end - range.begin) * w.blocks;
  bool falling = starts[0] < 0 || starts[segments] > w.entries;
  for (int64_t i = 0; i < segments; ++i) falling |= starts[i] > starts[i + 1];
  return !falling;
}

// The columns of an output from its first input on.
struct Columns {
  std::vector<uint16_t> room;

  const uint16_t* of(const SparseWeights& w, int64_t n) {
    const int32_t* starts = w.starts + n * w.blocks;
    const size_t size = starts[w.blocks] - starts[0] + kBytes;
    if (room.size() < size) room.resize(size);
    uint16_t* to = room.data() - starts[0];
    for (int64_t block = 0; block < w.blocks; ++block) {
      const uint16_t base = (uint16_t)(block * kSparseBlock);
      const int64_t end = starts[block + 1];
      int64_t i = starts[block];
      for (; i < end && i + kBytes <= w.entries; i += kBytes) b_widen(to + i, w.columns + i, base);
      for (; i < end; ++i) to[i] = (uint16_t)(base + w.columns[i]);
    }
    return room.data();
  }
};

// Some rows by some outputs: one block of inputs after the other, which so stays in the first level of
// the cache; all at once where the second is as fast, as it is where an entry reads one line of it.
template <class Sums, class Value>
JOPT_INLINE void sparse_rows(const float* x, int64_t inputs, const SparseWeights& w, Range range,
                             int64_t rows, float* y) {
  constexpr int64_t kRows = sizeof(Sums) / sizeof(float), kOutputs = 128;
  const Value* values = (const Value*)w.values;
  const bool near = inputs <= (kRows > 16 ? 512 : 4096);
  Columns columns;
  for (int64_t from = range.begin; from < range.end; from += kOutputs) {
    const int64_t size = least(kOutputs, range.end - from);
    Sums held[kOutputs];
    for (int64_t i = 0; near && i < size; ++i) {
      const int32_t* starts = w.starts + (from + i) * w.blocks;
      const int64_t count = starts[w.blocks] - starts[0];
      sparse_tile(values + starts[0], columns.of(w, from + i), count, x, held[i]);
    }
    for (int64_t block = 0; !near && block < w.blocks; ++block)
      for (int64_t i = 0; i < size; ++i) {
        const int32_t* starts = w.starts + (from + i) * w.blocks + block;
        sparse_tile(values + starts[0], w.columns + starts[0], starts[1] - starts[0],
                    x + block * kSparseBlock * kRows, held[i]);
      }
    for (int64_t i = 0; w.scale && i < size; ++i) held[i].scale(w.scale[from + i]);
    transpose((const float*)held, size, rows, kRows, y + from, w.outputs);
  }
}

template <class Value>
static void sparse_row(const Floats& x, const SparseWeights& w, Range range, float* y) {
  Columns columns;
  for (int64_t n = range.begin; n < range.end; ++n) {
    const int64_t start = w.starts[n * w.blocks], count = w.starts[(n + 1) * w.blocks] - start;
    const Value* values = (const Value*)w.values + start;
    const float sum = sparse_dot(values, columns.of(w, n), count, x.data);
    y[n] = w.scale ? w.scale[n] * sum : sum;
  }
}

template <class Value>
static void sparse_outputs(const Floats& x, const SparseWeights& w, Range range, float* y) {
  if (x.rows == 1) return sparse_row<Value>(x, w, range, y);
  for (int64_t m = 0, some; m < x.rows; m += some) {
    some = rows_together(x.rows - m);
    const float* in = x.data + m * x.inputs;
    const int64_t left = least(some, x.rows - m);
    float* out = y + m * w.outputs;
    if (some == 32) sparse_rows<Rows16<2>, Value>(in, x.inputs, w, range, left, out);
    else if (some == 16) sparse_rows<Rows16<1>, Value>(in, x.inputs, w, range, left, out);
    else sparse_rows<Rows8, Value>(in, x.inputs, w, range, left, out);
  }
}

// Inputs are filled up to whole blocks, so that a byte counts no other. Returns false where the starts
// do not rise.
static bool sparse(const Floats& x, const SparseWeights& w, Range range, float* y) {
  if (!starts_rise(w, range)) return false;
  if (w.coded) sparse_outputs<int8_t>(x, w, range, y);
  else sparse_outputs<float>(x, w, range, y);
  return true;
}

// The sum of an output by a row of codes.
JOPT_INLINE int32_t sparse_sum(const SparseWeights& w, int64_t n, const int8_t* x) {
  const int8_t* values = (const int8_t*)w.values;
  const int32_t* starts = w.starts + n * w.blocks;
#ifdef JOPT_VBMI
  // A block's inputs, 128 higher, stand in four registers, where entries pick theirs.
  const __m512i high = _mm512_set1_epi8(-128), ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512(), total = sum;
  for (int64_t block = 0; block < w.blocks; ++block, x += kSparseBlock) {
    __m512i in[4];
    JOPT_UNROLL for (int i = 0; i < 4; ++i)
      in[i] = _mm512_xor_si512(high, _mm512_loadu_si512(x + i * 64));
    for (int64_t i = starts[block]; i < starts[block + 1]; i += 64) {
      const int64_t left = starts[block + 1] - i;
      const __mmask64 some = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
      prefetch(values + i + kAhead);
      prefetch(w.columns + i + kAhead);
      const __m512i place = _mm512_maskz_loadu_epi8(some, w.columns + i);
      const __m512i codes = _mm512_maskz_loadu_epi8(some, values + i);
      const __m512i picked = _mm512_mask_blend_epi8(
          _mm512_movepi8_mask(place), _mm512_permutex2var_epi8(in[0], place, in[1]),
          _mm512_permutex2var_epi8(in[2], place, in[3]));
      sum = _mm512_dpbusd_epi32(sum, picked, codes);
      total = _mm512_dpbusd_epi32(total, ones, codes);
    }
  }
  return _mm512_reduce_add_epi32(sum) - 128 * _mm512_reduce_add_epi32(total);
#else
  int32_t sum = 0;
  for (int64_t block = 0; block < w.blocks; ++block, x += kSparseBlock)
    for (int64_t i = starts[block]; i < starts[block + 1]; ++i) sum += values[i] * x[w.columns[i]];
  return sum;
#endif
}

// Codes by codes; otherwise as `sparse`.
static bool sparse8(const Codes8& x, const SparseWeights& w, Range range, float* y) {
  if (!starts_rise(w, range)) return false;
  for (int64_t n = range.begin; n < range.end; ++n)
    for (int64_t m = 0; m < x.rows; ++m)
      y[m * w.outputs + n] = (float)(x.scale[m] * ((double)sparse_sum(w, n, x.codes + m * x.stride) *
                                                   (w.scale ? w.scale[n] : 1.0f)));
  return true;
}

}  // namespace jopt
