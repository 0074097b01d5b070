# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of attention: linear against torch, pytorch-fast-transformers and softmax, over lengths, with memory; Nystrom."""

from __future__ import annotations

import importlib
import importlib.util
import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastops.bench import nystrom
from fastops.bench.case import Case, Implementation, Machine, Task, WrongResult, aligned

Array = npt.NDArray[Any]

REFERENCE = "reference"
SOFTMAX = "softmax_attention"
# Of the reference and of softmax a part is timed: tokens, and heads.
_TOKENS = 256
_SLOW_PAIRS = 1 << 25
# From here on a fresh result costs as much as what is in it.
_LARGE = 16384
_FAVOR = 128
_CHUNK, _LOOP = 64, 128

# What an operation is: "attend" with the linear weights of a map, "softmax", "gradient" or "step".
_YARDSTICKS = {
    "causal": ("fast-transformers", "torch chunk", "NumPy", REFERENCE),
    "bidirectional": ("torch einsum", "NumPy", REFERENCE),
    "softmax": ("torch SDPA", "NumPy", REFERENCE),
    "step": ("torch", "NumPy", REFERENCE),
}


class Kind(NamedTuple):
    """An operation's name, taken apart."""

    softmax: bool
    step: bool
    gradient: bool
    causal: bool
    feature_map: str

    @staticmethod
    def of(op: str) -> Kind:
        words = op.split()
        causal = "bidirectional" not in words
        named = [word for word in words if word in ("exp", "favor", "efficient")]
        name = {"efficient": "softmax"}.get(*named, *named) if named else "elu"
        return Kind("softmax" in words, "step" in words, "gradient" in words, causal, name)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the public functions."""
        if self.step:
            return {}
        return {"causal": self.causal} | ({} if self.softmax else {"feature_map": self.feature_map})


def _case(op: str, size: tuple[int, ...], dtype: str = "float32", quick: bool = False) -> Case:
    kind = Kind.of(op)
    name = "softmax" if kind.softmax else "step" if kind.step else "causal" if kind.causal else "bidirectional"
    if kind.step:
        b, h, d = size
        n = 1
    else:
        b, h, n, d = size
    return Case("attention", op, dtype, "x".join(map(str, size)), (n, b, h, d), "MAC", quick, _YARDSTICKS[name])


def cases() -> list[Case]:
    """Every case of the family, in the order of the table."""
    sizes = [(1, 8, 512, 64), (1, 8, 1024, 64), (1, 8, 4096, 64), (1, 8, 16384, 64)]
    sizes += [(4, 12, 512, 64), (1, 8, 4096, 128), (1, 1, 16384, 64)]
    return [
        *(_case("linear causal", size, quick=size[2] == 1024) for size in sizes),
        *(_case("linear bidirectional", size, quick=size[2] == 1024) for size in sizes),
        _case("linear causal", (1, 8, 4096, 64), "bfloat16"),
        _case("linear bidirectional", (1, 8, 4096, 64), "bfloat16"),
        _case("exp causal", (1, 8, 4096, 64)),
        _case("efficient causal", (1, 8, 4096, 64)),
        _case("favor causal", (1, 8, 4096, 64)),
        *(_case(f"gradient {name}", (1, 8, n, 64)) for name in ("causal", "bidirectional") for n in (1024, 4096)),
        _case("step", (1, 8, 64), quick=True),
        _case("step", (32, 8, 64)),
        _case("step", (1, 32, 128)),
        *(_case(f"softmax {name}", (1, 8, n, 64)) for name in ("causal", "bidirectional") for n in (1024, 4096)),
        *nystrom.cases(),
    ]


def implementations(case: Case, machine: Machine) -> list[Implementation]:
    """Rows of a case on a machine: the peers first, the native levels last."""
    if case.op.startswith("nystrom"):
        return nystrom.implementations(case, machine)
    if case.dtype == "bfloat16" and "ml_dtypes" not in machine.modules:
        return []
    kind = Kind.of(case.op)
    plain = kind.feature_map == "elu" and not kind.softmax
    rows: list[Implementation] = []
    if "torch" in machine.modules and kind.step:
        rows.append(Implementation("torch, eager", "torch step"))
    elif "torch" in machine.modules and kind.softmax:
        rows.append(Implementation("torch SDPA", "torch SDPA"))
    elif "torch" in machine.modules and plain and kind.causal:
        if "fast_transformers" in machine.modules and case.dtype == "float32":
            rows.append(Implementation("fast-transformers", "fast-transformers"))
        rows.append(Implementation("torch chunks", "torch chunks"))
        rows.append(Implementation("torch chunk loop", "torch chunk loop"))
    elif "torch" in machine.modules and plain:
        rows.append(Implementation("torch einsum", "torch einsum"))
    lengths = plain and not kind.step and case.dtype == "float32" and case.shape[1:] == (1, 8, 64)
    if lengths and "torch" in machine.modules:
        rows.append(Implementation("torch SDPA (softmax)", "torch SDPA"))
    if (plain and not kind.gradient) or kind.softmax:
        rows.append(Implementation("NumPy blocks" if kind.softmax else "NumPy", "numpy"))
    rows.append(Implementation(REFERENCE, "fastops"))
    if "numba" in machine.backends:
        rows.append(Implementation("numba", "fastops", "numba"))
    rows += [Implementation(f"native {target}", "fastops", "native", target) for target in reversed(machine.targets)]
    if machine.backends[0] == "native":
        best, many = machine.targets[0], machine.threads
        name = f"native {best}"
        if many > 1 and not kind.step:
            rows.append(Implementation(f"{name}, {many} threads", "fastops", "native", best, many))
        if case.shape[0] >= _LARGE and not kind.gradient:
            rows.append(Implementation(f"{name}, out=", "out", "native", best))
        if lengths and not kind.gradient:
            rows.append(Implementation(f"{SOFTMAX} {name}", SOFTMAX, "native", best))
    return rows


# --- inputs --------------------------------------------------------------------------------------------------------------------


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def _inputs(case: Case) -> list[Array]:
    """q, k, v and, for gradients, dy: (B, H, N, D)."""
    rng = np.random.default_rng(zlib.crc32(case.group.encode()))
    n, b, h, d = case.shape
    shape = (b, h, n, d)
    return [aligned(rng.standard_normal(shape).astype(np.float32).astype(_dtype(case.dtype)), i) for i in range(4)]


def _part(case: Case, row: Implementation) -> tuple[slice, slice, slice]:
    """What a row takes of batch, heads and tokens: all, or where it is slow one head, and some tokens of it."""
    n, b, h, _ = case.shape
    kind, every = Kind.of(case.op), slice(None)
    pairs = kind.softmax or row.recipe in ("torch SDPA", SOFTMAX)
    if row.name == REFERENCE and not kind.step:
        # What a token costs does not depend on their number; of softmax it does.
        return slice(0, 1), slice(0, 1), every if pairs else slice(0, min(n, _TOKENS))
    if pairs and b * h * n * n > _SLOW_PAIRS:
        return slice(0, 1), slice(0, 1), every
    return every, every, every


# --- implementations -----------------------------------------------------------------------------------------------------------


def _functions(backend: str) -> Any:
    """The public functions on a backend, whichever this process has chosen: a module of their own."""
    spec = importlib.util.find_spec("fastops.attention")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._backend = importlib.import_module(f"fastops.{backend}")  # type: ignore[attr-defined]
    return module


def _projection(d: int) -> Array:
    import fastops

    return np.asarray(fastops.favor_projection(d, _FAVOR, rng=0), np.float32)


def _ours(case: Case, row: Implementation, f: Any, inputs: list[Array]) -> Callable[[], Any]:
    kind = Kind.of(case.op)
    q, k, v, dy = inputs
    if kind.softmax or row.recipe == SOFTMAX:
        return partial(f.softmax_attention, q, k, v, causal=kind.causal)
    options = kind.options
    if kind.feature_map == "favor":
        options["projection"] = _projection(case.shape[3])
    if row.recipe == "out":
        options["out"] = np.empty_like(v)
    if kind.step:
        nothing = q[:, :, :0]
        _, state = f.linear_attention(nothing, nothing, nothing, causal=True, return_state=True)
        token = [np.ascontiguousarray(x[:, :, 0]) for x in (q, k, v)]
        return partial(f.linear_attention_step_, *token, state)
    if not kind.gradient:
        return partial(f.linear_attention, q, k, v, **options)

    def both() -> Any:
        y = f.linear_attention(q, k, v, **options)
        return f.linear_attention_backward(dy, q, k, v, y, **options)

    return both


def _elu(x: Array) -> Array:
    return np.where(x >= 0, x + 1, np.exp(np.minimum(x, 0)))


def _numpy(case: Case, inputs: list[Array]) -> Callable[[], Any]:
    """The operation as it is written with NumPy's matrix products, in float32."""
    kind = Kind.of(case.op)
    q, k, v, _ = inputs
    n, _, _, d = case.shape
    dtype = v.dtype

    def wide(*arrays: Array) -> list[Array]:
        return [x.astype(np.float32, copy=False) for x in arrays]

    def softmax() -> Array:
        out = np.empty_like(v)
        keys = k.swapaxes(-1, -2)
        for start in range(0, n, _LOOP):
            stop = min(start + _LOOP, n)
            seen = stop if kind.causal else n
            scores = q[:, :, start:stop] @ keys[..., :seen] * np.float32(d**-0.5)
            if kind.causal:
                scores[..., start:] += np.triu(np.full((stop - start, stop - start), -np.inf, np.float32), 1)
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            out[:, :, start:stop] = scores @ v[:, :, :seen]
        return out

    def bidirectional() -> Array:
        fq, fk, fv = wide(q, k, v)
        fq, fk = _elu(fq), _elu(fk)
        sums = fq @ fk.sum(axis=2)[..., np.newaxis]
        return np.asarray(fq @ (fk.swapaxes(-1, -2) @ fv) / sums).astype(dtype, copy=False)

    def causal() -> Array:
        fq, fk, fv = wide(q, k, v)
        fq, fk = _elu(fq), _elu(fk)
        out = np.empty_like(v)
        s = np.zeros((*k.shape[:2], d, v.shape[-1]), np.float32)
        z = np.zeros((*k.shape[:2], d, 1), np.float32)
        for start in range(0, n, _CHUNK):
            part = slice(start, start + _CHUNK)
            cq, ck, cv = fq[:, :, part], fk[:, :, part], fv[:, :, part]
            w = np.tril(cq @ ck.swapaxes(-1, -2))
            out[:, :, part] = (cq @ s + w @ cv) / (cq @ z + w.sum(axis=-1, keepdims=True))
            s += ck.swapaxes(-1, -2) @ cv
            z += ck.sum(axis=2)[..., np.newaxis]
        return out

    def step() -> Array:
        cq, ck, cv = wide(q[:, :, 0], k[:, :, 0], v[:, :, 0])
        cq, ck = _elu(cq), _elu(ck)
        np.add(s, ck[..., np.newaxis] * cv[..., np.newaxis, :], out=s)
        np.add(z, ck, out=z)
        y = (cq[..., np.newaxis, :] @ s)[..., 0, :] / (cq * z).sum(axis=-1, keepdims=True)
        return np.asarray(y).astype(dtype, copy=False)

    s, z = np.zeros((*k.shape[:2], d, d), np.float32), np.zeros((*k.shape[:2], d), np.float32)
    return softmax if kind.softmax else step if kind.step else causal if kind.causal else bidirectional


# With torch: features, then one of the ways to write what follows.


def _torch_elu(x: Any) -> Any:
    import torch

    return torch.nn.functional.elu(x) + 1


def _torch_chunks(q: Any, k: Any, v: Any) -> Any:
    """All chunks at once, as batches of matrix products; the state of each is a sum along the chunks."""
    b, h, n, d = q.shape
    size = math.gcd(_CHUNK, n)
    q, k, v = (x.view(b, h, n // size, size, d) for x in (q, k, v))
    s = k.transpose(-1, -2) @ v
    s = s.cumsum(2) - s
    z = k.sum(3, keepdim=True)
    z = z.cumsum(2) - z
    w = (q @ k.transpose(-1, -2)).tril()
    sums = q @ z.transpose(-1, -2) + w.sum(-1, keepdim=True)
    return ((q @ s + w @ v) / sums).reshape(b, h, n, d)


def _torch_loop(q: Any, k: Any, v: Any) -> Any:
    """Chunk by chunk."""
    import torch

    b, h, n, d = q.shape
    s, z = q.new_zeros(b, h, d, d), q.new_zeros(b, h, d, 1)
    rows = []
    for start in range(0, n, _LOOP):
        cq, ck, cv = (x[:, :, start : start + _LOOP] for x in (q, k, v))
        w = (cq @ ck.transpose(-1, -2)).tril()
        rows.append((cq @ s + w @ cv) / (cq @ z + w.sum(-1, keepdim=True)))
        s = s + ck.transpose(-1, -2) @ cv
        z = z + ck.sum(2).unsqueeze(-1)
    return torch.cat(rows, 2)


def _torch_einsum(q: Any, k: Any, v: Any) -> Any:
    """As LinearAttention of fast-transformers writes it."""
    import torch

    kv = torch.einsum("nhsd,nhsm->nhmd", k, v)
    z = 1 / torch.einsum("nhld,nhd->nhl", q, k.sum(dim=2))
    return torch.einsum("nhld,nhmd,nhl->nhlm", q, kv, z)


def _fast_transformers(q: Any, k: Any, v: Any) -> Any:
    """As its CausalLinearAttention, without the copies that its layout needs."""
    import torch
    from fast_transformers.causal_product import causal_dot_product

    z = 1 / torch.einsum("nhld,nhld->nhl", q, k.cumsum(2))
    return causal_dot_product(q, k, v) * z[..., None]


_TORCH: dict[str, Callable[[Any, Any, Any], Any]] = {
    "torch chunks": _torch_chunks,
    "torch chunk loop": _torch_loop,
    "torch einsum": _torch_einsum,
    "fast-transformers": _fast_transformers,
}


def _tensor(x: Array) -> Any:
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _torch(case: Case, row: Implementation, inputs: list[Array]) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(row.threads)
    kind = Kind.of(case.op)
    q, k, v, dy = (_tensor(np.ascontiguousarray(x)) for x in inputs)
    if kind.step:
        q, k, v = (x[:, :, 0] for x in (q, k, v))
        s, z = torch.zeros(*k.shape, v.shape[-1]), torch.zeros(k.shape)

        def step() -> Any:
            fq, fk = _torch_elu(q), _torch_elu(k)
            s.add_(fk[..., None] * v[..., None, :])
            z.add_(fk)
            return torch.einsum("nhd,nhdm->nhm", fq, s) / (fq * z).sum(-1, keepdim=True)

        return lambda: step().numpy()

    def attend() -> Any:
        if row.recipe == "torch SDPA":
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=kind.causal)
        y = _TORCH[row.recipe](_torch_elu(q.float()), _torch_elu(k.float()), v.float())
        return y.to(q.dtype)

    def back(tensor: Any) -> Array:
        if tensor.dtype == torch.bfloat16:
            return np.asarray(tensor.view(torch.int16).numpy().view(_dtype("bfloat16")))
        return np.asarray(tensor.numpy())

    if not kind.gradient:
        return lambda: back(attend())
    for x in (q, k, v):
        x.requires_grad_()

    def both() -> Any:
        for x in (q, k, v):
            x.grad = None
        attend().backward(dy)
        return tuple(back(x.grad) for x in (q, k, v))

    return both


# --- tasks ---------------------------------------------------------------------------------------------------------------------


def prepare(case: Case, row: Implementation) -> Task:
    """Inputs and call of one row; equal inputs in every process."""
    if case.op.startswith("nystrom"):
        return nystrom.prepare(case, row, _functions)
    part = _part(case, row)
    inputs = [np.ascontiguousarray(x[part]) for x in _inputs(case)]
    n, b, h, d = case.shape
    taken_b, taken_h, taken = inputs[0].shape[:3]
    kind = Kind.of(case.op)
    softmax = kind.softmax or row.recipe in ("torch SDPA", SOFTMAX)
    if row.recipe == "numpy":
        call = _numpy(case, inputs)
    elif row.recipe in ("fastops", "out", SOFTMAX):
        call = _ours(case, row, _functions(row.backend), inputs)
    else:
        call = _torch(case, row, inputs)
    # Tokens are what is compared, also with softmax, each of whose tokens costs the more the more there are.
    work = float(taken_b * taken_h * taken * 2 * d * d)
    whole = float(b * h * n * 2 * d * d)
    if kind.softmax:
        pairs = (n + 1) / 2 if kind.causal else n
        work, whole = (x / d * pairs for x in (work, whole))
    note = "" if work == whole else f"timed on {taken} of {n} tokens, {taken_b * taken_h} of {b * h} heads"

    def check() -> float:
        got = call()
        return _check(case, softmax, inputs, got)

    return Task(call, (), work, whole, check, note, [inputs], memory=not kind.step)


def _check(case: Case, softmax: bool, inputs: list[Array], got: Any) -> float:
    """Largest difference over the largest number, of some rows against the oracle; raises above the dtype's bound."""
    kind = Kind.of(case.op)
    f = _functions("reference")
    # The last head, so that a mistake of heads shows.
    q, k, v, dy = (x[-1:, -1:].astype(np.float64) for x in inputs)
    if kind.step:
        y = f.linear_attention(q, k, v, causal=True)
        return _difference(got[-1:, -1:], y[:, :, 0], case.dtype)
    if kind.gradient and not softmax:
        options = kind.options
        y = f.linear_attention(q, k, v, **options)
        want = f.linear_attention_backward(dy, q, k, v, y, **options)
        return max(_difference(x[-1:, -1:], y, case.dtype) for x, y in zip(got, want, strict=True))
    n = q.shape[2]
    rows = sorted({0, 1 % n, n // 3, n // 2, max(n - 2, 0), n - 1})
    wanted = []
    for i in rows:
        seen = i + 1 if kind.causal else n
        arrays = q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen]
        if kind.gradient:
            wanted.append(_softmax_slope(*(x[0, 0] for x in (*arrays, dy[:, :, i : i + 1]))))
        elif softmax:
            wanted.append(f.softmax_attention(*arrays)[0, 0])
        else:
            options = kind.options | {"causal": False}
            if kind.feature_map == "favor":
                options["projection"] = _projection(case.shape[3])
            wanted.append(f.linear_attention(*arrays, **options)[0, 0])
    result = got[0] if kind.gradient else got
    return _difference(result[-1, -1, rows], np.concatenate(wanted), case.dtype)


def _softmax_slope(q: Array, k: Array, v: Array, dy: Array) -> Array:
    """dq of softmax attention for one row."""
    scale = q.shape[-1] ** -0.5
    p = np.exp(scale * q @ k.T)
    p /= p.sum()
    slope = dy @ v.T
    return np.asarray(scale * (p * (slope - (p * slope).sum())) @ k)


def _difference(got: Array, want: Array, dtype: str) -> float:
    scale = max(float(np.abs(want).max(initial=0.0)), 1e-30)
    error = float(np.abs(got.astype(np.float64) - want).max(initial=0.0)) / scale
    # Some sums of products in float32, thousands of terms long; bfloat16 has 8 bits.
    bound = 2e-2 if dtype == "bfloat16" else 2e-4
    if not error <= bound:
        raise WrongResult(f"difference {error:.3g} from the oracle, allowed {bound:.3g}")
    return error
