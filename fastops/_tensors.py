# SPDX-License-Identifier: BSD-3-Clause
"""Lists of tensors and the steps over them: what may stand in a list, the one check that words its errors, `TensorList`.

The native backend reads well-formed lists by itself and comes here with all others; the Numba and reference backends always do.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _dlpack, _validate
from ._validate import AnyArray, Text

WIDE_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
_WIDE = "float32 or float64"
# Of NumPy's arrays.
_HOST_ARRAY = "an array in host memory (numpy, torch, the buffer protocol or DLPack)"


class Role(NamedTuple):
    """An argument that is a list of tensors.

    `dtypes` says which are allowed: "wide" (float32, float64), "shadow" (those and bfloat16), "float" (any of the four), "same"
    (that of the first role's tensor) or "gradient" (the same, or a half type beside float32).
    """

    name: str
    written: bool
    dtypes: str = "same"


class SgdStep(NamedTuple):
    """m = keep m + gain (g + weight_decay p); where `moves`, p -= lr (nesterov ? g + momentum m : m)."""

    lr: float
    momentum: float
    keep: float
    gain: float
    weight_decay: float
    nesterov: bool
    moves: bool
    ema_weight: float
    zero_grad: bool


class AdamStep(NamedTuple):
    """The numbers of one AdamW step, formed in double: `decay` = 1 - lr weight_decay, `l2` its coupled form, w = 1 - beta,
    `step_size` = lr / (1 - beta1^t), `scale` = 1 / sqrt(1 - beta2^t)."""

    decay: float
    l2: float
    w1: float
    beta2: float
    w2: float
    step_size: float
    scale: float
    eps: float
    ema_weight: float
    zero_grad: bool


class EgStep(NamedTuple):
    """The numbers of the adaptive exponentiated gradient; see `fastops.adaptive_eg_step_`."""

    lr: float
    beta: float
    mu: float
    gain_lr: float
    gain_low: float
    gain_high: float
    scale_lr: float
    scale_low: float
    scale_high: float


def ema_roles(sets: int) -> list[Role]:
    """`sets` lists of shadows and the parameters."""
    names = ["shadows"] if sets == 1 else [f"shadows of profile {k}" for k in range(sets)]
    return [Role("params", False, "float"), *(Role(name, True, "shadow") for name in names)]


def _step_roles(*states: str, ema: object = None, zero_grad: bool = False, moves: bool = True) -> list[Role]:
    shadows = [] if ema is None else [Role("ema", True)]
    written = [Role(name, True) for name in states]
    return [Role("params", moves, "wide"), Role("grads", zero_grad, "gradient"), *written, *shadows]


def sgd_roles(buffers: object, ema: object, step: SgdStep) -> list[Role]:
    """Parameters, gradients, momentum and the shadows that follow the parameters, where there are such."""
    states = [] if buffers is None else ["momentum_buffers"]
    return _step_roles(*states, ema=ema, zero_grad=step.zero_grad, moves=step.moves)


def adamw_roles(ema: object, step: AdamStep) -> list[Role]:
    """Parameters, gradients, both moments and the shadows, where there are such."""
    return _step_roles("exp_avg", "exp_avg_sq", ema=ema, zero_grad=step.zero_grad)


LOOKAHEAD_ROLES = [Role("slow", True, "wide"), Role("fast", True)]
FINITE_ROLES = [Role("params", False, "float")]
EG_ROLES = _step_roles()
ADAPTIVE_EG_ROLES = _step_roles("momentum", "update", "gain")


class FixedList(Sequence[Any]):
    """Tensors that stay those of a list, whatever becomes of their contents."""

    __slots__ = ("_arrays",)

    _arrays: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, index: Any) -> Any:
        return self._arrays[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._arrays)

    def __repr__(self) -> str:
        package = type(self).__module__.rpartition("._")[0]
        return f"<{package}.{type(self).__name__} of {len(self._arrays)} arrays>"

    def __reduce__(self) -> Any:
        raise _validate.no_pickle("a TensorList", "it stands for memory of this process; pickle a list of its arrays")


class TensorList(FixedList):
    """A list of tensors that many calls use: it keeps them alive, and the native backend what it knows of them.

    Give it wherever a function takes a list of arrays. Each call verifies, from the fields of the array objects, that every
    array still is where and what it was; one that was resized, or a torch tensor whose storage was exchanged, is read anew.

    Parameters
    ----------
    arrays : iterable of arrays
        NumPy arrays, torch CPU tensors, or objects with the buffer protocol or DLPack. The list is fixed; the contents of the
        arrays are not.
    verify : bool
        False spares the look at torch tensors, which costs some 50 ns each, where NumPy's arrays take a few: call `refresh`
        whenever the storage of one was exchanged or resized, since memory that is gone would be written otherwise.

    Raises
    ------
    TypeError
        `arrays` is not iterable, or an element is no array in host memory.

    Notes
    -----
    A call that finds the list in use by a call of another thread raises RuntimeError. Does not pickle: it stands for memory
    of this process.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> shadows = fastops.TensorList([np.zeros(3, np.float32) for _ in range(2)])
    >>> params = fastops.TensorList([np.ones(3, np.float32) for _ in range(2)])
    >>> fastops.ema_update_(shadows, params, 0.5)
    >>> shadows[1]
    array([0.5, 0.5, 0.5], dtype=float32)
    """

    __slots__ = ("_busy", "_counters", "_known", "_plan", "_verify")

    def __init__(self, arrays: Iterable[Any], *, verify: bool = True) -> None:
        self._arrays = tuple(as_list("arrays", arrays))
        for i, item in enumerate(self._arrays):
            as_ndarray(f"arrays[{i}]", item)
        self._verify = _validate.boolean("verify", verify)
        self._plan: Any = None
        self._known: tuple[Any, ...] | None = None
        self._counters: tuple[int, tuple[Any, ...]] = -1, ()
        self._busy = 0  # the process whose call uses it: what a fork interrupts does not go on in the child

    def _known_tensors(self) -> tuple[Any, ...]:
        """The tensors of torch, which autograd knows: found once."""
        if self._known is None:
            self._known = of_torch(self._arrays)
        return self._known

    def _written_tensors(self) -> Iterable[Any]:
        """Tensors of torch whose versions are counted for all of them."""
        tensors, plan = self._known_tensors(), self._plan
        if plan is None or len(tensors) < 2:
            return tensors
        if self._counters[0] != plan.version:
            self._counters = plan.version, tensors[:1] if _count_together(tensors) else tensors
        found = self._counters[1]
        return found if len(found) < 2 else plan.walk(found)

    def refresh(self) -> None:
        """Forget what is known of the arrays, so that the next call reads them anew.

        Examples
        --------
        >>> import numpy as np
        >>> import fastops
        >>> fastops.TensorList([np.zeros(3)], verify=False).refresh()
        """
        self._plan = None
        self._counters = -1, ()


@contextlib.contextmanager
def in_use(*lists: object) -> Iterator[None]:
    """Marks the `TensorList`s among the arguments as taken by this call."""
    taken: list[TensorList] = []
    try:
        for item in lists:
            if isinstance(item, TensorList):
                if item._busy == os.getpid() and not any(item is other for other in taken):
                    raise _validate.busy("a TensorList")
                item._busy = os.getpid()
                taken.append(item)
        yield
    finally:
        for item in taken:
            item._busy = 0


def as_list(name: str, value: object) -> list[Any]:
    """The tensors of an argument: those of a list, tuple, `TensorList` or other iterable; an array alone is a list of one."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, FixedList):
        return list(value._arrays)
    if isinstance(value, (str, bytes, dict, set, frozenset)):
        raise _validate.wrong_type(name, "a list of arrays", value)
    if _is_array(value):
        return [value]
    try:
        return list(value)  # type: ignore[call-overload, no-any-return]
    except TypeError:
        raise _validate.wrong_type(name, "a list of arrays", value) from None


def _is_array(value: object) -> bool:
    return (
        isinstance(value, (np.ndarray, memoryview, bytearray))
        or hasattr(value, "__dlpack__")
        or (hasattr(value, "__array_interface__") and not isinstance(value, np.generic))
    )


def as_ndarray(name: str, value: Any) -> AnyArray:
    """The memory of one tensor as an ndarray, never a copy."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ndarray):
        if hasattr(value, "mask"):
            raise _validate.wrong_type(name, "an array without a mask", Text("a masked array"))
        return value.view(np.ndarray)
    if hasattr(value, "data_ptr") and hasattr(value, "detach"):
        return _from_torch(name, value)
    if _validate.has_cuda_interface(value):
        raise _validate.wrong_type(name, _HOST_ARRAY, _validate.ON_CUDA)
    if isinstance(value, (bool, int, float, complex, str, bytes, list, tuple, dict, np.generic)) or value is None:
        raise _validate.wrong_type(name, _HOST_ARRAY, value)
    with contextlib.suppress(TypeError, ValueError):
        return np.asarray(memoryview(value))
    if hasattr(value, "__array_interface__"):
        with contextlib.suppress(TypeError, ValueError):
            return np.asarray(value)
    if hasattr(value, "__dlpack__"):
        try:
            return _dlpack.from_dlpack(name, value)
        except TypeError:
            if not hasattr(value, "__array__"):
                raise
    if hasattr(value, "__array__"):
        # Its own conversion may copy, so nothing is written there.
        with contextlib.suppress(Exception):
            array = np.asarray(value).view()
            array.flags.writeable = False
            return array
    raise _validate.wrong_type(name, _HOST_ARRAY, value)


def _from_torch(name: str, tensor: Any) -> AnyArray:
    if tensor.device.type != "cpu":
        raise _validate.wrong_type(name, _HOST_ARRAY, Text(f"a tensor on {_validate.clip(str(tensor.device), 20)}"))
    layout = str(tensor.layout).removeprefix("torch.")
    if layout != "strided":
        raise _validate.wrong_type(name, "a dense tensor", Text(f"a tensor of layout {_validate.clip(layout, 20)}"))
    dtype = str(tensor.dtype).removeprefix("torch.")
    bfloat16 = _validate.bfloat16() if dtype == "bfloat16" else None
    if dtype == "bfloat16" and bfloat16 is None:
        raise _validate.wrong_type(name, "of a dtype that NumPy knows", Text("bfloat16 without ml_dtypes"))
    try:
        plain = tensor.detach()
        if not within_storage(plain):
            raise _validate.wrong_value(name, "a tensor whose storage holds its elements", Text("one resized to fewer"))
        if bfloat16 is not None:
            import torch

            return plain.view(torch.int16).numpy().view(bfloat16)  # type: ignore[no-any-return]
        return plain.numpy()  # type: ignore[no-any-return]
    except (NotImplementedError, RuntimeError, TypeError):
        # A dtype of torch's own, a lazy conjugate or negative, a tensor that stands for others.
        raise _validate.wrong_type(
            name,
            "a tensor that NumPy can share",
            Text(f"a {_validate.clip(type(tensor).__name__, 30)} of dtype {_validate.clip(dtype, 20)}"),
        ) from None


def within_storage(tensor: Any) -> bool:
    """Whether a tensor's storage, which can be resized under it, holds all its elements."""
    if not tensor.numel():
        return True
    reach = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return bool((tensor.storage_offset() + reach) * tensor.element_size() <= tensor.untyped_storage().nbytes())


def _allowed(role: Role, main: np.dtype[Any]) -> tuple[tuple[np.dtype[Any], ...], str]:
    if role.dtypes == "wide":
        return WIDE_DTYPES, _WIDE
    if role.dtypes == "shadow":
        return tuple(d for d in _validate.FLOAT_DTYPES if d != np.float16), "bfloat16, float32 or float64"
    if role.dtypes == "float":
        return _validate.FLOAT_DTYPES, _validate.FLOAT_NAMES
    if role.dtypes == "gradient" and main == np.float32:
        return tuple(d for d in _validate.FLOAT_DTYPES if d != np.float64), "float16, bfloat16 or float32"
    return (main,), f"{main}, as the first list has there"


def changed() -> RuntimeError:
    """The RuntimeError for arrays that another thread changed between their check and their use."""
    return RuntimeError("arrays must stay as they are during a call, got others than were checked")


@contextlib.contextmanager
def prepared(roles: Sequence[Role], values: Sequence[object]) -> Iterator[list[list[AnyArray]]]:
    """The arrays of every role, checked, for a block that writes them."""
    with in_use(*values):
        lists = [as_list(role.name, value) for role, value in zip(roles, values, strict=True)]
        yield check(roles, lists)
        bump_versions(items for role, items in zip(roles, lists, strict=True) if role.written)


def of_torch(items: Iterable[Any]) -> tuple[Any, ...]:
    """Those of the arrays that are torch's tensors."""
    torch = sys.modules.get("torch")
    found = tuple(items)
    if torch is None or not {*map(type, found)} - {torch.Tensor, torch.nn.Parameter}:
        return found if torch is not None else ()
    return tuple(item for item in found if isinstance(item, torch.Tensor))


def bump_versions(written: Iterable[Iterable[Any]]) -> None:
    """Tells torch's autograd of lists that changed in place; without it a backward pass would use the new values silently."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    for items in written:
        tensors = items._written_tensors() if isinstance(items, TensorList) else of_torch(items)
        if tensors:
            torch.autograd.graph.increment_version(tensors)


def _count_together(tensors: tuple[Any, ...]) -> bool:
    """Whether tensors that were written have one counter of versions, as views of one tensor have."""
    torch = sys.modules["torch"]
    # Numbers that others, which may write meanwhile, do not reach by chance.
    for times in (3, 7):
        try:
            before = {x._version for x in tensors}
            torch.autograd.graph.increment_version(tensors[:1] * times)
            after = {x._version for x in tensors}
        except RuntimeError:  # tensors of inference mode have none
            return False
        if len(before) != 1 or after != {before.pop() + times}:
            return False
    return True


def check(roles: Sequence[Role], lists: Sequence[list[Any]]) -> list[list[AnyArray]]:
    """The arrays of every role, checked: lengths, dtypes, shapes, writability, byte order, overlap."""
    count = len(lists[0])
    for role, items in zip(roles, lists, strict=True):
        if len(items) != count:
            raise _validate.wrong_value(
                role.name, f"a list of {count} arrays, as many as {roles[0].name}", Text(str(len(items)))
            )
    arrays: list[list[AnyArray]] = [[] for _ in roles]
    for i in range(count):
        main: AnyArray | None = None
        for role, items, checked in zip(roles, lists, arrays, strict=True):
            name = f"{role.name}[{i}]"
            array = as_ndarray(name, items[i])
            main = array if main is None else main
            dtypes, wanted = _allowed(role, main.dtype)
            if array.dtype not in dtypes or not array.dtype.isnative:
                raise _validate.wrong_type(name, f"of dtype {wanted}", Text(_validate.clip(str(array.dtype), 40)))
            if array.shape != main.shape:
                raise _validate.wrong_value(
                    name,
                    _validate.clip(f"of shape {main.shape} as {roles[0].name}[{i}]", 90),
                    Text(_validate.clip(str(array.shape), 40)),
                )
            if role.written:
                _validate.writable(name, array)
            checked.append(array)
    refuse_overlap(roles, arrays)
    return arrays


def refuse_overlap(roles: Sequence[Role], arrays: Sequence[Sequence[AnyArray]]) -> None:
    """A tensor that is written must share no memory with any other of the call."""
    spans = []
    for r, (role, items) in enumerate(zip(roles, arrays, strict=True)):
        for i, array in enumerate(items):
            if array.size:
                low, high = _validate.byte_bounds(array)
                spans.append((low, high, role.written, r, i))
    spans.sort()
    # Spans that may still reach the next one; few, unless arrays overlap.
    live: list[tuple[int, int, bool, int, int]] = []
    for span in spans:
        live = [other for other in live if other[1] > span[0]]
        for other in live:
            if not (span[2] or other[2]):
                continue
            first, second = arrays[span[3]][span[4]], arrays[other[3]][other[4]]
            if _validate.share_memory(first, second):
                written, beside = (span, other) if span[2] else (other, span)
                raise _validate.wrong_value(
                    f"{roles[written[3]].name}[{written[4]}]",
                    f"memory apart from {roles[beside[3]].name}[{beside[4]}]",
                    Text("arrays that overlap"),
                )
        live.append(span)


def refuse_shared_scales(scales: AnyArray, roles: Sequence[Role], lists: Sequence[Sequence[AnyArray]]) -> None:
    """Scales are written beside the tensors, so they must share no memory with one."""
    for role, items in zip(roles, lists, strict=True):
        for i, array in enumerate(items):
            if _validate.share_memory(scales, array):
                raise _validate.wrong_value(
                    "scales", f"memory apart from {role.name}[{i}]", Text("arrays that overlap")
                )


def check_rounding(roles: Sequence[Role], sets: Sequence[Sequence[AnyArray]], seed: int | None) -> None:
    """Refuses bfloat16 shadows that would round to nearest: there, small updates are lost for ever."""
    if seed is not None:
        return
    shadows = [role for role in roles if role.dtypes == "shadow"]
    for role, items in zip(shadows, sets, strict=True):
        for i, array in enumerate(items):
            if array.dtype not in WIDE_DTYPES:
                raise _validate.wrong_type(
                    f"{role.name}[{i}]", f"of dtype {_WIDE}, or bfloat16 with rounding='stochastic'", Text("bfloat16")
                )


class Rows(NamedTuple):
    """What a step on rows works on; without `rows`, a row is live where its gradient is not all 0."""

    params: list[AnyArray]
    grads: list[AnyArray]
    exp_avg: list[AnyArray]
    exp_avg_sq: list[AnyArray]
    rows: list[AnyArray] | None = None


@contextlib.contextmanager
def prepared_rows(params: object, grads: object, exp_avg: object, exp_avg_sq: object, rows: object) -> Iterator[Rows]:
    """The arrays of a step on rows, checked, and the rows of each tensor as int64 where they are given."""
    states = [Role("params", True, "wide"), Role("exp_avg", True), Role("exp_avg_sq", True)]
    gradient = Role("grads", False, "gradient")
    with in_use(params, grads, exp_avg, exp_avg_sq):
        named = zip(states, (params, exp_avg, exp_avg_sq), strict=True)
        lists = [as_list(role.name, value) for role, value in named]
        gradients = as_list("grads", grads)
        if rows is None:
            p, m, v, g = check([*states, gradient], [*lists, gradients])
            for i, table in enumerate(p):
                _want_rows(table, i)
            yield Rows(p, g, m, v)
        else:
            p, m, v = check(states, lists)
            g, index = _check_rows(gradient, p, gradients, as_list("rows", rows))
            refuse_overlap([*states, gradient], [p, m, v, g])
            yield Rows(p, g, m, v, index)
        bump_versions(lists)


def _check_rows(
    gradient: Role, p: list[AnyArray], gradients: list[Any], rows: list[Any]
) -> tuple[list[AnyArray], list[AnyArray]]:
    for name, items in (("rows", rows), ("grads", gradients)):
        if len(items) != len(p):
            raise _validate.wrong_value(name, f"a list of {len(p)} arrays, as many as params", Text(str(len(items))))
    chosen: list[AnyArray] = []
    checked: list[AnyArray] = []
    for i, table in enumerate(p):
        _want_rows(table, i)
        index = as_ndarray(f"rows[{i}]", rows[i])
        if index.dtype.kind not in "iu" or index.ndim != 1:
            raise _validate.wrong_type(f"rows[{i}]", "a 1-D integer array", index)
        g = as_ndarray(f"grads[{i}]", gradients[i])
        dtypes, wanted = _allowed(gradient, table.dtype)
        if g.dtype not in dtypes or not g.dtype.isnative:
            raise _validate.wrong_type(f"grads[{i}]", f"of dtype {wanted}", Text(_validate.clip(str(g.dtype), 40)))
        if g.shape != (len(index), *table.shape[1:]):
            raise _validate.wrong_value(
                f"grads[{i}]",
                f"of shape {(len(index), *table.shape[1:])}, a row for each of rows[{i}]",
                Text(_validate.clip(str(g.shape), 40)),
            )
        if len(index):
            low, high = _extremes(index)
            if low < 0 or high >= len(table):
                raise _validate.wrong_value(
                    f"rows[{i}]", f"of indices in [0, {len(table)})", Text(f"indices from {low} to {high}")
                )
        index = index.astype(np.int64)
        if not _are_distinct(index):
            raise _validate.wrong_value(
                f"rows[{i}]", "of distinct indices (add up their gradients)", Text("repeated ones")
            )
        chosen.append(index)
        checked.append(g)
    return checked, chosen


def _are_distinct(index: AnyArray) -> bool:
    """Whether no two are equal; those that rise, as most do, are not sorted again."""
    return _rises(index) or _rises(np.sort(index))


def _rises(index: AnyArray) -> bool:
    # Not all(): NumPy's reductions lose the MemoryError of their buffers.
    return bool(np.count_nonzero(index[1:] > index[:-1]) == max(len(index) - 1, 0))


def _extremes(index: AnyArray) -> tuple[int, int]:
    try:
        return int(index.min()), int(index.max())
    except SystemError:  # NumPy's reductions lose the MemoryError of their buffers
        raise MemoryError from None


def _want_rows(table: AnyArray, i: int) -> None:
    if table.ndim == 0:
        raise _validate.wrong_value(f"params[{i}]", "an array with rows", Text("a 0-d array"))
