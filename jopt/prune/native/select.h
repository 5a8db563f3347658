// Marks exactly the largest scores of several arrays together, in two passes over them.
//
// A sample says between which two values the cut lies. The first pass counts what lies above and
// gathers what lies between, a few in a hundred; the cut is found among these, or, should the sample
// have been unlucky, in one more pass. The second pass writes the marks.
#pragma once

#include <algorithm>
#include <tuple>

#include "../../native/threads.h"

namespace jopt {

// Scores of one array, and where its marks go.
struct Leaf {
  const int32_t* scores;  // the bits of floats
  bool* marks;
  int64_t size;
};

constexpr int64_t kSample = 1 << 15;
constexpr int64_t kChunk = 1 << 14;  // scores that a thread takes at once
constexpr int64_t kPiece = 1 << 10;  // scores looked at together
constexpr int32_t kLeastKey = std::numeric_limits<int32_t>::min();
constexpr int32_t kGreatestKey = std::numeric_limits<int32_t>::max();

// Integers of the order of floats: NaN lowest, both zeros 0, every denormal itself.
JOPT_INLINE int32_t key_of(int32_t bits) {
  const int32_t size = bits & kGreatestKey;
  const int32_t key = bits < 0 ? -size : size;
  return size > 0x7f800000 ? kLeastKey : key;
}

// A part of a leaf.
struct Chunk {
  const Leaf* leaf;
  int64_t begin, end;
};

// What a chunk has of scores above, at and between two values.
struct Found {
  int64_t above = 0, high = 0, low = 0;
  std::vector<int32_t> between;
};

// low < high; neither need be there. A piece at a time: loops that compilers turn into vectors make
// keys and say which lie within, and these, few, are then looked at one by one.
inline void look(const Chunk& chunk, int32_t low, int32_t high, int32_t* buffer, Found* found) {
  alignas(kLine) int32_t keys[kPiece];
  alignas(kLine) bool within[kPiece];
  int64_t above = 0, at_high = 0, at_low = 0, count = 0;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kPiece) {
    const int32_t* scores = chunk.leaf->scores + begin;
    const int64_t size = least(kPiece, chunk.end - begin);
    int32_t over = 0;
    for (int64_t i = 0; i < size; ++i) keys[i] = key_of(scores[i]);
    for (int64_t i = 0; i < size; ++i) over += keys[i] > high;
    for (int64_t i = 0; i < size; ++i) within[i] = (keys[i] >= low) & (keys[i] <= high);
    std::memset(within + size, 0, round_up(size, 8) - size);
    above += over;
    for (int64_t i = 0; i < size; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, within + i, 8);
      for (; eight; eight &= eight - 1) {
        const int32_t key = keys[i + __builtin_ctzll(eight) / 8];
        at_high += key == high, at_low += key == low;
        buffer[count] = key;
        count += (key > low) & (key < high);
      }
    }
  }
  found->above = above, found->high = at_high, found->low = at_low;
  found->between.assign(buffer, buffer + count);
}

inline void mark(const Chunk& chunk, int32_t least) {
  const int32_t* scores = chunk.leaf->scores;
  bool* marks = chunk.leaf->marks;
  for (int64_t i = chunk.begin; i < chunk.end; ++i) marks[i] = key_of(scores[i]) >= least;
}

inline int64_t count_equal(const Chunk& chunk, int32_t cut) {
  int64_t count = 0;
  for (int64_t i = chunk.begin; i < chunk.end; ++i) count += key_of(chunk.leaf->scores[i]) == cut;
  return count;
}

// Marks what lies above the cut, and the first `wanted` of what is equal to it.
inline void mark_first(const Chunk& chunk, int32_t cut, int64_t wanted) {
  for (int64_t i = chunk.begin; i < chunk.end; ++i) {
    const int32_t key = key_of(chunk.leaf->scores[i]);
    const bool equal = key == cut && wanted > 0;
    wanted -= equal;
    chunk.leaf->marks[i] = key > cut || equal;
  }
}

// The cut: how many scores lie above it, and how many are equal to it.
struct Cut {
  int32_t key;
  int64_t above, equal;
};

// The `rank`th largest of keys, counted from 1, with `above` more above all of them.
inline Cut cut_among(std::vector<int32_t>& keys, int64_t rank, int64_t above) {
  std::nth_element(keys.begin(), keys.begin() + (rank - 1), keys.end(), std::greater<int32_t>());
  const int32_t key = keys[rank - 1];
  Cut cut{key, above, 0};
  for (const int32_t each : keys) cut.above += each > key, cut.equal += each == key;
  return cut;
}

// Calls body(position) for one of each of kSample pieces of equal length, at random, so that no
// pattern is hit.
template <class Body>
void at_random(int64_t size, const Body& body) {
  uint64_t state = 0x9e3779b97f4a7c15;
  for (int64_t i = 0; i < kSample; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const int64_t begin = i * size / kSample, end = (i + 1) * size / kSample;
    body(begin + int64_t((state >> 33) % uint64_t(end - begin)));
  }
}

// Two values that the cut lies between, by four standard errors of a sample's ranks.
inline std::pair<int32_t, int32_t> bracket(const std::vector<Leaf>& leaves, int64_t size,
                                           int64_t keep) {
  std::vector<int32_t> sample;
  sample.reserve(kSample);
  auto leaf = leaves.begin();
  int64_t first = 0;  // of the leaf
  at_random(size, [&](int64_t position) {
    while (position - first >= leaf->size) first += leaf++->size;
    sample.push_back(key_of(leaf->scores[position - first]));
  });
  const double part = double(keep) / double(size);
  const double error = 4 * (std::sqrt(part * (1 - part) * kSample) + 1);
  const auto ranked = [&](double rank) {
    if (rank < 0) return kGreatestKey;
    if (rank >= kSample) return kLeastKey;
    const auto place = sample.begin() + int64_t(rank);
    std::nth_element(sample.begin(), place, sample.end(), std::greater<int32_t>());
    return *place;
  };
  const int32_t low = ranked(part * kSample + error), high = ranked(part * kSample - error);
  return {low, high > low ? high : low + 1};
}

template <class Pool>
void keep_largest(Pool& pool, const std::vector<Leaf>& leaves, int64_t keep) {
  int64_t size = 0;
  for (const Leaf& leaf : leaves) size += leaf.size;
  if (keep <= 0 || keep >= size) {
    for (const Leaf& leaf : leaves)
      if (leaf.size) std::memset(leaf.marks, keep > 0, leaf.size);
    return;
  }
  std::vector<Chunk> chunks;
  for (const Leaf& leaf : leaves)
    for (int64_t begin = 0; begin < leaf.size; begin += kChunk)
      chunks.push_back({&leaf, begin, least(begin + kChunk, leaf.size)});
  const int64_t count = chunks.size();

  Cut cut{};
  const auto narrow = [&](int32_t low, int32_t high) {
    std::vector<Found> found(count);
    parallel_for(pool, count, [&](int64_t at) {
      const Scratch<int32_t> buffer = scratch<int32_t>(chunks[at].end - chunks[at].begin + 1);
      look(chunks[at], low, high, buffer.get(), &found[at]);
    });
    int64_t above = 0, at_high = 0, at_low = 0, between = 0;
    for (const Found& each : found) {
      above += each.above, at_high += each.high, at_low += each.low;
      between += each.between.size();
    }
    if (keep <= above) return 1;
    if (keep <= above + at_high) return cut = {high, above, at_high}, 0;
    above += at_high;
    if (keep <= above + between) {
      std::vector<int32_t> keys;
      keys.reserve(between);
      for (const Found& each : found)
        keys.insert(keys.end(), each.between.begin(), each.between.end());
      return cut = cut_among(keys, keep - above, above), 0;
    }
    above += between;
    if (keep <= above + at_low) return cut = {low, above, at_low}, 0;
    return -1;
  };
  // No key is the greatest; NaN has the least.
  int32_t low = kLeastKey, high = kGreatestKey;
  if (size > 4 * kSample) std::tie(low, high) = bracket(leaves, size, keep);
  const int missed = narrow(low, high);
  if (missed > 0) narrow(high, kGreatestKey);
  if (missed < 0) narrow(kLeastKey, low);

  const int64_t wanted = keep - cut.above;
  if (wanted == cut.equal)
    return parallel_for(pool, count, [&](int64_t at) { mark(chunks[at], cut.key); });
  std::vector<int64_t> first(count);  // how many equals come before a chunk
  parallel_for(pool, count, [&](int64_t at) { first[at] = count_equal(chunks[at], cut.key); });
  int64_t before = 0;
  for (int64_t& each : first) before += std::exchange(each, before);
  parallel_for(pool, count, [&](int64_t at) {
    mark_first(chunks[at], cut.key, wanted - first[at]);
  });
}

}  // namespace jopt
