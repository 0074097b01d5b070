# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions of fastops.cuda, and the gradients of its products and convolutions, against the reference: on the CPU as fibers,
and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerance
from gpu_arrays import Fake, Shim, made_by
from samples import FLOATS, MULTIPLIERS
from test_matmul import CONVOLUTIONS, MODES, PLAIN, close, magnitude, normal, oracle, pairs

from fastops import Multiplier, cuda

F32 = FLOATS["f32"]
# One of each way of multiplying.
KINDS = ("plain", "min-mse", "negative", "segments-4", "equation", "k1", "flush")


# --- matrix products ---------------------------------------------------------------------------------------------------------


def check_matmul(gpu: Any, monkeypatch: pytest.MonkeyPatch, *operands: Any, **options: Any) -> None:
    """Operands: a, b, dy."""
    a, b, dy = operands
    got = made_by(gpu, "mitchell_matmul_grad", monkeypatch, *operands, **options)
    given = {"multiplier": PLAIN, "mode": "exact"} | options
    vectors = (a.ndim == 1, b.ndim == 1)
    two = [a[np.newaxis] if vectors[0] else a, b[:, np.newaxis] if vectors[1] else b]
    upper = dy.reshape(np.matmul(np.zeros(two[0].shape), np.zeros(two[1].shape)).shape)
    want = oracle("mitchell_matmul_grad", *two, upper, **given)
    sizes = magnitude("mitchell_matmul_grad", *two, upper, multiplier=PLAIN, mode="ste")
    for x, y, size, operand in zip(got, want, sizes, (a, b), strict=True):
        bound = tolerance.gradient(4.0 * size, max(1, dy.size), a.dtype)
        close(x, y.reshape(operand.shape), bound.reshape(operand.shape))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_matmul_gradients_are_within_tolerance(gpu: Any, kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplier = Multiplier(**MULTIPLIERS[kind])
    for dtype in FLOATS.values():
        operands = normal((7, 19), dtype, 1), normal((19, 37), dtype, 2), normal((7, 37), dtype, 3)
        check_matmul(gpu, monkeypatch, *operands, multiplier=multiplier, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_matmul_gradients_of_every_shape_and_layout(gpu: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for a_shape, b_shape in (
        ((65, 3), (3, 66)),
        ((3, 4, 5), (3, 5, 6)),
        # Summed over what the batch repeats.
        ((4, 5), (3, 5, 6)),
        ((2, 1, 4, 5), (3, 5, 6)),
        ((2, 3, 4, 5), (2, 1, 5, 6)),
        ((3, 4, 5), (5,)),
        ((5,), (5, 6)),
        ((5,), (5,)),
        ((3, 0), (0, 4)),
        ((0, 3), (3, 4)),
        ((2, 3, 4), (4, 0)),
        ((0, 2, 3), (3, 4)),
        # In parts, of several refills of the places in shared memory.
        ((2, 700), (700, 3)),
        ((700, 2), (2, 3)),
        ((9, 70, 2), (2, 3)),
    ):
        a, b = normal(a_shape, F32, 1), normal(b_shape, F32, 2)
        dy = normal(np.matmul(np.zeros(a_shape), np.zeros(b_shape)).shape, F32, 3)
        check_matmul(gpu, monkeypatch, a, b, dy, mode=mode)
        if a.ndim > 1 and b.ndim > 1:
            turned = np.asfortranarray(a), np.asfortranarray(b), np.asfortranarray(dy)
            check_matmul(gpu, monkeypatch, *turned, mode=mode)
    a, b, dy = normal((2, 3, 4, 5), F32, 1), normal((5, 6), F32, 2), normal((2, 3, 4, 6), F32, 3)
    for axes in ((1, 0, 2, 3), (0, 2, 1, 3)):
        apart = [np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes)) for x in (a, dy)]
        check_matmul(gpu, monkeypatch, apart[0], b, apart[1], mode=mode)
    check_matmul(gpu, monkeypatch, a[:, :, ::2], b[::-1], dy[:, :, ::2], mode=mode)
    check_matmul(gpu, monkeypatch, a, b, np.broadcast_to(F32.type(0.5), dy.shape), mode=mode)


@pytest.mark.parametrize("kind", ["plain", "negative", "segments-4", "equation", "k1"])
@pytest.mark.parametrize("name", ["bf16", "f32", "f64"])
def test_matmul_gradients_of_special_values(gpu: Any, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in FLOATS:
        pytest.skip("ml_dtypes is not installed")
    dtype, huge = FLOATS[name], np.ldexp(1.0, 127 if name != "f64" else 1023)
    options = {"multiplier": Multiplier(**MULTIPLIERS[kind])}
    # One term each, near to overflow: what the dtype holds is finite.
    rng = np.random.default_rng(1)
    for b_size, dy_size in ((huge, 1.0), (1.0, huge), (1 / huge, huge), (huge / 8, 4.0), (4.0, huge / 8)):
        a, b, dy = (
            (rng.uniform(1.0, 1.99, (n, 1)) * size * rng.choice([-1, 1], (n, 1))).astype(dtype)
            for n, size in ((40, 1.0), (1, b_size), (40, dy_size))
        )
        got = made_by(gpu, "mitchell_matmul_grad", monkeypatch, a, b, dy, **options)[0]
        want = oracle("mitchell_matmul_grad", a, b, dy, mode="exact", **options)[0]
        size = np.abs(np.where(np.isfinite(want.astype(np.float64)), want, 0).astype(np.float64))
        close(got, want, tolerance.gradient(size, 1, dtype))
    # Every pair of zeros, infinities and nan among other terms.
    values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.5, -3.0], dtype)
    a, b, dy = np.ones((7, 3), dtype), np.ones((3, 7), dtype), np.ones((7, 7), dtype)
    a[:, 1], b[1] = values, values
    for mode in MODES:
        check_matmul(gpu, monkeypatch, a, b, dy, mode=mode, **options)
        check_matmul(
            gpu, monkeypatch, dy, dy, np.ascontiguousarray(np.broadcast_to(values, (7, 7))), mode=mode, **options
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [n for n in ("f16", "bf16") if n in FLOATS])
def test_matmul_gradients_of_subnormal_operands(
    gpu: Any, name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them in turn, beside numbers that make the result a normal one."""
    rng = np.random.default_rng(1)
    small, large = (2.0**-16, 2.0**10) if name == "f16" else (2.0**-129, 2.0**20)
    for at in range(3):
        operands = []
        for i, shape in enumerate(((4, 5), (5, 6), (4, 6))):
            x = rng.uniform(1.0, 2.0, shape) * (small if i == at else large if (i - at) % 3 == 1 else 1.0)
            operands.append(x.astype(FLOATS[name]))
        for options in ({"subnormals": "flush"}, {}):
            check_matmul(gpu, monkeypatch, *operands, multiplier=Multiplier(**options), mode=mode)


def test_matmul_gradients_without_terms_are_zero(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, dy = np.full((2, 3), np.nan, F32), np.zeros((3, 0), F32), np.zeros((2, 0), F32)
    da, db = made_by(gpu, "mitchell_matmul_grad", monkeypatch, a, b, dy)
    assert not da.any()
    assert db.shape == b.shape


# --- convolutions ------------------------------------------------------------------------------------------------------------


def check_conv2d(gpu: Any, x: Any, w: Any, *, out: Any = None, **options: Any) -> None:
    given = {"multiplier": PLAIN} | options
    want = oracle("mitchell_conv2d", x, w, **given)
    to = gpu.empty(want.shape, want.dtype) if out is None else out
    assert cuda.mitchell_conv2d(gpu.put(x), gpu.put(w), out=to, **(gpu.options | options)) is to
    (sizes,) = magnitude("mitchell_conv2d", x, w, **(given | {"multiplier": PLAIN}))
    close(gpu.get(to), want, tolerance.matmul(2.0 * sizes, int(np.prod(w.shape[1:])), x.dtype))


def check_conv2d_grad(gpu: Any, monkeypatch: pytest.MonkeyPatch, *operands: Any, **options: Any) -> None:
    """Operands: x, w, dy."""
    x, w, dy = operands
    given = {"multiplier": PLAIN, "mode": "exact"} | options
    got = made_by(gpu, "mitchell_conv2d_grad", monkeypatch, *operands, **options)
    want = oracle("mitchell_conv2d_grad", *operands, **given)
    sizes = magnitude("mitchell_conv2d_grad", *operands, **(given | {"multiplier": PLAIN, "mode": "ste"}))
    for g, y, size in zip(got, want, sizes, strict=True):
        close(g, y, tolerance.gradient(4.0 * size, max(dy.size, w.size), x.dtype))


def images(case: int, dtype: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Images, kernels, a gradient of the result and the settings."""
    x_shape, w_shape, settings = CONVOLUTIONS[case]
    steps = pairs(settings)
    x, w = normal(x_shape, dtype, 1), normal(w_shape, dtype, 2)
    shape = oracle("mitchell_conv2d", x, w, **steps, multiplier=PLAIN).shape
    return x, w, normal(shape, dtype, 3), steps


def turned(x: Any) -> Any:
    """The same elements with the channels together."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("case", range(len(CONVOLUTIONS)))
def test_conv2d_is_within_tolerance(gpu: Any, case: int) -> None:
    for dtype in FLOATS.values():
        x, w, dy, steps = images(case, dtype)
        check_conv2d(gpu, x, w, **steps)
    check_conv2d(gpu, turned(x), turned(w), out=gpu.put(turned(dy)), **steps)


@pytest.mark.parametrize("kind", MULTIPLIERS)
def test_conv2d_of_every_multiplier_is_within_tolerance(gpu: Any, kind: str) -> None:
    x, w, _, steps = images(3, F32)
    check_conv2d(gpu, x, w, multiplier=Multiplier(**MULTIPLIERS[kind]), **steps)


def test_conv2d_of_large_tiles_and_of_many_terms_is_within_tolerance(gpu: Any) -> None:
    # Enough tiles of 128 x 128 to be worth them; a sum in parts.
    check_conv2d(gpu, normal((1, 128, 9, 11), F32, 1), normal((17 * 128, 1, 2, 1), F32, 2), **pairs({"groups": 128}))
    check_conv2d(gpu, normal((1, 90, 5, 4), F32, 1), normal((17, 90, 3, 3), F32, 2), **pairs({"padding": 1}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", range(len(CONVOLUTIONS)))
def test_conv2d_gradients_are_within_tolerance(gpu: Any, case: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in FLOATS.values() if case == 3 else (F32,):
        *operands, steps = images(case, dtype)
        check_conv2d_grad(gpu, monkeypatch, *operands, mode=mode, **steps)
    check_conv2d_grad(gpu, monkeypatch, *map(turned, operands), mode=mode, **steps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_conv2d_gradients_of_every_multiplier(gpu: Any, kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *operands, steps = images(7, F32)
    check_conv2d_grad(gpu, monkeypatch, *operands, multiplier=Multiplier(**MULTIPLIERS[kind]), mode=mode, **steps)


def test_conv2d_gradients_of_every_stride(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels that no tap reaches among them, and strides that share divisors with dilations."""
    # Planes, and matrix products.
    for channels in (2, 18):
        for stride, dilation, kernel in ((4, 2, 3), (6, 4, 2), (2, 3, 2), (5, 1, 2), (3, 3, 3)):
            steps = pairs({"stride": (stride, 2), "dilation": (dilation, 1), "padding": (3, 1)})
            x, w = normal((2, channels, 17, 4), F32, 1), normal((3, channels, kernel, 2), F32, 2)
            dy = normal(oracle("mitchell_conv2d", x, w, **steps, multiplier=PLAIN).shape, F32, 3)
            check_conv2d_grad(gpu, monkeypatch, x, w, dy, **steps)


def test_conv2d_gradients_in_parts(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, dy = normal((3, 1, 17, 20), F32, 1), normal((300, 1, 1, 1), F32, 2), normal((3, 300, 17, 20), F32, 3)
    check_conv2d_grad(gpu, monkeypatch, x, w, dy, mode="mimic")


@pytest.mark.parametrize("kind", ["plain", "segments-4", "equation", "k1"])
def test_conv2d_and_its_gradients_of_special_values(gpu: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding multiplies infinite kernels, and gives a gradient of images no term."""
    multiplier = Multiplier(**MULTIPLIERS[kind])
    # Planes, and matrix products.
    for channels, modes in ((2, MODES), (18, ("exact",))):
        for value in (np.inf, np.nan, -0.0):
            # Every tap of each pixel, some of them, and none where the last result does not reach.
            for steps in (pairs({"padding": 1}), pairs({}), pairs({"stride": 3})):
                x, w = normal((1, channels, 6, 7), F32, 1), normal((2, channels, 2, 2), F32, 2)
                dy = normal(oracle("mitchell_conv2d", x, w, **steps, multiplier=PLAIN).shape, F32, 3)
                for at in range(3):
                    operands = [x.copy(), w.copy(), dy.copy()]
                    for place in ((0, 0, 0, 0), (0, 1, 1, 1), (0, 0, -1, -1), (0, 1, 0, -1)):
                        operands[at][place] = value
                    if at < 2:
                        check_conv2d(gpu, *operands[:2], multiplier=multiplier, **steps)
                    for mode in modes:
                        check_conv2d_grad(gpu, monkeypatch, *operands, multiplier=multiplier, mode=mode, **steps)
                    check_conv2d_grad(gpu, monkeypatch, *map(turned, operands), multiplier=multiplier, **steps)


# --- torch -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_on(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch, and the device of its tensors: for the shim tensors of the CPU that say they are on a GPU."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("fastops.torch")
    if not isinstance(gpu, Shim):
        return torch, "cuda"

    def through(name: str) -> Any:
        function = getattr(cuda, name)

        def called(*tensors: Any, **options: Any) -> Any:
            assert not any(x.requires_grad for x in tensors)
            found = function(*(Fake(x.numpy()) for x in tensors), **options, stream=1)
            made = [torch.from_numpy(gpu.get(x)) for x in (found if isinstance(found, tuple) else (found,))]
            called.count += 1
            return tuple(made) if isinstance(found, tuple) else made[0]

        called.count = 0
        return called

    for name in ("mul", "div", "matmul", "conv2d"):
        for full in (f"mitchell_{name}", f"mitchell_{name}_grad"):
            monkeypatch.setattr(cuda, full, through(full))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    return torch, "cpu"


OPERATORS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "mitchell_mul": ((5, 1), (7,), {}),
    "mitchell_div": ((5, 7), (7,), {}),
    "mitchell_matmul": ((2, 5, 7), (7, 3), {}),
    "mitchell_conv2d": ((2, 4, 6, 5), (4, 2, 3, 3), {"stride": 2, "padding": 1, "groups": 2}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPERATORS)
def test_torch_differentiates_on_the_gpu(torch_on: Any, name: str, mode: str) -> None:
    from fastops import torch as ft

    torch, device = torch_on
    first, second, steps = OPERATORS[name]
    arrays = [normal(shape, F32, i, zeros=0.0) for i, shape in enumerate((first, second))]
    multiplier = Multiplier("min-mse")
    leaves = [torch.tensor(x, device=device, requires_grad=True) for x in arrays]
    y = getattr(ft, name)(*leaves, **steps, multiplier=multiplier, mode=mode)
    dy = normal(tuple(y.shape), F32, 3)
    y.backward(torch.tensor(dy, device=device))
    if device == "cpu":
        assert getattr(cuda, name).count == getattr(cuda, f"{name}_grad").count == 1
    want = oracle(f"{name}_grad", *arrays, dy, multiplier=multiplier, mode=mode, **(pairs(steps) if steps else {}))
    for leaf, exact in zip(leaves, want, strict=True):
        found = leaf.grad.cpu().numpy()
        assert found.shape == exact.shape
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(np.array(exact)), rtol=1e-4, atol=1e-5)


def test_torch_batches_on_the_gpu(torch_on: Any) -> None:
    from fastops import torch as ft

    torch, device = torch_on
    a, b = (torch.tensor(normal(shape, F32, i), device=device) for i, shape in enumerate(((3, 4, 5), (5, 2))))
    gradient = torch.func.vmap(torch.func.grad(lambda x: ft.mitchell_matmul(x, b).sum()))(a)
    each = [
        oracle(
            "mitchell_matmul_grad",
            x.cpu().numpy(),
            b.cpu().numpy(),
            np.ones((4, 2), F32),
            multiplier=PLAIN,
            mode="exact",
        )[0]
        for x in a
    ]
    torch.testing.assert_close(gradient.cpu(), torch.from_numpy(np.stack(each)), rtol=1e-5, atol=1e-5)


# --- refusals ----------------------------------------------------------------------------------------------------------------


def ones(*shape: int, dtype: Any = np.float32) -> Fake:
    return Fake(np.ones(shape, dtype))


def test_matmul_gradients_refuse_what_does_not_fit(shim: Shim) -> None:
    for operands, kind, text in (
        ((ones(2, 3), ones(4, 2), ones(2, 2)), ValueError, r"^b must be of shape \(\.\.\., 3, N\) to follow a"),
        ((ones(2, 3), ones(3, 2), ones(2, 3)), ValueError, r"^dy must be of shape \(2, 2\), got \(2, 3\)"),
        ((ones(2, 3), ones(3), ones(2, 1)), ValueError, r"^dy must be of shape \(2,\), got \(2, 1\)"),
        ((ones(2, 3), ones(3, 2), ones(2, 2, dtype=np.float64)), TypeError, r"^dy must be of dtype float32, as a"),
        ((ones(2, 3), 1.0, ones(2, 2)), TypeError, r"^b must be an array on a GPU, got 1.0"),
        ((ones(), ones(3), ones()), ValueError, r"^a must be an array of at least 1 dimension"),
    ):
        with pytest.raises(kind, match=text):
            cuda.mitchell_matmul_grad(*operands)
    with pytest.raises(ValueError, match=r"^mode must be"):
        cuda.mitchell_matmul_grad(ones(2, 2), ones(2, 2), ones(2, 2), mode="other")


def test_conv2d_refuses_what_does_not_fit(shim: Shim) -> None:
    x, w = ones(1, 4, 6, 6), ones(2, 4, 3, 3)
    for options, kind, text in (
        ({"stride": 0}, ValueError, r"^stride must be an integer in"),
        ({"padding": -1}, ValueError, r"^padding must be an integer in"),
        ({"dilation": (1, 2, 3)}, ValueError, r"^dilation must be an integer or a pair"),
        ({"dilation": 3}, ValueError, r"^w must be of dilated height <= 6"),
        ({"groups": 3}, ValueError, r"^groups must be a divisor"),
        ({"groups": 2}, ValueError, r"^w must be of shape \(O, 2, KH, KW\)"),
        ({"padding": 2**29}, ValueError, r"^x must be of padded sides below 536870912 on a GPU"),
        ({"stride": 2**29}, ValueError, r"^stride and dilation must be below 536870912 on a GPU"),
        ({"multiplier": 1}, TypeError, r"^multiplier must be a fastops.Multiplier"),
        ({"out": ones(1, 2, 4, 3)}, ValueError, r"^out must be of shape \(1, 2, 4, 4\), got \(1, 2, 4, 3\)"),
    ):
        with pytest.raises(kind, match=text):
            cuda.mitchell_conv2d(x, w, **options)
        if "out" not in options:
            with pytest.raises(kind, match=text):
                cuda.mitchell_conv2d_grad(x, w, ones(1, 2, 4, 4), **options)
    square = np.ones((1, 1, 3, 3), np.float32)
    with pytest.raises(ValueError, match=r"^out must be memory apart from x"):
        cuda.mitchell_conv2d(Fake(square), ones(1, 1, 1, 1), out=Fake(square))
    with pytest.raises(ValueError, match=r"^dy must be of shape \(1, 2, 4, 4\)"):
        cuda.mitchell_conv2d_grad(x, w, ones(1, 2, 4, 3))
    with pytest.raises(ValueError, match=r"^x must be of shape \(N, C, H, W\)"):
        cuda.mitchell_conv2d(ones(4, 6, 6), w)
    with pytest.raises(TypeError, match=r"^w must be an array on a GPU"):
        cuda.mitchell_conv2d(x, 2.0)
    with pytest.raises(ValueError, match=r"^mode must be"):
        cuda.mitchell_conv2d_grad(x, w, ones(1, 2, 4, 4), mode="other")
