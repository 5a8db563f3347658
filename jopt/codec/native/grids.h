// Which elements are blank, and the values of the others, anti-diagonal by anti-diagonal: the
// models of `_flags.py` and `_values.py`, with the order and the factors of `_grids.py`.
#pragma once

#include <cstdlib>

#include "models.h"

namespace jopt {

struct Axis {
  int64_t stride, length;
};

// An array as a matrix whose last row may be short, and the neighbours that are looked at.
struct Grid {
  int64_t rows, cols, size;
  bool table;
  std::vector<Axis> axes;
  std::vector<int64_t> up, left;

  std::vector<int64_t> offsets() const {
    std::vector<int64_t> found;
    for (int64_t step : up) found.push_back(step * cols);
    found.insert(found.end(), left.begin(), left.end());
    return found;
  }
  int64_t widest() const { return std::min(rows, cols); }
};

inline int64_t largest(const std::vector<int64_t>& steps) {
  return steps.empty() ? 0 : *std::max_element(steps.begin(), steps.end());
}

struct Wave {
  int64_t row, col, count;
};

template <class Each>
void for_each_wave(const Grid& grid, Each each) {
  for (int64_t diagonal = 0; diagonal < grid.rows + grid.cols - 1; ++diagonal) {
    int64_t first = std::max<int64_t>(0, diagonal - grid.cols + 1);
    int64_t count = std::min(grid.rows, diagonal + 1) - first;
    if ((first + count - 1) * (grid.cols - 1) + diagonal >= grid.size) --count;
    if (count > 0) each(Wave{first, diagonal - first, count});
  }
}

// The factors of rows, columns and further axes, and the pooled factors of lagged rows.
class Density {
 public:
  Density(const Grid& grid, int period) : grid_(grid), up_(largest(grid.up)),
                                          left_(largest(grid.left)) {
    if (grid.table) {  // in front of either, zeros for the lags that reach out
      factors_.emplace_back(grid.rows + up_, period);
      factors_.emplace_back(grid.cols + left_, period);
    }
    for (const Axis& axis : grid.axes) factors_.emplace_back(axis.length, period);
    places_.resize(factors_.size(), std::vector<int64_t>(grid.widest()));
  }

  int64_t count() const { return static_cast<int64_t>(factors_.size()); }
  int64_t pools() const { return grid_.table ? !grid_.up.empty() + !grid_.left.empty() : 0; }

  // Writes `count() + pools()` rows of features, from a row on.
  void fill(Features& features, int64_t from, const Wave& wave) {
    int64_t at = 0;
    if (grid_.table) {
      for (int64_t i = 0; i < wave.count; ++i) places_[0][i] = wave.row + i + up_;
      for (int64_t i = 0; i < wave.count; ++i) places_[1][i] = wave.col - i + left_;
      at = 2;
    }
    for (const Axis& axis : grid_.axes) {
      for (int64_t i = 0; i < wave.count; ++i) {
        uint64_t flat = (wave.row + i) * grid_.cols + wave.col - i;
        places_[at][i] = flat / static_cast<uint64_t>(axis.stride) %
                         static_cast<uint64_t>(axis.length);
      }
      ++at;
    }
    for (at = 0; at < count(); ++at) {
      double* row = features.row(from + at);
      const int64_t* places = places_[at].data();
      for (int64_t i = 0; i < wave.count; ++i) row[i] = factors_[at].feature(places[i]);
    }
    if (!grid_.table) return;
    if (!grid_.up.empty()) pool(features.row(from + at++), 0, grid_.up, wave.count);
    if (!grid_.left.empty()) pool(features.row(from + at), 1, grid_.left, wave.count);
  }

  // Tells each factor what was seen, and what was expected of the others alone.
  void learn(const uint8_t* bits, const double* odds, Features& features, int64_t from,
             const double* weights, int64_t count) {
    for (size_t at = 0; at < factors_.size(); ++at) {
      const double *own = features.row(from + at), weight = weights[at];
      const int64_t* places = places_[at].data();
      for (int64_t i = 0; i < count; ++i) {
        double expected = squash(odds[i] - std::floor(weight * own[i]));
        factors_[at].learn(places[i], bits[i] * kOne, expected);
      }
      factors_[at].turn();
    }
  }

 private:
  void pool(double* row, int64_t which, const std::vector<int64_t>& steps, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      double seen = 0, expected = 0;
      for (int64_t step : steps) {
        seen += factors_[which].seen(places_[which][i] - step);
        expected += factors_[which].expected(places_[which][i] - step);
      }
      row[i] = log_ratio(seen, expected);
    }
  }

  const Grid& grid_;
  int64_t up_, left_;
  std::vector<Factor> factors_;
  std::vector<std::vector<int64_t>> places_;
};

template <class Coder>
void code_flags(Coder& coder, uint8_t* flags, const Grid& grid, double base, int period) {
  coder.expect_flags(grid.size);
  std::vector<int64_t> offsets = grid.offsets();
  int64_t margin = largest(offsets), step = std::max<int64_t>(1, grid.cols - 1);
  std::vector<uint8_t> known(margin + grid.size);
  Density density(grid, period);
  int64_t fixed = 1 + density.count() + density.pools();
  std::vector<double> first{base};
  first.insert(first.end(), density.count(), 0.8);
  first.insert(first.end(), density.pools(), 0.3);
  first.insert(first.end(), offsets.size(), 0.4);
  Features features(first.size(), grid.widest());
  Logistic model(first, 25, grid.widest());
  std::fill(features.row(0), features.row(0) + features.stride, kUnit);
  std::vector<uint8_t> bits(grid.widest());
  std::vector<double> weights(density.count());
  for_each_wave(grid, [&](const Wave& wave) {
    density.fill(features, 1, wave);
    int64_t begin = wave.row * grid.cols + wave.col;
    for (size_t at = 0; at < offsets.size(); ++at) {
      double* row = features.row(fixed + at);
      const uint8_t* near = known.data() + begin + margin - offsets[at];
      for (int64_t i = 0; i < wave.count; ++i) row[i] = near[i * step] * kUnit;
    }
    for (int64_t at = 0; at < density.count(); ++at) weights[at] = model.weight(1 + at);
    if (!Coder::kReads) {
      for (int64_t i = 0; i < wave.count; ++i) bits[i] = flags[begin + i * step] != 0;
    }
    model.code(coder, bits.data(), features, wave.count);
    for (int64_t i = 0; i < wave.count; ++i) {
      known[begin + margin + i * step] = flags[begin + i * step] = bits[i];
    }
    density.learn(bits.data(), model.odds(), features, 1, weights.data(), wave.count);
  });
}

// The elements of a wave that are not blank.
struct Kept {
  std::vector<int64_t> row, col, flat;
  int64_t count = 0;

  explicit Kept(int64_t most) : row(most), col(most), flat(most) {}

  void take(const Grid& grid, const Wave& wave, const uint8_t* flags) {
    count = 0;
    for (int64_t i = 0; i < wave.count; ++i) {
      int64_t place = (wave.row + i) * grid.cols + wave.col - i;
      if (!flags[place]) continue;
      row[count] = wave.row + i, col[count] = wave.col - i, flat[count++] = place;
    }
  }
};

class Signs {
 public:
  Signs(const Grid& grid, int64_t lags) : features_(3 + lags, grid.widest()),
        model_(weights(lags), 10, grid.widest()),
        balances_{std::vector<double>(2 * grid.rows, 2.0),
                  std::vector<double>(2 * grid.cols, 2.0)} {
    std::fill(features_.row(0), features_.row(0) + features_.stride, kUnit);
  }

  template <class Coder, class Near>
  void code(Coder& coder, uint8_t* bits, const Kept& kept, int64_t lags, Near near) {
    const int64_t* places[2] = {kept.row.data(), kept.col.data()};
    for (int which = 0; which < 2; ++which) {
      double* row = features_.row(1 + which);
      const double* balance = balances_[which].data();
      for (int64_t i = 0; i < kept.count; ++i) {
        const double* pair = balance + 2 * places[which][i];
        row[i] = log_ratio(pair[1], pair[0]);
      }
    }
    for (int64_t lag = 0; lag < lags; ++lag) {
      double* row = features_.row(3 + lag);
      for (int64_t i = 0; i < kept.count; ++i) {
        int value = near(lag, i);
        row[i] = value > 0 ? kUnit : value < 0 ? -kUnit : 0.0;
      }
    }
    model_.code(coder, bits, features_, kept.count);
    for (int which = 0; which < 2; ++which) {
      for (int64_t i = 0; i < kept.count; ++i) {
        balances_[which][2 * places[which][i] + bits[i]] += 1.0;
      }
    }
  }

 private:
  static std::vector<double> weights(int64_t lags) {
    std::vector<double> found{0.0, 0.5, 0.5};
    found.insert(found.end(), lags, 1.0);
    return found;
  }

  Features features_;
  Logistic model_;
  std::vector<double> balances_[2];
};

class Magnitudes {
 public:
  Magnitudes(const Grid& grid, int64_t lags, int depth)
      : depth_(depth), features_(5 + lags, grid.widest()), nodes_(2 << depth, 0.5),
        means_{Factor(grid.rows, 1), Factor(grid.cols, 1)}, node_(grid.widest()) {
    std::vector<double> weights{0.0, 1.0, 0.2, 0.2, 0.0};
    weights.insert(weights.end(), lags, 0.1);
    for (int level = 0; level < depth; ++level) models_.emplace_back(weights, 25, grid.widest());
    std::fill(features_.row(0), features_.row(0) + features_.stride, kUnit);
  }

  // `sizes` are at least 1; they are read where the coder writes, and written where it reads.
  template <class Coder, class Near>
  void code(Coder& coder, int32_t* sizes, uint8_t* bits, const Kept& kept, int64_t lags,
            Near near) {
    fill(kept, lags, near);
    for (int64_t i = 0; i < kept.count; ++i) node_[i] = 1;
    for (int level = 0; level < depth_; ++level) {
      int shift = depth_ - 1 - level;
      double* row = features_.row(1);
      for (int64_t i = 0; i < kept.count; ++i) {
        const double* pair = nodes_.data() + 2 * node_[i];
        row[i] = log_ratio(pair[1], pair[0]);
        if (!Coder::kReads) bits[i] = (sizes[i] - 1) >> shift & 1;
      }
      models_[level].code(coder, bits, features_, kept.count);
      for (int64_t i = 0; i < kept.count; ++i) {
        nodes_[2 * node_[i] + bits[i]] += 1.0;
        node_[i] = 2 * node_[i] + bits[i];
      }
    }
    for (int64_t i = 0; i < kept.count; ++i) sizes[i] = node_[i] - (1 << depth_) + 1;
    learn(kept, sizes);
  }

 private:
  template <class Near>
  void fill(const Kept& kept, int64_t lags, Near near) {
    double scale = 2 * kUnit / (1 << depth_), *seen = features_.row(4);
    for (int64_t i = 0; i < kept.count; ++i) {
      features_.row(2)[i] = means_[0].feature(kept.row[i]);
      features_.row(3)[i] = means_[1].feature(kept.col[i]);
      seen[i] = 0;
    }
    for (int64_t lag = 0; lag < lags; ++lag) {
      double* row = features_.row(5 + lag);
      for (int64_t i = 0; i < kept.count; ++i) {
        int size = std::abs(near(lag, i));
        row[i] = std::floor(size * scale);
        seen[i] += size ? kUnit / 4 : 0.0;
      }
    }
  }

  void learn(const Kept& kept, const int32_t* sizes) {
    for (int64_t i = 0; i < kept.count; ++i) total_ += sizes[i];
    seen_ += static_cast<double>(kept.count);
    double mean = std::floor(total_ * kOne / seen_);
    for (int64_t i = 0; i < kept.count; ++i) {
      means_[0].learn(kept.row[i], sizes[i] * kOne, mean);
      means_[1].learn(kept.col[i], sizes[i] * kOne, mean);
    }
  }

  int depth_;
  Features features_;
  std::vector<double> nodes_;  // how often a node of the tree was followed by a zero, by a one
  Factor means_[2];
  std::vector<int32_t> node_;
  std::vector<Logistic> models_;
  double total_ = 1.0, seen_ = 1.0;
};

template <class Coder>
void code_values(Coder& coder, int16_t* values, const uint8_t* flags, const Grid& grid,
                 int depth) {
  std::vector<int64_t> offsets = grid.offsets();
  int64_t margin = largest(offsets), lags = static_cast<int64_t>(offsets.size());
  std::vector<int16_t> known(margin + grid.size);
  Signs signs(grid, lags);
  Magnitudes magnitudes(grid, lags, depth);
  Kept kept(grid.widest());
  std::vector<uint8_t> positive(grid.widest()), bits(grid.widest());
  std::vector<int32_t> sizes(grid.widest());
  for_each_wave(grid, [&](const Wave& wave) {
    kept.take(grid, wave, flags);
    if (!kept.count) return;
    if (!Coder::kReads) {
      for (int64_t i = 0; i < kept.count; ++i) {
        int value = values[kept.flat[i]];
        positive[i] = value > 0;
        sizes[i] = std::abs(value);
      }
    }
    auto near = [&](int64_t lag, int64_t i) -> int {
      return known[kept.flat[i] + margin - offsets[lag]];
    };
    signs.code(coder, positive.data(), kept, lags, near);
    magnitudes.code(coder, sizes.data(), bits.data(), kept, lags, near);
    for (int64_t i = 0; i < kept.count; ++i) {
      int value = positive[i] ? sizes[i] : -sizes[i];
      known[margin + kept.flat[i]] = values[kept.flat[i]] = static_cast<int16_t>(value);
    }
  });
}

}  // namespace jopt
