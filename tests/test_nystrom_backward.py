# SPDX-License-Identifier: BSD-3-Clause
"""Gradients of Nystrom attention: against finite differences in float64, and in every dtype against those in float64."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from quadratic import wide
from samples import FLOATS, assert_same_bits, bits
from segments import averages

import fastops
from fastops import _nystrom
from fastops import attention as module

F32, F64 = FLOATS["f32"], FLOATS["f64"]
solvers = pytest.mark.parametrize("pinv", ["newton", "ridge"])


@pytest.fixture
def ops(backend: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The public functions, on a backend and CPU level."""
    monkeypatch.setattr(module, "_backend", backend)
    return module


def arrays_of(seed: int, b: int, h: int, heads: int, n: int, m: int, d: int, e: int, dtype: Any = F64) -> list[Any]:
    rng = np.random.default_rng(seed)
    shapes = (b, h, n, d), (b, heads, m, d), (b, heads, m, e)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def distance(got: Any, want: Any) -> float:
    size = float(np.linalg.norm(want))
    return float(np.linalg.norm(wide(got) - wide(want))) / (size if size else 1.0)


def check(ops: Any, arrays: list[Any], options: dict[str, Any], seed: int) -> None:
    """Each gradient along a random direction against a central difference; the fourth array is the convolution's weights."""

    def forward(at: list[Any]) -> Any:
        more = {"conv_weight": at[3]} if len(at) > 3 else {}
        return ops.nystrom_attention(*at[:3], **options, **more)

    rng = np.random.default_rng(seed)
    dy = rng.standard_normal(forward(arrays).shape)
    more = {"conv_weight": arrays[3]} if len(arrays) > 3 else {}
    found = ops.nystrom_attention_backward(dy, *arrays[:3], **options, **more)
    assert len(found) == len(arrays)
    for i, (x, gradient) in enumerate(zip(arrays, found, strict=True)):
        assert gradient.shape == x.shape
        assert gradient.dtype == x.dtype
        direction = rng.standard_normal(x.shape)

        def at(step: float, i: int = i, x: Any = x, direction: Any = direction) -> float:
            moved = [x + step * direction if j == i else other for j, other in enumerate(arrays)]
            return float((forward(moved) * dy).sum())

        h = tolerance.CENTRAL_STEP
        quotient, slope = (at(h) - at(-h)) / (2 * h), float((gradient * direction).sum())
        size = np.abs(gradient * direction).sum() + np.abs(forward(arrays) * dy).sum()
        assert abs(quotient - slope) <= tolerance.CENTRAL * max(size, 1.0), (i, quotient, slope)


CONDITIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": 0.7},
    "normalize": {"normalize": True, "mask": 0.8},
    "taps": {"taps": 5, "mask": 0.8},
    "taps beyond": {"taps": 71},
    "scale": {"scale": -0.7},
    "landmarks": {"landmarks": True},
    "landmarks and mask": {"landmarks": True, "mask": 0.5, "normalize": True, "taps": 3},
    "exact": {"num_landmarks": 40, "taps": 3},
}


@solvers
@pytest.mark.parametrize("kind", CONDITIONS)
def test_gradients_are_differences(ops: ModuleType, kind: str, pinv: str) -> None:
    condition = dict(CONDITIONS[kind])
    rng = np.random.default_rng(1)
    b, h, heads, d = 2, 4, 2, 5
    for n, m in ((23, 23), (31, 23)):
        arrays = arrays_of(2, b, h, heads, n, m, d, 3)
        options = {"num_landmarks": 5, "pinv": pinv}
        options.update(
            {key: value for key, value in condition.items() if key in ("num_landmarks", "normalize", "scale")}
        )
        if "mask" in condition:
            options["key_mask"] = rng.random((b, m)) < condition["mask"]
        if "landmarks" in condition:
            options["landmarks"] = rng.standard_normal((b, h, 6, d)), rng.standard_normal((b, heads, 6, d))
        if "taps" in condition and n == m:
            arrays.append(rng.standard_normal((h, condition["taps"])))
        check(ops, arrays, options, 3)


@pytest.mark.parametrize("iterations", [0, 1, 6, 14])
def test_every_step_and_the_coefficient_are_differentiated(ops: ModuleType, iterations: int) -> None:
    """Without steps only the coefficient is left: a constant would be off by 1 to 10 %."""
    check(ops, arrays_of(4, 1, 2, 1, 30, 30, 6, 3), {"num_landmarks": 6, "iterations": iterations}, 5)


def test_few_landmarks_and_rows(ops: ModuleType) -> None:
    for n, m, landmarks in ((2, 2, 1), (1, 7, 1), (7, 1, 3), (3, 9, 2), (9, 2, 1)):
        for pinv in ("newton", "ridge"):
            check(ops, arrays_of(6, 1, 2, 2, n, m, 3, 2), {"num_landmarks": landmarks, "pinv": pinv}, 7)


def test_the_coefficient_of_a_batch_is_a_constant(ops: ModuleType) -> None:
    """Of one head it is that head's, so the difference is the coefficient's gradient, which `init="matrix"` has."""
    arrays = arrays_of(8, 1, 1, 1, 30, 30, 6, 3)
    dy = np.random.default_rng(8).standard_normal((1, 1, 30, 3))
    options: dict[str, Any] = {"num_landmarks": 6, "iterations": 2}
    for init in ("matrix", "batch"):
        y = ops.nystrom_attention(*arrays, **options, init=init)
        assert distance(y, ops.nystrom_attention(*arrays, **options)) <= tolerance.nystrom(F64)
    own, batch = (ops.nystrom_attention_backward(dy, *arrays, **options, init=init) for init in ("matrix", "batch"))
    assert distance(batch[2], own[2]) <= tolerance.nystrom_gradient(F64)
    assert distance(batch[0], own[0]) > 1e-3
    reference = backward_of(fastops.reference, dy, arrays, {**options, "init": "batch"})
    for x, want in zip(batch, reference, strict=True):
        assert distance(x, want) <= tolerance.nystrom_gradient(F64)


def backward_of(backend: Any, dy: Any, arrays: list[Any], options: dict[str, Any]) -> Any:
    """The gradients by another backend."""
    before = module._backend
    module._backend = backend
    try:
        return module.nystrom_attention_backward(dy, *arrays, **options)
    finally:
        module._backend = before


@solvers
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "size", [(1, 2, 1, 60, 60, 8, 5, 9), (2, 2, 2, 33, 150, 17, 16, 16), (1, 1, 1, 200, 200, 64, 64, 24)], ids=str
)
def test_every_dtype_has_the_gradients_of_float64(
    ops: ModuleType, size: tuple[int, ...], dtype: str, pinv: str
) -> None:
    *shape, landmarks = size
    b, h, heads, n, m, d, e = shape
    arrays = arrays_of(9, b, h, heads, n, m, d, e, FLOATS[dtype])
    rng = np.random.default_rng(9)
    dy = rng.standard_normal((b, h, n, e)).astype(FLOATS[dtype])
    mask = rng.random((b, m)) < 0.8
    for options in (
        {},
        {"key_mask": mask, "normalize": True},
        {"conv_weight": rng.standard_normal((h, 3)).astype(dy.dtype)},
    ):
        if "conv_weight" in options and n != m:
            continue
        options = {**options, "num_landmarks": landmarks, "pinv": pinv}
        found = ops.nystrom_attention_backward(dy, *arrays, **options)
        want = backward_of(fastops.reference, wide(dy), [wide(x) for x in arrays], options)
        assert len(found) == len(want)
        for i, (x, exact) in enumerate(zip(found, want, strict=True)):
            assert x.dtype == (dy.dtype if i < 3 or dtype == "f64" else F32)
            for at in np.ndindex(x.shape[:2] if i < 3 else ()):
                off = distance(x[at], exact[at])
                assert off <= tolerance.nystrom_gradient(dy.dtype), (i, at, off, options)


def test_what_is_masked_has_no_gradient(ops: ModuleType) -> None:
    q, k, v = arrays_of(10, 2, 4, 2, 40, 40, 5, 3, F32)
    rng = np.random.default_rng(10)
    dy, w = rng.standard_normal((2, 4, 40, 3)).astype(F32), rng.standard_normal((4, 7)).astype(F32)
    mask = rng.random((2, 40)) < 0.6
    for pinv in ("newton", "ridge"):
        options: dict[str, Any] = {"num_landmarks": 6, "pinv": pinv, "key_mask": mask, "conv_weight": w}
        clean = ops.nystrom_attention_backward(dy, q, k, v, **options)
        dirty = [x.copy() for x in (dy, q, k, v)]
        for x in dirty:
            x.swapaxes(1, 2)[~mask] = np.nan
        for x, want in zip(ops.nystrom_attention_backward(*dirty, **options), clean, strict=True):
            assert_same_bits(x, want)
        for x in clean[:3]:
            assert not x.swapaxes(1, 2)[~mask].any()
            assert x.swapaxes(1, 2)[mask].all()
        # Of keys alone where there are as many queries as they like.
        dq, dk, dv = ops.nystrom_attention_backward(dy[:, :, :30], q[:, :, :30], k, v, num_landmarks=6, key_mask=mask)
        assert dq.all()
        for x in (dk, dv):
            assert not x.swapaxes(1, 2)[~mask].any()


def test_forms_of_the_arrays(ops: ModuleType) -> None:
    q, k, v = arrays_of(11, 6, 4, 2, 19, 19, 5, 3, F32)
    dy = np.random.default_rng(11).standard_normal((6, 4, 19, 3)).astype(F32)
    options: dict[str, Any] = {"num_landmarks": 4, "conv_weight": np.ones((4, 3))}
    before = [bits(x).copy() for x in (dy, q, k, v)]
    want = ops.nystrom_attention_backward(dy, q, k, v, **options)
    for x, same in zip((dy, q, k, v), before, strict=True):
        np.testing.assert_array_equal(bits(x), same)

    def call(change: Any, **more: Any) -> Any:
        return ops.nystrom_attention_backward(*map(change, (dy, q, k, v)), **{**options, **more})

    bound = tolerance.nystrom_gradient(F32)
    for change in (lambda x: x.reshape(2, 3, *x.shape[1:]), np.asfortranarray, lambda x: x.astype(">f4")):
        for x, y in zip(call(change), want, strict=True):
            assert distance(x.reshape(y.shape), y) <= bound
    for i, (x, y) in enumerate(
        zip(call(lambda x: np.ascontiguousarray(x.swapaxes(1, 2)), layout="bnhd"), want, strict=True)
    ):
        assert distance(x if i == 3 else x.swapaxes(1, 2), y) <= bound
    alone = call(lambda x: x[3, 0], conv_weight=np.ones((1, 3)))
    # Two heads of queries share those of keys and values.
    assert distance(alone[0], want[0][3, 0]) <= bound
    repeated = ops.nystrom_attention_backward(dy, q, np.repeat(k, 2, 1), np.repeat(v, 2, 1), **options)
    for x, y in zip(repeated[1:3], want[1:3], strict=True):
        assert distance(x.reshape(6, 2, 2, 19, -1).sum(2), y) <= bound
    # The convolution's gradient adds up over samples, however they are laid out.
    total = sum(ops.nystrom_attention_backward(dy[i], q[i], k[i], v[i], **options)[3] for i in range(6))
    assert distance(total, want[3]) <= bound


@solvers
def test_landmarks_have_gradients_where_asked_for(ops: ModuleType, pinv: str) -> None:
    """Functions of q and k as landmarks are, a gradient without theirs would be wrong."""
    rng = np.random.default_rng(14)
    q, k, v = arrays_of(14, 2, 4, 2, 20, 25, 5, 3)
    dy = rng.standard_normal((2, 4, 20, 3))
    landmarks = rng.standard_normal((2, 4, 6, 5)), rng.standard_normal((2, 2, 6, 5))
    options: dict[str, Any] = {"pinv": pinv, "key_mask": rng.random((2, 25)) < 0.7}
    *plain, found = ops.nystrom_attention_backward(dy, q, k, v, landmarks=landmarks, **options, return_d_landmarks=True)
    constant = ops.nystrom_attention_backward(dy, q, k, v, landmarks=landmarks, **options)
    assert len(constant) == 3
    for x, y in zip(constant, plain, strict=True):
        assert_same_bits(x, y)
    h = tolerance.CENTRAL_STEP
    assert isinstance(found, tuple)
    for i, (x, gradient) in enumerate(zip(landmarks, found, strict=True)):
        assert gradient.shape == x.shape
        direction = rng.standard_normal(x.shape)
        ends = []
        for step in (h, -h):
            moved = tuple(y + step * direction if j == i else y for j, y in enumerate(landmarks))
            ends.append(float((ops.nystrom_attention(q, k, v, landmarks=moved, **options) * dy).sum()))
        quotient, slope = (ends[0] - ends[1]) / (2 * h), float((gradient * direction).sum())
        assert abs(quotient - slope) <= tolerance.CENTRAL * max(np.abs(gradient * direction).sum(), abs(ends[0]), 1.0)
    # A head alone, shapes as given; after the convolution's weights; float32 where those are computed with.
    one = [x[1, 3].astype(F32) for x in (dy, q)] + [x[1, 1].astype(F32) for x in (k, v)]
    pair = landmarks[0][1, 3], landmarks[1][1, 1]
    *_, alone = ops.nystrom_attention_backward(*one, landmarks=pair, pinv=pinv, return_d_landmarks=True)
    assert [x.shape for x in alone] == [(6, 5), (6, 5)]
    assert [x.dtype for x in alone] == [F32, F32]
    x = np.ones((0, 4, 9, 5))
    empty = np.ones((0, 4, 3, 5)), np.ones((0, 4, 3, 5))
    got = ops.nystrom_attention_backward(
        x, x, x, x, landmarks=empty, conv_weight=np.ones((4, 3)), return_d_landmarks=True
    )
    assert [part.shape for part in got[4]] == [(0, 4, 3, 5)] * 2
    # The means of segments are landmarks, too: with their shares q and k have the gradients that they have without.
    means = [np.stack([[averages(head, 5) for head in sample] for sample in y]) for y in (q, k)]
    dq, dk, dv, (dqt, dkt) = ops.nystrom_attention_backward(
        dy, q, k, v, landmarks=means, pinv=pinv, return_d_landmarks=True
    )
    want = ops.nystrom_attention_backward(dy, q, k, v, num_landmarks=5, pinv=pinv)
    bound = tolerance.nystrom_gradient(F64)
    assert distance(dq + np.repeat(dqt / 4, 4, axis=2), want[0]) <= bound
    assert distance(dk + np.repeat(dkt / 5, 5, axis=2), want[1]) <= bound
    assert distance(dv, want[2]) <= bound
    for wrong in ({"return_d_landmarks": True}, {"landmarks": means, "return_d_landmarks": 1}):
        with pytest.raises((TypeError, ValueError), match="return_d_landmarks"):
            ops.nystrom_attention_backward(dy, q, k, v, **wrong)


@solvers
def test_backends_give_landmarks_their_gradients(backend: ModuleType, target: str, pinv: str) -> None:
    """Against differences, in float64; and the other gradients are the same without them."""
    rng = np.random.default_rng(12)
    q, k, v = arrays_of(12, 2, 4, 2, 20, 25, 5, 3)
    dy = rng.standard_normal((2, 4, 20, 3))
    landmarks = [rng.standard_normal((2, 4, 6, 5)), rng.standard_normal((2, 2, 6, 5))]
    mask = rng.random((2, 25)) < 0.7
    options = _nystrom.NystromOptions(6, 6, pinv, 1e-3, 0.4, False, True)

    def loss(pair: list[Any]) -> float:
        out = np.empty_like(dy)
        backend.nystrom_attention(q, k, v, out, options, mask, None, *pair, None)
        return float((out * dy).sum())

    gradients = [np.empty_like(x) for x in (q, k, v)]
    found = [np.full_like(x, np.nan) for x in landmarks]
    backend.nystrom_attention_backward(dy, q, k, v, *gradients, options, mask, None, None, *landmarks, *found)
    h = tolerance.CENTRAL_STEP
    for i, (x, gradient) in enumerate(zip(landmarks, found, strict=True)):
        direction = rng.standard_normal(x.shape)
        ends = [loss([y + s * direction if j == i else y for j, y in enumerate(landmarks)]) for s in (h, -h)]
        quotient, slope = (ends[0] - ends[1]) / (2 * h), float((gradient * direction).sum())
        size = np.abs(gradient * direction).sum() + np.abs(loss(landmarks))
        assert abs(quotient - slope) <= tolerance.CENTRAL * max(size, 1.0)
    again = [np.empty_like(x) for x in gradients]
    backend.nystrom_attention_backward(dy, q, k, v, *again, options, mask, None, None, *landmarks, None, None)
    for x, y in zip(again, gradients, strict=True):
        assert_same_bits(x, y)


def test_heads_know_nothing_of_each_other(ops: ModuleType) -> None:
    q, k, v = arrays_of(13, 2, 4, 4, 40, 40, 5, 3, F32)
    dy = np.random.default_rng(13).standard_normal((2, 4, 40, 3)).astype(F32)
    for pinv in ("newton", "ridge"):
        options: dict[str, Any] = {"num_landmarks": 6, "pinv": pinv}
        want = ops.nystrom_attention_backward(dy, q, k, v, **options)
        for b, h in itertools.product(range(2), (0, 3)):
            alone = ops.nystrom_attention_backward(dy[b, h], q[b, h], k[b, h], v[b, h], **options)
            for x, y in zip(alone, want, strict=True):
                assert_same_bits(x, y[b, h])
