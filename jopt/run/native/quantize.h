// Rounding rows of activations to int8, and sums of their codes.
// Included by kernels.h, after the vectors of the instruction set.

namespace jopt {

// One row: scale = largest magnitude / 127, or `fixed` where that is not null. A row with a NaN,
// or with an infinity and no fixed scale, gets the scale NaN, and so does a fixed scale that is no
// normal number. One below 127 * FLT_MIN counts as 0. Codes are round(x * (1 / scale)).
static double quantize(const float* x, int64_t inputs, int64_t stride, const float* fixed,
                       int8_t* codes) {
  const int64_t whole = inputs / kBytes * kBytes;
  float tail[kBytes] = {0};
  int64_t i = whole;
  for (; i + kFloats <= inputs; i += kFloats) f_store(tail + i - whole, f_load(x + i));
  for (; i < inputs; ++i) tail[i - whole] = x[i];
  I most = i_zero();
  for (i = 0; i < whole; i += kFloats) most = i_magnitudes(most, f_load(x + i));
  for (; i < inputs; i += kFloats) most = i_magnitudes(most, f_load(tail + i - whole));
  const int32_t bits = i_most(most);
  float largest;
  std::memcpy(&largest, &bits, 4);
  const float scale = fixed ? *fixed : largest / 127.0f;
  constexpr float kSmallest = std::numeric_limits<float>::min();
  const bool usable = scale >= kSmallest && scale <= std::numeric_limits<float>::max();
  const bool wrong = std::isnan(largest) || (fixed ? !usable : std::isinf(largest));
  if (wrong || scale < kSmallest) {
    std::memset(codes, 0, stride);
    return wrong ? std::numeric_limits<double>::quiet_NaN() : 0.0;
  }
  const float inverse = 1.0f / scale;
  for (i = 0; i < whole; i += kBytes) b_round(codes + i, x + i, inverse);
  for (; i < stride; i += kBytes) b_store(codes + i, b_none());
  if (whole < inputs) b_round(codes + whole, tail, inverse);
  return scale;
}

// The sum of codes of one row; their number is a multiple of 32.
static int32_t sum_codes(const int8_t* codes, int64_t count) {
  int8_t ones[kBytes];
  std::memset(ones, 1, kBytes);
  const B one = b_load(ones);
  I sum = i_zero();
  for (int64_t i = 0; i < count; i += kBytes) sum = dot8(sum, one, b_load(codes + i));
  return i_sum(sum);
}

}  // namespace jopt
