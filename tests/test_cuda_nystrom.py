# SPDX-License-Identifier: BSD-3-Clause
"""Nystrom attention of fastops.cuda against the reference in float64: on the CPU as fibers, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerance
from gpu_arrays import PLATFORMS, Fake, Shim, open_platform
from quadratic import wide
from samples import FLOATS, assert_same_bits
from test_cuda_attention import full_of_nan

from fastops import attention as cpu
from fastops import cuda, reference

F32 = FLOATS["f32"]
NAMES = tuple(name for name in FLOATS if name != "f64")
every_dtype = pytest.mark.parametrize("name", NAMES)
solvers = pytest.mark.parametrize("pinv", ["newton", "ridge"])


@pytest.fixture(params=PLATFORMS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where kernels run; new arrays are full of nan, so that what is not written shows."""
    found = open_platform(request.param, monkeypatch)
    if isinstance(found, Shim):
        full_of_nan(found, monkeypatch)
    monkeypatch.setattr(cpu, "_backend", reference)
    return found


@pytest.fixture
def shim(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels on the CPU, for what needs no GPU to be seen."""
    found = open_platform("shim", monkeypatch)
    full_of_nan(found, monkeypatch)
    return found


def arrays_of(seed: int, b: int, h: int, heads: int, n: int, m: int, d: int, e: int, name: str = "f32") -> list[Any]:
    rng = np.random.default_rng(seed)
    shapes = (b, h, n, d), (b, heads, m, d), (b, heads, m, e)
    return [rng.standard_normal(shape).astype(FLOATS[name]) for shape in shapes]


def put(gpu: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options whose arrays lie on the GPU."""

    def moved(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(gpu.put, x))
        return gpu.put(x) if isinstance(x, np.ndarray) else x

    return gpu.options | {key: moved(x) for key, x in options.items()}


def in_float64(arrays: list[Any], options: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    def moved(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(wide, x))
        return wide(x) if isinstance(x, np.ndarray) and x.dtype != bool else x

    return [wide(x) for x in arrays], {key: moved(x) for key, x in options.items()}


def distance(got: Any, want: Any) -> float:
    size = float(np.linalg.norm(want))
    return float(np.linalg.norm(wide(got) - want)) / (size if size else 1.0)


def check(gpu: Any, arrays: list[Any], bound: float = 0.0, **options: Any) -> Any:
    """The result head by head, so that none hides behind another, and what is told of them."""
    y, info = cuda.nystrom_attention(*map(gpu.put, arrays), **put(gpu, options), return_info=True)
    got = gpu.get(y)
    exact, given = in_float64(arrays, options)
    want, told = cpu.nystrom_attention(*exact, **given, return_info=True)
    assert got.shape == want.shape
    assert got.dtype == arrays[0].dtype
    bound = bound or tolerance.nystrom(got.dtype)
    heads = want.shape[:2] if options.get("layout") != "bnhd" else (want.shape[0], want.shape[2])
    for b, h in np.ndindex(*heads):
        at = (b, slice(None), h) if options.get("layout") == "bnhd" else (b, h)
        assert distance(got[at], want[at]) <= bound, (at, distance(got[at], want[at]), options)
    rest = tolerance.NYSTROM_TOLD * max(bound, tolerance.nystrom(np.dtype(F32)))
    for i, (part, of_info) in enumerate(zip(info, told, strict=True)):
        # A residual is a difference: its error is one of A.
        np.testing.assert_allclose(gpu.get(part), of_info, rtol=rest, atol=rest if i == 0 else 0)
    plain = cuda.nystrom_attention(*map(gpu.put, arrays), **put(gpu, options))
    assert_same_bits(gpu.get(plain), got)
    return got


# B, H, H_kv, N, M, D, E and the landmarks: on both sides of tiles of 64.
SIZES = [
    (1, 1, 1, 2, 2, 1, 1, 1),
    (2, 4, 2, 70, 9, 8, 5, 8),
    (1, 2, 1, 90, 150, 17, 66, 5),
    (1, 1, 1, 80, 80, 72, 8, 70),
]


@solvers
@every_dtype
def test_rows_are_the_definition(gpu: Any, name: str, pinv: str) -> None:
    for seed, (*sizes, landmarks) in enumerate(SIZES):
        check(gpu, arrays_of(seed, *sizes, name), num_landmarks=landmarks, pinv=pinv)
