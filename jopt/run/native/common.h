// What every kernel needs: the arguments of each, ranges of outputs, prefetch.
#pragma once

#include "../../native/threads.h"

#define JOPT_INLINE_MEMBER inline __attribute__((always_inline))
#define JOPT_APART static __attribute__((noinline))  // compiled once for all who call it
#define JOPT_UNROLL _Pragma("GCC unroll 16")
#define JOPT_UNROLL_LONG _Pragma("GCC unroll 32")

namespace jopt {

constexpr int64_t kBytes = 32;  // a step over int8 codes, in every instruction set
constexpr int64_t kFloats = 8;  // a step over floats
constexpr int64_t kPair = 64;   // 4-bit codes in a step over 32 packed bytes
constexpr int64_t kPanel = 16;  // outputs that lie side by side
constexpr int64_t kWord = 4;    // bytes of an output that lie together: a float, or codes
constexpr int64_t kBlock = kPair / 2 / kWord;  // words of a block of 64 4-bit codes

// Asks for what is read next: the same place in the rows that follow, which lie in one piece.
JOPT_INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

struct Range {
  int64_t begin, end;
};

// Rows of activations rounded to int8, each row padded with zeros to `stride`.
struct Codes8 {
  const int8_t* codes;
  const double* scale;  // one a row; NaN for a row that is not finite
  const int32_t* total;  // sums of codes, (rows, groups): of all, or of those that share a scale
  int64_t rows, inputs, stride;
};

// Rows of float activations, each padded with zeros to `stride`.
struct Floats {
  const float* data;
  const double* total;  // the sum of each row, where weights have zero points
  int64_t rows, inputs, stride;
};

// Weights in panels of 16 outputs: words of four inputs (int8) or of eight (4 bits) lie side by side,
// so that sums lie in lanes and none is added up across a vector. What fills the last panel up counts
// for nothing: its scales are 0; so do the inputs that fill up the last words, which are 0.
struct Int8Weights {
  const int8_t* codes;  // (panels, words, 16, 4); inputs are filled up to a multiple of 32
  const float* scale;   // (outputs)
  const float* zero;    // (outputs), or null for 0
  int64_t words, outputs;

  const int8_t* panel(int64_t n) const { return codes + n / kPanel * words * kPanel * kWord; }
};

// Codes 0 to 15 stand for -8 to 7. In blocks of 64: byte i of a block holds code i below and code
// 32 + i above.
struct Int4Weights {
  const uint8_t* packed;  // (panels, words, 16, 4); eight words a block
  const float* scale;     // (panels, groups, 16, 1)
  const float* zero;      // of scale's shape, or null for 0
  int64_t words, groups, group;  // `group` codes share a scale: 32, or a multiple of 64
  int64_t outputs;

  const uint8_t* panel(int64_t n) const { return packed + n / kPanel * words * kPanel * kWord; }
};

// Codes by output, as blocks hold them, that are looked up in tables.
struct Codebook {
  const uint8_t* packed;  // (outputs, width)
  int64_t width;          // bytes of a row, a multiple of 32
  const float* scale;     // (outputs, groups), or null for 1
  int64_t groups, group;
  const float* table;  // (tables, 16)
  int64_t tables;      // 1 or outputs
  int64_t outputs;
};

struct FloatWeights {
  const float* kernel;  // (inputs, outputs)
  int64_t outputs;
};

struct BitWeights {
  const uint8_t* bits;  // (outputs, width bytes); bit i % 8 of byte i / 8 is input i
  int64_t width;
  const float* scale;  // (outputs)
  int64_t outputs;
};

constexpr int64_t kSparseBlock = 256;  // inputs of a block, so that a byte counts them

struct SparseWeights {
  const void* values;      // (entries), float or int8
  bool coded;              // whether values are int8
  const float* scale;      // (outputs), or null for 1
  const uint8_t* columns;  // (entries), from the first input of each block on
  const int32_t* starts;   // (outputs * blocks + 1): of the blocks of inputs of each output
  int64_t outputs, blocks, entries;
};

// What becomes of the outputs of a product: (y - less) * times + plus + more, within bounds. A NaN
// stays one.
struct After {
  const float* less = nullptr;   // (outputs), or null for 0
  const float* times = nullptr;  // or null for 1
  const float* plus = nullptr;   // or null for 0
  const float* more = nullptr;   // of the shape of the outputs, or null for 0
  float low = -std::numeric_limits<float>::infinity();
  float high = std::numeric_limits<float>::infinity();

  bool none() const {
    return !less && !times && !plus && !more && low == -high && std::isinf(high);
  }
};

struct Window {
  int64_t batch, height, width, channels;  // of the input
  int64_t rows, columns;                   // of the kernel
  int64_t stride_rows, stride_columns;
  int64_t top, left;  // padding before
  int64_t out_rows, out_columns;
};

}  // namespace jopt
