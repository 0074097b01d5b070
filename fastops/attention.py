# SPDX-License-Identifier: BSD-3-Clause
"""Attention over long sequences: linear and Nystrom attention with their gradients, and exact softmax attention to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _attention, _nystrom, _validate
from ._attention import LinearOptions, Problem
from ._backend import backend as _backend
from ._validate import AnyArray, Text

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "NystromInfo",
    "favor_projection",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_step_",
    "logn_scale",
    "nystrom_attention",
    "nystrom_attention_backward",
    "softmax_attention",
]

State = Sequence["ArrayLike"]


def linear_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    causal: bool = False,
    feature_map: str = "elu",
    normalize: bool | None = None,
    eps: float = 0.0,
    kernel_eps: float | None = None,
    scale: float | None = None,
    projection: ArrayLike | None = None,
    key_mask: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    decay: ArrayLike | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    layout: str = "bhnd",
    out: AnyArray | None = None,
) -> Any:
    """Attend with weights f(q).f(k), at a cost that grows linearly with the length.

    Parameters
    ----------
    q : (..., H, N, D) or (N, D) array_like of float16, bfloat16, float32 or float64
        Queries. Any leading dimensions and strides; a copy is made only where the last axis is not contiguous.
    k : (..., H_kv, M, D) or (M, D) array_like
        Keys; H is a multiple of H_kv, and query head h uses key head h // (H / H_kv).
    v : (..., H_kv, M, E) or (M, E) array_like
        Values. Arrays of several dtypes are promoted to the common one.
    causal : bool
        Row i sees the keys j <= i + M - N: the last row sees all, as decoding needs (torch's ``is_causal`` aligns the first).
    feature_map : {"elu", "relu", "relu2", "identity", "exp", "softmax", "favor", "cosine"}
        See the notes.
    normalize : bool, optional
        Divide by the sum of the weights. True by default, but False for "identity", whose weights may cancel.
    eps : float
        Added to the sum of the weights: absolute, so weights far below it give results near 0.
    kernel_eps : float, optional
        Added to the features of "relu" (1e-3 by default) and "relu2" (0).
    scale : float, optional
        Within the exponent for "exp", "softmax" and "favor", else a factor of every weight. D**-0.5 for "identity", "exp" and
        "favor", 1 for the others.
    projection : (m, D) array_like, optional
        The directions of "favor", from `favor_projection`; m features.
    key_mask : (..., M) or (..., H_kv, M) bool array_like, optional
        True where a key counts; others are as if they were absent, in the sums and in the normaliser, but that their `decay`
        applies. Leading dimensions as those of `k`, heads first in every layout.
    cu_seqlens : (S + 1,) int array_like, optional
        Offsets of S sequences packed along N, from 0 to N; the batch is then 1 and M = N.
    decay : (H_kv,) or (..., H_kv, M) array_like of floats, optional
        Logarithms <= 0 of the factor by which the sums shrink at each key, before it is added; -inf forgets. With `causal`, and
        not with "softmax" and "favor". Heads first in every layout. The sums shrink at a masked key too: with padding on the right,
        give ``decay[:, None] * mask[..., None, :]``.
    initial_state : tuple of arrays, optional
        The sums to begin with, as `return_state` gives them. Of no tokens S and z are 0, and m, the largest logits of "exp", "softmax"
        and "favor", -inf.
    return_state : bool
        Return the sums over all keys too.
    layout : {"bhnd", "bnhd"}
        "bnhd": q, k, v and the result are (..., N, H, D), at least 3-D.
    out : ndarray, optional
        Where the result goes: of its shape and dtype and apart from the arguments in memory, any strides.

    Returns
    -------
    y : (..., H, N, E) ndarray
        Of the common dtype. A row without keys, or whose weights add up to 0, is 0.
    state : tuple of arrays
        With `return_state`: S (..., H_kv, F, E) and z (..., H_kv, F) for F features, of float32 (float64 for float64); and m like
        z for "exp", "softmax" and "favor", where the sums are S 2**m and z 2**m. With `cu_seqlens` the first
        dimension of each is the number of sequences.

    Raises
    ------
    TypeError
        Integer or complex arrays, float16 with bfloat16, a mask that is not bool.
    ValueError
        Shapes that do not fit, a mask of pairs (N, M), a positive or nan decay, options that exclude each other, an `out` that is
        read-only or overlaps an argument. Nothing was written.

    Notes
    -----
    y_i = sum_j w_ij v_j / (sum_j w_ij + eps), w_ij = f(q_i).f(k_j) exp(sum of decay over j+1..i). Features f(x): "elu" x + 1 for
    x >= 0 and exp(x) below; "relu" max(x, 0) + kernel_eps; "relu2" max(x, 0)**2 + kernel_eps; "identity" x; "cosine"
    (x / \\|x\\|, 1), so w = 1 + cos; "exp" exp(scale x); "favor" exp(W x' - \\|x'\\|**2 / 2) / sqrt(m), x' = sqrt(scale) x, which
    approximates softmax attention for small norms; "softmax" is softmax(scale q) over D for q and over the visible keys, each
    feature by its own sum, for k. The exponentials keep running maxima: no logit overflows, and no key changes an earlier row.
    Sums are in float32 (float64 for float64): the error is at most 4e-6 max(abs(v)) in float32 for "elu". The same bits for every
    number of threads. 4 D E flops a token and the causal triangle of a block; extra memory O(D E) a thread.
    Katharopoulos et al., "Transformers are RNNs", ICML 2020; Shen et al., "Efficient attention", WACV 2021; Choromanski et al.,
    "Rethinking attention with Performers", ICLR 2021; Su Jianlin, kexue.fm/archives/7546; Sun et al., "Retentive network", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> q = k = np.zeros((1, 3, 2), np.float32)
    >>> v = np.array([[[3.0], [5.0], [1.0]]], np.float32)
    >>> fastops.linear_attention(q, k, v, causal=True)[0, :, 0]
    array([3., 4., 3.], dtype=float32)
    """
    p = Problem(layout, q, k, v)
    options = _attention.linear_options(p.d, p.wide, causal, feature_map, normalize, eps, kernel_eps, scale, projection)
    with_state = _validate.boolean("return_state", return_state)
    mask, offsets, g, state = _conditions(p, options, key_mask, cu_seqlens, decay, initial_state)
    y, written, given = p.output(out)
    after = p.new_state(options, offsets) if with_state else None
    state_out = None if after is None else p.backend_state(after)
    if p.b * p.hq:
        _backend.linear_attention(*p.arrays, written, options, mask, offsets, g, state, state_out)
    _attention.settle(written, given)
    return y if after is None else (y, after)


def _conditions(
    p: Problem, options: LinearOptions, key_mask: object, cu_seqlens: object, decay: object, initial_state: object
) -> tuple[AnyArray | None, AnyArray | None, AnyArray | None, tuple[AnyArray, ...] | None]:
    """Mask, offsets, decay and state, checked; overlap of `out` is checked with them afterwards."""
    if options.projection is not None:
        p.inputs["projection"] = options.projection
    mask = p.key_mask(key_mask)
    offsets = p.offsets(cu_seqlens)
    g = p.decay(decay, options)
    return mask, offsets, g, p.state("initial_state", initial_state, options, offsets)


@lru_cache(maxsize=64, typed=True)
def _quick_options(
    d: int,
    dtype: np.dtype[Any],
    feature_map: str,
    normalize: bool | None,
    eps: float,
    kernel_eps: float | None,
    scale: float | None,
) -> LinearOptions | None:
    """The options of a step, checked once for all steps that have them; None of dtypes that are converted."""
    if dtype not in (np.float32, np.float64) or d < 1:
        return None
    return _attention.linear_options(d, dtype, True, feature_map, normalize, eps, kernel_eps, scale, None)


def _options_of_map(d: int, dtype: np.dtype[Any], feature_map: str) -> LinearOptions | None:
    """The options of a call that names a map and no more."""
    return _quick_options(d, dtype, feature_map, None, 0.0, None, None)


# Half the time of `_quick_options`: none of these three equals a value of another type, and few are hashed.
_plain_options = lru_cache(maxsize=64)(_options_of_map)


def linear_attention_step_(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    state: Sequence[AnyArray],
    *,
    feature_map: str = "elu",
    normalize: bool | None = None,
    eps: float = 0.0,
    kernel_eps: float | None = None,
    scale: float | None = None,
    projection: ArrayLike | None = None,
    decay: ArrayLike | None = None,
    out: AnyArray | None = None,
) -> AnyArray:
    """Take the next token of causal linear attention: update the state in place and return the token's row.

    Parameters
    ----------
    q : (..., H, D) or (D,) array_like of float16, bfloat16, float32 or float64
        The token's queries.
    k : (..., H_kv, D) or (D,) array_like
        Its keys.
    v : (..., H_kv, E) or (E,) array_like
        Its values.
    state : tuple of arrays
        As `linear_attention` with ``return_state=True`` gives it, C-contiguous; changed in place. Of no tokens: what it gives for
        arrays of length 0.
    feature_map : str
        As in `linear_attention`, as are the other options.
    normalize : bool, optional
        Divide by the sum of the weights.
    eps : float
        Added to the sum of the weights.
    kernel_eps : float, optional
        Added to the features of "relu" and "relu2".
    scale : float, optional
        Within the exponent or of the weights.
    projection : (m, D) array_like, optional
        The directions of "favor"; quickest in the dtype of the state.
    decay : (H_kv,) or (..., H_kv) array_like, optional
        Logarithms <= 0 of the token's decay.
    out : (..., H, E) ndarray, optional
        Where the result goes.

    Returns
    -------
    (..., H, E) ndarray
        The row of the token, of the common dtype of q, k and v.

    Raises
    ------
    TypeError
        As `linear_attention`; a state of another dtype than float32 (float64 for float64).
    ValueError
        As `linear_attention`; a state of other shapes, read-only, not C-contiguous or overlapping another argument. The state is
        as before.

    Notes
    -----
    Token by token it gives what `linear_attention` gives for all at once, up to rounding. 4 D E flops and 8 D E bytes a head. A call with
    `decay`, `projection` or half precision costs some 50 microseconds more than one without. Rows of a batch that have ended: step them
    too, and ignore the result. The state is changed in place: copy it before branching.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> nothing = np.zeros((1, 2, 0, 4), np.float32)
    >>> _, state = fastops.linear_attention(nothing, nothing, nothing, causal=True, return_state=True)
    >>> q = k = v = np.ones((1, 2, 4), np.float32)
    >>> fastops.linear_attention_step_(q, k, v, state)[0, 0]
    array([1., 1., 1., 1.], dtype=float32)
    >>> state[1][0, 0]
    array([2., 2., 2., 2.], dtype=float32)
    """
    if decay is None and projection is None and type(q) is np.ndarray:
        try:
            if normalize is kernel_eps is scale is None and type(eps) is float and not eps:
                quick = _plain_options(q.shape[-1], q.dtype, feature_map)
            else:
                quick = _quick_options(q.shape[-1], q.dtype, feature_map, normalize, eps, kernel_eps, scale)
        except (IndexError, TypeError):  # no axis; an option of the wrong type, or one without a hash
            quick = None
        if quick is not None:
            y: AnyArray | None = _backend.plain_step(q, k, v, state, out, quick)
            if y is None and type(state) is tuple and _are_rows((q, k, v), state if out is None else (*state, out)):
                # Copies of them cost less than what follows.
                y = _backend.plain_step(*map(np.ascontiguousarray, (q, k, v)), state, out, quick)
            if y is not None:
                return y
    given = (feature_map, normalize, eps, kernel_eps, scale, projection)
    step, options = _attention.prepare_step(q, k, v, out, decay, state, given)
    if step.q.size:
        _backend.linear_attention_step(step.q, step.k, step.v, step.out, options, step.decay, step.state)
    _attention.settle(step.out, step.given)
    return step.result


def _are_rows(given: tuple[Any, ...], written: tuple[Any, ...]) -> bool:
    """Whether some arrays have gaps, as rows q[:, :, i] of a longer one, and are apart from those that are written."""
    if not all(type(x) is np.ndarray for x in (*given, *written)) or all(x.flags.c_contiguous for x in given):
        return False
    return not any(np.may_share_memory(x, y) for x in given for y in written)


def linear_attention_backward(
    dy: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    y: ArrayLike,
    *,
    causal: bool = False,
    feature_map: str = "elu",
    normalize: bool | None = None,
    eps: float = 0.0,
    kernel_eps: float | None = None,
    scale: float | None = None,
    projection: ArrayLike | None = None,
    key_mask: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    decay: ArrayLike | None = None,
    initial_state: State | None = None,
    layout: str = "bhnd",
    d_state: State | None = None,
) -> tuple[Any, ...]:
    """Differentiate `linear_attention` with respect to q, k, v and the initial state.

    Parameters
    ----------
    dy : (..., H, N, E) array_like of float16, bfloat16, float32 or float64
        The gradient of the result.
    q : (..., H, N, D) array_like
        As in the forward call, as are all options.
    k : (..., H_kv, M, D) array_like
        Keys.
    v : (..., H_kv, M, E) array_like
        Values.
    y : (..., H, N, E) array_like
        The result of the forward call.
    causal : bool
        As `linear_attention`.
    feature_map : str
        As `linear_attention`.
    normalize : bool, optional
        As `linear_attention`.
    eps : float
        As `linear_attention`.
    kernel_eps : float, optional
        As `linear_attention`.
    scale : float, optional
        As `linear_attention`.
    projection : (m, D) array_like, optional
        As `linear_attention`; it gets no gradient.
    key_mask : bool array_like, optional
        As `linear_attention`; the gradients of masked keys and values are 0. Queries are not masked: nan in one of them
        reaches all gradients that it takes part in.
    cu_seqlens : (S + 1,) int array_like, optional
        As `linear_attention`.
    decay : array_like, optional
        As `linear_attention`; it gets no gradient.
    initial_state : tuple of arrays, optional
        As `linear_attention`.
    layout : {"bhnd", "bnhd"}
        As `linear_attention`.
    d_state : (dS, dz), optional
        The gradient of the state that the forward call returned, at its own m where it has one.

    Returns
    -------
    dq, dk, dv : ndarrays
        Of the shapes of q, k and v and their common dtype.
    d_initial_state : (dS, dz)
        Only with `initial_state`: its gradient, at its own m.

    Raises
    ------
    TypeError
        As `linear_attention`.
    ValueError
        As `linear_attention`.

    Notes
    -----
    With d_i = sum_j w_ij + eps, G_i = dy_i / d_i and c_i = -dy_i.y_i / d_i: df(q_i) = sum_j (G_i.v_j + c_i) f(k_j), df(k_j) =
    sum_i (G_i.v_j + c_i) f(q_i), dv_j = sum_i w_ij G_i, over the pairs that see each other; a sweep forward and one backward.
    Sums are computed anew: extra memory O(D E + N) a thread, O(N F) for "exp", "favor" and "softmax". About 2.5 times the
    forward's flops.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> q = k = np.zeros((1, 3, 2))
    >>> v = np.array([[[3.0], [5.0], [1.0]]])
    >>> y = fastops.linear_attention(q, k, v, causal=True)
    >>> dq, dk, dv = fastops.linear_attention_backward(np.ones_like(y), q, k, v, y, causal=True)
    >>> dv[0, :, 0].round(4)
    array([1.8333, 0.8333, 0.3333])
    """
    p = Problem(layout, q, k, v, dy=dy, y=y)
    options = _attention.linear_options(p.d, p.wide, causal, feature_map, normalize, eps, kernel_eps, scale, projection)
    mask, offsets, g, state = _conditions(p, options, key_mask, cu_seqlens, decay, initial_state)
    d_last = p.state("d_state", d_state, options, offsets, parts=2)
    gradients = p.gradients()
    d_first = None if state is None else p.new_state(options, offsets)[:2]
    d_initial = None if d_first is None else p.backend_state(d_first)
    qq, kk, vv, d, result = p.arrays
    if p.b * p.hq:
        _backend.linear_attention_backward(
            d, qq, kk, vv, result, *gradients, options, mask, offsets, g, state, d_last, d_initial
        )
    dq, dk, dv = (p.given(x) for x in gradients)
    return (dq, dk, dv) if d_first is None else (dq, dk, dv, d_first)


def softmax_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    causal: bool = False,
    key_mask: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    scale: float | None = None,
    logn: str | ArrayLike | None = None,
    layout: str = "bhnd",
    out: AnyArray | None = None,
) -> AnyArray:
    """Attend with softmax weights, exactly, without an array of N x M.

    Parameters
    ----------
    q : (..., H, N, D) or (N, D) array_like of float16, bfloat16, float32 or float64
        Queries; arrays, layouts, masks and heads as in `linear_attention`.
    k : (..., H_kv, M, D) or (M, D) array_like
        Keys.
    v : (..., H_kv, M, E) or (M, E) array_like
        Values.
    causal : bool
        Row i sees the keys j <= i + M - N.
    key_mask : (..., M) or (..., H_kv, M) bool array_like, optional
        True where a key counts.
    cu_seqlens : (S + 1,) int array_like, optional
        Offsets of S sequences packed along N.
    scale : float, optional
        Factor of q.k, D**-0.5 by default.
    logn : "keys" or array_like that broadcasts to (..., H, N), optional
        A further factor of each row's logits: "keys" is `logn_scale` of the number of keys that the row sees.
    layout : {"bhnd", "bnhd"}
        "bnhd": q, k, v and the result are (..., N, H, D).
    out : ndarray, optional
        Where the result goes.

    Returns
    -------
    (..., H, N, E) ndarray
        Of the common dtype of q, k and v. A row without keys is 0.

    Raises
    ------
    TypeError
        Integer or complex arrays, float16 with bfloat16, a mask that is not bool.
    ValueError
        Shapes that do not fit, a mask of pairs (N, M), an `out` that is read-only or overlaps an argument.

    Notes
    -----
    y_i = sum_j softmax_j(scale logn_i q_i.k_j) v_j with a running maximum. 2 (D + E) flops a pair of row and visible key; extra
    memory O(D + E) a thread for each row of a block.
    Milakov and Gimelshein, arXiv:1805.02867; Su Jianlin, kexue.fm/archives/8823 (logn).

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> x = np.eye(2)
    >>> fastops.softmax_attention(x, x, x, scale=np.log(3.0)).round(6)
    array([[0.75, 0.25],
           [0.25, 0.75]])
    """
    p = Problem(layout, q, k, v)
    causal = _validate.boolean("causal", causal)
    factor = p.d**-0.5 if scale is None else _validate.number("scale", scale, -np.inf, open_low=True)
    mask = p.key_mask(key_mask)
    offsets = p.offsets(cu_seqlens)
    factors = None
    if isinstance(logn, str):
        _validate.choice("logn", logn, ("keys",))
        factors = _attention.row_factors(p, np.asarray(logn_scale(_attention.visible_keys(p, causal, mask, offsets))))
    elif logn is not None:
        factors = _attention.given_factors(p, logn)
    y, written, given = p.output(out)
    if p.b * p.hq:
        _backend.softmax_attention(*p.arrays, written, causal, factor, mask, offsets, factors)
    _attention.settle(written, given)
    return y


class NystromInfo(NamedTuple):
    """What `nystrom_attention` tells of each head with ``return_info=True``; nan where attention was exact.

    Parameters
    ----------
    residual : (..., H) ndarray
        \\|AZA - A\\| / \\|A\\| in Frobenius norms: 0 for a pseudo-inverse, which Z is not meant to be.
    coefficient : (..., H) ndarray
        1 / (largest column sum * largest row sum) of A, with which Z began or by which the ridge was divided.
    row_sum_min : (..., H) ndarray
        The smallest sum of a row's weights; exact attention has 1. 0 without keys, nan without queries.
    row_sum_max : (..., H) ndarray
        The largest.

    Raises
    ------
    TypeError
        Fewer or more than four parts.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> x = np.zeros((1, 8, 4))
    >>> _, info = fastops.nystrom_attention(x, x, x, num_landmarks=2, return_info=True)
    >>> info.coefficient
    array([1.])
    """

    residual: AnyArray
    coefficient: AnyArray
    row_sum_min: AnyArray
    row_sum_max: AnyArray


def nystrom_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    num_landmarks: int = 64,
    iterations: int = 6,
    pinv: str = "newton",
    ridge: float | None = None,
    scale: float | None = None,
    key_mask: ArrayLike | None = None,
    conv_weight: ArrayLike | None = None,
    landmarks: Sequence[ArrayLike] | None = None,
    init: str = "matrix",
    normalize: bool = False,
    causal: bool = False,
    layout: str = "bhnd",
    out: AnyArray | None = None,
    return_info: bool = False,
) -> Any:
    """Approximate softmax attention through landmarks, the means of segments, at a cost that grows linearly with the length.

    Parameters
    ----------
    q : (..., H, N, D) or (N, D) array_like of float16, bfloat16, float32 or float64
        Queries; arrays, layouts and heads as in `linear_attention`.
    k : (..., H_kv, M, D) or (M, D) array_like
        Keys; H is a multiple of H_kv.
    v : (..., H_kv, M, E) or (M, E) array_like
        Values.
    num_landmarks : int
        Segments m of queries and of keys, 1 to 4096. A sample with at most m queries or keys gets exact softmax attention.
    iterations : int
        Steps of the iteration towards the inverse of A. More is not better, and from some 150 on rounding can make everything nan: see the
        notes. Of no effect with pinv="ridge".
    pinv : {"newton", "ridge"}
        How A is inverted: by that iteration, or in closed form with a ridge, about as exact, and faster from
        some hundred landmarks on.
    ridge : float, optional
        With pinv="ridge" only: what is added, relative to the norms of A. 1/1178 by default, about what six steps do to small
        singular values.
    scale : float, optional
        Factor of q.k, D**-0.5 by default.
    key_mask : (..., M) bool array_like, optional
        True where a key counts, for all heads. Where N = M it holds for queries too, and the rows of others are 0. Segments are
        cut of what counts, so that padding changes nothing.
    conv_weight : (H, taps) array_like, optional
        Weights of a convolution of v along N that is added to each head, an odd number; with N = M.
    landmarks : tuple of (..., H, m, D) and (..., H_kv, m, D) array_like, optional
        Landmarks of q and of k in place of the means, heads first in every layout; `num_landmarks` is not looked at then, and
        attention is never exact.
    init : {"matrix", "batch"}
        The coefficient with which the iteration begins: of each matrix, or one of all in the call, as the models of the paper's
        authors and of Hugging Face have it; then heads and samples depend on each other.
    normalize : bool
        Divide each row by the sum of its weights, which is 1 only about.
    causal : bool
        Must be False: the means of segments hold keys that come after a row.
    layout : {"bhnd", "bnhd"}
        "bnhd": q, k, v and the result are (..., N, H, D).
    out : ndarray, optional
        Where the result goes.
    return_info : bool
        Return a `NystromInfo` too.

    Returns
    -------
    y : (..., H, N, E) ndarray
        Of the common dtype of q, k and v.
    info : NystromInfo
        With `return_info`: residual, coefficient and sums of weights of each head, float32 (float64 for float64).

    Raises
    ------
    TypeError
        Integer or complex arrays, float16 with bfloat16, a mask that is not bool.
    ValueError
        Shapes that do not fit, numbers out of range, an even number of taps, options that exclude each other, an `out` that is
        read-only or overlaps an argument. Nothing was written.
    NotImplementedError
        ``causal=True``.

    Notes
    -----
    y = P1 Z (P3 v), P1 = softmax(s q Kt^T), A = softmax(s Qt Kt^T), P3 = softmax(s Qt k^T), s the scale, Qt and Kt the means of
    m segments of as equal lengths as can be, later ones the longer. Z begins as A^T / (\\|A\\|_1 \\|A\\|_inf), and a step takes
    it to Z (13 I - AZ (15 I - AZ (7 I - AZ))) / 4: small singular values grow 3.25 times, so six steps invert those above about
    0.03 sqrt(\\|A\\|_1) and leave the noise of the others. A true pseudo-inverse is often worse than the mean of v. With "ridge"
    Z = (A^T A + ridge \\|A\\|_1 \\|A\\|_inf I)^-1 A^T.
    Good where queries and keys change smoothly along the sequence or lie in few directions; of random ones it is no better than
    the mean of v. Landmarks, A, Z and sums are in float32 (float64 for float64; A and Z also beyond 8 iterations). nan and inf
    stay in their head. 4 N m (D + E) + 48 m**3 flops a head; extra memory O(m (m + D + E)) a thread.
    Xiong et al., "Nystromformer", AAAI 2021, arXiv:2102.03902; Su Jianlin, kexue.fm/archives/8180.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> t = np.linspace(0, 3, 1000)
    >>> q = k = 3 * np.stack([np.cos(t), np.sin(t)], axis=1)
    >>> y = fastops.nystrom_attention(q, k, k, num_landmarks=16)
    >>> exact = fastops.softmax_attention(q, k, k)
    >>> bool(np.abs(y - exact).max() < 0.03 * np.abs(exact).max())
    True
    """
    p = Problem(layout, q, k, v)
    options, extras = _nystrom.prepare(
        p, num_landmarks, iterations, pinv, ridge, scale, key_mask, conv_weight, landmarks, init, normalize, causal
    )
    told = _validate.boolean("return_info", return_info)
    y, written, given = p.output(out)
    info = np.empty((p.b, p.hq, 4), p.wide) if told else None
    if p.b * p.hq:
        _backend.nystrom_attention(*p.arrays, written, options, *extras, info)
    _attention.settle(written, given)
    if info is None:
        return y
    shape = (*p.batch, p.hq) if p.heads else ()
    return y, NystromInfo(*(np.array(info[..., i]).reshape(shape) for i in range(4)))


def nystrom_attention_backward(
    dy: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    num_landmarks: int = 64,
    iterations: int = 6,
    pinv: str = "newton",
    ridge: float | None = None,
    scale: float | None = None,
    key_mask: ArrayLike | None = None,
    conv_weight: ArrayLike | None = None,
    landmarks: Sequence[ArrayLike] | None = None,
    init: str = "matrix",
    normalize: bool = False,
    causal: bool = False,
    layout: str = "bhnd",
    return_d_landmarks: bool = False,
) -> tuple[Any, ...]:
    """Differentiate `nystrom_attention` with respect to q, k, v, the weights of the convolution and given landmarks.

    Parameters
    ----------
    dy : (..., H, N, E) array_like of float16, bfloat16, float32 or float64
        The gradient of the result.
    q : (..., H, N, D) array_like
        As in the forward call, as are all options.
    k : (..., H_kv, M, D) array_like
        Keys.
    v : (..., H_kv, M, E) array_like
        Values.
    num_landmarks : int
        As `nystrom_attention`.
    iterations : int
        As `nystrom_attention`.
    pinv : {"newton", "ridge"}
        As `nystrom_attention`.
    ridge : float, optional
        As `nystrom_attention`.
    scale : float, optional
        As `nystrom_attention`.
    key_mask : bool array_like, optional
        As `nystrom_attention`; what does not count gets gradients of 0.
    conv_weight : (H, taps) array_like, optional
        As `nystrom_attention`.
    landmarks : tuple of two array_like, optional
        As `nystrom_attention`; constants unless their gradients are asked for.
    init : {"matrix", "batch"}
        As `nystrom_attention`; the coefficient of a batch counts as a constant.
    normalize : bool
        As `nystrom_attention`.
    causal : bool
        Must be False.
    layout : {"bhnd", "bnhd"}
        As `nystrom_attention`.
    return_d_landmarks : bool
        Return the gradients of given landmarks too.

    Returns
    -------
    dq, dk, dv : ndarrays
        Of the shapes of q, k and v and their common dtype.
    d_conv_weight : (H, taps) ndarray
        Only with `conv_weight`: float32 (float64 for float64).
    d_landmarks : tuple of (..., H, m, D) and (..., H_kv, m, D) ndarray
        Only with `return_d_landmarks`: float32 (float64 for float64).

    Raises
    ------
    TypeError
        As `nystrom_attention`.
    ValueError
        As `nystrom_attention`.
    NotImplementedError
        As `nystrom_attention`.

    Notes
    -----
    Every step of the iteration is differentiated, and so is the coefficient that it begins with: taking Z for the inverse that it
    is not, or for a constant, is wrong by 2 to 48 %. About 2.5 times the forward's flops. Extra memory of each thread: some
    4 m (m (iterations + 15) + 10 (D + E)) bytes (8 in place of 4 for float64), and where float32 or float64 rows are not whole
    vectors (multiples of 8 or 4 numbers, half of that in level v2, twice in v4), and for half precision, rows of dq, dk and dv
    of one head in the type of the sums, 4 (N D + M (D + E)) bytes. The first part does not grow with the length.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> x = np.zeros((8, 4))
    >>> dq, dk, dv = fastops.nystrom_attention_backward(np.ones_like(x), x, x, x, num_landmarks=2, iterations=0)
    >>> dv[:2]
    array([[1., 1., 1., 1.],
           [1., 1., 1., 1.]])
    """
    p = Problem(layout, q, k, v, dy=dy)
    options, extras = _nystrom.prepare(
        p, num_landmarks, iterations, pinv, ridge, scale, key_mask, conv_weight, landmarks, init, normalize, causal
    )
    told = _validate.boolean("return_d_landmarks", return_d_landmarks)
    if told and landmarks is None:
        raise _validate.wrong_value("return_d_landmarks", "False without landmarks", told)
    gradients = p.gradients()
    d_taps = None if extras.conv_weight is None else np.zeros(extras.conv_weight.shape, p.wide)
    d_landmarks = [np.zeros(x.shape, p.wide) if told and x is not None else None for x in extras[2:]]
    qq, kk, vv, d = p.arrays
    if p.b * p.hq:
        own = (extras.key_mask, extras.conv_weight, d_taps, extras.q_landmarks, extras.k_landmarks)
        _backend.nystrom_attention_backward(d, qq, kk, vv, *gradients, options, *own, *d_landmarks)
    found: list[Any] = [p.given(x) for x in gradients]
    if d_taps is not None:
        found.append(d_taps)
    if told:
        found.append(
            tuple(x.reshape((*p.batch, *x.shape[1 if p.heads else 2 :])) for x in d_landmarks if x is not None)
        )
    return tuple(found)


def logn_scale(n: ArrayLike, *, base: float = 512, min_n: float = 16, clip: bool = False) -> Any:
    """Compute the factor of the logits that keeps attention's entropy from growing as fast with the number of keys.

    Parameters
    ----------
    n : array_like of numbers
        Numbers of keys: of each row, those that it sees.
    base : float
        The number of keys whose factor is 1, > 1: about the length of training.
    min_n : float
        Fewer count as so many, >= 1: log(1) = 0 would make weights uniform.
    clip : bool
        At least 1: only rows longer than `base` change.

    Returns
    -------
    float64 ndarray or scalar
        log(max(n, min_n)) / log(base), of the shape of `n`.

    Raises
    ------
    TypeError
        An `n` that is not of real numbers.
    ValueError
        A `base` or `min_n` out of range.

    Notes
    -----
    Su Jianlin, kexue.fm/archives/8823 (base 512) and 9034. Multiplies scale D**-0.5; see `softmax_attention` with
    ``logn="keys"``.

    Examples
    --------
    >>> import fastops
    >>> fastops.logn_scale([8, 512, 4096]).round(4)
    array([0.4444, 1.    , 1.3333])
    """
    counts = _validate.array("n", n)
    if counts.dtype.kind not in "iuf" and counts.dtype not in _validate.FLOAT_DTYPES:
        raise _validate.wrong_type("n", "of real numbers", Text(_validate.clip(str(counts.dtype), 40)))
    low = _validate.number("min_n", min_n, 1.0)
    divisor = math.log(_validate.number("base", base, 1.0, open_low=True))
    factors = np.log(np.maximum(counts.astype(np.float64), low)) / divisor
    return np.maximum(factors, 1.0) if _validate.boolean("clip", clip) else factors


def favor_projection(D: int, m: int, *, rng: int | np.random.Generator | None = None) -> AnyArray:
    """Draw random directions for ``feature_map="favor"``: orthogonal in blocks of D, with the lengths of normal vectors.

    Parameters
    ----------
    D : int
        Numbers in a row of q and k.
    m : int
        Features; more approximate softmax better. 256 suit D = 64 and entries of a standard deviation up to 1/2.
    rng : int or numpy.random.Generator, optional
        A seed or a generator; a fresh one by default.

    Returns
    -------
    (m, D) float64 ndarray
        Rows of random orthogonal matrices, each times the length of a normal vector of its own.

    Raises
    ------
    TypeError
        A D or m that is not an integer, an rng of another type.
    ValueError
        A D, m or seed out of range.

    Notes
    -----
    Choromanski et al., "Rethinking attention with Performers", ICLR 2021. m D min(m, D) flops and 3 m D numbers of memory.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> w = fastops.favor_projection(4, 6, rng=0)
    >>> w.shape
    (6, 4)
    >>> bool(abs(w[0] @ w[1]) < 1e-12)
    True
    """
    d = _validate.integer("D", D, 1)
    rows = _validate.integer("m", m, 1)
    seed = rng if rng is None or isinstance(rng, np.random.Generator) else _validate.integer("rng", rng, 0, 2**64 - 1)
    generator = np.random.default_rng(seed)
    _validate.fits_memory("D and m", (rows + d, d), 8)
    blocks = -(-rows // d)
    orthogonal, triangle = np.linalg.qr(generator.standard_normal((blocks, d, d)))
    # Without these signs the directions would not be uniform (Mezzadri 2007).
    orthogonal *= np.sign(np.diagonal(triangle, axis1=1, axis2=2))[:, np.newaxis]
    lengths = np.sqrt(generator.chisquare(d, rows))
    return np.ascontiguousarray(orthogonal.reshape((blocks * d, d))[:rows] * lengths[:, np.newaxis])
