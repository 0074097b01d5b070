# SPDX-License-Identifier: BSD-3-Clause
"""Linear and softmax attention in plain NumPy: the recurrence token by token in float64, rounded once at the end.

The oracle of the other backends and the text of the semantics. Every feature is c exp(e), a factor and an exponent: the maps that
are exponentials have c = 1, the others e = 0. A sum over keys is kept as S exp(a), a the largest exponent in it, so that neither
huge logits nor the keys to come change what a row gets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._attention import EXPONENTIAL, LinearOptions
from .nystrom import nystrom_attention, nystrom_attention_backward

__all__ = [
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_step",
    "nystrom_attention",
    "nystrom_attention_backward",
    "plain_step",
    "softmax_attention",
]

Array = NDArray[Any]
Float = NDArray[np.float64]
State = tuple[Array, ...]

# Rows of softmax attention at a time.
_BLOCK = 32


# Feature maps.


def _features(x: Float, o: LinearOptions) -> tuple[Float, Float]:
    """Factors and exponents of the features of rows."""
    if o.feature_map in EXPONENTIAL:
        e = o.scale * x
        if o.projection is not None:
            w, x = o.projection.astype(np.float64), math.sqrt(o.scale) * x
            e = x @ w.T - 0.5 * (x * x).sum(axis=-1, keepdims=True) - 0.5 * math.log(len(w))
        return np.broadcast_to(1.0, e.shape), e
    if o.feature_map == "elu":
        # Not (exp(x) - 1) + 1, which is 0 from -17 on in float32 and from -6 on in bfloat16.
        c = np.where(x < 0, np.exp(np.minimum(x, 0)), x + 1)
    elif o.feature_map == "relu":
        c = np.maximum(x, 0) + o.kernel_eps
    elif o.feature_map == "relu2":
        c = np.maximum(x, 0) ** 2 + o.kernel_eps
    elif o.feature_map == "cosine":
        c = np.concatenate([_unit(x)[0], np.ones((*x.shape[:-1], 1))], axis=-1)
    else:
        c = x
    return c, np.broadcast_to(0.0, c.shape)


def _unit(x: Float) -> tuple[Float, Float]:
    """x / |x| and |x|, 0 where x is 0."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    x = np.where(largest == 0, 0, x / largest)
    norm = np.sqrt((x * x).sum(axis=-1, keepdims=True))
    return np.where(largest == 0, 0, x / norm), largest * norm


def _chain(x: Float, d: Float, o: LinearOptions) -> Float:
    """The gradient in rows x from that in their features, of exponentials that in the exponents."""
    if o.projection is not None:
        root = math.sqrt(o.scale)
        d = d @ o.projection.astype(np.float64) - root * x * d.sum(axis=-1, keepdims=True)
        return root * d
    if o.feature_map in EXPONENTIAL:
        return o.scale * d
    if o.feature_map == "elu":
        return d * np.where(x < 0, np.exp(np.minimum(x, 0)), 1)
    if o.feature_map == "relu":
        return np.where(x > 0, d, 0)
    if o.feature_map == "relu2":
        return 2 * np.maximum(x, 0) * d
    if o.feature_map == "cosine":
        unit, norm = _unit(x)
        d = d[..., :-1]
        return np.where(norm == 0, 0, (d - unit * (unit * d).sum(axis=-1, keepdims=True)) / norm)
    return d


# Sums over keys: S (.., F, E + 1), whose last column is the normaliser z, times exp(a), a (.., F).


class _Keys(NamedTuple):
    c: Float
    e: Float
    v1: Float
    """v and a column of ones."""


def _keys(k: Float, v: Float, mask: Array | None, o: LinearOptions) -> _Keys:
    c, e = _features(k, o)
    if mask is not None:
        seen = mask[..., np.newaxis]
        v = np.where(seen, v, 0)
        # In only one of them: a plain map's maximum is 0 for ever.
        c, e = (c, np.where(seen, e, -np.inf)) if o.feature_map in EXPONENTIAL else (np.where(seen, c, 0), e)
    return _Keys(c, e, np.concatenate([v, np.ones((*v.shape[:-1], 1))], axis=-1))


def _finite(a: Float) -> Float:
    """The maximum, 0 where there is nothing to take it of."""
    return np.where(a == -np.inf, 0, a)


def _initial(state: State | None, part: slice, shape: tuple[int, ...], o: LinearOptions) -> tuple[Float, Float]:
    if state is None:
        return np.zeros(shape), np.full(shape[:-1], -np.inf if o.feature_map in EXPONENTIAL else 0.0)
    s, z, *m = (x[part].astype(np.float64) for x in state)
    return np.concatenate([s, z[..., np.newaxis]], axis=-1), m[0] * math.log(2) if m else np.zeros_like(z)


def _exponent(s: Float, a: Float) -> tuple[Float, Float]:
    """The integer m of a state that brings its z to (1/2, 1], and exp(a) / 2**m."""
    # Of z, not of a: a rounded up at every step would not follow a slow decay.
    m = np.ceil(a / math.log(2) + np.log2(np.abs(s[..., -1])))
    return m, np.where(m == -np.inf, 0, np.exp(a - m * math.log(2)))


class _Token(NamedTuple):
    """One step of the recurrence S = rho S + c kappa v1."""

    rho: Float
    kappa: Float
    s: Float
    a: Float


def _recurrence(keys: _Keys, decay: Array | None, s: Float, a: Float) -> Iterator[_Token]:
    for j in range(keys.c.shape[2]):
        before = a if decay is None else a + decay[:, :, j, np.newaxis]
        a = np.maximum(before, keys.e[:, :, j])
        rho, kappa = np.exp(before - _finite(a)), np.exp(keys.e[:, :, j] - _finite(a))
        s = rho[..., np.newaxis] * s + (keys.c[:, :, j] * kappa)[..., np.newaxis] * keys.v1[:, :, j, np.newaxis]
        yield _Token(rho, kappa, s, a)


def _total(keys: _Keys, s: Float, a: Float) -> _Token:
    """All keys at once, kappa for each of them."""
    top = np.concatenate([a[:, :, np.newaxis], keys.e], axis=2).max(axis=2)
    rho, kappa = np.exp(a - _finite(top)), np.exp(keys.e - _finite(top)[:, :, np.newaxis])
    return _Token(rho, kappa, rho[..., np.newaxis] * s + (keys.c * kappa).swapaxes(-1, -2) @ keys.v1, top)


# Rows of queries (.., R, F) under a sum.


def _weights(c: Float, e: Float, a: Float) -> tuple[Float, Float]:
    """Features times exp(a), divided by the exponential of their largest exponent, and that."""
    e = e + a[:, :, np.newaxis]
    top = _finite(e.max(axis=-1, keepdims=True))
    return c * np.exp(e - top), top


def _softmax(e: Float) -> Float:
    p = np.exp(e - e.max(axis=-1, keepdims=True))
    return np.asarray(p / p.sum(axis=-1, keepdims=True))


def _divided(x: Float, by: Float) -> Float:
    """x / by, 0 where `by` is 0."""
    return np.where(by == 0, 0, x / by)


def _rows(c: Float, e: Float, s: Float, a: Float, o: LinearOptions) -> Float:
    if o.feature_map == "softmax":
        return _softmax(e) @ _divided(s[..., :-1], s[..., -1:])
    w, top = _weights(c, e, a)
    sums = w @ s
    if not o.normalize:
        return np.asarray(sums[..., :-1] * np.exp(top))
    return _divided(sums[..., :-1], sums[..., -1:] + (o.eps * np.exp(-top) if o.eps else 0.0))


class _RowGradients(NamedTuple):
    features: Float
    """In the rows' features, of exponentials in the exponents."""
    u: Float
    g: Float
    h: Float
    """The gradient in S is u^T g, that in z the sum of h over rows."""


def _row_gradients(c: Float, e: Float, s: Float, a: Float, dy: Float, o: LinearOptions) -> _RowGradients:
    if o.feature_map == "softmax":
        p, inverse = _softmax(e), _divided(np.ones(1), s[..., -1])[:, :, np.newaxis]
        each = dy @ s[..., :-1].swapaxes(-1, -2) * inverse
        return _RowGradients(p * (each - (p * each).sum(axis=-1, keepdims=True)), p * inverse, dy, -p * inverse * each)
    w, top = _weights(c, e, a)
    if o.normalize:
        sums = w @ s
        den = sums[..., -1:] + (o.eps * np.exp(-top) if o.eps else 0.0)
        g = _divided(dy, den)
        column = -(g * _divided(sums[..., :-1], den)).sum(axis=-1, keepdims=True)
    else:
        g = dy * np.exp(top)
        column = np.zeros_like(top)
    d = np.concatenate([g, column], axis=-1) @ s.swapaxes(-1, -2)
    return _RowGradients(w * d if o.feature_map in EXPONENTIAL else o.scale * d, w, g, w * column)


# Calls.


def _parts(offsets: Array | None) -> Iterator[tuple[slice, slice]]:
    """Tokens and states of each sequence."""
    if offsets is None:
        yield slice(None), slice(None)
    else:
        for i, (low, high) in enumerate(pairwise(offsets.tolist())):
            yield slice(low, high), slice(i, i + 1)


def _grouped(x: Array, tokens: slice, heads: int) -> Float:
    """(B, H_kv, r, N, D): the query heads of each key head."""
    b, h, _, d = x.shape
    part = x[:, :, tokens]
    return part.reshape((b, heads, h // max(heads, 1), part.shape[2], d)).astype(np.float64)


def _flat(x: Float) -> Float:
    """The rows of all query heads of a key head as one axis."""
    return x.reshape((*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4]))


def _queries(q: Float, o: LinearOptions) -> tuple[Float, Float]:
    c, e = _features(q, o)
    return (c, e) if o.feature_map in EXPONENTIAL else (o.scale * c, e)


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    options: LinearOptions,
    key_mask: Array | None,
    offsets: Array | None,
    decay: Array | None,
    state: State | None,
    state_out: State | None,
) -> None:
    """y_i = sum_j f(q_i).f(k_j) v_j over the keys that row i sees, divided by the sum of the weights."""
    o, heads, e = options, k.shape[1], v.shape[-1]
    for tokens, part in _parts(offsets):
        mask, g = (None if x is None else x[:, :, tokens] for x in (key_mask, decay))
        with np.errstate(all="ignore"):
            keys = _keys(k[:, :, tokens].astype(np.float64), v[:, :, tokens].astype(np.float64), mask, o)
            cq, eq = _queries(_grouped(q, tokens, heads), o)
            s, a = _initial(state, part, (k.shape[0], heads, keys.c.shape[-1], e + 1), o)
            if o.causal:
                y = np.zeros((*cq.shape[:-1], e))
                before = cq.shape[3] - keys.c.shape[2]
                for i in range(before):
                    y[..., i, :] = _rows(cq[..., i, :], eq[..., i, :], s, a, o)
                for i, token in enumerate(_recurrence(keys, g, s, a), before):
                    s, a = token.s, token.a
                    if i >= 0:
                        y[..., i, :] = _rows(cq[..., i, :], eq[..., i, :], s, a, o)
            else:
                _, _, s, a = _total(keys, s, a)
                y = _rows(_flat(cq), _flat(eq), s, a, o)
            out[:, :, tokens] = y.reshape(out[:, :, tokens].shape)
            if state_out is not None:
                m, factor = _exponent(s, a) if o.feature_map in EXPONENTIAL else (a, np.ones_like(a))
                s = s * factor[..., np.newaxis]
                for x, value in zip(state_out, (s[..., :-1], s[..., -1], m), strict=False):
                    x[part] = value


def linear_attention_step(
    q: Array, k: Array, v: Array, out: Array, options: LinearOptions, decay: Array | None, state: State
) -> None:
    """One token of the causal form, the state changed in place."""
    after = tuple(np.empty_like(x) for x in state)
    g = None if decay is None else decay[..., np.newaxis]
    rows, keys, values, result = (x[:, :, np.newaxis] for x in (q, k, v, out))
    linear_attention(rows, keys, values, result, options, None, None, g, state, after)
    for x, new in zip(state, after, strict=True):
        x[...] = new


def plain_step(q: Array, k: Array, v: Array, state: State, out: Array | None, options: LinearOptions) -> None:
    """No shorter way for plain arrays here: None sends every step through the full check."""


def linear_attention_backward(
    dy: Array,
    q: Array,
    k: Array,
    v: Array,
    y: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    options: LinearOptions,
    key_mask: Array | None,
    offsets: Array | None,
    decay: Array | None,
    state: State | None,
    d_state: State | None,
    d_initial: State | None,
) -> None:
    """The gradients by one sweep forward, for dq, and one backward, for dk and dv; y is computed anew."""
    o, heads, e = options, k.shape[1], v.shape[-1]
    for tokens, part in _parts(offsets):
        mask, g = (None if x is None else x[:, :, tokens] for x in (key_mask, decay))
        with np.errstate(all="ignore"):
            kf, vf = (x[:, :, tokens].astype(np.float64) for x in (k, v))
            keys, qf = _keys(kf, vf, mask, o), _grouped(q, tokens, heads)
            rows, dyf = _queries(qf, o), _grouped(dy, tokens, heads)
            s, a = _initial(state, part, (k.shape[0], heads, keys.c.shape[-1], e + 1), o)
            d_last = None if d_state is None else _initial(d_state, part, (), o)[0]
            sweep = _causal if o.causal else _bidirectional
            d_rows, d_keys, d_values, d_first = sweep(keys, rows, dyf, g, s, a, d_last, o)
            d_queries, d_k = _chain(qf, d_rows, o), _chain(kf, d_keys, o)
            if mask is not None:
                d_k = np.where(mask[..., np.newaxis], d_k, 0)
            for x, value in ((dq, d_queries), (dk, d_k), (dv, d_values)):
                x[:, :, tokens] = value.reshape(x[:, :, tokens].shape)
            if d_initial is not None:
                d_initial[0][part], d_initial[1][part] = d_first[..., :-1], d_first[..., -1]


_Sweep = tuple[Float, Float, Float, Float]


def _seed(d_last: Float | None, s: Float, a: Float, o: LinearOptions) -> Float:
    """The gradient in S from that in the state, which is S exp(a) / 2**m."""
    if d_last is None:
        return np.zeros_like(s)
    return d_last * _exponent(s, a)[1][..., np.newaxis] if o.feature_map in EXPONENTIAL else d_last


def _causal(
    keys: _Keys,
    rows: tuple[Float, Float],
    dy: Float,
    decay: Array | None,
    s: Float,
    a: Float,
    d_last: Float | None,
    o: LinearOptions,
) -> _Sweep:
    cq, eq = rows
    nq, nk = cq.shape[3], keys.c.shape[2]

    def gradients(i: int, s: Float, a: Float) -> _RowGradients:
        return _row_gradients(cq[..., i, :], eq[..., i, :], s, a, dy[..., i, :], o)

    # Of keys before the first query there are no rows.
    found = [gradients(i, s, a) for i in range(nq - nk)]
    rhos, kappas = np.empty_like(keys.e), np.empty_like(keys.e)
    for j, token in enumerate(_recurrence(keys, decay, s, a)):
        rhos[:, :, j], kappas[:, :, j], s, a = token
        if j + nq - nk >= 0:
            found.append(gradients(j + nq - nk, s, a))
    d_rows = np.stack([x.features for x in found], axis=3) if found else np.zeros_like(cq)
    d_keys, d_values = np.empty_like(keys.e), np.empty_like(keys.v1)
    # The gradient in S of token j, in units of exp(a_j), from the rows that see it.
    r = _seed(d_last, s, a, o)
    for j in range(nk - 1, -1, -1):
        if found and j + nq - nk >= 0:
            _add(r, found.pop())
        d_keys[:, :, j] = kappas[:, :, j] * (r @ keys.v1[:, :, j, :, np.newaxis])[..., 0]
        d_values[:, :, j] = ((keys.c[:, :, j] * kappas[:, :, j])[..., np.newaxis, :] @ r)[..., 0, :]
        r = rhos[:, :, j, :, np.newaxis] * r
    for x in found:
        _add(r, x)
    return d_rows, d_keys, d_values[..., :-1], r


def _bidirectional(
    keys: _Keys,
    rows: tuple[Float, Float],
    dy: Float,
    decay: Array | None,
    s: Float,
    a: Float,
    d_last: Float | None,
    o: LinearOptions,
) -> _Sweep:
    rho, kappa, s, a = _total(keys, s, a)
    found = _row_gradients(_flat(rows[0]), _flat(rows[1]), s, a, _flat(dy), o)
    r = _seed(d_last, s, a, o)
    _add(r, found)
    d_values = (keys.c * kappa) @ r
    return (
        found.features.reshape(rows[0].shape),
        kappa * (keys.v1 @ r.swapaxes(-1, -2)),
        d_values[..., :-1],
        rho[..., np.newaxis] * r,
    )


def _add(r: Float, x: _RowGradients) -> None:
    r[..., :-1] += x.u.swapaxes(-1, -2) @ x.g
    r[..., -1] += x.h.sum(axis=2)


def softmax_attention(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    causal: bool,
    scale: float,
    key_mask: Array | None,
    offsets: Array | None,
    logn: Array | None,
) -> None:
    """softmax over the visible keys of scale logn_i q_i.k_j, times v; some rows at a time."""
    heads = k.shape[1]
    for tokens, _ in _parts(offsets):
        with np.errstate(all="ignore"):
            rows = scale * _grouped(q, tokens, heads)
            if logn is not None:
                rows *= _grouped(logn[..., np.newaxis], tokens, heads)
            kf, vf = (x[:, :, np.newaxis, tokens].astype(np.float64) for x in (k, v))
            nq, nk = rows.shape[3], kf.shape[3]
            seen = np.ones((1, 1, 1, 1, nk), bool)
            if key_mask is not None:
                seen = key_mask[:, :, np.newaxis, np.newaxis, tokens]
                kf, vf = (np.where(seen.swapaxes(-1, -2), x, 0) for x in (kf, vf))
            y = np.zeros((*rows.shape[:-1], v.shape[-1]))
            for i in range(0, nq, _BLOCK):
                block = rows[..., i : i + _BLOCK, :]
                limits = (
                    np.arange(i, i + block.shape[3])[:, np.newaxis] + nk - nq + 1 if causal else np.full((1, 1), nk)
                )
                first, last = (min(max(int(x), 0), nk) for x in (limits[0, 0], limits[-1, 0]))
                visible = seen[..., :last] & (np.arange(last) < limits)
                scores = np.where(visible, block @ kf[..., :last, :].swapaxes(-1, -2), -np.inf)
                w = np.exp(scores - _finite(scores.max(axis=-1, keepdims=True, initial=-np.inf)))
                # The keys that some rows of the block see: to others not even nan may come from them.
                rest = w[..., first:, np.newaxis] * vf[..., np.newaxis, first:last, :]
                total = w[..., :first] @ vf[..., :first, :]
                total += np.where(visible[..., first:, np.newaxis], rest, 0).sum(axis=-2)
                y[..., i : i + _BLOCK, :] = _divided(total, w.sum(axis=-1, keepdims=True))
            out[:, :, tokens] = y.reshape(out[:, :, tokens].shape)
