// Probabilities learned while coding, as `_models.py` has them: whole numbers in doubles, whose
// sums and products are exact in any order, and single divisions, rounded once and floored.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "coder.h"

namespace jopt {

constexpr double kUnit = 256.0;  // one nat of log-odds, or the number 1 as a feature
constexpr int kLimit = 11 * 256;
constexpr double kFeatureLimit = 4 * 256 - 1;
constexpr double kWeight = 65536.0;  // the weight 1
constexpr double kLn2 = 181704.0 / 1024.0;
constexpr int kLogs = 2048;

struct Tables {
  double squash[2 * kLimit + 1];
  double logs[kLogs];
};

inline Tables& tables() {
  static Tables found;
  return found;
}

inline double squash(double odds) {
  int32_t index = static_cast<int32_t>(odds) + kLimit;
  index = index < 0 ? 0 : index > 2 * kLimit ? 2 * kLimit : index;
  return tables().squash[index];
}

// ln(above / below) of positive normal numbers, in units, clipped to the range of a feature.
inline double log_ratio(double above, double below) {
  double ratio = above / below;
  uint64_t bits;
  std::memcpy(&bits, &ratio, sizeof bits);
  int32_t exponent = static_cast<int32_t>(bits >> 52 & 0x7ff) - 1022;
  double logs = std::floor((exponent - 1) * kLn2);
  logs += tables().logs[bits >> 41 & (kLogs - 1)];
  return logs < -kFeatureLimit ? -kFeatureLimit : logs > kFeatureLimit ? kFeatureLimit : logs;
}

// How much more often than expected an index shows ones (`_grids.Factor`).
class Factor {
 public:
  Factor(int64_t count, int period)
      : seen_(count, kOne), expected_(count, kOne), known_(period > 1 ? count : 0),
        period_(period) {}

  double feature(int64_t index) const {
    return period_ > 1 ? known_[index] : log_ratio(seen_[index], expected_[index]);
  }
  double seen(int64_t index) const { return seen_[index]; }
  double expected(int64_t index) const { return expected_[index]; }

  void learn(int64_t index, double seen, double expected) {
    seen_[index] += seen;
    expected_[index] += expected;
  }

  void turn() {
    if (period_ <= 1 || ++turns_ % period_) return;
    for (size_t at = 0; at < known_.size(); ++at) known_[at] = log_ratio(seen_[at], expected_[at]);
  }

 private:
  std::vector<double> seen_, expected_, known_;
  int period_;
  int64_t turns_ = 0;
};

// Features by rows, one column a bit; a row is `stride` apart from the next.
struct Features {
  std::vector<double> data;
  int64_t stride = 0;

  Features(int64_t rows, int64_t columns) : data(rows * columns), stride(columns) {}
  double* row(int64_t at) { return data.data() + at * stride; }
};

// A logistic regression that takes one Newton step per batch (`_models.Logistic`).
class Logistic {
 public:
  Logistic(const std::vector<double>& weights, double firmness, int64_t most)
      : curvature_(weights.size(), firmness * 4096), odds_(most), chances_(most), errors_(most),
        spread_(most), zeros_(most) {
    for (double weight : weights) weights_.push_back(std::floor(weight * kWeight));
  }

  double weight(int64_t at) const { return weights_[at] / kWeight; }
  const double* odds() const { return odds_.data(); }

  template <class Coder>
  void code(Coder& coder, uint8_t* bits, Features& features, int64_t count) {
    double *odds = odds_.data(), *chances = chances_.data();
    std::fill(odds, odds + count, 0.0);
    for (size_t at = 0; at < weights_.size(); ++at) {
      const double *row = features.row(at), weight = weights_[at];
      for (int64_t i = 0; i < count; ++i) odds[i] += weight * row[i];
    }
    for (int64_t i = 0; i < count; ++i) odds[i] = std::floor(odds[i] / kWeight);
    for (int64_t i = 0; i < count; ++i) chances[i] = squash(odds[i]);
    for (int64_t i = 0; i < count; ++i) zeros_[i] = zero_share(chances[i]);
    for (int64_t i = 0; i < count; ++i) bits[i] = coder.flag(bits[i], zeros_[i]);
    learn(bits, features, count);
  }

 private:
  void learn(const uint8_t* bits, Features& features, int64_t count) {
    double *errors = errors_.data(), *spread = spread_.data();
    const double* chances = chances_.data();
    for (int64_t i = 0; i < count; ++i) {
      errors[i] = bits[i] * kOne - chances[i];
      spread[i] = std::floor(chances[i] * (kOne - chances[i]) / kOne);
    }
    for (size_t at = 0; at < weights_.size(); ++at) {
      const double* row = features.row(at);
      double gradient = 0, curvature = 0;
#pragma omp simd reduction(+ : gradient, curvature)
      for (int64_t i = 0; i < count; ++i) {
        gradient += row[i] * errors[i];
        curvature += row[i] * row[i] * spread[i];
      }
      curvature_[at] += std::floor(curvature / (1 << 20));
      double moved = weights_[at] + std::floor(gradient * 16 / curvature_[at]);
      weights_[at] = std::clamp(moved, -16 * kWeight, 16 * kWeight);
    }
  }

  std::vector<double> weights_, curvature_, odds_, chances_, errors_, spread_;
  std::vector<uint32_t> zeros_;
};

// Symbols by how often each was seen so far, in blocks that grow (`_models.code_histogram`).
template <class Coder>
void code_histogram(Coder& coder, uint8_t* symbols, int64_t count, int alphabet, int64_t gain) {
  std::vector<int64_t> weights(alphabet, 1);
  std::vector<uint32_t> ends(alphabet);
  for (int64_t start = 0, stop; start < count; start = stop) {
    stop = std::min(count, start + std::max<int64_t>(8, start / 8));
    double total = 0, sum = 0;
    for (int64_t weight : weights) total += static_cast<double>(weight);
    double scale = static_cast<double>(kWhole - alphabet) / total;
    for (int at = 0; at < alphabet; ++at) {
      sum += static_cast<double>(weights[at]);
      ends[at] = static_cast<uint32_t>(sum * scale) + at + 1;
    }
    ends[alphabet - 1] = kWhole;
    coder.expect_symbols(stop - start, ends);
    for (int64_t at = start; at < stop; ++at) symbols[at] = coder.symbol(symbols[at]);
    for (int64_t at = start; at < stop; ++at) weights[symbols[at]] += gain;
  }
}

}  // namespace jopt
