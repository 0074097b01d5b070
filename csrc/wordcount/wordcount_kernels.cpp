// SPDX-License-Identifier: BSD-3-Clause
// The scan of text for words, compiled once per CPU level.
#include "wordcount/wordcount_kernels.h"

#include "core/simd.h"

namespace fastops::FASTOPS_LEVEL {
namespace {

using simd::u8;
using Mask = decltype(u8{} == 'a');

// Unsigned, so that bytes below `first` are far above it.
FASTOPS_INLINE Mask in_range(u8 v, std::uint8_t first, std::uint8_t last) {
  return (v - first) <= simd::splat<u8>(static_cast<std::uint8_t>(last - first));
}

template <int Kind> FASTOPS_INLINE Mask in_word(u8 v) {
  if constexpr (Kind == kNotUnicodeSpace) return ~(in_range(v, 9, 13) | in_range(v, 28, 32));
  if constexpr (Kind == kNotAsciiSpace) return ~(in_range(v, 9, 13) | (v == ' '));
  return in_range(v | 0x20, 'a', 'z') | in_range(v, '0', '9') | (v == std::uint8_t{95}) | (v >= 0x80);
}

template <int Kind, bool Lower>
std::size_t scan(const std::uint8_t* in, std::size_t blocks, std::uint8_t* out, std::uint64_t* words,
                 std::uint64_t* high) noexcept {
  std::size_t lines = 0;
  for (std::size_t b = 0; b < blocks; ++b) {
    std::uint64_t word = 0, top = 0, line = 0;
    for (std::size_t i = 0; i < 64; i += kBytes) {
      const u8 v = simd::load<u8>(in + 64 * b + i);
      word |= simd::bits_of_bytes(in_word<Kind>(v)) << i;
      top |= simd::bits_of_bytes(v >= 0x80) << i;
      line |= simd::bits_of_bytes(v == '\n') << i;
      simd::store(out + 64 * b + i,
                  Lower ? v | simd::select(in_range(v, 'A', 'Z'), simd::splat<u8>(std::uint8_t{0x20}), u8{}) : v);
    }
    words[b] = word;
    high[b] = top;
    lines += static_cast<std::size_t>(__builtin_popcountll(line));
  }
  return lines;
}

}  // namespace

extern const WordKernels kWordKernels = {{{&scan<kNotUnicodeSpace, false>, &scan<kNotUnicodeSpace, true>},
                                          {&scan<kNotAsciiSpace, false>, &scan<kNotAsciiSpace, true>},
                                          {&scan<kAlphanumeric, false>, &scan<kAlphanumeric, true>}}};

}  // namespace fastops::FASTOPS_LEVEL
