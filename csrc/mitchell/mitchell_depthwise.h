// SPDX-License-Identifier: BSD-3-Clause
// Between the two ways of a gathered product on a GPU: tiles of a matrix, and planes of convolutions with few filters.
#ifndef FASTOPS_MITCHELL_MITCHELL_DEPTHWISE_H
#define FASTOPS_MITCHELL_MITCHELL_DEPTHWISE_H

#include "cuda/gpu.h"

namespace fastops::gpu {

// Of kPixels and kTaps.
std::size_t mitchell_depthwise_workspace(const GatheredMatmul& call) noexcept;
Status mitchell_depthwise(const fastops_mitchell* m, const GatheredMatmul& call, void* workspace,
                          Stream stream) noexcept;
// parts[part][matrix][row][column], in order, to the result.
Status mitchell_add_parts(const GatheredMatmul& call, void* parts, std::size_t splits, Stream stream) noexcept;

}  // namespace fastops::gpu
#endif
