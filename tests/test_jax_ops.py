# SPDX-License-Identifier: BSD-3-Clause
"""Operations of fastops.jax: the values and gradients of the functions for arrays, under jit, vmap, grad and scan, on every route."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

import fastops
from fastops import Multiplier, _attention, _backend, _validate

jax = pytest.importorskip("jax", reason="jax is not installed")
fj = pytest.importorskip("fastops.jax")

jnp = jax.numpy
MODES = _validate.GRADIENT_MODES
DTYPES = [np.dtype(t) for t in (np.float16, jnp.bfloat16, np.float32, np.float64)]
ROUTES = ["callback"] + (["ffi"] if fj._ops.MODULE is not None else [])


@pytest.fixture(autouse=True, scope="module", params=ROUTES)
def route(request: pytest.FixtureRequest) -> Iterator[str]:
    before, wide = fj.get_route(), jax.config.jax_enable_x64
    fj.set_route(request.param)
    # What jax has traced would keep the other route.
    jax.clear_caches()
    # Not the context manager, which the threads of callbacks do not see.
    jax.config.update("jax_enable_x64", True)
    yield request.param
    jax.config.update("jax_enable_x64", wide)
    fj.set_route(before)


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(dtype))


def plain(x: Any) -> Any:
    return np.asarray(x)


def same(x: Any, y: Any) -> None:
    assert isinstance(x, jax.Array)
    assert plain(x).tobytes() == np.ascontiguousarray(y).tobytes()
    assert x.dtype == np.asarray(y).dtype
    assert x.shape == np.shape(y)


def gradients(function: Callable[..., Any], *args: Any, dy: Any) -> Any:
    y, back = jax.vjp(function, *args)
    return (y, *back(dy))


# --- values and gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ["mul", "div", "matmul"])
@pytest.mark.parametrize("broadcast", [False, True])
def test_mitchell_is_that_of_arrays(op: str, mode: str, dtype: Any, broadcast: bool) -> None:
    m = Multiplier("min-mse")
    if op == "matmul":
        shapes = ((2, 1, 3, 4), (5, 4, 3)) if broadcast else ((2, 3, 4), (2, 4, 5))
    else:
        shapes = ((5, 1, 4), (3, 4)) if broadcast else ((5, 4), (5, 4))
    a, b = normal(*shapes[0], dtype=dtype), normal(*shapes[1], dtype=dtype, seed=1)
    function = lambda a, b: getattr(fj, f"mitchell_{op}")(a, b, multiplier=m, mode=mode)
    same(function(a, b), getattr(m, op)(plain(a), plain(b)))
    dy = normal(*function(a, b).shape, dtype=dtype, seed=2)
    y, da, db = gradients(jax.jit(function), a, b, dy=dy)
    same(y, function(a, b))
    want = getattr(fastops, f"mitchell_{op}_grad")(plain(a), plain(b), plain(dy), multiplier=m, mode=mode)
    same(da, want[0])
    same(db, want[1])


@pytest.mark.parametrize(
    "m", [Multiplier(segments=8), Multiplier("lmul-equation"), Multiplier(corrections=2), Multiplier(mantissa_bits=3)]
)
def test_every_form_of_multiplier(m: Multiplier) -> None:
    a, b = normal(7, 9), normal(9, 5, seed=1)
    same(fj.mitchell_mul(a, a + 1, multiplier=m), m.mul(plain(a), plain(a + 1)))
    same(fj.mitchell_matmul(a, b, multiplier=m), m.matmul(plain(a), plain(b)))


def test_every_bit_pattern_of_operands() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 4000, np.uint32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 1e-38], np.float32)
    a = np.concatenate([bits.view(np.float32), special])
    b = a[::-1].copy()
    with np.errstate(all="ignore"):
        for op in ("mul", "div"):
            got = plain(getattr(fj, f"mitchell_{op}")(jnp.asarray(a), jnp.asarray(b)))
            np.testing.assert_array_equal(got, getattr(fastops, f"mitchell_{op}")(a, b))


@pytest.mark.parametrize("mode", MODES)
def test_conv2d_is_that_of_arrays(mode: str) -> None:
    x, w = normal(2, 4, 7, 6), normal(6, 2, 3, 2)
    steps: dict[str, Any] = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": 2}
    function = lambda x, w: fj.mitchell_conv2d(x, w, mode=mode, **steps)
    y = function(x, w)
    same(y, fastops.mitchell_conv2d(plain(x), plain(w), **steps))
    dy = normal(*y.shape, seed=3)
    _, dx, dw = gradients(function, x, w, dy=dy)
    want = fastops.mitchell_conv2d_grad(plain(x), plain(w), plain(dy), mode=mode, **steps)
    same(dx, want[0])
    same(dw, want[1])


def test_numbers_vectors_and_mixed_dtypes() -> None:
    x = normal(4)
    assert fj.mitchell_mul(x, 3.0).dtype == np.float32
    assert fj.mitchell_mul(2, x).tolist() == (2 * x).tolist()
    assert fj.mitchell_mul(x, jnp.ones(4, np.float64)).dtype == np.float64
    assert fj.mitchell_mul(x, jnp.ones(4, np.int32)).dtype == np.float32
    assert fj.mitchell_mul(x.astype(np.float16), jnp.ones(4, jnp.bfloat16)).dtype == np.float32
    assert fj.mitchell_mul(jnp.float32(3.0), jnp.float32(3.0)) == 8
    half = normal(4, dtype=np.float16)
    same(fj.mitchell_mul(half, 3.1), fastops.mitchell_mul(plain(half), 3.1))
    a, b = normal(3, 4), normal(4, 2, seed=1)
    for left, right in ((a[0], b), (a, b[:, 0]), (a[0], b[:, 0])):
        same(fj.mitchell_matmul(left, right), fastops.mitchell_matmul(plain(left), plain(right)))
    # jax says nothing of infinities, and neither do these.
    assert fj.mitchell_div(jnp.ones(2), jnp.zeros(2)).tolist() == [np.inf] * 2
    # NumPy's arrays are taken for jax's, as jax does.
    same(fj.mitchell_mul(plain(a), plain(a)), fastops.mitchell_mul(plain(a), plain(a)))


def test_without_x64_double_precision_is_single() -> None:
    with jax.enable_x64(False):
        x = np.linspace(1, 2, 5)
        assert fj.mitchell_mul(x, x).dtype == np.float32
        assert fj.linear_attention(x[:, None], x[:, None], x[:, None]).dtype == np.float32
        g = np.array([-0.5])
        x = jnp.asarray(x[:, None])
        y = fj.linear_attention(x, x, x, causal=True, decay=g)
        same(y, fastops.linear_attention(plain(x), plain(x), plain(x), causal=True, decay=g))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("feature_map", ["elu", "exp"])
def test_linear_attention_is_that_of_arrays(causal: bool, layout: str, dtype: Any, feature_map: str) -> None:
    shapes = ((2, 4, 9, 5), (2, 2, 9, 5), (2, 2, 9, 3))
    if layout == "bnhd":
        shapes = tuple((b, n, h, d) for b, h, n, d in shapes)
    q, k, v = (normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    wide = np.float64 if dtype == np.float64 else np.float32
    mask = np.random.default_rng(1).random((2, 9)) < 0.7
    options: dict[str, Any] = {"causal": causal, "layout": layout, "feature_map": feature_map, "key_mask": mask}
    parts = ((2, 2, 5, 3), (2, 2, 5), (2, 2, 5))[: 3 if feature_map == "exp" else 2]
    state = tuple(abs(plain(normal(*s, seed=9, dtype=wide))) for s in parts)

    def function(q: Any, k: Any, v: Any, s: Any, z: Any) -> Any:
        given = (s, z, *(jnp.asarray(x) for x in state[2:]))
        y, after = fj.linear_attention(q, k, v, initial_state=given, return_state=True, **options)
        return (y, *after[:2]), after[2:]

    operands = (q, k, v, *(jnp.asarray(x) for x in state[:2]))
    found, back, rest = jax.vjp(jax.jit(function), *operands, has_aux=True)
    arrays = [plain(x) for x in (q, k, v)]
    want, wanted = fastops.linear_attention(*arrays, initial_state=state, return_state=True, **options)
    for x, z in zip((*found, *rest), (want, *wanted), strict=True):
        same(x, z)
    dy, ds, dz = (normal(*x.shape, seed=5, dtype=x.dtype) for x in found)
    *three, first = fastops.linear_attention_backward(
        plain(dy), *arrays, want, initial_state=state, d_state=(plain(ds), plain(dz)), **options
    )
    for x, z in zip(back((dy, ds, dz)), (*three, *first), strict=True):
        same(x, z)


# All of them: handlers take a map by its number, which fastops.jax says anew.
@pytest.mark.parametrize("feature_map", _attention.FEATURE_MAPS)
def test_feature_maps(feature_map: str) -> None:
    q, k, v = (normal(2, 6, 4, seed=i) for i in range(3))
    options: dict[str, Any] = {"feature_map": feature_map, "scale": 0.3, "causal": True}
    if feature_map == "favor":
        options["projection"] = fastops.favor_projection(4, 8, rng=0)
    y, state = fj.linear_attention(q, k, v, return_state=True, **options)
    want, wanted = fastops.linear_attention(plain(q), plain(k), plain(v), return_state=True, **options)
    for x, z in zip((y, *state), (want, *wanted), strict=True):
        same(x, z)


@pytest.mark.parametrize("logn", [None, "keys", "array"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_attention_is_that_of_arrays(dtype: Any, logn: Any) -> None:
    q, k, v = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate(((2, 7, 4, 3), (2, 9, 2, 3), (2, 9, 2, 5))))
    mask = np.random.default_rng(1).random((2, 2, 9)) < 0.7
    if logn == "array":
        logn = np.linspace(0.5, 2, 7)
    for options in ({}, {"key_mask": mask}, {"causal": True, "key_mask": mask[:, 0]}):
        options |= {"logn": logn, "layout": "bnhd", "scale": 0.7}
        same(
            fj.softmax_attention(q, k, v, **options),
            fastops.softmax_attention(plain(q), plain(k), plain(v), **options),
        )
    q, k = q[0].swapaxes(0, 1), k[0].swapaxes(0, 1)
    packed = {"cu_seqlens": np.array([0, 3, 3, 9]), "causal": True, "logn": None if logn is None else "keys"}
    same(fj.softmax_attention(k, k, k, **packed), fastops.softmax_attention(plain(k), plain(k), plain(k), **packed))
    same(fj.softmax_attention(q[0], k[0], k[0]), fastops.softmax_attention(plain(q[0]), plain(k[0]), plain(k[0])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_nystrom_attention_is_that_of_arrays(dtype: Any, layout: str) -> None:
    q, k, v = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate(((2, 4, 20, 4), (2, 2, 20, 4), (2, 2, 20, 3))))
    if layout == "bnhd":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    taps = normal(4, 5)
    mask = np.random.default_rng(1).random((2, 20)) < 0.8
    marks = (normal(2, 4, 3, 4), normal(2, 2, 3, 4))
    arrays = [plain(x) for x in (q, k, v)]
    for options in (
        {"conv_weight": taps},
        {"key_mask": mask, "pinv": "ridge", "ridge": 0.01},
        {"init": "batch", "normalize": True},
        {"landmarks": marks, "conv_weight": taps, "scale": 0.4},
    ):
        named = {"num_landmarks": 4, "layout": layout, **options}
        told = {
            name: jax.tree.map(plain, x) if name in ("conv_weight", "landmarks") else x for name, x in named.items()
        }
        given = [options[name] for name in ("conv_weight", "landmarks") if name in options]
        y = fj.nystrom_attention(q, k, v, **named)
        same(y, fastops.nystrom_attention(*arrays, **told))
        dy = normal(*y.shape, seed=5, dtype=dtype)

        def function(q: Any, k: Any, v: Any, *rest: Any, named: Any = named, options: Any = options) -> Any:
            names = [name for name in ("conv_weight", "landmarks") if name in options]
            return fj.nystrom_attention(q, k, v, **{**named, **dict(zip(names, rest, strict=True))})

        _, *found = gradients(function, q, k, v, *given, dy=dy)
        want = fastops.nystrom_attention_backward(plain(dy), *arrays, **told, return_d_landmarks="landmarks" in options)
        for x, z in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            same(x, z.astype(x.dtype))


# --- jax's checker -----------------------------------------------------------------------------------------------------------------


def variables(*shapes: tuple[int, ...]) -> list[Any]:
    return [normal(*shape, dtype=np.float64, seed=i) for i, shape in enumerate(shapes)]


def _all(found: Any) -> tuple[Any, ...]:
    y, state = found
    return y, *state[:2]


MASK = np.array([[True, False, True, True, True, False], [False] * 6])
PACKED = np.array([0, 3, 3, 7])
FUNCTIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "mul": (fj.mitchell_mul, [(3, 4), (4,)]),
    "mul alike": (fj.mitchell_mul, [(3, 4), (3, 4)]),
    "div": (fj.mitchell_div, [(3, 4), (4,)]),
    "matmul": (fj.mitchell_matmul, [(2, 3, 4), (4, 2)]),
    "matmul alike": (fj.mitchell_matmul, [(2, 3, 4), (2, 4, 2)]),
    "vector": (fj.mitchell_matmul, [(3, 4), (4,)]),
    "conv2d": (lambda x, w: fj.mitchell_conv2d(x, w, padding=1, groups=2), [(1, 2, 4, 3), (4, 1, 2, 3)]),
    "linear": (lambda q, k, v: fj.linear_attention(q, k, v, causal=True), [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)]),
    "linear one head": (lambda q, k, v: fj.linear_attention(q, k, v, causal=True), [(5, 3), (6, 3), (6, 2)]),
    "linear masked": (
        lambda q, k, v: fj.linear_attention(q, k, v, key_mask=MASK, layout="bnhd"),
        [(2, 5, 4, 3), (2, 6, 2, 3), (2, 6, 2, 2)],
    ),
    "state": (
        lambda q, k, v: fj.linear_attention(q, k, v, causal=True, feature_map="softmax", return_state=True)[1][:2],
        [(1, 2, 5, 3), (1, 2, 5, 3), (1, 2, 5, 2)],
    ),
    "decay": (
        lambda q, k, v, g: fj.linear_attention(q, k, v, causal=True, decay=-jnp.exp(g), eps=0.3, key_mask=MASK),
        [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2), (2,)],
    ),
    "decay identity": (
        lambda q, k, v, g: fj.linear_attention(q, k, v, causal=True, decay=-jnp.exp(g), feature_map="identity"),
        [(2, 4, 7, 3), (2, 2, 6, 3), (2, 2, 6, 2), (2, 2, 6)],
    ),
    "decay one head": (
        lambda q, k, v, g: fj.linear_attention(q, k, v, causal=True, decay=-jnp.exp(g)),
        [(5, 3), (5, 3), (5, 2), (5,)],
    ),
    "decay packed": (
        lambda q, k, v, g: _all(
            fj.linear_attention(q, k, v, causal=True, decay=-jnp.exp(g), cu_seqlens=PACKED, return_state=True)
        ),
        [(1, 2, 7, 3), (1, 2, 7, 3), (1, 2, 7, 2), (1, 2, 7)],
    ),
    "decay and states": (
        lambda q, k, v, g, s, z: _all(
            fj.linear_attention(
                q,
                k,
                v,
                causal=True,
                decay=-jnp.exp(g),
                initial_state=(s, jnp.exp(z)),
                return_state=True,
                layout="bnhd",
            )
        ),
        [(2, 6, 4, 3), (2, 6, 2, 3), (2, 6, 2, 2), (2, 2, 6), (2, 2, 3, 2), (2, 2, 3)],
    ),
    "decay and the last z without a divisor": (
        lambda q, k, v, g: fj.linear_attention(
            q, k, v, causal=True, decay=-jnp.exp(g), normalize=False, return_state=True
        )[1][1],
        [(2, 4, 6, 3), (2, 2, 6, 3), (2, 2, 6, 2), (2,)],
    ),
    "step": (
        lambda q, k, v, g, s, z: _all(fj.linear_attention_step(q, k, v, (s, jnp.exp(z)), decay=-jnp.exp(g))),
        [(2, 4, 3), (2, 2, 3), (2, 2, 2), (2,), (2, 2, 3, 2), (2, 2, 3)],
    ),
    "step one head": (
        lambda q, k, v, s, z: _all(fj.linear_attention_step(q, k, v, (s, jnp.exp(z)))),
        [(3,), (3,), (2,), (3, 2), (3,)],
    ),
    "softmax": (fj.softmax_attention, [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)]),
    "softmax causal": (
        lambda q, k, v: fj.softmax_attention(q, k, v, causal=True, logn="keys", layout="bnhd"),
        [(2, 5, 4, 3), (2, 6, 2, 3), (2, 6, 2, 2)],
    ),
    "softmax masked": (
        lambda q, k, v: fj.softmax_attention(q, k, v, key_mask=MASK, logn=np.arange(1.0, 6)),
        [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)],
    ),
    "softmax causal masked": (
        lambda q, k, v: fj.softmax_attention(q, k, v, causal=True, key_mask=MASK),
        [(2, 4, 8, 3), (2, 2, 6, 3), (2, 2, 6, 2)],
    ),
    "softmax packed": (
        lambda q, k, v: fj.softmax_attention(q, k, v, causal=True, cu_seqlens=PACKED),
        [(1, 2, 7, 3), (1, 2, 7, 3), (1, 2, 7, 2)],
    ),
    "softmax one head": (fj.softmax_attention, [(5, 3), (6, 3), (6, 2)]),
    "nystrom landmarks": (
        lambda q, k, v, first, second: fj.nystrom_attention(q, k, v, landmarks=(first, second)),
        [(2, 4, 8, 3), (2, 2, 8, 3), (2, 2, 8, 2), (2, 4, 3, 3), (2, 2, 3, 3)],
    ),
    "nystrom": (
        lambda q, k, v, w: fj.nystrom_attention(q, k, v, num_landmarks=3, conv_weight=w),
        [(1, 2, 8, 3), (1, 2, 8, 3), (1, 2, 8, 2), (2, 3)],
    ),
    "nystrom batch": (
        lambda q, k, v: fj.nystrom_attention(q, k, v, num_landmarks=3, init="batch"),
        [(2, 2, 8, 3), (2, 2, 8, 3), (2, 2, 8, 2)],
    ),
}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "nystrom batch"])
def test_gradients_pass_jaxs_check(name: str) -> None:
    from jax.test_util import check_grads

    function, shapes = FUNCTIONS[name]
    # Within a piece of Mitchell's product: its slope jumps between pieces.
    check_grads(function, variables(*shapes), order=1, modes=["rev"], eps=1e-6, atol=1e-6, rtol=1e-5)


def test_softmax_gradient_can_be_differentiated_again() -> None:
    from jax.test_util import check_grads

    function, shapes = FUNCTIONS["softmax causal masked"]
    check_grads(function, variables(*shapes), order=2, modes=["rev"], eps=1e-5, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_gradient_is_that_of_jax(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # In many blocks of rows, the last one not full.
    monkeypatch.setattr("fastops.jax._attention._BLOCK", 300)
    jax.clear_caches()
    q, k, v = (normal(2, 17, 3, 4, seed=i) for i in range(3))
    ours = jax.grad(lambda *x: (fj.softmax_attention(*x, causal=causal, layout="bnhd") ** 2).sum(), (0, 1, 2))
    theirs = jax.grad(lambda *x: (jax.nn.dot_product_attention(*x, is_causal=causal) ** 2).sum(), (0, 1, 2))
    for x, y in zip(ours(q, k, v), theirs(q, k, v), strict=True):
        bound = tolerance.attention_gradient(float(abs(y).max()) * 4, 8.0, np.dtype("f4"), np.dtype("f4"))
        assert abs(x - y).max() <= bound
    jax.clear_caches()


def test_what_masked_keys_hold_reaches_no_gradient() -> None:
    shapes = [(2, 4, 6, 3), (2, 2, 6, 3), (2, 2, 6, 2), (2, 2, 6)]
    mask = np.array([[True, False, True, True, True, False], [False, True, True, True, False, True]])

    def linear(q: Any, k: Any, v: Any, g: Any, **options: Any) -> Any:
        named = {"causal": True, "decay": -jnp.exp(g), "key_mask": mask, **options}
        turned = (x.swapaxes(1, 2) if named.get("layout") == "bnhd" else x for x in (q, k, v))
        return fj.linear_attention(*turned, **named)

    functions: list[Callable[..., Any]] = [
        lambda q, k, v, g: fj.softmax_attention(q, k, v, key_mask=mask),
        lambda q, k, v, g: fj.softmax_attention(q, k, v, key_mask=np.stack([mask, ~mask], 1), causal=True),
        linear,
        lambda *x: linear(*x, layout="bnhd"),
        lambda *x: linear(*x, feature_map="identity", key_mask=np.stack([mask, ~mask], 1)),
    ]
    for function in functions:
        seen = np.stack([mask, ~mask], 1) if function in (functions[1], functions[4]) else mask[:, None]
        q, k, v, g = variables(*shapes)
        grad = jax.grad(lambda *x, f=function: (f(*x) ** 2).sum(), (0, 1, 2, 3))
        k, v = (jnp.where(seen[..., None], x, 0.0) for x in (k, v))
        want = grad(q, k, v, g)
        assert any(np.asarray(x).any() for x in want)
        for odd in (np.nan, np.inf, -np.inf):
            given = (jnp.where(seen[..., None], x, odd) for x in (k, v))
            for x, y in zip(grad(q, *given, g), want, strict=True):
                np.testing.assert_array_equal(x, y)
    # And of the gradient's own gradient.
    q, k, v, _ = variables(*shapes)
    soft = lambda q, k, v: (fj.softmax_attention(q, k, v, key_mask=mask) ** 2).sum()
    twice = jax.grad(lambda *x: sum((y**2).sum() for y in jax.grad(soft, (0, 1, 2))(*x)), (0, 1, 2))
    given = (jnp.where(mask[:, None, :, None], x, np.nan) for x in (k, v))
    assert all(bool(jnp.isfinite(x).all()) for x in twice(q, *given))


@pytest.mark.parametrize("name", ["softmax", "linear", "packed"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_causality_hides_reaches_no_gradient(name: str, bad: float) -> None:
    """What is not finite in later keys reaches no earlier query, nor that of earlier queries a later key; packed: no other part."""
    attend = fj.linear_attention if name == "linear" else fj.softmax_attention
    options = {"cu_seqlens": np.array([0, 2, 4, 6])} if name == "packed" else {}

    def gradients(place: str, value: float) -> list[Any]:
        q, k, v, dy = (np.array(x) for x in variables(*[(1, 2, 6, 4)] * 4))
        for x in {"keys": (k, v), "queries": (q,), "dy": (dy,)}[place]:
            x[:, :, slice(4, None) if place == "keys" else slice(2)] = value
        found = jax.vjp(lambda *x: attend(*x, causal=True, **options), q, k, v)[1](dy)
        rest = slice(4) if place == "keys" else slice(2, None)
        return [x[:, :, rest] for x in (found if place != "keys" or options else found[:1])]

    for place in ("keys", "queries", "dy"):
        for got, want in zip(gradients(place, bad), gradients(place, 0.0), strict=True):
            assert np.isfinite(want).all()
            assert np.asarray(want).any()
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if not name.startswith("softmax")])
def test_second_derivatives_are_refused(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    loss = lambda *x: sum((y**2).sum() for y in jax.tree.leaves(function(*x)))
    with pytest.raises(NotImplementedError, match=r"differentiated once, got a second time"):
        jax.grad(lambda *x: (jax.grad(loss)(*x) ** 2).sum())(*variables(*shapes))


def test_what_gets_no_gradient_says_so() -> None:
    q = normal(2, 6, 4)
    w, g, f = normal(8, 4), -abs(normal(2)), abs(normal(6))
    for name, function, x in (
        ("projection", lambda w: fj.linear_attention(q, q, q, feature_map="favor", projection=w), w),
        ("decay", lambda g: fj.linear_attention(q, q, q, causal=True, feature_map="exp", decay=g), g),
        ("logn", lambda f: fj.softmax_attention(q, q, q, logn=f), f),
    ):
        for call in (function, jax.jit(function)):
            with pytest.raises(TypeError, match=rf"^{name} must be .*stop_gradient.*got one that is differentiated"):
                jax.grad(lambda x, call=call: call(x).sum())(x)
            assert not jax.grad(lambda x, call=call: call(jax.lax.stop_gradient(x)).sum())(x).any()
            jax.grad(lambda y, call=call, x=x: (call(x) * y).sum())(1.0)


# --- transforms --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_functions_are_the_same(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    args = variables(*shapes)
    loss = lambda *x: sum(y.sum() for y in jax.tree.leaves(function(*x)))
    every = tuple(range(len(args)))
    for f in (function, jax.grad(loss, every)):
        for x, y in zip(jax.tree.leaves(jax.jit(f)(*args)), jax.tree.leaves(f(*args)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("first_only", [False, True])
def test_vmap_gives_values_and_gradients_of_each_sample(name: str, first_only: bool) -> None:
    function, shapes = FUNCTIONS[name]
    batch = [jnp.stack([normal(*s, dtype=np.float64, seed=10 * i + j) for j in range(3)]) for i, s in enumerate(shapes)]
    dims = [1] + [None if first_only else 0] * (len(shapes) - 1)
    batch = [jnp.moveaxis(x, 0, d) if d else x[0] if d is None else x for x, d in zip(batch, dims, strict=True)]
    loss = lambda *args: sum((x * x).sum() for x in jax.tree.leaves(function(*args)))
    every = tuple(range(len(shapes)))
    values = jax.vmap(function, dims)(*batch)
    got = jax.jit(jax.vmap(jax.grad(loss, every), dims))(*batch)
    for j in range(3):
        sample = [x if d is None else jnp.take(x, j, d) for x, d in zip(batch, dims, strict=True)]
        for x, y in zip(jax.tree.leaves(values), jax.tree.leaves(function(*sample)), strict=True):
            np.testing.assert_allclose(x[j], y, rtol=1e-12, atol=1e-13)
        for x, y in zip(got, jax.grad(loss, every)(*sample), strict=True):
            np.testing.assert_allclose(x[j], y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["mul", "matmul", "conv2d", "linear", "decay and states", "softmax packed", "nystrom", "step"]
)
def test_vmap_of_vmap_and_over_extras(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    first, *rest = variables(*shapes)
    batch = jnp.stack([first, first + 1])
    last = jnp.stack([rest[-1], rest[-1] * 0.5, -rest[-1]])
    # The outer one maps the first operand, the inner one the last.
    inner = lambda x: jax.vmap(lambda y: function(x, *rest[:-1], y))(last)
    got = jax.vmap(inner)(batch)
    for i in range(2):
        for j in range(3):
            want = function(batch[i], *rest[:-1], last[j])
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(x[i, j], y, rtol=1e-12, atol=1e-13)


def test_vmap_over_masks_offsets_and_projections() -> None:
    q = normal(2, 6, 4)
    masks = np.random.default_rng(0).random((3, 6)) < 0.6
    offsets = np.array([[0, 2, 6], [0, 6, 6], [0, 1, 6]])
    w = normal(3, 8, 4)
    for function, xs in (
        (lambda m: fj.linear_attention(q, q, q, key_mask=m), masks),
        (lambda m: fj.softmax_attention(q, q, q, key_mask=m, logn="keys", causal=True), masks),
        (lambda m: fj.nystrom_attention(q, q, q, key_mask=m, num_landmarks=2), masks),
        (lambda c: fj.linear_attention(q[None], q[None], q[None], cu_seqlens=c, causal=True), offsets),
        (lambda c: fj.softmax_attention(q[None], q[None], q[None], cu_seqlens=c, logn="keys"), offsets),
        (lambda w: fj.linear_attention(q, q, q, feature_map="favor", projection=w), w),
    ):
        got = jax.vmap(function)(xs)
        for j in range(3):
            same(got[j], function(xs[j]))


def test_jit_of_several_shapes() -> None:
    f = jax.jit(lambda x, y: fj.mitchell_mul(x, y, mode="ste") + fj.mitchell_div(x, 7.0))
    for shape in ((3,), (2, 3), (0,), (4, 0, 2), ()):
        x = normal(*shape) if shape else jnp.float32(1.5)
        want = fastops.mitchell_mul(plain(x), plain(x)) + fastops.mitchell_div(plain(x), np.float32(7.0))
        same(f(x, x), np.asarray(want))
    for m in (Multiplier(), Multiplier("min-mse"), Multiplier(0.01)):
        x = normal(5)
        same(jax.jit(fj.mitchell_mul, static_argnames="multiplier")(x, x, multiplier=m), m.mul(plain(x), plain(x)))


def test_arrays_without_elements() -> None:
    for shape in ((2, 3, 0, 4), (0, 3, 5, 4), (2, 0, 5, 4)):
        x = jnp.zeros(shape)
        for attend in (fj.linear_attention, fj.softmax_attention, fj.nystrom_attention):
            assert attend(x, x, x).shape == shape
            assert jax.grad(lambda x, attend=attend: attend(x, x, x).sum())(x).shape == shape
    nothing = jnp.zeros((2, 3, 0, 4), np.float32)
    q = normal(2, 3, 5, 4)
    same(fj.softmax_attention(q, nothing, nothing), np.zeros((2, 3, 5, 4), np.float32))
    assert fj.mitchell_matmul(jnp.zeros((3, 0)), jnp.zeros((0, 2))).tolist() == [[0, 0]] * 3
    assert fj.mitchell_mul(jnp.zeros((0, 3)), jnp.zeros(3)).shape == (0, 3)
    assert jax.vmap(lambda x: fj.linear_attention(x, x, x))(jnp.zeros((0, 2, 5, 4))).shape == (0, 2, 5, 4)


# --- decoding ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_map", ["elu", "exp", "softmax", "identity"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_are_those_of_arrays(feature_map: str, dtype: Any) -> None:
    empty = np.zeros((2, 2, 0, 4), dtype)
    _, state = fastops.linear_attention(empty, empty, empty, causal=True, feature_map=feature_map, return_state=True)
    ours = tuple(map(jnp.asarray, state))
    for i in range(3):
        q = normal(2, 4, 4, seed=i, dtype=dtype)
        k, v = q[:, :2], q[:, 2:]
        before = [plain(x).copy() for x in ours]
        y, after = fj.linear_attention_step(q, k, v, ours, feature_map=feature_map)
        for x, z in zip(ours, before, strict=True):
            same(x, z)
        want = fastops.linear_attention_step_(plain(q), plain(k), plain(v), state, feature_map=feature_map)
        for x, z in zip((y, *after), (want, *state), strict=True):
            same(x, z)
        ours = after


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("feature_map", ["elu", "exp", "favor"])
def test_decoding_by_scan_is_the_whole_sequence(feature_map: str, decay: bool) -> None:
    if decay and feature_map == "favor":
        pytest.skip("favor has no decay")
    q, k, v = (normal(*s, seed=i) for i, s in enumerate(((2, 4, 30, 8), (2, 2, 30, 8), (2, 2, 30, 6))))
    options: dict[str, Any] = {"feature_map": feature_map}
    if feature_map == "favor":
        options["projection"] = fastops.favor_projection(8, 16, rng=0)
    g = jnp.array([-0.3, -0.01]) if decay else None
    whole, last = fj.linear_attention(q, k, v, causal=True, decay=g, return_state=True, **options)
    begin = fj.linear_attention(
        q[:, :, :10], k[:, :, :10], v[:, :, :10], causal=True, decay=g, return_state=True, **options
    )[1]

    @jax.jit
    def decode(state: Any, q: Any, k: Any, v: Any) -> Any:
        def step(state: Any, rows: Any) -> Any:
            y, state = fj.linear_attention_step(*rows, state, decay=g, **options)
            return state, y

        return jax.lax.scan(step, state, [jnp.moveaxis(x[:, :, 10:], 2, 0) for x in (q, k, v)])

    state, y = decode(begin, q, k, v)
    np.testing.assert_allclose(jnp.moveaxis(y, 0, 2), whole[:, :, 10:], rtol=2e-5, atol=2e-5)
    scale = [np.exp2(x[2]) if len(x) > 2 else np.ones_like(x[1]) for x in (state, last)]
    np.testing.assert_allclose(state[1] * scale[0], last[1] * scale[1], rtol=2e-5)


def test_gradient_through_scan_is_that_of_the_whole_sequence() -> None:
    q, k, v = (normal(2, 2, 7, 4, seed=i, dtype=np.float64) for i in range(3))

    def steps(q: Any, k: Any, v: Any) -> Any:
        state = (jnp.zeros((2, 2, 4, 4)), jnp.zeros((2, 2, 4)))
        step = lambda state, rows: fj.linear_attention_step(*rows, state)[::-1]
        return jnp.moveaxis(jax.lax.scan(step, state, [jnp.moveaxis(x, 2, 0) for x in (q, k, v)])[1], 0, 2)

    whole = lambda *x: fj.linear_attention(*x, causal=True)
    for x, y in zip(
        *(jax.grad(lambda *x, f=f: (f(*x) ** 2).sum(), (0, 1, 2))(q, k, v) for f in (steps, whole)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


# --- errors ------------------------------------------------------------------------------------------------------------------------

X, I8 = jnp.ones((2, 3, 4), np.float32), jnp.ones((2, 3, 4), np.int8)
STATE = (jnp.ones((2, 4, 4), np.float32), jnp.ones((2, 4), np.float32))
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "dtype": (lambda: fj.mitchell_mul(I8, I8), TypeError, r"^a and b must be arrays of float16, .*got int8 and int8$"),
    "complex": (lambda: fj.mitchell_mul(X, 1j), TypeError, r"^b must be a jax.Array, got 1j$"),
    "numbers": (lambda: fj.mitchell_mul(1.0, 2.0), TypeError, r"^a and b must be arrays of .*, got numbers$"),
    "list": (lambda: fj.mitchell_mul([1.0], X), TypeError, r"^a must be a jax.Array, got an object of type list$"),
    "shapes": (
        lambda: fj.mitchell_mul(X, jnp.ones((3, 3))),
        ValueError,
        r"^b must be of a shape that broadcasts with \(2, 3, 4\), got \(3, 3\)$",
    ),
    "mode": (lambda: fj.mitchell_mul(X, X, mode="exakt"), ValueError, r"^mode must be .*did you mean 'exact'\?$"),
    "multiplier": (
        lambda: fj.mitchell_div(X, X, multiplier=Multiplier("lmul")),
        ValueError,
        r"^multiplier must be one",
    ),
    "matmul": (lambda: fj.mitchell_matmul(X, X), ValueError, r"^b must be of shape \(\.\.\., 4, N\) to follow a"),
    "matmul 0-d": (lambda: fj.mitchell_matmul(jnp.float32(1), X), ValueError, r"^a must be an array of at least 1"),
    "conv": (lambda: fj.mitchell_conv2d(X, X), ValueError, r"^x must be of shape \(N, C, H, W\), got \(2, 3, 4\)$"),
    "stride": (
        lambda: fj.mitchell_conv2d(X[None], X[None], stride=0),
        ValueError,
        r"^stride must be an integer in \[1, ",
    ),
    "k": (
        lambda: fj.linear_attention(X, X[..., :3], X),
        ValueError,
        r"^k must be of shape \(H, N, 4\), got \(2, 3, 3\)$",
    ),
    "q": (lambda: fj.linear_attention(None, X, X), TypeError, r"^q must be a jax.Array, got None$"),
    "int q": (lambda: fj.softmax_attention(I8, I8, I8), TypeError, r"^q and k and v must be arrays of float16"),
    "mask": (lambda: fj.linear_attention(X, X, X, key_mask=jnp.ones(3)), TypeError, r"^key_mask must be of dtype bool"),
    "mask of pairs": (
        lambda: fj.softmax_attention(X, X, X, key_mask=jnp.ones((3, 3), bool)),
        ValueError,
        r"^key_mask must be of shape \(3,\) or \(2, 3\)",
    ),
    "map": (lambda: fj.linear_attention(X, X, X, feature_map="elu2"), ValueError, r"did you mean 'relu2' ?"),
    "causal": (lambda: fj.linear_attention(X, X, X, causal=1), TypeError, r"^causal must be True or False, got 1$"),
    "decay": (
        lambda: fj.linear_attention(X, X, X, causal=True, decay=jnp.ones(2)),
        ValueError,
        r"^decay must be <= 0 everywhere, the logarithm of a factor, got positive ones or nan$",
    ),
    "decay alone": (
        lambda: fj.linear_attention(X, X, X, decay=-jnp.ones(2)),
        ValueError,
        r"^decay must be None without",
    ),
    "offsets": (
        lambda: fj.linear_attention(X[None], X[None], X[None], cu_seqlens=np.array([0, 2, 1, 3])),
        ValueError,
        r"^cu_seqlens must be offsets that rise from 0 to 3, got 1 after 2$",
    ),
    "state": (
        lambda: fj.linear_attention(X, X, X, initial_state=STATE[::-1]),
        ValueError,
        r"^initial_state\[0\] must be of shape \(2, 4, 4\), got \(2, 4\)$",
    ),
    "state of one": (
        lambda: fj.linear_attention(X, X, X, initial_state=(X,)),
        TypeError,
        r"^initial_state must be a tuple",
    ),
    "step": (
        lambda: fj.linear_attention_step(X[:, 0], X[:, 0], X[:, 0], STATE[::-1]),
        ValueError,
        r"^state\[0\] must be of shape \(2, 4, 4\), got \(2, 4\)$",
    ),
    "step dtype": (
        lambda: fj.linear_attention_step(X[:, 0], X[:, 0], X[:, 0], tuple(x.astype(np.float16) for x in STATE)),
        TypeError,
        r"^state\[0\] must be of dtype float32, got float16$",
    ),
    "logn": (lambda: fj.softmax_attention(X, X, X, logn="kees"), ValueError, r"^logn must be 'keys'"),
    "logn shape": (
        lambda: fj.softmax_attention(X, X, X, logn=jnp.ones(2)),
        ValueError,
        r"^logn must be 'keys' or of a",
    ),
    "landmarks": (lambda: fj.nystrom_attention(X, X, X, landmarks=X), TypeError, r"^landmarks must be a tuple of two"),
    "taps": (lambda: fj.nystrom_attention(X, X, X, conv_weight=jnp.ones((2, 2))), ValueError, r"^conv_weight must be"),
    "route": (lambda: fj.set_route("fast"), ValueError, r"^name must be 'ffi' or 'callback', got 'fast'$"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_raise_before_anything_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, kind, text = WRONG[name]
    if _backend.name == "native":
        monkeypatch.setattr("fastops.jax._ops.call", None)
    with pytest.raises(kind, match=text) as caught:
        call()
    assert len(str(caught.value)) < 200


def test_wrong_arguments_raise_while_tracing() -> None:
    with pytest.raises(ValueError, match=r"^b must be of shape \(\.\.\., 4, N\) to follow a"):
        jax.jit(fj.mitchell_matmul)(X, X)
    with pytest.raises(TypeError, match=r"^a and b must be arrays of float16"):
        jax.jit(fj.mitchell_mul)(I8, I8)
    with pytest.raises(ValueError, match=r"^k must be of shape \(H, N, 4\)"):
        jax.vmap(fj.linear_attention)(X[None], X[None, ..., :3], X[None])


def test_wrong_values_of_a_trace_raise_when_they_come() -> None:
    decays = jax.jit(lambda g: fj.linear_attention(X, X, X, causal=True, decay=g))
    packed = jax.jit(lambda c: fj.linear_attention(X[None], X[None], X[None], cu_seqlens=c))
    soft = jax.jit(lambda c: fj.softmax_attention(X[None], X[None], X[None], cu_seqlens=c))
    for function, x, text in (
        (decays, jnp.array([-1.0, 0.5]), "decay must be <= 0 everywhere"),
        (decays, jnp.array([-1.0, np.nan]), "decay must be <= 0 everywhere"),
        (packed, jnp.array([0, 9, 3]), "cu_seqlens must be offsets that rise from 0 to 3"),
        (packed, jnp.array([0, -9, 3]), "cu_seqlens must be offsets that rise from 0 to 3"),
        (soft, jnp.array([0, 2, 2]), "cu_seqlens must be offsets that rise from 0 to 3"),
        (soft, jnp.array([1, 2, 3]), "cu_seqlens must be offsets that rise from 0 to 3"),
    ):
        with pytest.raises(Exception, match=text):
            function(x).block_until_ready()


# --- routes and threads ------------------------------------------------------------------------------------------------------------


def test_the_route_is_the_one_asked_for(route: str) -> None:
    assert fj.get_route() == route
    text = jax.jit(fj.mitchell_mul).lower(X, X).as_text()
    assert ("fastops_mitchell" in text) == (route == "ffi")
    assert ("python_cpu_callback" in text) == (route == "callback")


MULTIPLIER = fj._mitchell._attributes(Multiplier(), "mul")


def handle(target: str, shapes: list[tuple[int, ...]], results: list[tuple[int, ...]], **attributes: Any) -> Any:
    """A handler's answer to buffers of ones, as any caller of jax's interface may ask."""
    found = [jax.ShapeDtypeStruct(s, np.float32) for s in results]
    given = {**attributes, **MULTIPLIER}
    return jax.block_until_ready(jax.ffi.ffi_call(target, found)(*(jnp.ones(s, np.float32) for s in shapes), **given))


def steps_of(*numbers: int) -> dict[str, Any]:
    return {"steps": np.array(numbers, np.int64)}


STEPS = (1, 1, 0, 0, 1, 1, 1)
IMAGE, KERNEL, RESULT = (1, 2, 5, 4), (4, 2, 3, 3), (1, 4, 3, 2)


@pytest.mark.parametrize(
    ("x", "w", "y", "steps"),
    [
        *((IMAGE, KERNEL, y, STEPS) for y in ((1, 1, 1, 1), (1, 4, 3, 3), (1, 4, 2, 2), (1, 3, 3, 2), (2, 4, 3, 2))),
        *((IMAGE, w, RESULT, STEPS) for w in ((4, 1, 3, 3), (4, 3, 3, 3), (3, 2, 3, 3))),
        *(
            (IMAGE, KERNEL, RESULT, (*STEPS[:i], n, *STEPS[i + 1 :]))
            for i in range(7)
            for n in (-1, 2, 2**62, *((0,) if i not in (2, 3) else ()))
        ),
        # Twice that is 0 in 64 bits.
        (IMAGE, KERNEL, RESULT, (1, 1, -(2**63), 0, 1, 1, 1)),
        (IMAGE, (4, 2, 0, 3), (1, 4, 6, 2), STEPS),
        ((1, 2, 2, 4), KERNEL, (1, 4, 1, 2), STEPS),
    ],
    ids=str,
)
def test_convolutions_that_do_not_fit_are_refused_by_handlers(x: Any, w: Any, y: Any, steps: Any, route: str) -> None:
    if route != "ffi":
        pytest.skip("handlers alone")
    with pytest.raises(Exception, match="buffers that do not fit each other"):
        handle("fastops_conv2d", [x, w], [y], **steps_of(*steps))
    with pytest.raises(Exception, match="buffers that do not fit each other"):
        handle("fastops_conv2d_grad", [y, x, w], [x, w], mode=np.int32(0), **steps_of(*steps))


def test_gradients_of_other_sizes_and_modes_are_refused_by_handlers(route: str) -> None:
    if route != "ffi":
        pytest.skip("handlers alone")
    (y,) = handle("fastops_conv2d", [IMAGE, KERNEL], [RESULT], **steps_of(*STEPS))
    assert y.shape == RESULT
    dx, dw = handle(
        "fastops_conv2d_grad", [RESULT, IMAGE, KERNEL], [IMAGE, KERNEL], mode=np.int32(2), **steps_of(*STEPS)
    )
    assert (dx.shape, dw.shape) == (IMAGE, KERNEL)
    for results in ([(1, 2, 4, 4), KERNEL], [IMAGE, (4, 2, 3, 2)], [KERNEL, IMAGE]):
        with pytest.raises(Exception, match="buffers that do not fit each other"):
            handle("fastops_conv2d_grad", [RESULT, IMAGE, KERNEL], results, mode=np.int32(0), **steps_of(*STEPS))
    for mode in (-1, 3, 9):
        for target, shapes, more in (
            ("fastops_conv2d_grad", [RESULT, IMAGE, KERNEL], steps_of(*STEPS)),
            ("fastops_matmul_grad", [(2, 4), (2, 3), (3, 4)], {}),
            ("fastops_mitchell_grad", [(3,), (3,), (3,)], {"op": np.int32(0), "rank": np.int32(1)}),
        ):
            with pytest.raises(Exception, match="a mode of gradients that there is none of"):
                handle(target, shapes, shapes[1:], mode=np.int32(mode), **more)


@pytest.mark.parametrize("n", [2**57, 2**60])
def test_handlers_without_memory_say_so(n: int, route: str) -> None:
    if route != "ffi":
        pytest.skip("handlers alone")
    # One pointer for each matrix of a result without elements: more than a process can have, and more than a vector can count.
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED: fastops: out of memory"):
        handle("fastops_matmul_grad", [(1, 0, 1), (1, 0, 1), (1, 1, 1)], [(n, 0, 1), (1, 1, 1)], mode=np.int32(0))


def test_handlers_follow_the_target_and_the_number_of_threads() -> None:
    if _backend.name != "native":
        pytest.skip("native alone has targets")
    a, b = normal(70, 90), normal(90, 50, seed=1)
    for name in fastops.show_config("dict")["targets_runnable"]:
        with fastops.target(name):
            same(fj.mitchell_matmul(a, b), fastops.mitchell_matmul(plain(a), plain(b)))
    maps = Path("/proc/self/maps")
    if maps.exists():
        # Two copies of the library would be two dispatch states.
        assert len({line.split()[-1] for line in maps.read_text().splitlines() if "libfastops" in line}) == 1


def test_a_module_of_another_jaxlib_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastops.jax._ops._api_version", lambda: (0, 1))
    if fj._ops.MODULE is None:
        assert fj._ops._module() is None
        return
    with pytest.warns(UserWarning, match=r"^fastops._jax was built for another jaxlib, .*, jaxlib's \(0, 1\)$"):
        assert fj._ops._module() is None


def test_a_module_that_cannot_be_loaded_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError(f"{name}.so: undefined symbol: fastops_of_another_day")

    monkeypatch.setattr("fastops.jax._ops.import_module", fail)
    built = fj._ops.MODULE is not None
    if _backend.name == "native":
        with pytest.warns(UserWarning, match=r"^fastops._jax cannot be loaded, callbacks are used: .*undefined symbol"):
            assert fj._ops._module() is None
    assert fastops.show_config("dict")["jax_handlers"] == ("built" if built else "not built")
    monkeypatch.setattr("fastops.jax._ops.MODULE", None)
    wanted = "built, but not to be used here: callbacks are" if built else "not built"
    assert fastops.show_config("dict")["jax_handlers"] == wanted


def test_a_route_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastops.jax._ops.MODULE", None)
    with pytest.raises(ValueError, match=r"^name must be 'callback': this build has no module of handlers"):
        fj.set_route("ffi")


@pytest.mark.parametrize("name", ["mul", "decay and states", "step", "softmax causal masked", "nystrom"])
def test_values_are_the_same_by_pure_callback(name: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if route != "callback":
        pytest.skip("the other route")
    function, shapes = FUNCTIONS[name]
    args = variables(*shapes)
    calls = [function, jax.grad(lambda *x: sum((y**2).sum() for y in jax.tree.leaves(function(*x))))]
    calls.append(lambda x, *rest: jax.vmap(lambda x: function(x, *rest))(jnp.stack([x, x + 1])))
    want = [jax.tree.leaves(call(*args)) for call in calls]
    monkeypatch.setattr("fastops.jax._ops._direct", lambda: None)
    jax.clear_caches()
    for call, wanted in zip(calls, want, strict=True):
        for x, y in zip(jax.tree.leaves(call(*args)), wanted, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)
    jax.clear_caches()


def test_operations_run_without_compilation() -> None:
    function, shapes = FUNCTIONS["decay and states"]
    args = variables(*shapes)
    want = function(*args)
    with jax.disable_jit():
        got = function(*args)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)


DEVICES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import fastops, fastops.jax as fj
fj.set_route({route!r})
mesh = jax.make_mesh((2,), ("x",))
x = np.linspace(1, 2, 64, dtype=np.float32).reshape(4, 2, 8)
a = jax.device_put(x, NamedSharding(mesh, P("x")))
assert len(a.sharding.device_set) == 2
want = fastops.mitchell_mul(x, x)
attended = fastops.linear_attention(x, x, x, causal=True)
assert (np.asarray(jax.jit(fj.mitchell_mul)(a, a)) == want).all()
assert (np.asarray(fj.mitchell_mul(a, a)) == want).all()
attend = lambda x: fj.linear_attention(x, x, x, causal=True)
assert (np.asarray(jax.jit(attend)(a)) == attended).all()
part = jax.shard_map(attend, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
assert (np.asarray(jax.jit(part)(a)) == attended).all()
g = jax.jit(jax.grad(lambda x: attend(x).sum()))(a)
assert g.shape == x.shape
print("done")
"""


@pytest.mark.parametrize("text", ["DEVICES", "CROWD"])
def test_large_arrays_many_threads_and_devices_do_not_wait_for_each_other(route: str, text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", globals()[text].format(route=route)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


CROWD = """
import threading
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
import fastops, fastops.jax as fj
fj.set_route({route!r})
fastops.set_num_threads(4)
a = jnp.linspace(1, 2, 3_000_000)
q = jnp.ones((1, 8, 512, 64))

@jax.jit
def f(a, q):
    y, z = fj.mitchell_mul(a, a + 1), fj.mitchell_mul(a * 2, a)
    w = fj.linear_attention(q * 2, q, q, causal=True) + fj.softmax_attention(q, q + 1, q)
    return fj.mitchell_mul(y, z).sum() + w.sum() + fj.mitchell_matmul(q, q.swapaxes(-1, -2)).sum()

def work():
    for _ in range(3):
        jax.grad(f)(a, q).block_until_ready()

threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
x = np.asarray(a)
y = fj.mitchell_mul(a, a)
assert (np.asarray(y) == fastops.mitchell_mul(x, x)).all()
print("done")
"""


@pytest.mark.parametrize(
    "shapes", [((2, 1, 3, 1, 2), (1, 5, 1, 2, 1)), ((4, 1, 3), (2, 1)), ((3, 1, 1, 2), (1, 4, 2, 2))]
)
def test_axes_that_alternate_broadcast(shapes: Any) -> None:
    a, b = (normal(*s, seed=i) for i, s in enumerate(shapes))
    for x, y in ((a, b), (b, a)):
        same(fj.mitchell_mul(x, y), fastops.mitchell_mul(plain(x), plain(y)))
        product = fj.mitchell_matmul(x[..., None], y[..., None, :])
        same(product, fastops.mitchell_matmul(plain(x)[..., None], plain(y)[..., None, :]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=mutually_broadcastable_shapes(num_shapes=2, max_dims=5, max_side=4, min_side=0), seed=st.integers(0, 99))
def test_every_shape_that_broadcasts(shapes: Any, seed: int) -> None:
    a, b = (np.asarray(normal(*s, seed=seed + i)) for i, s in enumerate(shapes.input_shapes))
    want = np.asarray(fastops.mitchell_mul(a, b))
    same(fj.mitchell_mul(jnp.asarray(a), jnp.asarray(b)), want)
    _, da, db = gradients(fj.mitchell_mul, jnp.asarray(a), jnp.asarray(b), dy=jnp.asarray(want))
    first, second = fastops.mitchell_mul_grad(a, b, want)
    same(da, first)
    same(db, second)


def test_large_arrays_are_those_of_numpy() -> None:
    a, b = normal(2_500_000), normal(2_500_000, seed=1)
    same(jax.jit(fj.mitchell_mul)(a, b), fastops.mitchell_mul(plain(a), plain(b)))
    same(
        fj.mitchell_mul(a.reshape(2, 1, -1), b[:3].reshape(3, 1)),
        fastops.mitchell_mul(plain(a).reshape(2, 1, -1), plain(b)[:3].reshape(3, 1)),
    )
