# SPDX-License-Identifier: BSD-3-Clause
"""The compiled backend: true NumPy ufuncs, SIMD kernels for each CPU level, and threads."""

from __future__ import annotations

from typing import Any as _Any

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

__all__ = list(_backend.NAMES)


def __getattr__(name: str) -> _Any:
    return _backend.attribute(__name__, name)
