# SPDX-License-Identifier: BSD-3-Clause
"""Arrays on a GPU, from any library and our own: where their memory is and which stream they belong to."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import _tensors, _validate
from .._validate import Text, clip
from . import _runtime

DTYPES = (
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "bool",
)
FLOATS = DTYPES[:4]
_SIZES = (2, 2, 4, 8, 1, 1, 2, 2, 4, 4, 8, 8, 1)
WANTED = "an array on a GPU (torch, cupy, or any with __cuda_array_interface__ or __dlpack__)"
# DLPack's device types of memory that CUDA kernels reach, and its type codes by NumPy's letters.
_DEVICES = (2, 13)
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
_LETTERS = {"i": "int", "u": "uint", "f": "float"}


class View(NamedTuple):
    """Memory on a GPU. Strides in elements; `stream` is the one that the array is written on, where its library says."""

    data: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: int
    device: int
    stream: int | None
    read_only: bool
    keep: object

    @property
    def triple(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """What the compiled module takes."""
        return self.data, self.shape, self.strides

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def dtype_name(self) -> str:
        """As NumPy spells it."""
        return DTYPES[self.dtype]


class Array:
    """A result on a GPU for callers whose library makes no arrays of its own here: an owner of memory that others can read.

    torch, cupy, jax and numba take it over without a copy: ``torch.from_dlpack(x)``, ``cupy.from_dlpack(x)``,
    ``numba.cuda.as_cuda_array(x)``. Functions make it.

    Attributes
    ----------
    shape : tuple of int
        Lengths of the axes; C order.
    device : int
        The number of the GPU.

    Examples
    --------
    >>> import fastops.cuda
    >>> fastops.cuda.Array.__name__
    'Array'
    """

    __slots__ = ("_code", "_memory", "_stream", "device", "shape")
    _is_on_gpu = True

    def __init__(self, shape: tuple[int, ...], code: int, device: int, stream: int) -> None:
        self.shape = shape
        self.device = device
        self._code = code
        self._stream = stream
        self._memory = _runtime.module().ArrayMemory(math.prod(shape) * _SIZES[code], device, stream)

    @property
    def dtype(self) -> str:
        """The name of the dtype, as NumPy and ml_dtypes spell it."""
        return DTYPES[self._code]

    def __repr__(self) -> str:
        return f"<fastops.cuda.Array of shape {self.shape} and dtype {self.dtype} on device {self.device}>"

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        stream = self._named_stream()
        self._memory.begin(stream)
        kind = {"uint": "u", "int": "i"}.get(self.dtype.rstrip("0123456789"), "f")
        typestr = "<V2" if self.dtype == "bfloat16" else f"<{kind}{_SIZES[self._code]}"
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": typestr,
            "data": (self._memory.address, False),
            "strides": None,
            "stream": stream,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DEVICES[0], self.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        if copy:
            raise _validate.wrong_value("copy", "False: an Array gives its own memory", copy)
        if dl_device not in (None, self.__dlpack_device__()):
            raise _validate.wrong_value("dl_device", f"{self.__dlpack_device__()}, where the array is", dl_device)
        name = self.dtype.rstrip("0123456789")
        code = next(code for code, text in _CODES.items() if text == name)
        if stream is None:
            stream = 1
        self._memory.begin(None if stream == -1 else stream)
        # Who does not say that it knows versions must get what was before them.
        versioned = max_version is not None and max_version[0] >= 1
        return _runtime.module().to_dlpack(self._memory, self.shape, code, 8 * _SIZES[self._code], versioned)

    def _named_stream(self) -> int:
        """The one that others shall order themselves after: its own may be gone, but for memory of a graph, which only that uses."""
        return (self._stream or 1) if self._memory.is_captured else 1

    def _view(self) -> View:
        return View(
            self._memory.address, self.shape, _contiguous(self.shape), self._code, self.device, None, False, self
        )


def is_cupy(value: object) -> bool:
    """Whether this is an array of cupy."""
    return type(value).__module__.partition(".")[0] == "cupy"


def interface_of(value: object) -> Any:
    """The `__cuda_array_interface__` of an array; None where it has none, or refuses it."""
    try:
        return getattr(value, "__cuda_array_interface__", None)
    except Exception:  # noqa: BLE001 - jax raises for bfloat16 and for arrays elsewhere, torch within autograd
        return None


def is_torch(value: object) -> bool:
    """Whether this is a tensor of torch."""
    return hasattr(value, "data_ptr") and hasattr(value, "detach") and hasattr(value, "device")


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, reach = [], 1
    for length in reversed(shape):
        strides.append(reach)
        reach *= length
    return tuple(reversed(strides))


def _from_torch(name: str, tensor: Any, in_place: bool) -> View:
    if tensor.device.type != "cuda":
        raise _validate.wrong_type(name, "a tensor on a GPU", Text(f"one on {clip(str(tensor.device), 20)}"))
    layout = str(tensor.layout).removeprefix("torch.")
    if layout != "strided":
        raise _validate.wrong_type(name, "a dense tensor", Text(f"a tensor of layout {clip(layout, 20)}"))
    if tensor.requires_grad and not in_place and sys.modules["torch"].is_grad_enabled():
        wanted = "a tensor outside autograd (its detach(), or fastops.torch, which has gradients)"
        raise _validate.wrong_type(name, wanted, Text("a tensor with requires_grad=True"))
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise _validate.wrong_type(name, f"of dtype {_validate.FLOAT_NAMES}", Text(clip(dtype, 20)))
    if tensor.is_neg():
        raise _validate.wrong_type(name, "a tensor that holds its values", Text("a lazy negative (its resolve_neg())"))
    if not _tensors.within_storage(tensor):
        raise _validate.wrong_value(name, "a tensor whose storage holds its elements", Text("one resized to fewer"))
    return View(
        tensor.data_ptr(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        DTYPES.index(dtype),
        tensor.device.index or 0,
        None,
        False,
        tensor,
    )


def _from_interface(name: str, value: Any, found: Any) -> View | None:
    """An array by `__cuda_array_interface__`; None for a dtype that it cannot name."""
    try:
        typestr, shape = str(found["typestr"]), tuple(int(n) for n in found["shape"])
        data, read_only = found["data"]
        strides, stream, version = found.get("strides"), found.get("stream"), int(found.get("version", 0))
    except (KeyError, TypeError, ValueError):
        got = Text("one whose __cuda_array_interface__ is incomplete")
        raise _validate.wrong_type(name, "an array on a GPU", got) from None
    if found.get("mask") is not None:
        raise _validate.wrong_type(name, "an array without a mask", Text("a masked array"))
    kind, size = typestr[1:2], typestr[2:]
    known = f"{_LETTERS[kind]}{8 * int(size)}" if kind in _LETTERS and size.isdigit() else ""
    if typestr[1:] == "b1":
        known = "bool"
    if typestr[:1] == ">" and known in DTYPES:
        raise _validate.wrong_type(name, "in native byte order", Text(clip(typestr, 20)))
    if known not in DTYPES:
        return None
    code = DTYPES.index(known)
    if strides is None:
        steps = _contiguous(shape)
    else:
        if any(int(s) % _SIZES[code] and n > 1 for s, n in zip(strides, shape, strict=True)):
            raise _validate.wrong_value(name, "of strides in whole elements", Text(clip(str(tuple(strides)))))
        steps = tuple(int(s) // _SIZES[code] for s in strides)
    if stream is not None and (version < 3 or stream == 0):
        if stream == 0:
            raise _validate.wrong_value(name, "on a stream other than 0, which is ambiguous", 0)
        stream = None
    if 0 not in shape:
        device = _runtime.module().device_of(int(data))
    else:
        device = int(value.__dlpack_device__()[1]) if hasattr(value, "__dlpack_device__") else 0
    if device < 0:
        raise _validate.wrong_type(name, "an array on a GPU", Text("one whose address is not in a GPU's memory"))
    return View(int(data), shape, steps, code, device, stream, bool(read_only), value)


def _from_dlpack(name: str, value: Any, stream: int) -> View:
    kind, device = value.__dlpack_device__()
    if int(kind) not in _DEVICES:
        got = "an array in host memory" if int(kind) in (1, 3) else f"one on DLPack's device type {int(kind)}"
        raise _validate.wrong_type(name, "an array on a GPU", Text(got))
    # Its library would let the stream wait for what is outside of the graph.
    _runtime.module().refuse_capture(int(device), stream, f"{name}, an array that is read by DLPack")
    try:
        try:
            capsule = value.__dlpack__(stream=stream or 1, max_version=(1, 0))
        except TypeError:
            capsule = value.__dlpack__(stream=stream or 1)
        data, shape, strides, (code, bits, lanes), read_only = _runtime.module().from_dlpack(capsule)
    except MemoryError:
        raise
    except Exception as error:
        got = Text(f"an object of type {clip(type(value).__name__, 30)} that does not export it")
        raise _validate.wrong_type(name, "an array that can be read by DLPack", got) from error
    dtype = "bool" if (code, bits) == (6, 8) else f"{_CODES.get(code, '?')}{bits}"
    if lanes != 1 or dtype not in DTYPES:
        raise _validate.wrong_type(name, f"of dtype {_validate.FLOAT_NAMES}", Text(f"DLPack's {dtype}"))
    steps = _contiguous(shape) if strides is None else strides
    return View(data, shape, steps, DTYPES.index(dtype), int(device), None, read_only, (value, capsule))


def view(name: str, value: Any, stream: int = 1, *, in_place: bool = False) -> View:
    """Where the memory of an array on a GPU is; it is not copied. `in_place`: autograd may know the tensor."""
    if isinstance(value, Array):
        return value._view()
    if is_torch(value):
        return _from_torch(name, value, in_place)
    found = None if isinstance(value, np.ndarray) else interface_of(value)
    if found is not None:
        result = _from_interface(name, value, found)
        exports = hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")
        if result is not None:
            # Who names no stream may be about to write it still (jax), and orders itself before ours by DLPack alone. A
            # graph waits for nobody outside of it.
            if result.stream is not None or not exports or _runtime.module().is_captured(result.device, stream):
                return result
            # DLPack before 1.0 cannot say that an array is read-only.
            ordered = _from_dlpack(name, value, stream)
            return ordered._replace(read_only=ordered.read_only or result.read_only)
        if not exports:
            got = Text(clip(str(found["typestr"]), 20))
            raise _validate.wrong_type(name, f"of dtype {_validate.FLOAT_NAMES}", got)
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__") and not isinstance(value, np.ndarray):
        return _from_dlpack(name, value, stream)
    raise _validate.wrong_type(name, WANTED, value)


Described = tuple[int, tuple[int, ...], tuple[int, ...], int, int, bool]


def described(name: str, found: View) -> Described:
    """What the compiled module asks of a tensor in a list that it cannot read itself."""
    if found.dtype_name not in FLOATS:
        raise _validate.wrong_type(name, f"of dtype {_validate.FLOAT_NAMES}", Text(found.dtype_name))
    return found.data, found.shape, found.strides, found.dtype, found.device, found.read_only


def same_memory(a: View, b: View) -> bool:
    """Whether two arrays may share memory: from their first to their last bytes."""
    ends = []
    for x in (a, b):
        if 0 in x.shape:
            return False
        steps = [(n - 1) * stride * _SIZES[x.dtype] for n, stride in zip(x.shape, x.strides, strict=True)]
        ends.append(
            (x.data + sum(s for s in steps if s < 0), x.data + sum(s for s in steps if s > 0) + _SIZES[x.dtype])
        )
    return a.device == b.device and ends[0][0] < ends[1][1] and ends[1][0] < ends[0][1]
