# SPDX-License-Identifier: BSD-3-Clause
"""fastops on NVIDIA GPUs: the functions of the same names over arrays that lie on a GPU, without copies.

`import fastops` never loads it, and it needs neither a driver nor a GPU to be imported: `is_available` says whether there is one.
"""

from __future__ import annotations

from ._arrays import Array
from ._attention import linear_attention, linear_attention_backward, linear_attention_step_
from ._conv import mitchell_conv2d, mitchell_conv2d_grad
from ._matmul import lut_matmul, mitchell_matmul, mitchell_matmul_grad
from ._mitchell import (
    lmul,
    mitchell_div,
    mitchell_div_grad,
    mitchell_exp2,
    mitchell_log2,
    mitchell_mul,
    mitchell_mul_grad,
    mitchell_reciprocal,
    mitchell_rsqrt,
    mitchell_sqrt,
    mitchell_square,
)
from ._nystrom import nystrom_attention, nystrom_attention_backward
from ._optim import TensorList, adamw_step_, ema_update_, sgd_step_
from ._runtime import device_count, is_available

__all__ = [
    "Array",
    "TensorList",
    "adamw_step_",
    "device_count",
    "ema_update_",
    "is_available",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_step_",
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
    "mitchell_reciprocal",
    "mitchell_rsqrt",
    "mitchell_sqrt",
    "mitchell_square",
    "nystrom_attention",
    "nystrom_attention_backward",
    "sgd_step_",
]
