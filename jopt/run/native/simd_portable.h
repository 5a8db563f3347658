// The same vectors in plain C++, for any machine: loops of fixed length that compilers vectorize.
// Included by kernels.h.

namespace jopt {

struct F {
  float v[8];
};
struct I {
  int32_t v[8];
};
struct B {
  uint8_t v[32];
};
struct C {
  int64_t v;
};

JOPT_INLINE F f_set(float v) { return {{v, v, v, v, v, v, v, v}}; }
JOPT_INLINE F f_zero() { return f_set(0.0f); }
JOPT_INLINE F f_load(const float* p) {
  F out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
JOPT_INLINE F f_of(float a, float b, float c, float d, float e, float f, float g, float h) {
  return {{a, b, c, d, e, f, g, h}};
}
JOPT_INLINE F f_codes(const int8_t* p) {
  F out;
  for (int i = 0; i < 8; ++i) out.v[i] = p[i];
  return out;
}
JOPT_INLINE F f_load_once(const float* p) { return f_load(p); }
JOPT_INLINE void f_store(float* p, F v) { std::memcpy(p, v.v, sizeof v.v); }
JOPT_INLINE F f_add(F a, F b) {
  for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
  return a;
}
JOPT_INLINE F f_sub(F a, F b) {
  for (int i = 0; i < 8; ++i) a.v[i] -= b.v[i];
  return a;
}
JOPT_INLINE F f_mul(F a, F b) {
  for (int i = 0; i < 8; ++i) a.v[i] *= b.v[i];
  return a;
}
JOPT_INLINE F f_fma(F a, F b, F c) {
  for (int i = 0; i < 8; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
JOPT_INLINE F f_within(F v, float low, float high) {
  for (float& each : v.v) each = low > each ? low : high < each ? high : each;
  return v;
}
JOPT_INLINE float f_sum(F v) {
  const float* p = v.v;
  return ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
}

JOPT_INLINE B b_load(const void* p) {
  B out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
JOPT_INLINE B f_bytes(F v) { return b_load(v.v); }
JOPT_INLINE void b_store(void* p, B v) { std::memcpy(p, v.v, sizeof v.v); }
JOPT_INLINE B b_none() { return {}; }
JOPT_INLINE B b_low(B v) {
  for (int i = 0; i < 32; ++i) v.v[i] &= 15;
  return v;
}
JOPT_INLINE B b_high(B v) {
  for (int i = 0; i < 32; ++i) v.v[i] >>= 4;
  return v;
}
JOPT_INLINE B b_table(const int8_t* entries) {
  B out;
  std::memcpy(out.v, entries, 16);
  std::memcpy(out.v + 16, entries, 16);
  return out;
}
JOPT_INLINE B b_lookup(B table, B index) {
  for (int i = 0; i < 32; ++i) index.v[i] = table.v[index.v[i]];
  return index;
}

JOPT_INLINE B b_spread(const void* word) {
  B out;
  for (int i = 0; i < 32; i += 4) std::memcpy(out.v + i, word, 4);
  return out;
}
JOPT_INLINE void b_transpose(B* rows) {
  B from[8];
  std::memcpy(from, rows, sizeof from);
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) std::memcpy(rows[j].v + 4 * i, from[i].v + 4 * j, 4);
}

// Adds a number to 32 bytes.
JOPT_INLINE void b_widen(uint16_t* to, const uint8_t* from, uint16_t base) {
  for (int i = 0; i < kBytes; ++i) to[i] = (uint16_t)(base + from[i]);
}

JOPT_INLINE I i_zero() { return {{0, 0, 0, 0, 0, 0, 0, 0}}; }
JOPT_INLINE I i_set(int32_t v) { return {{v, v, v, v, v, v, v, v}}; }
JOPT_INLINE I i_load(const int32_t* p) {
  I out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
JOPT_INLINE void i_store(int32_t* p, I v) { std::memcpy(p, v.v, sizeof v.v); }
JOPT_INLINE I i_add(I a, I b) {
  for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
  return a;
}
JOPT_INLINE F i_float(I v) {
  F out;
  for (int i = 0; i < 8; ++i) out.v[i] = (float)v.v[i];
  return out;
}
JOPT_INLINE int32_t i_sum(I v) {
  int32_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += v.v[i];
  return sum;
}
JOPT_INLINE I i_byte(const B& words, int place) {
  I out;
  for (int i = 0; i < 8; ++i) out.v[i] = (int8_t)words.v[4 * i + place];
  return out;
}

JOPT_INLINE I dot8(I sum, B codes, B x) {
  int16_t products[32];
  for (int i = 0; i < 32; ++i) products[i] = (int16_t)((int8_t)codes.v[i] * (int8_t)x.v[i]);
  for (int i = 0; i < 32; ++i) sum.v[i / 4] += products[i];
  return sum;
}
constexpr int kInt8Rows = 4, kInt4Rows = 2;
constexpr int kFloatRows = 6, kFloatPanels = 1;
constexpr int64_t kManyRows = 16;
JOPT_INLINE I dot4(I sum, B codes, B x) { return dot8(sum, codes, x); }
JOPT_INLINE I dot4(I sum, B low, B x_low, B high, B x_high) {
  return dot8(dot8(sum, low, x_low), high, x_high);
}
struct Table {
  float v[16];
};
JOPT_INLINE Table t_load(const float* p) {
  Table out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
JOPT_INLINE F t_lookup(const Table& table, const uint8_t* index) {
  F out;
  for (int i = 0; i < 8; ++i) out.v[i] = table.v[index[i]];
  return out;
}

JOPT_INLINE F f_signed(F x, uint32_t word, int from) {
  for (int i = 0; i < 8; ++i) x.v[i] = (word >> (from + i)) & 1 ? x.v[i] : -x.v[i];
  return x;
}

JOPT_INLINE B b_counts(B a, B b) {
  for (int i = 0; i < 32; ++i) {
    uint8_t bits = a.v[i] ^ b.v[i];
    bits = (uint8_t)(bits - ((bits >> 1) & 0x55));
    bits = (uint8_t)((bits & 0x33) + ((bits >> 2) & 0x33));
    a.v[i] = (uint8_t)((bits + (bits >> 4)) & 15);
  }
  return a;
}
JOPT_INLINE C c_zero() { return {0}; }
JOPT_INLINE C c_add(C sum, B counts) {
  int32_t total = 0;
  for (int i = 0; i < 32; ++i) total += counts.v[i];
  return {sum.v + total};
}
JOPT_INLINE int64_t c_sum(C v) { return v.v; }

JOPT_INLINE int32_t i_most(I v) {
  int32_t most = v.v[0];
  for (int i = 1; i < 8; ++i) most = v.v[i] > most ? v.v[i] : most;
  return most;
}
JOPT_INLINE I i_magnitudes(I most, F x) {
  for (int i = 0; i < 8; ++i) {
    int32_t bits;
    std::memcpy(&bits, &x.v[i], 4);
    bits &= 0x7fffffff;
    most.v[i] = bits > most.v[i] ? bits : most.v[i];
  }
  return most;
}
// Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even.
JOPT_INLINE void b_round(int8_t* out, const float* x, float inverse) {
  for (int i = 0; i < 32; ++i) {
    float value = x[i] * inverse;
    value = value > -127.0f ? (value < 127.0f ? value : 127.0f) : -127.0f;
    out[i] = (int8_t)(int32_t)((value + 12582912.0f) - 12582912.0f);
  }
}

}  // namespace jopt
