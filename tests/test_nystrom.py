# SPDX-License-Identifier: BSD-3-Clause
"""Nystrom attention against its formulas, what others get wrong in it, and its error against exact attention."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from hypothesis import given
from hypothesis import strategies as st
from quadratic import wide
from samples import FLOATS, assert_same_bits, bits
from segments import Nystrom, averages

import fastops
from fastops import attention as module

F32, F64 = FLOATS["f32"], FLOATS["f64"]
solvers = pytest.mark.parametrize("pinv", ["newton", "ridge"])
DATA = Path(os.environ.get("FASTOPS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
LEARNED = DATA / "learned_qkv.npz"


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


def distance(got: Any, want: Any) -> float:
    size = float(np.linalg.norm(want))
    return float(np.linalg.norm(wide(got) - wide(want))) / (size if size else 1.0)


def assert_defined(ops: Any, q: Any, k: Any, v: Any, bound: float = 0.0, **options: Any) -> Any:
    """The result, compared head by head so that none hides behind another."""
    want = Nystrom(q, k, v, **options)
    got, info = ops.nystrom_attention(q, k, v, **options, return_info=True)
    assert got.shape == want.y.shape
    assert got.dtype == q.dtype
    told = tolerance.NYSTROM_TOLD * (bound or tolerance.nystrom(info.residual.dtype))
    bound = bound or tolerance.nystrom(got.dtype)
    for at in np.ndindex(got.shape[:2]):
        off = distance(got[at], want.y[at])
        assert off <= bound, (at, off, options)
    for i, (part, of_info) in enumerate(zip(info, np.moveaxis(want.info, -1, 0), strict=True)):
        assert part.dtype == (F64 if q.dtype == F64 else F32)
        # A residual is a difference: its error is one of A.
        np.testing.assert_allclose(part, of_info, rtol=told, atol=told if i == 0 else 0)
    assert_same_bits(ops.nystrom_attention(q, k, v, **options), got)
    return got


# --- the formulas ------------------------------------------------------------------------------------------------------------------

# B, H, H_kv, N, M, D, E and the landmarks.
SIZES = [
    (1, 1, 1, 2, 2, 1, 1, 1),
    (2, 2, 1, 13, 13, 3, 2, 4),
    (1, 4, 2, 40, 9, 8, 5, 8),
    (1, 3, 3, 9, 50, 17, 16, 5),
    (1, 2, 2, 150, 150, 33, 9, 16),
    (1, 1, 1, 200, 331, 64, 64, 24),
    (1, 1, 1, 90, 90, 16, 9, 21),
]


@solvers
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_are_the_definition(ops: ModuleType, dtype: str, size: tuple[int, ...], pinv: str) -> None:
    *shape, landmarks = size
    b, h, _, n, m = size[:5]
    q, k, v = operands(1, *shape, dtype=FLOATS[dtype])
    rng = np.random.default_rng(2)
    before = [bits(x).copy() for x in (q, k, v)]
    common = {"num_landmarks": landmarks, "pinv": pinv}
    assert_defined(ops, q, k, v, **common)
    mask = rng.random((b, m)) < 0.8
    mask[:, : landmarks + 1] = True
    assert_defined(ops, q, k, v, **common, key_mask=mask, scale=-0.4)
    assert_defined(ops, q, k, v, **common, key_mask=mask, normalize=True)
    if n == m:
        w = rng.standard_normal((h, 5)).astype(q.dtype)
        assert_defined(ops, q, k, v, **common, key_mask=mask, conv_weight=w)
    for x, same in zip((q, k, v), before, strict=True):
        np.testing.assert_array_equal(bits(x), same)


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 7, 12])
def test_any_number_of_steps(ops: ModuleType, iterations: int) -> None:
    for dtype in (F32, F64):
        q, k, v = operands(3, 1, 2, 1, 60, 60, 8, 5, dtype)
        bound = tolerance.NYSTROM_LONG if dtype == F32 and iterations > 7 else 0.0
        assert_defined(ops, q, k, v, num_landmarks=9, iterations=iterations, bound=bound)


def test_many_steps_are_taken_in_double(ops: ModuleType) -> None:
    """In float32 twenty steps lose half of its digits (5e-4 of Z), forty all."""
    q, k, v = operands(4, 1, 2, 2, 80, 80, 16, 5)
    for iterations in (13, 20):
        assert_defined(ops, q, k, v, num_landmarks=12, iterations=iterations, bound=tolerance.NYSTROM_LONG)
    assert np.isfinite(ops.nystrom_attention(q, k, v, num_landmarks=12, iterations=60)).all()


def test_ridges_of_all_sizes(ops: ModuleType) -> None:
    q, k, v = operands(5, 1, 2, 1, 60, 60, 8, 5)
    for ridge in (1e-3, 0.1, 3.0, 1e6):
        assert_defined(ops, q, k, v, num_landmarks=9, pinv="ridge", ridge=ridge)


def test_scale_is_that_of_attention(ops: ModuleType) -> None:
    q, k, v = operands(6, 1, 2, 2, 40, 40, 16, 3, F64)
    assert_same_bits(
        ops.nystrom_attention(q, k, v, num_landmarks=5), ops.nystrom_attention(q, k, v, num_landmarks=5, scale=0.25)
    )
    assert_defined(ops, q, k, v, num_landmarks=5, scale=1.5)
    uniform = ops.nystrom_attention(q, k, v, num_landmarks=5, scale=0.0)
    assert distance(uniform, np.broadcast_to(v.mean(2, keepdims=True), v.shape)) <= tolerance.nystrom(F64)


@given(data=st.data())
def test_any_shape_and_mask(data: st.DataObject) -> None:
    """On the default backend; the others have the sizes above."""
    b, heads, groups, n = (data.draw(st.integers(1, high)) for high in (2, 2, 2, 40))
    m = n if data.draw(st.booleans()) else data.draw(st.integers(1, 40))
    landmarks, d, e = (data.draw(st.integers(1, high)) for high in (9, 9, 9))
    q, k, v = operands(data.draw(st.integers(0, 99)), b, heads * groups, heads, n, m, d, e, F64)
    mask = np.random.default_rng(n).random((b, m)) < data.draw(st.sampled_from([0.0, 0.4, 0.9, 1.0]))
    options: dict[str, Any] = {"num_landmarks": landmarks, "key_mask": mask, "normalize": False}
    if n == m and data.draw(st.booleans()):
        taps = 2 * data.draw(st.integers(0, 30)) + 1
        options["conv_weight"] = np.random.default_rng(taps).standard_normal((heads * groups, taps))
    assert_defined(module, q, k, v, **options)


# --- what others get wrong ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("landmarks", [1, 3, 4, 7])
def test_lengths_that_landmarks_do_not_divide(ops: ModuleType, landmarks: int) -> None:
    """Others raise, or pad and attend to the padding (constant values of 1 become 0.976)."""
    q, k, v = operands(7, 1, 1, 1, 41, 41, 4, 3)
    for n, m in itertools.product(range(0, 41, 4), (2, 17, 40)):
        assert_defined(ops, q[:, :, :n], k[:, :, :m], v[:, :, :m], num_landmarks=landmarks)
        assert_defined(ops, q[:, :, :m], k[:, :, :n], v[:, :, :n], num_landmarks=landmarks)


@solvers
def test_constant_values_stay_where_weights_are_uniform_or_normalized(ops: ModuleType, pinv: str) -> None:
    for n in (64, 65, 95):
        q, k, _ = operands(8, 1, 2, 2, n, n, 8, 1)
        v = np.ones((1, 2, n, 3), F32)
        y = ops.nystrom_attention(q, k, v, num_landmarks=16, pinv=pinv, normalize=True)
        np.testing.assert_allclose(y, 1, rtol=tolerance.nystrom(F32))
        y, info = ops.nystrom_attention(q, k, v, num_landmarks=16, pinv=pinv, return_info=True)
        np.testing.assert_allclose(y.min(axis=(2, 3)), info.row_sum_min, rtol=tolerance.nystrom(F32))
        np.testing.assert_allclose(y.max(axis=(2, 3)), info.row_sum_max, rtol=tolerance.nystrom(F32))
        y = ops.nystrom_attention(0 * q, k, v, num_landmarks=16, pinv=pinv, ridge=1e-7 if pinv == "ridge" else None)
        np.testing.assert_allclose(y, 1, rtol=tolerance.nystrom(F32))


@solvers
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_padding_changes_nothing(ops: ModuleType, pinv: str, dtype: str) -> None:
    """Others' landmarks hold the padding: the result is off by 0.42 to 0.45."""
    q, k, v = operands(9, 1, 4, 2, 50, 50, 8, 5, FLOATS[dtype])
    w = np.random.default_rng(9).standard_normal((4, 7))
    options: dict[str, Any] = {"num_landmarks": 7, "pinv": pinv}
    plain = ops.nystrom_attention(q, k, v, **options)
    tapped = ops.nystrom_attention(q, k, v, **options, conv_weight=w)
    for before, after in ((0, 30), (14, 0), (3, 5)):
        padded = [np.pad(x, ((0, 0), (0, 0), (before, after), (0, 0)), constant_values=np.nan) for x in (q, k, v)]
        mask = np.pad(np.ones((1, 50), bool), ((0, 0), (before, after)))
        for want, more in ((plain, {}), (tapped, {"conv_weight": w})):
            y = ops.nystrom_attention(*padded, **options, **more, key_mask=mask)
            assert distance(y[:, :, mask[0]], want) <= tolerance.nystrom(y.dtype)
            assert not y[:, :, ~mask[0]].any()
    # Holes too; and of keys alone where the lengths differ.
    mask = np.random.default_rng(10).random((1, 50)) < 0.6
    short = [x[:, :, mask[0]] for x in (q, k, v)]
    y = ops.nystrom_attention(q, k, v, **options, key_mask=mask)
    assert distance(y[:, :, mask[0]], ops.nystrom_attention(*short, **options)) <= tolerance.nystrom(y.dtype)
    y = ops.nystrom_attention(q[:, :, :40], k, v, **options, key_mask=mask)
    assert distance(y, ops.nystrom_attention(q[:, :, :40], *short[1:], **options)) <= tolerance.nystrom(y.dtype)


@solvers
def test_heads_and_samples_know_nothing_of_each_other(ops: ModuleType, pinv: str) -> None:
    """Others' coefficient is of the whole batch: 4.9 % when another head's q is 6 times as large."""
    q, k, v = operands(11, 2, 4, 4, 64, 64, 8, 5)
    options: dict[str, Any] = {"num_landmarks": 8, "pinv": pinv}
    want = ops.nystrom_attention(q, k, v, **options)
    louder = q.copy()
    louder[1, 2] *= 6
    y = ops.nystrom_attention(louder, k, v, **options)
    others = np.ones((2, 4), bool)
    others[1, 2] = False
    assert_same_bits(y[others], want[others])
    assert distance(y[1, 2], want[1, 2]) > 0.01
    assert_same_bits(ops.nystrom_attention(q[1:, :1], k[1:, :1], v[1:, :1], **options), want[1:, :1])
    if pinv == "newton":
        batch = {**options, "init": "batch"}
        assert distance(*(ops.nystrom_attention(x, k, v, **batch)[others] for x in (louder, q))) > 0.01


@pytest.mark.parametrize("name", [name for name in ("f16", "bf16") if name in FLOATS])
def test_half_precision_is_that_of_the_result(ops: ModuleType, name: str) -> None:
    """Others raise, or round A, which costs 1e-2 (float16) and 8e-2 (bfloat16)."""
    t = np.linspace(0, 6, 300)
    rng = np.random.default_rng(12)
    q, k, v = (np.cos(t[:, None] * rng.uniform(0, 2, 16) + rng.uniform(0, 6, 16)) for _ in range(3))
    half = [(3 * x[np.newaxis, np.newaxis]).astype(FLOATS[name]) for x in (q, k, v)]
    y = assert_defined(ops, *half, num_landmarks=32)
    single = ops.nystrom_attention(*(x.astype(F32) for x in half), num_landmarks=32)
    # Rounded once: the float32 result's own error moves few roundings by one place.
    differ = bits(y) != bits(single.astype(y.dtype))
    assert differ.mean() <= tolerance.NYSTROM_ROUNDED_OTHERWISE


def test_causal_is_refused(ops: ModuleType) -> None:
    """Others' flag is wrong: the means of segments hold later keys."""
    x = np.ones((1, 20, 4), F32)
    out = np.full((1, 20, 4), 7, F32)
    with pytest.raises(NotImplementedError, match="causal must be False, since the means of segments hold keys after"):
        ops.nystrom_attention(x, x, x, causal=True, out=out)
    assert (out == 7).all()
    with pytest.raises(NotImplementedError, match="causal"):
        ops.nystrom_attention_backward(x, x, x, x, causal=True)


@solvers
def test_few_rows_or_keys_get_exact_attention(ops: ModuleType, pinv: str) -> None:
    for n, m, landmarks in ((7, 7, 7), (7, 7, 8), (1, 1, 64), (3, 50, 3), (50, 3, 3), (6, 50, 300), (1, 90, 64)):
        q, k, v = operands(13, 2, 4, 2, n, m, 5, 3)
        y, info = ops.nystrom_attention(q, k, v, num_landmarks=landmarks, pinv=pinv, normalize=True, return_info=True)
        assert distance(y, ops.softmax_attention(q, k, v)) <= tolerance.nystrom(F32)
        assert all(np.isnan(x).all() for x in info)
    # By what counts, sample by sample.
    q, k, v = operands(14, 3, 2, 2, 40, 40, 5, 3)
    mask = np.arange(40) < np.array([[40], [8], [9]])
    y, info = ops.nystrom_attention(q, k, v, num_landmarks=8, pinv=pinv, key_mask=mask, return_info=True)
    want = ops.softmax_attention(q[1:2], k[1:2], v[1:2], key_mask=mask[1:2])
    assert distance(y[1:2, :, :8], want[:, :, :8]) <= tolerance.nystrom(F32)
    assert not y[1, :, 8:].any()
    np.testing.assert_array_equal(np.isnan(info.coefficient), [[False] * 2, [True] * 2, [False] * 2])
    # The default has 64 landmarks, not 64 of 64 rows.
    q, k, v = operands(15, 1, 1, 1, 70, 70, 4, 3)
    assert distance(ops.nystrom_attention(q, k, v), ops.softmax_attention(q, k, v)) > 1e-3


@pytest.mark.parametrize("init", ["matrix", "batch"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_head(ops: ModuleType, value: float, init: str) -> None:
    q, k, v = operands(16, 2, 4, 2, 30, 30, 5, 3)
    for pinv, i in itertools.product(("newton", "ridge") if init == "matrix" else ("newton",), range(3)):
        options: dict[str, Any] = {"num_landmarks": 6, "pinv": pinv, "init": init}
        want = ops.nystrom_attention(q, k, v, **options)
        arrays = [x.copy() for x in (q, k, v)]
        arrays[i][1, 1, 5, 2] = value
        y, info = ops.nystrom_attention(*arrays, **options, return_info=True)
        clean = np.ones((2, 4), bool)
        clean[1, [1] if i == 0 else [2, 3]] = False
        if init == "matrix":
            assert_same_bits(y[clean], want[clean])
        assert np.isfinite(y[clean]).all()
        assert np.isfinite(np.stack(info)[:, clean]).all()
        assert not np.isfinite(y[~clean]).all(axis=(1, 2)).any()
        dy = np.ones_like(y)
        dq, dk, dv = ops.nystrom_attention_backward(dy, *arrays, **options)
        assert np.isfinite(dq[clean]).all()
        for x in (dk, dv):
            assert np.isfinite(x[0]).all()
            assert np.isfinite(x[1, 1 if i == 0 else 0]).all()


def test_a_sample_without_keys_is_zero(ops: ModuleType) -> None:
    q, k, v = operands(17, 3, 2, 2, 30, 30, 5, 3)
    mask = np.ones((3, 30), bool)
    mask[1] = False
    w = np.ones((2, 3))
    for pinv, landmarks in itertools.product(("newton", "ridge"), (None, (q[:, :, :4], k[:, :, :4]))):
        options: dict[str, Any] = {"num_landmarks": 4, "pinv": pinv, "landmarks": landmarks}
        for dirty in (v, np.where(mask[:, np.newaxis, :, np.newaxis], v, np.nan)):
            y = ops.nystrom_attention(q, k, dirty, **options, key_mask=mask, conv_weight=w)
            assert not y[1].any()
            assert y[[0, 2]].all()
        y = ops.nystrom_attention(q[:, :, :20], k, v, **options, key_mask=mask, normalize=True)
        assert not y[1].any()
        assert y[[0, 2]].all()
        gradients = ops.nystrom_attention_backward(np.ones_like(v), q, k, v, **options, key_mask=mask, conv_weight=w)
        for x in gradients[:3]:
            assert not x[1].any()
            assert x[[0, 2]].all()


# --- landmarks, several of them, and the batch's coefficient ------------------------------------------------------------------------


@solvers
def test_given_landmarks(ops: ModuleType, pinv: str) -> None:
    q, k, v = operands(18, 2, 4, 2, 60, 45, 5, 3, F64)
    own = tuple(np.stack([[averages(x, 7) for x in sample] for sample in y]) for y in (q, k))
    y = ops.nystrom_attention(q, k, v, landmarks=own, pinv=pinv)
    assert distance(y, ops.nystrom_attention(q, k, v, num_landmarks=7, pinv=pinv)) <= tolerance.nystrom(F64)
    rng = np.random.default_rng(18)
    others = rng.standard_normal((2, 4, 9, 5)), rng.standard_normal((2, 2, 9, 5))
    for normalize in (False, True):
        assert_defined(ops, q, k, v, landmarks=others, pinv=pinv, normalize=normalize)
    # Never exact, even where there are more of them than rows.
    assert_defined(ops, q[:, :, :3], k[:, :, :4], v[:, :, :4], landmarks=others, pinv=pinv)
    single = [x.astype(F32) for x in (q, k, v)]
    assert_defined(ops, *single, landmarks=tuple(x.astype(F32) for x in others), pinv=pinv)
    mask = np.arange(45) < np.array([[45], [2]])
    assert_defined(ops, q, k, v, landmarks=others, pinv=pinv, key_mask=mask)
    alone = ops.nystrom_attention(q[0, 0], k[0, 0], v[0, 0], landmarks=(others[0][0, 0], others[1][0, 0]), pinv=pinv)
    assert_same_bits(alone, ops.nystrom_attention(q, k, v, landmarks=others, pinv=pinv)[0, 0])


@pytest.mark.parametrize("landmarks", [128, 300])
def test_many_landmarks(ops: ModuleType, landmarks: int) -> None:
    q, k, v = operands(19, 1, 1, 1, 450, 450, 16, 5)
    assert_defined(ops, q, k, v, num_landmarks=landmarks)
    assert_defined(ops, q, k, v, num_landmarks=landmarks, pinv="ridge")


@solvers
def test_long_sequences(ops: ModuleType, pinv: str) -> None:
    """Many blocks of keys, or of queries, with maxima that rise and fall along them."""
    rng = np.random.default_rng(27)
    for n, m in ((40, 6000), (6000, 40)):
        q, k, v = operands(27, 1, 2, 1, n, m, 4, 3)
        for x in (q, k):
            x *= rng.uniform(0.2, 1.5, (1, 1, x.shape[2], 1)).astype(F32)
        assert_defined(ops, q, k, v, num_landmarks=8, pinv=pinv)
        assert_defined(ops, q, k, v, num_landmarks=8, pinv=pinv, key_mask=rng.random((1, m)) < 0.6)


def hugging_face(q: Any, k: Any, v: Any, w: Any, m: int, batch: bool) -> Any:
    """The formulas of Hugging Face's NystromformerSelfAttention, without a mask and for lengths that m divides."""
    b, h, n, d = q.shape
    q, k = q / d**0.25, k / d**0.25
    qm, km = (x.reshape(b, h, m, n // m, d).mean(-2) for x in (q, k))

    def softmax(x: Any) -> Any:
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    first, key, third = (
        softmax(q @ km.swapaxes(-1, -2)),
        softmax(qm @ km.swapaxes(-1, -2)),
        softmax(qm @ k.swapaxes(-1, -2)),
    )
    sums = key.sum(-2)
    value = key.swapaxes(-1, -2) / (sums.max() if batch else sums.max(-1)[..., None, None])
    one = np.eye(m)
    for _ in range(6):
        product = key @ value
        value = 0.25 * value @ (13 * one - product @ (15 * one - product @ (7 * one - product)))
    y = first @ value @ (third @ v)
    half = w.shape[1] // 2
    padded = np.pad(v, ((0, 0), (0, 0), (half, half), (0, 0)))
    return y + sum(w[:, t, None, None] * padded[:, :, t : t + n] for t in range(w.shape[1]))


@pytest.mark.parametrize("init", ["matrix", "batch"])
def test_hugging_faces_formulas_where_they_agree(ops: ModuleType, init: str) -> None:
    q, k, v = operands(20, 2, 3, 3, 96, 96, 16, 8, F64, 1.5)
    q[0, 1] *= 4
    w = np.random.default_rng(20).standard_normal((3, 65)) / 8
    want = hugging_face(q, k, v, w, 16, init == "batch")
    got = ops.nystrom_attention(q, k, v, num_landmarks=16, conv_weight=w, init=init)
    assert distance(got, want) <= tolerance.nystrom(F64)
    other = ops.nystrom_attention(
        q, k, v, num_landmarks=16, conv_weight=w, init="matrix" if init == "batch" else "batch"
    )
    assert distance(other, want) > 1e-4


def test_the_batchs_coefficient_is_of_those_that_use_landmarks(ops: ModuleType) -> None:
    q, k, v = operands(21, 3, 4, 2, 40, 40, 5, 3, F64)
    q[1] *= 5
    mask = np.arange(40) < np.array([[40], [5], [30]])
    for dtype in (F64, F32):
        arrays = [x.astype(dtype) for x in (q, k, v)]
        assert_defined(ops, *arrays, num_landmarks=6, init="batch", key_mask=mask)
        assert_defined(ops, *arrays, num_landmarks=6, init="batch")


# --- arrays ------------------------------------------------------------------------------------------------------------------------


def test_forms_of_the_arrays(ops: ModuleType) -> None:
    q, k, v = operands(22, 6, 4, 2, 19, 19, 5, 3)
    w = np.random.default_rng(22).standard_normal((4, 3)).astype(F32)
    mask = np.arange(19) < np.arange(9, 15)[:, np.newaxis]
    options: dict[str, Any] = {"num_landmarks": 4, "conv_weight": w, "return_info": True}
    want, told = ops.nystrom_attention(q, k, v, **options, key_mask=mask)

    def call(change: Any, key_mask: Any = mask, **more: Any) -> Any:
        return ops.nystrom_attention(*map(change, (q, k, v)), **{**options, "key_mask": key_mask, **more})

    y, info = call(lambda x: x.reshape(2, 3, *x.shape[1:]), mask.reshape(2, 3, 19))
    assert_same_bits(y, want.reshape(2, 3, 4, 19, 3))
    assert_same_bits(info.residual, told.residual.reshape(2, 3, 4))
    assert isinstance(info, fastops.NystromInfo)
    y, info = call(lambda x: x[3], mask[3])
    assert_same_bits(y, want[3])
    assert info.row_sum_min.shape == (4,)
    y, info = call(lambda x: x[3, 0], mask[3], conv_weight=w[:1])
    assert_same_bits(y, want[3, 0])
    assert info.coefficient.shape == ()
    assert_same_bits(info.coefficient, told.coefficient[3, 0])
    for change in (
        np.asfortranarray,
        lambda x: np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1],
        lambda x: x.astype(">f4"),
    ):
        assert distance(call(change)[0], want) <= tolerance.nystrom(F32)
    assert distance(
        call(np.array, np.asfortranarray(mask), conv_weight=w.astype(F64).T.copy().T)[0], want
    ) <= tolerance.nystrom(F32)
    out = np.zeros((6, 19, 4, 6), F32)[..., ::2]
    y, _ = call(lambda x: np.ascontiguousarray(x.swapaxes(1, 2)), layout="bnhd", out=out)
    assert y is out
    assert distance(np.ascontiguousarray(y.swapaxes(1, 2)), want) <= tolerance.nystrom(F32)
    repeated = ops.nystrom_attention(q, np.repeat(k, 2, 1), np.repeat(v, 2, 1), **options, key_mask=mask)[0]
    assert distance(repeated, want) <= tolerance.nystrom(F32)
    # Heads of stride 0.
    one = [np.broadcast_to(x[:1, :1], (3, 2, *x.shape[2:])) for x in (q, k, v)]
    same = ops.nystrom_attention(*one, num_landmarks=4)
    assert distance(
        same, np.broadcast_to(ops.nystrom_attention(*(x[:1, :1] for x in one), num_landmarks=4), same.shape)
    ) <= (tolerance.nystrom(F32))


def test_empty_arrays(ops: ModuleType) -> None:
    for b, h, n, m in itertools.product((0, 1), (0, 2), (0, 3), (0, 3)):
        q, k, v = operands(23, b, h, h, n, m, 3, 2)
        landmarks = np.ones((b, h, 2, 3)), np.ones((b, h, 2, 3))
        for options in ({}, {"num_landmarks": 1, "pinv": "ridge"}, {"landmarks": landmarks}, {"init": "batch"}):
            y, info = ops.nystrom_attention(q, k, v, **options, return_info=True)
            assert y.shape == (b, h, n, 2)
            assert info.residual.shape == (b, h)
            if m == 0:
                assert not y.any()
            gradients = ops.nystrom_attention_backward(y, q, k, v, **options)
            assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
            if n == 0 or m == 0:
                assert not any(x.any() for x in gradients)
    y = ops.nystrom_attention(*operands(24, 0, 2, 2, 9, 9, 3, 2), conv_weight=np.ones((2, 3)), num_landmarks=3)
    assert y.shape == (0, 2, 9, 2)


@solvers
def test_thread_counts_give_the_same_bits(
    native: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch, pinv: str
) -> None:
    monkeypatch.setattr(module, "_backend", native)
    before = fastops.get_num_threads()
    try:
        for b, h, heads, n in ((2, 3, 3, 120), (1, 1, 1, 1500)):
            arrays = operands(25, b, h, heads, n, n, 16, 24)
            dy = arrays[2]
            results = []
            for threads in (1, 2, 5):
                fastops.set_num_threads(threads)
                options: dict[str, Any] = {"num_landmarks": 16, "pinv": pinv}
                y = module.nystrom_attention(*arrays, **options)
                results.append((y, *module.nystrom_attention_backward(dy, *arrays, **options)))
            for found in results[1:]:
                for x, first in zip(found, results[0], strict=True):
                    assert_same_bits(x, first)
    finally:
        fastops.set_num_threads(before)


# --- attacks -----------------------------------------------------------------------------------------------------------------------


@solvers
def test_row_sums_of_nothing(ops: ModuleType, pinv: str) -> None:
    """Without keys the sums were those of Z; of a head whose queries are all masked, the infinities they began with."""
    q, k, v = operands(43, 2, 2, 2, 20, 20, 5, 3)
    own: dict[str, Any] = {"landmarks": (q[:, :, :4], k[:, :, :4]), "pinv": pinv, "return_info": True}
    mask = np.ones((2, 20), bool)
    mask[1] = False
    for steps in (6, 12):
        for queries in (20, 13):
            y, info = ops.nystrom_attention(q[:, :, :queries], k, v, **own, key_mask=mask, iterations=steps)
            assert not y[1].any()
            for sums in (info.row_sum_min, info.row_sum_max):
                assert (np.abs(sums[0]) > 0.1).all()
                np.testing.assert_array_equal(sums[1], np.nan if queries == 20 else 0)
        _, info = ops.nystrom_attention(q, k[:, :, :0], v[:, :, :0], **own, iterations=steps)
        np.testing.assert_array_equal(info.row_sum_max, 0)


FORMS: dict[str, Any] = {
    "reversed rows": lambda x: np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1],
    "reversed numbers": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "all reversed": lambda x: np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
    "every other": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "gaps of nan": lambda x: np.pad(x, ((0, 0), (0, 0), (0, 0), (1, 2)), constant_values=np.nan)[..., 1:-2],
    "transposed": np.asfortranarray,
    "misaligned": lambda x: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
    "swapped": lambda x: x.astype(x.dtype.newbyteorder()) if x.dtype.kind == "f" else x,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_any_strides_and_bytes(ops: ModuleType, form: str, dtype: str) -> None:
    q, k, v = operands(44, 2, 2, 1, 23, 23, 9, 10, FLOATS[dtype])
    mask = np.arange(23) < np.array([[23], [15]])
    landmarks = q[:, :, :5].copy(), k[:, :, :5].copy()
    change = FORMS[form]
    arrays = [change(x) for x in (q, k, v)]
    for options in ({"num_landmarks": 5, "key_mask": mask}, {"landmarks": landmarks}, {"num_landmarks": 30}):
        want = ops.nystrom_attention(q, k, v, **options)
        other = dict(options)
        if "key_mask" in other:
            other["key_mask"] = np.ascontiguousarray(mask[:, ::-1])[:, ::-1]
        if "landmarks" in other:
            other["landmarks"] = tuple(change(x) for x in landmarks)
        # Rows that are read in place or copied first: the order of sums may differ.
        assert distance(ops.nystrom_attention(*arrays, **other), want) <= tolerance.nystrom(want.dtype)
        dy = np.ones_like(want)
        found = ops.nystrom_attention_backward(change(dy), *arrays, **other)
        for x, y in zip(found, ops.nystrom_attention_backward(dy, q, k, v, **options), strict=True):
            assert distance(x, y) <= tolerance.nystrom_gradient(want.dtype)


def test_rows_of_stride_zero(ops: ModuleType) -> None:
    """All keys alike: every row is the mean of v, and no key has a gradient."""
    q, k, v = operands(45, 1, 2, 2, 30, 30, 5, 3, F64)
    same = np.broadcast_to(k[:, :, :1], k.shape)
    y = ops.nystrom_attention(q, same, v, num_landmarks=5, normalize=True)
    np.testing.assert_allclose(y, np.broadcast_to(v.mean(2, keepdims=True), v.shape), atol=tolerance.nystrom(F64))
    row = np.broadcast_to(q[:, :, :1], q.shape)
    assert_defined(ops, row, same, v, num_landmarks=5)


def test_numbers_out_of_range_are_refused(ops: ModuleType) -> None:
    x = np.ones((2, 2, 12, 4), F32)
    out = np.full_like(x, 7)
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        *((ValueError, {"num_landmarks": n}) for n in (0, -1, 4097)),
        *((TypeError, {"num_landmarks": n}) for n in (2.0, True, None)),
        *((ValueError, {"iterations": n}) for n in (-1, 2**31, 10**30)),
        *((TypeError, {"iterations": n}) for n in (1.5, True, None)),
        *((ValueError, {"pinv": "ridge", "ridge": r}) for r in (0, -1.0, np.nan, np.inf)),
        (TypeError, {"pinv": "ridge", "ridge": True}),
        (ValueError, {"ridge": 1e-3}),
        *((ValueError, {"scale": r}) for r in (np.nan, np.inf)),
        (ValueError, {"pinv": "exact"}),
        (ValueError, {"init": "batch", "pinv": "ridge"}),
        (ValueError, {"key_mask": np.ones((2, 2, 12), bool)}),
        (ValueError, {"key_mask": np.ones((2, 11), bool)}),
        (TypeError, {"key_mask": np.ones((2, 12), np.uint8)}),
        *((ValueError, {"conv_weight": np.ones(s)}) for s in ((2, 2), (2, 0), (1, 3), (2,), (2, 3, 1))),
        (TypeError, {"conv_weight": np.ones((2, 3), int)}),
        (TypeError, {"landmarks": 5}),
        (ValueError, {"landmarks": (x,)}),
        (ValueError, {"landmarks": (x[:, :, :3], x[:, :, :4])}),
        (ValueError, {"landmarks": (x[:, :, :0], x[:, :, :0])}),
        (ValueError, {"landmarks": (x[..., :3], x[..., :3])}),
        (TypeError, {"landmarks": (x.astype(int), x)}),
    ]
    for error, options in wrong:
        with pytest.raises(error):
            ops.nystrom_attention(x, x, x, out=out, **options)
        with pytest.raises(error):
            ops.nystrom_attention_backward(x, x, x, x, **options)
    for dtype in (np.int32, np.bool_, np.complex64, object):
        with pytest.raises(TypeError):
            ops.nystrom_attention(x.astype(dtype), x, x, out=out)
    for kind in range(3):
        arrays = [x, x, x]
        arrays[kind] = out
        with pytest.raises(ValueError, match="memory apart"):
            ops.nystrom_attention(*arrays, out=out)
    assert (out == 7).all()


def test_more_than_memory_is_an_error(ops: ModuleType) -> None:
    """Views of one number claim any size."""
    x = np.ones((1, 1, 9, 4), F32)
    for shape in ((1, 1, 2**40, 4), (2**20, 2**20, 64, 4), (1, 1, 64, 2**40)):
        huge = np.broadcast_to(F32.type(1), shape)
        with pytest.raises(MemoryError):
            ops.nystrom_attention(huge, huge, huge)
        with pytest.raises(MemoryError):
            ops.nystrom_attention_backward(huge, huge, huge, huge)
    many = np.broadcast_to(F32.type(1), (1, 1, 2**56, 4))
    with pytest.raises(MemoryError):
        ops.nystrom_attention_backward(x, x, many, many)
    with pytest.raises(MemoryError):
        ops.nystrom_attention(x, x, x, num_landmarks=2, conv_weight=np.broadcast_to(F32.type(0), (1, 2**40 + 1)))


def test_a_gradient_of_too_many_steps_is_an_error(
    native: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the matrix of each."""
    monkeypatch.setattr(module, "_backend", native)
    x = np.broadcast_to(F32.type(1), (1, 1, 300, 4))
    with pytest.raises(MemoryError):
        module.nystrom_attention_backward(x, x, x, x, num_landmarks=256, iterations=2**31 - 1)


# --- against exact attention -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not LEARNED.exists(), reason="no learned_qkv.npz in FASTOPS_TEST_DATA or ../shared/data")
@pytest.mark.parametrize(("layer", "landmarks", "want"), [(1, 64, 0.203), (1, 128, 0.088), (2, 64, 0.235)])
def test_error_on_learned_queries(ops: ModuleType, layer: int, landmarks: int, want: float) -> None:
    with np.load(LEARNED) as arrays:
        q, k, v = arrays[f"l{layer}_n1024"].astype(F32)
    exact = ops.softmax_attention(q, k, v)
    y = ops.nystrom_attention(q, k, v, num_landmarks=landmarks)
    assert distance(y, exact) == pytest.approx(want, rel=tolerance.NYSTROM_FIGURES)


def test_error_on_smooth_and_on_random_queries(ops: ModuleType) -> None:
    """Along a smooth path a good approximation, and better with more landmarks; of white noise no better than the mean of v."""
    rng = np.random.default_rng(26)
    t = np.linspace(0, 4, 512)[:, None]
    q, k, v = (3 * np.cos(t * rng.uniform(0, 8, 16) + rng.uniform(0, 6, 16)).astype(F32) for _ in range(3))
    exact = ops.softmax_attention(q, k, v)
    off = [distance(ops.nystrom_attention(q, k, v, num_landmarks=m), exact) for m in (8, 16, 64)]
    assert off[0] > off[1] > off[2]
    assert off[2] < tolerance.NYSTROM_SMOOTH
    q, k, v = rng.standard_normal((3, 512, 64)).astype(F32)
    exact = ops.softmax_attention(q, k, v)
    mean = distance(np.broadcast_to(v.mean(0), v.shape), exact)
    assert distance(ops.nystrom_attention(q, k, v, num_landmarks=32), exact) > tolerance.NYSTROM_NOISE * mean


@pytest.mark.parametrize("name", FLOATS)
def test_exact_rows_of_every_dtype(ops: ModuleType, name: str) -> None:
    """The exact rows of half precision were written as halves into room of float32."""
    for n in (5, 40):
        q, k, v = operands(41, 2, 2, 1, n, n, 8, 3, FLOATS[name])
        wide = [x.astype(np.float64) for x in (q, k, v)]
        want = ops.softmax_attention(*wide)
        y = ops.nystrom_attention(q, k, v, num_landmarks=64)
        assert y.dtype == q.dtype
        assert distance(y.astype(np.float64), want) <= tolerance.nystrom(q.dtype)


def test_a_nan_head_does_not_lower_the_maximum_of_the_batch(ops: ModuleType) -> None:
    q, k, v = operands(42, 1, 3, 3, 60, 60, 8, 3)
    q[:, 0] *= 4
    _, want = ops.nystrom_attention(q[:, :2], k[:, :2], v[:, :2], num_landmarks=6, init="batch", return_info=True)
    for head in (1, 2):
        bad = q.copy()
        bad[:, head, 3] = np.nan
        _, info = ops.nystrom_attention(bad, k, v, num_landmarks=6, init="batch", return_info=True)
        np.testing.assert_allclose(info.coefficient[0, 0], want.coefficient[0, 0], rtol=1e-5)
        assert np.isnan(info.row_sum_min[0, head])
