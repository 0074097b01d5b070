# SPDX-License-Identifier: BSD-3-Clause
"""AdamW with a moving average of the weights in the same pass, as an optimizer of torch."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tensors, _validate, optim
from .._backend import backend as _backend
from .._validate import Text
from ._tensor_lists import (
    GradientReader,
    by_device,
    counted_with,
    hold,
    kept_list,
    local,
    same,
    steps_of,
    want_averaged,
)

__all__ = ["AdamW"]

# What torch's own has beside these, and what a state for it must say.
_FIXED: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}
_REFUSED = ("amsgrad", "maximize", "differentiable")


class _Bucket(NamedTuple):
    """Parameters of a group that have taken as many steps, on one device: one call."""

    params: list[Tensor]
    step: Tensor
    lists: tuple[Any, ...]
    """params, exp_avg, exp_avg_sq and the averages or None, as calls take them."""
    states: list[dict[str, Any]]
    """That of each parameter."""
    entries: list[Any]
    """What they held under the names of `_ENTRIES`, one state after the other."""


_ENTRIES = ("step", "exp_avg", "exp_avg_sq", "ema")


def _counters() -> dict[str, Tensor]:
    """What counts the versions of all states of a name."""
    return {name: torch.empty(0, device="cpu") for name in _ENTRIES[1:]}


def _count(steps: Any) -> Tensor:
    """A number of steps as torch's optimizers have it, whatever the default dtype and device are."""
    return torch.tensor(float(steps), dtype=torch.float32, device="cpu")


def _with_own_steps(states: dict[Any, Any]) -> dict[Any, Any]:
    """States with a count for each: here the parameters of a group share one, torch counts each parameter's own."""
    return {
        key: {**own, "step": _count(own["step"])} if isinstance(own, dict) and "step" in own else own
        for key, own in states.items()
    }


def _kept(tensors: list[Any]) -> Any:
    found = kept_list(tensors)
    return [local(x) for x in tensors] if found is None else found


class AdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` with a moving average of the parameters in the same pass.

    Parameters
    ----------
    params : iterable of parameters or of groups
        Of float32 or float64, on the CPU or on NVIDIA GPUs (`fastops.cuda`); gradients of the same dtype, or in half precision
        beside float32. Shards of DTensors (FSDP2) are stepped in place.
    lr : float or Tensor
        Step size.
    betas : (float, float)
        Decays of the moments.
    eps : float
        Added to the root.
    weight_decay : float
        As in torch, 0.01 by default.
    ema_decay : float in [0, 1], optional
        Keep an average of the parameters that moves by (1 - ema_decay) of the way after each step, starting as a copy; see
        `average_parameters`. An option of each group, as the others are.
    decoupled_weight_decay : bool
        False adds the weight decay to the gradient (Adam with an L2 penalty).

    Raises
    ------
    TypeError, ValueError
        An option out of range.

    Notes
    -----
    `step` raises where a parameter or gradient is of another dtype or device, before it writes any. It makes one call for
    each group and device, of parameters that have taken as many steps; on a GPU that is one launch, on torch's current stream.
    The state dict is that of ``torch.optim.AdamW``, which can be exchanged; averages are an entry ``ema`` beside the moments.
    ``amsgrad``, ``maximize`` and ``differentiable`` are refused.
    The parameters that step together share one tensor ``step``. Autograd counts the changes of all first moments together, and so those
    of the second ones and of the averages: a backward pass that saved one of them raises after a step of any.

    Examples
    --------
    >>> import torch
    >>> from fastops.torch import AdamW
    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = AdamW([w], lr=0.1, weight_decay=0.0, ema_decay=0.75)
    >>> w.square().sum().backward()
    >>> optimizer.step()
    >>> with optimizer.average_parameters():
    ...     round(w.item(), 4)
    0.975
    >>> round(w.item(), 4)
    0.9
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ema_decay: float | None = None,
        decoupled_weight_decay: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            **_FIXED,
            "decoupled_weight_decay": decoupled_weight_decay,
            "ema_decay": ema_decay,
        }
        self._buckets: dict[int, list[_Bucket]] = {}
        self._gradients: dict[int, GradientReader] = {}
        self._counters = _counters()
        self._seen: tuple[list[Any], list[Any]] | None = None
        self._swapped = False
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Parameters
        ----------
        param_group : dict
            As in torch.

        Raises
        ------
        TypeError, ValueError
            An option out of range.
        """
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._buckets.clear()

    def _check(self, group: dict[str, Any]) -> None:
        for name in _REFUSED:
            if group[name]:
                raise _validate.wrong_value(name, "False", group[name])
        optim._adam_step(
            1, float(group["lr"]), group["betas"], group["eps"], group["weight_decay"], group["decoupled_weight_decay"]
        )
        if group["ema_decay"] is not None:
            _validate.number("ema_decay", group["ema_decay"], 0.0, 1.0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = vars(self).get("param_groups", [])
        defaults = state.get("defaults", vars(self).get("defaults", {}))
        for i, group in enumerate(state["param_groups"]):
            # What torch's state does not say stays as it is.
            own = groups[i] if i < len(groups) else defaults
            for name, value in {**_FIXED, "decoupled_weight_decay": True, "ema_decay": None}.items():
                group.setdefault(name, own.get(name, value))
            self._check(group)
        super().__setstate__(state)
        self._buckets = {}
        self._gradients = {}
        self._counters = _counters()
        self._seen = None
        self._swapped = False

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state["state"] = defaultdict(dict, _with_own_steps(state["state"]))
        return state

    def state_dict(self) -> dict[str, Any]:
        """The state, as ``torch.optim.AdamW`` has it.

        Returns
        -------
        dict
            "state" and "param_groups".
        """
        state: dict[str, Any] = super().state_dict()
        state["state"] = _with_own_steps(state["state"])
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, and move the averages.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients anew.

        Returns
        -------
        object
            What the closure gave.

        Raises
        ------
        TypeError, ValueError
            A parameter or gradient of another dtype, layout or device, or an option out of range, before anything was written.
        RuntimeError
            Averages are swapped in.
        """
        if self._swapped:
            raise _validate.wrong_moment("step", "called outside average_parameters()", "a call within")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._forget()
        work = [self._work(i, group) for i, group in enumerate(self.param_groups)]
        if sum(len(calls) + len(by_device(idle)) for calls, idle in work) > 1:
            # A call checks its own tensors before it writes, but those of the next ones too late.
            for group, (calls, idle) in zip(self.param_groups, work, strict=True):
                self._check(group)
                for bucket, grads in calls:
                    _want_fit(bucket, grads)
                for params in by_device(idle):
                    shadows = [local(self.state[p]["ema"]) for p in params]
                    want_averaged(steps_of(params[0]), shadows, [local(p) for p in params])
        for group, (calls, idle) in zip(self.param_groups, work, strict=True):
            self._step_group(group, calls, idle)
        return loss

    def _work(self, i: int, group: dict[str, Any]) -> tuple[list[tuple[_Bucket, list[Any]]], list[Tensor]]:
        """The buckets of a group with their gradients, and parameters that only their averages follow."""
        for name in _REFUSED:
            if group[name]:
                raise _validate.wrong_value(name, "False", group[name])
        params: list[Tensor] = group["params"]
        averages = group["ema_decay"] is not None
        grads, complete = self._gradients.setdefault(i, GradientReader()).read(params)
        idle: list[Tensor] = []
        if not complete:
            # Averages follow parameters that stand still, too.
            idle = [
                p
                for p, g in zip(params, grads, strict=True)
                if g is None and averages and "ema" in self.state.get(p, ())
            ]
            params = [p for p, g in zip(params, grads, strict=True) if g is not None]
        buckets = self._buckets.get(i)
        if buckets is None or not (_holds(buckets, params, averages) and self._knows(buckets)):
            buckets = self._buckets[i] = self._sort(params, averages)
        whole = len(buckets) == 1 and len(buckets[0].params) == len(grads)
        return [(bucket, grads if whole else [x.grad for x in bucket.params]) for bucket in buckets], idle

    def _step_group(self, group: dict[str, Any], calls: list[tuple[_Bucket, list[Any]]], idle: list[Tensor]) -> None:
        for bucket, given in calls:
            p, m, v, shadows = bucket.lists
            steps_of(bucket.params[0]).adamw_step_(
                p,
                [local(g) for g in given] if type(p) is list else given,
                m,
                v,
                step=int(bucket.step) + 1,
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled=group["decoupled_weight_decay"],
                ema=shadows,
                ema_decay=group["ema_decay"],
            )
            bucket.step.add_(1)
        for params in by_device(idle):
            shadows = [local(self.state[p]["ema"]) for p in params]
            steps_of(params[0]).ema_update_(shadows, [local(p) for p in params], group["ema_decay"])

    def _forget(self) -> None:
        """Drop the lists of parameters whose state was cleared or replaced."""
        # To look for a tensor in a dict takes several times as long as to walk over the dict.
        if self._seen is not None and len(self.state) == len(self._seen[0]):
            keys, states = self._seen
            if same(self.state, keys) and same(self.state.values(), states):
                return
        for i, buckets in [*self._buckets.items()]:
            if not all(same(map(self.state.get, bucket.params), bucket.states) for bucket in buckets):
                del self._buckets[i]
        self._seen = list(self.state), list(self.state.values())

    def _knows(self, buckets: list[_Bucket]) -> bool:
        """Whether the entries of the states are what the lists were made of."""
        for bucket in buckets:
            kept = _ENTRIES if bucket.lists[3] is not None else _ENTRIES[:3]
            if not hold(bucket.states, kept, bucket.entries):
                return False
            # The local part of a DTensor is another object each time.
            if type(bucket.lists[0]) is list:
                held = zip(bucket.params, bucket.lists[0], strict=True)
                if any(local(p).data_ptr() != part.data_ptr() for p, part in held):
                    return False
            if type(bucket.lists[1]) is list:
                parts = chain.from_iterable(zip(*bucket.lists[1 : len(kept)], strict=True))
                shards = (x for x in bucket.entries if x is not bucket.step)
                if any(local(x).data_ptr() != part.data_ptr() for x, part in zip(shards, parts, strict=True)):
                    return False
        return True

    # What is made in inference mode could not be written outside it.
    @torch.inference_mode(False)
    def _sort(self, params: list[Tensor], averages: bool) -> list[_Bucket]:
        """One list for each number of steps taken, and each device."""
        self._seen = None
        found: dict[tuple[int, Any], list[Tensor]] = {}
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = _count(0)
                for name in ("exp_avg", "exp_avg_sq"):
                    zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
                    state[name] = counted_with(self._counters[name], zeros)
            if averages and "ema" not in state:
                copy = p.detach().clone(memory_format=torch.preserve_format)
                state["ema"] = counted_with(self._counters["ema"], copy)
            found.setdefault((int(state["step"]), (p.is_cuda, p.device)), []).append(p)
        buckets = []
        for (step, _), members in found.items():
            # One counter for all, but not for those that have taken part in it and do not now.
            shared = _count(step)
            states = [self.state[p] for p in members]
            for state in states:
                state["step"] = shared
            moments = (_kept([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq"))
            shadows = _kept([state["ema"] for state in states]) if averages else None
            entries = [state[name] for state in states for name in (_ENTRIES if averages else _ENTRIES[:3])]
            buckets.append(_Bucket(members, shared, (_kept(members), *moments, shadows), states, entries))
        return buckets

    @contextlib.contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Evaluate with the averages as the parameters: within ``with``, and with their own values again afterwards.

        Yields
        ------
        None
            Parameters that have no average yet keep their values.

        Raises
        ------
        RuntimeError
            They are swapped in already.
        ValueError
            No group has an `ema_decay`.

        Notes
        -----
        Of a model under ``fully_shard``, call ``model.reshard()`` before leaving: it keeps whole parameters after a forward pass.
        """
        if self._swapped:
            raise _validate.wrong_moment("average_parameters", "left before it is entered again", "a call within")
        if all(group["ema_decay"] is None for group in self.param_groups):
            raise _validate.wrong_value("ema_decay", "given, for averages to be there", Text("None"))
        pairs = [
            (p, self.state[p]["ema"])
            for group in self.param_groups
            for p in group["params"]
            if p in self.state and "ema" in self.state[p]
        ]
        own = [p.detach().clone() for p, _ in pairs]
        self._swapped = True
        try:
            with torch.no_grad():
                for p, average in pairs:
                    p.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for (p, _), value in zip(pairs, own, strict=True):
                    p.copy_(value)
            self._swapped = False


def _want_fit(bucket: _Bucket, grads: list[Tensor]) -> None:
    """Raises what the step of a bucket would."""
    p, m, v, shadows = bucket.lists
    numbers = optim._adam_step(1, 0.0, (0.0, 0.0), 0.0, 0.0, True)
    given = [local(g) for g in grads] if type(p) is list else grads
    steps = steps_of(bucket.params[0])
    if steps is optim and _backend.adamw_fits(p, given, m, v, shadows, numbers):
        return
    roles = _tensors.adamw_roles(shadows, numbers)
    lists = [list(x) for x in (p, given, m, v, shadows or ())]
    if steps is optim:
        _tensors.check(roles, lists[: len(roles)])
    else:
        steps._optim.want(roles, lists[: len(roles)])


def _holds(buckets: list[_Bucket], params: list[Tensor], averages: bool) -> bool:
    """Whether the lists are of these parameters."""
    if any((bucket.lists[3] is not None) != averages for bucket in buckets):
        return False
    if sum(len(bucket.params) for bucket in buckets) != len(params):
        return False
    if len(buckets) == 1:
        return same(buckets[0].params, params)
    return {id(p) for bucket in buckets for p in bucket.params} == set(map(id, params))
