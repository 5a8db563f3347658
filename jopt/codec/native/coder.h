// The entropy coder beneath the models: asymmetric numeral systems (Duda 2013) as a stack.
//
// A Writer keeps what it is told and pushes it in reverse at the end, a Reader decodes as it goes;
// a model is written once for both. Words of 32 bits, a state of 64, probabilities of 24: the
// stream is that of constriction's AnsCoder, bit for bit.
#pragma once

#include <cstdint>
#include <vector>

namespace jopt {

constexpr int kPrecision = 24;
constexpr uint32_t kWhole = 1u << kPrecision;
constexpr double kOne = 65536.0;  // the probability 1 in the units of a model's chances

// How much of the whole a zero takes where a one has the chance `chance / kOne`.
inline uint32_t zero_share(double chance) {
  return static_cast<int32_t>((1.0 - chance / kOne) * (kWhole - 2)) + 1;
}

class Writer {
 public:
  static constexpr bool kReads = false;

  // Says how many flags come.
  void expect_flags(int64_t count) { flags_.reserve(flags_.size() + count); }

  uint32_t flag(uint32_t truth, uint32_t zeros) {
    flags_.push_back(truth << 31 | zeros);
    return truth;
  }

  // Says how the symbols that come next are distributed: `ends` are the right ends of their shares,
  // the last one kWhole.
  void expect_symbols(int64_t count, const std::vector<uint32_t>& ends) {
    close_flags();
    blocks_.push_back({count, ends});
    symbols_.reserve(symbols_.size() + count);
  }

  uint32_t symbol(uint32_t truth) {
    symbols_.push_back(static_cast<uint8_t>(truth));
    return truth;
  }

  // Encodes what was taken, and lets go of it; returns the number of words.
  int64_t finish() {
    close_flags();
    const uint32_t* flag = flags_.data() + flags_.size();
    const uint8_t* symbol = symbols_.data() + symbols_.size();
    for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) {
      if (block->ends.empty()) {
        for (int64_t left = block->count; left; --left) push_flag(*--flag);
        continue;
      }
      std::vector<Share> shares = shares_of(block->ends);
      for (int64_t left = block->count; left; --left) push_symbol(shares[*--symbol]);
    }
    for (; state_; state_ >>= 32) words_.push_back(static_cast<uint32_t>(state_));
    std::vector<Block>().swap(blocks_);
    std::vector<uint32_t>().swap(flags_);
    std::vector<uint8_t>().swap(symbols_);
    return static_cast<int64_t>(words_.size());
  }
  const std::vector<uint32_t>& words() const { return words_; }

 private:
  struct Block {
    int64_t count;
    std::vector<uint32_t> ends;  // empty for flags
  };

  // What a symbol takes of the whole, and 2^64 / size rounded down.
  struct Share {
    uint64_t begin, size, inverse;
  };

  void close_flags() {
    int64_t count = static_cast<int64_t>(flags_.size()) - closed_;
    if (count) blocks_.push_back({count, {}});
    closed_ += count;
  }

  static std::vector<Share> shares_of(const std::vector<uint32_t>& ends) {
    std::vector<Share> found;
    uint64_t begin = 0;
    for (uint32_t end : ends) {
      uint64_t size = end - begin;
      found.push_back({begin, size, size > 1 ? ~uint64_t{0} / size : ~uint64_t{0}});
      begin = end;
    }
    return found;
  }

  void make_room(uint64_t size) {
    if (state_ >> (64 - kPrecision) < size) return;
    words_.push_back(static_cast<uint32_t>(state_));
    state_ >>= 32;
  }

  void push_flag(uint32_t kept) {
    uint64_t zeros = kept & (kWhole - 1), begin = kept >> 31 ? zeros : 0;
    uint64_t size = kept >> 31 ? kWhole - zeros : zeros;
    make_room(size);
    state_ = (state_ / size) << kPrecision | (begin + state_ % size);
  }

  void push_symbol(const Share& share) {
    make_room(share.size);
    uint64_t quotient = static_cast<unsigned __int128>(state_) * share.inverse >> 64;
    uint64_t rest = state_ - quotient * share.size;
    while (rest >= share.size) ++quotient, rest -= share.size;  // once or twice at most
    state_ = quotient << kPrecision | (share.begin + rest);
  }

  std::vector<Block> blocks_;
  std::vector<uint32_t> flags_;  // the share of a zero, and above it the flag
  std::vector<uint8_t> symbols_;
  int64_t closed_ = 0;
  uint64_t state_ = 0;
  std::vector<uint32_t> words_;
};

class Reader {
 public:
  static constexpr bool kReads = true;

  Reader(const uint32_t* words, int64_t count) : words_(words, words + count) {
    while (!(state_ >> 32) && !words_.empty()) refill();
  }

  void expect_flags(int64_t) {}

  uint32_t flag(uint32_t, uint32_t zeros) {
    uint32_t place = state_ & (kWhole - 1);
    uint32_t one = place >= zeros;
    uint32_t begin = one ? zeros : 0, share = one ? kWhole - zeros : zeros;
    advance(place - begin, share);
    return one;
  }

  void expect_symbols(int64_t, const std::vector<uint32_t>& ends) {
    ends_ = ends.data();
    starts_.resize(kSlots);
    for (uint32_t slot = 0, at = 0; slot < kSlots; ++slot) {
      while (ends_[at] <= slot << kSlotBits) ++at;
      starts_[slot] = static_cast<uint8_t>(at);
    }
  }

  uint32_t symbol(uint32_t) {
    uint32_t place = state_ & (kWhole - 1);
    uint32_t found = starts_[place >> kSlotBits];
    while (ends_[found] <= place) ++found;
    uint32_t begin = found ? ends_[found - 1] : 0;
    advance(place - begin, ends_[found] - begin);
    return found;
  }

  bool empty() const { return !state_ && words_.empty(); }

  int64_t bits_left() const {
    int bits = state_ ? 63 - __builtin_clzll(state_) : 0;
    return 32 * static_cast<int64_t>(words_.size()) + bits;
  }

 private:
  void advance(uint32_t rest, uint32_t share) {
    state_ = (state_ >> kPrecision) * share + rest;
    if (!(state_ >> 32) && !words_.empty()) refill();
  }

  void refill() {
    state_ = state_ << 32 | words_.back();
    words_.pop_back();
  }

  static constexpr uint32_t kSlotBits = kPrecision - 12, kSlots = 1 << 12;

  uint64_t state_ = 0;
  std::vector<uint32_t> words_;
  const uint32_t* ends_ = nullptr;
  std::vector<uint8_t> starts_;  // which symbol holds the first place of a slot
};

}  // namespace jopt
