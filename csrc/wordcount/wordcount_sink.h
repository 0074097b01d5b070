// SPDX-License-Identifier: BSD-3-Clause
// What becomes of tokens: n-grams, counting in batches with the slots fetched ahead, looking up of ids.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_SINK_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_SINK_H

#include <algorithm>
#include <atomic>
#include <limits>

#include "fastops/fastops.h"
#include "wordcount/wordcount_spill.h"
#include "wordcount/wordcount_table.h"

namespace fastops {

// The memory of all tables of a counter.
struct Budget {
  std::atomic<std::size_t> used{0};
  std::size_t limit = std::numeric_limits<std::size_t>::max();
};

// Counts keys. A key's first 16 bytes can be read whatever its size, and keys stay where they are until flush().
class Tally {
 public:
  Tally(bool documents, std::size_t approximate, Budget* budget, Spill* spill) noexcept
      : table_(documents), approximate_(approximate), budget_(budget), spill_(spill) {}

  void key(const std::uint8_t* data, std::size_t size) noexcept {
    Key& key = batch_[pending_];
    if (__builtin_expect(size <= kInlineKey, 1)) {
      key = short_key(data, size);
    } else {
      key = long_key(data, size);
      long_bytes_ += size;
    }
    table_.prefetch(key.hash);
    document_of_[pending_] = document_;
    if (++pending_ == kBatch) flush();
  }
  // A code point counted as a key, in an array; false where that cannot be.
  bool code_point(std::uint32_t code) noexcept {
    if (table_.with_documents() || approximate_ > 0) return false;
    if (code_points_.bytes() == 0 && !code_points_.grow(kCodePoints * sizeof(std::uint64_t))) {
      status_ = FASTOPS_NO_MEMORY;
      return true;
    }
    ++code_points_.get<std::uint64_t>()[code];
    return true;
  }
  // Whether stop words may stay until the end; kept for nothing, they would take the place of others.
  bool stop_words_later() const noexcept { return approximate_ == 0; }
  // The array's counts go to the table.
  void settle() noexcept;
  void end_document() noexcept { ++document_; }
  // Kept out of the loop over tokens, as what is rare there.
  __attribute__((noinline)) void flush() noexcept {
    if (approximate_ > 0)
      count_roughly();
    else if (pending_ > 0 && (table_.has_room(pending_, long_bytes_) || make_room())) {
      if (table_.with_documents())
        for (unsigned i = 0; i < pending_; ++i) table_.count(batch_[i], document_of_[i]);
      else
        for (unsigned i = 0; i < pending_; ++i) table_.count(batch_[i]);
    }
    pending_ = 0;
    long_bytes_ = 0;
  }
  // What went wrong so far; nothing is counted after it.
  fastops_status status() const noexcept { return status_; }
  Table& table() noexcept { return table_; }
  std::uint64_t error_bound() const noexcept { return error_bound_; }
  // The table leaves, with its memory.
  void reset() noexcept {
    budget_->used -= table_.bytes();
    table_.clear();
    error_bound_ = 0;
    status_ = FASTOPS_OK;
  }
  bool spill() noexcept {
    if (!spill_->write(table_)) {
      status_ = spill_->error_number() != 0 ? FASTOPS_INVALID : FASTOPS_NO_MEMORY;
      return false;
    }
    budget_->used -= table_.bytes();
    // What waits in the batch may be of earlier documents than the current one.
    if (!table_.forget_before(pending_ > 0 ? document_of_[0] : document_)) status_ = FASTOPS_NO_MEMORY;
    budget_->used += table_.bytes();
    return status_ == FASTOPS_OK;
  }

 private:
#if defined(FASTOPS_TEST_TINY)
  static constexpr unsigned kBatch = 3;
#else
  static constexpr unsigned kBatch = 64;
#endif

  static constexpr std::size_t kCodePoints = 0x110000;

  bool make_room() noexcept;
  void count_roughly() noexcept;

  Table table_;
  Region code_points_;
  Key batch_[kBatch];
  std::uint64_t document_of_[kBatch];
  unsigned pending_ = 0;
  std::size_t long_bytes_ = 0;
  std::uint64_t document_ = 1;
  std::size_t approximate_;
  std::uint64_t error_bound_ = 0;
  Budget* budget_;
  Spill* spill_;
  fastops_status status_ = FASTOPS_OK;
};

// Looks keys up; unknown ones are left out.
class Lookup {
 public:
  Lookup(const Table& table, const std::int64_t* ranks) noexcept : table_(table), ranks_(ranks) {}
  void key(const std::uint8_t* data, std::size_t size) noexcept {
    const Table::Slot* const slot = table_.get(size <= kInlineKey ? short_key(data, size) : long_key(data, size));
    if (slot == nullptr) return;
    if ((count_ + 1) * sizeof(std::int64_t) > ids_.bytes() && !ids_.grow(2 * ids_.bytes() + 4096)) {
      status_ = FASTOPS_NO_MEMORY;
      return;
    }
    ids_.get<std::int64_t>()[count_++] = ranks_[slot - table_.slots()];
  }
  static bool code_point(std::uint32_t) noexcept { return false; }
  static bool stop_words_later() noexcept { return false; }
  void end_document() noexcept {}
  void flush() noexcept {}
  void clear() noexcept {
    count_ = 0;
    status_ = FASTOPS_OK;
  }
  fastops_status status() const noexcept { return status_; }
  const std::int64_t* ids() const noexcept { return ids_.get<std::int64_t>(); }
  std::size_t count() const noexcept { return count_; }

 private:
  const Table& table_;
  const std::int64_t* ranks_;
  Region ids_;
  std::size_t count_ = 0;
  fastops_status status_ = FASTOPS_OK;
};

// Tokens on their way to keys: stop words out, then n-grams of ngram_low .. ngram_high tokens of one document.
template <class Keys> class Grams {
 public:
  Grams(const fastops_word_rule& rule, const Table* stop_words, Keys& keys) noexcept
      : keys_(keys),
        stop_words_(stop_words),
        low_(rule.ngram_low),
        high_(rule.ngram_high),
        spaced_(rule.tokenizer != FASTOPS_WORDS_CHAR) {
    // Stop words of single tokens are cheaper to take out of the table at the end, where there is one.
    plain_ = high_ == 1 && (stop_words == nullptr || keys.stop_words_later());
  }
  void token(const std::uint8_t* data, std::size_t size) noexcept {
    if (plain_)
      keys_.key(data, size);
    else
      join(data, size);
  }
  bool code_point(std::uint32_t code) noexcept { return plain_ && keys_.code_point(code); }
  void end_document() noexcept {
    keys_.end_document();
    if (!plain_) forget();
  }
  void flush() noexcept { keys_.flush(); }
  fastops_status status() const noexcept { return status_ != FASTOPS_OK ? status_ : keys_.status(); }
  void forget() noexcept {
    // Keys that wait in a batch point into the text here.
    keys_.flush();
    used_ = 0;
    held_ = 0;
  }

 private:
  static constexpr std::size_t kCompact = 65536;

  __attribute__((noinline)) void join(const std::uint8_t* data, std::size_t size) noexcept {
    if (stop_words_ != nullptr && stop_words_->get(make_key(data, size)) != nullptr) return;
    const std::size_t separator = spaced_ && held_ > 0 ? 1 : 0;
    const std::size_t wanted = used_ + separator + size + kInlineKey;
    if (wanted > kCompact || wanted > text_.bytes()) make_room(separator + size);
    if (status_ != FASTOPS_OK) return;
    auto* const text = text_.get<std::uint8_t>();
    if (separator != 0) text[used_++] = ' ';
    drop_oldest();
    starts_.get<std::size_t>()[held_++] = used_;
    std::memcpy(text + used_, data, size);
    used_ += size;
    for (unsigned n = low_; n <= held_; ++n) {
      const std::size_t start = starts_.get<std::size_t>()[held_ - n];
      if (used_ - start >= kMaxKey) {
        status_ = FASTOPS_NO_MEMORY;
        return;
      }
      keys_.key(text + start, used_ - start);
    }
  }
  void drop_oldest() noexcept {
    if (held_ < high_) return;
    auto* const starts = starts_.get<std::size_t>();
    std::memmove(starts, starts + 1, (held_ - 1) * sizeof(std::size_t));
    --held_;
  }
  // The last tokens move to the front.
  void make_room(std::size_t more) noexcept {
    keys_.flush();
    if (!starts_.grow(high_ * sizeof(std::size_t))) {
      status_ = FASTOPS_NO_MEMORY;
      return;
    }
    drop_oldest();
    auto* const starts = starts_.get<std::size_t>();
    const std::size_t first = held_ > 0 ? starts[0] : used_;
    if (!text_.grow(std::max(2 * kCompact, 2 * (used_ - first + more + kInlineKey)))) {
      status_ = FASTOPS_NO_MEMORY;
      return;
    }
    std::memmove(text_.get<std::uint8_t>(), text_.get<std::uint8_t>() + first, used_ - first);
    for (unsigned i = 0; i < held_; ++i) starts[i] -= first;
    used_ -= first;
  }

  Keys& keys_;
  const Table* stop_words_;
  Region text_, starts_;
  std::size_t used_ = 0;
  unsigned held_ = 0, low_, high_;
  bool spaced_, plain_;
  fastops_status status_ = FASTOPS_OK;
};

}  // namespace fastops
#endif
