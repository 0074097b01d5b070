# SPDX-License-Identifier: BSD-3-Clause
"""How the Numba backend compiles: a loop for its one signature at its first call, kept in Numba's cache where there is one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numba
from numba import extending

# Of no type to the checker, whatever this version of Numba declares: it takes an intrinsic's typing context for an argument.
types: Any = numba.types
njit: Any = numba.njit
intrinsic: Any = extending.intrinsic


# One for all kernels, as Numba has one for all compilations. A fork waits for it: the child would find Numba's own held for
# ever by a thread that it has not.
_compiling = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
    )


class Kernel:
    """A loop that is compiled for its one signature when it is first called."""

    def __init__(self, function: Callable[..., Any], signature: Any, options: dict[str, Any]) -> None:
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self._function = function
        self._signature = signature
        self._options = options
        self._compiled: Any = None

    def __call__(self, *args: Any) -> Any:
        compiled = self._compiled
        if compiled is None:
            compiled = self._compile()
        return compiled(*args)

    def _compile(self) -> Any:
        with _compiling:
            if self._compiled is None:
                try:
                    self._compiled = njit(self._signature, nogil=True, cache=True, **self._options)(self._function)
                except Exception:  # noqa: BLE001 (what is wrong with the function itself is raised again)
                    # No place for the cache, one that cannot be written, or a damaged one: this process compiles for itself.
                    self._compiled = njit(self._signature, nogil=True, **self._options)(self._function)
        return self._compiled


def kernel(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Makes a `Kernel` of a function."""
    return lambda function: Kernel(function, signature, options)


def given(dtype: Any, ndim: int = 1, layout: str = "C") -> Any:
    """The type of an array that is only read; writeable ones convert to it."""
    return types.Array(dtype, ndim, layout, readonly=True)
