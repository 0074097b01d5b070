# SPDX-License-Identifier: BSD-3-Clause
"""fastops for torch: differentiable operators, modules, averages and optimizers over torch's own tensors, without copies.

Needs torch, which `import fastops` never loads.
"""

from __future__ import annotations

try:
    import torch as _torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("fastops.torch needs torch: pip install 'fastops[torch]'", name="torch") from None

from ._attention import linear_attention, linear_attention_step_, nystrom_attention, softmax_attention
from ._averaging import EMA
from ._distributed import distributed_linear_attention
from ._mitchell import mitchell_conv2d, mitchell_div, mitchell_matmul, mitchell_mul
from ._modules import LinearAttention, MitchellConv2d, MitchellLinear, NystromAttention, approximate, exact
from ._optim import AdamW

__all__ = [
    "EMA",
    "AdamW",
    "LinearAttention",
    "MitchellConv2d",
    "MitchellLinear",
    "NystromAttention",
    "approximate",
    "distributed_linear_attention",
    "exact",
    "linear_attention",
    "linear_attention_step_",
    "mitchell_conv2d",
    "mitchell_div",
    "mitchell_matmul",
    "mitchell_mul",
    "nystrom_attention",
    "softmax_attention",
]

del _torch
