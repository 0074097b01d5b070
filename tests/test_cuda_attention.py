# SPDX-License-Identifier: BSD-3-Clause
"""Linear attention of fastops.cuda against its definition in float64: on the CPU as fibers, and on a GPU where there is one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import tolerance
from gpu_arrays import Fake, Shim
from quadratic import DECAYING, EXPONENTIAL, Definition, wide
from samples import FLOATS, assert_same_bits

import fastops
from fastops import attention as cpu
from fastops import cuda, reference
from fastops.cuda import _attention, _calls

F32 = FLOATS["f32"]
NAMES = tuple(name for name in FLOATS if name != "f64")
MAPS = _attention._MAPS
# With decay on a GPU.
PLAIN = tuple(name for name in DECAYING if name not in EXPONENTIAL)
both = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
every_map = pytest.mark.parametrize("feature_map", MAPS)
every_dtype = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where kernels run; new arrays are full of nan, so that what is not written shows."""
    if isinstance(gpu, Shim):
        full_of_nan(gpu, monkeypatch)
    monkeypatch.setattr(cpu, "_backend", reference)
    return gpu


@pytest.fixture
def shim(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> Shim:
    """Likewise."""
    full_of_nan(shim, monkeypatch)
    return shim


def full_of_nan(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {0: FLOATS["f16"], 1: FLOATS.get("bf16"), 2: F32}
    monkeypatch.setattr(
        _calls, "empty_like", lambda _like, shape, code, *_: shim.put(np.full(shape, np.nan, kinds[code]))
    )


def arrays_of(seed: int, b: int, h: int, heads: int, n: int, m: int, d: int, e: int, name: str = "f32") -> list[Any]:
    rng = np.random.default_rng(seed)
    shapes = (b, h, n, d), (b, heads, m, d), (b, heads, m, e)
    return [rng.standard_normal(shape).astype(FLOATS[name]) for shape in shapes]


def of_map(feature_map: str, d: int) -> dict[str, Any]:
    # Weights next to 0 have gradients next to infinity.
    options: dict[str, Any] = {"feature_map": feature_map}
    if feature_map.startswith("relu"):
        options["kernel_eps"] = 0.1
    if feature_map == "favor":
        options["projection"] = fastops.favor_projection(d, 6, rng=3).astype(F32)
    return options


def state_of(
    seed: int, *arrays: Any, sequences: int | None = None, feature_map: str = "elu", scale: float | None = None
) -> tuple[Any, ...]:
    """What a state may be: the sums over some keys."""
    k, v = arrays[1:3]
    rng = np.random.default_rng(seed)
    lead = (k.shape[0] if sequences is None else sequences, k.shape[1])
    own = [rng.standard_normal((*lead, 9, x.shape[3])) for x in (k, v)]
    options = {**of_map(feature_map, k.shape[3]), "scale": scale}
    _, state = cpu.linear_attention(own[0][:, :, :1], *own, **options, return_state=True)
    return tuple(x.astype(F32) for x in state)


def put(gpu: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options whose arrays lie on the GPU; offsets stay in host memory."""

    def moved(key: str, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(gpu.put, x))
        return gpu.put(x) if isinstance(x, np.ndarray) and key != "cu_seqlens" else x

    return {key: moved(key, x) for key, x in options.items()}


def forward(gpu: Any, arrays: list[Any], **options: Any) -> tuple[Any, list[Any]]:
    y, state = cuda.linear_attention(*map(gpu.put, arrays), **(gpu.options | put(gpu, options)), return_state=True)
    return gpu.get(y), [gpu.get(x) for x in state]


def in_float64(arrays: list[Any], options: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    def moved(key: str, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(wide, x))
        return wide(x) if key in ("decay", "projection") else x

    return [wide(x) for x in arrays], {key: moved(key, x) for key, x in options.items() if key != "tf32"}


def fraction_of(arrays: list[Any], tf32: bool = False) -> float:
    """The distance of neighbours among the numbers that products take."""
    return tolerance.TF32 if tf32 else tolerance.rounding(arrays[0].dtype)


def check(gpu: Any, arrays: list[Any], **options: Any) -> None:
    """The result and the state against those in float64."""
    y, state = forward(gpu, arrays, **options)
    exact, given = in_float64(arrays, options)
    want, want_state = cpu.linear_attention(*exact, **given, return_state=True)
    assert y.dtype == arrays[0].dtype
    assert y.shape == want.shape
    fraction = fraction_of(arrays, bool(options.get("tf32")))
    size, exponent = magnitude(arrays, options, want)
    bound = tolerance.attention(size, want, exponent, y.dtype)
    if fraction > tolerance.rounding(np.dtype(F32)):
        bound = tolerance.attention_on_tensor_cores(size, want, exponent, y.dtype, fraction)
    assert (np.abs(wide(y) - want) <= bound).all(), np.abs(wide(y) - want).max(initial=0)
    for got, exact_sum in zip(in_units(state, want_state), want_state, strict=True):
        assert got.shape == exact_sum.shape
        finite = exact_sum[np.isfinite(exact_sum)]
        most = np.abs(finite).max(initial=1.0) + math.sqrt(arrays[1].shape[-2]) * 4
        same = (got == exact_sum) | (np.abs(got - exact_sum) <= (4 * fraction + (64 + 4 * exponent) * 2.0**-24) * most)
        assert same.all()
    assert all(x.dtype == F32 for x in state)


def in_units(state: Any, of: Any) -> list[Any]:
    """The sums of a state in the units of another one."""
    if len(state) == 2:
        return [wide(x) for x in state]
    seen = np.isfinite(of[2])
    assert (np.isfinite(state[2]) == seen).all()
    power = 2.0 ** np.where(seen, wide(state[2]) - np.where(seen, of[2], 0), 0)
    return [wide(state[0]) * power[..., np.newaxis], wide(state[1]) * power, of[2]]


def magnitude(arrays: list[Any], options: dict[str, Any], want: Any) -> tuple[Any, float]:
    """The sums of magnitudes behind a result, and the largest exponent."""
    layout, offsets = options.get("layout", "bhnd"), options.get("cu_seqlens")
    known = {key: x for key, x in options.items() if key not in ("layout", "cu_seqlens", "tf32", "initial_state")}
    exact = [x.swapaxes(1, 2) for x in arrays] if layout == "bnhd" else arrays
    state = options.get("initial_state")
    found = np.zeros(want.swapaxes(1, 2).shape if layout == "bnhd" else want.shape)
    ends = [0, exact[0].shape[2]] if offsets is None else list(offsets)
    exponent = 0.0
    for i, (low, high) in enumerate(itertools.pairwise(ends)):
        tokens = slice(low, high) if offsets is not None else slice(None)
        part = known | {key: known[key][..., tokens] for key in ("key_mask",) if key in known}
        if "decay" in known and known["decay"].ndim > 1:
            part["decay"] = known["decay"][..., tokens]
        own = None if state is None else tuple(x[i : i + 1] if offsets is not None else x for x in state)
        definition = Definition(*(x[:, :, tokens] for x in exact), **part, initial_state=own)
        found[:, :, tokens] = definition.result()[1]
        exponent = max(exponent, definition.exponent())
    return found.swapaxes(1, 2) if layout == "bnhd" else found, exponent


# --- results -----------------------------------------------------------------------------------------------------------------

# On both sides of a tile of 64 and of chunks of 64 and 128 tokens; more queries than keys, and fewer.
SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 1, 70, 70, 12, 9),
    (1, 4, 2, 66, 200, 17, 3),
    (1, 1, 1, 150, 66, 5, 66),
    (1, 1, 1, 257, 257, 64, 64),
]


@every_dtype
@every_map
@both
def test_linear_attention_is_within_tolerance(gpu: Any, causal: bool, feature_map: str, name: str) -> None:
    for seed, sizes in enumerate(SIZES if feature_map in ("elu", "cosine") else SIZES[1:4]):
        check(gpu, arrays_of(seed, *sizes, name), causal=causal, **of_map(feature_map, sizes[5]))


@every_dtype
@both
@pytest.mark.parametrize(("d", "e"), [(32, 32), (96, 96), (128, 64), (64, 128), (256, 256), (300, 7)])
def test_head_sizes_are_within_tolerance(gpu: Any, d: int, e: int, causal: bool, name: str) -> None:
    arrays = arrays_of(1, 1, 1, 1, 80, 80, d, e, name)
    check(gpu, arrays, causal=causal)
    check(gpu, arrays, causal=causal, feature_map="identity", normalize=False)


def conditions(causal: bool, heads: int, m: int, seed: int) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    found: dict[str, dict[str, Any]] = {
        "mask": {"key_mask": rng.random((2, m)) < 0.7},
        "mask of heads": {"key_mask": rng.random((2, heads, m)) < 0.7},
        "scale and eps": {"scale": 0.6, "eps": 0.3},
        "sums": {"normalize": False},
    }
    if causal:
        steep = -rng.exponential(0.5, (2, heads, m)).astype(F32)
        steep[..., m // 3] = -np.inf
        steep[..., m // 2] = -50.0
        found |= {
            "decay of heads": {"decay": -rng.exponential(0.1, heads).astype(F32)},
            "decay of tokens": {"decay": -rng.exponential(0.05, (2, heads, m)).astype(F32)},
            "steep decay and mask": {"decay": steep, "key_mask": rng.random((2, heads, m)) < 0.7},
            "decay of halves": {"decay": -rng.exponential(0.1, (2, heads, m)).astype(np.float16)},
        }
    return found


def cases(kind: str, causal: bool, name: str) -> list[tuple[int, str, list[Any], dict[str, Any]]]:
    """Maps and lengths under a condition: seeds, maps, arrays and options."""
    if "decay" in kind and not causal:
        pytest.skip("decay is of causal calls")
    found = []
    sizes = [(150, 150), (40, 200), (200, 70)]
    maps = ["elu", "relu", "cosine", *(() if "decay" in kind else EXPONENTIAL)]
    for seed, feature_map in enumerate(maps):
        n, m = sizes[seed % 3]
        options = {**of_map(feature_map, 12), **conditions(causal, 2, m, seed)[kind]}
        if feature_map == "softmax":
            options.pop("eps", None)
            options.pop("normalize", None)
        found.append((seed, feature_map, arrays_of(seed, 2, 4, 2, n, m, 12, 9, name), options))
    return found


@every_dtype
@both
@pytest.mark.parametrize("kind", conditions(True, 2, 9, 0))
@pytest.mark.parametrize("with_state", [False, True], ids=["", "state"])
def test_conditions_are_within_tolerance(gpu: Any, with_state: bool, kind: str, causal: bool, name: str) -> None:
    for seed, feature_map, arrays, options in cases(kind, causal, name):
        state = {}
        if with_state:
            state["initial_state"] = state_of(seed, *arrays, feature_map=feature_map, scale=options.get("scale"))
        check(gpu, arrays, causal=causal, **options, **state)


@every_dtype
@both
def test_packed_sequences_are_within_tolerance(gpu: Any, causal: bool, name: str) -> None:
    ends = [0, 0, 130, 131, 200, 200]
    arrays = arrays_of(3, 1, 4, 2, 200, 200, 12, 9, name)
    options: dict[str, Any] = {"causal": causal, "cu_seqlens": ends}
    check(gpu, arrays, **options)
    options["key_mask"] = np.random.default_rng(5).random((1, 200)) < 0.7
    for feature_map in EXPONENTIAL:
        state = state_of(4, *arrays, sequences=5, feature_map=feature_map)
        check(gpu, arrays, **options, **of_map(feature_map, 12), initial_state=state)
    options["initial_state"] = state_of(4, *arrays, sequences=5)
    check(gpu, arrays, **options)
    if causal:
        check(gpu, arrays, **options, decay=np.array([-0.1, -0.01], F32))
        check(gpu, arrays, **options, decay=-np.random.default_rng(6).random((1, 2, 200)).astype(F32))


@both
def test_offsets_may_lie_on_the_gpu(gpu: Any, causal: bool) -> None:
    arrays = arrays_of(3, 1, 2, 1, 200, 200, 12, 9)
    # More than the threads that read them.
    ends = np.sort(np.random.default_rng(0).integers(0, 200, 299))
    ends[0], ends[-1] = 0, 200
    want, want_state = forward(gpu, arrays, causal=causal, cu_seqlens=list(ends))
    for dtype in (np.int32, np.int64):
        moved = gpu.put(ends.astype(dtype))
        given = gpu.options | {"causal": causal, "return_state": True}
        y, state = cuda.linear_attention(*map(gpu.put, arrays), cu_seqlens=moved, **given)
        assert_same_bits(gpu.get(y), want)
        for got, exact in zip(state, want_state, strict=True):
            assert_same_bits(gpu.get(got), exact)


def test_offsets_on_the_gpu_stay_within_the_arrays(shim: Shim) -> None:
    """They are not looked at beforehand; AddressSanitizer would see what they reached."""
    arrays = arrays_of(3, 1, 1, 1, 100, 100, 4, 4)
    for ends in ([0, 90, 20, 100], [-5, 50, 10**9], [100, 0, 100, 0, 100], [0, 100, 0, 100, 0, 100]):
        y = cuda.linear_attention(*map(shim.put, arrays), cu_seqlens=Fake(np.array(ends)), causal=True, stream=1)
        assert shim.get(y).shape == (1, 1, 100, 4)
    # Those that fall begin where the last one ended, also beyond the threads that read them.
    falling = Fake(np.array([0, 100] * 150))
    options = {"causal": True, "stream": 1, "return_state": True}
    y, (_, z) = cuda.linear_attention(*map(shim.put, arrays), cu_seqlens=falling, **options)
    assert_same_bits(shim.get(y), forward(shim, arrays, causal=True)[0])
    assert shim.get(z)[0].all()
    assert not shim.get(z)[1:].any()


@every_dtype
@both
def test_layouts_are_within_tolerance(gpu: Any, causal: bool, name: str) -> None:
    arrays = arrays_of(7, 2, 4, 2, 70, 90, 16, 8, name)
    turned = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
    check(gpu, turned, causal=causal, layout="bnhd")
    views = {
        "heads and tokens exchanged": [x.swapaxes(1, 2) for x in turned],
        "columns apart": [np.asfortranarray(x) for x in arrays],
        "every other row": [np.repeat(x, 2, axis=2)[:, :, ::2] for x in arrays],
        "not aligned": [np.concatenate([x[..., :1], x], axis=-1)[..., 1:] for x in arrays],
    }
    want = forward(gpu, arrays, causal=causal)[0]
    for kind, given in views.items():
        got = forward(gpu, given, causal=causal)[0]
        assert_same_bits(got, want), kind


def test_leading_dimensions_are_any(gpu: Any) -> None:
    arrays = arrays_of(8, 6, 2, 1, 20, 20, 4, 3)
    want = forward(gpu, arrays, causal=True)[0]
    split = [x.reshape(2, 3, *x.shape[1:]) for x in arrays]
    y, state = forward(gpu, split, causal=True)
    assert_same_bits(y, want.reshape(2, 3, 2, 20, 3))
    assert state[0].shape == (2, 3, 1, 4, 3)
    # A batch that cannot be walked as one.
    crossed = [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in split]
    assert_same_bits(forward(gpu, crossed, causal=True)[0], y)
    single = [x[0, 0] for x in arrays]
    assert_same_bits(
        forward(gpu, single, causal=True)[0], forward(gpu, [x[:1, :1] for x in arrays], causal=True)[0][0, 0]
    )


@both
def test_results_go_where_they_are_told(gpu: Any, causal: bool) -> None:
    arrays = arrays_of(9, 1, 2, 2, 70, 70, 8, 8)
    want = forward(gpu, arrays, causal=causal)[0]
    for out in (np.full((1, 70, 2, 8), np.nan, F32).swapaxes(1, 2), np.full((1, 2, 8, 70), np.nan, F32).swapaxes(2, 3)):
        target = gpu.put(out)
        result = cuda.linear_attention(*map(gpu.put, arrays), causal=causal, out=target, **gpu.options)
        assert result is target
        assert_same_bits(gpu.get(target), want)


@both
def test_tf32_is_within_its_tolerance(gpu: Any, causal: bool) -> None:
    arrays = arrays_of(10, 1, 2, 1, 150, 150, 40, 33)
    check(gpu, arrays, causal=causal, tf32=True)
    exact, fast = (forward(gpu, arrays, causal=causal, tf32=x)[0] for x in (False, True))
    assert (exact != fast).any()


# --- what a result must not do -----------------------------------------------------------------------------------------------


@every_dtype
@every_map
def test_no_key_changes_an_earlier_row(gpu: Any, feature_map: str, name: str) -> None:
    q, k, v = arrays_of(11, 1, 2, 1, 200, 200, 12, 9, name)
    want = forward(gpu, [q, k, v], causal=True, **of_map(feature_map, 12))[0]
    for at, value in ((199, 30.0), (100, np.nan), (100, np.inf), (64, np.nan)):
        other, values = k.copy(), v.copy()
        other[:, :, at] = value
        values[:, :, at] = value
        got = forward(gpu, [q, other, values], causal=True, **of_map(feature_map, 12))[0]
        assert_same_bits(got[:, :, :at], want[:, :, :at])
        assert (wide(got[:, :, at:]) != wide(want[:, :, at:])).any()


@pytest.mark.parametrize("feature_map", EXPONENTIAL)
@both
def test_units_rise_and_fall_with_the_keys(gpu: Any, causal: bool, feature_map: str) -> None:
    q, k, v = arrays_of(25, 1, 2, 1, 300, 300, 4, 3)
    size = np.abs(np.linspace(-4, 4, 300)).astype(F32)[:, np.newaxis]
    options = {"causal": causal, **of_map(feature_map, 4), "scale": 1.0}
    for keys in (k * size, k * (4 - size), np.abs(k) * size):
        state = state_of(25, q, keys, v, feature_map=feature_map, scale=1.0)
        check(gpu, [q, keys, v], **options, initial_state=state)
        check_gradients(gpu, 25, [q, keys, v], **options, initial_state=state)


@pytest.mark.parametrize("feature_map", ["exp", "softmax"])
def test_keys_far_below_a_later_one_count_in_their_rows(gpu: Any, feature_map: str) -> None:
    arrays = arrays_of(24, 1, 2, 1, 60, 60, 4, 3)
    arrays[1][:, :, 20] = 60.0
    arrays[1][:, :, 40:, 1] = 70.0
    options = {"causal": True, "feature_map": feature_map, "scale": 1.0}
    check(gpu, arrays, **options)
    check_gradients(gpu, 24, arrays, **options)
    # Far beyond what a float's exponential holds; the definition's does not either.
    arrays[1] += 1000.0
    y, _ = forward(gpu, arrays, **options)
    exact, given = in_float64(arrays, options)
    want = cpu.linear_attention(*exact, **given)
    bound = tolerance.attention(np.asarray(2 * np.abs(arrays[2]).max()), want, 1100.0, y.dtype)
    assert (np.abs(wide(y) - want) <= bound).all()


@both
def test_what_is_not_finite_stays_in_its_head(gpu: Any, causal: bool) -> None:
    arrays = arrays_of(12, 2, 2, 2, 80, 80, 8, 8)
    want = forward(gpu, arrays, causal=causal)[0]
    broken = [x.copy() for x in arrays]
    for x in broken:
        x[0, 1, 40] = np.nan
    got = forward(gpu, broken, causal=causal)[0]
    same = np.ones((2, 2), bool)
    same[0, 1] = False
    assert_same_bits(got[same], want[same])


@every_map
@both
def test_hidden_keys_may_hold_anything(gpu: Any, causal: bool, feature_map: str) -> None:
    arrays = arrays_of(13, 1, 2, 1, 100, 100, 6, 5)
    mask = np.random.default_rng(13).random((1, 100)) < 0.6
    want = forward(gpu, arrays, causal=causal, key_mask=mask, **of_map(feature_map, arrays[0].shape[-1]))
    for x in arrays[1:]:
        x[0, 0, ~mask[0]] = np.nan
    got = forward(gpu, arrays, causal=causal, key_mask=mask, **of_map(feature_map, arrays[0].shape[-1]))
    for x, y in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert_same_bits(x, y)


@every_map
@both
def test_rows_without_keys_are_zero(gpu: Any, causal: bool, feature_map: str) -> None:
    arrays = arrays_of(14, 1, 2, 1, 9, 9, 4, 3)
    for mask in (np.zeros((1, 9), bool), np.arange(9)[np.newaxis] > 4):
        y, state = forward(gpu, arrays, causal=causal, key_mask=mask, **of_map(feature_map, arrays[0].shape[-1]))
        rows = y[:, :, : 5 if mask.any() and causal else 0 if mask.any() else 9]
        assert not rows.any()
        assert mask.any() or not any(x.any() for x in state[:2])
    assert not forward(gpu, [arrays[0], *(x[:, :, :0] for x in arrays[1:])], causal=causal)[0].any()


@both
def test_empty_arrays_give_empty_results(gpu: Any, causal: bool) -> None:
    for b, h, n, m in ((0, 2, 3, 3), (2, 0, 3, 3), (1, 2, 0, 5), (1, 1, 0, 0)):
        arrays = arrays_of(15, b, h, h, n, m, 4, 3)
        y, (s, z) = forward(gpu, arrays, causal=causal)
        assert (y.shape, s.shape, z.shape) == ((b, h, n, 3), (b, h, 4, 3), (b, h, 4))
        assert n or not s.size or np.isfinite(s).all()
        gradients = backward(gpu, y, *arrays, y, causal=causal)
        assert [x.shape for x in gradients] == [x.shape for x in arrays]
        assert not any(x.any() for x in gradients)


def test_long_sequences_lose_nothing(gpu: Any) -> None:
    """Sums of many chunks: of ones the row is one, and the state the number of keys."""
    q = k = np.zeros((1, 1, 5000, 2), F32)
    y, (s, z) = forward(gpu, [q, k, np.ones((1, 1, 5000, 1), F32)], causal=True)
    assert (y == 1).all()
    assert (s == 5000).all()
    assert (z == 5000).all()


# --- token by token ----------------------------------------------------------------------------------------------------------


@every_dtype
@every_map
@pytest.mark.parametrize("decays", [False, True], ids=["", "decay"])
def test_steps_are_the_rows_of_a_call(gpu: Any, decays: bool, feature_map: str, name: str) -> None:
    arrays = arrays_of(16, 2, 4, 2, 7, 7, 9, 37, name)
    if decays and feature_map not in PLAIN:
        pytest.skip("decay is not of this map")
    options: dict[str, Any] = {**of_map(feature_map, 9), "scale": 0.7}
    g = -np.random.default_rng(16).random((2, 2, 7)).astype(F32)
    if decays:
        g[..., 4] = -np.inf
    state = state_of(16, *arrays, feature_map=feature_map, scale=0.7)
    exact, given = in_float64(arrays, options)
    more = {"decay": wide(g)} if decays else {}
    want, want_state = cpu.linear_attention(
        *exact, **given, **more, causal=True, initial_state=tuple(map(wide, state)), return_state=True
    )
    moved = tuple(gpu.put(x.copy()) for x in state)
    for i in range(7):
        step = {**options, "decay": g[..., i].copy()} if decays else options
        token = [gpu.put(x[:, :, i]) for x in arrays]
        y = cuda.linear_attention_step_(*token, moved, **(gpu.options | put(gpu, step)))
        size = np.abs(want[:, :, i]) + 4.0
        bound = tolerance.attention(size, want[:, :, i], 0.0, arrays[0].dtype)
        assert (np.abs(wide(gpu.get(y)) - want[:, :, i]) <= bound).all()
    for got, exact_sum in zip(in_units([gpu.get(x) for x in moved], want_state), want_state, strict=True):
        assert np.abs(got - exact_sum).max() <= 64 * 2.0**-24 * np.abs(exact_sum).max()


def test_a_step_takes_rows_of_a_longer_array(gpu: Any) -> None:
    arrays = arrays_of(17, 1, 2, 1, 3, 3, 4, 3)
    state = state_of(17, *arrays)
    one, other = (tuple(gpu.put(x.copy()) for x in state) for _ in range(2))
    rows = [x[:, :, 1] for x in arrays]
    out = gpu.put(np.full((1, 2, 3), np.nan, F32))
    want = cuda.linear_attention_step_(*(gpu.put(x.copy()) for x in rows), one, **gpu.options)
    assert cuda.linear_attention_step_(*map(gpu.put, rows), other, out=out, **gpu.options) is out
    assert_same_bits(gpu.get(out), gpu.get(want))
    single = tuple(gpu.put(x[0, 0].copy()) for x in state)
    alone = cuda.linear_attention_step_(*(gpu.put(x[0, 0].copy()) for x in rows), single, **gpu.options)
    assert_same_bits(gpu.get(alone), gpu.get(want)[0, 0])


# --- gradients ---------------------------------------------------------------------------------------------------------------


def backward(gpu: Any, dy: Any, q: Any, k: Any, v: Any, y: Any, **options: Any) -> list[Any]:
    given = gpu.options | put(gpu, options)
    dq, dk, dv, *first = cuda.linear_attention_backward(*map(gpu.put, (dy, q, k, v, y)), **given)
    return [gpu.get(x) for x in (dq, dk, dv, *itertools.chain(*first))]


def check_gradients(gpu: Any, seed: int, arrays: list[Any], **options: Any) -> None:
    """Against those of the same numbers in float64, which difference quotients prove elsewhere."""
    rng = np.random.default_rng(seed)
    exact, given = in_float64(arrays, options)
    y, final = cpu.linear_attention(*exact, **given, return_state=True)
    dy = rng.standard_normal(y.shape).astype(arrays[0].dtype)
    d_state = tuple(rng.standard_normal(x.shape).astype(F32) for x in final[:2])
    own = d_state
    if len(final) == 3:
        # They are taken at the call's own m.
        seen = np.isfinite(final[2])
        m = np.where(seen, wide(forward(gpu, arrays, **options)[1][2]) - np.where(seen, final[2], 0), 0)
        own = (wide(d_state[0]) * 2.0 ** -m[..., np.newaxis], wide(d_state[1]) * 2.0**-m)
    found = backward(gpu, dy, *arrays, y.astype(arrays[0].dtype), d_state=d_state, **options)
    dq, dk, dv, *first = cpu.linear_attention_backward(wide(dy), *exact, y, d_state=tuple(map(wide, own)), **given)
    fraction = fraction_of(arrays, bool(options.get("tf32")))
    size, exponent = magnitude(arrays, options, y)
    features = max(np.abs(wide(x)).max(initial=1.0) for x in arrays[:2])
    most = float(np.abs(wide(dy)).max(initial=0) * (size.max(initial=0) + 1.0) * features)
    for got, want in zip(found, (dq, dk, dv, *itertools.chain(*first)), strict=True):
        assert got.shape == want.shape
        whole = np.abs(want).max(initial=0) + most
        bound = tolerance.attention_gradient(whole, exponent, got.dtype, arrays[0].dtype)
        if fraction > tolerance.rounding(np.dtype(F32)):
            bound += tolerance.gradient_on_tensor_cores(whole, fraction)
        assert np.abs(wide(got) - want).max(initial=0) <= bound


@every_dtype
@every_map
@both
def test_gradients_are_within_tolerance(gpu: Any, causal: bool, feature_map: str, name: str) -> None:
    for seed, sizes in enumerate(SIZES if feature_map in ("elu", "cosine") else SIZES[1:4]):
        check_gradients(gpu, seed, arrays_of(seed, *sizes, name), causal=causal, **of_map(feature_map, sizes[5]))


@every_dtype
@both
@pytest.mark.parametrize("kind", conditions(True, 2, 9, 0))
def test_gradients_under_conditions_are_within_tolerance(gpu: Any, kind: str, causal: bool, name: str) -> None:
    for seed, feature_map, arrays, options in cases(kind, causal, name):
        state = state_of(seed, *arrays, feature_map=feature_map, scale=options.get("scale"))
        check_gradients(gpu, seed, arrays, causal=causal, **options, initial_state=state)


@every_dtype
@both
def test_gradients_of_head_sizes_are_within_tolerance(gpu: Any, causal: bool, name: str) -> None:
    for d, e in ((32, 32), (96, 96), (64, 128), (130, 64)):
        check_gradients(gpu, d, arrays_of(d, 1, 1, 1, 80, 80, d, e, name), causal=causal)


@both
def test_gradients_of_packed_sequences_are_within_tolerance(gpu: Any, causal: bool) -> None:
    ends = [0, 0, 130, 131, 200, 200]
    for feature_map in ("elu", "cosine", *EXPONENTIAL):
        arrays = arrays_of(18, 1, 4, 2, 200, 200, 12, 9)
        options: dict[str, Any] = {"causal": causal, "cu_seqlens": ends, **of_map(feature_map, 12)}
        options["initial_state"] = state_of(19, *arrays, sequences=5, feature_map=feature_map)
        check_gradients(gpu, 18, arrays, **options)
        if causal and feature_map in PLAIN:
            check_gradients(gpu, 18, arrays, **options, decay=np.array([-0.1, -0.01], F32))


@both
def test_gradients_of_layouts_are_those_of_heads_first(gpu: Any, causal: bool) -> None:
    arrays = arrays_of(20, 2, 4, 2, 70, 90, 16, 8)
    y = forward(gpu, arrays, causal=causal)[0]
    want = backward(gpu, y, *arrays, y, causal=causal)
    turned = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (y, *arrays, y)]
    for got, exact in zip(backward(gpu, *turned, causal=causal, layout="bnhd"), want, strict=True):
        assert_same_bits(got.swapaxes(1, 2), exact)
    single = [x[0, 0] for x in (y, *arrays, y)]
    first = [x[:1, :1] for x in (y, *arrays, y)]
    for got, exact in zip(backward(gpu, *single, causal=causal), backward(gpu, *first, causal=causal), strict=True):
        assert_same_bits(got, exact[0, 0])


@both
def test_gradients_in_tf32_are_within_its_tolerance(gpu: Any, causal: bool) -> None:
    check_gradients(gpu, 21, arrays_of(21, 1, 2, 1, 150, 150, 40, 33), causal=causal, tf32=True)


@every_map
def test_no_row_reaches_the_gradient_of_a_later_key(gpu: Any, feature_map: str) -> None:
    arrays = arrays_of(22, 1, 2, 1, 200, 200, 12, 9)
    y = forward(gpu, arrays, causal=True, **of_map(feature_map, 12))[0]
    want = backward(gpu, y, *arrays, y, causal=True, **of_map(feature_map, 12))
    q, k, v = (x.copy() for x in arrays)
    q[:, :, 100] = np.nan
    dy = y.copy()
    dy[:, :, 100] = np.inf
    got = backward(gpu, dy, q, k, v, y, causal=True, **of_map(feature_map, 12))
    for x, exact in zip(got[1:], want[1:], strict=True):
        assert_same_bits(x[:, :, 101:], exact[:, :, 101:])
    rows = np.arange(200) != 100
    assert_same_bits(got[0][:, :, rows], want[0][:, :, rows])


@every_map
@both
def test_gradients_of_hidden_keys_are_zero(gpu: Any, causal: bool, feature_map: str) -> None:
    arrays = arrays_of(23, 1, 2, 1, 100, 100, 6, 5)
    mask = np.random.default_rng(23).random((1, 100)) < 0.6
    options = {"causal": causal, "key_mask": mask, **of_map(feature_map, 6)}
    for x in arrays[1:]:
        x[0, 0, ~mask[0]] = np.nan
    y = forward(gpu, arrays, **options)[0]
    state = state_of(23, *arrays, feature_map=feature_map)[:2]
    for gradient in backward(gpu, y, *arrays, y, **options, d_state=state):
        assert np.isfinite(gradient).all()
        assert gradient.shape[1] == 2 or not gradient[0, 0, ~mask[0]].any()


# --- refusals ----------------------------------------------------------------------------------------------------------------


def on_gpu(*shape: int, dtype: Any = F32, **changes: Any) -> Fake:
    return Fake(np.ones(shape, dtype), **changes)


def refused(kind: type[Exception], text: str, *arrays: Any, **options: Any) -> None:
    given = arrays or tuple(on_gpu(1, 2, 5, 4) for _ in range(3))
    with pytest.raises(kind, match=text):
        cuda.linear_attention(*given, **options)


def test_arrays_that_do_not_fit_are_refused(shim: Shim) -> None:
    q = on_gpu(1, 2, 5, 4)
    refused(TypeError, r"^q must be an array on a GPU", np.ones((2, 5, 4), F32), q, q)
    refused(TypeError, r"^v must be an array on a GPU, got 1.0", q, q, 1.0)
    refused(
        TypeError,
        r"^q must be of dtype float16 or bfloat16 or float32, got float64",
        *(on_gpu(1, 2, 5, 4, dtype=float),) * 3,
    )
    refused(TypeError, r"^k must be of dtype float32, as q, got float16", q, on_gpu(1, 2, 5, 4, dtype=np.float16), q)
    refused(ValueError, r"^k must be of shape \(1, H, N, 4\), got \(1, 2, 5, 3\)", q, on_gpu(1, 2, 5, 3), q)
    refused(ValueError, r"^v must be of shape \(1, 2, 5, E\), got \(1, 2, 6, 4\)", q, q, on_gpu(1, 2, 6, 4))
    refused(ValueError, r"^q must be of a multiple of the 2 heads", on_gpu(1, 3, 5, 4), q, q)
    many = on_gpu(2, 2, 2, 2, 2, 2, 3, 4)
    crossed = Fake(np.ones((3, 2, 2, 2, 2, 2, 2, 4), F32)[::, ...].transpose(6, 5, 4, 3, 2, 1, 0, 7))
    refused(ValueError, r"^q must be of at most 4 leading dimensions", crossed, many, many)


def misaligned(*shape: int, dtype: Any = F32) -> Any:
    """Ones, a byte after where they should lie."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    array = np.empty(size + 1, np.uint8)[1:].view(dtype).reshape(shape)
    array[...] = 1
    return array


def test_arrays_that_are_not_aligned_are_refused(shim: Shim) -> None:
    """Which the CPU reads, and a GPU ends the process's work for."""
    q = on_gpu(1, 2, 5, 4)
    refused(ValueError, r"^k must be aligned to its elements", q, Fake(misaligned(1, 2, 5, 4)), q)
    refused(ValueError, r"^decay must be aligned to its elements", decay=Fake(misaligned(2)), causal=True)
    state = on_gpu(1, 2, 4, 4), Fake(misaligned(1, 2, 4))
    refused(ValueError, r"^initial_state\[1\] must be aligned to its elements", initial_state=state)
    offsets = misaligned(2, dtype=np.int64)
    offsets[:] = 0, 5
    refused(ValueError, r"^cu_seqlens must be aligned to its elements", cu_seqlens=Fake(offsets))
    projection = Fake(misaligned(3, 4))
    refused(ValueError, r"^projection must be aligned to its elements", projection=projection, feature_map="favor")


def test_options_that_do_not_fit_are_refused(shim: Shim) -> None:
    refused(
        NotImplementedError,
        r"^decay must be None with feature_map='exp' on a GPU",
        feature_map="exp",
        decay=on_gpu(2),
        causal=True,
    )
    refused(ValueError, r"^feature_map must be .*; did you mean 'elu'\?", feature_map="elo")
    refused(ValueError, r"^kernel_eps must be None with feature_map='elu'", kernel_eps=1.0)
    refused(ValueError, r"^projection must be None with feature_map='elu'", projection=on_gpu(2, 4))
    refused(ValueError, r"^projection must be of shape \(m, 4\)", projection=on_gpu(2, 3), feature_map="favor")
    refused(ValueError, r"^projection must be given", feature_map="favor")
    refused(TypeError, r"^tf32 must be ", tf32=1)
    refused(TypeError, r"^return_state must be ", return_state=1)
    refused(ValueError, r"^layout must be ", layout="nope")
    refused(TypeError, r"^key_mask must be an array on a GPU", key_mask=np.ones((1, 5), bool))
    refused(TypeError, r"^key_mask must be of dtype bool .*, got float32", key_mask=on_gpu(1, 5))
    refused(ValueError, r"^key_mask must be of shape \(1, 5\) or \(1, 2, 5\)", key_mask=on_gpu(5, 5, dtype=bool))
    refused(ValueError, r"^decay must be None without causal=True", decay=on_gpu(2))
    refused(ValueError, r"^decay must be of shape \(2,\) or \(1, 2, 5\), got \(3,\)", decay=on_gpu(3), causal=True)
    refused(TypeError, r"^decay must be of dtype float16", decay=on_gpu(2, dtype=np.int32), causal=True)
    refused(ValueError, r"^cu_seqlens must be offsets that rise from 0 to 5", cu_seqlens=[0, 4])
    refused(TypeError, r"^cu_seqlens must be a 1-D array of int32 or int64", cu_seqlens=on_gpu(3))
    refused(TypeError, r"^initial_state must be a tuple of arrays", initial_state=on_gpu(3))
    refused(ValueError, r"^initial_state must be 2 arrays \(S, z\), got 1", initial_state=(on_gpu(3),))
    refused(
        TypeError, r"^initial_state\[1\] must be an array on a GPU, got None", initial_state=(on_gpu(1, 2, 4, 4), None)
    )
    s, z = on_gpu(1, 2, 4, 4), on_gpu(1, 2, 4)
    refused(ValueError, r"^initial_state\[1\] must be of shape \(1, 2, 4\), got", initial_state=(s, s))
    refused(
        TypeError,
        r"^initial_state\[0\] must be of dtype float32, got",
        initial_state=(on_gpu(1, 2, 4, 4, dtype=float), z),
    )
    turned = Fake(np.ones((1, 2, 4, 4), F32).swapaxes(2, 3)[:, ::-1])
    refused(ValueError, r"^initial_state\[0\] must be C-contiguous, got other strides", initial_state=(turned, z))


def test_results_that_do_not_fit_are_refused(shim: Shim) -> None:
    refused(ValueError, r"^out must be of shape \(1, 2, 5, 4\), got", out=on_gpu(2, 5, 4))
    refused(TypeError, r"^out must be of dtype float32, got", out=on_gpu(1, 2, 5, 4, dtype=float))
    q = np.ones((1, 2, 5, 4), F32)
    refused(
        ValueError, r"^out must be memory apart from q", Fake(q), on_gpu(1, 2, 5, 4), on_gpu(1, 2, 5, 4), out=Fake(q)
    )


def test_steps_that_do_not_fit_are_refused(shim: Shim) -> None:
    x, s, z = on_gpu(1, 2, 4), np.zeros((1, 2, 4, 4), F32), np.zeros((1, 2, 4), F32)
    step = cuda.linear_attention_step_
    for state, kind, text in (
        (None, TypeError, r"^state must be a tuple of arrays"),
        ((Fake(s), Fake(s)), ValueError, r"^state\[1\] must be of shape \(1, 2, 4\)"),
        ((Fake(s, read_only=True), Fake(z)), ValueError, r"^state\[0\] must be writable"),
        (
            (Fake(s), Fake(s[0, 0, 0].reshape(1, 1, 4).repeat(2, 1)[:, ::-1])),
            ValueError,
            r"^state\[1\] must be C-contig",
        ),
        (
            (Fake(s), Fake(s.reshape(-1)[:8].reshape(1, 2, 4))),
            ValueError,
            r"^state\[0\] must be memory apart from state\[1\]",
        ),
    ):
        with pytest.raises(kind, match=text):
            step(x, x, x, state)
    with pytest.raises(ValueError, match=r"^decay must be of shape \(2,\) or \(1, 2\), got \(3,\)"):
        step(x, x, x, (Fake(s), Fake(z)), decay=on_gpu(3))
    long = on_gpu(1, 1, 5000)
    with pytest.raises(ValueError, match=r"^q must be of rows with at most 3072 features, got 5000"):
        step(long, long, on_gpu(1, 1, 1), (on_gpu(1, 1, 5000, 1), on_gpu(1, 1, 5000)))
    assert not s.any()
    assert not z.any()


def test_gradients_that_do_not_fit_are_refused(shim: Shim) -> None:
    x = on_gpu(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"^dy must be of shape \(1, 2, 5, 4\), got \(1, 2, 5, 3\)"):
        cuda.linear_attention_backward(on_gpu(1, 2, 5, 3), x, x, x, x)
    with pytest.raises(ValueError, match=r"^d_state\[0\] must be of shape"):
        cuda.linear_attention_backward(x, x, x, x, x, d_state=(x, x))


# --- torch -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_on(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch, and the device of its tensors."""
    return through_torch(gpu, monkeypatch, "linear_attention", "linear_attention_backward", "linear_attention_step_")


def through_torch(gpu: Any, monkeypatch: pytest.MonkeyPatch, *names: str) -> Any:
    """torch, and the device of its tensors: for the shim tensors of the CPU that say they are on a GPU."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("fastops.torch")
    if not isinstance(gpu, Shim):
        return torch, "cuda"

    def through(name: str) -> Any:
        function = getattr(cuda, name)

        def into(x: Any) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(map(into, x))
            return Fake(x.detach().numpy()) if isinstance(x, torch.Tensor) else x

        def out_of(x: Any) -> Any:
            return tuple(map(out_of, x)) if isinstance(x, tuple) else torch.from_numpy(gpu.get(x))

        return lambda *args, **options: out_of(
            function(*map(into, args), **{key: into(x) for key, x in options.items()}, stream=1)
        )

    for name in names:
        monkeypatch.setattr(cuda, name, through(name))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    return torch, "cpu"


@both
@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_torch_differentiates_on_the_gpu(torch_on: Any, feature_map: str, causal: bool) -> None:
    from fastops import torch as ft

    torch, device = torch_on
    arrays = arrays_of(30, 2, 4, 2, 70, 70, 8, 5)
    state = state_of(30, *arrays, feature_map=feature_map)
    leaves = [torch.tensor(x, device=device, requires_grad=i < 5) for i, x in enumerate((*arrays, *state))]
    mask = np.random.default_rng(30).random((2, 70)) < 0.8
    y, last = ft.linear_attention(
        *leaves[:3],
        causal=causal,
        feature_map=feature_map,
        key_mask=torch.tensor(mask, device=device),
        initial_state=leaves[3:],
        return_state=True,
    )
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate((y, *last[:2]))]
    sum((x * w.to(device)).sum() for x, w in zip((y, *last), weights, strict=False)).backward()
    options = {"causal": causal, "feature_map": feature_map, "key_mask": mask, "initial_state": tuple(map(wide, state))}
    want, final = cpu.linear_attention(*map(wide, arrays), **options, return_state=True)
    dy, ds, dz = (wide(x.numpy()) for x in weights)
    if len(final) == 3:
        m = wide(last[2].cpu().numpy()) - final[2]
        ds, dz = ds * 2.0 ** -m[..., np.newaxis], dz * 2.0**-m
    dq, dk, dv, first = cpu.linear_attention_backward(dy, *map(wide, arrays), want, **options, d_state=(ds, dz))
    for leaf, exact in zip(leaves, (dq, dk, dv, *first), strict=False):
        found = wide(leaf.grad.cpu().numpy())
        assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("kind", ["heads", "tokens", "packed", "sums", "rows alone", "two axes"])
def test_torch_differentiates_decays_on_the_gpu(torch_on: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastops import torch as ft

    torch, device = torch_on
    n = 40 if kind == "rows alone" else 30
    arrays = arrays_of(32, 1 if kind == "packed" else 2, 4, 2, n, 30, 5, 3)
    rng = np.random.default_rng(32)
    decay = -rng.random(2 if kind == "heads" else (*arrays[1].shape[:2], 30)).astype(F32)
    state = state_of(32, *arrays, sequences=3 if kind == "packed" else None)
    options: dict[str, Any] = {"causal": True, "key_mask": rng.random((*arrays[1].shape[:1], 30)) < 0.8}
    if kind == "packed":
        options["cu_seqlens"] = np.array([0, 11, 11, 30])
    if kind == "sums":
        options["normalize"] = False
    if kind == "two axes":
        arrays, decay = [x[0, 0] for x in arrays], decay[0, 0]
        state, options["key_mask"] = tuple(x[0, 0] for x in state), options["key_mask"][0]
    found = []
    for on_gpu, where, dtype in ((True, device, torch.float32), (False, "cpu", torch.float64)):
        if where == "cpu":
            monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu, raising=False)
        leaf = torch.tensor(decay, device=where, dtype=dtype, requires_grad=True)
        tensors = [torch.tensor(x, device=where, dtype=dtype) for x in (*arrays, *state)]
        given = {key: torch.tensor(x, device=where) if isinstance(x, np.ndarray) else x for key, x in options.items()}
        y, last = ft.linear_attention(*tensors[:3], **given, decay=leaf, initial_state=tensors[3:], return_state=True)
        weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate((y, *last))]
        sum((x * w.to(x)).sum() for x, w in zip((y, *last), weights, strict=True)).backward()
        found.append(wide(leaf.grad.cpu().numpy()))
    assert np.abs(found[0] - found[1]).max() <= 2e-5 * np.abs(found[1]).max()


@pytest.mark.parametrize(
    ("ends", "counted"), [([0, 11, 10**9], [0, 11, 30]), ([0, 20, 11, 30], [0, 20, 20, 30]), ([4, 11, 20], [4, 11, 20])]
)
def test_torch_differentiates_decays_of_offsets_that_nobody_checked(
    torch_on: Any, ends: list[int], counted: list[int]
) -> None:
    """Those of the sequences alone; a look beyond the tokens would end all work on a GPU."""
    from fastops import torch as ft

    torch, device = torch_on
    q, k, v = (torch.tensor(x, device=device) for x in arrays_of(33, 1, 2, 2, 30, 30, 4, 3))
    decay = torch.tensor(-np.random.default_rng(33).random((1, 2, 30)).astype(F32), device=device, requires_grad=True)

    def gradient(decay: Any, *operands: Any, **options: Any) -> Any:
        y, (s, z) = ft.linear_attention(*operands, causal=True, decay=decay, return_state=True, **options)
        return torch.autograd.grad((y, s, z), decay, [torch.ones_like(x) for x in (y, s, z)])[0]

    found = gradient(decay, q, k, v, cu_seqlens=torch.tensor(ends, device=device))
    want = torch.zeros_like(found)
    for begin, end in itertools.pairwise(counted):
        if end > begin:
            own = decay[..., begin:end].detach().requires_grad_()
            want[..., begin:end] = gradient(own, *(x[:, :, begin:end] for x in (q, k, v)))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


def test_torch_steps_are_the_rows_of_a_call(torch_on: Any) -> None:
    from fastops import torch as ft

    torch, device = torch_on
    q, k, v = (torch.tensor(x, device=device) for x in arrays_of(31, 1, 2, 1, 6, 6, 4, 3))
    want = ft.linear_attention(q, k, v, causal=True)
    nothing = [x[:, :, :0] for x in (q, k, v)]
    _, state = ft.linear_attention(*nothing, causal=True, return_state=True)
    for i in range(6):
        row = ft.linear_attention_step_(q[:, :, i], k[:, :, i], v[:, :, i], state)
        torch.testing.assert_close(row, want[:, :, i], atol=1e-5, rtol=1e-5)
    assert state[0]._version == 6


def test_torch_says_what_the_gpu_has_not(torch_on: Any) -> None:
    from fastops import torch as ft

    torch, device = torch_on
    x = torch.ones(1, 1, 3, 2, device=device)
    decay = torch.full((1,), -0.1, device=device)
    with pytest.raises(NotImplementedError, match=r"^decay must be None with feature_map='exp' on a GPU"):
        ft.linear_attention(x, x, x, feature_map="exp", decay=decay, causal=True)
    with pytest.raises(TypeError, match=r"^q must be of dtype float16 or bfloat16 or float32, got float64"):
        ft.linear_attention(x.double(), x.double(), x.double())
