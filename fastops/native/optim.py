# SPDX-License-Identifier: BSD-3-Clause
"""Thin typed access to the compiled optimizer steps.

`_core` reads lists of arrays by itself. Where it finds one that is not plain (0), the shared checker raises the error that fits,
or brings arrays that fit; where it met tensors of another library (2), torch's autograd is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core, _tensors
from .._tensors import AdamStep, EgStep, Role, SgdStep, TensorList

Array = NDArray[Any]
Tensors = Sequence[Any]

_core.register_tensor_list(TensorList)

# Sets of shadows that one call of `_core` takes: its roles (FASTOPS_MAX_ROLES) but the parameters.
_PROFILES = 15


def _run(
    done: int, roles: Callable[[], list[Role]], values: list[Any], again: Callable[[list[list[Array]]], int]
) -> None:
    """What follows a first call that answered `done`, 0 or 2; `again` calls with lists that were checked."""
    if done == 2:
        names = zip(roles(), values, strict=True)
        _tensors.bump_versions(value for role, value in names if role.written)
        return
    with _tensors.prepared(roles(), values) as lists:
        if not again(lists):
            raise _tensors.changed()


def ema_update(
    shadow_sets: Sequence[Tensors], params: Tensors, weights: Sequence[float | Sequence[float]], seed: int | None
) -> None:
    """s += w (p - s) for every set of shadows, w one number or one per tensor; bfloat16 shadows round stochastically by `seed`."""
    sets = tuple(shadow_sets)
    done = _core.ema_update(sets, params, tuple(weights), seed, False)
    if done != 1:

        def again(lists: list[list[Array]]) -> int:
            checked, *shadows = lists
            _tensors.check_rounding(_tensors.ema_roles(len(sets)), shadows, seed)
            for k in range(0, len(shadows), _PROFILES):
                part = tuple(shadows[k : k + _PROFILES])
                if not _core.ema_update(part, checked, tuple(weights[k : k + _PROFILES]), seed, True):
                    return 0
            return 1

        _run(done, lambda: _tensors.ema_roles(len(sets)), [params, *sets], again)


def lookahead_sync(slow: Tensors, fast: Tensors, alpha: float) -> None:
    """slow += alpha (fast - slow); fast = slow."""
    done = _core.lookahead_sync(slow, fast, alpha, False)
    if done != 1:
        _run(
            done,
            lambda: _tensors.LOOKAHEAD_ROLES,
            [slow, fast],
            lambda lists: _core.lookahead_sync(lists[0], lists[1], alpha, True),
        )


def all_finite(arrays: Tensors) -> bool:
    """Whether no element is inf or nan."""
    answer = _core.all_finite(arrays, False)
    if answer < 0:
        with _tensors.prepared(_tensors.FINITE_ROLES, [arrays]) as (checked,):
            answer = _core.all_finite(checked, True)
    return bool(answer)


def sgd_step(params: Tensors, grads: Tensors, buffers: Tensors | None, ema: Tensors | None, step: SgdStep) -> None:
    """One step of SGD, with momentum where there are buffers."""
    done = _core.sgd_step(params, grads, buffers, ema, step, False)
    if done != 1:

        def again(lists: list[list[Array]]) -> int:
            rest = iter(lists[2:])
            momentum = None if buffers is None else next(rest)
            return _core.sgd_step(lists[0], lists[1], momentum, next(rest, None), step, True)

        values = [x for x in (params, grads, buffers, ema) if x is not None]
        _run(done, lambda: _tensors.sgd_roles(buffers, ema, step), values, again)


def adamw_step(
    params: Tensors, grads: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, ema: Tensors | None, step: AdamStep
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019), in the arrangement of torch."""
    done = _core.adamw_step(params, grads, exp_avg, exp_avg_sq, ema, step, False)
    if done != 1:

        def again(lists: list[list[Array]]) -> int:
            p, g, m, v, *shadows = lists
            return _core.adamw_step(p, g, m, v, shadows[0] if shadows else None, step, True)

        values = [x for x in (params, grads, exp_avg, exp_avg_sq, ema) if x is not None]
        _run(done, lambda: _tensors.adamw_roles(ema, step), values, again)


def adamw_fits(
    params: Tensors, grads: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, ema: Tensors | None, step: AdamStep
) -> bool:
    """Whether `adamw_step` would take these lists as they are."""
    return bool(_core.adamw_step(params, grads, exp_avg, exp_avg_sq, ema, step, False, True))


def lazy_adamw_rows(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    rows: Tensors | None,
    decays: bool,
    step: AdamStep,
) -> None:
    """AdamW on the live rows: those of `rows`, else those whose gradient has an element other than 0.

    `decays`: the moments of the other rows decay as under a gradient of zero.
    """
    with _tensors.prepared_rows(params, grads, exp_avg, exp_avg_sq, rows) as lists:
        # A flag for each row of a table.
        live = None if lists.rows is None or not decays else [np.zeros(len(table), bool) for table in lists.params]
        for flags, index in zip(live or (), lists.rows or (), strict=False):
            flags[index] = True
        with (
            _contiguous(lists.params, True) as p,
            _contiguous(lists.grads, False) as g,
            _contiguous(lists.exp_avg, True) as m,
            _contiguous(lists.exp_avg_sq, True) as v,
        ):
            _core.lazy_adamw_rows(p, g, m, v, lists.rows, live, decays, step)


@contextmanager
def _contiguous(arrays: list[Array], written: bool) -> Iterator[list[Array]]:
    """The arrays in C order: themselves, or copies that go back at the end."""
    copies = [np.ascontiguousarray(a) for a in arrays]
    yield copies
    if written:
        for array, copy in zip(arrays, copies, strict=True):
            if copy is not array:
                array[...] = copy


def eg_step(params: Tensors, grads: Tensors, lr: float) -> None:
    """p *= exp(-lr g), the exponentiated gradient (Kivinen and Warmuth 1997)."""
    done = _core.eg_step(params, grads, lr, False)
    if done != 1:
        _run(
            done, lambda: _tensors.EG_ROLES, [params, grads], lambda lists: _core.eg_step(lists[0], lists[1], lr, True)
        )


def adaptive_eg_step(
    params: Tensors, grads: Tensors, momentum: Tensors, update: Tensors, gain: Tensors, scales: Array, step: EgStep
) -> None:
    """One step with multiplicative gains (Amid, Anil, Fifty and Warmuth 2022), directions by signs and unit vectors.

    gain *= exp(gain_lr sign(m) sign(g)); scale *= exp(scale_lr cos(h, g)); m = beta m + (1 - beta) g;
    h = mu h + lr gain g; p -= scale h; gain and scale stay in their bounds. A scale is a float64 per tensor.
    """
    own = np.require(scales, requirements=["C", "A"])
    done = _core.adaptive_eg_step(params, grads, momentum, update, gain, own, step, False)
    if done != 1:

        def again(lists: list[list[Array]]) -> int:
            _tensors.refuse_shared_scales(scales, _tensors.ADAPTIVE_EG_ROLES, lists)
            p, g, m, h, q = lists
            return _core.adaptive_eg_step(p, g, m, h, q, own, step, True)

        _run(done, lambda: _tensors.ADAPTIVE_EG_ROLES, [params, grads, momentum, update, gain], again)
    if own is not scales:
        scales[...] = own
