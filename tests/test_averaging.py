# SPDX-License-Identifier: BSD-3-Clause
"""`EMA` and `posthoc_ema_weights`: schedules, profiles, buffers, swapping, states, wrong calls, and the faults of other libraries."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from numpy.typing import NDArray
from samples import FLOATS, assert_same_bits

import fastops
from fastops import _schedules, _tensors, averaging
from fastops.averaging import EMA, posthoc_ema_weights

Array = NDArray[Any]


@pytest.fixture(autouse=True)
def _over(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs over every backend."""
    monkeypatch.setattr(averaging, "_backend", backend)


@pytest.fixture
def torch() -> ModuleType:
    return pytest.importorskip("torch", reason="torch is not installed")


def follow(ema: EMA, p: Array, values: Any) -> list[bool]:
    """Updates with the parameter set to each of the values in turn."""
    moved = []
    for value in values:
        p[...] = value
        moved.append(ema.update())
    return moved


# --- schedules -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("power", "t", "decay"),
    [
        (2 / 3, 31600, 0.998999541),
        (2 / 3, 1_000_000, 0.9999),
        (3 / 4, 10_000, 0.999000075),
        (3 / 4, 215_400, 0.999899985),
    ],
)
def test_decay_timm_printed_values(power: float, t: int, decay: float) -> None:
    ema = EMA([], 1.0, warmup="timm", power=power)
    assert abs(ema.decay_at(t + 1) - decay) <= tolerance.printed(9)
    late = EMA([], 1.0, warmup="timm", power=power, update_after_step=7)
    assert late.decay_at(t + 8) == ema.decay_at(t + 1)


def test_decay_starts_at_zero_and_stays_in_its_bounds() -> None:
    for warmup, at_3 in (("timm", 1 - (1 + 2 / 5) ** -0.5), ("tf", 3 / 12)):
        ema = EMA([], 0.9, warmup=warmup, inv_gamma=5.0, power=0.5, update_after_step=4)
        assert [ema.decay_at(step) for step in (1, 4, 5)] == [0.0, 0.0, 0.0]
        assert ema.decay_at(7) == at_3
        assert ema.decay_at(10**9) == 0.9
        assert EMA([], 0.9, warmup=warmup, min_decay=0.7).decay_at(2) == 0.7
        assert EMA([], 0.9, warmup=warmup, min_decay=0.7).decay_at(1) == 0.0


def test_decay_without_warmup_is_constant_from_the_first_update() -> None:
    assert EMA([], 0.9).decay_at(1) == 0.9
    ema = EMA([], 0.9, update_after_step=2, update_every=2)
    assert [ema.decay_at(step) for step in range(1, 7)] == [1.0, 0.0, 1.0, 0.9, 1.0, 0.9]


def test_decay_equal_counts_updates() -> None:
    ema = EMA([], "equal", update_after_step=3, update_every=2)
    assert [ema.decay_at(step) for step in range(1, 9)] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.5, 1.0, 2 / 3]


@pytest.mark.parametrize(
    ("sigma", "gamma"), [(0.05, 16.972198602303447), (0.10, 6.937203937601809), (0.075, 10.289116448983853)]
)
def test_power_exponent_of_the_paper(sigma: float, gamma: float) -> None:
    assert math.isclose(_schedules.exponent(sigma), gamma, rel_tol=tolerance.DEBIASED)
    ema = EMA([], warmup="power", sigma=sigma)
    assert ema.decay_at(1) == 0.0
    assert math.isclose(ema.decay_at(4), 0.75 ** (gamma + 1), rel_tol=tolerance.DEBIASED)


@pytest.mark.parametrize("sigma", [1e-12, 1e-6, 0.003, 0.2, 0.2886751345948129])
def test_power_exponent_inverts_the_width(sigma: float) -> None:
    g = _schedules.exponent(sigma)
    assert math.isclose(math.sqrt(g + 1) / ((g + 2) * math.sqrt(g + 3)), sigma, rel_tol=tolerance.DEBIASED)


def test_power_average_of_one_to_ten() -> None:
    p = np.zeros(1)
    ema = EMA([p], warmup="power", sigma=0.1)
    follow(ema, p, range(1, 11))
    assert abs(ema.shadows[0][0] - 9.315390399056312) <= tolerance.average(10, 10.0, p.dtype)


def test_power_uses_the_true_interval() -> None:
    """KarrasEMA of ema-pytorch takes 1 / (step + 1) for an update of 100 steps."""
    g = _schedules.exponent(0.1) + 1
    ema = EMA([], warmup="power", sigma=0.1, update_every=100)
    assert ema.decay_at(100) == 0.0
    assert math.isclose(ema.decay_at(400), 0.75**g, rel_tol=tolerance.DEBIASED)
    # A skipped update makes the next interval longer.
    p = np.zeros(1)
    ema = EMA([p], warmup="power", sigma=0.1, nonfinite="skip")
    assert follow(ema, p, [1.0, np.nan, 4.0]) == [True, False, True]
    want = 4.0 + (1 / 3) ** g * (1.0 - 4.0)
    assert abs(ema.shadows[0][0] - want) <= tolerance.average(3, 4.0, p.dtype)


def test_power_starts_after_update_after_step() -> None:
    p, q = np.zeros(1), np.zeros(1)
    late, plain = EMA([p], warmup="power", sigma=0.1, update_after_step=5), EMA([q], warmup="power", sigma=0.1)
    follow(late, p, [9.0] * 5)
    assert late.shadows[0][0] == 9.0
    follow(late, p, range(1, 11))
    follow(plain, q, range(1, 11))
    assert_same_bits(late.shadows[0], plain.shadows[0])


def test_equal_weights_are_the_mean() -> None:
    p = np.zeros(3, np.float32)
    ema = EMA([p], "equal", update_after_step=2)
    follow(ema, p, [100.0, 200.0, 1.0, 2.0, 6.0])
    np.testing.assert_allclose(ema.shadows[0], 3.0, rtol=0, atol=tolerance.average(3, 6.0, p.dtype))


def test_update_every_and_after_step() -> None:
    p = np.zeros(1)
    ema = EMA([p], 0.5, update_every=2, update_after_step=2)
    assert follow(ema, p, [1.0, 2.0, 3.0, 4.0, 5.0]) == [False, True, False, True, False]
    assert ema.shadows[0][0] == 3.0  # a copy at step 2, then halfway to 4
    assert (ema.step, ema.updates, ema.skipped) == (5, 2, 0)


def test_the_posts_formula_starts_at_the_weights() -> None:
    p = np.full(1, 2.0)
    ema = EMA([p], 0.9)
    follow(ema, p, [3.0, 4.0])
    assert abs(ema.shadows[0][0] - (0.9 * (0.9 * 2.0 + 0.1 * 3.0) + 0.1 * 4.0)) <= tolerance.average(2, 4.0, p.dtype)


def test_parameters_that_never_change_are_their_average() -> None:
    """Zero-initialised averages under TensorFlow (keras 18949), weights that do not sum to 1 (PostHocEMA)."""
    p = np.array([2.5, -1e30, 3e-39], np.float32)
    for options in ({}, {"warmup": "timm"}, {"warmup": "tf"}, {"warmup": "power", "sigma": 0.1}, {"decay": "equal"}):
        ema = EMA([p], **options)
        for _ in range(3):
            ema.update()
        assert_same_bits(ema.shadows[0], p)
    weights = posthoc_ema_weights([5, 10, 5, 10], [0.05, 0.05, 0.1, 0.1], 10, 0.075)
    assert abs(float(weights.sum()) - 1.0) <= tolerance.DEBIASED


# --- debiasing -----------------------------------------------------------------------------------------------------------------


def test_debias_vector() -> None:
    p, out = np.full(1, 2.5), np.zeros(1)
    ema = EMA([p], 0.9, debias=True)
    for _ in range(3):
        ema.update()
    assert abs(ema.shadows[0][0] - 0.6775) <= tolerance.average(3, 2.5, p.dtype)
    ema.copy_to_([out])
    assert abs(out[0] - 2.5) <= 2.5 * tolerance.DEBIASED


@pytest.mark.parametrize("dtype", FLOATS)
def test_debias_in_every_dtype(dtype: str) -> None:
    p = np.full((2, 3), 2.5, FLOATS[dtype])
    for shadow_dtype in (None, *(["bfloat16"] if "bf16" in FLOATS else [])):
        ema = EMA([p], (0.9, 0.99), debias=True, shadow_dtype=shadow_dtype)
        for _ in range(3):
            ema.update()
        for profile in (0, 1):
            with ema.average_parameters(profile):
                # Stochastic rounding moves each of the shadows by up to a unit.
                atol = 2.5 * 2.0**-6 if shadow_dtype else 2.5 * tolerance.rounding(p.dtype)
                np.testing.assert_allclose(p.astype(np.float64), 2.5, rtol=0, atol=atol)
    assert (p == 2.5).all()


def test_averages_before_the_first_update_are_the_parameters() -> None:
    """bert4keras 225: applying the averages before the first step failed."""
    for debias in (False, True):
        p, count, out = np.full(2, 1.5), np.array(3), [np.zeros(2), np.array(0)]
        ema = EMA([p, count], debias=debias, buffers="average")
        with ema.average_parameters():
            assert (p == 1.5).all()
            assert count == 3
        ema.copy_to_(out)
        assert (out[0] == 1.5).all()
        assert out[1] == 3
        ema.copy_to_()
        assert (p == 1.5).all()
    # A decay of 1 never takes anything in.
    ema = EMA([p], 1.0, debias=True)
    ema.update()
    ema.copy_to_()
    assert (p == 1.5).all()


def test_debias_after_copies_has_nothing_to_divide_by() -> None:
    p, out = np.full(1, 2.0), np.zeros(1)
    ema = EMA([p], 0.5, debias=True, update_after_step=1)
    follow(ema, p, [2.0, 4.0])
    ema.copy_to_([out])
    assert out[0] == 3.0


# --- profiles ------------------------------------------------------------------------------------------------------------------


def test_profiles_equal_single_averages_in_one_call(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(shape).astype(dtype) for shape, dtype in (((33, 5), "f4"), ((), "f8"), ((7,), "f2"))]
    decays = (0.9, "equal", 0.999)
    calls = []

    class Counting:
        all_finite = staticmethod(backend.all_finite)

        @staticmethod
        def ema_update(sets: Any, live: Any, weights: Any, seed: Any) -> None:
            calls.append(len(sets))
            backend.ema_update(sets, live, weights, seed)

    together, alone = EMA(params, decays), [EMA(params, decay) for decay in decays]
    for _ in range(4):
        for p in params:
            p[...] = rng.standard_normal(p.shape)
        monkeypatch.setattr(averaging, "_backend", Counting)
        together.update()
        monkeypatch.setattr(averaging, "_backend", backend)
        for ema in alone:
            ema.update()
    assert calls == [3] * 4
    for shadows, ema in zip(together.shadows, alone, strict=True):
        for got, want in zip(shadows, ema.shadows, strict=True):
            assert_same_bits(got, want)
    powers = EMA(params, warmup="power", sigma=[0.05, 0.1])
    assert powers.decay_at(5, 1) == EMA(params, warmup="power", sigma=0.1).decay_at(5)


def test_profiles_are_many() -> None:
    p = np.zeros(3)
    decays = [k / 20 for k in range(20)]
    ema = EMA([p], decays)
    follow(ema, p, [1.0])
    np.testing.assert_allclose(
        [shadows[0][0] for shadows in ema.shadows],
        1 - np.array(decays),
        rtol=0,
        atol=tolerance.average(1, 1.0, p.dtype),
    )


def test_shadows_is_a_list_of_lists_where_decay_is_a_sequence() -> None:
    p = np.ones(2)
    assert isinstance(EMA([p]).shadows[0], np.ndarray)
    assert isinstance(EMA([p], [0.9]).shadows[0][0], np.ndarray)
    ema = EMA([p])
    ema.shadows.clear()
    assert len(ema.shadows) == 1


# --- arrays --------------------------------------------------------------------------------------------------------------------


def test_shadows_lie_on_cache_lines_in_the_order_of_their_parameters() -> None:
    base = np.zeros((4, 3, 5, 7), np.float32)
    params = [base, base.transpose(0, 3, 1, 2), np.asfortranarray(base[0, 0]), base[::2, :, 1:3], base[0, 0, 0, 0:1], np.zeros((0, 3)), np.array(1.0), np.broadcast_to(base[0, 0, :, :1], (5, 6))]  # fmt: skip
    for ema in (EMA(params), copy.copy(EMA(params)), pickle.loads(pickle.dumps(EMA(params)))):
        for p, shadow in zip(ema._sources, ema.shadows, strict=True):
            assert shadow.ctypes.data % 64 == 0 or not shadow.size
            assert shadow.shape == p.shape
            if p.size:
                assert np.argsort(shadow.strides).tolist() == np.argsort(np.empty_like(p).strides).tolist()
        assert not any(np.shares_memory(a, b) for a in ema.shadows for b in params)


@pytest.mark.parametrize("dtype", FLOATS)
def test_shadow_dtypes(dtype: str) -> None:
    p = np.ones(3, FLOATS[dtype])
    assert EMA([p]).shadows[0].dtype == (np.float64 if dtype == "f64" else np.float32)
    for wanted in (*["bfloat16"] * ("bf16" in FLOATS), "float32", "float64", np.float64, np.dtype("f4")):
        ema = EMA([p], 0.5, shadow_dtype=wanted)
        follow(ema, p, [3.0])
        assert ema.shadows[0].dtype == (FLOATS["bf16"] if wanted == "bfloat16" else np.dtype(wanted))
        assert ema.shadows[0].astype(np.float64).tolist() == [2.0, 2.0, 2.0]
        p[...] = 1


@pytest.mark.parametrize("kind", ["list", "tuple", "generator", "TensorList", "dict"])
def test_params_of_every_kind(kind: str) -> None:
    arrays = [np.zeros(2), np.zeros((1, 3), np.float32)]
    params: Any = {
        "list": arrays,
        "tuple": tuple(arrays),
        "generator": (array for array in arrays),
        "TensorList": fastops.TensorList(arrays),
        "dict": {"layer.0.weight": arrays[0], "bias": arrays[1]},
    }[kind]
    ema = EMA(params, 0.75)
    for _ in range(2):
        for p in arrays:
            p += 1.0
        assert ema.update()
    assert [shadow.ravel()[0] for shadow in ema.shadows] == [0.6875, 0.6875]
    assert ema.names == (["layer.0.weight", "bias"] if kind == "dict" else ["0", "1"])


def test_list_is_copied_arrays_are_not() -> None:
    arrays = [np.zeros(2)]
    ema = EMA(arrays, 0.5)
    arrays.append(np.zeros(3))
    arrays[0] += 1.0
    ema.update()
    assert ema.shadows[0].tolist() == [0.5, 0.5]


def test_update_reads_other_arrays() -> None:
    ema = EMA([np.zeros(2), np.array(3)], 0.5)
    ema.update([np.ones(2, np.float16), np.array(7)])
    assert [shadow.tolist() for shadow in ema.shadows] == [[0.5, 0.5], 7]
    named = EMA({"a": np.zeros(1), "b": np.zeros(1)}, 0.5)
    named.update({"b": np.full(1, 4.0), "a": np.full(1, 2.0)})
    assert [shadow[0] for shadow in named.shadows] == [1.0, 2.0]


def test_no_arrays_no_elements() -> None:
    for params in ([], [np.zeros((0, 3), np.float32)], {}):
        ema = EMA(params, nonfinite="skip")
        assert ema.update()
        ema.swap_()
        ema.swap_()
        ema.load_state_dict(ema.state_dict())
        assert ema.step == 1


# --- buffers -------------------------------------------------------------------------------------------------------------------


def test_integers_are_copied_averaged_or_skipped() -> None:
    """AveragedModel(use_buffers=True) averages counters: 5 and then 15 give 6 at a decay of 0.9."""
    for buffers, want in (("copy", 15), ("average", 6), ("skip", None)):
        count = np.array(5, np.int64)
        ema = EMA({"w": np.zeros(2), "count": count, "b": np.ones(1)}, 0.9, buffers=buffers)
        follow(ema, count, [15])
        assert ema.names == (["w", "b"] if want is None else ["w", "count", "b"])
        count[...] = 99
        with ema.average_parameters():
            assert count == (99 if want is None else want)
        assert count == 99


@pytest.mark.parametrize("dtype", ["?", "b", "B", "h", "H", "i", "I", "l", "L"])
def test_averaged_integers_round_to_nearest_within_their_type(dtype: str) -> None:
    kind = np.dtype(dtype)
    low, high = (0, 1) if kind.kind == "b" else (np.iinfo(kind).min, np.iinfo(kind).max)
    count = np.array([low, high, 0, 1], kind)
    ema = EMA([count], 0.5, buffers="average")
    assert ema.shadows[0].dtype == np.float64
    with ema.average_parameters():
        assert count.dtype == kind
        assert count.tolist() == [low, high, 0, 1]
    follow(ema, count, [[low, high, 1, 0]])
    with ema.average_parameters():
        # A half goes to the even neighbour.
        assert count.tolist() == [low, high, 0, 0]
    if kind.kind != "b":
        odd = np.array([1, 2, 5], kind)
        ema = EMA([odd], 0.75, buffers="average")
        follow(ema, odd, [[3, 6, 8]])
        with ema.average_parameters():
            assert odd.tolist() == [2, 3, 6]  # 1.5, 3, 5.75


def test_buffers_with_debias_and_profiles() -> None:
    count, flag = np.array([4, 8]), np.array([True])
    ema = EMA([count, flag], (0.5, 0.9), debias=True, buffers="average")
    ema.update()
    for profile in (0, 1):
        with ema.average_parameters(profile):
            assert count.tolist() == [4, 8]
            assert flag.tolist() == [True]
    copied = EMA([count, flag], (0.5, 0.9), debias=True)
    assert all(shadows[0].tolist() == [4, 8] for shadows in copied.shadows)
    count += 1
    copied.update()
    assert all(shadows[0].tolist() == [5, 9] for shadows in copied.shadows)


# --- inf and nan ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_stays_for_ever_or_is_skipped(value: float) -> None:
    """timm: still nan after 100 clean updates."""
    p, q = np.zeros(5, np.float32), np.ones(2, np.float16)
    kept, spread = EMA([p, q], 0.5, nonfinite="skip"), EMA([p, q], 0.5)
    p[3] = value
    assert (kept.update(), spread.update()) == (False, True)
    p[...] = 0
    for _ in range(100):
        kept.update()
        spread.update()
    assert (kept.step, kept.updates, kept.skipped) == (101, 100, 1)
    assert kept.shadows[0].tolist() == [0.0] * 5
    assert not np.isfinite(spread.shadows[0][3])
    assert spread.skipped == 0


def test_skipped_updates_leave_buffers_and_count_nothing() -> None:
    p, count = np.zeros(1), np.array(1)
    ema = EMA([p, count], "equal", nonfinite="skip")
    p[0], count[...] = 2.0, 2
    assert ema.update()
    p[0], count[...] = np.nan, 3
    assert not ema.update()
    assert ema.shadows[1] == 2
    p[0] = 4.0
    assert ema.update()
    assert [ema.shadows[0][0], ema.shadows[1]] == [3.0, 3]
    assert ema.decay_at(4) == 3 / 4  # as planned: without skips


def test_nonfinite_parameters_at_the_start() -> None:
    p = np.array([np.nan])
    with pytest.raises(ValueError, match="params must be finite where nonfinite='skip' and debias=False"):
        EMA([p], nonfinite="skip")
    ema = EMA([p], nonfinite="skip", debias=True)
    assert follow(ema, p, [np.nan, 2.0]) == [False, True]


# --- swapping ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_swap_and_back_keeps_every_bit(dtype: str) -> None:
    rng = np.random.default_rng(1)
    # Strided, Fortran, 0-d; the shadow is wider than the halves, so an exchange would lose bits of it.
    base = rng.standard_normal((6, 8)).astype(FLOATS[dtype])
    params = [base[::2, ::3], np.asfortranarray(base), base[1, 1:2].reshape(())]
    ema = EMA(params, 0.9)
    for p in params:
        p[...] = rng.standard_normal(p.shape)
    ema.update()
    before, shadows = [p.copy() for p in params], [s.copy() for s in ema.shadows]
    for _ in range(2):
        ema.swap_()
        for p, shadow in zip(params, shadows, strict=True):
            assert_same_bits(p, shadow.astype(p.dtype))
        ema.swap_()
        for p, old in zip(params, before, strict=True):
            assert_same_bits(p, old)
    for got, want in zip(ema.shadows, shadows, strict=True):
        assert_same_bits(got, want)


def test_context_restores_after_an_exception() -> None:
    p = np.zeros(2)
    ema = EMA([p], 0.5)
    follow(ema, p, [1.0])

    def work() -> None:
        with ema.average_parameters():
            assert p.tolist() == [0.5, 0.5]
            p[...] = 7.0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert p.tolist() == [1.0, 1.0]
    # Swapping back by hand inside is no harm.
    with ema.average_parameters():
        ema.swap_()
    assert p.tolist() == [1.0, 1.0]
    assert ema.update()


def test_nothing_updates_while_averages_are_swapped_in() -> None:
    p = np.zeros(2)
    ema = EMA([p], (0.5, 0.9))
    follow(ema, p, [1.0])
    state = ema.state_dict()
    with ema.average_parameters(1):
        for call in (ema.update, ema.copy_to_, lambda: ema.load_state_dict(state), ema.average_parameters().__enter__):
            with pytest.raises(RuntimeError, match="must be called when the parameters are back"):
                call()
        with pytest.raises(ValueError, match="profile must be 1, which is swapped in, got 0"):
            ema.swap_()
        for key, value in ema.state_dict().items():
            np.testing.assert_array_equal(value, state[key])
        # A pickle from here knows the parameters to go back to.
        other = pickle.loads(pickle.dumps(ema))
    assert p.tolist() == [1.0, 1.0]
    other.swap_(1)
    assert other._sources[0].tolist() == [1.0, 1.0]


def test_copy_to_writes_any_float_dtype() -> None:
    p, count = np.zeros((2, 2), np.float32), np.array(4)
    ema = EMA({"p": p, "count": count}, 0.5)
    follow(ema, p, [1.0])
    for dtype in FLOATS.values():
        out = {"count": np.array(0), "p": np.zeros((2, 2), dtype, order="F")}
        ema.copy_to_(out)
        assert out["p"].astype(np.float64).tolist() == [[0.5, 0.5]] * 2
        assert out["count"] == 4
    with np.errstate(all="raise"):
        p[...] = 1e30
        ema.update()
        ema.copy_to_({"count": np.array(0), "p": (out := np.zeros((2, 2), np.float16))})
    assert np.isinf(out).all()
    ema.copy_to_()
    assert p[0, 0] == np.float32(ema.shadows[0][0, 0])


def test_tied_weights_are_one_array_under_two_names() -> None:
    p = np.zeros(3)
    ema = EMA({"embedding": p, "head": p}, 0.5)
    follow(ema, p, [1.0])
    with ema.average_parameters():
        assert p.tolist() == [0.5] * 3
    assert p.tolist() == [1.0] * 3


def test_an_interrupt_is_heard_when_all_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [np.zeros(1) for _ in range(4)]
    ema = EMA(params, 0.5)
    for p in params:
        p[...] = 1.0
    ema.update()
    real, calls = np.copyto, []

    def interrupted(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args, **options)

    monkeypatch.setattr(np, "copyto", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ema.swap_()
    assert [p[0] for p in params] == [0.5] * 4
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        ema.swap_()
    assert [p[0] for p in params] == [1.0] * 4
    calls.clear()
    with pytest.raises(KeyboardInterrupt), ema.average_parameters():
        raise AssertionError("not reached")
    assert [p[0] for p in params] == [1.0] * 4
    assert ema.update()


# --- states --------------------------------------------------------------------------------------------------------------------


def saved(state: dict[str, Any]) -> Any:
    """What a file of NumPy's makes of a state, without pickle."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **state)
    file.seek(0)
    return np.load(file, allow_pickle=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"debias": True},
        {"decay": (0.9, "equal")},
        {"warmup": "power", "sigma": (0.05, 0.1)},
        {"buffers": "average"},
        {"buffers": "skip"},
        {"nonfinite": "skip", "update_every": 3},
        pytest.param(
            {"shadow_dtype": "bfloat16", "seed": 3},
            marks=pytest.mark.skipif("bf16" not in FLOATS, reason="ml_dtypes is not installed"),
        ),
    ],
    ids=str,
)
def test_a_run_goes_on_from_a_file_as_if_uninterrupted(options: dict[str, Any]) -> None:
    def params() -> dict[str, Array]:
        return {
            "file": np.zeros((2, 3), np.float32),
            "0.w": np.zeros(2, FLOATS.get("bf16", np.float16)),
            "n": np.array(0),
        }

    def steps(ema: EMA, arrays: dict[str, Array], numbers: range) -> None:
        for i in numbers:
            for array in arrays.values():
                array[...] = np.random.default_rng(i).integers(0, 9, array.shape)
            if i == 6:
                arrays["file"][0] = np.nan if "nonfinite" in options else 1
            ema.update()

    whole, first, second = params(), params(), params()
    one, two, three = (EMA(arrays, **options) for arrays in (whole, first, second))
    steps(one, whole, range(12))
    steps(two, first, range(7))
    three.load_state_dict(saved(two.state_dict()))
    steps(three, second, range(7, 12))
    want, got = one.state_dict(), three.state_dict()
    assert want.keys() == got.keys()
    for key, value in want.items():
        assert_same_bits(np.asarray(got[key]), np.asarray(value))


def test_state_keys_are_the_names() -> None:
    ema = EMA({"layer.weight": np.ones(2), "n": np.array(1)}, (0.5, 0.9))
    names = {"shadow.0.layer.weight", "shadow.0.n", "shadow.1.layer.weight", "shadow.1.n"}
    numbers = {"step", "last", "updates", "averaged", "skipped", "totals", "debias"}
    state = ema.state_dict()
    assert set(state) == names | numbers
    state["shadow.0.layer.weight"][...] = 9.0
    assert ema.shadows[0][0].tolist() == [1.0, 1.0]


def test_loading_keeps_the_shadows_dtype() -> None:
    """torch_ema turns float32 shadows of bfloat16 parameters into bfloat16 when it loads them."""
    p = np.ones(3, FLOATS.get("bf16", np.float16))
    ema, other = EMA([p], 0.999), EMA([p.copy()], 0.999)
    follow(ema, p, [2.0])
    arrays = [id(shadow) for shadow in other.shadows]
    other.load_state_dict(ema.state_dict())
    assert other.shadows[0].dtype == np.float32
    assert_same_bits(other.shadows[0], ema.shadows[0])
    assert arrays == [id(shadow) for shadow in other.shadows]


@pytest.mark.skipif("bf16" not in FLOATS, reason="ml_dtypes is not installed")
@pytest.mark.parametrize("form", ["uint16", "void", "bfloat16"])
def test_bfloat16_states_load_in_every_form(form: str) -> None:
    p = np.array([1.5, -2.25, 3.0], np.float32)
    ema = EMA([p], shadow_dtype="bfloat16")
    state = ema.state_dict()
    assert state["shadow.0.0"].dtype == np.uint16
    if form == "void":
        state["shadow.0.0"] = saved({"a": ema.shadows[0]})["a"]
        assert state["shadow.0.0"].dtype == np.dtype("V2")
    elif form == "bfloat16":
        state["shadow.0.0"] = ema.shadows[0]
    other = EMA([np.zeros(3, np.float32)], shadow_dtype="bfloat16")
    other.load_state_dict(state)
    assert_same_bits(other.shadows[0], ema.shadows[0])


def _change(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, key: value}


WRONG_STATES: list[tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    (lambda state: 3, TypeError, "state must be a mapping of names to arrays and numbers, got 3"),
    (lambda state: {k: v for k, v in state.items() if k != "step"}, ValueError, "with the key 'step'"),
    (lambda state: {k: v for k, v in state.items() if k != "shadow.0.b"}, ValueError, "with the key 'shadow.0.b'"),
    (_change("shadow.1.a", np.zeros(1)), ValueError, "without the key 'shadow.1.a'"),
    (_change("shadow.0.b", np.zeros(3)), ValueError, "state['shadow.0.b'] must be of shape (2,)"),
    (_change("shadow.0.b", np.zeros(2, np.float32)), TypeError, "state['shadow.0.b'] must be of dtype float64"),
    (_change("shadow.0.b", np.zeros(2, ">f8")), TypeError, "state['shadow.0.b'] must be of dtype float64"),
    (_change("shadow.0.b", [0.0, 0.0]), TypeError, "state['shadow.0.b'] must be"),
    (_change("step", -1), ValueError, "state['step'] must be an integer >= 0, got -1"),
    (_change("step", 1.5), TypeError, "state['step'] must be an integer"),
    (_change("last", 99), ValueError, "state['last'] must be an integer in [0, 1], got 99"),
    (_change("updates", "1"), TypeError, "state['updates'] must be an integer"),
    (_change("debias", 1), ValueError, "state['debias'] must be 0, as this EMA has it, got 1"),
    (_change("totals", np.zeros(2)), ValueError, "state['totals'] must be of shape (1,)"),
    (_change("totals", np.zeros(1, np.int64)), TypeError, "state['totals'] must be a float64 array"),
    (_change("totals", np.array([np.nan])), ValueError, "state['totals'] must be of numbers in [0, 1]"),
]


@pytest.mark.parametrize(("change", "kind", "text"), WRONG_STATES, ids=range(len(WRONG_STATES)))
def test_wrong_states_change_nothing(change: Callable[[dict[str, Any]], Any], kind: type[Exception], text: str) -> None:
    ema = EMA({"a": np.ones(1), "b": np.ones(2)}, 0.5)
    source = EMA({"a": np.full(1, 5.0), "b": np.full(2, 5.0)}, 0.5)
    source.update()
    with pytest.raises(kind) as caught:
        ema.load_state_dict(change(source.state_dict()))
    assert text in str(caught.value)
    assert [shadow[0] for shadow in ema.shadows] == [1.0, 1.0]
    assert ema.step == 0


def test_pickle_alone_and_with_its_model() -> None:
    model = {"w": np.zeros(2), "n": np.array(1)}
    ema = EMA(model, (0.5, 0.9), buffers="average", debias=True)
    follow(ema, model["w"], [1.0])
    for other_model, other in (pickle.loads(pickle.dumps((model, ema))), copy.deepcopy((model, ema))):
        other_model["w"] += 1.0
        assert other.update()
        assert other.shadows[0][0].tolist() == [1.25, 1.25]  # 0.5 + (2 - 0.5) / 2
        other.copy_to_(profile=0)
        assert model["w"].tolist() == [1.0, 1.0]
    alone = pickle.loads(pickle.dumps(ema))
    model["w"] += 8.0
    alone.update()
    assert alone.shadows[0][0].tolist() == [0.75, 0.75]
    # A shallow copy follows the same parameters with shadows of its own.
    shallow = copy.copy(ema)
    shallow.update()
    assert shallow.shadows[0][0].tolist() == [4.75, 4.75]
    assert ema.shadows[0][0].tolist() == [0.5, 0.5]
    assert repr(shallow) == "<fastops.EMA of 2 arrays, decay=0.5, 0.9, warmup='none', step 2>"


# --- fused steps ---------------------------------------------------------------------------------------------------------------


def test_advance_makes_a_fused_step_equal_to_two_calls() -> None:
    rng = np.random.default_rng(2)
    start = [rng.standard_normal(shape).astype(np.float32) for shape in ((5, 3), (4,))]
    fused, apart = [p.copy() for p in start], [p.copy() for p in start]
    options: dict[str, Any] = {"decay": 0.9, "warmup": "timm", "update_every": 2}
    one, two = EMA(fused, **options), EMA(apart, **options)
    m1, m2 = [np.zeros_like(p) for p in start], [np.zeros_like(p) for p in start]
    for _ in range(5):
        grads = [rng.standard_normal(p.shape).astype(np.float32) for p in start]
        fastops.sgd_step_(fused, grads, m1, lr=0.1, momentum=0.9, ema=one.shadows, ema_decay=one.advance())
        fastops.sgd_step_(apart, grads, m2, lr=0.1, momentum=0.9)
        two.update()
    for got, want in zip(one.shadows, two.shadows, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance.average(10, 4.0, got.dtype))
    assert one.state_dict()["totals"] == two.state_dict()["totals"]
    assert (one.step, one.updates) == (5, 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"decay": (0.9, 0.99)}, "decay must be one number for advance"),
        ({"nonfinite": "skip"}, "nonfinite must be 'propagate' for advance"),
        ({"buffers": "copy"}, "buffers must be 'skip' for advance, got 'copy'"),
    ],
)
def test_advance_refuses_what_a_fused_step_cannot_do(options: dict[str, Any], text: str) -> None:
    ema = EMA([np.zeros(2), *([np.array(1)] * ("buffers" in options))], **options)
    with pytest.raises(ValueError, match=text):
        ema.advance()
    assert ema.step == 0


# --- stochastic rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("bf16" not in FLOATS, reason="ml_dtypes is not installed")
def test_bfloat16_shadow_moves_where_rounding_to_nearest_would_not() -> None:
    p = np.full(4096, 0.5, np.float32)
    ema = EMA([p], 0.999, shadow_dtype="bfloat16", seed=5)
    p[...] = 0.75
    nearest = ema.shadows[0][:1].copy()
    for _ in range(1000):
        ema.update()
        nearest += ((np.float32(0.75) - nearest.astype(np.float32)) * np.float32(0.001)).astype(nearest.dtype)
    assert float(nearest[0]) == 0.5
    want = 0.75 - 0.25 * 0.999**1000
    got = float(ema.shadows[0].astype(np.float64).mean())
    assert abs(got - want) <= tolerance.stochastic_mean(0.999, p.size)


@pytest.mark.skipif("bf16" not in FLOATS, reason="ml_dtypes is not installed")
def test_seeds_decide_the_bits() -> None:
    p = np.linspace(0.1, 0.9, 1000, dtype=np.float32)
    runs = []
    for seed in (7, 7, 8):
        ema = EMA([p], 0.9, shadow_dtype="bfloat16", seed=seed)
        for _ in range(3):
            ema.update()
        runs.append(ema.state_dict()["shadow.0.0"])
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


# --- threads, failures ---------------------------------------------------------------------------------------------------------


def test_one_thread_at_a_time(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ema = EMA([np.zeros(2)], 0.5)
    errors: list[str] = []

    def meanwhile() -> None:
        state = {"step": 0}
        for call in (ema.update, ema.swap_, ema.copy_to_, ema.state_dict, ema.advance, lambda: pickle.dumps(ema)):
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))
        with pytest.raises(RuntimeError, match="one thread at a time"):
            ema.load_state_dict(state)

    class Slow:
        @staticmethod
        def ema_update(*arguments: Any) -> None:
            thread = threading.Thread(target=meanwhile)
            thread.start()
            thread.join()
            backend.ema_update(*arguments)

    monkeypatch.setattr(averaging, "_backend", Slow)
    assert ema.update()
    assert errors == ["an EMA must be used by one thread at a time, got a call during another"] * 6
    monkeypatch.setattr(averaging, "_backend", backend)
    assert ema.update()


@pytest.mark.parametrize("error", [MemoryError, ValueError("x"), RuntimeError("x")])
def test_a_failing_update_does_not_count(error: Any, backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        @staticmethod
        def ema_update(*_: Any) -> None:
            raise error

    ema = EMA([np.zeros(2)], 0.5, debias=True)
    before = ema.state_dict()
    monkeypatch.setattr(averaging, "_backend", Failing)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        ema.update()
    assert ema.state_dict().keys() == before.keys()
    assert all((ema.state_dict()[key] == before[key]).all() for key in before if key.startswith(("shadow", "totals")))
    assert ema.step == 0
    monkeypatch.setattr(averaging, "_backend", backend)
    assert ema.update()


def test_changed_parameters_are_named_and_nothing_moves() -> None:
    arrays = {"n": np.array(1), "a": np.zeros(2), "b": np.zeros((2, 2))}
    for buffers in ("copy", "average", "skip"):
        ema = EMA(arrays, 0.5, buffers=buffers)
        for change, kind, text in (
            ({"b": np.zeros(4)}, ValueError, "params['b'] must be of shape (2, 2), got (4,)"),
            ({"b": np.zeros((2, 2), int)}, TypeError, "params['b'] must be of dtype float16"),
            ({"b": None}, TypeError, "params['b'] must be an array in host memory"),
            ({"n": np.array(2.0)}, TypeError, "params['n'] must be of dtype int64"),
            ({"n": np.array([2])}, ValueError, "params['n'] must be of shape ()"),
        ):
            if "n" in change and buffers == "skip":
                continue
            with pytest.raises(kind) as caught:
                ema.update({**arrays, "a": np.ones(2), **change})
            assert text in str(caught.value)
            assert not any(shadow.any() for name, shadow in zip(ema.names, ema.shadows, strict=True) if name != "n")
            assert ema.step == 0
        assert ema.update()


def test_a_resized_parameter_is_named() -> None:
    p = [np.zeros(3), np.zeros(4)]
    ema = EMA(p, 0.5)
    p[0][...] = 1.0
    p[1].resize(5, refcheck=False)
    with pytest.raises(ValueError, match=r"params\[1\] must be of shape \(4,\)"):
        ema.update()
    assert not ema.shadows[0].any()
    with pytest.raises(ValueError, match=r"params\[1\] must be of shape \(4,\)"):
        ema.swap_()
    assert p[0].tolist() == [1.0] * 3


class _Frozen:
    """Targets that cannot be written, the last of them for the reason named."""

    @staticmethod
    def read_only() -> list[Array]:
        b = np.zeros(2)
        b.flags.writeable = False
        return [np.zeros(2), b]

    @staticmethod
    def overlapping() -> list[Array]:
        base = np.zeros(3)
        return [base[:2], base[1:]]

    @staticmethod
    def folded() -> list[Array]:
        return [np.zeros(2), np.lib.stride_tricks.as_strided(np.zeros(1), (2,), (0,))]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_Frozen.read_only, "params[1] must be writable, got a read-only array"),
        (_Frozen.overlapping, "params[1] must be memory apart from params[0], got arrays that overlap"),
        (_Frozen.folded, "params[1] must be an array whose elements are all distinct in memory"),
    ],
)
def test_targets_that_cannot_be_written_stop_everything(make: Callable[[], list[Array]], text: str) -> None:
    source = EMA([np.full(2, 5.0), np.full(2, 5.0)], 0.5)
    targets = make()
    with pytest.raises(ValueError) as caught:
        source.copy_to_(targets)
    assert text in str(caught.value)
    assert not any(target.any() for target in targets)
    # The same arrays as parameters: following them is fine, writing there is not.
    ema = EMA(targets, 0.5, debias=True)
    assert ema.update()
    with pytest.raises(ValueError) as caught:
        ema.swap_()
    assert text in str(caught.value)
    with pytest.raises(ValueError), ema.average_parameters():
        raise AssertionError("not reached")
    assert not any(target.any() for target in targets)
    assert ema.update()


def _ema(*arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: EMA(*(arguments or ([np.zeros(2)],)), **options)


P = [np.zeros(2)]
N = {"w": np.zeros(2)}
FLOAT_WORDS = "float16, bfloat16, float32 or float64"


WRONG_CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (_ema(3), TypeError, "params must be a list of arrays, got 3"),
        (_ema("abc"), TypeError, "params must be a list of arrays, got 'abc'"),
        (_ema([[1.0]]), TypeError, "params[0] must be an array in host memory"),
        (_ema([np.zeros(2), np.zeros(2, complex)]), TypeError, f"params[1] must be of dtype {FLOAT_WORDS}, an integer or bool, got complex128"),
        (_ema({"w": np.zeros(2, ">f4")}), TypeError, "params['w'] must be of dtype"),
        (_ema([np.zeros(2, ">i4")]), TypeError, "params[0] must be of dtype"),
        (_ema([np.zeros(2, np.longdouble)]), TypeError, "params[0] must be of dtype"),
        (_ema([np.ma.masked_array(np.zeros(2))]), TypeError, "params[0] must be an array without a mask"),
        (_ema({1: np.zeros(2)}), TypeError, "params must be a mapping of text to arrays, got a key of int"),
        (_ema(decay=1.5), ValueError, "decay must be a finite number in [0, 1], got 1.5"),
        (_ema(decay=float("nan")), ValueError, "decay must be a finite number in [0, 1], got nan"),
        (_ema(decay=True), TypeError, "decay must be a finite number"),
        (_ema(decay="mean"), ValueError, "decay must be 'equal', got 'mean'"),
        (_ema(decay=(0.9, 1.5)), ValueError, "decay[1] must be a finite number in [0, 1], got 1.5"),
        (_ema(decay=()), ValueError, "decay must be a number or a sequence of at least one, got an empty one"),
        (_ema(decay="equal", warmup="tf"), ValueError, "decay must be a number with warmup='tf', got 'equal'"),
        (_ema(warmup="timm2"), ValueError, "warmup must be 'none' or 'timm' or 'tf' or 'power', got 'timm2'; did you mean 'timm'?"),
        (_ema(warmup=None), TypeError, "warmup must be 'none'"),
        (_ema(warmup="power"), ValueError, "sigma must be a number or a sequence of them with warmup='power', got None"),
        (_ema(sigma=0.1), ValueError, "sigma must be None without warmup='power', got 0.1"),
        (_ema(warmup="power", sigma=0.3), ValueError, "sigma must be a finite number in (0, 0.288675], got 0.3"),
        (_ema(warmup="power", sigma=(0.1, 0.0)), ValueError, "sigma[1] must be a finite number in (0, 0.288675], got 0.0"),
        (_ema(warmup="power", sigma=0.1, decay=(0.9,)), TypeError, "decay must be a number, unused, with warmup='power'"),
        (_ema(inv_gamma=0), ValueError, "inv_gamma must be a finite number in (0, inf), got 0.0"),
        (_ema(power=-1.0), ValueError, "power must be a finite number in (0, inf), got -1.0"),
        (_ema(update_every=0), ValueError, "update_every must be an integer >= 1, got 0"),
        (_ema(update_every=1.0), TypeError, "update_every must be an integer >= 1, got 1.0"),
        (_ema(update_after_step=-1), ValueError, "update_after_step must be an integer >= 0, got -1"),
        (_ema(min_decay=0.9999), ValueError, "min_decay must be a finite number in [0, 0.999], got 0.9999"),
        (_ema(debias=1), TypeError, "debias must be True or False, got 1"),
        (_ema(buffers="keep"), ValueError, "buffers must be 'copy' or 'average' or 'skip', got 'keep'"),
        (_ema(nonfinite="raise"), ValueError, "nonfinite must be 'propagate' or 'skip', got 'raise'"),
        (_ema(shadow_dtype="float16"), ValueError, "shadow_dtype must be None, 'float32', 'float64' or 'bfloat16', got 'float16'"),
        (_ema(shadow_dtype="nonsense"), ValueError, "shadow_dtype must be None, 'float32'"),
        (_ema(shadow_dtype=">f4"), ValueError, "shadow_dtype must be None, 'float32'"),
        (_ema(seed=-1), ValueError, "seed must be an integer in [0, 18446744073709551615], got -1"),
        (_ema(seed=None), TypeError, "seed must be an integer"),
        (lambda: EMA(P).decay_at(0), ValueError, "step must be an integer >= 1 and below 2**63, got 0"),
        (lambda: EMA(P).decay_at(1.0), TypeError, "step must be an integer >= 1 and below 2**63, got 1.0"),
        (lambda: EMA(P).decay_at(1, 1), ValueError, "profile must be an integer in [0, 0], got 1"),
        (lambda: EMA(P).swap_(-1), ValueError, "profile must be an integer in [0, 0], got -1"),
        (lambda: EMA(P).copy_to_(P, profile="0"), TypeError, "profile must be an integer in [0, 0], got '0'"),
        (lambda: EMA(P).average_parameters(2).__enter__(), ValueError, "profile must be an integer in [0, 0], got 2"),
        (lambda: EMA(P).update([]), ValueError, "params must be a list of 1 arrays, got 0"),
        (lambda: EMA(P).update(N), TypeError, "params must be a list of arrays, as the EMA was made with"),
        (lambda: EMA(N).update(P), TypeError, "params must be a mapping of names to arrays, as the EMA was made with"),
        (lambda: EMA(N).update({}), ValueError, "params must be a mapping with the key 'w', got one of 0 keys"),
        (lambda: EMA(N).copy_to_({**N, "x": 1}), ValueError, "params must be a mapping without the key 'x', got one of 2 keys"),
        (lambda: EMA(N).copy_to_({"w": np.zeros(3)}), ValueError, "params['w'] must be of shape (2,), got (3,)"),
        (lambda: EMA(N).copy_to_({"w": np.zeros(2, int)}), TypeError, f"params['w'] must be of dtype {FLOAT_WORDS}, got int64"),
        (lambda: (ema := EMA(P)).copy_to_(ema.shadows), ValueError, "params[0] must be memory apart from shadows[0]"),
        (lambda: posthoc_ema_weights([1j], 0.1, 1, 0.1), TypeError, "t must be an array of real numbers"),
        (lambda: posthoc_ema_weights([], 0.1, 1, 0.1), ValueError, "t must be of shape (N,), N >= 1"),
        (lambda: posthoc_ema_weights(5, 0.1, 1, 0.1), ValueError, "t must be of shape (N,), N >= 1"),
        (lambda: posthoc_ema_weights([1, 2], [0.1], 1, 0.1), ValueError, "sigma must be a number or of shape (2,)"),
        (lambda: posthoc_ema_weights([0, 2], 0.1, 1, 0.1), ValueError, "t must be of finite numbers > 0, got an array with others"),
        (lambda: posthoc_ema_weights([1], 0.5, 1, 0.1), ValueError, "sigma must be of numbers in (0, 0.288675], got 0.5"),
        (lambda: posthoc_ema_weights([1], 0.1, np.nan, 0.1), ValueError, "t_out must be of finite numbers > 0, got nan"),
        (lambda: posthoc_ema_weights([1], 0.1, 1, [[0.1]]), ValueError, "sigma_out must be a number or of shape ()"),
        (lambda: posthoc_ema_weights([1], 0.1, [[1]], 0.1), ValueError, "t_out must be a number or of shape (M,)"),
        (lambda: posthoc_ema_weights([1, 1], 0.1, 1, 0.1), ValueError, "t must be of pairs (t, sigma) that are all distinct"),
        (lambda: posthoc_ema_weights([1, 2], 0.1, 1, 0.1, normalize=1), TypeError, "normalize must be True or False"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), WRONG_CALLS, ids=range(len(WRONG_CALLS)))
def test_wrong_calls_are_refused_in_words(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert text in str(caught.value)
    assert len(str(caught.value)) < 200


# --- averages made up afterwards -----------------------------------------------------------------------------------------------


def test_posthoc_weights_of_the_paper() -> None:
    t, sigma = (5, 10, 5, 10), (0.05, 0.05, 0.1, 0.1)
    want = np.array([1.40305537e-4, 0.354482976, -2.50809201e-3, 0.681456179])
    raw = posthoc_ema_weights(t, sigma, 10, 0.075, normalize=False)
    np.testing.assert_allclose(raw, want, rtol=0, atol=tolerance.POSTHOC)
    scaled = posthoc_ema_weights(t, sigma, 10, 0.075)
    np.testing.assert_allclose(scaled, want / want.sum(), rtol=0, atol=tolerance.POSTHOC)
    several = posthoc_ema_weights(t, sigma, 10, [0.05, 0.075])
    assert several.shape == (4, 2)
    np.testing.assert_allclose(several[:, 1], scaled, rtol=0, atol=tolerance.POSTHOC)
    # What was stored is found again.
    np.testing.assert_allclose(several[:, 0], [0, 1, 0, 0], rtol=0, atol=tolerance.POSTHOC)


def test_posthoc_average_is_near_the_one_kept_along() -> None:
    rng = np.random.default_rng(3)
    p = np.zeros(64)
    ema = EMA([p], warmup="power", sigma=(0.05, 0.1, 0.07))
    stored, t, sigma = [], [], []
    for step in range(1, 4097):
        p += rng.standard_normal(p.shape)
        ema.update()
        if step % 512 == 0:
            for profile, width in enumerate((0.05, 0.1)):
                stored.append(ema.shadows[profile][0].copy())
                t.append(step)
                sigma.append(width)
    got = np.tensordot(posthoc_ema_weights(t, sigma, 4096, 0.07), stored, 1)
    want = ema.shadows[2][0]
    assert np.abs(got - want).max() <= tolerance.POSTHOC_FIT * np.abs(want).max()


# --- torch ---------------------------------------------------------------------------------------------------------------------


def test_torch_module_with_buffers(torch: ModuleType) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.BatchNorm1d(4))
    ema = EMA({**dict(model.named_parameters()), **dict(model.named_buffers())}, 0.9)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        # By hand: torch.optim imports half of torch at its first step.
        parameters = list(model.parameters())
        grads = torch.autograd.grad((model(torch.randn(8, 3)) ** 3).sum(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p -= 0.1 * g
        ema.update()
    now = {name: value.clone() for name, value in model.state_dict().items()}
    with ema.average_parameters():
        for name, value in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                assert int(value) == 2
            else:
                assert not torch.equal(value, now[name])
                assert not torch.equal(value, start[name])
    for name, value in model.state_dict().items():
        assert torch.equal(value, now[name])


def test_torch_averaged_model_agrees(torch: ModuleType, backend: ModuleType) -> None:
    swa = torch.optim.swa_utils
    model = torch.nn.Linear(7, 5)
    ours = EMA(model.parameters(), (0.99, "equal"))
    theirs = [swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.99)), swa.AveragedModel(model)]
    with torch.no_grad():
        for _ in range(5):
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            ours.update()
            for averaged in theirs:
                averaged.update_parameters(model)
    # AveragedModel copies at its first update; so does "equal", and an EMA started there.
    for got, want in zip(ours.shadows[1], theirs[1].module.parameters(), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=0, atol=tolerance.average(5, 16.0, got.dtype))
    start = EMA(model.parameters(), 0.99, update_after_step=1)
    again = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.99))
    with torch.no_grad():
        for _ in range(5):
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            start.update()
            again.update_parameters(model)
    for got, want in zip(start.shadows, again.module.parameters(), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=0, atol=tolerance.average(5, 16.0, got.dtype))


@pytest.mark.skipif("bf16" not in FLOATS, reason="ml_dtypes is not installed")
def test_torch_bfloat16_parameters_with_float32_shadows(torch: ModuleType) -> None:
    """A mixed lerp is an error in torch, and a bfloat16 shadow never moves: 0.5 stays 0.5 at a decay of 0.9999."""
    p = torch.nn.Parameter(torch.full((4,), 0.5, dtype=torch.bfloat16))
    ema = EMA([p], 0.9999)
    assert ema.shadows[0].dtype == np.float32
    with torch.no_grad():
        p.fill_(1.0)
    for _ in range(1000):
        ema.update()
    want = 1.0 - 0.5 * 0.9999**1000
    np.testing.assert_allclose(ema.shadows[0], want, rtol=0, atol=tolerance.average(1000, 1.0, np.dtype(np.float32)))
    ema.copy_to_([out := torch.zeros(4, dtype=torch.float64)])
    assert out.tolist() == ema.shadows[0].astype(np.float64).tolist()
    with ema.average_parameters():
        assert p.tolist() == torch.from_numpy(ema.shadows[0]).bfloat16().tolist()
    assert p.tolist() == [1.0] * 4


def test_torch_autograd_hears_of_swapped_parameters(torch: ModuleType) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    ema = EMA([p], 0.5)
    loss = (p * p).sum()
    ema.update()
    loss.backward(retain_graph=True)  # reading is no change
    ema.swap_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    ema.swap_()
    loss = (p * p).sum()
    ema.copy_to_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torch_tensors_whose_storage_changes(torch: ModuleType) -> None:
    p = torch.zeros(4)
    ema = EMA([p], 0.5)
    p.data = torch.ones(4)
    ema.update()
    assert ema.shadows[0].tolist() == [0.5] * 4
    p.data = torch.ones(5)
    with pytest.raises(ValueError, match=r"params\[0\] must be of shape \(4,\)"):
        ema.update()
    p.data = torch.ones(4)
    p.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"params\[0\] must be a tensor whose storage holds its elements"):
        ema.update()
    assert ema.shadows[0].tolist() == [0.5] * 4


def test_torch_state_and_pickle(torch: ModuleType) -> None:
    model = torch.nn.Linear(2, 2)
    ema = EMA(dict(model.named_parameters()))
    ema.update()
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    other = EMA(dict(model.named_parameters()))
    other.load_state_dict(torch.load(file, weights_only=False))
    assert other.step == 1
    same_model, same = pickle.loads(pickle.dumps((model, ema)))
    with torch.no_grad():
        same_model.bias.fill_(100.0)
    same.update()
    assert same.shadows[1].max() > 0.05
    assert _tensors.as_ndarray("p", model.bias).max() < 100
