// SPDX-License-Identifier: BSD-3-Clause
// Counts as bytes: the container of save() and to_bytes(), little endian.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_CONTAINER_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_CONTAINER_H

#include "wordcount/wordcount_words.h"

namespace fastops {

std::size_t packed_size(const fastops_words& words) noexcept;
// To packed_size() bytes.
void pack(const fastops_words& words, std::uint8_t* to) noexcept;
// Into an empty table; *why says in words what is wrong with the bytes where the answer is FASTOPS_INVALID.
fastops_status unpack(const std::uint8_t* from, std::size_t size, fastops_words* words, const char** why) noexcept;

}  // namespace fastops
#endif
