# SPDX-License-Identifier: BSD-3-Clause
"""Nystrom attention in plain NumPy, head by head in float64, rounded once at the end: the oracle and the text of the semantics.

Values have a column of ones beside them, whose sums are those of the weights. The functions of one head compute in the dtype of
their arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._nystrom import NystromOptions

__all__ = ["nystrom_attention", "nystrom_attention_backward"]

Array = NDArray[Any]


def softmax(x: Array) -> Array:
    """Of each row; of no numbers none."""
    p = np.exp(x - x.max(axis=-1, keepdims=True, initial=-np.inf))
    return np.asarray(p / p.sum(axis=-1, keepdims=True))


def softmax_gradient(p: Array, dp: Array) -> Array:
    """The gradient of logits from that of their softmax."""
    return np.asarray(p * (dp - (dp * p).sum(axis=-1, keepdims=True)))


def divided(x: Array, by: Array) -> Array:
    """x / by, 0 where `by` is 0."""
    return np.where(by == 0, 0, x / np.where(by == 0, 1, by))


def lengths(n: int, m: int) -> NDArray[np.int64]:
    """Of m segments of n rows in turn: the last n mod m have one row more."""
    return n // m + (np.arange(m) >= m - n % m)


def means(x: Array, m: int) -> Array:
    """Of m segments of the rows."""
    length, longer = divmod(len(x), m)
    first = (m - longer) * length
    d = x.shape[1]
    parts = x[:first].reshape((m - longer, length, d)), x[first:].reshape((longer, length + 1, d))
    return np.concatenate([part.mean(axis=1) for part in parts])


def spread(d: Array, n: int) -> Array:
    """The gradient of n rows from that of their means."""
    count = lengths(n, len(d))
    return np.repeat(d / count[:, np.newaxis].astype(d.dtype), count, axis=0)


def norms(a: Array) -> tuple[Any, Any]:
    """The largest sum of a column and of a row; A has no negative elements."""
    return a.sum(axis=0).max(), a.sum(axis=1).max()


def first_coefficient(a: Array, largest: tuple[Any, Any] | None) -> Any:
    """What Z begins as a multiple of: by the norms of A, or by the `largest` of a batch."""
    first, second = norms(a) if largest is None else largest
    return a.dtype.type(1 / (first * second))


def newton(a: Array, coefficient: Any, iterations: int) -> list[Array]:
    """Every Z of the iteration: each step takes the residual I - A Z to about its third power."""
    one = np.eye(len(a), dtype=a.dtype)
    found = [np.asarray(coefficient * a.T)]
    for _ in range(iterations):
        z = found[-1]
        x = a @ z
        found.append(z @ (13 * one - x @ (15 * one - x @ (7 * one - x))) / 4)
    return found


def newton_gradient(a: Array, found: list[Array], dz: Array) -> tuple[Array, Array]:
    """The gradients of A through the steps, and of the Z that they began with."""
    one = np.eye(len(a), dtype=a.dtype)
    da = np.zeros_like(a)
    for z in reversed(found[:-1]):
        x = a @ z
        p = 7 * one - x
        q = 15 * one - x @ p
        r = 13 * one - x @ q
        dr = z.T @ dz / 4
        dq = -x.T @ dr
        dp = -x.T @ dq
        dx = -dr @ q.T - dq @ p.T - dp
        da += dx @ z.T
        dz = dz @ r.T / 4 + a.T @ dx
    return da, dz


def regularised(a: Array, ridge: float, b: Array) -> Array:
    """(A^T A + ridge c I)^-1 b, nan where that is singular to working precision."""
    first, second = norms(a)
    try:
        return np.linalg.solve(a.T @ a + ridge * first * second * np.eye(len(a), dtype=a.dtype), b)
    except np.linalg.LinAlgError:
        return np.full_like(b, np.nan)


def norm_gradient(a: Array, d_first: Any, d_second: Any) -> Array:
    """The gradient of A from those of its norms: it goes to the first of the largest columns and rows."""
    da = np.zeros_like(a)
    da[:, a.sum(axis=0).argmax()] += d_first
    da[a.sum(axis=1).argmax()] += d_second
    return da


class Solved(NamedTuple):
    """W = Z B and what its gradient needs."""

    w: Array
    z: list[Array]


def solve(a: Array, b: Array, coefficient: Any, o: NystromOptions) -> Solved:
    """W = Z B."""
    if o.pinv == "ridge":
        return Solved(regularised(a, o.ridge, a.T @ b), [])
    z = newton(a, coefficient, o.iterations)
    return Solved(z[-1] @ b, z)


def solve_gradient(
    a: Array, b: Array, solved: Solved, coefficient: Any, dw: Array, o: NystromOptions
) -> tuple[Array, Array]:
    """The gradients of A and B."""
    first, second = norms(a)
    if o.pinv == "ridge":
        u = regularised(a, o.ridge, dw)
        dm = -u @ solved.w.T
        dc = o.ridge * np.trace(dm)
        da = b @ u.T + a @ (dm + dm.T) + norm_gradient(a, dc * second, dc * first)
        return da, a @ u
    da, dz = newton_gradient(a, solved.z, dw @ b.T)
    da += coefficient * dz.T
    if not o.batch_init:
        dc = -coefficient * (dz * a.T).sum()
        da += norm_gradient(a, dc / first, dc / second)
    return da, solved.z[-1].T @ dw


class Head(NamedTuple):
    """The valid rows of one head, and its landmarks; without them attention is exact."""

    q: Array
    k: Array
    v: Array
    qt: Array | None
    kt: Array | None

    def matrix(self, scale: float, real: Any = np.float64) -> Array:
        """A."""
        assert self.qt is not None
        assert self.kt is not None
        return softmax(scale * (self.qt.astype(real, copy=False) @ self.kt.T.astype(real, copy=False)))


def with_ones(v: Array) -> Array:
    """v and a column of ones."""
    return np.concatenate([v, np.ones_like(v[:, :1])], axis=1)


def rows(head: Head, largest: tuple[Any, Any] | None, o: NystromOptions) -> tuple[Array, list[Any]]:
    """The rows of the result, and what `return_info` tells."""
    if head.qt is None or head.kt is None:
        return softmax(o.scale * (head.q @ head.k.T)) @ head.v, [np.nan] * 4
    a = head.matrix(o.scale)
    coefficient = first_coefficient(a, largest)
    solved = solve(a, softmax(o.scale * (head.qt @ head.k.T)) @ with_ones(head.v), coefficient, o)
    sums = softmax(o.scale * (head.q @ head.kt.T)) @ solved.w
    y, weights = sums[:, :-1], sums[:, -1:]
    told = [residual(a, solved, o), coefficient, *((weights.min(), weights.max()) if len(weights) else [np.nan] * 2)]
    return divided(y, weights) if o.normalize else y, told


def residual(a: Array, solved: Solved, o: NystromOptions) -> Any:
    """How far Z is from a pseudo-inverse."""
    z = regularised(a, o.ridge, a.T) if o.pinv == "ridge" else solved.z[-1]
    return np.linalg.norm(a @ z @ a - a) / np.linalg.norm(a)


class Gradients(NamedTuple):
    """Of the valid rows of one head, and of landmarks."""

    q: Array
    k: Array
    v: Array
    qt: Array | None
    kt: Array | None


def rows_gradient(head: Head, dy: Array, largest: tuple[Any, Any] | None, o: NystromOptions) -> Gradients:
    """The gradients from that of the rows; landmarks have theirs for themselves."""
    q, k, v, qt, kt = head
    if qt is None or kt is None:
        p = softmax(o.scale * (q @ k.T))
        ds = o.scale * softmax_gradient(p, dy @ v.T)
        return Gradients(ds @ k, ds.T @ q, p.T @ dy, None, None)
    p1, p3, v1 = softmax(o.scale * (q @ kt.T)), softmax(o.scale * (qt @ k.T)), with_ones(v)
    # What has no side of N rows is in float64 in every backend.
    a, b = head.matrix(o.scale), (p3 @ v1).astype(np.float64)
    coefficient = first_coefficient(a, largest)
    solved = solve(a, b, coefficient, o)
    w = solved.w.astype(q.dtype)
    column = np.zeros_like(dy[:, :1])
    if o.normalize:
        sums = p1 @ w
        dy = divided(dy, sums[:, -1:])
        column = -(dy * divided(sums[:, :-1], sums[:, -1:])).sum(axis=-1, keepdims=True)
    d = np.concatenate([dy, column], axis=-1)
    da, db = solve_gradient(a, b, solved, coefficient, p1.T @ d, o)
    ds1 = o.scale * softmax_gradient(p1, d @ w.T)
    ds2 = o.scale * softmax_gradient(a, da).astype(q.dtype)
    ds3 = o.scale * softmax_gradient(p3, (db := db.astype(q.dtype)) @ v1.T)
    return Gradients(ds1 @ kt, ds3.T @ qt, p3.T @ db[:, :-1], ds2 @ kt + ds3 @ k, ds1.T @ q + ds2.T @ qt)


def shifted(n: int, taps: int) -> Iterator[tuple[int, slice, slice]]:
    """Each tap, the rows that it reaches, and the rows of v that these take by it."""
    for t in range(taps):
        by = t - taps // 2
        if abs(by) < n:
            yield t, slice(max(-by, 0), n - max(by, 0)), slice(max(by, 0), n + min(by, 0))


def convolved(v: Array, w: Array) -> Array:
    """The weights of one head over the rows of v."""
    y = np.zeros_like(v)
    for t, to, take in shifted(len(v), len(w)):
        y[to] += w[t] * v[take]
    return y


class Heads:
    """The heads of a call in dtype `real`, with the valid rows of each sample."""

    def __init__(
        self,
        q: Array,
        k: Array,
        v: Array,
        o: NystromOptions,
        key_mask: Array | None,
        q_landmarks: Array | None,
        k_landmarks: Array | None,
        real: Any,
    ) -> None:
        self.q, self.k, self.v, self.o, self.real = q, k, v, o, real
        self.landmarks = q_landmarks, k_landmarks
        self.groups = q.shape[1] // max(k.shape[1], 1)
        everything = [slice(None)] * len(k)
        self.keys: Any = everything if key_mask is None else key_mask
        self.rows: Any = self.keys if q.shape[2] == k.shape[2] else everything
        self.largest = self._largest() if o.batch_init else None

    def valid(self, x: Array, rows: Any) -> Array:
        """Some rows of one head."""
        found: Array = x[rows]
        return found.astype(self.real, copy=False)

    def alone(self, x: Array, rows: Any) -> Array:
        """The same and zeros in the place of the others."""
        y = np.zeros(x.shape, self.real)
        y[rows] = x[rows]
        return y

    def head(self, b: int, h: int) -> Head:
        """One of them."""
        m, g = self.o.landmarks, h // self.groups
        q = self.valid(self.q[b, h], self.rows[b])
        k, v = (self.valid(x[b, g], self.keys[b]) for x in (self.k, self.v))
        qt, kt = self.landmarks
        if qt is not None and kt is not None:
            return Head(q, k, v, qt[b, h].astype(self.real), kt[b, g].astype(self.real))
        if len(q) <= m or len(k) <= m:
            return Head(q, k, v, None, None)
        return Head(q, k, v, means(q, m), means(k, m))

    def _largest(self) -> tuple[Any, Any]:
        """The norms' maxima over all matrices that are finite."""
        found = [(0.0, 0.0)]
        for b, h in np.ndindex(self.q.shape[:2]):
            head = self.head(b, h)
            if head.qt is not None:
                found.append(norms(head.matrix(self.o.scale)))
        first, second = np.nanmax(np.array(found), axis=0)
        return first, second


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
        heads = Heads(q, k, v, options, key_mask, q_landmarks, k_landmarks, np.float64)
        for b, h in np.ndindex(q.shape[:2]):
            own = heads.rows[b]
            y, told = rows(heads.head(b, h), heads.largest, options)
            if conv_weight is not None:
                values = heads.alone(v[b, h // heads.groups], heads.keys[b])
                y = y + convolved(values, conv_weight[h].astype(np.float64))[own]
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
        heads = Heads(q, k, v, options, key_mask, q_landmarks, k_landmarks, np.float64)
        gradients(heads, dy, dq, dk, dv, conv_weight, d_conv_weight, d_q_landmarks, d_k_landmarks)


def gradients(
    heads: Heads,
    dy: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    conv_weight: Array | None,
    d_conv_weight: Array | None,
    d_q_landmarks: Array | None,
    d_k_landmarks: Array | None,
) -> None:
    """Head by head, those of keys and values summed up over the heads of queries that share them."""
    real = heads.real
    if d_conv_weight is not None:
        d_conv_weight[...] = 0
    for b, g in np.ndindex(heads.k.shape[:2]):
        own, seen = heads.rows[b], heads.keys[b]
        d_keys, d_values = (np.zeros(x.shape[2:], real) for x in (heads.k, heads.v))
        d_kt = np.zeros((heads.o.landmarks, heads.k.shape[3]), real)
        for h in range(g * heads.groups, (g + 1) * heads.groups):
            head = heads.head(b, h)
            found = rows_gradient(head, heads.valid(dy[b, h], own), heads.largest, heads.o)
            d_rows = found.q
            d_keys[seen] += found.k
            d_values[seen] += found.v
            if found.qt is not None and found.kt is not None:
                if heads.landmarks[0] is None:
                    d_rows = d_rows + spread(found.qt, len(d_rows))
                    d_keys[seen] += spread(found.kt, len(head.k))
                else:
                    d_kt += found.kt
                    if d_q_landmarks is not None:
                        d_q_landmarks[b, h] = found.qt
            dq[b, h] = 0
            dq[b, h][own] = d_rows
            if conv_weight is not None and d_conv_weight is not None:
                d, values = heads.alone(dy[b, h], own), heads.alone(heads.v[b, g], seen)
                d_values[seen] += convolved(d, conv_weight[h, ::-1].astype(real))[seen]
                for t, to, take in shifted(len(d), conv_weight.shape[1]):
                    d_conv_weight[h, t] += (d[to] * values[take]).sum()
        dk[b, g], dv[b, g] = d_keys, d_values
        if d_k_landmarks is not None:
            d_k_landmarks[b, g] = d_kt
