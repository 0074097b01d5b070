// SPDX-License-Identifier: BSD-3-Clause
// Chinese words as jieba 0.42.1 cuts them: the most probable path through the words of a dictionary, and a hidden
// Markov model of four states for runs of single characters that the dictionary leaves. Every sum is made of the same
// doubles in the same order as in jieba, and ties fall as there, so that the tokens are equal. Text may be cut after a
// code point that is in no word (is_word_ascii, kFirstHan), but for "\r" before "\n".
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_ZH_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_ZH_H

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "core/checked.h"
#include "wordcount/wordcount_utf8.h"

namespace fastops {

// Ideographs that are parts of words; beside them ASCII letters, digits and some signs (jieba's re_han_default).
static constexpr std::uint32_t kFirstHan = 0x4e00, kLastHan = 0x9fd5, kHanCount = kLastHan - kFirstHan + 1;

enum ZhState : std::uint8_t { kZhBegin, kZhMiddle, kZhEnd, kZhSingle };

struct ZhHmm {
  double start[4], trans[4][4];    // trans[from][to]
  std::vector<double> emit;        // emit[(code point - kFirstHan) * 4 + state]
  std::vector<std::string> split;  // sorted; words that are taken apart again
};

// A dictionary as a double array over characters: the unit of a node's child by character c is units[base(node) + c]
// where check() of it is c. Immutable once built: threads share it.
class ZhModel {
 public:
  // A unit: base of the children (0: none) in the low 28 bits, check in the next 16, number of the weight (0: no word).
  static constexpr std::uint64_t kMaxBase = (1u << 28) - 1, kMaxWeights = (1u << 20) - 1;
  static std::uint32_t base(std::uint64_t unit) noexcept { return static_cast<std::uint32_t>(unit & kMaxBase); }
  static std::uint32_t check(std::uint64_t unit) noexcept { return static_cast<std::uint32_t>(unit >> 28 & 0xffff); }
  static std::uint32_t weight(std::uint64_t unit) noexcept { return static_cast<std::uint32_t>(unit >> 44); }

  // `words`: each ended by "\n", all different; word i has weights[numbers[i]], numbers from 1 on; weights[0] is that
  // of a character outside the dictionary. Weights are log(frequency) - log(total). Throws std::length_error where a
  // dictionary is too large for the units, std::invalid_argument where the arguments do not fit; std::bad_alloc.
  ZhModel(const char* words, std::size_t size, const std::uint32_t* numbers, std::size_t count,
          std::vector<double> weights, bool has_hmm, ZhHmm hmm);

  // Characters as numbers from 1 on; kUnknown stands for those that no word has.
  std::uint16_t code(std::uint32_t code_point) const noexcept {
    return code_point < 0x80 ? ascii_[code_point] : han_[code_point - kFirstHan];
  }
  bool has_hmm() const noexcept { return has_hmm_; }
  const ZhHmm& hmm() const noexcept { return hmm_; }
  const std::uint64_t* roots() const noexcept { return roots_.data(); }  // by code
  const std::uint64_t* units() const noexcept { return units_.data(); }
  const double* weights() const noexcept { return weights_.data(); }
  std::size_t bytes() const noexcept {
    return (roots_.size() + units_.size()) * 8 + (weights_.size() + hmm_.emit.size()) * sizeof(double) + sizeof *this;
  }

 private:
  std::uint16_t ascii_[128];
  std::vector<std::uint16_t> han_;
  std::vector<std::uint64_t> roots_, units_;
  std::vector<double> weights_;
  bool has_hmm_;
  ZhHmm hmm_;
};

// What a thread needs to cut; grows to the longest run of word characters met.
class ZhWork {
 public:
  bool reserve(std::size_t characters) noexcept {
    if (characters <= capacity_) return true;
    const std::size_t wanted = std::max<std::size_t>(characters + characters / 2, 4096);
    capacity_ = 0;
    if (!codes_.reserve({wanted + 1, sizeof(std::uint16_t)}) || !lengths_.reserve({wanted, sizeof(std::uint32_t)}) ||
        !scores_.reserve({wanted + 1, sizeof(double)}) || !states_.reserve({wanted, 1}))
      return false;
    capacity_ = wanted;
    return true;
  }
  std::uint16_t* codes() const noexcept { return codes_.get<std::uint16_t>(); }
  std::uint32_t* lengths() const noexcept { return lengths_.get<std::uint32_t>(); }
  double* scores() const noexcept { return scores_.get<double>(); }
  std::uint8_t* states() const noexcept { return states_.get<std::uint8_t>(); }

 private:
  Workspace codes_, lengths_, scores_, states_;
  std::size_t capacity_ = 0;
};

// What is here is static: a file compiled once per level keeps its own copy.
namespace zh {

static inline bool is_alnum(unsigned char c) noexcept {
  return (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z');
}
static inline bool is_digit(unsigned char c) noexcept { return c >= '0' && c <= '9'; }
static inline bool is_word_ascii(unsigned char c) noexcept {
  return is_alnum(c) || c == '+' || c == '#' || c == '&' || c == '.' || c == '_' || c == '%' || c == '-';
}

// Bytes of the character of a word that begins with `first`.
static inline std::size_t width(unsigned char first) noexcept { return first < 0x80 ? 1 : 3; }

// The ideograph at p; 0 where there is none.
static inline std::uint32_t han_at(const unsigned char* p, const unsigned char* end) noexcept {
  if (*p < 0xe4 || *p > 0xe9 || end - p < 3 || (p[1] & 0xc0) != 0x80 || (p[2] & 0xc0) != 0x80) return 0;
  const std::uint32_t code = (p[0] & 0x0fu) << 12 | (p[1] & 0x3fu) << 6 | (p[2] & 0x3fu);
  return code >= kFirstHan && code <= kLastHan ? code : 0;
}

// For every character of a run the length of the best word that begins there: jieba's calc(), from the right.
static inline void route(const ZhModel& model, std::size_t count, const ZhWork& work) noexcept {
  const std::uint16_t* const codes = work.codes();
  const std::uint64_t *const roots = model.roots(), *const units = model.units();
  const double* const weights = model.weights();
  double* const scores = work.scores();
  std::uint32_t* const lengths = work.lengths();
  scores[count] = 0.0;
  constexpr std::size_t kAhead = 8;
  for (std::size_t i = count; i-- > 0;) {
    if (i >= kAhead) {
      const std::size_t k = i - kAhead;
      __builtin_prefetch(units + ZhModel::base(roots[codes[k]]) + codes[k + 1]);
    }
    const std::uint64_t root = roots[codes[i]];
    // Alone at least, with the weight of frequency 1 if it is no word; a longer word then wins at any weight.
    double best = weights[ZhModel::weight(root)] + scores[i + 1];
    bool found = ZhModel::weight(root) != 0;
    std::uint32_t length = 1;
    std::uint32_t base = ZhModel::base(root);
    for (std::size_t j = i + 1; base != 0 && j < count; ++j) {
      const std::uint64_t unit = units[base + codes[j]];
      if (ZhModel::check(unit) != codes[j]) break;
      if (const std::uint32_t number = ZhModel::weight(unit); number != 0) {
        const double score = weights[number] + scores[j + 1];
        if (!found || score >= best) {  // of equal ones the longest, as max() of tuples
          best = score;
          length = static_cast<std::uint32_t>(j + 1 - i);
          found = true;
        }
      }
      base = ZhModel::base(unit);
    }
    scores[i] = best;
    lengths[i] = length;
  }
}

// Whether the characters from `first` to before `last` are a word.
static inline bool is_word(const ZhModel& model, const std::uint16_t* codes, std::size_t first,
                           std::size_t last) noexcept {
  std::uint64_t unit = model.roots()[codes[first]];
  for (std::size_t j = first + 1; j < last; ++j) {
    if (ZhModel::base(unit) == 0) return false;
    unit = model.units()[ZhModel::base(unit) + codes[j]];
    if (ZhModel::check(unit) != codes[j]) return false;
  }
  return ZhModel::weight(unit) != 0;
}

template <class Emit>
static void emit_characters(const unsigned char* p, const unsigned char* end, const Emit& emit) noexcept {
  for (; p < end; p += width(*p)) emit(p, width(*p));
}

// Ideographs alone, by the model's most probable states (Viterbi 1967); of equal ones the letter that sorts last.
template <class Emit>
static void cut_han(const ZhHmm& hmm, const unsigned char* p, const unsigned char* end, std::uint8_t* states,
                    const Emit& emit) noexcept {
  const std::size_t count = static_cast<std::size_t>(end - p) / 3;
  const auto emission = [&](std::size_t t) { return &hmm.emit[std::size_t{han_at(p + 3 * t, end) - kFirstHan} * 4]; };
  const auto& trans = hmm.trans;
  double b, m, e, s;
  {
    const double* const at = emission(0);
    b = hmm.start[kZhBegin] + at[kZhBegin];
    m = hmm.start[kZhMiddle] + at[kZhMiddle];
    e = hmm.start[kZhEnd] + at[kZhEnd];
    s = hmm.start[kZhSingle] + at[kZhSingle];
  }
  for (std::size_t t = 1; t < count; ++t) {
    const double* const at = emission(t);
    const double eb = e + trans[kZhEnd][kZhBegin] + at[kZhBegin], sb = s + trans[kZhSingle][kZhBegin] + at[kZhBegin];
    const double bm = b + trans[kZhBegin][kZhMiddle] + at[kZhMiddle];
    const double mm = m + trans[kZhMiddle][kZhMiddle] + at[kZhMiddle];
    const double be = b + trans[kZhBegin][kZhEnd] + at[kZhEnd], me = m + trans[kZhMiddle][kZhEnd] + at[kZhEnd];
    const double es = e + trans[kZhEnd][kZhSingle] + at[kZhSingle];
    const double ss = s + trans[kZhSingle][kZhSingle] + at[kZhSingle];
    // Bit y: state y's best predecessor is the later letter of its two.
    states[t] = static_cast<std::uint8_t>((sb >= eb ? 1u << kZhBegin : 0u) | (mm >= bm ? 1u << kZhMiddle : 0u) |
                                          (me >= be ? 1u << kZhEnd : 0u) | (ss >= es ? 1u << kZhSingle : 0u));
    b = sb >= eb ? sb : eb;
    m = mm >= bm ? mm : bm;
    e = me >= be ? me : be;
    s = ss >= es ? ss : es;
  }
  static constexpr std::uint8_t kEarlier[4] = {kZhEnd, kZhBegin, kZhBegin, kZhEnd};
  static constexpr std::uint8_t kLater[4] = {kZhSingle, kZhMiddle, kZhMiddle, kZhSingle};
  std::uint8_t state = s >= e ? kZhSingle : kZhEnd;
  for (std::size_t t = count; t-- > 0;) {
    const unsigned bits = t > 0 ? states[t] : 0;
    states[t] = state;
    state = (bits >> state & 1u) != 0 ? kLater[state] : kEarlier[state];
  }
  std::size_t begin = 0;
  for (std::size_t t = 0; t < count; ++t) {
    if (states[t] == kZhBegin) begin = t;
    if (states[t] != kZhEnd && states[t] != kZhSingle) continue;
    const std::size_t first = states[t] == kZhEnd ? begin : t;
    const unsigned char* const word = p + 3 * first;
    const std::size_t length = 3 * (t + 1 - first);
    if (!hmm.split.empty() && std::binary_search(hmm.split.begin(), hmm.split.end(),
                                                 std::string_view(reinterpret_cast<const char*>(word), length)))
      emit_characters(word, word + length, emit);
    else
      emit(word, length);
  }
}

// A run of characters that the dictionary left alone: jieba's finalseg.cut().
template <class Emit>
static void cut_rest(const ZhHmm& hmm, const unsigned char* p, const unsigned char* end, std::uint8_t* states,
                     const Emit& emit) noexcept {
  while (p < end) {
    const unsigned char* const begin = p;
    if (*p >= 0x80) {
      while (p < end && *p >= 0x80) p += 3;
      cut_han(hmm, begin, p, states, emit);
      continue;
    }
    if (is_alnum(*p)) {  // [a-zA-Z0-9]+(?:\.\d+)?%?
      while (p < end && is_alnum(*p)) ++p;
      if (end - p > 1 && *p == '.' && is_digit(p[1]))
        for (++p; p < end && is_digit(*p);) ++p;
      if (p < end && *p == '%') ++p;
    } else {
      while (p < end && *p < 0x80 && !is_alnum(*p)) ++p;
    }
    emit(begin, static_cast<std::size_t>(p - begin));
  }
}

template <class Emit>
static void cut_run(const ZhModel& model, const unsigned char* p, std::size_t count, const ZhWork& work,
                    const Emit& emit) noexcept {
  route(model, count, work);
  const std::uint32_t* const lengths = work.lengths();
  const unsigned char* buffer = p;  // single characters that wait
  std::size_t waiting = 0;
  const auto flush = [&](std::size_t i) {
    if (waiting == 0) return;
    if (waiting == 1 || !model.has_hmm())
      emit(buffer, static_cast<std::size_t>(p - buffer));
    else if (is_word(model, work.codes(), i - waiting, i))
      emit_characters(buffer, p, emit);
    else
      cut_rest(model.hmm(), buffer, p, work.states(), emit);
    waiting = 0;
  };
  for (std::size_t i = 0; i < count;) {
    const std::uint32_t length = lengths[i];
    if (length == 1 && (model.has_hmm() || is_alnum(*p))) {
      if (waiting++ == 0) buffer = p;
      p += width(*p);
      ++i;
      continue;
    }
    flush(i);
    const unsigned char* const begin = p;
    i += length;
    for (std::uint32_t k = 0; k < length; ++k) p += width(*p);
    emit(begin, static_cast<std::size_t>(p - begin));
  }
  flush(count);
}

}  // namespace zh

// emit(begin, length) for every token of the text, white space included, as jieba.lcut() gives them. Bytes that are
// part of no code point are tokens of their own. False, with the rest of the text not cut, where there is no memory.
template <class Emit>
static bool zh_cut(const ZhModel& model, const unsigned char* text, std::size_t size, ZhWork& work,
                   const Emit& emit) noexcept {
  const unsigned char* p = text;
  const unsigned char* const end = text + size;
  while (p < end) {
    const unsigned char* const begin = p;
    while (p < end) {
      if (*p < 0x80 ? !zh::is_word_ascii(*p) : zh::han_at(p, end) == 0) break;
      p += zh::width(*p);
    }
    if (p > begin) {
      if (!work.reserve(static_cast<std::size_t>(p - begin))) return false;
      std::uint16_t* const codes = work.codes();
      std::size_t count = 0;
      for (const unsigned char* q = begin; q < p; q += zh::width(*q))
        codes[count++] = model.code(*q < 0x80 ? *q : (q[0] & 0x0fu) << 12 | (q[1] & 0x3fu) << 6 | (q[2] & 0x3fu));
      codes[count] = 0;  // read by a prefetch alone
      zh::cut_run(model, begin, count, work, emit);
    }
    if (p == end) break;
    std::uint32_t code = 0;
    unsigned subpart = 1;
    std::size_t length = std::max(decode(p, end, &code, &subpart), 1u);
    if (*p == '\r' && end - p > 1 && p[1] == '\n') length = 2;
    emit(p, length);
    p += length;
  }
  return true;
}

}  // namespace fastops
#endif
