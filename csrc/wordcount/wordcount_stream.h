// SPDX-License-Identifier: BSD-3-Clause
// From the bytes of a text to its tokens: scan, mark what is not ASCII, rewrite where bytes must change, tokenize.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_STREAM_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_STREAM_H

#include "wordcount/wordcount_breaks.h"
#include "wordcount/wordcount_kernels.h"
#include "wordcount/wordcount_sink.h"
#include "wordcount/wordcount_text.h"
#include "wordcount/wordcount_zh.h"

namespace fastops {

// The kernels of the level in force. wordcount_counter.cpp
const WordKernels& word_kernels() noexcept;

template <class Keys> class Stream {
 public:
  Stream(const fastops_word_rule& rule, const Table* stop_words, Keys& keys) noexcept
      : rule_(rule), grams_(rule, stop_words, keys), kernels_(word_kernels()) {}

  // The next bytes of a text, which begin at `offset` of it. Works on as many as it can, all of them where the text
  // ends, and answers how many; less than all also after a failure.
  std::size_t consume(const std::uint8_t* text, std::size_t size, std::uint64_t offset, bool ends) noexcept {
    std::size_t done = 0;
    while (done < size && ok()) {
      std::size_t n = size - done < kPiece ? size - done : kPiece;
      if (done + n < size || !ends) {
        std::size_t cut = safe_cut(rule_, text + done, n, false);
        // A long run without white space: more of it, then any place that is as good.
        while (cut == 0 && done + n < size && n < kAnywhere) {
          n = size - done < 2 * n ? size - done : 2 * n;
          cut = done + n == size && ends ? n : safe_cut(rule_, text + done, n, false);
        }
        if (cut == 0 && n >= kAnywhere) cut = safe_cut(rule_, text + done, n, true);
        while (cut == 0 && done + n < size) {
          n = size - done < 2 * n ? size - done : 2 * n;
          cut = done + n == size && ends ? n : safe_cut(rule_, text + done, n, true);
        }
        if (cut == 0) {
          if (n >= kAnywhere && n > longest_run() + kPiece) fail(FASTOPS_WORDS_LONG_TOKEN, offset + done);
          break;
        }
        n = cut;
      }
      piece(text + done, n, offset + done);
      done += n;
    }
    return done;
  }
  // The text ends; all of it was consumed.
  void end_text() noexcept {
    if (!rule_.lines || line_open_) end_document();
    grams_.flush();
  }
  void token(const std::uint8_t* data, std::size_t size) noexcept {
    if (size > rule_.max_token_bytes)
      fail(FASTOPS_WORDS_LONG_TOKEN, ~std::uint64_t{0});
    else
      grams_.token(data, size);
  }
  void end_document() noexcept {
    ++documents_;
    line_open_ = false;
    grams_.end_document();
  }
  void flush() noexcept { grams_.flush(); }
  // A document of which this stream sees nothing more.
  void count_document() noexcept { ++documents_; }
  void no_memory() noexcept { memory_ = false; }

  bool ok() const noexcept { return status() == FASTOPS_OK; }
  fastops_status status() const noexcept {
    if (error_.failure != FASTOPS_WORDS_OK) return FASTOPS_INVALID;
    return memory_ ? grams_.status() : FASTOPS_NO_MEMORY;
  }
  const fastops_word_error& error() const noexcept { return error_; }
  __attribute__((noinline)) void fail(int failure, std::uint64_t offset, int error_number = 0) noexcept {
    if (ok()) error_ = {failure, error_number, offset};
  }
  std::uint64_t documents() const noexcept { return documents_; }
  void reset() noexcept {
    grams_.forget();
    documents_ = 0;
    line_open_ = false;
    error_ = {};
    memory_ = true;
  }

 private:
#if defined(FASTOPS_TEST_TINY)
  static constexpr std::size_t kPiece = 64, kAnywhere = 128, kLongestRun = 4096;
#else
  static constexpr std::size_t kPiece = std::size_t{1} << 16, kAnywhere = std::size_t{1} << 20;
  static constexpr std::size_t kLongestRun = std::size_t{1} << 26;
#endif
  static constexpr std::size_t kSlack = 64 + kInlineKey;

  // Bytes that may come without a place to cut at. They are one token, but under the tokenizers whose tokens depend on
  // what stands further on: a chapter of Chinese without punctuation, a line of flags.
  std::size_t longest_run() const noexcept {
    const bool tokens = rule_.tokenizer == FASTOPS_WORDS_ZH || rule_.tokenizer == FASTOPS_WORDS_UNICODE;
    return tokens ? std::max(rule_.max_token_bytes, kLongestRun) : rule_.max_token_bytes;
  }

  void piece(const std::uint8_t* text, std::size_t n, std::uint64_t offset) noexcept {
    offset_ = offset;
    text_ = text;
    size_ = n;
    rewritten_ = false;
    std::size_t lines = scan(text, n);
    if (!memory_) return;
    if (any_high(n)) {
      const bool maps = rule_.lowercase == FASTOPS_CASE_UNICODE || rule_.lowercase == FASTOPS_CASE_FOLD;
      std::ptrdiff_t bad = maps ? 0 : mark(n);
      if (bad >= 0) {
        if (!clean_.grow(kLargestGrowth * n + kSlack)) {
          memory_ = false;
          return;
        }
        std::size_t invalid = 0;
        const std::ptrdiff_t size = rewrite(rule_, text, n, clean_.get<std::uint8_t>(), &invalid);
        if (size < 0) {
          fail(FASTOPS_WORDS_BAD_BYTE, offset + invalid,
               text[invalid] | why_invalid(text + invalid, text + size_) << 8);
          return;
        }
        rewritten_ = true;
        n = static_cast<std::size_t>(size);
        lines = scan(clean_.get<std::uint8_t>(), n);
        if (!memory_) return;
        if (any_high(n)) mark(n);
      }
    }
    const auto* const out = out_.get<std::uint8_t>();
    if (n == 0) return;  // nothing but bytes that are left out
    line_open_ = out[n - 1] != '\n';
    switch (rule_.tokenizer) {
      case FASTOPS_WORDS_WHITESPACE:
      case FASTOPS_WORDS_WORD:
        if (rule_.lines && (rule_.doc_freq || rule_.ngram_high > 1)) {
          words<true>(out, n);
        } else {
          words<false>(out, n);
          if (rule_.lines) documents_ += lines;
        }
        break;
      default:
        lines_of(out, n);
    }
  }

  // Copies the text to out_ with its ASCII letters lowered where wanted, and marks words and bytes above ASCII.
  std::size_t scan(const std::uint8_t* text, std::size_t n) noexcept {
    const std::size_t whole = n / 64, blocks = whole + 1;
    if (!out_.grow(blocks * 64 + kSlack) || !words_.grow((blocks + 1) * 8) || !high_.grow((blocks + 1) * 8)) {
      memory_ = false;
      return 0;
    }
    const bool lower = rule_.lowercase != FASTOPS_CASE_KEEP;
    const int kind = rule_.tokenizer == FASTOPS_WORDS_WORD ? kAlphanumeric
                     : rule_.class_pages == nullptr        ? kNotAsciiSpace
                                                           : kNotUnicodeSpace;
    const auto run = kernels_.scan[kind][lower];
    auto* const out = out_.get<std::uint8_t>();
    auto* const words = words_.get<std::uint64_t>();
    auto* const high = high_.get<std::uint64_t>();
    std::uint8_t tail[64];
    std::memset(tail, ' ', sizeof tail);
    if (n % 64 != 0) std::memcpy(tail, text + 64 * whole, n % 64);
    const std::size_t lines = run(text, whole, out, words, high);
    return lines + run(tail, 1, out + 64 * whole, words + whole, high + whole);
  }
  bool any_high(std::size_t n) const noexcept {
    const auto* const high = high_.get<std::uint64_t>();
    std::uint64_t any = 0;
    for (std::size_t b = 0; b <= n / 64; ++b) any |= high[b];
    return any != 0;
  }

  // Takes the bytes of code points that are no word's out of words_. Answers the place of the first byte that is not
  // UTF-8, -1 where there is none or where such bytes stay.
  std::ptrdiff_t mark(std::size_t n) noexcept {
    const auto* const out = out_.get<std::uint8_t>();
    const auto* const end = out + n;
    auto* const words = words_.get<std::uint64_t>();
    const auto* const high = high_.get<std::uint64_t>();
    const bool word = rule_.tokenizer == FASTOPS_WORDS_WORD;
    const std::uint8_t wanted = word ? kCharWord : kCharSpace;
    std::size_t next = 0;  // everything before it is done
    for (std::size_t b = 0; b <= n / 64; ++b) {
      std::uint64_t left = high[b];
      if (next > 64 * b) left = next >= 64 * b + 64 ? 0 : left & ~std::uint64_t{0} << (next - 64 * b);
      while (left != 0) {
        const std::size_t i = 64 * b + static_cast<std::size_t>(__builtin_ctzll(left));
        std::uint32_t code = 0;
        unsigned length = 1, subpart = 1;
        bool in_word = !word;
        length = decode(out + i, end, &code, &subpart);
        if (length == 0) {
          if (rule_.errors != FASTOPS_ERRORS_ESCAPE) return static_cast<std::ptrdiff_t>(i);
          length = subpart;
        } else {
          in_word = ((char_class(rule_, code) & wanted) != 0) == word;
        }
        if (!in_word) {
          const std::uint64_t bits = (std::uint64_t{1} << length) - 1;
          words[b] &= ~(bits << i % 64);
          if (i % 64 + length > 64) words[b + 1] &= ~(bits >> (64 - i % 64));
        }
        next = i + length;
        left = next >= 64 * b + 64 ? 0 : left & ~std::uint64_t{0} << (next - 64 * b);
      }
    }
    return -1;
  }

  __attribute__((always_inline)) bool emit(const std::uint8_t* data, std::size_t size) noexcept {
    if (__builtin_expect(size > rule_.max_token_bytes, 0)) {
      too_long(static_cast<std::size_t>(data - out_.get<std::uint8_t>()));
      return false;
    }
    grams_.token(data, size);
    return true;
  }
  // A token that begins at byte `at` of the piece as it was tokenized.
  __attribute__((noinline, cold)) void too_long(std::size_t at) noexcept {
    std::size_t place = at;
    if (rewritten_) rewrite(rule_, text_, size_, clean_.get<std::uint8_t>(), &place, at);
    fail(FASTOPS_WORDS_LONG_TOKEN, offset_ + place);
  }
  // Documents end at the line ends between words.
  void line_ends(const std::uint8_t* gap, const std::uint8_t* end) noexcept {
    for (; gap < end; ++gap) {
      if (*gap != '\n') continue;
      ++documents_;
      grams_.end_document();
    }
  }

  // Behind the last byte there is no word: one at the end ends there.
  template <bool Lines> void words(const std::uint8_t* out, std::size_t n) noexcept {
    const auto* const marks = words_.get<std::uint64_t>();
    const std::uint8_t *start = out, *gap = out;
    std::uint64_t inside = 0;
    for (std::size_t b = 0; b <= n / 64; ++b) {
      const std::uint64_t word = marks[b];
      // A bit where a word begins, and one after each word.
      std::uint64_t turns = word ^ (word << 1 | inside);
      while (turns != 0) {
        const std::uint8_t* const at = out + 64 * b + __builtin_ctzll(turns);
        turns &= turns - 1;
        if (inside == 0) {
          if constexpr (Lines) line_ends(gap, at);
          start = at;
        } else {
          if (!emit(start, static_cast<std::size_t>(at - start))) return;
          gap = at;
        }
        inside ^= 1;
      }
    }
    if constexpr (Lines) line_ends(gap, out + n);
    grams_.flush();
  }

  void lines_of(const std::uint8_t* p, std::size_t n) noexcept {
    const std::uint8_t* const end = p + n;
    while (p < end && ok()) {
      const auto* const line =
          rule_.lines ? static_cast<const std::uint8_t*>(std::memchr(p, '\n', static_cast<std::size_t>(end - p)))
                      : nullptr;
      if (line == nullptr) {
        tokenize(p, end);
        break;
      }
      tokenize(p, line > p && line[-1] == '\r' ? line - 1 : line);
      ++documents_;
      grams_.end_document();
      p = line + 1;
    }
    grams_.flush();
  }
  void tokenize(const std::uint8_t* p, const std::uint8_t* end) noexcept {
    const auto size = static_cast<std::size_t>(end - p);
    const auto each = [this](const std::uint8_t* token, std::size_t bytes) noexcept {
      if (error_.failure == FASTOPS_WORDS_OK) emit(token, bytes);
    };
    switch (rule_.tokenizer) {
      case FASTOPS_WORDS_UNICODE:
        unicode_words(BreakTable{rule_.break_pages, rule_.break_classes}, p, size, each);
        break;
      case FASTOPS_WORDS_ZH:
        if (!zh_cut(*reinterpret_cast<const ZhModel*>(rule_.zh), p, size, zh_work_, each)) no_memory();
        break;
      default:
        while (p < end) {
          std::uint32_t code = 0;
          unsigned subpart = 1;
          const unsigned length = decode(p, end, &code, &subpart);
          const unsigned bytes = length == 0 ? 1 : length;
          if (length == 0 || bytes > rule_.max_token_bytes || !grams_.code_point(code))
            if (!emit(p, bytes)) return;
          p += bytes;
        }
    }
  }

  const fastops_word_rule& rule_;
  Grams<Keys> grams_;
  const WordKernels& kernels_;
  Region out_, clean_, words_, high_;
  ZhWork zh_work_;
  const std::uint8_t* text_ = nullptr;  // the piece, as it came
  std::size_t size_ = 0;
  std::uint64_t documents_ = 0, offset_ = 0;
  fastops_word_error error_{};
  bool line_open_ = false, rewritten_ = false, memory_ = true;
};

}  // namespace fastops
#endif
