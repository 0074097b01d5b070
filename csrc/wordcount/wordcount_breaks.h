// SPDX-License-Identifier: BSD-3-Clause
// Words by the boundaries of UAX #29: segments that hold a letter or a digit. Rules are named as in the annex.
// A boundary stands before and after every line feed, so that text may be cut there.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_BREAKS_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_BREAKS_H

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "wordcount/wordcount_utf8.h"

// What is here is static: a file compiled once per level keeps its own copy.
namespace fastops {

// Values of Word_Break; the order is that of CLASSES in _word_break.py.
enum class BreakClass : std::uint8_t {
  kOther,
  kCr,
  kLf,
  kNewline,
  kExtend,
  kFormat,
  kZwj,
  kSpace,
  kLetter,
  kHebrew,
  kNumeric,
  kKatakana,
  kExtendNumLet,
  kMidLetter,
  kMidNum,
  kMidNumLet,
  kSingleQuote,
  kDoubleQuote,
  kFlag,
};
static constexpr std::uint8_t kBreakClassBits = 0x1f;
static constexpr std::uint8_t kBreakEmoji = 0x20;  // Extended_Pictographic
static constexpr std::uint8_t kBreakAlnum = 0x40;  // str.isalnum() of the running Python

// classes[pages[c >> 8] * 256 + (c & 255)] is the class of code point c with the two bits above.
struct BreakTable {
  const std::uint16_t* pages;  // 0x1100
  const std::uint8_t* classes;
};

namespace breaks {

using Class = BreakClass;

static constexpr std::uint32_t set() noexcept { return 0; }
template <class... Rest> static constexpr std::uint32_t set(Class first, Rest... rest) {
  return 1u << static_cast<unsigned>(first) | set(rest...);
}
static constexpr bool in(Class value, std::uint32_t values) {
  return (values >> static_cast<unsigned>(value) & 1u) != 0;
}

static constexpr std::uint32_t kNewlines = set(Class::kCr, Class::kLf, Class::kNewline);
static constexpr std::uint32_t kIgnored = set(Class::kExtend, Class::kFormat, Class::kZwj);
static constexpr std::uint32_t kLetters = set(Class::kLetter, Class::kHebrew);
static constexpr std::uint32_t kMidLetters = set(Class::kMidLetter, Class::kMidNumLet, Class::kSingleQuote);
static constexpr std::uint32_t kMidNumbers = set(Class::kMidNum, Class::kMidNumLet, Class::kSingleQuote);
static constexpr std::uint32_t kAsciiWord = set(Class::kLetter, Class::kNumeric, Class::kExtendNumLet);

// What joins a character of class `one` whatever follows: WB5, WB8 to WB10, WB13 to WB13b.
static constexpr std::uint32_t joins(Class one) {
  switch (one) {
    case Class::kLetter:
    case Class::kHebrew:
    case Class::kNumeric:
      return kLetters | set(Class::kNumeric, Class::kExtendNumLet);
    case Class::kKatakana:
      return set(Class::kKatakana, Class::kExtendNumLet);
    case Class::kExtendNumLet:
      return kLetters | set(Class::kNumeric, Class::kKatakana, Class::kExtendNumLet);
    default:
      return 0;
  }
}

// What must follow for `after` to join `one`: WB6, WB7b, WB12, and with them WB7, WB7c, WB11.
static constexpr std::uint32_t wanted_next(Class one, Class after) {
  if (in(one, kLetters) && in(after, kMidLetters)) return kLetters;
  if (one == Class::kHebrew && after == Class::kDoubleQuote) return set(Class::kHebrew);
  if (one == Class::kNumeric && in(after, kMidNumbers)) return set(Class::kNumeric);
  return 0;
}

static inline Class class_of(std::uint8_t bits) { return static_cast<Class>(bits & kBreakClassBits); }

// Class and bits of the code point at p; a byte that is no part of one stands alone.
static inline std::uint8_t bits_at(const BreakTable& table, const unsigned char* p, const unsigned char* end,
                                   std::size_t* length) noexcept {
  std::uint32_t code = 0;
  unsigned subpart = 1;
  *length = decode(p, end, &code, &subpart);
  if (*length == 0) {
    *length = 1;
    return 0;
  }
  return table.classes[std::size_t{table.pages[code >> 8]} * 256 + (code & 255)];
}

// The end of the segment that is known up to p: `last` are the bits of the character before p, `one` the class of the
// last one that WB4 does not skip. `alnum` gathers bits of the rest.
static inline const unsigned char* segment_end(const BreakTable& table, const unsigned char* p,
                                               const unsigned char* end, std::uint8_t last, Class one,
                                               std::uint8_t* alnum) noexcept {
  bool odd = one == Class::kFlag;  // the number of regional indicators that end here
  while (p < end) {
    std::size_t length;
    const std::uint8_t bits = bits_at(table, p, end, &length);
    const Class before = class_of(last), after = class_of(bits);
    const bool emoji = before == Class::kZwj && (bits & kBreakEmoji) != 0;  // WB3c
    if (!emoji && in(after, kIgnored)) {                                    // WB4
      *alnum |= bits;
      last = bits;
      p += length;
      continue;
    }
    const bool spaces = before == Class::kSpace && after == Class::kSpace;  // WB3d
    if (in(after, joins(one)) || emoji || spaces) {
      odd = false;
    } else if (odd && after == Class::kFlag) {  // WB15, WB16
      odd = false;
    } else {
      const std::uint32_t wanted = wanted_next(one, after);
      if (wanted == 0) return p;  // WB3b, WB999
      std::uint8_t passed = 0, next = 0;
      std::size_t step = 0;
      const unsigned char* q = p + length;
      for (; q < end; q += step) {
        next = bits_at(table, q, end, &step);
        if (!in(class_of(next), kIgnored)) break;
        passed |= next;
      }
      if (q < end && in(class_of(next), wanted)) {
        *alnum |= static_cast<std::uint8_t>(bits | passed | next);
        last = next;
        one = class_of(next);
        p = q + step;
        continue;
      }
      if (one != Class::kHebrew || after != Class::kSingleQuote) return p;  // WB7a
    }
    *alnum |= bits;
    last = bits;
    one = after;
    p += length;
  }
  return p;
}

static constexpr std::uint64_t bytes_of(unsigned char byte) { return 0x0101010101010101u * byte; }
static constexpr std::uint64_t kTop = bytes_of(0x80);

// Eight bytes of ASCII as one integer; the top bit of each byte of the result answers for that byte. No sum carries
// into the next byte, since all are below 0x80.
static inline std::uint64_t word_bytes(std::uint64_t ascii) noexcept {
  const std::uint64_t lower = ascii | bytes_of(0x20);
  const std::uint64_t letters = (lower + bytes_of(0x80 - 'a')) & ~(lower + bytes_of(0x80 - 'z' - 1));
  const std::uint64_t digits = (ascii + bytes_of(0x80 - '0')) & ~(ascii + bytes_of(0x80 - '9' - 1));
  return letters | digits | ~((ascii ^ bytes_of('_')) + bytes_of(0x7f));
}
// ' , . : ;
static inline std::uint64_t middle_bytes(std::uint64_t ascii) noexcept {
  const std::uint64_t quote = (ascii ^ bytes_of('\'')) + bytes_of(0x7f);
  const std::uint64_t comma = ((ascii | bytes_of(2)) ^ bytes_of('.')) + bytes_of(0x7f);
  const std::uint64_t colon = ((ascii | bytes_of(1)) ^ bytes_of(';')) + bytes_of(0x7f);
  return ~(quote & comma & colon);
}
// The top bits side by side, that of the lowest byte first.
static inline std::uint64_t gather(std::uint64_t bytes) noexcept {
  return ((bytes & kTop) >> 7) * 0x0102040810204080u >> 56;
}

// 64 bytes at a time: bits of those that are in ASCII words, and of those where more than ASCII words must be thought
// of: bytes that are not ASCII, a byte before one that is no part of a word, and what may join two words.
struct AsciiBlock {
  static constexpr std::size_t kSize = 64;
  std::uint64_t words = 0, other = 0;

  // Reads kSize + 1 bytes.
  explicit AsciiBlock(const unsigned char* p) noexcept {
    std::uint64_t middle = 0, foreign = 0;
    for (unsigned k = 0; k < 8; ++k) {
      std::uint64_t w;
      std::memcpy(&w, p + 8 * k, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
      w = __builtin_bswap64(w);
#endif
      words |= gather(word_bytes(w & ~kTop) & ~w) << 8 * k;
      middle |= gather(middle_bytes(w & ~kTop) & ~w) << 8 * k;
      foreign |= gather(w) << 8 * k;
    }
    const unsigned char next = p[kSize];
    const bool word = is_word(next);
    other = foreign | (~words & (foreign >> 1 | std::uint64_t{next >= 0x80} << 63)) |
            (middle & (words >> 1 | std::uint64_t{word} << 63));
  }
  static bool is_word(unsigned char c) noexcept {
    return (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z') || c == '_';
  }
};

// Emits words up to the first place where they are not plain, and returns where to go on: the begin of a segment.
// `until` tells how far to go there without a further try.
template <class Emit>
static const unsigned char* ascii_words(const unsigned char* p, const unsigned char* end, const Emit& emit,
                                        const unsigned char** until) noexcept {
  constexpr std::size_t kSize = AsciiBlock::kSize, kFewest = 16;
  while (static_cast<std::size_t>(end - p) >= kFewest) {
    const std::size_t left = static_cast<std::size_t>(end - p), size = left < kSize ? left : kSize;
    unsigned char last_block[kSize + 1];
    if (left <= kSize) {
      std::memset(last_block, 0, sizeof last_block);
      std::memcpy(last_block, p, left);
    }
    const AsciiBlock block(left <= kSize ? last_block : p);
    const std::uint64_t before = (block.other & (~block.other + 1)) - 1;  // all bits where there is no other
    std::uint64_t begins = block.words & ~(block.words << 1);
    for (std::uint64_t ends = ~block.words & block.words << 1 & before; ends != 0; ends &= ends - 1) {
      const unsigned char* const word = p + __builtin_ctzll(begins);
      const unsigned char* const stop = p + __builtin_ctzll(ends);
      begins &= begins - 1;
      const unsigned char* first = word;
      while (first < stop && *first == '_') ++first;  // "_" alone is no word
      if (first < stop) emit(word, static_cast<std::size_t>(stop - word));
    }
    begins &= before;  // a word that goes on after the block, or ends at other
    *until = p + size;
    if (block.other != 0) return p + __builtin_ctzll(begins != 0 ? begins : block.other);
    if ((begins & 1) != 0) return p;
    p += begins != 0 ? static_cast<std::size_t>(__builtin_ctzll(begins)) : size;
  }
  *until = end;
  return p;
}

}  // namespace breaks

// emit(begin, length) for every word of the text: UTF-8, in which bytes that are part of no code point stand alone.
template <class Emit>
static void unicode_words(const BreakTable& table, const unsigned char* text, std::size_t size,
                          const Emit& emit) noexcept {
  using breaks::Class;
  using breaks::class_of;
  using breaks::in;
  const std::uint8_t* const ascii = table.classes + std::size_t{table.pages[0]} * 256;
  const unsigned char* p = text;
  const unsigned char* const end = text + size;
  const unsigned char* until = text;
  while (p < end) {
    if (p >= until) {
      if (*p < 0x80) {
        p = breaks::ascii_words(p, end, emit, &until);
        if (p == end) return;
        while (*p == ' ' && p > text && p[-1] == ' ') --p;  // WB3d
      } else {
        until = p + std::min<std::size_t>(breaks::AsciiBlock::kSize, static_cast<std::size_t>(end - p));
      }
    }
    const unsigned char* const begin = p;
    std::uint8_t last, alnum = 0;
    if (*p < 0x80) {
      last = ascii[*p];
      if (in(class_of(last), breaks::kAsciiWord)) {
        for (;; ++p) {
          for (; p < end && *p < 0x80 && in(class_of(ascii[*p]), breaks::kAsciiWord); ++p) alnum |= ascii[*p];
          last = ascii[p[-1]];
          if (end - p < 2 || *p >= 0x80 || p[1] >= 0x80) break;
          const std::uint32_t wanted = breaks::wanted_next(class_of(last), class_of(ascii[*p]));
          if (!in(class_of(ascii[p[1]]), wanted)) break;
        }
        const bool open = p < end && (*p >= 0x80 || (end - p > 1 && p[1] >= 0x80));
        if (open) p = breaks::segment_end(table, p, end, last, class_of(last), &alnum);
        if ((alnum & kBreakAlnum) != 0) emit(begin, static_cast<std::size_t>(p - begin));
        continue;
      }
      ++p;
      if (in(class_of(last), breaks::kNewlines)) continue;  // WB3, WB3a: none of them is in a word
      if (class_of(last) == Class::kSpace)
        while (p < end && *p == ' ') ++p;  // WB3d
      if (p == end || *p < 0x80) continue;
    } else {
      std::size_t length;
      last = breaks::bits_at(table, p, end, &length);
      alnum = last;
      p += length;
      if (in(class_of(last), breaks::kNewlines)) continue;
    }
    p = breaks::segment_end(table, p, end, last, class_of(last), &alnum);
    if ((alnum & kBreakAlnum) != 0) emit(begin, static_cast<std::size_t>(p - begin));
  }
}

}  // namespace fastops
#endif
