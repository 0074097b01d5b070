# SPDX-License-Identifier: BSD-3-Clause
"""Arrays on a GPU from any library: where their memory is, which stream they belong to, and new ones of the same kind."""

from __future__ import annotations

import atexit
import contextlib
import math
import sys
import threading
from collections import deque
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
_WANTED = "an array on a GPU (torch, cupy, or any with __cuda_array_interface__ or __dlpack__)"
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
        """The one that others shall order themselves after: its own may be gone, except while it goes into a graph."""
        return (self._stream or 1) if self._memory.is_captured else 1

    def _view(self) -> View:
        return View(
            self._memory.address, self.shape, _contiguous(self.shape), self._code, self.device, None, False, self
        )


def same_stream(a: int, b: int) -> bool:
    """Whether two handles are one stream: 0 and 1 both name the legacy default stream."""
    return a == b or {a, b} == {0, 1}


def interface_of(value: object) -> Any:
    """The `__cuda_array_interface__` of an array; None where it has none, or refuses it."""
    try:
        return getattr(value, "__cuda_array_interface__", None)
    except Exception:  # noqa: BLE001 - jax raises for bfloat16 and for arrays elsewhere, torch within autograd
        return None


def is_torch(value: object) -> bool:
    """Whether this is a tensor of torch."""
    return hasattr(value, "data_ptr") and hasattr(value, "detach") and hasattr(value, "device")


def is_number(value: object) -> bool:
    """Whether this stands for itself rather than for memory."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, (bool, np.bool_))


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


def _from_interface(name: str, value: object, found: Any) -> View | None:
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
    empty = 0 in shape
    device = 0 if empty else _runtime.module().device_of(int(data))
    if device < 0:
        raise _validate.wrong_type(name, "an array on a GPU", Text("one whose address is not in a GPU's memory"))
    return View(int(data), shape, steps, code, device, stream, bool(read_only), value)


def _from_dlpack(name: str, value: Any, stream: int) -> View:
    kind, device = value.__dlpack_device__()
    if int(kind) not in _DEVICES:
        got = "an array in host memory" if int(kind) in (1, 3) else f"one on DLPack's device type {int(kind)}"
        raise _validate.wrong_type(name, "an array on a GPU", Text(got))
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
        value._memory.begin(stream)
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
    raise _validate.wrong_type(name, _WANTED, value)


Described = tuple[int, tuple[int, ...], tuple[int, ...], int, int, bool]


def described(name: str, found: View) -> Described:
    """What the compiled module asks of a tensor in a list that it cannot read itself."""
    if found.dtype_name not in FLOATS:
        raise _validate.wrong_type(name, f"of dtype {_validate.FLOAT_NAMES}", Text(found.dtype_name))
    return found.data, found.shape, found.strides, found.dtype, found.device, found.read_only


def handle(stream: Any) -> int:
    """The handle of a stream: an integer, a stream of torch, cupy or numba, or an object with `__cuda_stream__`."""
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr", "handle"):
        found = getattr(stream, attribute, None)
        if found is not None:
            found = getattr(found, "value", found)
            return int(found or 0)
    return _validate.integer("stream", stream, 0, 2**64 - 1)


def current_stream(values: Sequence[Any], device: int | None = None) -> int:
    """The caller's stream: the current one of torch or cupy, whose arrays come first, else the one that an array names, else 1,
    the default stream."""
    for value in values:
        if is_torch(value) and value.device.type == "cuda":
            torch = sys.modules["torch"]
            return int(torch.cuda.current_stream(value.device if device is None else device).cuda_stream)
        if type(value).__module__.partition(".")[0] == "cupy":
            return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    for value in values:
        if isinstance(value, Array):
            return value._named_stream()
        found = interface_of(value)
        if found is not None and found.get("stream"):
            return int(found["stream"])
    return 1


def _torch_stream(tensor: Any) -> int | None:
    """torch's current stream, on which it reuses memory and on which tensors are taken to be written."""
    torch: Any = sys.modules.get("torch")
    kind: Any = getattr(torch, "Tensor", ())
    if not isinstance(tensor, kind):
        return None
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


class Kept:
    """What calls under way use and nobody else may hold: objects whose memory their libraries reuse when the last reference goes.

    The host never waits: what is done is dropped when a later call looks, and at exit all is.
    """

    def __init__(self) -> None:
        self._new: deque[tuple[tuple[int, int], Any, object]] = deque()
        self._queues: dict[tuple[int, int], deque[tuple[Any, object]]] = {}
        # Who finds it taken leaves the look to the other, or is what a look has called.
        self._looking = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._new or self._queues)

    def add(self, device: int, stream: int, mark: Any, things: object) -> None:
        """Keeps things until what the mark stands for is done."""
        self._new.append(((device, stream), mark, things))

    def drop_done(self) -> None:
        """Lets go of what is done. A stream's calls end in their order."""
        if not self._looking.acquire(blocking=False):
            return
        done = []
        try:
            while self._new:
                key, mark, things = self._new.popleft()
                self._queues.setdefault(key, deque()).append((mark, things))
            for key, queue in list(self._queues.items()):
                while queue and queue[0][0].is_done():
                    done.append(queue.popleft())
                if not queue:
                    del self._queues[key]
        finally:
            self._looking.release()
        done.clear()  # which may run anything, this function too

    def clear(self) -> None:
        """Lets go of all, as long as the libraries are there that own it."""
        self._new.clear()
        self._queues.clear()


kept = Kept()
atexit.register(kept.clear)


class Operands:
    """What a call uses: its stream waits for theirs, and they stay as they are until the stream is done with the call."""

    def __init__(self, stream: object, values: Sequence[Any]) -> None:
        self.native = _runtime.module()
        self.stream = current_stream(values) if stream is None else handle(stream)
        # The usual call, of torch's tensors alone on torch's current stream, asks for that once.
        self.of_torch = stream is None and bool(values) and is_torch(values[0])
        self._waited: list[int] = []
        self._arrays: list[Array] = []
        self._guests: list[object] = []
        self._later: list[int] = []
        self._chosen = stream is None

    def take(self, value: Any, found: View, *, written: bool = False) -> bool:
        """Orders the stream after an operand's; whether its library may reuse its memory on another one."""
        if isinstance(value, Array):
            self._arrays.append(value)
            return False
        theirs = found.stream
        if theirs is None and is_torch(value):
            theirs = self.stream if self.of_torch else _torch_stream(value)
        if theirs is not None:
            if same_stream(theirs, self.stream):
                return False
            if theirs not in self._waited:
                self.native.wait(self.stream, theirs, found.device)
                self._waited.append(theirs)
            if written and self._chosen and theirs not in self._later:
                self._later.append(theirs)
        self._guests.append(found.keep)
        return True

    def keep(self, thing: object) -> None:
        """Something else that must stay."""
        self._guests.append(thing)

    def use(self, array: Array) -> None:
        """An array of which the address is known already."""
        array._memory.begin(self.stream)
        self._arrays.append(array)

    def give_up(self) -> None:
        """Says that the call, which raises, will not use its arrays."""
        for array in self._arrays:
            with contextlib.suppress(RuntimeError):
                array._memory.end(self.stream)
        self._arrays.clear()

    def end(self, device: int) -> None:
        """Says that the stream has got all of the call."""
        for array in self._arrays:
            array._memory.end(self.stream)
        self._arrays.clear()
        # What a graph reads must live as long as it, which its owner knows; in a capture no event is asked for, and who waits
        # for one becomes part of it.
        if not (self._guests or kept) or self.native.is_captured(device, self.stream):
            return
        for stream in self._later:
            self.native.wait(stream, self.stream, device)
        if self._guests:
            kept.add(device, self.stream, self.native.Mark(device, self.stream), tuple(self._guests))
            self._guests.clear()
        kept.drop_done()


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


class Call:
    """The arrays of one call: on one device, ordered before a stream, of one dtype each of `dtypes`."""

    def __init__(self, stream: object, **values: Any) -> None:
        arrays = {name: value for name, value in values.items() if value is not None and not is_number(value)}
        if not arrays:
            _runtime.module()
            raise _validate.wrong_type(next(iter(values)), _WANTED, next(iter(values.values())))
        self.operands = operands = Operands(stream, list(arrays.values()))
        self.native, self.stream = operands.native, operands.stream
        self._results_stay = False
        self.views: dict[str, View] = {}
        self.device = -1
        try:
            self._take(arrays)
        except BaseException:
            operands.give_up()
            raise

    def _take(self, arrays: dict[str, Any]) -> None:
        first = next(iter(arrays))
        for name, value in arrays.items():
            found = view(name, value, self.stream)
            if self.device >= 0 and found.device != self.device:
                wanted = f"on device {self.device}, where {first} is"
                raise _validate.wrong_value(name, wanted, Text(f"an array on device {found.device}"))
            self.device = found.device
            self.views[name] = found
            moves = self.operands.take(value, found, written=name == "out" or name.startswith("state["))
            if name == first:
                self._results_stay = moves
        self.like = arrays[first]

    def dtype(self, allowed: Sequence[str], *names: str) -> int:
        """The one dtype of the arrays of these names, as a code."""
        chosen = [(name, self.views[name]) for name in names if name in self.views]
        for name, found in chosen:
            if found.dtype_name not in allowed:
                raise _validate.wrong_type(name, f"of dtype {_either(allowed)}", Text(found.dtype_name))
            if found.dtype != chosen[0][1].dtype:
                wanted = f"of dtype {chosen[0][1].dtype_name}, as {chosen[0][0]}"
                raise _validate.wrong_type(name, wanted, Text(found.dtype_name))
        return chosen[0][1].dtype

    def end(self) -> None:
        """Says that the stream has got all of the call: until it is done with that, no memory may be reused."""
        self.operands.end(self.device)

    def new(self, shape: tuple[int, ...], code: int) -> tuple[Any, View]:
        """An array of the caller's kind, and its memory."""
        made = empty_like(self.like, shape, code, self.device, self.stream)
        if isinstance(made, Array):
            return made, made._view()
        if self._results_stay:
            self.operands.keep(made)
        return made, view("a result", made, self.stream)

    def output(self, out: Any, shape: tuple[int, ...], dtypes: Sequence[int]) -> tuple[Any, View]:
        """`out`, checked, or a new array of the caller's kind and of the first of the dtypes; and its memory."""
        if out is None:
            return self.new(shape, dtypes[0])
        found = self.views["out"]
        if found.dtype not in dtypes:
            wanted = _either([DTYPES[code] for code in dtypes])
            raise _validate.wrong_type("out", f"of dtype {wanted}", Text(found.dtype_name))
        if found.shape != shape:
            raise _validate.wrong_value("out", f"of shape {clip(str(shape))}", Text(clip(str(found.shape))))
        if found.read_only:
            raise _validate.wrong_value("out", "writable", Text("a read-only array"))
        reach = 0 if 0 in shape else 1
        for stride, n in sorted((abs(s), n) for s, n in zip(found.strides, found.shape, strict=True) if n > 1):
            if stride < reach:
                got = Text("overlapping strides")
                raise _validate.wrong_value("out", "an array whose elements are all distinct in memory", got)
            reach = stride * (n - 1) + reach
        return out, found


def _either(names: Sequence[str]) -> str:
    return _validate.FLOAT_NAMES if tuple(names) == FLOATS else " or ".join(names)


def empty_like(like: Any, shape: tuple[int, ...], code: int, device: int, stream: int) -> Any:
    """A new array of the caller's library, C order."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, DTYPES[code]), device=like.device)
    if type(like).__module__.partition(".")[0] == "cupy" and DTYPES[code] != "bfloat16":
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device):
            return cupy.empty(shape, DTYPES[code])
    return Array(shape, code, device, stream)


def returned(like: Any, result: Any) -> Any:
    """What the caller gets of a new array, of which its stream has got all: jax's own kind where its arrays came, which only a
    finished one can become."""
    if not isinstance(result, Array):
        return result
    result._memory.end(result._stream)
    if type(like).__module__.partition(".")[0] in ("jax", "jaxlib"):
        return sys.modules["jax"].dlpack.from_dlpack(result)
    return result
