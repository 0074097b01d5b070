// SPDX-License-Identifier: BSD-3-Clause
// The register tile of a matrix product: Rows x Vectors accumulators, the arithmetic of one step given by a body.
#ifndef FASTOPS_CORE_TILE_H
#define FASTOPS_CORE_TILE_H

#include "core/simd.h"

namespace fastops::FASTOPS_LEVEL {

// A body has the types
//   Vector               the lanes of an accumulator
//   Row, Column          what a step needs of one row of a, of one vector of b
// and the functions (all inline; i, v and the step k are constants or counters of the unrolled loops)
//   Row row(k, i)                              element (i, k) of packed a
//   Column column(k, v)                        vector v of step k of packed b
//   Vector step(row, column, i, v, acc)        acc plus one term per lane
// Every accumulator must stay in a register: Rows * Vectors + Vectors + what a step holds is at most the level's count.
template <int Rows, int Vectors, class Body>
FASTOPS_INLINE void run_tile(const Body& body, std::size_t steps, typename Body::Vector (&acc)[Rows][Vectors]) {
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) acc[i][v] = typename Body::Vector{};
  for (std::size_t k = 0; k < steps; ++k) {
    typename Body::Column columns[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) columns[v] = body.column(k, v);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const typename Body::Row row = body.row(k, i);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) acc[i][v] = body.step(row, columns[v], i, v, acc[i][v]);
    }
  }
}

// The part of a tile that exists, from a copy of all of it.
template <class T>
__attribute__((noinline)) void store_part(const T* tile, std::size_t width, T* c, std::ptrdiff_t ldc, std::size_t rows,
                                          std::size_t cols, bool first) {
  for (std::size_t i = 0; i < rows; ++i, tile += width, c += ldc)
    for (std::size_t j = 0; j < cols; ++j) c[j] = first ? tile[j] : c[j] + tile[j];
}

// c (rows x cols of the tile that exist) = or += acc.
template <int Rows, int Vectors, class V, class T>
FASTOPS_INLINE void store_tile(const V (&acc)[Rows][Vectors], T* c, std::ptrdiff_t ldc, std::size_t rows,
                               std::size_t cols, bool first) {
  constexpr std::size_t kWidth = simd::kLanes<V>;
  if (rows == Rows && cols == Vectors * kWidth) {
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        T* p = c + i * ldc + v * static_cast<std::ptrdiff_t>(kWidth);
        simd::store(p, first ? acc[i][v] : simd::load<V>(p) + acc[i][v]);
      }
    return;
  }
  alignas(64) T tile[Rows * Vectors * kWidth];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) simd::store(tile + (i * Vectors + v) * kWidth, acc[i][v]);
  store_part(tile, Vectors * kWidth, c, ldc, rows, cols, first);
}

}  // namespace fastops::FASTOPS_LEVEL
#endif
