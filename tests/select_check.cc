// Marks the largest of random scores, and compares with a stable sort. Built with sanitizers by
// test_prune_natively.py: arrays are exactly as long as they are said to be.

#include "select.h"
#include "pools.h"

#include <cstdio>
#include <numeric>
#include <random>

using namespace jopt;

static std::mt19937 source(1);
static int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(source);
}

static float score(int64_t kind) {
  const float normal = std::normal_distribution<float>()(source);
  if (kind == 0) return normal;
  if (kind == 1) return std::round(normal);
  if (kind == 2) return normal > 1 ? std::nanf("") : normal < -1 ? -INFINITY : normal;
  if (kind == 3) return pick(0, 1) ? 0.0f : -0.0f;
  const int32_t bits = (int32_t)source();
  float any;
  std::memcpy(&any, &bits, sizeof any);
  return any;
}

// Scores that a sample misleads: those that it draws are greater than all others, or less.
static void mislead(std::vector<float>& scores, float value) {
  if ((int64_t)scores.size() >= kSample)
    at_random(scores.size(), [&](int64_t position) { scores[position] = value; });
}

static bool right(const std::vector<float>& scores, int64_t keep, const std::vector<char>& marks) {
  std::vector<int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  const auto key = [&](int64_t at) {
    int32_t bits;
    std::memcpy(&bits, &scores[at], sizeof bits);
    return key_of(bits);
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key(a) > key(b); });
  for (int64_t place = 0; place < (int64_t)order.size(); ++place)
    if (marks[order[place]] != (place < keep)) return false;
  return true;
}

int main(int count, char** words) {
  const int64_t rounds = count > 1 ? std::atoi(words[1]) : 40;
  long wrong = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t kind = pick(0, 4), leaves = pick(1, 4);
    const int64_t longest = round % 4 ? 3 * kPiece : 5 * kSample;
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < leaves; ++i) sizes.push_back(pick(0, longest));
    if (round % 8 == 0) sizes.back() = 5 * kSample;
    std::vector<float> scores(std::accumulate(sizes.begin(), sizes.end(), int64_t{0}));
    for (float& each : scores) each = score(kind);
    if (round % 3) mislead(scores, round % 3 == 1 ? 1e30f : -1e30f);
    const int64_t size = scores.size(), keep = pick(-1, size + 1);
    std::vector<char> marks(size);
    std::vector<std::vector<float>> own;  // arrays of their own, so that a sanitizer sees their ends
    std::vector<std::unique_ptr<bool[]>> made;
    std::vector<Leaf> list;
    int64_t first = 0;
    for (const int64_t each : sizes) {
      own.emplace_back(scores.begin() + first, scores.begin() + first + each);
      made.emplace_back(new bool[each]);
      list.push_back({(const int32_t*)own.back().data(), made.back().get(), each});
      first += each;
    }
    if (round % 3 == 0) {
      Serial pool;
      keep_largest(pool, list, keep);
    } else if (round % 3 == 1) {
      Late pool;
      keep_largest(pool, list, keep);
    } else {
      Threads pool;
      keep_largest(pool, list, keep);
    }
    auto to = marks.begin();
    for (const Leaf& leaf : list) to = std::copy(leaf.marks, leaf.marks + leaf.size, to);
    if (right(scores, keep, marks)) continue;
    ++wrong;
    std::printf("round %ld: kind %ld, %ld of %ld\n", (long)round, (long)kind, (long)keep, (long)size);
  }
  std::printf("%ld rounds: %ld wrong\n", (long)rounds, wrong);
  return wrong ? 1 : 0;
}
