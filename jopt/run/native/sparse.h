// Products with sparse weights, in compressed rows by output and, within those, by blocks of inputs.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

template <class Column>
static bool columns_fit(const Column* columns, int64_t count, int64_t inputs) {
  constexpr int64_t kStep = kBytes / sizeof(Column);
  B largest = b_none();
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) largest = b_larger(largest, b_load(columns + i), Column{});
  Column lanes[kStep], most = 0;
  b_store(lanes, largest);
  for (Column lane : lanes) most = lane > most ? lane : most;
  for (; i < count; ++i) most = columns[i] > most ? columns[i] : most;
  return count == 0 || (int64_t)most < inputs;
}

constexpr int64_t kAhead = 1024;  // entries by which prefetches run ahead, over the rows that follow

JOPT_INLINE F f_values(const float* p) { return f_load(p); }
JOPT_INLINE F f_values(const int8_t* p) { return f_codes(p); }

// What eight entries are multiplied by. Eight loads are faster than one gather on most machines.
template <class Column>
JOPT_INLINE F f_picked(const float* x, const Column* c) {
  return f_of(x[c[0]], x[c[1]], x[c[2]], x[c[3]], x[c[4]], x[c[5]], x[c[6]], x[c[7]]);
}

template <class Value, class Column>
JOPT_INLINE float sparse_dot(const Value* values, const Column* columns, int64_t count,
                             const float* x) {
  F sum[2] = {f_zero(), f_zero()};
  int64_t i = 0;
  for (; i + 2 * kFloats <= count; i += 2 * kFloats) {
    prefetch(values + i + kAhead);
    prefetch(columns + i + kAhead);
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

constexpr int64_t kNear = 256 << 10;  // bytes of inputs that are read fast wherever they lie

// Some rows by some outputs: one block of inputs after the other, which so stays near; all blocks at
// once where they do anyhow.
template <class Sums, class Value, class Column>
JOPT_INLINE void sparse_rows(const float* x, int64_t inputs, const SparseWeights& w, Range range,
                             int64_t rows, float* y) {
  constexpr int64_t kRows = sizeof(Sums) / sizeof(float), kOutputs = 128;
  const int64_t together = inputs * (int64_t)sizeof(Sums) <= kNear ? w.blocks : 1;
  for (int64_t from = range.begin; from < range.end; from += kOutputs) {
    const int64_t size = least(kOutputs, range.end - from);
    Sums held[kOutputs];
    for (int64_t block = 0; block < w.blocks; block += together)
      for (int64_t i = 0; i < size; ++i) {
        const int32_t* starts = w.starts + (from + i) * w.blocks + block;
        sparse_tile((const Value*)w.values + starts[0], (const Column*)w.columns + starts[0],
                    starts[together] - starts[0], x, held[i]);
      }
    for (int64_t i = 0; w.scale && i < size; ++i) held[i].scale(w.scale[from + i]);
    transpose((const float*)held, size, rows, kRows, y + from, w.outputs);
  }
}

// Whether the starts of some outputs rise within the entries, and their columns are below the number
// of inputs.
template <class Column>
JOPT_INLINE bool outputs_fit(const SparseWeights& w, Range range, int64_t inputs) {
  const int32_t* starts = w.starts + range.begin * w.blocks;
  const int64_t segments = (range.end - range.begin) * w.blocks;
  const int64_t first = starts[0], last = starts[segments];
  bool falling = first < 0 || last > w.entries;
  for (int64_t i = 0; i < segments; ++i) falling |= starts[i] > starts[i + 1];
  return !falling && columns_fit((const Column*)w.columns + first, last - first, inputs);
}

// Columns of one output are read from memory once: looked at, then used.
template <class Value, class Column>
static bool sparse_row(const Floats& x, const SparseWeights& w, Range range, float* y) {
  for (int64_t n = range.begin; n < range.end; ++n) {
    if (!outputs_fit<Column>(w, {n, n + 1}, x.inputs)) return false;
    const int64_t start = w.starts[n * w.blocks], end = w.starts[(n + 1) * w.blocks];
    const float sum = sparse_dot((const Value*)w.values + start, (const Column*)w.columns + start,
                                 end - start, x.data);
    y[n] = w.scale ? w.scale[n] * sum : sum;
  }
  return true;
}

template <class Value, class Column>
static bool sparse_outputs(const Floats& x, const SparseWeights& w, Range range, float* y) {
  if (x.rows == 1) return sparse_row<Value, Column>(x, w, range, y);
  if (!outputs_fit<Column>(w, range, x.inputs)) return false;
  for (int64_t m = 0, some; m < x.rows; m += some) {
    some = rows_together(x.rows - m);
    const float* in = x.data + m * x.inputs;
    const int64_t left = least(some, x.rows - m);
    float* out = y + m * w.outputs;
    if (some == 32) sparse_rows<Rows16<2>, Value, Column>(in, x.inputs, w, range, left, out);
    else if (some == 16) sparse_rows<Rows16<1>, Value, Column>(in, x.inputs, w, range, left, out);
    else sparse_rows<Rows8, Value, Column>(in, x.inputs, w, range, left, out);
  }
  return true;
}

// Returns false, and reads nothing beyond x, where a column is not below the number of inputs.
static bool sparse(const Floats& x, const SparseWeights& w, Range range, float* y) {
  if (w.coded)
    return w.wide ? sparse_outputs<int8_t, uint32_t>(x, w, range, y)
                  : sparse_outputs<int8_t, uint16_t>(x, w, range, y);
  return w.wide ? sparse_outputs<float, uint32_t>(x, w, range, y)
                : sparse_outputs<float, uint16_t>(x, w, range, y);
}

// The sum of an output by a row of codes.
JOPT_INLINE int32_t sparse_sum(const SparseWeights& w, int64_t n, const int8_t* x) {
  const int8_t* values = (const int8_t*)w.values;
  const uint16_t* columns = (const uint16_t*)w.columns;
  const int32_t* starts = w.starts + n * w.blocks;
#ifdef JOPT_VBMI
  // A block's inputs, 128 higher, stand in four registers, where entries pick theirs by the low byte of
  // their column.
  const __m512i high = _mm512_set1_epi8(-128), ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512(), total = sum;
  for (int64_t block = 0; block < w.blocks; ++block, x += kSparseBlock) {
    __m512i in[4];
    JOPT_UNROLL for (int i = 0; i < 4; ++i)
      in[i] = _mm512_xor_si512(high, _mm512_loadu_si512(x + i * 64));
    for (int64_t i = starts[block]; i < starts[block + 1]; i += 32) {
      const int64_t left = starts[block + 1] - i;
      const __mmask32 some = left < 32 ? (1u << left) - 1 : ~0u;
      prefetch(values + i + kAhead);
      prefetch(columns + i + kAhead);
      const __m512i place = _mm512_castsi256_si512(
          _mm512_cvtepi16_epi8(_mm512_maskz_loadu_epi16(some, columns + i)));
      const __m512i codes = _mm512_zextsi256_si512(_mm256_maskz_loadu_epi8(some, values + i));
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
  for (int64_t i = starts[0]; i < starts[w.blocks]; ++i) sum += values[i] * x[columns[i]];
  return sum;
#endif
}

// Codes by codes; rows are filled up to whole blocks. Returns false as `sparse` does.
static bool sparse8(const Codes8& x, const SparseWeights& w, Range range, float* y) {
  for (int64_t n = range.begin; n < range.end; ++n) {
    if (!outputs_fit<uint16_t>(w, {n, n + 1}, x.inputs)) return false;
    for (int64_t m = 0; m < x.rows; ++m)
      y[m * w.outputs + n] = (float)(x.scale[m] * ((double)sparse_sum(w, n, x.codes + m * x.stride) *
                                                   (w.scale ? w.scale[n] : 1.0f)));
  }
  return true;
}

}  // namespace jopt
