# SPDX-License-Identifier: BSD-3-Clause
"""The oracle itself: against published figures, its definition in rational arithmetic, and its symmetries."""

from __future__ import annotations

import math
import tracemalloc
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import tolerance
from samples import (
    FLOATS,
    INTEGERS,
    MANTISSA,
    MULTIPLIERS,
    Array,
    assert_same_bits,
    edge_integers,
    near_one,
    patterns,
    specials,
)

from fastops import Multiplier, reference
from fastops._segments import segment_table

UNARY = ("square", "reciprocal", "sqrt", "rsqrt")
EXACT: dict[str, Callable[..., Array]] = {
    "mul": np.multiply,
    "div": np.divide,
    "square": np.square,
    "reciprocal": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
}


def mantissas(dtype: Any, bits: int) -> Array:
    return (1 + np.arange(2**bits) / 2**bits).astype(dtype)


def continuum(bits: int) -> Array:
    """The middles of the intervals between the mantissas of so many bits."""
    return (1 + (np.arange(2**bits) + 0.5) / 2**bits).astype(np.float32)


def relative_errors(multiplier: Multiplier, op: str, m: Array) -> Array:
    """Of all pairs of mantissas, in per cent; of all mantissas and their doubles for one operand."""
    args = (m[:, np.newaxis], m[np.newaxis, :]) if op in ("mul", "div") else (np.concatenate([m, 2 * m]),)
    result = reference.mitchell_op(op, multiplier)(*args).astype(np.float64)
    return 100 * (result / EXACT[op](*(v.astype(np.float64) for v in args)) - 1)


def rms(error: Array) -> float:
    return math.sqrt(float(np.square(error).mean()))


def test_mul_float16_enumeration() -> None:
    error = relative_errors(Multiplier(), "mul", mantissas(np.float16, 10)) / 100
    assert error.size == 2**20
    assert float(error.mean()) == pytest.approx(-0.0384879512, abs=tolerance.FIGURE)
    assert rms(error) == pytest.approx(0.0484196514, abs=tolerance.FIGURE)
    assert np.count_nonzero(np.abs(error) < tolerance.QUOTIENT) == 2047
    assert abs(2047 / 2**20 - 0.001952) < tolerance.printed(6)


def test_mul_error_within_one_ninth() -> None:
    # Products of 11-bit significands and nine times them are exact in float64.
    m = mantissas(np.float16, 10)
    result = reference.mitchell_mul(m[:, np.newaxis], m).astype(np.float64)
    exact = m[:, np.newaxis].astype(np.float64) * m
    assert (9 * result >= 8 * exact).all()
    assert (result <= exact).all()
    worst = np.argwhere(9 * result == 8 * exact)
    assert worst.tolist() == [[512, 512]]


def test_div_error_within_one_eighth() -> None:
    m = mantissas(np.float16, 10).astype(np.float64)
    result = reference.mitchell_div(m[:, np.newaxis].astype(np.float16), m.astype(np.float16)).astype(np.float64)
    assert (result * m >= m[:, np.newaxis]).all()
    assert (8 * result * m <= 9 * m[:, np.newaxis]).all()
    # (1 + 0) / (1 + 1/2): exact 2/3, approximate 3/4.
    assert np.argwhere(8 * result * m == 9 * m[:, np.newaxis]).tolist() == [[0, 512]]
    error = relative_errors(Multiplier(), "div", m.astype(np.float16)) / 100
    assert float(error.mean()) == pytest.approx(0.0410179983, abs=tolerance.FIGURE)
    assert rms(error) == pytest.approx(0.0522682749, abs=tolerance.FIGURE)


@pytest.mark.parametrize(
    ("op", "bits", "mean", "square"),
    [
        ("mul", 7, -3.8485, 4.8423),
        ("div", 7, 4.1016, 5.2273),
        ("mul", 4, -3.8313, 4.8649),
        ("mul", 3, -3.7790, 4.9307),
    ],
)
def test_short_mantissas(op: str, bits: int, mean: float, square: float) -> None:
    dtype = FLOATS.get("bf16", np.dtype(np.float32))
    error = relative_errors(Multiplier(), op, mantissas(dtype, bits))
    assert float(error.mean()) == pytest.approx(mean, abs=tolerance.printed(4))
    assert rms(error) == pytest.approx(square, abs=tolerance.printed(4))


@pytest.mark.parametrize(
    ("op", "mean", "low", "high"),
    [
        ("square", -3.834, -100 / 9, 0.0),
        ("reciprocal", 8.333, 0.0, 12.5),
        ("sqrt", 2.022, 0.0, 100 * (3 / (2 * math.sqrt(2)) - 1)),
        ("rsqrt", 6.164, 0.0, 8.87),
    ],
)
def test_unary_errors(op: str, mean: float, low: float, high: float) -> None:
    assert float(relative_errors(Multiplier(), op, mantissas(np.float16, 10)).mean()) == pytest.approx(
        mean, abs=tolerance.printed(3)
    )
    error = relative_errors(Multiplier(), op, mantissas(np.float32, 16))
    assert error.min() >= low - tolerance.ENUMERATED
    assert error.max() <= high + tolerance.printed(2)
    assert max(abs(error.min() - low), abs(error.max() - high)) < tolerance.EXTREME


def test_log2_exp2_errors() -> None:
    m = mantissas(np.float64, 16)
    error = reference.mitchell_log2(m) - np.log2(m)
    assert error.max() == 0
    assert error.min() == pytest.approx(-0.08607, abs=tolerance.printed(5))
    assert float(error.mean()) == pytest.approx(-0.05730, abs=tolerance.printed(5))
    relative = 100 * (reference.mitchell_exp2(m - 1) / np.exp2(m - 1) - 1)
    assert relative.min() == 0
    assert relative.max() == pytest.approx(6.148, abs=tolerance.printed(3))
    assert float(relative.mean()) == pytest.approx(4.068, abs=tolerance.printed(3))


@pytest.mark.parametrize(
    ("op", "name", "square", "low", "high"),
    [
        ("mul", "none", 4.842, None, None),
        ("mul", "zero-mean", 3.0552, -7.65, 5.66),
        ("mul", "min-mse", 3.0538, -7.74, 5.52),
        ("mul", "minimax", 3.200, -6.89, 6.89),
        ("div", "none", 5.227, None, None),
        ("div", "zero-mean", 3.1123, -5.48, 8.19),
        ("div", "min-mse", 3.1108, None, None),
        ("div", "minimax", 3.291, -6.97, 6.97),
        ("square", "none", 5.108, None, None),
        ("square", "zero-mean", 3.569, None, None),
        ("square", "min-mse", 3.562, None, None),
        ("square", "minimax", None, -6.88, 6.88),
        ("reciprocal", "none", 9.129, None, None),
        ("reciprocal", "zero-mean", 3.433, -5.77, 4.01),
        ("reciprocal", "min-mse", 3.426, None, None),
        ("reciprocal", "minimax", None, -5.05, 5.05),
        ("sqrt", "none", 2.720, None, None),
        ("sqrt", "zero-mean", 1.812, -2.77, 4.02),
        ("sqrt", "minimax", None, -3.47, 3.47),
        ("rsqrt", "none", 6.574, None, None),
        ("rsqrt", "zero-mean", 2.095, -4.41, 2.06),
        ("rsqrt", "min-mse", 2.093, None, None),
        ("rsqrt", "minimax", None, -3.42, 3.42),
    ],
)
def test_constants(op: str, name: str, square: float | None, low: float | None, high: float | None) -> None:
    grid = continuum(10 if op in ("mul", "div") else 14)
    if square is not None:
        assert rms(relative_errors(Multiplier(name), op, grid)) == pytest.approx(square, abs=tolerance.unit(3))
    if low is not None and high is not None:
        error = relative_errors(
            Multiplier(name), op, np.concatenate([[1], grid, [np.nextafter(np.float32(2), 0)]], dtype=np.float32)
        )
        # Extremes on kinks lie between grid points, 2**-10 apart, and "minimax" prints one figure for both ends.
        assert float(error.min()) == pytest.approx(low, abs=tolerance.EXTREME)
        assert float(error.max()) == pytest.approx(high, abs=tolerance.EXTREME)


def test_constants_are_centred() -> None:
    m = mantissas(np.float32, 10)
    for op in EXACT:
        grid = m if op in ("mul", "div") else mantissas(np.float32, 14)
        assert abs(float(relative_errors(Multiplier("zero-mean"), op, grid).mean())) < tolerance.SAMPLED
        none, best = (rms(relative_errors(Multiplier(name), op, grid)) for name in ("zero-mean", "min-mse"))
        assert best <= none + tolerance.ENUMERATED
    assert float(relative_errors(Multiplier("min-mse"), "mul", m).mean()) == pytest.approx(
        -0.095, abs=tolerance.SAMPLED
    )
    assert float(np.abs(relative_errors(Multiplier("min-mse"), "mul", m)).mean()) == pytest.approx(
        2.566, abs=tolerance.unit(3)
    )


@pytest.mark.parametrize(
    ("form", "bits", "bias", "square", "low", "high"),
    [
        ("lmul", 7, 0.41, 3.10, -7.29, 6.25),
        ("lmul", 4, 4.87, 5.87, -3.2, 12.5),
        ("lmul", 3, 4.93, 6.02, None, 12.5),
        ("lmul-equation", 10, -6.41, 9.61, -23.4, 6.25),
    ],
)
def test_lmul_forms(form: str, bits: int, bias: float, square: float, low: float | None, high: float) -> None:
    # float32 holds the equation's product, of one bit more than the operands, without rounding.
    multiplier = Multiplier(form, mantissa_bits=bits)
    error = relative_errors(multiplier, "mul", mantissas(np.float32, bits))
    close = tolerance.printed(2) if form == "lmul" else tolerance.CONTINUUM
    assert float(error.mean()) == pytest.approx(bias, abs=close)
    assert rms(error) == pytest.approx(square, abs=close)
    assert float(error.max()) == pytest.approx(high, abs=tolerance.printed(1))
    if low is not None:
        assert float(error.min()) == pytest.approx(low, abs=tolerance.printed(1))


def test_lmul_equation_without_offset_is_babics_basic_block() -> None:
    error = relative_errors(Multiplier(corrections=0), "mul", mantissas(np.float32, 10))
    assert float(error.mean()) == pytest.approx(-9.42, abs=tolerance.CONTINUUM)
    assert float(error.min()) == pytest.approx(-25.0, abs=tolerance.EXTREME * 2)


@pytest.mark.parametrize(
    ("segments", "absolute", "square"), [(2, None, 2.93), (4, 1.433, 1.782), (8, 0.751, 0.950), (16, 0.388, 0.492)]
)
def test_segment_tables(segments: int, absolute: float | None, square: float) -> None:
    error = relative_errors(Multiplier(segments=segments), "mul", continuum(10))
    assert rms(error) == pytest.approx(square, abs=tolerance.printed(2 if segments == 2 else 3))
    if absolute is not None:
        assert float(np.abs(error).mean()) == pytest.approx(absolute, abs=tolerance.unit(3))
    if segments == 16:
        assert error.min() >= -1.72
        assert error.max() <= 1.51


@pytest.mark.parametrize("op", sorted(EXACT))
@pytest.mark.parametrize("segments", [2, 16])
def test_segment_table_is_the_least_square(op: str, segments: int) -> None:
    binary = op in ("mul", "div")
    table = np.array(segment_table(op, segments))
    assert table.size == (segments**2 if binary else segments)
    if op == "mul":
        np.testing.assert_array_equal(table.reshape(segments, segments), table.reshape(segments, segments).T)
    n = 512 if binary else 2**14
    x = (np.arange(n) + 0.5) / n
    cell = (x * segments).astype(int)
    if binary:
        cell = (cell[:, np.newaxis] * segments + cell).ravel()
        x, y = (v.ravel() for v in np.meshgrid(x, x, indexing="ij"))
        log, exact = (x + y, (1 + x) * (1 + y)) if op == "mul" else (x - y, (1 + x) / (1 + y))
    elif op in ("sqrt", "rsqrt"):
        log = np.concatenate([x, 1 + x]) / 2 * (1 if op == "sqrt" else -1)
        exact = EXACT[op](np.concatenate([1 + x, 2 + 2 * x]))
        cell = np.tile(cell, 2)
    else:
        log, exact = (2 * x if op == "square" else -x), EXACT[op](1 + x)

    def squares(shift: float) -> Array:
        s = log + table[cell] + shift
        error = np.exp2(np.floor(s)) * (1 + s - np.floor(s)) / exact - 1
        return np.bincount(cell, weights=np.square(error))

    # Off by 2**-9 either way, every cell must be worse than it is.
    least = squares(0.0)
    assert (squares(2.0**-9) > least).all()
    assert (squares(-(2.0**-9)) > least).all()


def test_uint8_table() -> None:
    u = np.arange(256, dtype=np.uint8)
    table = reference.mitchell_mul(u[:, np.newaxis], u)
    assert table.dtype == np.uint16
    assert int(table.sum(dtype=np.int64)) == 1025628691
    assert zlib.crc32(table.astype("<u2").tobytes()) == 0x65A00F35
    assert int(table.max()) == 65024
    exact = u[:, np.newaxis].astype(np.int64) * u
    difference = exact - table
    assert int(difference.max()) == 4096
    assert float(difference.mean()) == pytest.approx(606.398, abs=tolerance.printed(3))
    assert float(np.square(difference).mean()) == pytest.approx(974069.77, abs=tolerance.printed(2))
    error = difference[1:, 1:] / exact[1:, 1:]
    assert 100 * float(error.mean()) == pytest.approx(3.78783, abs=tolerance.printed(5))
    assert 100 * rms(error) == pytest.approx(4.8204, abs=tolerance.printed(4))
    assert float(difference[1:, 1:].mean()) == pytest.approx(611.16, abs=tolerance.printed(2))
    assert 100 * float((difference[1:, 1:] == 0).mean()) == pytest.approx(6.176, abs=tolerance.printed(3))
    assert (9 * difference <= exact).all()


def test_int8_table() -> None:
    i = np.delete(np.arange(-128, 128), 128).astype(np.int8)
    table = reference.mitchell_mul(i[:, np.newaxis], i)
    assert table.dtype == np.int16
    assert (int(table.min()), int(table.max())) == (-16256, 16384)
    error = 100 * (table / (i[:, np.newaxis].astype(np.float64) * i) - 1)
    assert float(error.mean()) == pytest.approx(-3.69941, abs=tolerance.printed(5))


def test_uint16_rows() -> None:
    """Integers equal the sum of the bit patterns of the operands as float32, which holds them exactly."""
    rows = np.unique(np.rint(np.geomspace(1, 65535, 24))).astype(np.uint16)[:, np.newaxis]
    columns = np.arange(1, 65536, dtype=np.uint16)
    product = reference.mitchell_mul(rows, columns)
    assert product.dtype == np.uint32
    bits = rows.astype(np.float32).view(np.int32) + columns.astype(np.float32).view(np.int32) - (127 << 23)
    np.testing.assert_array_equal(product.astype(np.float64), bits.view(np.float32).astype(np.float64))
    octave = np.arange(32768 + 512, 65536, 1024)[:, np.newaxis]
    error = 100 * (
        reference.mitchell_mul(octave.astype(np.uint16), columns) / (octave * columns.astype(np.float64)) - 1
    )
    # The middle of each of 32 strata stands for one octave of rows, and octaves are alike: off by the midpoint rule's
    # error.
    assert float(error.mean()) == pytest.approx(-3.84856, abs=tolerance.SAMPLED)
    assert rms(error) == pytest.approx(4.84187, abs=tolerance.SAMPLED)
    assert int(reference.mitchell_mul(np.uint16(49152), np.uint16(49152))) == 49152**2 - 268435456


@pytest.mark.parametrize(
    ("corrections", "low", "mean", "square"),
    [
        (0, -24.80, -8.913, 10.99),
        (1, -6.10, -0.8337, 1.370),
        (2, -1.48, -0.0708, 0.170),
        (3, -0.346, -0.00475, 0.0198),
    ],
)
def test_babic_corrections(corrections: int, low: float, mean: float, square: float) -> None:
    u = np.arange(1, 256, dtype=np.uint8)
    product = reference.mitchell_op("mul", Multiplier(corrections=corrections))(u[:, np.newaxis], u)
    error = 100 * (product / (u[:, np.newaxis].astype(np.float64) * u) - 1)
    for got, printed in ((error.min(), low), (error.mean(), mean), (rms(error), square)):
        digits = max(2, 3 - math.ceil(math.log10(abs(printed)))) if abs(printed) < 1 else 2
        assert float(got) == pytest.approx(printed, abs=tolerance.printed(digits))
    assert float(error.max()) == 0


def test_uint8_division_is_of_reals() -> None:
    u = np.arange(1, 256, dtype=np.uint8)
    quotient = reference.mitchell_div(u[:, np.newaxis], u)
    assert quotient.dtype == np.float16
    # The figure is that of unrounded quotients: in float32 they are.
    f = u.astype(np.float32)
    error = 100 * (
        reference.mitchell_div(f[:, np.newaxis], f).astype(np.float64) / (f[:, np.newaxis].astype(np.float64) / f) - 1
    )
    assert float(error.mean()) == pytest.approx(4.10221, abs=tolerance.printed(5))
    assert float(error.max()) == pytest.approx(12.5, abs=tolerance.printed(9))


def two_to(e: int) -> Fraction:
    return Fraction(2) ** e


def parts(a: float, bits: int, kept: int | None) -> tuple[int, Fraction]:
    """a = 2**e (1 + x), x cut to `kept` bits."""
    value = abs(Fraction(a))
    e = value.numerator.bit_length() - value.denominator.bit_length()
    e -= two_to(e) > value
    x = value / two_to(e) - 1
    kept = min(bits, kept or bits)
    return e, math.floor(x * two_to(kept)) / two_to(kept)


def piecewise(log: Fraction) -> Fraction:
    return two_to(math.floor(log)) * (1 + log - math.floor(log))


def without_top(n: int, count: int) -> int:
    for _ in range(count):
        n -= (1 << n.bit_length()) >> 1
    return n


def define(op: str, m: Multiplier, dtype: np.dtype[Any], *args: float) -> float:
    """Rule A for finite operands that IEEE's own rules leave to it."""
    name = next(k for k, v in FLOATS.items() if v == dtype)
    bits, emin = MANTISSA[name], {"f16": -14, "f64": -1022}.get(name, -126)
    if m.subnormals == "flush" and any(abs(Fraction(v)) < two_to(emin) for v in args):
        return math.nan
    spec = m.spec(op)
    sign = math.prod(math.copysign(1, v) for v in args) if op in ("mul", "div", "reciprocal") else 1
    (ea, x), (eb, y) = (parts(v, bits, m.mantissa_bits) for v in (args * 2)[:2])
    row, column = (math.floor(v * (m.segments or 1)) for v in (x, y))
    c = spec.c
    if m.segments:
        c = spec.table[row * m.segments + column] if len(args) == 2 else spec.table[row]
    c = Fraction(round(Fraction(c) * two_to(bits))) / two_to(bits)
    if op == "mul" or (op == "square" and spec.form):
        if spec.form == 0:
            value = two_to(ea + eb) * piecewise(x + y + c)
        elif spec.form == 1:
            value = two_to(ea + eb) * (1 + x + y + c)
        else:
            p, q = (int((1 + v) * two_to(bits)) for v in (x, y))
            k = spec.corrections + 1
            value = two_to(ea + eb - 2 * bits) * (p * q - without_top(p, k) * without_top(q, k))
    elif op == "div":
        value = two_to(ea - eb) * piecewise(x - y + c)
    elif op == "square":
        value = two_to(2 * ea) * piecewise(2 * x + c)
    elif op == "reciprocal":
        value = two_to(-ea) * piecewise(c - x)
    elif op == "log2":
        value, sign = abs(ea + x), 1 if ea + x >= 0 else -1
    elif op == "exp2":
        value = piecewise(Fraction(args[0]))
    else:
        half = (ea + x + 2 * c) / 2 if op == "sqrt" else (2 * c - ea - x) / 2
        value = piecewise(Fraction(round(half * two_to(bits))) / two_to(bits))
    if m.subnormals == "flush" and value < two_to(emin):
        return sign * 0.0
    return sign * nearest(value, bits, emin)


def nearest(value: Fraction, bits: int, emin: int) -> float:
    """To nearest, ties to even, with gradual underflow."""
    if value == 0:
        return 0.0
    e = max(emin, parts_exponent(value))
    rounded = round(value / two_to(e - bits)) * two_to(e - bits)
    emax = 1 - emin
    return math.inf if rounded >= two_to(emax + 1) else float(rounded)


def parts_exponent(value: Fraction) -> int:
    e = value.numerator.bit_length() - value.denominator.bit_length()
    return e - (two_to(e) > value)


def operands(name: str, seed: int) -> Array:
    dtype = FLOATS[name]
    last = 2.0 ** -MANTISSA[name]
    few_bits = np.array([1 + last, 1.5 + last, 1.75 + last, 2 - last]).astype(dtype)
    values = np.concatenate([patterns(dtype, 60, seed), near_one(dtype, 20, seed), specials(name), few_bits])
    with np.errstate(invalid="ignore"):  # signalling NaN among the patterns
        return values[np.isfinite(values) & (values != 0)]


@pytest.mark.parametrize("kind", sorted(MULTIPLIERS))
@pytest.mark.parametrize("name", sorted(FLOATS))
def test_float_operations_follow_the_definition(name: str, kind: str) -> None:
    m, dtype = Multiplier(**MULTIPLIERS[kind]), FLOATS[name]
    a = operands(name, 1)
    b = np.resize(operands(name, 2)[::-1], a.shape)
    ops = [op for op in EXACT if m._has(op)] + (["log2", "exp2"] if kind in ("plain", "flush") else [])
    for op in ops:
        args = (a, b) if op in ("mul", "div") else (np.abs(a) if op in ("sqrt", "rsqrt", "log2") else a,)
        if op == "exp2":
            # Powers within reach of the dtype and just outside of it, and those near 0.
            args = ((np.sign(a) * np.exp2(np.log2(np.abs(a.astype(np.float64))) % 24 - 12)).astype(dtype),)
        with np.errstate(all="ignore"):
            got = reference.mitchell_op(op, m)(*args)
            want = np.array([define(op, m, dtype, *map(float, pair)) for pair in zip(*args, strict=True)]).astype(dtype)
        known = ~np.isnan(want)
        assert known.sum() > a.size / 4
        assert_same_bits(got[known], want[known], *(v[known] for v in args))


@pytest.mark.parametrize("kind", sorted(MULTIPLIERS))
@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda d: d.name)
def test_integer_products_follow_the_definition(dtype: np.dtype[Any], kind: str) -> None:
    m = Multiplier(**MULTIPLIERS[kind])
    spec = m.spec("mul")
    a = np.concatenate([edge_integers(dtype)[::5], patterns(dtype, 30, 3)])
    b = np.resize(patterns(dtype, 37, 4), a.shape)
    ends = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
    a, b = np.concatenate([a, ends, ends]), np.concatenate([b, ends, ends[::-1]])
    got = reference.mitchell_op("mul", m)(a, b)
    bits = 23 if dtype.itemsize <= 2 else 52
    for i, (p, q) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        if p == 0 or q == 0:
            assert got[i] == 0
            continue
        (ea, x), (eb, y) = (parts(v, 64, m.mantissa_bits) for v in (p, q))
        # parts() takes floats; integers of 64 bits go in as they are.
        c = spec.c
        if m.segments:
            c = spec.table[math.floor(x * m.segments) * m.segments + math.floor(y * m.segments)]
        c = Fraction(round(Fraction(c) * two_to(bits))) / two_to(bits)
        if spec.form == 0:
            value = two_to(ea + eb) * piecewise(x + y + c)
        elif spec.form == 1:
            value = two_to(ea + eb) * (1 + x + y + c)
        else:
            scaled = [int((1 + v) * two_to(64)) for v in (x, y)]
            rest = [without_top(v, spec.corrections + 1) for v in scaled]
            value = two_to(ea + eb - 128) * (scaled[0] * scaled[1] - rest[0] * rest[1])
        want = math.floor(value) * (1 if (p < 0) == (q < 0) else -1)
        if dtype.itemsize < 8:
            want = min(want, int(np.iinfo(got.dtype).max))
        else:
            want = (want + 2**63) % 2**64 - 2**63 if dtype.kind == "i" else want % 2**64
        assert int(got[i]) == want, (p, q)


def test_integers_square_as_they_multiply() -> None:
    for dtype in INTEGERS:
        a = edge_integers(dtype)
        assert_same_bits(reference.mitchell_square(a), reference.mitchell_mul(a, a), a)


def flags(function: Callable[..., Any], *args: Any) -> tuple[Any, set[str]]:
    """The result, and which flags it raised but underflow (that of a rounded subnormal result)."""
    raised: set[str] = set()
    with np.errstate(all="call", under="ignore", call=lambda kind, _: raised.add(kind)):
        result = function(*args)
    return result, raised


@pytest.mark.parametrize("name", sorted(FLOATS))
@pytest.mark.parametrize("op", ["mul", "div"])
def test_special_values_are_ieee(name: str, op: str) -> None:
    values = specials(name)
    assert values.size == 12
    ieee = {"mul": np.multiply, "div": np.divide}[op]
    for a in values:
        for b in values:
            x, y = (np.full(3, v) for v in (a, b))
            got, raised = flags(getattr(reference, f"mitchell_{op}"), x, y)
            want, expected = flags(lambda p, q: ieee(p.astype(np.float64), q.astype(np.float64)), x, y)
            regular = all(np.isfinite(v) and v != 0 for v in (a, b))
            if regular:
                assert raised == ({"overflow"} if np.isinf(got[0]) else set()), (a, b)
                assert np.signbit(got[0]) == (np.signbit(a) != np.signbit(b))
            else:
                assert_same_bits(got, want.astype(values.dtype), x, y)
                assert raised == expected, (a, b)


@pytest.mark.parametrize("name", sorted(FLOATS))
@pytest.mark.parametrize("op", ["square", "reciprocal", "sqrt", "rsqrt", "log2", "exp2"])
def test_unary_special_values(name: str, op: str) -> None:
    ieee: dict[str, Callable[[Array], Array]] = {
        "square": np.square,
        "reciprocal": lambda a: 1 / a,
        "sqrt": np.sqrt,
        "rsqrt": lambda a: 1 / np.sqrt(a),
        "log2": np.log2,
        "exp2": np.exp2,
    }
    for a in specials(name):
        x = np.full(3, a)
        got, raised = flags(getattr(reference, f"mitchell_{op}"), x)
        special = not np.isfinite(a) or a == 0 or (a < 0 and op in ("sqrt", "rsqrt", "log2"))
        if special:
            want, expected = flags(ieee[op], x.astype(np.float64))
            assert_same_bits(got, want.astype(x.dtype), x)
            assert raised == expected, a
        else:
            assert raised == ({"overflow"} if np.isinf(got[0]) else set()), a


def test_masked_lanes_raise_nothing_and_stay() -> None:
    a = np.array([1.5, np.inf, 3e38, 0.0], np.float32)
    out = np.full(4, 7, np.float32)
    got = reference.mitchell_mul(a, a[::-1].copy(), out=out, where=np.array([False, False, False, False]))
    assert got is out
    assert (out == 7).all()
    reference.mitchell_mul(a, np.float32(2), out=out, where=a == 1.5)
    assert out.tolist() == [3, 7, 7, 7]


def test_function_arguments_are_those_of_a_ufunc() -> None:
    mul = reference.mitchell_mul
    a = np.full((3, 1), 1.5, np.float32)
    assert mul(a, np.ones(4, np.float32)).shape == (3, 4)
    assert type(mul(np.float32(1.5), np.float32(1.5))) is np.float32
    assert mul(a, 1.5).dtype == np.float32
    assert mul(np.uint8(3), np.int8(3)).dtype == np.int32
    assert mul(np.uint64(3), np.int64(3)).dtype == np.float64
    assert mul(a, a.astype(np.float64)).dtype == np.float64
    assert mul(np.uint8(3), np.uint8(3), dtype=np.uint64).dtype == np.uint64
    assert reference.mitchell_sqrt(np.int16(9)).dtype == np.float32
    assert mul(np.empty((0, 3)), np.empty((2, 1, 3))).shape == (2, 0, 3)
    out = np.empty((3, 1), np.float64)
    assert mul(a, a, out=(out,)) is out
    assert out.tolist() == [[2.0]] * 3
    with pytest.raises(TypeError, match="complex128"):
        mul(1j, 2.0)
    with pytest.raises(TypeError, match="out must be"):
        mul(a, a, out=np.empty((3, 1), np.int32))
    with pytest.raises(ValueError, match="out must be"):
        mul(a, a, out=np.empty((1,), np.float32))


@pytest.mark.parametrize("kind", sorted(MULTIPLIERS))
@pytest.mark.parametrize("name", sorted(FLOATS))
def test_mul_symmetries(name: str, kind: str) -> None:
    dtype = FLOATS[name]
    mul = reference.mitchell_op("mul", Multiplier(**MULTIPLIERS[kind]))
    a, b = near_one(dtype, 400, 5), near_one(dtype, 400, 6)
    product = mul(a, b)
    assert_same_bits(mul(b, a), product, a, b)
    assert_same_bits(mul(-a, b), -product, a, b)
    assert_same_bits(mul(-a, -b), product, a, b)
    four = dtype.type(4)
    assert_same_bits(mul(four * a, b), four * product, a, b)


@pytest.mark.parametrize("kind", ["plain", "k0", "k3", "m52", "flush"])
@pytest.mark.parametrize("name", sorted(FLOATS))
def test_powers_of_two_multiply_exactly(name: str, kind: str) -> None:
    dtype = FLOATS[name]
    a = near_one(dtype, 300, 7)
    for power in (-2.0, 0.25, 1.0, 8.0):
        b = np.full_like(a, power)
        assert_same_bits(reference.mitchell_op("mul", Multiplier(**MULTIPLIERS[kind]))(a, b), a * b, a, b)


@pytest.mark.parametrize("kind", ["plain", "min-mse", "lmul", "equation", "k0", "m7"])
def test_mul_grows_with_its_operand(kind: str) -> None:
    mul = reference.mitchell_op("mul", Multiplier(**MULTIPLIERS[kind]))
    # Every positive finite float16, subnormals included, against a few factors.
    a = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)
    with np.errstate(over="ignore"):
        for factor in (0.3, 1.0, 1.5, 1.999, 57.0, 6e-8):
            product = mul(a, np.float16(factor))
            assert (product[1:] >= product[:-1]).all()


@pytest.mark.parametrize("kind", sorted(MULTIPLIERS))
@pytest.mark.parametrize("name", sorted(FLOATS))
def test_matmul_sums_the_products(name: str, kind: str) -> None:
    m, dtype = Multiplier(**MULTIPLIERS[kind]), FLOATS[name]
    a, b = near_one(dtype, 2 * 3 * 5, 8).reshape(2, 1, 3, 5), near_one(dtype, 4 * 5 * 2, 9).reshape(4, 5, 2)
    got = reference.mitchell_matmul(a, b, multiplier=m)
    assert got.shape == (2, 4, 3, 2)
    assert got.dtype == dtype
    products = reference.mitchell_op("mul", m)(a[..., np.newaxis], b[..., np.newaxis, :, :]).astype(np.float64)
    magnitude = np.abs(products).sum(axis=-2)
    # The iterative form and the equation have more bits than the dtype: their element-wise products were rounded.
    bound = tolerance.matmul(magnitude, 5, dtype) * (6 if m.spec("mul").form else 1)
    assert (np.abs(got.astype(np.float64) - products.sum(axis=-2)) <= bound).all()


def test_matmul_of_exact_products_is_exact() -> None:
    """Powers of two on one side leave numpy.matmul of small integers."""
    rng = np.random.default_rng(10)
    a = rng.integers(-50, 50, (7, 33)).astype(np.float32)
    b = (2.0 ** rng.integers(-3, 4, (33, 9)) * rng.choice([-1, 0, 1], (33, 9))).astype(np.float32)
    np.testing.assert_array_equal(reference.mitchell_matmul(a, b), a @ b)
    out = np.zeros((9, 7), np.float32)
    assert reference.mitchell_matmul(a, b, out=out.T).base is out
    np.testing.assert_array_equal(out.T, a @ b)
    assert reference.mitchell_matmul(a[:, :0], b[:0]).tolist() == np.zeros((7, 9)).tolist()


def test_matmul_special_operands() -> None:
    tiny = np.float32(1e-40)
    one = np.ones((1, 1), np.float32)
    for value, want in (
        (np.inf, np.inf),
        (-np.inf, -np.inf),
        (np.nan, np.nan),
        (tiny, 0.0),
        (np.float32(3e38), np.float32(3e38)),
    ):
        got = reference.mitchell_matmul(one * np.float32(value), one)
        np.testing.assert_array_equal(got, np.full((1, 1), want, np.float32))
    huge = np.full((1, 2), 3e38, np.float32)
    assert np.isinf(reference.mitchell_matmul(huge, huge.T)[0, 0])
    assert np.isnan(reference.mitchell_matmul(huge, np.array([[3e38], [-3e38]], np.float32))[0, 0])
    assert np.isnan(reference.mitchell_matmul(np.array([[np.inf]]), np.array([[0.0]]))[0, 0])
    # float16 subnormals are normal numbers where they are accumulated.
    half = np.array([[2.0**-24]], np.float16)
    assert reference.mitchell_matmul(half, np.ones((1, 1), np.float16))[0, 0] == np.float16(2.0**-24)
    assert (
        reference.mitchell_matmul(half, np.ones((1, 1), np.float16), multiplier=Multiplier(subnormals="flush"))[0, 0]
        == 0
    )


def test_matmul_memory_is_bounded() -> None:
    a = np.ones((1, 2**20), np.float32)
    tracemalloc.start()
    reference.mitchell_matmul(a, a.T)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The operands in float64 and their masks; all products at once would take ten times that.
    assert peak < 80 * 2**20


@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_is_the_sum_over_the_window(groups: int) -> None:
    m = Multiplier("min-mse")
    mul = reference.mitchell_op("mul", m)
    x = near_one(np.dtype(np.float64), 2 * 4 * 7 * 6, 11).reshape(2, 4, 7, 6)
    w = near_one(np.dtype(np.float64), 6 * (4 // groups) * 3 * 2, 12).reshape(6, 4 // groups, 3, 2)
    stride, padding, dilation = (2, 1), (1, 2), (1, 3)
    got = reference.mitchell_conv2d(
        x, w, stride=stride, padding=padding, dilation=dilation, groups=groups, multiplier=m, out=None
    )
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (2, 2)))
    assert got.shape == (2, 6, 4, 7)
    for n, o, i, j in np.ndindex(*got.shape):
        first = o // (6 // groups) * (4 // groups)
        rows = slice(2 * i, 2 * i + 3)
        window = padded[n, first : first + 4 // groups, rows, j : j + 4 : 3]
        products = mul(window, w[o])
        assert abs(got[n, o, i, j] - products.sum()) <= tolerance.matmul(np.abs(products).sum(), products.size, x.dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_lut_matmul_indexes_by_the_raw_bytes(dtype: Any) -> None:
    rng = np.random.default_rng(13)
    table = rng.integers(-(2**31), 2**31, (256, 256)).astype(np.int32)
    a = rng.integers(0, 256, (2, 3, 5)).astype(np.uint8).view(dtype)
    b = rng.integers(0, 256, (5, 4)).astype(np.uint8).view(dtype)
    out = np.full((2, 3, 4), -1, np.int64)
    assert reference.lut_matmul(a, b, table, out=out) is out
    for n, i, j in np.ndindex(2, 3, 4):
        assert out[n, i, j] == sum(int(table[int(a[n, i, k]) % 256, int(b[k, j]) % 256]) for k in range(5))


SMOOTH = ["plain", "min-mse", "segments-16", "equation", "k0", "k2"]


def _multiplier(kind: str) -> Multiplier:
    return Multiplier(**MULTIPLIERS.get(kind, {"corrections": 2}))


def check_gradient(function: Callable[..., Array], dy: Array, args: list[Array], gradients: tuple[Array, ...]) -> None:
    """Differences in a few elements of each operand, where both half steps agree: one linear piece."""
    rng = np.random.default_rng(14)
    bound = tolerance.finite_difference(float(np.abs(dy).sum() * 40), 1)
    checked = 0
    for which, gradient in enumerate(gradients):
        assert gradient.shape == args[which].shape
        for flat in rng.choice(gradient.size, min(gradient.size, 12), replace=False):

            def total(step: float, which: int = which, flat: int = int(flat)) -> float:
                moved = [v.copy() for v in args]
                moved[which].flat[flat] += step
                return float((function(*moved) * dy).sum())

            right = (total(tolerance.STEP) - total(0)) / tolerance.STEP
            left = (total(0) - total(-tolerance.STEP)) / tolerance.STEP
            if abs(right - left) <= 2 * bound:
                checked += 1
                assert right == pytest.approx(float(gradient.flat[flat]), abs=2 * bound)
    assert checked >= sum(min(g.size, 12) for g in gradients) * 3 // 4


@pytest.mark.parametrize("kind", SMOOTH)
def test_mul_and_div_gradients_are_slopes(kind: str) -> None:
    m, f64 = _multiplier(kind), np.dtype(np.float64)
    a, b, dy = near_one(f64, 6, 15).reshape(6, 1), near_one(f64, 5, 16), near_one(f64, 30, 17).reshape(6, 5)
    gradients = reference.mitchell_mul_grad(a, b, dy, multiplier=m, mode="exact")
    check_gradient(reference.mitchell_op("mul", m), dy, [a, b], gradients)
    if m._has("div"):
        gradients = reference.mitchell_div_grad(a, b, dy, multiplier=m, mode="exact")
        check_gradient(reference.mitchell_op("div", m), dy, [a, b], gradients)


@pytest.mark.parametrize("kind", SMOOTH)
def test_matmul_and_conv2d_gradients_are_slopes(kind: str) -> None:
    m, f64 = _multiplier(kind), np.dtype(np.float64)
    a, b = near_one(f64, 2 * 3 * 4, 18).reshape(2, 3, 4), near_one(f64, 4 * 5, 19).reshape(4, 5)
    dy = near_one(f64, 30, 20).reshape(2, 3, 5)
    gradients = reference.mitchell_matmul_grad(a, b, dy, multiplier=m, mode="exact")
    check_gradient(lambda p, q: reference.mitchell_matmul(p, q, multiplier=m), dy, [a, b], gradients)
    x, w = near_one(f64, 2 * 4 * 6 * 5, 21).reshape(2, 4, 6, 5), near_one(f64, 6 * 2 * 2 * 3, 22).reshape(6, 2, 2, 3)
    options: dict[str, Any] = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 2), "groups": 2, "multiplier": m}
    shape = reference.mitchell_conv2d(x, w, **options, out=None).shape
    dy = near_one(f64, math.prod(shape), 23).reshape(shape)
    gradients = reference.mitchell_conv2d_grad(x, w, dy, **options, mode="exact")
    check_gradient(lambda p, q: reference.mitchell_conv2d(p, q, **options, out=None), dy, [x, w], gradients)


def test_gradients_at_zero_and_beyond() -> None:
    a = np.array([0.0, 3.0, np.inf, np.nan, 3.0, 0.0, -np.inf, 2.0])
    b = np.array([3.0, 0.0, -3.0, 3.0, -np.inf, 0.0, 0.0, np.nan])
    da, db = reference.mitchell_mul_grad(a, b, np.ones(8))
    np.testing.assert_array_equal(da, [2, 0, -2, np.nan, -np.inf, 0, 0, np.nan])
    np.testing.assert_array_equal(db, [0, 2, np.inf, np.nan, 2, 0, -np.inf, np.nan])
    da, db = reference.mitchell_div_grad(a[:5], b[:5], np.ones(5))
    # 1 / (1 + 1/2): Mitchell's slope is 2**-1 2**-1 for b = 3.
    np.testing.assert_array_equal(da, [0.25, np.inf, -0.25, np.nan, 0])
    np.testing.assert_array_equal(db, [0, -np.inf, -np.inf, np.nan, 0])


@pytest.mark.parametrize("name", sorted(FLOATS))
def test_gradient_modes(name: str) -> None:
    dtype, m = FLOATS[name], Multiplier("min-mse")
    a, b, dy = (near_one(dtype, 12, seed).reshape(3, 4) for seed in (24, 25, 26))
    wide = [v.astype(np.float64) for v in (a, b, dy)]
    da, db = reference.mitchell_mul_grad(a, b, dy, multiplier=m, mode="ste")
    assert_same_bits(da, (wide[2] * wide[1]).astype(dtype))
    assert_same_bits(db, (wide[2] * wide[0]).astype(dtype))
    da, db = reference.mitchell_div_grad(a, b, dy, multiplier=m, mode="ste")
    assert_same_bits(da, (wide[2] / wide[1]).astype(dtype))
    assert_same_bits(db, (-wide[2] * wide[0] / (wide[1] * wide[1])).astype(dtype))
    mul, div = (reference.mitchell_op(op, m) for op in ("mul", "div"))
    da, db = reference.mitchell_mul_grad(a, b, dy, multiplier=m, mode="mimic")
    assert_same_bits(da, mul(dy, b))
    assert_same_bits(db, mul(dy, a))
    da, db = reference.mitchell_div_grad(a, b, dy, multiplier=m, mode="mimic")
    assert_same_bits(da, div(dy, b))
    assert_same_bits(db, -div(mul(dy, a), mul(b, b)))
    out = near_one(dtype, 9, 27).reshape(3, 3)
    da, db = reference.mitchell_matmul_grad(a, b.T, out, multiplier=m, mode="mimic")
    assert_same_bits(da, reference.mitchell_matmul(out, b, multiplier=m))
    assert_same_bits(db, reference.mitchell_matmul(a.T, out, multiplier=m))
    da, _ = reference.mitchell_matmul_grad(a, b.T, out, multiplier=m, mode="ste")
    assert_same_bits(da, (out.astype(np.float64) @ wide[1]).astype(dtype))
