# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of Nystrom attention, a part of the family of attention: against torch, the published modules and exact softmax."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastops.bench.case import Case, Implementation, Machine, Task, WrongResult, aligned

Array = npt.NDArray[Any]

REFERENCE = "reference"
RIGHT, LEFT, MODULE, HUGGING_FACE, SDPA = (
    "torch right",
    "torch left",
    "nystrom_attention",
    "transformers",
    "nystrom SDPA",
)
# Of exact attention a part is timed: heads.
_SLOW_PAIRS = 1 << 25
_STEPS, _RIDGE = 6, 1 / 1178
# The modules of others begin all their iterations with one coefficient, and only iterate.
_BATCH = frozenset([LEFT, MODULE, HUGGING_FACE])
_LATENT = 8


class Kind(NamedTuple):
    """An operation's name, taken apart."""

    gradient: bool
    ridge: bool
    landmarks: int

    @staticmethod
    def of(case: Case) -> Kind:
        words = case.op.split()
        # Of short cases, which tests have, fewer: else attention would be exact.
        return Kind("gradient" in words, "ridge" in words, min(int(words[-1][1:]), case.shape[0] // 2))

    def options(self, row: Implementation) -> dict[str, Any]:
        """Keywords of the public functions for what a row computes."""
        if row.recipe in _BATCH:
            return {"num_landmarks": self.landmarks, "init": "batch"}
        return {"num_landmarks": self.landmarks, "pinv": "ridge" if self.ridge else "newton"}


def _case(op: str, size: tuple[int, ...], quick: bool = False) -> Case:
    b, h, n, d = size
    yardsticks = ("nystrom_attention", "torch", "NumPy", REFERENCE)
    return Case(
        "attention", f"nystrom {op}", "float32", "x".join(map(str, size)), (n, b, h, d), "MAC", quick, yardsticks
    )


def cases() -> list[Case]:
    """Every case, in the order of the table."""
    short, small, long, longest = (1, 8, 1024, 64), (4, 12, 512, 64), (1, 8, 4096, 64), (1, 8, 16384, 64)
    sizes = [(short, 32), (short, 64), (short, 128), (small, 64), (small, 128)]
    sizes += [(long, 32), (long, 64), (long, 128), (longest, 64)]
    return [
        *(_case(f"m{m}", size, quick=(size, m) == (short, 64)) for size, m in sizes),
        *(_case("ridge m128", size) for size in (small, short)),
        *(_case("gradient m64", size) for size in (long, small)),
    ]


def implementations(case: Case, machine: Machine) -> list[Implementation]:
    """Rows of a case on a machine: the peers first, the native levels last."""
    kind = Kind.of(case)
    rows: list[Implementation] = []
    if "torch" in machine.modules:
        if case.shape[0] % kind.landmarks == 0:
            if "nystrom_attention" in machine.modules:
                rows.append(Implementation("nystrom_attention", MODULE))
            if "transformers" in machine.modules:
                rows.append(Implementation("transformers Nystromformer", HUGGING_FACE))
            rows.append(Implementation("torch (P1 Z)(P3 V)", LEFT))
        rows.append(Implementation("torch P1 (Z (P3 V))", RIGHT))
        if machine.threads > 1:
            rows.append(
                Implementation(f"torch P1 (Z (P3 V)), {machine.threads} threads", RIGHT, threads=machine.threads)
            )
        rows.append(Implementation("torch SDPA (softmax)", SDPA))
    if not kind.gradient:
        rows.append(Implementation("NumPy", "nystrom NumPy"))
    rows.append(Implementation(REFERENCE, "fastops"))
    if "numba" in machine.backends:
        rows.append(Implementation("numba", "fastops", "numba"))
    rows += [Implementation(f"native {target}", "fastops", "native", target) for target in reversed(machine.targets)]
    if machine.backends[0] == "native" and machine.threads > 1:
        best, many = machine.targets[0], machine.threads
        rows.append(Implementation(f"native {best}, {many} threads", "fastops", "native", best, many))
    return rows


# --- inputs --------------------------------------------------------------------------------------------------------------------


def _inputs(case: Case) -> list[Array]:
    """q, k, v and dy: (B, H, N, D).

    Rows that change smoothly and lie in a few directions: of others the operation is no better than the mean of v. The first
    three come from one path, an autoregressive one of the first order.
    """
    rng = np.random.default_rng(zlib.crc32(f"nystrom {case.size}".encode()))
    n, b, h, d = case.shape
    path = rng.standard_normal((n, b, h, _LATENT))
    keep = 0.98
    path[1:] *= math.sqrt(1 - keep**2)
    for i in range(1, n):
        path[i] += keep * path[i - 1]
    path = np.ascontiguousarray(np.moveaxis(path, 0, 2))
    to_key = rng.standard_normal((b, h, _LATENT, d)) / math.sqrt(_LATENT)
    to_query = 2 * to_key + 0.5 * rng.standard_normal((b, h, _LATENT, d)) / math.sqrt(_LATENT)
    to_value = rng.standard_normal((b, h, _LATENT, d)) / math.sqrt(_LATENT)
    arrays = [path @ to_query, path @ to_key, path @ to_value, rng.standard_normal((b, h, n, d))]
    return [aligned(x.astype(np.float32), i) for i, x in enumerate(arrays)]


def _part(case: Case, row: Implementation) -> tuple[slice, slice]:
    """What a row takes of batch and heads: all, or where it is slow one head."""
    n, b, h, _ = case.shape
    slow = row.name == REFERENCE or (row.recipe == SDPA and b * h * n * n > _SLOW_PAIRS)
    return (slice(0, 1), slice(0, 1)) if slow else (slice(None), slice(None))


# --- implementations -----------------------------------------------------------------------------------------------------------


def _ours(case: Case, row: Implementation, f: Any, inputs: list[Array]) -> Callable[[], Any]:
    kind = Kind.of(case)
    q, k, v, dy = inputs
    options = kind.options(row)
    if not kind.gradient:
        return partial(f.nystrom_attention, q, k, v, **options)

    def both() -> Any:
        f.nystrom_attention(q, k, v, **options)
        return f.nystrom_attention_backward(dy, q, k, v, **options)

    return both


def _softmax(x: Array) -> Array:
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)
    return x


def _numpy(case: Case, inputs: list[Array]) -> Callable[[], Any]:
    """As it is written with NumPy's matrix products, in float32."""
    kind = Kind.of(case)
    q, k, v, _ = inputs
    b, h, n, d = q.shape
    m = kind.landmarks

    def means(x: Array) -> Array:
        # Segments of one length, as every case has them.
        return np.asarray(x.reshape((b, h, m, n // m, d)).mean(axis=3))

    def call() -> Any:
        qt, kt = means(q) * np.float32(d**-0.5), means(k)
        one = np.eye(m, dtype=np.float32)
        a = _softmax(qt @ kt.swapaxes(-1, -2))
        w = _softmax(qt @ k.swapaxes(-1, -2)) @ v
        at = a.swapaxes(-1, -2)
        c = a.sum(axis=-2).max(axis=-1) * a.sum(axis=-1).max(axis=-1)
        c = c[..., np.newaxis, np.newaxis]
        if kind.ridge:
            w = np.linalg.solve(at @ a + np.float32(_RIDGE) * c * one, at @ w)
        else:
            z = at / c
            for _ in range(_STEPS):
                x = a @ z
                z = z @ (13 * one - x @ (15 * one - x @ (7 * one - x))) / 4
            w = z @ w
        return _softmax(q @ (np.float32(d**-0.5) * kt).swapaxes(-1, -2)) @ w

    return call


# With torch.


def _torch_inverse(a: Any, c: Any) -> Any:
    import torch

    z = a.transpose(-1, -2) / c
    one = torch.eye(a.shape[-1])
    for _ in range(_STEPS):
        x = a @ z
        z = 0.25 * z @ (13 * one - x @ (15 * one - x @ (7 * one - x)))
    return z


def _torch_right(kind: Kind, q: Any, k: Any, v: Any) -> Any:
    """The scale on small operands only, each matrix for itself, nothing of N rows beyond P1 and P3."""
    import torch

    m, d = kind.landmarks, q.shape[-1]
    qt = q.unflatten(2, (m, -1)).mean(3) * d**-0.5
    kt = k.unflatten(2, (m, -1)).mean(3)
    a = (qt @ kt.transpose(-1, -2)).softmax(-1)
    w = (qt @ k.transpose(-1, -2)).softmax(-1) @ v
    c = (a.sum(-2).amax(-1) * a.sum(-1).amax(-1))[..., None, None]
    if kind.ridge:
        at = a.transpose(-1, -2)
        factor = torch.linalg.cholesky(at @ a + _RIDGE * c * torch.eye(m))
        w = torch.cholesky_solve(at @ w, factor)
    else:
        w = _torch_inverse(a, c) @ w
    return (q @ (d**-0.5 * kt).transpose(-1, -2)).softmax(-1) @ w


def _torch_left(kind: Kind, q: Any, k: Any, v: Any) -> Any:
    """In the order, and with the coefficient, of the module of the paper's authors."""
    m, d = kind.landmarks, q.shape[-1]
    q, k = q / d**0.25, k / d**0.25
    qt, kt = (x.unflatten(2, (m, -1)).mean(3) for x in (q, k))
    p1 = (q @ kt.transpose(-1, -2)).softmax(-1)
    a = (qt @ kt.transpose(-1, -2)).softmax(-1)
    p3 = (qt @ k.transpose(-1, -2)).softmax(-1)
    return (p1 @ _torch_inverse(a, a.sum(-2).max())) @ (p3 @ v)


def _flat(x: Array) -> Any:
    """(B, N, H D), the layout of modules."""
    import torch

    b, h, n, d = x.shape
    return torch.from_numpy(np.ascontiguousarray(x.swapaxes(1, 2)).reshape((b, n, h * d)))


def _module(kind: Kind, inputs: list[Array]) -> tuple[list[Any], Callable[[], Any]]:
    """NystromAttention of the package, its projections replaced by what gives q, k and v."""
    import torch
    from nystrom_attention import NystromAttention

    b, h, n, d = inputs[0].shape
    given = torch.cat([_flat(x) for x in inputs[:3]], -1)
    module = NystromAttention(1, d, h, kind.landmarks, _STEPS, residual=False)
    module.to_qkv, module.to_out = _given(given), torch.nn.Identity()
    nothing = torch.zeros(b, n, 1)
    return [given], lambda: module(nothing)


def _hugging_face(kind: Kind, inputs: list[Array]) -> tuple[list[Any], Callable[[], Any]]:
    """NystromformerSelfAttention, its projections replaced by what gives q, k and v."""
    import torch
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    b, h, n, d = inputs[0].shape
    config = NystromformerConfig(
        hidden_size=h * d,
        num_attention_heads=h,
        num_landmarks=kind.landmarks,
        segment_means_seq_len=n,
    )
    module = NystromformerSelfAttention(config)
    module.conv_kernel_size = None
    given = [_flat(x) for x in inputs[:3]]
    module.query, module.key, module.value = map(_given, given)
    nothing = torch.zeros(b, n, 1)
    return given, lambda: module(nothing)[0]


def _given(value: Any) -> Any:
    """A module that answers `value` to anything."""
    import torch

    module = torch.nn.Identity()
    module.forward = lambda _: value
    return module


def _torch(case: Case, row: Implementation, inputs: list[Array]) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(row.threads)
    kind = Kind.of(case)
    b, h, n, d = inputs[0].shape
    flat = row.recipe in (MODULE, HUGGING_FACE)
    dy = _flat(inputs[3]) if flat else torch.from_numpy(inputs[3])
    if flat:
        leaves, attend = (_module if row.recipe == MODULE else _hugging_face)(kind, inputs)
    else:
        leaves = [torch.from_numpy(x) for x in inputs[:3]]
        if row.recipe == SDPA:
            attend = partial(torch.nn.functional.scaled_dot_product_attention, *leaves)
        else:
            attend = partial(_torch_right if row.recipe == RIGHT else _torch_left, kind, *leaves)

    def back(tensor: Any) -> list[Array]:
        """One or three arrays (B, H, N, D)."""
        array = np.asarray(tensor.numpy())
        return list(np.moveaxis(array.reshape((b, n, -1, h, d)), (2, 3), (0, 2))) if flat else [array]

    if not kind.gradient:

        def forward() -> Any:
            with torch.no_grad():
                return back(attend())[0]

        return forward
    for x in leaves:
        x.requires_grad_()

    def both() -> Any:
        for x in leaves:
            x.grad = None
        attend().backward(dy)
        return tuple(array for x in leaves for array in back(x.grad))

    return both


# --- tasks ---------------------------------------------------------------------------------------------------------------------


def prepare(case: Case, row: Implementation, functions: Callable[[str], Any]) -> Task:
    """Inputs and call of one row; equal inputs in every process."""
    part = _part(case, row)
    inputs = [np.ascontiguousarray(x[part]) for x in _inputs(case)]
    n, b, h, d = case.shape
    taken = inputs[0].shape[0] * inputs[0].shape[1]
    kind = Kind.of(case)
    if row.recipe == "nystrom NumPy":
        call = _numpy(case, inputs)
    elif row.recipe == "fastops":
        call = _ours(case, row, functions(row.backend), inputs)
    else:
        call = _torch(case, row, inputs)
    # Products of the fewest, whichever a row does: P1 and P3 with what they multiply, the inverse, and Z (P3 V).
    m = kind.landmarks
    head = float(4 * n * m * d + (2 * m**3 // 3 if kind.ridge else 4 * _STEPS * m**3) + 2 * m * m * d)
    notes = []
    if taken < b * h:
        notes.append(f"timed on {taken} of {b * h} heads")
    if row.recipe in _BATCH:
        notes.append(
            "one first coefficient for all heads" + (", six steps in place of the ridge" if kind.ridge else "")
        )
    if row.recipe == SDPA:
        notes.append("exact attention")

    def check() -> float:
        return _check(case, row, functions(REFERENCE), inputs, call())

    return Task(call, (), taken * head, b * h * head, check, "; ".join(notes), [inputs], memory=True)


def _exact(kind: Kind, f: Any, inputs: list[Array]) -> tuple[Array, ...]:
    """Softmax attention, or its gradients, of the rows given."""
    q, k, v, dy = inputs
    if not kind.gradient:
        return (np.asarray(f.softmax_attention(q, k, v, causal=False)),)
    # With at least as many landmarks as rows it is exact.
    return tuple(f.nystrom_attention_backward(dy, q, k, v, num_landmarks=q.shape[2]))


def _check(case: Case, row: Implementation, f: Any, inputs: list[Array], got: Any) -> float:
    """Largest difference over the largest number, of the last head against the oracle; raises above the row's bound."""
    kind = Kind.of(case)
    # The last head, so that a mistake of heads shows.
    last = [x[-1:, -1:].astype(np.float64) for x in inputs]
    # Sums of products in float32 that an inverse of small singular values makes larger.
    bound = 1e-3 if kind.gradient else 2e-4
    options = kind.options(row)
    if row.recipe == SDPA:
        if not kind.gradient:
            # All rows would be N x N numbers.
            some = slice(0, None, max(case.shape[0] // 64, 1))
            last[0], got = last[0][:, :, some], got[:, :, some]
        wanted = _exact(kind, f, last)
    else:
        if row.recipe in _BATCH:
            # Their coefficient is that of all heads.
            last = [x.astype(np.float64) for x in inputs]
        if kind.gradient:
            if row.recipe in _BATCH:
                # Through the coefficient, which is a constant to the oracle, goes up to some per cent.
                bound = 5e-2
            wanted = f.nystrom_attention_backward(last[3], *last[:3], **options)
        else:
            wanted = (f.nystrom_attention(*last[:3], **options),)
    errors = []
    for x, whole in zip(got if kind.gradient else (got,), wanted, strict=True):
        want = whole[-1:, -1:]
        scale = max(float(np.abs(want).max(initial=0.0)), 1e-30)
        errors.append(float(np.abs(x[-1:, -1:].astype(np.float64) - want).max(initial=0.0)) / scale)
    error = max(errors)
    if not error <= bound:
        raise WrongResult(f"difference {error:.3g} from the oracle, allowed {bound:.3g}")
    return error
