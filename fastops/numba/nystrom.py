# SPDX-License-Identifier: BSD-3-Clause
"""Nystrom attention: products by NumPy's BLAS over blocks of rows and of keys, exponentials and their maxima by Numba.

The gradients are the reference's own functions of one head, in the dtype of the arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..reference import nystrom as plain
from ._attention_kernels import _exp, _pair
from ._kernel import types

if TYPE_CHECKING:
    from .._nystrom import NystromOptions

Array = NDArray[Any]

# Weights of a block: they stay in the cache between the two products.
_BLOCK = 1 << 15
# Of so many lanes is a vector, or two.
_LANES = 16
# Beyond so many steps float32 loses what it has gained.
_STEPS = 8


@_pair(lambda real, read, write: types.void(write(2)))
def exponentials(s):  # type: ignore[no-untyped-def]
    """Each row's exponentials over that of its maximum, in place."""
    rows, columns = s.shape
    none = s.dtype.type(-np.inf)
    zero = s.dtype.type(0)
    lanes = np.empty(_LANES, s.dtype)
    whole = columns - columns % _LANES
    for i in range(rows):
        row = s[i]
        for lane in range(_LANES):
            lanes[lane] = none
        for first in range(0, whole, _LANES):
            for lane in range(_LANES):
                lanes[lane] = max(lanes[lane], row[first + lane])
        top = none
        for lane in range(_LANES):
            top = max(top, lanes[lane])
        for j in range(whole, columns):
            top = max(top, row[j])
        for j in range(columns):
            row[j] = _exp(row[j] - top, zero)


@_pair(lambda real, read, write: types.void(write(2), write(1), write(1)))
def column_exponentials(s, top, factor):  # type: ignore[no-untyped-def]
    """Each column's exponentials over that of the maximum so far, in place; `factor` is what earlier ones shrink by."""
    rows, columns = s.shape
    none = s.dtype.type(-np.inf)
    zero = s.dtype.type(0)
    before = top.copy()
    for i in range(rows):
        for j in range(columns):
            top[j] = max(top[j], s[i, j])
    for j in range(columns):
        factor[j] = zero
        if before[j] != none:
            factor[j] = _exp(before[j] - top[j], zero)
    base = top.copy()
    for j in range(columns):
        if base[j] == none:
            base[j] = zero
    for i in range(rows):
        for j in range(columns):
            s[i, j] = _exp(s[i, j] - base[j], zero)


def _averages(q: Array, k: Array, w: Array, scale: float) -> Array:
    """softmax(scale q k^T) w, by blocks of rows."""
    kt = np.ascontiguousarray(k.T)
    kt *= scale
    w = plain.with_ones(w)
    y = np.empty((len(q), w.shape[1] - 1), q.dtype)
    step = max(_BLOCK // max(len(k), 1), 1)
    for first in range(0, len(q), step):
        part = slice(first, first + step)
        weights = q[part] @ kt
        exponentials[weights.dtype](weights)
        sums = weights @ w
        np.divide(sums[:, :-1], sums[:, -1:], out=y[part])
    return y if len(k) else np.zeros_like(y)


def _streamed(q: Array, k: Array, v: Array, scale: float) -> Array:
    """The same of few rows and many keys, by blocks of keys, with the sums of the weights: 1, or 0 without keys."""
    qt = np.ascontiguousarray(q.T)
    qt *= scale
    top, factor = np.full(len(q), -np.inf, q.dtype), np.empty(len(q), q.dtype)
    sums = np.zeros((len(q), v.shape[1] + 1), q.dtype)
    step = max(_BLOCK // len(q), 1)
    for first in range(0, len(k), step):
        part = slice(first, first + step)
        weights = k[part] @ qt
        column_exponentials[weights.dtype](weights, top, factor)
        sums *= factor[:, np.newaxis]
        sums += weights.T @ plain.with_ones(v[part])
    if len(k):
        sums /= sums[:, -1:].copy()
    return sums


def _newton(a: Array, coefficient: Any, iterations: int) -> Array:
    """Z after all steps, in three matrices of memory beside it."""
    z = np.ascontiguousarray(coefficient * a.T)
    x, t, u = (np.empty_like(z) for _ in range(3))
    diagonals = [y.reshape(-1)[:: len(a) + 1] for y in (t, u)]
    for _ in range(iterations):
        np.matmul(a, z, out=x)
        np.negative(x, out=t)
        diagonals[0] += 7
        np.matmul(x, t, out=u)
        np.negative(u, out=u)
        diagonals[1] += 15
        np.matmul(x, u, out=t)
        np.negative(t, out=t)
        diagonals[0] += 13
        np.matmul(z, t, out=u)
        np.multiply(u, a.dtype.type(0.25), out=z)
    return z


def _head(head: plain.Head, largest: tuple[Any, Any] | None, o: NystromOptions, tells: bool) -> tuple[Array, list[Any]]:
    q, k, v, qt, kt = head
    if qt is None or kt is None:
        return _averages(q, k, v, o.scale), [np.nan] * 4
    real = np.float64 if o.pinv == "ridge" or o.iterations > _STEPS else q.dtype
    a, b = head.matrix(o.scale, real), _streamed(qt, k, v, o.scale).astype(real, copy=False)
    coefficient = plain.first_coefficient(a, largest)
    if o.pinv == "ridge":
        solved = plain.solve(a, b, coefficient, o)
    else:
        z = _newton(a, coefficient, o.iterations)
        solved = plain.Solved(z @ b, [z])
    sums = _averages(q, kt, solved.w.astype(q.dtype), o.scale)
    y, weights = sums[:, :-1], sums[:, -1:]
    told = []
    if tells:
        ends = [weights.min(), weights.max()] if len(weights) else [np.nan] * 2
        told = [plain.residual(a, solved, o), coefficient, *ends]
    return plain.divided(y, weights) if o.normalize else y, told


def _real(dtype: np.dtype[Any]) -> type[Any]:
    return np.float64 if dtype == np.float64 else np.float32


def nystrom_attention(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    options: NystromOptions,
    key_mask: Array | None,
    conv_weight: Array | None,
    q_landmarks: Array | None,
    k_landmarks: Array | None,
    info: Array | None,
) -> None:
    """softmax(s Q Kt^T) Z softmax(s Qt K^T) V with Z about the inverse of softmax(s Qt Kt^T)."""
    with np.errstate(all="ignore"):
        heads = plain.Heads(q, k, v, options, key_mask, q_landmarks, k_landmarks, _real(q.dtype))
        for b, h in np.ndindex(q.shape[:2]):
            own = heads.rows[b]
            y, told = _head(heads.head(b, h), heads.largest, options, info is not None)
            if conv_weight is not None:
                y = y + plain.convolved(heads.alone(v[b, h // heads.groups], heads.keys[b]), conv_weight[h])[own]
            if not isinstance(own, slice):
                out[b, h] = 0
            out[b, h][own] = y
            if info is not None:
                info[b, h] = told


def nystrom_attention_backward(
    dy: Array,
    q: Array,
    k: Array,
    v: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    options: NystromOptions,
    key_mask: Array | None,
    conv_weight: Array | None,
    d_conv_weight: Array | None,
    q_landmarks: Array | None,
    k_landmarks: Array | None,
    d_q_landmarks: Array | None,
    d_k_landmarks: Array | None,
) -> None:
    """Through every step of the iteration and through the coefficient that it begins with."""
    with np.errstate(all="ignore"):
        heads = plain.Heads(q, k, v, options, key_mask, q_landmarks, k_landmarks, _real(q.dtype))
        plain.gradients(heads, dy, dq, dk, dv, conv_weight, d_conv_weight, d_q_landmarks, d_k_landmarks)
