# SPDX-License-Identifier: BSD-3-Clause
"""The arrays of moving averages: which are followed, the shadows made for them, and how both are read and written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from . import _tensors, _validate
from ._validate import AnyArray, Text

Params = Iterable[Any] | Mapping[str, Any]

_CACHE_LINE: Final = 64


class Entry(NamedTuple):
    """One of the arrays that are followed."""

    name: str
    label: str
    """What errors call it."""
    kind: str
    """"float", or "copy", "average", "skip" of a buffer."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def check(self, label: str, array: AnyArray) -> None:
        """Refuses an array that cannot stand for this one."""
        fits = array.dtype in _validate.FLOAT_DTYPES if self.kind == "float" else array.dtype == self.dtype
        if not (fits and array.dtype.isnative):
            wanted = _validate.FLOAT_NAMES if self.kind == "float" else str(self.dtype)
            raise _validate.wrong_type(label, f"of dtype {wanted}", Text(_validate.clip(str(array.dtype), 40)))
        if array.shape != self.shape:
            raise _validate.wrong_value(
                label, _validate.clip(f"of shape {self.shape}", 80), Text(_validate.clip(str(array.shape), 40))
            )


def entries(params: Params, buffers: str) -> tuple[list[Entry], list[Any]]:
    """What is followed, checked, and the objects it came from."""
    if isinstance(params, Mapping):
        for key in params:
            if not isinstance(key, str):
                raise _validate.wrong_type(
                    "params", "a mapping of text to arrays", Text(f"a key of {type(key).__name__}")
                )
        names, sources = list(params), list(params.values())
        labels = [f"params[{_validate.clip(name, 40)!r}]" for name in names]
    else:
        sources = list(_tensors.as_list("params", params))
        names = [str(i) for i in range(len(sources))]
        labels = [f"params[{name}]" for name in names]
    entries = []
    for name, label, source in zip(names, labels, sources, strict=True):
        array = _tensors.as_ndarray(label, source)
        if array.dtype in _validate.FLOAT_DTYPES and array.dtype.isnative:
            kind = "float"
        elif array.dtype.kind in "iub" and array.dtype.isnative:
            kind = buffers
        else:
            wanted = f"of dtype {_validate.FLOAT_NAMES}, an integer or bool"
            raise _validate.wrong_type(label, wanted, Text(_validate.clip(str(array.dtype), 40)))
        entries.append(Entry(name, label, kind, array.shape, array.dtype))
    return entries, sources


def chosen_dtype(value: object) -> np.dtype[Any] | None:
    """The argument `shadow_dtype` of `fastops.EMA`, checked."""
    if value is None:
        return None
    wanted = "None, 'float32', 'float64' or 'bfloat16'"
    bfloat16 = _validate.bfloat16()
    if isinstance(value, str) and value == "bfloat16":
        if bfloat16 is None:
            raise _validate.wrong_value("shadow_dtype", "a dtype that NumPy knows", Text("bfloat16 without ml_dtypes"))
        return bfloat16
    try:
        dtype = np.dtype(value)  # type: ignore[call-overload]
    except TypeError:
        raise _validate.wrong_value("shadow_dtype", wanted, value) from None
    if dtype not in (*_tensors.WIDE_DTYPES, *([] if bfloat16 is None else [bfloat16])) or not dtype.isnative:
        raise _validate.wrong_value("shadow_dtype", wanted, value)
    return dtype  # type: ignore[no-any-return]


def dtype_of(entry: Entry, asked: np.dtype[Any] | None) -> np.dtype[Any]:
    """The dtype of the shadow of an array, where `asked` is what the user chose for floating-point ones."""
    if entry.kind == "copy":
        return entry.dtype
    if entry.kind == "average" or (asked is None and entry.dtype == np.float64):
        return np.dtype(np.float64)
    return np.dtype(np.float32) if asked is None else asked


def aligned(like: AnyArray, dtype: np.dtype[Any]) -> AnyArray:
    """A new array on a cache line, in the order of axes that `like` has in memory."""
    axes = sorted(range(like.ndim), key=lambda axis: -abs(like.strides[axis]))
    size = like.size * dtype.itemsize
    raw = np.empty(size + _CACHE_LINE, np.uint8)
    start = -raw.__array_interface__["data"][0] % _CACHE_LINE
    array = raw[start : start + size].view(dtype).reshape([like.shape[axis] for axis in axes])
    return array.transpose([axes.index(axis) for axis in range(like.ndim)])


def copy(array: AnyArray, like: AnyArray) -> AnyArray:
    """A copy on a cache line, in the order of axes that `like` has in memory."""
    new = aligned(like if like.shape == array.shape else array, array.dtype)
    new[...] = array
    return new


def portable(array: AnyArray) -> AnyArray:
    """bfloat16 as uint16: a file of NumPy's own dtypes can be read anywhere."""
    return array.view(np.uint16) if array.dtype == _validate.bfloat16() else array


def read(name: str, value: object, shadow: AnyArray) -> AnyArray:
    """An array of a state, in the dtype of the shadow that it is for."""
    array = _tensors.as_ndarray(name, value) if not isinstance(value, np.generic) else np.asarray(value)
    if shadow.dtype == _validate.bfloat16() and array.dtype in (np.dtype(np.uint16), np.dtype("V2")):
        array = array.view(shadow.dtype)
    if array.dtype != shadow.dtype or not array.dtype.isnative:
        raise _validate.wrong_type(
            name, f"of dtype {shadow.dtype}, as the shadow here", Text(_validate.clip(str(array.dtype), 40))
        )
    if array.shape != shadow.shape:
        raise _validate.wrong_value(
            name, _validate.clip(f"of shape {shadow.shape}", 80), Text(_validate.clip(str(array.shape), 40))
        )
    return array


def to_integers(average: AnyArray, dtype: np.dtype[Any]) -> AnyArray:
    """The nearest integers, half to even; the ends of 64-bit types are no float64 numbers."""
    rounded = np.rint(average)
    if dtype.kind == "b":
        return np.asarray(rounded != 0)
    high = np.iinfo(dtype).max
    inside = rounded < float(high) if dtype.itemsize == 8 else np.True_
    return np.asarray(np.where(inside, np.where(inside, rounded, 0).astype(dtype), dtype.type(high)))


def write(targets: list[AnyArray], values: list[tuple[AnyArray, float]]) -> KeyboardInterrupt | None:
    """target = value / divisor for all; an interrupt that came meanwhile, to be raised when the caller is done."""
    interrupt: KeyboardInterrupt | None = None
    i = 0
    with np.errstate(all="ignore"):
        while i < len(targets):
            try:
                while i < len(targets):
                    (value, divisor), target = values[i], targets[i]
                    if divisor == 1.0:
                        np.copyto(target, value, casting="unsafe")
                    else:
                        np.divide(value, divisor, out=target, dtype=np.float64, casting="unsafe")
                    i += 1
            except KeyboardInterrupt as error:
                # Writing the same array again does no harm.
                interrupt = error
    return interrupt
