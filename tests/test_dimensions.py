# SPDX-License-Identifier: BSD-3-Clause
"""As many dimensions as arrays of the running NumPy have: 64, of which its own functions on shapes take 32."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from samples import FLOATS, assert_same_bits, near_one

import fastops
from fastops import _validate

pytestmark = pytest.mark.usefixtures("over_backend")

MOST = 32 if np.lib.NumpyVersion(np.__version__) < "2.0.0" else 64

A = near_one(FLOATS["f32"], 2 * 3 * 4, 1).reshape(2, 1, 3, 4)
B = near_one(FLOATS["f32"], 5 * 4 * 2, 2).reshape(1, 5, 4, 2)
BYTES_A = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 1, 3, 4)
BYTES_B = np.arange(5 * 4 * 2, dtype=np.uint8).reshape(1, 5, 4, 2)


@pytest.fixture(params=[33, MOST])
def ndim(request: pytest.FixtureRequest) -> int:
    if request.param > MOST:
        pytest.skip(f"arrays of this NumPy have at most {MOST} dimensions")
    return int(request.param)


def deep(array: Any, ndim: int) -> Any:
    """The first axis first, then ones, then the others."""
    return array.reshape(array.shape[:1] + (1,) * (ndim - array.ndim) + array.shape[1:])


def test_matmul_of_many_dimensions(backend: ModuleType, ndim: int) -> None:
    want = fastops.mitchell_matmul(A, B)
    assert_same_bits(fastops.mitchell_matmul(deep(A, ndim), deep(B, ndim)), deep(want, ndim))
    assert_same_bits(fastops.mitchell_matmul(deep(A, ndim), B), deep(want, ndim))
    assert_same_bits(
        fastops.mitchell_matmul(A[0, 0, 0], deep(B, ndim)), deep(fastops.mitchell_matmul(A[0, 0, 0], B), ndim - 1)
    )
    out = np.empty(deep(want, ndim).shape[::-1], np.float32).T
    assert fastops.mitchell_matmul(deep(A, ndim), deep(B, ndim), out=out) is out
    assert_same_bits(out, deep(want, ndim))
    row = np.empty(out.shape[:-2] + out.shape[-1:], np.float32)
    assert fastops.mitchell_matmul(A[0, 0, 0], deep(np.concatenate([B, B]), ndim), out=row) is row
    # NumPy's limit of bytes counts the lengths beside a 0 too.
    lead = (0, *(2,) * min(ndim - 3, 50))
    assert fastops.mitchell_matmul(np.empty((*lead, 3, 4)), np.ones((4, 2))).shape == (*lead, 3, 2)


def test_lut_matmul_of_many_dimensions(backend: ModuleType, ndim: int) -> None:
    table = np.arange(65536, dtype=np.int32).reshape(256, 256)
    want = fastops.lut_matmul(BYTES_A, BYTES_B, table)
    assert_same_bits(fastops.lut_matmul(deep(BYTES_A, ndim), deep(BYTES_B, ndim), table), deep(want, ndim))
    out = np.empty(deep(want, ndim).shape, np.int64)
    assert fastops.lut_matmul(deep(BYTES_A, ndim), BYTES_B, table, out=out) is out
    assert_same_bits(out, deep(want, ndim).astype(np.int64))
    assert isinstance(fastops.lut_matmul(BYTES_A[0, 0, 0], BYTES_B[0, 0, :, 0], table), np.integer)


@pytest.mark.parametrize("mode", ["exact", "ste", "mimic"])
def test_gradients_of_many_dimensions(backend: ModuleType, ndim: int, mode: str) -> None:
    dy = np.ones((2, 5, 3, 2), np.float32)
    want = fastops.mitchell_matmul_grad(A, B, dy, mode=mode)
    got = fastops.mitchell_matmul_grad(deep(A, ndim), B, deep(dy, ndim), mode=mode)
    assert_same_bits(got[0], deep(want[0], ndim))
    assert_same_bits(got[1], want[1])
    for gradient in (fastops.mitchell_mul_grad, fastops.mitchell_div_grad):
        other = A[:, :, :1]
        want = gradient(A, other, A, mode=mode)
        got = gradient(deep(A, ndim), deep(other, ndim), deep(A, ndim), mode=mode)
        for g, w in zip(got, want, strict=True):
            assert_same_bits(g, deep(w, ndim))


def test_elementwise_of_many_dimensions(backend: ModuleType, ndim: int) -> None:
    want = backend.mitchell_mul(A, B[:, :, :3, :1])
    assert_same_bits(backend.mitchell_mul(deep(A, ndim), B[:, :, :3, :1]), deep(want, ndim))


def test_broadcast_shapes_is_numpys() -> None:
    for shapes in [((),), ((), (3,)), ((2, 1), (1, 3)), ((0, 1), (3,)), ((5,), (2, 1, 1), (1,)), ((1,), (0,))]:
        assert _validate.broadcast_shapes(*shapes) == np.broadcast_shapes(*shapes)
    for shapes in [((2,), (3,)), ((2, 3), (2,)), ((0,), (2,))]:
        with pytest.raises(ValueError):
            _validate.broadcast_shapes(*shapes)


def test_attention_of_many_dimensions(backend: ModuleType, ndim: int) -> None:
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal((2, 2, 5, width)).astype(np.float32) for width in (3, 3, 4)]
    mask, decay = rng.random((2, 5)) < 0.7, -rng.random((2, 2, 5))
    options = {"causal": True, "return_state": True}
    want, state = fastops.linear_attention(*arrays, **options, key_mask=mask, decay=decay)
    q, k, v = (deep(x, ndim) for x in arrays)
    out = np.empty(deep(want, ndim).shape[::-1], np.float32).T
    many = {"key_mask": deep(mask, ndim - 2), "decay": deep(decay, ndim - 1)}
    y, after = fastops.linear_attention(q, k, v, **options, **many, initial_state=None, out=out)
    assert y is out
    assert_same_bits(y, deep(want, ndim))
    for got, wanted in zip(after, state, strict=True):
        np.testing.assert_array_equal(got.reshape(wanted.shape), wanted)
    fastops.linear_attention(q, k, v, **options, **many, initial_state=after)
    gradients = fastops.linear_attention_backward(y, q, k, v, y, causal=True)
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]
    logn = deep(rng.random((2, 2, 5)), ndim - 1)
    scaled = fastops.softmax_attention(q, k, v, key_mask=many["key_mask"], logn=logn)
    plain = fastops.softmax_attention(*arrays, key_mask=mask, logn=logn.reshape(2, 2, 5))
    assert_same_bits(scaled, deep(plain, ndim))
    swapped = fastops.linear_attention(*(x.swapaxes(-3, -2) for x in (q, k, v)), causal=True, layout="bnhd")
    np.testing.assert_array_equal(
        swapped.reshape(2, 5, 2, 4).swapaxes(1, 2), fastops.linear_attention(*arrays, causal=True)
    )
    # A step has one axis less than its state.
    rows = [deep(x[:, :, 0], ndim - 1) for x in arrays]
    row = fastops.linear_attention_step_(*rows, after)
    assert row.shape == deep(want, ndim)[..., 0, :].shape
    if ndim == MOST:
        with pytest.raises(ValueError, match=f"^q must be of less than {MOST} dimensions, got {MOST}$"):
            fastops.linear_attention_step_(q, k, v, after)
