# SPDX-License-Identifier: BSD-3-Clause
"""The choice of the backend, made once at import: FASTOPS_BACKEND, else native, else what the install recorded."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

from . import _validate

CHOICES = ("native", "numba", "reference")
VARIABLE = "FASTOPS_BACKEND"

_HOW_TO_BUILD = (
    "fastops has no compiled module _core: build it with 'pip install .' in the source tree (needs a C++17 compiler), or "
    "set FASTOPS_BACKEND=numba or reference"
)


def installed(module: str) -> bool:
    """Whether a module could be imported, without importing it."""
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _built_without_native() -> bool:
    """Whether the install was asked to leave the compiled module out (FASTOPS_NATIVE=off)."""
    try:
        install = import_module(f"{__package__}._install")
    except ImportError:
        return False
    return not getattr(install, "NATIVE", True)


def load(backend: str) -> ModuleType:
    """The module of a backend; ImportError with what to do where it cannot be had."""
    if backend == "numba" and not installed("numba"):
        raise ImportError("FASTOPS_BACKEND=numba needs numba: pip install 'fastops[numba]'")
    return import_module(f"{__package__}.{backend}")


def require_core() -> None:
    """Imports `_core`; ImportError that says how to build it where it is absent, the loader's own words where it is broken."""
    core = f"{__package__}._core"
    try:
        import_module(core)
    except ModuleNotFoundError as error:
        if error.name == core:
            raise ImportError(_HOW_TO_BUILD, name=core) from None
        raise


def choose() -> tuple[str, str]:
    """The backend's name and why it is that one."""
    asked = os.environ.get(VARIABLE, "")
    if asked:
        if asked not in CHOICES:
            raise _validate.wrong_choice(VARIABLE, CHOICES, asked)
        return asked, f"{VARIABLE}={asked}"
    if _built_without_native():
        if installed("numba"):
            return "numba", "installed with FASTOPS_NATIVE=off, and numba is there"
        return "reference", "installed with FASTOPS_NATIVE=off, and numba is not there"
    return "native", "the default: the compiled module is there"


name, reason = choose()
backend = load(name)


def get() -> ModuleType:
    """The module of the chosen backend."""
    return backend
