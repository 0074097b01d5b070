# SPDX-License-Identifier: BSD-3-Clause
"""Element-wise Mitchell arithmetic: every backend and CPU level against the reference, bit by bit, in every layout of arrays."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from fractions import Fraction
from types import ModuleType
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import tolerance
from hypothesis import HealthCheck, given, settings
from samples import (
    FLOATS,
    INTEGERS,
    MANTISSA,
    MULTIPLIERS,
    WIDER,
    assert_same_bits,
    bits,
    edge_integers,
    near_one,
    patterns,
    specials,
    views,
)

import fastops
from fastops import Multiplier, _backend, reference
from fastops._multiplier import OPS

BINARY = ("mul", "div")
PLAIN = Multiplier()
OPTIONS = {name: Multiplier(**options) for name, options in MULTIPLIERS.items()}
OPS_OF = [(name, op) for name, m in OPTIONS.items() for op in OPS if m._has(op) and op not in ("log2", "exp2")]

quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def operands(op: str, make: Callable[[int], Any]) -> list[Any]:
    return [make(seed) for seed in range(2 if op in BINARY else 1)]


def check(backend: ModuleType, op: str, multiplier: Multiplier, *arrays: Any, **keywords: Any) -> None:
    with np.errstate(all="ignore"):
        got = backend.mitchell_op(op, multiplier)(*arrays, **keywords)
        want = reference.mitchell_op(op, multiplier)(*arrays, **keywords)
    assert_same_bits(got, want, *arrays)


# The definition.


def round_to(value: Fraction, name: str) -> float:
    """The nearest number of a dtype, ties to even, as an exact float; infinity beyond the range."""
    if value == 0:
        return 0.0
    sign, value = (-1, -value) if value < 0 else (1, value)
    m = MANTISSA[name]
    info = {"f16": -14, "bf16": -126, "f32": -126, "f64": -1022}[name]
    e = value.numerator.bit_length() - value.denominator.bit_length()
    e -= Fraction(2) ** e > value
    step = Fraction(2) ** (max(e, info) - m)
    n = round(value / step)
    largest = Fraction(2) ** {"f16": 16, "bf16": 128, "f32": 128, "f64": 1024}[name]
    return sign * (math.inf if n * step >= largest else float(n * step))


def piecewise(log: Fraction) -> Fraction:
    """PL: the inverse of taking x for log2(1 + x)."""
    whole = math.floor(log)
    return Fraction(2) ** whole * (1 + log - whole)


def mitchell_log(x: float) -> Fraction:
    value = abs(Fraction(x))
    e = value.numerator.bit_length() - value.denominator.bit_length()
    e -= Fraction(2) ** e > value
    return e + value / Fraction(2) ** e - 1


def definition(op: str, c: float, name: str, *values: float) -> float:
    """Rule A with the constant c, in exact fractions, of positive finite values."""
    m = MANTISSA[name]
    constant = Fraction(round(Fraction(c) * 2**m), 2**m)
    logs = [mitchell_log(v) for v in values]
    if op in ("sqrt", "rsqrt"):
        u = (logs[0] if op == "sqrt" else -logs[0]) * 2**m + 2 * constant * 2**m
        return round_to(piecewise(Fraction(round(u / 2), 2**m)), name)
    if op == "log2":
        return round_to(logs[0], name)
    if op == "exp2":
        return round_to(piecewise(Fraction(values[0])), name)
    log = {"mul": sum(logs), "div": logs[0] - logs[-1], "square": 2 * logs[0], "reciprocal": -logs[0]}[op]
    return round_to(piecewise(log + constant), name)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("compensation", ["none", "minimax", 0.3])
@quiet
def test_results_follow_the_definition_in_fractions(
    backend: ModuleType, target: str, op: str, name: str, compensation: Any
):
    multiplier = Multiplier(compensation)
    dtype = FLOATS[name]
    n = 150
    arrays = operands(op, lambda seed: patterns(dtype, n, 10 + seed))
    arrays = [np.where(np.isfinite(a), np.abs(a), a.dtype.type(1.5)) for a in arrays]
    if op == "exp2":
        arrays = [np.concatenate([near_one(dtype, n // 2, 3) * dtype.type(5), -near_one(dtype, n - n // 2, 4)])]
    subnormal = (np.arange(1, n + 1) * 7).astype(bits(arrays[0]).dtype).view(dtype)
    arrays[0] = np.where(np.arange(n) % 5 == 0, subnormal, arrays[0])
    arrays = [np.where(a == 0, a.dtype.type(1), a) for a in arrays]
    got = backend.mitchell_op(op, multiplier)(*arrays)
    c = multiplier.spec(op).c
    want = np.array([definition(op, c, name, *map(float, values)) for values in zip(*arrays, strict=True)]).astype(
        dtype
    )
    assert_same_bits(got, want, *arrays)


# Every option, dtype and operation.


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("op", OPS)
def test_random_bit_patterns(backend: ModuleType, target: str, op: str, name: str):
    check(backend, op, PLAIN, *operands(op, lambda seed: patterns(FLOATS[name], 20_000, seed)))


@pytest.mark.parametrize(("option", "op"), OPS_OF)
def test_every_option(backend: ModuleType, target: str, option: str, op: str):
    for name, dtype in FLOATS.items():
        n = 1500 if name != "f64" else 400
        arrays = operands(op, lambda seed, n=n, dtype=dtype: np.concatenate(
            [patterns(dtype, n, 20 + seed), near_one(dtype, n, 30 + seed)]
        ))  # fmt: skip
        check(backend, op, OPTIONS[option], *arrays)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("op", OPS)
def test_special_values(backend: ModuleType, target: str, op: str, name: str):
    values = specials(name)
    assert len(values) == 12
    for multiplier in (
        PLAIN,
        OPTIONS["flush"],
        OPTIONS["minimax"],
        OPTIONS["segments-16"],
        OPTIONS["k1"],
        OPTIONS["equation"],
    ):
        if multiplier._has(op):
            check(backend, op, multiplier, *((values[:, None], values[None, :]) if op in BINARY else (values,)))


@pytest.mark.parametrize("name", FLOATS)
@quiet
def test_zeros_infinities_and_nan_are_those_of_numpy(backend: ModuleType, target: str, name: str):
    values = specials(name)[:5]
    others = np.concatenate([values, specials(name)[-3:]])
    a, b = (x.ravel() for x in np.meshgrid(values, others))
    for x, y in ((a, b), (b, a)):
        assert_same_bits(backend.mitchell_mul(x, y), x * y, x, y)
        assert_same_bits(backend.mitchell_div(x, y), x / y, x, y)
    assert_same_bits(backend.mitchell_square(values), values * values, values)
    assert_same_bits(backend.mitchell_reciprocal(values), values.dtype.type(1) / values, values)
    assert_same_bits(
        backend.mitchell_sqrt(others), np.where(others == 1.5, others.dtype.type(1.25), np.sqrt(others)), others
    )
    assert_same_bits(backend.mitchell_rsqrt(values), (1 / np.sqrt(values)).astype(values.dtype), values)
    assert_same_bits(backend.mitchell_log2(values), np.log2(values), values)
    assert_same_bits(backend.mitchell_exp2(values), np.exp2(values), values)


@pytest.mark.parametrize("name", FLOATS)
def test_subnormal_operands_and_results(backend: ModuleType, target: str, name: str):
    dtype = FLOATS[name]
    unsigned = bits(np.zeros(1, dtype)).dtype
    small = (
        np.concatenate([np.arange(1, 300), (1 << MANTISSA[name]) + np.arange(-200, 200)]).astype(unsigned).view(dtype)
    )
    large = np.full(small.shape, 1.75, dtype)
    for op in OPS:
        for multiplier in (PLAIN, OPTIONS["flush"], OPTIONS["flush-minimax"]):
            for other in (large, large / dtype.type(8), small[::-1]):
                check(backend, op, multiplier, *((small, other) if op in BINARY else (small,)))
    # Products whose exact values lie below the normal range: gradual underflow, rounded once.
    root = np.ldexp(1.0, {"f16": -8, "bf16": -65, "f32": -65, "f64": -515}[name])
    a = (near_one(dtype, 2000, 5).astype(np.float64) * root).astype(dtype)
    b = (near_one(dtype, 2000, 6).astype(np.float64) * root).astype(dtype)
    with np.errstate(all="ignore"):
        assert (np.abs(a * b) < np.ldexp(1.0, {"f16": -14, "bf16": -126, "f32": -126, "f64": -1022}[name])).mean() > 0.5
    for multiplier in (PLAIN, OPTIONS["flush"], OPTIONS["min-mse"], OPTIONS["k0"], OPTIONS["k3"], OPTIONS["equation"]):
        check(backend, "mul", multiplier, a, b)
    check(backend, "div", PLAIN, a, dtype.type(1) / b)


# Integers.


@pytest.mark.parametrize(
    "option",
    [
        "plain",
        "min-mse",
        "minimax",
        "lmul",
        "equation",
        "segments-4",
        "segments-16",
        "m1",
        "m7",
        "negative",
        "k0",
        "k1",
        "k2-m6",
        "k3",
    ],
)
def test_every_pair_of_bytes(backend: ModuleType, target: str, option: str):
    for dtype in (np.uint8, np.int8):
        values = np.arange(256).astype(dtype)
        check(backend, "mul", OPTIONS[option], values[:, None], values[None, :])
        check(backend, "square", OPTIONS[option], values)


def test_the_table_of_bytes_is_the_published_one(backend: ModuleType, target: str):
    values = np.arange(256, dtype=np.uint8)
    table = backend.mitchell_mul(values[:, None], values[None, :])
    assert table.dtype == np.uint16
    assert int(table.sum(dtype=np.int64)) == 1025628691
    assert zlib.crc32(table.astype("<u2").tobytes()) == 0x65A00F35
    signed = np.arange(-128, 128, dtype=np.int8)
    product = backend.mitchell_mul(signed[:, None], signed[None, :])
    assert product.dtype == np.int16
    assert (product.min(), product.max()) == (-16256, 16384)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers(backend: ModuleType, target: str, dtype: np.dtype[Any]):
    edges = edge_integers(dtype)
    a, b = patterns(dtype, 1500, 1), patterns(dtype, 1500, 2)
    for option in ("plain", "minimax", "negative", "lmul-m4", "equation", "segments-8-m5", "m7", "k0", "k2-m6"):
        multiplier = OPTIONS[option]
        check(backend, "mul", multiplier, a, b)
        check(backend, "mul", multiplier, edges[:, None], edges[None, ::7])
        check(backend, "square", multiplier, edges)
    got = backend.mitchell_mul(a, b)
    assert got.dtype == np.dtype(WIDER[dtype.char])
    # Python's integers are the independent definition.
    for x, y, z in list(zip(a.tolist(), b.tolist(), got.tolist(), strict=True))[:300]:
        assert z == _wrap(_integer_mitchell(x, y), got.dtype)


def _integer_mitchell(a: int, b: int) -> int:
    if a == 0 or b == 0:
        return 0
    sign = -1 if (a < 0) != (b < 0) else 1
    a, b = abs(a), abs(b)
    ka, kb = a.bit_length() - 1, b.bit_length() - 1
    p = (a - (1 << ka) << kb) + (b - (1 << kb) << ka)
    return sign * (p + (1 << (ka + kb)) if p < 1 << (ka + kb) else 2 * p)


def _wrap(value: int, dtype: np.dtype[Any]) -> int:
    info = np.iinfo(dtype)
    return (value - info.min) % 2**info.bits + info.min


def test_mixed_integers_take_the_loop_that_holds_both(backend: ModuleType, target: str):
    a, b = np.array([200, 3], np.uint8), np.array([-100, 7], np.int16)
    for x, y in ((a, b), (a, np.array([5, 6], np.uint32)), (b, np.array([5, 6], np.int64)), (a, a.astype(bool))):
        check(backend, "mul", PLAIN, x, y)
    for op in ("div", "sqrt", "log2", "exp2", "reciprocal", "rsqrt"):
        check(backend, op, PLAIN, *((a, a) if op in BINARY else (a,)))


# Properties of the definition.


@pytest.mark.parametrize("name", FLOATS)
def test_mul_error_within_one_ninth_and_symmetries(backend: ModuleType, target: str, name: str):
    dtype = FLOATS[name]
    a, b = near_one(dtype, 5000, 1), near_one(dtype, 5000, 2)
    product = backend.mitchell_mul(a, b)
    exact = a.astype(np.float64) * b.astype(np.float64)
    ratio = product.astype(np.float64) / exact
    slack = tolerance.rounding(dtype)
    assert ratio.max() <= 1 + slack
    assert ratio.min() >= 8 / 9 - slack
    assert ratio.min() < 0.9
    assert_same_bits(product, backend.mitchell_mul(b, a), a, b)
    assert_same_bits(backend.mitchell_mul(-a, b), -product, a, b)
    assert_same_bits(backend.mitchell_mul(a * dtype.type(8), b), product * dtype.type(8), a, b)
    power = np.ldexp(1.0, np.arange(5000) % 9 - 4).astype(dtype)
    assert_same_bits(backend.mitchell_mul(a, power), a * power, a, power)
    assert_same_bits(backend.mitchell_div(a, power), a / power, a, power)
    ordered = np.sort(np.abs(a))
    assert (np.diff(backend.mitchell_mul(ordered, np.full_like(ordered, 1.625)).astype(np.float64)) >= 0).all()
    half = np.array([1.5], dtype)
    assert backend.mitchell_mul(half, half) == 2
    quotient = backend.mitchell_div(a, b).astype(np.float64) / (a.astype(np.float64) / b.astype(np.float64))
    assert quotient.min() >= 1 - slack
    assert quotient.max() <= 9 / 8 + slack


def test_half_precision_figures(backend: ModuleType, target: str):
    mantissas = (np.arange(1024, 2048) / 1024).astype(np.float16)
    x = mantissas.astype(np.float64)
    exact = x[:, None] * x[None, :]
    error = backend.mitchell_mul(mantissas[:, None], mantissas[None, :]).astype(np.float64) / exact - 1
    assert abs(error.mean() - -0.0384879512) < tolerance.FIGURE
    assert abs(np.sqrt((error**2).mean()) - 0.0484196514) < tolerance.FIGURE
    assert error.min() == 8 / 9 - 1
    error = (
        backend.mitchell_div(mantissas[:, None], mantissas[None, :]).astype(np.float64) * x[None, :] / x[:, None] - 1
    )
    assert abs(error.mean() - 0.0410179983) < tolerance.FIGURE
    assert abs(np.sqrt((error**2).mean()) - 0.0522682749) < tolerance.FIGURE
    assert error.max() == 0.125


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [name for name in ("f16", "bf16") if name in FLOATS])
def test_all_pairs_of_half_precision(native: ModuleType, name: str):
    """All 2^32 pairs of bit patterns at every level; signs and order are covered by symmetry of the oracle, not of the kernel."""
    from fastops import _core

    positive = np.arange(1 << 15, dtype=np.uint16).view(FLOATS[name])
    sign = np.uint16(1 << 15)
    before = _core.get_target()
    try:
        for first in range(0, positive.size, 32):
            a, b = positive[first : first + 32, None], positive[None, first:]
            with np.errstate(all="ignore"):
                want = bits(reference.mitchell_mul(a, b))
                nan = np.isnan(want.view(FLOATS[name]))
                for level in _core.targets():
                    _core.set_target(level)
                    for flip_a, flip_b in ((0, 0), (0, sign), (sign, 0), (sign, sign)):
                        x, y = (
                            (bits(v) | np.uint16(flip)).view(FLOATS[name]) for v, flip in ((a, flip_a), (b, flip_b))
                        )
                        for got in (native.mitchell_mul(x, y), native.mitchell_mul(y, x)):
                            same = bits(got) == (want | np.uint16(flip_a ^ flip_b))
                            assert (same | (nan & np.isnan(got))).all(), (level, first)
    finally:
        _core.set_target(before)


# Layouts.


@pytest.mark.parametrize("name", FLOATS)
def test_every_length_and_alignment(backend: ModuleType, target: str, name: str):
    dtype = FLOATS[name]
    a, b = patterns(dtype, 300, 3), patterns(dtype, 300, 4)
    with np.errstate(all="ignore"):
        want = reference.mitchell_mul(a, b)
    lengths = range(201) if backend.__name__ != "fastops.reference" else (0, 1, 2, 3, 17)
    out = np.empty(301, dtype)
    for n in lengths:
        i = n % 67
        out.fill(dtype.type(7))
        with np.errstate(all="ignore"):
            backend.mitchell_mul(a[i : i + n], b[i : i + n], out=out[1 : n + 1])
        assert_same_bits(out[1 : n + 1], want[i : i + n], a[i : i + n], b[i : i + n])
        assert out[0] == 7
        assert out[n + 1] == 7


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", FLOATS)
def test_every_layout(backend: ModuleType, target: str, op: str, name: str):
    dtype = FLOATS[name]
    for n in (1, 37):
        first = list(views(lambda k: patterns(dtype, k, 11 + k), n))
        second = list(views(lambda k: patterns(dtype, k, 50 + k), n))
        pairs = [(x, y) for _, x in first for _, y in second] if op in BINARY else [(x,) for _, x in first]
        for arrays in pairs if backend.__name__ != "fastops.reference" else pairs[:5]:
            before = [x.tobytes() for x in arrays]
            check(backend, op, PLAIN, *arrays)
            assert before == [x.tobytes() for x in arrays]


@pytest.mark.parametrize("name", FLOATS)
def test_out_of_every_layout(backend: ModuleType, target: str, name: str):
    dtype = FLOATS[name]
    a, b = patterns(dtype, 37, 1), patterns(dtype, 37, 2)
    with np.errstate(all="ignore"):
        want = reference.mitchell_mul(a, b)
        for kind, out in views(lambda k: np.zeros(k, dtype), 37):
            if kind in ("read-only", "zero stride"):
                continue
            result = backend.mitchell_mul(a, b, out=out)
            assert result is out
            assert_same_bits(np.ascontiguousarray(out).astype(dtype), want, a, b)
        wide = np.zeros(37, np.float64)
        backend.mitchell_mul(a, b, out=wide)
        assert_same_bits(wide, want.astype(np.float64))


@pytest.mark.parametrize("name", [*FLOATS, "u8", "i32"])
def test_overlap_of_out_and_operands(backend: ModuleType, target: str, name: str):
    dtype = {**FLOATS, "u8": np.dtype(np.uint8), "i32": np.dtype(np.int32)}[name]
    operation = backend.mitchell_mul
    for n in (5, 64, 1000):
        for shift in (0, 1, 3, -1, -5, 16):
            lo, hi = max(0, -shift), n + max(0, shift)
            base = patterns(dtype, n + 40, 9)
            result = np.dtype(WIDER[dtype.char]) if dtype.kind in "iu" else dtype
            if result != dtype:
                # A widening loop writes over operands of half the width.
                base = np.concatenate([base, base])
                out_of = lambda x, lo=lo, n=n, result=result: x[: x.size // 8 * 8].view(result)[lo : lo + n // 2]
                a_of = lambda x, n=n: x[: n // 2]
            else:
                out_of = lambda x, lo=lo, shift=shift, n=n: x[lo + shift : lo + shift + n]
                a_of = lambda x, lo=lo, n=n: x[lo : lo + n]
            assert hi <= base.size
            with np.errstate(all="ignore"):
                a = a_of(base)
                want = reference.mitchell_mul(a.copy(), a[::-1].copy())
                operation(a, a[::-1], out=out_of(base))
            assert_same_bits(out_of(base), want)


def test_in_place_square_of_a_reversed_view(backend: ModuleType, target: str):
    x = near_one(np.dtype(np.float32), 101, 1)
    want = reference.mitchell_square(x[::-1].copy())
    backend.mitchell_square(x[::-1], out=x)
    assert_same_bits(x, want)


def test_zero_dimensional_and_empty(backend: ModuleType, target: str):
    for name, dtype in FLOATS.items():
        for op in OPS:
            scalar = dtype.type(1.5)
            arrays = [scalar] * (2 if op in BINARY else 1)
            got = backend.mitchell_op(op, PLAIN)(*arrays)
            assert got.shape == (), name
            check(backend, op, PLAIN, *arrays)
            out = np.empty((), dtype)
            assert backend.mitchell_op(op, PLAIN)(*arrays, out=out) is out
            for shape in ((0,), (3, 0), (0, 2, 5)):
                empty = np.empty(shape, dtype)
                got = backend.mitchell_op(op, PLAIN)(*[empty] * len(arrays))
                assert (got.shape, got.dtype) == (shape, dtype)
    assert float(backend.mitchell_mul(3, 5)) == 14
    assert float(backend.mitchell_mul(3.0, 3)) == 8.0
    assert backend.mitchell_mul([3.0, 5.0], 3.0).tolist() == [8.0, 14.0]


def test_broadcasting(backend: ModuleType, target: str):
    a, b, c = (
        patterns(FLOATS["f32"], 12, 1),
        patterns(FLOATS["f32"], 35, 2).reshape(5, 7),
        patterns(FLOATS["f32"], 7, 3),
    )
    for x, y in ((a.reshape(12, 1), c), (b, c), (b[:, :1], b), (b, np.float32(1.7)), (a.reshape(3, 1, 4, 1), c[:5])):
        check(backend, "mul", PLAIN, x, y)
        check(backend, "div", PLAIN, y, x)
    check(backend, "mul", PLAIN, b, np.asfortranarray(b))
    check(backend, "mul", PLAIN, b.T, np.asfortranarray(b).T)


def test_where_keeps_what_out_held(backend: ModuleType, target: str):
    for dtype in FLOATS.values():
        a, b = patterns(dtype, 333, 1), patterns(dtype, 333, 2)
        mask = np.random.default_rng(0).random(333) < 0.4
        out = np.full(333, 5, dtype)
        with np.errstate(all="ignore"):
            backend.mitchell_mul(a, b, out=out, where=mask)
            want = np.where(mask, reference.mitchell_mul(a, b), dtype.type(5))
        assert_same_bits(out, want.astype(dtype), a, b)
        backend.mitchell_sqrt(np.abs(near_one(dtype, 333, 1)), out=out, where=False)
        assert_same_bits(out, want.astype(dtype))


def test_promotion_is_that_of_numpy(backend: ModuleType, target: str):
    f32, f64, f16 = (np.array([1.5, 3.0], t) for t in (np.float32, np.float64, np.float16))
    for x, y in (
        (f32, f64),
        (f16, f32),
        (f32, 2.5),
        (f16, 3),
        (f32, np.array([3, 5], np.int8)),
        (f32, np.array([3, 5], np.int64)),
    ):
        got = backend.mitchell_mul(x, y)
        assert got.dtype == np.multiply(x, y).dtype
        check(backend, "mul", PLAIN, x, y)
    got = backend.mitchell_mul(f32, f32, dtype=np.float64)
    assert got.dtype == np.float64


# Floating-point warnings.


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("op", OPS)
def test_no_false_warning(backend: ModuleType, target: str, op: str, name: str):
    dtype = FLOATS[name]
    positive = np.abs(near_one(dtype, 999, 1))
    # Lanes of zeros, infinities, NaN and subnormals beside ordinary ones: their neighbours' flags must not leak.
    rare = positive.copy()
    rare[::7], rare[3::7] = 0, np.inf
    rare[5::7] = np.nan
    tiny = positive.copy()
    tiny[::5] = np.array([3], bits(tiny).dtype).view(dtype)
    with warnings.catch_warnings(), np.errstate(divide="warn", over="warn", invalid="warn", under="ignore"):
        warnings.simplefilter("error")
        function = backend.mitchell_op(op, PLAIN)
        function(*[positive] * (2 if op in BINARY else 1))
        if op in ("mul", "div"):
            function(rare, positive)
            function(tiny, positive)
        elif op in ("sqrt", "exp2", "square"):
            function(rare)
            function(tiny)
        elif op == "log2":
            function(tiny)
        if op == "mul":
            function(positive, rare)


@pytest.mark.parametrize(
    ("op", "values", "kind"),
    [
        ("mul", (np.inf, 0.0), "invalid"),
        ("mul", ("max", "max"), "overflow"),
        ("div", (1.0, 0.0), "divide by zero"),
        ("div", (0.0, 0.0), "invalid"),
        ("div", (np.inf, np.inf), "invalid"),
        ("div", ("max", 0.25), "overflow"),
        ("square", ("max",), "overflow"),
        ("reciprocal", (0.0,), "divide by zero"),
        ("sqrt", (-1.0,), "invalid"),
        ("rsqrt", (0.0,), "divide by zero"),
        ("rsqrt", (-1.0,), "invalid"),
        ("log2", (0.0,), "divide by zero"),
        ("log2", (-1.0,), "invalid"),
        ("exp2", (20000.0,), "overflow"),
    ],
)
@pytest.mark.parametrize("name", ["f16", "f32", "f64"])
def test_a_true_warning_is_given(
    backend: ModuleType, target: str, op: str, values: tuple[Any, ...], kind: str, name: str
):
    dtype = FLOATS[name]
    largest = np.finfo(dtype).max
    for n, at in ((1, 0), (100, 97)):
        arrays = [np.full(n, 1.5, dtype) for _ in values]
        for array, value in zip(arrays, values, strict=True):
            array[at] = largest if value == "max" else value
        with pytest.warns(RuntimeWarning, match=kind), np.errstate(all="warn", under="ignore"):
            backend.mitchell_op(op, PLAIN)(*arrays)


# What true ufuncs offer.


def folded(values: Any) -> Any:
    total = values[0]
    for value in values[1:]:
        total = reference.mitchell_mul(total, value)
    return total


def test_reduce_and_accumulate(native: ModuleType):
    mul = native.mitchell_mul
    assert mul.identity == 1
    for name, dtype in FLOATS.items():
        # Nearer to one than elsewhere: 23 factors of float16 must not overflow.
        x = np.sqrt(np.abs(near_one(dtype, 23, 1))).astype(dtype)
        assert_same_bits(mul.reduce(x), dtype.type(folded(x)))
        assert_same_bits(mul.accumulate(x), np.array([folded(x[: i + 1]) for i in range(23)], dtype))
        grid = near_one(dtype, 60, 2).reshape(5, 12)
        assert_same_bits(mul.reduce(grid, axis=0), np.array([folded(column) for column in grid.T], dtype))
        assert_same_bits(mul.reduce(grid, axis=1), np.array([folded(row) for row in grid], dtype))
        assert_same_bits(mul.accumulate(grid, axis=0)[-1], mul.reduce(grid, axis=0))
        assert mul.reduce(np.empty(0, dtype)) == 1, name
    ints = np.array([3, 5, 7, 9], np.int64)
    assert mul.reduce(ints) == folded(list(ints))
    small = np.array([3, 5, 7], np.uint8)
    assert mul.reduce(small, dtype=np.uint64) == folded([np.uint64(v) for v in small])
    assert mul.accumulate(small, dtype=np.int64).tolist() == [3, 14, folded([np.int64(v) for v in small])]


def test_reduce_without_identity_where_one_is_not_neutral(native: ModuleType):
    compensated = native.mitchell_op("mul", Multiplier("min-mse"))
    assert compensated.identity is None
    with pytest.raises(ValueError, match="identity"):
        compensated.reduce(np.empty(0, np.float32))
    for option in ("m7", "segments-4", "lmul", "flush", "k0", "k1"):
        ufunc = native.mitchell_op("mul", OPTIONS[option])
        x = np.array([1.2345, 1e-40], np.float32)
        # One is the identity only where it leaves every number as it is.
        assert (ufunc.identity == 1) <= (ufunc(np.float32(1), x) == x).all()
        assert_same_bits(ufunc.reduce(x[:1]), x[0])
    x = near_one(np.dtype(np.float32), 9, 1)
    total = x[0]
    for value in x[1:]:
        total = reference.mitchell_op("mul", Multiplier("min-mse"))(total, value)
    assert_same_bits(compensated.reduce(x), total)


def test_outer_and_at(native: ModuleType, target: str):
    for dtype in FLOATS.values():
        a, b = near_one(dtype, 19, 1), near_one(dtype, 23, 2)
        for op in BINARY:
            ufunc = native.mitchell_op(op, PLAIN)
            assert_same_bits(ufunc.outer(a, b), reference.mitchell_op(op, PLAIN)(a[:, None], b[None, :]))
        x = a.copy()
        native.mitchell_mul.at(x, [0, 3, 0], np.array([1.5, 2.5, 1.5], dtype))
        want = a.copy()
        for i, factor in ((0, 1.5), (3, 2.5), (0, 1.5)):
            want[i] = reference.mitchell_mul(want[i], dtype.type(factor))
        assert_same_bits(x, want)
        native.mitchell_square.at(x, [2, 2])
        want[2] = reference.mitchell_square(reference.mitchell_square(want[2]))
        assert_same_bits(x, want)


def test_reduceat(native: ModuleType):
    x = near_one(np.dtype(np.float32), 20, 1)
    got = native.mitchell_mul.reduceat(x, [0, 4, 9])
    assert_same_bits(got, np.array([folded(x[:4]), folded(x[4:9]), folded(x[9:])], np.float32))


def test_subclasses_and_masks_go_through(native: ModuleType):
    masked = np.ma.masked_array([1.5, 3.0, 5.0], [False, True, False])
    got = native.mitchell_mul(masked, 3.0)
    assert isinstance(got, np.ma.MaskedArray)
    assert got.mask.tolist() == [False, True, False]

    class Sub(np.ndarray):
        pass

    assert type(native.mitchell_mul(np.ones(3).view(Sub), 2.0)) is Sub


def test_bfloat16_mixes_as_numpy_does(native: ModuleType):
    if "bf16" not in FLOATS:
        pytest.skip("ml_dtypes is not installed")
    x = np.array([1.5, 3.0], FLOATS["bf16"])
    for other in (np.ones(2, np.float32), 2.0, np.ones(2, np.float64)):
        assert native.mitchell_mul(x, other).dtype == np.multiply(x, other).dtype


def test_types_list(native: ModuleType):
    types = set(native.mitchell_mul.types)
    assert {"ee->e", "ff->f", "dd->d", "bb->h", "BB->H", "hh->i", "HH->I", "ii->l", "II->L", "ll->l", "LL->L"} <= types
    assert {"e->e", "f->f", "d->d"} <= set(native.mitchell_sqrt.types)


def test_large_arrays_and_threads(native: ModuleType, target: str):
    """Above the sizes where threads and streaming stores start."""
    n = (1 << 21) + 77
    a, b = patterns(FLOATS["f32"], n, 1), patterns(FLOATS["f32"], n, 2)
    out = np.empty(n + 5, np.float32)[5:]
    results = []
    before = fastops.get_num_threads()
    try:
        with np.errstate(all="ignore"):
            for threads in (1, 2, 5):
                fastops.set_num_threads(threads)
                out.fill(0)
                native.mitchell_mul(a, b, out=out)
                results.append(out.copy())
            want = np.concatenate([native.mitchell_mul(a[i : i + 999], b[i : i + 999]) for i in range(0, n, 999)])
    finally:
        fastops.set_num_threads(before)
    for result in results:
        assert_same_bits(result, want, a, b)
    sample = np.random.default_rng(0).integers(0, n, 5000)
    check(native, "mul", PLAIN, a[sample], b[sample])


@pytest.mark.parametrize("bad", [0, 1 << 20, (1 << 21) - 1])
def test_warnings_do_not_depend_on_where_a_thread_met_them(native: ModuleType, target: str, bad: int):
    x = np.full(1 << 21, 1.5, np.float32)
    x[bad] = np.finfo(np.float32).max
    with pytest.warns(RuntimeWarning, match="overflow"), np.errstate(all="warn"):
        native.mitchell_mul(x, x)


# Pickles.


PICKLED = [
    Multiplier(),
    *(OPTIONS[n] for n in ("lmul", "float", "negative", "segments-8-m5", "flush-minimax", "k2-m6")),
]


def operations() -> list[Any]:
    return [getattr(m, op) for m in PICKLED for op in OPS if m._has(op) and op not in ("log2", "exp2")] + [
        fastops.mitchell_log2,
        fastops.mitchell_exp2,
        fastops.lmul,
    ]


def test_operations_pickle_by_their_names():
    cloudpickle = pytest.importorskip("cloudpickle")
    for operation in operations():
        assert getattr(fastops, operation.__name__) is operation
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(operation, protocol)) is operation
        assert pickle.loads(cloudpickle.dumps(operation)) is operation


def test_operations_arrive_in_a_fresh_process():
    cloudpickle = pytest.importorskip("cloudpickle")
    x = near_one(np.dtype(np.float32), 50, 1)
    values = [
        op(np.abs(x), np.abs(x)) if op.__name__.startswith(("mitchell_mul", "mitchell_div", "lmul")) else op(np.abs(x))
        for op in operations()
    ]
    code = (
        "import pickle, sys, numpy as np\n"
        "x = np.abs(pickle.load(sys.stdin.buffer))\n"
        "for _ in range(2):\n"
        "    for op, want in zip(pickle.load(sys.stdin.buffer), pickle.load(sys.stdin.buffer)):\n"
        "        got = op(x, x) if op.__name__.startswith(('mitchell_mul', 'mitchell_div', 'lmul')) else op(x)\n"
        "        assert got.tobytes() == want.tobytes(), op.__name__\n"
        "print('same')"
    )
    data = (
        pickle.dumps(x)
        + pickle.dumps(operations())
        + pickle.dumps(values)
        + cloudpickle.dumps(operations())
        + pickle.dumps(values)
    )
    ran = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    assert ran.stdout.strip() == b"same"


def test_multipliers_pickle_compare_and_print():
    for multiplier in OPTIONS.values():
        again = pickle.loads(pickle.dumps(multiplier))
        assert again == multiplier
        assert hash(again) == hash(multiplier)
        assert eval(repr(multiplier), {"Multiplier": Multiplier}) == multiplier
        assert Multiplier._from_token(multiplier._token()) == multiplier
        assert again.mul is multiplier.mul
    assert len(set(OPTIONS.values())) == len(OPTIONS)
    assert Multiplier(segments=4) != "Multiplier(segments=4)"


# Hypothesis.


def any_floats(dtype: np.dtype[Any], shape: Any) -> st.SearchStrategy[Any]:
    """Arrays of raw bit patterns."""
    unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
    return hnp.arrays(unsigned, shape).map(lambda raw: raw.view(dtype))


@st.composite
def views_of(draw: st.DrawFn, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    """An array of this shape: cut, reversed, transposed, repeated or misaligned."""
    axes = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2, 3, -1, -2, 0])) for _ in shape]
    full = [1 if step == 0 else n * abs(step) for n, step in zip(shape, steps, strict=True)]
    base = draw(any_floats(dtype, tuple(full[axis] for axis in axes)))
    if draw(st.booleans()):
        raw = np.zeros(base.nbytes + 1, np.uint8)
        moved = np.ndarray(base.shape, dtype, raw[1:].data)
        moved[...] = base
        base = moved
    view = base.transpose(np.argsort(axes))
    view = view[tuple(slice(None) if step == 0 else slice(None, None, step) for step in steps)]
    view = np.broadcast_to(view, shape) if 0 in steps else view
    if draw(st.booleans()) and view.flags.writeable:
        view.flags.writeable = False
    return view


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_view_of_any_bits(backend: ModuleType, target: str, data: st.DataObject):
    dtype = data.draw(st.sampled_from(list(FLOATS.values())), label="dtype")
    op = data.draw(st.sampled_from(OPS), label="op")
    multiplier = data.draw(st.sampled_from([m for m in OPTIONS.values() if m._has(op)]), label="multiplier")
    shapes = data.draw(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=9), label="shapes")
    arrays = [data.draw(views_of(dtype, shape)) for shape in shapes.input_shapes[: 2 if op in BINARY else 1]]
    before = [x.tobytes() for x in arrays]
    check(backend, op, PLAIN if op in ("log2", "exp2") else multiplier, *arrays)
    assert before == [x.tobytes() for x in arrays]


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_integers(backend: ModuleType, target: str, data: st.DataObject):
    dtype = data.draw(st.sampled_from(INTEGERS), label="dtype")
    multiplier = data.draw(st.sampled_from(list(OPTIONS.values())), label="multiplier")
    shapes = data.draw(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=9), label="shapes")
    arrays = [data.draw(hnp.arrays(dtype, shape)) for shape in shapes.input_shapes]
    check(backend, "mul", multiplier, *arrays)


def test_the_default_backend_is_the_one_of_the_package():
    assert fastops.mitchell_mul is _backend.backend.mitchell_mul
