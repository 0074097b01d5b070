# SPDX-License-Identifier: BSD-3-Clause
"""Softmax attention against its definition, and the factors that keep its entropy from growing."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from quadratic import softmax_rows, wide
from samples import FLOATS, assert_same_bits, bits

import fastops
from fastops import attention as module

F32, F64 = FLOATS["f32"], FLOATS["f64"]
both = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])


@pytest.fixture
def ops(backend: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The public functions, on a backend and CPU level."""
    monkeypatch.setattr(module, "_backend", backend)
    return module


def operands(
    seed: int, b: int, h: int, heads: int, n: int, m: int, d: int, e: int, dtype: Any = F32, scale: float = 1.0
) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    shapes = (b, h, n, d), (b, heads, m, d), (b, heads, m, e)
    q, k, v = ((scale * rng.standard_normal(shape)).astype(dtype) for shape in shapes)
    return q, k, v


def assert_defined(got: Any, q: Any, k: Any, v: Any, **options: Any) -> None:
    want, magnitude, logit = softmax_rows(q, k, v, **options)
    assert got.shape == want.shape
    bound = tolerance.softmax_attention(magnitude, want, logit, q.shape[-1], got.dtype)
    difference = np.abs(wide(got) - want)
    over = ~(difference <= bound)
    assert not over.any(), (
        f"{int(over.sum())} of {over.size} over the bound, the worst {np.max(difference / bound):.3g} of it"
    )


SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 1, 5, 5, 3, 2),
    (1, 4, 2, 9, 40, 8, 5),
    (1, 3, 3, 40, 9, 17, 16),
    (1, 1, 1, 150, 150, 33, 9),
    (1, 1, 1, 3, 300, 64, 64),
]


@both
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_are_the_definition(ops: ModuleType, causal: bool, dtype: str, size: tuple[int, ...]) -> None:
    b, heads, m = size[0], size[2], size[4]
    q, k, v = operands(1, *size, FLOATS[dtype])
    rng = np.random.default_rng(2)
    before = [bits(x).copy() for x in (q, k, v)]
    for mask in (None, rng.random((b, m)) < 0.7, rng.random((b, heads, m)) < 0.3):
        for scale in (None, -1.5, 0.0):
            y = ops.softmax_attention(q, k, v, causal=causal, key_mask=mask, scale=scale)
            assert y.dtype == q.dtype
            assert_defined(y, q, k, v, causal=causal, key_mask=mask, scale=scale)
    for x, same in zip((q, k, v), before, strict=True):
        np.testing.assert_array_equal(bits(x), same)


def test_every_length(ops: ModuleType) -> None:
    q, k, v = operands(3, 1, 1, 1, 70, 70, 4, 3)
    for n, shift in itertools.product(range(0, 70, 3), (-33, -16, -7, -1, 0, 1, 15, 40)):
        m = max(n + shift, 0)
        rows, keys, values = q[:, :, :n], k[:, :, :m], v[:, :, :m]
        assert_defined(ops.softmax_attention(rows, keys, values, causal=True), rows, keys, values, causal=True)


@both
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_huge_logits(ops: ModuleType, causal: bool, size: float) -> None:
    q, k, v = (np.round(x * 8) / 8 for x in operands(4, 1, 2, 1, 100, 100, 4, 3, F64))
    k[:, :, ::7] *= size
    q[:, :, ::5] *= size
    for dtype in (F32, F64):
        arrays = [x.astype(dtype) for x in (q, k, v)]
        y = ops.softmax_attention(*arrays, causal=causal)
        assert np.isfinite(y).all()
        assert_defined(y, *arrays, causal=causal)


@both
def test_constant_values_stay(ops: ModuleType, causal: bool) -> None:
    q, k, _ = operands(5, 2, 4, 2, 90, 90, 8, 1)
    v = np.broadcast_to(np.arange(1, 5, dtype=F32).reshape(2, 2, 1, 1), (2, 2, 90, 3))
    y = ops.softmax_attention(q, k, v, causal=causal)
    want = np.broadcast_to(np.repeat(v[:, :, :1], 2, 1), y.shape)
    np.testing.assert_allclose(y, want, rtol=float(tolerance.attention(np.ones(()), 1.0, 0.0, F32)))


@both
def test_packed_sequences_know_nothing_of_each_other(ops: ModuleType, causal: bool) -> None:
    ends = [0, 0, 17, 18, 70, 91, 91]
    q, k, v = operands(6, 1, 4, 2, 91, 91, 5, 3)
    mask = np.random.default_rng(6).random((1, 2, 91)) < 0.8
    logn = np.random.default_rng(7).uniform(0.5, 2, (1, 4, 91))
    for options in ({}, {"key_mask": mask}, {"logn": logn}, {"logn": "keys", "key_mask": mask}):
        y = ops.softmax_attention(q, k, v, causal=causal, cu_seqlens=ends, **options)
        for part in itertools.starmap(slice, itertools.pairwise(ends)):
            pieces = {key: x if isinstance(x, str) else x[..., part] for key, x in options.items()}
            alone = ops.softmax_attention(q[:, :, part], k[:, :, part], v[:, :, part], causal=causal, **pieces)
            assert_same_bits(y[:, :, part], alone)


@pytest.mark.parametrize("poison", [1e6, np.inf, np.nan])
def test_no_key_reaches_an_earlier_row(ops: ModuleType, poison: float) -> None:
    n = 100
    q, k, v = operands(8, 1, 2, 1, n, n, 5, 3)
    want = ops.softmax_attention(q, k, v, causal=True)
    for at in (n - 1, 63, 17, 0):
        for which in ("k", "v"):
            changed = {"k": k.copy(), "v": v.copy()}
            changed[which][:, :, at, 1] = poison
            y = ops.softmax_attention(q, changed["k"], changed["v"], causal=True)
            before = slice(0, at)
            assert_defined(y[:, :, before], q[:, :, before], k[:, :, before], v[:, :, before], causal=True)
            if which == "v":
                assert_same_bits(y[..., 0], want[..., 0])


@both
def test_masked_keys_are_absent(ops: ModuleType, causal: bool) -> None:
    q, k, v = operands(9, 2, 4, 2, 13, 120, 5, 3)
    mask = np.random.default_rng(9).random((2, 120)) < 0.4
    mask[1, 64:] = False
    clean = ops.softmax_attention(q, k, v, causal=causal, key_mask=mask)
    assert_defined(clean, q, k, v, causal=causal, key_mask=mask)
    for poison in (np.nan, np.inf, 1e30):
        dirty = [x.copy() for x in (k, v)]
        for x in dirty:
            x[~np.repeat(mask[:, np.newaxis], 2, 1)] = poison
        assert_same_bits(ops.softmax_attention(q, *dirty, causal=causal, key_mask=mask), clean)
    dead = ops.softmax_attention(q, k, v, causal=causal, key_mask=np.zeros((2, 120), bool))
    assert not dead.any()


@both
def test_nan_and_infinity_stay_in_their_head(ops: ModuleType, causal: bool) -> None:
    q, k, v = operands(10, 2, 4, 2, 21, 21, 5, 3)
    want = ops.softmax_attention(q, k, v, causal=causal)
    for value, i in itertools.product((np.nan, np.inf, -np.inf), range(3)):
        arrays = [x.copy() for x in (q, k, v)]
        arrays[i][1, 1, 5, 2] = value
        y = ops.softmax_attention(*arrays, causal=causal)
        clean = np.ones(y.shape, bool)
        if i == 0:
            clean[1, 1, 5] = False
        else:
            clean[1, 2:, 5 if causal else 0 :] = False
        np.testing.assert_allclose(y[clean], want[clean], rtol=0, atol=float(tolerance.attention(4.0, 4.0, 0.0, F32)))
        if np.isnan(value):
            assert np.isnan(y[~clean]).any()


def test_forms_of_the_arrays(ops: ModuleType) -> None:
    q, k, v = operands(11, 6, 4, 2, 9, 9, 5, 3)
    want = ops.softmax_attention(q, k, v, causal=True, logn="keys")

    def call(change: Any, **options: Any) -> Any:
        return ops.softmax_attention(*map(change, (q, k, v)), causal=True, logn="keys", **options)

    np.testing.assert_array_equal(call(lambda x: x.reshape(2, 3, *x.shape[1:])), want.reshape(2, 3, 4, 9, 3))
    np.testing.assert_array_equal(call(lambda x: x[3]), want[3])
    np.testing.assert_array_equal(call(lambda x: x[3, 0]), want[3, 0])
    assert_same_bits(call(np.asfortranarray), want)
    assert_same_bits(call(lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1]), want)
    assert_same_bits(call(lambda x: x.astype(">f4")), want)
    out = np.zeros((6, 9, 4, 6), F32)[..., ::2]
    y = call(lambda x: np.ascontiguousarray(x.swapaxes(1, 2)), layout="bnhd", out=out)
    assert y is out
    assert_same_bits(np.ascontiguousarray(y.swapaxes(1, 2)), want)
    for b, h, n, m in itertools.product((0, 1), (0, 2), (0, 3), (0, 3)):
        arrays = operands(12, b, h, h, n, m, 3, 2)
        for causal in (False, True):
            empty = ops.softmax_attention(*arrays, causal=causal, logn="keys")
            assert empty.shape == (b, h, n, 2)
            if m == 0:
                assert not empty.any()


def test_a_hundred_thousand_keys_for_one_row(ops: ModuleType) -> None:
    """No memory of N x M, and keys of stride 0 are read in place."""
    q, k, v = operands(13, 1, 1, 1, 1, 1, 4, 3)
    m = 100_003
    y = ops.softmax_attention(q, np.broadcast_to(k, (1, 1, m, 4)), np.broadcast_to(v, (1, 1, m, 3)))
    np.testing.assert_allclose(y, v, rtol=2 * tolerance.running_sum(m, equal=True))


@both
def test_thread_counts_give_the_same_bits(
    native: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch, causal: bool
) -> None:
    monkeypatch.setattr(module, "_backend", native)
    before = fastops.get_num_threads()
    try:
        for b, h, heads, n in ((2, 3, 3, 120), (1, 1, 1, 700)):
            q, k, v = operands(14, b, h, heads, n, n, 16, 24)
            results = []
            for threads in (1, 2, 5):
                fastops.set_num_threads(threads)
                results.append(module.softmax_attention(q, k, v, causal=causal))
            for y in results[1:]:
                assert_same_bits(y, results[0])
    finally:
        fastops.set_num_threads(before)


# --- factors of log n --------------------------------------------------------------------------------------------------------------


def test_logn_scale_values() -> None:
    """bert4keras: log(max(n, 16)) / log(512); kappa log n / d with kappa = sqrt(d) / log 512 is the same."""
    np.testing.assert_allclose(
        fastops.logn_scale([0, 1, 16, 17, 512, 4096]),
        [math.log(16) / math.log(512)] * 3 + [math.log(17) / math.log(512), 1.0, math.log(4096) / math.log(512)],
        rtol=tolerance.DOUBLE,
    )
    np.testing.assert_allclose(64**0.5 / math.log(512), 1.28, atol=tolerance.printed(2))
    assert fastops.logn_scale(1, min_n=1) == 0
    # Qwen and rerope: at least 1, so that only rows beyond the length of training change.
    np.testing.assert_allclose(
        fastops.logn_scale(np.array([[8], [2048], [4096]]), base=2048, clip=True),
        [[1.0], [1.0], [12 / 11]],
        rtol=tolerance.DOUBLE,
    )
    assert isinstance(fastops.logn_scale(100), np.float64)
    assert fastops.logn_scale(np.arange(3, dtype=np.uint8)).dtype == F64
    assert np.isnan(fastops.logn_scale(np.nan))
    assert fastops.logn_scale([]).shape == (0,)


@both
def test_logn_of_keys_counts_the_keys_that_a_row_sees(ops: ModuleType, causal: bool) -> None:
    """Per row and by the mask, not the call's length nor the row's position (the usual mistakes)."""
    q, k, v = operands(15, 2, 4, 2, 40, 60, 5, 3)
    rng = np.random.default_rng(15)
    left = np.arange(60) >= np.array([[0], [35]])
    scattered = rng.random((2, 2, 60)) < 0.5
    for mask in (None, left, scattered):
        y = ops.softmax_attention(q, k, v, causal=causal, key_mask=mask, logn="keys")
        seen = np.tril(np.ones((40, 60), bool), 20) if causal else np.ones((40, 60), bool)
        counts = np.broadcast_to(seen.sum(-1), (2, 2, 40))
        if mask is not None:
            each = mask if mask.ndim == 3 else np.repeat(mask[:, np.newaxis], 2, 1)
            counts = (seen & each[:, :, np.newaxis]).sum(-1)
        factors = np.repeat(np.log(np.maximum(counts, 16)) / np.log(512), 2, 1).astype(F32)
        assert_defined(y, q, k, v, causal=causal, key_mask=mask, logn=factors)
        assert_same_bits(ops.softmax_attention(q, k, v, causal=causal, key_mask=mask, logn=factors), y)


def test_logn_is_a_factor_of_the_query(ops: ModuleType) -> None:
    q, k, v = operands(16, 2, 4, 2, 20, 20, 5, 3, F64)
    rows = np.random.default_rng(16).uniform(0.5, 2, 20)
    for logn in (
        rows,
        np.broadcast_to(rows, (4, 20)),
        np.broadcast_to(rows, (2, 4, 20)).copy(),
        np.float64(1.5),
        [[1.5]] * 4,
    ):
        y = ops.softmax_attention(q, k, v, causal=True, logn=logn)
        factors = np.broadcast_to(np.asarray(logn), (2, 4, 20))
        assert_defined(y, q, k, v, causal=True, logn=factors)
        assert_defined(y, q * factors[..., np.newaxis], k, v, causal=True)
    one = ops.softmax_attention(q[0, 0], k[0, 0], v[0, 0], logn=rows)
    assert_defined(one[np.newaxis, np.newaxis], q[:1, :1], k[:1, :1], v[:1, :1], logn=rows)


def test_entropy_grows_more_slowly_with_logn() -> None:
    """N(0, 1) in 64 dimensions: 3.68 to 7.82 without and 3.94 to 7.43 with it, from 64 to 4096 keys (the family's figures)."""

    def entropy(n: int, factor: float) -> float:
        rng = np.random.default_rng(17)
        q, k = rng.standard_normal((200, 64)), rng.standard_normal((n, 64))
        scores = factor * q @ k.T / 8
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return float(-(p * np.log(np.maximum(p, 1e-300))).sum(-1).mean())

    plain, scaled = ([entropy(n, float(f(n))) for n in (64, 4096)] for f in (lambda n: 1.0, fastops.logn_scale))
    np.testing.assert_allclose(plain, [3.68, 7.82], atol=tolerance.ENTROPY)
    np.testing.assert_allclose(scaled, [3.94, 7.43], atol=tolerance.ENTROPY)
