# SPDX-License-Identifier: BSD-3-Clause
"""Matrix products, convolutions, table products and all gradients: every backend and CPU level against the reference."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import FLOATS, MULTIPLIERS, assert_same_bits, near_one

import fastops
from fastops import Multiplier, reference

PLAIN = Multiplier()
OPTIONS = {name: Multiplier(**options) for name, options in MULTIPLIERS.items()}
MODES = ("exact", "ste", "mimic")
REFERENCE = "fastops.reference"

# Sizes on both sides of the tiles' edges (registers, panels, cache blocks).
SHAPES = [
    (1, 1, 1),
    (1, 1, 7),
    (2, 3, 4),
    (5, 1, 3),
    (6, 16, 16),
    (7, 17, 33),
    (13, 64, 48),
    (16, 31, 65),
    (33, 5, 129),
    (1, 200, 1),
    (61, 70, 67),
    (3, 600, 20),
]


def normal(shape: tuple[int, ...], dtype: np.dtype[Any], seed: int, zeros: float = 0.2) -> Any:
    """Standard normal numbers, a fifth of them zeros of either sign."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    x[rng.random(shape) < zeros] = 0.0
    return (x * rng.choice([-1.0, 1.0], shape)).astype(dtype)


def close(got: Any, want: Any, bound: Any) -> None:
    """Equal where not finite, within the bound elsewhere. Shows the worst element."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    x, y = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(invalid="ignore"):
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        excess = np.where(same, 0.0, np.abs(x - y) - np.broadcast_to(bound, x.shape))
    excess = np.where(np.isnan(excess), np.inf, excess)
    if got.size and excess.max() > 0:
        i = np.unravel_index(excess.argmax(), excess.shape)
        raise AssertionError(
            f"{int((excess > 0).sum())} of {got.size} beyond the bound, worst at {tuple(map(int, i))}: got {x[i]!r}, "
            f"want {y[i]!r}, bound {float(np.broadcast_to(bound, x.shape)[i])!r}"
        )


_known: dict[Any, Any] = {}


def oracle(name: str, *arrays: Any, **keywords: Any) -> Any:
    """The reference's result; each is computed once for all backends and levels."""
    operands = tuple((x.shape, x.dtype.name, x.tobytes()) for x in arrays)
    key = hash((name, operands, tuple(sorted(keywords.items()))))
    if key not in _known:
        if name in ("mitchell_matmul", "mitchell_conv2d"):
            keywords["out"] = None
        _known[key] = getattr(reference, name)(*arrays, **keywords)
    return _known[key]


def magnitude(name: str, *arrays: Any, **keywords: Any) -> Any:
    """The oracle's result for the absolute values, in float64: the sum of |products| that bounds scale with."""
    finite = (np.abs(np.nan_to_num(x.astype(np.float64), posinf=0, neginf=0)) for x in arrays)
    with np.errstate(all="ignore"):
        result = oracle(name, *finite, **keywords)
    return result if isinstance(result, tuple) else (result,)


def check_matmul(backend: ModuleType, multiplier: Multiplier, a: Any, b: Any) -> Any:
    got = backend.mitchell_matmul(a, b, multiplier=multiplier, out=None)
    want = oracle("mitchell_matmul", a, b, multiplier=multiplier)
    with np.errstate(all="ignore"):
        sizes = np.matmul(*(np.abs(np.nan_to_num(x.astype(np.float64), posinf=0, neginf=0)) for x in (a, b)))
        bound = tolerance.matmul(2.0 * sizes, a.shape[-1], a.dtype)
    close(got, want, bound)
    return got


# --- products -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matmul_shapes(backend: ModuleType, target: str, shape: tuple[int, int, int], name: str):
    m, k, n = shape
    dtype = FLOATS[name]
    check_matmul(backend, PLAIN, normal((m, k), dtype, 1), normal((k, n), dtype, 2))


@pytest.mark.parametrize("option", OPTIONS)
def test_matmul_multipliers(backend: ModuleType, target: str, option: str):
    for dtype in FLOATS.values():
        a, b = normal((9, 37), dtype, 3), normal((37, 21), dtype, 4)
        check_matmul(backend, OPTIONS[option], a, b)


@pytest.mark.parametrize("option", ["plain", "float", "segments-16", "equation", "k1", "m7", "k3", "segments-8-m5"])
def test_each_product_is_the_elementwise_one(backend: ModuleType, target: str, option: str):
    """K = 1: no sum hides a wrong product."""
    for name in ("f32", "f64"):
        a, b = near_one(FLOATS[name], 70, 1), near_one(FLOATS[name], 50, 2)
        got = backend.mitchell_matmul(a[:, None], b[None, :], multiplier=OPTIONS[option], out=None)
        want = reference.mitchell_op("mul", OPTIONS[option])(a[:, None], b[None, :])
        close(got, want, tolerance.matmul(np.abs(want.astype(np.float64)), 1, FLOATS[name]))


@pytest.mark.parametrize("name", FLOATS)
def test_matmul_empty_and_no_terms(backend: ModuleType, target: str, name: str):
    dtype = FLOATS[name]
    for a, b in (
        ((3, 0), (0, 4)),
        ((0, 5), (5, 4)),
        ((3, 5), (5, 0)),
        ((0, 0), (0, 0)),
        ((2, 0, 3, 4), (4, 5)),
        ((2, 3, 0), (2, 0, 1)),
    ):
        got = backend.mitchell_matmul(np.ones(a, dtype), np.ones(b, dtype), multiplier=PLAIN, out=None)
        assert got.dtype == dtype
        assert got.shape == np.matmul(np.ones(a), np.ones(b)).shape
        assert not got.any()
        out = np.full(got.shape, 7, dtype)
        backend.mitchell_matmul(np.ones(a, dtype), np.ones(b, dtype), multiplier=PLAIN, out=out)
        assert not out.any()


@pytest.mark.parametrize("name", ["f32", "f64", "f16"])
def test_matmul_batches_and_broadcasting(backend: ModuleType, target: str, name: str):
    dtype = FLOATS[name]
    for a, b in (
        ((3, 4, 5), (3, 5, 6)),
        ((4, 5), (3, 5, 6)),
        ((3, 4, 5), (5, 6)),
        ((2, 1, 4, 5), (1, 3, 5, 6)),
        ((2, 3, 1, 5), (3, 5, 1)),
        ((1, 1, 4, 5), (5, 6)),
    ):
        got = check_matmul(backend, PLAIN, normal(a, dtype, 5), normal(b, dtype, 6))
        assert got.shape == np.matmul(np.ones(a), np.ones(b)).shape
    wide = np.broadcast_to(normal((4, 5), dtype, 7), (3, 4, 5))
    check_matmul(backend, PLAIN, wide, normal((3, 5, 6), dtype, 8))


def layouts(x: Any) -> list[Any]:
    """The same matrix with other strides."""
    m, n = x.shape
    spread = np.zeros((2 * m, 3 * n), x.dtype)
    spread[::2, ::3] = x
    raw = np.zeros(x.nbytes + 1, np.uint8)
    shifted = np.ndarray(x.shape, x.dtype, raw[1:].data)
    shifted[...] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    return [x, np.asfortranarray(x), spread[::2, ::3], x[::-1, ::-1].copy()[::-1, ::-1], shifted, frozen]


@pytest.mark.parametrize("name", ["f16", "f32", "f64"])
def test_matmul_layouts(backend: ModuleType, target: str, name: str):
    dtype = FLOATS[name]
    a, b = normal((11, 19), dtype, 1), normal((19, 35), dtype, 2)
    first = backend.mitchell_matmul(a, b, multiplier=PLAIN, out=None)
    for x, y in itertools.product(layouts(a), layouts(b)):
        before = x.tobytes(), y.tobytes()
        got = check_matmul(backend, PLAIN, x, y)
        if backend.__name__ != REFERENCE:
            # NumPy's own sums, which the reference takes, depend on the layout.
            assert_same_bits(got, first)
        assert (x.tobytes(), y.tobytes()) == before
    row = np.broadcast_to(a[:1], (11, 19))
    check_matmul(backend, PLAIN, row, b)
    check_matmul(backend, PLAIN, b.T, a.T)


@pytest.mark.parametrize("name", FLOATS)
def test_matmul_out(backend: ModuleType, target: str, name: str):
    dtype = FLOATS[name]
    a, b = normal((2, 11, 19), dtype, 1), normal((2, 19, 23), dtype, 2)
    want = backend.mitchell_matmul(a, b, multiplier=PLAIN, out=None)
    base = np.full((2, 24, 50), 7, dtype)
    for out in (
        base[:, 1:12, 2:25],
        base[:, 1:23:2, 2:48:2],
        base[:, :11, 22::-1],
        np.full((2, 23, 11), 7, dtype).transpose(0, 2, 1),
        np.full((11, 2, 23), 7, dtype).transpose(1, 0, 2),
    ):
        result = backend.mitchell_matmul(a, b, multiplier=PLAIN, out=out)
        assert result is out
        assert_same_bits(np.ascontiguousarray(out), want)
    assert (base[:, 23] == 7).all()
    assert (base[:, :, 48:] == 7).all()


@pytest.mark.parametrize("option", ["plain", "minimax", "segments-4", "equation", "k1", "flush"])
@pytest.mark.parametrize("name", FLOATS)
def test_matmul_special_values(backend: ModuleType, target: str, option: str, name: str):
    dtype = FLOATS[name]
    top = {"f16": 15, "bf16": 127, "f32": 127, "f64": 1023}[name]
    a, b = normal((8, 12), dtype, 1), normal((12, 70), dtype, 2)
    huge = np.ldexp(1.75, top)
    for value in (np.inf, -np.inf, np.nan, huge, -huge, np.ldexp(1.0, top - 1), 0.0, -0.0):
        x, y = a.copy(), b.copy()
        x[3, 5] = value
        check_matmul(backend, OPTIONS[option], x, b)
        y[5, 33] = value
        check_matmul(backend, OPTIONS[option], a, y)
        check_matmul(backend, OPTIONS[option], x, y)
    # Huge times small stays finite though the bit patterns' sum passes the largest exponent on the way.
    x, y = np.full((8, 12), np.ldexp(1.5, top), dtype), np.full((12, 70), np.ldexp(1.5, -top + 2), dtype)
    got = check_matmul(backend, OPTIONS[option], x, y)
    assert np.isfinite(got.astype(np.float64)).all()
    got = check_matmul(backend, OPTIONS[option], y.T[:8], x.T)
    assert np.isfinite(got.astype(np.float64)).all()


@pytest.mark.parametrize("option", ["plain", "negative", "segments-4", "equation", "k0", "k1", "k3"])
@pytest.mark.parametrize("name", ["bf16", "f32", "f64"])
def test_matmul_products_overflow_one_by_one(backend: ModuleType, target: str, option: str, name: str):
    """Each product is infinite where it overflows, before it is added: beside it one of the other sign gives nan."""
    dtype = FLOATS[name]
    huge = np.ldexp(1.75, 127 if name != "f64" else 1023)
    a = np.array([[np.inf, huge], [-np.inf, huge], [huge, huge], [huge, 1.0]], dtype)
    b = np.array([[1.0, huge, huge, 1.0, 2.0], [-huge, -huge, 1.0, -huge, -2.0]], dtype)
    got = check_matmul(backend, OPTIONS[option], a, b)
    assert np.isnan(got[0, :2].astype(np.float64)).all()
    assert np.isnan(got[2, 1].astype(np.float64))
    assert got[2, 2].astype(np.float64) == np.inf


@pytest.mark.parametrize("name", FLOATS)
def test_matmul_subnormal_operands(backend: ModuleType, target: str, name: str):
    dtype = FLOATS[name]
    tiny = np.full((4, 6), {"f16": 2.0**-20, "bf16": 2.0**-130, "f32": 2.0**-130, "f64": 2.0**-1030}[name], dtype)
    one = np.full((6, 35), 1.0, dtype)
    assert (tiny != 0).all()
    for option in ("plain", "flush"):
        got = check_matmul(backend, OPTIONS[option], tiny, one)
        other = check_matmul(backend, OPTIONS[option], one.T, tiny.T)
        # float16's are normal numbers where they are accumulated; the others count as zero.
        expected = 6 * float(tiny[0, 0]) if name == "f16" and option == "plain" else 0.0
        assert (got.astype(np.float64) == expected).all()
        assert (other.astype(np.float64) == expected).all()


@pytest.mark.parametrize("name", ["f32", "f64", "f16"])
def test_matmul_bits_do_not_depend_on_the_threads(backend: ModuleType, target: str, name: str):
    if backend.__name__ == REFERENCE:
        pytest.skip("the reference has one thread")
    dtype = FLOATS[name]
    before = fastops.get_num_threads()
    cases = [((150, 300), (300, 170)), ((1, 3000), (3000, 5)), ((700, 40), (40, 3)), ((6, 30, 64), (6, 64, 30))]
    try:
        for a, b in cases:
            x, y = normal(a, dtype, 1), normal(b, dtype, 2)
            results = []
            for threads in (1, 2, 3, 7):
                fastops.set_num_threads(threads)
                results.append(backend.mitchell_matmul(x, y, multiplier=PLAIN, out=None))
                results.append(backend.mitchell_matmul_grad(x, y, results[0], multiplier=PLAIN, mode="exact")[0])
            for got, want in zip(results[2:], results * 3, strict=False):
                assert_same_bits(got, want)
    finally:
        fastops.set_num_threads(before)


@pytest.mark.parametrize("option", ["plain", "min-mse", "negative", "m7"])
@pytest.mark.parametrize("name", ["f32", "f64"])
def test_matmul_bits_do_not_depend_on_the_neighbours(backend: ModuleType, target: str, option: str, name: str):
    """Which values a panel holds chooses the way it is multiplied, never the result of another row or column."""
    if backend.__name__ != "fastops.native":
        pytest.skip("only native chooses by the values")
    dtype = FLOATS[name]
    plain = normal((9, 600), dtype, 1, zeros=0.0), normal((600, 70), dtype, 2, zeros=0.0)
    wide = 2.0 ** np.random.default_rng(3).uniform(-40, 40, (9, 600))
    edges = np.array([2.0**-21, np.nextafter(2.0**-21, 0), 2.0**12, np.nextafter(2.0**12, 0), 1 / 3])
    edge = np.random.default_rng(4).choice(edges, (9, 600))
    for left, right in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.3, 0.3)):
        for scale in (1.0, wide.astype(dtype), edge.astype(dtype)):
            a = plain[0] * scale * (normal((9, 600), dtype, 5, left) != 0)
            b = plain[1] * (normal((600, 70), dtype, 6, right) != 0)
            # Sums that cancel, and sums of nothing.
            a[2, 1::2], b[1::2] = -a[2, ::2], b[::2]
            a[3] = 0
            b[:, 5] = 0
            want = backend.mitchell_matmul(a, b, multiplier=OPTIONS[option], out=None)
            assert not want[3].any()
            assert not want[:, 5].any()
            for value in (0.0, 1e-30, 1e-37, 1e30, np.inf):
                x, y = a.copy(), b.copy()
                x[4, 7] = y[8, 9] = value
                got = backend.mitchell_matmul(x, b, multiplier=OPTIONS[option], out=None)
                assert_same_bits(np.delete(got, 4, 0), np.delete(want, 4, 0))
                got = backend.mitchell_matmul(a, y, multiplier=OPTIONS[option], out=None)
                assert_same_bits(np.delete(got, 9, 1), np.delete(want, 9, 1))


def test_matmul_of_blocks_larger_than_the_caches(backend: ModuleType, target: str):
    if backend.__name__ == REFERENCE:
        pytest.skip("compared with itself")
    a, b = normal((150, 1100), FLOATS["f32"], 1), normal((1100, 270), FLOATS["f32"], 2)
    got = backend.mitchell_matmul(a, b, multiplier=PLAIN, out=None)
    rows, columns = [0, 5, 77, 149], [0, 1, 63, 64, 255, 269]
    want = oracle("mitchell_matmul", a[rows], b[:, columns], multiplier=PLAIN)
    sizes = np.abs(a[rows].astype(np.float64)) @ np.abs(b[:, columns].astype(np.float64))
    close(got[np.ix_(rows, columns)], want, tolerance.matmul(sizes, 1100, a.dtype))


def test_matmul_front_end():
    a, b = normal((4, 6), FLOATS["f32"], 1), normal((6, 5), FLOATS["f32"], 2)
    full = fastops.mitchell_matmul(a, b)
    assert fastops.mitchell_matmul(a[1], b).shape == (5,)
    assert_same_bits(fastops.mitchell_matmul(a[1], b), fastops.mitchell_matmul(a[1:2], b)[0])
    assert_same_bits(fastops.mitchell_matmul(a, b[:, 2]), fastops.mitchell_matmul(a, b[:, 2:3])[:, 0])
    dot = fastops.mitchell_matmul(a[1], b[:, 2])
    assert isinstance(dot, np.float32)
    out = np.zeros(5, np.float32)
    assert fastops.mitchell_matmul(a[1], b, out=out) is out
    assert_same_bits(out, fastops.mitchell_matmul(a[1], b))
    out = np.zeros((), np.float32)
    assert fastops.mitchell_matmul(a[1], b[:, 2], out=out) is out
    assert out == dot
    assert fastops.mitchell_matmul(a, b.astype(np.float64)).dtype == np.float64
    assert fastops.mitchell_matmul(a.astype(np.float16), b).dtype == np.float32
    assert_same_bits(fastops.mitchell_matmul(a.astype(">f4"), b), full)
    assert_same_bits(
        fastops.mitchell_matmul(a.tolist(), b.astype(np.float64)),
        fastops.mitchell_matmul(a.astype(float), b.astype(float)),
    )
    assert_same_bits(
        Multiplier("min-mse").matmul(a, b), fastops.mitchell_matmul(a, b, multiplier=Multiplier("min-mse"))
    )
    out = np.zeros((4, 5), np.float32)
    assert Multiplier().matmul(a, b, out) is out
    assert_same_bits(out, full)
    # Interleaved memory without a shared element is no overlap.
    base = np.zeros((4, 12), np.float32)
    base[:, ::2] = a
    fastops.mitchell_matmul(base[:, ::2], b, out=base[:, 1:11:2])
    assert_same_bits(np.ascontiguousarray(base[:, 1:11:2]), full)


# --- convolution ----------------------------------------------------------------------------------------------------------------


CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((1, 1, 3, 3), (1, 1, 1, 1), {}),
    ((2, 3, 7, 9), (4, 3, 3, 3), {}),
    ((2, 3, 7, 9), (4, 3, 3, 3), {"padding": 1}),
    ((2, 3, 8, 9), (5, 3, 3, 2), {"stride": (2, 3), "padding": (1, 0)}),
    ((1, 4, 9, 9), (6, 4, 3, 3), {"dilation": (2, 3), "padding": 2}),
    ((2, 6, 5, 6), (4, 3, 2, 3), {"groups": 2}),
    ((1, 6, 6, 5), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
    ((1, 4, 6, 5), (8, 1, 3, 3), {"groups": 4, "padding": 2, "stride": 2, "dilation": 2}),
    ((2, 2, 5, 5), (3, 2, 5, 5), {}),
    ((1, 2, 4, 4), (3, 2, 1, 1), {"stride": 2}),
    ((1, 1, 1, 20), (2, 1, 1, 7), {"padding": (0, 3)}),
    ((1, 2, 9, 19), (37, 2, 3, 3), {"padding": 3}),
    ((2, 6, 20, 24), (4, 3, 3, 3), {"groups": 2, "padding": 1, "dilation": (1, 2)}),
    ((3, 4, 15, 31), (5, 4, 2, 3), {"padding": (1, 0), "dilation": (3, 1)}),
    ((0, 3, 5, 5), (4, 3, 3, 3), {}),
    ((1, 0, 5, 5), (4, 0, 3, 3), {}),
    ((1, 3, 5, 5), (0, 3, 3, 3), {}),
]


def pairs(settings: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **settings}
    return {
        key: value if isinstance(value, tuple) or key == "groups" else (value, value) for key, value in result.items()
    }


@pytest.mark.parametrize("case", range(len(CONVOLUTIONS)))
@pytest.mark.parametrize("name", FLOATS)
def test_conv2d(backend: ModuleType, target: str, case: int, name: str):
    x_shape, w_shape, given_settings = CONVOLUTIONS[case]
    steps = pairs(given_settings)
    dtype = FLOATS[name]
    x, w = normal(x_shape, dtype, 1), normal(w_shape, dtype, 2)
    got = backend.mitchell_conv2d(x, w, **steps, multiplier=PLAIN, out=None)
    want = oracle("mitchell_conv2d", x, w, **steps, multiplier=PLAIN)
    (sizes,) = magnitude("mitchell_conv2d", x, w, **steps, multiplier=PLAIN)
    bound = tolerance.matmul(2.0 * sizes, int(np.prod(w_shape[1:])), dtype)
    close(got, want, bound)
    out = np.full((*want.shape[:3], 2 * want.shape[3]), 7, dtype)[..., ::2]
    assert backend.mitchell_conv2d(x, w, **steps, multiplier=PLAIN, out=out) is out
    close(np.ascontiguousarray(out), want, bound)
    turned = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    close(
        backend.mitchell_conv2d(turned, w[..., ::-1].copy()[..., ::-1], **steps, multiplier=PLAIN, out=None),
        want,
        bound,
    )


def test_conv2d_of_many_images_is_that_of_each(native: ModuleType) -> None:
    """Padded images wait 2**22 elements at a time: 2 of these groups."""
    dtype = FLOATS["f32"]
    x, w = normal((2, 4, 900, 1000), dtype, 1), normal((2, 2, 3, 3), dtype, 2)
    x[1, 2, 7, 5], x[0, 1, 3, 3] = np.inf, np.nan
    steps = pairs({"groups": 2, "padding": 1})
    together = native.mitchell_conv2d(x, w, **steps, multiplier=PLAIN, out=None)
    part = (slice(None), slice(None), slice(0, 12), slice(0, 12))
    want = oracle("mitchell_conv2d", x[part], w, **steps, multiplier=PLAIN)[:, :, :10, :10]
    (sizes,) = magnitude("mitchell_conv2d", np.nan_to_num(x[part], posinf=0), w, **steps, multiplier=PLAIN)
    close(together[:, :, :10, :10], want, tolerance.matmul(2.0 * sizes[:, :, :10, :10], 18, dtype))
    for i in range(2):
        alone = native.mitchell_conv2d(x[i : i + 1], w, **steps, multiplier=PLAIN, out=None)
        assert np.array_equal(together[i : i + 1], alone, equal_nan=True)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("option", OPTIONS)
def test_conv2d_multipliers(backend: ModuleType, target: str, option: str, stride: int):
    dtype = FLOATS["f32"]
    x, w = normal((2, 4, 17, 28), dtype, 1), normal((6, 2, 3, 3), dtype, 2)
    steps = pairs({"groups": 2, "padding": 1, "stride": stride})
    got = backend.mitchell_conv2d(x, w, **steps, multiplier=OPTIONS[option], out=None)
    want = oracle("mitchell_conv2d", x, w, **steps, multiplier=OPTIONS[option])
    (sizes,) = magnitude("mitchell_conv2d", x, w, **steps, multiplier=PLAIN)
    close(got, want, tolerance.matmul(2.0 * sizes, 18, dtype))


@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38, 1e-40])
def test_conv2d_special_values(backend: ModuleType, target: str, value: float):
    dtype = FLOATS["f32"]
    for where in ("x", "w"):
        x, w = normal((1, 2, 6, 6), dtype, 1), normal((3, 2, 3, 3), dtype, 2)
        (x if where == "x" else w)[0, 1, 1, 2] = value
        steps = pairs({"padding": 2})
        got = backend.mitchell_conv2d(x, w, **steps, multiplier=PLAIN, out=None)
        want = oracle("mitchell_conv2d", x, w, **steps, multiplier=PLAIN)
        (sizes,) = magnitude("mitchell_conv2d", x, w, **steps, multiplier=PLAIN)
        close(got, want, tolerance.matmul(2.0 * sizes, 18, dtype))


def test_conv2d_front_end():
    x, w = normal((1, 2, 6, 6), FLOATS["f32"], 1), normal((3, 2, 3, 3), FLOATS["f32"], 2)
    full = fastops.mitchell_conv2d(x, w, padding=1)
    assert_same_bits(fastops.mitchell_conv2d(x, w, padding=(1, 1), stride=[1, 1]), full)
    assert_same_bits(Multiplier().conv2d(x, w, padding=1), full)
    assert fastops.mitchell_conv2d(x, w.astype(np.float64)).dtype == np.float64
    as_matrix = fastops.mitchell_matmul(w.reshape(3, 18)[:, 4::9], x.reshape(2, 36))
    middle = np.zeros_like(w)
    middle[:, :, 1, 1] = w[:, :, 1, 1]
    got = fastops.mitchell_conv2d(x, middle, padding=1).reshape(3, 36)
    close(got, as_matrix, tolerance.matmul(np.abs(as_matrix.astype(np.float64)) + 1, 18, x.dtype))


# --- tables --------------------------------------------------------------------------------------------------------------------


def byte_matrices(m: int, k: int, n: int, first: str, second: str, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, (m, k)).astype(np.uint8).view(first),
        rng.integers(0, 256, (k, n)).astype(np.uint8).view(second),
    )


def table_product(a: Any, b: Any, table: Any) -> Any:
    """Sums of look-ups, in Python's own way."""
    left, right = a.view(np.uint8), b.view(np.uint8)
    return table.astype(np.int64)[left[:, :, None], right[None, :, :]].sum(axis=1)


@pytest.mark.parametrize(("first", "second"), [("u1", "u1"), ("i1", "i1"), ("u1", "i1"), ("i1", "u1")])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 300, 40)], ids=str)
def test_lut_matmul(backend: ModuleType, target: str, shape: tuple[int, int, int], first: str, second: str):
    a, b = byte_matrices(*shape, first, second)
    rng = np.random.default_rng(1)
    for low, high, wide in ((0, 2**16, False), (-(2**15), 2**15, False), (-(2**31), 2**31, True)):
        table = rng.integers(low, high, (256, 256)).astype(np.int32)
        want = table_product(a, b, table)
        if not wide:
            out = np.empty(want.shape, np.int32)
            backend.lut_matmul(a, b, table, out=out)
            assert_same_bits(out, want.astype(np.int32))
        out = np.empty(want.shape, np.int64)
        backend.lut_matmul(a, b, table, out=out)
        assert_same_bits(out, want)


# For each way of looking up: few rows, few columns, neither; columns in several blocks; more steps than a 32-bit sum takes.
@pytest.mark.parametrize("shape", [(3, 127, 515), (40, 33, 90), (40, 19, 405), (34, 3, 2100), (2, 65541, 33)], ids=str)
def test_lut_matmul_of_many_terms(native: ModuleType, target: str, shape: tuple[int, int, int]):
    a, b = byte_matrices(*shape, "u1", "u1")
    table = np.random.default_rng(1).integers(0, 2**16, (256, 256)).astype(np.int32)
    want = table_product(a, b, table)
    for dtype in (np.int32, np.int64) if shape[1] < 2**15 else (np.int64,):
        out = np.empty(want.shape, dtype)
        native.lut_matmul(a, b, table, out=out)
        assert_same_bits(out, want.astype(dtype))
        native.lut_matmul(np.asfortranarray(a), b[:, ::-1], table, out=out[:, ::-1])
        assert_same_bits(out, want.astype(dtype))
        turned = np.empty(want.T.shape, dtype)
        native.lut_matmul(b.T, np.ascontiguousarray(a.T), np.ascontiguousarray(table.T), out=turned)
        assert_same_bits(turned, np.ascontiguousarray(want.T).astype(dtype))


def test_lut_matmul_front_end(backend: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fastops.mitchell, "_backend", backend)
    a, b = byte_matrices(5, 9, 7, "u1", "u1")
    table = Multiplier().table(8)
    want = table_product(a, b, table)
    got = fastops.lut_matmul(a, b, table)
    assert_same_bits(got, want.astype(np.int32))
    signed = np.arange(-128, 128, dtype=np.int8)
    exact = np.zeros((256, 256), np.int16)
    exact[np.ix_(signed.view(np.uint8), signed.view(np.uint8))] = np.multiply.outer(signed.astype(np.int16), signed)
    x, y = a.view(np.int8), b.view(np.int8)
    assert_same_bits(fastops.lut_matmul(x, y, exact), x.astype(np.int32) @ y.astype(np.int32))
    # Entries of 32 unsigned bits, and sums beyond int32.
    large = np.full((256, 256), 2**32 - 1, np.uint32)
    assert fastops.lut_matmul(a, b, large).tolist() == np.full((5, 7), 9 * (2**32 - 1)).tolist()
    assert fastops.lut_matmul(a, b, np.full((256, 256), 2**31 // 9, np.int64)).dtype == np.int32
    assert fastops.lut_matmul(a, b, np.full((256, 256), 2**31 // 9 + 1, np.int64)).dtype == np.int64
    lowest = np.full((256, 256), -(2**31), np.int64)
    assert (fastops.lut_matmul(a, b, lowest) == -9 * 2**31).all()
    # Layouts, batches, out.
    batch = np.stack([a, a[::-1]])
    assert_same_bits(fastops.lut_matmul(batch, b, table), np.stack([want, want[::-1]]).astype(np.int32))
    assert_same_bits(
        fastops.lut_matmul(np.asfortranarray(a), b[:, ::-1], table[::-1][::-1]), want[:, ::-1].astype(np.int32)
    )
    assert_same_bits(fastops.lut_matmul(b.T, a.T, table.T), want.T.astype(np.int32))
    out = np.full((7, 10), 7, np.int64).T[:5, :]
    assert_same_bits(np.ascontiguousarray(fastops.lut_matmul(a, b, table, out=np.zeros((7, 5), np.int64).T)), want)
    assert fastops.lut_matmul(a, b, table, out=out) is out
    assert_same_bits(np.ascontiguousarray(out), want)
    assert fastops.lut_matmul(a[0], b[:, 0], table) == want[0, 0]
    assert_same_bits(fastops.lut_matmul(a[0], b, table), want[0].astype(np.int32))
    for m, k, n in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        x, y = byte_matrices(m, k, n, "u1", "u1")
        empty = fastops.lut_matmul(x, y, table)
        assert empty.shape == (m, n)
        assert not empty.any()


# --- gradients --------------------------------------------------------------------------------------------------------------------


GRADIENT_OPTIONS = (
    "plain",
    "min-mse",
    "float",
    "lmul",
    "equation",
    "segments-4",
    "segments-16",
    "m7",
    "flush",
    "k0",
    "k1",
    "k3",
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", GRADIENT_OPTIONS)
def test_mul_grad(backend: ModuleType, target: str, option: str, mode: str):
    for dtype in FLOATS.values():
        a, b, dy = (normal((301,), dtype, seed) for seed in (1, 2, 3))
        got = backend.mitchell_mul_grad(a, b, dy, multiplier=OPTIONS[option], mode=mode)
        want = oracle("mitchell_mul_grad", a, b, dy, multiplier=OPTIONS[option], mode=mode)
        for x, y in zip(got, want, strict=True):
            close(x, y, tolerance.gradient(np.abs(y.astype(np.float64)), 1, dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", [n for n in GRADIENT_OPTIONS if OPTIONS[n]._has("div")])
def test_div_grad(backend: ModuleType, target: str, option: str, mode: str):
    for dtype in FLOATS.values():
        a, b, dy = normal((301,), dtype, 1), near_one(dtype, 301, 2), normal((301,), dtype, 3)
        got = backend.mitchell_div_grad(a, b, dy, multiplier=OPTIONS[option], mode=mode)
        want = oracle("mitchell_div_grad", a, b, dy, multiplier=OPTIONS[option], mode=mode)
        for x, y in zip(got, want, strict=True):
            close(x, y, 2 * tolerance.gradient(np.abs(y.astype(np.float64)), 1, dtype))


@pytest.mark.parametrize("mode", MODES)
def test_elementwise_gradients_sum_to_the_operands(backend: ModuleType, target: str, mode: str):
    for name, dtype in FLOATS.items():
        for a_shape, b_shape in (
            ((5, 1), (7,)),
            ((3, 1, 4), (1, 5, 1)),
            ((), (6,)),
            ((2, 3), (2, 3)),
            ((0, 3), (3,)),
            ((1,), ()),
        ):
            a, b = (
                near_one(dtype, int(np.prod(a_shape)), 1).reshape(a_shape),
                near_one(dtype, int(np.prod(b_shape)), 2).reshape(b_shape),
            )
            dy = normal(np.broadcast_shapes(a_shape, b_shape), dtype, 3)
            for op in ("mul", "div"):
                function = getattr(backend, f"mitchell_{op}_grad")
                got = function(a, b, dy, multiplier=PLAIN, mode=mode)
                want = oracle(f"mitchell_{op}_grad", a, b, dy, multiplier=PLAIN, mode=mode)
                sizes = magnitude(f"mitchell_{op}_grad", a, b, dy, multiplier=PLAIN, mode=mode)
                for x, y, size, shape in zip(got, want, sizes, (a_shape, b_shape), strict=True):
                    assert x.shape == shape, name
                    close(x, y, 4 * tolerance.gradient(np.abs(size), max(dy.size, 1), dtype))


@pytest.mark.parametrize("op", ["mul", "div"])
@pytest.mark.parametrize("mode", MODES)
def test_elementwise_gradients_of_special_values(backend: ModuleType, target: str, op: str, mode: str):
    values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.5, -3.0], np.float32)
    a, b = (x.ravel() for x in np.meshgrid(values, values))
    dy = np.full(a.shape, 1.25, np.float32)
    got = getattr(backend, f"mitchell_{op}_grad")(a, b, dy, multiplier=PLAIN, mode=mode)
    want = oracle(f"mitchell_{op}_grad", a, b, dy, multiplier=PLAIN, mode=mode)
    for x, y in zip(got, want, strict=True):
        close(x, y, tolerance.gradient(np.abs(np.nan_to_num(y.astype(np.float64), posinf=0, neginf=0)), 1, a.dtype))


def test_exact_gradients_are_difference_quotients(backend: ModuleType, target: str):
    """Inside one linear piece the slope is the quotient of differences."""
    rng = np.random.default_rng(5)
    a, b = rng.uniform(0.3, 5, 400) * rng.choice([-1, 1], 400), rng.uniform(0.3, 5, 400) * rng.choice([-1, 1], 400)
    one = np.ones(400)
    h = tolerance.STEP
    for op, options in (("mul", ("plain", "min-mse", "equation", "k1")), ("div", ("plain", "minimax"))):
        for option in options:
            function = backend.mitchell_op(op, OPTIONS[option])
            da, db = getattr(backend, f"mitchell_{op}_grad")(a, b, one, multiplier=OPTIONS[option], mode="exact")
            for gradient, x, y in ((da, h, 0.0), (db, 0.0, h)):
                left, right = function(a - x, b - y), function(a + x, b + y)
                centre = function(a, b)
                size = np.abs(centre) + np.abs(gradient)
                # Across a kink the two halves differ in slope: such points are left out, few as they are.
                smooth = np.abs(left + right - 2 * centre) <= 1e-3 * h * np.abs(gradient)
                if op == "mul" or x:
                    assert smooth.mean() > 0.9
                    bound = tolerance.finite_difference(float(size.max()), 1) + (
                        1e-3 * np.abs(gradient) if op == "div" else 0
                    )
                    quotient = (right - left) / (2 * h)
                    assert (np.abs(quotient - gradient) <= bound)[smooth].all(), option


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", GRADIENT_OPTIONS)
def test_matmul_grad(backend: ModuleType, target: str, option: str, mode: str):
    for dtype in (FLOATS["f32"], FLOATS["f64"], FLOATS["f16"]):
        a, b, dy = normal((7, 19), dtype, 1), normal((19, 37), dtype, 2), normal((7, 37), dtype, 3)
        check_matmul_grad(backend, OPTIONS[option], a, b, dy, mode)


def check_matmul_grad(backend: ModuleType, multiplier: Multiplier, a: Any, b: Any, dy: Any, mode: str) -> None:
    got = backend.mitchell_matmul_grad(a, b, dy, multiplier=multiplier, mode=mode)
    want = oracle("mitchell_matmul_grad", a, b, dy, multiplier=multiplier, mode=mode)
    sizes = magnitude("mitchell_matmul_grad", a, b, dy, multiplier=PLAIN, mode="ste")
    terms = (dy.size // max(1, a.shape[-2]), dy.size // max(1, b.shape[-1]))
    for x, y, size, count, operand in zip(got, want, sizes, terms, (a, b), strict=True):
        assert x.shape == operand.shape
        close(x, y, tolerance.gradient(4.0 * size, count, a.dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matmul_grad_shapes(backend: ModuleType, target: str, shape: tuple[int, int, int], mode: str):
    m, k, n = shape
    dtype = FLOATS["f32"]
    check_matmul_grad(
        backend, PLAIN, normal((m, k), dtype, 1), normal((k, n), dtype, 2), normal((m, n), dtype, 3), mode
    )


@pytest.mark.parametrize("option", ["plain", "negative", "minimax", "segments-4", "equation", "k1"])
@pytest.mark.parametrize("name", ["bf16", "f32", "f64"])
def test_matmul_exact_grad_near_overflow(backend: ModuleType, target: str, option: str, name: str):
    """A gradient that its dtype holds is finite, however near to overflow the operands lie. One term each."""
    dtype = FLOATS[name]
    huge = np.ldexp(1.0, 127 if name != "f64" else 1023)
    rng = np.random.default_rng(1)
    for b_size, dy_size in ((huge, 1.0), (1.0, huge), (1 / huge, huge), (huge / 8, 4.0), (4.0, huge / 8)):
        a, b, dy = (
            (rng.uniform(1.0, 1.99, (40, 1, 1)) * size * rng.choice([-1, 1], (40, 1, 1))).astype(dtype)
            for size in (1.0, b_size, dy_size)
        )
        got = backend.mitchell_matmul_grad(a, b, dy, multiplier=OPTIONS[option], mode="exact")[0]
        want = oracle("mitchell_matmul_grad", a, b, dy, multiplier=OPTIONS[option], mode="exact")[0]
        assert np.isfinite(want.astype(np.float64)).any()
        size = np.abs(np.where(np.isfinite(want.astype(np.float64)), want, 0).astype(np.float64))
        close(got, want, tolerance.gradient(size, 1, dtype))


@pytest.mark.parametrize("mode", MODES)
def test_matmul_grad_batches_layouts_and_empty(backend: ModuleType, target: str, mode: str):
    for dtype in FLOATS.values():
        for a_shape, b_shape in (
            ((3, 4, 5), (3, 5, 6)),
            ((4, 5), (3, 5, 6)),
            ((2, 1, 4, 5), (3, 5, 6)),
            ((3, 0), (0, 4)),
            ((0, 3), (3, 4)),
            ((2, 3, 4), (4, 0)),
        ):
            a, b = normal(a_shape, dtype, 1), normal(b_shape, dtype, 2)
            dy = normal(np.matmul(np.ones(a_shape), np.ones(b_shape)).shape, dtype, 3)
            check_matmul_grad(backend, PLAIN, a, b, dy, mode)
            check_matmul_grad(
                backend, PLAIN, np.asfortranarray(a), b[..., ::-1, :].copy()[..., ::-1, :], np.asfortranarray(dy), mode
            )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", range(len(CONVOLUTIONS)))
def test_conv2d_grad(backend: ModuleType, target: str, case: int, mode: str):
    x_shape, w_shape, given_settings = CONVOLUTIONS[case]
    steps = pairs(given_settings)
    for dtype in (FLOATS["f32"], FLOATS["f64"], FLOATS["f16"]):
        x, w = normal(x_shape, dtype, 1), normal(w_shape, dtype, 2)
        shape = oracle("mitchell_conv2d", x, w, **steps, multiplier=PLAIN).shape
        check_conv2d_grad(backend, PLAIN, x, w, normal(shape, dtype, 3), steps, mode)


def check_conv2d_grad(
    backend: ModuleType, multiplier: Multiplier, x: Any, w: Any, dy: Any, steps: dict[str, Any], mode: str
) -> None:
    got = backend.mitchell_conv2d_grad(x, w, dy, **steps, multiplier=multiplier, mode=mode)
    want = oracle("mitchell_conv2d_grad", x, w, dy, **steps, multiplier=multiplier, mode=mode)
    sizes = magnitude("mitchell_conv2d_grad", x, w, dy, **steps, multiplier=PLAIN, mode="ste")
    for g, y, size, operand in zip(got, want, sizes, (x, w), strict=True):
        assert g.shape == operand.shape
        close(g, y, tolerance.gradient(4.0 * size, max(dy.size, w.size), x.dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", GRADIENT_OPTIONS)
def test_conv2d_grad_multipliers(backend: ModuleType, target: str, option: str, mode: str):
    dtype = FLOATS["f32"]
    x, w, steps = (
        normal((2, 4, 6, 7), dtype, 1),
        normal((6, 2, 3, 2), dtype, 2),
        pairs({"groups": 2, "padding": 1, "stride": 2}),
    )
    shape = oracle("mitchell_conv2d", x, w, **steps, multiplier=PLAIN).shape
    check_conv2d_grad(backend, OPTIONS[option], x, w, normal(shape, dtype, 3), steps, mode)


def test_gradient_front_ends():
    a, b = normal((4, 6), FLOATS["f32"], 1), normal((6, 5), FLOATS["f32"], 2)
    dy = normal((4, 5), FLOATS["f32"], 3)
    da, db = fastops.mitchell_matmul_grad(a, b, dy)
    for left, right, upper in ((a[1], b, dy[1]), (a, b[:, 2], dy[:, 2]), (a[1], b[:, 2], dy[1, 2])):
        first, second = fastops.mitchell_matmul_grad(left, right, upper)
        assert first.shape == left.shape
        assert second.shape == right.shape
    assert_same_bits(
        fastops.mitchell_matmul_grad(a[1], b, dy[1])[0], fastops.mitchell_matmul_grad(a[1:2], b, dy[1:2])[0][0]
    )
    assert fastops.mitchell_matmul_grad(a, b.astype(float), dy)[0].dtype == np.float64
    assert_same_bits(fastops.mitchell_matmul_grad(a, b, dy, mode="exact")[1], db)
    first, second = fastops.mitchell_mul_grad(a, a[:1], a)
    assert (first.shape, second.shape) == ((4, 6), (1, 6))
    first, second = fastops.mitchell_div_grad(1.5, 2.5, 1.0)
    assert (first.dtype, first.shape) == (np.float64, ())
    assert da.dtype == np.float32


# --- hypothesis -------------------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_matrix_product(backend: ModuleType, target: str, data: st.DataObject):
    dtype = data.draw(st.sampled_from(list(FLOATS.values())), label="dtype")
    multiplier = data.draw(st.sampled_from(list(OPTIONS.values())), label="multiplier")
    m, k, n = (data.draw(st.integers(0, 40), label=name) for name in "mkn")
    batch = data.draw(st.sampled_from([(), (1,), (2,), (2, 1), (2, 3)]), label="batch of a")
    other = data.draw(
        st.sampled_from([(), (1,), (3,)]) if batch[-1:] != (2,) else st.sampled_from([(), (1,), (2,)]),
        label="batch of b",
    )
    a = normal((*batch, m, k), dtype, data.draw(st.integers(0, 99)))
    b = normal((*other, k, n), dtype, data.draw(st.integers(0, 99)))
    if data.draw(st.booleans(), label="a transposed in memory"):
        a = np.swapaxes(np.swapaxes(a, -1, -2).copy(), -1, -2)
    if data.draw(st.booleans(), label="b transposed in memory"):
        b = np.swapaxes(np.swapaxes(b, -1, -2).copy(), -1, -2)
    check_matmul(backend, multiplier, a, b)
