# SPDX-License-Identifier: BSD-3-Clause
"""The numbers of moving averages: what decay a schedule gives at a step, and the power functions of averages made up afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _validate
from ._validate import Text

WARMUPS: Final = ("none", "timm", "tf", "power")
# The relative width of the uniform average, gamma = 0: 12^-1/2.
WIDEST: Final = 0.2886751345948129


class Schedule(NamedTuple):
    """The decay of every profile at every step."""

    warmup: str
    decays: tuple[float | None, ...]
    """Limits; None stands for equal weights."""
    gammas: tuple[float, ...]
    inv_gamma: float
    power: float
    min_decay: float
    every: int
    after: int

    def decay(self, profile: int, step: int, last: int, averaged: int) -> float:
        """The decay of the update at `step`, the one before it at `last`, `averaged` of them since `after`."""
        since = step - self.after
        if since <= 0:
            return 0.0
        if self.warmup == "power":
            return math.pow(1.0 - min(step - last, since) / since, self.gammas[profile] + 1.0)
        limit = self.decays[profile]
        if limit is None:
            return averaged / (averaged + 1)
        if self.warmup == "none":
            return limit
        t = since - 1
        if t == 0:
            return 0.0
        ramp = 1.0 - (1.0 + t / self.inv_gamma) ** -self.power if self.warmup == "timm" else (1 + t) / (10 + t)
        return min(max(ramp, self.min_decay), limit)


class Progress(NamedTuple):
    """What an update changes beside the shadows."""

    step: int
    last: int
    """The step of the last update."""
    updates: int
    averaged: int
    """Updates after `update_after_step`."""
    skipped: int
    totals: tuple[float, ...]
    """For each profile, the sum of the weights that the parameters seen so far have in the shadow."""


def profiles(decay: object, warmup: str, sigma: object) -> tuple[tuple[float | None, ...], tuple[float, ...], bool]:
    """Decays and exponents of all profiles, and whether they came as a sequence."""
    power = warmup == "power"
    if (sigma is None) == power:
        wanted = "a number or a sequence of them with warmup='power'" if power else "None without warmup='power'"
        raise _validate.wrong_value("sigma", wanted, sigma)
    name, given = ("sigma", sigma) if power else ("decay", decay)
    several = isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, (str, bytes)) and np.ndim(given) != 0
    if power and not isinstance(decay, (int, float, np.number)):
        raise _validate.wrong_type("decay", "a number, unused, with warmup='power'", decay)
    items = list(given) if several else [given]  # type: ignore[call-overload]
    if not items:
        raise _validate.wrong_value(name, "a number or a sequence of at least one", Text("an empty one"))
    labels = [f"{name}[{i}]" for i in range(len(items))] if several else [name]
    if power:
        widths = [
            _validate.number(label, x, 0.0, WIDEST, open_low=True) for label, x in zip(labels, items, strict=True)
        ]
        return (1.0,) * len(items), tuple(map(exponent, widths)), several
    decays: list[float | None] = []
    for label, item in zip(labels, items, strict=True):
        if isinstance(item, str):
            _validate.choice(label, item, ("equal",))
            if warmup != "none":
                raise _validate.wrong_value(label, f"a number with warmup={warmup!r}", item)
            decays.append(None)
        else:
            decays.append(_validate.number(label, item, 0.0, 1.0))
    return tuple(decays), (), several


def single(
    decay: object,
    warmup: str,
    inv_gamma: float,
    power: float,
    min_decay: float,
    update_every: int,
    update_after_step: int | None,
) -> Schedule:
    """The schedule of one average of a framework's, checked: without a warmup the first update copies, as theirs do."""
    _validate.choice("warmup", warmup, ("none", "timm", "tf"))
    decays, _, several = profiles(decay, warmup, None)
    if several:
        raise _validate.wrong_type("decay", "a number or 'equal' (fastops.EMA keeps several averages)", decay)
    copies = warmup == "none" and decays[0] is not None
    after = int(copies) if update_after_step is None else update_after_step
    return schedule(warmup, decays, (), inv_gamma, power, min_decay, update_every, after)


def schedule(
    warmup: str,
    decays: tuple[float | None, ...],
    gammas: tuple[float, ...],
    inv_gamma: float,
    power: float,
    min_decay: float,
    update_every: int,
    update_after_step: int,
) -> Schedule:
    """The schedule of these numbers, checked."""
    limits = [limit for limit in decays if limit is not None]
    return Schedule(
        warmup,
        decays,
        gammas,
        _validate.number("inv_gamma", inv_gamma, 0.0, open_low=True),
        _validate.number("power", power, 0.0, open_low=True),
        _validate.number("min_decay", min_decay, 0.0, min(limits, default=1.0)),
        _validate.integer("update_every", update_every, 1),
        _validate.integer("update_after_step", update_after_step, 0),
    )


def exponent(sigma: float) -> float:
    """The exponent of the power function of relative width sigma: sigma^2 = (g + 1) / ((g + 2)^2 (g + 3))."""
    # There sigma gamma is 1 for float64, and the squares below would overflow.
    if sigma < 1e-100:
        return min(1.0 / sigma, 1e150)
    # Newton on the largest root of g^3 + 7 g^2 + (16 - t) g + 12 - t, t = sigma^-2: convex there, and 1 / sigma lies above it.
    t = sigma**-2
    gamma = 1.0 / sigma
    for _ in range(100):
        value = ((gamma + 7.0) * gamma + 16.0 - t) * gamma + 12.0 - t
        new = gamma - value / ((3.0 * gamma + 14.0) * gamma + 16.0 - t)
        if new >= gamma:
            break
        gamma = new
    return max(gamma, 0.0)


def posthoc_weights(
    times: NDArray[np.float64],
    widths: NDArray[np.float64],
    out_times: NDArray[np.float64],
    out_widths: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The least-squares fit in the Notes of `fastops.posthoc_ema_weights`, all of one dimension."""
    gammas, out_gammas = (np.array([exponent(x) for x in item.tolist()]) for item in (widths, out_widths))
    gram = _correlation(times[:, None], gammas[:, None], times, gammas)
    try:
        solved = np.linalg.solve(gram, _correlation(times[:, None], gammas[:, None], out_times, out_gammas))
    except np.linalg.LinAlgError:
        raise _validate.wrong_value(
            "t", "of pairs (t, sigma) that float64 tells apart", Text("nearly equal ones")
        ) from None
    return solved.astype(np.float64)


def _correlation(
    t_a: NDArray[np.float64], g_a: NDArray[np.float64], t_b: NDArray[np.float64], g_b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Inner products of power functions, as in the Notes of `posthoc_ema_weights`."""
    power = (t_a / t_b) ** np.where(t_a < t_b, g_b, -g_a)
    result: NDArray[np.float64] = (g_a + 1) * (g_b + 1) * power / ((g_a + g_b + 1) * np.maximum(t_a, t_b))
    return result
