# SPDX-License-Identifier: BSD-3-Clause
"""Moving averages of the weights of a torch module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from .. import _schedules, _validate
from .._backend import backend as _backend
from .._validate import Text
from ._tensor_lists import Pairs, Slots, want_averaged

__all__ = ["EMA"]

_COUNTER = "n_averaged"


def _all_finite(tensors: Any) -> bool:
    if tensors and tensors[0].is_cuda:
        return bool(torch.stack([x.isfinite().all() for x in tensors]).all())
    return bool(_backend.all_finite(tensors))


class EMA(torch.nn.Module):
    """A moving average of a module's weights, as a module: ``AveragedModel`` and timm's ``ModelEmaV3`` in one pass over the memory.

    Parameters
    ----------
    model : torch.nn.Module
        On the CPU or on NVIDIA GPUs (`fastops.cuda`). `module` starts as a copy of it; give `update` the model that is trained, or
        let it be this one.
    decay : float in [0, 1] or "equal"
        The average moves by s += (1 - decay) (p - s). "equal" is the plain mean of the weights at all updates (SWA).
    warmup : {"none", "timm", "tf"}
        As in `fastops.EMA`, as are the next three.
    inv_gamma : float
        Of "timm".
    power : float
        Of "timm".
    min_decay : float
        Of "timm" and "tf".
    update_after_step : int, optional
        Up to this update the average is a copy: 1 by default, so that the first update copies as ``AveragedModel`` does, and 0
        with a warmup or "equal", whose first decay is 0 anyway.
    buffers : {"copy", "average"}
        What becomes of floating-point buffers such as running statistics. Integer ones are copied.
    nonfinite : {"propagate", "skip"}
        "skip" leaves out an update where a parameter holds an inf or nan.
    dtype : torch.dtype, optional
        Of the averages, such as torch.float32 for a model in half precision. By default that of the model: bfloat16 averages
        round stochastically, without which small updates were lost; float16 needs a `dtype`.
    seed : int
        Of the stochastic rounding.
    layout : {"torch", "timm"}
        Whose state dict `state_dict` gives: that of ``AveragedModel``, which counts the updates in ``n_averaged``, or that of
        ``ModelEmaV3``, which does not. Both are loaded.
    module : torch.nn.Module, optional
        What holds the averages in place of a copy, such as a model that is sharded as `model` is; its weights are the start.

    Attributes
    ----------
    module : torch.nn.Module
        The averaged model, in evaluation mode.
    n_averaged : Tensor
        Updates so far.

    Raises
    ------
    TypeError
        A `model` that is no module, an option of the wrong type.
    ValueError
        A number out of range, a float16 model without `dtype`.

    Notes
    -----
    Parameters that are DTensors (FSDP2's ``fully_shard``) are averaged shard by shard, without communication. A sharded module
    cannot be copied: make the EMA before ``fully_shard(model); fully_shard(ema.module)``.
    On a GPU one launch on torch's current stream moves all averages; a model on several devices takes a call for each.

    Examples
    --------
    >>> import torch
    >>> from fastops.torch import EMA
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> ema = EMA(model, decay=0.75)
    >>> for value in (0.0, 1.0):
    ...     _ = torch.nn.init.constant_(model.weight, value)
    ...     _ = ema.update()
    >>> ema.module.weight.item()
    0.25
    >>> with ema.average_parameters():
    ...     model.weight.item()
    0.25
    >>> model.weight.item()
    1.0
    """

    n_averaged: Tensor
    module: torch.nn.Module

    def __init__(
        self,
        model: torch.nn.Module,
        decay: float | str = 0.999,
        *,
        warmup: str = "none",
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_decay: float = 0.0,
        update_after_step: int | None = None,
        buffers: str = "copy",
        nonfinite: str = "propagate",
        dtype: Any = None,
        seed: int = 0,
        layout: str = "torch",
        module: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, torch.nn.Module):
            raise _validate.wrong_type("model", "a torch.nn.Module", model)
        self._schedule = _schedules.single(decay, warmup, inv_gamma, power, min_decay, 1, update_after_step)
        self._averages_buffers = _validate.choice("buffers", buffers, ("copy", "average")) == "average"
        self._skips = _validate.choice("nonfinite", nonfinite, ("propagate", "skip")) == "skip"
        self._seed = _validate.integer("seed", seed, 0, 2**64 - 1)
        saved = _validate.choice("layout", layout, ("torch", "timm")) == "torch"
        if dtype is not None and dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise _validate.wrong_value("dtype", "torch.float32, float64, bfloat16 or None", Text(str(dtype)))
        made = deepcopy(model) if module is None else module
        if dtype is not None:
            made = made.to(dtype=dtype)
        for x in made.parameters():
            if x.dtype is torch.float16:
                raise _validate.wrong_value("dtype", "torch.float32 for a model with float16 weights", dtype)
        self.module = made.eval()
        self.register_buffer(_COUNTER, torch.zeros((), dtype=torch.long), persistent=saved)
        self.register_load_state_dict_pre_hook(_read_counter)
        # Not a submodule: neither its weights nor its devices are this module's.
        self._source = [model]
        self._swapped = False
        self._make_lists()

    def _make_lists(self) -> None:
        """What follows from the other fields and does not pickle."""
        self._pairs = Pairs()
        self._slots: dict[int, tuple[torch.nn.Module, Slots]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: x for key, x in vars(self).items() if key not in ("_pairs", "_slots")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_lists()

    def _places(self, module: torch.nn.Module) -> Slots:
        found = self._slots.get(id(module))
        if found is None or not found[1].current():
            if len(self._slots) > 2:
                self._slots.clear()
            found = self._slots[id(module)] = (module, Slots(module))
        return found[1]

    def _tensors(self, model: torch.nn.Module | None) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """Live and averaged tensors that are averaged, and those that are copied."""
        source, own = self._places(self._model(model)), self._places(self.module)
        if source.counts() != own.counts():
            # Names may have come to share a tensor, which places do not tell of.
            self._slots.clear()
            source, own = self._places(self._model(model)), self._places(self.module)
        have, want = source.counts(), own.counts()
        if have != want:
            wanted = f"a module of {want[0]} parameters and {want[1]} buffers"
            raise _validate.wrong_value("model", wanted, Text(f"one of {have[0]} and {have[1]}"))
        live, averages = source.params.read(), own.params.read()
        copies: tuple[list[Any], list[Any]] = ([], [])
        for x, s in zip(source.buffers.read(), own.buffers.read(), strict=True):
            averaged = self._averages_buffers and s.is_floating_point()
            (live if averaged else copies[0]).append(x)
            (averages if averaged else copies[1]).append(s)
        return live, averages, *copies

    def _model(self, model: torch.nn.Module | None) -> torch.nn.Module:
        return self._source[0] if model is None else model

    def get_decay(self, step: int | None = None) -> float:
        """The decay of an update.

        Parameters
        ----------
        step : int, optional
            The number of the update, from 1; by default the next one.

        Returns
        -------
        float
            0 where the average becomes a copy.

        Raises
        ------
        TypeError, ValueError
            `step` is no such number.
        """
        step = int(self.n_averaged) + 1 if step is None else _validate.integer("step", step, 0)
        return self._schedule.decay(0, step, step - 1, max(step - self._schedule.after - 1, 0))

    @torch.no_grad()
    def update(self, model: torch.nn.Module | None = None, step: int | None = None) -> bool:
        """Count an update and move the averages towards the weights.

        Parameters
        ----------
        model : torch.nn.Module, optional
            Whose weights; by default the model that this was made of.
        step : int, optional
            The number of the update, from 1, where it is counted elsewhere.

        Returns
        -------
        bool
            Whether the averages moved: False where ``nonfinite="skip"`` found an inf or nan.

        Raises
        ------
        TypeError, ValueError
            Weights of other shapes or dtypes, or not where their averages are. Nothing was written.
        RuntimeError
            Averages are swapped in.
        """
        if self._swapped:
            raise _validate.wrong_moment("update", "called outside average_parameters()", "a call within")
        live, averages, sources, targets = self._tensors(model)
        _want_shapes(sources, targets)
        groups = self._pairs.of(averages, live)
        count = int(self.n_averaged) + 1 if step is None else step
        decay = self.get_decay(count)
        # Wider averages than bfloat16 round to nearest all the same. Fibonacci's multiplier, so that the streams of neighbouring
        # seeds do not meet after a few steps.
        seed = (self._seed * 0x9E3779B97F4A7C15 + count) % 2**64
        try:
            moved = self._move(groups, decay, seed)
        except (TypeError, ValueError):
            # Modules move to another device within the same tensors.
            if len(groups) != 1 or not self._pairs.moved():
                raise
            moved = self._move(self._pairs.of(averages, live), decay, seed)
        if not moved:
            return False
        _write(targets, sources)
        self.n_averaged.fill_(count)
        return True

    def _move(self, groups: list[tuple[Any, Any, Any]], decay: float, seed: int) -> bool:
        if self._skips and not all(_all_finite(params) for _, _, params in groups):
            return False
        if len(groups) > 1:
            # A call checks its own tensors before it writes, but those of the next ones too late.
            for steps, shadows, params in groups:
                want_averaged(steps, list(shadows), list(params))
        for steps, shadows, params in groups:
            steps.ema_update_(shadows, params, decay, rounding="stochastic", seed=seed)
        return True

    def update_parameters(self, model: torch.nn.Module) -> None:
        """Update from `model`: the name that ``AveragedModel`` has for it.

        Parameters
        ----------
        model : torch.nn.Module
            Whose weights.
        """
        self.update(model)

    def set(self, model: torch.nn.Module | None = None) -> None:
        """Make the averages a copy of the weights.

        Parameters
        ----------
        model : torch.nn.Module, optional
            Whose weights; by default the model that this was made of.

        Raises
        ------
        ValueError
            Weights or buffers of other shapes. Nothing was written.
        """
        live, averages, sources, targets = self._tensors(model)
        _want_shapes(live + sources, averages + targets)
        _write(averages + targets, live + sources)

    def copy_to_(self, model: torch.nn.Module | None = None) -> None:
        """Write the averages into a model for good.

        Parameters
        ----------
        model : torch.nn.Module, optional
            By default the model that this was made of.

        Raises
        ------
        ValueError
            Weights or buffers of other shapes. Nothing was written.
        """
        live, averages, sources, targets = self._tensors(model)
        _want_shapes(live + sources, averages + targets)
        _write(live + sources, averages + targets)

    @contextlib.contextmanager
    def average_parameters(self, model: torch.nn.Module | None = None) -> Iterator[torch.nn.Module]:
        """Evaluate a model with the averages as its weights: within ``with``, and with its own again afterwards.

        Parameters
        ----------
        model : torch.nn.Module, optional
            By default the model that this was made of.

        Yields
        ------
        torch.nn.Module
            The model.

        Raises
        ------
        RuntimeError
            They are swapped in already.

        Notes
        -----
        Keeps a copy of the weights meanwhile. `module` can be evaluated without one.
        """
        if self._swapped:
            raise _validate.wrong_moment("average_parameters", "left before it is entered again", "a call within")
        live, averages, sources, targets = self._tensors(model)
        tensors, means = live + sources, averages + targets
        with torch.no_grad():
            own = [x.detach().clone() for x in tensors]
        self._swapped = True
        try:
            _write(tensors, means)
            _forget_gathered(self._model(model))
            yield self._model(model)
        finally:
            _forget_gathered(self._model(model))
            _write(tensors, own)
            self._swapped = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the averaged model gives.

        Parameters
        ----------
        *args, **kwargs
            Those of the model.

        Returns
        -------
        object
            Its result.
        """
        return self.module(*args, **kwargs)

    def extra_repr(self) -> str:
        """The decay, for `repr`."""
        decay = self._schedule.decays[0]
        return f"decay={'equal' if decay is None else f'{decay:g}'}, warmup={self._schedule.warmup!r}"


def _want_shapes(tensors: list[Any], averages: list[Any]) -> None:
    """Raises where one cannot be copied to the other, before any is."""
    for x, s in zip(tensors, averages, strict=True):
        if x.shape != s.shape:
            got = Text(f"{_validate.clip(str(tuple(x.shape)), 40)} beside {_validate.clip(str(tuple(s.shape)), 40)}")
            raise _validate.wrong_value("model", "a module whose tensors have the shapes of their averages", got)


@torch.no_grad()
def _write(targets: list[Any], values: list[Any]) -> None:
    for x, value in zip(targets, values, strict=True):
        x.copy_(value)


def _forget_gathered(model: torch.nn.Module) -> None:
    """FSDP2 keeps the whole parameters of a root module after a forward pass, and would go on with those."""
    for part in model.modules():
        if hasattr(part, "reshard"):
            part.reshard()


def _read_counter(ema: EMA, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state without a counter is one of an average that has begun, and a counter that is not kept is read all the same."""
    key = prefix + _COUNTER
    kept = _COUNTER not in ema._non_persistent_buffers_set
    count = state.get(key)
    if count is None:
        count = torch.tensor(max(int(ema.n_averaged), ema._schedule.after))
    if kept:
        state[key] = count
    else:
        state.pop(key, None)
        ema.n_averaged.copy_(count)
