# SPDX-License-Identifier: BSD-3-Clause
"""Every public function of arrays takes objects that have DLPack, or `__array_interface__`, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastops

f32 = np.float32


class Producer:
    """DLPack alone, in the version that can say that an array is read-only."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class OldProducer(Producer):
    """DLPack alone, in the version before."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        return self._array.__dlpack__()


class Interface:
    """`__array_interface__` alone."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.__array_interface__ = array.__array_interface__


class OnGpu(Producer):
    """An array in the memory of a device; to look at it would be an error."""

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("device memory was asked for")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).random(shape, f32) + f32(0.5)


A, B, DY = random(3, 4), random(4, 5), random(3, 5)
X, W = random(1, 2, 6, 6), random(3, 2, 3, 3)
Q, K, V = random(1, 2, 8, 4), random(1, 2, 8, 5)[..., :4].copy(), random(1, 2, 8, 3)
BYTES = np.arange(12, dtype=np.uint8).reshape(3, 4)
TABLE = np.multiply.outer(np.arange(256), np.arange(256)).astype(np.int32)
MASK = (np.arange(8) < 6)[np.newaxis]

Wrap = Callable[[np.ndarray], Any]
# Name of the first argument, and a call with every array wrapped.
READ: dict[str, tuple[str, Callable[[Wrap], Any]]] = {
    "mitchell_matmul": ("a", lambda w: fastops.mitchell_matmul(w(A), w(B))),
    "mitchell_matmul_grad": ("a", lambda w: fastops.mitchell_matmul_grad(w(A), w(B), w(DY))),
    "mitchell_conv2d": ("x", lambda w: fastops.mitchell_conv2d(w(X), w(W))),
    "mitchell_conv2d_grad": ("x", lambda w: fastops.mitchell_conv2d_grad(w(X), w(W), w(random(1, 3, 4, 4)))),
    "mitchell_mul_grad": ("a", lambda w: fastops.mitchell_mul_grad(w(A), w(A), w(A))),
    "mitchell_div_grad": ("a", lambda w: fastops.mitchell_div_grad(w(A), w(A), w(A))),
    "lut_matmul": ("a", lambda w: fastops.lut_matmul(w(BYTES), w(BYTES.T.copy()), w(TABLE))),
    "Multiplier.matmul": ("a", lambda w: fastops.Multiplier("min-mse").matmul(w(A), w(B))),
    "linear_attention": ("q", lambda w: fastops.linear_attention(w(Q), w(K), w(V), causal=True, decay=w(-random(2)))),
    "linear_attention masked": ("q", lambda w: fastops.linear_attention(w(Q), w(K), w(V), key_mask=w(MASK))),
    "linear_attention_backward": (
        "q",
        lambda w: fastops.linear_attention_backward(w(V), w(Q), w(K), w(V), w(fastops.linear_attention(Q, K, V))),
    ),
    "softmax_attention": ("q", lambda w: fastops.softmax_attention(w(Q), w(K), w(V))),
    "nystrom_attention": ("q", lambda w: fastops.nystrom_attention(w(Q), w(K), w(V), num_landmarks=4)),
    "nystrom_attention_backward": (
        "q",
        lambda w: fastops.nystrom_attention_backward(w(V), w(Q), w(K), w(V), num_landmarks=4),
    ),
    "optimal_offset": ("a", lambda w: fastops.optimal_offset("mul", w(A), w(A))),
}


def states(count: int) -> list[np.ndarray]:
    return [np.full((2, 3), 0.5 + i / 4, f32) for i in range(count)]


# The arrays, which of them are changed, and a call with each wrapped.
WRITTEN: dict[str, tuple[Callable[[], list[np.ndarray]], tuple[int, ...], Callable[..., Any]]] = {
    "ema_update_": (lambda: states(2), (0,), lambda s, p: fastops.ema_update_([s], [p], 0.9)),
    "ema_update_ alone": (lambda: states(2), (0,), lambda s, p: fastops.ema_update_(s, p, 0.9)),
    "sgd_step_": (lambda: states(3), (0, 2), lambda p, g, m: fastops.sgd_step_([p], [g], [m], lr=0.1, momentum=0.9)),
    "adamw_step_": (
        lambda: states(4),
        (0, 2, 3),
        lambda p, g, m, v: fastops.adamw_step_([p], [g], [m], [v], step=1, lr=0.1),
    ),
    "lazy_adamw_rows_": (
        lambda: states(4),
        (0, 2, 3),
        lambda p, g, m, v: fastops.lazy_adamw_rows_([p], [g], [m], [v], step=1, lr=0.1),
    ),
    "lookahead_sync_": (lambda: states(2), (0, 1), lambda s, p: fastops.lookahead_sync_([s], [p], 0.5)),
    "eg_step_": (lambda: states(2), (0,), lambda p, g: fastops.eg_step_([p], [g], lr=0.1)),
    "adaptive_eg_step_": (
        lambda: [*states(5), np.ones(1)],
        (0, 2, 3, 4, 5),
        lambda p, g, m, h, gain, scale: fastops.adaptive_eg_step_([p], [g], [m], [h], [gain], scale, lr=0.1),
    ),
    "EMA": (lambda: states(1), (), lambda p: fastops.EMA([p], decay=0.5).update([p])),
    "TensorList": (
        lambda: states(2),
        (0,),
        lambda s, p: fastops.ema_update_(fastops.TensorList([s]), fastops.TensorList([p]), 0.9),
    ),
    "linear_attention_step_": (
        lambda: [random(2, 4), random(2, 4), random(2, 3), np.zeros((2, 4, 3), f32), np.zeros((2, 4), f32)],
        (3, 4),
        lambda q, k, v, s, z: fastops.linear_attention_step_(q, k, v, (s, z)),
    ),
}
WRAPS = {"dlpack": Producer, "old dlpack": OldProducer, "array interface": Interface}


def values(result: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", READ)
def test_functions_read_bare_producers(name: str, wrap: str) -> None:
    _, call = READ[name]
    for got, wanted in zip(values(call(WRAPS[wrap])), values(call(lambda x: x)), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", READ)
def test_read_only_producers_are_read(name: str) -> None:
    def wrap(x: np.ndarray) -> Producer:
        x = x.copy()
        x.flags.writeable = False
        return Producer(x)

    _, call = READ[name]
    for got, wanted in zip(values(call(wrap)), values(call(lambda x: x)), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", READ)
def test_producers_on_a_device_are_refused_by_name(name: str) -> None:
    argument, call = READ[name]
    with pytest.raises(
        TypeError, match=rf"^{argument} must be .*in host memory.*, got an array on a GPU, which fastops.cuda takes$"
    ):
        call(OnGpu)


@pytest.mark.parametrize("wrap", ["dlpack", "array interface"])
@pytest.mark.parametrize("name", WRITTEN)
def test_in_place_functions_write_to_the_producers_memory(name: str, wrap: str) -> None:
    make, _, call = WRITTEN[name]
    plain, wrapped = make(), make()
    call(*plain)
    call(*map(WRAPS[wrap], wrapped))
    for got, wanted in zip(wrapped, plain, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", [name for name in WRITTEN if WRITTEN[name][1]])
def test_in_place_functions_refuse_read_only_memory(name: str, wrap: str) -> None:
    """A producer of old DLPack cannot say whether it may be written: it is taken as read-only."""
    make, changed, call = WRITTEN[name]
    for i in changed:
        arrays = make()
        before = [x.copy() for x in arrays]
        if wrap != "old dlpack":
            arrays[i].flags.writeable = False
        wrapped = [WRAPS[wrap](x) if j == i else x for j, x in enumerate(arrays)]
        with pytest.raises(ValueError, match="must be writable, got a read-only array"):
            call(*wrapped)
        for got, wanted in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", WRITTEN)
def test_in_place_functions_refuse_devices(name: str) -> None:
    make, _, call = WRITTEN[name]
    arrays = make()
    with pytest.raises(TypeError, match=r"must be .*in host memory.*got an array on a GPU"):
        call(OnGpu(arrays[0]), *arrays[1:])


class Bfloat16:
    """A capsule of code 4 and 16 bits over memory of 2-byte elements, as torch and jax export bfloat16."""

    def __init__(self, words: np.ndarray, versioned: bool) -> None:
        self.words, self.versioned = words, versioned

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        import ctypes

        if not self.versioned and options:
            raise TypeError("no such argument")
        capsule = self.words.__dlpack__(max_version=(1, 0)) if self.versioned else self.words.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        address = pointer(capsule, b"dltensor_versioned" if self.versioned else b"dltensor")
        # The byte of the type's code: after the data, the device and the number of dimensions.
        ctypes.c_uint8.from_address(address + (32 if self.versioned else 0) + 20).value = 4
        return capsule


@pytest.mark.parametrize("versioned", [True, False])
def test_bfloat16_of_dlpack_is_read_and_written(versioned: bool) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    if versioned and np.lib.NumpyVersion(np.__version__) < "2.1.0":
        pytest.skip("this NumPy exports no versioned capsule")
    wide = random(4, 6)
    half = wide.astype(ml_dtypes.bfloat16)
    words = half.view(np.uint16)
    for view in (words, words[::2, ::-1], words[:0], words.T):
        got = fastops.mitchell_matmul(Bfloat16(view, versioned), np.ones((view.shape[1], 2), ml_dtypes.bfloat16))
        wanted = fastops.mitchell_matmul(view.view(ml_dtypes.bfloat16), np.ones((view.shape[1], 2), ml_dtypes.bfloat16))
        np.testing.assert_array_equal(got, wanted)
    shadow, same = half.copy(), half.copy()
    step = {"rounding": "stochastic", "seed": 3}
    fastops.ema_update_([same], [wide], 0.5, **step)
    given = Bfloat16(shadow.view(np.uint16), versioned)
    if versioned:
        fastops.ema_update_([given], [wide], 0.5, **step)
        np.testing.assert_array_equal(shadow, same)
    else:
        with pytest.raises(ValueError, match="read-only"):
            fastops.ema_update_([given], [wide], 0.5, **step)


def test_memory_of_bfloat16_lives_as_long_as_the_array() -> None:
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    import gc
    import weakref

    from fastops import _validate

    class Words(np.ndarray):
        pass

    words = np.full(1000, 0x3F80, np.uint16).view(Words)
    gone = weakref.ref(words)
    array = _validate.array("a", Bfloat16(words, False))
    del words
    gc.collect()
    assert gone() is not None
    assert (array == 1).all()
    del array
    gc.collect()
    assert gone() is None


def test_a_producer_that_fails_is_named() -> None:
    class Broken(Producer):
        def __dlpack__(self, **options: Any) -> Any:
            raise RuntimeError("no")

    class Nowhere(Producer):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise RuntimeError("no")

    for kind in (Broken, Nowhere):
        with pytest.raises(
            TypeError,
            match=rf"^b must be an array in host memory that NumPy can read by DLPack, got an object of type {kind.__name__}",
        ) as caught:
            fastops.mitchell_matmul(A, kind(B))
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert str(caught.value.__cause__) == "no"
    with pytest.raises(TypeError, match=r"^params\[0\] must be an array in host memory that NumPy can read by DLPack"):
        fastops.ema_update_([A.copy()], [Broken(A)], 0.5)
