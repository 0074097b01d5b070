# SPDX-License-Identifier: BSD-3-Clause
"""fastops: numeric operations with native kernels, NumPy arrays in and NumPy arrays out.

Mitchell arithmetic (multiplication by adding approximate logarithms) as NumPy ufuncs, with matrix products, convolutions
and gradients; moving averages and optimizer steps over lists of tensors, in place; linear, Nystrom and
softmax attention; word counting. `show_config()` says what is compiled in and what was chosen.
"""

from __future__ import annotations

import sys as _sys
from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any


def _asked_for_folders() -> bool:
    """Whether `python -m fastops` is to print folders alone, for which NumPy is not needed."""
    return _sys.argv[:1] == ["-m"] and _import_module(f"{__name__}._folders").asked_alone()


if TYPE_CHECKING or not _asked_for_folders():
    from ._config import get_num_threads, set_num_threads, show_config, target
    from ._multiplier import OPS as _OPS
    from ._multiplier import Multiplier
    from ._validate import clip as _clip
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
    from ._counts import WordCounts
    from ._rule import DecodeError, TokenTooLong, WorkerDied
    from ._tensors import TensorList
    from ._workers import parallel_apply
    from ._zh import ZhTokenizer
    from .analysis import optimal_offset
    from .attention import (
        NystromInfo,
        favor_projection,
        linear_attention,
        linear_attention_backward,
        linear_attention_step_,
        logn_scale,
        nystrom_attention,
        nystrom_attention_backward,
        softmax_attention,
    )
    from .averaging import EMA, posthoc_ema_weights
    from .optim import (
        adamw_step_,
        adaptive_eg_step_,
        eg_step_,
        ema_update_,
        lazy_adamw_rows_,
        lookahead_sync_,
        sgd_step_,
    )
    from .wordcount import count_files, count_words

# In plain order, as a test has it.
__all__ = [  # noqa: RUF022
    "DecodeError",
    "EMA",
    "Multiplier",
    "NystromInfo",
    "TensorList",
    "TokenTooLong",
    "WordCounts",
    "WorkerDied",
    "ZhTokenizer",
    "__version__",
    "adamw_step_",
    "adaptive_eg_step_",
    "count_files",
    "count_words",
    "eg_step_",
    "ema_update_",
    "favor_projection",
    "get_num_threads",
    "lazy_adamw_rows_",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_step_",
    "lmul",
    "logn_scale",
    "lookahead_sync_",
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
    "nystrom_attention",
    "nystrom_attention_backward",
    "optimal_offset",
    "parallel_apply",
    "posthoc_ema_weights",
    "set_num_threads",
    "sgd_step_",
    "show_config",
    "softmax_attention",
    "target",
]

_SUBMODULES = (
    "analysis",
    "attention",
    "averaging",
    "bench",
    "cuda",
    "distributed",
    "jax",
    "keras",
    "native",
    "numba",
    "optim",
    "reference",
    "torch",
    "wordcount",
)
# Public names that are loaded when they are first asked for, and their modules.
_LATER = {
    "DecodeError": "_rule",
    "EMA": "averaging",
    "NystromInfo": "attention",
    "TensorList": "_tensors",
    "TokenTooLong": "_rule",
    "WordCounts": "_counts",
    "WorkerDied": "_rule",
    "ZhTokenizer": "_zh",
    "adamw_step_": "optim",
    "adaptive_eg_step_": "optim",
    "count_files": "wordcount",
    "count_words": "wordcount",
    "eg_step_": "optim",
    "ema_update_": "optim",
    "favor_projection": "attention",
    "lazy_adamw_rows_": "optim",
    "linear_attention": "attention",
    "linear_attention_backward": "attention",
    "linear_attention_step_": "attention",
    "logn_scale": "attention",
    "lookahead_sync_": "optim",
    "nystrom_attention": "attention",
    "nystrom_attention_backward": "attention",
    "optimal_offset": "analysis",
    "parallel_apply": "_workers",
    "posthoc_ema_weights": "averaging",
    "sgd_step_": "optim",
    "softmax_attention": "attention",
}


def __getattr__(name: str) -> Any:
    """What is loaded on demand, and the operations of a `Multiplier` by their names (pickles hold those)."""
    if name in _LATER:
        value = globals()[name] = getattr(_import_module(f"{__name__}.{_LATER[name]}"), name)
        return value
    if name in _SUBMODULES:
        return _import_module(f"{__name__}.{name}")
    op, _, token = name.removeprefix("mitchell_").partition("__")
    if token and op in _OPS and name.startswith("mitchell_"):
        from ._backend import backend

        try:
            return backend.mitchell_op(op, Multiplier._from_token(token))
        except (OverflowError, TypeError, ValueError):
            pass
    raise AttributeError(f"module {__name__!r} has no attribute {_clip(name)!r}")


def __dir__() -> list[str]:
    from ._backend import installed

    # Who looks at all names, as `help` does, must not meet one that raises.
    absent = [name for name in ("jax", "keras", "torch") if not installed(name)]
    return sorted({*globals(), *__all__, *_SUBMODULES}.difference(absent))
