# SPDX-License-Identifier: BSD-3-Clause
"""Linear, Nystrom and softmax attention as differentiable operations of jax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _attention, _decay, _nystrom, _validate, attention
from .._attention import Problem
from .._validate import AnyArray, Text
from . import _ops
from ._ops import Shape, Spec, given, spec, stand_in

__all__ = ["linear_attention", "linear_attention_step", "nystrom_attention", "softmax_attention"]


def _wide(dtype: Any) -> np.dtype[Any]:
    """The dtype of features, sums and states."""
    return _attention.compute_dtype(np.dtype(dtype))


class Arrays(NamedTuple):
    """What linear attention takes beyond q, k and v, in one form.

    projection (m, D); key_mask (B, H_kv or 1, M); cu_seqlens (S + 1,); decay (B or 1, H_kv, M or 1); S (B, H_kv, F, E); z and m
    (B, H_kv, F), of a state of packed sequences (S, H_kv, ...).
    """

    projection: Any = None
    key_mask: Any = None
    cu_seqlens: Any = None
    decay: Any = None
    s: Any = None
    z: Any = None
    m: Any = None


_RANKS = Arrays(2, 3, 1, 3, 4, 3, 3)


class Options(NamedTuple):
    """What is fixed when linear attention is traced: the options as they were given."""

    causal: bool
    feature_map: str
    normalize: bool | None
    eps: float
    kernel_eps: float | None
    scale: float | None
    layout: str
    with_state: bool
    route: str

    @property
    def named(self) -> dict[str, Any]:
        """The arguments of the functions for arrays."""
        return dict(zip(self._fields[:7], self[:7], strict=True))


def _heads(x: Any) -> Any:
    """(..., H, N, D) or (N, D) as four axes, in the order of the layout."""
    return x.reshape((math.prod(x.shape[:-3]), *(x.shape[-3:] if x.ndim > 2 else (1, *x.shape))))


def _axis(layout: str) -> int:
    return 2 if layout == "bnhd" else 1


# --- checks ------------------------------------------------------------------------------------------------------------------------


def _triple(q: Any, k: Any, v: Any) -> list[Any]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _ops.is_array(x):
            raise _validate.wrong_type(name, "a jax.Array", x)
    return _ops.floats(q=q, k=k, v=v)


def _offsets_like(x: Spec, total: int) -> Any:
    """Offsets of the shape and dtype of `x` that pass where any do."""
    if x is None or len(x[0]) != 1 or x[1].kind not in "iu" or not x[0][0] or total > np.iinfo(x[1]).max:
        return stand_in(x)
    found = np.zeros(x[0], x[1])
    found[-1] = total
    return found


def _problem(layout: object, q: Spec, k: Spec, v: Spec) -> Problem:
    return Problem(layout, *(stand_in(x) for x in (q, k, v)))


def _parts(name: str, state: object) -> tuple[Any, Any, Any]:
    """S, z and m of a state."""
    return _attention.state_parts(name, state, _ops.is_array, "a jax.Array")


def _check_linear(
    q: Spec,
    k: Spec,
    v: Spec,
    projection: Spec,
    key_mask: Spec,
    cu_seqlens: Spec,
    decay: Spec,
    state: tuple[Spec, ...] | None,
    causal: Any,
    feature_map: Any,
    normalize: Any,
    eps: Any,
    kernel_eps: Any,
    scale: Any,
    layout: Any,
    return_state: Any,
) -> None:
    p = _problem(layout, q, k, v)
    options = _attention.linear_options(
        p.d, p.wide, causal, feature_map, normalize, eps, kernel_eps, scale, stand_in(projection)
    )
    _validate.boolean("return_state", return_state)
    p.key_mask(stand_in(key_mask))
    offsets = p.offsets(_offsets_like(cu_seqlens, p.nk))
    p.decay(stand_in(decay), options)
    if state is not None:
        _attention.state_arrays("initial_state", [stand_in(x) for x in state], p.state_shapes(options, offsets), p.wide)
    for shape in p.state_shapes(options, offsets):
        _validate.fits_memory("q, k and v", shape, p.wide.itemsize)


def _check_softmax(
    q: Spec, k: Spec, v: Spec, key_mask: Spec, cu_seqlens: Spec, logn: Spec, causal: Any, scale: Any, layout: Any
) -> None:
    p = _problem(layout, q, k, v)
    _validate.boolean("causal", causal)
    if scale is not None:
        _validate.number("scale", scale, -np.inf, open_low=True)
    p.key_mask(stand_in(key_mask))
    p.offsets(_offsets_like(cu_seqlens, p.nk))
    if logn is not None:
        _attention.given_factors(p, stand_in(logn))


def _check_nystrom(
    q: Spec, k: Spec, v: Spec, key_mask: Spec, conv_weight: Spec, landmarks: tuple[Spec, ...] | None, *options: Any
) -> None:
    *before, init, normalize, layout = options
    p = _problem(layout, q, k, v)
    marks = None if landmarks is None else tuple(stand_in(x) for x in landmarks)
    count, iterations, pinv, ridge, scale = before
    mask, taps = stand_in(key_mask), stand_in(conv_weight)
    _nystrom.prepare(p, count, iterations, pinv, ridge, scale, mask, taps, marks, init, normalize, False)


def _check_step(
    q: Spec, k: Spec, v: Spec, state: tuple[Spec, ...], projection: Spec, decay: Spec, *options: Any
) -> None:
    # Memory that is never touched.
    parts = tuple(np.empty(*x) for x in state if x is not None)
    given = (*options, stand_in(projection))
    _attention.prepare_step(stand_in(q), stand_in(k), stand_in(v), None, stand_in(decay), parts, given)


def _once(check: Any) -> Any:
    """A check that is not made again for what has passed; options without a hash are its own to refuse."""
    passed = lru_cache(maxsize=256, typed=True)(check)

    def cached(*args: Any) -> None:
        try:
            hash(args)
        except TypeError:
            check(*args)
        else:
            passed(*args)

    return cached


_linear_fits, _softmax_fits, _nystrom_fits, _step_fits = map(
    _once, (_check_linear, _check_softmax, _check_nystrom, _check_step)
)


def _check_values(cu_seqlens: Any, decay: Any, total: int) -> None:
    """The values of arguments that are there before anything runs; those of a trace are checked when they come."""
    if _ops.is_known(cu_seqlens):
        _attention.check_offsets(np.asarray(cu_seqlens), total)
    if _ops.is_known(decay):
        logs = np.asarray(decay)
        if np.count_nonzero(logs <= 0) != logs.size:
            raise _validate.wrong_value(
                "decay", "<= 0 everywhere, the logarithm of a factor", Text("positive ones or nan")
            )


def _number(value: Any) -> Any:
    """A checked number as one that can be hashed."""
    return value if value is None else float(value)


# --- linear attention --------------------------------------------------------------------------------------------------------------


def _resolved(options: Options, d: int, dtype: Any, projection: Any) -> _attention.LinearOptions:
    name, given = options.feature_map, options[3:6]
    w = None if projection is None else stand_in(spec(projection))
    return _attention.linear_options(d, _wide(dtype), options.causal, name, options.normalize, *given, w)


def _attributes(options: Options, q: Any, more: Arrays) -> dict[str, Any]:
    """The options as handlers take them."""
    o = _resolved(options, q.shape[-1], q.dtype, more.projection)
    flags = {"feature_map": MAPS.index(o.feature_map), "causal": o.causal, "normalize": o.normalize}
    return {
        **{name: np.int32(x) for name, x in flags.items()},
        "tokens_first": np.int32(options.layout == "bnhd"),
        **{name: np.float64(getattr(o, name)) for name in ("eps", "kernel_eps", "scale")},
    }


# In the order of fastops_feature_map.
MAPS = ("elu", "relu", "relu2", "identity", "cosine", "exp", "favor", "softmax")


def _for_handlers(options: Options, k: Any, more: Arrays) -> Arrays:
    """The arrays beyond q, k and v as handlers read them."""
    if options.route == "callback":
        return more
    decay = more.decay
    if decay is not None:
        decay = jnp.broadcast_to(decay, (k.shape[0], *decay.shape[1:]))
    return more._replace(decay=decay, cu_seqlens=_plain_offsets(more.cu_seqlens))


def _plain_offsets(x: Any) -> Any:
    """Offsets of a dtype that handlers read."""
    return x if x is None or x.dtype in (np.int32, np.int64) else x.astype(np.int32)


def _conditions(options: Options, k: AnyArray, more: Arrays) -> dict[str, Any]:
    """The arguments of the functions for arrays, of arrays with any leading axes."""
    mask, decay, axis = more.key_mask, more.decay, _axis(options.layout)
    if mask is not None and mask.shape[-2] == 1:
        mask = mask[..., 0, :]
    if decay is not None:
        heads, rows = (k.shape[-2], k.shape[-3]) if axis == 2 else (k.shape[-3], k.shape[-2])
        decay = np.broadcast_to(decay, (*k.shape[:-3], heads, rows))
    state = tuple(x for x in more[4:] if x is not None) or None
    return {
        **options.named,
        "projection": more.projection,
        "key_mask": mask,
        "cu_seqlens": more.cu_seqlens,
        "decay": decay,
        "initial_state": state,
    }


def _samples(axes: tuple[int, ...], operands: Sequence[Any], ranks: Sequence[int], more: Sequence[Any]) -> Any:
    """Operands and `Arrays` with the samples' axes in full; None where they cannot be one call."""
    found = Arrays(*more)
    if found.cu_seqlens is not None or not _ops.is_shared(found.projection, 2):
        return None
    full = [None if x is None else _ops.spread(x, axes, rank) for x, rank in zip(operands, ranks, strict=True)]
    rest = [None if x is None else _ops.spread(x, axes, rank) for x, rank in zip(found, _RANKS, strict=True)]
    return full, Arrays(*rest)._replace(projection=_ops.alone(found.projection, 2))


def _state_shapes(options: Options, q: Any, k: Any, v: Any, more: Arrays) -> list[Shape]:
    o = _resolved(options, q.shape[-1], q.dtype, more.projection)
    batch = k.shape[0] if more.cu_seqlens is None else more.cu_seqlens.shape[0] - 1
    z = (batch, k.shape[_axis(options.layout)], o.features(q.shape[-1]))
    return [Shape(x, _wide(q.dtype)) for x in ((*z, v.shape[-1]), *[z] * (o.parts - 1))]


def _linear_forward(q: Any, k: Any, v: Any, more: Arrays, options: Options) -> list[Any]:
    def one(q: AnyArray, k: AnyArray, v: AnyArray, *rest: Any) -> list[AnyArray]:
        given = _conditions(options, k, Arrays(*rest))
        found = attention.linear_attention(q, k, v, **given, return_state=options.with_state)
        return [found[0], *found[1]] if options.with_state else [found]

    def many(axes: tuple[int, ...], *arrays: Any) -> list[AnyArray] | None:
        full = _samples(axes, arrays[:3], (4, 4, 4), arrays[3:])
        return None if full is None else one(*full[0], *full[1])

    results = [Shape((*q.shape[:-1], v.shape[-1]), q.dtype)]
    if options.with_state:
        results += _state_shapes(options, q, k, v, more)
    attributes = _attributes(options, q, more)
    operands = (q, k, v, *_for_handlers(options, k, more))
    target = "fastops_linear_attention"
    return _ops.call(options.route, target, attributes, one, results, *operands, many=many, spread_out=True)


@_ops.refuse_twice("linear_attention")
def _linear_backward(options: Options, *operands: Any) -> list[Any]:
    """dq, dk, dv, and dS and dz where there is an initial state."""

    def one(dy: Any, ds: Any, dz: Any, q: Any, k: Any, v: Any, y: Any, *rest: Any) -> list[AnyArray]:
        given = _conditions(options, k, Arrays(*rest))
        d_state = None if ds is None else (ds, dz)
        found = attention.linear_attention_backward(dy, q, k, v, y, **given, d_state=d_state)
        return [*found[:3], *(found[3] if len(found) > 3 else ())]

    def many(axes: tuple[int, ...], *arrays: Any) -> list[AnyArray] | None:
        full = _samples(axes, arrays[:7], (4, 4, 3, 4, 4, 4, 4), arrays[7:])
        return None if full is None else one(*full[0], *full[1])

    q, k, v, more = *operands[3:6], Arrays(*operands[7:])
    first = [Shape(x.shape, x.dtype) for x in (more.s, more.z) if x is not None]
    attributes = _attributes(options, q, more)
    operands = (*operands[:7], *_for_handlers(options, k, more))
    return _by_heads(
        options, "fastops_linear_attention_backward", attributes, one, (q, k, v), first, *operands, many=many
    )


def _by_heads(
    options: Any, target: str, attributes: Any, one: Any, like: Any, more: Any, *operands: Any, many: Any
) -> Any:
    """The gradients of q, k and v, which handlers write with heads first, and others after them."""
    turn = options.route == "ffi" and options.layout == "bnhd"
    shapes = [(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) if turn else x.shape for x in like]
    results = [*(Shape(shape, x.dtype) for shape, x in zip(shapes, like, strict=True)), *more]
    found = _ops.call(options.route, target, attributes, one, results, *operands, many=many, spread_out=True)
    return [x.swapaxes(1, 2) if turn and i < len(like) else x for i, x in enumerate(found)]


@_ops.refuse_twice("linear_attention")
def _decay_backward(options: Options, *operands: Any) -> Any:
    """The gradient of the decay, of its shape; by the callback on every route."""
    decay = operands[13]
    host = lambda *arrays: [_decay_gradient(options, arrays[:10], Arrays(*arrays[10:]))]
    return _ops.call(options.route, "", None, host, [Shape(decay.shape, decay.dtype)], *operands)[0]


def _decay_gradient(options: Options, operands: Sequence[Any], more: Arrays) -> AnyArray:
    if options.layout == "bnhd":
        options = options._replace(layout="bhnd")
        operands = [x if i in (1, 2, 8, 9) else x.swapaxes(1, 2) for i, x in enumerate(operands)]
    return _decay.summed(_decay.gradient(_conditions(options, operands[4], more), operands), more.decay.shape)


def _linear_gradients(
    options: Options, q: Any, k: Any, v: Any, more: Arrays, y: Any, last: Any, cotangents: Any, of_decay: bool
) -> tuple[Any, ...]:
    """The cotangents of q, k, v and of `more`; `last` are S and z of the state that was returned."""
    dy, *d_state = cotangents
    ds = dz = None
    if any(not _ops.is_zero(x) for x in d_state[:2]):
        ds, dz = (_ops.solid(x) for x in d_state[:2])
    dy = _ops.solid(dy)
    dq, dk, dv, *first = _linear_backward(options, dy, ds, dz, q, k, v, y, *more)
    d_decay = None
    if of_decay:
        states = (None, None) if ds is None else last[:2]
        d_decay = _decay_backward(options, dy, ds, dz, q, k, v, y, dv, *states, *more)
    s, z = first or (None, None)
    return dq, dk, dv, Arrays(decay=d_decay, s=s, z=z)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _linear(q: Any, k: Any, v: Any, more: Arrays, options: Options) -> list[Any]:
    return _linear_forward(q, k, v, more, options)


def _forward_rule(operation: Callable[..., list[Any]]) -> Callable[..., Any]:
    """What keeps for the gradient what the operation and its result are made of."""

    def forward(q: Any, k: Any, v: Any, more: Arrays, options: Options) -> Any:
        refused = more.decay if options.feature_map == "exp" else None
        _ops.without_gradient(projection=more.projection, decay=refused)
        of_decay = more.decay is not None and more.decay.perturbed
        q, k, v, more = _ops.values((q, k, v, more))
        y, *last = operation(q, k, v, more, options)
        # Trees without leaves say what is known when it is traced.
        return [y, *last], (q, k, v, more, y, last if of_decay else [], () if of_decay else None)

    return forward


def _linear_bwd(options: Options, kept: Any, cotangents: Any) -> Any:
    q, k, v, more, y, last, of_decay = kept
    return _linear_gradients(options, q, k, v, more, y, last, cotangents, of_decay is not None)


_linear.defvjp(_forward_rule(_linear), _linear_bwd, symbolic_zeros=True)


def _one_form(q: Any, k: Any, more: Arrays, axis: int) -> Arrays:
    """The arrays beyond q, k and v as `Arrays` says, of the four axes of k, and q's own of the call."""
    b, h, dtype = k.shape[0], k.shape[axis], _wide(q.dtype)
    rows = k.shape[3 - axis]
    found = [None if x is None else jnp.asarray(x) for x in more]
    w, mask, offsets, decay, *state = found
    if mask is not None:
        mask = mask.reshape((b, 1 if mask.ndim < q.ndim - 1 else h, rows))
    if decay is not None:
        per_token = decay.ndim > 1 or (q.ndim == 2 and decay.shape == (rows,))
        decay = decay.astype(dtype).reshape((b, h, rows) if per_token else (1, h, 1))
    w = None if w is None else w.astype(dtype)
    lead = (b if offsets is None else offsets.shape[0] - 1, h)
    state = [None if x is None else x.reshape((*lead, *x.shape[-2 + (i > 0) :])) for i, x in enumerate(state)]
    if state[2] is not None:
        # S and z have their gradients at this m.
        state[2] = jax.lax.stop_gradient(state[2])
    return Arrays(w, mask, offsets, decay, *state)


@partial(jax.jit, static_argnums=(4,))
def _linear_call(q: Any, k: Any, v: Any, more: Arrays, options: Options) -> Any:
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    heads = [_heads(x) for x in (q, k, v)]
    y, *state = _linear(*heads, _one_form(q, heads[1], more, _axis(options.layout)), options)
    y = y.reshape((*q.shape[:-1], v.shape[-1]))
    if not options.with_state:
        return y
    lead = q.shape[:-3] if more.cu_seqlens is None else (more.cu_seqlens.shape[0] - 1,)
    lead += (heads[1].shape[_axis(options.layout)],) if q.ndim > 2 else ()
    return y, _state_out(state, lead)


def _state_out(state: Sequence[Any], lead: tuple[int, ...]) -> tuple[Any, ...]:
    """A state with its batch as the caller has it."""
    s, *rest = (x.reshape((*lead, *x.shape[2:])) for x in state)
    return (s, *rest[:1], *(jax.lax.stop_gradient(m) for m in rest[1:]))


def linear_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    feature_map: str = "elu",
    normalize: bool | None = None,
    eps: float = 0.0,
    kernel_eps: float | None = None,
    scale: float | None = None,
    projection: Any = None,
    key_mask: Any = None,
    cu_seqlens: Any = None,
    decay: Any = None,
    initial_state: Sequence[Any] | None = None,
    return_state: bool = False,
    layout: str = "bhnd",
) -> Any:
    """Attend with weights f(q).f(k), at a cost that grows linearly with the length: for arrays, with gradients.

    Parameters
    ----------
    q : (..., H, N, D) or (N, D) Array of float16, bfloat16, float32 or float64
        Queries.
    k : (..., H_kv, M, D) or (M, D) Array
        Keys.
    v : (..., H_kv, M, E) or (M, E) Array
        Values.
    causal : bool
        As in `fastops.linear_attention`, as are all options.
    feature_map : {"elu", "relu", "relu2", "identity", "exp", "softmax", "favor", "cosine"}
        What turns rows into features.
    normalize : bool, optional
        Divide by the sum of the weights.
    eps : float
        Added to that sum.
    kernel_eps : float, optional
        Added to the features of "relu" and "relu2".
    scale : float, optional
        Within the exponent or of the weights.
    projection : (m, D) Array, optional
        The directions of "favor"; it gets no gradient.
    key_mask : (..., M) or (..., H_kv, M) bool Array, optional
        True where a key counts.
    cu_seqlens : (S + 1,) int Array, optional
        Offsets of packed sequences.
    decay : (H_kv,) or (..., H_kv, M) Array, optional
        Logarithms <= 0 of the decay at each key. It gets a gradient, but with "exp" none.
    initial_state : tuple of Arrays, optional
        The sums to begin with; S and z get gradients.
    return_state : bool
        Return the sums over all keys too.
    layout : {"bhnd", "bnhd"}
        The order of heads and tokens.

    Returns
    -------
    y : (..., H, N, E) Array
        Of the common dtype.
    state : tuple of Arrays
        With `return_state`: S, z, and m for "exp", "softmax" and "favor", float32 (float64 for float64). m is not differentiable:
        it is where the gradients of S and z are taken.

    Raises
    ------
    TypeError
        As `fastops.linear_attention`; a derivative with respect to what gets no gradient.
    ValueError
        As `fastops.linear_attention`.
    NotImplementedError
        A second derivative.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from fastops.jax import linear_attention
    >>> q = k = jnp.zeros((1, 1, 3, 2))
    >>> v = jnp.array([3.0, 5.0, 1.0]).reshape(1, 1, 3, 1)
    >>> linear_attention(q, k, v, causal=True).ravel()
    Array([3., 4., 3.], dtype=float32)
    >>> jax.grad(lambda v: linear_attention(q, k, v, causal=True).sum())(v).ravel().round(4)
    Array([1.8333, 0.8333, 0.3333], dtype=float32)
    """
    q, k, v = _triple(q, k, v)
    named = {"projection": projection, "key_mask": key_mask, "cu_seqlens": cu_seqlens, "decay": decay}
    more = Arrays(*(given(name, x) for name, x in named.items()))
    if initial_state is not None:
        more = Arrays(*more[:4], *_parts("initial_state", initial_state))
    state = None if initial_state is None else tuple(spec(x) for x in initial_state)
    options = (causal, feature_map, normalize, eps, kernel_eps, scale, layout)
    _linear_fits(*map(spec, (q, k, v, *more[:4])), state, *options, return_state)
    _check_values(more.cu_seqlens, more.decay, k.shape[-3 if layout == "bnhd" else -2])
    numbers = (float(eps), _number(kernel_eps), _number(scale))
    divides = None if normalize is None else bool(normalize)
    fixed = Options(bool(causal), feature_map, divides, *numbers, layout, bool(return_state), _ops.route())
    return _linear_call(q, k, v, more, fixed)


# --- a step ------------------------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _step(q: Any, k: Any, v: Any, more: Arrays, options: Options) -> list[Any]:
    def one(q: AnyArray, k: AnyArray, v: AnyArray, *arrays: Any) -> list[AnyArray]:
        rest = Arrays(*arrays)
        state = tuple(np.array(x, order="C") for x in rest[4:] if x is not None)
        decay = None if rest.decay is None else np.broadcast_to(rest.decay, k.shape[:-1])
        given = options.named
        del given["causal"], given["layout"]
        y = attention.linear_attention_step_(q, k, v, state, projection=rest.projection, decay=decay, **given)
        return [y, *state]

    def many(axes: tuple[int, ...], *arrays: Any) -> list[AnyArray] | None:
        rest = Arrays(*arrays[3:])
        if not _ops.is_shared(rest.projection, 2):
            return None
        ranks = (3, 3, 3, 2, 3, 1, 2, 4, 3, 3)
        full: list[Any] = [
            None if x is None else _ops.spread(x, axes, rank) for x, rank in zip(arrays, ranks, strict=True)
        ]
        full[3] = _ops.alone(rest.projection, 2)
        return one(*full)

    states = [x for x in more[4:] if x is not None]
    results = [Shape((*q.shape[:-1], v.shape[-1]), q.dtype), *(Shape(x.shape, x.dtype) for x in states)]
    attributes = _attributes(options, q, more)
    operands = (q, k, v, *_for_handlers(options, k, more))
    # XLA may let the state after the token have the memory of the one before it.
    aliases = {7 + i: 1 + i for i in range(len(states))}
    target = "fastops_linear_attention_step"
    return _ops.call(
        options.route, target, attributes, one, results, *operands, many=many, spread_out=True, aliases=aliases
    )


def _step_bwd(options: Options, kept: Any, cotangents: Any) -> Any:
    """A step is the linear attention of one token."""
    q, k, v, more, y, last, of_decay = kept
    dy, *d_state = cotangents
    q, k, v, y, dy = (x[:, :, None] for x in (q, k, v, y, _ops.solid(dy)))
    if more.decay is not None:
        more = more._replace(decay=more.decay[..., None])
    found = _linear_gradients(options, q, k, v, more, y, last, (dy, *d_state), of_decay is not None)
    *first, rest = found
    if rest.decay is not None:
        rest = rest._replace(decay=rest.decay[..., 0])
    return (*(x[:, :, 0] for x in first), rest)


_step.defvjp(_forward_rule(_step), _step_bwd, symbolic_zeros=True)


@partial(jax.jit, static_argnums=(4,))
def _step_call(q: Any, k: Any, v: Any, more: Arrays, options: Options) -> Any:
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    rows = [x.reshape((math.prod(x.shape[:-2]), x.shape[-2] if x.ndim > 1 else 1, x.shape[-1])) for x in (q, k, v)]
    (b, h), dtype = rows[1].shape[:2], _wide(q.dtype)
    w, _, _, decay, *state = (None if x is None else jnp.asarray(x) for x in more)
    lead = (*q.shape[:-2], *k.shape[-2:-1])
    state = [None if x is None else x.reshape((b, h, *x.shape[len(lead) :])) for x in state]
    if state[2] is not None:
        state[2] = jax.lax.stop_gradient(state[2])
    if decay is not None:
        decay = decay.astype(dtype).reshape((b, h) if decay.ndim > 1 else (1, h))
    if w is not None:
        w = w.astype(dtype)
    y, *after = _step(*rows, Arrays(w, None, None, decay, *state), options)
    return y.reshape((*q.shape[:-1], v.shape[-1])), _state_out(after, lead)


def linear_attention_step(
    q: Any,
    k: Any,
    v: Any,
    state: Sequence[Any],
    *,
    feature_map: str = "elu",
    normalize: bool | None = None,
    eps: float = 0.0,
    kernel_eps: float | None = None,
    scale: float | None = None,
    projection: Any = None,
    decay: Any = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Take the next token of causal linear attention: the token's row and the state after it, for decoding in `jax.lax.scan`.

    Parameters
    ----------
    q : (..., H, D) or (D,) Array of float16, bfloat16, float32 or float64
        The token's queries.
    k : (..., H_kv, D) or (D,) Array
        Its keys.
    v : (..., H_kv, E) or (E,) Array
        Its values.
    state : tuple of Arrays
        As `linear_attention` with ``return_state=True`` gives it, or the last step; it stays as it is.
    feature_map : str
        As in `linear_attention`, as are the other options.
    normalize : bool, optional
        Divide by the sum of the weights.
    eps : float
        Added to that sum.
    kernel_eps : float, optional
        Added to the features of "relu" and "relu2".
    scale : float, optional
        Within the exponent or of the weights.
    projection : (m, D) Array, optional
        The directions of "favor"; it gets no gradient.
    decay : (H_kv,) or (..., H_kv) Array, optional
        Logarithms <= 0 of the token's decay. It gets a gradient, but with "exp" none.

    Returns
    -------
    y : (..., H, E) Array
        The row of the token, of the common dtype of q, k and v.
    state : tuple of Arrays
        The state after the token.

    Raises
    ------
    TypeError
        As `fastops.linear_attention_step_`; a derivative with respect to what gets no gradient.
    ValueError
        As `fastops.linear_attention_step_`.
    NotImplementedError
        A second derivative.

    Notes
    -----
    Values are those of `fastops.linear_attention_step_`, bit by bit. The gradient is that of `linear_attention` for one token.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from fastops.jax import linear_attention, linear_attention_step
    >>> nothing = jnp.zeros((1, 2, 0, 4))
    >>> _, state = linear_attention(nothing, nothing, nothing, causal=True, return_state=True)
    >>> def decode(state, x):
    ...     y, state = linear_attention_step(x, x, x, state)
    ...     return state, y
    >>> state, y = jax.lax.scan(decode, state, jnp.ones((5, 1, 2, 4)))
    >>> y.shape, state[1][0, 0]
    ((5, 1, 2, 4), Array([10., 10., 10., 10.], dtype=float32))
    """
    q, k, v = _triple(q, k, v)
    projection, decay = given("projection", projection), given("decay", decay)
    begin = _parts("state", state)
    options = (feature_map, normalize, eps, kernel_eps, scale)
    parts = tuple(spec(x) for x in state)
    _step_fits(*map(spec, (q, k, v)), parts, spec(projection), spec(decay), *options)
    _check_values(None, decay, 0)
    numbers = (float(eps), _number(kernel_eps), _number(scale))
    divides = None if normalize is None else bool(normalize)
    fixed = Options(True, feature_map, divides, *numbers, "bhnd", True, _ops.route())
    return _step_call(q, k, v, Arrays(projection, None, None, decay, *begin), fixed)


# --- softmax attention -------------------------------------------------------------------------------------------------------------

# Numbers that the gradient holds at once, of each of its arrays of rows and keys.
_BLOCK = 1 << 21


class SoftmaxOptions(NamedTuple):
    """What is fixed when softmax attention is traced."""

    causal: bool
    scale: float | None
    layout: str
    route: str


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _softmax(q: Any, k: Any, v: Any, key_mask: Any, cu_seqlens: Any, factors: Any, options: SoftmaxOptions) -> Any:
    """Of four axes, a mask (B, H_kv or 1, M) and factors (B, H, N)."""

    def one(q: AnyArray, k: AnyArray, v: AnyArray, key_mask: Any, cu_seqlens: Any, factors: Any) -> list[AnyArray]:
        if key_mask is not None and key_mask.shape[-2] == 1:
            key_mask = key_mask[..., 0, :]
        named: dict[str, Any] = {"causal": options.causal, "scale": options.scale, "layout": options.layout}
        return [attention.softmax_attention(q, k, v, key_mask=key_mask, cu_seqlens=cu_seqlens, logn=factors, **named)]

    def many(axes: tuple[int, ...], *arrays: Any) -> list[AnyArray] | None:
        if arrays[4] is not None:
            return None
        ranks = (4, 4, 4, 3, 1, 3)
        full: list[Any] = [
            None if x is None else _ops.spread(x, axes, rank) for x, rank in zip(arrays, ranks, strict=True)
        ]
        return one(*full)

    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    attributes = {
        "causal": np.int32(options.causal),
        "tokens_first": np.int32(options.layout == "bnhd"),
        "scale": np.float64(scale),
    }
    results = [Shape((*q.shape[:-1], v.shape[-1]), q.dtype)]
    offsets = _plain_offsets(cu_seqlens) if options.route == "ffi" else cu_seqlens
    operands, target = (q, k, v, key_mask, offsets, factors), "fastops_softmax_attention"
    return _ops.call(options.route, target, attributes, one, results, *operands, many=many, spread_out=True)[0]


def _softmax_fwd(*args: Any) -> Any:
    *arrays, options = args
    _ops.without_gradient(logn=arrays[5])
    arrays = _ops.values(arrays)
    y = _softmax(*arrays, options)
    return y, (*arrays, y)


def _softmax_bwd(options: SoftmaxOptions, kept: Any, dy: Any) -> Any:
    """With P the weights and d = sum(dy y) of a row: dS = P (dy V^T - d), dQ = dS K, dK = dS^T Q, dV = P^T dy, by blocks of rows.

    Dao et al., "FlashAttention", NeurIPS 2022, appendix B.4. In jax's own operations, so that it can be differentiated again.
    """
    q, k, v, key_mask, cu_seqlens, factors, y = kept
    dtype, wide = q.dtype, _wide(q.dtype)
    first, second = [q, _ops.solid(dy), y], [k, v]
    if options.layout == "bnhd":
        first, second = ([x.swapaxes(1, 2) for x in group] for group in (first, second))
    b, h, m, _ = second[0].shape
    n, d = first[0].shape[2:]
    groups = first[0].shape[1] // h if h else 1
    # (B, H_kv, G, N, ...), one group of query heads for each of the keys' heads.
    first = [x.reshape((b, h, groups, n, x.shape[-1])).astype(wide) for x in first]
    k, v = (x.astype(wide) for x in second)
    if key_mask is not None:
        # What a masked key holds may be nan, and 0 times nan is nan.
        k, v = (jnp.where(key_mask[..., None], x, 0.0) for x in (k, v))
    f = jnp.full((b, h, groups, n), d**-0.5 if options.scale is None else options.scale, wide)
    if factors is not None:
        f = f * factors.reshape(f.shape)
    rows = jnp.arange(n)
    low, high = _visible(n, m, options.causal, cu_seqlens)
    step = max(1, min(n, _BLOCK // max(1, m * b * h * groups)))
    blocks = -(-n // step)
    pad = blocks * step - n

    def cut(x: Any, axis: int) -> Any:
        x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape((*x.shape[:axis], blocks, step, *x.shape[axis + 1 :])), axis, 0)

    keys = jnp.arange(m)
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    # 0 times what is not finite would be nan for those who do not see it. Those who do have it by `ds`.
    shown = _finite(k)

    def body(sums: tuple[Any, Any], block: Any) -> Any:
        q, dy, y, f, low, high = block
        dk, dv = sums
        seen = ((keys >= low[:, None]) & (keys < high[:, None]))[None, None, None]
        if key_mask is not None:
            seen = seen & key_mask[:, :, None, None]
        scaled = q * f[..., None]
        logits = jnp.where(seen, product("bhgnd,bhmd->bhgnm", scaled, k), -jnp.inf)
        most = logits.max(-1, keepdims=True, initial=-jnp.inf)
        weights = jnp.where(seen, jnp.exp(logits - jnp.where(most == -jnp.inf, 0.0, most)), 0.0)
        total = weights.sum(-1, keepdims=True)
        # A row without keys is 0, not nan.
        weights = jnp.where(seen, weights / jnp.where(total == 0.0, 1.0, total), 0.0)
        odd = ~jnp.isfinite(dy).all(-1, keepdims=True)
        dv = dv + product("bhgnm,bhgne->bhme", jnp.where(seen & odd, jnp.nan, weights), _finite(dy))
        ds = weights * (product("bhgne,bhme->bhgnm", dy, v) - (dy * y).sum(-1, keepdims=True))
        ds = jnp.where(seen, ds, 0.0)
        dk = dk + product("bhgnm,bhgnd->bhmd", ds, _finite(scaled))
        return (dk, dv), product("bhgnm,bhmd->bhgnd", ds, shown) * f[..., None]

    if b * h * groups * n * m:
        parts = (*(cut(x, 3) for x in first), cut(f, 3), cut(low, 0), cut(high, 0))
        (dk, dv), dq = jax.lax.scan(body, (jnp.zeros_like(k), jnp.zeros_like(v)), parts)
        dq = jnp.moveaxis(dq, 0, 3).reshape((b, h, groups, blocks * step, d))[..., : len(rows), :]
    else:
        dq, dk, dv = (jnp.zeros_like(x) for x in (first[0], k, v))
    found = [dq.reshape((b, -1 if dq.size else groups * h, *dq.shape[-2:])), dk, dv]
    if options.layout == "bnhd":
        found = [x.swapaxes(1, 2) for x in found]
    return (*(x.astype(dtype) for x in found), None, None, None)


def _finite(x: Any) -> Any:
    return jnp.where(jnp.isfinite(x), x, 0.0)


_softmax.defvjp(_softmax_fwd, _softmax_bwd, symbolic_zeros=True)


def _visible(n: int, m: int, causal: bool, cu_seqlens: Any) -> tuple[Any, Any]:
    """The first key that each row could see, and the one past the last."""
    rows = jnp.arange(n)
    if cu_seqlens is None:
        low, high, last = jnp.zeros_like(rows), jnp.full_like(rows, m), rows + (m - n) + 1
    else:
        place = jnp.searchsorted(cu_seqlens, rows, side="right") - 1
        low, high, last = cu_seqlens[place], cu_seqlens[place + 1], rows + 1
    return low, jnp.minimum(jnp.maximum(last, low), high) if causal else high


@partial(jax.jit, static_argnums=(6, 7))
def _softmax_call(
    q: Any, k: Any, v: Any, key_mask: Any, cu_seqlens: Any, logn: Any, by_keys: bool, options: SoftmaxOptions
) -> Any:
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    heads = [_heads(x) for x in (q, k, v)]
    more = _one_form(q, heads[1], Arrays(key_mask=key_mask, cu_seqlens=cu_seqlens), _axis(options.layout))
    axis, wide = _axis(options.layout), _wide(q.dtype)
    b, hq, n = heads[0].shape[0], heads[0].shape[axis], heads[0].shape[3 - axis]
    hkv, m = heads[1].shape[axis], heads[1].shape[3 - axis]
    factors = None
    if by_keys:
        low, high = _visible(n, m, options.causal, more.cu_seqlens)
        counts = (high - low)[None, None]
        if more.key_mask is not None:
            sums = jnp.pad(more.key_mask.astype(jnp.int32).cumsum(-1), ((0, 0), (0, 0), (1, 0)))
            counts = sums[..., high] - sums[..., low]
        # Logarithms are taken here, in float64 as everywhere.
        factors = jnp.asarray(np.asarray(attention.logn_scale(np.arange(m + 1))).astype(wide))[counts]
        if factors.shape[1] not in (1, hq):
            factors = jnp.repeat(factors, hq // hkv, axis=1)
    elif logn is not None:
        factors = jnp.broadcast_to(jnp.asarray(logn).astype(wide), (*q.shape[:-3], hq, n) if q.ndim > 2 else (n,))
        factors = factors.reshape((b, hq, n))
    if factors is not None:
        factors = jnp.broadcast_to(factors, (b, hq, n))
    y = _softmax(*heads, more.key_mask, more.cu_seqlens, factors, options)
    return y.reshape((*q.shape[:-1], v.shape[-1]))


def softmax_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    key_mask: Any = None,
    cu_seqlens: Any = None,
    scale: float | None = None,
    logn: Any = None,
    layout: str = "bhnd",
) -> jax.Array:
    """Attend with softmax weights, exactly: `fastops.softmax_attention` for arrays, with gradients.

    Parameters
    ----------
    q : (..., H, N, D) or (N, D) Array of float16, bfloat16, float32 or float64
        Queries.
    k : (..., H_kv, M, D) or (M, D) Array
        Keys.
    v : (..., H_kv, M, E) or (M, E) Array
        Values.
    causal : bool
        Row i sees the keys j <= i + M - N (``is_causal`` of `jax.nn.dot_product_attention` aligns the first row).
    key_mask : (..., M) or (..., H_kv, M) bool Array, optional
        True where a key counts.
    cu_seqlens : (S + 1,) int Array, optional
        Offsets of packed sequences.
    scale : float, optional
        Factor of q.k, D**-0.5 by default.
    logn : "keys" or Array that broadcasts to (..., H, N), optional
        A further factor of each row's logits; it gets no gradient.
    layout : {"bhnd", "bnhd"}
        The order of heads and tokens.

    Returns
    -------
    (..., H, N, E) Array
        Of the common dtype.

    Raises
    ------
    TypeError
        As `fastops.softmax_attention`.
    ValueError
        As `fastops.softmax_attention`.

    Notes
    -----
    The gradient computes the weights anew, in blocks of rows, with jax's own products: no array of N x M is kept or
    made. It can be differentiated again. What a mask, causality or packing hides reaches no result and no gradient of who does not
    see it, be it nan or inf.

    Examples
    --------
    >>> import math
    >>> import jax.numpy as jnp
    >>> from fastops.jax import softmax_attention
    >>> x = jnp.eye(2)
    >>> softmax_attention(x, x, x, scale=math.log(3)).round(4)
    Array([[0.75, 0.25],
           [0.25, 0.75]], dtype=float32)
    """
    q, k, v = _triple(q, k, v)
    key_mask, cu_seqlens = given("key_mask", key_mask), given("cu_seqlens", cu_seqlens)
    by_keys = isinstance(logn, str)
    if by_keys:
        _validate.choice("logn", logn, ("keys",))
    factors = None if by_keys else given("logn", logn)
    _softmax_fits(*map(spec, (q, k, v, key_mask, cu_seqlens, factors)), causal, scale, layout)
    _check_values(cu_seqlens, None, k.shape[-3 if layout == "bnhd" else -2])
    options = SoftmaxOptions(bool(causal), _number(scale), layout, _ops.route())
    return _softmax_call(q, k, v, key_mask, cu_seqlens, factors, by_keys, options)


# --- Nystrom attention -------------------------------------------------------------------------------------------------------------


class NystromOptions(NamedTuple):
    """What is fixed when Nystrom attention is traced: the options as they were given."""

    num_landmarks: int
    iterations: int
    pinv: str
    ridge: float | None
    scale: float | None
    init: str
    normalize: bool
    layout: str
    route: str


_NYSTROM_RANKS = (4, 4, 4, 2, 2, 4, 4)


def _nystrom_attributes(options: NystromOptions, q: Any, q_landmarks: Any) -> dict[str, Any]:
    """The options as handlers take them."""
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    whole = {
        "landmarks": options.num_landmarks if q_landmarks is None else q_landmarks.shape[2],
        "iterations": options.iterations,
        "ridge_solve": options.pinv == "ridge",
        "batch_init": options.init == "batch",
        "normalize": options.normalize,
        "tokens_first": options.layout == "bnhd",
    }
    ridge = _nystrom.RIDGE if options.ridge is None else options.ridge
    return {**{name: np.int32(x) for name, x in whole.items()}, "ridge": np.float64(ridge), "scale": np.float64(scale)}


def _nystrom_named(options: NystromOptions, more: Sequence[Any]) -> dict[str, Any]:
    """The arguments of the functions for arrays."""
    key_mask, taps, *landmarks = more
    given = dict(zip(options._fields[:-1], options[:-1], strict=True))
    marks = None if landmarks[0] is None else tuple(landmarks)
    return {**given, "key_mask": key_mask, "conv_weight": taps, "landmarks": marks}


def _nystrom_samples(options: NystromOptions, axes: tuple[int, ...], operands: Sequence[Any], ranks: Any) -> Any:
    """Operands with the samples' axes in full; None where they cannot be one call."""
    taps = operands[-3]
    if options.init == "batch" or not _ops.is_shared(taps, 2):
        return None
    full = [None if x is None else _ops.spread(x, axes, rank) for x, rank in zip(operands, ranks, strict=True)]
    full[-3] = _ops.alone(taps, 2)
    return full


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _nystrom_op(
    q: Any, k: Any, v: Any, key_mask: Any, taps: Any, q_landmarks: Any, k_landmarks: Any, options: NystromOptions
) -> Any:
    """Of four axes, a mask (B, M), taps (H, taps) and landmarks (B, H, m, D) and (B, H_kv, m, D)."""

    def one(q: AnyArray, k: AnyArray, v: AnyArray, *more: Any) -> list[AnyArray]:
        return [attention.nystrom_attention(q, k, v, **_nystrom_named(options, more))]

    def many(axes: tuple[int, ...], *arrays: Any) -> list[AnyArray] | None:
        full = _nystrom_samples(options, axes, arrays, _NYSTROM_RANKS)
        return None if full is None else one(*full)

    results = [Shape((*q.shape[:-1], v.shape[-1]), q.dtype)]
    operands = (q, k, v, key_mask, taps, q_landmarks, k_landmarks)
    attributes, target = _nystrom_attributes(options, q, q_landmarks), "fastops_nystrom_attention"
    return _ops.call(options.route, target, attributes, one, results, *operands, many=many, spread_out=True)[0]


@_ops.refuse_twice("nystrom_attention")
def _nystrom_backward(options: NystromOptions, *operands: Any) -> list[Any]:
    def one(dy: AnyArray, q: AnyArray, k: AnyArray, v: AnyArray, *more: Any) -> list[AnyArray]:
        told = more[2] is not None
        found = attention.nystrom_attention_backward(
            dy, q, k, v, **_nystrom_named(options, more), return_d_landmarks=told
        )
        return [*found[:-1], *found[-1]] if told else list(found)

    def many(axes: tuple[int, ...], *arrays: Any) -> list[AnyArray] | None:
        # The gradient of weights in common would be a sum over samples.
        if arrays[5] is not None:
            return None
        full = _nystrom_samples(options, axes, arrays, (4, *_NYSTROM_RANKS))
        return None if full is None else one(*full)

    more = [Shape(x.shape, x.dtype) for x in operands[5:] if x is not None]
    attributes = _nystrom_attributes(options, operands[1], operands[6])
    target = "fastops_nystrom_attention_backward"
    return _by_heads(options, target, attributes, one, operands[1:4], more, *operands, many=many)


def _nystrom_fwd(*args: Any) -> Any:
    return _nystrom_op(*args), args[:-1]


def _nystrom_bwd(options: NystromOptions, kept: Any, dy: Any) -> Any:
    dq, dk, dv, *rest = _nystrom_backward(options, dy, *kept)
    d_taps = None if kept[4] is None else rest.pop(0)
    return (dq, dk, dv, None, d_taps, *(rest or (None, None)))


_nystrom_op.defvjp(_nystrom_fwd, _nystrom_bwd)


@partial(jax.jit, static_argnums=(7,))
def _nystrom_call(
    q: Any, k: Any, v: Any, key_mask: Any, taps: Any, q_landmarks: Any, k_landmarks: Any, options: NystromOptions
) -> Any:
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    heads = [_heads(x) for x in (q, k, v)]
    wide = _wide(q.dtype)
    if key_mask is not None:
        key_mask = jnp.asarray(key_mask).reshape((heads[1].shape[0], -1 if key_mask.size else key_mask.shape[-1]))
    taps, first, second = (None if x is None else jnp.asarray(x).astype(wide) for x in (taps, q_landmarks, k_landmarks))
    marks = [None if x is None else _heads(x) for x in (first, second)]
    y = _nystrom_op(*heads, key_mask, taps, *marks, options)
    return y.reshape((*q.shape[:-1], v.shape[-1]))


def nystrom_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    num_landmarks: int = 64,
    iterations: int = 6,
    pinv: str = "newton",
    ridge: float | None = None,
    scale: float | None = None,
    key_mask: Any = None,
    conv_weight: Any = None,
    landmarks: Sequence[Any] | None = None,
    init: str = "matrix",
    normalize: bool = False,
    layout: str = "bhnd",
) -> jax.Array:
    """Approximate softmax attention through landmarks: `fastops.nystrom_attention` for arrays, with gradients.

    Parameters
    ----------
    q : (..., H, N, D) or (N, D) Array of float16, bfloat16, float32 or float64
        Queries.
    k : (..., H_kv, M, D) or (M, D) Array
        Keys.
    v : (..., H_kv, M, E) or (M, E) Array
        Values.
    num_landmarks : int
        As in `fastops.nystrom_attention`, as are all options.
    iterations : int
        Steps towards the inverse.
    pinv : {"newton", "ridge"}
        How it is found.
    ridge : float, optional
        Of pinv="ridge".
    scale : float, optional
        Factor of q.k.
    key_mask : (..., M) bool Array, optional
        True where a key counts.
    conv_weight : (H, taps) Array, optional
        Weights of a convolution of v; it gets a gradient.
    landmarks : tuple of two Arrays, optional
        In place of the means of segments; they get gradients.
    init : {"matrix", "batch"}
        The coefficient with which the iteration begins.
    normalize : bool
        Divide each row by the sum of its weights.
    layout : {"bhnd", "bnhd"}
        The order of heads and tokens.

    Returns
    -------
    (..., H, N, E) Array
        Of the common dtype.

    Raises
    ------
    TypeError
        As `fastops.nystrom_attention`.
    ValueError
        As `fastops.nystrom_attention`.
    NotImplementedError
        A second derivative.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from fastops.jax import nystrom_attention, softmax_attention
    >>> t = jnp.linspace(0, 3, 1000)
    >>> q = 3 * jnp.stack([jnp.cos(t), jnp.sin(t)], 1)
    >>> bool(abs(nystrom_attention(q, q, q, num_landmarks=16) - softmax_attention(q, q, q)).max() < 0.1)
    True
    """
    q, k, v = _triple(q, k, v)
    key_mask, conv_weight = given("key_mask", key_mask), given("conv_weight", conv_weight)
    marks = None
    if landmarks is not None:
        if not isinstance(landmarks, (tuple, list)) or len(landmarks) != 2:
            raise _validate.wrong_type("landmarks", "a tuple of two arrays", landmarks)
        marks = tuple(given(f"landmarks[{i}]", x) for i, x in enumerate(landmarks))
    options = (num_landmarks, iterations, pinv, ridge, scale, init, normalize, layout)
    shapes = None if marks is None else tuple(spec(x) for x in marks)
    _nystrom_fits(*map(spec, (q, k, v, key_mask, conv_weight)), shapes, *options)
    numbers = (_number(ridge), _number(scale))
    fixed = NystromOptions(
        int(num_landmarks), int(iterations), pinv, *numbers, init, bool(normalize), layout, _ops.route()
    )
    return _nystrom_call(q, k, v, key_mask, conv_weight, *(marks or (None, None)), fixed)
