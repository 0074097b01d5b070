// SPDX-License-Identifier: BSD-3-Clause
// What each CPU level brings to counting: the scan that finds the bytes of words.
#ifndef FASTOPS_WORDCOUNT_WORDCOUNT_KERNELS_H
#define FASTOPS_WORDCOUNT_WORDCOUNT_KERNELS_H

#include <cstddef>
#include <cstdint>

#include "core/dispatch.h"

namespace fastops {

// Which ASCII bytes belong to words; bytes from 0x80 on always do here.
enum WordBytes {
  kNotUnicodeSpace,  // all but 9-13 and 28-32: str.split()
  kNotAsciiSpace,    // all but 9-13 and 32: bytes.split()
  kAlphanumeric,     // letters, digits and the underscore: \w
  kWordByteKinds
};

struct WordKernels {
  // For each of `blocks` runs of 64 bytes: the bytes with A-Z lowered where [lower], a bit per byte of a word, a bit
  // per byte from 0x80 on. Returns how many bytes are "\n".
  std::size_t (*scan[kWordByteKinds][2])(const std::uint8_t* in, std::size_t blocks, std::uint8_t* out,
                                         std::uint64_t* words, std::uint64_t* high) noexcept;
};

#define FASTOPS_DECLARE_WORDS(level)     \
  namespace level {                      \
  extern const WordKernels kWordKernels; \
  }
FASTOPS_FOR_EACH_LEVEL(FASTOPS_DECLARE_WORDS)
#undef FASTOPS_DECLARE_WORDS

}  // namespace fastops
#endif
