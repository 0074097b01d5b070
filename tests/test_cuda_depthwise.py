# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions of few channels or filters a group and their gradients on fastops.cuda, which have kernels of their own: against the
reference, and against the same convolution among so many filters that it goes by the matrix product."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerance
from gpu_arrays import Fake, Shim, made_by
from samples import FLOATS, MULTIPLIERS, assert_same_bits
from test_cuda_gradients import F32, check_conv2d, check_conv2d_grad, turned
from test_matmul import MODES, PLAIN, close, normal, oracle, pairs

from fastops import Multiplier, cuda

# Images, kernels and settings.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((2, 5, 9, 11), (5, 1, 3, 3), {"groups": 5, "padding": 1}),
    "multiples": ((2, 3, 12, 7), (6, 1, 3, 3), {"groups": 3, "padding": (0, 1)}),
    "channels of a group": ((2, 6, 10, 9), (9, 2, 3, 3), {"groups": 3, "padding": 1}),
    "one group": ((2, 3, 9, 8), (16, 3, 3, 2), {}),
    "stride": ((2, 4, 17, 15), (4, 1, 3, 3), {"groups": 4, "padding": 1, "stride": 2}),
    "strides": ((1, 3, 20, 23), (3, 1, 3, 2), {"groups": 3, "stride": (1, 3), "padding": (1, 0)}),
    "dilation": ((1, 3, 15, 14), (3, 1, 3, 3), {"groups": 3, "padding": 2, "dilation": 2}),
    "dilated columns": ((1, 3, 12, 14), (3, 1, 3, 3), {"groups": 3, "padding": (1, 3), "dilation": (1, 3)}),
    "stride and dilation": ((1, 2, 19, 18), (2, 1, 3, 3), {"groups": 2, "stride": (2, 4), "dilation": (3, 2)}),
    "5x5": ((1, 2, 12, 13), (2, 1, 5, 5), {"groups": 2, "padding": 2}),
    "7x7": ((1, 2, 14, 15), (2, 1, 7, 7), {"groups": 2, "padding": 3}),
    "9x9": ((1, 2, 17, 11), (2, 1, 9, 9), {"groups": 2, "padding": 4}),
    "19 rows of taps": ((1, 2, 25, 5), (2, 1, 19, 2), {"groups": 2, "padding": (6, 0)}),
    "small planes": ((3, 40, 7, 7), (40, 1, 3, 3), {"groups": 40, "padding": 1}),
    "wide": ((1, 2, 10, 150), (2, 1, 3, 3), {"groups": 2, "padding": 1}),
    "tall": ((2, 2, 300, 3), (2, 1, 3, 3), {"groups": 2, "padding": 1}),
    "a row": ((2, 5, 1, 300), (5, 1, 1, 4), {"groups": 5, "padding": (0, 3)}),
    "a column": ((2, 5, 300, 1), (5, 1, 4, 1), {"groups": 5, "padding": (3, 0)}),
    "few rows": ((2, 3, 5, 9), (3, 1, 3, 3), {"groups": 3}),
    "rows of one strip and one more": ((1, 2, 11, 9), (2, 1, 3, 3), {"groups": 2}),
    "many images": ((260, 1, 2, 2), (1, 1, 2, 2), {}),
    "nothing but padding": ((1, 2, 2, 2), (2, 1, 2, 2), {"groups": 2, "padding": 4, "stride": 3}),
    "too large a patch": ((1, 1, 101, 2), (1, 1, 2, 2), {"dilation": (100, 1)}),
    "no image": ((0, 3, 5, 5), (3, 1, 3, 3), {"groups": 3}),
    "no channel": ((2, 0, 5, 5), (0, 0, 3, 3), {}),
    "no filter": ((1, 3, 5, 5), (0, 1, 3, 3), {"groups": 3}),
}
# On either side of what goes by the matrix product: filters of a group, channels of it, and pairs of both.
EDGES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "16 filters": ((1, 4, 9, 9), (32, 2, 3, 2), {"groups": 2, "padding": 1}),
    "17 filters": ((1, 4, 9, 9), (34, 2, 3, 2), {"groups": 2, "padding": 1}),
    "16 channels": ((1, 32, 9, 9), (4, 16, 3, 2), {"groups": 2, "padding": 1}),
    "17 channels": ((1, 34, 9, 9), (4, 17, 3, 2), {"groups": 2, "padding": 1, "stride": (2, 1)}),
    "64 pairs": ((1, 16, 9, 9), (16, 8, 3, 2), {"groups": 2, "padding": 1}),
    "65 pairs": ((1, 10, 9, 9), (26, 5, 3, 2), {"groups": 2, "padding": 1}),
    "many": ((2, 20, 9, 7), (20, 20, 3, 3), {"padding": 1, "stride": 2}),
}


def images(case: str, dtype: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Images, kernels, a gradient of the result and the settings."""
    x_shape, w_shape, settings = (CASES | EDGES)[case]
    steps = pairs(settings)
    x, w = normal(x_shape, dtype, 1), normal(w_shape, dtype, 2)
    shape = oracle("mitchell_conv2d", x, w, **steps, multiplier=PLAIN).shape
    return x, w, normal(shape, dtype, 3), steps


@pytest.mark.parametrize("case", CASES | EDGES)
def test_depthwise_is_within_tolerance(gpu: Any, case: str) -> None:
    for dtype in FLOATS.values() if case in ("3x3", "multiples") else (F32,):
        x, w, dy, steps = images(case, dtype)
        check_conv2d(gpu, x, w, **steps)
    check_conv2d(gpu, turned(x), turned(w), out=gpu.put(turned(dy)), **steps)
    # Channels together in one of them alone.
    check_conv2d(gpu, turned(x), w, **steps)
    check_conv2d(gpu, x, w, out=gpu.put(turned(dy)), **steps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES | EDGES)
def test_depthwise_gradients_are_within_tolerance(
    gpu: Any, case: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in FLOATS.values() if case in ("3x3", "multiples") else (F32,):
        *operands, steps = images(case, dtype)
        check_conv2d_grad(gpu, monkeypatch, *operands, mode=mode, **steps)
    x, w, dy = operands
    check_conv2d_grad(gpu, monkeypatch, *map(turned, operands), mode=mode, **steps)
    check_conv2d_grad(gpu, monkeypatch, turned(x), w, dy, mode=mode, **steps)
    check_conv2d_grad(gpu, monkeypatch, x, w, turned(dy), mode=mode, **steps)


@pytest.mark.parametrize("kind", MULTIPLIERS)
def test_depthwise_of_every_multiplier_is_within_tolerance(
    gpu: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplier = Multiplier(**MULTIPLIERS[kind])
    # The last by the matrix product.
    for case in ("channels of a group", "stride", "many"):
        for dtype in (F32, FLOATS["f64"], FLOATS["f16"]) if case != "many" else (F32,):
            x, w, dy, steps = images(case, dtype)
            check_conv2d(gpu, x, w, multiplier=multiplier, **steps)
            for mode in MODES if dtype is F32 else ("exact", "mimic"):
                check_conv2d_grad(gpu, monkeypatch, x, w, dy, multiplier=multiplier, mode=mode, **steps)


def test_depthwise_of_any_strides(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, dy, steps = images("channels of a group", F32)
    apart = np.zeros((2, 12, 30, 18), F32)
    apart[:, ::2, 1::3, ::2] = x
    for image, kernel, upper in (
        (apart[:, ::2, 1::3, ::2], w, dy),
        (x[:, ::-1, ::-1], w[:, :, ::-1, ::-1], dy[..., ::-1]),
        (np.broadcast_to(x[:, :1], x.shape), np.broadcast_to(w[:1], w.shape), np.broadcast_to(F32.type(0.5), dy.shape)),
    ):
        check_conv2d(gpu, image, kernel, **steps)
        for mode in MODES:
            check_conv2d_grad(gpu, monkeypatch, image, kernel, upper, mode=mode, **steps)


def test_depthwise_of_offsets_beyond_32_bits(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images, channels and rows that lie far apart in memory of which few pages are touched."""
    try:
        memory = np.zeros(2**33 + 2**20, np.int8)
    except MemoryError:
        pytest.skip("8 GiB of address space are not to be had")
    x, w, dy, steps = images("3x3", F32)
    small = tuple(a[:2, :2, :5, :6] for a in (x, w, dy))
    settings = steps | {"groups": 2}
    far = 2**33 + 2**18  # bytes
    for axis in range(3):
        strides = [1 << 14, 1 << 12, 1 << 8]
        strides[axis] = far // 4 if axis == 2 else far
        for at in (0, 2):
            operands = [a.copy() for a in small]
            shape = operands[at].shape
            view = np.lib.stride_tricks.as_strided(memory.view(F32), shape, (*strides, 4))
            view[...] = operands[at]
            operands[at] = view
            if at == 0:
                check_conv2d(shim, *operands[:2], **settings)
            check_conv2d_grad(shim, monkeypatch, *operands, **settings)
            view[...] = 0


# --- against the matrix product ----------------------------------------------------------------------------------------------


def exact(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    """Numbers of which some hundred products add up without rounding, in any order."""
    rng = np.random.default_rng(seed)
    return (rng.choice([-1.0, 1.0, 0.0], shape, p=[0.45, 0.45, 0.1]) * rng.choice([1.0, 1.5, 2.0, 3.0], shape)).astype(
        dtype
    )


def among(x: Any, axis: int, groups: int, count: int, seed: int) -> Any:
    """The channels or filters of each group, with others after them, `count` in all."""
    parts = []
    for i, part in enumerate(np.split(x, groups, axis)):
        shape = list(part.shape)
        shape[axis] = count - part.shape[axis]
        parts.append(np.concatenate([part, exact(tuple(shape), x.dtype, seed + i)], axis))
    return np.concatenate(parts, axis)


def of_groups(x: Any, axis: int, groups: int, count: int) -> Any:
    """The first `count` of each group."""
    parts = [part.take(range(count), axis) for part in np.split(x, groups, axis)]
    return np.concatenate(parts, axis)


@pytest.mark.parametrize("kind", ["plain", "equation", "k1"])
@pytest.mark.parametrize("case", ["3x3", "multiples", "channels of a group", "stride", "dilation"])
def test_depthwise_has_the_bits_of_the_matrix_product(
    gpu: Any, case: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no sum is rounded: the order of terms is another one."""
    x_shape, w_shape, settings = CASES[case]
    steps, multiplier = pairs(settings), Multiplier(**MULTIPLIERS[kind])
    groups, channels, filters = steps["groups"], w_shape[1], w_shape[0] // steps["groups"]
    for dtype, values in ((F32, (None, np.inf, np.nan)), (FLOATS["f16"], (None,))):
        x, w = exact(x_shape, dtype, 1), exact(w_shape, dtype, 2)
        dy = exact(oracle("mitchell_conv2d", x, w, **steps, multiplier=PLAIN).shape, dtype, 3)
        for value in values:
            given = [x.copy(), w.copy(), dy.copy()]
            if value is not None:
                for operand in given:
                    operand.flat[[0, -1]] = value
            options = {"multiplier": multiplier, **steps}
            y = made_by(gpu, "mitchell_conv2d", monkeypatch, *given[:2], **options)[0]
            more = among(given[1], 0, groups, 17, 5)
            assert_same_bits(
                y,
                of_groups(
                    made_by(gpu, "mitchell_conv2d", monkeypatch, given[0], more, **options)[0], 1, groups, filters
                ),
            )
            for mode in MODES:
                options["mode"] = mode
                dx, dw = made_by(gpu, "mitchell_conv2d_grad", monkeypatch, *given, **options)
                wide = among(given[0], 1, groups, 17, 5), among(given[1], 1, 1, 17, 6), given[2]
                found = made_by(gpu, "mitchell_conv2d_grad", monkeypatch, *wide, **options)[0]
                assert_same_bits(dx, of_groups(found, 1, groups, channels))
                wide = given[0], among(given[1], 0, groups, 65, 7), among(given[2], 1, groups, 65, 8)
                found = made_by(gpu, "mitchell_conv2d_grad", monkeypatch, *wide, **options)[1]
                assert_same_bits(dw, of_groups(found, 0, groups, filters))


def test_depthwise_of_many_images_is_that_of_each(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, whatever a block's other planes hold, and in a second call."""
    x, w, dy, steps = images("small planes", F32)
    x[1, 3, 2, 2], dy[1, 4, 0, 0] = np.inf, np.nan
    y = made_by(gpu, "mitchell_conv2d", monkeypatch, x, w, **steps)[0]
    dx, dw = made_by(gpu, "mitchell_conv2d_grad", monkeypatch, x, w, dy, **steps)
    for i in (0, 2):
        one = slice(i, i + 1)
        assert_same_bits(made_by(gpu, "mitchell_conv2d", monkeypatch, x[one], w, **steps)[0], y[one])
        assert_same_bits(made_by(gpu, "mitchell_conv2d_grad", monkeypatch, x[one], w, dy[one], **steps)[0], dx[one])
    assert_same_bits(made_by(gpu, "mitchell_conv2d_grad", monkeypatch, x, w, dy, **steps)[1], dw)


@pytest.mark.parametrize("name", [n for n in ("f16", "bf16") if n in FLOATS])
def test_depthwise_of_subnormal_operands(gpu: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them in turn, beside numbers that make the result a normal one."""
    rng = np.random.default_rng(1)
    small, large = (2.0**-16, 2.0**10) if name == "f16" else (2.0**-129, 2.0**20)
    steps = pairs({"groups": 3, "padding": 1})
    for at in range(3):
        operands = []
        for i, shape in enumerate(((1, 3, 6, 5), (3, 1, 3, 3), (1, 3, 6, 5))):
            x = rng.uniform(1.0, 2.0, shape) * (small if i == at else large if (i - at) % 3 == 1 else 1.0)
            operands.append(x.astype(FLOATS[name]))
        for options in ({"subnormals": "flush"}, {}):
            multiplier = Multiplier(**options)
            if at == 0:
                check_conv2d(gpu, *operands[:2], multiplier=multiplier, **steps)
            for mode in MODES:
                check_conv2d_grad(gpu, monkeypatch, *operands, multiplier=multiplier, mode=mode, **steps)


@pytest.mark.parametrize("kind", ["plain", "negative", "min-mse", "segments-4", "equation", "k1"])
def test_depthwise_gradients_near_overflow(gpu: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One term each: what the dtype holds is finite."""
    options = {"multiplier": Multiplier(**MULTIPLIERS[kind])}
    for dtype, huge in ((F32, 2.0**127), (FLOATS["f64"], 2.0**1023)):
        rng = np.random.default_rng(1)
        for w_size, dy_size in ((huge, 1.0), (1.0, huge), (1 / huge, huge), (huge / 8, 4.0), (4.0, huge / 8)):
            x, w, dy = (
                (rng.uniform(1.0, 1.99, shape) * size * rng.choice([-1, 1], shape)).astype(dtype)
                for shape, size in (((1, 1, 9, 7), 1.0), ((1, 1, 1, 1), w_size), ((1, 1, 9, 7), dy_size))
            )
            got = made_by(gpu, "mitchell_conv2d_grad", monkeypatch, x, w, dy, **options)[0]
            with np.errstate(over="ignore"):
                want = oracle("mitchell_conv2d_grad", x, w, dy, **pairs({}), mode="exact", **options)[0]
            size = np.abs(np.where(np.isfinite(want), want, 0).astype(np.float64))
            close(got, want, tolerance.gradient(size, 1, dtype))


def test_depthwise_results_go_where_they_are_wanted(gpu: Any) -> None:
    x, w, dy, steps = images("multiples", F32)
    out = np.full((*dy.shape[:3], 2 * dy.shape[3]), 7, F32)
    if isinstance(gpu, Shim):
        cuda.mitchell_conv2d(Fake(x), Fake(w), out=Fake(out[..., ::2]), **steps, stream=1)
        assert (out[..., 1::2] == 7).all()
        check_conv2d(gpu, x, w, out=gpu.put(out[..., ::2]), **steps)


def test_the_benchmark_checks_its_convolutions(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """On small ones: the limit by memory is reported of those in groups alone, and a wrong result stops it."""
    torch = pytest.importorskip("torch")
    path = Path(__file__).parents[1] / "bench" / "bench_cuda.py"
    spec = importlib.util.spec_from_file_location("bench_cuda", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    scale = [1.0]

    def through(name: str) -> Any:
        function = getattr(cuda, name)

        def called(*tensors: Any, out: Any = None, **options: Any) -> Any:
            found = function(*(Fake(x.numpy()) for x in tensors), **options, stream=1)
            made = [scale[0] * torch.from_numpy(shim.get(x)) for x in (found if isinstance(found, tuple) else (found,))]
            return tuple(made) if isinstance(found, tuple) else made[0]

        return called

    for name in ("mitchell_conv2d", "mitchell_conv2d_grad"):
        monkeypatch.setattr(cuda, name, through(name))
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device: randn(*shape))
    monkeypatch.setattr(bench, "product_rate", lambda: 1.0)

    def once(functions: dict[str, Any], _: int) -> dict[str, float]:
        for function in functions.values():
            function()
        return dict.fromkeys(functions, 1.0)

    monkeypatch.setattr(bench, "milliseconds", once)
    cases = {x_shape[1] // w_shape[1] for x_shape, w_shape, _ in bench.CONVOLUTIONS}
    assert {1, 32, 672} <= cases
    monkeypatch.setattr(bench, "CONVOLUTIONS", (((1, 3, 7, 6), (4, 3, 3, 3), 1), ((2, 4, 7, 6), (4, 1, 3, 3), 2)))
    report = bench.Report()
    bench.convolutions(report, 100.0, 1)
    assert len(report.rows) == 8
    assert ["share of copy bandwidth" in row for row in report.rows] == [False] * 4 + [True] + [False] * 3
    assert all("speed against torch conv2d (exact, no TF32)" in report.rows[i] for i in (0, 4))
    scale[0] = 1.5
    with pytest.raises(AssertionError, match="wrong result"):
        bench.convolutions(report, 100.0, 1)
