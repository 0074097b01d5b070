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
