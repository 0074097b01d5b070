# SPDX-License-Identifier: BSD-3-Clause
"""The compiled backend: true NumPy ufuncs, SIMD kernels for each CPU level, and threads."""

from __future__ import annotations

from .. import _backend

_backend.require_core()

from .. import _core

if (_cpu := _core.cpu_info())["architecture"] == "x86_64" and _cpu["level"] < 2:
    raise ImportError("fastops needs a CPU of level x86-64-v2 (SSE4.2, POPCNT); FASTOPS_BACKEND=reference runs on any")

try:
    from ml_dtypes import bfloat16 as _bfloat16
except ImportError:
    pass
else:
    # Loops for a dtype of another package go in when the ufunc is made, so this comes before the first one.
    _core.register_bfloat16(_bfloat16)

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
)
from .optim import (
    adamw_step,
    adaptive_eg_step,
    all_finite,
    eg_step,
    ema_update,
    lazy_adamw_rows,
    lookahead_sync,
    sgd_step,
)

__all__ = [
    "adamw_step",
    "adaptive_eg_step",
    "all_finite",
    "eg_step",
    "ema_update",
    "lazy_adamw_rows",
    "lmul",
    "lookahead_sync",
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
    "sgd_step",
]
