# SPDX-License-Identifier: BSD-3-Clause
"""Each cell of fastops in the tables of docs/attention.md is a test, over every backend and CPU level."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from numpy.typing import NDArray
from pages import DOCS, table
from samples import bfloat16

import fastops
from fastops import attention

Array = NDArray[Any]
PAGE = DOCS / "attention.md"
ERRORS: dict[str, type[Exception]] = {"`TypeError`": TypeError, "`ValueError`": ValueError}


@pytest.fixture(autouse=True)
def _over(backend: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions on the backend under test."""
    monkeypatch.setattr(attention, "_backend", backend)


def dtype_of(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        if bfloat16 is None:
            pytest.skip("ml_dtypes is not installed")
        return np.dtype(bfloat16)
    return np.dtype(name)


def rows(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def qkv(n: int = 6, m: int = 6, d: int = 4) -> tuple[Array, Array, Array]:
    return rows(2, n, d), rows(2, m, d, seed=1), rows(2, m, 3, seed=2)


# Feature maps.

MAPS = list(table(PAGE, "`feature_map`"))[1:]
FEATURES = 7


def options_of(name: str, d: int) -> dict[str, Any]:
    more = {"projection": fastops.favor_projection(d, FEATURES, rng=0)} if name == "favor" else {}
    return {"feature_map": name, "causal": True, **more}


@pytest.mark.parametrize("cells", MAPS, ids=lambda cells: cells[0].strip("`"))
def test_map(cells: list[str]) -> None:
    name, _, features, divides, scale, decay, parts = (cell.strip("`") for cell in cells)
    q, k, v = qkv()
    options = options_of(name, 4)
    y, state = fastops.linear_attention(q, k, v, return_state=True, **options)
    assert len(state) == int(parts)
    assert state[0].shape == (2, {"D": 4, "D + 1": 5, "m": FEATURES}[features], 3)
    np.testing.assert_array_equal(y, fastops.linear_attention(q, k, v, normalize=divides == "yes", **options))
    factor = {"1": 1.0, "D^-1/2": 0.5}[scale]
    # A factor of all weights is not seen where rows are divided by them.
    sums = {} if name == "softmax" else {"normalize": False}
    np.testing.assert_array_equal(
        fastops.linear_attention(q, k, v, **options, **sums),
        fastops.linear_attention(q, k, v, scale=factor, **options, **sums),
    )
    if decay == "ValueError":
        with pytest.raises(ValueError, match="decay must be None with"):
            fastops.linear_attention(q, k, v, decay=np.full(2, -0.5), **options)
    else:
        assert (fastops.linear_attention(q, k, v, decay=np.full(2, -0.5), **options) != y).any()


def features(name: str, x: Array, d: int) -> Array:
    """f(x) of the table's second column, for the maps whose keys have it of themselves."""
    x = x.astype(np.float64)
    if name == "favor":
        w, x = fastops.favor_projection(d, FEATURES, rng=0), x * d**-0.25
        return np.asarray(np.exp(x @ w.T - (x * x).sum(-1, keepdims=True) / 2) / math.sqrt(FEATURES))
    return np.asarray(
        {
            "elu": lambda: np.where(x >= 0, x + 1, np.exp(x)),
            "relu": lambda: np.maximum(x, 0) + 1e-3,
            "relu2": lambda: np.maximum(x, 0) ** 2,
            "identity": lambda: x,
            "cosine": lambda: np.concatenate(
                [x / np.linalg.norm(x, axis=-1, keepdims=True), np.ones((*x.shape[:-1], 1))], -1
            ),
            "exp": lambda: np.exp(x * d**-0.5),
            "softmax": lambda: np.exp(x),
        }[name]()
    )


@pytest.mark.parametrize("name", [cells[0].strip("`") for cells in MAPS])
def test_features_of_a_key(name: str) -> None:
    """The state of one key is its features."""
    k, v = rows(5, 1, 4, dtype=np.float64), np.ones((5, 1, 1))
    _, state = fastops.linear_attention(k[:, :0], k, v, return_state=True, **options_of(name, 4))
    z = state[1] * (2.0 ** state[2] if len(state) > 2 else 1)
    want = features(name, k[:, 0], 4)
    np.testing.assert_allclose(z, want, rtol=tolerance.DOUBLE, atol=0)


FAVOR = list(table(PAGE, "standard deviation"))


@pytest.mark.parametrize("cells", FAVOR[1:], ids=lambda cells: cells[0])
def test_favor_is_as_far_from_softmax_as_stated(cells: list[str], backend: ModuleType) -> None:
    if backend.__name__.endswith("reference") and cells[0] != "0.5":
        pytest.skip("slow, and the same")
    deviation = float(cells[0])
    for head, text in zip(FAVOR[0][1:3], cells[1:3], strict=True):
        found = []
        for seed in range(3):
            q, k = (rows(512, 64, seed=s, dtype=np.float64) * deviation for s in (2 * seed, 2 * seed + 1))
            w = fastops.favor_projection(64, int(head.removeprefix("m = ")), rng=seed)
            exact = fastops.softmax_attention(q, k, np.eye(512))
            near = fastops.linear_attention(q, k, np.eye(512), feature_map="favor", projection=w)
            found.append(np.linalg.norm(near - exact) / np.linalg.norm(exact))
        assert tolerance.FAVOR_SPREAD[0] < np.mean(found) / float(text) < tolerance.FAVOR_SPREAD[1]


# Semantics.


def seen(y: Array) -> list[int]:
    """How many keys each row sees, v being the identity."""
    return [int(np.count_nonzero(row)) for row in y]


def masked(position: int, value: float) -> tuple[Array, Array, Array, Array]:
    q, k, v = qkv()
    k[:, position] = v[:, position] = value
    mask = np.ones(6, bool)
    mask[position] = False
    return q, k, v, mask


def check_true() -> str:
    q, k, v = qkv()
    mask = np.array([True] * 3 + [False] * 3)
    got = fastops.linear_attention(q, k, v, key_mask=mask)
    np.testing.assert_allclose(
        got, fastops.linear_attention(q, k[:, :3], v[:, :3]), rtol=0, atol=tolerance.ATTENTION * abs(v).max()
    )
    return "key counts"


def check_masked() -> str:
    q, k, v, mask = masked(2, 5.0)
    without = [np.delete(x, 2, axis=1) for x in (k, v)]
    bound = tolerance.ATTENTION * abs(v).max()
    for normalize in (False, True):
        got = fastops.linear_attention(q, k, v, key_mask=mask, normalize=normalize)
        want = fastops.linear_attention(q, *without, normalize=normalize)
        np.testing.assert_allclose(got, want, rtol=0, atol=bound * (1 if normalize else 50))
    return "gone from sum and normaliser"


def check_masked_nan() -> str:
    for function in (fastops.linear_attention, fastops.softmax_attention):
        for causal in (False, True):
            plain = function(*(m := masked(2, 1.0))[:3], key_mask=m[3], causal=causal)
            odd = function(*(m := masked(2, np.nan))[:3], key_mask=m[3], causal=causal)
            np.testing.assert_array_equal(plain, odd)
    return "no effect"


def check_later_nan() -> str:
    for function in (fastops.linear_attention, fastops.softmax_attention):
        q, k, v = qkv()
        plain = function(q, k, v, causal=True)
        v[:, 4] = np.nan
        odd = function(q, k, v, causal=True)
        np.testing.assert_array_equal(plain[:, :4], odd[:, :4])
        assert np.isnan(odd[:, 4:]).all()
    return "no effect"


def check_few_rows() -> str:
    for function in (fastops.linear_attention, fastops.softmax_attention):
        counts = seen(function(rows(2, 4), rows(5, 4), np.eye(5, dtype=np.float32), causal=True))
        assert counts == [4, 5]
    return "row 0 sees 4 keys"


def check_few_keys() -> str:
    for function in (fastops.linear_attention, fastops.softmax_attention):
        counts = seen(function(rows(5, 4), rows(2, 4), np.eye(2, dtype=np.float32), causal=True))
        assert counts == [0, 0, 0, 1, 2]
    return "rows 0 to 2 see none"


def check_no_keys() -> str:
    q, k, v = qkv()
    for function in (fastops.linear_attention, fastops.softmax_attention):
        for causal in (False, True):
            assert (function(q, k, v, causal=causal, key_mask=np.zeros(6, bool)) == 0).all()
            assert (function(q, k[:, :0], v[:, :0], causal=causal) == 0).all()
    return "0"


def check_dead() -> str:
    q, k, v = qkv()
    assert (fastops.linear_attention(-abs(q), k, v, feature_map="relu2") == 0).all()
    return "0"


def check_eps() -> str:
    q, k, v = qkv()
    y, (_, z) = fastops.linear_attention(q, k, v, return_state=True)
    np.testing.assert_array_equal(y, fastops.linear_attention(q, k, v, eps=0.0))
    f = np.where(q >= 0, q + 1, np.exp(np.minimum(q, 0))).astype(np.float64)
    den = np.einsum("hnd,hd->hn", f, z.astype(np.float64))[..., np.newaxis]
    got = fastops.linear_attention(q, k, v, eps=0.5)
    np.testing.assert_allclose(got, y * den / (den + 0.5), rtol=0, atol=tolerance.ATTENTION * abs(v).max())
    return "0, or `eps`"


def check_pairs() -> str:
    q, k, v = qkv()
    for function in (fastops.linear_attention, fastops.softmax_attention):
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            function(q, k, v, key_mask=np.ones((6, 6), bool))
    return "`ValueError`"


def check_groups() -> str:
    q, k, v = rows(4, 6, 4), rows(2, 6, 4, seed=1), rows(2, 6, 3, seed=2)
    for function in (fastops.linear_attention, fastops.softmax_attention):
        for causal in (False, True):
            want = function(q, np.repeat(k, 2, axis=0), np.repeat(v, 2, axis=0), causal=causal)
            np.testing.assert_array_equal(function(q, k, v, causal=causal), want)
    return "yes"


def check_half_sums() -> str:
    for name in ("float16", "bfloat16"):
        if name == "bfloat16" and bfloat16 is None:
            continue
        # 1 + 2000 of 2**-10 are lost where each sum is rounded to half.
        k = np.full((2000, 1), np.log(2.0**-10), dtype_of(name))
        v = np.ones_like(k)
        _, (s, z) = fastops.linear_attention(k, k, v, return_state=True)
        one = float(np.exp(k[0, 0].astype(np.float64)))
        assert s.dtype == z.dtype == np.float32
        assert abs(z[0] / (2000 * one) - 1) < tolerance.running_sum(2000, equal=True)
    return "float32 sums"


def check_half_range() -> str:
    q = np.full((100, 2), 1.0, np.float16)
    k = np.full((100, 2), 1000.0, np.float16)
    y, (_, z) = fastops.linear_attention(q, k, np.full((100, 1), 3.0, np.float16), return_state=True)
    assert (y == 3).all()
    assert (z > 65504).all()
    return "right"


def check_far_below() -> str:
    for name in ("float16", "float32", "float64"):
        k = np.full((1, 1), -20.0 if name != "float16" else -16.0, name)
        _, (_, z) = fastops.linear_attention(k, k, k, return_state=True)
        assert abs(z[0] / math.exp(float(k[0, 0])) - 1) < tolerance.ATTENTION
    return "exp(-20)"


def check_large_later_key() -> str:
    for name in ("exp", "favor"):
        q, k, v = qkv()
        options = options_of(name, 4)
        plain = fastops.linear_attention(q, k, v, **options)
        k[:, 5] = 300.0
        np.testing.assert_array_equal(plain[:, :5], fastops.linear_attention(q, k, v, **options)[:, :5])
    return "changes no earlier row"


def check_integers() -> str:
    x = np.ones((2, 6, 4), np.int32)
    for function in (fastops.linear_attention, fastops.softmax_attention):
        with pytest.raises(TypeError, match=r"q must be float16, .* got int32"):
            function(x, x, x)
    return "`TypeError`"


def check_scale() -> str:
    q, k, v = qkv()
    np.testing.assert_array_equal(fastops.softmax_attention(q, k, v), fastops.softmax_attention(q, k, v, scale=0.5))
    return "D^-1/2"


SITUATIONS: dict[str, Callable[[], str]] = {
    "True in a mask": check_true,
    "a masked key": check_masked,
    "nan in a masked key": check_masked_nan,
    "nan in a later value, causal": check_later_nan,
    "causal, 2 rows and 5 keys": check_few_rows,
    "causal, 5 rows and 2 keys": check_few_keys,
    "a row without keys": check_no_keys,
    "weights that add up to 0": check_dead,
    "what is added to the normaliser": check_eps,
    "a mask of pairs (N, M)": check_pairs,
    "fewer heads of k and v": check_groups,
    "float16, bfloat16": check_half_sums,
    "key sums above 65504 in float16": check_half_range,
    "features of -20, elu": check_far_below,
    "a large later key, exp or favor": check_large_later_key,
    "integers": check_integers,
    "softmax attention's scale": check_scale,
}
TOLD = {cells[0]: cells[1] for cells in list(table(PAGE, "situation"))[1:]}


def test_every_situation_has_a_case() -> None:
    assert list(TOLD) == list(SITUATIONS)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situation(situation: str) -> None:
    assert SITUATIONS[situation]() == TOLD[situation]


DTYPES = list(table(PAGE, "dtype of q, k and v"))[1:]


@pytest.mark.parametrize("cells", DTYPES, ids=lambda cells: cells[0])
def test_dtype(cells: list[str]) -> None:
    names = cells[0].split(" and ")
    q, k, v = qkv()
    for first, second in ((names[0], names[-1]), (names[-1], names[0])):
        arrays = q.astype(dtype_of(first)), k.astype(dtype_of(second)), v.astype(dtype_of(second))
        if cells[1] in ERRORS:
            for function in (fastops.linear_attention, fastops.softmax_attention):
                with pytest.raises(ERRORS[cells[1]]):
                    function(*arrays)
            continue
        y, state = fastops.linear_attention(*arrays, return_state=True)
        assert y.dtype == fastops.softmax_attention(*arrays).dtype == dtype_of(cells[1])
        assert all(x.dtype == np.dtype(cells[2]) for x in state)


def test_tables_are_complete() -> None:
    assert [len(found) for found in (MAPS, FAVOR, TOLD, DTYPES)] == [8, 4, 17, 10]
