// SPDX-License-Identifier: BSD-3-Clause
// The C interface's table of words: a hash table with what is known of it as a whole.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_WORDS_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_WORDS_H

#include <atomic>
#include <cstdint>

#include "fastops/fastops.h"
#include "wordcount/wordcount_table.h"

struct fastops_words {
  explicit fastops_words(bool documents_counted = false) noexcept : table(documents_counted) {}
  fastops::Table table;
  std::uint64_t documents = 0, error_bound = 0;

  // The sum of all counts; a sweep of the table where it is not known from before.
  unsigned __int128 total() const noexcept {
    if (!total_known.load(std::memory_order_acquire)) {
      unsigned __int128 sum = 0;
      for (std::size_t i = 0; i < table.capacity(); ++i) sum += table.slots()[i].count;
      set_total(sum);  // several readers may: they set the same
    }
    return static_cast<unsigned __int128>(total_high.load(std::memory_order_relaxed)) << 64 |
           total_low.load(std::memory_order_relaxed);
  }
  void set_total(unsigned __int128 sum) const noexcept {
    total_low.store(static_cast<std::uint64_t>(sum), std::memory_order_relaxed);
    total_high.store(static_cast<std::uint64_t>(sum >> 64), std::memory_order_relaxed);
    total_known.store(true, std::memory_order_release);
  }

  mutable std::atomic<bool> total_known{false};
  mutable std::atomic<std::uint64_t> total_low{0}, total_high{0};
};

#endif
