// SPDX-License-Identifier: BSD-3-Clause
// One code point of UTF-8, by the rule of RFC 3629: no overlong forms, no surrogates, nothing above U+10FFFF.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_UTF8_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_UTF8_H

#include <cstddef>
#include <cstdint>

// What is here is static: a file compiled once per level keeps its own copy.
namespace fastops {

static constexpr std::uint32_t kInvalidByte = 0xffffffff;

// The code point at `p` < `end`, and its length; kInvalidByte and 1 where no valid sequence begins.
static inline std::uint32_t decode_utf8(const unsigned char* p, const unsigned char* end,
                                        std::size_t* length) noexcept {
  const std::uint32_t a = p[0];
  *length = 1;
  if (a < 0x80) return a;
  const auto tail = [](std::uint32_t byte) { return (byte & 0xc0) == 0x80; };
  const std::size_t left = static_cast<std::size_t>(end - p);
  if (a < 0xe0) {
    if (a < 0xc2 || left < 2 || !tail(p[1])) return kInvalidByte;
    *length = 2;
    return (a & 0x1f) << 6 | (p[1] & 0x3fu);
  }
  if (a < 0xf0) {
    if (left < 3 || !tail(p[1]) || !tail(p[2])) return kInvalidByte;
    const std::uint32_t code = (a & 0x0f) << 12 | (p[1] & 0x3fu) << 6 | (p[2] & 0x3fu);
    if (code < 0x800 || (code >= 0xd800 && code < 0xe000)) return kInvalidByte;
    *length = 3;
    return code;
  }
  if (a > 0xf4 || left < 4 || !tail(p[1]) || !tail(p[2]) || !tail(p[3])) return kInvalidByte;
  const std::uint32_t code = (a & 0x07) << 18 | (p[1] & 0x3fu) << 12 | (p[2] & 0x3fu) << 6 | (p[3] & 0x3fu);
  if (code < 0x10000 || code > 0x10ffff) return kInvalidByte;
  *length = 4;
  return code;
}

}  // namespace fastops
#endif
