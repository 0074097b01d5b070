# SPDX-License-Identifier: BSD-3-Clause
"""Matrix products on a GPU: shapes, and one launch a call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import _validate, mitchell
from .._multiplier import Multiplier
from .._validate import Text, clip
from ._arrays import DTYPES, FLOATS, View
from ._calls import returned
from ._mitchell import _constants, arrays_of, gradient_mode

__all__ = ["lut_matmul", "mitchell_matmul", "mitchell_matmul_grad"]

Triple = tuple[int, tuple[int, ...], tuple[int, ...]]
_BYTES = ("uint8", "int8")


def _as_matrices(a: View, b: View) -> tuple[Triple, Triple, tuple[int, ...], tuple[int, ...]]:
    """Both as (address, shape, strides) of two axes at least, the shape of their product, and its axes that are dropped."""
    for name, item in (("a", a), ("b", b)):
        if not item.shape:
            raise _validate.wrong_value(name, "an array of at least 1 dimension", Text("a 0-d array"))
    drop: tuple[int, ...] = ()
    left, right = a.triple, b.triple
    if len(a.shape) == 1:
        left, drop = (a.data, (1, *a.shape), (0, *a.strides)), (-2,)
    if len(b.shape) == 1:
        right, drop = (b.data, (*b.shape, 1), (*b.strides, 0)), (*drop, -1)
    if left[1][-1] != right[1][-2]:
        wanted = f"of shape (..., {left[1][-1]}, N) to follow a of shape {clip(str(a.shape))}"
        raise _validate.wrong_value("b", wanted, Text(clip(str(b.shape))))
    try:
        batch = _validate.broadcast_shapes(left[1][:-2], right[1][:-2])
    except ValueError:
        wanted = f"of leading dimensions that broadcast with {clip(str(left[1][:-2]))} of a"
        raise _validate.wrong_value("b", wanted, Text(clip(str(right[1][:-2])))) from None
    return left, right, (*batch, left[1][-2], right[1][-1]), drop


def _kept(shape: tuple[int, ...], drop: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(shape, -len(shape)) if i not in drop)


def _expanded(memory: View, drop: tuple[int, ...]) -> Triple:
    """A result with the axes of one element that `drop` took away."""
    shape, strides = list(memory.shape), list(memory.strides)
    for axis in sorted(drop, reverse=True):
        at = len(shape) + axis + 1
        shape.insert(at, 1)
        strides.insert(at, 0)
    return memory.data, tuple(shape), tuple(strides)


def mitchell_matmul(
    a: Any, b: Any, *, multiplier: Multiplier | None = None, out: Any = None, stream: Any = None
) -> Any:
    """Multiply matrices on a GPU with an approximate multiplier and exact sums.

    Parameters
    ----------
    a : (..., M, K) array of float16, bfloat16, float32 or float64
        On a GPU, of any strides. The leading dimensions broadcast with those of `b`; 1-D operands stand for a row and a column.
    b : (..., K, N) array
        Of the same dtype and device.
    multiplier : fastops.Multiplier, optional
        Mitchell's multiplier by default.
    out : (..., M, N) array, optional
        Where the result goes, of the same dtype and device, apart from the operands in memory; any strides.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Returns
    -------
    (..., M, N) array
        `out`, or a new array of the library of `a`. The call returns before the kernel has run.

    Raises
    ------
    RuntimeError, TypeError
        As `mitchell_mul`.
    ValueError
        Shapes that do not multiply, arrays on different devices, an `out` that does not fit or overlaps an operand.

    Notes
    -----
    Products, sums and subnormal operands as in `fastops.mitchell_matmul`; the order of the sum differs from the CPU's. An integer
    addition and a multiply-add for each of the M N K products: half the rate of a float32 product without tensor cores.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     a = torch.ones(2, 2, device="cuda")
    ...     y = fastops.cuda.mitchell_matmul(a, a)
    """
    chosen = mitchell._multiplier(multiplier)
    call = arrays_of(stream, out, a=a, b=b)
    dtype = call.dtype(FLOATS, "a", "b")
    left, right, shape, drop = _as_matrices(call.views["a"], call.views["b"])
    result, memory = call.output(out, _kept(shape, drop), (dtype,))
    constants = _constants(call.native, "mul", chosen)
    with call:
        call.native.matmul(constants, dtype, left, right, _expanded(memory, drop), call.device, call.stream)
    return result if out is not None else returned(call.like, result)


def mitchell_matmul_grad(
    a: Any, b: Any, dy: Any, *, multiplier: Multiplier | None = None, mode: str = "exact", stream: Any = None
) -> tuple[Any, Any]:
    """Differentiate `mitchell_matmul` with respect to its operands, on a GPU.

    Parameters
    ----------
    a : (..., M, K) array of float16, bfloat16, float32 or float64
        The first operand of the product: on a GPU, of any strides.
    b : (..., K, N) array
        The second one, of the same dtype and device.
    dy : (..., M, N) array
        The gradient of the result, of the same dtype and device.
    multiplier : fastops.Multiplier, optional
        That of the product.
    mode : {"exact", "ste", "mimic"}
        As in `fastops.mitchell_matmul_grad`.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Returns
    -------
    da : (..., M, K) array
        New, of the library of `a`, summed to its shape. The call returns before the kernel has run.
    db : (..., K, N) array
        Likewise for `b`.

    Raises
    ------
    RuntimeError, TypeError
        As `mitchell_mul_grad`.
    ValueError
        Shapes that do not fit, arrays on different devices, more than four leading dimensions that do not lie behind one another,
        an unknown `mode`.

    Notes
    -----
    Slopes and subnormal operands as in `fastops.mitchell_matmul_grad`; the sum over what the leading dimensions repeat is part of
    the same sum, in the precision of the accumulators. 2 M N K products; a sum over many terms to few elements is made in at most
    256 parts, which take memory.
    A. Kosson and M. Jaggi, NeurIPS 2023, section 3.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     a = torch.ones(2, 2, device="cuda")
    ...     da, db = fastops.cuda.mitchell_matmul_grad(a, a, a)
    """
    chosen = mitchell._multiplier(multiplier)
    code = gradient_mode(mode)
    call = arrays_of(stream, a=a, b=b, dy=dy)
    dtype = call.dtype(FLOATS, "a", "b", "dy")
    first, second = call.views["a"], call.views["b"]
    left, right, shape, drop = _as_matrices(first, second)
    _validate.same_shape("dy", call.views["dy"], _kept(shape, drop))
    da, to_a = call.output(None, first.shape, (dtype,))
    db, to_b = call.output(None, second.shape, (dtype,))
    with call:
        call.native.matmul_grad(
            _constants(call.native, "mul", chosen),
            code,
            dtype,
            left,
            right,
            _expanded(call.views["dy"], drop),
            *_as_matrices(to_a, to_b)[:2],
            call.device,
            call.stream,
        )
    return returned(call.like, da), returned(call.like, db)


def lut_matmul(a: Any, b: Any, table: ArrayLike, *, out: Any = None, stream: Any = None) -> Any:
    """Multiply 8-bit matrices on a GPU with any multiplier that a table describes.

    Parameters
    ----------
    a : (..., M, K) array of uint8 or int8
        On a GPU, of any strides. The leading dimensions broadcast with those of `b`; 1-D operands stand for a row and a column.
    b : (..., K, N) array of uint8 or int8
        On the same device; it may have the other of the two dtypes.
    table : (256, 256) array_like of integers
        In host memory: as in `fastops.lut_matmul`.
    out : (..., M, N) array of int32 or int64, optional
        Where the result goes, apart from the operands in memory; int32 is refused where the sum could overflow it.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Returns
    -------
    (..., M, N) array
        Exact sums: int32 where K max(abs(table)) fits, int64 otherwise.

    Raises
    ------
    RuntimeError
        No GPU.
    TypeError
        Operands that are not 8-bit integers on a GPU, a `table` of another kind than integers, an `out` of the wrong dtype.
    ValueError
        Shapes that do not multiply, entries out of range, arrays on different devices, an `out` that does not fit or overlaps.

    Notes
    -----
    M N K look-ups; each call copies the table (256 KB) to the GPU.

    Examples
    --------
    >>> import fastops, fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     a = torch.ones(2, 2, dtype=torch.uint8, device="cuda")
    ...     y = fastops.cuda.lut_matmul(a, a, fastops.Multiplier().table(8))
    """
    entries, largest = _validate.table("table", table)
    call = arrays_of(stream, out, a=a, b=b)
    for name in ("a", "b"):
        call.dtype(_BYTES, name)
    left, right, shape, drop = _as_matrices(call.views["a"], call.views["b"])
    bound = largest * left[1][-1]
    if bound > np.iinfo(np.int64).max:
        got = Text(clip(str(call.views["a"].shape)))
        raise _validate.wrong_value("a", "of fewer columns than overflow int64 sums", got)
    wide, narrow = DTYPES.index("int64"), DTYPES.index("int32")
    dtypes = (wide,) if bound > np.iinfo(np.int32).max else (narrow, wide)
    if math.prod(shape):
        call.refuse_capture("tables in host memory")
    result, memory = call.output(out, _kept(shape, drop), dtypes)
    is_wide = memory.dtype == wide
    # A table of int64 has entries that only an int64 sum holds.
    with call:
        call.native.lut_matmul(left, right, entries, is_wide, _expanded(memory, drop), call.device, call.stream)
    return result if out is not None else returned(call.like, result)
