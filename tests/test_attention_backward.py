# SPDX-License-Identifier: BSD-3-Clause
"""Gradients of linear attention: against finite differences in float64, and in every dtype against those in float64."""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from quadratic import DECAYING, EXPONENTIAL, MAPS, Definition, wide
from samples import FLOATS, assert_same_bits, bits

import fastops
from fastops import attention as module

F32, F64 = FLOATS["f32"], FLOATS["f64"]
both = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
every_map = pytest.mark.parametrize("name", MAPS)


@pytest.fixture
def ops(backend: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The public functions, on a backend and CPU level."""
    monkeypatch.setattr(module, "_backend", backend)
    return module


class Call:
    """A forward call, a loss in its result and its state, and the gradients of that."""

    def __init__(self, ops: ModuleType, arrays: list[Any], state: Any, options: dict[str, Any], seed: int) -> None:
        self.ops, self.arrays, self.initial, self.options = ops, arrays, state, options
        rng = np.random.default_rng(seed)
        self.y, self.final = ops.linear_attention(*arrays, **options, initial_state=state, return_state=True)
        self.dy = rng.standard_normal(self.y.shape).astype(self.y.dtype)
        self.d_state = tuple(rng.standard_normal(x.shape).astype(x.dtype) for x in self.final[:2])

    def loss(self, arrays: list[Any]) -> float:
        """At q, k, v and the parts of the initial state."""
        state = None if self.initial is None else (*arrays[3:], *self.initial[2:])
        y, final = self.ops.linear_attention(*arrays[:3], **self.options, initial_state=state, return_state=True)
        # A state in the units that the first one had.
        power = np.ones_like(final[1])
        if len(final) == 3:
            known = np.isfinite(final[2]) & np.isfinite(self.final[2])
            power[known] = 2.0 ** (final[2] - np.where(known, self.final[2], 0))[known]
        total = (self.dy * y).sum() + (self.d_state[0] * final[0] * power[..., np.newaxis]).sum()
        return float(total + (self.d_state[1] * final[1] * power).sum())

    def gradients(self, **changed: Any) -> list[Any]:
        arguments = {"initial_state": self.initial, "d_state": self.d_state, **self.options, **changed}
        dq, dk, dv, *first = self.ops.linear_attention_backward(self.dy, *self.arrays, self.y, **arguments)
        return [dq, dk, dv, *itertools.chain(*first)]

    def check(self, seed: int) -> None:
        """Each gradient along a random direction against a central difference."""
        rng = np.random.default_rng(seed)
        arguments = [*self.arrays, *(() if self.initial is None else self.initial[:2])]
        found = self.gradients()
        assert len(found) == len(arguments)
        for i, (x, gradient) in enumerate(zip(arguments, found, strict=True)):
            assert gradient.shape == x.shape
            assert gradient.dtype == x.dtype
            direction = rng.standard_normal(x.shape)

            def at(step: float, i: int = i, x: Any = x, direction: Any = direction) -> float:
                return self.loss([x + step * direction if j == i else other for j, other in enumerate(arguments)])

            h = tolerance.CENTRAL_STEP
            quotient = (at(h) - at(-h)) / (2 * h)
            size = np.abs(gradient * direction).sum() + np.abs(self.loss(arguments))
            difference = abs(quotient - (gradient * direction).sum())
            assert difference <= tolerance.CENTRAL * max(size, 1.0), (i, quotient, (gradient * direction).sum())


def of_map(name: str, d: int) -> dict[str, Any]:
    options: dict[str, Any] = {"feature_map": name}
    if name == "favor":
        options["projection"] = fastops.favor_projection(d, 6, rng=3)
    if name in ("relu", "relu2"):
        # Rows whose weights are all next to 0 have gradients next to infinity.
        options["kernel_eps"] = 0.1
    return options


def arrays_of(seed: int, b: int, h: int, heads: int, n: int, m: int, d: int, e: int, dtype: Any = F64) -> list[Any]:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in ((b, h, n, d), (b, heads, m, d), (b, heads, m, e)))
    # Away from the kinks of relu, which a difference quotient would straddle.
    for x in (q, k):
        x[np.abs(x) < 0.01] = 0.5
    return [q, k, v]


CONDITIONS = ["plain", "mask", "decay", "decay and mask", "scale and eps"]


def condition(kind: str, name: str, causal: bool, b: int, heads: int, m: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {}
    if "mask" in kind:
        options["key_mask"] = rng.random((b, heads, m)) < 0.7
    if "decay" in kind:
        if not causal or name not in DECAYING:
            pytest.skip("decay is of causal calls, and not of this map")
        options["decay"] = -rng.exponential(0.2, (b, heads, m))
        options["decay"][..., m // 2] = -np.inf
    if kind == "scale and eps":
        options["scale"] = 0.6
        if name not in ("softmax", "identity"):
            options["eps"] = 0.3
    return options


@every_map
@both
@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("with_state", [False, True], ids=["", "state"])
def test_gradients_are_difference_quotients(
    ops: ModuleType, name: str, causal: bool, kind: str, with_state: bool
) -> None:
    sizes = [(2, 4, 2, 5, 5), (1, 2, 2, 3, 7), (1, 1, 1, 37, 37), (1, 3, 1, 7, 3)]
    for seed, (b, h, heads, n, m) in enumerate(sizes[(CONDITIONS.index(kind) + with_state) % 2 :: 2]):
        options = {"causal": causal, **of_map(name, 4), **condition(kind, name, causal, b, heads, m, seed)}
        arrays = arrays_of(seed, b, h, heads, n, m, 4, 3)
        state = None
        if with_state:
            before = arrays_of(seed + 50, b, h, heads, 6, 6, 4, 3)
            _, state = ops.linear_attention(*before, **of_map(name, 4), return_state=True)
        Call(ops, arrays, state, options, seed).check(seed)


@every_map
@both
@pytest.mark.parametrize("normalize", [False, True], ids=["sums", "means"])
def test_gradients_with_and_without_a_normaliser(ops: ModuleType, name: str, causal: bool, normalize: bool) -> None:
    if name == "softmax" and not normalize:
        pytest.skip("its weights add up to 1")
    # Of the identity only with an eps beyond its sums: they change sign.
    options = {"causal": causal, **of_map(name, 4), "normalize": normalize}
    if name == "identity" and normalize:
        options["eps"] = 100.0
    Call(ops, arrays_of(60, 1, 2, 1, 20, 20, 4, 3), None, options, 60).check(60)


@every_map
@both
def test_gradients_of_packed_sequences(ops: ModuleType, name: str, causal: bool) -> None:
    ends = [0, 0, 9, 10, 30, 30]
    for kind in ("plain", "mask"):
        options = {"causal": causal, **of_map(name, 4), **condition(kind, name, causal, 1, 2, 30, 61)}
        arrays = arrays_of(61, 1, 4, 2, 30, 30, 4, 3)
        _, state = ops.linear_attention(*arrays_of(62, 5, 4, 2, 3, 3, 4, 3), **of_map(name, 4), return_state=True)
        call = Call(ops, arrays, state, {**options, "cu_seqlens": ends}, 61)
        call.check(61)
        whole = call.gradients()
        for i, part in enumerate(itertools.starmap(slice, itertools.pairwise(ends))):
            pieces = {key: x[..., part] if key == "key_mask" else x for key, x in options.items()}
            alone = ops.linear_attention_backward(
                call.dy[:, :, part],
                *(x[:, :, part] for x in arrays),
                call.y[:, :, part],
                **pieces,
                initial_state=tuple(x[i : i + 1] for x in state),
                d_state=tuple(x[i : i + 1] for x in call.d_state),
            )
            for got, want in zip(whole[:3], alone[:3], strict=True):
                assert_same_bits(got[:, :, part], want)
            for got, want in zip(whole[3:], alone[3], strict=True):
                assert_same_bits(got[i : i + 1], want)


SIZES = [(2, 2, 1, 5, 5, 3, 2), (1, 4, 2, 9, 37, 8, 5), (1, 2, 2, 35, 35, 17, 9), (1, 1, 1, 40, 33, 5, 33)]


@every_map
@both
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_in_every_dtype(ops: ModuleType, name: str, causal: bool, dtype: str) -> None:
    """Against those of the same numbers in float64 by the reference, whose own are difference quotients (above)."""
    for seed, (b, h, heads, n, m, d, e) in enumerate(SIZES):
        for kind in ("plain",) if seed == 0 else ("decay and mask" if causal and name in DECAYING else "mask",):
            options = {"causal": causal, **of_map(name, d), **condition(kind, name, causal, b, heads, m, seed)}
            if dtype != "f64":
                for key in ("projection", "decay"):
                    if key in options:
                        options[key] = options[key].astype(F32)
            arrays = arrays_of(seed, b, h, heads, n, m, d, e, FLOATS[dtype])
            _, state = ops.linear_attention(
                *arrays_of(seed + 50, b, h, heads, 6, 6, d, e, FLOATS[dtype]), **of_map(name, d), return_state=True
            )
            call = Call(ops, arrays, state, options, seed)
            before = [bits(x).copy() for x in (*arrays, call.dy, call.y)]
            found = call.gradients()
            for x, same in zip((*arrays, call.dy, call.y), before, strict=True):
                np.testing.assert_array_equal(bits(x), same)
            exact = exact_gradients(call)
            definition = Definition(*arrays, **options, initial_state=state)
            for got, want in zip(found, exact, strict=True):
                assert np.isfinite(wide(got)).all()
                size = np.abs(want).max(initial=0) + spread(call, definition)
                bound = tolerance.attention_gradient(size, definition.exponent(), got.dtype, arrays[0].dtype)
                assert np.abs(wide(got) - want).max(initial=0) <= bound, (kind, n, m)


def exact_gradients(call: Call) -> list[Any]:
    """Those of the reference in float64, at the exponents of the call's own states."""
    ops, power = fastops.reference, 1.0
    arrays, state = [wide(x) for x in call.arrays], None if call.initial is None else tuple(map(wide, call.initial))
    options = {key: wide(x) if key in ("projection", "decay") else x for key, x in call.options.items()}
    before = module._backend
    try:
        module._backend = ops
        y, final = module.linear_attention(*arrays, **options, initial_state=state, return_state=True)
        if len(final) == 3:
            known = np.isfinite(final[2])
            power = np.where(known, 2.0 ** (np.where(known, final[2], 0) - np.where(known, wide(call.final[2]), 0)), 0)
        d_state = [wide(call.d_state[0]) * np.asarray(power)[..., np.newaxis], wide(call.d_state[1]) * power]
        dq, dk, dv, *first = module.linear_attention_backward(
            wide(call.dy), *arrays, y, **options, initial_state=state, d_state=d_state
        )
    finally:
        module._backend = before
    return [dq, dk, dv, *itertools.chain(*first)]


def spread(call: Call, definition: Definition) -> float:
    """What the gradients would be without cancelling: of the loss of magnitudes."""
    _, magnitude = definition.result()
    most = float(np.abs(wide(call.dy)).max(initial=0))
    features = max(np.abs(definition.fq).max(initial=0), np.abs(definition.fk).max(initial=0), 1.0)
    return most * (float(magnitude.max(initial=0)) + 1.0) * float(features)


# --- what a gradient must not do ---------------------------------------------------------------------------------------------------


def test_gradient_of_elu_does_not_cancel(ops: ModuleType) -> None:
    """elu(x) + 1 in bfloat16 is 0 below -6: another package's gradients were 3e6 in place of 3e-7."""
    for dtype in FLOATS.values():
        q, k, v = (x.astype(dtype) for x in arrays_of(70, 1, 1, 1, 30, 30, 4, 3))
        q, k = (np.minimum(wide(x) - 8, -5).astype(dtype) for x in (q, k))
        call = Call(ops, [q, k, v], None, {"causal": True}, 70)
        dq, dk, dv = call.gradients(d_state=None)
        call.d_state = tuple(np.zeros_like(x) for x in call.d_state)
        for got, want in zip((dq, dk, dv), exact_gradients(call), strict=True):
            size = np.abs(want).max() + 4.0
            assert np.abs(wide(got) - want).max() <= tolerance.attention_gradient(size, 0.0, dtype, dtype)


@both
@every_map
def test_gradients_of_dead_rows_are_zero(ops: ModuleType, name: str, causal: bool) -> None:
    arrays = arrays_of(71, 1, 2, 1, 9, 9, 4, 3, F32)
    options = {"causal": causal, **of_map(name, 4), "key_mask": np.zeros((1, 9), bool)}
    for gradient in Call(ops, arrays, None, options, 71).gradients(d_state=None):
        assert not gradient.any()
    if name == "relu2":
        arrays[0][:, :, ::2] = -1
        options = {"causal": causal, "feature_map": name}
        call = Call(ops, arrays, None, options, 71)
        dq, dk, dv = call.gradients(d_state=None)
        assert all(np.isfinite(x).all() for x in (dq, dk, dv))
        assert not dq[:, :, ::2].any()


@both
@every_map
def test_gradients_of_masked_keys_are_zero_whatever_they_hold(ops: ModuleType, name: str, causal: bool) -> None:
    arrays = arrays_of(72, 2, 4, 2, 21, 21, 4, 3, F32)
    mask = np.random.default_rng(72).random((2, 2, 21)) < 0.6
    options = {"causal": causal, **of_map(name, 4), "key_mask": mask}
    call = Call(ops, arrays, None, options, 72)
    want = call.gradients()
    assert not want[1][~mask].any()
    assert not want[2][~mask].any()
    for poison in (np.nan, np.inf):
        dirty = [arrays[0], *(x.copy() for x in arrays[1:])]
        for x in dirty[1:]:
            x[~mask] = poison
        call.arrays = dirty
        for got, clean in zip(call.gradients(), want, strict=True):
            assert_same_bits(got, clean)


@every_map
def test_no_gradient_comes_from_later_rows_only(ops: ModuleType, name: str) -> None:
    """The gradient of one row alone reaches the keys up to it and no other row."""
    arrays = arrays_of(73, 1, 2, 1, 37, 37, 4, 3)
    call = Call(ops, arrays, None, {"causal": True, **of_map(name, 4)}, 73)
    for row in (0, 15, 16, 30):
        call.dy[...] = 0
        call.dy[:, :, row] = 1
        dq, dk, dv = call.gradients(d_state=None)
        assert not np.delete(dq, row, 2).any()
        assert not dk[:, :, row + 1 :].any()
        assert not dv[:, :, row + 1 :].any()
        assert dv[:, :, : row + 1].any()


@both
@every_map
def test_nan_stays_in_its_head(ops: ModuleType, name: str, causal: bool) -> None:
    arrays = arrays_of(74, 2, 4, 2, 19, 19, 4, 3, F32)
    call = Call(ops, arrays, None, {"causal": causal, **of_map(name, 4)}, 74)
    want = call.gradients(d_state=None)
    for i, x in enumerate(arrays):
        bad = x.copy()
        bad[1, -1, 5, 2] = np.nan
        call.arrays = [bad if j == i else other for j, other in enumerate(arrays)]
        call.y = ops.linear_attention(*call.arrays, **call.options)
        for got, clean in zip(call.gradients(d_state=None), want, strict=True):
            heads = 1 if got.shape[1] == 2 else 2
            assert_same_bits(got[0], clean[0])
            assert_same_bits(got[1, :heads], clean[1, :heads])


@every_map
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_in_a_row_does_not_reach_later_keys(ops: ModuleType, name: str, poison: float) -> None:
    """Within a register tile the zeros of the triangle's other half were multiplied with it."""
    for heads, n, m in ((2, 61, 61), (1, 30, 37), (4, 37, 30)):
        arrays = arrays_of(79, 1, 4, heads, n, m, 5, 3, F32)
        options = {"causal": True, **of_map(name, 5)}
        if name in DECAYING and heads == 2:
            options["decay"] = -np.random.default_rng(79).exponential(0.2, (1, heads, m))
        clean = Call(ops, arrays, None, options, 79)
        want = clean.gradients(d_state=None)
        for row, which in itertools.product((n - 1, n - 3, 20, 7), ("dy", "q")):
            bad = Call(ops, arrays, None, options, 79)
            if which == "dy":
                bad.dy[:, :, row, 1] = poison
            else:
                bad.arrays = [arrays[0].copy(), *arrays[1:]]
                bad.arrays[0][:, :, row, 1] = poison
                bad.y = ops.linear_attention(*bad.arrays, **options)
            got = bad.gradients(d_state=None)
            seen = max(row + 1 + m - n, 0)
            assert_same_bits(np.delete(got[0], row, 2), np.delete(want[0], row, 2))
            for x, y in zip(got[1:], want[1:], strict=True):
                assert_same_bits(x[:, :, seen:], y[:, :, seen:])
            if which == "dy" and seen:
                assert not np.isfinite(got[0][:, :, row]).all()
                assert not np.isfinite(got[2][:, :, :seen]).all()


@pytest.mark.parametrize("name", EXPONENTIAL)
@both
def test_huge_logits(ops: ModuleType, name: str, causal: bool) -> None:
    """The chain through exponents of thousands stays finite, and is that of float64."""
    arrays = arrays_of(75, 1, 2, 1, 40, 40, 4, 3)
    arrays[1][:, :, ::7] *= 300
    arrays[0][:, :, ::5] *= 300
    options = {"causal": causal, **of_map(name, 4), "scale": 1.0}
    if name == "favor":
        options["projection"] = np.round(options["projection"] * 8) / 8
    for dtype in (F32, F64):
        call = Call(ops, [(np.round(x * 64) / 64).astype(dtype) for x in arrays], None, options, 75)
        call.d_state = tuple(np.zeros_like(x) for x in call.d_state)
        for got, want in zip(call.gradients(), exact_gradients(call), strict=True):
            assert np.isfinite(got).all()
            exponent = 300.0 * (50 if name == "favor" else 4)
            bound = tolerance.attention_gradient(np.abs(want).max() + 40.0, exponent, dtype, dtype)
            assert np.abs(got - want).max() <= bound


# --- forms -------------------------------------------------------------------------------------------------------------------------


@both
def test_layouts_and_leading_dimensions(ops: ModuleType, causal: bool) -> None:
    arrays = arrays_of(76, 6, 4, 2, 9, 9, 4, 3, F32)
    call = Call(ops, arrays, None, {"causal": causal}, 76)
    want = call.gradients(d_state=None)

    def same(got: Any, part: Any = slice(None)) -> None:
        for x, wanted in zip(got, want, strict=True):
            bound = tolerance.attention_gradient(np.abs(wanted).max(), 0.0, F32, F32)
            assert np.abs(x - wanted[part].reshape(x.shape)).max() <= bound

    def back(change: Any, **options: Any) -> Any:
        dy, y = change(call.dy), change(call.y)
        return ops.linear_attention_backward(dy, *map(change, arrays), y, causal=causal, **options)

    same(back(lambda x: x.reshape(2, 3, *x.shape[1:])))
    same(back(lambda x: x[2]), 2)
    same(back(lambda x: np.asfortranarray(x)))
    same(back(lambda x: np.ascontiguousarray(x[::-1])[::-1]))
    swapped = back(lambda x: np.ascontiguousarray(x.swapaxes(1, 2)), layout="bnhd")
    same([x.swapaxes(1, 2) for x in swapped])
    one = ops.linear_attention_backward(
        call.dy[1, 0], arrays[0][1, 0], arrays[1][1, 0], arrays[2][1, 0], call.y[1, 0], causal=causal
    )
    assert np.abs(one[0] - want[0][1, 0]).max() <= tolerance.attention_gradient(np.abs(want[0]).max(), 0.0, F32, F32)


@both
@every_map
def test_empty(ops: ModuleType, name: str, causal: bool) -> None:
    for b, h, heads, n, m in ((0, 2, 1, 3, 3), (1, 0, 0, 3, 3), (1, 2, 1, 0, 3), (1, 2, 1, 3, 0), (1, 1, 1, 1, 1)):
        arrays = arrays_of(77, b, h, heads, n, m, 1, 1)
        state = ops.linear_attention(*arrays, **of_map(name, 1), return_state=True)[1]
        call = Call(ops, arrays, state, {"causal": causal, **of_map(name, 1)}, 77)
        for got, x in zip(call.gradients(), [*arrays, *state[:2]], strict=True):
            assert got.shape == x.shape
        if b and h:
            call.check(77)


@every_map
@both
def test_thread_counts_give_the_same_bits(
    native: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch, name: str, causal: bool
) -> None:
    monkeypatch.setattr(module, "_backend", native)
    threads = fastops.get_num_threads()
    try:
        for b, h, heads, n in ((2, 3, 3, 120), (1, 1, 1, 700)):
            arrays = arrays_of(78, b, h, heads, n, n, 8, 12, F32)
            call = Call(module, arrays, None, {"causal": causal, **of_map(name, 8)}, 78)
            results = []
            for count in (1, 2, 5):
                fastops.set_num_threads(count)
                results.append(call.gradients())
            for found in results[1:]:
                for got, want in zip(found, results[0], strict=True):
                    assert_same_bits(got, want)
    finally:
        fastops.set_num_threads(threads)


def test_gradients_where_weights_are_near_the_least_float(
    native: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The native forward scales features up there; the gradient was nan."""
    native_ops = importlib.import_module("fastops.attention")
    monkeypatch.setattr(native_ops, "_backend", native)
    q = np.full((2, 2), -45, np.float32)
    v = np.array([[1, 2], [3, 4]], np.float32)
    for causal in (False, True):
        y = native_ops.linear_attention(q, q, v, causal=causal)
        dq, dk, dv = native_ops.linear_attention_backward(v, q, q, v, y, causal=causal)
        wide = [x.astype(np.float64) for x in (v, q, q, v, y)]
        want = native_ops.linear_attention_backward(*wide, causal=causal)
        for x, w in zip((dq, dk, dv), want, strict=True):
            np.testing.assert_allclose(x, w, atol=1e-5)
