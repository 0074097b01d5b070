// SPDX-License-Identifier: BSD-3-Clause
// Texts cut at line ends into blocks for the pool; the tables of the workers put together.
#include "wordcount/wordcount_counter.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <new>

#include "core/parallel.h"

namespace fastops {
namespace {

#define FASTOPS_LEVEL_TABLE(level) &level::kWordKernels,
constexpr const WordKernels* kTable[] = {FASTOPS_FOR_EACH_LEVEL(FASTOPS_LEVEL_TABLE)};
#undef FASTOPS_LEVEL_TABLE

#if defined(FASTOPS_TEST_TINY)
constexpr std::size_t kBlock = 64, kSpan = 256, kRead = 64;
constexpr double kNanosecondsPerByte = 1e6;  // the pool works on the shortest texts
constexpr std::size_t kFullAtLeast = 4;
#else
constexpr std::size_t kBlock = std::size_t{1} << 18;  // of a text in memory, for one worker
constexpr std::size_t kSpan = std::size_t{1} << 20;   // of a file, likewise
constexpr std::size_t kRead = std::size_t{1} << 17;   // of a file at a time
constexpr double kNanosecondsPerByte = 1.2;
constexpr std::size_t kFullAtLeast = 2048;  // keys that an approximate count may hold, however few it keeps
#endif

// The next "\n" at or after p; null where there is none.
const std::uint8_t* line_end(const std::uint8_t* p, const std::uint8_t* end) noexcept {
  return p < end ? static_cast<const std::uint8_t*>(std::memchr(p, '\n', static_cast<std::size_t>(end - p))) : nullptr;
}

}  // namespace

const WordKernels& word_kernels() noexcept { return *kTable[active_level()]; }

void Tally::settle() noexcept {
  if (code_points_.bytes() == 0) return;
  std::uint8_t bytes[kInlineKey] = {};
  for (std::uint32_t code = 0; code < kCodePoints; ++code) {
    const std::uint64_t count = code_points_.get<std::uint64_t>()[code];
    if (count == 0) continue;
    const auto size = static_cast<std::size_t>(encode(bytes, code) - bytes);
    if (table_.add(short_key(bytes, size), count, 0) != Added::kDone) status_ = FASTOPS_NO_MEMORY;
  }
  code_points_.release();
}

bool Tally::make_room() noexcept {
  if (status_ != FASTOPS_OK) return false;
  std::size_t needed = table_.needed(pending_, long_bytes_);
  if (budget_->used.fetch_add(needed) + needed > budget_->limit && table_.size() > 0) {
    budget_->used -= needed;
    if (!spill()) return false;
    needed = table_.needed(pending_, long_bytes_);
    budget_->used += needed;
  }
  const std::size_t before = table_.bytes();
  if (!table_.reserve(pending_, long_bytes_)) status_ = FASTOPS_NO_MEMORY;
  budget_->used += table_.bytes() - before - needed;
  return status_ == FASTOPS_OK;
}

// Key by key, and the table becomes smaller at the key that finds it full: nothing depends on how the text was cut.
void Tally::count_roughly() noexcept {
  const std::size_t full = 2 * approximate_ > kFullAtLeast ? 2 * approximate_ : kFullAtLeast;
  const std::size_t before = table_.bytes();
  for (unsigned i = 0; i < pending_ && status_ == FASTOPS_OK; ++i) {
    const Key& key = batch_[i];
    if (table_.size() >= full) {
      const std::uint64_t less = table_.shrink(approximate_);
      if (less == kMaxCount) {
        status_ = FASTOPS_NO_MEMORY;
        break;
      }
      error_bound_ += less;
    }
    if (!table_.reserve(1, key.size > kInlineKey ? key.size : 0))
      status_ = FASTOPS_NO_MEMORY;
    else if (table_.with_documents())
      table_.count(key, document_of_[i]);
    else
      table_.count(key);
  }
  budget_->used += table_.bytes() - before;
}

WordCounter::Worker::Worker(const WordCounter& counter, Budget* budget, Spill* spill) noexcept
    : tally(counter.rule_.doc_freq != 0, counter.approximate_, budget, spill),
      stream(counter.rule_, counter.stop_words(), tally) {}

WordCounter::WordCounter(const fastops_word_rule& rule, unsigned workers, std::size_t memory_limit,
                         std::size_t approximate) noexcept
    : rule_(rule),
      workers_(workers < 1             ? 1
               : workers > kMaxThreads ? kMaxThreads
                                       : workers),
      approximate_(approximate),
      documents_matter_(rule.doc_freq != 0 || rule.ngram_high > 1) {
  if (memory_limit > 0) budget_.limit = memory_limit;
  if (rule_.max_token_bytes >= kMaxKey) rule_.max_token_bytes = kMaxKey - 1;
}

WordCounter::~WordCounter() {
  for (unsigned i = 0; i < made_; ++i) all_[i].~Worker();
}

bool WordCounter::prepare() noexcept {
  if (!room_.reserve({workers_, sizeof(Worker)})) return false;
  all_ = room_.get<Worker>();
  for (; made_ < workers_; ++made_) new (all_ + made_) Worker(*this, &budget_, &spill_);
  return true;
}

// What the workers met, the one that comes first in the text; `status` is how the pool ended.
fastops_status WordCounter::take_errors(fastops_status status) noexcept {
  for (unsigned i = 0; i < made_; ++i) {
    Worker& worker = all_[i];
    const fastops_status found = worker.stream.status();
    if (found == FASTOPS_OK) continue;
    if (found == FASTOPS_INVALID) {
      fastops_word_error error = worker.stream.error();
      if (error.failure == FASTOPS_WORDS_OK) error = {FASTOPS_WORDS_SPILL, spill_.error_number(), 0};
      if (error_.failure == FASTOPS_WORDS_OK || error.offset < error_.offset) error_ = error;
    }
    if (status == FASTOPS_OK) status = found;
  }
  failed_ = status != FASTOPS_OK;
  return status;
}

fastops_status WordCounter::memory(const std::uint8_t* data, std::size_t size, std::uint64_t offset,
                                   fastops_poll poll) noexcept {
  const std::uint8_t* const end = data + size;
  if (serial() || size < 2 * kBlock) {
    const fastops_status status = parallel_run(
        1,
        [&](std::size_t, unsigned) noexcept {
          std::size_t done = 0;
          while (done < size && all_[0].stream.ok() && !asked_to_stop(poll)) {
            std::size_t n = size - done < kBlock ? size - done : kBlock;
            const std::uint8_t* const line = line_end(data + done + n - 1, end);
            n = line == nullptr ? size - done : static_cast<std::size_t>(line + 1 - data) - done;
            all_[0].stream.consume(data + done, n, offset + done, true);
            done += n;
          }
        },
        0, poll, 1);
    return take_errors(stopped_ ? FASTOPS_INTERRUPTED : status);
  }
  const std::size_t blocks = (size + kBlock - 1) / kBlock;
  const fastops_status status = parallel_run(
      blocks,
      [&](std::size_t block, unsigned worker) noexcept {
        if (!is_wanted(block)) return;
        // The lines that begin in the block.
        const std::uint8_t* first = data;
        const std::uint8_t* const stop = block + 1 < blocks ? data + (block + 1) * kBlock : end;
        if (block > 0) {
          const std::uint8_t* const before = line_end(data + block * kBlock - 1, stop);
          if (before == nullptr) return;
          first = before + 1;
        }
        if (first >= stop) return;
        const std::uint8_t* const last = line_end(stop - 1, end);
        const std::uint8_t* const after = last == nullptr ? end : last + 1;
        Stream<Tally>& stream = all_[worker].stream;
        stream.consume(first, static_cast<std::size_t>(after - first),
                       offset + static_cast<std::uint64_t>(first - data), true);
        note_failure(all_[worker], block);
      },
      static_cast<double>(size) * kNanosecondsPerByte, poll, workers_);
  return take_errors(status);
}

fastops_status WordCounter::feed(const std::uint8_t* data, std::size_t size, fastops_poll poll) noexcept {
  if (failed_) return FASTOPS_INVALID;
  // What was carried goes on to the end of its line, or grows until it can be cut.
  while (size > 0) {
    if (carried_ == 0 && begun_ && !inside_line_) {
      const std::uint8_t* last = static_cast<const std::uint8_t*>(memrchr(data, '\n', size));
      if (last != nullptr) {
        const auto n = static_cast<std::size_t>(last + 1 - data);
        const fastops_status status = memory(data, n, offset_, poll);
        if (status != FASTOPS_OK) return status;
        offset_ += n;
        data += n;
        size -= n;
        continue;
      }
    }
    const std::uint8_t* const line = line_end(data, data + size);
    std::size_t n = line == nullptr ? size : static_cast<std::size_t>(line + 1 - data);
    // No more at a time than what a run without white space may hold.
    if (n > kSpan) n = kSpan;
    if (carried_ + n > carry_.bytes() &&
        !carry_.grow(carried_ + n > 2 * carry_.bytes() ? carried_ + n : 2 * carry_.bytes()))
      return FASTOPS_NO_MEMORY;
    auto* const carry = carry_.get<std::uint8_t>();
    std::memcpy(carry + carried_, data, n);
    carried_ += n;
    data += n;
    size -= n;
    std::size_t skipped = 0;
    if (!begun_) {
      if (carried_ < 4 && line == nullptr) return FASTOPS_OK;
      if (begins_with_mark(carry, carried_, &skipped)) {
        error_ = {FASTOPS_WORDS_ENCODING, 0, 0};
        failed_ = true;
        return FASTOPS_INVALID;
      }
      begun_ = true;
    }
    const bool whole = carry[carried_ - 1] == '\n';
    if (!whole && skipped == 0 && carried_ < tried_ + std::max(kRead, tried_)) continue;
    const std::size_t done =
        skipped + all_[0].stream.consume(carry + skipped, carried_ - skipped, offset_ + skipped, whole);
    const fastops_status status = take_errors(FASTOPS_OK);
    if (status != FASTOPS_OK) return status;
    if (done > 0) inside_line_ = carry[done - 1] != '\n';
    std::memmove(carry, carry + done, carried_ - done);
    carried_ -= done;
    offset_ += done;
    tried_ = carried_;
  }
  return FASTOPS_OK;
}

fastops_status WordCounter::end(fastops_poll) noexcept {
  if (failed_) return FASTOPS_INVALID;
  Stream<Tally>& stream = all_[0].stream;
  std::size_t skipped = 0;
  const auto* const carry = carry_.get<std::uint8_t>();
  if (!begun_ && begins_with_mark(carry, carried_, &skipped)) {
    error_ = {FASTOPS_WORDS_ENCODING, 0, 0};
    failed_ = true;
    return FASTOPS_INVALID;
  }
  if (carried_ > skipped) stream.consume(carry + skipped, carried_ - skipped, offset_ + skipped, true);
  if (stream.ok()) stream.end_text();
  carried_ = tried_ = 0;
  offset_ = 0;
  begun_ = inside_line_ = false;
  return take_errors(FASTOPS_OK);
}

void WordCounter::some_texts(Worker& worker, const void* const* data, const std::size_t* sizes, std::size_t count,
                             std::size_t block) noexcept {
  Stream<Tally>& stream = worker.stream;
  // A line end more keeps tokens of neighbours apart: where documents do not matter, small texts are counted together,
  // but for those in which something may be wrong at a place to be named.
  const bool together = !documents_matter_ && rule_.tokenizer <= FASTOPS_WORDS_WORD &&
                        (rule_.errors == FASTOPS_ERRORS_REPLACE || rule_.errors == FASTOPS_ERRORS_ESCAPE) &&
                        rule_.max_token_bytes >= kBlock / 4;
  std::size_t held = 0;
  for (std::size_t i = 0; i <= count && stream.ok() && is_wanted(block); ++i) {
    const std::size_t size = i < count ? sizes[i] : kBlock;
    if (held > 0 && held + size + 1 > kBlock) {
      stream.consume(worker.buffer.get<std::uint8_t>(), held, 0, true);
      held = 0;
    }
    if (i == count) break;
    const auto* const text = static_cast<const std::uint8_t*>(data[i]);
    std::size_t skipped = 0;
    if (begins_with_mark(text, size, &skipped)) {
      stream.fail(FASTOPS_WORDS_ENCODING, 0);
    } else if (!together || size + 1 > kBlock / 4) {
      if (size > skipped) stream.consume(text + skipped, size - skipped, skipped, true);
      if (stream.ok()) stream.end_text();
    } else {
      if (!worker.buffer.grow(kBlock)) {
        stream.no_memory();
        return;
      }
      auto* const buffer = worker.buffer.get<std::uint8_t>();
      if (size > skipped) std::memcpy(buffer + held, text + skipped, size - skipped);
      held += size - skipped;
      if (size > skipped && text[size - 1] != '\n') buffer[held++] = '\n';
      if (!rule_.lines) stream.count_document();
    }
  }
  stream.flush();
}

fastops_status WordCounter::texts(const void* const* data, const std::size_t* sizes, std::size_t count,
                                  fastops_poll poll) noexcept {
  if (failed_) return FASTOPS_INVALID;
  double bytes = 0;
  for (std::size_t i = 0; i < count; ++i) bytes += static_cast<double>(sizes[i]) + 100;
  // Enough texts for a block, whatever their sizes.
  const std::size_t blocks = count == 0 ? 0
                             : 1 + static_cast<std::size_t>(bytes / static_cast<double>(kBlock)) < count
                                 ? 1 + static_cast<std::size_t>(bytes / static_cast<double>(kBlock))
                                 : count;
  const fastops_status status = parallel_run(
      blocks,
      [&](std::size_t block, unsigned worker) noexcept {
        const std::size_t first = count * block / blocks;
        some_texts(all_[worker], data + first, sizes + first, count * (block + 1) / blocks - first, block);
        note_failure(all_[worker], block);
      },
      bytes * kNanosecondsPerByte, poll, workers_);
  return take_errors(status);
}

fastops_status WordCounter::token(const std::uint8_t* data, std::size_t size) noexcept {
  if (failed_) return FASTOPS_INVALID;
  // The table reads 16 bytes of every key, and the key must stay until the batch is counted.
  Worker& worker = all_[0];
  if (carry_.bytes() < size + 64 && !carry_.grow(2 * (size + 64))) return FASTOPS_NO_MEMORY;
  std::memcpy(carry_.get<std::uint8_t>(), data, size);
  worker.stream.token(carry_.get<std::uint8_t>(), size);
  if (size > kInlineKey) worker.stream.flush();
  return worker.stream.ok() ? FASTOPS_OK : take_errors(FASTOPS_OK);
}

fastops_status WordCounter::end_document() noexcept {
  if (failed_) return FASTOPS_INVALID;
  all_[0].stream.end_document();
  return take_errors(FASTOPS_OK);
}

// The lines that begin in [start, stop), by blocks; the last one may end later.
void WordCounter::lines_of_file(Worker& worker, int fd, std::uint64_t start, std::uint64_t stop, std::size_t block,
                                fastops_poll poll) noexcept {
  Stream<Tally>& stream = worker.stream;
  std::uint64_t at = start > 0 ? start - 1 : 0;  // of the next byte to be read
  bool skipping = start > 0;                     // until the first line's beginning
  std::uint64_t first = 0;                       // where buffer begins
  std::size_t held = 0, tried = 0;               // tried: of those held, how many could not be cut
  bool last = false;
  first = at;
  while (!last && stream.ok() && is_wanted(block) && !(poll.function != nullptr && asked_to_stop(poll))) {
    if (!worker.buffer.grow(held + kRead)) {
      stream.no_memory();
      return;
    }
    auto* const buffer = worker.buffer.get<std::uint8_t>();
    // Not much more than what is asked for.
    const std::uint64_t wanted = at < stop ? stop - at + kRead / 256 : kRead / 8;
    const ssize_t n =
        pread(fd, buffer + held, wanted < kRead ? static_cast<std::size_t>(wanted) : kRead, static_cast<off_t>(at));
    if (n < 0) {
      if (errno == EINTR) continue;
      stream.fail(FASTOPS_WORDS_READ, at, errno);
      return;
    }
    at += static_cast<std::uint64_t>(n);
    held += static_cast<std::size_t>(n);
    const bool ended = n == 0;
    std::size_t from = 0;
    if (skipping) {
      const std::uint8_t* const line = line_end(buffer, buffer + held);
      from = line == nullptr ? held : static_cast<std::size_t>(line + 1 - buffer);
      if (first + from >= stop || (line == nullptr && ended)) return;
      skipping = line == nullptr;
    } else if (first == 0 && start == 0) {
      if (held < 4 && !ended) continue;
      if (begins_with_mark(buffer, held, &from)) {
        stream.fail(FASTOPS_WORDS_ENCODING, 0);
        return;
      }
    }
    std::size_t until = held;
    if (first + held >= stop) {
      // The line that goes over `stop` is the last one.
      const std::size_t inside = stop > first ? static_cast<std::size_t>(stop - first) : 0;
      const std::size_t look = inside > from ? inside - 1 : from;
      const std::uint8_t* const line = line_end(buffer + look, buffer + held);
      if (line != nullptr) {
        until = static_cast<std::size_t>(line + 1 - buffer);
        last = true;
      }
    }
    last = last || ended;
    if (!last && from == 0 && tried > 0 && held < tried + std::max(kRead, tried)) continue;
    if (until > from) from += stream.consume(buffer + from, until - from, first + from, last);
    std::memmove(buffer, buffer + from, held - from);
    held -= from;
    first += from;
    tried = held;
    if (last && stream.ok() && (rule_.lines || documents_matter_)) stream.end_text();
  }
}

fastops_status WordCounter::file(int fd, std::uint64_t start, std::uint64_t stop, fastops_poll poll) noexcept {
  if (failed_) return FASTOPS_INVALID;
  if (!rule_.lines && start == 0 && (!documents_matter_ || stop == 0)) all_[0].stream.count_document();
  if (start == stop) return FASTOPS_OK;
  if (serial()) {
    const fastops_status status = parallel_run(
        1, [&](std::size_t, unsigned) noexcept { lines_of_file(all_[0], fd, start, stop, 0, poll); }, 0, poll, 1);
    return take_errors(stopped_ ? FASTOPS_INTERRUPTED : status);
  }
  const std::uint64_t size = stop - start;
  const auto spans = static_cast<std::size_t>((size + kSpan - 1) / kSpan);
  const fastops_status status = parallel_run(
      spans,
      [&](std::size_t span, unsigned worker) noexcept {
        if (!is_wanted(span)) return;
        const std::uint64_t from = start + span * kSpan;
        lines_of_file(all_[worker], fd, from, span + 1 < spans ? from + kSpan : stop, span, {nullptr, nullptr});
        note_failure(all_[worker], span);
      },
      static_cast<double>(size) * kNanosecondsPerByte, poll, workers_);
  return take_errors(status);
}

// The workers' tables in one; through the file where memory has a limit that they came near to.
fastops_status WordCounter::gather(fastops_poll poll, fastops_words* words) noexcept {
  if (spill_.used() || budget_.used > budget_.limit / 2) {
    for (unsigned i = 0; i < made_; ++i)
      if (!all_[i].tally.spill()) return take_errors(FASTOPS_OK);
    words->table.back_by_files();
    for (unsigned part = 0; part < Spill::kParts; ++part) {
      if (poll.function != nullptr && poll.function(poll.context) != 0) return FASTOPS_INTERRUPTED;
      if (!spill_.read(part, &words->table)) {
        if (spill_.error_number() == 0) return FASTOPS_NO_MEMORY;
        error_ = {FASTOPS_WORDS_SPILL, spill_.error_number(), 0};
        return FASTOPS_INVALID;
      }
    }
    return FASTOPS_OK;
  }
  unsigned largest = 0;
  for (unsigned i = 1; i < made_; ++i)
    if (all_[i].tally.table().size() > all_[largest].tally.table().size()) largest = i;
  std::swap(words->table, all_[largest].tally.table());
  for (unsigned i = 0; i < made_; ++i) {
    if (i == largest) continue;
    if (poll.function != nullptr && poll.function(poll.context) != 0) return FASTOPS_INTERRUPTED;
    const Added added = words->table.add(all_[i].tally.table());
    if (added != Added::kDone) return FASTOPS_NO_MEMORY;
    all_[i].tally.reset();
  }
  return FASTOPS_OK;
}

fastops_status WordCounter::finish(fastops_poll poll, fastops_words** words) noexcept {
  if (failed_) return FASTOPS_INVALID;
  if (begun_ || carried_ > 0) {
    const fastops_status status = end(poll);
    if (status != FASTOPS_OK) return status;
  }
  auto* result = new (std::nothrow) fastops_words(rule_.doc_freq != 0);
  if (result == nullptr) return FASTOPS_NO_MEMORY;
  for (unsigned i = 0; i < made_; ++i) {
    all_[i].stream.flush();
    all_[i].tally.settle();
    result->documents += all_[i].stream.documents();
    result->error_bound += all_[i].tally.error_bound();
  }
  fastops_status status = take_errors(FASTOPS_OK);
  if (status == FASTOPS_OK) status = gather(poll, result);
  if (status == FASTOPS_OK && rule_.stop_words != nullptr && rule_.ngram_high == 1) {
    fastops_words* left = nullptr;
    status = fastops_words_select(result, 1, kMaxCount, 0, kMaxCount, rule_.stop_words, poll, &left);
    if (status == FASTOPS_OK) std::swap(result->table, left->table);
    fastops_words_destroy(left);
  }
  if (status == FASTOPS_OK && approximate_ > 0) {
    const std::uint64_t less = result->table.shrink(approximate_);
    if (less == kMaxCount) status = FASTOPS_NO_MEMORY;
    result->error_bound += less;
  }
  if (status != FASTOPS_OK) {
    delete result;
    failed_ = true;
    return status;
  }
  for (unsigned i = 0; i < made_; ++i) {
    all_[i].stream.reset();
    all_[i].tally.reset();
  }
  budget_.used = 0;
  spill_.reset();
  *words = result;
  return FASTOPS_OK;
}

}  // namespace fastops
