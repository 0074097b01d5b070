# SPDX-License-Identifier: BSD-3-Clause
"""Moving averages and optimizer steps over lists of tensors: published vectors, the oracle, every layout, every refusal."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import tolerance
from hypothesis import HealthCheck, given, settings
from samples import FLOATS, assert_same_bits, bits, patterns

import fastops
from fastops import _tensors, reference
from fastops import optim as module

F32, F64 = FLOATS["f32"], FLOATS["f64"]
BF16 = FLOATS.get("bf16")
HALVES = [dtype for dtype in FLOATS.values() if dtype.itemsize == 2]
needs_bfloat16 = pytest.mark.skipif(BF16 is None, reason="ml_dtypes is not installed")
in_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def ops(backend: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The public functions, on a backend and CPU level."""
    monkeypatch.setattr(module, "_backend", backend)
    return module


@pytest.fixture
def native_ops(native: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The public functions on the native backend, for what it alone promises."""
    monkeypatch.setattr(module, "_backend", native)
    return module


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = fastops.get_num_threads()
    yield
    fastops.set_num_threads(before)


# --- tensors in every layout -------------------------------------------------------------------------------------------------

LAYOUTS = ("C", "Fortran", "reversed", "every second", "middle axis out", "misaligned")


def laid(values: Any, layout: str) -> Any:
    """A writable array of these values whose memory is laid out in this way."""
    values = np.ascontiguousarray(values) if values.ndim else values.copy()
    if layout == "Fortran":
        return values.copy(order="F")
    if layout == "reversed" and values.ndim:
        return np.flip(np.flip(values).copy())
    if layout == "every second":
        base = np.zeros((*values.shape, 2), values.dtype)
        base[..., 1] = values
        return base[..., 1]
    if layout == "middle axis out" and values.ndim > 1:
        return np.moveaxis(np.moveaxis(values, -1, 0).copy(), 0, -1)
    if layout == "misaligned":
        raw = bytearray(values.nbytes + 1)
        array = np.ndarray(values.shape, values.dtype, raw, offset=1)
        array[...] = values
        return array
    return values.copy()


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Any:
    """Normal numbers of both signs and several exponents."""
    return np.asarray(scale * rng.standard_normal(shape) * 2.0 ** rng.integers(-4, 3, shape)).astype(dtype)


def positive(arrays: list[Any]) -> list[Any]:
    """The arrays, with their values made positive in place."""
    for x in arrays:
        x[...] = np.abs(x)
    return arrays


def wide(x: Any) -> Any:
    return np.asarray(x).astype(np.float64)


def magnitude(x: Any) -> Any:
    return np.abs(wide(x))


def assert_within(got: Any, want: Any, bound: Any) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    # An exponential may leave the range: two infinities of one sign have no difference.
    same = wide(got) == wide(want)
    difference = np.abs(np.subtract(wide(got), wide(want), out=np.zeros(want.shape), where=~same))
    over = ~same & ~(difference <= bound)
    assert not over.any(), (
        f"{int(over.sum())} of {over.size} over the bound, "
        f"the worst {np.max(difference / np.where(bound > 0, bound, 1)):.3g} of it"
    )


def snapshot(*lists: Any) -> list[bytes]:
    return [np.asarray(a).tobytes() for items in lists if items is not None for a in items]


# --- published and computed vectors --------------------------------------------------------------------------------------------


def test_average_of_a_constant(ops: ModuleType) -> None:
    """archives/6575: decay 0.9 towards 2.5, three steps from 0, raw and divided by 1 - 0.9^3."""
    shadow = [np.zeros(1)]
    for _ in range(3):
        ops.ema_update_(shadow, [np.array([2.5])], 0.9)
    assert shadow[0][0] == pytest.approx(0.6775, rel=tolerance.DOUBLE)
    assert shadow[0][0] / (1 - 0.9**3) == pytest.approx(2.5, rel=tolerance.DOUBLE)


GRADIENTS = (0.3, -0.2, 0.5, 0.1, 0.4, -0.6, 0.2, 0.2, 0.2)


def test_hidden_accumulation_vector(ops: ModuleType) -> None:
    """archives/8634: k = 3, b = 0.9, lr = 0.1; the post's form is dampening = momentum."""
    p, m = [np.ones(1)], [np.zeros(1)]
    after = []
    for t, g in enumerate(GRADIENTS):
        options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.9, "accumulate": (t, 3)}
        ops.sgd_step_(p, [np.array([g])], m, **options)
        after.append(p[0][0])
    # The parameters move with every third gradient alone.
    assert after[:2] == [1.0, 1.0]
    np.testing.assert_allclose(after[2::3], [0.998, 0.9965333333333334, 0.9932133333333334], rtol=tolerance.DOUBLE)
    np.testing.assert_allclose(m[0], 0.0332, rtol=tolerance.DOUBLE)


@pytest.mark.parametrize("form", [{}, {"dampening": 0.9}, {"weight_decay": 0.01}])
def test_hidden_accumulation_is_a_step_on_the_mean(ops: ModuleType, form: dict[str, float]) -> None:
    rng = np.random.default_rng(1)
    gradients = rng.standard_normal((4, 3, 7))
    start = rng.standard_normal(7)
    hidden, explicit = ([start.copy()] for _ in range(2))
    m, buffer = [np.zeros(7)], [np.zeros(7)]
    options = {"lr": 0.1, "momentum": 0.9, **form}
    for group in gradients:
        for i, g in enumerate(group):
            ops.sgd_step_(hidden, [g], m, accumulate=(i, 3), **options)
        ops.sgd_step_(explicit, [group.mean(axis=0)], buffer, **options)
    np.testing.assert_allclose(hidden[0], explicit[0], rtol=tolerance.DOUBLE)
    np.testing.assert_allclose(m[0], buffer[0], rtol=tolerance.DOUBLE, atol=tolerance.DOUBLE)


def test_lookahead_vector(ops: ModuleType) -> None:
    """lr 0.1, g = 1, k = 2, alpha 0.5 from 1."""
    slow, fast, after = [np.ones(1)], [np.ones(1)], []
    for t in range(1, 5):
        ops.sgd_step_(fast, [np.ones(1)], None, lr=0.1)
        if t % 2 == 0:
            ops.lookahead_sync_(slow, fast)
        after.append(fast[0][0])
    np.testing.assert_allclose(after, [0.9, 0.9, 0.8, 0.8], rtol=tolerance.DOUBLE)
    assert slow[0][0] == fast[0][0]


def test_adamw_vector(ops: ModuleType) -> None:
    p, m, v = [np.ones(1)], [np.zeros(1)], [np.zeros(1)]
    after = []
    for t, g in enumerate((0.5, -0.25), 1):
        ops.adamw_step_(p, [np.array([g])], m, v, step=t, lr=0.01, weight_decay=0.1)
        after.append(p[0][0])
    np.testing.assert_allclose(after, [0.9890000002, 0.9853476298705847], rtol=tolerance.DOUBLE)
    np.testing.assert_allclose([m[0][0], v[0][0]], [0.02, 3.1225e-4], rtol=tolerance.DOUBLE)


def test_exponentiated_gradient_vector(ops: ModuleType) -> None:
    p = [np.array([1.0, 2.0, 0.5])]
    ops.eg_step_(p, [np.array([0.1, -0.2, 0.3])], lr=0.5)
    np.testing.assert_allclose(p[0], [0.95122942, 2.21034184, 0.43035399], atol=tolerance.printed(8))


def test_adaptive_exponentiated_gradient_vector(ops: ModuleType) -> None:
    """Three steps of Amid et al. with lr 0.1 and mu 0.9."""
    p, m, h, gain = [np.array([1.0, -1.0])], [np.zeros(2)], [np.zeros(2)], [np.ones(2)]
    scales = np.ones(1)
    for g in ((1.0, -2.0), (0.5, 1.0), (1.0, 1.0)):
        ops.adaptive_eg_step_(p, [np.array(g)], m, h, gain, scales, lr=0.1)
    np.testing.assert_allclose(p[0], [0.53118717, -0.74416936], atol=tolerance.printed(8))
    np.testing.assert_allclose(scales, 0.9996595173109921, rtol=tolerance.DOUBLE)
    np.testing.assert_allclose(gain[0], [1.02020134, 0.98019867], atol=tolerance.printed(8))


# --- moving averages against the oracle ----------------------------------------------------------------------------------------

SHAPES = [(), (0,), (1,), (3, 0, 2), (5,), (17,), (4, 3), (2, 3, 5), (67,), (2, 1, 33)]
DECAYS = [0.0, 1e-9, 0.1, 0.5, 0.500001, 0.9, 0.9999, 1.0 - 1e-12, 1.0]


class Set(NamedTuple):
    """A drawn list: shape and layouts of each tensor, and the seed of its values."""

    shapes: list[tuple[int, ...]]
    layouts: list[list[str]]
    seed: int


def sets(roles: int) -> st.SearchStrategy[Set]:
    tensor = st.tuples(st.sampled_from(SHAPES), st.lists(st.sampled_from(LAYOUTS), min_size=roles, max_size=roles))
    return st.tuples(st.lists(tensor, max_size=5), st.integers(0, 2**32)).map(
        lambda drawn: Set([shape for shape, _ in drawn[0]], [layouts for _, layouts in drawn[0]], drawn[1])
    )


def lists_of(drawn: Set, *dtypes: Any) -> list[list[Any]]:
    """A list for each role."""
    rng = np.random.default_rng(drawn.seed)
    return [
        [
            laid(numbers(rng, shape, dtype), layouts[r])
            for shape, layouts in zip(drawn.shapes, drawn.layouts, strict=True)
        ]
        for r, dtype in enumerate(dtypes)
    ]


@pytest.mark.parametrize("param", FLOATS)
@pytest.mark.parametrize("shadow", ["f32", "f64"])
@given(drawn=sets(2), decay=st.sampled_from(DECAYS) | st.floats(0, 1))
@in_fixture
def test_average_within_two_eps_of_the_oracle(
    ops: ModuleType, shadow: str, param: str, drawn: Set, decay: float
) -> None:
    s, p = lists_of(drawn, FLOATS[shadow], FLOATS[param])
    want, before = [x.copy() for x in s], snapshot(p)
    reference.ema_update((want,), p, (1.0 - decay,), None)
    bounds = [tolerance.lerp(wide(x), wide(y) if param != "f64" else y, x.dtype) for x, y in zip(s, p, strict=True)]
    ops.ema_update_(s, p, decay)
    for got, exact, bound in zip(s, want, bounds, strict=True):
        assert_within(got, exact, bound)
    assert snapshot(p) == before


@pytest.mark.parametrize("layout", ["C", "every second"])
def test_average_at_every_tail_and_across_pieces(ops: ModuleType, layout: str) -> None:
    """Lengths around the vectors and around the pieces into which a list is cut."""
    rng = np.random.default_rng(2)
    sizes = [*range(40), 127, 1 << 12, (1 << 14) + 3, 70_001]
    for dtype, other in ((F32, F32), (F32, HALVES[-1]), (F32, F64), (F64, F32)):
        s = [laid(numbers(rng, (n,), dtype), layout) for n in sizes]
        p = [laid(numbers(rng, (n,), other), layout) for n in sizes]
        want = [x.copy() for x in s]
        reference.ema_update((want,), p, (0.1,), None)
        bounds = [tolerance.lerp(x, y, dtype) for x, y in zip(s, p, strict=True)]
        ops.ema_update_(s, p, 0.9)
        for got, exact, bound in zip(s, want, bounds, strict=True):
            assert_within(got, exact, bound)


def test_average_moves_towards_the_parameter(ops: ModuleType) -> None:
    """A wrong sign, as in hand-written updates that diverge silently, would not."""
    s, p = [np.zeros(4, np.float32)], [np.full(4, 3, np.float32)]
    for _ in range(2000):
        ops.ema_update_(s, p, 0.99)
    np.testing.assert_allclose(s[0], 3.0, rtol=tolerance.ARRIVED)


@pytest.mark.parametrize("param", FLOATS)
@pytest.mark.parametrize("shadow", ["f32", "f64"])
def test_ends_of_the_decay_are_exact(ops: ModuleType, shadow: str, param: str) -> None:
    """0 copies every bit pattern, infinities and nan too; 1 touches nothing."""
    s, p = patterns(FLOATS[shadow], 1000, 3), patterns(FLOATS[param], 1000, 4)
    before = bits(s).copy()
    ops.ema_update_([s], [p], 1.0)
    np.testing.assert_array_equal(bits(s), before)
    ops.ema_update_([s], [p], 0.0)
    with np.errstate(all="ignore"):
        assert_same_bits(s, p.astype(FLOATS[shadow]), p)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_nan_and_infinity_propagate(ops: ModuleType, decay: float) -> None:
    p = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    s = [np.ones(4, np.float32)]
    ops.ema_update_(s, [p], decay)
    assert np.isnan(s[0][0])
    # From the far end, infinity minus itself is nan, as in torch.
    assert not np.isfinite(s[0][1:3]).any()
    assert s[0][3] == 1.0
    ops.ema_update_(s, [np.ones(4, np.float32)], 0.99)
    assert np.isnan(s[0][0]), "and stays"


def test_a_decay_for_each_tensor(ops: ModuleType) -> None:
    s = [np.zeros(3, np.float32) for _ in range(4)]
    p = [np.ones(3, np.float32) for _ in range(4)]
    ops.ema_update_(s, p, [1.0, 0.75, 0.25, 0.0])
    assert [x[0] for x in s] == [0.0, 0.25, 0.75, 1.0]
    ops.ema_update_(iter(s), iter(p), np.array([0.0, 0.0, 1.0, 1.0]))
    assert [x[0] for x in s] == [1.0, 1.0, 0.75, 1.0]


@pytest.mark.parametrize("profiles", [1, 2, 3, 4, 5, 17])
def test_profiles_in_one_pass_equal_those_one_by_one(backend: ModuleType, target: str, profiles: int) -> None:
    rng = np.random.default_rng(5)
    sizes = [3, 0, 70, 20_011]
    p = [numbers(rng, (n,), F32) for n in sizes]
    together = [[numbers(rng, (n,), F32) for n in sizes] for _ in range(profiles)]
    weights = tuple([0.1, 0.7, 0.0, 1.0, 0.01][k % 5] for k in range(profiles))
    apart = [[x.copy() for x in s] for s in together]
    backend.ema_update(tuple(together), p, weights, None)
    for s, w in zip(apart, weights, strict=True):
        backend.ema_update((s,), p, (w,), None)
    for got, want in zip(together, apart, strict=True):
        for x, y in zip(got, want, strict=True):
            assert_same_bits(x, y)


def fused(w: np.floating[Any], s: np.floating[Any], p: np.floating[Any], dtype: Any) -> np.floating[Any]:
    """The formula of the levels with FMA in exact arithmetic: the difference rounded, product and sum together once."""
    near = w < 0.5
    factor = Fraction(float(w)) if near else Fraction(float(dtype.type(w - dtype.type(1))))
    exact = factor * Fraction(float(dtype.type(p - s))) + Fraction(float(s if near else p))
    nearest = dtype.type(float(exact))
    around = [np.nextafter(nearest, dtype.type(side)) for side in (-np.inf, np.inf)]
    # float() rounds to 53 bits: a second rounding could land next to the right one; the even one takes a tie.
    return min([nearest, *around], key=lambda x: (abs(Fraction(float(x)) - exact), int(bits(x).item()) & 1))


@pytest.mark.parametrize("w", [0.001, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", ["f32", "f64"])
def test_levels_with_fma_round_product_and_sum_once(native_ops: ModuleType, target: str, name: str, w: float) -> None:
    if target == "v2":
        pytest.skip("v2 has no FMA")
    dtype = FLOATS[name]
    rng = np.random.default_rng(6)
    s, p = numbers(rng, (203,), dtype), numbers(rng, (203,), dtype)
    decay = 1.0 - w
    want = np.array([fused(dtype.type(1.0 - decay), x, y, dtype) for x, y in zip(s, p, strict=True)], dtype)
    native_ops.ema_update_([s], [p], decay)
    assert_same_bits(s, want, p)


# --- stochastic rounding -------------------------------------------------------------------------------------------------------


@needs_bfloat16
@pytest.mark.parametrize("param", FLOATS)
@given(drawn=sets(2), decay=st.sampled_from(DECAYS) | st.floats(0, 1), seed=st.integers(0, 2**64 - 1))
@in_fixture
def test_stochastic_rounding_within_a_unit_of_the_oracle(
    ops: ModuleType, param: str, drawn: Set, decay: float, seed: int
) -> None:
    s, p = lists_of(drawn, BF16, FLOATS[param])
    want, before = [x.copy() for x in s], [x.copy() for x in s]
    reference.ema_update((want,), p, (1.0 - decay,), seed)
    ops.ema_update_(s, p, decay, rounding="stochastic", seed=seed)
    for got, exact, old in zip(s, want, before, strict=True):
        if decay == 1.0:
            assert_same_bits(got, old)
        # Neighbours have neighbouring patterns, zeros of both signs apart.
        apart = np.abs(bits(got).astype(int) - bits(exact).astype(int))
        assert ((apart <= 1) | (magnitude(got) + magnitude(exact) < 1e-30)).all()


@needs_bfloat16
def test_stochastic_rounding_is_the_same_everywhere(ops: ModuleType) -> None:
    rng = np.random.default_rng(7)
    sizes = [50_000, 1, 31, 32, 33, 40_000]
    s, p = [numbers(rng, (n,), BF16) for n in sizes], [numbers(rng, (n,), F32) for n in sizes]
    for decay in (0.99, 0.3):
        want = [x.copy() for x in s]
        reference.ema_update((want,), p, (1.0 - decay,), 12345)
        ops.ema_update_(s, p, decay, rounding="stochastic", seed=12345)
        got, exact = (np.concatenate([bits(x).astype(int) for x in items]) for items in (s, want))
        assert np.abs(got - exact).max() <= 1
        assert np.mean(got != exact) <= tolerance.RANDOM_DIFFERENT


@needs_bfloat16
def test_stochastic_rounding_of_special_values(ops: ModuleType) -> None:
    """Copies of any bit pattern have the oracle's bits: infinities stay, nan stays nan whatever part of it is cut off."""
    odd = np.array([0x7F800001, 0xFF80FFFF, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 1, 0x80000001, 0x7FC00000], np.uint32)
    p = np.concatenate([np.tile(odd, 9).view(np.float32), patterns(F32, 5000, 17)])
    s, want = np.zeros(p.shape, BF16), np.zeros(p.shape, BF16)
    reference.ema_update(([want],), [p], (1.0,), 3)
    ops.ema_update_([s], [p], 0.0, rounding="stochastic", seed=3)
    assert_same_bits(s, want, p)
    np.testing.assert_array_equal(np.isnan(s.astype(np.float32)), np.isnan(p))
    assert np.isinf(s[:72].astype(np.float32)).sum() >= 18


@needs_bfloat16
def test_stochastic_rounding_is_unbiased(ops: ModuleType) -> None:
    """Over many seeds, elements and tensors the mean is the value itself, whatever part of a unit it cuts off."""
    values = np.array([1.0 + k / 16 * 2.0**-7 for k in range(16)] + [-1.0 - 3 / 16 * 2.0**-7], np.float32)
    n = 64
    p = [np.tile(values, n), np.repeat(values, n)]
    total, seeds = np.zeros(values.size), range(40)
    for seed in seeds:
        s = [np.zeros(x.shape, BF16) for x in p]
        ops.ema_update_(s, p, 0.0, rounding="stochastic", seed=seed)
        total += wide(s[0]).reshape(n, -1).sum(axis=0) + wide(s[1]).reshape(-1, n).sum(axis=1)
    count = 2 * n * len(seeds)
    assert np.abs(total / count - values).max() <= tolerance.rounding_mean(2.0**-7, count)
    assert total[0] == count, "what needs no rounding is exact"


@needs_bfloat16
def test_seeds_tensors_and_elements_draw_apart(ops: ModuleType) -> None:
    def draw(seed: int) -> list[Any]:
        s = [np.zeros(999, BF16) for _ in range(2)]
        ops.ema_update_(s, [np.full(999, 1.0 + 2.0**-8, np.float32)] * 2, 0.0, rounding="stochastic", seed=seed)
        return [bits(x) for x in s]

    first, again, other = draw(1), draw(1), draw(2**64 - 1)
    np.testing.assert_array_equal(first, again)
    for a, b in ((first[0], first[1]), (first[0], other[0]), (first[0], np.roll(first[0], 16))):
        # A fair coin an element: 5 standard deviations.
        assert abs(int((a == b).sum()) - 500) < tolerance.COINS


@needs_bfloat16
def test_bfloat16_shadow_arrives(ops: ModuleType) -> None:
    """Peers' bfloat16 shadows stand still: 0.5 towards 1 at decay 0.9999 is 0.5 for ever; exact after 20000 steps is 0.9323."""
    n = 1024
    s, p = [np.full(n, 0.5, BF16)], [np.ones(n, np.float32)]
    for step in range(20_000):
        ops.ema_update_(s, p, 0.9999, rounding="stochastic", seed=step)
    exact = 1.0 - 0.5 * 0.9999**20_000
    assert exact == pytest.approx(0.9323, abs=tolerance.printed(4))
    assert abs(wide(s[0]).mean() - exact) < tolerance.long_average(2.0**-8, n)


@needs_bfloat16
def test_bfloat16_shadows_refuse_rounding_to_nearest(ops: ModuleType) -> None:
    s = [np.zeros(3, np.float32), np.full(3, 0.5, BF16)]
    p = [np.ones(3, np.float32)] * 2
    with pytest.raises(TypeError, match=r"^shadows\[1\] must be of dtype .*rounding='stochastic', got bfloat16$"):
        ops.ema_update_(s, p, 0.5)
    assert (wide(s[0]) == 0).all()


@needs_bfloat16
def test_stochastic_rounding_leaves_wide_shadows_to_round_to_nearest(ops: ModuleType) -> None:
    rng = np.random.default_rng(8)
    plain, random = ([numbers(np.random.default_rng(9), (77,), F32)] for _ in range(2))
    p = [numbers(rng, (77,), F32)]
    ops.ema_update_(plain, p, 0.9)
    ops.ema_update_(random, p, 0.9, rounding="stochastic", seed=3)
    assert_same_bits(random[0], plain[0])


# --- steps against the oracle ----------------------------------------------------------------------------------------------------

GRADIENT_DTYPES = [(F64, F64), (F32, F32), *((F32, half) for half in HALVES)]
GRADIENT_IDS = [f"{p.name}-{g.name}" for p, g in GRADIENT_DTYPES]
unit_or_zero = st.sampled_from([0.0, 0.3, 0.9])


def copies(*lists: list[Any]) -> list[list[Any]]:
    return [[x.copy() for x in items] for items in lists]


def averages(ema: list[Any], old: list[Any], p: list[Any], bounds: list[Any], w: float, want: list[Any]) -> None:
    """Shadows of new parameters that are themselves off by `bounds`."""
    for got, exact, s, parameter, bound in zip(ema, want, old, p, bounds, strict=True):
        assert_within(got, exact, tolerance.lerp(wide(s), wide(parameter), got.dtype) + w * bound)


@pytest.mark.parametrize(("param", "gradient"), GRADIENT_DTYPES, ids=GRADIENT_IDS)
@given(
    drawn=sets(4),
    momentum=unit_or_zero,
    dampening=unit_or_zero,
    decay=st.sampled_from([0.0, 0.1]),
    form=st.sampled_from(["plain", "momentum", "nesterov", "accumulate", "accumulate and move"]),
    ema=st.booleans(),
    zero=st.booleans(),
)
@in_fixture
def test_sgd_within_the_bound_of_the_oracle(
    ops: ModuleType,
    param: Any,
    gradient: Any,
    drawn: Set,
    momentum: float,
    dampening: float,
    decay: float,
    form: str,
    ema: bool,
    zero: bool,
) -> None:
    lr, i = 0.3, {"accumulate": 1, "accumulate and move": 2}.get(form)
    p, g, m, s = lists_of(drawn, param, gradient, param, param)
    options: dict[str, Any] = {"lr": lr, "weight_decay": decay, "nesterov": form == "nesterov", "zero_grad": zero}
    if form != "plain":
        options |= {"momentum": momentum, "dampening": 0.0 if form == "nesterov" else dampening}
    if i is not None:
        options["accumulate"] = (i, 3)
    if ema:
        options["ema_decay"] = 0.9
    old = copies(p, g, m, s)

    def call(function: Callable[..., None], *lists: list[Any]) -> None:
        buffers = None if form == "plain" else lists[2]
        function(lists[0], lists[1], buffers, ema=lists[3] if ema else None, **options)

    want = copies(p, g, m, s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_backend", reference)
        call(module.sgd_step_, *want)
    call(ops.sgd_step_, p, g, m, s)
    keep, gain = (momentum if i is None else 1.0), (1.0 - options.get("dampening", 0.0)) / (1 if i is None else 3)
    p_bounds = []
    for k, (p0, g0, m0) in enumerate(zip(*old[:3], strict=True)):
        mg = magnitude(g0) + decay * magnitude(p0)
        mm = keep * magnitude(m0) + gain * mg
        move = mg if form == "plain" else mg + momentum * mm if form == "nesterov" else mm
        bound = tolerance.step(magnitude(p0) + lr * move, tolerance.SGD, param)
        p_bounds.append(bound)
        assert_within(p[k], want[0][k], bound)
        assert_within(m[k], want[2][k], tolerance.step(mm, tolerance.SGD, param))
        if zero:
            assert not bits(g[k]).any()
        else:
            assert_same_bits(g[k], g0)
        if form == "accumulate":
            assert_same_bits(p[k], p0)
        if form == "plain":
            assert_same_bits(m[k], m0)
    if ema and form != "accumulate":
        averages(s, old[3], p, p_bounds, 1.0 - 0.9, want[3])
    else:
        assert snapshot(s) == snapshot(old[3])


def adam_bounds(p: Any, g: Any, m: Any, v: Any, options: dict[str, Any], dtype: Any) -> tuple[Any, Any, Any]:
    """Bounds of p, m and v after a step from these."""
    p, g, m, v = (magnitude(x) for x in (p, g, m, v))
    b1, b2 = options["betas"]
    g = g + (0.0 if options["decoupled"] else options["weight_decay"]) * p
    first = m + (1 - b1) * (g + m)
    second = b2 * v + (1 - b2) * g * g
    return first, second, p


@pytest.mark.parametrize(("param", "gradient"), GRADIENT_DTYPES, ids=GRADIENT_IDS)
@given(
    drawn=sets(5),
    step=st.sampled_from([1, 2, 1000]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.4, 0.5)]),
    decay=st.sampled_from([0.0, 0.1]),
    decoupled=st.booleans(),
    ema=st.booleans(),
    zero=st.booleans(),
)
@in_fixture
def test_adamw_within_the_bound_of_the_oracle(
    ops: ModuleType,
    param: Any,
    gradient: Any,
    drawn: Set,
    step: int,
    betas: tuple[float, float],
    decay: float,
    decoupled: bool,
    ema: bool,
    zero: bool,
) -> None:
    lists = lists_of(drawn, param, gradient, param, param, param)
    lists[3] = positive(lists[3])
    options: dict[str, Any] = {
        "step": step,
        "lr": 0.01,
        "betas": betas,
        "eps": 1e-4,
        "weight_decay": decay,
        "decoupled": decoupled,
        "zero_grad": zero,
    }
    if ema:
        options["ema_decay"] = 0.25
    old, want = copies(*lists), copies(*lists)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_backend", reference)
        module.adamw_step_(*want[:4], ema=want[4] if ema else None, **options)
    ops.adamw_step_(*lists[:4], ema=lists[4] if ema else None, **options)
    p_bounds = []
    for k, (p0, g0, m0, v0) in enumerate(zip(*old[:4], strict=True)):
        first, second, size = adam_bounds(p0, g0, m0, v0, options, param)
        assert_within(lists[2][k], want[2][k], tolerance.step(first, tolerance.ADAM, param))
        assert_within(lists[3][k], want[3][k], tolerance.step(second, tolerance.ADAM, param))
        # With l2 the gradient may cancel and its square with it: the root is then off by what the sum of magnitudes allows.
        root = np.sqrt(wide(want[3][k]) / (1 - betas[1] ** step))
        slack = 0.0
        if not decoupled and decay:
            off = tolerance.step(second, tolerance.ADAM, param) / (1 - betas[1] ** step)
            slack = np.minimum(np.sqrt(off), off / np.where(root > 0, root, np.inf)) / (root + 1e-4)
        update = 0.01 / (1 - betas[0] ** step) * first / (root + 1e-4)
        bound = tolerance.step(size + update, tolerance.ADAM, param) + slack * update
        p_bounds.append(bound)
        assert_within(lists[0][k], want[0][k], bound)
        if zero:
            assert not bits(lists[1][k]).any()
        else:
            assert_same_bits(lists[1][k], g0)
    if ema:
        averages(lists[4], old[4], lists[0], p_bounds, 0.75, want[4])


@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
@given(drawn=sets(2), alpha=st.sampled_from([0.0, 0.5, 0.8, 1.0]) | st.floats(0, 1))
@in_fixture
def test_lookahead_within_two_eps_of_the_oracle(ops: ModuleType, dtype: Any, drawn: Set, alpha: float) -> None:
    slow, fast = lists_of(drawn, dtype, dtype)
    old, want = copies(slow, fast), copies(slow, fast)
    reference.lookahead_sync(*want, alpha)
    ops.lookahead_sync_(slow, fast, alpha)
    for k, (q, p) in enumerate(zip(*old, strict=True)):
        assert_within(slow[k], want[0][k], tolerance.lerp(q, p, dtype))
        assert_same_bits(fast[k], slow[k])
        if alpha in (0.0, 1.0):
            assert_same_bits(slow[k], p if alpha else q)


@pytest.mark.parametrize(("param", "gradient"), GRADIENT_DTYPES, ids=GRADIENT_IDS)
@given(drawn=sets(2), lr=st.sampled_from([0.0, 0.01, 1.0, 7.0]))
@in_fixture
def test_exponentiated_gradient_within_the_bound_of_the_oracle(
    ops: ModuleType, param: Any, gradient: Any, drawn: Set, lr: float
) -> None:
    p, g = lists_of(drawn, param, gradient)
    old, want = copies(p), copies(p)
    reference.eg_step(want[0], g, lr)
    ops.eg_step_(p, g, lr=lr)
    for k, before in enumerate(old[0]):
        assert_within(p[k], want[0][k], tolerance.exponential(wide(want[0][k]), lr * wide(g[k]), param))
        np.testing.assert_array_equal(np.signbit(p[k]), np.signbit(before))
        if lr == 0.0:
            assert_same_bits(p[k], before)


@pytest.mark.parametrize(("param", "gradient"), GRADIENT_DTYPES, ids=GRADIENT_IDS)
@given(drawn=sets(5), rate=st.sampled_from([0.0, 0.01, 0.5]), tight=st.booleans())
@in_fixture
def test_adaptive_gradient_within_the_bound_of_the_oracle(
    ops: ModuleType, param: Any, gradient: Any, drawn: Set, rate: float, tight: bool
) -> None:
    lists = lists_of(drawn, param, gradient, param, param, param)
    lists[4] = positive(lists[4])
    options: dict[str, Any] = {"lr": 0.1, "beta": 0.8, "mu": 0.7, "gain_lr": rate, "scale_lr": rate}
    if tight:
        options |= {"gain_bounds": (0.5, 1.0), "scale_bounds": (0.99, 1.001)}
    scales, wanted = np.ones(len(drawn.shapes)), np.ones(len(drawn.shapes))
    old, want = copies(*lists), copies(*lists)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_backend", reference)
        module.adaptive_eg_step_(*want, wanted, **options)
    ops.adaptive_eg_step_(*lists, scales, **options)
    # Sums of some dozens of exact products in double, in another order.
    np.testing.assert_allclose(scales, wanted, rtol=tolerance.DOUBLE)
    for k, (p, g, m, h, _) in enumerate(zip(*old, strict=True)):
        sizes = [magnitude(x) for x in (p, g, m, h)]
        gain = magnitude(want[4][k])
        first = 0.8 * sizes[2] + 0.2 * sizes[1]
        velocity = 0.7 * sizes[3] + 0.1 * gain * sizes[1]
        for role, size in ((4, gain), (2, first), (3, velocity), (0, sizes[0] + wanted[k] * velocity)):
            assert_within(lists[role][k], want[role][k], tolerance.step(size, tolerance.ADAPTIVE, param))


@pytest.mark.parametrize("values", [(1.0, -2.0), (np.nan, np.inf), (0.0, -0.0)])
def test_adaptive_gradient_of_special_values(ops: ModuleType, values: tuple[float, float]) -> None:
    """Signs of zeros, infinities and nan move the gains as the oracle has them; an angle that is none keeps the scale."""
    grid = np.array([(a, b) for a in (*values, 1.0) for b in (*values, np.inf, -np.inf, 0.0)])
    g, m = grid.T.copy()
    lists = [np.ones(len(g)), g, m, np.zeros(len(g)), np.ones(len(g))]
    want, scales, wanted = [x.copy() for x in lists], np.ones(1), np.ones(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_backend", reference)
        module.adaptive_eg_step_(*([x] for x in want), wanted, lr=0.1)
    ops.adaptive_eg_step_(*([x] for x in lists), scales, lr=0.1)
    assert scales[0] == wanted[0] == 1.0
    for got, exact in zip(lists, want, strict=True):
        np.testing.assert_allclose(got, exact, rtol=tolerance.DOUBLE)


@pytest.mark.parametrize("state", ["frozen", "decay"])
@pytest.mark.parametrize("given_rows", [True, False])
@pytest.mark.parametrize(("param", "gradient"), GRADIENT_DTYPES, ids=GRADIENT_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lazy_rows_are_adamw_on_the_live_rows(
    ops: ModuleType, state: str, given_rows: bool, param: Any, gradient: Any, layout: str
) -> None:
    rng = np.random.default_rng(11)
    shapes = [(40, 3), (7,), (5, 2, 3), (6, 0), (0, 4)]
    tables = [[laid(numbers(rng, shape, param), layout) for shape in shapes] for _ in range(3)]
    tables[2] = positive(tables[2])
    live = [rng.permutation(shape[0])[: shape[0] // 2] for shape in shapes]
    full = [np.zeros(shape, gradient) for shape in shapes]
    for g, rows in zip(full, live, strict=True):
        g[rows] = numbers(rng, g[rows].shape, gradient)
    grads = [laid(g[rows] if given_rows else g, layout) for g, rows in zip(full, live, strict=True)]
    dense, old = copies(*tables), copies(*tables)
    options: dict[str, Any] = {"step": 3, "lr": 0.1, "weight_decay": 0.2, "eps": 1e-4}
    index = [rows.astype(np.int32) for rows in live] if given_rows else None
    ops.lazy_adamw_rows_(*tables[:1], grads, *tables[1:], index, state=state, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_backend", reference)
        module.adamw_step_(dense[0], full, *dense[1:], **options)
    for k, rows in enumerate(live):
        # A row without elements has no gradient other than 0.
        moved = np.zeros(len(old[0][k]), bool)
        moved[rows] = True
        size = [magnitude(x[k]) for x in old]
        bounds = [
            tolerance.step(size[0] + 1000.0 * (size[1] + magnitude(full[k])), tolerance.ADAM, param),
            tolerance.step(size[1] + magnitude(full[k]), tolerance.ADAM, param),
            tolerance.step(size[2] + magnitude(full[k]) ** 2, tolerance.ADAM, param),
        ]
        for role, bound in enumerate(bounds):
            assert_within(tables[role][k][moved], dense[role][k][moved], bound[moved])
            if role == 0 or state == "frozen":
                assert_same_bits(tables[role][k][~moved], old[role][k][~moved])
            else:
                assert_within(tables[role][k][~moved], dense[role][k][~moved], bound[~moved])


def test_a_row_is_live_by_its_gradient(ops: ModuleType) -> None:
    """-0 is no gradient, nan is one."""
    p, m, v = ([np.ones((4, 2))] for _ in range(3))
    g = np.array([[0.0, -0.0], [0.0, 1e-300], [np.nan, 0.0], [0.0, 0.0]])
    ops.lazy_adamw_rows_(p, [g], m, v, step=1, lr=0.5)
    assert (p[0][[0, 3]] == 1).all()
    assert (m[0][[0, 3]] == 1).all()
    assert (p[0][1] != 1).all()
    assert np.isnan(p[0][2, 0])
    assert np.isfinite(p[0][2, 1])


@pytest.mark.parametrize("name", FLOATS)
def test_all_finite_sees_every_place(backend: ModuleType, target: str, name: str) -> None:
    dtype = FLOATS[name]
    largest = bits(np.array(np.inf, dtype)) - np.uint16(1)
    x = np.full(1000, largest, bits(np.zeros((), dtype)).dtype).view(dtype)
    assert backend.all_finite([x, -x, np.zeros((0,), dtype), np.zeros((), dtype), x.reshape(10, 100)[::2].T])
    for place in (0, 1, 15, 500, 998, 999):
        for value in (np.inf, -np.inf, np.nan):
            odd = x.copy()
            odd[place] = value
            assert not backend.all_finite([x, odd])
            assert not backend.all_finite([x, laid(odd.reshape(10, 100), "Fortran")])
    assert backend.all_finite([])


# --- the same bits -------------------------------------------------------------------------------------------------------------


def every_call(ops: ModuleType, sizes: list[Any], seed: int, layout: str = "C") -> list[Any]:
    """Results of every function on tensors of these shapes, laid out in this way."""
    rng = np.random.default_rng(seed)

    def make(dtype: Any = F32) -> list[Any]:
        return [laid(numbers(rng, shape, dtype), layout) for shape in sizes]

    half = HALVES[-1]
    results: list[list[Any]] = []
    for decay in (0.9, 0.2):
        for shadow, param in ((F32, F32), (F32, half), (F64, F32), (F32, F64)):
            s = make(shadow)
            ops.ema_update_(s, make(param), decay)
            results.append(s)
    if BF16 is not None:
        s = make(BF16)
        ops.ema_update_(s, make(), 0.9, rounding="stochastic", seed=5)
        results.append(s)
    for gradient in (F32, half):
        p, g, m, s = make(), make(gradient), make(), make()
        ops.sgd_step_(p, g, m, lr=0.1, momentum=0.9, weight_decay=0.1, ema=s, ema_decay=0.9, zero_grad=True)
        results += [p, g, m, s]
        p, g, m, v, s = make(), make(gradient), make(), positive(make()), make()
        ops.adamw_step_(p, g, m, v, step=3, lr=0.1, ema=s, ema_decay=0.9, zero_grad=True)
        results += [p, g, m, v, s]
    q, p = make(), make()
    ops.lookahead_sync_(q, p)
    results += [q, p]
    p = make()
    ops.eg_step_(p, make(), lr=0.1)
    results.append(p)
    lists, scales = [make() for _ in range(5)], np.ones(len(sizes))
    ops.adaptive_eg_step_(*lists, scales, lr=0.1, scale_lr=0.5)
    results += [*lists, [scales]]
    rows = [n for n, shape in enumerate(sizes) if len(shape)]
    tables = [[x for n, x in enumerate(make()) if n in rows] for _ in range(4)]
    for table in tables[1]:
        table[::3] = 0
    ops.lazy_adamw_rows_(tables[0], tables[1], tables[2], positive(tables[3]), step=3, lr=0.1, state="decay")
    return [*results, *tables]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strided_tensors_give_the_bits_of_contiguous_ones(ops: ModuleType, layout: str) -> None:
    shapes = [(3, 5), (), (0, 2), (67,), (2, 3, 7), (90, 31), (130, 270)]
    want, got = every_call(ops, shapes, 12), every_call(ops, shapes, 12, layout)
    for one, other in zip(want, got, strict=True):
        for x, y in zip(one, other, strict=True):
            assert_same_bits(y, x)


def test_broadcast_inputs_equal_their_copies(ops: ModuleType) -> None:
    rng = np.random.default_rng(13)
    row = numbers(rng, (9,), F32)
    for view in (np.broadcast_to(row, (5, 9)), np.broadcast_to(row[0], (5, 9)), np.broadcast_to(row[:5, None], (5, 9))):
        s, t = copies([numbers(rng, (5, 9), F32)], [np.zeros((5, 9), np.float32)])
        t = copies(s)[0]
        ops.ema_update_(s, [view], 0.9)
        ops.ema_update_(t, [view.copy()], 0.9)
        assert_same_bits(s[0], t[0])
        lists, others = copies(*[[numbers(rng, (5, 9), F32)] for _ in range(2)]), []
        others = copies(*lists)
        ops.sgd_step_(lists[0], [view], lists[1], lr=0.1, momentum=0.9)
        ops.sgd_step_(others[0], [view.copy()], others[1], lr=0.1, momentum=0.9)
        assert_same_bits(lists[0][0], others[0][0])


SHAPES_FOR_THREADS = [(300_007,), (5,), (0,), (), (211, 333), (70_001,), *[(100 + k,) for k in range(50)]]


def test_bits_do_not_depend_on_the_number_of_threads(native_ops: ModuleType) -> None:
    results = []
    for threads in (1, 2, 5):
        fastops.set_num_threads(threads)
        results.append(every_call(native_ops, SHAPES_FOR_THREADS, 14))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            for one, two in zip(x, y, strict=True):
                assert_same_bits(two, one)


def test_levels_with_fma_give_equal_bits(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import TARGETS

    from fastops import _core

    levels = [name for name, why in TARGETS.items() if why is None and name != "v2"]
    if len(levels) < 2:
        pytest.skip(f"one level with FMA runs here: {levels}")
    monkeypatch.setattr(module, "_backend", native)
    before, results = _core.get_target(), []
    try:
        for level in levels:
            _core.set_target(level)
            results.append(every_call(module, SHAPES_FOR_THREADS, 15))
    finally:
        _core.set_target(before)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            for one, two in zip(x, y, strict=True):
                assert_same_bits(two, one)


# --- lists ---------------------------------------------------------------------------------------------------------------------


def test_empty_lists_and_tensors_do_nothing(ops: ModuleType) -> None:
    ops.ema_update_([], [], 0.5)
    ops.sgd_step_([], [], None, lr=0.1)
    ops.adamw_step_([], [], [], [], step=1, lr=0.1)
    ops.lookahead_sync_([], [])
    ops.eg_step_([], [], lr=0.1)
    ops.adaptive_eg_step_([], [], [], [], [], np.ones(0), lr=0.1)
    ops.lazy_adamw_rows_([], [], [], [], step=1, lr=0.1)
    ops.lazy_adamw_rows_([], [], [], [], [], step=1, lr=0.1)
    s = [np.zeros((0,), np.float32), np.zeros((3, 0), np.float32), np.zeros((), np.float32)]
    ops.ema_update_(s, [np.ones(x.shape, np.float32) for x in s], 0.5)
    assert s[2] == 0.5
    ops.ema_update_([], [], [])


def test_any_iterable_and_a_single_array_are_lists(ops: ModuleType) -> None:
    s, p = [np.zeros(2, np.float32), np.zeros(3, np.float32)], [np.ones(2, np.float32), np.ones(3, np.float32)]
    forms: list[Callable[[list[Any]], Any]] = [
        list,
        tuple,
        iter,
        lambda x: (y for y in x),
        lambda x: dict(enumerate(x)).values(),
        fastops.TensorList,
    ]
    for form in forms:
        ops.ema_update_(form(s), form(p), 0.5)
    for x in s:
        np.testing.assert_array_equal(x, 1 - 0.5 ** len(forms))
    table, step = np.zeros((2, 2)), np.ones((2, 2))
    ops.ema_update_(table, step, 0.5)
    ops.ema_update_(table, step, [0.5])
    ops.ema_update_(table, step, np.array(0.5))
    np.testing.assert_array_equal(table, 0.875)
    p, g, m, v = (iter([np.ones(3)]) for _ in range(4))
    ops.adamw_step_(p, g, m, v, step=1, lr=0.1)


class Buffer:
    """An array of another library: it has the buffer protocol's or DLPack's way in, and nothing else."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Immutable:
    """As arrays of jax: memory that may be read."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.array


def test_arrays_of_other_libraries(ops: ModuleType) -> None:
    import array

    values = np.zeros(4, np.float32)
    own = array.array("f", [0.0] * 4)
    ops.ema_update_(
        [memoryview(values), Buffer(np.zeros(4, np.float32)), own], [Immutable(np.ones(4, np.float32))] * 3, 0.5
    )
    assert (values == 0.5).all()
    assert list(own) == [0.5] * 4

    class Sub(np.ndarray):
        pass

    sub = np.zeros(4, np.float32).view(Sub)
    ops.ema_update_([sub], [np.ones(4, np.float32)], 0.5)
    assert (np.asarray(sub) == 0.5).all()
    with pytest.raises(ValueError, match=r"^shadows\[0\] must be writable"):
        ops.ema_update_([Immutable(np.zeros(4, np.float32))], [np.ones(4, np.float32)], 0.5)


def test_no_memory_beside_the_tensors(ops: ModuleType, backend: ModuleType) -> None:
    """Peers cast the parameters to a copy of their own."""
    if backend is reference:
        pytest.skip("the reference computes on copies")
    n = 1 << 20
    s, p = [np.zeros(n, np.float32)], [np.ones(n, HALVES[-1])]
    m, v = [np.zeros(n, np.float32)], [np.zeros(n, np.float32)]
    ops.ema_update_(s, p, 0.9)
    ops.adamw_step_(s, p, m, v, step=1, lr=0.1, zero_grad=True)
    tracemalloc.start()
    try:
        ops.ema_update_(s, p, 0.9)
        ops.ema_update_([s[0][::-1]], p, 0.9)
        ops.adamw_step_(s, p, m, v, step=1, lr=0.1, zero_grad=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < n


# --- TensorList ----------------------------------------------------------------------------------------------------------------


def test_tensor_list_is_a_sequence() -> None:
    arrays = [np.zeros(3, np.float32), np.ones((2, 2))]
    plan = fastops.TensorList(arrays)
    assert len(plan) == 2
    assert plan[0] is arrays[0]
    assert list(plan)[1] is arrays[1]
    assert repr(plan) == "<fastops.TensorList of 2 arrays>"
    arrays.append(np.zeros(1))
    assert len(plan) == 2, "the list is fixed"


def test_tensor_list_gives_the_same_bits(ops: ModuleType) -> None:
    rng = np.random.default_rng(16)
    s, p = ([numbers(rng, (n,), F32) for n in (5, 0, 300)] for _ in range(2))
    want = copies(s)[0]
    plan, params = fastops.TensorList(s), fastops.TensorList(p)
    for _ in range(3):
        ops.ema_update_(plan, params, 0.9)
        ops.ema_update_(want, p, 0.9)
        p[0] += 1  # the contents are read anew
    for x, y in zip(s, want, strict=True):
        assert_same_bits(x, y)


def resized(array: Any, size: int) -> None:
    array.resize(size, refcheck=False)


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
def test_tensor_list_notices_what_changed(ops: ModuleType) -> None:
    """Arrays that were resized, reshaped, retyped or made read-only since the last call: never a stale pointer."""

    def fresh() -> tuple[list[Any], list[Any], Any, Any]:
        s, p = [np.zeros(1000, np.float32) for _ in range(2)], [np.ones(1000, np.float32) for _ in range(2)]
        plans = fastops.TensorList(s), fastops.TensorList(p)
        ops.ema_update_(*plans, 0.5)
        return s, p, *plans

    s, p, plan, params = fresh()
    resized(s[1], 4000)
    with pytest.raises(ValueError, match=r"^shadows\[1\] must be of shape \(1000,\).*got \(4000,\)$"):
        ops.ema_update_(plan, params, 0.5)
    assert (s[0] == 0.5).all()
    resized(p[1], 4000)
    ops.ema_update_(plan, params, 0.0)
    np.testing.assert_array_equal(s[1], p[1])

    s, p, plan, params = fresh()
    for array in (s[0], p[0]):
        resized(array, 1 << 20)  # moves
    s[0][:], p[0][:] = 0, 2
    ops.ema_update_(plan, params, 0.5)
    assert (s[0] == 1).all()

    s, p, plan, params = fresh()
    s[1].flags.writeable = False
    with pytest.raises(ValueError, match=r"^shadows\[1\] must be writable"):
        ops.ema_update_(plan, params, 0.5)
    assert (s[0] == 0.5).all()

    s, p, plan, params = fresh()
    s[0].shape = (10, 100)
    with pytest.raises(ValueError, match=r"^shadows\[0\] must be of shape"):
        ops.ema_update_(plan, params, 0.5)


def test_lists_that_change_between_calls(ops: ModuleType) -> None:
    """Plain lists at old addresses: other tensors, other overlaps."""
    base = np.zeros(2000, np.float32)
    s, p = [base[:1000]], [np.ones(1000, np.float32)]
    for _ in range(3):
        ops.ema_update_(s, p, 0.5)
    with pytest.raises(ValueError, match="memory apart from"):
        ops.ema_update_(s, [base[500:1500]], 0.5)
    with pytest.raises(ValueError, match="memory apart from"):
        ops.ema_update_([base[:1000], base[:1000]], p * 2, 0.5)
    p[0] = np.full(1000, 3, np.float32)
    base[:] = 0
    ops.ema_update_(s, p, 0.5)
    assert (s[0] == 1.5).all()


def test_tensor_list_refuses_a_second_thread(ops: ModuleType) -> None:
    n = 1 << 12
    plan = fastops.TensorList([np.zeros(n, np.float32)])
    params = fastops.TensorList([np.ones(n, np.float32)])
    with _tensors.in_use(plan):
        before = plan[0].copy()
        for arguments in ((plan, params), ([np.ones(n, np.float32)], plan)):
            with pytest.raises(
                RuntimeError, match=r"^a TensorList must be used by one thread at a time, got a call during"
            ):
                ops.ema_update_(*arguments, 0.5)
        np.testing.assert_array_equal(plan[0], before)
    ops.ema_update_(plan, params, 0.5)
    assert (plan[0] == 0.5).all()
    # After an error it is free again.
    with pytest.raises(ValueError):
        ops.ema_update_(plan, [np.ones(3, np.float32)], 0.5)
    ops.ema_update_(plan, params, 0.5)


def test_tensor_list_in_many_threads_is_right_or_refused(native_ops: ModuleType) -> None:
    n, rounds = 400_000, 60
    plan = fastops.TensorList([np.zeros(n, np.float32)])
    params = fastops.TensorList([np.ones(n, np.float32)])
    done, refused, wrong = [], [], []
    start = threading.Barrier(4)

    def use() -> None:
        start.wait()
        for _ in range(rounds):
            try:
                native_ops.ema_update_(plan, params, 0.5)
                done.append(1)
            except RuntimeError as error:
                refused.append(error)
            except BaseException as error:  # noqa: BLE001
                wrong.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(done) + len(refused) == 4 * rounds
    assert done
    expected = np.zeros(1, np.float32)
    for _ in done:
        reference.ema_update(([expected],), [np.ones(1, np.float32)], (0.5,), None)
    np.testing.assert_array_equal(plan[0], expected[0])


def test_one_tensor_list_may_stand_twice_in_a_call(ops: ModuleType) -> None:
    plan = fastops.TensorList([np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match="memory apart from"):
        ops.ema_update_(plan, plan, 0.5)
    g = fastops.TensorList([np.ones(3, np.float32)])
    ops.adamw_step_(fastops.TensorList([np.ones(3, np.float32)]), g, plan, [np.zeros(3, np.float32)], step=1, lr=0.1)


# --- all or nothing --------------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What is wrong with tensor i: a change of the lists, the error, the argument that it names and what it says."""

    spoil: Callable[[dict[str, list[Any]], int], None]
    kind: type[Exception]
    name: str
    text: str


def _put(role: str, make: Callable[[dict[str, list[Any]], int], Any]) -> Callable[[dict[str, list[Any]], int], None]:
    def spoil(lists: dict[str, list[Any]], i: int) -> None:
        lists[role][i] = make(lists, i)

    return spoil


def _frozen(x: Any) -> Any:
    x.flags.writeable = False
    return x


def _folded(x: Any) -> Any:
    return np.lib.stride_tricks.as_strided(np.zeros(x.size, x.dtype), x.shape, (0,) * x.ndim)


def _shifted(x: Any, like: Any) -> Any:
    """Another array that shares all but one element with x."""
    base = np.zeros(x.size + 1, x.dtype)
    base[:-1] = x.reshape(-1)
    like[...] = x
    return base


def _partly_over(first: str, second: str) -> Callable[[dict[str, list[Any]], int], None]:
    def spoil(lists: dict[str, list[Any]], i: int) -> None:
        x = lists[first][i]
        base = np.ones(x.size + 1, x.dtype)
        lists[first][i], lists[second][i] = base[:-1].reshape(x.shape), base[1:].reshape(x.shape)

    return spoil


def faults(written: str, read: str, first: str = "") -> dict[str, Fault]:
    """Faults of two roles of a call; a fault between the two may name either where `first` is the call's first list."""
    w, r = written, read
    # The first list decides what the shapes should be.
    shaped = "" if first == w else w
    apart = "" if first == r else w
    return {
        "integers": Fault(_put(w, lambda x, i: x[w][i].astype(np.int32)), TypeError, w, "int32"),
        "float16 state": Fault(_put(w, lambda x, i: x[w][i].astype(np.float16)), TypeError, w, "float16"),
        "complex input": Fault(_put(r, lambda x, i: x[r][i].astype(complex)), TypeError, r, "complex128"),
        "byte order": Fault(_put(w, lambda x, i: x[w][i].astype(">f4")), TypeError, w, ">f4"),
        "input byte order": Fault(_put(r, lambda x, i: x[r][i].astype(">f4")), TypeError, r, ">f4"),
        "shape": Fault(_put(w, lambda x, i: np.zeros(x[w][i].size + 1, np.float32)), ValueError, shaped, "of shape"),
        "input to broadcast": Fault(_put(r, lambda x, i: np.ones(1, np.float32)), ValueError, "", "of shape"),
        "dimensions": Fault(_put(w, lambda x, i: x[w][i][None]), ValueError, shaped, "of shape"),
        "read-only": Fault(_put(w, lambda x, i: _frozen(x[w][i].copy())), ValueError, w, "a read-only array"),
        "folded": Fault(_put(w, lambda x, i: _folded(x[w][i])), ValueError, w, "overlapping strides"),
        "the other": Fault(_put(w, lambda x, i: x[r][i]), ValueError, apart, "apart from "),
        "part of the other": Fault(_partly_over(w, r), ValueError, apart, "apart from "),
        "twice": Fault(_put(w, lambda x, i: x[w][i - 1]), ValueError, w, f"apart from {w}["),
        "reversed": Fault(_put(w, lambda x, i: x[r][i][::-1]), ValueError, apart, "apart from "),
        "a number": Fault(_put(w, lambda x, i: 1.0), TypeError, w, "1.0"),
        "None": Fault(_put(w, lambda x, i: None), TypeError, w, "None"),
        "a list": Fault(_put(r, lambda x, i: [1.0, 2.0]), TypeError, r, "an object of type list"),
        "objects": Fault(_put(w, lambda x, i: x[w][i].astype(object)), TypeError, w, "object"),
        "masked": Fault(_put(w, lambda x, i: np.ma.masked_array(x[w][i])), TypeError, w, "a masked array"),
    }


N = 5
CALLS: dict[str, tuple[tuple[str, ...], Callable[..., None], dict[str, Fault]]] = {
    "ema": (
        ("shadows", "params"),
        lambda ops, x: ops.ema_update_(x["shadows"], x["params"], 0.5),
        faults("shadows", "params"),
    ),
    "sgd": (
        ("params", "grads", "momentum_buffers", "ema"),
        lambda ops, x: ops.sgd_step_(
            x["params"], x["grads"], x["momentum_buffers"], lr=0.1, momentum=0.9, ema=x["ema"], ema_decay=0.9
        ),
        faults("momentum_buffers", "grads"),
    ),
    "adamw": (
        ("params", "grads", "exp_avg", "exp_avg_sq", "ema"),
        lambda ops, x: ops.adamw_step_(
            x["params"], x["grads"], x["exp_avg"], x["exp_avg_sq"], step=1, lr=0.1, ema=x["ema"], ema_decay=0.9
        ),
        faults("ema", "grads"),
    ),
    "lookahead": (
        ("slow", "fast"),
        lambda ops, x: ops.lookahead_sync_(x["slow"], x["fast"]),
        {k: f for k, f in faults("fast", "slow", "slow").items() if k not in ("complex input", "input byte order")},
    ),
    "eg": (
        ("params", "grads"),
        lambda ops, x: ops.eg_step_(x["params"], x["grads"], lr=0.1),
        faults("params", "grads", "params"),
    ),
    "adaptive": (
        ("params", "grads", "momentum", "update", "gain"),
        lambda ops, x: ops.adaptive_eg_step_(*x.values(), np.ones(N), lr=0.1),
        faults("gain", "grads"),
    ),
    "lazy": (
        ("params", "grads", "exp_avg", "exp_avg_sq"),
        lambda ops, x: ops.lazy_adamw_rows_(*x.values(), step=1, lr=0.1),
        faults("exp_avg_sq", "grads"),
    ),
}


@pytest.mark.parametrize("i", [0, 2, N - 1])
@pytest.mark.parametrize(("call", "fault"), [(c, f) for c, (_, _, found) in CALLS.items() for f in found])
def test_a_fault_in_one_tensor_leaves_all_untouched(ops: ModuleType, call: str, fault: str, i: int) -> None:
    names, function, found = CALLS[call]
    spoil, kind, name, text = found[fault]
    lists = {role: [np.full(7 + k, 1.5 + r, np.float32) for k in range(N)] for r, role in enumerate(names)}
    function(ops, {role: [x.copy() for x in items] for role, items in lists.items()})  # the call itself is right
    if fault == "twice":
        for items in lists.values():
            items[i - 1] = np.full(7 + i, 1.5, np.float32)
    spoil(lists, i)
    everything = [x for items in lists.values() for x in items if isinstance(x, np.ndarray)]
    before = [x.tobytes() for x in everything]
    with pytest.raises(kind) as caught:
        function(ops, lists)
    assert [x.tobytes() for x in everything] == before
    message = str(caught.value)
    assert message.startswith(f"{name}[" if name else names), message
    assert any(f"[{k}] must be " in message for k in (i, (i - 1) % N if fault == "twice" else i)), message
    assert text in message, message
    assert " must be " in message
    assert ", got " in message, message
    assert len(message) < 200


@pytest.mark.parametrize("call", CALLS)
def test_lists_of_different_lengths(ops: ModuleType, call: str) -> None:
    names, function, _ = CALLS[call]
    for short in range(len(names)):
        lists = {role: [np.ones(3, np.float32) for _ in range(N - (r == short))] for r, role in enumerate(names)}
        before = snapshot(*lists.values())
        with pytest.raises(ValueError, match="must be "):
            function(ops, lists)
        assert snapshot(*lists.values()) == before


@pytest.mark.parametrize("bad", [float("nan"), -0.1, 1.5, float("inf")])
@pytest.mark.parametrize("place", [None, 0, 2])
def test_decay_outside_its_interval(ops: ModuleType, bad: float, place: int | None) -> None:
    """Peers take 1.5 and nan, and write what comes of it."""
    s, p = [np.zeros(3, np.float32) for _ in range(3)], [np.ones(3, np.float32) for _ in range(3)]
    decay: Any = bad if place is None else [bad if k == place else 0.5 for k in range(3)]
    name = "decay" if place is None else rf"decay\[{place}\]"
    with pytest.raises(ValueError, match=rf"^{name} must be a finite number in \[0, 1\], got "):
        ops.ema_update_(s, p, decay)
    assert all((x == 0).all() for x in s)
    with pytest.raises(ValueError, match=r"^ema_decay must be a finite number in \[0, 1\], got "):
        ops.sgd_step_(s, p, None, lr=0.1, ema=copies(s)[0], ema_decay=bad)
    assert all((x == 0).all() for x in s)


def test_shadows_may_be_views_of_one_block(ops: ModuleType) -> None:
    """Spans that interleave without a common element."""
    base = np.zeros((2, 50), np.float32)
    s = [base[:, ::2], base[:, 1::2]]
    ops.ema_update_(s, [np.ones((2, 25), np.float32), np.full((2, 25), 2, np.float32)], 0.5)
    assert (s[0] == 0.5).all()
    assert (s[1] == 1).all()
    ops.ema_update_([base[0]], [base[1]], 0.5)
    with pytest.raises(ValueError, match="memory apart from"):
        ops.ema_update_([base[0]], [base[0:1, :].reshape(50)], 0.5)


def test_parameters_may_be_shared_where_only_read(ops: ModuleType) -> None:
    p = np.ones(5, np.float32)
    s = [np.zeros(5, np.float32) for _ in range(3)]
    ops.ema_update_(s, [p, p, p], 0.5)
    assert all((x == 0.5).all() for x in s)
    frozen = _frozen(np.ones(5))
    m = [np.zeros(5)]
    # An accumulating call writes the buffer alone.
    ops.sgd_step_([frozen], [frozen], m, lr=0.1, accumulate=(0, 2))
    np.testing.assert_array_equal(m[0], 0.5)


def test_dtypes_are_told_apart_however_many_there_were(ops: ModuleType) -> None:
    """Descriptors that come and go, each an object of its own."""
    p = [np.ones(6, np.float32)]
    for k in range(40):
        with pytest.raises(TypeError):
            ops.ema_update_([np.zeros(6, np.dtype([(f"field{k}", "f4")]))], p, 0.5)
        with pytest.raises(TypeError):
            ops.ema_update_([np.zeros(6, np.dtype(">f4"))], p, 0.5)
    for _ in range(200):
        s = np.zeros(6, np.dtype("f4", metadata={"unit": "m"}))
        ops.ema_update_([s], p, 0.5)
        assert (s == 0.5).all()
        del s
        s = np.zeros(6, np.dtype(">f4"))
        with pytest.raises(TypeError, match=r"^shadows\[0\] must be of dtype"):
            ops.ema_update_([s], p, 0.5)
        assert (s == 0).all()
        del s
