# SPDX-License-Identifier: BSD-3-Clause
"""Moving averages and optimizer steps over lists of tensors in plain NumPy: every formula in float64, rounded once at the end.

The oracle of the other backends and the text of the semantics. All lists are checked before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _tensors
from .._tensors import AdamStep, EgStep, SgdStep

__all__ = [
    "adamw_fits",
    "adamw_step",
    "adaptive_eg_step",
    "all_finite",
    "eg_step",
    "ema_update",
    "lazy_adamw_rows",
    "lookahead_sync",
    "random_bits",
    "sgd_step",
]

Array = NDArray[Any]
Float = NDArray[np.float64]
Tensors = Sequence[Any]


# Moving averages.


def ema_update(
    shadow_sets: Sequence[Tensors], params: Tensors, weights: Sequence[float | Sequence[float]], seed: int | None
) -> None:
    """s += w (p - s) for every set of shadows, w one number or one per tensor; bfloat16 shadows round stochastically by `seed`."""
    roles = _tensors.ema_roles(len(shadow_sets))
    with _tensors.prepared(roles, [params, *shadow_sets]) as (checked, *sets):
        _tensors.check_rounding(roles, sets, seed)
        for weight, shadows in zip(weights, sets, strict=True):
            for i, (s, p) in enumerate(zip(shadows, checked, strict=True)):
                _ema(s, p, weight if isinstance(weight, float) else weight[i], seed, i)


def _ema(s: Array, p: Array, w: float, seed: int | None, tensor: int) -> None:
    if w == 0.0:
        return
    with np.errstate(all="ignore"):
        # w = 1 is a copy, also over inf and nan.
        average = p if w == 1.0 else _wide(s) + w * (_wide(p) - _wide(s))
        if s.dtype in (np.float32, np.float64):
            s[...] = average
        else:
            assert seed is not None
            s[...] = _round_randomly(
                average.astype(np.float32), s.dtype, random_bits(seed, tensor, s.size).reshape(s.shape)
            )


def random_bits(seed: int, tensor: int, size: int) -> NDArray[np.uint32]:
    """16 random bits for each element of a tensor, a function of (seed, tensor, element) alone.

    Elements e and e + 16 of a run of 32 take the halves of one 32-bit hash, which suits vectors of any width.
    """
    u = np.uint32
    key = mix64(seed ^ mix64(tensor))
    e = np.arange(size, dtype=np.uint64)
    pair = (e >> np.uint64(5) << np.uint64(4)) | (e & np.uint64(15))
    with np.errstate(over="ignore"):
        x = pair.astype(u) + u(key & 0xFFFFFFFF)
        x ^= x >> u(16)
        x *= u(0x21F0AAAD)
        x ^= x >> u(15)
        x ^= u(key >> 32) + (pair >> np.uint64(32)).astype(u) * u(0x9E3779B9)
        x *= u(0x735A2D97)
        x ^= x >> u(15)
    return np.where(e & np.uint64(16), x >> u(16), x & u(0xFFFF)).astype(u)


def mix64(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def _round_randomly(x: Array, dtype: np.dtype[Any], r: NDArray[np.uint32]) -> Array:
    """float32 to bfloat16: away from zero with the probability of the part that is cut off; nan stays nan."""
    u = x.view(np.uint32)
    with np.errstate(over="ignore"):
        cut = ((u + r) >> np.uint32(16)).astype(np.uint16)
    special = (u & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    kept = (u >> np.uint32(16)).astype(np.uint16) | np.where(np.isnan(x), np.uint16(0x40), np.uint16(0))
    return np.where(special, kept, cut).astype(np.uint16).view(dtype)


def lookahead_sync(slow: Tensors, fast: Tensors, alpha: float) -> None:
    """slow += alpha (fast - slow); fast = slow."""
    with _tensors.prepared(_tensors.LOOKAHEAD_ROLES, [slow, fast]) as lists:
        for q, p in zip(*lists, strict=True):
            _ema(q, p, alpha, None, 0)
            p[...] = q


def all_finite(arrays: Tensors) -> bool:
    """Whether no element is inf or nan."""
    with _tensors.prepared(_tensors.FINITE_ROLES, [arrays]) as (checked,):
        return all(bool(np.isfinite(a).all()) for a in checked)


# Steps.


def _wide(x: Array) -> Float:
    return x.astype(np.float64)


def _finish(p: Array, g: Array, shadow: Array | None, ema_weight: float, zero_grad: bool) -> None:
    """What may follow the step in the same pass."""
    if shadow is not None:
        _ema(shadow, p, ema_weight, None, 0)
    if zero_grad:
        g[...] = 0


def sgd_step(params: Tensors, grads: Tensors, buffers: Tensors | None, ema: Tensors | None, step: SgdStep) -> None:
    """One step of SGD, with momentum where there are buffers."""
    values = [x for x in (params, grads, buffers, ema) if x is not None]
    with _tensors.prepared(_tensors.sgd_roles(buffers, ema, step), values) as lists, np.errstate(all="ignore"):
        for p, g, *rest in zip(*lists, strict=True):
            gradient = _wide(g) + step.weight_decay * _wide(p) if step.weight_decay else _wide(g)
            update = gradient
            if buffers is not None:
                m = step.keep * _wide(rest[0]) + step.gain * gradient
                rest[0][...] = m
                update = gradient + step.momentum * m if step.nesterov else m
            if step.moves:
                p[...] = _wide(p) - step.lr * update
            _finish(p, g, rest[-1] if ema is not None and step.moves else None, step.ema_weight, step.zero_grad)


def _adam(p: Array, g: Array, m: Array, v: Array, s: AdamStep) -> None:
    gradient = _wide(g) + s.l2 * _wide(p) if s.l2 else _wide(g)
    first = _wide(m) + s.w1 * (gradient - _wide(m))
    second = s.beta2 * _wide(v) + s.w2 * gradient * gradient
    p[...] = s.decay * _wide(p) - s.step_size * first / (np.sqrt(second) * s.scale + s.eps)
    m[...] = first
    v[...] = second


def adamw_step(
    params: Tensors, grads: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, ema: Tensors | None, step: AdamStep
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019), in the arrangement of torch."""
    values = [x for x in (params, grads, exp_avg, exp_avg_sq, ema) if x is not None]
    with _tensors.prepared(_tensors.adamw_roles(ema, step), values) as lists, np.errstate(all="ignore"):
        for p, g, m, v, *shadow in zip(*lists, strict=True):
            _adam(p, g, m, v, step)
            _finish(p, g, shadow[0] if shadow else None, step.ema_weight, step.zero_grad)


def adamw_fits(
    params: Tensors, grads: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, ema: Tensors | None, step: AdamStep
) -> bool:
    """Whether a look told that `adamw_step` takes these lists: that of the compiled module, which this has not."""
    return False


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
    with _tensors.prepared_rows(params, grads, exp_avg, exp_avg_sq, rows) as lists, np.errstate(all="ignore"):
        for i, (p, g, m, v) in enumerate(zip(*lists[:4], strict=True)):
            if lists.rows is None:
                live = np.flatnonzero((g != 0).any(axis=tuple(range(1, g.ndim))))
                gradient = g[live]
            else:
                live, gradient = lists.rows[i], g
            if decays:
                dead = np.ones(len(p), bool)
                dead[live] = False
                m[dead] = (1.0 - step.w1) * _wide(m[dead])
                v[dead] = step.beta2 * _wide(v[dead])
            part = [x[live] for x in (p, m, v)]
            _adam(part[0], gradient, part[1], part[2], step)
            p[live], m[live], v[live] = part


def eg_step(params: Tensors, grads: Tensors, lr: float) -> None:
    """p *= exp(-lr g), the exponentiated gradient (Kivinen and Warmuth 1997)."""
    with _tensors.prepared(_tensors.EG_ROLES, [params, grads]) as lists, np.errstate(all="ignore"):
        for p, g in zip(*lists, strict=True):
            p[...] = _wide(p) * np.exp(-lr * _wide(g))


def adaptive_eg_step(
    params: Tensors, grads: Tensors, momentum: Tensors, update: Tensors, gain: Tensors, scales: Array, step: EgStep
) -> None:
    """One step with multiplicative gains (Amid, Anil, Fifty and Warmuth 2022), directions by signs and unit vectors.

    gain *= exp(gain_lr sign(m) sign(g)); scale *= exp(scale_lr cos(h, g)); m = beta m + (1 - beta) g;
    h = mu h + lr gain g; p -= scale h; gain and scale stay in their bounds. A scale is a float64 per tensor.
    """
    values = [params, grads, momentum, update, gain]
    with _tensors.prepared(_tensors.ADAPTIVE_EG_ROLES, values) as lists, np.errstate(all="ignore"):
        _tensors.refuse_shared_scales(scales, _tensors.ADAPTIVE_EG_ROLES, lists)
        for i, (p, g, m, h, q) in enumerate(zip(*lists, strict=True)):
            gradient, velocity = _wide(g), _wide(h)
            factor = _wide(q) * np.exp(step.gain_lr * np.sign(_wide(m)) * np.sign(gradient))
            factor = np.clip(factor, step.gain_low, step.gain_high)
            cosine = (velocity * gradient).sum() / (np.sqrt((velocity**2).sum()) * np.sqrt((gradient**2).sum()))
            if np.isfinite(cosine):
                scales[i] = np.clip(scales[i] * np.exp(step.scale_lr * cosine), step.scale_low, step.scale_high)
            q[...] = factor
            m[...] = step.beta * _wide(m) + (1.0 - step.beta) * gradient
            velocity = step.mu * velocity + step.lr * factor * gradient
            h[...] = velocity
            p[...] = _wide(p) - scales[i] * velocity
