// SPDX-License-Identifier: BSD-3-Clause
// libFuzzer target of one tokenizer (FASTOPS_FUZZ_TOKENIZER): a text fed in pieces, at once, as a file and as texts
// gives what the scalar model says, whatever the rule, level, threads and memory. The input's first eight bytes choose
// those.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "word_model.h"

namespace {

using model::Result;
constexpr fastops_poll kNoPoll = {nullptr, nullptr};

[[noreturn]] void report(const fastops_word_rule& r, const char* how, const std::string& what) {
  std::fprintf(stderr, "%s: tokenizer %d, case %d, errors %d, lines %d, documents %d, %u-%u-grams, %s: %s\n",
               fastops_get_target(), r.tokenizer, r.lowercase, r.errors, r.lines, r.doc_freq, r.ngram_low, r.ngram_high,
               how, what.c_str());
  std::abort();
}

// Whether the call ended as the model says; then compares and empties the counter.
void compare(const fastops_word_rule& rule, fastops_word_counter* counter, fastops_status status, const Result& wanted,
             const char* how) {
  fastops_words* words = nullptr;
  if (status == FASTOPS_OK) status = fastops_word_counter_finish(counter, kNoPoll, &words);
  if (status == FASTOPS_OK) {
    if (wanted.failure != FASTOPS_WORDS_OK) report(rule, how, "no failure, wanted " + std::to_string(wanted.failure));
    const std::string difference = model::difference(model::contents(words), wanted);
    if (!difference.empty()) report(rule, how, difference);
    fastops_words_destroy(words);
  } else {
    fastops_word_error error{};
    fastops_word_counter_error(counter, &error);
    // A stretch that cannot be cut counts as one token; of two failures either may be met first.
    const bool allowed = error.failure == wanted.failure || error.failure == FASTOPS_WORDS_LONG_TOKEN ||
                         wanted.failure == FASTOPS_WORDS_LONG_TOKEN;
    const bool may_fail = wanted.failure != FASTOPS_WORDS_OK || rule.max_token_bytes < 1000;
    if (status != FASTOPS_INVALID || !allowed || !may_fail)
      report(rule, how, "status " + std::to_string(status) + ", failure " + std::to_string(error.failure));
    if (wanted.failure == error.failure && error.failure == FASTOPS_WORDS_BAD_BYTE && error.offset != wanted.offset)
      report(rule, how, "a bad byte at " + std::to_string(error.offset) + ", wanted " + std::to_string(wanted.offset));
  }
  fastops_word_counter_destroy(counter);
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  model::tables();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  constexpr std::size_t kOptions = 8;
  if (size < kOptions) return 0;
  const std::string text(reinterpret_cast<const char*>(data) + kOptions, size - kOptions);
  fastops_word_rule rule = model::rule(FASTOPS_FUZZ_TOKENIZER, data[0] & 3, data[0] >> 2 & 3, (data[0] >> 4 & 1) != 0);
  rule.doc_freq = data[0] >> 5 & 1;
  rule.ngram_high = 1 + data[1] % 3;
  rule.ngram_low = 1 + (data[1] >> 2) % rule.ngram_high;
  const std::size_t longest[] = {std::size_t{1} << 20, std::size_t{1} << 20, 3, 40};
  rule.max_token_bytes = longest[data[1] >> 4 & 3];
  rule.zh = model::zh((data[1] >> 6 & 1) != 0);
  if (rule.lowercase <= FASTOPS_CASE_ASCII && rule.tokenizer == FASTOPS_WORDS_WHITESPACE && (data[1] >> 7) != 0)
    rule.class_pages = nullptr;
  const unsigned workers = (data[2] & 3) == 3 ? 3 : 1;  // threads take most of the time
  const std::size_t limit = data[2] >> 2 & 1;
  fastops_set_num_threads(workers);
  const char* const level = fastops_compiled_target(data[2] >> 3 & 1);
  if (level != nullptr) fastops_set_target(level);

  Result wanted;
  model::count_text(rule, {}, text, wanted);
  const auto counter = [&] {
    fastops_word_counter* const made = fastops_word_counter_create(&rule, workers, limit, 0);
    if (made == nullptr) report(rule, "made", "no counter");
    return made;
  };
  {
    // Cut after data[3], data[4], ... bytes by turns.
    fastops_word_counter* const c = counter();
    fastops_status status = FASTOPS_OK;
    std::size_t at = 0;
    for (unsigned turn = 3; at < text.size() && status == FASTOPS_OK; turn = turn == 7 ? 3 : turn + 1) {
      const std::size_t n = std::min<std::size_t>(text.size() - at, 1 + data[turn]);
      status = fastops_word_counter_feed(c, text.data() + at, n, kNoPoll);
      at += n;
    }
    if (status == FASTOPS_OK) status = fastops_word_counter_end(c, kNoPoll);
    compare(rule, c, status, wanted, "in pieces");
  }
  if ((data[2] >> 4 & 1) != 0) {
    fastops_word_counter* const c = counter();
    fastops_status status = fastops_word_counter_feed(c, text.data(), text.size(), kNoPoll);
    if (status == FASTOPS_OK) status = fastops_word_counter_end(c, kNoPoll);
    compare(rule, c, status, wanted, "at once");
  }
  if ((data[2] >> 5 & 1) != 0) {
    fastops_word_counter* const c = counter();
    const void* const texts[] = {text.data(), text.data()};
    const std::size_t sizes[] = {text.size(), text.size()};
    Result twice = wanted;
    model::count_text(rule, {}, text, twice);
    compare(rule, c, fastops_word_counter_texts(c, texts, sizes, 2, kNoPoll), twice, "as texts");
  }
  if ((data[2] >> 6 & 1) != 0) {
    static const int file = memfd_create("fuzz", MFD_CLOEXEC);
    if (ftruncate(file, 0) != 0 || pwrite(file, text.data(), text.size(), 0) != ssize_t(text.size())) return 0;
    const bool parts = rule.lines != 0 || (rule.doc_freq == 0 && rule.ngram_high == 1);
    const std::uint64_t middle = parts ? std::min<std::size_t>(data[7], text.size()) : 0;
    fastops_word_counter* const c = counter();
    fastops_status status = FASTOPS_OK;
    if (middle > 0) status = fastops_word_counter_file(c, file, 0, middle, kNoPoll);
    if (status == FASTOPS_OK && (middle < text.size() || middle == 0))
      status = fastops_word_counter_file(c, file, middle, text.size(), kNoPoll);
    compare(rule, c, status, wanted, "as a file");
  }
  return 0;
}
