# SPDX-License-Identifier: BSD-3-Clause
"""`EMA` and `posthoc_ema_weights`: schedules, debiasing, profiles, arrays, buffers, stochastic rounding, averages made up afterwards."""

from __future__ import annotations

import copy
import math
import pickle
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from numpy.typing import NDArray
from samples import FLOATS, assert_same_bits, follow

import fastops
from fastops import _schedules, averaging
from fastops.averaging import EMA, posthoc_ema_weights

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("over_backend")


# Schedules.


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


# Debiasing.


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


# Profiles.


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


# Arrays.


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


# Buffers.


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


# Inf and nan.


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


# Stochastic rounding.


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


# Averages made up afterwards.


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
