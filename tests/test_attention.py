# SPDX-License-Identifier: BSD-3-Clause
"""Linear attention: every map and condition against the definition, states, layouts, and the bugs that other packages had."""

from __future__ import annotations

import importlib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import tolerance
from hypothesis import HealthCheck, given, settings
from quadratic import DECAYING, EXPONENTIAL, MAPS, Definition, softmax_rows, wide
from samples import FLOATS, assert_same_bits, bits

import fastops
from fastops import attention as module

F32, F64 = FLOATS["f32"], FLOATS["f64"]
HALF = ("f16", "bf16")
HALVES = [dtype for dtype in FLOATS.values() if dtype.itemsize == 2]
BF16 = FLOATS.get("bf16")
needs_bfloat16 = pytest.mark.skipif(BF16 is None, reason="ml_dtypes is not installed")
in_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
both = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
every_map = pytest.mark.parametrize("name", MAPS)


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


@pytest.fixture
def best_ops(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The same on its best CPU level alone, for what takes seconds."""
    monkeypatch.setattr(module, "_backend", native)
    return module


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = fastops.get_num_threads()
    yield
    fastops.set_num_threads(before)


def operands(
    seed: int, b: int, h: int, heads: int, n: int, m: int, d: int, e: int, dtype: Any = F64, scale: float = 1.0
) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    shapes = (b, h, n, d), (b, heads, m, d), (b, heads, m, e)
    q, k, v = ((scale * rng.standard_normal(shape)).astype(dtype) for shape in shapes)
    return q, k, v


def of_map(name: str, d: int, features: int = 6) -> dict[str, Any]:
    """The options that a map needs."""
    options: dict[str, Any] = {"feature_map": name}
    if name == "favor":
        options["projection"] = fastops.favor_projection(d, features, rng=3)
    return options


def alive(name: str, d: int) -> dict[str, Any]:
    """The same with features that are not all 0 in any row."""
    return {**of_map(name, d), **({"kernel_eps": 0.1} if name == "relu2" else {})}


def in_state_dtype(options: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The same options with what backends round to the compute dtype rounded already, for the definition."""
    computed = F64 if dtype == F64 else F32
    names = ("projection", "decay")
    return {
        key: value.astype(computed) if key in names and value is not None else value for key, value in options.items()
    }


def sums(state: Any) -> list[Any]:
    """S and z of a state without their exponent."""
    s, z, *m = (wide(x) for x in state)
    power = 2.0 ** m[0] if m else np.ones_like(z)
    return [s * power[..., np.newaxis], z * power]


def assert_defined(got: Any, q: Any, k: Any, v: Any, **options: Any) -> None:
    """A result within the rounding bound of its definition."""
    definition = Definition(q, k, v, **in_state_dtype(options, q.dtype))
    want, magnitude = definition.result()
    assert_close(got, want, magnitude, definition.exponent())


def assert_close(got: Any, want: Any, magnitude: Any, exponent: float = 0.0) -> None:
    assert got.shape == want.shape
    bound = tolerance.attention(magnitude, want, exponent, got.dtype)
    difference = np.abs(wide(got) - want)
    over = ~(difference <= bound)
    assert not over.any(), (
        f"{int(over.sum())} of {over.size} over the bound, "
        f"the worst {np.max(difference / np.where(bound > 0, bound, 1)):.3g} of it"
    )


def assert_unchanged(got: Any, want: Any, definition: Definition, part: Any) -> None:
    """The same bits; of exponentials, where a block may take another way, the same but for roundings."""
    if definition.map not in EXPONENTIAL:
        assert_same_bits(got[part], want[part])
        return
    y, magnitude = definition.result()
    assert_close(got[part], y[part], magnitude[part], definition.exponent())


def conditions(name: str, causal: bool, b: int, heads: int, m: int, seed: int) -> list[dict[str, Any]]:
    """Masks and decays, alone and together."""
    rng = np.random.default_rng(seed)
    padding, scattered = rng.random((b, m)) < 0.8, rng.random((b, heads, m)) < 0.6
    found: list[dict[str, Any]] = [{}, {"key_mask": padding}, {"key_mask": scattered}]
    if causal and name in DECAYING:
        tokens = -rng.exponential(0.3, (b, heads, m))
        tokens[rng.random(tokens.shape) < 0.05] = -np.inf
        tokens[rng.random(tokens.shape) < 0.05] = 0.0
        found += [{"decay": -rng.exponential(0.1, heads)}, {"decay": -rng.exponential(0.3, (b, heads, m))}]
        found += [{"decay": tokens, "key_mask": scattered}]
    return found


# --- against the definition ----------------------------------------------------------------------------------------------------

# B, H, H_kv, N, M, D, E: around the vectors and the blocks, one or several query heads, more and fewer queries than keys.
SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 1, 5, 5, 3, 2),
    (1, 4, 2, 9, 4, 8, 5),
    (1, 3, 3, 4, 21, 16, 17),
    (1, 2, 1, 70, 70, 33, 9),
    (1, 1, 1, 130, 131, 8, 16),
]


@every_map
@both
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_is_the_definition(ops: ModuleType, name: str, causal: bool, dtype: str) -> None:
    for seed, (b, h, heads, n, m, d, e) in enumerate(SIZES):
        q, k, v = operands(seed, b, h, heads, n, m, d, e, FLOATS[dtype])
        for condition in conditions(name, causal, b, heads, m, seed)[seed % 2 :: 2 if seed > 3 or dtype in HALF else 1]:
            options = {"causal": causal, **of_map(name, d), **condition}
            before = [bits(x).copy() for x in (q, k, v)]
            y = ops.linear_attention(q, k, v, **options)
            assert y.dtype == q.dtype
            assert_defined(y, q, k, v, **options)
            for x, same in zip((q, k, v), before, strict=True):
                np.testing.assert_array_equal(bits(x), same)


@both
@pytest.mark.parametrize(
    "options",
    [
        {"normalize": False},
        {"eps": 0.5},
        {"scale": 0.3},
        {"feature_map": "identity", "normalize": True, "eps": 40.0},
        {"feature_map": "identity", "scale": -2.0},
        {"feature_map": "relu", "kernel_eps": 0.25, "eps": 1e-3},
        {"feature_map": "relu2", "kernel_eps": 0.5},
        {"feature_map": "cosine", "scale": 2.0, "normalize": False},
        {"feature_map": "exp", "normalize": False, "scale": 0.5},
        {"feature_map": "exp", "eps": 3.0},
        {"feature_map": "softmax", "scale": 1.7},
        {"feature_map": "favor", "scale": 0.4, "normalize": False},
        {"feature_map": "favor", "scale": 1.0, "eps": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_options_are_the_definition(ops: ModuleType, causal: bool, dtype: str, options: dict[str, Any]) -> None:
    q, k, v = operands(7, 1, 2, 1, 37, 37, 8, 6, FLOATS[dtype])
    needed = {**of_map(options.get("feature_map", "elu"), 8), **options}
    assert_defined(ops.linear_attention(q, k, v, causal=causal, **needed), q, k, v, causal=causal, **needed)


@both
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_wide_rows_are_the_definition(ops: ModuleType, causal: bool, dtype: str) -> None:
    """D and E beyond any tile, neither a multiple of a vector."""
    for d, e in ((300, 7), (5, 300), (129, 131)):
        q, k, v = operands(d, 1, 1, 1, 40, 40, d, e, FLOATS[dtype])
        assert_defined(ops.linear_attention(q, k, v, causal=causal), q, k, v, causal=causal)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_every_length_is_the_definition(ops: ModuleType, dtype: str) -> None:
    """Around every block and vector; queries and keys of different lengths shift the diagonal."""
    q, k, v = operands(8, 1, 1, 1, 70, 70, 4, 3, FLOATS[dtype])
    for n, shift in itertools.product(range(0, 70, 3), (-33, -16, -7, -1, 0, 1, 15, 40)):
        m = max(n + shift, 0)
        rows, keys, values = q[:, :, :n], k[:, :, :m], v[:, :, :m]
        assert_defined(ops.linear_attention(rows, keys, values, causal=True), rows, keys, values, causal=True)


@both
def test_long_sums_keep_their_accuracy(ops: ModuleType, causal: bool) -> None:
    """bfloat16 operands over 4096 tokens: a state in bfloat16 would be off by a per cent, a key sum in it by half a one."""
    dtype = BF16 or F32
    q, k, v = operands(9, 1, 1, 1, 4096, 4096, 16, 8, dtype)
    y, state = ops.linear_attention(q, k, v, causal=causal, return_state=True)
    assert state[0].dtype == state[1].dtype == F32
    s, z = Definition(q[:, :, -1:], k, v).sums()
    np.testing.assert_allclose(state[1], z, rtol=tolerance.running_sum(4096))
    last = slice(-64, None)
    assert_defined(y[:, :, last], q[:, :, last], k, v, causal=causal)
    assert np.abs(wide(state[0]) - s).max() <= tolerance.running_sum(4096) * z.max() * np.abs(wide(v)).max()


# --- states --------------------------------------------------------------------------------------------------------------------


@every_map
@both
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_state_goes_on_where_it_stopped(ops: ModuleType, name: str, causal: bool, dtype: str) -> None:
    b, h, heads, n, d, e = 2, 4, 2, 41, 5, 3
    q, k, v = operands(10, b, h, heads, n, n, d, e, FLOATS[dtype])
    for condition in conditions(name, causal, b, heads, n, 10):
        options = {"causal": causal, **of_map(name, d)}
        whole = {**options, **condition}
        want, final = ops.linear_attention(q, k, v, **whole, return_state=True)
        state, rows = None, []
        for part in (slice(0, 0), slice(0, 19), slice(19, 20), slice(20, 20), slice(20, n)):
            pieces = {key: x if key == "decay" and x.ndim == 1 else x[..., part] for key, x in condition.items()}
            kept = None if state is None else [x.copy() for x in state]
            before = state
            y, state = ops.linear_attention(
                q[:, :, part], k[:, :, part], v[:, :, part], **options, **pieces, initial_state=state, return_state=True
            )
            rows.append(y)
            for x, same in zip(before or (), kept or (), strict=True):
                assert_same_bits(x, same)
        definition = Definition(q, k, v, **in_state_dtype(whole, q.dtype))
        result, magnitude = definition.result()
        if causal:
            assert_close(np.concatenate(rows, 2), result, 2 * magnitude, definition.exponent())
        else:
            # Each call sees all keys up to its own end.
            assert_close(rows[-1], result[:, :, 20:], 2 * magnitude[:, :, 20:], definition.exponent())
        assert_close(want, result, magnitude, definition.exponent())
        for got, wanted in zip(sums(state), sums(final), strict=True):
            size = np.abs(wanted).max(initial=0)
            assert (
                np.abs(got - wanted).max() <= tolerance.attention(size, 0.0, definition.exponent(), FLOATS[dtype]) * 8
            )


@every_map
def test_state_is_the_sum_over_keys(ops: ModuleType, name: str) -> None:
    q, k, v = operands(11, 2, 4, 2, 23, 23, 5, 3)
    options = of_map(name, 5)
    for causal in (False, True):
        _, state = ops.linear_attention(q, k, v, causal=causal, **options, return_state=True)
        features = {"cosine": 6, "favor": 6}.get(name, 5)
        assert [x.shape for x in state] == [(2, 2, features, 3), *[(2, 2, features)] * (len(state) - 1)]
        assert len(state) == (3 if name in EXPONENTIAL else 2)
        assert all(x.dtype == F64 and x.flags.c_contiguous for x in state)
        definition = Definition(q[:, ::2], k, v, **options)
        for got, want in zip(sums(state), definition.sums(), strict=True):
            bound = tolerance.attention(np.abs(want).max(), 0.0, definition.exponent(), F64) * 8
            assert np.abs(got - want).max() <= bound
        if name in EXPONENTIAL:
            assert (state[2] == np.round(state[2])).all()
    for part in ops.linear_attention(q, k, v, **options, normalize=name == "softmax", return_state=True)[1]:
        assert part.size, "all parts, with or without a normaliser"


@every_map
def test_state_of_no_keys(ops: ModuleType, name: str) -> None:
    q, k, v = operands(12, 1, 2, 1, 4, 0, 5, 3, F32)
    hidden = operands(12, 1, 2, 1, 4, 7, 5, 3, F32)
    for arguments, mask in (((q, k, v), None), (hidden, np.zeros((1, 7), bool))):
        for causal in (False, True):
            y, state = ops.linear_attention(
                *arguments, **of_map(name, 5), causal=causal, key_mask=mask, return_state=True
            )
            assert not y.any()
            assert not state[0].any()
            assert not state[1].any()
            if name in EXPONENTIAL:
                assert (state[2] == -np.inf).all()
    # And it is as good as none.
    q, k, v = operands(13, 1, 2, 1, 9, 9, 5, 3, F32)
    for causal in (False, True):
        plain = ops.linear_attention(q, k, v, **of_map(name, 5), causal=causal)
        after = ops.linear_attention(q, k, v, **of_map(name, 5), causal=causal, initial_state=state)
        assert_defined(after, q, k, v, **of_map(name, 5), causal=causal)
        assert_defined(plain, q, k, v, **of_map(name, 5), causal=causal)


@every_map
@pytest.mark.parametrize("dtype", FLOATS)
def test_step_by_step_equals_prefill(ops: ModuleType, name: str, dtype: str) -> None:
    """The normaliser's state too is carried, at each step."""
    b, h, heads, n, d, e = 2, 4, 2, 19, 5, 3
    q, k, v = operands(14, b, h, heads, n, n, d, e, FLOATS[dtype])
    for condition in [c for c in conditions(name, True, b, heads, n, 14) if "key_mask" not in c]:
        options = of_map(name, d)
        _, state = ops.linear_attention(
            q[:, :, :0], k[:, :, :0], v[:, :, :0], causal=True, **options, return_state=True
        )
        addresses = [x.ctypes.data for x in state]
        out = np.zeros((b, h, e), q.dtype)
        rows = []
        for i in range(n):
            step = {key: x if x.ndim == 1 else x[..., i] for key, x in condition.items()}
            where = {} if i % 2 else {"out": out}
            y = ops.linear_attention_step_(q[:, :, i], k[:, :, i], v[:, :, i], state, **options, **step, **where)
            assert y is out or i % 2
            assert y.shape == (b, h, e)
            rows.append(y.copy())
        assert addresses == [x.ctypes.data for x in state]
        whole = {**options, **condition, "causal": True}
        definition = Definition(q, k, v, **in_state_dtype(whole, q.dtype))
        want, magnitude = definition.result()
        assert_close(np.stack(rows, 2), want, 2 * magnitude, 2 * definition.exponent())
        _, final = ops.linear_attention(q, k, v, **whole, return_state=True)
        computed = state[0].dtype
        for got, wanted in zip(sums(state), sums(final), strict=True):
            size = np.abs(wanted).max()
            assert np.abs(got - wanted).max() <= tolerance.attention(size, 0.0, definition.exponent(), computed) * 8


def test_step_takes_any_form(ops: ModuleType) -> None:
    """Without heads or batch, with more of it, lists, views that overlap nothing; all the same numbers."""
    q, k, v = operands(15, 1, 2, 1, 1, 1, 4, 3, F32)
    q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
    fresh = [np.zeros((1, 1, 4, 3), F32), np.zeros((1, 1, 4), F32)]
    want_state = tuple(x.copy() for x in fresh)
    want = ops.linear_attention_step_(q, k, v, want_state)

    def same(y: Any, state: Any) -> None:
        np.testing.assert_array_equal(np.reshape(y, want.shape), want)
        for got, wanted in zip(state, want_state, strict=True):
            np.testing.assert_array_equal(got.reshape(wanted.shape), wanted)

    for shape in ((), (1, 1), (1, 1, 1)):
        state = [x.reshape((*shape, *x.shape[1:])).copy() for x in fresh]
        y = ops.linear_attention_step_(*(x.reshape((*shape, *x.shape[1:])) for x in (q, k, v)), state)
        assert y.shape == (*shape, 2, 3)
        same(y, state)
    # Rows of a longer array, as decoding over a known sequence has them.
    longer = [np.repeat(x[:, :, np.newaxis], 3, 2) for x in (q, k, v)]
    state = tuple(x.copy() for x in fresh)
    same(ops.linear_attention_step_(*(x[:, :, 1] for x in longer), state), state)
    state = [x.copy() for x in fresh]
    same(ops.linear_attention_step_(q[..., ::-1][..., ::-1], np.asfortranarray(k), v.astype(">f4"), state), state)
    one = [x[0, 0].copy() for x in fresh]
    y = ops.linear_attention_step_(q[0, 0], k[0, 0], v[0, 0], one)
    np.testing.assert_array_equal(y, want[0, 0])
    view = [x.copy()[np.newaxis][0] for x in fresh]
    same(ops.linear_attention_step_(q, k, v, tuple(view)), view)
    out = np.zeros((1, 2, 6), F32)[..., ::2]
    state = [x.copy() for x in fresh]
    y = ops.linear_attention_step_(q, k, v, state, out=out)
    assert y is out
    same(out, state)


@every_map
def test_step_by_the_short_way_has_the_bits_of_the_full_check(
    ops: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain arrays may skip the check in Python: rows cut out of longer arrays, lists of states, results given."""

    def none(*arguments: Any) -> None:
        return None

    for dtype, (d, e) in itertools.product((F32, F64), ((5, 3), (1, 1), (16, 8))):
        q, k, v = operands(48, 2, 4, 2, 3, 3, d, e, dtype)
        options = of_map(name, d)
        _, start = ops.linear_attention(q, k, v, causal=True, **options, return_state=True)
        found = []
        for short in (True, False):
            with monkeypatch.context() as patch:
                if not short:
                    patch.setattr(module._backend, "plain_step", none)
                for form in (tuple, list):
                    state = form(x.copy() for x in start)
                    rows = [
                        ops.linear_attention_step_(q[:, :, 0], k[:, :, 0], v[:, :, 0], state, **options),
                        ops.linear_attention_step_(*(x[:, :, 1].copy() for x in (q, k, v)), state, **options),
                        ops.linear_attention_step_(
                            *(x[:, :, 2] for x in (q, k, v)), state, **options, out=np.zeros((2, 4, e), dtype)
                        ),
                    ]
                    found.append([*rows, *state])
        for other in found[1:]:
            for got, want in zip(other, found[0], strict=True):
                assert_same_bits(got, want)


def test_a_step_onto_its_own_arguments_is_refused(ops: ModuleType) -> None:
    """Of each part of the state with each operand, itself or a view; nothing is written."""
    base = np.random.default_rng(49).standard_normal((2, 4, 4)).astype(F32)
    plain = {"q": base.copy(), "k": base.copy(), "v": base.copy()}
    for name in plain:
        z = base.copy()
        for view in (z, z[:], z[::-1], z.reshape(2, 4, 4)):
            state = (np.zeros((2, 4, 4, 4), F32), z)
            with pytest.raises(ValueError, match="apart from"):
                ops.linear_attention_step_(**{**plain, name: view}, state=state)
            with pytest.raises(ValueError, match="apart from"):
                ops.linear_attention_step_(**plain, state=state, out=view if name == "q" else z)
            np.testing.assert_array_equal(z, base)
            assert not state[0].any()
    with pytest.raises(ValueError, match="out must be memory apart from q"):
        ops.linear_attention_step_(
            **plain, state=(np.zeros((2, 4, 4, 4), F32), np.zeros((2, 4, 4), F32)), out=plain["q"]
        )


# --- sequences packed along N --------------------------------------------------------------------------------------------------


@every_map
@both
def test_packed_sequences_know_nothing_of_each_other(ops: ModuleType, name: str, causal: bool) -> None:
    ends = [0, 0, 17, 18, 18, 50, 81, 81]
    q, k, v = operands(16, 1, 4, 2, 81, 81, 5, 3, F32)
    options = {"causal": causal, **of_map(name, 5)}
    _, states = ops.linear_attention(*operands(17, 7, 4, 2, 6, 6, 5, 3, F32), **options, return_state=True)
    for condition in conditions(name, causal, 1, 2, 81, 16):
        for initial in (None, states):
            y, final = ops.linear_attention(
                q, k, v, **options, **condition, cu_seqlens=ends, initial_state=initial, return_state=True
            )
            assert final[0].shape[:2] == (7, 2)
            for i, part in enumerate(itertools.starmap(slice, itertools.pairwise(ends))):
                pieces = {key: x if key == "decay" and x.ndim == 1 else x[..., part] for key, x in condition.items()}
                state = None if initial is None else tuple(x[i : i + 1] for x in initial)
                alone, after = ops.linear_attention(
                    q[:, :, part],
                    k[:, :, part],
                    v[:, :, part],
                    **options,
                    **pieces,
                    initial_state=state,
                    return_state=True,
                )
                assert_same_bits(y[:, :, part], alone)
                for got, want in zip(final, after, strict=True):
                    assert_same_bits(got[i], want[0])


def test_packed_sequences_take_any_integers(ops: ModuleType) -> None:
    q, k, v = operands(18, 1, 2, 2, 6, 6, 3, 2, F32)
    want = ops.linear_attention(q, k, v, cu_seqlens=[0, 2, 6])
    for dtype in ("i4", "u8", ">i2", "i1"):
        assert_same_bits(ops.linear_attention(q, k, v, cu_seqlens=np.array([0, 2, 6], dtype)), want)
    strided = np.array([0, 9, 2, 9, 6, 9])[::2]
    assert_same_bits(ops.linear_attention(q[0], k[0], v[0], cu_seqlens=strided), want[0])
    nothing = ops.linear_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], cu_seqlens=[0], return_state=True)
    assert nothing[0].shape == (1, 2, 0, 2)
    assert nothing[1][0].shape == (0, 2, 3, 2)


# --- layouts -------------------------------------------------------------------------------------------------------------------


def laid(x: Any, layout: str) -> Any:
    """The same values in another layout of memory."""
    if layout == "heads after tokens":
        return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    if layout == "every second row":
        base = np.zeros((*x.shape[:2], 2 * x.shape[2], x.shape[3]), x.dtype)
        base[:, :, ::2] = x
        return base[:, :, ::2]
    if layout == "part of a row":
        base = np.zeros((*x.shape[:3], x.shape[3] + 3), x.dtype)
        base[..., 1:-2] = x
        return base[..., 1:-2]
    if layout == "reversed":
        return np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]
    if layout == "Fortran":
        return np.asfortranarray(x)
    if layout == "every second number":
        return np.repeat(x, 2, axis=-1)[..., ::2]
    if layout == "misaligned":
        raw = bytearray(x.nbytes + 1)
        array = np.ndarray(x.shape, x.dtype, raw, offset=1)
        array[...] = x
        return array
    return x.copy()


LAYOUTS = (
    "C",
    "heads after tokens",
    "every second row",
    "part of a row",
    "reversed",
    "Fortran",
    "every second number",
    "misaligned",
)


@given(
    sizes=st.tuples(
        *(st.integers(0, 3), st.integers(0, 2), st.integers(0, 3)), *(st.sampled_from([1, 2, 7, 18, 35]),) * 4
    ),
    layouts=st.tuples(*(st.sampled_from(LAYOUTS),) * 4),
    dtype=st.sampled_from(sorted(FLOATS)),
    causal=st.booleans(),
    name=st.sampled_from(MAPS),
    seed=st.integers(0, 2**32),
)
@in_fixture
def test_any_layout_gives_the_same_bits(
    ops: ModuleType, sizes: Any, layouts: Any, dtype: str, causal: bool, name: str, seed: int
) -> None:
    b, heads, repeats, n, m, d, e = sizes
    repeats = repeats if heads else 0
    if heads and not repeats:
        repeats = 1
    q, k, v = operands(seed, b, heads * repeats, heads, n, m, d, e, FLOATS[dtype])
    options = {"causal": causal, **of_map(name, d)}
    want = ops.linear_attention(q, k, v, **options)
    out = laid(np.full_like(want, 7), layouts[3])
    y = ops.linear_attention(
        *(laid(x, layout) for x, layout in zip((q, k, v), layouts, strict=False)), **options, out=out
    )
    assert y is out
    assert_same_bits(y, want)
    assert_defined(want, q, k, v, **options)


@both
def test_leading_dimensions(ops: ModuleType, causal: bool) -> None:
    q, k, v = operands(19, 6, 4, 2, 9, 9, 5, 3, F32)
    want, state = ops.linear_attention(q, k, v, causal=causal, return_state=True)

    def same(shape: tuple[int, ...], *arguments: Any, part: Any = slice(None), **options: Any) -> None:
        y, after = ops.linear_attention(*arguments, causal=causal, return_state=True, **options)
        assert y.shape == (*shape, *want[part].shape[-2:])
        np.testing.assert_array_equal(y, want[part].reshape(y.shape))
        for got, wanted in zip(after, state, strict=True):
            lead = (*shape[:-1], 2) if shape else ()
            assert got.shape[: len(lead)] == lead
            np.testing.assert_array_equal(got, wanted[part].reshape(got.shape))

    same((6, 4), q, k, v)
    same((2, 3, 4), *(x.reshape(2, 3, *x.shape[1:]) for x in (q, k, v)))
    same((1, 2, 1, 3, 4), *(x.reshape(1, 2, 1, 3, *x.shape[1:]) for x in (q, k, v)))
    # Axes that no single stride walks.
    same((3, 2, 4), *(x.reshape(2, 3, *x.shape[1:]).swapaxes(0, 1) for x in (q, k, v)), part=[0, 3, 1, 4, 2, 5])
    same((4,), q[0], k[0], v[0], part=0)
    y = ops.linear_attention(q[1, 3], k[1, 1], v[1, 1], causal=causal)
    np.testing.assert_array_equal(y, want[1, 3])
    out = np.zeros((3, 2, 4, 9, 3), F32).swapaxes(0, 1)
    got = ops.linear_attention(*(x.reshape(2, 3, *x.shape[1:]) for x in (q, k, v)), causal=causal, out=out)
    assert got is out
    np.testing.assert_array_equal(out.reshape(want.shape), want)


@both
def test_heads_after_tokens(ops: ModuleType, causal: bool) -> None:
    """layout="bnhd" as in flash-attn and JAX: same bits, masks and states as ever."""
    q, k, v = operands(20, 2, 4, 2, 9, 9, 5, 3, F32)
    mask = np.random.default_rng(0).random((2, 2, 9)) < 0.7
    want, state = ops.linear_attention(q, k, v, causal=causal, key_mask=mask, return_state=True)
    swapped = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v)]
    out = np.zeros((2, 9, 4, 3), F32)
    y, after = ops.linear_attention(*swapped, causal=causal, key_mask=mask, return_state=True, layout="bnhd", out=out)
    assert y is out
    assert_same_bits(y.swapaxes(1, 2), want)
    for got, wanted in zip(after, state, strict=True):
        assert_same_bits(got, wanted)
    one = ops.linear_attention(*(x[0] for x in swapped), causal=causal, key_mask=mask[0], layout="bnhd")
    assert one.shape == (9, 4, 3)
    assert_same_bits(one, y[0])
    # Queries, keys and values of one projection, cut out of it.
    packed = np.zeros((2, 9, 3, 4, 5), F32)
    packed[...] = np.random.default_rng(1).standard_normal(packed.shape)
    cut = [packed[:, :, i] for i in range(3)]
    assert_same_bits(
        ops.linear_attention(*cut, causal=causal, layout="bnhd"),
        ops.linear_attention(*(x.copy() for x in cut), causal=causal, layout="bnhd"),
    )


def test_promotion(ops: ModuleType) -> None:
    q, k, v = operands(21, 1, 1, 1, 5, 5, 3, 2)
    for kinds in itertools.product(("f2", "f4", "f8"), repeat=3):
        arrays = [x.astype(kind) for x, kind in zip((q, k, v), kinds, strict=True)]
        common = np.result_type(*kinds)
        assert_same_bits(ops.linear_attention(*arrays), ops.linear_attention(*(x.astype(common) for x in arrays)))
    assert_same_bits(ops.linear_attention(q.tolist(), k.tolist(), v.tolist()), ops.linear_attention(q, k, v))
    assert_same_bits(
        ops.linear_attention(*(x.astype(">f4") for x in (q, k, v))),
        ops.linear_attention(*(x.astype("f4") for x in (q, k, v))),
    )


@every_map
def test_empty(ops: ModuleType, name: str) -> None:
    """No batch, no heads, no rows, no keys: shapes are right and no memory is touched."""
    for b, h, heads, n, m in itertools.product((0, 1, 2), (0, 2), (0, 1), (0, 3), (0, 3)):
        if (h == 0) != (heads == 0):
            continue
        q, k, v = operands(22, b, h, heads, n, m, 3, 2, F32)
        for causal in (False, True):
            y, state = ops.linear_attention(q, k, v, causal=causal, **of_map(name, 3), return_state=True)
            assert y.shape == (b, h, n, 2)
            assert_defined(y, q, k, v, causal=causal, **of_map(name, 3))
            assert state[0].shape[:2] == (b, heads)
            if m == 0:
                assert not state[0].any()
            _, again = ops.linear_attention(
                q, k, v, causal=causal, **of_map(name, 3), initial_state=state, return_state=True
            )
            for got, want in zip(sums(again), sums(state), strict=True):
                np.testing.assert_allclose(got, 2 * want, rtol=tolerance.BENCH_EXACT)


@pytest.mark.parametrize("axis", ["rows", "heads", "numbers"])
def test_zero_strides_are_read_in_place(ops: ModuleType, axis: str) -> None:
    q, k, v = operands(23, 2, 3, 3, 20, 20, 4, 4, F32)
    index = {"rows": np.s_[:, :, :1], "heads": np.s_[:, :1], "numbers": np.s_[..., :1]}[axis]
    wide_ones = [np.broadcast_to(x[index], x.shape) for x in (q, k, v)]
    for causal in (False, True):
        want = ops.linear_attention(*(x.copy() for x in wide_ones), causal=causal)
        assert_same_bits(ops.linear_attention(*wide_ones, causal=causal), want)
        mask = np.broadcast_to(np.True_, (2, 3, 20))
        decay = np.broadcast_to(np.float32(-0.1), (2, 3, 20))
        if causal:
            dense = ops.linear_attention(*wide_ones, causal=True, key_mask=mask.copy(), decay=decay.copy())
            assert_same_bits(ops.linear_attention(*wide_ones, causal=True, key_mask=mask, decay=decay), dense)


def test_more_than_two_to_the_31_elements(best_ops: ModuleType) -> None:
    """Keys and values of stride 0, more elements than an int holds; the last key is another one."""
    m, d = 2**25 + 3, 64
    rng = np.random.default_rng(24)
    row, value = rng.standard_normal((1, d)).astype(F32), np.full((1, 1), 3, F32)
    k, v = np.broadcast_to(row, (m, d)), np.broadcast_to(value, (m, 1))
    assert k.size > 2**31
    fastops.set_num_threads(2)
    y, (_, z) = best_ops.linear_attention(row, k, v, return_state=True)
    # Blocks of at least 16 keys are summed on their own.
    bound = tolerance.running_sum(m // 16, equal=True)
    np.testing.assert_allclose(y, 3, rtol=2 * bound)
    expected = Definition(row[np.newaxis, np.newaxis], row[np.newaxis, np.newaxis], value[np.newaxis, np.newaxis])
    np.testing.assert_allclose(z, m * expected.fk[0, 0, 0], rtol=bound)


@both
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_results_round_as_the_dtype(ops: ModuleType, causal: bool, dtype: Any) -> None:
    """Ties, subnormals, what rounds to infinity, infinity and nan, in whole vectors and in a row's rest."""
    rng = np.random.default_rng(24)
    patterns = rng.integers(0, 1 << 16, (40, 70), np.uint16)
    patterns[::2] &= 0xBFFF if dtype == BF16 else 0xDFFF  # rows without a large number
    patterns[4:6] &= 0x80FF
    v = patterns.view(dtype)
    v[1, :3], v[3, 68] = (np.inf, np.nan, -np.inf), np.nan
    largest = np.array((0x7F7F if dtype == BF16 else 0x7BFF), np.uint16).view(dtype)
    v[7, ::3], v[9, 69] = largest, -largest
    q, k = np.array([[[1, 2.0**-8]]], dtype), np.ones((1, 1, 2), dtype)
    with np.errstate(all="ignore"):
        want = (v.astype(F64) * (1 + 2.0**-8) + 0.0).astype(F32).astype(dtype)
    for row, wanted in zip(v, want, strict=True):
        options: Any = {"feature_map": "identity", "scale": 1.0, "causal": causal}
        assert_same_bits(ops.linear_attention(q, k, row[np.newaxis, np.newaxis], **options)[0, 0], wanted)
    assert np.isinf(want[7, ::3]).all()


# --- what other packages got wrong -----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shift", [-6.0, -8.0, -15.0, -20.0, -40.0])
def test_elu_is_the_exponential_below_zero(ops: ModuleType, causal: bool, dtype: str, shift: float) -> None:
    """elu(x) + 1 cancels: wrong by 58 % at -6 in bfloat16, and 0 at -20 in float32, so that rows were nan or 0."""
    q, k, v = operands(25, 1, 1, 1, 20, 20, 4, 3, F64, 0.5)
    q, k, v = ((x + s).astype(FLOATS[dtype]) for x, s in ((q, shift / 2), (k, shift), (v, 0.0)))
    assert_defined(ops.linear_attention(q, k, v, causal=causal), q, k, v, causal=causal)


@both
def test_eps_is_absolute_and_zero_by_default(ops: ModuleType, causal: bool) -> None:
    """With the usual 1e-6, rows of small weights shrink to nothing."""
    q, k, v = operands(26, 1, 1, 1, 64, 64, 4, 1, F32)
    q, k, v = q - 15, k - 15, np.ones_like(v)
    bound = tolerance.attention(2.0, 1.0, 0.0, F32)
    assert np.abs(ops.linear_attention(q, k, v, causal=causal) - 1).max() <= bound
    shrunk = ops.linear_attention(q, k, v, causal=causal, eps=1e-6)
    assert (shrunk < 0.05).all()
    assert_defined(shrunk, q, k, v, causal=causal, eps=1e-6)


@both
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_key_sums_beyond_half_precision(ops: ModuleType, causal: bool, dtype: Any) -> None:
    """z reaches 80 000, beyond float16; in bfloat16 it would stop at 1024."""
    n = 4096
    k = np.full((1, n, 2), 18, dtype)
    v = np.full((1, n, 1), 2, dtype)
    y, (s, z) = ops.linear_attention(k, k, v, causal=causal, return_state=True)
    assert (y == 2).all()
    assert (z == 19 * n).all()
    assert (s == 38 * n).all()


@both
@every_map
def test_constant_values_stay(ops: ModuleType, name: str, causal: bool) -> None:
    """A normaliser over another axis than the keys' (the heads', as there was) would show."""
    if name == "identity":
        pytest.skip("its weights may cancel")
    b, h, heads, n, d = 2, 4, 2, 35, 6
    q, k, _ = operands(27, b, h, heads, n, n, d, 1, F32)
    constants = np.arange(1.0, 1 + b * heads).reshape(b, heads, 1, 1)
    v = np.broadcast_to(constants, (b, heads, n, 3)).astype(F32)
    y = ops.linear_attention(q, k, v, causal=causal, **alive(name, d))
    want = np.broadcast_to(np.repeat(constants, 2, 1), y.shape)
    assert_close(y, want, 2 * np.abs(want), 20.0 if name == "favor" else 0.0)


@every_map
@pytest.mark.parametrize("poison", [1e4, np.inf, np.nan])
def test_no_key_reaches_an_earlier_row(ops: ModuleType, name: str, poison: float) -> None:
    """FAVOR+ and efficient attention of other packages subtract a maximum over all keys: the last one leaked into all rows."""
    n = 40
    q, k, v = operands(28, 1, 2, 1, n, n, 5, 3, F32)
    options = {"causal": True, **alive(name, 5)}
    want = ops.linear_attention(q, k, v, **options)
    definition = Definition(q, k, v, **in_state_dtype(options, F32))
    for at in (n - 1, 17, 0):
        for which in ("k", "v"):
            changed = {"k": k.copy(), "v": v.copy()}
            changed[which][:, :, at, 1] = poison
            y = ops.linear_attention(q, changed["k"], changed["v"], **options)
            assert_unchanged(y, want, definition, np.s_[:, :, :at])
            if not np.isfinite(poison) and which == "v":
                assert not np.isfinite(y[:, :, at:, 1]).any()
                y[..., 1] = want[..., 1]
                assert_close(y, *definition.result(), definition.exponent())


@both
@every_map
def test_nan_and_infinity_stay_in_their_head(ops: ModuleType, name: str, causal: bool) -> None:
    q, k, v = operands(29, 2, 4, 2, 21, 21, 5, 3, F32)
    options = {"causal": causal, **of_map(name, 5)}
    want = ops.linear_attention(q, k, v, **options)
    definition = Definition(q, k, v, **in_state_dtype(options, F32))
    for value, (which, x) in itertools.product((np.nan, np.inf, -np.inf), (("q", q), ("k", k), ("v", v))):
        bad = x.copy()
        bad[1, 1, 5, 2] = value
        y = ops.linear_attention(*(bad if other is x else other for other in (q, k, v)), **options)
        clean = np.ones(y.shape, bool)
        if which == "q":
            clean[1, 1, 5] = False
        else:
            clean[1, 2:, 5 if causal else 0 :] = False
        assert_unchanged(y, want, definition, clean)
        if np.isnan(value):
            hit = y[~clean]
            assert np.isnan(hit).any()
            if which != "v":
                assert np.isnan(hit).all()


@both
@pytest.mark.parametrize("name", EXPONENTIAL)
def test_infinite_logits_are_nan(ops: ModuleType, name: str, causal: bool) -> None:
    """As inf / inf: they counted as 1e37 natively. exp(-inf) is 0."""
    q, k, v = operands(48, 1, 2, 1, 40, 40, 5, 3, F32)
    reference = importlib.import_module("fastops.reference")
    options = of_map(name, 5) | {"causal": causal}
    for which, value in itertools.product("qk", (np.inf, -np.inf)):
        arrays = {"q": q.copy(), "k": k.copy(), "v": v}
        arrays[which][:, :, 17, 2] = value
        y = ops.linear_attention(*arrays.values(), **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_backend", reference)
            want = ops.linear_attention(*arrays.values(), **options)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(want))
        assert np.isnan(want).any() == (value > 0 or name == "favor")


@both
@every_map
def test_masked_keys_are_absent(ops: ModuleType, name: str, causal: bool) -> None:
    """Masks hit the normaliser too, and what a masked key or value holds is never looked at."""
    n, m = 13, 50
    q, k, v = operands(30, 2, 4, 2, n, m, 5, 3, F32)
    seen = np.zeros((2, m), bool)
    seen[0, :21] = True  # padded on the right
    seen[1, 29:] = True  # on the left
    options = of_map(name, 5)
    clean = ops.linear_attention(q, k, v, causal=causal, key_mask=seen, **options)
    assert_defined(clean, q, k, v, causal=causal, key_mask=seen, **options)
    for poison in (np.nan, np.inf, 1e30):
        dirty = [x.copy() for x in (k, v)]
        for x in dirty:
            x[~np.repeat(seen[:, np.newaxis], 2, 1)] = poison
        assert_same_bits(ops.linear_attention(q, *dirty, causal=causal, key_mask=seen, **options), clean)
    if not causal:
        cut = ops.linear_attention(q[:1], k[:1, :, :21], v[:1, :, :21], **options)
        definition = Definition(q[:1], k[:1, :, :21], v[:1, :, :21], **in_state_dtype(options, F32))
        want, magnitude = definition.result()
        assert_close(clean[:1], want, magnitude, definition.exponent())
        assert_close(cut, want, magnitude, definition.exponent())


@both
def test_rows_without_weights_are_zero(ops: ModuleType, causal: bool) -> None:
    """eps = 0 gave nan in rows whose features meet no live one."""
    q, k, v = operands(31, 1, 1, 1, 64, 64, 4, 3, F32)
    k[..., :3] = -1
    q[:, :, ::2, 3] = -1
    y = ops.linear_attention(q, k, v, causal=causal, feature_map="relu2")
    assert (y[:, :, ::2] == 0).all()
    assert_defined(y, q, k, v, causal=causal, feature_map="relu2")
    for name in MAPS:
        dead = ops.linear_attention(q, k, v, causal=causal, key_mask=np.zeros((1, 64), bool), **of_map(name, 4))
        assert (dead == 0).all()
    q[...], k[...] = 1, 1
    k[:, :, 1::2] = -1
    cancelled = ops.linear_attention(q, k, v, feature_map="identity", normalize=True)
    assert (cancelled == 0).all(), "weights that add up to 0"


def test_causal_rows_end_at_the_last_key(ops: ModuleType) -> None:
    """Bottom-right: a row of queries over a cache sees all of it; rows before the first key see none."""
    q, k, v = operands(32, 1, 1, 1, 3, 8, 4, 2, F32)
    y = ops.linear_attention(q, k, v, causal=True)
    for i in range(3):
        assert_close(y[:, :, i : i + 1], *Definition(q[:, :, i : i + 1], k[:, :, : 6 + i], v[:, :, : 6 + i]).result())
    q, k, v = operands(33, 1, 1, 1, 8, 3, 4, 2, F32)
    y = ops.linear_attention(q, k, v, causal=True)
    assert (y[:, :, :5] == 0).all()
    assert_defined(y, q, k, v, causal=True)
    # These see the initial state as it is, whatever the decay of the first key.
    _, state = ops.linear_attention(*operands(34, 1, 1, 1, 6, 6, 4, 2, F32), return_state=True)
    options = {"causal": True, "initial_state": state, "decay": np.full((1, 1, 3), -1.5, F32)}
    assert_defined(ops.linear_attention(q, k, v, **options), q, k, v, **options)


# --- decay ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECAYING)
def test_decay_forms(ops: ModuleType, name: str) -> None:
    q, k, v = operands(35, 2, 4, 2, 37, 37, 5, 3, F32)
    options = {"causal": True, **of_map(name, 5)}
    heads = np.array([-0.1, -0.7])
    want = ops.linear_attention(q, k, v, **options, decay=heads)
    full = np.broadcast_to(heads[:, np.newaxis], (2, 2, 37))
    assert_same_bits(ops.linear_attention(q, k, v, **options, decay=full), want)
    assert_same_bits(ops.linear_attention(q, k, v, **options, decay=full.astype(F32)), want)
    plain, definition = ops.linear_attention(q, k, v, **options, decay=np.zeros(2)), Definition(q, k, v, **options)
    assert_close(plain, *definition.result(), definition.exponent())


@pytest.mark.parametrize("name", DECAYING)
def test_decay_of_minus_infinity_begins_anew(ops: ModuleType, name: str) -> None:
    q, k, v = operands(36, 1, 2, 2, 60, 60, 5, 3, F32)
    decay = np.zeros((1, 2, 60))
    decay[..., 23] = decay[..., 41] = -np.inf
    options = {"causal": True, **of_map(name, 5)}
    y = ops.linear_attention(q, k, v, **options, decay=decay)
    for part in (slice(0, 23), slice(23, 41), slice(41, 60)):
        pieces = [x[:, :, part] for x in (q, k, v)]
        assert_defined(y[:, :, part], *pieces, **options)


@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.parametrize("rate", [-3.0, -100.0, -3e4])
def test_strong_decay(ops: ModuleType, name: str, rate: float) -> None:
    """Factors whose inverses leave every range: blocks must not divide by them."""
    q, k, v = operands(37, 1, 1, 1, 80, 80, 5, 3, F32)
    options = {"causal": True, **alive(name, 5), "decay": np.full(1, rate)}
    assert_defined(ops.linear_attention(q, k, v, **options), q, k, v, **options)


def test_retention(ops: ModuleType) -> None:
    """Sun et al. 2023, eq. 5: sum over j <= i of gamma^(i - j) q_i.k_j v_j."""
    q, k, v = operands(38, 1, 2, 2, 30, 30, 4, 3)
    gamma = 1 - 2.0 ** -np.array([5.0, 6.0])
    y = ops.linear_attention(q, k, v, causal=True, feature_map="identity", scale=1.0, decay=np.log(gamma))
    i, j = np.arange(30)[:, np.newaxis], np.arange(30)
    weights = np.where(j <= i, gamma[:, np.newaxis, np.newaxis] ** (i - j), 0) * (q @ k.swapaxes(-1, -2))
    assert_close(y, weights @ v, np.abs(weights) @ np.abs(v) + 30)


# --- exponentials ----------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", EXPONENTIAL)
@pytest.mark.parametrize("size", [1.0, 100.0, 3e4])
def test_huge_logits(ops: ModuleType, name: str, causal: bool, size: float) -> None:
    """exp(k) overflows from 88 on, in float16 from 11; running maxima do not, and small ones after large ones count."""
    n, d = 50, 3
    if name == "favor":
        size = min(size, 1e3)  # its exponents are squares, and their roundings relative errors
    rng = np.random.default_rng(39)
    q, k, v = (rng.integers(-8, 9, (1, 1, n, d)) / 8 for _ in range(3))
    k[:, :, ::7] *= size
    q[:, :, ::5] *= size
    options = {"feature_map": name, "scale": 1.0}
    if name == "favor":
        options["projection"] = np.array([[1.0, 0, 0], [0, 0.5, 0], [0, -1, 0.25], [0, 0, 0]])
    e = (
        [x @ options["projection"].T - 0.5 * (x**2).sum(-1, keepdims=True) for x in (q, k)]
        if name == "favor"
        else [q, k]
    )
    seen = np.tril(np.ones((n, n), bool)) if causal else np.ones((n, n), bool)
    # All in logarithms: over keys, then over features.
    pairs = np.where(seen[..., np.newaxis], e[1][0, 0][np.newaxis], -np.inf)
    top = pairs.max(1, keepdims=True)
    each = np.exp(pairs - top)
    if name == "softmax":
        p = np.exp(q[0, 0] - q[0, 0].max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        want = np.einsum("id,ijd,je->ie", p, each / each.sum(1, keepdims=True), v[0, 0])
    else:
        row = e[0][0, 0] + top[:, 0]
        row = np.exp(row - row.max(-1, keepdims=True))
        weights = np.einsum("id,ijd->ij", row, each)
        want = weights @ v[0, 0] / weights.sum(-1, keepdims=True)
    for dtype in (F32, F64):
        y = ops.linear_attention(q.astype(dtype), k.astype(dtype), v.astype(dtype), causal=causal, **options)
        assert np.isfinite(y).all()
        exponent = 0.0 if name != "favor" else float(max(np.abs(x).max() for x in e)) * 2
        assert_close(y[0, 0], want, np.full(want.shape, 4.0), exponent + 4 * (size > 1) * float(np.abs(k).max()))


@pytest.mark.parametrize("name", ["exp"])
def test_large_keys_are_forgotten(ops: ModuleType, name: str) -> None:
    """A running maximum that never falls would lose all keys after a large one that has decayed."""
    n = 60
    q, k, v = operands(40, 1, 1, 1, n, n, 3, 2, F32, 0.5)
    k[:, :, 3] = 150.0
    decay = np.full((1, 1, n), -0.01)
    decay[..., 10:14] = -100.0
    options = {"causal": True, "feature_map": name, "scale": 1.0, "decay": decay}
    y = ops.linear_attention(q, k, v, **options)
    late = slice(20, None)
    pieces = [x[:, :, 11:] for x in (q, k, v)]
    want = Definition(*pieces, **{**options, "decay": decay[..., 11:].astype(F32)}).result()
    assert_close(y[:, :, late], want[0][:, :, 9:], want[1][:, :, 9:], 10.0)


def test_favor_tends_to_softmax_attention(ops: ModuleType) -> None:
    """Of 64 numbers of standard deviation 1/4, 256 features err by 6 % (the family's measurement); fewer by more."""
    q, k, v = operands(41, 1, 1, 1, 64, 64, 64, 8, F64, 0.25)
    want, _, _ = softmax_rows(q, k, v)

    def error(m: int) -> float:
        found = [
            np.linalg.norm(
                ops.linear_attention(q, k, v, feature_map="favor", projection=fastops.favor_projection(64, m, rng=seed))
                - want
            )
            for seed in range(3)
        ]
        return float(np.mean(found) / np.linalg.norm(want))

    few, many = error(16), error(1024)
    assert many < few / 3, (few, many)
    assert many < tolerance.FAVOR


def test_favor_projection_is_orthogonal_in_blocks() -> None:
    w = fastops.favor_projection(8, 21, rng=5)
    assert w.shape == (21, 8)
    assert w.dtype == F64
    for block in (w[:8], w[8:16], w[16:]):
        products = block @ block.T
        off = products - np.diag(np.diag(products))
        assert np.abs(off).max() <= tolerance.DOUBLE * np.abs(products).max()
    many = fastops.favor_projection(8, 4096, rng=6)
    squares = (many**2).sum(-1)
    # chi-squared with 8 degrees of freedom: variance 16.
    assert abs(squares.mean() - 8) < 5 * 4 / 64
    assert abs(squares.var() - 16) < 16 / 4
    assert np.abs(many.mean(0)).max() < 5 / 64
    assert_same_bits(w, fastops.favor_projection(8, 21, rng=5))
    assert_same_bits(w, fastops.favor_projection(8, 21, rng=np.random.default_rng(5)))
    assert not np.array_equal(fastops.favor_projection(8, 21), fastops.favor_projection(8, 21))
    assert fastops.favor_projection(1, 1, rng=0).shape == (1, 1)


@both
def test_cosine_is_one_plus_the_cosine(ops: ModuleType, causal: bool) -> None:
    """Su's first-order weights 1 + cos(q, k) in [0, 2], of any length of rows; 1 with a row of zeros."""
    q, k, v = operands(42, 1, 1, 1, 20, 20, 4, 3, F32)
    q[:, :, 3], k[:, :, 5] = 0, 0
    options = {"causal": causal, "feature_map": "cosine"}
    y = ops.linear_attention(q, k, v, **options)
    assert_defined(y, q, k, v, **options)
    for factor in (1e-30, 1e18, 3e37):
        assert_defined(ops.linear_attention(q * F32.type(factor), k, v, **options), q, k, v, **options)


# --- the native backend ----------------------------------------------------------------------------------------------------------


@every_map
@both
def test_thread_counts_give_the_same_bits(native_ops: ModuleType, name: str, causal: bool) -> None:
    for b, h, heads, n in ((2, 3, 3, 300), (1, 1, 1, 1500), (1, 4, 1, 700)):
        q, k, v = operands(43, b, h, heads, n, n, 16, 24, F32)
        options = {"causal": causal, **of_map(name, 16), "return_state": True}
        results = []
        for threads in (1, 2, 3, 5, 17):
            fastops.set_num_threads(threads)
            results.append(native_ops.linear_attention(q, k, v, **options))
        for y, state in results[1:]:
            assert_same_bits(y, results[0][0])
            for got, want in zip(state, results[0][1], strict=True):
                assert_same_bits(got, want)


@every_map
@pytest.mark.parametrize(
    ("n_q", "n_k"), [(700, 700), (650, 701), (701, 650), (3, 700), (700, 3), (40, 40), (0, 9), (9, 0)]
)
def test_heads_cut_along_tokens_give_the_same_bits(native_ops: ModuleType, name: str, n_q: int, n_k: int) -> None:
    """One causal head is cut where the number of threads asks for it, also where chunks end early: behind rows that are not finite."""
    q, k, v = operands(52, 1, 4, 2, n_q, n_k, 16, 24, F32)
    rng = np.random.default_rng(53)
    seen = rng.random((1, n_k)) < 0.8
    if n_k > 600:
        k[0, 0, 331], v[0, 1, 17, 3] = np.inf, np.nan
        q[0, 1, -2], k[0, 1, 290:293] = 40, 40
    options = {"causal": True, **of_map(name, 16), "return_state": True}
    for more in (
        {},
        {"key_mask": seen},
        {} if name in ("softmax", "favor") else {"decay": -rng.random((1, 2, n_k), np.float32)},
    ):
        fastops.set_num_threads(1)
        _, first = native_ops.linear_attention(q[:, :, :5], k[:, :, :5], v[:, :, :5], **options)
        results = []
        for threads in (1, 2, 3, 4, 9):
            fastops.set_num_threads(threads)
            y, state = native_ops.linear_attention(
                q[:, :2], k[:, :1], v[:, :1], **options, **{x: a[:, :1] if x == "decay" else a for x, a in more.items()}
            )
            other, later = native_ops.linear_attention(q, k, v, **options, **more, initial_state=first)
            results.append((y, *state, other, *later))
        for result in results[1:]:
            for got, want in zip(result, results[0], strict=True):
                assert_same_bits(got, want)


def test_a_million_tokens(best_ops: ModuleType) -> None:
    n, d = 1_000_000, 8
    rng = np.random.default_rng(44)
    q, k, v = (rng.standard_normal((1, n, d), np.float32) for _ in range(3))
    for causal in (False, True):
        y, _ = best_ops.linear_attention(q, k, v, causal=causal, return_state=True)
        last = q[np.newaxis, :, -3:]
        want, magnitude = Definition(last, k[np.newaxis], v[np.newaxis], causal=causal).result()
        assert np.abs(y[0, -3:] - want[0, 0]).max() <= tolerance.running_sum(n) * magnitude.max()


def test_memory_beyond_the_result_is_a_few_blocks(native_ops: ModuleType) -> None:
    """No temporaries of the size of the operands: the peak of NumPy's allocations is the result."""
    import tracemalloc

    q, k, v = operands(45, 1, 2, 2, 4096, 4096, 64, 64, F32)
    for causal in (False, True):
        tracemalloc.start()
        y = native_ops.linear_attention(q, k, v, causal=causal)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < y.nbytes + 2**18
        del y


def test_a_row_sees_what_its_neighbours_see(ops: ModuleType) -> None:
    """Rows of one query each equal those of all queries: for decoding without a state."""
    q, k, v = operands(46, 1, 2, 1, 30, 30, 5, 3, F32)
    y = ops.linear_attention(q, k, v, causal=True)
    for i in (0, 7, 29):
        one = ops.linear_attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], causal=True)
        want, magnitude = Definition(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1]).result()
        assert_close(one, want, magnitude)
        assert_close(y[:, :, i : i + 1], want, magnitude)


def test_default_scales(ops: ModuleType) -> None:
    q, k, v = operands(47, 1, 1, 1, 8, 8, 4, 3)
    for name in MAPS:
        scale = 0.5 if name in ("identity", "exp", "favor") else 1.0
        options = of_map(name, 4)
        assert_same_bits(
            ops.linear_attention(q, k, v, **options), ops.linear_attention(q, k, v, **options, scale=scale)
        )
        normalize = name != "identity"
        assert_same_bits(
            ops.linear_attention(q, k, v, **options), ops.linear_attention(q, k, v, **options, normalize=normalize)
        )
    assert math.isclose(
        float(module._attention.linear_options(9, F32, False, "exp", None, 0, None, None, None).scale), 1 / 3
    )


# --- what an attack found ----------------------------------------------------------------------------------------------------------


def test_rows_without_keys_are_zero_beside_large_features(ops: ModuleType) -> None:
    """Features that were scaled up for the sake of a tiny denominator overflowed."""
    one = np.ones((2, 1), F32)
    assert not ops.linear_attention(300 * one, one, one, key_mask=np.zeros(2, bool)).any()
    y = ops.linear_attention(17 * one, one[:1], one[:1], feature_map="relu2", causal=True)
    np.testing.assert_array_equal(y, [[0], [1]])
    huge = np.full((1, 1), 1e20)
    assert not ops.linear_attention(huge, one[:1], one[:1], key_mask=np.zeros(1, bool)).any()


@pytest.mark.parametrize("name", ["exp", "softmax"])
def test_a_late_key_behind_masked_ones_changes_no_earlier_row(ops: ModuleType, name: str) -> None:
    """The masked rows before it saw a state in the units of that key, in which nothing was left of it."""
    n = 30
    k = np.zeros((n, 1), F32)
    k[-1] = 120
    mask = np.ones(n, bool)
    mask[24:29] = False
    y = ops.linear_attention(0 * k, k, 0 * k + 7, causal=True, feature_map=name, scale=1.0, key_mask=mask)
    np.testing.assert_allclose(y, 7, rtol=1e-6)
    low, zero = np.full((4, 1), -100, F32), np.zeros((4, 1), F32)
    options: dict[str, Any] = {"causal": True, "feature_map": name, "scale": 1.0}
    _, state = ops.linear_attention(low, low, zero + 7, **options, return_state=True)
    mask = np.array([False, False, False, True])
    y = ops.linear_attention(zero, zero, zero + 3, **options, initial_state=state, key_mask=mask)
    np.testing.assert_allclose(y, [[7], [7], [7], [3]], rtol=1e-6)


def test_subnormal_rows_have_a_direction(ops: ModuleType) -> None:
    one = np.ones((1, 2), F32)
    y = ops.linear_attention(np.full((1, 2), 1e-40, F32), one, one[:, :1], feature_map="cosine")
    np.testing.assert_array_equal(y, 1)


def test_a_step_wants_arrays_that_it_can_change(ops: ModuleType) -> None:
    one = np.ones((1, 1, 2))
    _, state = ops.linear_attention(*(np.ones((1, 1, 1, 2)),) * 3, causal=True, return_state=True)
    with pytest.raises(TypeError, match=r"state\[0\] must be an ndarray"):
        ops.linear_attention_step_(one, one, one, (state[0].tolist(), state[1]))


def test_no_layout_but_the_two(ops: ModuleType) -> None:
    one = np.ones((1, 1, 2, 2), F32)
    for layout in ("step", np.array(["bhnd", "bnhd"])):
        with pytest.raises((TypeError, ValueError), match="layout must be"):
            ops.linear_attention(one, one, one, layout=layout)


def test_misaligned_decay_is_copied(ops: ModuleType) -> None:
    one = np.ones((1, 2, 3, 4), F32)
    raw = np.zeros(9, np.uint8)
    decay = raw[1:].view(F32)
    decay[...] = -0.5
    want = ops.linear_attention(one, one, one, causal=True, decay=decay.copy())
    np.testing.assert_array_equal(ops.linear_attention(one, one, one, causal=True, decay=decay), want)


def test_a_step_with_an_axis_of_tokens_blames_it(ops: ModuleType) -> None:
    """The state was said to be of the wrong shape."""
    one = np.ones((1, 2, 1, 4), F32)
    _, state = ops.linear_attention(one, one, one, causal=True, return_state=True)
    with pytest.raises(ValueError, match=r"^q, k and v must be .* without an axis of tokens, got \(1, 2, 1, 4\)"):
        ops.linear_attention_step_(one, one, one, state)
    with pytest.raises(ValueError, match=r"^[qkv] must be"):
        ops.linear_attention_step_(one, one[:, :, 0], one[:, :, 0], state)
    ops.linear_attention_step_(*(one[:, :, 0],) * 3, state)


def test_a_step_without_query_heads_changes_nothing(ops: ModuleType) -> None:
    q, k = np.ones((1, 0, 4), F32), np.ones((1, 2, 4), F32)
    state = np.zeros((1, 2, 4, 4), F32), np.zeros((1, 2, 4), F32)
    with pytest.raises(ValueError, match="q must be"):
        ops.linear_attention_step_(q, k, k, state)
    assert not state[1].any()


@pytest.mark.parametrize(
    ("offsets", "got"),
    [([0, 3, 5], "5 as the last"), ([1, 6], "1 as the first"), ([0, 4, 3, 6], "3 after 4"), ([0, 7], "7 as the last")],
)
def test_offsets_say_what_is_wrong(offsets: list[int], got: str) -> None:
    x = np.ones((1, 2, 6, 4))
    for function in (fastops.linear_attention, fastops.softmax_attention):
        with pytest.raises(ValueError, match=rf"^cu_seqlens must be offsets that rise from 0 to 6, got {got}$"):
            function(x, x, x, cu_seqlens=offsets)
    with pytest.raises(ValueError, match=r"^cu_seqlens must be offsets that rise from 0 to 6, got none$"):
        fastops.linear_attention(x, x, x, cu_seqlens=np.empty(0, np.int64))


@pytest.mark.parametrize(("value", "got"), [(None, "None"), ({}, "an object of type dict"), ([None], "object")])
def test_what_is_no_array_is_named_as_it_came(value: Any, got: str) -> None:
    x = np.ones((1, 2, 6, 4))
    calls: dict[str, Callable[[], object]] = {
        "k": lambda: fastops.linear_attention(x, value, x),
        "q": lambda: fastops.softmax_attention(value, x, x),
        "v": lambda: fastops.nystrom_attention(x, x, value),
        "a": lambda: fastops.mitchell_matmul(value, x),
        r"state\[0\]": lambda: fastops.linear_attention_step_(x[0, 0], x[0, 0], x[0, 0], (value, value)),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{name} must be .*float\d\d, got {got}$"):
            call()


@pytest.mark.parametrize("shape", [(1, 4, 1, 3), (1, 1, 4, 3), (1, 4, 6, 3), (2, 1, 4, 3)])
def test_a_step_of_grouped_heads_names_its_axis_of_tokens(shape: tuple[int, ...]) -> None:
    q = np.ones(shape)
    k = np.ones(tuple(2 if n == 4 else n for n in shape))
    state = np.ones((shape[0], 2, 3, 3)), np.ones((shape[0], 2, 3))
    with pytest.raises(ValueError, match=rf"^q, k and v must be .* an axis of tokens, got {re.escape(str(shape))}$"):
        fastops.linear_attention_step_(q, k, k, state)


def test_a_mask_with_axes_of_length_1_says_how_to_take_them_off() -> None:
    x = np.ones((2, 2, 6, 4))
    mask = np.ones((2, 1, 1, 6), bool)
    for function in (fastops.linear_attention, fastops.softmax_attention, fastops.nystrom_attention):
        with pytest.raises(
            ValueError, match=r"^key_mask must be of shape \(2, 6\).* \(its reshape\(\(2, 6\)\)\), got \(2, 1, 1, 6\)$"
        ):
            function(x, x, x, key_mask=mask)
