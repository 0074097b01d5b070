# SPDX-License-Identifier: BSD-3-Clause
"""fastops for jax: differentiable operations on jax's arrays, under jit, vmap, grad and scan.

Needs jax, which `import fastops` never loads.
"""

from __future__ import annotations

try:
    import jax as _jax
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    raise ImportError("fastops.jax needs jax: pip install 'fastops[jax]'", name="jax") from None

from ._attention import linear_attention, linear_attention_step, nystrom_attention, softmax_attention
from ._mitchell import mitchell_conv2d, mitchell_div, mitchell_matmul, mitchell_mul
from ._ops import get_route, set_route

__all__ = [
    "get_route",
    "linear_attention",
    "linear_attention_step",
    "mitchell_conv2d",
    "mitchell_div",
    "mitchell_matmul",
    "mitchell_mul",
    "nystrom_attention",
    "set_route",
    "softmax_attention",
]

del _jax
