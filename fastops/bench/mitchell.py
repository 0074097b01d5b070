# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of Mitchell arithmetic: ufuncs, matrix products, look-up tables, convolution and gradients."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fastops.bench.case import Case, Implementation, Machine, Task, WrongResult, aligned

Array = npt.NDArray[Any]

EXACT = "NumPy exact"
REFERENCE = "reference"
_UNARY = ("square", "reciprocal", "sqrt", "rsqrt", "log2", "exp2")
_EXACT_OPS: dict[str, Callable[..., Any]] = {
    "mul": np.multiply,
    "div": np.divide,
    "square": np.square,
    "reciprocal": np.reciprocal,
    "sqrt": np.sqrt,
    "log2": np.log2,
    "exp2": np.exp2,
}
# Options of fastops.Multiplier, by the second word of an operation's name.
_MULTIPLIERS: dict[str, dict[str, Any]] = {
    "": {},
    "min-mse": {"compensation": "min-mse"},
    "segments=16": {"segments": 16},
    "lmul": {"compensation": "lmul"},
}
# A row slower than this many units of work a call is timed on a part of the problem, and its rate compared.
_PART = 4_000_000


def _elementwise(op: str, dtype: str, n: int, quick: bool = False) -> Case:
    return Case("mitchell", op, dtype, f"n={n:.0e}".replace("e+0", "e"), (n,), "element", quick, (EXACT, REFERENCE))


def _matmul(op: str, dtype: str, n: int, quick: bool = False, yardsticks: tuple[str, ...] = (EXACT,)) -> Case:
    return Case("mitchell", op, dtype, f"n={n}", (n, n, n), "MAC", quick, yardsticks)


def cases() -> list[Case]:
    """Every case of the family, in the order of the table."""
    return [
        _elementwise("mul", "float32", 1_000, quick=True),
        _elementwise("mul", "float32", 10_000),
        _elementwise("mul", "float32", 100_000, quick=True),
        _elementwise("mul", "float32", 1_000_000),
        _elementwise("mul", "float32", 10_000_000, quick=True),
        _elementwise("mul min-mse", "float32", 100_000),
        _elementwise("mul segments=16", "float32", 100_000),
        _elementwise("mul lmul", "float32", 100_000),
        _elementwise("mul", "float64", 100_000),
        _elementwise("mul", "float64", 10_000_000),
        _elementwise("mul", "float16", 100_000),
        _elementwise("mul", "bfloat16", 100_000),
        _elementwise("mul", "uint8", 100_000, quick=True),
        _elementwise("mul", "int16", 100_000),
        _elementwise("mul", "uint32", 100_000),
        _elementwise("mul", "int64", 100_000),
        _elementwise("div", "float32", 100_000, quick=True),
        *(_elementwise(op, "float32", 100_000) for op in _UNARY),
        _matmul("matmul", "float32", 256),
        _matmul("matmul", "float32", 512, quick=True),
        _matmul("matmul", "float32", 1024),
        _matmul("matmul", "float64", 512),
        _matmul("matmul", "bfloat16", 512, yardsticks=(REFERENCE,)),
        _matmul("matmul min-mse", "float32", 512),
        _matmul("matmul segments=16", "float32", 512),
        _matmul("lut_matmul", "uint8", 512, quick=True, yardsticks=("scalar LUT loop", REFERENCE)),
        # (images, channels in, channels out, height and width, kernel)
        Case(
            "mitchell",
            "conv2d",
            "float32",
            "4x64x28x28 * 64x64x3x3",
            (4, 64, 64, 28, 3),
            "MAC",
            True,
            ("matmul of the same size", REFERENCE),
        ),
        _matmul("matmul_grad", "float32", 512, quick=True, yardsticks=("forward", REFERENCE)),
    ]


def implementations(case: Case, machine: Machine) -> list[Implementation]:
    """Rows of a case on a machine: the yardsticks first, the native levels last."""
    op = case.op.split()[0]
    if case.dtype == "bfloat16" and "ml_dtypes" not in machine.modules:
        return []
    product = case.unit == "MAC"
    plain = " " not in case.op
    many = machine.threads
    rows: list[Implementation] = []
    if op == "matmul" or not product:
        if case.dtype != "bfloat16" or not product:
            rows.append(Implementation(EXACT, "exact"))
        if op == "matmul" and case.dtype in ("float32", "float64"):
            if "v4" in machine.targets:
                env = (("OPENBLAS_CORETYPE", "SKYLAKEX"),)
                rows.append(Implementation(f"{EXACT}, SkylakeX kernel", "exact", env=env))
            if many > 1:
                rows.append(Implementation(f"{EXACT}, {many} threads", "exact", threads=many))
        if "torch" in machine.modules and plain and case.dtype in ("float32", "float64") and op in ("mul", "matmul"):
            rows.append(Implementation("torch.mm" if product else "torch.mul", "torch"))
    best = _best(machine)
    if op == "conv2d":
        rows.append(_row("matmul of the same size", "matmul", best))
    if op == "matmul_grad":
        rows.append(_row("forward", "matmul", best))
    rows.append(Implementation(REFERENCE, "fastops"))
    if op == "matmul" and plain and case.dtype == "float32":
        rows.append(Implementation("NumPy broadcasting", "broadcast"))
        if "numba" in machine.modules:
            rows.append(Implementation("numba triple loop", "triple loop"))
    if "numba" in machine.modules and (op == "lut_matmul" or case.group == "matmul float32 n=512"):
        rows.append(Implementation("scalar LUT loop", "scalar lut"))
    if "numba" in machine.backends:
        rows.append(Implementation("numba", "fastops", "numba"))
    rows += [Implementation(f"native {target}", "fastops", "native", target) for target in reversed(machine.targets)]
    large = product or case.shape[0] >= 1_000_000
    if many > 1 and large and plain and best[0] != "reference":
        rows.append(_row(f"{' '.join(best).strip()}, {many} threads", "fastops", best, many))
    return rows


def _best(machine: Machine) -> tuple[str, str]:
    backend = machine.backends[0]
    return backend, machine.targets[0] if backend == "native" else ""


def _row(name: str, recipe: str, best: tuple[str, str], threads: int = 1) -> Implementation:
    return Implementation(name, recipe, *best, threads)


def prepare(case: Case, row: Implementation) -> Task:
    """Inputs and call of one row; equal inputs in every process."""
    rng = np.random.default_rng(zlib.crc32(case.group.encode()))
    op, _, options = case.op.partition(" ")
    if case.unit == "element":
        return _prepare_elementwise(case, row, op, options, rng)
    if op == "conv2d":
        return _prepare_conv2d(case, row, rng)
    if op == "matmul_grad":
        return _prepare_grad(case, row, rng)
    return _prepare_matmul(case, row, op, options, rng)


def _module(row: Implementation) -> Any:
    return importlib.import_module(f"fastops.{row.backend}")


def _oracle() -> Any:
    return importlib.import_module("fastops.reference")


def _multiplier(options: str) -> Any:
    from fastops import Multiplier

    return Multiplier(**_MULTIPLIERS[options])


def _dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        name = importlib.import_module("ml_dtypes").bfloat16
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


# Element by element.


def _prepare_elementwise(case: Case, row: Implementation, op: str, options: str, rng: np.random.Generator) -> Task:
    dtype = _dtype(case.dtype)
    n = case.shape[0]
    part = n if row.name != REFERENCE else min(n, _PART // 8)
    inputs = [aligned(values[:part], slot) for slot, values in enumerate(_operands(op, dtype, n, rng))]
    multiplier = _multiplier(options)
    oracle = _oracle().mitchell_op(op, multiplier)
    exact = row.recipe in ("exact", "torch")
    call: Callable[..., Any]
    if exact:
        call = _EXACT_OPS.get(op, _exact_rsqrt)
        if dtype.kind in "iu":  # The widening product, as the Mitchell product widens.
            call = partial(np.multiply, dtype=_widened(dtype))
    else:
        call = _module(row).mitchell_op(op, multiplier)
    out = aligned(np.asarray(call(*(x[:1] for x in inputs))).repeat(part), len(inputs))
    result = out
    args: tuple[Any, ...] = (*inputs, out)
    if row.recipe == "torch":
        import torch

        torch.set_num_threads(row.threads)
        tensors = [torch.from_numpy(x) for x in args]
        call, args = partial(torch.mul, out=tensors[-1]), tuple(tensors[:-1])

    def check() -> float:
        call(*args)
        worst = 0.0
        for place in _places(part):
            operands = [x[place] for x in inputs]
            if not exact:
                worst = max(worst, _relative(result[place], oracle(*operands), 0.0))
            elif dtype.kind in "iu":
                wide = [x.astype(object) for x in operands]
                modulus = 2 ** (8 * result.itemsize)
                same = [int(g) % modulus == (x * y) % modulus for g, x, y in zip(result[place], *wide, strict=True)]
                if not all(same):
                    raise WrongResult("an integer product differs from Python's")
            else:
                f = _EXACT_OPS.get(op, _exact_rsqrt)
                want = f(*(x.astype(np.longdouble) for x in operands))
                worst = max(worst, _relative(result[place], want, 4 * _eps(dtype)))
        return worst

    return Task(call, args, float(part), float(n), check, _note(part, n, "elements"), [inputs, out])


def _operands(op: str, dtype: np.dtype[Any], n: int, rng: np.random.Generator) -> list[Array]:
    count = 1 if op in _UNARY else 2
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return [rng.integers(info.min, info.max, n, dtype, endpoint=True) for _ in range(count)]
    # Magnitudes in [1/8, 8) keep float16 normal; signs where the operation takes them; exp2 wants exponents.
    draw = partial(rng.random, n, np.float64 if dtype == np.float64 else np.float32)
    values = []
    for _ in range(count):
        magnitude = np.exp2(draw() * 6 - 3)
        if op == "exp2":
            magnitude = magnitude * 1.25 - 5
        elif op not in ("sqrt", "rsqrt", "log2"):
            magnitude = np.copysign(magnitude, draw() - 0.5)
        values.append(magnitude.astype(dtype))
    return values


def _exact_rsqrt(a: Array, out: Array | None = None) -> Array:
    result: Array = np.sqrt(a, out=out)
    return np.reciprocal(result, out=out)


def _widened(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"{dtype.kind}{min(8, 2 * dtype.itemsize)}")


def _places(n: int) -> list[slice]:
    """Whole array when it is small, else its start, middle and end: the oracle is slow."""
    if n <= 20_000:
        return [slice(0, n)]
    middle = n // 2 + 7
    return [slice(0, 4099), slice(middle, middle + 4099), slice(n - 4099, n)]


def _eps(dtype: np.dtype[Any]) -> float:
    if dtype.name == "bfloat16":
        return 2.0**-7
    return float(np.finfo(dtype).eps)


def _relative(got: Array, want: Array, bound: float) -> float:
    """Largest relative difference of finite results; raises above `bound`."""
    with np.errstate(all="ignore"):
        wide_got, wide_want = got.astype(np.longdouble), want.astype(np.longdouble)
        difference = np.abs(wide_got - wide_want)
        error = float(np.max(difference / np.where(wide_want == 0, 1, np.abs(wide_want)), initial=0))
    if not error <= bound:
        raise WrongResult(f"relative difference {error:.3g} from the oracle, allowed {bound:.3g}")
    return error


def _note(part: int, whole: int, what: str) -> str:
    return "" if part == whole else f"timed on {part:,} of {whole:,} {what}"


# Matrix products.


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any], slot: int) -> Array:
    """Standard normal numbers without zeros or subnormals, so that the plain integer trick of some rows is legal."""
    values = rng.standard_normal(shape, np.float64 if dtype == np.float64 else np.float32)
    values[np.abs(values) < 1e-6] = 1e-6
    return aligned(values.astype(dtype), slot)


def _sums(got: Array, want: Array, scale: Array, terms: int, eps: float) -> float:
    """Largest difference over the sum of the terms' magnitudes.

    Bound 4 eps sqrt(terms): the rounding errors of a sum of n terms grow like sqrt(n) eps for errors of random sign.
    """
    error = float(np.max(np.abs(got.astype(np.float64) - want.astype(np.float64)) / scale, initial=0))
    bound = 4 * eps * terms**0.5
    if not error <= bound:
        raise WrongResult(f"difference {error:.3g} of the sum of magnitudes, allowed {bound:.3g}")
    return error


def _prepare_matmul(case: Case, row: Implementation, op: str, options: str, rng: np.random.Generator) -> Task:
    m, k, n = case.shape
    if op == "lut_matmul" or row.recipe == "scalar lut":
        return _prepare_lut(case, row, rng)
    dtype = _dtype(case.dtype)
    a = _normal(rng, (m, k), dtype, 0)
    b = _normal(rng, (k, n), dtype, 1)
    share = {"broadcast": _PART, "fastops": _PART // 2 if row.backend == "reference" else m * k * n}
    part = min(m, max(4, share.get(row.recipe, m * k * n) // (k * n)))
    a = a[:part]
    out = aligned(np.zeros((part, n), dtype), 2)
    multiplier = _multiplier(options)
    args: tuple[Any, ...] = ()
    call: Callable[..., object]
    exact = row.recipe in ("exact", "torch")
    if row.recipe == "exact":
        call, args = np.matmul, (a, b, out)
    elif row.recipe == "torch":
        import torch

        torch.set_num_threads(row.threads)
        x, y, z = (torch.from_numpy(values) for values in (a, b, out))
        call, args = partial(torch.mm, out=z), (x, y)
    elif row.recipe == "broadcast":
        call, args = _broadcast_matmul, (a, b, out)
    elif row.recipe == "triple loop":
        call, args = _triple_loop(), (a.view(np.int32), b.view(np.int32), out)
    else:
        call = partial(_module(row).mitchell_matmul, a, b, multiplier=multiplier, out=out)

    def check() -> float:
        call(*args)
        rows = slice(0, 4)
        wide_a, wide_b = a[rows].astype(np.float64), b.astype(np.float64)
        scale = np.abs(wide_a) @ np.abs(wide_b)
        oracle = np.matmul if exact else partial(_oracle().mitchell_matmul, multiplier=multiplier, out=None)
        want = oracle(wide_a, wide_b) if exact else oracle(a[rows], b)
        return _sums(out[rows], want, scale, k, _eps(dtype))

    return Task(call, args, float(part) * k * n, float(m) * k * n, check, _note(part, m, "rows"), [a, b, out])


def _broadcast_matmul(a: Array, b: Array, out: Array) -> None:
    """Mitchell products of float32 matrices with NumPy alone: integer adds by broadcasting, blocks that stay in L2."""
    bits_a, bits_b = a.view(np.int32), b.view(np.int32)
    bias = np.int32(127 << 23)
    width = 128
    block = np.empty((b.shape[0], width), np.int32)
    for left in range(0, b.shape[1], width):
        right = bits_b[:, left : left + width] - bias
        buffer = block[:, : right.shape[1]]
        for i in range(a.shape[0]):
            np.add(bits_a[i, :, None], right, out=buffer)
            np.add.reduce(buffer.view(np.float32), axis=0, out=out[i, left : left + width])


def _triple_loop() -> Callable[..., object]:
    """The loop that a Numba user writes: i, k, j, zero handled, vectorised by LLVM."""
    import numba

    @numba.njit(error_model="numpy")  # type: ignore[untyped-decorator, unused-ignore]
    def triple_loop(a: Any, b: Any, out: Any) -> None:
        bias = np.int32(127 << 23)
        mask = np.int32(0x7FFFFFFF)
        for i in range(a.shape[0]):
            row = out[i]
            row[:] = 0
            for k in range(a.shape[1]):
                if a[i, k] & mask == 0:
                    continue
                x = np.int32(a[i, k] - bias)
                for j in range(b.shape[1]):
                    y = b[k, j]
                    product = np.int32(x + y).view(np.float32)
                    row[j] += product if y & mask != 0 else np.float32(0)

    return triple_loop  # type: ignore[no-any-return, unused-ignore]


def _prepare_lut(case: Case, row: Implementation, rng: np.random.Generator) -> Task:
    m, k, n = case.shape
    a = aligned(rng.integers(0, 256, (m, k), np.uint8), 0)
    b = aligned(rng.integers(0, 256, (k, n), np.uint8), 1)
    table = aligned(_multiplier("").table(8).astype(np.int32), 2)
    share = _PART if row.backend == "reference" and row.recipe == "fastops" else m * k * n
    part = min(m, max(4, share // (k * n)))
    if row.recipe == "scalar lut":
        part = min(m, max(4, m // 4))
    a = a[:part]
    out = aligned(np.zeros((part, n), np.int32), 3)
    call: Callable[..., object]
    args: tuple[Any, ...] = (a, b, table)
    if row.recipe == "scalar lut":
        call, args = _scalar_lut(), (*args, out)
    else:
        call = partial(_module(row).lut_matmul, out=out)

    def check() -> float:
        call(*args)
        want = table[a[:4, :, None], b[None]].sum(axis=1, dtype=np.int64)
        if not np.array_equal(out[:4], want):
            raise WrongResult("an integer sum differs from the indexed table's")
        return 0.0

    return Task(call, args, float(part) * k * n, float(m) * k * n, check, _note(part, m, "rows"), [a, b, table, out])


def _scalar_lut() -> Callable[..., object]:
    """One table look-up a product, the way of the simulators that take any 8-bit multiplier."""
    import numba

    @numba.njit  # type: ignore[untyped-decorator, unused-ignore]
    def scalar_lut(a: Any, b: Any, table: Any, out: Any) -> None:
        for i in range(a.shape[0]):
            row = out[i]
            row[:] = 0
            for k in range(a.shape[1]):
                entries = table[a[i, k]]
                for j in range(b.shape[1]):
                    row[j] += entries[b[k, j]]

    return scalar_lut  # type: ignore[no-any-return, unused-ignore]


# Convolution and gradients.


def _prepare_conv2d(case: Case, row: Implementation, rng: np.random.Generator) -> Task:
    images, channels, filters, side, kernel = case.shape
    dtype = np.dtype(case.dtype)
    multiplier = _multiplier("")
    pixels, terms = images * side * side, channels * kernel * kernel
    if row.recipe == "matmul":
        flat = Case(case.family, "matmul", case.dtype, case.size, (filters, terms, pixels), "MAC")
        return _prepare_matmul(flat, Implementation(row.name, "fastops", row.backend, row.target), "matmul", "", rng)
    x = _normal(rng, (images, channels, side, side), dtype, 0)
    w = _normal(rng, (filters, channels, kernel, kernel), dtype, 1)
    part = filters
    if row.backend == "reference":
        x, part = x[:1], max(1, filters // 16)
        w = w[:part]
    padding = kernel // 2
    options: dict[str, Any] = {
        "stride": (1, 1),
        "padding": (padding, padding),
        "dilation": (1, 1),
        "groups": 1,
        "multiplier": multiplier,
    }
    out = aligned(np.zeros((x.shape[0], part, side, side), dtype), 2)
    call = partial(_module(row).mitchell_conv2d, x, w, out=out, **options)

    def check() -> float:
        call()
        few = slice(0, 2)
        want = _oracle().mitchell_conv2d(x[:1], w[few], out=None, **options)
        # Mitchell's sum of magnitudes is within 1/9 of the exact one.
        scale = _oracle().mitchell_conv2d(np.abs(x[:1]), np.abs(w[few]), out=None, **options).astype(np.float64)
        return _sums(out[:1, few], want, scale, terms, _eps(dtype))

    work = float(x.shape[0]) * side * side * part * terms
    note = _note(x.shape[0] * part, images * filters, "output planes")
    return Task(call, (), work, float(filters) * pixels * terms, check, note, [x, w, out])


def _prepare_grad(case: Case, row: Implementation, rng: np.random.Generator) -> Task:
    m, k, n = case.shape
    dtype = np.dtype(case.dtype)
    multiplier = _multiplier("")
    if row.recipe == "matmul":
        forward = Implementation(row.name, "fastops", row.backend, row.target)
        return _prepare_matmul(case, forward, "matmul", "", rng)
    a = _normal(rng, (m, k), dtype, 0)
    b = _normal(rng, (k, n), dtype, 1)
    part = min(m, max(4, _PART // 4 // (k * n))) if row.backend == "reference" else m
    a = a[:part]
    dy = _normal(rng, (part, n), dtype, 2)
    results: list[tuple[Array, Array]] = []

    def call() -> None:
        results[:] = [_module(row).mitchell_matmul_grad(a, b, dy, multiplier=multiplier, mode="exact")]

    def check() -> float:
        call()
        da, db = results[0]
        oracle = partial(_oracle().mitchell_matmul_grad, multiplier=multiplier, mode="exact")
        few = slice(0, 2)
        want_a = oracle(a[few], b, dy[few])[0]
        want_b = oracle(a, b[:, few], dy[:, few])[1]
        wide = [np.abs(x.astype(np.float64)) for x in (a, b, dy)]
        error_a = _sums(da[few], want_a, wide[2][few] @ wide[1].T, n, _eps(dtype))
        return max(error_a, _sums(db[:, few], want_b, wide[0].T @ wide[2][:, few], part, _eps(dtype)))

    return Task(call, (), 2.0 * part * k * n, 2.0 * m * k * n, check, _note(part, m, "rows"), [a, b, dy])
