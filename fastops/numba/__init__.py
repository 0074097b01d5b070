# SPDX-License-Identifier: BSD-3-Clause
"""The fallback backend: the reference's semantics, bit for bit where that is exact arithmetic, compiled by Numba."""

from __future__ import annotations

from typing import Any as _Any

from .. import _backend
from .mitchell import set_num_threads as set_num_threads

__all__ = list(_backend.NAMES)


def __getattr__(name: str) -> _Any:
    return _backend.attribute(__name__, name)
