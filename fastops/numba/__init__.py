# SPDX-License-Identifier: BSD-3-Clause
"""The fallback backend: the reference's semantics, bit for bit where that is exact arithmetic, compiled by Numba."""

from .mitchell import (
    lmul,
    lut_matmul,
    mitchell_conv2d,
    mitchell_conv2d_grad,
    mitchell_div,
    mitchell_div_grad,
    mitchell_exp2,
    mitchell_log2,
    mitchell_matmul,
    mitchell_matmul_grad,
    mitchell_mul,
    mitchell_mul_grad,
    mitchell_op,
    mitchell_reciprocal,
    mitchell_rsqrt,
    mitchell_sqrt,
    mitchell_square,
    set_num_threads,
)

__all__ = [
    "lmul",
    "lut_matmul",
    "mitchell_conv2d",
    "mitchell_conv2d_grad",
    "mitchell_div",
    "mitchell_div_grad",
    "mitchell_exp2",
    "mitchell_log2",
    "mitchell_matmul",
    "mitchell_matmul_grad",
    "mitchell_mul",
    "mitchell_mul_grad",
    "mitchell_op",
    "mitchell_reciprocal",
    "mitchell_rsqrt",
    "mitchell_sqrt",
    "mitchell_square",
    "set_num_threads",
]
