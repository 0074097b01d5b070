# SPDX-License-Identifier: BSD-3-Clause
"""fastops: numeric operations with native kernels, NumPy arrays in and NumPy arrays out.

Mitchell arithmetic (multiplication by adding approximate logarithms) as NumPy ufuncs, with matrix products, convolutions
and gradients. `show_config()` says what is compiled in and what was chosen.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from ._config import get_num_threads, set_num_threads, show_config, target
from ._multiplier import OPS as _OPS
from ._multiplier import Multiplier
from .mitchell import (
    lmul,
    lut_matmul,
    mitchell_conv2d,
    mitchell_conv2d_grad,
    mitchell_div,
    mitchell_div_grad,
    mitchell_exp2,
    mitchell_log2,
    mitchell_matmul,
    mitchell_matmul_grad,
    mitchell_mul,
    mitchell_mul_grad,
    mitchell_reciprocal,
    mitchell_rsqrt,
    mitchell_sqrt,
    mitchell_square,
)

try:
    __version__: str = _import_module(f"{__name__}._version").__version__
except ImportError:
    # The file is made by the build; a bare source tree has none.
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from .analysis import optimal_offset

__all__ = [
    "Multiplier",
    "__version__",
    "get_num_threads",
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
    "mitchell_reciprocal",
    "mitchell_rsqrt",
    "mitchell_sqrt",
    "mitchell_square",
    "optimal_offset",
    "set_num_threads",
    "show_config",
    "target",
]

_SUBMODULES = ("analysis", "bench", "native", "numba", "reference")


def __getattr__(name: str) -> Any:
    """What is loaded on demand, and the operations of a `Multiplier` by their names (pickles hold those)."""
    if name == "optimal_offset":
        from .analysis import optimal_offset

        return optimal_offset
    if name in _SUBMODULES:
        return _import_module(f"{__name__}.{name}")
    op, _, token = name.removeprefix("mitchell_").partition("__")
    if token and op in _OPS and name.startswith("mitchell_"):
        from ._backend import backend

        try:
            return backend.mitchell_op(op, Multiplier._from_token(token))
        except (OverflowError, TypeError, ValueError):
            pass
    raise AttributeError(f"module {__name__!r} has no attribute {name[:60]!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
