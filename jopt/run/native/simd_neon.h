// Vectors of NEON, two registers each; with its dot products where the processor has them.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

struct F {  // 8 floats
  float32x4_t half[2];
};
struct B {  // 32 bytes
  uint8x16_t half[2];
};
struct I {  // 8 int32
  int32x4_t half[2];
};
using C = uint64x2_t;  // 2 counters

JOPT_INLINE F f_set(float v) { return {{vdupq_n_f32(v), vdupq_n_f32(v)}}; }
JOPT_INLINE F f_zero() { return f_set(0.0f); }
JOPT_INLINE F f_load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4)}}; }
JOPT_INLINE F f_of(float a, float b, float c, float d, float e, float f, float g, float h) {
  return {{float32x4_t{a, b, c, d}, float32x4_t{e, f, g, h}}};
}
JOPT_INLINE F f_codes(const int8_t* p) {
  const int16x8_t eight = vmovl_s8(vld1_s8(p));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(eight))),
           vcvtq_f32_s32(vmovl_s16(vget_high_s16(eight)))}};
}
// Loads into registers: compilers would rather load again for each use.
JOPT_INLINE F f_load_once(const float* p) {
  F v = f_load(p);
  asm("" : "+w"(v.half[0]), "+w"(v.half[1]));
  return v;
}
JOPT_INLINE void f_store(float* p, F v) {
  vst1q_f32(p, v.half[0]);
  vst1q_f32(p + 4, v.half[1]);
}
JOPT_INLINE F f_add(F a, F b) {
  return {{vaddq_f32(a.half[0], b.half[0]), vaddq_f32(a.half[1], b.half[1])}};
}
JOPT_INLINE F f_sub(F a, F b) {
  return {{vsubq_f32(a.half[0], b.half[0]), vsubq_f32(a.half[1], b.half[1])}};
}
JOPT_INLINE F f_mul(F a, F b) {
  return {{vmulq_f32(a.half[0], b.half[0]), vmulq_f32(a.half[1], b.half[1])}};
}
JOPT_INLINE F f_fma(F a, F b, F c) {
  return {{vfmaq_f32(c.half[0], a.half[0], b.half[0]), vfmaq_f32(c.half[1], a.half[1], b.half[1])}};
}
// `v` where it lies within bounds or is a NaN, which both let through.
JOPT_INLINE F f_within(F v, float low, float high) {
  const float32x4_t below = vdupq_n_f32(low), above = vdupq_n_f32(high);
  return {{vminq_f32(above, vmaxq_f32(below, v.half[0])),
           vminq_f32(above, vmaxq_f32(below, v.half[1]))}};
}
JOPT_INLINE float f_sum(F v) {
  const float32x4_t four = vaddq_f32(v.half[0], v.half[1]);
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

JOPT_INLINE B b_load(const void* p) {
  const uint8_t* from = (const uint8_t*)p;
  return {{vld1q_u8(from), vld1q_u8(from + 16)}};
}
JOPT_INLINE B b_bytes(I v) {
  return {{vreinterpretq_u8_s32(v.half[0]), vreinterpretq_u8_s32(v.half[1])}};
}
JOPT_INLINE I b_words(B v) {
  return {{vreinterpretq_s32_u8(v.half[0]), vreinterpretq_s32_u8(v.half[1])}};
}
JOPT_INLINE B f_bytes(F v) {
  return {{vreinterpretq_u8_f32(v.half[0]), vreinterpretq_u8_f32(v.half[1])}};
}
JOPT_INLINE void b_store(void* p, B v) {
  uint8_t* to = (uint8_t*)p;
  vst1q_u8(to, v.half[0]);
  vst1q_u8(to + 16, v.half[1]);
}
JOPT_INLINE B b_none() { return {{vdupq_n_u8(0), vdupq_n_u8(0)}}; }
JOPT_INLINE B b_low(B v) {
  const uint8x16_t mask = vdupq_n_u8(15);
  return {{vandq_u8(v.half[0], mask), vandq_u8(v.half[1], mask)}};
}
JOPT_INLINE B b_high(B v) { return {{vshrq_n_u8(v.half[0], 4), vshrq_n_u8(v.half[1], 4)}}; }
JOPT_INLINE B b_table(const int8_t* entries) {
  const uint8x16_t all = vld1q_u8((const uint8_t*)entries);
  return {{all, all}};
}
JOPT_INLINE B b_lookup(B table, B index) {
  return {{vqtbl1q_u8(table.half[0], index.half[0]), vqtbl1q_u8(table.half[0], index.half[1])}};
}

JOPT_INLINE B b_spread(const void* word) {
  uint32_t four;
  std::memcpy(&four, word, 4);
  const uint8x16_t all = vreinterpretq_u8_u32(vdupq_n_u32(four));
  return {{all, all}};
}
// Four vectors of four words: those of one place go into one vector.
JOPT_INLINE void square(int32x4_t& a, int32x4_t& b, int32x4_t& c, int32x4_t& d) {
  const int64x2_t ab = vreinterpretq_s64_s32(vtrn1q_s32(a, b));
  const int64x2_t ab_odd = vreinterpretq_s64_s32(vtrn2q_s32(a, b));
  const int64x2_t cd = vreinterpretq_s64_s32(vtrn1q_s32(c, d));
  const int64x2_t cd_odd = vreinterpretq_s64_s32(vtrn2q_s32(c, d));
  a = vreinterpretq_s32_s64(vtrn1q_s64(ab, cd));
  b = vreinterpretq_s32_s64(vtrn1q_s64(ab_odd, cd_odd));
  c = vreinterpretq_s32_s64(vtrn2q_s64(ab, cd));
  d = vreinterpretq_s32_s64(vtrn2q_s64(ab_odd, cd_odd));
}
// The same of eight.
JOPT_INLINE void b_transpose(B* rows) {
  I words[8];
  JOPT_UNROLL for (int i = 0; i < 8; ++i) words[i] = b_words(rows[i]);
  JOPT_UNROLL for (int i = 0; i < 8; i += 4) JOPT_UNROLL for (int h = 0; h < 2; ++h)
    square(words[i].half[h], words[i + 1].half[h], words[i + 2].half[h], words[i + 3].half[h]);
  JOPT_UNROLL for (int i = 0; i < 4; ++i) {
    rows[i] = b_bytes({{words[i].half[0], words[i + 4].half[0]}});
    rows[i + 4] = b_bytes({{words[i].half[1], words[i + 4].half[1]}});
  }
}

// Adds a number to 32 bytes.
JOPT_INLINE void b_widen(uint16_t* to, const uint8_t* from, uint16_t base) {
  const uint16x8_t more = vdupq_n_u16(base);
  JOPT_UNROLL for (int i = 0; i < kBytes; i += 8)
    vst1q_u16(to + i, vaddw_u8(more, vld1_u8(from + i)));
}

JOPT_INLINE I i_set(int32_t v) { return {{vdupq_n_s32(v), vdupq_n_s32(v)}}; }
JOPT_INLINE I i_zero() { return i_set(0); }
JOPT_INLINE I i_load(const int32_t* p) { return {{vld1q_s32(p), vld1q_s32(p + 4)}}; }
JOPT_INLINE void i_store(int32_t* p, I v) {
  vst1q_s32(p, v.half[0]);
  vst1q_s32(p + 4, v.half[1]);
}
JOPT_INLINE I i_add(I a, I b) {
  return {{vaddq_s32(a.half[0], b.half[0]), vaddq_s32(a.half[1], b.half[1])}};
}
JOPT_INLINE F i_float(I v) { return {{vcvtq_f32_s32(v.half[0]), vcvtq_f32_s32(v.half[1])}}; }
JOPT_INLINE int32_t i_sum(I v) { return vaddvq_s32(vaddq_s32(v.half[0], v.half[1])); }
// The byte of a place in each word, with its sign.
JOPT_INLINE I i_byte(B words, int place) {
  const int32x4_t up = vdupq_n_s32(24 - 8 * place);
  const I all = b_words(words);
  return {{vshrq_n_s32(vshlq_s32(all.half[0], up), 24), vshrq_n_s32(vshlq_s32(all.half[1], up), 24)}};
}

// The products of codes in [-128, 127] and activations in [-127, 127], sums of four in each word. Two of
// them, 2 * 128 * 127, fit int16.
JOPT_INLINE int32x4_t dot(int32x4_t sum, uint8x16_t codes, uint8x16_t x) {
  const int8x16_t a = vreinterpretq_s8_u8(codes), b = vreinterpretq_s8_u8(x);
#ifdef __ARM_FEATURE_DOTPROD
  return vdotq_s32(sum, a, b);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
}
JOPT_INLINE I dot8(I sum, B codes, B x) {
  return {{dot(sum.half[0], codes.half[0], x.half[0]), dot(sum.half[1], codes.half[1], x.half[1])}};
}
constexpr int kInt8Rows = 4, kInt4Rows = 4;  // whose sums fit in registers
constexpr int kFloatRows = 6, kFloatPanels = 1;
constexpr int64_t kManyRows = 16;  // from which on packing codebooks into panels pays
JOPT_INLINE I dot4(I sum, B codes, B x) { return dot8(sum, codes, x); }
JOPT_INLINE I dot4(I sum, B low, B x_low, B high, B x_high) {
  return dot8(dot8(sum, low, x_low), high, x_high);
}

// Entries of a table of 16 floats, by 8 indices of bytes.
struct Table {
  uint8x16x4_t bytes;
};
JOPT_INLINE Table t_load(const float* p) {
  const uint8_t* from = (const uint8_t*)p;
  return {{{vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)}}};
}
JOPT_INLINE F t_lookup(const Table& table, const uint8_t* index) {
  const uint8x8_t eight = vshl_n_u8(vld1_u8(index), 2);
  const uint8x16_t twice = vcombine_u8(vzip1_u8(eight, eight), vzip2_u8(eight, eight));
  const uint8x16_t place = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100));
  const uint8x16_t first = vorrq_u8(vzip1q_u8(twice, twice), place);
  const uint8x16_t second = vorrq_u8(vzip2q_u8(twice, twice), place);
  return {{vreinterpretq_f32_u8(vqtbl4q_u8(table.bytes, first)),
           vreinterpretq_f32_u8(vqtbl4q_u8(table.bytes, second))}};
}

// x where bit `from + lane` of word is set, -x elsewhere.
JOPT_INLINE F f_signed(F x, uint32_t word, int from) {
  constexpr int32_t kLanes[] = {0, 1, 2, 3, 4, 5, 6, 7};
  const uint32x4_t others = vdupq_n_u32(~word), sign = vdupq_n_u32(0x80000000);
  JOPT_UNROLL for (int h = 0; h < 2; ++h) {
    const int32x4_t up = vsubq_s32(vdupq_n_s32(31 - from), vld1q_s32(kLanes + 4 * h));
    const uint32x4_t flip = vandq_u32(vshlq_u32(others, up), sign);
    x.half[h] = vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x.half[h]), flip));
  }
  return x;
}

JOPT_INLINE B b_counts(B a, B b) {
  return {{vcntq_u8(veorq_u8(a.half[0], b.half[0])), vcntq_u8(veorq_u8(a.half[1], b.half[1]))}};
}
JOPT_INLINE C c_zero() { return vdupq_n_u64(0); }
JOPT_INLINE C c_add(C sum, B counts) {
  const uint16x8_t pairs = vpaddlq_u8(vaddq_u8(counts.half[0], counts.half[1]));
  return vpadalq_u32(sum, vpaddlq_u16(pairs));
}
JOPT_INLINE int64_t c_sum(C v) { return (int64_t)vaddvq_u64(v); }

JOPT_INLINE int32_t i_most(I v) { return vmaxvq_s32(vmaxq_s32(v.half[0], v.half[1])); }
// The bits of the largest magnitude: those of a NaN are above those of infinity.
JOPT_INLINE I i_magnitudes(I most, F x) {
  const int32x4_t mask = vdupq_n_s32(0x7fffffff);
  JOPT_UNROLL for (int h = 0; h < 2; ++h)
    most.half[h] = vmaxq_s32(most.half[h], vandq_s32(vreinterpretq_s32_f32(x.half[h]), mask));
  return most;
}
JOPT_INLINE int16x4_t round4(const float* x, float inverse) {
  const float32x4_t limit = vdupq_n_f32(127.0f);
  const float32x4_t value = vminq_f32(limit, vmaxq_f32(vnegq_f32(limit), vmulq_n_f32(vld1q_f32(x), inverse)));
  return vmovn_s32(vcvtnq_s32_f32(value));  // to the nearest, ties to even
}
JOPT_INLINE void b_round(int8_t* out, const float* x, float inverse) {
  JOPT_UNROLL for (int i = 0; i < 32; i += 8)
    vst1_s8(out + i, vmovn_s16(vcombine_s16(round4(x + i, inverse), round4(x + i + 4, inverse))));
}

}  // namespace jopt
