# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of `fastops.jax`: what a compiled call on jax's arrays costs over the same call on arrays, beside jax's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import fastops
from fastops import _shadows
from fastops.bench import framework
from fastops.bench.case import Case, Implementation, Machine, Task
from fastops.bench.framework import Array, Pair

# XLA's pool has one thread then, as every other row.
_ALONE = (("NPROC", "1"),)


def cases() -> list[Case]:
    """Every case of the family, in the order of the table."""
    return framework.cases("jax", {"10": 10, "1e5": 100_000, "1e6": 1_000_000, "1e7": 10_000_000})


def implementations(case: Case, machine: Machine) -> list[Implementation]:
    """Rows of a case on a machine: jax's own operation, the call on arrays, and the compiled call on jax's arrays by every route."""
    if "jax" not in machine.modules:
        return []
    from fastops._backend import installed

    name, backend, level = framework.native(machine)
    routes = ["ffi"] if backend == "native" and installed("fastops._jax") else []
    return [
        Implementation(_PEERS[framework.op_of(case)], "peer", env=_ALONE),
        Implementation(name, "fastops", backend, level),
        *(
            Implementation(f"{name}, fastops.jax by {route}", route, backend, level, env=_ALONE)
            for route in (*routes, "callback")
        ),
    ]


_PEERS = {
    "mul": "jnp.multiply (exact)",
    "matmul": "jnp.matmul (exact)",
    "linear causal": "jax.nn attention (softmax)",
    "linear causal forward + backward": "jax.nn attention (softmax)",
    "softmax": "jax.nn attention",
    "nystrom": "jax.nn attention (exact)",
    "step": "jax, compiled",
}


def prepare(case: Case, row: Implementation) -> Task:
    """Operands and call of one row; equal operands in every process."""
    return framework.task(case, row, _CALLS[framework.op_of(case)], np.asarray)


def _compiled(function: Callable[..., Any], operands: list[Array]) -> Callable[[], Any]:
    """A compiled call that waits for its result."""
    import jax

    arrays, ready = [_shared(x) for x in operands], jax.jit(function)
    return lambda: jax.block_until_ready(ready(*arrays))


def _shared(x: Array) -> Any:
    """NumPy's memory as jax's: what `jax.numpy.asarray` copies to lies in small pages, which each read of it would show."""
    import jax

    return jax.dlpack.from_dlpack(_shadows.copy(x, x))  # on a boundary from which jax takes it over


def _ours(row: Implementation) -> Any:
    """fastops.jax by the route of a row."""
    from fastops import jax as fj

    fj.set_route(row.recipe)
    return fj


def _plain(name: str, peer: Callable[..., Any], count: int, **options: Any) -> Any:
    """A function of arrays, its twin of jax's arrays, and jax's own."""

    def made(row: Implementation, operands: list[Array]) -> Pair:
        given = operands[:count]
        want = partial(getattr(fastops, name), *given, **options)
        if row.recipe == "fastops":
            return want, want
        if row.recipe == "peer":
            return _compiled(peer, given), want
        return _compiled(partial(getattr(_ours(row), name), **options), given), want

    return made


def _peer(name: str) -> Callable[..., Any]:
    def call(*arrays: Any) -> Any:
        import jax

        return getattr(jax.numpy, name)(*arrays)

    return call


def _softmax(q: Any, k: Any, v: Any, causal: bool = False) -> Any:
    import jax

    y = jax.nn.dot_product_attention(*(x.swapaxes(1, 2) for x in (q, k, v)), is_causal=causal)
    return y.swapaxes(1, 2)


def _causal_softmax(q: Any, k: Any, v: Any) -> Any:
    return _softmax(q, k, v, True)


def _both_ways(row: Implementation, operands: list[Array]) -> Pair:
    """The gradient of q, as what is compared."""
    arrays = framework.gradient_of_q(operands)
    if row.recipe == "fastops":
        return arrays, arrays
    attend = _causal_softmax if row.recipe == "peer" else partial(_ours(row).linear_attention, causal=True)

    def tape(q: Any, k: Any, v: Any, dy: Any) -> Any:
        import jax

        # All three, as a training step needs them.
        found = jax.vjp(attend, q, k, v)[1](dy)
        return found[0] + 0 * (found[1].sum() + found[2].sum())

    return _compiled(tape, operands), arrays


def _step(row: Implementation, operands: list[Array]) -> Pair:
    q, k, v, _ = operands
    b, h, d = q.shape
    state = (np.zeros((b, h, d, d), np.float32), np.zeros((b, h, d), np.float32))

    def want() -> Array:
        # After any number of equal tokens the row is the value.
        return v

    if row.recipe == "fastops":
        return partial(fastops.linear_attention_step_, q, k, v, state), want
    if row.recipe != "peer":
        step = _ours(row).linear_attention_step
        return _compiled(lambda q, k, v, s, z: step(q, k, v, (s, z))[0], [q, k, v, *state]), want

    def plain(q: Any, k: Any, v: Any, s: Any, z: Any) -> Any:
        import jax

        fq, fk = (jax.nn.elu(x) + 1 for x in (q, k))
        s, z = s + fk[..., None] * v[..., None, :], z + fk
        return jax.numpy.einsum("bhd,bhde->bhe", fq, s) / (fq * z).sum(-1, keepdims=True)

    return _compiled(plain, [q, k, v, *state]), want


_CALLS: dict[str, Callable[[Implementation, list[Array]], Pair]] = {
    "mul": _plain("mitchell_mul", _peer("multiply"), 2),
    "matmul": _plain("mitchell_matmul", _peer("matmul"), 2),
    "linear causal": _plain("linear_attention", _causal_softmax, 3, causal=True),
    "linear causal forward + backward": _both_ways,
    "softmax": _plain("softmax_attention", _softmax, 3),
    "nystrom": _plain("nystrom_attention", _softmax, 3),
    "step": _step,
}
