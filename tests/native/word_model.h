// SPDX-License-Identifier: BSD-3-Clause
// Word counting in scalar code that works on whole texts, for comparison, and small tables of characters in the form of
// those that Python makes. Only the ASCII part is true to Unicode; the rest has a few characters of every kind.
#ifndef FASTOPS_TESTS_WORD_MODEL_H
#define FASTOPS_TESTS_WORD_MODEL_H

#include <cmath>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "fastops/fastops.h"
#include "wordcount/wordcount_zh.h"

namespace model {

using std::size_t;

inline bool among(std::uint32_t c, std::initializer_list<std::uint32_t> ranges) {
  for (const std::uint32_t* p = ranges.begin(); p != ranges.end(); p += 2)
    if (c >= p[0] && c <= p[1]) return true;
  return false;
}
inline bool is_letter(std::uint32_t c) {
  return among(
      c, {'A',   'Z',   'a',    'z',    0xaa,   0xaa,   0xb5,   0xb5,   0xc0,   0xd6,   0xd8,    0xf6,   0xf8,  0x24f,
          0x370, 0x373, 0x388,  0x3ff,  0x400,  0x4ff,  0x1e00, 0x1fff, 0x212a, 0x212a, 0xfb03,  0xfb03, 0x2bc, 0x2bc,
          0x5d0, 0x5ea, 0x30a1, 0x30fa, 0x3041, 0x3096, 0x4e00, 0x9fff, 0xff9e, 0xff9e, 0x1d400, 0x1d7ff});
}
inline bool is_digit(std::uint32_t c) { return among(c, {'0', '9', 0x660, 0x669}); }
inline std::uint8_t char_class(std::uint32_t c) {
  std::uint8_t bits = 0;
  if (among(c, {9, 13, 28, 32, 0x85, 0x85, 0xa0, 0xa0, 0x2000, 0x200a, 0x2028, 0x2029, 0x3000, 0x3000})) bits |= 1;
  if (is_letter(c) || is_digit(c) || c == '_') bits |= 2;
  if (among(c, {'A',   'Z',   'a',   'z',   0xb5,  0xb5,   0xc0,   0xd6,   0xd8,   0xf6,   0xf8,
                0x24f, 0x388, 0x3ff, 0x400, 0x4ff, 0x1e00, 0x1fff, 0x212a, 0x212a, 0xfb03, 0xfb03}))
    bits |= 4;
  if (among(c, {'\'', '\'',  '.',   '.',   ':',   ':',    '^',    '^',    '`',    '`',    0xad,   0xad,    0xb7,
                0xb7, 0x2bc, 0x2bc, 0x300, 0x36f, 0x2019, 0x2019, 0x200b, 0x200f, 0xff9e, 0xff9e, 0xe0001, 0xe0001}))
    bits |= 8;
  return bits;
}

// Word_Break, with the bits of wordcount_breaks.h.
enum Break {
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
  kFlag
};
inline std::uint8_t break_bits(std::uint32_t c) {
  int kind = kOther;
  if (c == '\r')
    kind = kCr;
  else if (c == '\n')
    kind = kLf;
  else if (among(c, {11, 12, 0x85, 0x85, 0x2028, 0x2029}))
    kind = kNewline;
  else if (c == 0x200d)
    kind = kZwj;
  else if (among(c, {0x300, 0x36f, 0xfe0f, 0xfe0f, 0xff9e, 0xff9e, 0x1f3fb, 0x1f3ff}))
    kind = kExtend;
  else if (among(c, {0xad, 0xad, 0x200e, 0x200f, 0xfeff, 0xfeff, 0xe0001, 0xe0001}))
    kind = kFormat;
  else if (c == ' ' || c == 0x3000)
    kind = kSpace;
  else if (among(c, {0x5d0, 0x5ea}))
    kind = kHebrew;
  else if (is_digit(c))
    kind = kNumeric;
  else if (among(c, {0x30a1, 0x30fa}))
    kind = kKatakana;
  else if (c == '_' || c == 0x202f)
    kind = kExtendNumLet;
  else if (c == ':' || c == 0xb7)
    kind = kMidLetter;
  else if (c == ',' || c == ';')
    kind = kMidNum;
  else if (c == '.' || c == 0x2019)
    kind = kMidNumLet;
  else if (c == '\'')
    kind = kSingleQuote;
  else if (c == '"')
    kind = kDoubleQuote;
  else if (among(c, {0x1f1e6, 0x1f1ff}))
    kind = kFlag;
  else if (is_letter(c) && !among(c, {0x3041, 0x3096, 0x4e00, 0x9fff}))
    kind = kLetter;
  std::uint8_t bits = std::uint8_t(kind);
  if (among(c, {0xa9, 0xa9, 0x2764, 0x2764, 0x1f300, 0x1f3fa, 0x1f400, 0x1f64f})) bits |= 0x20;
  if (is_letter(c) || is_digit(c)) bits |= 0x40;
  return bits;
}

inline std::vector<std::uint32_t> lower(std::uint32_t c, bool fold) {
  if (fold) switch (c) {
      case 0xdf:
        return {'s', 's'};
      case 0x149:
        return {0x2bc, 'n'};
      case 0x345:
        return {0x3b9};
      case 0x390:
        return {0x3b9, 0x308, 0x301};
      case 0x3c2:
        return {0x3c3};
      case 0xfb03:
        return {'f', 'f', 'i'};
      case 0x1f80:
        return {0x1f00, 0x3b9};
      default:
        break;
    }
  if (c == 0x130) return {'i', 0x307};
  if (c == 0x1e9e) return {0xdf};
  if (c == 0x212a) return {'k'};
  if (among(c, {'A', 'Z', 0xc0, 0xd6, 0xd8, 0xde, 0x391, 0x3a9, 0x410, 0x42f})) return {c + 32};
  return {c};
}

template <class T> struct Stages {
  std::vector<std::uint16_t> pages;
  std::vector<T> values;
  template <class F> explicit Stages(const F& f) {
    std::map<std::vector<T>, std::uint16_t> known;
    for (std::uint32_t page = 0; page < 0x1100; ++page) {
      // Planes beyond the second have tags alone.
      const bool same = page > 0x1ff && page != 0xe00;
      std::vector<T> row(256, f(page * 256));
      for (std::uint32_t i = 1; i < 256 && !same; ++i) row[i] = f(page * 256 + i);
      const auto [at, added] = known.emplace(row, std::uint16_t(known.size()));
      if (added) values.insert(values.end(), row.begin(), row.end());
      pages.push_back(at->second);
    }
  }
};
struct Tables {
  std::vector<std::uint32_t> several[2];
  Stages<std::uint8_t> classes{char_class}, breaks{break_bits};
  Stages<std::int32_t> cases[2] = {Stages<std::int32_t>(CaseOf{this, 0}), Stages<std::int32_t>(CaseOf{this, 1})};
  struct CaseOf {
    Tables* tables;
    int fold;
    std::int32_t operator()(std::uint32_t c) const {
      const std::vector<std::uint32_t> to = lower(c, fold == 1);
      if (to.size() == 1) return std::int32_t(c ^ to[0]);
      std::vector<std::uint32_t>& several = tables->several[fold];
      const auto at = std::int32_t(several.size());
      several.push_back(std::uint32_t(to.size()));
      several.insert(several.end(), to.begin(), to.end());
      return ~at;
    }
  };
};
inline const Tables& tables() {
  static const Tables made;
  return made;
}

// A dictionary of a few words over few ideographs, so that their ends overlap; equal frequencies make ties.
inline const std::map<std::string, std::uint32_t>& dictionary() {
  static const std::map<std::string, std::uint32_t> words = {{"一", 1},  {"一丁", 2}, {"丁七", 2},   {"一丁七", 1},
                                                             {"七", 3},  {"七七", 1}, {"七七七", 1}, {"丁七一一", 1},
                                                             {"C++", 2}, {"a一", 3},  {"一.", 1}};
  return words;
}
inline const std::vector<double>& weights() {
  static const std::vector<double> values = {std::log(1.0 / 64), std::log(1.0 / 64), std::log(8.0 / 64),
                                             std::log(2.0 / 64)};
  return values;
}
inline const fastops_zh_model* zh(bool hmm) {
  const auto make = [](bool with) {
    std::string words;
    std::vector<std::uint32_t> numbers;
    for (const auto& [word, number] : dictionary()) {
      words += word + '\n';
      numbers.push_back(number);
    }
    fastops::ZhHmm h{};
    if (with) {
      for (int i = 0; i < 4; ++i) {
        h.start[i] = i == 0 || i == 3 ? -0.7 : -1e100;
        for (int j = 0; j < 4; ++j) h.trans[i][j] = -0.5 - 0.25 * ((i * 5 + j * 3) % 7);
      }
      h.emit.resize(std::size_t{fastops::kHanCount} * 4);
      for (size_t i = 0; i < h.emit.size(); ++i) h.emit[i] = -1.0 - double(i * 7 % 13) / 8;
      h.split = {"丁丁"};
    }
    return new fastops::ZhModel(words.data(), words.size(), numbers.data(), numbers.size(), weights(), with, h);
  };
  static const fastops::ZhModel* const made[2] = {make(false), make(true)};
  return reinterpret_cast<const fastops_zh_model*>(made[hmm]);
}

inline fastops_word_rule rule(int tokenizer, int lowercase = FASTOPS_CASE_KEEP, int errors = FASTOPS_ERRORS_REPLACE,
                              bool lines = false) {
  const Tables& all = tables();
  fastops_word_rule r{};
  r.tokenizer = tokenizer;
  r.lowercase = lowercase;
  r.errors = errors;
  r.lines = lines;
  r.ngram_low = r.ngram_high = 1;
  r.max_token_bytes = size_t{1} << 20;
  r.class_pages = all.classes.pages.data();
  r.classes = all.classes.values.data();
  const bool fold = lowercase == FASTOPS_CASE_FOLD;
  r.case_pages = all.cases[fold].pages.data();
  r.cases = all.cases[fold].values.data();
  r.case_several = all.several[fold].data();
  r.break_pages = all.breaks.pages.data();
  r.break_classes = all.breaks.values.data();
  r.zh = zh(false);
  return r;
}

// A decoded character; an invalid byte that stays ("surrogateescape") is 0x110000 and the byte.
struct Char {
  std::uint32_t code;
  std::string bytes;
};
constexpr std::uint32_t kEscaped = 0x110000;

inline std::string encoded(std::uint32_t c) {
  std::string s;
  if (c >= kEscaped) return std::string(1, char(c - kEscaped));
  if (c < 0x80) return std::string(1, char(c));
  int more = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
  s += char((0xf0 << (3 - more)) | c >> 6 * more);
  while (more-- > 0) s += char(0x80 | (c >> 6 * more & 63));
  return s;
}
// Whether the bytes begin some valid sequence (Unicode, table 3-7).
inline bool begins(const unsigned char* p, size_t n) {
  if (p[0] < 0xc2 || p[0] > 0xf4) return p[0] < 0x80 && n == 1;
  if (n > (p[0] < 0xe0 ? 2u : p[0] < 0xf0 ? 3u : 4u)) return false;
  for (size_t i = 1; i < n; ++i)
    if (p[i] < 0x80 || p[i] > 0xbf) return false;
  if (n < 2) return true;
  return !(p[0] == 0xe0 && p[1] < 0xa0) && !(p[0] == 0xed && p[1] > 0x9f) && !(p[0] == 0xf0 && p[1] < 0x90) &&
         !(p[0] == 0xf4 && p[1] > 0x8f);
}

struct Result {
  std::map<std::string, std::pair<std::uint64_t, std::uint64_t>> counts;
  std::uint64_t documents = 0;
  int failure = FASTOPS_WORDS_OK;
  std::uint64_t offset = 0;  // of an invalid byte
};

inline std::vector<Char> decode(const fastops_word_rule& r, const std::string& text, size_t at, Result& result) {
  std::vector<Char> chars;
  while (at < text.size()) {
    const auto* p = reinterpret_cast<const unsigned char*>(text.data()) + at;
    size_t n = 0;
    while (n < text.size() - at && begins(p, n + 1)) ++n;
    const size_t whole = p[0] < 0x80 ? 1 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4;
    if (n == whole) {
      std::uint32_t c = n == 1 ? p[0] : p[0] & (0x7f >> n);
      for (size_t i = 1; i < n; ++i) c = c << 6 | (p[i] & 63);
      chars.push_back({c, std::string(text, at, n)});
    } else {
      n = n == 0 ? 1 : n;
      if (r.errors == FASTOPS_ERRORS_STRICT) {
        result.failure = FASTOPS_WORDS_BAD_BYTE;
        result.offset = at;
        return {};
      }
      if (r.errors == FASTOPS_ERRORS_REPLACE) chars.push_back({0xfffd, encoded(0xfffd)});
      if (r.errors == FASTOPS_ERRORS_ESCAPE)
        for (size_t i = 0; i < n; ++i) chars.push_back({kEscaped + p[i], std::string(text, at + i, 1)});
    }
    at += n;
  }
  return chars;
}

inline std::uint8_t class_of(const fastops_word_rule& r, std::uint32_t c) {
  if (r.class_pages == nullptr) return c == ' ' || (c >= 9 && c <= 13) ? 1 : 2;
  return c >= kEscaped ? 0 : char_class(c);
}

inline std::vector<Char> mapped(const fastops_word_rule& r, const std::vector<Char>& in) {
  if (r.lowercase == FASTOPS_CASE_KEEP) return in;
  std::vector<Char> out;
  for (size_t i = 0; i < in.size(); ++i) {
    const std::uint32_t c = in[i].code;
    if (r.lowercase == FASTOPS_CASE_ASCII || c >= kEscaped) {
      const std::uint32_t to = c >= 'A' && c <= 'Z' ? c + 32 : c;
      out.push_back({to, encoded(to)});
    } else if (c == 0x3a3 && r.lowercase == FASTOPS_CASE_UNICODE) {
      size_t before = i, after = i + 1;
      while (before > 0 && (class_of(r, in[before - 1].code) & 8) != 0) --before;
      while (after < in.size() && (class_of(r, in[after].code) & 8) != 0) ++after;
      const bool final = before > 0 && (class_of(r, in[before - 1].code) & 4) != 0 &&
                         !(after < in.size() && (class_of(r, in[after].code) & 4) != 0);
      out.push_back({final ? 0x3c2u : 0x3c3u, encoded(final ? 0x3c2 : 0x3c3)});
    } else {
      for (const std::uint32_t to : lower(c, r.lowercase == FASTOPS_CASE_FOLD)) out.push_back({to, encoded(to)});
    }
  }
  return out;
}

// Whether a boundary of UAX #29 stands before character i > 0.
inline bool boundary(const std::vector<std::uint8_t>& bits, size_t i) {
  const auto kind = [&](size_t k) { return int(bits[k] & 0x1f); };
  const auto newline = [&](size_t k) { return kind(k) == kCr || kind(k) == kLf || kind(k) == kNewline; };
  const auto skipped = [&](size_t k) { return kind(k) == kExtend || kind(k) == kFormat || kind(k) == kZwj; };
  if (kind(i - 1) == kCr && kind(i) == kLf) return false;          // WB3
  if (newline(i - 1) || newline(i)) return true;                   // WB3a, WB3b
  if (kind(i - 1) == kZwj && (bits[i] & 0x20) != 0) return false;  // WB3c
  if (kind(i - 1) == kSpace && kind(i) == kSpace) return false;    // WB3d
  if (skipped(i)) return false;                                    // WB4
  const auto back = [&](size_t k) {  // the character that the ones of WB4 before k are part of
    do --k;
    while (k > 0 && skipped(k) && !newline(k - 1));
    return k;
  };
  const size_t p = back(i);
  const int one = kind(p), two = kind(i);
  int before = -1, next = -1;
  if (p > 0 && !newline(p - 1)) before = kind(back(p));
  for (size_t k = i + 1; k < bits.size(); ++k)
    if (!skipped(k)) {
      next = kind(k);
      break;
    }
  const auto letter = [](int k) { return k == kLetter || k == kHebrew; };
  const auto mid_letter = [](int k) { return k == kMidLetter || k == kMidNumLet || k == kSingleQuote; };
  const auto mid_number = [](int k) { return k == kMidNum || k == kMidNumLet || k == kSingleQuote; };
  if (letter(one) && letter(two)) return false;                                  // WB5
  if (letter(one) && mid_letter(two) && letter(next)) return false;              // WB6
  if (letter(before) && mid_letter(one) && letter(two)) return false;            // WB7
  if (one == kHebrew && two == kSingleQuote) return false;                       // WB7a
  if (one == kHebrew && two == kDoubleQuote && next == kHebrew) return false;    // WB7b
  if (before == kHebrew && one == kDoubleQuote && two == kHebrew) return false;  // WB7c
  if ((one == kNumeric || letter(one)) && two == kNumeric) return false;         // WB8, WB9
  if (one == kNumeric && letter(two)) return false;                              // WB10
  if (before == kNumeric && mid_number(one) && two == kNumeric) return false;    // WB11
  if (one == kNumeric && mid_number(two) && next == kNumeric) return false;      // WB12
  if (one == kKatakana && two == kKatakana) return false;                        // WB13
  const auto word = [&](int k) { return letter(k) || k == kNumeric || k == kKatakana; };
  if ((word(one) || one == kExtendNumLet) && two == kExtendNumLet) return false;  // WB13a
  if (one == kExtendNumLet && word(two)) return false;                            // WB13b
  if (one != kFlag || two != kFlag) return true;                                  // WB999
  size_t flags = 1;                                                               // WB15, WB16
  for (size_t k = p; k > 0 && kind(k) == kFlag && !newline(k - 1);) {
    k = back(k);
    if (kind(k) != kFlag) break;
    ++flags;
  }
  return flags % 2 == 0;
}

using Tokens = std::vector<std::string>;

inline Tokens unicode_words(const std::vector<Char>& chars) {
  std::vector<std::uint8_t> bits;
  for (const Char& c : chars) bits.push_back(c.code >= kEscaped ? 0 : break_bits(c.code));
  Tokens tokens;
  std::string segment;
  bool kept = false;
  for (size_t i = 0; i < chars.size(); ++i) {
    if (i > 0 && boundary(bits, i)) {
      if (kept) tokens.push_back(segment);
      segment.clear();
      kept = false;
    }
    segment += chars[i].bytes;
    kept = kept || (bits[i] & 0x40) != 0;
  }
  if (kept) tokens.push_back(segment);
  return tokens;
}

// jieba's cut without its hidden Markov model.
inline Tokens zh_words(const std::vector<Char>& chars) {
  const auto ascii = [](std::uint32_t c) { return c < 0x80 && (is_letter(c) || is_digit(c)); };
  const auto in_run = [&](std::uint32_t c) {
    return (c >= 0x4e00 && c <= 0x9fd5) || ascii(c) ||
           (c < 0x80 && c != 0 && std::strchr("+#&._%-", int(c)) != nullptr);
  };
  Tokens tokens;
  for (size_t i = 0; i < chars.size();) {
    size_t stop = i;
    while (stop < chars.size() && in_run(chars[stop].code)) ++stop;
    if (stop == i) {
      const bool pair = chars[i].code == '\r' && i + 1 < chars.size() && chars[i + 1].code == '\n';
      tokens.push_back(chars[i].bytes + (pair ? "\n" : ""));
      i += pair ? 2 : 1;
      continue;
    }
    std::vector<double> score(stop + 1, 0.0);
    std::vector<size_t> end(stop + 1);
    for (size_t k = stop; k-- > i;) {
      bool found = false;
      std::string word;
      for (size_t j = k; j < stop; ++j) {
        word += chars[j].bytes;
        const auto at = dictionary().find(word);
        if (at == dictionary().end()) continue;
        const double s = weights()[at->second] + score[j + 1];
        if (!found || s >= score[k]) {
          score[k] = s;
          end[k] = j + 1;
        }
        found = true;
      }
      if (!found) {
        score[k] = weights()[0] + score[k + 1];
        end[k] = k + 1;
      }
    }
    std::string letters;  // single ones are joined
    for (; i < stop; i = end[i]) {
      if (end[i] == i + 1 && ascii(chars[i].code)) {
        letters += chars[i].bytes;
        continue;
      }
      if (!letters.empty()) tokens.push_back(letters);
      letters.clear();
      std::string word;
      for (size_t k = i; k < end[i]; ++k) word += chars[k].bytes;
      tokens.push_back(word);
    }
    if (!letters.empty()) tokens.push_back(letters);
  }
  return tokens;
}

// With the hidden Markov model: the header's own code over the whole document.
inline Tokens zh_words_at_once(const fastops_word_rule& r, const std::vector<Char>& chars) {
  std::string text;
  for (const Char& c : chars) text += c.bytes;
  fastops::ZhWork work;
  Tokens tokens;
  fastops::zh_cut(*reinterpret_cast<const fastops::ZhModel*>(r.zh), reinterpret_cast<const unsigned char*>(text.data()),
                  text.size(), work,
                  [&](const unsigned char* p, size_t n) { tokens.emplace_back(reinterpret_cast<const char*>(p), n); });
  return tokens;
}

inline Tokens tokenize(const fastops_word_rule& r, const std::vector<Char>& chars) {
  Tokens tokens;
  switch (r.tokenizer) {
    case FASTOPS_WORDS_CHAR:
      for (const Char& c : chars) tokens.push_back(c.bytes);
      return tokens;
    case FASTOPS_WORDS_UNICODE:
      return unicode_words(chars);
    case FASTOPS_WORDS_ZH:
      return r.zh == zh(false) ? zh_words(chars) : zh_words_at_once(r, chars);
    default:
      break;
  }
  bool inside = false;
  for (const Char& c : chars) {
    const std::uint8_t kind = class_of(r, c.code);
    const bool word = r.tokenizer == FASTOPS_WORDS_WORD ? (kind & 2) != 0 : (kind & 1) == 0;
    if (word && !inside) tokens.emplace_back();
    if (word) tokens.back() += c.bytes;
    inside = word;
  }
  return tokens;
}

inline void count_document(const fastops_word_rule& r, const std::set<std::string>& stop_words,
                           const std::vector<Char>& chars, Result& result) {
  ++result.documents;
  Tokens kept;
  for (const std::string& token : tokenize(r, chars)) {
    if (token.size() > r.max_token_bytes) result.failure = FASTOPS_WORDS_LONG_TOKEN;
    if (stop_words.count(token) == 0) kept.push_back(token);
  }
  std::set<std::string> seen;
  for (size_t i = 0; i < kept.size(); ++i) {
    std::string gram;
    for (size_t n = 1; n <= r.ngram_high && i + n <= kept.size(); ++n) {
      gram += (n > 1 && r.tokenizer != FASTOPS_WORDS_CHAR ? " " : "") + kept[i + n - 1];
      if (n < r.ngram_low) continue;
      auto& [count, documents] = result.counts[gram];
      ++count;
      if (r.doc_freq != 0 && seen.insert(gram).second) ++documents;
    }
  }
}

// Adds one whole text.
inline void count_text(const fastops_word_rule& r, const std::set<std::string>& stop_words, const std::string& text,
                       Result& result) {
  if (result.failure != FASTOPS_WORDS_OK) return;
  const std::string four = text.substr(0, 4), two = text.substr(0, 2);
  if (two == "\xff\xfe" || two == "\xfe\xff" || four == std::string("\0\0\xfe\xff", 4)) {
    result.failure = FASTOPS_WORDS_ENCODING;
    return;
  }
  const size_t skipped = text.compare(0, 3, "\xef\xbb\xbf") == 0 ? 3 : 0;
  const std::vector<Char> chars = mapped(r, decode(r, text, skipped, result));
  if (result.failure != FASTOPS_WORDS_OK) return;
  if (r.lines == 0) return count_document(r, stop_words, chars, result);
  std::vector<Char> line;
  for (const Char& c : chars) {
    if (c.code != '\n') {
      line.push_back(c);
      continue;
    }
    if (!line.empty() && line.back().code == '\r') line.pop_back();
    count_document(r, stop_words, line, result);
    line.clear();
  }
  if (!line.empty()) count_document(r, stop_words, line, result);
}

// What a table of the library holds, and whether it is `wanted`; a difference in words, or "".
inline Result contents(const fastops_words* words) {
  fastops_words_info info{};
  fastops_words_describe(words, &info);
  std::vector<size_t> entries(info.entries);
  size_t bytes = 0;
  Result result;
  if (fastops_words_rank(words, info.entries, entries.data(), &bytes, {nullptr, nullptr}) != FASTOPS_OK) return result;
  std::string keys(bytes, '\0');
  std::vector<std::uint64_t> offsets(info.entries + 1), counts(info.entries), documents(info.entries);
  fastops_words_read(words, entries.data(), info.entries, keys.data(), offsets.data(), counts.data(), documents.data());
  for (size_t i = 0; i < info.entries; ++i)
    result.counts[keys.substr(offsets[i], offsets[i + 1] - offsets[i])] = {counts[i], documents[i]};
  result.documents = info.documents;
  return result;
}
inline std::string quoted(const std::string& s) {
  std::string out = "'";
  for (const char c : s.substr(0, 200)) {
    char text[5];
    const auto byte = static_cast<unsigned char>(c);
    std::snprintf(text, sizeof text, byte > 32 && byte < 127 ? "%c" : "\\x%02x", byte);
    out += text;
  }
  return out + "'";
}
inline std::string difference(const Result& got, const Result& wanted) {
  if (got.documents != wanted.documents)
    return std::to_string(got.documents) + " documents, wanted " + std::to_string(wanted.documents);
  for (const auto& [key, pair] : wanted.counts) {
    const auto at = got.counts.find(key);
    const auto found = at == got.counts.end() ? std::pair<std::uint64_t, std::uint64_t>{0, 0} : at->second;
    if (found != pair)
      return quoted(key) + ": " + std::to_string(found.first) + " in " + std::to_string(found.second) + ", wanted " +
             std::to_string(pair.first) + " in " + std::to_string(pair.second);
  }
  for (const auto& [key, pair] : got.counts)
    if (wanted.counts.count(key) == 0) return quoted(key) + ": " + std::to_string(pair.first) + ", wanted none";
  return "";
}

}  // namespace model
#endif
