// SPDX-License-Identifier: BSD-3-Clause
// Rows of the operands of a matrix product: strided, of half types, or patches of images.
#ifndef FASTOPS_MITCHELL_MITCHELL_MATMUL_READ_H
#define FASTOPS_MITCHELL_MITCHELL_MATMUL_READ_H

#include "core/half.h"
#include "mitchell/mitchell_matmul_bodies.h"

namespace fastops::FASTOPS_LEVEL::matmul {

template <class T> FASTOPS_INLINE T element(const Operand& x, std::ptrdiff_t offset) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<const double*>(x.data)[offset];
  } else {
    if (x.dtype == FASTOPS_F32) return static_cast<const float*>(x.data)[offset];
    const std::uint16_t h = static_cast<const std::uint16_t*>(x.data)[offset];
    const bool f16 = x.dtype == FASTOPS_F16;
    if (x.flush && (h & (f16 ? 0x7c00 : 0x7f80)) == 0) return half::from_bf16(h & 0x8000);
    return f16 ? half::from_f16(h) : half::from_bf16(h);
  }
}

template <class T> FASTOPS_INLINE void prefetch(const Operand& x, std::size_t row, std::size_t col) {
  if (x.layout == Layout::kMatrix)
    __builtin_prefetch(static_cast<const T*>(x.data) + static_cast<std::ptrdiff_t>(row) * x.row_stride +
                       static_cast<std::ptrdiff_t>(col) * x.col_stride);
}

template <class T> FASTOPS_INLINE bool is_native(const Operand& x) { return sizeof(T) == 8 || x.dtype == FASTOPS_F32; }

template <class T>
FASTOPS_INLINE void read_strided(const Operand& x, std::ptrdiff_t offset, std::ptrdiff_t stride, std::size_t n, T* to) {
  if (is_native<T>(x)) {
    const T* from = static_cast<const T*>(x.data) + offset;
    if (stride == 1)
      for (std::size_t i = 0; i < n; ++i) to[i] = from[i];
    else
      for (std::size_t i = 0; i < n; ++i) to[i] = from[static_cast<std::ptrdiff_t>(i) * stride];
  } else if constexpr (sizeof(T) == 4) {
    std::size_t i = 0;
    if (stride == 1 && !x.flush) {
      const std::uint16_t* from = static_cast<const std::uint16_t*>(x.data) + offset;
      constexpr std::size_t kWidth = simd::kLanes<simd::f32>;
      if (x.dtype == FASTOPS_F16)
        for (; i + kWidth <= n; i += kWidth) store(to + i, half::from_f16(load<simd::half_u16>(from + i)));
      else
        for (; i + kWidth <= n; i += kWidth) store(to + i, half::from_bf16(load<simd::half_u16>(from + i)));
    }
    for (; i < n; ++i) to[i] = element<T>(x, offset + static_cast<std::ptrdiff_t>(i) * stride);
  }
}

// A row of patches (channel and kernel position) that moves on without dividing.
struct PatchRow {
  std::size_t channel, kernel_row, kernel_col;

  PatchRow(const Patches& p, std::size_t row)
      : channel(row / (p.kernel_height * p.kernel_width)),
        kernel_row(row / p.kernel_width % p.kernel_height),
        kernel_col(row % p.kernel_width) {}
  void advance(const Patches& p) {
    if (++kernel_col < p.kernel_width) return;
    kernel_col = 0;
    if (++kernel_row < p.kernel_height) return;
    kernel_row = 0;
    ++channel;
  }
};
struct PatchCol {
  std::size_t image, y, x;

  PatchCol(const Patches& p, std::size_t col)
      : image(col / (p.out_height * p.out_width)), y(col / p.out_width % p.out_height), x(col % p.out_width) {}
};

// The output positions of a panel of b as runs within a row of the image, for patches in steps of one column.
template <class T, std::size_t kCols> class PatchRuns {
 public:
  PatchRuns(const Operand& b, PatchCol at, std::size_t n)
      : data_(static_cast<const T*>(b.data)),
        height_(static_cast<std::ptrdiff_t>(b.patches->height)),
        width_(static_cast<std::ptrdiff_t>(b.patches->width)),
        whole_(static_cast<std::ptrdiff_t>(b.patches->channels) * height_ * width_ - std::ptrdiff_t{kCols}) {
    const Patches& p = *b.patches;
    for (std::size_t done = 0; done < n;) {
      const std::size_t size = n - done < p.out_width - at.x ? n - done : p.out_width - at.x;
      Run& run = run_[runs_++];
      run.first = static_cast<std::int32_t>(done);
      run.size = static_cast<std::int32_t>(size);
      run.image = static_cast<std::ptrdiff_t>(at.image) * p.image_stride;
      run.y = static_cast<std::ptrdiff_t>(at.y * p.stride_h) - static_cast<std::ptrdiff_t>(p.padding_h);
      run.x = static_cast<std::ptrdiff_t>(at.x) - static_cast<std::ptrdiff_t>(p.padding_w);
      run.offset = run.y * width_ + run.x;
      done += size;
      at.x = 0;
      if (++at.y == p.out_height) {
        at.y = 0;
        ++at.image;
      }
    }
  }
  // A row of the patches, by whole vectors: up to kCols elements after its end are written as well.
  void read(const Patches& p, const PatchRow& row, T* buffer) const {
    const std::ptrdiff_t down = static_cast<std::ptrdiff_t>(row.kernel_row * p.dilation_h);
    const std::ptrdiff_t right = static_cast<std::ptrdiff_t>(row.kernel_col * p.dilation_w);
    const std::ptrdiff_t first_row = static_cast<std::ptrdiff_t>(row.channel) * height_;
    for (std::size_t r = 0; r < runs_; ++r) {
      const Run& run = run_[r];
      const std::ptrdiff_t y = run.y + down, x = run.x + right, offset = (first_row + y) * width_ + x;
      const bool inside = y >= 0 && y < height_;
      const T* const from = data_ + run.image + offset;
      T* const to = buffer + run.first;
      if (inside && offset >= 0 && offset <= whole_) {
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kCols; i += Bits<T>::kWidth) store(to + i, load<typename Bits<T>::F>(from + i));
        for (std::ptrdiff_t i = 0; i < -x && i < run.size; ++i) to[i] = T{};
        for (std::ptrdiff_t i = run.size; i > 0 && i > width_ - x; --i) to[i - 1] = T{};
      } else {
        for (std::ptrdiff_t i = 0; i < run.size; ++i) to[i] = !inside || x + i < 0 || x + i >= width_ ? T{} : from[i];
      }
    }
  }
  // The same straight into a panel, what change(vector) makes of it; whether zeros of the padding are among it. Each
  // run is written by whole vectors, over what the one before has written past its end; the last, past the row's end.
  template <class Change>
  FASTOPS_INLINE bool write(const Patches& p, const PatchRow& row, T* panel, Change&& change) const {
    using F = typename Bits<T>::F;
    constexpr std::ptrdiff_t kWidth = Bits<T>::kWidth;
    const std::ptrdiff_t down = static_cast<std::ptrdiff_t>(row.kernel_row * p.dilation_h);
    const std::ptrdiff_t right = static_cast<std::ptrdiff_t>(row.kernel_col * p.dilation_w);
    const std::ptrdiff_t moved = (static_cast<std::ptrdiff_t>(row.channel) * height_ + down) * width_ + right;
    bool zeros = false;
    for (std::size_t r = 0; r < runs_; ++r) {
      const Run& run = run_[r];
      const std::ptrdiff_t y = run.y + down, x = run.x + right, offset = run.offset + moved;
      const bool inside = y >= 0 && y < height_;
      const T* const from = data_ + run.image + offset;
      T* const to = panel + run.first;
      if (inside && offset >= 0 &&
          offset <= whole_ + std::ptrdiff_t{kCols} - (run.size + kWidth - 1) / kWidth * kWidth) {
        for (std::ptrdiff_t i = 0; i < run.size; i += kWidth) store(to + i, change(load<F>(from + i)));
        if (x >= 0 && x + run.size <= width_) continue;
        // The compiler shall not call memset for these few.
        for (std::ptrdiff_t i = 0; i < -x && i < run.size; ++i) {
          to[i] = T{};
          __asm__ volatile("");
        }
        for (std::ptrdiff_t i = run.size; i > 0 && i > width_ - x; --i) {
          to[i - 1] = T{};
          __asm__ volatile("");
        }
      } else {
        for (std::ptrdiff_t i = 0; i < run.size; i += kWidth) {
          F v{};
          if (inside) v = change(some(from + i, max_of(-x - i, 0), min_of(min_of(width_ - x, run.size) - i, kWidth)));
          store(to + i, v);
        }
      }
      zeros = true;
    }
    return zeros;
  }

 private:
  static constexpr std::ptrdiff_t min_of(std::ptrdiff_t a, std::ptrdiff_t b) { return a < b ? a : b; }
  static constexpr std::ptrdiff_t max_of(std::ptrdiff_t a, std::ptrdiff_t b) { return a < b ? b : a; }
  // Elements begin .. end of a vector; the others are zero.
  static __attribute__((noinline)) typename Bits<T>::F some(const T* from, std::ptrdiff_t begin, std::ptrdiff_t end) {
    alignas(64) T part[Bits<T>::kWidth] = {};
    for (std::ptrdiff_t i = begin; i < end; ++i) part[i] = from[i];
    return load<typename Bits<T>::F>(part);
  }
  struct Run {
    std::int32_t first, size;
    std::ptrdiff_t image, y, x, offset;  // y, x, offset: of the image, for the first kernel position
  };
  const T* data_;
  std::ptrdiff_t height_, width_, whole_;  // the last offset from which kCols elements can be read
  std::size_t runs_ = 0;
  Run run_[kCols];
};

// n output positions from `at`; in place where they lie together in the image as T. What the padding covers is zero.
template <class T> const T* read_patches(const Operand& x, const PatchRow& row, PatchCol at, std::size_t n, T* buffer) {
  const Patches& p = *x.patches;
  const std::size_t down = row.kernel_row * p.dilation_h, right = row.kernel_col * p.dilation_w;
  for (std::size_t done = 0; done < n;) {
    const std::size_t run = min_of(n - done, p.out_width - at.x);
    const std::size_t y = at.y * p.stride_h + down - p.padding_h;  // wraps above the image
    T* const to = buffer + done;
    std::size_t begin = run, end = run;
    if (y < p.height) {
      // Column x stride + right - padding of the image, for x from at.x; begin and end bound those inside it.
      const std::size_t first = at.x * p.stride_w + right, limit = p.width + p.padding_w;
      begin = first >= p.padding_w ? 0 : min_of(run, (p.padding_w - first + p.stride_w - 1) / p.stride_w);
      if (first >= limit)
        end = begin;
      else if (first + (run - 1) * p.stride_w >= limit)
        end = (limit - first + p.stride_w - 1) / p.stride_w;
      if (end < begin) end = begin;
    }
    for (std::size_t i = 0; i < begin; ++i) to[i] = T{};
    if (begin < end) {
      const std::size_t column = (at.x + begin) * p.stride_w + right - p.padding_w;
      const std::ptrdiff_t offset = static_cast<std::ptrdiff_t>(at.image) * p.image_stride +
                                    static_cast<std::ptrdiff_t>((row.channel * p.height + y) * p.width + column);
      if (begin == 0 && end == n && p.stride_w == 1 && is_native<T>(x)) return static_cast<const T*>(x.data) + offset;
      read_strided(x, offset, static_cast<std::ptrdiff_t>(p.stride_w), end - begin, to + begin);
    }
    for (std::size_t i = end; i < run; ++i) to[i] = T{};
    done += run;
    at.x = 0;
    if (++at.y == p.out_height) {
      at.y = 0;
      ++at.image;
    }
  }
  return buffer;
}

// Elements (row, col) .. (row, col + n): in place where they lie together as T, else in `buffer`.
template <class T> const T* read(const Operand& x, std::size_t row, std::size_t col, std::size_t n, T* buffer) {
  if (x.layout == Layout::kPatches)
    return read_patches(x, PatchRow(*x.patches, row), PatchCol(*x.patches, x.first_col + col), n, buffer);
  std::ptrdiff_t offset = static_cast<std::ptrdiff_t>(col) * x.col_stride;
  if (x.row_offsets != nullptr) {
    offset += static_cast<std::ptrdiff_t>(x.row_offsets[row]);
  } else {
    if (x.row_inner != 0) {
      offset += static_cast<std::ptrdiff_t>(row / x.row_inner) * x.row_outer_stride;
      row %= x.row_inner;
    }
    offset += static_cast<std::ptrdiff_t>(row) * x.row_stride;
  }
  if (x.col_stride == 1 && is_native<T>(x)) return static_cast<const T*>(x.data) + offset;
  read_strided(x, offset, x.col_stride, n, buffer);
  return buffer;
}

// Filled up with ones, which no product minds.
template <class T> FASTOPS_INLINE typename Bits<T>::F load_some(const T* p, std::size_t n) {
  using F = typename Bits<T>::F;
  return n >= Bits<T>::kWidth ? load<F>(p) : simd::load_first<F>(p, n, T(1));
}

}  // namespace fastops::FASTOPS_LEVEL::matmul
#endif
