# SPDX-License-Identifier: BSD-3-Clause
"""Checks of arguments, and the one place where the texts of their errors are made.

Every message reads "<argument> must be <what was wanted>, got <what came>", stays under 200 characters and never prints the
contents of an array.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np

try:
    from ml_dtypes import bfloat16 as _bfloat16
except ImportError:
    _bfloat16 = None

AnyArray = np.ndarray[Any, np.dtype[Any]]

FLOAT_DTYPES: tuple[np.dtype[Any], ...] = tuple(
    np.dtype(t) for t in (np.float16, _bfloat16, np.float32, np.float64) if t is not None
)
FLOAT_NAMES = "float16, bfloat16, float32 or float64"
GRADIENT_MODES = ("exact", "ste", "mimic")
MAX_THREADS = 1024
MAX_COUNT = 2**63 - 1

# A product of sizes above this cannot be an array on a 64-bit machine.
_MAX_BYTES = 2**63 - 1
_MAX_TEXT = 60
# What float() takes all the same.
_NO_NUMBERS = (bool, np.bool_, str, bytes, bytearray, memoryview, np.timedelta64)
# Python refuses to print much longer integers.
_MAX_BITS = 1024


def bfloat16() -> np.dtype[Any] | None:
    """The dtype of ml_dtypes where it is installed."""
    return None if _bfloat16 is None else np.dtype(_bfloat16)


class Text(str):
    """What came, already put in words."""


ON_CUDA = Text("an array on a GPU, which fastops.cuda takes")


def describe(value: object) -> str:
    """A short text for what came: type, shape and dtype of an array, never its contents."""
    if isinstance(value, Text):
        return value
    if isinstance(value, np.ndarray):
        return f"an array of shape {clip(str(value.shape))} and dtype {clip(str(value.dtype))}"
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, bytes, int, float, complex, np.generic)) or value is None:
        return clip(repr(value))
    if isinstance(value, tuple) and all(isinstance(item, (int, float)) for item in value):
        return clip("(" + ", ".join(map(describe, value)) + ("," if len(value) == 1 else "") + ")")
    return f"an object of type {clip(type(value).__name__)}"


def dtype_of(x: AnyArray) -> object:
    """What came where an array of another dtype was wanted: that dtype, or what is no array at all."""
    return x.item() if x.dtype == object and not x.ndim else Text(clip(str(x.dtype), 40))


def clip(text: str, most: int = _MAX_TEXT) -> str:
    """The text, or its beginning and a mark where it is longer than `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def wrong_type(name: str, wanted: str, got: object) -> TypeError:
    """The TypeError for an argument of the wrong type or dtype."""
    return TypeError(f"{name} must be {wanted}, got {describe(got)}")


def wrong_value(name: str, wanted: str, got: object) -> ValueError:
    """The ValueError for an argument of the wrong shape or value."""
    return ValueError(f"{name} must be {wanted}, got {describe(got)}")


def not_offered(name: str, wanted: str, got: object) -> NotImplementedError:
    """The NotImplementedError for what cannot be had here."""
    return NotImplementedError(f"{name} must be {wanted}, got {describe(got)}")


def busy(name: str) -> RuntimeError:
    """The RuntimeError for an object that a call of another thread is using."""
    return RuntimeError(f"{name} must be used by one thread at a time, got a call during another")


def wrong_moment(name: str, wanted: str, got: str) -> RuntimeError:
    """The RuntimeError for a call that the state of its object does not allow."""
    return RuntimeError(f"{name} must be {wanted}, got {got}")


def no_pickle(name: str, why: str) -> TypeError:
    """The TypeError for an object that stands for something of this process alone."""
    return TypeError(f"{name} must not be pickled: {why}")


def wrong_choice(name: str, choices: Iterable[str], got: object) -> ValueError:
    """The ValueError for an unknown name: it lists the choices and suggests the closest."""
    from difflib import get_close_matches

    known = list(choices)
    listed = " or ".join(repr(choice) for choice in known) if known else "absent (there are no choices here)"
    close = get_close_matches(str(got)[:_MAX_TEXT], known, n=1) if isinstance(got, str) else []
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(f"{name} must be {listed}, got {describe(got)}{hint}")


def choice(name: str, value: object, choices: Sequence[str]) -> str:
    """`value` if it is one of `choices`."""
    if isinstance(value, str) and value in choices:
        return value
    if not isinstance(value, str):
        raise wrong_type(name, " or ".join(repr(item) for item in choices), value)
    raise wrong_choice(name, choices, value)


def default_workers() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def integer(name: str, value: object, low: int, high: int = MAX_COUNT) -> int:
    """`value` as an int in [low, high]; bool and float are refused."""
    wanted = f"an integer >= {low}" if high == MAX_COUNT else f"an integer in [{low}, {high}]"
    if isinstance(value, (bool, np.bool_)):
        raise wrong_type(name, wanted, value)
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise wrong_type(name, wanted, value) from None
    if number > high == MAX_COUNT:
        raise wrong_value(name, "an integer below 2**63", number)
    if not low <= number <= high:
        raise wrong_value(name, wanted, number)
    return number


def number(
    name: str, value: object, low: float, high: float = np.inf, *, open_low: bool = False, open_high: bool = False
) -> float:
    """`value` as a finite float in the interval; bool and arrays with axes are refused."""
    if type(value) is float and low < value < high:
        return value
    left, right = "(" if open_low else "[", ")" if open_high or high == np.inf else "]"
    wanted = f"a finite number in {left}{low:g}, {high:g}{right}"
    if isinstance(value, _NO_NUMBERS) or getattr(value, "ndim", None):
        raise wrong_type(name, wanted, value)
    try:
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise wrong_type(name, wanted, value) from None
    above = low < result if open_low else low <= result
    below = result < high if open_high or high == np.inf else result <= high
    if not (above and below):
        raise wrong_value(name, wanted, result)
    return result


def boolean(name: str, value: object) -> bool:
    """`value` as a bool; numbers are refused."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise wrong_type(name, "True or False", value)


def integer_pair(name: str, value: object, low: int) -> tuple[int, int]:
    """`value` as (height, width): one integer for both, or a pair of integers."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise wrong_value(name, "an integer or a pair of integers", Text(f"{len(value)} items"))
        first, second = (integer(name, item, low, 2**31 - 1) for item in value)
        return first, second
    number = integer(name, value, low, 2**31 - 1)
    return number, number


def has_cuda_interface(value: object) -> bool:
    """Whether an array says where it is on a GPU. Ours is not asked: its answer lends it to the asker."""
    return getattr(type(value), "_is_on_gpu", False) or hasattr(value, "__cuda_array_interface__")


def array(name: str, value: object) -> AnyArray:
    """`value` as a plain ndarray."""
    if type(value) is np.ndarray:
        return value
    if hasattr(value, "mask") and isinstance(value, np.ndarray):
        raise wrong_type(name, "an array without a mask (fill it first)", Text("a masked array"))
    if has_cuda_interface(value):
        raise wrong_type(name, "an array in host memory", ON_CUDA)
    if hasattr(value, "__dlpack__"):
        from . import _dlpack

        if _dlpack.is_bare(value):
            return _dlpack.from_dlpack(name, value)
    try:
        result = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        if hasattr(value, "data_ptr") and hasattr(value, "detach"):
            _refuse_tensor(name, value)
        if isinstance(error, RuntimeError):
            raise
        raise wrong_value(name, "an array or what numpy.asarray takes", Text(type(value).__name__)) from None
    return result


def _refuse_tensor(name: str, tensor: Any) -> NoReturn:
    """Raises for a torch tensor that NumPy does not read, with the way around it."""
    dtype = clip(str(tensor.dtype), 20)
    if tensor.requires_grad:
        got = Text("a tensor with requires_grad=True")
        raise wrong_type(name, "a tensor outside autograd (its detach())", got) from None
    if dtype == "torch.bfloat16":
        wanted = "a tensor that NumPy can read (its view(torch.int16).numpy().view(ml_dtypes.bfloat16))"
        raise wrong_type(name, wanted, Text(f"one of {dtype}")) from None
    layout, device = clip(str(tensor.layout), 20), clip(str(tensor.device), 20)
    got = Text(f"a {clip(type(tensor).__name__, 30)} of {dtype}, {layout} on {device}")
    raise wrong_type(name, "a dense tensor on the CPU that NumPy can read", got) from None


def float_arrays(**values: object) -> list[AnyArray]:
    """The arguments as arrays of one floating-point dtype in native byte order, promoted as NumPy promotes."""
    arrays = {name: array(name, value) for name, value in values.items()}
    first, *others = (item.dtype for item in arrays.values())
    if first in FLOAT_DTYPES and first.isnative and all(dtype is first for dtype in others):
        return list(arrays.values())
    for name, item in arrays.items():
        if item.dtype.newbyteorder("=") not in FLOAT_DTYPES:
            raise wrong_type(name, FLOAT_NAMES, dtype_of(item))
    try:
        dtype = np.result_type(*(item.dtype for item in arrays.values()))
    except TypeError:  # float16 and bfloat16 have none
        got = " and ".join(str(item.dtype) for item in arrays.values())
        wanted = f"of dtypes with a common one among {FLOAT_NAMES}"
        raise wrong_type(" and ".join(arrays), wanted, Text(got)) from None
    if dtype not in FLOAT_DTYPES:
        names = " and ".join(arrays)
        raise wrong_type(names, f"of dtypes with a common one among {FLOAT_NAMES}", Text(str(dtype)))
    return [item.astype(dtype, copy=False) for item in arrays.values()]


def byte_array(name: str, value: object) -> AnyArray:
    """`value` as a uint8 or int8 array."""
    result = array(name, value)
    if result.dtype not in (np.dtype(np.uint8), np.dtype(np.int8)):
        raise wrong_type(name, "uint8 or int8", dtype_of(result))
    return result


def table(name: str, value: object) -> tuple[AnyArray, int]:
    """`value` as a C-contiguous (256, 256) array of int32 (int64 where an entry exceeds it), and the largest magnitude."""
    result = array(name, value)
    if result.dtype.kind not in "iu":
        raise wrong_type(name, "an integer array", dtype_of(result))
    if result.shape != (256, 256):
        raise wrong_value(name, "of shape (256, 256)", Text(str(result.shape)))
    try:
        low, high = int(result.min()), int(result.max())
    except SystemError:  # NumPy's reductions lose the MemoryError of their buffers
        raise MemoryError from None
    if low < -(2**31) or high >= 2**32:
        raise wrong_value(name, "of entries in [-2**31, 2**32)", Text(f"entries from {low} to {high}"))
    return np.ascontiguousarray(result, dtype=np.int32 if high < 2**31 else np.int64), max(-low, high)


def matmul_shape(a: AnyArray, b: AnyArray) -> tuple[int, ...]:
    """The shape of the product of a (..., M, K) and b (..., K, N); both have at least two dimensions."""
    if a.shape[-1] != b.shape[-2]:
        raise wrong_value(
            "b",
            f"of shape (..., {a.shape[-1]}, N) to follow a of shape {clip(str(a.shape))}",
            Text(clip(str(b.shape))),
        )
    if a.ndim == b.ndim == 2:
        return a.shape[0], b.shape[1]
    try:
        batch = broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise wrong_value(
            "b",
            f"of leading dimensions that broadcast with {clip(str(a.shape[:-2]))} of a",
            Text(clip(str(b.shape[:-2]))),
        ) from None
    return (*batch, a.shape[-2], b.shape[-1])


def broadcast_shapes(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """`numpy.broadcast_shapes` for as many dimensions as an array may have: NumPy's own stops at 32, its arrays at 64."""
    common = [1] * max(map(len, shapes))
    for shape in shapes:
        for axis, length in enumerate(shape, len(common) - len(shape)):
            if length != 1:
                if common[axis] not in (1, length):
                    raise wrong_value("shapes", "such that they broadcast", Text(clip(str(shapes))))
                common[axis] = length
    return tuple(common)


def without_common_ones(a: AnyArray, b: AnyArray) -> tuple[AnyArray, AnyArray, tuple[int, ...]]:
    """Operands of more than 32 dimensions without the leading ones of length 1 in both, as views; and these axes' numbers.

    Axes count from the end of the product's shape. Backends add an axis of their own, which the last of NumPy's dimensions
    would leave no room for.
    """
    ndim = max(a.ndim, b.ndim)
    if ndim <= 32:
        return a, b, ()

    def is_one(item: AnyArray, axis: int) -> bool:
        return item.ndim < -axis or item.shape[axis] == 1

    ones = tuple(axis for axis in range(-ndim, -2) if is_one(a, axis) and is_one(b, axis))
    a, b = (item.squeeze(tuple(axis for axis in ones if item.ndim >= -axis)) for item in (a, b))
    return a, b, ones


def at_least_2d(a: AnyArray, b: AnyArray) -> tuple[AnyArray, AnyArray, tuple[int, ...]]:
    """1-D operands of a matrix product as a row and a column, and the result's axes to drop (as `numpy.matmul`)."""
    for name, item in (("a", a), ("b", b)):
        if item.ndim == 0:
            raise wrong_value(name, "an array of at least 1 dimension", Text("a 0-d array"))
    drop: tuple[int, ...] = ()
    if a.ndim == 1:
        a = a[np.newaxis, :]
        drop += (-2,)
    if b.ndim == 1:
        b = b[:, np.newaxis]
        drop += (-1,)
    return a, b, drop


class Shaped(Protocol):
    """What has a shape: an array or a tensor of any library."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...


def same_shape(name: str, value: Shaped, shape: tuple[int, ...]) -> None:
    """Refuses an array of another shape."""
    if value.shape != shape:
        raise wrong_value(name, f"of shape {clip(str(shape))}", Text(clip(str(value.shape))))


def broadcast_shape(**arrays: AnyArray) -> tuple[int, ...]:
    """The common shape of the arrays."""
    try:
        return broadcast_shapes(*(item.shape for item in arrays.values()))
    except ValueError:
        (_, first), *others = arrays.items()
        name = others[-1][0]
        raise wrong_value(
            name,
            f"of a shape that broadcasts with {clip(str(first.shape))}",
            Text(clip(str(others[-1][1].shape))),
        ) from None


def fits_memory(name: str, shape: tuple[int, ...], itemsize: int) -> None:
    """Refuses a result whose size in bytes no address reaches."""
    size = itemsize
    for length in shape:
        size *= length
    if size > _MAX_BYTES:
        raise wrong_value(name, "of less than 2**63 bytes", Text(f"a result of shape {clip(str(shape))}"))


def out_array(
    out: object, shape: tuple[int, ...], dtypes: Sequence[np.dtype[Any]], inputs: dict[str, AnyArray]
) -> AnyArray:
    """`out` if the result can be written there without a copy and without touching an input."""
    if not isinstance(out, np.ndarray):
        raise wrong_type("out", f"an ndarray of dtype {_either(dtypes)} or None", out)
    if hasattr(out, "mask"):
        raise wrong_type("out", "an array without a mask", Text("a masked array"))
    if out.dtype not in dtypes:
        raise wrong_type(
            "out",
            f"of dtype {_either(dtypes)}",
            Text(clip(str(out.dtype))),
        )
    same_shape("out", out, shape)
    writable("out", out)
    for name, item in inputs.items():
        if share_memory(out, item):
            raise wrong_value("out", f"memory apart from {name}", Text(f"an array that overlaps {name}"))
    return out


def writable(name: str, value: AnyArray) -> None:
    """Refuses an array that is read-only or holds an element twice."""
    if not value.flags.writeable:
        raise wrong_value(name, "writable", Text("a read-only array"))
    if overlaps_itself(value):
        raise wrong_value(name, "an array whose elements are all distinct in memory", Text("overlapping strides"))


def byte_bounds(x: AnyArray) -> tuple[int, int]:
    """The first address of an array and the one past its last."""
    low = high = x.__array_interface__["data"][0]
    for stride, length in zip(x.strides, x.shape, strict=True):
        reach = stride * (length - 1)
        low, high = low + min(reach, 0), high + max(reach, 0)
    return low, high + x.itemsize


def share_memory(x: AnyArray, y: AnyArray) -> bool:
    """Whether an element of one lies in the memory of the other."""
    if not np.may_share_memory(x, y):
        return False
    try:
        # The exact answer is a Diophantine problem; beyond this much work the bounds decide.
        return bool(np.shares_memory(x, y, max_work=10_000))  # type: ignore[arg-type]
    except RuntimeError:
        return True


def _either(dtypes: Sequence[np.dtype[Any]]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)


def overlaps_itself(x: AnyArray) -> bool:
    """Whether two elements share memory."""
    if x.flags.c_contiguous:
        return False
    reach = x.itemsize
    for stride, length in sorted((abs(stride), length) for stride, length in zip(x.strides, x.shape, strict=True)):
        if length > 1:
            if stride < reach:
                return x.size > 0
            reach += stride * (length - 1)
    return False


def conv2d_shape(
    x: Shaped,
    w: Shaped,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> tuple[int, int, int, int]:
    """The shape (N, O, H', W') of the convolution of x (N, C, H, W) with w (O, C/groups, KH, KW)."""
    for name, item, wanted in (("x", x, "(N, C, H, W)"), ("w", w, "(O, C/groups, KH, KW)")):
        if item.ndim != 4:
            raise wrong_value(name, f"of shape {wanted}", Text(clip(str(item.shape))))
    channels, outputs = x.shape[1], w.shape[0]
    if channels % groups or outputs % groups:
        raise wrong_value("groups", f"a divisor of the {channels} channels of x and the {outputs} of w", groups)
    if w.shape[1] * groups != channels:
        raise wrong_value(
            "w",
            f"of shape (O, {channels // groups}, KH, KW) for {channels} channels in {groups} groups",
            Text(clip(str(w.shape))),
        )
    size = []
    for axis, name in ((0, "height"), (1, "width")):
        kernel = w.shape[2 + axis]
        if kernel < 1:
            raise wrong_value("w", f"of {name} >= 1", Text(clip(str(w.shape))))
        reach = dilation[axis] * (kernel - 1) + 1
        padded = x.shape[2 + axis] + 2 * padding[axis]
        if padded < reach:
            raise wrong_value("w", f"of dilated {name} <= {padded}, the padded {name} of x", reach)
        size.append((padded - reach) // stride[axis] + 1)
    return x.shape[0], outputs, size[0], size[1]
