# SPDX-License-Identifier: BSD-3-Clause
"""Operators of fastops.torch: the values and gradients of the functions for arrays, under torch's checkers, compilers and transforms."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tolerance

import fastops
from fastops import Multiplier, _backend, _validate

torch = pytest.importorskip("torch", reason="torch is not installed")
ft = pytest.importorskip("fastops.torch")

F64 = torch.float64
MODES = _validate.GRADIENT_MODES
ops = torch.ops.fastops


def normal(*shape: int, dtype: Any = torch.float32, seed: int = 0, grad: bool = False) -> Any:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype).requires_grad_(grad)


def plain(x: Any) -> np.ndarray:
    x = x.detach()
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(_validate.bfloat16())
    return x.numpy()


def same(x: Any, y: Any) -> None:
    assert plain(x).tobytes() == np.ascontiguousarray(y).tobytes()
    assert plain(x).dtype == np.asarray(y).dtype
    assert tuple(x.shape) == np.shape(y)


DTYPES = [torch.float16, torch.float32, F64, *([torch.bfloat16] if _validate.bfloat16() is not None else [])]


# --- values and gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ["mul", "div", "matmul"])
def test_mitchell_is_that_of_arrays(op: str, mode: str, dtype: Any) -> None:
    m = Multiplier("min-mse")
    shapes = ((2, 1, 3, 4), (5, 4, 3)) if op == "matmul" else ((5, 1, 4), (3, 4))
    a, b = normal(*shapes[0], dtype=dtype, grad=True), normal(*shapes[1], dtype=dtype, seed=1, grad=True)
    y = getattr(ft, f"mitchell_{op}")(a, b, multiplier=m, mode=mode)
    with torch.no_grad():
        assert torch.equal(y, getattr(ft, f"mitchell_{op}")(a, b, multiplier=m))
    same(y, getattr(m, op)(plain(a), plain(b)))
    dy = normal(*y.shape, dtype=dtype, seed=2)
    y.backward(dy)
    da, db = getattr(fastops, f"mitchell_{op}_grad")(plain(a), plain(b), plain(dy), multiplier=m, mode=mode)
    same(a.grad, da)
    same(b.grad, db)


@pytest.mark.parametrize("mode", MODES)
def test_conv2d_is_that_of_arrays(mode: str) -> None:
    x, w = normal(2, 4, 7, 6, grad=True), normal(6, 2, 3, 2, grad=True)
    steps: dict[str, Any] = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": 2}
    y = ft.mitchell_conv2d(x, w, mode=mode, **steps)
    same(y, fastops.mitchell_conv2d(plain(x), plain(w), **steps))
    with torch.no_grad():
        same(ft.mitchell_conv2d(x, w, **steps), plain(y))
    dy = normal(*y.shape, seed=3)
    y.backward(dy)
    dx, dw = fastops.mitchell_conv2d_grad(plain(x), plain(w), plain(dy), mode=mode, **steps)
    same(x.grad, dx)
    same(w.grad, dw)


def test_numbers_vectors_and_mixed_dtypes() -> None:
    x = normal(4).requires_grad_()
    assert ft.mitchell_mul(x, 3.0).dtype is torch.float32
    assert ft.mitchell_mul(2, x).tolist() == (2 * x).tolist()
    assert ft.mitchell_mul(x, torch.tensor(3.0, dtype=F64)).dtype is torch.float32
    assert ft.mitchell_mul(x, torch.ones(4, dtype=F64)).dtype is F64
    assert ft.mitchell_mul(x, torch.ones(4, dtype=torch.int64)).dtype is torch.float32
    assert ft.mitchell_mul(torch.tensor(3.0), torch.tensor(3.0)) == 8
    a, b = normal(3, 4), normal(4, 2, seed=1)
    for left, right in ((a[0], b), (a, b[:, 0]), (a[0], b[:, 0])):
        same(ft.mitchell_matmul(left, right), fastops.mitchell_matmul(plain(left), plain(right)))
    transposed = ft.mitchell_mul(a.t(), a.t())
    assert transposed.is_contiguous()
    # torch says nothing of infinities, and neither do these.
    assert ft.mitchell_div(torch.ones(2), torch.zeros(2)).tolist() == [np.inf] * 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_linear_attention_is_that_of_arrays(causal: bool, layout: str) -> None:
    shapes = ((2, 4, 9, 5), (2, 2, 9, 5), (2, 2, 9, 3))
    if layout == "bnhd":
        shapes = tuple((b, n, h, d) for b, h, n, d in shapes)
    q, k, v = (normal(*shape, seed=i, grad=True) for i, shape in enumerate(shapes))
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    options: dict[str, Any] = {"causal": causal, "layout": layout, "feature_map": "exp"}
    state = [plain(normal(*s, seed=9)).copy() for s in ((2, 2, 5, 3), (2, 2, 5), (2, 2, 5))]
    given = [torch.from_numpy(x) for x in state]
    given[0].requires_grad_()
    given[1].requires_grad_()
    y, after = ft.linear_attention(q, k, v, key_mask=mask, initial_state=given, return_state=True, **options)
    arrays = [plain(x) for x in (q, k, v)]
    want, wanted = fastops.linear_attention(
        *arrays, key_mask=mask.numpy(), initial_state=tuple(state), return_state=True, **options
    )
    same(y, want)
    for x, z in zip(after, wanted, strict=True):
        same(x, z)
    dy, ds, dz = (normal(*x.shape, seed=5) for x in (y, after[0], after[1]))
    torch.autograd.backward([y, after[0], after[1]], [dy, ds, dz])
    dq, dk, dv, first = fastops.linear_attention_backward(
        plain(dy),
        *arrays,
        want,
        key_mask=mask.numpy(),
        initial_state=tuple(state),
        d_state=(plain(ds), plain(dz)),
        **options,
    )
    for x, z in zip((q, k, v, *given[:2]), (dq, dk, dv, *first), strict=True):
        same(x.grad, z)


def test_nystrom_attention_is_that_of_arrays() -> None:
    q, k, v = (normal(2, 3, 20, 4, seed=i, grad=True) for i in range(3))
    taps = normal(3, 5, grad=True)
    y = ft.nystrom_attention(q, k, v, num_landmarks=4, conv_weight=taps)
    arrays = [plain(x) for x in (q, k, v)]
    same(y, fastops.nystrom_attention(*arrays, num_landmarks=4, conv_weight=plain(taps)))
    dy = normal(*y.shape, seed=5)
    y.backward(dy)
    want = fastops.nystrom_attention_backward(plain(dy), *arrays, num_landmarks=4, conv_weight=plain(taps))
    for x, z in zip((q, k, v, taps), want, strict=True):
        same(x.grad, z)


# --- torch's checkers --------------------------------------------------------------------------------------------------------------


def variables(*shapes: tuple[int, ...]) -> list[Any]:
    return [normal(*shape, dtype=F64, seed=i, grad=True) for i, shape in enumerate(shapes)]


def _all(found: tuple[Any, tuple[Any, ...]]) -> tuple[Any, ...]:
    return found[0], *found[1]


MASK = torch.tensor([[True, False, True, True, True, False], [False] * 6])
FUNCTIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "mul": (ft.mitchell_mul, [(3, 4), (4,)]),
    "div": (ft.mitchell_div, [(3, 4), (4,)]),
    "matmul": (ft.mitchell_matmul, [(2, 3, 4), (4, 2)]),
    "conv2d": (lambda x, w: ft.mitchell_conv2d(x, w, padding=1, groups=2), [(1, 2, 4, 3), (4, 1, 2, 3)]),
    "linear": (lambda q, k, v: ft.linear_attention(q, k, v, causal=True), [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)]),
    "state": (
        lambda q, k, v: ft.linear_attention(q, k, v, causal=True, feature_map="softmax", return_state=True)[1][:2],
        [(1, 2, 5, 3), (1, 2, 5, 3), (1, 2, 5, 2)],
    ),
    "decay": (
        lambda q, k, v, g: ft.linear_attention(q, k, v, causal=True, decay=-g.exp(), eps=0.3, key_mask=MASK),
        [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2), (2,)],
    ),
    "decay identity": (
        lambda q, k, v, g: ft.linear_attention(q, k, v, causal=True, decay=-g.exp(), feature_map="identity"),
        [(2, 4, 7, 3), (2, 2, 6, 3), (2, 2, 6, 2), (2, 2, 6)],
    ),
    "decay one head": (
        lambda q, k, v, g: ft.linear_attention(q, k, v, causal=True, decay=-g.exp()),
        [(5, 3), (5, 3), (5, 2), (5,)],
    ),
    "decay packed": (
        lambda q, k, v, g: _all(
            ft.linear_attention(
                q, k, v, causal=True, decay=-g.exp(), cu_seqlens=torch.tensor([0, 3, 3, 7]), return_state=True
            )
        ),
        [(1, 2, 7, 3), (1, 2, 7, 3), (1, 2, 7, 2), (1, 2, 7)],
    ),
    "decay and states": (
        lambda q, k, v, g, s, z: _all(
            ft.linear_attention(
                q,
                k,
                v,
                causal=True,
                decay=-g.exp(),
                initial_state=(s, z.exp()),
                return_state=True,
                layout="bnhd",
            )
        ),
        [(2, 6, 4, 3), (2, 6, 2, 3), (2, 6, 2, 2), (2, 2, 6), (2, 2, 3, 2), (2, 2, 3)],
    ),
    "decay and the last z without a divisor": (
        lambda q, k, v, g: ft.linear_attention(
            q, k, v, causal=True, decay=-g.exp(), normalize=False, return_state=True
        )[1][1],
        [(2, 4, 6, 3), (2, 2, 6, 3), (2, 2, 6, 2), (2,)],
    ),
    "softmax": (ft.softmax_attention, [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)]),
    "softmax causal": (
        lambda q, k, v: ft.softmax_attention(q, k, v, causal=True, logn="keys", layout="bnhd"),
        [(2, 5, 4, 3), (2, 6, 2, 3), (2, 6, 2, 2)],
    ),
    "softmax masked": (
        lambda q, k, v: ft.softmax_attention(q, k, v, key_mask=MASK, logn=torch.arange(1.0, 6)),
        [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)],
    ),
    "softmax causal masked": (
        lambda q, k, v: ft.softmax_attention(q, k, v, causal=True, key_mask=MASK),
        [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)],
    ),
    "softmax packed": (
        lambda q, k, v: ft.softmax_attention(q, k, v, causal=True, cu_seqlens=torch.tensor([0, 2, 2, 7])),
        [(1, 2, 7, 3), (1, 2, 7, 3), (1, 2, 7, 2)],
    ),
    "softmax one head": (ft.softmax_attention, [(5, 3), (6, 3), (6, 2)]),
    "nystrom landmarks": (
        lambda q, k, v, first, second: ft.nystrom_attention(q, k, v, landmarks=(first, second)),
        [(2, 4, 8, 3), (2, 2, 8, 3), (2, 2, 8, 2), (2, 4, 3, 3), (2, 2, 3, 3)],
    ),
    "nystrom": (
        lambda q, k, v, w: ft.nystrom_attention(q, k, v, num_landmarks=3, conv_weight=w),
        [(1, 2, 8, 3), (1, 2, 8, 3), (1, 2, 8, 2), (2, 3)],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    assert torch.autograd.gradcheck(function, variables(*shapes))


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_gradient_is_torchs(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # In many blocks of rows.
    monkeypatch.setattr("fastops.torch._attention._BLOCK", 300)
    ours = [normal(2, 3, 17, 4, seed=i, grad=True) for i in range(3)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    ft.softmax_attention(*ours, causal=causal).square().sum().backward()
    torch.nn.functional.scaled_dot_product_attention(*theirs, is_causal=causal).square().sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        bound = tolerance.attention_gradient(float(y.grad.abs().max()) * 4, 8.0, np.dtype("f4"), np.dtype("f4"))
        assert (x.grad - y.grad).abs().max() <= bound


NONE7 = (None,) * 7
LINEAR = (False, "elu", None, 0.0, None, None)
OPERATORS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "mul": lambda: (ops.mitchell_mul, (normal(4, 3).t().requires_grad_(), normal(3, 4, grad=True), "c_none", "exact")),
    "div": lambda: (ops.mitchell_div, (normal(3, 1, grad=True), normal(4, grad=True), "c_min_mse", "ste")),
    "matmul": lambda: (ops.mitchell_matmul, (normal(2, 3, 4, grad=True), normal(4, 5), "c_none", "mimic")),
    "conv2d": lambda: (
        ops.mitchell_conv2d,
        (normal(2, 4, 7, 6, grad=True), normal(6, 2, 3, 2, grad=True), [2, 1], [1, 0], [1, 2], 2, "c_none", "exact"),
    ),
    **{
        f"linear {layout} {state}": lambda layout=layout, state=state: (
            ops.linear_attention,
            (*(normal(2, 3, 4, 5, seed=i, grad=True) for i in range(3)), *NONE7, *LINEAR, layout, state),
        )
        for layout in ("bhnd", "bnhd")
        for state in (False, True)
    },
    "linear decay": lambda: (
        ops.linear_attention,
        (
            *(normal(2, 3, 4, 5, seed=i, grad=True) for i in range(3)),
            *(None, None, None, torch.full((2, 3, 4), -0.5).requires_grad_(), None, None, None),
            *(True, *LINEAR[1:], "bhnd", True),
        ),
    ),
    "step": lambda: (
        ops.linear_attention_step_,
        (
            *(normal(2, 3, 5) for _ in range(3)),
            *(normal(*s).exp() for s in ((2, 3, 5, 5), (2, 3, 5))),
            *(None,) * 3,
            *LINEAR[1:],
        ),
    ),
    "softmax": lambda: (
        ops.softmax_attention,
        (*(normal(2, 3, 4, 5, seed=i, grad=True) for i in range(3)), *(None,) * 3, True, None, True, "bnhd"),
    ),
    "nystrom landmarks": lambda: (
        ops.nystrom_attention,
        (
            *(normal(2, 3, 14, 5, seed=i, grad=True) for i in range(3)),
            *(None, None, normal(2, 3, 4, 5, grad=True), normal(2, 3, 4, 5, seed=1, grad=True)),
            *(3, 6, "ridge", None, None, "matrix", False, "bhnd"),
        ),
    ),
    "nystrom": lambda: (
        ops.nystrom_attention,
        (
            *(normal(2, 3, 14, 5, seed=i, grad=True) for i in range(3)),
            *(None, normal(3, 3, grad=True), None, None),
            *(3, 6, "newton", None, None, "matrix", False, "bhnd"),
        ),
    ),
}


# Of torch 2.14: its own check reads gradients of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    op, args = OPERATORS[name]()
    result = torch.library.opcheck(op.default, args)
    assert set(result.values()) == {"SUCCESS"}
    assert len(result) == 4


def test_opcheck_finds_a_wrong_shape() -> None:
    """The checker is awake: it refuses an operator whose fake is wrong."""
    lib = torch.library.Library("fastops_test", "FRAGMENT")
    lib.define("wrong(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    lib.impl("wrong", lambda x: x + 1, "CompositeExplicitAutograd")
    torch.library.register_fake("fastops_test::wrong", lambda x: x.new_empty((7,)), lib=lib)
    from torch.testing._internal.optests.generate_tests import OpCheckError

    with pytest.raises(OpCheckError):
        torch.library.opcheck(torch.ops.fastops_test.wrong.default, (torch.ones(3),))


# --- compilers and transforms ------------------------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_functions_are_the_same(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    x, y = variables(*shapes), variables(*shapes)
    got, want = compiled(function)(*x), function(*y)
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
        assert torch.equal(a, b)
        a.sum().backward(retain_graph=True)
        b.sum().backward(retain_graph=True)
    for a, b in zip(x, y, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_compiled_functions_take_multipliers_and_numbers() -> None:
    x = normal(5)
    f = compiled(lambda x, m: ft.mitchell_mul(x, 3.0, multiplier=m, mode="ste") + ft.mitchell_div(x, 7.0))
    for m in (Multiplier(), Multiplier("min-mse"), Multiplier(0.01)):
        assert torch.equal(f(x, m), ft.mitchell_mul(x, 3.0, multiplier=m) + ft.mitchell_div(x, 7.0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_compiles() -> None:
    q, k, v = (normal(1, 2, 6, 4, seed=i) for i in range(3))

    def layer(q: Any, k: Any, v: Any) -> Any:
        return ft.linear_attention(2 * q, k.exp(), v, causal=True).relu() + 1

    torch.compiler.reset()
    try:
        got = torch.compile(layer, fullgraph=True)(q, k, v)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no C++ compiler for inductor: {type(error).__name__}")
    torch.testing.assert_close(got, layer(q, k, v))


def test_a_compiled_step_changes_the_state() -> None:
    nothing = torch.zeros(1, 2, 0, 4)
    _, state = ft.linear_attention(nothing, nothing, nothing, causal=True, return_state=True)
    other = tuple(x.clone() for x in state)
    step = compiled(lambda x, state: ft.linear_attention_step_(x, x, x, state) + 1)
    for i in range(3):
        x = normal(1, 2, 4, seed=i)
        assert torch.equal(step(x, other), ft.linear_attention_step_(x, x, x, state) + 1)
    for a, b in zip(state, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("first_only", [False, True])
def test_vmap_gives_gradients_of_each_sample(name: str, first_only: bool) -> None:
    function, shapes = FUNCTIONS[name]
    batch = [torch.stack([normal(*s, dtype=F64, seed=10 * i + j) for j in range(3)]) for i, s in enumerate(shapes)]
    dims = [1] + [None if first_only else 0] * (len(shapes) - 1)
    batch = [x.movedim(0, d) if d else x[0] if d is None else x for x, d in zip(batch, dims, strict=True)]

    def loss(*args: Any) -> Any:
        y = function(*args)
        return sum((x * x).sum() for x in (y if isinstance(y, tuple) else (y,)))

    every = tuple(range(len(shapes)))
    got = torch.vmap(torch.func.grad(loss, every), tuple(dims))(*batch)
    values = torch.vmap(loss, tuple(dims))(*batch)
    for j in range(3):
        sample = [x if d is None else x.select(d, j) for x, d in zip(batch, dims, strict=True)]
        torch.testing.assert_close(values[j], loss(*sample))
        for a, b in zip(got, torch.func.grad(loss, every)(*sample), strict=True):
            torch.testing.assert_close(a[j], b)


def test_autocast_casts_products_as_torch_does() -> None:
    a, q = normal(3, 3), normal(1, 2, 5, 4)
    with torch.autocast("cpu", dtype=torch.float16):
        assert ft.mitchell_matmul(a, a).dtype is torch.float16
        assert ft.mitchell_conv2d(a[None, None], a[None, None]).dtype is torch.float16
        assert ft.mitchell_mul(a, a).dtype is torch.float32
        assert ft.mitchell_matmul(a.double(), a.double()).dtype is F64
        for attend in (ft.linear_attention, ft.softmax_attention, ft.nystrom_attention):
            assert attend(q, q, q).dtype is torch.float16
        x = a.clone().requires_grad_()
        ft.mitchell_matmul(x, a).sum().backward()
    assert x.grad.dtype is torch.float32
    if _validate.bfloat16() is not None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same(
                ft.mitchell_matmul(a, a),
                fastops.mitchell_matmul(*(plain(a.bfloat16()),) * 2),
            )


# --- memory ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_read_in_place(dtype: Any) -> None:
    x = normal(4, 6, dtype=dtype)[:, ::2].requires_grad_()
    y = ft._ops.array("x", x)
    assert y.__array_interface__["data"][0] == x.data_ptr()
    assert ft._ops.tensor(y).data_ptr() == x.data_ptr()
    assert [8 * s for s in ft._ops.tensor(y).stride()] == [8 * s for s in x.stride()]


def test_lazy_negatives_and_conjugates_are_resolved() -> None:
    x = torch.imag((torch.ones(4) * 1j).conj())
    assert x.is_neg()
    assert ft.mitchell_mul(x, x.abs()).tolist() == [-1.0] * 4


def test_a_step_is_that_of_arrays_and_tells_autograd() -> None:
    for feature_map, decay in (("elu", None), ("exp", None), ("elu", torch.tensor([-0.5, -0.25]))):
        nothing = torch.zeros(2, 2, 0, 4)
        _, state = ft.linear_attention(
            nothing, nothing, nothing, causal=True, feature_map=feature_map, return_state=True
        )
        arrays = tuple(plain(x).copy() for x in state)
        for i in range(3):
            q = normal(2, 4, 4, seed=i)
            k, v = q[:, :2], q[:, 2:]
            rows = [x.clone() if i else x for x in (q, k, v)]
            y = ft.linear_attention_step_(*rows, state, feature_map=feature_map, decay=decay)
            options = {} if decay is None else {"decay": decay.numpy()}
            same(
                y, fastops.linear_attention_step_(*(plain(x) for x in rows), arrays, feature_map=feature_map, **options)
            )
        for a, b in zip(state, arrays, strict=True):
            same(a, b)
            assert a._version == 3


@pytest.mark.parametrize(
    "options",
    [
        {"eps": [1]},
        {"scale": [1]},
        {"feature_map": ["elu"]},
        {"normalize": [1]},
        {"kernel_eps": [1], "feature_map": "relu"},
    ],
    ids=str,
)
def test_options_of_a_step_without_a_hash(options: dict[str, Any]) -> None:
    nothing = torch.zeros(1, 2, 0, 4)
    _, state = ft.linear_attention(nothing, nothing, nothing, causal=True, return_state=True)
    row = torch.ones(1, 2, 4)
    with pytest.raises(TypeError, match=rf"^{next(iter(options))} must be .*, got an object of type list"):
        ft.linear_attention_step_(row, row, row, state, **options)
    assert all((s == 0).all() for s in state)


def test_autograd_refuses_a_state_that_a_step_changed() -> None:
    x = normal(1, 2, 5, 4).requires_grad_()
    _, state = ft.linear_attention(x, x, x, causal=True, return_state=True)
    loss = state[0].square().sum()
    with torch.no_grad():
        row = normal(1, 2, 4)
        ft.linear_attention_step_(row, row, row, [s.detach() for s in state])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_states_that_overlap_are_refused() -> None:
    s, z = torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4)
    with pytest.raises(ValueError, match="apart"):
        ft.linear_attention_step_(z, z, z, (s, z))
    row = normal(1, 2, 4)
    with pytest.raises(ValueError, match="apart"):
        ft.linear_attention_step_(row, row, row, (s, s.flatten()[8:16].reshape(1, 2, 4)))
    assert (s == 1).all()


@pytest.mark.parametrize("causal", [False, True])
def test_what_a_mask_hides_may_be_nan_in_gradients(causal: bool) -> None:
    """The last keys are hidden: what stands there reaches no gradient, of softmax attention nor of a decay."""
    clean = [normal(2, 2, 6, 4, dtype=F64, seed=i) for i in range(3)]
    seen = torch.tensor([True] * 4 + [False] * 2)
    found = []
    for hidden in (0.0, torch.nan):
        q, k, v = (x.clone() for x in clean)
        k[..., 4:, :] = v[..., 4:, :] = hidden
        inputs = [x.requires_grad_() for x in (q, k, v)]
        y = ft.softmax_attention(q, k, v, causal=causal, key_mask=seen.expand(2, 6))
        gradients = list(torch.autograd.grad(y.sum(), inputs))
        if causal:
            decay = -torch.rand(2, 2, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
            inputs = [*inputs, decay.requires_grad_()]
            y = ft.linear_attention(q, k, v, causal=True, decay=decay, key_mask=seen.expand(2, 6), eps=0.1)
            gradients += torch.autograd.grad((y * y).sum(), inputs)
        found.append(gradients)
    for x, y in zip(*found, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["softmax", "linear"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_causality_hides_may_be_nan_in_gradients(name: str, bad: float) -> None:
    """What is not finite in later keys reaches no earlier query, nor that of earlier queries a later key."""
    attend = {"softmax": ft.softmax_attention, "linear": ft.linear_attention}[name]

    def gradients(place: str, value: float) -> list[Any]:
        q, k, v, dy = (normal(2, 2, 6, 4, dtype=F64, seed=i) for i in range(4))
        for x in {"keys": (k, v), "queries": (q,), "dy": (dy,)}[place]:
            x[:, :, slice(4, None) if place == "keys" else slice(2)] = value
        inputs = [x.requires_grad_() for x in (q, k, v)]
        found = torch.autograd.grad(attend(*inputs, causal=True), inputs, dy)
        return [found[0][:, :, :4]] if place == "keys" else [x[:, :, 2:] for x in found]

    for place in ("keys", "queries", "dy"):
        for got, want in zip(gradients(place, bad), gradients(place, 0.0), strict=True):
            assert want.isfinite().all()
            assert want.any()
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_decay_of_packed_sequences_of_one_head_and_their_states() -> None:
    """A state of packed sequences of (N, D) has no axis of heads."""
    q, k, v = (normal(5, 3, dtype=F64, seed=i) for i in range(3))
    state = (normal(2, 3, 3, dtype=F64, seed=3).exp(), normal(2, 3, dtype=F64, seed=4).exp())
    packed = {"causal": True, "cu_seqlens": torch.tensor([0, 2, 5]), "initial_state": state}
    decay = -normal(5, dtype=F64, seed=5).exp()

    def loss(logs: Any) -> Any:
        y, (s, z) = ft.linear_attention(q, k, v, decay=logs, return_state=True, **packed)
        return y.square().sum() + s.sum() + z.square().sum()

    assert torch.autograd.gradcheck(loss, decay.requires_grad_())


def test_transforms_nest_and_take_no_samples() -> None:
    x = normal(3, 2, 9, 4)

    def attend(q: Any) -> Any:
        return ft.nystrom_attention(q, q, q, num_landmarks=2)

    got = torch.func.grad(lambda q: torch.vmap(attend)(q).sum())(x)
    want = torch.stack([torch.func.grad(lambda q: attend(q).sum())(q) for q in x])
    torch.testing.assert_close(got, want)
    assert torch.vmap(attend)(x[:0]).shape == (0, 2, 9, 4)


# --- errors ------------------------------------------------------------------------------------------------------------------------


def _wrong() -> list[tuple[Callable[[], Any], type[Exception], str]]:
    x, q = normal(3, 3), normal(1, 2, 5, 4)
    g = x.clone().requires_grad_()
    state = (torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4))
    row = q[:, :, 0].clone().requires_grad_()
    return [
        (lambda: ft.mitchell_mul(torch.ones(2, dtype=torch.int32), 2), TypeError, "float16, bfloat16"),
        (lambda: ft.mitchell_mul(np.ones(2), x), TypeError, "a must be a torch.Tensor"),
        (lambda: ft.mitchell_mul(2.0, 3.0), TypeError, "got numbers"),
        (lambda: ft.mitchell_mul(x, x + 1j), TypeError, "torch.complex64"),
        (lambda: ft.mitchell_mul(x, x, mode="exakt"), ValueError, "did you mean 'exact'"),
        (lambda: ft.mitchell_mul(x, x, multiplier="min-mse"), TypeError, "fastops.Multiplier"),
        (lambda: ft.mitchell_div(x, x, multiplier=Multiplier("lmul")), ValueError, "defines div"),
        (lambda: ft.mitchell_mul(x.to_sparse(), x.to_sparse()), TypeError, "dense"),
        (lambda: ft.mitchell_matmul(x, x[:2]), ValueError, "b must be of shape"),
        (lambda: ft.mitchell_matmul(g, x[:2]), ValueError, "b must be of shape"),
        (lambda: ft.mitchell_matmul(x, x[0, 0]), ValueError, "at least 1 dimension"),
        (lambda: ft.mitchell_conv2d(q, q[:, :1]), ValueError, "w must be of"),
        (lambda: ft.mitchell_conv2d(q, q, stride=0), ValueError, "stride"),
        (lambda: ft.linear_attention(q, q, plain(q)), TypeError, "v must be a torch.Tensor"),
        (lambda: ft.linear_attention(q, q[..., :3], q), ValueError, "k must be of shape"),
        (
            lambda: ft.linear_attention(
                q, q, q, causal=True, decay=-torch.ones(2, requires_grad=True), feature_map="exp"
            ),
            TypeError,
            "decay",
        ),
        (lambda: ft.linear_attention(q, q, q, initial_state=state[0]), TypeError, "initial_state"),
        (lambda: ft.linear_attention(q, q, q, feature_map="eluu"), ValueError, "did you mean 'elu'"),
        (lambda: ft.linear_attention_step_(row, row, row, state), TypeError, "q must be a tensor outside autograd"),
        (lambda: ft.linear_attention_step_(q[0], q[0], q[0], None), TypeError, "state must be a tuple"),
        (lambda: ft.softmax_attention(q, q, q, logn="rows"), ValueError, "logn"),
        (lambda: ft.nystrom_attention(q, q, q, landmarks=q), TypeError, "landmarks must be a tuple"),
        (lambda: ft.nystrom_attention(q, q, q, num_landmarks=0), ValueError, "num_landmarks"),
    ]


@pytest.mark.parametrize("i", range(len(_wrong())))
def test_wrong_calls_are_named(i: int) -> None:
    call, kind, text = _wrong()[i]
    with pytest.raises(kind, match=text) as caught:
        call()
    assert len(str(caught.value)) < 200


def test_a_second_derivative_is_refused() -> None:
    x = normal(3).requires_grad_()
    (first,) = torch.autograd.grad(ft.mitchell_mul(x, x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        first.sum().backward()


# Of torch 2.14: its own forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_is_refused() -> None:
    """Tangents would be lost silently."""
    x, row = normal(3, 3), normal(1, 2, 4)
    state = (torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4))
    calls = (
        lambda x: ft.mitchell_mul(x, x),
        lambda x: ft.linear_attention(x, x, x),
        lambda x: ft.linear_attention_step_(row, row, torch.autograd.forward_ad.make_dual(row, row), state),
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.equal(ft.mitchell_mul(x, x), ft.mitchell_mul(x.clone(), x))
        for call in calls:
            with pytest.raises(NotImplementedError, match="must be taken backward"):
                call(dual)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(calls[0], (x,), (x,))


def test_modes_and_exporters_see_the_operators() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(op)
            return op(*args, **(kwargs or {}))

    x = normal(3, 4)
    with Log():
        ft.mitchell_mul(x, x)
        ft.softmax_attention(x, x, x)
    assert seen == [ops.mitchell_mul.default, ops.softmax_attention.default]
    with torch._subclasses.fake_tensor.FakeTensorMode():
        y = torch.rand(3, 4)
        assert type(ft.linear_attention(y, y, y)).__name__ == "FakeTensor"

    class Model(torch.nn.Module):
        def forward(self, q: Any) -> Any:
            return ft.linear_attention(q, q, q, causal=True) + ft.mitchell_mul(q, 2.0)

    q = normal(1, 2, 5, 4)
    exported = torch.export.export(Model(), (q,))
    assert ops.mitchell_mul.default in [node.target for node in exported.graph.nodes]
    assert torch.equal(exported.module()(q), Model()(q))


def test_operands_without_elements() -> None:
    for shape in ((0, 3), (3, 0), ()):
        a = torch.zeros(shape, requires_grad=True)
        ft.mitchell_mul(a, a).sum().backward()
        assert a.grad.shape == a.shape
    none, few = torch.zeros(1, 2, 0, 4, requires_grad=True), torch.ones(1, 2, 3, 4, requires_grad=True)
    for attend in (ft.linear_attention, ft.softmax_attention, ft.nystrom_attention):
        attend(none, few, few).sum().backward()
        y = attend(few, none, none)
        y.sum().backward()
        assert (y == 0).all()
        assert (few.grad == 0).all()
        assert none.grad.shape == none.shape


def test_a_tensor_on_another_device_is_named() -> None:
    """The kernels of every device are the same, and say what they take; a GPU is not needed to see the text."""

    class OnGpu:
        requires_grad, dtype, is_cpu, device, layout = False, torch.float32, False, "cuda:0", torch.strided

        def numpy(self) -> Any:
            raise TypeError

    with pytest.raises(TypeError, match=r"q must be a tensor on the CPU \(its cpu\(\)\), got one on cuda:0"):
        ft._ops.array("q", OnGpu())
    for name in ("mitchell_mul", "mitchell_conv2d", "linear_attention", "softmax_attention", "nystrom_attention"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastops::{name}", "CUDA")
    if torch.cuda.is_available():
        with pytest.raises(TypeError, match="q must be a tensor on the CPU"):
            ft.softmax_attention(*(torch.ones(1, 1, 2, 2, device="cuda") for _ in range(3)))


def _child(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_torch_is_imported_on_demand() -> None:
    ran = _child(
        "import sys, fastops; assert 'torch' not in sys.modules; 'torch' in dir(fastops) or sys.exit('no name')"
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_kernels_are_those_of_the_backend() -> None:
    assert ft._mitchell._backend is _backend.backend


@pytest.mark.gpu
def test_operators_take_tensors_on_a_gpu() -> None:
    from fastops import cuda

    if not cuda.is_available() or not torch.cuda.is_available():
        pytest.skip("no GPU")
    a, b = torch.randn(5, 7), torch.randn(7, 5)
    x, y = a.cuda(), b.cuda()
    for got, want in (
        (ft.mitchell_mul(x, y.T), ft.mitchell_mul(a, b.T)),
        (ft.mitchell_div(x, 3.0), ft.mitchell_div(a, 3.0)),
    ):
        assert got.is_cuda
        assert torch.equal(got.cpu(), want)
    torch.testing.assert_close(ft.mitchell_matmul(x, y).cpu(), ft.mitchell_matmul(a, b))
    images, kernels = torch.randn(2, 4, 6, 5), torch.randn(4, 2, 3, 3)
    settings = {"stride": 2, "padding": 1, "groups": 2}
    for function, operands, options in (
        (ft.mitchell_mul, (a, b.T), {}),
        (ft.mitchell_matmul, (a, b), {}),
        (ft.mitchell_conv2d, (images, kernels), settings),
    ):
        found = []
        for device in ("cpu", "cuda"):
            leaves = [t.detach().to(device).requires_grad_() for t in operands]
            y = function(*leaves, **options)
            y.backward(torch.ones_like(y))
            found.append((y.detach().cpu(), *(t.grad.cpu() for t in leaves)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)
