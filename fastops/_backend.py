# SPDX-License-Identifier: BSD-3-Clause
"""The choice of the backend, made once at import: FASTOPS_BACKEND, else native, else what the install recorded."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from . import _validate

CHOICES = ("native", "numba", "reference")
VARIABLE = "FASTOPS_BACKEND"

# What every backend offers, by the module of its package that holds it; loaded when it is first asked for.
FAMILIES: dict[str, tuple[str, ...]] = {
    "attention": (
        "linear_attention",
        "linear_attention_backward",
        "linear_attention_step",
        "nystrom_attention",
        "nystrom_attention_backward",
        "plain_step",
        "softmax_attention",
    ),
    "mitchell": (
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
        "mitchell_op",
        "mitchell_reciprocal",
        "mitchell_rsqrt",
        "mitchell_sqrt",
        "mitchell_square",
        "ufunc_of_tensors",
    ),
    "optim": (
        "adamw_fits",
        "adamw_step",
        "adaptive_eg_step",
        "all_finite",
        "eg_step",
        "ema_update",
        "lazy_adamw_rows",
        "lookahead_sync",
        "sgd_step",
    ),
    "wordcount": ("table_from_bytes", "word_counter", "word_table"),
}
NAMES = sorted(name for names in FAMILIES.values() for name in names)

_HOW_TO_BUILD = (
    "fastops has no compiled module _core: build it with 'pip install .' in the source tree (needs a C++17 compiler), or "
    "set FASTOPS_BACKEND=numba or reference"
)


def attribute(package: str, name: str) -> Any:
    """The function `name` of the backend `package`, for its module's `__getattr__`."""
    for family, names in FAMILIES.items():
        if name in names:
            value = getattr(import_module(f"{package}.{family}"), name)
            setattr(sys.modules[package], name, value)
            return value
    raise AttributeError(f"module {package!r} has no attribute {_validate.clip(name)!r}")


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
