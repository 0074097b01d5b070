# SPDX-License-Identifier: BSD-3-Clause
"""Thin typed access to the compiled attention kernels."""

from __future__ import annotations

from .. import _core

__all__ = [
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_step",
    "nystrom_attention",
    "nystrom_attention_backward",
    "plain_step",
    "softmax_attention",
]

linear_attention = _core.linear_attention
linear_attention_backward = _core.linear_attention_backward
linear_attention_step = _core.linear_attention_step
nystrom_attention = _core.nystrom_attention
nystrom_attention_backward = _core.nystrom_attention_backward
plain_step = _core.plain_step
softmax_attention = _core.softmax_attention
