// Sixteen lanes, one for each output of a panel: one vector of AVX-512, or two of another set.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

#ifdef JOPT_VNNI

using WF = __m512;   // 16 floats
using WB = __m512i;  // 16 words of 4 bytes
using WI = __m512i;  // 16 int32

JOPT_INLINE WF wf_set(float v) { return _mm512_set1_ps(v); }
JOPT_INLINE WF wf_load(const float* p) { return _mm512_loadu_ps(p); }
JOPT_INLINE void wf_store(float* p, WF v) { _mm512_storeu_ps(p, v); }
JOPT_INLINE WF wf_sub(WF a, WF b) { return _mm512_sub_ps(a, b); }
JOPT_INLINE WF wf_mul(WF a, WF b) { return _mm512_mul_ps(a, b); }
JOPT_INLINE WF wf_fma(WF a, WF b, WF c) { return _mm512_fmadd_ps(a, b, c); }
JOPT_INLINE WF wf_within(WF v, float low, float high) {
  return _mm512_min_ps(wf_set(high), _mm512_max_ps(wf_set(low), v));
}
JOPT_INLINE WF w_add(WF a, WF b) { return _mm512_add_ps(a, b); }
JOPT_INLINE WI w_add(WI a, WI b) { return _mm512_add_epi32(a, b); }
JOPT_INLINE WI wi_set(int32_t v) { return _mm512_set1_epi32(v); }
JOPT_INLINE void wi_store(int32_t* p, WI v) { _mm512_storeu_si512(p, v); }
JOPT_INLINE WF wi_float(WI v) { return _mm512_cvtepi32_ps(v); }
JOPT_INLINE WI wi_byte(WB words, int place) {
  return _mm512_srai_epi32(_mm512_slli_epi32(words, 24 - 8 * place), 24);
}
JOPT_INLINE WB wb_load(const void* p) { return _mm512_loadu_si512(p); }
// Loads into a register: compilers would rather load again for each use.
JOPT_INLINE WB wb_load_once(const void* p) {
  WB v = wb_load(p);
  asm("" : "+v"(v));
  return v;
}
JOPT_INLINE WB wb_spread(const void* word) {
  int32_t four;
  std::memcpy(&four, word, 4);
  return _mm512_set1_epi32(four);
}
JOPT_INLINE WB wb_shifted(WB codes) { return _mm512_xor_si512(codes, _mm512_set1_epi8(-128)); }
JOPT_INLINE WB wb_low(WB v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
JOPT_INLINE WB wb_high(WB v) {
  return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
}
JOPT_INLINE WI wi_dot_shifted(WI sum, WB codes, WB x) { return _mm512_dpbusd_epi32(sum, codes, x); }
JOPT_INLINE WI wi_dot4(WI sum, WB codes, WB x) { return _mm512_dpbusd_epi32(sum, codes, x); }
JOPT_INLINE WI wi_dot4(WI sum, WB low, WB x_low, WB high, WB x_high) {
  return wi_dot4(wi_dot4(sum, low, x_low), high, x_high);
}

#else

// Codes lie as they are.
constexpr int32_t kShift = 0;
JOPT_INLINE B b_shifted(B codes) { return codes; }
JOPT_INLINE I dot_shifted(I sum, B codes, B x) { return dot8(sum, codes, x); }

struct WF {
  F half[2];
};
struct WB {
  B half[2];
};
struct WI {
  I half[2];
};

JOPT_INLINE WF wf_set(float v) { return {{f_set(v), f_set(v)}}; }
JOPT_INLINE WF wf_load(const float* p) { return {{f_load(p), f_load(p + kFloats)}}; }
JOPT_INLINE void wf_store(float* p, WF v) {
  f_store(p, v.half[0]);
  f_store(p + kFloats, v.half[1]);
}
JOPT_INLINE WF wf_sub(WF a, WF b) {
  return {{f_sub(a.half[0], b.half[0]), f_sub(a.half[1], b.half[1])}};
}
JOPT_INLINE WF wf_mul(WF a, WF b) {
  return {{f_mul(a.half[0], b.half[0]), f_mul(a.half[1], b.half[1])}};
}
JOPT_INLINE WF wf_fma(WF a, WF b, WF c) {
  return {{f_fma(a.half[0], b.half[0], c.half[0]), f_fma(a.half[1], b.half[1], c.half[1])}};
}
JOPT_INLINE WF wf_within(WF v, float low, float high) {
  return {{f_within(v.half[0], low, high), f_within(v.half[1], low, high)}};
}
JOPT_INLINE WF w_add(WF a, WF b) {
  return {{f_add(a.half[0], b.half[0]), f_add(a.half[1], b.half[1])}};
}
JOPT_INLINE WI w_add(WI a, WI b) {
  return {{i_add(a.half[0], b.half[0]), i_add(a.half[1], b.half[1])}};
}
JOPT_INLINE WI wi_set(int32_t v) { return {{i_set(v), i_set(v)}}; }
JOPT_INLINE void wi_store(int32_t* p, WI v) {
  i_store(p, v.half[0]);
  i_store(p + kFloats, v.half[1]);
}
JOPT_INLINE WF wi_float(WI v) { return {{i_float(v.half[0]), i_float(v.half[1])}}; }
JOPT_INLINE WI wi_byte(WB words, int place) {
  return {{i_byte(words.half[0], place), i_byte(words.half[1], place)}};
}
JOPT_INLINE WB wb_load(const void* p) {
  return {{b_load(p), b_load((const uint8_t*)p + kBytes)}};
}
JOPT_INLINE WB wb_load_once(const void* p) { return wb_load(p); }
JOPT_INLINE WB wb_spread(const void* word) {
  const B spread = b_spread(word);
  return {{spread, spread}};
}
JOPT_INLINE WB wb_shifted(WB codes) { return {{b_shifted(codes.half[0]), b_shifted(codes.half[1])}}; }
JOPT_INLINE WB wb_low(WB v) { return {{b_low(v.half[0]), b_low(v.half[1])}}; }
JOPT_INLINE WB wb_high(WB v) { return {{b_high(v.half[0]), b_high(v.half[1])}}; }
JOPT_INLINE WI wi_dot_shifted(WI sum, WB codes, WB x) {
  return {{dot_shifted(sum.half[0], codes.half[0], x.half[0]),
           dot_shifted(sum.half[1], codes.half[1], x.half[1])}};
}
JOPT_INLINE WI wi_dot4(WI sum, WB codes, WB x) {
  return {{dot4(sum.half[0], codes.half[0], x.half[0]), dot4(sum.half[1], codes.half[1], x.half[1])}};
}
JOPT_INLINE WI wi_dot4(WI sum, WB low, WB x_low, WB high, WB x_high) {
  return {{dot4(sum.half[0], low.half[0], x_low.half[0], high.half[0], x_high.half[0]),
           dot4(sum.half[1], low.half[1], x_low.half[1], high.half[1], x_high.half[1])}};
}

#endif

}  // namespace jopt
