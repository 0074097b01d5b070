# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of `fastops.torch`: what a call on tensors costs over the same call on arrays, beside torch's own operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import fastops
from fastops.bench import framework, optim
from fastops.bench.case import Case, Implementation, Machine, Task
from fastops.bench.framework import Array, Pair

_TENSORS = "fastops.torch"
_LR, _DECAY = 1e-4, 0.999


def _model(size: str, quick: bool = False) -> Case:
    shapes = optim._SETS[size]()
    return framework.case("torch", "adamw + ema", size, (len(shapes), sum(map(optim._size, shapes))), "element", quick)


def cases() -> list[Case]:
    """Every case of the family, in the order of the table."""
    shared = framework.cases("torch", {"10": 10, "1e6": 1_000_000})
    return [*shared, _model("ResNet-50"), _model("5000x256", quick=True)]


def implementations(case: Case, machine: Machine) -> list[Implementation]:
    """Rows of a case on a machine: torch's own operation, the call on arrays, the call on tensors."""
    if "torch" not in machine.modules:
        return []
    name, backend, level = framework.native(machine)
    many = machine.threads if "adamw" in case.op else 1
    return [
        Implementation(_PEERS[framework.op_of(case)], "peer", threads=many),
        Implementation(name, "fastops", backend, level, many),
        Implementation(f"{name}, {_TENSORS}", "tensors", backend, level, many),
    ]


_PEERS = {
    "mul": "torch.mul (exact)",
    "matmul": "torch.mm (exact)",
    "linear causal": "torch SDPA (softmax)",
    "linear causal forward + backward": "torch SDPA (softmax)",
    "softmax": "torch SDPA",
    "nystrom": "torch SDPA (exact)",
    "step": "torch, eager",
    "adamw + ema": "torch AdamW fused, _foreach_lerp_",
}


def prepare(case: Case, row: Implementation) -> Task:
    """Operands and call of one row; equal operands in every process."""
    import torch

    torch.set_num_threads(row.threads)
    op = framework.op_of(case)
    if op == "adamw + ema":
        return _steps(case, row, framework.generator(case))
    plain = lambda x: np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)
    return framework.task(case, row, _CALLS[op], plain)


def _plain(ours: Callable[..., Any], theirs: str, peer: Callable[..., Any], count: int, **options: Any) -> Any:
    """A function of arrays, its twin of tensors by name, and torch's own."""

    def made(row: Implementation, operands: list[Array]) -> Pair:
        import torch

        given = operands[:count]
        tensors = [torch.from_numpy(x) for x in given]
        want = partial(ours, *given, **options)
        if row.recipe == "fastops":
            return want, want
        if row.recipe == "peer":
            return partial(peer, torch, *tensors), want
        from fastops import torch as ft

        return partial(getattr(ft, theirs), *tensors, **options), want

    return made


def _sdpa(torch: Any, q: Any, k: Any, v: Any, causal: bool = False) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _causal_sdpa(torch: Any, q: Any, k: Any, v: Any) -> Any:
    return _sdpa(torch, q, k, v, True)


def _step(row: Implementation, operands: list[Array]) -> Pair:
    import torch

    q, k, v, _ = operands
    b, h, d = q.shape
    nothing = np.zeros((b, h, 0, d), np.float32)
    _, begin = fastops.linear_attention(nothing, nothing, nothing, causal=True, return_state=True)
    state = tuple(x.copy() for x in begin)

    def want() -> Array:
        # After any number of equal tokens the row is the value.
        return v

    if row.recipe == "fastops":
        return partial(fastops.linear_attention_step_, q, k, v, state), want
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    s, z = (torch.from_numpy(x) for x in state)
    if row.recipe == "tensors":
        from fastops import torch as ft

        call: Any = ft.linear_attention_step_
        return partial(call, *tensors, (s, z)), want

    def eager() -> Any:
        fq, fk = (torch.nn.functional.elu(x) + 1 for x in tensors[:2])
        s.add_(torch.einsum("bhd,bhe->bhde", fk, tensors[2]))
        z.add_(fk)
        return torch.einsum("bhd,bhde->bhe", fq, s) / (fq * z).sum(-1, keepdim=True)

    return eager, want


def _both_ways(row: Implementation, operands: list[Array]) -> Pair:
    """The gradient of q, as what is compared."""
    import torch

    *qkv, dy = operands
    arrays = framework.gradient_of_q(operands)
    if row.recipe == "fastops":
        return arrays, arrays
    tensors = [torch.from_numpy(x).requires_grad_() for x in qkv]
    upper = torch.from_numpy(dy)

    def tape() -> Any:
        if row.recipe == "peer":
            y = _causal_sdpa(torch, *tensors)
        else:
            from fastops import torch as ft

            y = ft.linear_attention(*tensors, causal=True)
        return torch.autograd.grad(y, tensors, upper)[0]

    return tape, arrays


_CALLS: dict[str, Callable[[Implementation, list[Array]], Pair]] = {
    "mul": _plain(fastops.mitchell_mul, "mitchell_mul", lambda torch, a, b: torch.mul(a, b), 2),
    "matmul": _plain(fastops.mitchell_matmul, "mitchell_matmul", lambda torch, a, b: torch.mm(a, b), 2),
    "linear causal": _plain(fastops.linear_attention, "linear_attention", _causal_sdpa, 3, causal=True),
    "linear causal forward + backward": _both_ways,
    "softmax": _plain(fastops.softmax_attention, "softmax_attention", _sdpa, 3),
    "nystrom": _plain(fastops.nystrom_attention, "nystrom_attention", _sdpa, 3),
    "step": _step,
}


def _steps(case: Case, row: Implementation, rng: np.random.Generator) -> Task:
    """A step of AdamW with an average of the parameters."""
    import torch

    shapes = optim._SETS[case.size]()
    lists = {role: [rng.standard_normal(s).astype(np.float32) for s in shapes] for role in ("p", "g")}
    lists |= {role: [np.zeros(s, np.float32) for s in shapes] for role in ("m", "v")}
    lists["s"] = [p.copy() for p in lists["p"]]
    first = {role: items[0].copy() for role, items in lists.items()}
    elements = float(sum(p.size for p in lists["p"]))
    params = [torch.nn.Parameter(torch.from_numpy(p)) for p in lists["p"]]
    for p, g in zip(params, lists["g"], strict=True):
        p.grad = torch.from_numpy(g)
    call: Callable[[], object]
    if row.recipe == "fastops":
        tensors = {role: fastops.TensorList(items) for role, items in lists.items()}
        options: dict[str, Any] = {"lr": _LR, "weight_decay": 0.01, "ema": tensors["s"], "ema_decay": _DECAY}
        step = iter(range(1, 2**31))
        call = lambda: fastops.adamw_step_(*(tensors[x] for x in "pgmv"), step=next(step), **options)
    elif row.recipe == "tensors":
        from fastops import torch as ft

        call = ft.AdamW(params, lr=_LR, ema_decay=_DECAY).step
    else:
        optimizer = torch.optim.AdamW(params, lr=_LR, fused=True)
        shadows, live = [torch.from_numpy(s) for s in lists["s"]], [p.detach() for p in params]

        call = lambda: (optimizer.step(), torch._foreach_lerp_(shadows, live, 1.0 - _DECAY))

    def check() -> float:
        call()
        want = {role: [x] for role, x in first.items()}
        fastops.adamw_step_(
            *(want[x] for x in "pgmv"), step=1, lr=_LR, weight_decay=0.01, ema=want["s"], ema_decay=_DECAY
        )
        return framework.difference(lists["p"][0], want["p"][0])

    return Task(call, (), elements, elements, check, keep=[lists])
