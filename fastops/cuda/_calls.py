# SPDX-License-Identifier: BSD-3-Clause
"""A call on a GPU: the order of its stream and those of its arrays, how long these stay, and its results."""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .. import _validate
from .._validate import Text, clip
from . import _runtime
from ._arrays import DTYPES, FLOATS, WANTED, Array, View, interface_of, is_cupy, is_torch, view


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


def current_stream(values: Sequence[Any]) -> int:
    """The caller's stream: the current one of torch or cupy, whose arrays come first, else the one that an array names, else 1,
    the default stream."""
    for value in values:
        if is_torch(value) and value.device.type == "cuda":
            torch = sys.modules["torch"]
            return int(torch.cuda.current_stream(value.device).cuda_stream)
        if is_cupy(value):
            return _cupy_stream(value)
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


def _cupy_stream(array: Any) -> int:
    """cupy's current stream of the array's device. The interface names that of the current device."""
    return int(sys.modules["cupy"].cuda.get_current_stream(array.device.id).ptr)


def _same_stream(a: int, b: int) -> bool:
    """Whether two handles are one stream: 0 and 1 both name the legacy default stream."""
    return a == b or {a, b} == {0, 1}


def _is_number(value: object) -> bool:
    """Whether this stands for itself rather than for memory."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, (bool, np.bool_))


class Kept:
    """What calls under way use and nobody else may hold: objects whose memory their libraries reuse when the last reference goes.

    The host never waits: what is done is dropped when a later call looks, and at exit all is.
    """

    def __init__(self) -> None:
        self._for_good: list[object] = []
        self._new: deque[tuple[tuple[int, int], Any, object]] = deque()
        self._queues: dict[tuple[int, int], deque[tuple[Any, object]]] = {}
        # Who finds it taken leaves the look to the other, or is what a look has called.
        self._looking = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._new or self._queues)

    def add(self, device: int, stream: int, mark: Any, things: object) -> None:
        """Keeps things until what the mark stands for is done."""
        self._new.append(((device, stream), mark, things))

    def add_for_good(self, things: object) -> None:
        """Keeps things of which nobody can tell when they are done with."""
        self._for_good.append(things)

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
        self._for_good.clear()
        self._new.clear()
        self._queues.clear()


kept = Kept()
atexit.register(kept.clear)


class Operands:
    """What a call uses. In ``with operands:`` its stream has waited for theirs and gets the call, until the end of which they stay
    as they are."""

    def __init__(self, stream: object, values: Sequence[Any]) -> None:
        self.native = _runtime.module()
        self.stream = current_stream(values) if stream is None else handle(stream)
        self.device = -1
        # The usual call, of torch's tensors alone on torch's current stream, asks for that once.
        self.of_torch = stream is None and bool(values) and is_torch(values[0])
        self._chosen = stream is None
        # Others' streams, and whether the call writes what is theirs.
        self._theirs: dict[int, bool] = {}
        self._later: list[int] = []
        self._arrays: list[Array] = []
        # Memory of our own that the call has made: it ends with it, too.
        self._made: list[Any] = []
        self._guests: list[object] = []

    def take(self, value: Any, found: View, *, written: bool = False) -> bool:
        """One of them; whether its library may reuse its memory on another stream than that of the call, so that it must stay."""
        if isinstance(value, Array):
            self._arrays.append(value)
            return False
        theirs = found.stream
        if is_cupy(value):
            theirs = _cupy_stream(value)
        elif theirs is None and is_torch(value):
            theirs = self.stream if self.of_torch else _torch_stream(value)
        if theirs is not None:
            if _same_stream(theirs, self.stream):
                return False
            theirs = theirs or 1
            self._theirs[theirs] = self._theirs.get(theirs, False) or written
        return True

    def keep(self, *things: Any) -> None:
        """What must stay: of tensors, which may get other memory, the memory that they have now."""
        self._guests += (x.detach() if is_torch(x) else x for x in things)

    def refuse_capture(self, what: str) -> None:
        """Raises where the call goes into a graph, which cannot have this."""
        self.native.refuse_capture(self.device, self.stream, what)

    def end_with_it(self, memory: Any) -> None:
        """Memory of our own that this call makes and uses."""
        self._made.append(memory)

    def __enter__(self) -> None:
        begun = []
        try:
            if self.stream in (0, 1):
                self.native.want_usable(self.device, self.stream)
            for theirs, written in self._theirs.items():
                self.native.wait(self.stream, theirs, self.device)
                if written and self._chosen:
                    self._later.append(theirs)
            for array in self._arrays:
                array._memory.begin(self.stream)
                begun.append(array)
        except BaseException:
            self._arrays = begun
            self._guests.clear()  # nothing was launched
            self.__exit__(RuntimeError)
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What a call that failed had launched before ends too, as far as it can be told.
        with contextlib.suppress(*(() if kind is None else (RuntimeError,))):
            self._end()

    def _end(self) -> None:
        memory = (*(array._memory for array in self._arrays), *self._made)
        steps: list[Callable[[], object]] = [partial(x.end, self.stream) for x in memory]
        steps += [partial(self._end_on, theirs) for theirs in self._later]
        if self._guests or kept:
            steps.append(self._keep_guests)
        self._arrays.clear()
        self._made.clear()
        failed: list[BaseException] = []
        for step in steps:
            try:
                step()
            except BaseException as error:  # noqa: BLE001 - raised when all has ended that can
                failed.append(error)
        if failed:
            try:
                raise failed[0]
            finally:
                failed.clear()  # which would keep this frame, and all that the call uses

    def _end_on(self, theirs: int) -> None:
        """Lets another stream wait for this call, unless that is of a graph and the other one not."""
        native, device = self.native, self.device
        if native.is_captured(device, theirs) or not native.is_captured(device, self.stream):
            native.wait(theirs, self.stream, device)

    def _keep_guests(self) -> None:
        guests = tuple(self._guests)
        self._guests.clear()
        try:
            # What a graph reads must live as long as it, which its owner knows.
            if self.native.is_captured(self.device, self.stream):
                return
            if guests:
                kept.add(self.device, self.stream, self.native.Mark(self.device, self.stream), guests)
        except BaseException:
            kept.add_for_good(guests)
            raise
        kept.drop_done()


class Call(Operands):
    """The arrays of one call by their names: on one device."""

    def __init__(self, stream: object, **values: Any) -> None:
        arrays = {name: value for name, value in values.items() if value is not None and not _is_number(value)}
        if not arrays:
            _runtime.module()
            raise _validate.wrong_type(next(iter(values)), WANTED, next(iter(values.values())))
        super().__init__(stream, list(arrays.values()))
        self._results_stay = False
        self.views: dict[str, View] = {}
        first = next(iter(arrays))
        self.like = arrays[first]
        for name, value in arrays.items():
            found = view(name, value, self.stream)
            if self.device >= 0 and found.device != self.device:
                wanted = f"on device {self.device}, where {first} is"
                raise _validate.wrong_value(name, wanted, Text(f"an array on device {found.device}"))
            self.device = found.device
            self.views[name] = found
            stays = self.take(value, found, written=name == "out" or name.startswith("state["))
            if stays:
                self.keep(found.keep)
            if name == first:
                self._results_stay = stays

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

    def new(self, shape: tuple[int, ...], code: int) -> tuple[Any, View]:
        """An array of the caller's kind, and its memory."""
        made = empty_like(self.like, shape, code, self.device, self.stream)
        if isinstance(made, Array):
            self.end_with_it(made._memory)
            return made, made._view()
        if self._results_stay:
            self.keep(made)
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
    if is_cupy(like) and DTYPES[code] != "bfloat16":
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device):
            return cupy.empty(shape, DTYPES[code])
    return Array(shape, code, device, stream)


def returned(like: Any, result: Any) -> Any:
    """What the caller gets of a new array, when the call has ended: jax's own kind where its arrays came."""
    if not isinstance(result, Array):
        return result
    if type(like).__module__.partition(".")[0] in ("jax", "jaxlib"):
        return sys.modules["jax"].dlpack.from_dlpack(result)
    return result
