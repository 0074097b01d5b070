# SPDX-License-Identifier: BSD-3-Clause
"""Moving averages and optimizer steps over lists of tensors on a GPU, one launch a call."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from .. import _tensors, _validate, optim
from .._tensors import FixedList, Role
from ._arrays import Array, Described, Operands, View, described, interface_of, is_torch, view

__all__ = ["TensorList", "adamw_step_", "ema_update_", "sgd_step_"]

Tensors = Iterable[Any]
# Arrays of other libraries than torch, by kind, the stream that they named and whether they are written.
Guests = dict[tuple[type, int | None, bool], list[tuple[Any, View]]]


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

    __slots__ = ("_held", "_plans", "_tensors", "_verify", "_version")

    def __init__(self, arrays: Iterable[Any], *, verify: bool = True) -> None:
        self._arrays = tuple(_as_list("arrays", arrays))
        self._verify = _validate.boolean("verify", verify)
        # By roles and lists: the versions that these had, their plan, and the other lists, so that their addresses stay theirs.
        # With the plan, arrays of our own and of others.
        self._plans: dict[tuple[Any, ...], tuple[list[int], Any, tuple[list[Array], Guests, list[Any]]]] = {}
        self._version = 0
        self._held: tuple[Any, ...] = ()
        self._tensors: tuple[Any, ...] | None = None

    def refresh(self) -> None:
        """Forget what is known of the tensors, so that the next call reads them anew.

        Examples
        --------
        >>> import fastops.cuda
        >>> fastops.cuda.TensorList([], verify=False).refresh()
        """
        self._plans.clear()
        self._held = ()
        self._version += 1

    def _known_tensors(self) -> tuple[Any, ...]:
        """The tensors of torch, which autograd knows: found once."""
        if self._tensors is None:
            kind = getattr(sys.modules.get("torch"), "Tensor", ())
            self._tensors = tuple(x for x in self._arrays if isinstance(x, kind))
        return self._tensors

    def _hold(self) -> None:
        """Keeps the memory that the tensors have now: theirs may be exchanged under them."""
        if not self._held:
            self._held = tuple(x.detach() if hasattr(x, "detach") else x for x in self._arrays)


def _as_list(name: str, value: object) -> list[Any]:
    if isinstance(value, Array) or (not is_torch(value) and interface_of(value) is not None):
        return [value]
    return _tensors.as_list(name, value)


class _Step:
    """The tensors of a call as a plan, and the stream that it goes to."""

    def __init__(self, roles: list[Role], values: list[Any], stream: object) -> None:
        self._roles, self._values = roles, values
        lists = [
            v._arrays if isinstance(v, TensorList) else _as_list(r.name, v) for r, v in zip(roles, values, strict=True)
        ]
        self._operands = operands = Operands(stream, lists[0][:1] if lists else [])
        self.native, self.stream = operands.native, operands.stream
        self._lists = lists
        self._written = {role.name for role in roles if role.written}
        self._own: list[Array] = []
        self._guests: Guests = {}
        try:
            self._take_tensors()
            self.plan = self._known()
        except BaseException:
            operands.give_up()
            raise

    def _take_tensors(self) -> None:
        """The compiled module reads torch's tensors itself, and knows nothing of streams."""
        if self._operands.of_torch:
            return
        for role, value, items in zip(self._roles, self._values, self._lists, strict=True):
            tensors = value._known_tensors() if isinstance(value, TensorList) else items
            first = next((x for x in tensors if is_torch(x)), None)
            if first is not None and first.device.type == "cuda":
                at = next(i for i, x in enumerate(items) if x is first)
                found = view(f"{role.name}[{at}]", first, self.stream, in_place=True)
                if self._operands.take(first, found, written=role.written):
                    self._operands.keep(tuple(items))

    def _describe(self, name: str, value: Any) -> Described:
        found = view(name, value, self.stream, in_place=True)
        if not is_torch(value):
            written = name.partition("[")[0] in self._written
            self._operands.take(value, found, written=written)
            if isinstance(value, Array):
                self._own.append(value)
            else:
                self._guests.setdefault((type(value), found.stream, written), []).append((value, found))
        return described(name, found)

    def _take_again(self, own: list[Array], guests: Guests) -> None:
        for array in own:
            self._operands.use(array)
        for (_, stream, written), items in guests.items():
            value, found = items[0]
            if stream is not None:
                # The one of the first call may be gone.
                found = found._replace(stream=(interface_of(value) or {}).get("stream"))
            if self._operands.take(value, found, written=written):
                self._operands.keep(items)

    def _known(self) -> Any:
        values = self._values
        kept = values[0]
        if not all(isinstance(v, TensorList) and not v._verify for v in values):
            return self.native.plan(self._roles, self._lists, self._describe, self.stream)
        key = (*self._roles, *map(id, values))
        versions = [value._version for value in values]
        found = kept._plans.get(key)
        if found is None or found[0] != versions:
            for value in values:
                value._hold()
            plan = self.native.plan(self._roles, self._lists, self._describe, self.stream)
            others = [x for x in values if x is not kept]
            found = kept._plans[key] = versions, plan, (self._own, self._guests, others)
        else:
            own, guests, _ = found[2]
            self._take_again(own, guests)
        return found[1]

    def end(self) -> None:
        """Says that the stream has got all of the call."""
        self._operands.end(self.plan.device)

    def done(self) -> None:
        """Tells torch's autograd what was written, and says that the stream has got all of the call."""
        for role, value, items in zip(self._roles, self._values, self._lists, strict=True):
            if not role.written:
                continue
            if not isinstance(value, TensorList):
                _tensors.bump_versions((items,))
            elif known := value._known_tensors():
                sys.modules["torch"].autograd.graph.increment_version(known)
        self.end()


def want(roles: list[Role], lists: list[list[Any]]) -> None:
    """Raises what a call with these lists would."""
    _Step(roles, lists, None).end()


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
    step.native.ema_update(step.plan, weights, chosen, step.stream)
    step.done()


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
        step.native.sgd_step(step.plan, tuple(numbers), momentum_buffers is not None, shadows is not None, step.stream)
        step.done()


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
        call.native.adamw_step(call.plan, tuple(numbers), shadows is not None, call.stream)
        call.done()
