// SPDX-License-Identifier: BSD-3-Clause
// One code point of UTF-8 as CPython decodes it: no overlong forms, no surrogates, nothing above U+10FFFF.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_UTF8_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_UTF8_H

#include <cstddef>
#include <cstdint>

// What is here is static: a file compiled once per level keeps its own copy.
namespace fastops {

// The length of the maximal subpart (Unicode 15, section 3.9, table 3-7) that begins at p < end, where no valid
// sequence does.
[[maybe_unused]] __attribute__((noinline, cold)) static unsigned maximal_subpart(const std::uint8_t* p,
                                                                                 const std::uint8_t* end) noexcept {
  const std::uint32_t lead = p[0];
  const auto left = static_cast<std::size_t>(end - p);
  if (lead < 0xe0 || lead > 0xf4 || left < 2) return 1;
  const std::uint32_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  const std::uint32_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  if (p[1] < low || p[1] > high) return 1;
  return left < 3 || (p[2] & 0xc0) != 0x80 ? 2 : 3;
}

// Why no valid sequence begins at p < end, in CPython's words: the place in "invalid start byte", "invalid continuation
// byte", "unexpected end of data".
[[maybe_unused]] static inline int why_invalid(const std::uint8_t* p, const std::uint8_t* end) noexcept {
  if (p[0] < 0xc2 || p[0] > 0xf4) return 0;
  return p + maximal_subpart(p, end) == end ? 2 : 1;
}

// Decodes what begins at p < end: its length in bytes and the code point; or 0 and the length of the maximal subpart,
// which errors="replace" turns into one U+FFFD.
static inline unsigned decode(const std::uint8_t* p, const std::uint8_t* end, std::uint32_t* code,
                              unsigned* subpart) noexcept {
  const std::uint32_t lead = p[0];
  if (lead < 0x80) {
    *code = lead;
    return 1;
  }
  const auto left = static_cast<std::size_t>(end - p);
  const auto tail = [p](unsigned i) { return (p[i] & 0xc0) == 0x80; };
  if (lead < 0xe0) {
    if (lead >= 0xc2 && left >= 2 && tail(1)) {
      *code = (lead & 0x1f) << 6 | (p[1] & 0x3fu);
      return 2;
    }
  } else if (lead < 0xf0) {
    if (left >= 3 && tail(1) && tail(2)) {
      *code = (lead & 0xf) << 12 | (p[1] & 0x3fu) << 6 | (p[2] & 0x3fu);
      if (*code >= 0x800 && (*code < 0xd800 || *code >= 0xe000)) return 3;
    }
  } else if (lead <= 0xf4 && left >= 4 && tail(1) && tail(2) && tail(3)) {
    *code = (lead & 7) << 18 | (p[1] & 0x3fu) << 12 | (p[2] & 0x3fu) << 6 | (p[3] & 0x3fu);
    if (*code >= 0x10000 && *code <= 0x10ffff) return 4;
  }
  *subpart = maximal_subpart(p, end);
  return 0;
}

}  // namespace fastops
#endif
