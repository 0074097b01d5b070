# SPDX-License-Identifier: BSD-3-Clause
"""Linear, Nystrom and softmax attention as differentiable operators of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _attention, _decay, _validate, attention
from .._backend import backend as _backend
from .._validate import AnyArray
from . import _ops
from ._ops import array, direct, tensor

__all__ = ["linear_attention", "linear_attention_step_", "nystrom_attention", "softmax_attention"]


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of features, sums and states."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _optional(name: str, x: Tensor | None) -> Any:
    return None if x is None else array(name, x)


def _given(name: str, value: Any) -> Tensor | None:
    """An argument that may be an array of NumPy's too."""
    if value is None or isinstance(value, Tensor):
        return value
    return torch.as_tensor(np.array(_validate.array(name, value)))


def _triple(q: Any, k: Any, v: Any) -> list[Tensor]:
    if (
        isinstance(q, Tensor)
        and isinstance(k, Tensor)
        and isinstance(v, Tensor)
        and q.dtype is k.dtype is v.dtype
        and q.dtype in _ops.FLOATS
    ):
        return [q, k, v]
    for name, x in (("q", q), ("k", k), ("v", v)):
        _ops.want_tensor(name, x)
    return _ops.floats(q=q, k=k, v=v)


def _gradients(layout: str, *tensors: Tensor) -> list[Tensor]:
    """New tensors for the gradients of q, k and v, in their memory order: backends write heads first."""
    if layout == "bhnd" or tensors[0].is_cuda:
        return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]
    shapes = [(*x.shape[:-3], x.shape[-2], x.shape[-3], x.shape[-1]) for x in tensors]
    return [
        torch.empty(shape, dtype=x.dtype, device=x.device).transpose(-3, -2)
        for x, shape in zip(tensors, shapes, strict=True)
    ]


def _result(q: Tensor, v: Tensor) -> Tensor:
    return torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)


def _nothing(x: Tensor) -> Tensor:
    return torch.empty((0,), dtype=_wide(x), device=x.device)


# --- linear attention --------------------------------------------------------------------------------------------------------------

_OPTIONS = "bool causal, str feature_map, bool? normalize, float eps, float? kernel_eps, float? scale, str layout"
_NAMES = ("causal", "feature_map", "normalize", "eps", "kernel_eps", "scale", "layout")
_EXTRAS = "Tensor? projection, Tensor? key_mask, Tensor? cu_seqlens, Tensor? decay, Tensor? s, Tensor? z, Tensor? m"


def _state(*parts: Tensor | None) -> tuple[Tensor, ...] | None:
    return tuple(x for x in parts if x is not None) or None


def _conditions(extras: Sequence[Tensor | None], options: Sequence[Any]) -> dict[str, Any]:
    projection, key_mask, cu_seqlens, decay, *parts = extras
    state = _state(*parts)
    return {
        "projection": _optional("projection", projection),
        "key_mask": _optional("key_mask", key_mask),
        "cu_seqlens": _optional("cu_seqlens", cu_seqlens),
        "decay": _optional("decay", decay),
        "initial_state": None if state is None else tuple(array(f"initial_state[{i}]", x) for i, x in enumerate(state)),
        **dict(zip(_NAMES, options, strict=True)),
    }


def _linear_kernel(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    extras, (*options, with_state) = more[:7], more[7:]
    if q.is_cuda:
        operands = (x.detach() for x in (q, k, v))
        found = _cuda().linear_attention(*operands, **_cuda_conditions(extras, options), return_state=with_state)
    else:
        found = attention.linear_attention(
            array("q", q), array("k", k), array("v", v), **_conditions(extras, options), return_state=with_state
        )
    y, state = found if with_state else (found, ())
    parts = [_tensor(x) for x in (y, *state)]
    return (*parts, *(_nothing(q) for _ in range(4 - len(parts))))


def _cuda() -> Any:
    from .. import cuda

    return cuda


def _takes_tf32() -> bool:
    """Whether a GPU multiplies float32 with 10 bits of fraction: as torch's own products."""
    return torch.get_float32_matmul_precision() != "highest"


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else tensor(x)


def _cuda_conditions(extras: Sequence[Tensor | None], options: Sequence[Any]) -> dict[str, Any]:
    """What `fastops.cuda` takes beside q, k and v."""
    projection, key_mask, cu_seqlens, decay, *parts = (None if x is None else x.detach() for x in extras)
    state = _state(*(None if x is None else x.contiguous() for x in parts))
    return {
        "projection": projection,
        "key_mask": key_mask,
        "cu_seqlens": cu_seqlens,
        "decay": decay,
        "initial_state": state,
        "tf32": _takes_tf32(),
        **dict(zip(_NAMES, options, strict=True)),
    }


def _linear_fake(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    projection, _, cu_seqlens, *_ = more
    feature_map, layout, with_state = more[8], more[13], more[14]
    y = _result(q, v)
    if not with_state:
        return y, _nothing(q), _nothing(q), _nothing(q)
    lead = list(q.shape[:-3]) if cu_seqlens is None else [cu_seqlens.shape[0] - 1]
    if q.ndim > 2:
        lead.append(k.shape[-2] if layout == "bnhd" else k.shape[-3])
    f = q.shape[-1] + (feature_map == "cosine") if projection is None else projection.shape[0]
    options = {"dtype": _wide(q), "device": q.device}
    s, z = torch.empty([*lead, f, v.shape[-1]], **options), torch.empty([*lead, f], **options)
    return y, s, z, torch.empty([*lead, f] if feature_map in _attention.EXPONENTIAL else [0], **options)


def _linear_backward_kernel(
    dy: Tensor, ds: Tensor | None, dz: Tensor | None, q: Tensor, k: Tensor, v: Tensor, y: Tensor, *more: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    extras, options = more[:7], more[7:]
    if q.is_cuda:
        end = None if ds is None or dz is None else (ds.detach().contiguous(), dz.detach().contiguous())
        own = (x.detach() for x in (dy, q, k, v, y))
        found = _cuda().linear_attention_backward(*own, **_cuda_conditions(extras, options), d_state=end)
        last = found[3] if len(found) > 3 else (_nothing(q), _nothing(q))
        return (*map(_tensor, (*found[:3], *last)),)
    d_state = None if ds is None or dz is None else (array("d_state[0]", ds), array("d_state[1]", dz))
    operands = (array(name, x) for name, x in (("dy", dy), ("q", q), ("k", k), ("v", v), ("y", y)))
    found = attention.linear_attention_backward(*operands, **_conditions(extras, options), d_state=d_state)
    gradients = [tensor(x) for x in found[:3]]
    first = [tensor(x) for x in found[3]] if len(found) > 3 else [_nothing(q), _nothing(q)]
    return (*gradients, *first)


def _linear_backward_fake(
    dy: Tensor, ds: Tensor | None, dz: Tensor | None, q: Tensor, k: Tensor, v: Tensor, y: Tensor, *more: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    s, z = more[4:6]
    first = [_nothing(q) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (s, z)]
    return (*_gradients(more[-1], q, k, v), *first)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    # The last state is needed for the gradient of the decay alone.
    last = output[1:3] if inputs[-1] and inputs[6] is not None else (None, None)
    ctx.save_for_backward(*inputs[:10], output[0], *last)
    ctx.options, ctx.with_state = inputs[10:-1], inputs[-1]
    ctx.mark_non_differentiable(output[3])


def _linear_derive(ctx: Any, dy: Tensor | None, ds: Tensor | None, dz: Tensor | None, dm: Any) -> tuple[Any, ...]:
    q, k, v, *extras, y, last_s, last_z = ctx.saved_tensors
    s = extras[4]
    if dy is None:
        dy = torch.zeros_like(y)
    if ctx.with_state and (ds is not None or dz is not None):
        # A state has the shapes of the initial one where there is one, else those of its own gradient.
        ds = dz.new_zeros((*dz.shape, v.shape[-1])) if ds is None and dz is not None else ds
        dz = ds.new_zeros(ds.shape[:-1]) if dz is None and ds is not None else dz
    else:
        ds = dz = None
    dq, dk, dv, first_s, first_z = _linear_backward(dy, ds, dz, q, k, v, y, *extras, *ctx.options)
    first = (None, None) if s is None else (first_s, first_z)
    d_decay = None
    if ctx.needs_input_grad[6]:
        states = (None, None) if ds is None else (last_s, last_z)
        d_decay = _decay_backward(dy, ds, dz, q, k, v, y, dv, *states, *extras, *ctx.options)
    return (dq, dk, dv, None, None, None, d_decay, *first, None, *(None,) * (len(ctx.options) + 1))


def _decay_kernel(*args: Any) -> Tensor:
    if args[0].is_cuda:
        return _decay_on_cuda(args[:10], args[10:17], args[17:])
    operands: list[Any] = [None if x is None else array("dy", x) for x in args[:10]]
    given = _conditions(args[10:17], args[17:])
    decay, layout = given["decay"], given["layout"]
    own = [3 if i in (2, 9) else 4 for i in range(10)]
    if layout == "bnhd":
        operands = [x if i in (1, 2, 8, 9) else x.swapaxes(-3, -2) for i, x in enumerate(operands)]
    rank = operands[3].ndim

    def merged(x: AnyArray, axes: int) -> AnyArray:
        """As (B, H, ...), with so many axes."""
        x = x if rank > 2 else np.expand_dims(x, 1 - axes)
        return x.reshape((math.prod(x.shape[: 1 - axes]), *x.shape[1 - axes :]))

    operands = [None if x is None else merged(x, n) for x, n in zip(operands, own, strict=True)]
    b, h, m = operands[4].shape[:3]
    per_token = decay.ndim > 1 or (rank == 2 and decay.shape == (m,))
    given["decay"] = logs = decay.reshape((b, h, m) if per_token else (1, h, 1))
    mask, state = given["key_mask"], given["initial_state"]
    if mask is not None:
        given["key_mask"] = merged(mask, 3) if mask.ndim == rank - 1 else mask.reshape((b, m))
    if state is not None:
        given["initial_state"] = tuple(merged(x, 4 - (i > 0)) for i, x in enumerate(state))
    given["decay"] = np.broadcast_to(logs, (b, h, m))
    found = _decay.summed(_decay.gradient(given, operands), logs.shape)
    return torch.from_numpy(found.reshape(decay.shape).astype(decay.dtype))


def _decay_on_cuda(operands: Sequence[Any], extras: Sequence[Tensor | None], options: Sequence[Any]) -> Tensor:
    """`fastops._decay.gradient` with torch's own sums, and without waiting for the GPU."""
    given = _cuda_conditions(extras, options)
    rank, wide = operands[3].ndim, torch.float64
    layout, decay, mask, offsets = (given[key] for key in ("layout", "decay", "key_mask", "cu_seqlens"))
    turned = [
        x.transpose(-3, -2) if layout == "bnhd" and x is not None and i not in (1, 2, 8, 9) else x
        for i, x in enumerate(operands)
    ]

    def merged(x: Tensor, axes: int) -> Tensor:
        """As (B, H, ...), with so many axes."""
        x = x if rank > 2 else x.unsqueeze(1 - axes)
        return x.reshape((math.prod(x.shape[: 1 - axes]), *x.shape[1 - axes :]))

    own: list[Any] = [None if x is None else merged(x.detach(), 3 if i in (2, 9) else 4) for i, x in enumerate(turned)]
    dy, ds, dz, q, k, v, y, dv, last_s, last_z = own
    b, h, m = k.shape[:3]
    n = q.shape[2]
    per_token = decay.ndim > 1 or (rank == 2 and decay.shape == (m,))
    logs = decay.reshape((b, h, m) if per_token else (1, h, 1))
    of_rows = (dy.to(wide) * y.to(wide)).sum(-1)
    if mask is not None:
        mask = merged(mask, 3) if mask.ndim == rank - 1 else mask.reshape((b, 1, m))
        # What a masked key holds may be nan.
        v = torch.where(mask.unsqueeze(-1), v, torch.zeros((), dtype=v.dtype, device=v.device))
    of_keys = (dv.to(wide) * v.to(wide)).sum(-1)
    state = given["initial_state"]
    if state is not None:
        state = tuple(merged(x, 4 - i) for i, x in enumerate(state))
    normalizes = given["feature_map"] != "identity" if given["normalize"] is None else given["normalize"]
    if normalizes or dz is not None:
        begin = None if state is None else (state[1].unsqueeze(-1), state[1])
        plain = {**given, "normalize": False, "eps": 0.0, "initial_state": begin, "layout": "bhnd"}
        plain |= {"decay": logs.expand(b, h, m), "key_mask": None if mask is None else mask.expand(b, h, m)}
        ones = (q, k, v.new_ones((b, h, m, 1)))
        upper = torch.zeros_like(of_rows)
        if normalizes:
            sums = _cuda().linear_attention(*ones, **plain)[..., 0].to(wide) + given["eps"]
            upper = torch.where(sums != 0, -of_rows / sums, upper)
            of_rows = of_rows + upper * (sums - given["eps"])
        into = upper.unsqueeze(-1).to(q.dtype)
        end = None if dz is None else (dz.unsqueeze(-1).contiguous(), torch.zeros_like(dz))
        found = _cuda().linear_attention_backward(into, *ones, torch.zeros_like(into), **plain, d_state=end)
        of_keys = of_keys + found[2][..., 0]
    change = -of_keys
    change[..., max(m - n, 0) :] += of_rows.reshape((b, h, -1, n)).sum(2)[..., max(n - m, 0) :]
    zero = torch.zeros((), dtype=wide, device=k.device)
    if offsets is not None:
        # As the kernels take them, since nobody has looked at them; what lies outside of all sequences holds anything.
        ends = offsets.to(k.device, torch.int64).clamp(0, m).cummax(0).values
        tokens = torch.arange(m, device=k.device)
        which = (torch.searchsorted(ends, tokens, right=True) - 1).clamp(0, len(ends) - 2)
        inside = (tokens >= ends[0]) & (tokens < ends[-1])
        change = torch.where(inside, change, zero)
    # Sums from each token to the end of its sequence.
    after = torch.nn.functional.pad(change.flip(-1).cumsum(-1).flip(-1), (0, 1))
    full = after[..., :-1]
    if offsets is not None:
        full = full - after[..., ends[which + 1]]
    if ds is not None and last_s is not None:
        sums = (last_s.to(wide) * ds.to(wide)).sum((-1, -2)) + (last_z.to(wide) * dz.to(wide)).sum(-1)
        full = full + (sums.unsqueeze(-1) if offsets is None else sums[which].T)
    if offsets is not None:
        full = torch.where(inside, full, zero)
    axes = [i for i in range(3) if logs.shape[i] == 1 and full.shape[i] != 1]
    found = full.sum(axes, keepdim=True) if axes else full
    return torch.reshape(found, decay.shape).to(decay.dtype)


def _decay_fake(*args: Any) -> Tensor:
    decay = args[13]
    return torch.empty(decay.shape, dtype=decay.dtype, device=decay.device)


def _linear_vmap(info: Any, dims: Sequence[Any], *args: Any) -> Any:
    q, *_, projection, key_mask, cu_seqlens, decay, s = args[:8]
    plain = projection is None and cu_seqlens is None and decay is None and s is None
    if not plain or q.ndim - (dims[0] is not None) < 3 or args[-1]:
        return _ops.loop(_linear, info, dims, args)
    found = _linear(*_leading(info.batch_size, dims, args, 3, (key_mask, 4)), *args[5:])
    return found, (0, *(None,) * 3)


def _leading(n: int, dims: Sequence[Any], args: Sequence[Any], count: int, mask: tuple[Any, int]) -> list[Any]:
    """The first operands with their batch in front, and the arguments up to the mask."""
    operands = [_ops.batched(x, d, n, 0) for x, d in zip(args[:count], dims, strict=False)]
    key_mask, place = mask
    masked = None if key_mask is None else _ops.batched(key_mask, dims[place], n, 0)
    return [*operands, *args[count:place], masked]


_linear_backward = _ops.define(
    "linear_attention_backward(Tensor dy, Tensor? ds, Tensor? dz, Tensor q, Tensor k, Tensor v, Tensor y, "
    f"{_EXTRAS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_backward_kernel,
    _linear_backward_fake,
)
_decay_backward = _ops.define(
    "linear_attention_decay_backward(Tensor dy, Tensor? ds, Tensor? dz, Tensor q, Tensor k, Tensor v, Tensor y, Tensor dv, "
    f"Tensor? last_s, Tensor? last_z, {_EXTRAS}, {_OPTIONS}) -> Tensor",
    _decay_kernel,
    _decay_fake,
)
_linear = _ops.define(
    f"linear_attention(Tensor q, Tensor k, Tensor v, {_EXTRAS}, {_OPTIONS}, bool with_state) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _linear_kernel,
    _linear_fake,
    setup=_linear_setup,
    backward=_linear_derive,
    vmap=_linear_vmap,
    casts=(0, 1, 2),
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    feature_map: str = "elu",
    normalize: bool | None = None,
    eps: float = 0.0,
    kernel_eps: float | None = None,
    scale: float | None = None,
    projection: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    decay: Tensor | None = None,
    initial_state: Sequence[Tensor] | None = None,
    return_state: bool = False,
    layout: str = "bhnd",
) -> Any:
    """Attend with weights f(q).f(k), at a cost that grows linearly with the length: for tensors, with gradients.

    Parameters
    ----------
    q : (..., H, N, D) or (N, D) Tensor of float16, bfloat16, float32 or float64
        Queries, on the CPU or, but for float64, on an NVIDIA GPU (`fastops.cuda`); read in place.
    k : (..., H_kv, M, D) or (M, D) Tensor
        Keys.
    v : (..., H_kv, M, E) or (M, E) Tensor
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
    projection : (m, D) Tensor, optional
        The directions of "favor"; it gets no gradient.
    key_mask : (..., M) or (..., H_kv, M) bool Tensor, optional
        True where a key counts.
    cu_seqlens : (S + 1,) int Tensor, optional
        Offsets of packed sequences.
    decay : (H_kv,) or (..., H_kv, M) Tensor, optional
        Logarithms <= 0 of the decay at each key. It gets a gradient, but with "exp" none.
    initial_state : tuple of Tensors, optional
        The sums to begin with; S and z get gradients.
    return_state : bool
        Return the sums over all keys too.
    layout : {"bhnd", "bnhd"}
        The order of heads and tokens.

    Returns
    -------
    y : (..., H, N, E) Tensor
        Of the common dtype; under autocast of its dtype.
    state : tuple of Tensors
        With `return_state`: S, z, and m for "exp", "softmax" and "favor", float32 (float64 for float64). m is not differentiable:
        it is where the gradients of S and z are taken.

    Raises
    ------
    TypeError
        As `fastops.linear_attention`; `requires_grad` of what gets no gradient.
    ValueError
        As `fastops.linear_attention`.
    NotImplementedError
        A second derivative; on a GPU a `decay` with "exp".

    Notes
    -----
    On a GPU as `fastops.cuda.linear_attention`; float32 is multiplied in TF32 where ``torch.get_float32_matmul_precision()`` is not
    "highest".

    Examples
    --------
    >>> import torch
    >>> from fastops.torch import linear_attention
    >>> q = k = torch.zeros(1, 1, 3, 2)
    >>> v = torch.tensor([3.0, 5.0, 1.0]).reshape(1, 1, 3, 1).requires_grad_()
    >>> y = linear_attention(q, k, v, causal=True)
    >>> y.sum().backward()
    >>> y.detach().flatten(), v.grad.flatten()
    (tensor([3., 4., 3.]), tensor([1.8333, 0.8333, 0.3333]))
    """
    q, k, v = _triple(q, k, v)
    projection, key_mask, cu_seqlens, decay = (
        _given(name, x)
        for name, x in (
            ("projection", projection),
            ("key_mask", key_mask),
            ("cu_seqlens", cu_seqlens),
            ("decay", decay),
        )
    )
    state = (None, None, None) if initial_state is None else _parts("initial_state", initial_state)
    _ops.without_gradient(projection=projection, m=state[2], decay=decay if feature_map == "exp" else None)
    extras = (projection, key_mask, cu_seqlens, decay, *state)
    options = (causal, feature_map, normalize, eps, kernel_eps, scale, layout, return_state)
    y, *parts = _linear(q, k, v, *extras, *options)
    return (y, tuple(parts[: _count(feature_map)])) if return_state else y


def _count(feature_map: str) -> int:
    return 3 if feature_map in _attention.EXPONENTIAL else 2


def _parts(name: str, state: object) -> tuple[Tensor, Tensor, Tensor | None]:
    """S, z and m of a state, as an operator takes them."""
    return _attention.state_parts(name, state, lambda x: isinstance(x, Tensor), "a torch.Tensor")


# --- a step ------------------------------------------------------------------------------------------------------------------------


def _step_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    z: Tensor,
    m: Tensor | None,
    projection: Tensor | None,
    decay: Tensor | None,
    feature_map: str,
    normalize: bool | None,
    eps: float,
    kernel_eps: float | None,
    scale: float | None,
) -> Tensor:
    options: dict[str, Any] = {
        "feature_map": feature_map,
        "normalize": normalize,
        "eps": eps,
        "kernel_eps": kernel_eps,
        "scale": scale,
    }
    if q.is_cuda:
        state = tuple(x.detach() for x in (s, z, m) if x is not None)
        options |= {"projection": projection, "decay": None if decay is None else decay.detach()}
        return _tensor(_cuda().linear_attention_step_(q.detach(), k.detach(), v.detach(), state, **options))
    return tensor(
        attention.linear_attention_step_(
            array("q", q),
            array("k", k),
            array("v", v),
            (array("state[0]", s), array("state[1]", z))
            if m is None
            else (array("state[0]", s), array("state[1]", z), array("state[2]", m)),
            **options,
            projection=_optional("projection", projection),
            decay=_optional("decay", decay),
        )
    )


_QUICK = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


def _are_apart(given: tuple[Tensor, ...], written: tuple[Tensor, ...]) -> bool:
    memory = {x.untyped_storage().data_ptr() for x in given}
    return memory.isdisjoint(x.untyped_storage().data_ptr() for x in written)


def _quick_step(q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, ...], options: tuple[Any, ...]) -> Tensor | None:
    """A step on tensors as decoding has them, which the native backend reads by itself; None of others."""
    if type(q) is not Tensor or (dtype := _QUICK.get(q.dtype)) is None or not q.ndim:
        return None
    if not _ops.ordinary():
        return None
    # As `direct`, with the signs that torch puts off in the same loop: each call is felt here.
    records = _ops.records()
    for x in (q, k, v, *state):
        if type(x) not in _ops.PLAIN or not x.is_cpu or x.is_neg() or (records and x.requires_grad):
            return None
    feature_map, normalize, eps, kernel_eps, scale = options
    if normalize is kernel_eps is scale is None and type(eps) is float and not eps and type(feature_map) is str:
        checked = attention._plain_options(q.shape[-1], dtype, feature_map)
    else:
        try:
            checked = attention._quick_options(q.shape[-1], dtype, *options)
        except TypeError:  # an option of the wrong type, or one without a hash
            return None
    if checked is None:
        return None
    y: Tensor | None = _backend.plain_step(q, k, v, state, None, checked)
    if (
        y is None
        and not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous())
        and _are_apart((q, k, v), state)
    ):
        y = _backend.plain_step(q.contiguous(), k.contiguous(), v.contiguous(), state, None, checked)
    if y is not None:
        _bump(state)
    return y


_step = torch.library.custom_op(
    "fastops::linear_attention_step_",
    _step_kernel,
    mutates_args=("s", "z", "m"),
    schema="(Tensor q, Tensor k, Tensor v, Tensor(a!) s, Tensor(b!) z, Tensor(c!)? m, Tensor? projection, Tensor? decay, "
    "str feature_map, bool? normalize, float eps, float? kernel_eps, float? scale) -> Tensor",
)


@_step.register_fake
def _step_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return _result(q, v)


_step_op = torch.ops.fastops.linear_attention_step_.default
_bump = torch.autograd.graph.increment_version


def linear_attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sequence[Tensor],
    *,
    feature_map: str = "elu",
    normalize: bool | None = None,
    eps: float = 0.0,
    kernel_eps: float | None = None,
    scale: float | None = None,
    projection: Tensor | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    """Take the next token of causal linear attention: update the state in place and return the token's row.

    Parameters
    ----------
    q : (..., H, D) or (D,) Tensor of float16, bfloat16, float32 or float64
        The token's queries, on the CPU or, but for float64, on an NVIDIA GPU.
    k : (..., H_kv, D) or (D,) Tensor
        Its keys.
    v : (..., H_kv, E) or (E,) Tensor
        Its values.
    state : tuple of Tensors
        As `linear_attention` with ``return_state=True`` gives it; changed in place, and autograd is told.
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
    projection : (m, D) Tensor, optional
        The directions of "favor".
    decay : (H_kv,) or (..., H_kv) Tensor, optional
        Logarithms <= 0 of the token's decay.

    Returns
    -------
    (..., H, E) Tensor
        The row of the token.

    Raises
    ------
    TypeError
        As `fastops.linear_attention_step_`; a tensor with `requires_grad` where gradients are recorded: a step has none.
    ValueError
        As `fastops.linear_attention_step_`.

    Examples
    --------
    >>> import torch
    >>> from fastops.torch import linear_attention, linear_attention_step_
    >>> nothing = torch.zeros(1, 2, 0, 4)
    >>> _, state = linear_attention(nothing, nothing, nothing, causal=True, return_state=True)
    >>> x = torch.ones(1, 2, 4)
    >>> linear_attention_step_(x, x, x, state)[0, 0], state[0]._version
    (tensor([1., 1., 1., 1.]), 1)
    """
    if projection is None and decay is None and isinstance(state, (tuple, list)):
        options = (feature_map, normalize, eps, kernel_eps, scale)
        quick = _quick_step(q, k, v, tuple(state), options)
        if quick is not None:
            return quick
    q, k, v = _triple(q, k, v)
    projection, decay = _given("projection", projection), _given("decay", decay)
    s, z, m = _parts("state", state)
    tensors = [x for x in (q, k, v, s, z, m, projection, decay) if x is not None]
    args = (q, k, v, s, z, m, projection, decay, feature_map, normalize, eps, kernel_eps, scale)
    if direct(*tensors):
        y = _step_kernel(*args)
        _bump(tuple(state))
        return y
    _ops.without_tangent(tensors)
    names = ("q", "k", "v", "state[0]", "state[1]", "state[2]", "projection", "decay")
    _ops.without_gradient(**dict(zip(names, (q, k, v, s, z, m, projection, decay), strict=True)))
    return _step_op(*args)


# --- softmax attention -------------------------------------------------------------------------------------------------------------

_SOFTMAX = "bool causal, float? scale, bool by_keys, str layout"
_SOFTMAX_EXTRAS = "Tensor? key_mask, Tensor? cu_seqlens, Tensor? logn"
# Numbers that the gradient of softmax attention holds at once, of each of its arrays of rows and keys.
_BLOCK = 1 << 21


def _softmax_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    logn: Tensor | None,
    causal: bool,
    scale: float | None,
    by_keys: bool,
    layout: str,
) -> Tensor:
    return tensor(
        attention.softmax_attention(
            array("q", q),
            array("k", k),
            array("v", v),
            causal=causal,
            key_mask=_optional("key_mask", key_mask),
            cu_seqlens=_optional("cu_seqlens", cu_seqlens),
            scale=scale,
            logn="keys" if by_keys else _optional("logn", logn),
            layout=layout,
        )
    )


def _softmax_backward_kernel(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    logn: Tensor | None,
    causal: bool,
    scale: float | None,
    by_keys: bool,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """With P the weights and d = sum(dy y) of a row: dS = P (dy V^T - d), dQ = dS K, dK = dS^T Q, dV = P^T dy, by blocks of rows.

    Dao et al., "FlashAttention", NeurIPS 2022, appendix B.4.
    """
    p = _attention.Problem(layout, array("q", q), array("k", k), array("v", v))
    mask = p.key_mask(_optional("key_mask", key_mask))
    offsets = p.offsets(_optional("cu_seqlens", cu_seqlens))
    factors = None
    if by_keys:
        counts = _attention.visible_keys(p, causal, mask, offsets)
        factors = _attention.row_factors(p, np.asarray(attention.logn_scale(counts)))
    elif logn is not None:
        factors = _attention.given_factors(p, array("logn", logn))
    wide, groups = _wide(q), p.hq // p.hkv if p.hkv else 1
    if layout == "bnhd":
        dy, q, k, v, y = (x.transpose(-3, -2) for x in (dy, q, k, v, y))
    # (B, H_kv, G, N, ...), one group of query heads for each of the keys' heads.
    first = [x.reshape(p.b, p.hkv, groups, p.nq, x.shape[-1]).to(wide) for x in (dy, q, y)]
    second = [x.reshape(p.b, p.hkv, p.nk, x.shape[-1]).to(wide) for x in (k, v)]
    factor = p.d**-0.5 if scale is None else scale
    rows = torch.full((p.b, p.hkv, groups, p.nq), factor, dtype=wide)
    if factors is not None:
        rows *= torch.from_numpy(np.array(factors)).reshape(rows.shape)
    visible = None if mask is None else torch.from_numpy(np.array(mask))
    found = [torch.zeros_like(x) for x in (first[1], *second)]
    edges = [(0, p.nq, 0, p.nk)] if offsets is None else [(a, b, a, b) for a, b in pairwise(offsets)]
    for start, stop, low, high in edges:
        _softmax_rows(first, second, rows, visible, causal, (int(start), int(stop)), (int(low), int(high)), found)
    dq, dk, dv = (
        x.reshape((*q.shape[:-1], p.d) if i == 0 else (*k.shape[:-1], x.shape[-1])).to(q.dtype)
        for i, x in enumerate(found)
    )
    return (dq, dk, dv) if layout == "bhnd" else (dq.transpose(-3, -2), dk.transpose(-3, -2), dv.transpose(-3, -2))


def _softmax_rows(
    first: list[Tensor],
    second: list[Tensor],
    factors: Tensor,
    visible: Tensor | None,
    causal: bool,
    rows: tuple[int, int],
    keys: tuple[int, int],
    found: list[Tensor],
) -> None:
    dy, q, y = first
    k, v = (x[:, :, None, keys[0] : keys[1]] for x in second)
    dq, dk, dv = found
    count = k.shape[-2]
    if not count or not q.numel():
        return
    if visible is not None:
        # What nobody sees may be nan, of which 0 times is nan.
        k, v = (x.masked_fill(~visible[:, :, None, keys[0] : keys[1], None], 0.0) for x in (k, v))
    # Where pairs are hidden: 0 times what is not finite would be nan, for those who do not see it. Those who do have it by `ds`.
    shown = k.nan_to_num(0.0, 0.0, 0.0)
    step = max(1, _BLOCK // (count * math.prod(q.shape[:3])))
    for start in range(rows[0], rows[1], step):
        block = slice(start, min(start + step, rows[1]))
        f = factors[..., block, None]
        scaled = q[..., block, :] * f
        logits = scaled @ k.mT
        hidden = None
        if causal:
            last = torch.arange(block.start, block.stop) - rows[0] + count - (rows[1] - rows[0])
            hidden = torch.arange(count) > last[:, None]
        if visible is not None:
            masked = ~visible[:, :, None, None, keys[0] : keys[1]]
            hidden = masked if hidden is None else hidden | masked
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        weights = torch.softmax(logits, -1)
        if hidden is not None:
            # A row without keys is 0, not nan.
            weights = weights.masked_fill(hidden, 0.0)
        d = dy[..., block, :]
        inner = (d * y[..., block, :]).sum(-1, keepdim=True)
        ds = weights * (d @ v.mT - inner)
        if hidden is not None:
            ds = ds.masked_fill(hidden, 0.0)
            scaled = scaled.nan_to_num(0.0, 0.0, 0.0)
            odd = ~d.isfinite().all(-1, keepdim=True)
            if odd.any():
                weights = weights.masked_fill(odd & ~hidden, torch.nan)
                d = d.nan_to_num(0.0, 0.0, 0.0)
        dv[:, :, keys[0] : keys[1]] += (weights.mT @ d).sum(2)
        dq[..., block, :] = (ds @ (k if hidden is None else shown)) * f
        dk[:, :, keys[0] : keys[1]] += (ds.mT @ scaled).sum(2)


def _three_fake(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _gradients(more[-1], q, k, v)
    return dq, dk, dv


def _softmax_fake(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
    return _result(q, v)


def _softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3], output, *inputs[3:6])
    ctx.options = inputs[6:]


def _softmax_derive(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return (*_softmax_backward(dy, *ctx.saved_tensors, *ctx.options), *(None,) * (3 + len(ctx.options)))


def _softmax_vmap(info: Any, dims: Sequence[Any], *args: Any) -> Any:
    if args[4] is not None or args[5] is not None or args[0].ndim - (dims[0] is not None) < 3:
        return _ops.loop(_softmax, info, dims, args)
    return _softmax(*_leading(info.batch_size, dims, args, 3, (args[3], 3)), *args[4:]), 0


_softmax_backward = _ops.define(
    f"softmax_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, {_SOFTMAX_EXTRAS}, {_SOFTMAX}) "
    "-> (Tensor, Tensor, Tensor)",
    _softmax_backward_kernel,
    _three_fake,
)
_softmax = _ops.define(
    f"softmax_attention(Tensor q, Tensor k, Tensor v, {_SOFTMAX_EXTRAS}, {_SOFTMAX}) -> Tensor",
    _softmax_kernel,
    _softmax_fake,
    setup=_softmax_setup,
    backward=_softmax_derive,
    vmap=_softmax_vmap,
    casts=(0, 1, 2),
)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    logn: str | Tensor | None = None,
    layout: str = "bhnd",
) -> Tensor:
    """Attend with softmax weights, exactly: `fastops.softmax_attention` for tensors, with gradients.

    Parameters
    ----------
    q : (..., H, N, D) or (N, D) Tensor of float16, bfloat16, float32 or float64
        Queries, on the CPU; read in place.
    k : (..., H_kv, M, D) or (M, D) Tensor
        Keys.
    v : (..., H_kv, M, E) or (M, E) Tensor
        Values.
    causal : bool
        Row i sees the keys j <= i + M - N (torch's ``is_causal`` aligns the first row instead).
    key_mask : (..., M) or (..., H_kv, M) bool Tensor, optional
        True where a key counts.
    cu_seqlens : (S + 1,) int Tensor, optional
        Offsets of packed sequences.
    scale : float, optional
        Factor of q.k, D**-0.5 by default.
    logn : "keys" or Tensor that broadcasts to (..., H, N), optional
        A further factor of each row's logits; it gets no gradient.
    layout : {"bhnd", "bnhd"}
        The order of heads and tokens.

    Returns
    -------
    (..., H, N, E) Tensor
        Of the common dtype; under autocast of its dtype.

    Raises
    ------
    TypeError
        As `fastops.softmax_attention`; a tensor that is not on the CPU.
    ValueError
        As `fastops.softmax_attention`.
    NotImplementedError
        A second derivative.

    Notes
    -----
    The gradient computes the weights anew, in blocks of rows, with torch's own products: no array of N x M is kept or made.
    What a mask, causality or packing hides reaches no result and no gradient of who does not see it, be it nan or inf.

    Examples
    --------
    >>> import math, torch
    >>> from fastops.torch import softmax_attention
    >>> x = torch.eye(2)
    >>> softmax_attention(x, x, x, scale=math.log(3))
    tensor([[0.7500, 0.2500],
            [0.2500, 0.7500]])
    """
    q, k, v = _triple(q, k, v)
    key_mask, cu_seqlens = _given("key_mask", key_mask), _given("cu_seqlens", cu_seqlens)
    by_keys = isinstance(logn, str)
    if isinstance(logn, str):
        _validate.choice("logn", logn, ("keys",))
        factors = None
    else:
        factors = _given("logn", logn)
    _ops.without_gradient(logn=factors)
    return _softmax(q, k, v, key_mask, cu_seqlens, factors, causal, scale, by_keys, layout)


# --- Nystrom attention -------------------------------------------------------------------------------------------------------------

_NYSTROM = (
    "int num_landmarks, int iterations, str pinv, float? ridge, float? scale, str init, bool normalize, str layout"
)
_NYSTROM_NAMES = ("num_landmarks", "iterations", "pinv", "ridge", "scale", "init", "normalize", "layout")
_NYSTROM_EXTRAS = "Tensor? key_mask, Tensor? conv_weight, Tensor? q_landmarks, Tensor? k_landmarks"


def _nystrom_options(extras: Sequence[Tensor | None], options: Sequence[Any]) -> dict[str, Any]:
    key_mask, conv_weight, q_landmarks, k_landmarks = extras
    given = dict(zip(_NYSTROM_NAMES, options, strict=True))
    if q_landmarks is not None and k_landmarks is not None:
        given["landmarks"] = (array("landmarks[0]", q_landmarks), array("landmarks[1]", k_landmarks))
    return {
        "key_mask": _optional("key_mask", key_mask),
        "conv_weight": _optional("conv_weight", conv_weight),
        **given,
    }


def _cuda_nystrom_options(extras: Sequence[Tensor | None], options: Sequence[Any]) -> dict[str, Any]:
    """What `fastops.cuda` takes beside q, k and v."""
    key_mask, conv_weight, *pair = (None if x is None else x.detach().contiguous() for x in extras)
    landmarks = None if pair[0] is None else tuple(pair)
    given = {"key_mask": key_mask, "conv_weight": conv_weight, "landmarks": landmarks, "tf32": _takes_tf32()}
    return {**given, **dict(zip(_NYSTROM_NAMES, options, strict=True))}


def _nystrom_kernel(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
    if q.is_cuda:
        own = (x.detach() for x in (q, k, v))
        return _tensor(_cuda().nystrom_attention(*own, **_cuda_nystrom_options(more[:4], more[4:])))
    return tensor(
        attention.nystrom_attention(array("q", q), array("k", k), array("v", v), **_nystrom_options(more[:4], more[4:]))
    )


def _nystrom_backward_kernel(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, ...]:
    _, conv_weight, first, second = more[:4]
    if q.is_cuda:
        own = (x.detach() for x in (dy, q, k, v))
        options = _cuda_nystrom_options(more[:4], more[4:])
        found = _cuda().nystrom_attention_backward(*own, **options, return_d_landmarks=first is not None)
    else:
        operands = (array(name, x) for name, x in (("dy", dy), ("q", q), ("k", k), ("v", v)))
        options = _nystrom_options(more[:4], more[4:])
        found = attention.nystrom_attention_backward(*operands, **options, return_d_landmarks=first is not None)
    dq, dk, dv, *rest = found
    marks = [_nothing(q), _nothing(q)]
    if first is not None:
        marks = [_tensor(x).to(like.dtype) for x, like in zip(rest.pop(), (first, second), strict=True)]
    taps = _tensor(rest[0]).to(conv_weight.dtype) if rest else _nothing(q)
    return _tensor(dq), _tensor(dk), _tensor(dv), taps, *marks


def _nystrom_backward_fake(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, ...]:
    rest = (_nothing(q) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in more[1:4])
    return *_gradients(more[-1], q, k, v), *rest


def _nystrom_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _nystrom_derive(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dq, dk, dv, *rest = _nystrom_backward(dy, *ctx.saved_tensors, *ctx.options)
    given = (None if x is None else d for x, d in zip(ctx.saved_tensors[4:], rest, strict=True))
    return (dq, dk, dv, None, *given, *(None,) * len(ctx.options))


_nystrom_backward = _ops.define(
    f"nystrom_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, {_NYSTROM_EXTRAS}, {_NYSTROM}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _nystrom_backward_kernel,
    _nystrom_backward_fake,
)
_nystrom = _ops.define(
    f"nystrom_attention(Tensor q, Tensor k, Tensor v, {_NYSTROM_EXTRAS}, {_NYSTROM}) -> Tensor",
    _nystrom_kernel,
    _softmax_fake,
    setup=_nystrom_setup,
    backward=_nystrom_derive,
    casts=(0, 1, 2),
)


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_landmarks: int = 64,
    iterations: int = 6,
    pinv: str = "newton",
    ridge: float | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    conv_weight: Tensor | None = None,
    landmarks: Sequence[Tensor] | None = None,
    init: str = "matrix",
    normalize: bool = False,
    layout: str = "bhnd",
) -> Tensor:
    """Approximate softmax attention through landmarks: `fastops.nystrom_attention` for tensors, with gradients.

    Parameters
    ----------
    q : (..., H, N, D) or (N, D) Tensor of float16, bfloat16, float32 or float64
        Queries, on the CPU or, but for float64, on an NVIDIA GPU; read in place.
    k : (..., H_kv, M, D) or (M, D) Tensor
        Keys.
    v : (..., H_kv, M, E) or (M, E) Tensor
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
    key_mask : (..., M) bool Tensor, optional
        True where a key counts.
    conv_weight : (H, taps) Tensor, optional
        Weights of a convolution of v; it gets a gradient.
    landmarks : tuple of two Tensors, optional
        In place of the means of segments; they get gradients.
    init : {"matrix", "batch"}
        The coefficient with which the iteration begins.
    normalize : bool
        Divide each row by the sum of its weights.
    layout : {"bhnd", "bnhd"}
        The order of heads and tokens.

    Returns
    -------
    (..., H, N, E) Tensor
        Of the common dtype; under autocast of its dtype.

    Raises
    ------
    TypeError
        As `fastops.nystrom_attention`; tensors on several devices, or on a GPU of dtypes that it does not take.
    ValueError
        As `fastops.nystrom_attention`.
    NotImplementedError
        A second derivative.

    Notes
    -----
    On a GPU as `fastops.cuda.nystrom_attention`; float32 is multiplied in TF32 where ``torch.get_float32_matmul_precision()`` is not
    "highest".

    Examples
    --------
    >>> import torch
    >>> from fastops.torch import nystrom_attention, softmax_attention
    >>> t = torch.linspace(0, 3, 1000)
    >>> q = 3 * torch.stack([t.cos(), t.sin()], 1)
    >>> (nystrom_attention(q, q, q, num_landmarks=16) - softmax_attention(q, q, q)).abs().max() < 0.1
    tensor(True)
    """
    q, k, v = _triple(q, k, v)
    key_mask, conv_weight = _given("key_mask", key_mask), _given("conv_weight", conv_weight)
    first = second = None
    if landmarks is not None:
        if not isinstance(landmarks, (tuple, list)) or len(landmarks) != 2:
            raise _validate.wrong_type("landmarks", "a tuple of two tensors", landmarks)
        first, second = (_given(f"landmarks[{i}]", x) for i, x in enumerate(landmarks))
    extras = (key_mask, conv_weight, first, second)
    options = (num_landmarks, iterations, pinv, ridge, scale, init, normalize, layout)
    return _nystrom(q, k, v, *extras, *options)
