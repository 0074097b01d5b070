// SPDX-License-Identifier: BSD-3-Clause
// Counting by several threads: a stream and a table each, one table in the end.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_COUNTER_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_COUNTER_H

#include <limits>

#include "core/parallel.h"
#include "core/checked.h"
#include "wordcount/wordcount_stream.h"
#include "wordcount/wordcount_words.h"

namespace fastops {

class WordCounter {
 public:
  WordCounter(const fastops_word_rule& rule, unsigned workers, std::size_t memory_limit,
              std::size_t approximate) noexcept;
  ~WordCounter();
  WordCounter(const WordCounter&) = delete;
  WordCounter& operator=(const WordCounter&) = delete;
  // False where there is no memory.
  bool prepare() noexcept;

  fastops_status feed(const std::uint8_t* data, std::size_t size, fastops_poll poll) noexcept;
  fastops_status end(fastops_poll poll) noexcept;
  fastops_status texts(const void* const* data, const std::size_t* sizes, std::size_t count,
                       fastops_poll poll) noexcept;
  fastops_status token(const std::uint8_t* data, std::size_t size) noexcept;
  fastops_status end_document() noexcept;
  fastops_status file(int fd, std::uint64_t start, std::uint64_t stop, fastops_poll poll) noexcept;
  fastops_status finish(fastops_poll poll, fastops_words** words) noexcept;
  const fastops_word_error& error() const noexcept { return error_; }

 private:
  struct Worker {
    Worker(const WordCounter& counter, Budget* budget, Spill* spill) noexcept;
    Tally tally;
    Stream<Tally> stream;
    Region buffer;  // blocks of a file, small texts behind one another
  };

  bool serial() const noexcept { return workers_ == 1 || (documents_matter_ && !rule_.lines); }
  // The bytes of a text in memory that ends at a line's end, or at the text's.
  fastops_status memory(const std::uint8_t* data, std::size_t size, std::uint64_t offset, fastops_poll poll) noexcept;
  // Work of one block; `block` is its number, 0 where there is one only.
  void some_texts(Worker& worker, const void* const* data, const std::size_t* sizes, std::size_t count,
                  std::size_t block) noexcept;
  void lines_of_file(Worker& worker, int fd, std::uint64_t start, std::uint64_t stop, std::size_t block,
                     fastops_poll poll) noexcept;
  fastops_status take_errors(fastops_status status) noexcept;
  // After a failure the blocks before it are still counted, which were begun before it: so the first one of the text is
  // met, whichever worker is the quickest.
  bool is_wanted(std::size_t block) const noexcept { return block < failed_block_.load(std::memory_order_relaxed); }
  void note_failure(const Worker& worker, std::size_t block) noexcept {
    if (worker.stream.ok()) return;
    std::size_t first = failed_block_.load(std::memory_order_relaxed);
    while (block < first && !failed_block_.compare_exchange_weak(first, block, std::memory_order_relaxed)) {
    }
  }
  // Asks the poll of a run in one thread, from its body. It says so once, to whoever asks.
  bool asked_to_stop(fastops_poll poll) noexcept { return stopped_ = stopped_ || interrupted(poll); }
  const Table* stop_words() const noexcept { return rule_.stop_words == nullptr ? nullptr : &rule_.stop_words->table; }
  fastops_status gather(fastops_poll poll, fastops_words* words) noexcept;

  fastops_word_rule rule_;
  unsigned workers_, made_ = 0;
  std::size_t approximate_;
  bool documents_matter_;
  Budget budget_;
  Spill spill_;
  Workspace room_;
  Worker* all_ = nullptr;

  // The text that feed() is in.
  Region carry_;
  std::size_t carried_ = 0;
  std::size_t tried_ = 0;     // how many of them could not be cut
  std::uint64_t offset_ = 0;  // of the carried bytes
  bool begun_ = false;
  bool inside_line_ = false;  // the first worker has counted the beginning of a line, and must see the rest of it

  fastops_word_error error_{};
  std::atomic<std::size_t> failed_block_{std::numeric_limits<std::size_t>::max()};
  bool failed_ = false, stopped_ = false;
};

}  // namespace fastops
#endif
