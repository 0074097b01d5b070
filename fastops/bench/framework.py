# SPDX-License-Identifier: BSD-3-Clause
"""What the benchmark cases of the frameworks share: the operations, their operands, and how far results may differ."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fastops.bench.case import Case, Implementation, Machine, Task, WrongResult

Array = npt.NDArray[Any]
# A call, and what it should give.
Pair = tuple[Callable[[], Any], Callable[[], Array]]

_LEVELS = ("native v4", "native v3", "native v2", "native neon", "numba", "reference")
# Sums of products in float32; float32 steps.
_BOUND = 2e-3


def case(family: str, op: str, size: str, shape: tuple[int, ...], unit: str = "element", quick: bool = False) -> Case:
    """A case in float32."""
    return Case(family, f"{family}: {op}", "float32", size, shape, unit, quick, _LEVELS)


def cases(family: str, products: Mapping[str, int]) -> list[Case]:
    """Products of so many elements, and the operations that every framework has."""

    def attention(op: str, tokens: int, quick: bool = False) -> Case:
        return case(family, op, f"8x{tokens}x64", (1, 8, tokens, 64), "token", quick)

    return [
        *(case(family, "mul", size, (n,), quick=n == 10) for size, n in products.items()),
        case(family, "matmul", "256^3", (256, 256, 256), "MAC", quick=True),
        attention("linear causal", 256, quick=True),
        attention("linear causal", 4096),
        attention("linear causal forward + backward", 1024),
        attention("softmax", 1024),
        attention("nystrom", 4096),
        attention("step", 1),
    ]


def op_of(case: Case) -> str:
    """The operation of a case without its family."""
    return case.op.removeprefix(f"{case.family}: ")


def native(machine: Machine) -> tuple[str, str, str]:
    """The name of the rows that call fastops, their backend and its level."""
    backend = machine.backends[0]
    level = machine.targets[0] if backend == "native" and machine.targets else ""
    return f"{backend} {level}".strip(), backend, level


def generator(case: Case) -> np.random.Generator:
    """Equal numbers in every process."""
    return np.random.default_rng(zlib.crc32(case.group.encode()))


def task(case: Case, row: Implementation, make: Callable[[Implementation, list[Array]], Pair], plain: Any) -> Task:
    """Operands and call of one row; `plain` makes an array of a result."""
    call, want = make(row, _operands(op_of(case), case.shape, generator(case)))
    work = float(np.prod(case.shape)) if case.unit != "token" else float(case.shape[2])

    def check() -> float:
        got = call()
        return 0.0 if row.recipe == "peer" else difference(plain(got), want())

    return Task(call, (), work, work, check)


def difference(got: Array, want: Array) -> float:
    """The largest one, relative where numbers are large; raises where it is too large."""
    error = float(np.max(np.abs(got - want) / (1.0 + np.abs(want)), initial=0.0))
    if not error <= _BOUND:
        raise WrongResult(f"difference {error:.3g} from the call on arrays, allowed {_BOUND:.3g}")
    return error


def _operands(op: str, shape: tuple[int, ...], rng: np.random.Generator) -> list[Array]:
    if op == "mul":
        return [rng.uniform(1, 2, shape).astype(np.float32) for _ in range(2)]
    if op == "matmul":
        m, k, n = shape
        return [rng.standard_normal(s).astype(np.float32) for s in ((m, k), (k, n))]
    if op == "step":
        shape = (shape[0], shape[1], shape[3])
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(4)]


def gradient_of_q(operands: list[Array]) -> Callable[[], Array]:
    """Causal linear attention forward and backward on arrays: the gradient of q is what is compared."""
    import fastops

    q, k, v, dy = operands

    def arrays() -> Array:
        y = fastops.linear_attention(q, k, v, causal=True)
        found: Array = fastops.linear_attention_backward(dy, q, k, v, y, causal=True)[0]
        return found

    return arrays
