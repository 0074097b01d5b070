# SPDX-License-Identifier: BSD-3-Clause
"""The compiled module, loaded when a device is first asked for, and what it knows of devices."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .. import _backend

_loaded: Any = None
_usable: Any = None  # the module that has found a device


def _load() -> Any:
    global _loaded
    if _loaded is None and _backend.installed("fastops._cuda"):
        _loaded = import_module("fastops._cuda")
    return _loaded


def module() -> Any:
    """The compiled module; RuntimeError where it or a device is missing."""
    global _usable
    native = _load()
    if native is not None and native is _usable:
        return native
    if native is None:
        raise RuntimeError("no CUDA: fastops was built without it (needs nvcc at build: FASTOPS_CUDA=on pip install .)")
    why = native.problem()
    if why is not None:
        raise RuntimeError(f"no CUDA device: {why}")
    _usable = native
    return native


def device_count() -> int:
    """The number of GPUs that this process can use.

    Returns
    -------
    int
        0 without a driver, without a GPU, and where fastops was built without CUDA.

    Examples
    --------
    >>> import fastops.cuda
    >>> fastops.cuda.device_count() >= 0
    True
    """
    native = _load()
    return 0 if native is None else int(native.device_count())


def is_available() -> bool:
    """Whether there is a GPU that the functions of `fastops.cuda` can use.

    Returns
    -------
    bool
        False without a driver, without a GPU, and where fastops was built without CUDA: every other function then raises a
        RuntimeError that says which.

    Examples
    --------
    >>> import fastops.cuda
    >>> fastops.cuda.is_available() == (fastops.cuda.device_count() > 0)
    True
    """
    return device_count() > 0
