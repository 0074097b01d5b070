# SPDX-License-Identifier: BSD-3-Clause
"""Nystrom attention of fastops.cuda against the reference in float64: on the CPU as fibers, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerance
from gpu_arrays import Fake, Shim
from quadratic import wide
from samples import FLOATS, assert_same_bits
from test_cuda_attention import full_of_nan, misaligned, through_torch

from fastops import attention as cpu
from fastops import cuda, reference

F32 = FLOATS["f32"]
NAMES = tuple(name for name in FLOATS if name != "f64")
every_dtype = pytest.mark.parametrize("name", NAMES)
solvers = pytest.mark.parametrize("pinv", ["newton", "ridge"])


@pytest.fixture
def gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where kernels run; new arrays are full of nan, so that what is not written shows."""
    if isinstance(gpu, Shim):
        full_of_nan(gpu, monkeypatch)
    monkeypatch.setattr(cpu, "_backend", reference)
    return gpu


@pytest.fixture
def shim(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> Shim:
    """Likewise."""
    full_of_nan(shim, monkeypatch)
    return shim


@pytest.fixture
def torch_on(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch, and the device of its tensors."""
    return through_torch(gpu, monkeypatch, "nystrom_attention", "nystrom_attention_backward")


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

    return [wide(x) for x in arrays], {key: moved(x) for key, x in options.items() if key != "tf32"}


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
    bound = bound or (tolerance.NYSTROM_TF32 if options.get("tf32") else tolerance.nystrom(got.dtype))
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
    (1, 1, 1, 66, 20, 130, 136, 8),
]


@solvers
@every_dtype
def test_rows_are_the_definition(gpu: Any, name: str, pinv: str) -> None:
    for seed, (*sizes, landmarks) in enumerate(SIZES):
        check(gpu, arrays_of(seed, *sizes, name), num_landmarks=landmarks, pinv=pinv)


def conditions(seed: int, b: int, h: int, heads: int, n: int, m: int, d: int) -> dict[str, dict[str, Any]]:
    """What a call may have beside its arrays."""
    rng = np.random.default_rng(seed)
    mask = rng.random((b, m)) < 0.7
    mask[:, :8] = True
    # One sample with fewer keys than landmarks, and one without any.
    few = mask.copy()
    few[0] = np.arange(m) == 3
    few[-1] = False
    marks = [rng.standard_normal((b, count, 9, d)).astype(F32) for count in (h, heads)]
    found: dict[str, dict[str, Any]] = {
        "mask": {"key_mask": mask, "scale": -0.4},
        "few keys": {"key_mask": few, "normalize": True},
        "divided": {"key_mask": mask, "normalize": True},
        "landmarks": {"landmarks": tuple(marks), "key_mask": few},
        "landmarks of halves": {"landmarks": tuple(x.astype(np.float16) for x in marks), "normalize": True},
        "batch": {"init": "batch", "key_mask": few},
    }
    if n == m:
        taps = rng.standard_normal((h, 5)).astype(F32)
        found["taps"] = {"conv_weight": taps, "key_mask": few}
        found["taps of doubles"] = {"conv_weight": rng.standard_normal((h, 2 * n + 3))}
    return found


@every_dtype
@pytest.mark.parametrize("kind", conditions(0, 2, 2, 1, 9, 9, 1))
def test_conditions_are_within_tolerance(gpu: Any, kind: str, name: str) -> None:
    for seed, (n, m) in enumerate(((70, 70), (30, 81))):
        sizes = (2, 4, 2, n, m, 12)
        options = conditions(seed, *sizes)
        if kind in options:
            # The closed form has no coefficient to begin with.
            solver = "ridge" if n != m and kind != "batch" else "newton"
            check(gpu, arrays_of(seed, *sizes, 9, name), num_landmarks=7, pinv=solver, **options[kind])


@solvers
def test_tf32_is_within_its_tolerance(gpu: Any, pinv: str) -> None:
    for seed, (*sizes, landmarks) in enumerate(SIZES):
        check(gpu, arrays_of(seed, *sizes), num_landmarks=landmarks, pinv=pinv, tf32=True)
    arrays = arrays_of(5, 2, 4, 2, 70, 70, 12, 9)
    for given in conditions(5, 2, 4, 2, 70, 70, 12).values():
        check(gpu, arrays, num_landmarks=7, pinv="newton" if "init" in given else pinv, tf32=True, **given)


def test_tf32_rounds_elements_alone(gpu: Any) -> None:
    """With elements that TF32 holds the result has the error of float32: landmarks, weights and what lies between are not rounded."""
    arrays = [x.astype(np.float16).astype(F32) for x in arrays_of(21, 1, 2, 1, 150, 150, 40, 33)]
    exact, fast = (
        gpu.get(cuda.nystrom_attention(*map(gpu.put, arrays), **put(gpu, {"num_landmarks": 16}), tf32=x))
        for x in (False, True)
    )
    assert (exact != fast).any()
    want = cpu.nystrom_attention(*in_float64(arrays, {})[0], num_landmarks=16)
    for got in (exact, fast):
        assert distance(got, want) <= tolerance.nystrom(np.dtype(F32))


def test_tf32_takes_elements_as_tf32_holds_them(gpu: Any) -> None:
    """In results and gradients: weights that are computed anew are the same again."""
    marks = tuple(arrays_of(24, 1, 2, 1, 9, 9, 12, 1)[:2])
    arrays = [*arrays_of(25, 1, 2, 1, 70, 90, 12, 9), arrays_of(26, 1, 2, 1, 70, 1, 9, 1)[0]]
    # To 10 bits of fraction, ties away from zero.
    rounded = [(x.view(np.uint32) + 0x1000 & 0xFFFFE000).astype(np.uint32).view(F32) for x in arrays]
    assert all((x != y).any() for x, y in zip(arrays, rounded, strict=True))
    options = {"landmarks": marks, "normalize": True, "tf32": True}
    want, got = (gpu.get(cuda.nystrom_attention(*map(gpu.put, x[:3]), **put(gpu, options))) for x in (rounded, arrays))
    assert_same_bits(got, want)
    want, got = (gradients(gpu, x[3], x[:3], **options) for x in (rounded, arrays))
    for x, y in zip(got, want, strict=True):
        assert_same_bits(x, y)


def test_halves_are_the_same_with_tf32(gpu: Any) -> None:
    for name in ("f16", "bf16"):
        arrays = arrays_of(22, 1, 2, 1, 70, 70, 8, 5, name)
        plain, asked = (
            gpu.get(cuda.nystrom_attention(*map(gpu.put, arrays), **put(gpu, {"num_landmarks": 6}), tf32=x))
            for x in (False, True)
        )
        assert_same_bits(asked, plain)


@pytest.mark.parametrize("tf32", [False, True])
def test_sums_over_many_keys_do_not_drift(gpu: Any, tf32: bool) -> None:
    """The tensor cores round every step towards zero: of ones a mean would fall below 1 as the keys grow many."""
    q, k, v = arrays_of(23, 1, 1, 1, 8, 16384, 4, 3)
    options = {"num_landmarks": 8, "tf32": tf32}
    y = gpu.get(cuda.nystrom_attention(*map(gpu.put, (q, k, np.ones_like(v))), **put(gpu, options)))
    assert abs(wide(y) - 1.0).max() <= tolerance.nystrom(y.dtype)


@pytest.mark.parametrize("iterations", [0, 1, 3, 8, 12])
def test_any_number_of_steps(gpu: Any, iterations: int) -> None:
    bound = tolerance.NYSTROM_LONG if iterations > 7 else 0.0
    for landmarks in (9, 66):
        check(gpu, arrays_of(3, 1, 2, 1, 90, 90, 8, 5), bound, num_landmarks=landmarks, iterations=iterations)


def test_keys_in_many_parts_are_the_definition(gpu: Any) -> None:
    check(gpu, arrays_of(4, 1, 1, 1, 70, 600, 64, 64), num_landmarks=64)


def test_padding_changes_no_bit(gpu: Any) -> None:
    q, k, v = arrays_of(5, 2, 2, 1, 60, 60, 8, 5)
    mask = np.zeros((2, 60), bool)
    mask[:, :47] = True
    rows = [x[:, :, :47] for x in (q, k, v)]
    want = gpu.get(cuda.nystrom_attention(*map(gpu.put, rows), **put(gpu, {"num_landmarks": 6})))
    for x in (q, k, v):
        x[:, :, 47:] = np.nan
    got = gpu.get(cuda.nystrom_attention(*map(gpu.put, (q, k, v)), **put(gpu, {"num_landmarks": 6, "key_mask": mask})))
    assert_same_bits(np.ascontiguousarray(got[:, :, :47]), want)
    assert not got[:, :, 47:].any()


def test_what_is_not_finite_stays_in_its_head(gpu: Any) -> None:
    arrays = arrays_of(6, 2, 2, 2, 70, 70, 8, 5)
    want = check(gpu, arrays, num_landmarks=6)
    arrays[1][0, 1, 3] = np.nan
    arrays[2][1, 0, 5] = np.inf
    got = gpu.get(cuda.nystrom_attention(*map(gpu.put, arrays), **put(gpu, {"num_landmarks": 6})))
    assert np.isnan(got[0, 1]).all()
    assert not np.isfinite(got[1, 0]).any()
    for at in ((0, 0), (1, 1)):
        assert_same_bits(got[at], want[at])


def views_of(arrays: list[Any]) -> dict[str, list[Any]]:
    turned = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
    return {
        "heads and tokens exchanged": [x.swapaxes(1, 2) for x in turned],
        "columns apart": [np.asfortranarray(x) for x in arrays],
        "every other row": [np.repeat(x, 2, axis=2)[:, :, ::2] for x in arrays],
        "not aligned": [np.concatenate([x[..., :1], x], axis=-1)[..., 1:] for x in arrays],
    }


@every_dtype
def test_layouts_and_strides_change_no_bit(gpu: Any, name: str) -> None:
    arrays = arrays_of(7, 2, 4, 2, 70, 90, 16, 8, name)
    want = check(gpu, arrays, num_landmarks=6)
    turned = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
    assert_same_bits(check(gpu, turned, num_landmarks=6, layout="bnhd"), np.ascontiguousarray(want.swapaxes(1, 2)))
    for given in views_of(arrays).values():
        got = gpu.get(cuda.nystrom_attention(*map(gpu.put, given), **put(gpu, {"num_landmarks": 6})))
        assert_same_bits(got, want)


def test_leading_dimensions_are_any(gpu: Any) -> None:
    arrays = arrays_of(8, 6, 2, 1, 20, 20, 4, 3)
    mask = np.random.default_rng(8).random((6, 20)) < 0.8
    marks = tuple(np.random.default_rng(9).standard_normal((6, h, 5, 4)).astype(F32) for h in (2, 1))
    options = {"key_mask": mask, "landmarks": marks}
    want = gpu.get(cuda.nystrom_attention(*map(gpu.put, arrays), **put(gpu, options)))

    def split(x: Any) -> Any:
        return x.reshape(2, 3, *x.shape[1:])

    def crossed(x: Any) -> Any:
        """A batch that cannot be walked as one."""
        return np.ascontiguousarray(split(x).swapaxes(0, 1)).swapaxes(0, 1)

    for way in (split, crossed):
        given = {"key_mask": way(mask), "landmarks": tuple(map(split, marks))}
        y, info = cuda.nystrom_attention(*(gpu.put(way(x)) for x in arrays), **put(gpu, given), return_info=True)
        assert_same_bits(gpu.get(y), split(want))
        assert gpu.get(info.residual).shape == (2, 3, 2)
    single = {"num_landmarks": 5, "key_mask": mask[0]}
    y, info = cuda.nystrom_attention(*(gpu.put(x[0, 0]) for x in arrays), **put(gpu, single), return_info=True)
    whole = cuda.nystrom_attention(*(gpu.put(x[:1, :1]) for x in arrays), **put(gpu, single | {"key_mask": mask[:1]}))
    assert_same_bits(gpu.get(y), gpu.get(whole)[0, 0])
    assert gpu.get(info.coefficient).shape == ()


def test_results_go_where_they_shall(gpu: Any) -> None:
    arrays = arrays_of(10, 1, 2, 1, 70, 70, 8, 5)
    want = gpu.get(cuda.nystrom_attention(*map(gpu.put, arrays), **put(gpu, {"num_landmarks": 6})))
    room = gpu.empty((1, 2, 70, 5), np.dtype(F32))
    y = cuda.nystrom_attention(*map(gpu.put, arrays), **put(gpu, {"num_landmarks": 6}), out=room)
    assert y is room
    assert_same_bits(gpu.get(room), want)


def test_empty_arrays(gpu: Any) -> None:
    for sizes in ((0, 2, 1, 9, 9, 4, 3), (2, 2, 1, 0, 9, 4, 3), (2, 2, 1, 9, 0, 4, 3), (1, 0, 0, 9, 9, 4, 3)):
        q, k, v = map(gpu.put, arrays_of(11, *sizes))
        y, info = cuda.nystrom_attention(q, k, v, **gpu.options, num_landmarks=2, return_info=True)
        assert gpu.get(y).shape == (*sizes[:2], sizes[3], 3)
        assert not gpu.get(y).any()
        assert np.isnan(gpu.get(info.residual)).all()


# --- gradients ---------------------------------------------------------------------------------------------------------------


def gradients(gpu: Any, dy: Any, arrays: list[Any], **options: Any) -> list[Any]:
    found = cuda.nystrom_attention_backward(gpu.put(dy), *map(gpu.put, arrays), **put(gpu, options))
    flat = [*found[:-1], *found[-1]] if isinstance(found[-1], tuple) else list(found)
    return [gpu.get(x) for x in flat]


def check_gradients(gpu: Any, seed: int, arrays: list[Any], **options: Any) -> list[Any]:
    """Each gradient of a random loss."""
    q, v = arrays[0], arrays[2]
    dy = np.random.default_rng(seed + 100).standard_normal((*q.shape[:-1], v.shape[-1])).astype(q.dtype)
    found = gradients(gpu, dy, arrays, **options)
    exact, given = in_float64(arrays, options)
    want = cpu.nystrom_attention_backward(wide(dy), *exact, **given)
    flat = [*want[:-1], *want[-1]] if isinstance(want[-1], tuple) else list(want)
    for i, (got, exact_one) in enumerate(zip(found, flat, strict=True)):
        assert got.shape == exact_one.shape
        assert got.dtype == (q.dtype if i < 3 else F32)
        bound = tolerance.nystrom_gradient(got.dtype) + (2 * tolerance.NYSTROM_TF32 if options.get("tf32") else 0.0)
        assert distance(got, exact_one) <= bound, (i, distance(got, exact_one), options)
    return found


@solvers
@every_dtype
def test_gradients_are_the_definition(gpu: Any, name: str, pinv: str) -> None:
    for seed, (*sizes, landmarks) in enumerate(SIZES):
        check_gradients(gpu, seed, arrays_of(seed, *sizes, name), num_landmarks=landmarks, pinv=pinv)


@every_dtype
@pytest.mark.parametrize("kind", conditions(0, 2, 2, 1, 9, 9, 1))
def test_gradients_under_conditions_are_within_tolerance(gpu: Any, kind: str, name: str) -> None:
    for seed, (n, m) in enumerate(((70, 70), (30, 81))):
        sizes = (2, 4, 2, n, m, 12)
        options = conditions(seed, *sizes)
        if kind in options:
            solver = "ridge" if n != m and kind != "batch" else "newton"
            given = options[kind] | {"return_d_landmarks": "landmarks" in options[kind]}
            check_gradients(gpu, seed, arrays_of(seed, *sizes, 9, name), num_landmarks=7, pinv=solver, **given)


@solvers
def test_gradients_in_tf32_are_within_its_tolerance(gpu: Any, pinv: str) -> None:
    for seed, (*sizes, landmarks) in enumerate(SIZES):
        check_gradients(gpu, seed, arrays_of(seed, *sizes), num_landmarks=landmarks, pinv=pinv, tf32=True)
    sizes = (2, 4, 2, 70, 70, 12)
    for given in conditions(5, *sizes).values():
        more = {"return_d_landmarks": "landmarks" in given, "pinv": "newton" if "init" in given else pinv}
        check_gradients(gpu, 5, arrays_of(5, *sizes, 9), num_landmarks=7, tf32=True, **given, **more)


@pytest.mark.parametrize("iterations", [0, 1, 12])
def test_gradients_of_any_number_of_steps(gpu: Any, iterations: int) -> None:
    for init in ("matrix", "batch"):
        options = {"num_landmarks": 6, "iterations": iterations, "init": init}
        check_gradients(gpu, 12, arrays_of(12, 1, 2, 1, 70, 70, 8, 5), **options)


def test_gradients_of_many_rows_are_the_definition(gpu: Any) -> None:
    """More than one part of the sums over keys and over queries."""
    check_gradients(gpu, 13, arrays_of(13, 1, 2, 1, 300, 300, 8, 66), num_landmarks=66, normalize=True)


@every_dtype
def test_layouts_and_strides_change_no_bit_of_gradients(gpu: Any, name: str) -> None:
    arrays = arrays_of(14, 2, 4, 2, 70, 90, 16, 8, name)
    dy = arrays_of(15, 2, 4, 2, 70, 90, 16, 8, name)[0][..., :8]
    want = gradients(gpu, dy, arrays, num_landmarks=6)
    turned = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (dy, *arrays)]
    for got, exact in zip(gradients(gpu, turned[0], turned[1:], num_landmarks=6, layout="bnhd"), want, strict=True):
        assert_same_bits(np.ascontiguousarray(got.swapaxes(1, 2)), exact)
    for given in views_of([dy, *arrays]).values():
        for got, exact in zip(gradients(gpu, given[0], given[1:], num_landmarks=6), want, strict=True):
            assert_same_bits(got, exact)
    single = gradients(gpu, dy[0, 0], [x[0, 0] for x in arrays], num_landmarks=6)
    first = gradients(gpu, dy[:1, :1], [x[:1, :1] for x in arrays], num_landmarks=6)
    for got, exact in zip(single, first, strict=True):
        assert_same_bits(got, exact[0, 0])


def test_gradients_of_hidden_rows_are_zero(gpu: Any) -> None:
    arrays = arrays_of(16, 2, 2, 1, 70, 70, 6, 5)
    mask = np.random.default_rng(16).random((2, 70)) < 0.6
    mask[1, 5:] = False
    taps = np.random.default_rng(17).standard_normal((2, 3)).astype(F32)
    dy = arrays_of(18, 2, 2, 1, 70, 70, 6, 5)[0][..., :5]
    for x in (*arrays, dy):
        x[~np.broadcast_to(mask[:, np.newaxis], x.shape[:3])] = np.nan
    found = gradients(gpu, dy, arrays, num_landmarks=7, key_mask=mask, conv_weight=taps)
    for x in found:
        assert np.isfinite(x).all()
    for x in found[:3]:
        assert not x[~np.broadcast_to(mask[:, np.newaxis], x.shape[:3])].any()


def test_hidden_keys_far_above_the_others_reach_no_gradient(gpu: Any) -> None:
    """What stands in their place has a logit of 0, whose weight beside logits of -88.72 would be infinite."""
    rng = np.random.default_rng(20)
    q, k = np.ones((1, 1, 40, 1), F32), np.full((1, 1, 40, 1), -88.72, F32)
    v, dy = (rng.standard_normal((1, 1, 40, 3)).astype(F32) for _ in range(2))
    mask = rng.random((1, 40)) < 0.7
    for landmarks in (7, 40):
        for x in gradients(gpu, dy, [q, k, v], num_landmarks=landmarks, key_mask=mask, scale=1.0):
            assert np.isfinite(x).all()


def test_more_steps_than_memory_holds_are_refused(shim: Shim) -> None:
    """Products of sizes must not wrap around."""
    x = on_gpu(1, 8, 1, 1)
    with pytest.raises(MemoryError):
        cuda.nystrom_attention_backward(x, x, x, x, num_landmarks=4096, iterations=2**31 - 1)


def test_gradients_of_empty_arrays(gpu: Any) -> None:
    for sizes in ((0, 2, 1, 9, 9, 4, 3), (2, 2, 1, 0, 9, 4, 3), (2, 2, 1, 9, 0, 4, 3), (1, 0, 0, 9, 9, 4, 3)):
        arrays = arrays_of(19, *sizes)
        n, m = sizes[3:5]
        more = {"conv_weight": np.ones((sizes[1], 3), F32)} if n == m else {}
        marks = np.ones((*sizes[:2], 2, 4), F32), np.ones((sizes[0], sizes[2], 2, 4), F32)
        for given in ({"num_landmarks": 2}, {"landmarks": marks, "return_d_landmarks": True}):
            for x in gradients(gpu, np.ones((*sizes[:2], n, 3), F32), arrays, **more, **given):
                assert not x.any()


# --- refusals ----------------------------------------------------------------------------------------------------------------


def on_gpu(*shape: int, dtype: Any = F32) -> Fake:
    return Fake(np.ones(shape, dtype))


def refused(kind: type[Exception], text: str, *arrays: Any, **options: Any) -> None:
    given = arrays or tuple(on_gpu(1, 2, 5, 4) for _ in range(3))
    with pytest.raises(kind, match=text):
        cuda.nystrom_attention(*given, **options)
    with pytest.raises(kind, match=text):
        cuda.nystrom_attention_backward(on_gpu(1, 2, 5, 4), *given, **options)


def test_arguments_that_do_not_fit_are_refused(shim: Shim) -> None:
    q = on_gpu(1, 2, 5, 4)
    refused(TypeError, r"^q must be an array on a GPU", np.ones((1, 2, 5, 4), F32), q, q)
    refused(TypeError, r"float16 or bfloat16 or float32, got float64", *(on_gpu(1, 2, 5, 4, dtype=float),) * 3)
    refused(ValueError, r"^k must be of shape \(1, H, N, 4\), got \(1, 2, 5, 3\)", q, on_gpu(1, 2, 5, 3), q)
    refused(ValueError, r"^num_landmarks must be ", num_landmarks=0)
    refused(ValueError, r"^num_landmarks must be .*, got 4097", num_landmarks=4097)
    refused(ValueError, r"^iterations must be ", iterations=-1)
    refused(ValueError, r"^pinv must be ", pinv="svd")
    refused(ValueError, r"^ridge must be None with pinv='newton'", ridge=0.1)
    refused(ValueError, r"^init must be 'matrix' with pinv='ridge'", pinv="ridge", init="batch")
    refused(NotImplementedError, r"^causal must be False, since the means of segments", causal=True)
    refused(TypeError, r"^tf32 must be ", tf32=1)
    refused(TypeError, r"^key_mask must be an array on a GPU", key_mask=np.ones((1, 5), bool))
    refused(TypeError, r"^key_mask must be of dtype bool .*, got float32", key_mask=on_gpu(1, 5))
    refused(ValueError, r"^key_mask must be of shape \(1, 5\), one for all", key_mask=on_gpu(1, 2, 5, dtype=bool))
    refused(ValueError, r"^conv_weight must be of shape \(2, taps\), taps odd", conv_weight=on_gpu(2, 4))
    turned = Fake(np.ones((3, 2), F32).T)
    refused(ValueError, r"^conv_weight must be C-contiguous on a GPU", conv_weight=turned)
    refused(TypeError, r"^conv_weight must be of dtype float16", conv_weight=on_gpu(2, 3, dtype=np.int32))
    refused(TypeError, r"^landmarks must be a tuple of two arrays", landmarks=on_gpu(1, 2, 3, 4))
    refused(ValueError, r"^landmarks must be two arrays, of q and of k, got 1", landmarks=(q,))
    refused(TypeError, r"^landmarks\[1\] must be an array on a GPU", landmarks=(q, np.ones((1, 2, 5, 4), F32)))
    pair = on_gpu(1, 2, 3, 4), on_gpu(1, 2, 2, 4)
    refused(ValueError, r"^landmarks\[1\] must be of shape \(1, 2, 3, 4\), got \(1, 2, 2, 4\)", landmarks=pair)
    with pytest.raises(TypeError, match=r"^return_info must be "):
        cuda.nystrom_attention(q, q, q, return_info=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^out must be of shape \(1, 2, 5, 4\), got"):
        cuda.nystrom_attention(q, q, q, out=on_gpu(2, 5, 4))
    with pytest.raises(ValueError, match=r"^out must be memory apart from q"):
        cuda.nystrom_attention(q, on_gpu(1, 2, 5, 4), on_gpu(1, 2, 5, 4), out=q)
    with pytest.raises(ValueError, match=r"^return_d_landmarks must be False without landmarks"):
        cuda.nystrom_attention_backward(q, q, q, q, return_d_landmarks=True)
    with pytest.raises(ValueError, match=r"^dy must be of shape \(1, 2, 5, 4\), got \(1, 2, 5, 3\)"):
        cuda.nystrom_attention_backward(on_gpu(1, 2, 5, 3), q, q, q)


def test_arrays_that_are_not_aligned_are_refused(shim: Shim) -> None:
    """Which the CPU reads, and a GPU ends the process's work for."""
    q, odd = on_gpu(1, 2, 5, 4), Fake(misaligned(1, 2, 5, 4))
    refused(ValueError, r"^k must be aligned to its elements", q, odd, q)
    refused(ValueError, r"^conv_weight must be aligned to its elements", conv_weight=Fake(misaligned(2, 3)))
    pair = on_gpu(1, 2, 3, 4), Fake(misaligned(1, 2, 3, 4))
    refused(ValueError, r"^landmarks\[1\] must be aligned to its elements", landmarks=pair)


# --- torch -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mask and taps", "landmarks", "tokens first"])
def test_torch_differentiates_on_the_gpu(torch_on: Any, kind: str) -> None:
    from fastops import torch as ft

    torch, device = torch_on
    arrays = arrays_of(30, 2, 4, 2, 40, 40, 8, 5)
    rng = np.random.default_rng(31)
    options: dict[str, Any] = {"num_landmarks": 6, "normalize": True}
    more: list[Any] = []
    if kind == "mask and taps":
        options["key_mask"] = rng.random((2, 40)) < 0.8
        more = [rng.standard_normal((4, 3))]
    elif kind == "landmarks":
        more = [rng.standard_normal((2, h, 6, 8)).astype(F32) for h in (4, 2)]
    else:
        options["layout"] = "bnhd"
        arrays = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
    leaves = [torch.tensor(x, device=device, requires_grad=True) for x in (*arrays, *more)]
    given = {key: torch.tensor(x, device=device) if isinstance(x, np.ndarray) else x for key, x in options.items()}
    extra = {"conv_weight": leaves[3]} if len(more) == 1 else {"landmarks": leaves[3:]} if more else {}
    y = ft.nystrom_attention(*leaves[:3], **given, **extra)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weight.to(device)).sum().backward()
    exact, wanted = in_float64(arrays, options)
    if more:
        wanted |= {"conv_weight": more[0]} if len(more) == 1 else {"landmarks": tuple(map(wide, more))}
        wanted |= {"return_d_landmarks": len(more) == 2}
    want = cpu.nystrom_attention_backward(wide(weight.numpy()), *exact, **wanted)
    flat = [*want[:-1], *want[-1]] if isinstance(want[-1], tuple) else list(want)
    for leaf, exact_one in zip(leaves, flat, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert distance(leaf.grad.cpu().numpy(), exact_one) <= tolerance.nystrom_gradient(np.dtype(F32))


def test_torch_says_what_the_gpu_has_not(torch_on: Any) -> None:
    from fastops import torch as ft

    torch, device = torch_on
    x = torch.ones(1, 1, 3, 2, device=device, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"^q must be of dtype float16 or bfloat16 or float32, got float64"):
        ft.nystrom_attention(x, x, x)


def test_torch_multiplies_in_tf32_where_its_own_products_do(torch_on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastops import torch as ft

    torch, device = torch_on
    x = torch.ones(1, 1, 3, 2, device=device, requires_grad=True)
    asked: list[bool] = []
    for name in ("nystrom_attention", "nystrom_attention_backward"):
        plain = getattr(cuda, name)
        monkeypatch.setattr(
            cuda,
            name,
            lambda *args, plain=plain, **options: (asked.append(options["tf32"]), plain(*args, **options))[1],
        )
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            ft.nystrom_attention(x, x, x, num_landmarks=1).sum().backward()
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked == [False, False, True, True]
