// Vectors of AVX2 with FMA; with JOPT_VNNI, int8 dot products of AVX-512 VNNI on the same width.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

using F = __m256;   // 8 floats
using B = __m256i;  // 32 bytes
using I = __m256i;  // 8 int32
using C = __m256i;  // 4 counters

JOPT_INLINE F f_zero() { return _mm256_setzero_ps(); }
JOPT_INLINE F f_set(float v) { return _mm256_set1_ps(v); }
JOPT_INLINE F f_load(const float* p) { return _mm256_loadu_ps(p); }
JOPT_INLINE F f_of(float a, float b, float c, float d, float e, float f, float g, float h) {
  return _mm256_setr_ps(a, b, c, d, e, f, g, h);
}
JOPT_INLINE F f_codes(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
// Loads into a register: compilers would rather load again for each use.
JOPT_INLINE F f_load_once(const float* p) {
  F v = f_load(p);
  asm("" : "+x"(v));
  return v;
}
JOPT_INLINE void f_store(float* p, F v) { _mm256_storeu_ps(p, v); }
JOPT_INLINE F f_add(F a, F b) { return _mm256_add_ps(a, b); }
JOPT_INLINE F f_sub(F a, F b) { return _mm256_sub_ps(a, b); }
JOPT_INLINE F f_mul(F a, F b) { return _mm256_mul_ps(a, b); }
JOPT_INLINE F f_fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
// `v` where it lies within bounds or is a NaN, which the second operand of both is let through.
JOPT_INLINE F f_within(F v, float low, float high) {
  return _mm256_min_ps(f_set(high), _mm256_max_ps(f_set(low), v));
}
JOPT_INLINE float f_sum(F v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
JOPT_INLINE B b_load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
JOPT_INLINE B f_bytes(F v) { return _mm256_castps_si256(v); }
JOPT_INLINE void b_store(void* p, B v) { _mm256_storeu_si256((__m256i*)p, v); }
JOPT_INLINE B b_none() { return _mm256_setzero_si256(); }
JOPT_INLINE B b_low(B v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
JOPT_INLINE B b_high(B v) {
  return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
}
JOPT_INLINE B b_table(const int8_t* entries) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)entries));
}
JOPT_INLINE B b_lookup(B table, B index) { return _mm256_shuffle_epi8(table, index); }

JOPT_INLINE B b_spread(const void* word) {
  int32_t four;
  std::memcpy(&four, word, 4);
  return _mm256_set1_epi32(four);
}
// Eight vectors of eight words: those of one place go into one vector.
JOPT_INLINE void b_transpose(B* rows) {
  __m256i pairs[8], fours[8];
  JOPT_UNROLL for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  JOPT_UNROLL for (int i = 0; i < 8; i += 4) {
    JOPT_UNROLL for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  }
  JOPT_UNROLL for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
  }
}

// Adds a number to 32 bytes.
JOPT_INLINE void b_widen(uint16_t* to, const uint8_t* from, uint16_t base) {
  const __m256i more = _mm256_set1_epi16((short)base);
  JOPT_UNROLL for (int i = 0; i < kBytes; i += 16) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(from + i)));
    _mm256_storeu_si256((__m256i*)(to + i), _mm256_add_epi16(wide, more));
  }
}

JOPT_INLINE I i_zero() { return _mm256_setzero_si256(); }
JOPT_INLINE I i_set(int32_t v) { return _mm256_set1_epi32(v); }
JOPT_INLINE I i_load(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
JOPT_INLINE void i_store(int32_t* p, I v) { _mm256_storeu_si256((__m256i*)p, v); }
JOPT_INLINE I i_add(I a, I b) { return _mm256_add_epi32(a, b); }
JOPT_INLINE F i_float(I v) { return _mm256_cvtepi32_ps(v); }
JOPT_INLINE int32_t i_sum(I v) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
// The byte of a place in each word, with its sign.
JOPT_INLINE I i_byte(B words, int place) {
  return _mm256_srai_epi32(_mm256_slli_epi32(words, 24 - 8 * place), 24);
}

// The products of codes in [-128, 127] and activations in [-127, 127]. The magnitude of the code
// is the unsigned operand, where 128 has a place, so -128 needs no care; 2 * 128 * 127 fits int16.
JOPT_INLINE I dot8(I sum, B codes, B x) {
  B magnitude = _mm256_abs_epi8(codes), other = _mm256_sign_epi8(x, codes);
#ifdef JOPT_VNNI
  return _mm256_dpbusd_epi32(sum, magnitude, other);
#else
  I pairs = _mm256_maddubs_epi16(magnitude, other);
  return i_add(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

// The same with codes that are prepared: VNNI has them kShift higher, as bytes without a sign, so that
// whoever sums takes away kShift times the sum of the activations.
#ifdef JOPT_VNNI
constexpr int32_t kShift = 128;
constexpr int kInt8Rows = 8, kInt4Rows = 8;  // whose sums fit in registers
constexpr int kFloatRows = 6, kFloatPanels = 2;
constexpr int64_t kManyRows = 8;  // from which on packing codebooks into panels pays
JOPT_INLINE B b_shifted(B codes) { return _mm256_xor_si256(codes, _mm256_set1_epi8(-128)); }
JOPT_INLINE I dot_shifted(I sum, B codes, B x) { return _mm256_dpbusd_epi32(sum, codes, x); }
#else
constexpr int kInt8Rows = 4, kInt4Rows = 2;
constexpr int kFloatRows = 6, kFloatPanels = 1;
constexpr int64_t kManyRows = 16;
#endif

// The products of blocks of nibbles in [0, 15] and activations: 4 * 15 * 127 fits int16.
#ifdef JOPT_VNNI
JOPT_INLINE I dot4(I sum, B codes, B x) { return _mm256_dpbusd_epi32(sum, codes, x); }
JOPT_INLINE I dot4(I sum, B low, B x_low, B high, B x_high) {
  return dot4(dot4(sum, low, x_low), high, x_high);
}
#else
JOPT_INLINE I dot4(I sum, B codes, B x) {
  return i_add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}
JOPT_INLINE I dot4(I sum, B low, B x_low, B high, B x_high) {
  I pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, x_low), _mm256_maddubs_epi16(high, x_high));
  return i_add(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

// Entries of a table of 16 floats, by 8 indices of bytes.
struct Table {
  F first, second;
};
JOPT_INLINE Table t_load(const float* p) { return {f_load(p), f_load(p + 8)}; }
JOPT_INLINE F t_lookup(Table table, const uint8_t* index) {
  __m256i i = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)index));
  F below = _mm256_permutevar8x32_ps(table.first, i);
  F above = _mm256_permutevar8x32_ps(table.second, i);
  return _mm256_blendv_ps(below, above, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}

// x where bit `from + lane` of word is set, -x elsewhere.
JOPT_INLINE F f_signed(F x, uint32_t word, int from) {
  __m256i shift = _mm256_sub_epi32(_mm256_set1_epi32(31 - from),
                                   _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  __m256i flip = _mm256_sllv_epi32(_mm256_set1_epi32((int)~word), shift);
  return _mm256_xor_ps(x, _mm256_and_ps(_mm256_castsi256_ps(flip), f_set(-0.0f)));
}

JOPT_INLINE B b_counts(B a, B b) {
  const B table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2,
                                   2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  B bits = _mm256_xor_si256(a, b);
  return _mm256_add_epi8(b_lookup(table, b_low(bits)), b_lookup(table, b_high(bits)));
}
JOPT_INLINE C c_zero() { return _mm256_setzero_si256(); }
JOPT_INLINE C c_add(C sum, B counts) {
  return _mm256_add_epi64(sum, _mm256_sad_epu8(counts, _mm256_setzero_si256()));
}
JOPT_INLINE int64_t c_sum(C v) {
  __m128i half = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return _mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1);
}

JOPT_INLINE int32_t i_most(I v) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  return _mm_cvtsi128_si32(half);
}

// The bits of the largest magnitude: those of a NaN are above those of infinity.
JOPT_INLINE I i_magnitudes(I most, F x) {
  I bits = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
  return _mm256_max_epi32(most, bits);
}
JOPT_INLINE I round8(F x, F inverse, F limit) {
  F value = _mm256_mul_ps(x, inverse);
  value = _mm256_max_ps(f_sub(f_zero(), limit), _mm256_min_ps(value, limit));
  return _mm256_cvtps_epi32(value);
}
JOPT_INLINE void b_round(int8_t* out, const float* x, float inverse) {
  F s = f_set(inverse), limit = f_set(127.0f);
  I a = round8(f_load(x), s, limit), b = round8(f_load(x + 8), s, limit);
  I c = round8(f_load(x + 16), s, limit), d = round8(f_load(x + 24), s, limit);
  I bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256((__m256i*)out, bytes);
}

}  // namespace jopt
