// SPDX-License-Identifier: BSD-3-Clause
// The C interface's table of words: a hash table with what is known of it as a whole.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_WORDS_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_WORDS_H

#include "fastops/fastops.h"
#include "wordcount/wordcount_table.h"

struct fastops_words {
  explicit fastops_words(bool documents_counted = false) noexcept : table(documents_counted) {}
  fastops::Table table;
  std::uint64_t documents = 0, error_bound = 0;
};

#endif
