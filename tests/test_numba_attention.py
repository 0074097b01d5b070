# SPDX-License-Identifier: BSD-3-Clause
"""What only the Numba backend's attention has: its own exponential, tiles of any size, pieces of a head, chunks that end early."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tolerance
from samples import assert_same_bits

if "numba" not in (
    os.environ.get("FASTOPS_TEST_BACKENDS")
    or os.environ.get("FASTOPS_BACKEND")
    or ("native" if os.environ.get("FASTOPS_TARGET") else "numba")
):
    pytest.skip("this run does not cover the numba backend", allow_module_level=True)
pytest.importorskip("numba")

from fastops import attention
from fastops.numba import _attention_kernels as kernels
from fastops.numba import attention as module

REALS = [np.dtype(np.float32), np.dtype(np.float64)]


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(attention, "_backend", module)
    return attention


def features(x: Any, kind: int) -> Any:
    f = np.empty_like(x)
    kernels.features[x.dtype](x, f, kind, x.dtype.type(1), x.dtype.type(0), np.empty((0, 0), x.dtype))
    return f


@pytest.mark.parametrize("real", REALS, ids=str)
def test_exponential_is_right_to_some_units(real: np.dtype[Any]) -> None:
    """Below zero "elu" is the exponential itself: of normal numbers to a few units, of subnormal ones to their own, then 0."""
    low = np.log(np.finfo(real).tiny)
    x = np.concatenate([np.linspace(low, 0, 100_001), np.linspace(1.3 * low, low, 1001)]).astype(real)[:, np.newaxis]
    with np.errstate(all="ignore"):
        want = np.exp(x.astype(np.longdouble))
    got = features(x, kernels.ELU)
    error = np.abs(got - want) / np.maximum(want, np.finfo(real).tiny)
    assert error.max() <= tolerance.EXPONENTIAL_UNITS * np.finfo(real).eps
    special = np.array([[-np.inf, np.nan, -1e30, -0.0, np.inf]], real)
    np.testing.assert_array_equal(features(special, kernels.ELU), np.array([[0, np.nan, 0, 1, np.inf]], real))


@pytest.mark.parametrize("real", REALS, ids=str)
def test_every_size_of_tile(ops: Any, real: np.dtype[Any]) -> None:
    """Rows by four and one, columns by two vectors, one, and one by one, in each combination: against the plain formula."""
    rng = np.random.default_rng(0)
    for n, d, e in itertools.product((1, 3, 4, 31, 33, 37), (1, 3, 8), (1, 7, 8, 15, 16, 17, 25)):
        q, k, v = (rng.standard_normal(shape).astype(real) for shape in ((n, d), (n, d), (n, e)))
        f = [np.where(x < 0, np.exp(np.minimum(x, 0)), x + 1).astype(np.float64) for x in (q, k)]
        w = np.tril(f[0] @ f[1].T)
        want = w @ v / w.sum(axis=1, keepdims=True)
        bound = tolerance.ATTENTION * float(np.finfo(real).eps / np.finfo(np.float32).eps) * np.abs(v).max()
        assert np.abs(ops.linear_attention(q, k, v, causal=True) - want).max() <= bound, (n, d, e)


@pytest.mark.parametrize("name", ["elu", "exp", "softmax"])
def test_pieces_of_a_head_are_one(ops: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut where chunks end, a head gives the bits of the whole; its gradients too, to rounding."""
    rng = np.random.default_rng(1)
    q, k, v, dy = rng.standard_normal((4, 2, 150, 8))
    found = []
    for piece in (1024, 2 * kernels.CHUNK):
        monkeypatch.setattr(module, "_PIECE", piece)
        y = ops.linear_attention(q, k, v, causal=True, feature_map=name)
        found.append((y, *ops.linear_attention_backward(dy, q, k, v, y, causal=True, feature_map=name)))
    # Chunks of exponentials may end anywhere, and a piece begins a new one.
    if name == "elu":
        assert_same_bits(found[0][0], found[1][0])
    for whole, cut in zip(*found, strict=True):
        np.testing.assert_allclose(whole, cut, rtol=0, atol=tolerance.DOUBLE * np.abs(whole).max())


def test_keys_that_grow_share_no_chunk() -> None:
    """A chunk ends before a key whose features are 2**16 times those before it; those before keep their accuracy."""
    n, d = 20, 4
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, n, d), np.float32)
    k[12:] += 200
    options = SimpleNamespace(feature_map="exp", scale=1.0, kernel_eps=0.0, normalize=True, eps=0.0, projection=None)
    outs = []
    for keys in (k, k[:12]):
        out = np.empty((1, 1, len(keys), d), np.float32)
        module.linear_attention(
            q[np.newaxis, np.newaxis, : len(keys)],
            keys[np.newaxis, np.newaxis],
            v[np.newaxis, np.newaxis, : len(keys)],
            out,
            SimpleNamespace(**vars(options), causal=True),  # type: ignore[arg-type]
            None,
            None,
            None,
            None,
            None,
        )
        outs.append(out[0, 0])
    assert_same_bits(outs[0][:12], outs[1])
