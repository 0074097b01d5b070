// SPDX-License-Identifier: BSD-3-Clause
// A tile of a matrix product on a GPU: its operands, split as for the CPU's packed panels, in shared memory, a square
// of sums in each thread's registers. Kernels differ in where they fetch the elements.
#ifndef FASTOPS_MITCHELL_MITCHELL_TILE_H
#define FASTOPS_MITCHELL_MITCHELL_TILE_H

#include "cuda/device.h"
#include "mitchell/mitchell_matmul_math.h"

namespace fastops::FASTOPS_LEVEL::matmul {

inline constexpr int kThreads = 256;
inline constexpr int kSide = 16;  // threads along a side of the tile
inline constexpr int kDepth = 8;  // steps of depth in shared memory at once

enum class Body {
  kPair,      // one or two exact products
  kLog,       // scale(a) float(bits(b) + mantissa(a))
  kSegments,  // the same, with a constant by the segments of both
  kSlope,     // slope(point, a) b
  kSlopeSegments,
};
FASTOPS_HD constexpr bool is_slope(Body body) { return body == Body::kSlope || body == Body::kSlopeSegments; }

// What the multiplier decides; fields as those of Product.
template <class T> struct Arithmetic {
  using Int = typename IntegerOf<T>::type;
  Pack pack_a, pack_b;
  int steps, corrections;
  Int c, keep;
  bool skips;      // elements of b that are not there (-0) have no term; else they are zeros
  Int table[256];  // 16 x 16, row: the segment of a (of point)
};
FASTOPS_DEVICE float from_half(std::uint16_t h, fastops_dtype dtype, bool flush) {
  const bool f16 = dtype == FASTOPS_F16;
  if (flush && (h & (f16 ? 0x7c00 : 0x7f80)) == 0) return half::from_bf16(h & 0x8000);
  return f16 ? half::from_f16(h) : half::from_bf16(h);
}
template <class T> FASTOPS_DEVICE T read(const char* matrix, std::ptrdiff_t offset, fastops_dtype dtype, bool flush) {
  if constexpr (sizeof(T) == 8) {
    return reinterpret_cast<const double*>(matrix)[offset];
  } else {
    if (dtype == FASTOPS_F32) return reinterpret_cast<const float*>(matrix)[offset];
    return from_half(reinterpret_cast<const std::uint16_t*>(matrix)[offset], dtype, flush);
  }
}

// The float of a sum of bits times the scale, added. A zero in b leaves a mantissa without exponent, which counts as
// zero.
FASTOPS_DEVICE float log_step(std::int32_t b, std::int32_t mantissa, float scale, float acc) {
  return fma_flushed(bits<float>(added<float>(b, mantissa)), scale, acc);
}
FASTOPS_DEVICE double log_step(std::int64_t b, std::int64_t mantissa, double scale, double acc) {
  const bool zero = (b & Bits<double>::kMagnitude) == 0;
  return simd::fma(bits<double>(zero ? b : added<double>(b, mantissa)), scale, acc);
}

// An element of a or b as it lies in shared memory: so many numbers, each in an array of its own.
template <class T, Body kBody> struct Entry {
  using B = Bits<T>;
  using Int = typename B::Int;
  static constexpr bool kTables = kBody == Body::kSegments || kBody == Body::kSlopeSegments;
  static constexpr int kArraysA = is_slope(kBody) ? 1 : kBody == Body::kSegments ? 3 : 2;
  static constexpr int kArraysB = kBody == Body::kPair ? 2 : 1;

  // Puts an element at `to`, in arrays of `size`; whether the short step cannot multiply it.
  static FASTOPS_DEVICE bool put_a(const Arithmetic<T>& arithmetic, const Int* table, T from, T* to, int size) {
    if constexpr (kBody == Body::kPair) {
      const Pair<T> x = pack_pair_a<T>(arithmetic, from);
      to[0] = x.first;
      to[size] = x.second;
      return is_large<T>(from);
    } else {
      const T x = clean<T>(from, arithmetic.keep);
      if constexpr (is_slope(kBody)) {
        to[0] = x;
      } else {
        const Int u = bits<Int>(x);
        Int c = arithmetic.c, mantissa, scale;
        if constexpr (kTables) {
          const Int segment = (u >> (B::kMantissa - 4)) & 15;
          c = table[segment * 16];
          to[2 * size] = bits<T>(static_cast<Int>(segment * 16));
        }
        log_entry<T>(u, c, &mantissa, &scale);
        if constexpr (kTables) mantissa -= c;
        to[0] = bits<T>(mantissa);
        to[size] = bits<T>(scale);
      }
      return is_odd<T>(x);
    }
  }
  static FASTOPS_DEVICE bool put_b(const Arithmetic<T>& arithmetic, T from, bool is_there, T* to, int size) {
    T first = from, second{};
    bool odd = false;
    if constexpr (kBody == Body::kPair) {
      const Pair<T> y = pack_pair_b<T>(arithmetic, from);
      first = y.first;
      second = y.second;
      odd = is_large<T>(from);
    } else if constexpr (!is_slope(kBody)) {
      first = clean<T>(from, arithmetic.keep);
      odd = is_odd<T>(first);
    }
    if (arithmetic.skips) first = is_there ? first + T(0) : -T(0);
    to[0] = first;
    if constexpr (kBody == Body::kPair) to[size] = second;
    return odd;
  }
};

// The points where N results of a thread take their slopes: the mantissa with the constant in [0, 1), and where a unit
// has left it for the exponent, or come from it.
template <class T, Body kBody, int N> struct Points {
  using B = Bits<T>;
  using Int = typename B::Int;
  static_assert(N <= 32);
  Int mantissa[is_slope(kBody) ? N : 1] = {};
  unsigned carried = 0, borrowed = 0;

  FASTOPS_DEVICE void set(const Arithmetic<T>& arithmetic, int at, T x) {
    const Int u = bits<Int>(clean<T>(x, arithmetic.keep));
    const Int m = (u & B::kMagnitude) >= B::kInfinity ? 0 : u & B::kFraction;
    if constexpr (kBody == Body::kSlopeSegments) {
      mantissa[at] = m;
    } else {
      const Int sum = m + arithmetic.c;
      const unsigned bit = 1u << at;
      carried |= sum >= B::kSmallest ? bit : 0;
      borrowed |= sum < 0 ? bit : 0;
      mantissa[at] = sum - (sum >= B::kSmallest ? B::kSmallest : sum < 0 ? -B::kSmallest : 0);
    }
  }
  FASTOPS_DEVICE T factor(int at) const {
    return (carried >> at & 1) != 0 ? T(2) : (borrowed >> at & 1) != 0 ? T(0.5) : T(1);
  }
};

template <class T> FASTOPS_DEVICE bool is_skipped(const Arithmetic<T>& arithmetic, T b) {
  return arithmetic.skips && bits<typename Bits<T>::Int>(b) == Bits<T>::kSign;
}

template <class T, Body kBody, int kTile> struct Tile : Entry<T, kBody> {
  using Int = typename IntegerOf<T>::type;
  static constexpr int kLength = kSide * kTile;  // rows and columns of a block's tile
  static constexpr int kPitch = kLength + 4;     // rows of shared memory; the pad spreads a column over the banks
  static constexpr int kLoads = kLength * kDepth / kThreads;  // elements of a stage that a thread fetches
  static constexpr int kSize = kDepth * kPitch;
  static constexpr std::size_t kShared = 2 * (Tile::kArraysA + Tile::kArraysB) * kSize * sizeof(T) + 256 * sizeof(Int);
};

// Position i of a thread's square: groups of four, each group of all threads beside that of the others.
template <int kTile> FASTOPS_DEVICE int position(int thread, int i) { return i / 4 * (kSide * 4) + thread * 4 + i % 4; }

template <class T, int kTile> FASTOPS_DEVICE void load_line(const T* line, int thread, T (&to)[kTile]) {
#pragma unroll
  for (int i = 0; i < kTile; i += 4) {
    constexpr int kPart = 16 / sizeof(T) < 4 ? 16 / sizeof(T) : 4;
#pragma unroll
    for (int j = 0; j < 4; j += kPart) {
      const auto part = load_vector<Vector<T, kPart>>(line + position<kTile>(thread, i + j));
#pragma unroll
      for (int l = 0; l < kPart; ++l) to[i + j + l] = part.v[l];
    }
  }
}

// What becomes of fetched elements in the two stages of shared memory, and the sums of their products.
template <class T, Body kBody, int kTile> struct TileProduct {
  using S = Tile<T, kBody, kTile>;
  using B = Bits<T>;
  using Int = typename B::Int;
  static constexpr bool kSlopes = is_slope(kBody), kTables = S::kTables;

  const Arithmetic<T>& arithmetic;
  T* tiles;
  Int* table;
  int down, across;  // of the thread
  T acc[kTile][kTile] = {};
  Points<T, kBody, kSlopes ? kTile * kTile : 1> points;
  bool factored = false;

  FASTOPS_DEVICE TileProduct(const Arithmetic<T>& arithmetic_, void* shared)
      : arithmetic(arithmetic_),
        tiles(static_cast<T*>(shared)),
        table(reinterpret_cast<Int*>(tiles + 2 * (S::kArraysA + S::kArraysB) * S::kSize)),
        down(static_cast<int>(threadIdx.x) / kSide),
        across(static_cast<int>(threadIdx.x) % kSide) {
    if constexpr (kTables) {
      for (int i = static_cast<int>(threadIdx.x); i < 256; i += kThreads) table[i] = arithmetic.table[i];
      __syncthreads();
    }
  }

  FASTOPS_DEVICE void set_point(int i, int j, T x) { points.set(arithmetic, i * kTile + j, x); }
  FASTOPS_DEVICE T factor(int i, int j) const { return points.factor(i * kTile + j); }

  // Puts an element of a or b at `at` of a stage; whether the short step cannot multiply it.
  FASTOPS_DEVICE bool put_a(int stage, int at, T from) const {
    T* const to = tiles + stage * (S::kArraysA + S::kArraysB) * S::kSize + at;
    return S::put_a(arithmetic, table, from, to, S::kSize);
  }
  FASTOPS_DEVICE bool put_b(int stage, int at, T from, bool is_there = true) const {
    T* const to = tiles + (stage * (S::kArraysA + S::kArraysB) + S::kArraysA) * S::kSize + at;
    return S::put_b(arithmetic, from, is_there, to, S::kSize);
  }

  FASTOPS_DEVICE bool skipped(T b) const { return is_skipped(arithmetic, b); }

  // The products of a stage; kAny: of any operands. Written out: with a function for a term nvcc spills the tile of 8
  // x 8.
  template <bool kAny> FASTOPS_DEVICE void multiply(int stage) {
    const T* const line_a = tiles + stage * (S::kArraysA + S::kArraysB) * S::kSize;
    const T* const line_b = line_a + S::kArraysA * S::kSize;
    [[maybe_unused]] constexpr int kUnroll = kAny ? 1 : 4;
#pragma unroll kUnroll
    for (int k = 0; k < kDepth; ++k) {
      T first_a[kTile], first_b[kTile];
      load_line<T, kTile>(line_a + k * S::kPitch, down, first_a);
      load_line<T, kTile>(line_b + k * S::kPitch, across, first_b);
      if constexpr (kBody == Body::kPair) {
        T second_a[kTile] = {}, second_b[kTile] = {};
        if (arithmetic.steps == 2) {
          load_line<T, kTile>(line_a + S::kSize + k * S::kPitch, down, second_a);
          load_line<T, kTile>(line_b + S::kSize + k * S::kPitch, across, second_b);
        }
#pragma unroll
        for (int i = 0; i < kTile; ++i)
#pragma unroll
          for (int j = 0; j < kTile; ++j) {
            // Where a product may overflow, it does so before it is added.
            if constexpr (kAny) {
              if (!skipped(first_b[j])) acc[i][j] += simd::fma(second_a[i], second_b[j], first_a[i] * first_b[j]);
            } else {
              acc[i][j] = simd::fma(first_a[i], first_b[j], acc[i][j]);
            }
          }
        if (!kAny && arithmetic.steps == 2) {
#pragma unroll
          for (int i = 0; i < kTile; ++i)
#pragma unroll
            for (int j = 0; j < kTile; ++j) acc[i][j] = simd::fma(second_a[i], second_b[j], acc[i][j]);
        }
      } else if constexpr (kSlopes) {
#pragma unroll
        for (int i = 0; i < kTile; ++i)
#pragma unroll
          for (int j = 0; j < kTile; ++j) {
            const Int u = bits<Int>(first_a[i]);
            Int mantissa = points.mantissa[i * kTile + j];
            if constexpr (kTables)
              mantissa += table[(mantissa >> (B::kMantissa - 4)) * 16 + ((u >> (B::kMantissa - 4)) & 15)];
            if constexpr (kAny) {
              if (!skipped(first_b[j])) acc[i][j] += any_term<T>(u, mantissa, first_b[j], ~B::kFraction, factor(i, j));
            } else {
              acc[i][j] = simd::fma(bits<T>(added<T>(u, mantissa) & ~B::kFraction), first_b[j], acc[i][j]);
            }
          }
      } else {
        T second_a[kTile];
        load_line<T, kTile>(line_a + S::kSize + k * S::kPitch, down, second_a);
        [[maybe_unused]] Int row[kTile] = {};
        if constexpr (kTables) {
          T rows[kTile];
          load_line<T, kTile>(line_a + 2 * S::kSize + k * S::kPitch, down, rows);
#pragma unroll
          for (int i = 0; i < kTile; ++i) row[i] = bits<Int>(rows[i]);
        }
#pragma unroll
        for (int i = 0; i < kTile; ++i)
#pragma unroll
          for (int j = 0; j < kTile; ++j) {
            const Int u = bits<Int>(first_b[j]);
            Int mantissa = bits<Int>(first_a[i]);
            if constexpr (kTables) mantissa += table[row[i] + ((u >> (B::kMantissa - 4)) & 15)];
            if constexpr (kAny) {
              if (!skipped(first_b[j])) acc[i][j] += any_term<T>(u, mantissa, second_a[i], -1);
            } else {
              acc[i][j] = log_step(u, mantissa, second_a[i], acc[i][j]);
            }
          }
      }
    }
  }
  // `odd` is the same for all threads of the block.
  FASTOPS_DEVICE void multiply(int stage, bool odd) {
    if constexpr (kBody == Body::kSlopeSegments) {
      multiply<true>(stage);
    } else if constexpr (kBody == Body::kSlope) {
      // The factors wait for the end of the sum, or for the first odd stage, after which every term has its own. One
      // below 1 must not wait: what it halves could be infinite by then.
      if (!factored && (odd || arithmetic.c < 0)) apply_factors();
      if (factored)
        multiply<true>(stage);
      else
        multiply<false>(stage);
    } else if (odd) {
      multiply<true>(stage);
    } else {
      multiply<false>(stage);
    }
  }
  FASTOPS_DEVICE void apply_factors() {
#pragma unroll
    for (int i = 0; i < kTile; ++i)
#pragma unroll
      for (int j = 0; j < kTile; ++j) acc[i][j] *= factor(i, j);
    factored = true;
  }
  // After the last stage.
  FASTOPS_DEVICE void finish() {
    if constexpr (kBody == Body::kSlope)
      if (!factored) apply_factors();
  }
};

template <class T> FASTOPS_DEVICE void write(char* out, std::ptrdiff_t at, fastops_dtype dtype, T x) {
  if constexpr (sizeof(T) == 8) {
    reinterpret_cast<double*>(out)[at] = x;
  } else {
    if (dtype == FASTOPS_F32)
      reinterpret_cast<float*>(out)[at] = x;
    else
      reinterpret_cast<std::uint16_t*>(out)[at] = dtype == FASTOPS_F16 ? half::to_f16(x) : half::to_bf16(x);
  }
}

// Fills in what the multiplier decides (null: exact products). `transposed`: a is the second operand of its products,
// or the point that of its slopes.
template <class T>
Body set_arithmetic(const fastops_mitchell* m, fastops_dtype dtype, gpu::Terms terms, bool transposed,
                    Arithmetic<T>* arithmetic) noexcept {
  arithmetic->pack_a = arithmetic->pack_b = Pack::kRaw;
  arithmetic->steps = 1;
  arithmetic->keep = -1;
  if (m == nullptr || terms == gpu::Terms::kExact) return Body::kPair;
  const fastops_mitchell_params& params = m->params;
  const auto& k = [&]() -> const auto& {
    if constexpr (sizeof(T) == 4)
      return m->single[dtype];
    else
      return m->wide;
  }();
  const bool slopes = terms == gpu::Terms::kSlopes, equation = params.form == FASTOPS_FORM_EQUATION;
  arithmetic->keep = k.mantissa_mask | ~Bits<T>::kFraction;
  arithmetic->c = k.c;
  arithmetic->corrections = params.corrections;
  if (params.form != FASTOPS_FORM_LOG) {
    if (slopes) {
      arithmetic->pack_a = equation ? Pack::kPower : Pack::kTop;
    } else {
      arithmetic->pack_a = arithmetic->pack_b = equation ? Pack::kEquation : Pack::kIterative;
      arithmetic->steps = 2;
    }
    return Body::kPair;
  }
  if (params.segments == 0) return slopes ? Body::kSlope : Body::kLog;
  const int repeat = 16 / params.segments;
  for (int i = 0; i < 256; ++i) {
    const int row = (transposed ? i % 16 : i / 16) / repeat, col = (transposed ? i / 16 : i % 16) / repeat;
    arithmetic->table[i] = k.table[row * params.segments + col];
  }
  return slopes ? Body::kSlopeSegments : Body::kSegments;
}

inline std::size_t tiles_of(std::size_t n, std::size_t length) noexcept { return (n + length - 1) / length; }
template <class Call> FASTOPS_HD std::size_t batch_of(const Call& call) noexcept {
  std::size_t n = 1;
  for (const std::size_t length : call.batch) n *= length;
  return n;
}

}  // namespace fastops::FASTOPS_LEVEL::matmul
#endif
