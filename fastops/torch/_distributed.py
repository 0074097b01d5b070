# SPDX-License-Identifier: BSD-3-Clause
"""Linear attention over a sequence that is split across the ranks of a process group."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _attention, _validate
from .._validate import Text
from ._attention import _triple, linear_attention
from ._ops import without_gradient

__all__ = ["distributed_linear_attention"]


def _gathered(parts: list[Tensor], group: Any) -> list[list[Tensor]]:
    """The tensors of every rank, which have the shapes of these, in one message."""
    flat = torch.cat([x.reshape(-1) for x in parts])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, flat, group=group)
    sizes = [x.numel() for x in parts]
    return [[y.reshape(x.shape) for x, y in zip(parts, row.split(sizes), strict=True)] for row in found]


class _Before(torch.autograd.Function):
    """The state that a rank begins with: of the ranks before it, or of all, with what their decays leave of it."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, z: Tensor, m: Tensor | None, log: Tensor, causal: bool, group: Any) -> Any:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        rows = _gathered([s, z, log] if m is None else [s, z, log, m], group)
        logs = [row[2] for row in rows]
        # The weight with which rank r begins with the state of rank i, and where maxima are kept the maximum of r: for all r, as
        # the gradient needs them.
        begins, maxima = [], None
        for r in range(ranks):
            seen = range(r) if causal else range(ranks)
            left = {
                i: torch.stack(logs[i + 1 : r]).sum(0) if r > i + 1 and causal else torch.zeros_like(log) for i in seen
            }
            if m is None:
                begins.append({i: x.exp() for i, x in left.items()})
                continue
            moved = {i: rows[i][3] + left[i] / math.log(2) for i in seen}
            most = torch.stack([torch.full_like(m, -torch.inf), *moved.values()]).amax(0)
            # Without keys there is no maximum, and nothing to weigh.
            begins.append({i: torch.where(x == -torch.inf, 0.0, (x - most).exp2()) for i, x in moved.items()})
            maxima = most if r == rank else maxima
        ctx.weights = [begins[r].get(rank) for r in range(ranks)]
        ctx.group = group
        first_s, first_z = torch.zeros_like(s), torch.zeros_like(z)
        for i, weight in begins[rank].items():
            first_s += weight[..., None] * rows[i][0]
            first_z += weight * rows[i][1]
        if maxima is None:
            return first_s, first_z
        ctx.mark_non_differentiable(maxima)
        return first_s, first_z, maxima

    @staticmethod
    def backward(ctx: Any, ds: Tensor, dz: Tensor, *_: Any) -> Any:
        # Each rank is asked, also where nothing of its state is used: the others wait for it.
        own_s, own_z = torch.zeros_like(ds), torch.zeros_like(dz)
        for weight, (other_s, other_z) in zip(ctx.weights, _gathered([ds, dz], ctx.group), strict=True):
            if weight is not None:
                own_s += weight[..., None] * other_s
                own_z += weight * other_z
        return own_s, own_z, None, None, None, None


def _total(decay: Tensor | None, tokens: int, z: Tensor) -> Tensor:
    """The logarithm of what this rank's tokens leave of a state, as z (..., H_kv, F) is."""
    if decay is None:
        return torch.zeros_like(z)
    # (H_kv,), one for all tokens, or (..., H_kv, M).
    per_token = decay.shape == (*z.shape[:-1], tokens)
    total = decay.to(z.dtype).sum(-1) if per_token else decay.to(z.dtype) * tokens
    return total[..., None].expand(z.shape).contiguous()


def distributed_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    causal: bool = True,
    decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_state: bool = False,
    layout: str = "bhnd",
    feature_map: str = "elu",
    **options: Any,
) -> Any:
    """Attend over a sequence whose tokens are split across ranks in their order: each rank sends its state, not its keys.

    Parameters
    ----------
    q : (..., H, N, D) Tensor
        The queries of this rank's tokens, on the CPU.
    k : (..., H_kv, N, D) Tensor
        Their keys. Ranks may have different numbers of tokens; all other sizes and the dtype are the same.
    v : (..., H_kv, N, E) Tensor
        Their values.
    group : ProcessGroup, optional
        The ranks, the first tokens with rank 0; the default group otherwise.
    causal : bool
        Each row sees the keys up to its own, on this rank and those before; otherwise those of all ranks.
    decay : (H_kv,) or (..., H_kv, N) Tensor, optional
        As in `linear_attention`, of this rank's tokens; it gets no gradient here.
    key_mask : bool Tensor, optional
        As in `linear_attention`, of this rank's tokens.
    return_state : bool
        Return the sums over all keys up to the end of this rank's tokens too, with `causal`.
    layout : {"bhnd", "bnhd"}
        The order of heads and tokens.
    feature_map : str
        As in `linear_attention`.
    **options
        ``normalize``, ``eps``, ``kernel_eps``, ``scale`` and ``projection`` of `linear_attention`.

    Returns
    -------
    y : (..., H, N, E) Tensor
        The rows of this rank's tokens.
    state : tuple of Tensors
        With `return_state`.

    Raises
    ------
    RuntimeError
        ``torch.distributed`` is not initialised.
    TypeError, ValueError
        As `linear_attention`; an option that is not there; `return_state` without `causal`.

    Notes
    -----
    Every rank sends D E + 2 D numbers a head to every other (D more where the state has maxima), in one message forward and one
    backward, whatever the length is. Every rank of the group must call it, and its backward. The state of a rank is computed
    once more than on one rank: some 2 D E flops a token.

    Examples
    --------
    >>> import torch
    >>> import torch.distributed as dist
    >>> from fastops.torch import distributed_linear_attention, linear_attention
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> x = torch.randn(1, 2, 5, 4)
    >>> torch.equal(distributed_linear_attention(x, x, x), linear_attention(x, x, x, causal=True))
    True
    >>> dist.destroy_process_group()
    """
    known = ("normalize", "eps", "kernel_eps", "scale", "projection")
    for name in options:
        if name not in known:
            raise _validate.wrong_choice("an option", [*known], name)
    if not (dist.is_available() and dist.is_initialized()):
        raise _validate.wrong_moment("distributed_linear_attention", "called after init_process_group", "a call before")
    if _validate.boolean("return_state", return_state) and not causal:
        raise _validate.wrong_value("return_state", "False without causal=True", return_state)
    if decay is not None and not causal:
        raise _validate.wrong_value("decay", "None without causal=True", Text("a tensor"))
    q, k, v = _triple(q, k, v)
    without_gradient(decay=decay)
    if q.ndim < 3:
        raise _validate.wrong_value("q", "of shape (..., H, N, D)", Text(str(tuple(q.shape))))
    _validate.choice("feature_map", feature_map, _attention.FEATURE_MAPS)
    given: dict[str, Any] = {"feature_map": feature_map, "layout": layout, **options}
    axis = -3 if layout == "bnhd" else -2
    nothing = slice(0, 0)
    no_rows = (..., nothing, slice(None), slice(None)) if axis == -3 else (..., nothing, slice(None))
    sums: dict[str, Any] = {"decay": decay, "causal": causal, "key_mask": key_mask}
    _, (s, z, *rest) = linear_attention(q[no_rows], k, v, return_state=True, **sums, **given)
    log = _total(decay, k.shape[axis], z)
    state = _Before.apply(s, z, rest[0] if rest else None, log, causal, group)
    if causal:
        return linear_attention(q, k, v, initial_state=state, return_state=return_state, **sums, **given)
    return linear_attention(q, k[no_rows], v[no_rows], initial_state=state, **given)
