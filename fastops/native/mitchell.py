# SPDX-License-Identifier: BSD-3-Clause
"""Thin typed access to the compiled Mitchell kernels: outputs are allocated and broadcast shapes resolved here."""

from __future__ import annotations

import contextlib
import os
import sys
from _thread import allocate_lock
from typing import Any

import numpy as np

from .. import _core, _docs
from .._multiplier import Multiplier, OpSpec
from .._validate import AnyArray, broadcast_shapes, matmul_shape

Pair = tuple[int, int]

_ufuncs: dict[tuple[str, Multiplier], np.ufunc] = {}
# The module `threading` is not imported for one lock.
_lock = allocate_lock()


def _renew_lock() -> None:
    """In the child of a fork: the thread that may have held the lock is not there to let it go."""
    global _lock
    _lock = allocate_lock()


os.register_at_fork(after_in_child=_renew_lock)


def mitchell_op(op: str, multiplier: Multiplier) -> np.ufunc:
    """The ufunc of an operation under a multiplier; the same object for equal arguments."""
    key = (op, multiplier)
    found = _ufuncs.get(key)
    if found is not None:
        return found
    with _lock:
        found = _ufuncs.get(key)
        if found is None:
            name = multiplier._op_name(op)
            found = _core.make_ufunc(op, name, _docs.ufunc_doc(name, op, multiplier), multiplier.spec(op))
            # NumPy before 2.2 gives ufuncs no attributes; pickle then searches the imported modules for the name.
            with contextlib.suppress(AttributeError):
                found.__module__ = "fastops"
            _ufuncs[key] = found
            # Loaded where Numba has been asked for it; while it is imported there is no `add` yet, and it will find this one itself.
            add = getattr(sys.modules.get("fastops._numba_overloads"), "add", None)
            if add is not None:
                add(op, multiplier, found)
    return found


ufunc_of_tensors = _core.ufunc_of_tensors

mitchell_mul = mitchell_op("mul", Multiplier())
mitchell_div = mitchell_op("div", Multiplier())
mitchell_square = mitchell_op("square", Multiplier())
mitchell_reciprocal = mitchell_op("reciprocal", Multiplier())
mitchell_sqrt = mitchell_op("sqrt", Multiplier())
mitchell_rsqrt = mitchell_op("rsqrt", Multiplier())
mitchell_log2 = mitchell_op("log2", Multiplier())
mitchell_exp2 = mitchell_op("exp2", Multiplier())
lmul = mitchell_op("mul", Multiplier("lmul"))


_specs: dict[tuple[str, Multiplier], OpSpec] = {}


def _spec(op: str, multiplier: Multiplier) -> OpSpec:
    """The description that the kernels take; `_core` knows an object that it has met before by its address."""
    key = (op, multiplier)
    found = _specs.get(key)
    return found if found is not None else _specs.setdefault(key, multiplier.spec(op))


def _is_regular(x: AnyArray) -> bool:
    """Whether the elements are aligned and whole elements apart."""
    flags = x.flags
    return flags.aligned and (flags.c_contiguous or all(stride % x.itemsize == 0 for stride in x.strides))


def _regular(x: AnyArray) -> AnyArray:
    return x if _is_regular(x) else x.copy()


def _contiguous(x: AnyArray) -> AnyArray:
    return x if x.flags.c_contiguous and x.flags.aligned else x.copy()


def _into(out: AnyArray | None, shape: tuple[int, ...], dtype: np.dtype[Any], contiguous: bool = False) -> AnyArray:
    """Where a kernel writes: `out` itself where the kernel can, a fresh array otherwise."""
    if out is None or (contiguous and not out.flags.c_contiguous) or not _is_regular(out):
        return np.empty(shape, dtype)
    return out


def _deliver(result: AnyArray, out: AnyArray | None) -> AnyArray:
    if out is None or result is out:
        return result
    out[...] = result
    return out


def mitchell_matmul(a: AnyArray, b: AnyArray, *, multiplier: Multiplier, out: AnyArray | None = None) -> AnyArray:
    """The product of a (..., M, K) and b (..., K, N) under a multiplier."""
    result = _into(out, matmul_shape(a, b), a.dtype)
    _core.matmul(_regular(a), _regular(b), _spec("mul", multiplier), result)
    return _deliver(result, out)


def exact_matmul(a: AnyArray, b: AnyArray, *, out: AnyArray | None = None) -> AnyArray:
    """The exact product of a (..., M, K) and b (..., K, N), by the same tiling as the approximate one."""
    result = _into(out, matmul_shape(a, b), a.dtype)
    _core.exact_matmul(_regular(a), _regular(b), result)
    return _deliver(result, out)


def mitchell_conv2d(
    x: AnyArray,
    w: AnyArray,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    multiplier: Multiplier,
    out: AnyArray | None = None,
) -> AnyArray:
    """The convolution of x (N, C, H, W) with w (O, C/groups, KH, KW) under a multiplier."""
    size = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    result = _into(out, (x.shape[0], w.shape[0], *size), x.dtype, contiguous=True)
    image, kernel = _contiguous(x), _contiguous(w)
    _core.conv2d(image, kernel, stride, padding, dilation, groups, _spec("mul", multiplier), result)
    return _deliver(result, out)


def lut_matmul(a: AnyArray, b: AnyArray, table: AnyArray, *, out: AnyArray) -> AnyArray:
    """The product of 8-bit a (..., M, K) and b (..., K, N), each term read from a (256, 256) table."""
    result = _into(out, out.shape, out.dtype)
    _core.lut_matmul(a, b, table, result)
    return _deliver(result, out)


def _mode(mode: str) -> int:
    return ("exact", "ste", "mimic").index(mode)


def _sum_to(gradient: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """Sums over the axes along which an operand of this shape was broadcast."""
    if gradient.shape == shape:
        return gradient
    lead = gradient.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(shape) if n == 1 and gradient.shape[lead + i] != 1)
    # Half precision sums in float32, as the kernels do.
    wide = np.float32 if gradient.dtype.itemsize == 2 else gradient.dtype
    summed: AnyArray = gradient.sum(axis=axes, dtype=wide).reshape(shape)
    return summed.astype(gradient.dtype, copy=False)


def _elementwise_grad(
    kernel: Any, op: str, a: AnyArray, b: AnyArray, dy: AnyArray, multiplier: Multiplier, mode: str
) -> tuple[AnyArray, AnyArray]:
    shape = broadcast_shapes(a.shape, b.shape, dy.shape)
    left, right, upper = (_contiguous(np.broadcast_to(item, shape)) for item in (a, b, dy))
    da, db = np.empty_like(upper), np.empty_like(upper)
    kernel(left, right, upper, _spec(op, multiplier), _mode(mode), da, db)
    return _sum_to(da, a.shape), _sum_to(db, b.shape)


def mitchell_mul_grad(
    a: AnyArray, b: AnyArray, dy: AnyArray, *, multiplier: Multiplier, mode: str
) -> tuple[AnyArray, AnyArray]:
    """The gradients of `mitchell_mul`, summed to the shapes of the operands."""
    if mode == "mimic":
        mul = mitchell_op("mul", multiplier)
        with np.errstate(all="ignore"):
            return _sum_to(mul(dy, b), a.shape), _sum_to(mul(dy, a), b.shape)
    return _elementwise_grad(_core.mul_grad, "mul", a, b, dy, multiplier, mode)


def mitchell_div_grad(
    a: AnyArray, b: AnyArray, dy: AnyArray, *, multiplier: Multiplier, mode: str
) -> tuple[AnyArray, AnyArray]:
    """The gradients of `mitchell_div`, summed to the shapes of the operands."""
    if mode == "mimic":
        mul, div = mitchell_op("mul", multiplier), mitchell_op("div", multiplier)
        with np.errstate(all="ignore"):
            return _sum_to(div(dy, b), a.shape), _sum_to(-div(mul(dy, a), mul(b, b)), b.shape)
    return _elementwise_grad(_core.div_grad, "div", a, b, dy, multiplier, mode)


def mitchell_matmul_grad(
    a: AnyArray, b: AnyArray, dy: AnyArray, *, multiplier: Multiplier, mode: str
) -> tuple[AnyArray, AnyArray]:
    """The gradients of `mitchell_matmul`, summed to the shapes of the operands."""
    batch = dy.shape[:-2]
    da, db = np.empty(batch + a.shape[-2:], a.dtype), np.empty(batch + b.shape[-2:], b.dtype)
    _core.matmul_grad(_regular(a), _regular(b), _regular(dy), _spec("mul", multiplier), _mode(mode), da, db)
    return _sum_to(da, a.shape), _sum_to(db, b.shape)


def mitchell_conv2d_grad(
    x: AnyArray,
    w: AnyArray,
    dy: AnyArray,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    multiplier: Multiplier,
    mode: str,
) -> tuple[AnyArray, AnyArray]:
    """The gradients of `mitchell_conv2d`."""
    dx, dw = np.empty(x.shape, x.dtype), np.empty(w.shape, w.dtype)
    image, kernel, upper = (_contiguous(item) for item in (x, w, dy))
    _core.conv2d_grad(
        image, kernel, upper, stride, padding, dilation, groups, _spec("mul", multiplier), _mode(mode), dx, dw
    )
    return dx, dw
