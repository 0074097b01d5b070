# SPDX-License-Identifier: BSD-3-Clause
"""Moving averages and optimizer steps over lists of tensors on a GPU, one launch a call."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .. import _tensors, _validate, optim
from .._tensors import FixedList, Role
from ._arrays import Array, Described, View, described, interface_of, is_torch, view
from ._calls import Operands

__all__ = ["TensorList", "adamw_step_", "ema_update_", "sgd_step_"]

Tensors = Iterable[Any]
# Arrays of other libraries than torch, by kind, the stream that they named and whether they are written.
Guests = dict[tuple[type, int | None, bool], list[tuple[Any, View]]]


class _Plan(NamedTuple):
    """Lists that are not read again."""

    versions: list[int]
    table: Any
    own: list[Array]
    guests: Guests
    held: list[tuple[Any, ...]]  # the memory of each list, also where its tensors got other memory
    lists: list[Any]  # whose addresses are part of the key


_MOST_PLANS = 8


class TensorList(FixedList):
    """A fixed list of tensors on a GPU that many calls use.

    Parameters
    ----------
    arrays : iterable of arrays
        On one GPU: torch's, cupy's, or any with ``__cuda_array_interface__`` or DLPack.
    verify : bool
        False spares the look at every tensor in each call, which is expected to cost more than the kernel where tensors are many
        and small: call `refresh` whenever the memory of one was exchanged, since the old memory, which the list keeps alive, would be
        changed otherwise.

    Raises
    ------
    TypeError
        `arrays` is not iterable.

    Notes
    -----
    Does not pickle: it stands for memory of this process.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     shadows = fastops.cuda.TensorList([torch.zeros(3, device="cuda")], verify=False)
    """

    __slots__ = ("_plans", "_tensors", "_verify", "_version")

    def __init__(self, arrays: Iterable[Any], *, verify: bool = True) -> None:
        self._arrays = tuple(_as_list("arrays", arrays))
        self._verify = _validate.boolean("verify", verify)
        self._plans: dict[tuple[Any, ...], _Plan] = {}  # by roles and lists, the latest last
        self._version = 0
        self._tensors: tuple[Any, ...] | None = None

    def refresh(self) -> None:
        """Forget what is known of the tensors, so that the next call reads them anew.

        Examples
        --------
        >>> import fastops.cuda
        >>> fastops.cuda.TensorList([], verify=False).refresh()
        """
        self._plans.clear()
        self._version += 1

    def _known_tensors(self) -> tuple[Any, ...]:
        """The tensors of torch, which autograd knows: found once."""
        if self._tensors is None:
            kind = getattr(sys.modules.get("torch"), "Tensor", ())
            self._tensors = tuple(x for x in self._arrays if isinstance(x, kind))
        return self._tensors


def _as_list(name: str, value: object) -> list[Any]:
    if isinstance(value, Array) or (not is_torch(value) and interface_of(value) is not None):
        return [value]
    return _tensors.as_list(name, value)


class _Step(Operands):
    """The tensors of a call as a plan."""

    def __init__(self, roles: list[Role], values: list[Any], stream: object) -> None:
        self._roles, self._values = roles, values
        lists = [
            v._arrays if isinstance(v, TensorList) else _as_list(r.name, v) for r, v in zip(roles, values, strict=True)
        ]
        super().__init__(stream, [x for items in lists for x in items[:1]])
        self._lists = lists
        self._written = {role.name for role in roles if role.written}
        self._own: list[Array] = []
        self._foreign: Guests = {}
        self._held: list[tuple[Any, ...]] | None = None
        self.plan = self._read()
        self.device = self.plan.device
        self._take_tensors()

    def _take_tensors(self) -> None:
        """The compiled module reads torch's tensors itself, and knows nothing of streams."""
        if self.of_torch:
            return
        for i, (role, value, items) in enumerate(zip(self._roles, self._values, self._lists, strict=True)):
            tensors = value._known_tensors() if isinstance(value, TensorList) else items
            first = next((x for x in tensors if is_torch(x)), None)
            if first is not None and first.device.type == "cuda":
                found = view(role.name, first, self.stream, in_place=True)
                if self.take(first, found, written=role.written):
                    if self._held is None:
                        self.keep(*items)
                    else:
                        self.keep(self._held[i])  # detached when the list was read

    def _describe(self, name: str, value: Any) -> Described:
        found = view(name, value, self.stream, in_place=True)
        if not is_torch(value):
            written = name.partition("[")[0] in self._written
            if self.take(value, found, written=written):
                self.keep(found.keep)
            if isinstance(value, Array):
                self._own.append(value)
            else:
                self._foreign.setdefault((type(value), found.stream, written), []).append((value, found))
        return described(name, found)

    def _take_again(self, plan: _Plan) -> None:
        self._arrays += plan.own
        for (_, stream, written), items in plan.guests.items():
            value, found = items[0]
            if stream is None:
                # What its library knows of streams it learns by DLPack alone, array by array.
                for each, _ in items:
                    found = view("arrays", each, self.stream)
                    if self.take(each, found, written=written):
                        self.keep(found.keep)
                continue
            # The one of the first call may be gone.
            found = found._replace(stream=(interface_of(value) or {}).get("stream"))
            if self.take(value, found, written=written):
                self.keep(items)

    def _read(self) -> Any:
        """The table of the lists."""
        values = self._values
        if not all(isinstance(v, TensorList) and not v._verify for v in values):
            return self.native.plan(self._roles, self._lists, self._describe, self.stream)
        plans = values[0]._plans
        key = (*self._roles, *map(id, values))
        versions = [value._version for value in values]
        found = plans.get(key)
        if found is None or found.versions != versions:
            held = [tuple(x.detach() if is_torch(x) else x for x in items) for items in self._lists]
            table = self.native.plan(self._roles, self._lists, self._describe, self.stream)
            # Not the first list, which has this entry.
            found = _Plan(versions, table, self._own, self._foreign, held, [x for x in values if x is not values[0]])
            if key not in plans and len(plans) >= _MOST_PLANS:
                plans.pop(next(iter(plans), None), None)
        else:
            self._take_again(found)
        plans.pop(key, None)
        plans[key] = found
        self._held = found.held
        return found.table

    def tell_autograd(self) -> None:
        """That torch's tensors were written."""
        for role, value, items in zip(self._roles, self._values, self._lists, strict=True):
            if not role.written:
                continue
            if not isinstance(value, TensorList):
                _tensors.bump_versions((items,))
            elif known := value._known_tensors():
                sys.modules["torch"].autograd.graph.increment_version(known)


def want(roles: list[Role], lists: list[list[Any]]) -> None:
    """Raises what a call with these lists would."""
    _Step(roles, lists, None)


def ema_update_(
    shadows: Tensors,
    params: Tensors,
    decay: float | Sequence[float],
    *,
    rounding: str = "nearest",
    seed: int | None = None,
    stream: Any = None,
) -> None:
    """Move every shadow towards its parameter on a GPU: s += (1 - decay) (p - s), one launch for all.

    Parameters
    ----------
    shadows : list of arrays, float32 or float64 (bfloat16 with ``rounding="stochastic"``)
        On one GPU, changed in place. Without gaps, in any order of the axes.
    params : list of arrays, float16, bfloat16, float32 or float64
        As many, of the same shapes and memory order.
    decay : float or sequence of float
        In [0, 1], one for all tensors or one for each.
    rounding : {"nearest", "stochastic"}
        As in `fastops.ema_update_`.
    seed : int, optional
        In [0, 2**64), for stochastic rounding.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Raises
    ------
    RuntimeError
        No GPU.
    TypeError
        A dtype that is not in the table above, a tensor that is not on a GPU.
    ValueError
        Lists of different lengths, shapes or orders that differ, tensors with gaps, on several devices, or overlapping.

    Notes
    -----
    The bits of `fastops.ema_update_` on CPUs with FMA. Returns before the kernel has run. A list of which the previous calls
    had the same memory is not uploaded again; `TensorList` with ``verify=False`` is not even read.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     shadows, params = [torch.zeros(3, device="cuda")], [torch.ones(3, device="cuda")]
    ...     fastops.cuda.ema_update_(shadows, params, decay=0.75)
    """
    shadows, weights = optim._ema_weights(shadows, decay)
    chosen = optim._seed(rounding, seed)
    step = _Step(_tensors.ema_roles(1), [params, shadows], stream)
    if not isinstance(weights, float) and len(weights):
        step.refuse_capture("decays of every tensor, which come from host memory: give one for all")
    with step:
        step.native.ema_update(step.plan, weights, chosen, step.stream)
        step.tell_autograd()


def sgd_step_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors | None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    accumulate: tuple[int, int] | None = None,
    ema: Tensors | None = None,
    ema_decay: float | None = None,
    zero_grad: bool = False,
    stream: Any = None,
) -> None:
    """Take one step of stochastic gradient descent on a GPU, one launch for all tensors.

    Parameters
    ----------
    params, grads : list of arrays
        As in `fastops.sgd_step_`, on one GPU and without gaps.
    momentum_buffers : list of arrays or None
        Likewise.
    lr, momentum, dampening, nesterov, weight_decay, accumulate : float, bool or (i, k)
        As in `fastops.sgd_step_`.
    ema : list of arrays, optional
        Shadows, which follow the new parameters.
    ema_decay, zero_grad : float and bool, optional
        As in `fastops.sgd_step_`.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As `ema_update_`, and for numbers out of range.

    Notes
    -----
    The bits of `fastops.sgd_step_` on CPUs with FMA.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     p, g = [torch.ones(3, device="cuda")], [torch.ones(3, device="cuda")]
    ...     fastops.cuda.sgd_step_(p, g, None, lr=0.1)
    """
    numbers = optim._sgd_step(momentum_buffers, lr, momentum, dampening, nesterov, weight_decay, accumulate, zero_grad)
    with optim._average(_shadows(ema), ema_decay, numbers.moves) as (shadows, weight):
        numbers = numbers._replace(ema_weight=weight)
        values = [x for x in (params, grads, momentum_buffers, shadows) if x is not None]
        step = _Step(_tensors.sgd_roles(momentum_buffers, shadows, numbers), values, stream)
        with step:
            step.native.sgd_step(
                step.plan, tuple(numbers), momentum_buffers is not None, shadows is not None, step.stream
            )
            step.tell_autograd()


def _shadows(ema: Any) -> Any:
    if hasattr(ema, "_fused"):
        raise _validate.wrong_type("ema", "a list of arrays on a GPU", ema)
    return ema


def adamw_step_(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    ema: Tensors | None = None,
    ema_decay: float | None = None,
    zero_grad: bool = False,
    stream: Any = None,
) -> None:
    """Take one AdamW step on a GPU, one launch for all tensors.

    Parameters
    ----------
    params, grads, exp_avg, exp_avg_sq : list of arrays
        As in `fastops.adamw_step_`, on one GPU and without gaps.
    step, lr, betas, eps, weight_decay, decoupled : int, float, bool or (float, float)
        As in `fastops.adamw_step_`.
    ema : list of arrays, optional
        Shadows, which follow the new parameters.
    ema_decay, zero_grad : float and bool, optional
        As in `fastops.adamw_step_`.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As `ema_update_`, and for numbers out of range.

    Notes
    -----
    The bits of `fastops.adamw_step_` on CPUs with FMA. 28 bytes of traffic an element in float32, 36 with `ema`.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     p, g, m, v = ([torch.ones(3, device="cuda")] for _ in range(4))
    ...     fastops.cuda.adamw_step_(p, g, m, v, step=1, lr=0.01)
    """
    numbers = optim._adam_step(step, lr, betas, eps, weight_decay, decoupled, zero_grad=zero_grad)
    with optim._average(_shadows(ema), ema_decay) as (shadows, weight):
        numbers = numbers._replace(ema_weight=weight)
        values = [x for x in (params, grads, exp_avg, exp_avg_sq, shadows) if x is not None]
        call = _Step(_tensors.adamw_roles(shadows, numbers), values, stream)
        with call:
            call.native.adamw_step(call.plan, tuple(numbers), shadows is not None, call.stream)
            call.tell_autograd()
