# SPDX-License-Identifier: BSD-3-Clause
"""Error figures and best constants: against published figures, and against what they mean."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import tolerance
from samples import MULTIPLIERS

from fastops import Multiplier, optimal_offset
from fastops._multiplier import _CONSTANTS
from fastops.analysis import OPS, error_stats


def test_uint8_has_evoapprox_figures() -> None:
    stats = Multiplier().error_stats(8)
    percent = stats.as_percent()
    assert stats.exhaustive
    assert stats.count == 65536
    assert stats.wce == 4096
    assert stats.mae == pytest.approx(606.398, abs=tolerance.printed(3))
    assert stats.mse == pytest.approx(974069.77, abs=tolerance.printed(2))
    for name, figure, decimals in (
        ("MAE%", 0.9253, 4),
        ("WCE%", 6.25, 9),
        ("WCRE%", 11.1111, 4),
        ("EP%", 93.0923, 4),
        ("MRE%", 3.7583, 4),
        ("bias%", -3.7583, 4),
    ):
        assert percent[name] == pytest.approx(figure, abs=tolerance.printed(decimals)), name
    named = stats.as_dict()
    assert {"MAE", "WCE", "WCRE", "EP", "MRE", "MSE", "bias", "rms", "histogram"} <= set(named)
    assert named["MSE"] == stats.mse
    assert error_stats(Multiplier(), np.uint8) == stats


def test_samples_stand_for_the_operands() -> None:
    stats = error_stats(Multiplier(), 8, np.arange(1, 256))
    assert 100 * stats.bias == pytest.approx(-3.78783, abs=tolerance.printed(5))
    assert 100 * stats.rms == pytest.approx(4.8204, abs=tolerance.printed(4))
    assert stats.mae == pytest.approx(611.16, abs=tolerance.printed(2))
    assert 100 * (1 - stats.ep) == pytest.approx(6.176, abs=tolerance.printed(3))
    assert stats.count == 255**2
    assert not stats.exhaustive
    signed = np.delete(np.arange(-128, 128), 128)
    assert 100 * error_stats(Multiplier(), np.int8, signed).bias == pytest.approx(-3.69941, abs=tolerance.printed(5))
    pair = error_stats(Multiplier(), np.float64, ([1.5, 3.0, 6.0], [1.5]))
    assert (pair.count, pair.low, pair.high, pair.ep) == (3, pytest.approx(-1 / 9), pytest.approx(-1 / 9), 1.0)
    assert error_stats(Multiplier(), np.float32, [2.0, 4.0, 0.0]).ep == 0


@pytest.mark.parametrize("corrections", [0, 1, 2, 3])
def test_babic_figures(corrections: int) -> None:
    stats = error_stats(Multiplier(corrections=corrections), 8, np.arange(1, 256))
    figure = (8.913, 0.8337, 0.0708, 0.00475)[corrections]
    assert 100 * stats.mre == pytest.approx(figure, abs=tolerance.printed(len(str(figure).split(".")[1])))
    assert stats.bias == -stats.mre


@pytest.mark.parametrize(
    ("op", "bias", "rms"), [("mul", -0.0384879512, 0.0484196514), ("div", 0.0410179983, 0.0522682749)]
)
def test_float16_is_exhaustive(op: str, bias: float, rms: float) -> None:
    stats = error_stats(Multiplier(), np.float16, op=op)
    assert stats.count == 2**20
    assert stats.exhaustive
    assert stats.bias == pytest.approx(bias, abs=tolerance.FIGURE)
    assert stats.rms == pytest.approx(rms, abs=tolerance.FIGURE)
    assert stats.wcre == pytest.approx(1 / 9 if op == "mul" else 1 / 8, abs=tolerance.QUOTIENT)
    assert stats.ep == 1 - 2047 / 2**20


@pytest.mark.parametrize(("op", "bias"), [("square", -3.834), ("sqrt", 2.022), ("reciprocal", 8.333), ("rsqrt", 6.164)])
def test_unary_operations(op: str, bias: float) -> None:
    assert 100 * error_stats(Multiplier(), np.float16, op=op).bias == pytest.approx(bias, abs=tolerance.printed(3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_strata_stand_for_wide_operands(dtype: Any) -> None:
    stats = error_stats(Multiplier(), dtype)
    assert not stats.exhaustive
    assert stats.count == 2**20
    assert 100 * stats.bias == pytest.approx(-3.8488, abs=tolerance.SAMPLED)
    assert 100 * stats.rms == pytest.approx(4.842, abs=tolerance.SAMPLED)
    assert stats == error_stats(Multiplier(), dtype)


@pytest.mark.parametrize("kind", sorted(MULTIPLIERS))
def test_half_of_the_pairs_stand_for_all(kind: str) -> None:
    """Of two pairs that are each other's mirror image one is looked at; two arrays of the same values have no such pairs."""
    m = Multiplier(**MULTIPLIERS[kind])
    for bits, dtype, values in ((9, np.uint16, np.arange(512)), (8, np.int8, np.arange(-128, 128))):
        got = error_stats(m, bits if dtype is np.uint16 else dtype)
        want = error_stats(m, dtype, (values, values.copy()))
        assert (got.count, got.histogram, got.edges) == (want.count, want.histogram, want.edges)
        for name in ("mae", "wce", "wcre", "ep", "mre", "mse", "bias", "rms", "low", "high"):
            assert getattr(got, name) == pytest.approx(
                getattr(want, name), rel=tolerance.FIGURE, abs=tolerance.FIGURE
            ), name


def test_wide_integers_have_exact_errors() -> None:
    a = np.array([2**32 - 1, 3 * 2**30, 12345], np.uint32)
    stats = error_stats(Multiplier(), np.uint32, (a, a))
    products = [[int(Multiplier().mul(p, q)) for q in a] for p in a]
    errors = [products[i][j] - int(p) * int(q) for i, p in enumerate(a) for j, q in enumerate(a)]
    assert stats.wce == float(max(abs(e) for e in errors))
    assert stats.mae == pytest.approx(sum(abs(e) for e in errors) / 9, rel=tolerance.QUOTIENT * 9)
    low = error_stats(Multiplier(), np.int32, np.array([-(2**31), 2**31 - 1, -1], np.int32))
    assert low.wce == abs(int(Multiplier().mul(np.int32(2**31 - 1), np.int32(2**31 - 1))) - (2**31 - 1) ** 2)


def test_uint16_in_strata_of_its_own_and_bounded_memory() -> None:
    tracemalloc.start()
    stats = error_stats(Multiplier(), np.uint16, exhaustive=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20
    assert 100 * stats.bias == pytest.approx(-3.84856, abs=tolerance.SAMPLED)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_uint16_exhaustive() -> None:
    stats = error_stats(Multiplier(), np.uint16, exhaustive=True)
    assert stats.count == 2**32
    assert stats.wce == 268435456
    nonzero = 65535**2
    # The published set leaves out the zeros, whose errors are 0.
    assert 100 * stats.bias * 2**32 / nonzero == pytest.approx(-3.84856, abs=tolerance.printed(5))
    assert 100 * stats.rms * np.sqrt(2**32 / nonzero) == pytest.approx(4.84187, abs=tolerance.printed(5))


def test_histogram_covers_all_errors() -> None:
    stats = error_stats(Multiplier("min-mse"), np.float16)
    assert sum(stats.histogram) == stats.count
    assert len(stats.edges) == len(stats.histogram) + 1
    assert stats.edges[0] <= stats.low < stats.edges[1]
    assert stats.edges[-2] <= stats.high < stats.edges[-1]
    assert np.allclose(np.diff(stats.edges), 1 / 2048, rtol=0, atol=0)
    middle = (np.array(stats.edges[:-1]) + np.array(stats.edges[1:])) / 2
    assert abs(float(middle @ stats.histogram) / stats.count - stats.bias) < 1 / 4096


def test_figures_print_without_the_histogram() -> None:
    text = repr(Multiplier().error_stats(8))
    assert text.startswith("ErrorStats(mae=606.39")
    assert len(text) < 500


def test_results_that_are_nan_show_in_every_figure() -> None:
    stats = error_stats(Multiplier("min-mse"), np.float32, np.array([1.0, 0.0]), op="div")
    for name in ("mae", "wce", "mse", "mre", "wcre", "bias", "rms", "low", "high"):
        assert np.isnan(getattr(stats, name)), name


def test_normal_operands() -> None:
    for dtype in (np.float32, np.int8, np.uint16, 5):
        stats = error_stats(Multiplier(), dtype, "normal")
        assert not stats.exhaustive
        assert -1 / 9 - tolerance.QUOTIENT <= stats.low <= stats.high <= 0
        assert stats.bias == -stats.mre < 0
        assert stats != error_stats(Multiplier(), dtype, exhaustive=False)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_normal_operands_are_in_the_domain(op: str, dtype: Any) -> None:
    """Half of a normal distribution's values have no root: those of roots follow its positive half."""
    stats = error_stats(Multiplier(), dtype, "normal", op=op)
    assert all(np.isfinite([stats.mae, stats.wce, stats.mse, stats.mre, stats.bias, stats.rms, stats.low, stats.high]))
    assert stats.count == (1024 if op not in ("mul", "div") else 1024**2)
    largest = {"sqrt": 3 / 8**0.5 - 1, "rsqrt": 0.0888}.get(op, 1 / 8)
    assert stats.wcre <= largest + float(np.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        ((None, 8), {}, TypeError, "multiplier"),
        ((Multiplier(), 17), {}, ValueError, r"dtype_or_bits.*\[1, 16\]"),
        ((Multiplier(), 8.0), {}, TypeError, "dtype_or_bits"),
        ((Multiplier(), "float33"), {}, TypeError, "dtype_or_bits"),
        ((Multiplier(), np.int64), {}, TypeError, "dtype_or_bits.*int64"),
        ((Multiplier(), np.complex64), {}, TypeError, "dtype_or_bits.*complex64"),
        ((Multiplier(), 8, "gauss"), {}, ValueError, "distribution.*'normal'.*'gauss'"),
        ((Multiplier(), 8, [0.5]), {}, TypeError, "distribution.*float64"),
        ((Multiplier(), 8, [256]), {}, ValueError, r"distribution.*\[0, 256\)"),
        ((Multiplier(), np.float32, []), {}, ValueError, "distribution"),
        ((Multiplier(), np.float32, [np.nan]), {}, ValueError, "distribution.*finite"),
        ((Multiplier(), np.float32, ["a"]), {}, TypeError, "distribution"),
        ((Multiplier(), np.float32, ([1.0], [1.0], [1.0])), {}, ValueError, "distribution.*3 items"),
        ((Multiplier(), 8), {"op": "div"}, ValueError, "op.*'div'"),
        ((Multiplier(), np.float16), {"op": "log2"}, ValueError, "op.*'log2'"),
        ((Multiplier("lmul"), np.float16), {"op": "div"}, ValueError, "op.*'div'"),
        ((Multiplier(), np.float32), {"exhaustive": True}, ValueError, "exhaustive"),
    ],
)
def test_wrong_calls_of_error_stats(
    args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        error_stats(*args, **kwargs)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("objective", "name"), [("mse", "min-mse"), ("mean", "zero-mean"), ("max", "minimax")])
def test_optimal_offset_finds_the_constants(op: str, objective: str, name: str) -> None:
    c = optimal_offset(op, objective=objective)
    assert c == pytest.approx(_CONSTANTS[name][op], abs=tolerance.OFFSET[objective])
    assert c == optimal_offset(op, objective=objective)


@pytest.mark.parametrize("objective", ["mse", "mean", "max"])
@pytest.mark.parametrize("op", OPS)
def test_optimal_offset_is_best_for_the_samples(op: str, objective: str) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.3, 1.0, (2, 500))
    if op in ("sqrt", "rsqrt"):
        a = np.abs(a)
    args = (a, b) if op in ("mul", "div") else (a,)
    c = optimal_offset(op, *args, objective=objective)
    exact = {
        "mul": np.multiply,
        "div": np.divide,
        "square": np.square,
        "reciprocal": lambda v: 1 / v,
        "sqrt": np.sqrt,
        "rsqrt": lambda v: 1 / np.sqrt(v),
    }[op](*args)

    def value(shift: float) -> float:
        error = Multiplier(c + shift)._op(op)(*args) / exact - 1
        return {"mse": float(error @ error), "mean": abs(float(error.mean())), "max": float(np.abs(error).max())}[
            objective
        ]

    assert all(value(0.0) < value(shift) for shift in (-0.1, -0.01, -1e-4, 1e-4, 0.01, 0.1))


def test_optimal_offset_of_partial_and_odd_samples() -> None:
    uniform = optimal_offset("mul")
    assert optimal_offset("mul", np.array([1.0, 2.0, -4.0]), [8.0, 1.0, 0.5]) == 0
    rng = np.random.default_rng(4)
    middling = rng.uniform(1.4, 1.6, 1000)
    mantissas = 1 + rng.uniform(0, 1, 2**16)
    assert optimal_offset("mul", mantissas) == pytest.approx(uniform, abs=tolerance.OFFSET_SAMPLED)
    assert optimal_offset("mul", None, mantissas) == pytest.approx(uniform, abs=tolerance.OFFSET_SAMPLED)
    assert optimal_offset("mul", middling) > uniform + tolerance.OFFSET_SAMPLED
    assert optimal_offset("mul", [3], [3]) == optimal_offset("mul", [-6.0, np.inf, 0.0], [[12.0]])
    # 3 * 3 = 9 = 8 (1 + 1/8): S = 1 must become 1 + 1/8.
    for objective in ("mse", "mean", "max"):
        assert optimal_offset("mul", [3], [3], objective=objective) == pytest.approx(0.125, abs=tolerance.FIGURE)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        (("mull",), {}, ValueError, "op.*did you mean 'mul'"),
        (("log2",), {}, ValueError, "op.*'log2'"),
        (("mul",), {"objective": "median"}, ValueError, "objective.*'median'"),
        (("mul", ["x"]), {}, TypeError, "a must be"),
        (("mul", [1j]), {}, TypeError, "a must be.*complex"),
        (("mul", [1.0], [True]), {}, TypeError, "b must be.*bool"),
        (("mul", [1.0, 2.0], [1.0, 2.0, 3.0]), {}, ValueError, r"b must be.*\(2,\) and \(3,\)"),
        (("mul", [0.0, np.nan]), {}, ValueError, "a must be.*finite"),
        (("mul", []), {}, ValueError, "a must be.*finite"),
        (("sqrt", [1.0], [1.0]), {}, ValueError, "b must be None"),
    ],
)
def test_wrong_calls_of_optimal_offset(
    args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        optimal_offset(*args, **kwargs)
    assert len(str(caught.value)) < 200
