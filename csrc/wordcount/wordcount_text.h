// SPDX-License-Identifier: BSD-3-Clause
// UTF-8 as CPython decodes it, the tables of the running Python, case mapping of a text.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_TEXT_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_TEXT_H

#include <cstddef>
#include <cstdint>

#include "fastops/fastops.h"
#include "wordcount/wordcount_utf8.h"

namespace fastops {

// What the table of classes says of a code point; further bits are not looked at.
enum CharClass : std::uint8_t {
  kCharSpace = 1,      // str.isspace()
  kCharWord = 2,       // \w
  kCharCased = 4,      // has a case, and is not ignored when one looks for what stands beside a sigma
  kCharIgnorable = 8,  // is ignored then
};

inline std::uint8_t* encode(std::uint8_t* to, std::uint32_t code) noexcept {
  if (code < 0x80) {
    *to++ = static_cast<std::uint8_t>(code);
  } else if (code < 0x800) {
    *to++ = static_cast<std::uint8_t>(0xc0 | code >> 6);
    *to++ = static_cast<std::uint8_t>(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    *to++ = static_cast<std::uint8_t>(0xe0 | code >> 12);
    *to++ = static_cast<std::uint8_t>(0x80 | (code >> 6 & 0x3f));
    *to++ = static_cast<std::uint8_t>(0x80 | (code & 0x3f));
  } else {
    *to++ = static_cast<std::uint8_t>(0xf0 | code >> 18);
    *to++ = static_cast<std::uint8_t>(0x80 | (code >> 12 & 0x3f));
    *to++ = static_cast<std::uint8_t>(0x80 | (code >> 6 & 0x3f));
    *to++ = static_cast<std::uint8_t>(0x80 | (code & 0x3f));
  }
  return to;
}

// The class of a code point by the rule's table; without one only ASCII white space is known, and all else is a word.
inline std::uint8_t char_class(const fastops_word_rule& rule, std::uint32_t code) noexcept {
  if (rule.class_pages == nullptr) {
    const bool space = (code >= 9 && code <= 13) || code == 32;
    return space ? kCharSpace : kCharWord;
  }
  return rule.classes[std::size_t{rule.class_pages[code >> 8]} * 256 + (code & 255)];
}

// No text grows by more than this factor: an invalid byte becomes the three of U+FFFD, and no case mapping is worse.
inline constexpr std::size_t kLargestGrowth = 3;

// Whether a text begins with the byte order mark of UTF-16 or UTF-32; *skipped: the bytes of UTF-8's, 0 or 3.
bool begins_with_mark(const std::uint8_t* data, std::size_t size, std::size_t* skipped) noexcept;

// Writes the text as valid UTF-8 (but for "surrogateescape", which leaves bytes alone) with its case mapped, and
// answers its size; -1 where errors="strict" meets an invalid byte, with its place in *place. `to` has room for
// kLargestGrowth * size. Stops at the character that becomes the byte `until` of the result, with its place in *place.
std::ptrdiff_t rewrite(const fastops_word_rule& rule, const std::uint8_t* text, std::size_t size, std::uint8_t* to,
                       std::size_t* place, std::size_t until = static_cast<std::size_t>(-1)) noexcept;

// How many bytes of a text that goes on may be worked on by themselves: up to the last place where no token, no case
// mapping and no pair of line ends can reach over; 0 where there is none. `anywhere` looks past white space too.
std::size_t safe_cut(const fastops_word_rule& rule, const std::uint8_t* text, std::size_t size, bool anywhere) noexcept;

}  // namespace fastops
#endif
