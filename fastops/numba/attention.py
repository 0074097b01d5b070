# SPDX-License-Identifier: BSD-3-Clause
"""Linear and softmax attention through Numba: heads, sequences and pieces of them here, the arithmetic in `_attention_kernels`.

Each head goes in pieces of some hundred tokens, which are converted to the dtype of the arithmetic one by one: Ctrl-C is heard between
them, and no copy is longer. A loop compiles at its first call, some seconds for the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _attention_kernels as kernels
from .nystrom import nystrom_attention, nystrom_attention_backward

if TYPE_CHECKING:
    from .._attention import LinearOptions

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
State = Sequence[Array]

_FLOAT64 = np.dtype(np.float64)
_KINDS = {
    "elu": kernels.ELU,
    "relu": kernels.RELU,
    "relu2": kernels.RELU2,
    "identity": kernels.IDENTITY,
    "cosine": kernels.COSINE,
    "exp": kernels.EXP,
    "favor": kernels.FAVOR,
    "softmax": kernels.EXP,
}
# Tokens of a piece at most, and multiplications (Ctrl-C waits for them).
_PIECE = 1024
_WORK = 1 << 27
# Rows of a tile of softmax attention, and of what one call of its loop takes.
_TILE = 32
_ROWS = 256


def _real(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the arithmetic."""
    return _FLOAT64 if dtype == _FLOAT64 else np.dtype(np.float32)


class _Map(NamedTuple):
    """The options as the loops take them."""

    kind: int
    kind_q: int
    holds: int
    features: int
    factor_q: float
    factor_k: float
    eps: float
    forward: Array
    backward: Array

    @staticmethod
    def of(options: LinearOptions, d: int, real: np.dtype[Any]) -> _Map:
        name, scale = options.feature_map, options.scale
        count, forward = d, np.empty((0, 0), real)
        backward = forward
        factor_q, factor_k = scale, 1.0
        holds = kernels.PLAIN
        if name == "cosine":
            count = d + 1
        elif name == "favor":
            assert options.projection is not None
            backward = np.ascontiguousarray(options.projection, real)
            forward = np.ascontiguousarray(backward.T)
            count = len(backward)
            factor_q = factor_k = math.sqrt(scale)
        elif name in ("exp", "softmax"):
            factor_k = scale
        if name in ("exp", "favor", "softmax"):
            holds = kernels.EACH if name == "softmax" else kernels.SCALED
        kind = _KINDS[name]
        kind_q = kernels.SOFTMAX if name == "softmax" else kind
        return _Map(kind, kind_q, holds, count, factor_q, factor_k, options.kernel_eps, forward, backward)


class _Piece(NamedTuple):
    """Tokens that one call of a loop takes: queries and keys, of which row i sees the keys up to its own where it has both."""

    q: slice
    k: slice


def _cut(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _pieces(q: slice, k: slice, causal: bool, step: int) -> Iterator[_Piece]:
    """The pieces of a sequence, in the order in which the state passes through them."""
    before = (k.stop - k.start) - (q.stop - q.start) if causal else k.stop - k.start
    # Keys that all rows see, then rows that see none of the keys that are left.
    for part in _cut(k.start, k.start + max(before, 0), step):
        yield _Piece(slice(0, 0), part)
    rows = q.start + max(-before, 0) if causal else q.stop
    for part in _cut(q.start, rows, step):
        yield _Piece(part, slice(0, 0))
    shift = k.start + max(before, 0) - rows
    for part in _cut(rows, q.stop, step):
        yield _Piece(part, slice(part.start + shift, part.stop + shift))


def _step(features: int, columns: int, groups: int) -> int:
    tokens = _WORK // max(features * columns * groups, 1)
    return min(max(tokens, kernels.CHUNK), _PIECE)


class _Loops:
    """The loops for one dtype and one map, with their working memory."""

    def __init__(self, mapped: _Map, options: LinearOptions, d: int, columns: int, real: np.dtype[Any], chunk: int):
        self.map, self.real, self.columns, self.chunk = mapped, real, columns, chunk
        self.normalize, self.eps = bool(options.normalize), real.type(options.eps)
        f = mapped.features
        square = (chunk, chunk)
        self.work = (
            np.empty((f, chunk), real),
            np.empty(square, real),
            np.empty(square),
            np.empty(chunk),
            np.empty(chunk, real),
            np.empty(f),
            *(np.empty(f, real) for _ in range(3)),
        )
        self.no_decay = np.empty(0)

    def tokens(self, x: Array) -> Array:
        """Rows as the loops take them: of the arithmetic's dtype, contiguous."""
        return np.ascontiguousarray(x, self.real)

    def features(self, x: Array, query: bool) -> Array:
        """Features of rows of one head or more, or their logarithms."""
        m, real = self.map, self.real.type
        rows = self.tokens(x).reshape(-1, x.shape[-1])
        out = np.empty((len(rows), m.features), self.real)
        kind, factor = (m.kind_q, m.factor_q) if query else (m.kind, m.factor_k)
        kernels.features[self.real](rows, out, kind, real(factor), real(m.eps), m.forward)
        return out.reshape(*x.shape[:-1], m.features)

    def features_back(self, x: Array, df: Array, query: bool) -> Array:
        """The gradient of rows from that of their features."""
        m, real = self.map, self.real.type
        rows = self.tokens(x).reshape(-1, x.shape[-1])
        out = np.empty_like(rows)
        factor = m.factor_q if query else m.factor_k
        kernels.features_back[self.real](rows, df.reshape(-1, m.features), out, m.kind, real(factor), m.backward)
        return out.reshape(x.shape)

    def keys(self, head: _Head, part: slice) -> tuple[Array, Array, Array]:
        """Features of keys, values, decay; a masked key has none of the first two."""
        f, v = self.features(head.k[part], False), self.tokens(head.v[part])
        if head.mask is not None:
            absent = ~head.mask[part]
            if absent.any():
                f[absent] = 0 if self.map.holds == kernels.PLAIN else -np.inf
                v = np.where(absent[:, None], self.real.type(0), v)
        decay = self.no_decay if head.decay is None else np.ascontiguousarray(head.decay[part], _FLOAT64)
        return f, v, decay

    def options(self) -> tuple[Any, ...]:
        return self.map.holds, self.normalize, self.eps


class _Head(NamedTuple):
    """One head of keys with the heads of queries that read it."""

    q: Array
    k: Array
    v: Array
    mask: Array | None
    decay: Array | None


def _heads(
    q: Array, k: Array, v: Array, key_mask: Array | None, offsets: Array | None, decay: Array | None
) -> Iterator[tuple[tuple[int, int], int, slice, _Head, slice, slice]]:
    """Batch and head of the keys, the sequence's index, the queries' heads, the arrays, the sequence's queries and keys."""
    groups = q.shape[1] // max(k.shape[1], 1)
    for b in range(len(q)):
        if offsets is None:
            sequences = [(b, slice(0, q.shape[2]), slice(0, k.shape[2]))]
        else:
            parts = [slice(*pair) for pair in pairwise(offsets.tolist())]
            sequences = [(i, part, part) for i, part in enumerate(parts)]
        for h in range(k.shape[1]):
            own = slice(h * groups, (h + 1) * groups)
            head = _Head(
                q[b, own],
                k[b, h],
                v[b, h],
                None if key_mask is None else key_mask[b, h],
                None if decay is None else decay[b, h],
            )
            for index, rows, keys in sequences:
                yield (b, h), index, own, head, rows, keys


def _initial(state: State | None, index: int, h: int, loops: _Loops) -> tuple[Array, Array, Array]:
    """A copy of a head's state, or an empty one."""
    f, real = loops.map.features, loops.real
    empty = 0.0 if loops.map.holds == kernels.PLAIN else -np.inf
    if state is None:
        return np.zeros((f, loops.columns), real), np.zeros(f, real), np.full(f, empty, real)
    s, z = (np.array(x[index, h], real, order="C") for x in state[:2])
    m = np.array(state[2][index, h], real) if len(state) > 2 else np.full(f, empty, real)
    return s, z, m


def _told(loops: _Loops, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """The state as it is told: 2**m is the power of two that brings z to (1/2, 1]."""
    s, z, m = state
    if loops.map.holds == kernels.PLAIN:
        return state
    change = _change(z)
    s, z = np.ldexp(s, -change[:, None]), np.ldexp(z, -change)
    # Without a key there is no sum, whatever an initial state said.
    s[np.isneginf(m)] = z[np.isneginf(m)] = 0
    return s, z, m + change.astype(m.dtype)


def _change(z: Array) -> NDArray[np.int32]:
    """ceil(log2(z)), 0 for zero and for what is not finite."""
    mantissa, exponent = np.frexp(np.abs(z))
    return np.where(np.isfinite(z), exponent - (mantissa == 0.5), 0)


def _take(loops: _Loops, head: _Head, piece: _Piece, out: Array, state: tuple[Array, Array, Array]) -> None:
    """One piece of the forward pass; `out` (groups, rows, columns) is written."""
    run = kernels.segment[loops.real]
    q = loops.features(head.q[:, piece.q], True)
    k, v, decay = loops.keys(head, piece.k)
    direct = out.flags.c_contiguous and out.dtype == loops.real
    result = out if direct else np.empty(out.shape, loops.real)
    run(q, k, v, decay, result, *state, *loops.options(), *loops.work)
    if not direct:
        with np.errstate(all="ignore"):
            out[...] = result


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
    """y_i = sum_j w_ij v_j / sum_j w_ij with w_ij = f(q_i).f(k_j), by a state that passes along the keys."""
    real = _real(q.dtype)
    mapped = _Map.of(options, q.shape[3], real)
    loops = _Loops(mapped, options, q.shape[3], v.shape[3], real, kernels.CHUNK)
    step = _step(mapped.features, v.shape[3], q.shape[1] // max(k.shape[1], 1))
    for (b, h), index, own, head, rows, keys in _heads(q, k, v, key_mask, offsets, decay):
        own_state = _initial(state, index, h, loops)
        for piece in _pieces(rows, keys, options.causal, step):
            _take(loops, head, piece, out[b, own, piece.q], own_state)
        if state_out is not None:
            for target, value in zip(state_out, _told(loops, own_state), strict=False):
                target[index, h] = value


def linear_attention_step(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    options: LinearOptions,
    decay: Array | None,
    state: State,
) -> None:
    """One more token of each head; the state is updated in place."""
    real = _real(q.dtype)
    batch, q_heads, d = q.shape
    heads, columns = k.shape[1], v.shape[2]
    groups = q_heads // max(heads, 1)
    mapped = _Map.of(options, d, real)
    loops = _Loops(mapped, options, d, columns, real, 1)
    f = mapped.features
    queries = loops.features(q, True).reshape(batch * heads, groups, f)
    keys = loops.features(k, False).reshape(batch * heads, f)
    values = loops.tokens(v).reshape(batch * heads, columns)
    gone = loops.no_decay if decay is None else np.ascontiguousarray(decay, _FLOAT64).reshape(-1)
    direct = out.flags.c_contiguous and out.dtype == real
    result = (out if direct else np.empty(out.shape, real)).reshape(batch * heads, groups, columns)
    parts = [x.reshape(batch * heads, *x.shape[2:]) for x in state]
    if len(parts) == 2:
        parts.append(np.zeros((batch * heads, f), real))
    kernels.steps[real](queries, keys, values, gone, result, *parts, *loops.options(), *loops.work)
    if not direct:
        with np.errstate(all="ignore"):
            out[...] = result.reshape(out.shape)


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
    """The gradients of q, k and v: for each piece, last first, a forward sweep from its stored state and a reverse one."""
    real = _real(q.dtype)
    mapped = _Map.of(options, q.shape[3], real)
    loops = _Loops(mapped, options, q.shape[3], v.shape[3], real, kernels.CHUNK)
    f, columns = mapped.features, v.shape[3]
    step = _step(mapped.features, v.shape[3], q.shape[1] // max(k.shape[1], 1))
    more = (
        np.empty((columns, kernels.CHUNK), real),
        np.empty((columns, f), real),
        np.empty((kernels.CHUNK, kernels.CHUNK), real),
    )
    nothing = np.empty((q.shape[1] // max(k.shape[1], 1), 0, columns), real)
    for (b, h), index, own, head, rows, keys in _heads(q, k, v, key_mask, offsets, decay):
        own_state = _initial(state, index, h, loops)
        pieces: list[_Piece] = []
        stored: list[State] = []
        for piece in _pieces(rows, keys, options.causal, step):
            # Without keys a piece leaves the state as it is.
            same = bool(pieces) and pieces[-1].k.stop == pieces[-1].k.start
            stored.append(stored[-1] if same else [x.copy() for x in own_state])
            pieces.append(piece)
            if piece.k.stop > piece.k.start:
                _take(loops, head, _Piece(slice(0, 0), piece.k), nothing, own_state)
        if d_state is None:
            ds, dz = np.zeros((f, columns), real), np.zeros(f, real)
        else:
            ds, dz = (np.array(x[index, h], real, order="C") for x in d_state)
            if mapped.holds != kernels.PLAIN:
                change = _change(own_state[1])
                ds, dz = np.ldexp(ds, -change[:, None]), np.ldexp(dz, -change)
                ds[np.isneginf(own_state[2])] = dz[np.isneginf(own_state[2])] = 0
        for piece, before in zip(reversed(pieces), reversed(stored), strict=True):
            # A copy, since pieces may share what is stored.
            own_state = before[0].copy(), before[1].copy(), before[2].copy()
            part = _gradients(loops, head, piece, dy[b, own], y[b, own], own_state, (ds, dz), more)
            with np.errstate(all="ignore"):
                dq[b, own, piece.q] = part[0]
                dk[b, h, piece.k] = part[1]
                dv[b, h, piece.k] = part[2]
        if d_initial is not None:
            d_initial[0][index, h] = ds
            d_initial[1][index, h] = dz


def _gradients(
    loops: _Loops,
    head: _Head,
    piece: _Piece,
    dy: Array,
    y: Array,
    state: tuple[Array, Array, Array],
    d_state: tuple[Array, Array],
    more: tuple[Array, ...],
) -> tuple[Array, Array, Array]:
    """dq, dk and dv of one piece; `d_state` is moved to the piece's beginning."""
    real, f = loops.real, loops.map.features
    x, x_k = head.q[:, piece.q], head.k[piece.k]
    q = loops.features(x, True)
    k, v, decay = loops.keys(head, piece.k)
    rows = loops.tokens(y[:, piece.q])
    if y.dtype.itemsize == 2 and loops.normalize and loops.map.holds != kernels.EACH:
        # Rounded to half precision it is not right enough for the difference of dy.v and dy.y.
        _take(
            loops, head, piece, rows := np.empty(rows.shape, real), (state[0].copy(), state[1].copy(), state[2].copy())
        )
    g = np.array(dy[:, piece.q], real, order="C")
    groups, n, _ = g.shape
    c = np.empty((groups, n), real)
    dq, extra = (
        np.empty((groups, n, f), real),
        np.empty((groups, n, f) if loops.map.holds == kernels.EACH else (0, 0, 0), real),
    )
    tokens = max(n, len(k))
    starts, changes = np.empty(tokens + 1, np.int64), np.empty((tokens if loops.map.holds else 0, f))
    chunks = kernels.forth[real](
        q,
        k,
        v,
        decay,
        g,
        rows,
        c,
        dq,
        extra,
        *state,
        *loops.options(),
        starts,
        changes,
        *more,
        *loops.work,
    )
    dk, dv = np.empty(k.shape, real), np.empty(v.shape, real)
    kernels.back[real](
        q, k, v, decay, g, c, extra, dk, dv, *d_state, loops.map.holds, chunks, starts, changes, *more, *loops.work
    )
    dx_k = loops.features_back(x_k, dk, False)
    if head.mask is not None:
        dx_k[~head.mask[piece.k]] = 0
        dv[~head.mask[piece.k]] = 0
    return loops.features_back(x, dq, True), dx_k, dv


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
    """y_i = softmax over the visible keys of (scale logn_i q_i.k_j) v, by blocks of keys."""
    real = _real(q.dtype)
    d, columns = q.shape[3], v.shape[3]
    work = (
        np.empty((d, kernels.BLOCK), real),
        np.empty((_TILE, kernels.BLOCK), real),
        np.empty((kernels.BLOCK, columns), real),
    )
    no_mask = np.empty(0, np.bool_)
    for (b, _), _, own, head, rows, keys in _heads(q, k, v, key_mask, offsets, None):
        count = keys.stop - keys.start
        height = min(max(_WORK // max(count * (d + columns), 1) // _TILE * _TILE, _TILE), _ROWS)
        head_k, head_v = (np.ascontiguousarray(x[keys], real) for x in (head.k, head.v))
        mask = no_mask if head.mask is None else np.ascontiguousarray(head.mask[keys])
        before = count - (rows.stop - rows.start)
        for h in range(own.start, own.stop):
            for part in _cut(rows.start, rows.stop, height):
                n = part.stop - part.start
                scales = np.full(n, scale, real)
                if logn is not None:
                    scales *= logn[b, h, part].astype(real)
                result = np.empty((n, columns), real)
                kernels.attend[real](
                    np.ascontiguousarray(q[b, h, part], real),
                    head_k,
                    head_v,
                    mask,
                    scales,
                    result,
                    part.start - rows.start + before,
                    causal,
                    *work,
                    np.empty(n, real),
                    np.empty(n),
                )
                with np.errstate(all="ignore"):
                    out[b, h, part] = result
