# SPDX-License-Identifier: BSD-3-Clause
"""Moving averages and optimizer steps through Numba: the pieces of the tensors here, the arithmetic in `_optim_kernels`.

Tensors that are contiguous go to the loops as they are; others, and those of another dtype than the arithmetic's, piece by piece
through buffers that stay in the cache. A loop compiles at its first call, about half a second each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _tensors
from .._tensors import AdamStep, EgStep, SgdStep
from ..reference.optim import mix64
from . import _optim_kernels as kernels

Array = NDArray[Any]
Tensors = Sequence[Any]

# Elements of a piece: five arrays of it stay in a core's second cache.
_PIECE = 1 << 14
_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)


# --- pieces ------------------------------------------------------------------------------------------------------------------


def _words(array: Array) -> Array:
    """Half types as bit patterns, which is how Numba knows them."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def _flat(arrays: Sequence[Array], ordered: bool) -> list[Array] | None:
    """The arrays as vectors that share the order of their elements, in C order if `ordered`; None where that takes a copy."""
    if not all(a.flags.aligned for a in arrays):
        return None
    if all(a.flags.c_contiguous for a in arrays):
        return [a.reshape(-1) for a in arrays]
    if not ordered and all(a.flags.f_contiguous for a in arrays):
        return [a.T.reshape(-1) for a in arrays]
    return None


def _pieces(
    arrays: Sequence[Array], written: Sequence[bool], whole: bool, ordered: bool = False
) -> Iterator[tuple[int, Sequence[Array]]]:
    """Contiguous pieces of arrays of one shape, and the index of their first element; one piece if `whole` and possible."""
    words = [_words(a) for a in arrays]
    flat = _flat(words, ordered)
    if flat is not None:
        size = flat[0].size
        length = max(size, 1) if whole else _PIECE
        for start in range(0, size, length):
            yield start, flat if length == size else [a[start : start + length] for a in flat]
        return
    modes: Any = [["readwrite" if w else "readonly", "contig", "aligned"] for w in written]
    flags: Any = ["external_loop", "buffered", "zerosize_ok"]
    with np.nditer(words, flags, modes, order="C", buffersize=_PIECE) as iterator:
        start = 0
        pieces: Any = iterator
        for piece in pieces:
            chunk = piece if isinstance(piece, tuple) else (piece,)
            if chunk[0].size:
                yield start, chunk
            start += chunk[0].size


def _as(piece: Array, source: np.dtype[Any], dtype: np.dtype[Any]) -> Array:
    """A piece of an array of dtype `source`, converted."""
    if source == dtype:
        return piece
    if source.itemsize == 2:
        wide = np.empty(piece.size, np.float32)
        (kernels.widen_float16 if source == np.float16 else kernels.widen_bfloat16)(piece, wide)
        piece = wide
    return piece.astype(dtype, copy=False)


def _run(arrays: Sequence[Array], written: Sequence[bool], body: Callable[..., None], whole: bool) -> None:
    """Calls body(*pieces) in the dtype of the first array. Only gradients, second and read, may be of another."""
    dtype, source = arrays[0].dtype, arrays[1].dtype
    for _, (first, second, *others) in _pieces(arrays, written, whole and source == dtype):
        body(first, _as(second, source, dtype), *others)


# --- moving averages ---------------------------------------------------------------------------------------------------------


def ema_update(
    shadow_sets: Sequence[Tensors], params: Tensors, weights: Sequence[float | Sequence[float]], seed: int | None
) -> None:
    """s += w (p - s) for every set of shadows, w one number or one per tensor; bfloat16 shadows round stochastically by `seed`."""
    roles = _tensors.ema_roles(len(shadow_sets))
    with _tensors.prepared(roles, [params, *shadow_sets]) as (checked, *sets):
        _tensors.check_rounding(roles, sets, seed)
        for i, p in enumerate(checked):
            for weight, shadows in zip(weights, sets, strict=True):
                _ema(shadows[i], p, weight if isinstance(weight, float) else weight[i], seed, i)


def _ema(s: Array, p: Array, w: float, seed: int | None, tensor: int) -> None:
    if w == 0.0:
        return
    if s.dtype.itemsize == 2:
        assert seed is not None
        _ema_random(s, p, w, seed, tensor)
        return
    if w == 1.0:
        with np.errstate(all="ignore"):
            s[...] = p
        return
    for _, (shadow, param) in _pieces([s, p], [True, False], s.dtype == p.dtype):
        _average(shadow, _as(param, p.dtype, s.dtype), w)


def _ends(dtype: np.dtype[Any], w: float) -> tuple[Any, Any]:
    """w and w - 1 in the arithmetic's dtype."""
    rounded = dtype.type(w)
    return rounded, rounded - dtype.type(1)


def _average(s: Array, p: Array, w: float) -> None:
    """One piece, both of the same dtype."""
    if w == 1.0:
        s[...] = p
    elif w != 0.0:
        rounded, rest = _ends(s.dtype, w)
        kernels.ema[s.dtype](s, p, rounded, rest, bool(rounded < 0.5))


def _ema_random(s: Array, p: Array, w: float, seed: int, tensor: int) -> None:
    key = mix64(seed ^ mix64(tensor))
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    rounded, rest = _ends(_FLOAT32, w)
    how = kernels.COPY if w == 1.0 else kernels.NEAR if rounded < 0.5 else kernels.FAR
    numbers = rounded, rest, how, low, high
    for start, (shadow, param) in _pieces([s, p], [True, False], p.dtype == _FLOAT32, ordered=True):
        with np.errstate(all="ignore"):
            value = _as(param, p.dtype, _FLOAT32)
        kernels.ema_random(shadow, value, *numbers, np.uint64(start))


def lookahead_sync(slow: Tensors, fast: Tensors, alpha: float) -> None:
    """slow += alpha (fast - slow); fast = slow."""

    def body(q: Array, p: Array) -> None:
        _average(q, p, alpha)
        p[...] = q

    with _tensors.prepared(_tensors.LOOKAHEAD_ROLES, [slow, fast]) as lists:
        for pair in zip(*lists, strict=True):
            _run(pair, [True, True], body, False)


def all_finite(arrays: Tensors) -> bool:
    """Whether no element is inf or nan."""
    with _tensors.prepared(_tensors.FINITE_ROLES, [arrays]) as (checked,):
        return all(_finite(a.dtype, piece) for a in checked for _, (piece,) in _pieces([a], [False], True))


def _finite(dtype: np.dtype[Any], piece: Array) -> bool:
    if dtype.itemsize == 2:
        return bool(kernels.finite_half(piece, np.uint16(0x7C00 if dtype == np.float16 else 0x7F80)))
    return bool(kernels.finite[dtype](piece))


# --- steps -------------------------------------------------------------------------------------------------------------------


def _step(
    arrays: Sequence[Array], step: Callable[..., None], follows: bool, ema_weight: float, zero_grad: bool, moves: bool
) -> None:
    """`step` on the pieces of (p, g, states...), then what may follow in the same pass; the shadow is last where it `follows`."""
    p, g = arrays[:2]
    direct = zero_grad and g.dtype == p.dtype
    written = [moves, direct, *(True for _ in arrays[2:])]

    def body(p: Array, g: Array, *others: Array) -> None:
        step(p, g, *(others[:-1] if follows else others))
        if follows and moves:
            _average(others[-1], p, ema_weight)
        if direct:
            g[...] = 0

    _run(arrays, written, body, whole=not (follows or direct))
    if zero_grad and not direct:
        g[...] = 0


def sgd_step(params: Tensors, grads: Tensors, buffers: Tensors | None, ema: Tensors | None, step: SgdStep) -> None:
    """One step of SGD, with momentum where there are buffers."""
    values = [x for x in (params, grads, buffers, ema) if x is not None]

    def one(p: Array, g: Array, *buffer: Array) -> None:
        real = p.dtype.type
        lr, keep, gain, decay = (real(x) for x in (step.lr, step.keep, step.gain, step.weight_decay))
        if not buffer:
            if step.moves:
                kernels.sgd_plain[p.dtype](p, g, lr, decay)
        elif step.moves:
            kernels.sgd_momentum[p.dtype](p, g, *buffer, step.nesterov, lr, real(step.momentum), keep, gain, decay)
        else:
            kernels.sgd_buffer[p.dtype](*buffer, g, p, keep, gain, decay)

    with _tensors.prepared(_tensors.sgd_roles(buffers, ema, step), values) as lists:
        for arrays in zip(*lists, strict=True):
            _step(arrays, one, ema is not None, step.ema_weight, step.zero_grad, step.moves)


def _adam(p: Array, g: Array, m: Array, v: Array, s: AdamStep) -> None:
    real = p.dtype.type
    numbers = (s.decay, s.l2, s.w1, s.beta2, s.w2, s.step_size, s.scale, s.eps)
    kernels.adam[p.dtype](p, g, m, v, *(real(x) for x in numbers))


def adamw_step(
    params: Tensors, grads: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, ema: Tensors | None, step: AdamStep
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019), in the arrangement of torch."""
    values = [x for x in (params, grads, exp_avg, exp_avg_sq, ema) if x is not None]

    def one(p: Array, g: Array, m: Array, v: Array) -> None:
        _adam(p, g, m, v, step)

    with _tensors.prepared(_tensors.adamw_roles(ema, step), values) as lists:
        for arrays in zip(*lists, strict=True):
            _step(arrays, one, ema is not None, step.ema_weight, step.zero_grad, True)


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
    with _tensors.prepared_rows(params, grads, exp_avg, exp_avg_sq, rows) as lists:
        for i, (p, g, m, v) in enumerate(zip(*lists[:4], strict=True)):
            if lists.rows is None:
                live = np.flatnonzero((g != 0).reshape(len(g), math.prod(g.shape[1:])).any(axis=1))
                gradient = g[live]
            else:
                live, gradient = lists.rows[i], g
            if decays:
                dead = np.ones(len(p), bool)
                dead[live] = False
                with np.errstate(all="ignore"):
                    for state, factor in ((m, 1.0 - step.w1), (v, step.beta2)):
                        state[dead] *= state.dtype.type(factor)
            # Copies of the live rows, which are few.
            part = [x[live] for x in (p, m, v)]
            _run(
                [part[0], gradient, *part[1:]],
                [True, False, True, True],
                lambda p, g, m, v: _adam(p, g, m, v, step),
                True,
            )
            p[live], m[live], v[live] = part


def eg_step(params: Tensors, grads: Tensors, lr: float) -> None:
    """p *= exp(-lr g), the exponentiated gradient (Kivinen and Warmuth 1997)."""
    with _tensors.prepared(_tensors.EG_ROLES, [params, grads]) as lists:
        for pair in zip(*lists, strict=True):
            _run(pair, [True, False], lambda p, g: kernels.eg[p.dtype](p, g, lr), True)


def adaptive_eg_step(
    params: Tensors, grads: Tensors, momentum: Tensors, update: Tensors, gain: Tensors, scales: Array, step: EgStep
) -> None:
    """One step with multiplicative gains (Amid, Anil, Fifty and Warmuth 2022), directions by signs and unit vectors."""
    values = [params, grads, momentum, update, gain]
    with _tensors.prepared(_tensors.ADAPTIVE_EG_ROLES, values) as lists:
        _tensors.refuse_shared_scales(scales, _tensors.ADAPTIVE_EG_ROLES, lists)
        for i, (p, g, m, h, q) in enumerate(zip(*lists, strict=True)):
            scales[i] = _scale(float(scales[i]), h, g, step)
            real = p.dtype.type
            numbers = (
                step.lr,
                step.beta,
                1.0 - step.beta,
                step.mu,
                math.exp(step.gain_lr),
                math.exp(-step.gain_lr),
                step.gain_low,
                step.gain_high,
                float(scales[i]),
            )
            arguments = [real(x) for x in numbers]
            kernel = kernels.adaptive_eg[p.dtype]
            _run([p, g, m, h, q], [True, False, True, True, True], lambda *a, k=kernel, n=arguments: k(*a, *n), True)


def _scale(scale: float, h: Array, g: Array, step: EgStep) -> float:
    """The tensor's step size, moved by the cosine of the angle between its last update and its gradient."""
    sums = np.zeros(3)

    def add(h: Array, g: Array) -> None:
        nonlocal sums
        sums += kernels.products[h.dtype](h, g)

    # In C order: no layout of the tensors changes the sums.
    h, g = (np.ascontiguousarray(x) for x in (h, g))
    with np.errstate(all="ignore"):
        _run([h, g], [False, False], add, True)
        cosine = sums[0] / (np.sqrt(sums[1]) * np.sqrt(sums[2]))
        if not np.isfinite(cosine):
            return scale
        return float(np.clip(scale * np.exp(step.scale_lr * cosine), step.scale_low, step.scale_high))
