// SPDX-License-Identifier: BSD-3-Clause
// Case mapping as CPython's str.lower and str.casefold do it, and the places where a text may be cut.
#include "wordcount/wordcount_text.h"

#include <cstring>

#include "wordcount/wordcount_breaks.h"
#include "wordcount/wordcount_zh.h"

namespace fastops {
namespace {

constexpr std::uint32_t kSigma = 0x3a3, kSmallSigma = 0x3c3, kFinalSigma = 0x3c2;

// The class of the nearest code point before `p` that is not ignorable; 0 at the beginning.
std::uint8_t class_before(const fastops_word_rule& rule, const std::uint8_t* begin, const std::uint8_t* p) noexcept {
  while (p > begin) {
    const std::uint8_t* q = p - 1;
    while (q > begin && (*q & 0xc0) == 0x80 && p - q < 4) --q;
    std::uint32_t code = 0;
    unsigned subpart = 1;
    const unsigned length = decode(q, p, &code, &subpart);
    if (length == 0 || q + length != p) return 0;  // an invalid byte has no case
    const std::uint8_t found = char_class(rule, code);
    if ((found & kCharIgnorable) == 0) return found;
    p = q;
  }
  return 0;
}

std::uint8_t class_after(const fastops_word_rule& rule, const std::uint8_t* p, const std::uint8_t* end) noexcept {
  while (p < end) {
    std::uint32_t code = 0;
    unsigned subpart = 1;
    const unsigned length = decode(p, end, &code, &subpart);
    if (length == 0) {
      if (rule.errors != FASTOPS_ERRORS_IGNORE) return 0;
      p += subpart;
      continue;
    }
    const std::uint8_t found = char_class(rule, code);
    if ((found & kCharIgnorable) == 0) return found;
    p += length;
  }
  return 0;
}

// The case mapping of one code point; `begin` .. `out` is what was written before it.
std::uint8_t* map_case(const fastops_word_rule& rule, std::uint32_t code, std::uint8_t* out) noexcept {
  const std::int32_t mapped = rule.cases[std::size_t{rule.case_pages[code >> 8]} * 256 + (code & 255)];
  if (mapped >= 0) return encode(out, code ^ static_cast<std::uint32_t>(mapped));
  const std::uint32_t* several = rule.case_several + static_cast<std::size_t>(-(mapped + 1));
  for (std::uint32_t i = 0; i < several[0]; ++i) out = encode(out, several[1 + i]);
  return out;
}

bool is_plain_space(std::uint8_t c) noexcept { return c == ' ' || c == '\t' || c == '\n' || c == '\v' || c == '\f'; }

// Whether a boundary of UAX #29 stands between the two characters whatever stands around them.
bool always_breaks(BreakClass left, BreakClass right) noexcept {
  using breaks::Class;
  using breaks::in;
  constexpr std::uint32_t pairs = breaks::set(Class::kSpace, Class::kFlag);  // WB3d, WB15
  if (in(left, breaks::kIgnored) || in(right, breaks::kIgnored) || (left == right && in(left, pairs))) return false;
  if (in(right, breaks::joins(left)) || breaks::wanted_next(left, right) != 0) return false;
  // What joins the two may stand before them: WB7, WB7c, WB11.
  return !(in(left, breaks::kMidLetters) && in(right, breaks::kLetters)) &&
         !(left == Class::kDoubleQuote && right == Class::kHebrew) &&
         !(in(left, breaks::kMidNumbers) && right == Class::kNumeric);
}

bool in_zh_run(std::uint32_t code) noexcept {
  return code < 0x80 ? zh::is_word_ascii(static_cast<unsigned char>(code)) : code >= kFirstHan && code <= kLastHan;
}

// Whether the text may be cut before p, which begin < p < end, by what stands beside.
bool may_cut(const fastops_word_rule& rule, const std::uint8_t* begin, const std::uint8_t* p,
             const std::uint8_t* end) noexcept {
  if ((*p & 0xc0) == 0x80) return false;
  std::uint32_t here = 0, before = 0;
  unsigned subpart = 1;
  if (decode(p, end, &here, &subpart) == 0) return false;
  const std::uint8_t* q = p - 1;
  while (q > begin && (*q & 0xc0) == 0x80 && p - q < 4) --q;
  const unsigned length = decode(q, p, &before, &subpart);
  if (length == 0 || q + length != p || before == '\r') return false;
  const std::uint8_t left = char_class(rule, before), right = char_class(rule, here);
  if (rule.lowercase == FASTOPS_CASE_UNICODE) {
    // No sigma may see anything across: it stops at a character that is not ignorable, and to find one without a case
    // is to find nothing.
    constexpr std::uint8_t seen = kCharCased | kCharIgnorable;
    const bool sigma = before == kSigma || here == kSigma;
    if ((left & seen) != 0 && (right & seen) != 0 && (sigma || ((left | right) & kCharIgnorable) != 0)) return false;
  }
  // A mapped character may become one of another kind.
  const auto stays = [&](std::uint32_t code) noexcept {
    const bool maps = rule.lowercase == FASTOPS_CASE_UNICODE || rule.lowercase == FASTOPS_CASE_FOLD;
    return !maps || rule.cases[std::size_t{rule.case_pages[code >> 8]} * 256 + (code & 255)] == 0;
  };
  switch (rule.tokenizer) {
    case FASTOPS_WORDS_WHITESPACE:
      return (left & kCharSpace) != 0;
    case FASTOPS_WORDS_WORD:
      return (left & kCharWord) == 0 && stays(before);
    case FASTOPS_WORDS_CHAR:
      return true;
    case FASTOPS_WORDS_UNICODE: {
      const auto kind = [&](std::uint32_t code) noexcept {
        return breaks::class_of(rule.break_classes[std::size_t{rule.break_pages[code >> 8]} * 256 + (code & 255)]);
      };
      return always_breaks(kind(before), kind(here));
    }
    default:
      return (!in_zh_run(before) && stays(before)) || (!in_zh_run(here) && stays(here));
  }
}

}  // namespace

bool begins_with_mark(const std::uint8_t* data, std::size_t size, std::size_t* skipped) noexcept {
  *skipped = size >= 3 && std::memcmp(data, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
  // UTF-16 either way round, UTF-32 the big way; the little one begins as UTF-16 does.
  if (size >= 2 && ((data[0] == 0xfe && data[1] == 0xff) || (data[0] == 0xff && data[1] == 0xfe))) return true;
  return size >= 4 && std::memcmp(data, "\0\0\xfe\xff", 4) == 0;
}

std::ptrdiff_t rewrite(const fastops_word_rule& rule, const std::uint8_t* text, std::size_t size, std::uint8_t* to,
                       std::size_t* place, std::size_t until) noexcept {
  const std::uint8_t* const end = text + size;
  const bool maps = rule.lowercase == FASTOPS_CASE_UNICODE || rule.lowercase == FASTOPS_CASE_FOLD;
  std::uint8_t* out = to;
  for (const std::uint8_t* p = text; p < end;) {
    const std::uint8_t* const here = p;
    std::uint32_t code = 0;
    unsigned subpart = 1;
    const unsigned length = decode(p, end, &code, &subpart);
    p += length == 0 ? subpart : length;
    if (length == 0) {
      switch (rule.errors) {
        case FASTOPS_ERRORS_STRICT:
          *place = static_cast<std::size_t>(here - text);
          return -1;
        case FASTOPS_ERRORS_REPLACE:
          out = encode(out, 0xfffd);
          break;
        case FASTOPS_ERRORS_IGNORE:
          break;
        default:
          // Python escapes byte by byte; the bytes of a subpart are each invalid by themselves.
          for (unsigned i = 0; i < subpart; ++i) *out++ = here[i];
      }
    } else if (!maps) {
      for (unsigned i = 0; i < length; ++i) *out++ = here[i];
    } else if (code == kSigma && rule.lowercase == FASTOPS_CASE_UNICODE) {
      // At the end of a word and not alone (Unicode 15, section 3.13, Final_Sigma). What stands before is asked of what
      // was written: mapping keeps whether a character has a case.
      const bool final =
          (class_before(rule, to, out) & kCharCased) != 0 && (class_after(rule, p, end) & kCharCased) == 0;
      out = encode(out, final ? kFinalSigma : kSmallSigma);
    } else {
      out = map_case(rule, code, out);
    }
    if (static_cast<std::size_t>(out - to) > until) {
      *place = static_cast<std::size_t>(here - text);
      break;
    }
  }
  return out - to;
}

std::size_t safe_cut(const fastops_word_rule& rule, const std::uint8_t* text, std::size_t size,
                     bool anywhere) noexcept {
  for (std::size_t n = size; n > 0; --n)
    if (text[n - 1] == '\n') return n;
  // In UAX #29 marks stand on a space as on a letter.
  const bool marks = rule.tokenizer == FASTOPS_WORDS_UNICODE;
  for (std::size_t n = size; n > 0; --n)
    if (is_plain_space(text[n - 1]) && (!marks || (n < size && may_cut(rule, text, text + n, text + size)))) return n;
  if (!anywhere || size < 8) return 0;
  // The last bytes may be the beginning of a code point that is not whole.
  for (std::size_t n = size - 4; n > 0; --n)
    if (may_cut(rule, text, text + n, text + size)) return n;
  return 0;
}

}  // namespace fastops
