# SPDX-License-Identifier: BSD-3-Clause
"""The plain NumPy backend: the oracle of every other backend, and the documentation of the semantics."""

from __future__ import annotations

from typing import Any as _Any

from .. import _backend

__all__ = list(_backend.NAMES)


def __getattr__(name: str) -> _Any:
    return _backend.attribute(__name__, name)
