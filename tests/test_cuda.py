# SPDX-License-Identifier: BSD-3-Clause
"""fastops.cuda: the kernels' own sources on the CPU, as fibers, against the reference; the same on a GPU where there is one."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import child
import numpy as np
import pytest
import tolerance
from gpu_arrays import Fake, FakeTensor, Shim, made_by
from samples import FLOATS, MULTIPLIERS, assert_same_bits, near_one, patterns, specials

import fastops
from fastops import Multiplier, cuda, reference
from fastops._multiplier import OPS
from fastops.cuda import _arrays, _calls, _runtime
from fastops.reference.mitchell import sum_to

BINARY = ("mul", "div")
needs_bfloat16 = pytest.mark.skipif("bf16" not in FLOATS, reason="ml_dtypes is not installed")


def apply(gpu: Any, op: str, *operands: Any, **options: Any) -> Any:
    arrays = [gpu.put(x) if isinstance(x, np.ndarray) else x for x in operands]
    if "out" not in options:
        shape = np.broadcast_shapes(*(np.shape(x) for x in operands))
        dtype = next(x.dtype for x in operands if isinstance(x, np.ndarray))
        options["out"] = gpu.empty(shape, dtype)
    result = getattr(cuda, f"mitchell_{op}")(*arrays, **(gpu.options | options))
    assert result is options["out"]
    return gpu.get(result)


def expected(op: str, *operands: Any, multiplier: Multiplier | None = None) -> Any:
    with np.errstate(all="ignore"):
        return np.asarray(reference.mitchell_op(op, multiplier or Multiplier())(*operands))


def sample(name: str, n: int, seed: int) -> Any:
    """Numbers of the short path, with stretches of any bit patterns and special values among them."""
    x = near_one(FLOATS[name], n, seed)
    x[n // 4 : n // 2] = patterns(FLOATS[name], n // 2 - n // 4, seed)
    x[:: max(n // 7, 1)] = specials(name)[seed % 12]
    return x


# --- without a device --------------------------------------------------------------------------------------------------------


def test_import_needs_no_driver() -> None:
    child.run(
        """
        import fastops.cuda as cuda
        assert isinstance(cuda.is_available(), bool) and cuda.device_count() >= 0
        assert cuda.is_available() == (cuda.device_count() > 0)
        if not cuda.is_available():
            try:
                cuda.mitchell_sqrt(1)
            except RuntimeError as error:
                assert str(error).startswith("no CUDA"), error
            else:
                raise AssertionError("no error")
        """
    )


def test_import_of_fastops_does_not_load_it() -> None:
    child.run("import sys, fastops; assert not any('cuda' in name for name in sys.modules if 'fastops' in name)")


def test_a_missing_module_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runtime, "_load", lambda: None)
    assert cuda.device_count() == 0
    assert not cuda.is_available()
    for call in (
        lambda: cuda.mitchell_mul(1, 2),
        lambda: cuda.mitchell_matmul(1, 2),
        lambda: cuda.ema_update_([], [], 0.5),
        lambda: cuda.Array((1,), 2, 0, 1),
    ):
        with pytest.raises(RuntimeError, match=r"no CUDA: fastops was built without it"):
            call()


def test_a_missing_device_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDriver:
        @staticmethod
        def device_count() -> int:
            return 0

        @staticmethod
        def problem() -> str:
            return "CUDA driver version is insufficient for CUDA runtime version"

    monkeypatch.setattr(_runtime, "_loaded", NoDriver)
    assert not cuda.is_available()
    with pytest.raises(RuntimeError, match=r"^no CUDA device: CUDA driver version is insufficient"):
        cuda.mitchell_mul(1, 2)


# --- element by element ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("op", OPS)
def test_elementwise_has_the_bits_of_the_reference(gpu: Any, op: str, name: str) -> None:
    for n in (1, 3, 4099):
        operands = [sample(name, n, seed) for seed in range(1 + (op in BINARY))]
        assert_same_bits(apply(gpu, op, *operands), expected(op, *operands), *operands)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("op", OPS)
def test_special_values_have_the_bits_of_the_reference(gpu: Any, op: str, name: str) -> None:
    row, column = specials(name), specials(name)[:, None]
    operands = [np.ascontiguousarray(x) for x in np.broadcast_arrays(column, row)] if op in BINARY else [row]
    assert_same_bits(apply(gpu, op, *operands), expected(op, *operands), *operands)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("kind", MULTIPLIERS)
def test_every_multiplier_has_the_bits_of_the_reference(gpu: Any, kind: str, name: str) -> None:
    multiplier = Multiplier(**MULTIPLIERS[kind])
    a, b = sample(name, 301, 3), sample(name, 301, 4)
    for op in OPS:
        if multiplier._has(op):
            operands = (a, b) if op in BINARY else (a,)
            got = apply(gpu, op, *operands, multiplier=multiplier)
            assert_same_bits(got, expected(op, *operands, multiplier=multiplier), *operands)


def layouts() -> Iterator[tuple[str, Any, Any]]:
    a, b = sample("f32", 240, 1), sample("f32", 240, 2)
    yield "row and column", a[:15].reshape(1, 15), b[:16].reshape(16, 1)
    yield "scalar array", a.reshape(8, 30), b[0]
    yield "0-d", a[0, ...], b[0, ...]
    yield "empty", a[:0], b[:1]
    yield "empty of two axes", a[:0].reshape(0, 3), b[:3]
    yield "transposed", a.reshape(8, 30).T, b.reshape(30, 8)
    yield "both transposed", a.reshape(8, 30).T, b.reshape(8, 30).T
    yield "step", a[::3], b[:80]
    yield "reversed", a[::-1], b
    yield "middle axis out", a.reshape(4, 6, 10)[:, 1], b.reshape(4, 6, 10)[:, 2]
    yield "not aligned to 16 bytes", a[1:], b[1:]
    yield "eight axes", a[:128].reshape(2, 2, 2, 2, 2, 2, 2)[::-1], b[:2]
    yield "number behind", a, 3.0
    yield "number in front", 2, a


@pytest.mark.parametrize(("a", "b"), [pytest.param(a, b, id=name) for name, a, b in layouts()])
def test_layouts_have_the_bits_of_the_reference(gpu: Any, a: Any, b: Any) -> None:
    a, b = (np.asarray(x) if isinstance(x, np.generic) else x for x in (a, b))
    for op in BINARY:
        x, y = (z if isinstance(z, np.ndarray) else np.float32(z) for z in (a, b))
        assert_same_bits(apply(gpu, op, a, b), expected(op, x, y), a, b)
        turned = np.empty(np.broadcast_shapes(np.shape(a), np.shape(b))[::-1], np.float32).T
        assert_same_bits(apply(gpu, op, a, b, out=gpu.put(turned)), expected(op, x, y), a, b)


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_rounded_to_the_dtype(gpu: Any, name: str) -> None:
    a = sample(name, 100, 5)
    assert_same_bits(apply(gpu, "div", a, 0.3), expected("div", a, np.asarray(0.3).astype(a.dtype)), a)


def test_results_may_go_where_an_operand_lies(gpu: Any) -> None:
    a, b = near_one(FLOATS["f32"], 5000, 1), near_one(FLOATS["f32"], 5000, 2)
    want = expected("mul", a, b)
    x = gpu.put(a.copy())
    assert cuda.mitchell_mul(x, gpu.put(b), out=x, **gpu.options) is x
    assert_same_bits(gpu.get(x), want)


@pytest.mark.parametrize("name", FLOATS)
def test_new_results_are_readable_by_their_protocols(shim: Shim, name: str) -> None:
    a = sample(name, 12, 1).reshape(3, 4)
    result = cuda.mitchell_square(Fake(a) if name != "bf16" else exported(a), stream=7)
    assert isinstance(result, cuda.Array)
    assert (result.shape, result.dtype, result.device) == ((3, 4), a.dtype.name, 0)
    assert_same_bits(shim.get(result), expected("square", a))
    interface = result.__cuda_array_interface__
    assert interface["stream"] == 1
    assert interface["shape"] == (3, 4)
    assert result.__dlpack_device__() == (2, 0)
    data, shape, strides, dtype, read_only = _runtime.module().from_dlpack(result.__dlpack__(stream=7))
    assert (data, shape, strides, read_only) == (interface["data"][0], (3, 4), None, False)
    assert dtype == (4 if name == "bf16" else 2, 8 * a.itemsize, 1)
    # By DLPack in again.
    assert_same_bits(shim.get(cuda.mitchell_square(result)), expected("square", expected("square", a)))


def exported(array: Any) -> Any:
    """The array's elements as a `fastops.cuda.Array`, which has DLPack for every dtype."""
    made = cuda.Array(array.shape, _arrays.DTYPES.index(array.dtype.name), 0, 1)
    ctypes.memmove(made._memory.address, array.tobytes(), array.nbytes)
    return made


@needs_bfloat16
def test_bfloat16_comes_by_dlpack(shim: Shim) -> None:
    a, b = sample("bf16", 50, 1), sample("bf16", 50, 2)
    assert_same_bits(shim.get(cuda.mitchell_mul(exported(a), exported(b))), expected("mul", a, b))


def test_dlpack_speaks_the_version_that_is_asked_for(shim: Shim) -> None:
    result = cuda.mitchell_square(Fake(np.arange(6, dtype=np.float32).reshape(2, 3)))
    for options, name in (
        ({}, "dltensor"),
        ({"max_version": (0, 8)}, "dltensor"),
        ({"max_version": (1, 0), "dl_device": (2, 0), "copy": False}, "dltensor_versioned"),
    ):
        capsule = result.__dlpack__(stream=-1, **options)
        assert f'"{name}"' in repr(capsule)
        data, shape, *_ = _runtime.module().from_dlpack(capsule)
        assert (data, shape) == (result._memory.address, (2, 3))
    for options in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            result.__dlpack__(**options)


# --- streams and devices -----------------------------------------------------------------------------------------------------


def described(name: str, value: Any) -> Any:
    """What the module asks of a tensor, of which nothing else is to be known."""
    return _arrays.described(name, _arrays.view(name, value, in_place=True))


class Recording:
    """The module, and the waits that it is asked for."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.waits: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def plan_unseen(self, roles: Any, lists: Any, describe: object, stream: int) -> Any:
        """As for torch's own tensors, which the module reads itself."""
        return self.module.plan(roles, lists, described, stream)

    def wait(self, later: int, earlier: int, device: int) -> None:
        self.waits.append((later, earlier))


@pytest.fixture
def recorded(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> Recording:
    """The shim's module with its waits recorded."""
    recording = Recording(_runtime.module())
    monkeypatch.setattr(_runtime, "_loaded", recording)
    return recording


def test_the_producers_stream_is_the_default(recorded: Recording) -> None:
    result = cuda.mitchell_sqrt(Fake(np.ones(3, np.float32), stream=9))
    assert result._stream == 9
    assert recorded.waits == []


def test_a_stream_waits_for_those_of_the_operands(recorded: Recording) -> None:
    a, b = Fake(np.ones(3, np.float32), stream=9), Fake(np.ones(3, np.float32), stream=8)
    cuda.mitchell_mul(a, b)
    assert recorded.waits == [(9, 8)]
    cuda.mitchell_mul(a, b, out=Fake(np.ones(3, np.float32), stream=8), stream=5)
    assert recorded.waits[1:] == [(5, 9), (5, 8)]


def test_the_two_names_of_the_default_stream_are_one(recorded: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.mitchell_sqrt(Fake(np.ones(3, np.float32), stream=1), stream=0)
    assert recorded.waits == []
    libraries = Libraries(monkeypatch, torch_stream=0)
    cuda.mitchell_mul(libraries.torch(), ones(3, stream=1), out=ones(3, stream=5), stream=5)
    assert recorded.waits == [(5, 1)]


def test_streams_come_as_objects_of_their_libraries(recorded: Recording) -> None:
    array = Fake(np.ones(3, np.float32))
    for attribute, value in (("cuda_stream", 6), ("ptr", 6), ("__cuda_stream__", lambda: (0, 6))):
        stream = type("Stream", (), {attribute: staticmethod(value) if callable(value) else value})()
        assert cuda.mitchell_sqrt(array, stream=stream)._stream == 6
    with pytest.raises(TypeError, match=r"stream must be an integer"):
        cuda.mitchell_sqrt(array, stream="six")


def test_torch_tensors_go_to_the_current_stream(recorded: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    class Torch:
        class cuda:
            @staticmethod
            def current_stream(device: object) -> Any:
                return type("Stream", (), {"cuda_stream": 0})()

        @staticmethod
        def is_grad_enabled() -> bool:
            return True

        @staticmethod
        def empty(shape: Any, dtype: Any, device: Any) -> Any:
            return FakeTensor(np.empty(shape, dtype))

        float32 = np.dtype(np.float32)

    monkeypatch.setitem(sys.modules, "torch", Torch)
    a = sample("f32", 40, 1)
    result = cuda.mitchell_sqrt(FakeTensor(a))
    assert isinstance(result, FakeTensor)
    assert_same_bits(result.array, expected("sqrt", a))
    tensor = FakeTensor(a)
    tensor.requires_grad = True
    with pytest.raises(
        TypeError, match=r"a must be a tensor outside autograd .*, got a tensor with requires_grad=True"
    ):
        cuda.mitchell_sqrt(tensor)


# --- memory of results -------------------------------------------------------------------------------------------------------


# Of the shim: where memory is freed.
RELEASES = 1 << 20


class Trace:
    """What the shim's runtime was asked for: waits of streams for events, waits of the host, and calls that it refused."""

    def __init__(self) -> None:
        self.runtime = ctypes.CDLL(_runtime.module().__file__)
        self.waits()
        self.runtime.fastops_shim_idle_waits()
        self.faults()
        self.releases()

    def waits(self) -> list[tuple[int, int]]:
        """(The stream that waits, the one for what it had got)."""
        handles = (ctypes.c_void_p * 64)()
        found = [h or 0 for h in handles[: self.runtime.fastops_shim_waits(handles, 64)]]
        return list(zip(found[::2], found[1::2], strict=True))

    def end_streams(self, *streams: int) -> None:
        for stream in streams:
            self.runtime.fastops_shim_end_stream(ctypes.c_void_p(stream))

    def finish(self, *streams: int) -> None:
        for stream in streams:
            self.runtime.fastops_shim_finish_stream(ctypes.c_void_p(stream))

    def capture(self, stream: int | None, *, blocking: bool = False) -> None:
        self.runtime.fastops_shim_capture(ctypes.c_void_p(stream), int(blocking))

    def releases(self) -> int:
        """Memory that was freed."""
        return int(self.runtime.fastops_shim_releases())

    def faults(self) -> int:
        return int(self.runtime.fastops_shim_faults())

    def host_waits(self) -> int:
        """No call named a stream that was gone; the waits of the host."""
        assert self.faults() == 0
        return int(self.runtime.fastops_shim_idle_waits())


@pytest.fixture
def trace(shim: Shim) -> Trace:
    """The shim's runtime, from here on."""
    return Trace()


def test_an_array_outlives_the_stream_that_it_was_made_on(trace: Trace) -> None:
    """Its memory is free after an event of its own, for which the host does not wait."""
    array = cuda.mitchell_square(ones(3), stream=64)
    trace.end_streams(64)
    del array
    assert trace.waits() == [(RELEASES, 64)]
    assert trace.host_waits() == 0


def test_an_array_is_read_when_its_stream_is_gone(trace: Trace, shim: Shim) -> None:
    array = cuda.mitchell_mul(ones(3), 2.0, stream=64)
    trace.end_streams(64)
    again = cuda.mitchell_mul(array, 2.0, stream=65)
    assert trace.waits() == [(65, 64)]
    assert cuda.mitchell_mul(array, 2.0)._stream == 1
    assert (1, 64) in trace.waits()
    assert array.__cuda_array_interface__["stream"] == 1
    assert (1, 64) in trace.waits()
    array.__dlpack__(stream=66)
    assert (66, 64) in trace.waits()
    array.__dlpack__(stream=-1)
    assert trace.waits() == []
    assert shim.get(again).tolist() == [4.0] * 3
    assert trace.host_waits() == 0


def test_memory_is_free_after_every_call_that_used_it(trace: Trace) -> None:
    array = cuda.mitchell_square(ones(3, 3), stream=64)
    cuda.mitchell_mul_grad(array, array, array, stream=65)
    cuda.mitchell_matmul(array, array, stream=66)
    cuda.mitchell_matmul_grad(array, array, array, stream=67)
    cuda.mitchell_square(ones(3, 3), out=array, stream=68)
    trace.end_streams(64, 65, 66, 67, 68)
    trace.waits()
    del array
    assert trace.waits() == [(RELEASES, stream) for stream in (64, 65, 66, 67, 68)]
    numbers = cuda.Array((3, 3), _arrays.DTYPES.index("uint8"), 0, 60)
    numbers._memory.end(60)
    cuda.lut_matmul(numbers, numbers, np.zeros((256, 256), np.int32), stream=69)
    trace.waits()
    del numbers
    assert trace.waits() == [(RELEASES, 60), (RELEASES, 69)]
    images = cuda.mitchell_square(ones(1, 1, 3, 3), stream=70)
    cuda.mitchell_conv2d(images, images, stream=71)
    cuda.mitchell_conv2d_grad(images, images, ones(1, 1, 1, 1), stream=72)
    trace.waits()
    del images
    assert trace.waits() == [(RELEASES, stream) for stream in (70, 71, 72)]
    assert trace.host_waits() == 0


def test_a_handle_may_name_another_stream_later(trace: Trace) -> None:
    """Whose use of the memory does not take the place of the first one's."""
    array = cuda.mitchell_square(ones(3), stream=64)
    cuda.mitchell_square(ones(3), out=array, stream=64)
    assert (64, 64) in trace.waits()


def test_a_table_waits_for_both_streams_of_one_handle(trace: Trace) -> None:
    _runtime.module().forget_plans()
    shadows, params = [Fake(np.zeros(3, np.float32))], [ones(3)]
    cuda.ema_update_(shadows, params, 0.5, stream=64)
    assert trace.waits() == [(64, 64)]  # for the table
    trace.end_streams(64)
    trace.faults()  # another stream has the handle from here on
    cuda.ema_update_(shadows, params, 0.5, stream=64)
    assert trace.waits() == [(64, 64)] * 2
    _runtime.module().forget_plans()
    assert trace.host_waits() == 0


def test_memory_that_others_have_is_free_when_the_device_is_idle(trace: Trace) -> None:
    for lend in (lambda x: x.__cuda_array_interface__, lambda x: x.__dlpack__(stream=65)):
        array = cuda.mitchell_square(ones(3), stream=64)
        lend(array)
        del array
        assert trace.host_waits() == 1
    array = cuda.Array((3,), 2, 0, 64)  # of a call that failed
    trace.end_streams(64)
    del array
    assert trace.host_waits() == 1


def test_a_call_that_cannot_wait_for_an_array_does_not_use_it(trace: Trace) -> None:
    array = cuda.mitchell_square(ones(3), stream=64)
    trace.end_streams(65)
    with pytest.raises(RuntimeError, match="CUDA: an error of the shim"):
        cuda.mitchell_square(array, out=ones(3), stream=65)
    assert trace.faults() > 0
    del array
    assert trace.host_waits() == 0


def test_a_call_that_is_refused_does_not_use_its_arrays(trace: Trace) -> None:
    array, host = cuda.mitchell_square(ones(3), stream=64), np.ones(3, np.float32)
    with pytest.raises(TypeError, match="an array on a GPU"):
        cuda.mitchell_mul(array, host, stream=65)
    with pytest.raises(TypeError, match="an array on a GPU"):
        cuda.ema_update_([ones(3), host], [array] * 2, 0.5, stream=65)
    with pytest.raises(ValueError, match="b must be of a shape that broadcasts"):
        cuda.mitchell_mul(array, ones(2), stream=65)
    far = cuda.Array((3,), 2, 1, 66)
    far._memory.end(66)
    trace.capture(65)
    try:
        with pytest.raises(ValueError, match="b must be on device 0"):
            cuda.mitchell_mul(array, far, stream=65)
    finally:
        trace.capture(None)
    del array, far
    q = cuda.mitchell_square(ones(1, 4, 4), stream=64)
    with pytest.raises(ValueError, match="decay must"):
        cuda.linear_attention(q, q, q, cu_seqlens=[0, 4], decay=ones(7), stream=65)
    del q
    gc.collect()
    assert trace.host_waits() == 0


def test_a_call_that_the_module_refuses_has_ended(trace: Trace) -> None:
    """Also for the results that it had made."""
    raw = np.zeros(64, np.uint8)
    bent = Fake(raw[1:37].view(np.float32).reshape(3, 3))
    calls: tuple[Callable[[], object], ...] = (
        lambda: cuda.mitchell_mul(bent, 2.0, stream=65),
        lambda: cuda.mitchell_mul_grad(bent, bent, bent, stream=65),
        lambda: cuda.mitchell_matmul(bent, bent, stream=65),
        lambda: cuda.mitchell_matmul_grad(bent, bent, bent, stream=65),
        lambda: cuda.linear_attention(bent, bent, bent, return_state=True, stream=65),
        lambda: cuda.linear_attention(
            *[Fake(raw[1:37].view(np.float32).reshape(1, 3, 3))] * 3, cu_seqlens=[0, 3], stream=65
        ),
        lambda: cuda.nystrom_attention(bent, bent, bent, num_landmarks=2, stream=65),
    )
    for call in calls:
        with pytest.raises(ValueError, match="must be aligned to its elements"):
            call()
        gc.collect()
        assert trace.host_waits() == 0


def test_a_call_ends_also_where_a_part_of_it_cannot(trace: Trace, recorded: Recording) -> None:
    """The first of what was raised is, when all else has ended; operands of which nobody can tell when they are done with stay."""

    class Endless:
        """Memory of an Array, which does not end."""

        def __init__(self, memory: Any) -> None:
            self.address, self.begin = memory.address, memory.begin

        def end(self, stream: int) -> None:
            raise RuntimeError("no end")

    first, second, other = (cuda.mitchell_square(ones(3), stream=64) for _ in range(3))
    kept = ones(3, stream=66)
    alive = weakref.ref(kept)
    own = first._memory
    first._memory = Endless(own)
    with pytest.raises(RuntimeError, match="no end"):
        cuda.mitchell_mul(first, second, out=kept, stream=65)
    del second, kept
    gc.collect()
    assert trace.host_waits() == 0
    assert alive() is not None
    trace.finish(65)
    _calls.kept.drop_done()
    assert alive() is None

    def no_mark(*_: int) -> None:
        raise RuntimeError("no mark")

    recorded.Mark = no_mark
    kept = ones(3, stream=66)
    alive = weakref.ref(kept)
    with pytest.raises(RuntimeError, match="no mark"):
        cuda.mitchell_mul(other, kept, stream=65)
    del kept
    _calls.kept.drop_done()
    gc.collect()
    assert alive() is not None
    own.end(65)


def test_the_default_stream_leaves_the_capture_of_a_blocking_one_alone(trace: Trace) -> None:
    """All that it gets would end that capture."""
    array, other = (cuda.mitchell_square(ones(3), stream=64) for _ in range(2))
    shadows, params = [ones(3)], [ones(3)]
    cuda.ema_update_(shadows, params, 0.5, stream=64)
    trace.finish(64)
    trace.capture(70, blocking=True)
    calls: tuple[Callable[[], object], ...] = (
        lambda: array.__cuda_array_interface__,
        lambda: array.__dlpack__(),
        lambda: cuda.mitchell_square(array),
        lambda: cuda.mitchell_square(ones(3), stream=0),
        lambda: cuda.mitchell_square(ones(3), out=ones(3), stream=1),
        lambda: cuda.mitchell_square(ones(3, stream=1), out=ones(3, stream=1)),
        lambda: cuda.mitchell_square(ones(3, stream=64), out=ones(3), stream=1),
        lambda: array._memory.end(1),
        lambda: cuda.mitchell_square(ones(3, stream=1), out=ones(3), stream=64),
        lambda: cuda.ema_update_(shadows, params, 0.5, stream=1),
        lambda: cuda.ema_update_([ones(3)], params, 0.5, stream=1),
        lambda: _runtime.module().Mark(0, 1),
    )
    try:
        for i, call in enumerate(calls):
            with pytest.raises(RuntimeError, match="default stream cannot be used while a blocking stream is captured"):
                call()
            assert trace.faults() == 0, i
        assert not _runtime.module().is_captured(0, 1)
        assert not _calls.kept._for_good  # what was not launched needs nothing
        trace.finish(64)
        cuda.mitchell_mul(ones(3, stream=1), array, out=ones(3), stream=70)
        cuda.ema_update_(shadows, params, 0.5, stream=70)
        cuda.mitchell_square(other, stream=64)
    finally:
        trace.capture(None)
    del other
    gc.collect()
    assert trace.host_waits() == 0


def test_a_call_that_fails_has_ended(trace: Trace, recorded: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had launched before may run: its operands stay until that is done, and nobody waits for the device."""

    def fails(*given: Any) -> None:
        recorded.module.apply(*given)
        raise MemoryError("a second launch")

    monkeypatch.setattr(recorded, "apply", fails, raising=False)
    array, other = cuda.mitchell_matmul(ones(3, 3), ones(3, 3), stream=64), ones(3)
    alive = weakref.ref(other)
    with pytest.raises(MemoryError):
        cuda.mitchell_mul(array, other, out=ones(3, 3), stream=65)
    del array, other
    gc.collect()
    assert alive() is not None
    trace.finish(65)
    _calls.kept.drop_done()
    assert alive() is None
    assert trace.host_waits() == 0


def test_memory_whose_release_cannot_be_ordered_is_free_when_the_device_is_idle(trace: Trace) -> None:
    array = cuda.mitchell_square(ones(3), stream=64)
    trace.releases()
    trace.end_streams(RELEASES)
    del array
    trace.faults()
    assert trace.releases() == 1
    assert trace.host_waits() == 1


def test_a_graph_delays_the_release_of_what_others_have(trace: Trace) -> None:
    """No device is waited for within a capture; the next release frees that memory too."""
    arrays = [cuda.mitchell_square(ones(3), stream=64) for _ in range(3)]
    for array in arrays:
        array.__dlpack__(stream=65)
    trace.releases()
    trace.capture(70)
    try:
        del array, arrays[1:]
        assert trace.releases() == 0
    finally:
        trace.capture(None)
    arrays.clear()
    assert trace.releases() == 3
    assert trace.host_waits() == 1


def test_looking_at_an_array_lends_it_to_nobody(trace: Trace) -> None:
    array = cuda.mitchell_square(ones(3, 3), stream=64)
    with pytest.raises(TypeError, match="host memory"):
        fastops.mitchell_matmul(array, array)
    with pytest.raises(TypeError, match="host"):
        fastops.ema_update_([array], [array], 0.5)
    assert trace.waits() == []
    del array
    gc.collect()
    assert trace.host_waits() == 0


def test_an_array_alone_is_a_list_that_nobody_else_has(trace: Trace) -> None:
    shadow, param = (cuda.mitchell_square(ones(3), stream=64) for _ in range(2))
    cuda.ema_update_(shadow, param, 0.5, stream=64)
    del shadow, param
    assert trace.host_waits() == 0


def test_arrays_of_a_graph(trace: Trace) -> None:
    """Memory that is made in the capture is the graph's; what a graph reads is not free before the device is idle."""
    before = cuda.mitchell_square(ones(3), stream=64)
    trace.capture(64)
    try:
        inside = cuda.mitchell_square(before, stream=64)
        assert inside.__cuda_array_interface__["stream"] == 64
        cuda.mitchell_square(inside)
        del inside
        assert trace.host_waits() == 0
    finally:
        trace.capture(None)
    del before
    assert trace.host_waits() == 1


class Exporter:
    """As jax's arrays: an interface that names no stream, and DLPack, which learns of the reader's."""

    def __init__(self, *shape: int, **changes: Any) -> None:
        self.made = exported(np.ones(shape, np.float32))
        self.streams: list[int] = []
        interface = self.made.__cuda_array_interface__ | {"version": 2} | changes
        del interface["stream"]
        self.__cuda_array_interface__ = interface | changes

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int) -> object:
        self.streams.append(stream)
        return self.made.__dlpack__(stream=-1)


def test_who_names_no_stream_is_told_that_of_the_call(trace: Trace, shim: Shim) -> None:
    a, b = Exporter(3), Exporter(3)
    result = cuda.mitchell_mul(a, b, stream=64)
    assert shim.get(result).tolist() == [1.0] * 3
    assert (a.streams, b.streams) == ([64], [64])
    named = Exporter(3, version=3, stream=65)
    cuda.mitchell_square(named, stream=64)
    assert named.streams == []
    cuda.ema_update_([ones(3)], [a], 0.5, stream=66)
    assert a.streams == [64, 66]
    fixed = Exporter(3, data=(a.made._memory.address, True))
    with pytest.raises(ValueError, match=r"^out must be writable"):
        cuda.mitchell_square(b, out=fixed)
    trace.capture(64)
    try:
        cuda.mitchell_square(b, stream=64)
    finally:
        trace.capture(None)
    assert b.streams == [64, 1]


def heads(*shape: int) -> Fake:
    return ones(1, 1, *shape)


# With an array to which the test holds no other reference.
CALLS: dict[str, Callable[[Any], Any]] = {
    "product": lambda x: cuda.mitchell_mul(x, 2.0, stream=64),
    "gradient": lambda x: cuda.mitchell_mul_grad(x, ones(1), ones(1, 1, 4, 4), stream=64),
    "matrix product": lambda x: cuda.mitchell_matmul(x, ones(4, 2), stream=64),
    "convolution": lambda x: cuda.mitchell_conv2d(x, ones(1, 1, 2, 2), stream=64),
    "linear": lambda x: cuda.linear_attention(x, heads(4, 4), heads(4, 4), stream=64),
    "nystrom": lambda x: cuda.nystrom_attention(x, heads(4, 4), heads(4, 4), num_landmarks=2, stream=64),
    "read in a list": lambda x: cuda.ema_update_([ones(1, 1, 4, 4)], [x], 0.5, stream=64),
    "written in a list": lambda x: cuda.ema_update_([x], [ones(1, 1, 4, 4)], 0.5, stream=64),
}


def assert_stays_until_done(trace: Trace, alive: Callable[[], object]) -> None:
    """Until the first call that looks after stream 64 is done."""
    gc.collect()
    assert alive() is not None
    trace.finish(64)
    cuda.mitchell_square(ones(3), stream=65)
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", CALLS)
def test_operands_stay_until_the_stream_is_done(trace: Trace, name: str) -> None:
    x = Exporter(1, 1, 4, 4)
    alive = weakref.ref(x)
    CALLS[name](x)
    del x
    cuda.mitchell_square(ones(3), stream=65)
    assert_stays_until_done(trace, alive)
    assert trace.host_waits() == 1  # for the exporter's own memory


class Movable(FakeTensor):
    """A tensor whose memory may be exchanged; what is detached from it keeps that which it had."""

    def detach(self) -> FakeTensor:
        return FakeTensor(self.array)

    def move(self) -> Any:
        """A reference to the memory that it had."""
        had = weakref.ref(self.array)
        self.array = self.array.copy()
        return had


def test_memory_stays_when_a_tensor_gets_other_memory(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    Libraries(monkeypatch)

    def made() -> Movable:
        return Movable(np.ones(3, np.float32))

    x, lists = made(), [[made(), made()], [made(), made()]]
    fixed = [cuda.TensorList(items, verify=False) for items in lists]
    calls: tuple[tuple[Movable, Callable[[], object]], ...] = (
        (x, lambda: cuda.mitchell_square(x, stream=64)),
        (lists[1][1], lambda: cuda.ema_update_(*lists, 0.5, stream=64)),
        (lists[0][1], lambda: cuda.ema_update_(*fixed, 0.5, stream=64)),
    )
    for tensor, call in calls:
        _calls.kept.clear()
        call()
        had = tensor.move()
        for each in fixed:
            each.refresh()
        _runtime.module().forget_plans()
        gc.collect()
        assert had() is not None
        trace.finish(64)
        _calls.kept.drop_done()
        assert had() is None
        trace.faults()


def test_operands_of_the_calls_own_stream_or_of_a_graph_do_not_stay(trace: Trace) -> None:
    x = ones(3, stream=64)
    cuda.mitchell_square(x)
    assert not _calls.kept
    trace.capture(64)
    try:
        cuda.mitchell_square(ones(3), stream=64)
        cuda.mitchell_square(ones(3, stream=65), stream=64)
    finally:
        trace.capture(None)
    assert not _calls.kept
    assert trace.host_waits() == 0


def test_an_operand_may_call_when_it_goes(trace: Trace) -> None:
    gone = []

    class Caller(Fake):
        def __del__(self) -> None:
            cuda.mitchell_square(ones(3), stream=66)
            gone.append(1)

    cuda.mitchell_square(Caller(np.ones(3, np.float32)), stream=64)
    trace.finish(64)
    assert not gone
    cuda.mitchell_square(ones(3), stream=65)
    assert gone


def test_nothing_stays_at_exit() -> None:
    child.run(
        """
        import atexit
        gone = []
        atexit.register(lambda: gone or os._exit(1))
        from fastops.cuda import _calls

        class Thing:
            def __del__(self):
                gone.append(1)

        _calls.kept.add(0, 1, None, Thing())
        """
    )


class Libraries:
    """torch and cupy, with current streams 8 (unless another is given) and 9."""

    class Cupy(Fake):
        device = SimpleNamespace(id=0)

    def __init__(self, monkeypatch: pytest.MonkeyPatch, torch_stream: int = 8) -> None:
        self.Cupy.__module__ = "cupy"
        # The stream of another device would be another one.
        current_stream = {0: SimpleNamespace(ptr=9)}.__getitem__
        cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=current_stream))
        current = SimpleNamespace(current_stream=lambda _: SimpleNamespace(cuda_stream=torch_stream))
        torch = SimpleNamespace(
            cuda=current,
            Tensor=FakeTensor,
            nn=SimpleNamespace(Parameter=FakeTensor),
            autograd=SimpleNamespace(graph=SimpleNamespace(increment_version=lambda _: None)),
            float32=np.float32,
            empty=lambda shape, dtype, device: FakeTensor(np.empty(shape, dtype)),
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "torch", torch)

    def cupy(self) -> Any:
        return self.Cupy(np.ones(3, np.float32), stream=7)  # that of the current device, which need not be the array's

    def torch(self) -> Any:
        return FakeTensor(np.ones(3, np.float32))


def test_streams_of_several_libraries(recorded: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream of a call waits for each of them; who owns what it wrote on a stream it chose itself waits for it."""
    libraries = Libraries(monkeypatch)
    cuda.mitchell_mul(libraries.cupy(), libraries.torch(), out=libraries.torch())
    assert recorded.waits == [(9, 8), (8, 9)]
    recorded.waits.clear()
    cuda.mitchell_mul(libraries.torch(), libraries.cupy())
    assert recorded.waits == [(8, 9)]
    recorded.waits.clear()
    cuda.mitchell_mul(libraries.cupy(), libraries.torch(), out=libraries.torch(), stream=5)
    assert recorded.waits == [(5, 9), (5, 8)]
    recorded.waits.clear()
    array = exported(np.ones(3, np.float32))
    cuda.mitchell_mul(array, libraries.torch(), out=libraries.torch())
    assert recorded.waits == []
    cuda.ema_update_([libraries.torch()], [libraries.cupy()], 0.5)
    assert recorded.waits == [(9, 8), (8, 9)]
    recorded.waits.clear()
    monkeypatch.setattr(recorded, "plan", recorded.plan_unseen, raising=False)
    x = libraries.torch()
    alive = weakref.ref(x)
    cuda.ema_update_([x], [libraries.torch()], 0.5)
    del x
    gc.collect()
    assert (recorded.waits, alive()) == ([], None)
    cuda.ema_update_([libraries.torch()], [libraries.cupy()], 0.5)
    assert recorded.waits == [(9, 8), (8, 9)]
    recorded.waits.clear()
    x = libraries.torch()
    alive = weakref.ref(x)
    cuda.ema_update_([libraries.torch(), x], [libraries.torch()] * 2, 0.5, stream=5)
    del x
    gc.collect()
    assert recorded.waits == [(5, 8)]
    assert alive() is not None


def test_a_list_that_is_not_read_again_waits_for_its_libraries(
    recorded: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their current streams may be others by then; who is only read does not wait for the call."""
    libraries = Libraries(monkeypatch)
    read, written, ours = ones(3, stream=7), ones(3, stream=8), [libraries.cupy(), libraries.cupy()]
    lists = [cuda.TensorList(x, verify=False) for x in ([ours[0], written], [ours[1], read])]
    cuda.ema_update_(*lists, 0.5)
    assert recorded.waits == [(9, 7), (9, 8), (8, 9)]
    recorded.waits.clear()
    read.__cuda_array_interface__["stream"], written.__cuda_array_interface__["stream"] = 10, 11
    cuda.ema_update_(*lists, 0.5)
    assert recorded.waits == [(9, 10), (9, 11), (11, 9)]


def test_a_list_that_is_not_read_again_tells_its_libraries_of_the_stream(trace: Trace) -> None:
    exporters = [Exporter(3), Exporter(3)]
    lists = [cuda.TensorList(x, verify=False) for x in ([ones(3), ones(3)], exporters)]
    for stream in (64, 65):
        cuda.ema_update_(*lists, 0.5, stream=stream)
    assert [x.streams for x in exporters] == [[64, 65]] * 2
    _calls.kept.clear()


def test_lists_that_are_gone_are_forgotten(shim: Shim) -> None:
    """All but the latest with which a list was used."""
    params = cuda.TensorList([ones(3)], verify=False)
    gone = []
    for _ in range(12):
        gradient = ones(3)
        gone.append(weakref.ref(gradient))
        cuda.sgd_step_(params, cuda.TensorList([gradient], verify=False), None, lr=0.5)
    del gradient
    _calls.kept.clear()
    gc.collect()
    assert [x() is None for x in gone] == [True] * 4 + [False] * 8


def test_a_launch_of_which_nothing_is_known_ends_with_the_device(trace: Trace) -> None:
    _runtime.module().forget_plans()
    shadows, params = [Fake(np.zeros(3, np.float32))], [ones(3)]
    cuda.ema_update_(shadows, params, 0.5, stream=64)
    trace.finish(64)
    trace.end_streams(65)
    with pytest.raises(RuntimeError, match="CUDA: an error of the shim"):
        cuda.ema_update_(shadows, params, 0.5, stream=65)
    trace.faults()
    cuda.ema_update_(shadows, params, 0.5, stream=66)
    _runtime.module().forget_plans()
    assert trace.host_waits() == 1


def test_lists_choose_the_stream_of_any_library(recorded: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = Libraries(monkeypatch)
    array = exported(np.ones(3, np.float32))
    array._memory.end(1)
    monkeypatch.setattr(recorded, "plan", recorded.plan_unseen, raising=False)
    cuda.ema_update_([libraries.torch()], [array], 0.5)
    assert recorded.waits == []
    cuda.ema_update_([array], [libraries.torch()], 0.5)
    assert recorded.waits == []


def test_empty_arrays_are_on_their_device(shim: Shim) -> None:
    class Empty(Fake):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 1

    assert cuda.mitchell_square(Empty(np.ones((0, 3), np.float32))).device == 1


def test_a_list_that_is_not_read_again_stays_until_the_stream_is_done(trace: Trace) -> None:
    x = ones(3)
    alive = weakref.ref(x)
    lists = [cuda.TensorList([ones(3), y], verify=False) for y in (ones(3), x)]
    for _ in range(2):
        _calls.kept.clear()
        cuda.ema_update_(*lists, 0.5, stream=64)
    del x, lists
    assert_stays_until_done(trace, alive)
    assert trace.host_waits() == 0


def test_lists_of_tensors_end_on_their_device(recorded: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    Libraries(monkeypatch)
    cuda.mitchell_square(ones(3), stream=64)  # what is kept is looked at by the next call
    devices: list[int] = []
    monkeypatch.setattr(recorded, "plan", recorded.plan_unseen, raising=False)
    monkeypatch.setattr(recorded, "is_captured", lambda device, _: bool(devices.append(device)), raising=False)
    cuda.ema_update_(*([FakeTensor(np.ones(3, np.float32), "cuda:1")] for _ in range(2)), 0.5)
    assert devices == [1]


def test_autograd_knows_what_was_written_by_a_call_that_cannot_end(
    recorded: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = Libraries(monkeypatch)
    written: list[Any] = []
    monkeypatch.setattr(sys.modules["torch"].autograd.graph, "increment_version", written.extend)

    def refused(*_: object) -> None:
        raise RuntimeError("no event")

    monkeypatch.setattr(recorded, "Mark", refused, raising=False)
    shadow = libraries.torch()
    for shadows in ([shadow], cuda.TensorList([shadow])):
        with pytest.raises(RuntimeError, match="no event"):
            cuda.ema_update_(shadows, [libraries.torch()], 0.5, stream=5)
    assert written == [shadow] * 2


def test_a_call_ends_where_autograd_refuses_what_was_written(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for tensors of inference mode outside of it: the launch is under way by then."""
    libraries = Libraries(monkeypatch)

    def refused(*_: object) -> None:
        raise RuntimeError("inference tensors")

    monkeypatch.setattr(sys.modules["torch"].autograd.graph, "increment_version", refused)
    array = cuda.mitchell_square(ones(3), stream=64)
    with pytest.raises(RuntimeError, match="inference tensors"):
        cuda.ema_update_(cuda.TensorList([libraries.torch()]), [array], 0.5, stream=5)
    assert _calls.kept
    del array
    gc.collect()
    assert trace.host_waits() == 0


def test_tensors_behind_arrays_of_our_own_are_waited_for(recorded: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = Libraries(monkeypatch)
    monkeypatch.setattr(recorded, "plan", recorded.plan_unseen, raising=False)
    lists = [[exported(np.ones(3, np.float32)), libraries.torch()] for _ in range(2)]
    for call in (lists, [cuda.TensorList(x, verify=False) for x in lists]):
        recorded.waits.clear()
        cuda.ema_update_(*call, 0.5)
        assert recorded.waits == [(1, 8), (8, 1)]


def test_tensors_stay_on_another_stream_than_that_of_their_library(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = Libraries(monkeypatch)
    for call in (
        lambda x, **options: cuda.mitchell_square(x, **options),
        lambda x, **options: cuda.ema_update_([x], [libraries.torch()], 0.5, **options),
    ):
        _calls.kept.clear()
        for stream, stays in ((None, False), (8, False), (64, True)):
            x = libraries.torch()
            alive = weakref.ref(x)
            result = call(x, stream=stream)
            written = weakref.ref(result) if result is not None else alive
            del x, result
            gc.collect()
            assert (alive() is not None, written() is not None) == (stays, stays)


def test_a_graph_waits_for_no_stream_outside(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = Libraries(monkeypatch)
    recorded = Recording(_runtime.module())
    trace.capture(64)
    try:
        cuda.mitchell_mul(libraries.torch(), libraries.cupy(), out=libraries.torch(), stream=64)
        trace.capture(9)
        monkeypatch.setattr(_runtime, "_loaded", recorded)
        cuda.mitchell_mul(libraries.cupy(), 2.0, out=libraries.torch())
        assert recorded.waits == [(9, 8)]  # which does nothing
        monkeypatch.setattr(_runtime, "_loaded", recorded.module)
    finally:
        trace.capture(None)
    assert trace.host_waits() == 0


def test_a_graph_takes_no_stream_in(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be captured from there on, also what others launch on it, and the graph could not be ended."""
    libraries = Libraries(monkeypatch)
    x, y = libraries.torch(), libraries.cupy()
    lists = [[libraries.torch()], [libraries.torch()]]
    numbers, row = FakeTensor(np.ones((2, 2), np.uint8)), FakeTensor(np.ones((1, 5, 4), np.float32))
    own = [cuda.mitchell_square(ones(3), stream=64)]
    cuda.ema_update_(*lists, 0.5, stream=5)
    trace.finish(5)
    out = [libraries.torch() for _ in range(3)]
    calls: tuple[Callable[[], object], ...] = (
        lambda: cuda.mitchell_square(x, out=out[0], stream=5),
        lambda: cuda.mitchell_square(x, stream=5),
        lambda: cuda.mitchell_mul(y, x, out=libraries.cupy()),
        lambda: cuda.mitchell_mul(own[0], x, out=out[1], stream=1),
        lambda: cuda.mitchell_mul(own[0], x, out=out[2], stream=0),
        lambda: cuda.ema_update_(*lists, 0.5, stream=5),
        lambda: cuda.ema_update_(*lists, [0.5], stream=5),
        lambda: cuda.lut_matmul(numbers, numbers, np.ones((256, 256), np.int32), stream=5),
        lambda: cuda.linear_attention(row, row, row, cu_seqlens=[0, 5], stream=5),
    )
    monkeypatch.setattr(
        _calls, "empty_like", lambda _, shape, code, *__: FakeTensor(np.ones(shape, _arrays.DTYPES[code]))
    )
    trace.capture(8)
    for i, call in enumerate(calls):
        with pytest.raises(RuntimeError, match=r"^CUDA graphs cannot capture a call on a stream outside of them"):
            call()
        assert trace.faults() == 0, i
    cuda.mitchell_square(x, out=out[0], stream=8)
    trace.capture(None)
    assert not _calls.kept._for_good
    assert all(tensor.array.tolist() == [1.0] * 3 for tensor in out)
    own.clear()
    gc.collect()
    assert trace.host_waits() == 0


def test_a_graph_takes_nothing_by_dlpack(trace: Trace) -> None:
    """Its library would let the stream wait for what is outside of the graph."""
    array = exported(np.ones(3, np.float32))

    class Only:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, **_: Any) -> object:
            raise AssertionError("asked")

    trace.capture(64)
    try:
        with pytest.raises(RuntimeError, match=r"^CUDA graphs cannot capture a, an array that is read by DLPack"):
            cuda.mitchell_square(Only(), stream=64)
        cuda.mitchell_square(array, out=ones(3), stream=64)
    finally:
        trace.capture(None)
    with pytest.raises(TypeError, match="can be read by DLPack"):
        cuda.mitchell_square(Only(), stream=64)


def test_arrays_are_free_after_attention_and_lists(trace: Trace) -> None:
    """Which say when they have used one: nobody waits for the device, and who reads what they wrote waits for them."""

    def array(*shape: int) -> cuda.Array:
        made = exported(np.ones(shape, np.float32))
        made._memory.end(1)
        return made

    q = array(1, 1, 4, 4)
    y, state = cuda.linear_attention(q, q, q, return_state=True, stream=64)
    cuda.nystrom_attention(q, q, q, num_landmarks=2, out=y, stream=65)
    token = array(1, 1, 4)
    cuda.linear_attention_step_(token, token, token, state, stream=66)
    trace.waits()
    cuda.mitchell_square(y, stream=67)
    assert (67, 65) in trace.waits()
    cuda.mitchell_square(state[0], stream=67)
    assert (67, 66) in trace.waits()
    cuda.ema_update_([y], [q], 0.5, stream=68)
    trace.waits()
    cuda.mitchell_square(y, stream=67)
    assert (67, 68) in trace.waits()
    lists = [cuda.TensorList([x], verify=False) for x in (y, q)]
    for stream in (69, 70):
        cuda.ema_update_(*lists, 0.5, stream=stream)
    trace.waits()
    cuda.mitchell_square(y, stream=67)
    assert {(67, 69), (67, 70)} <= set(trace.waits())
    packed = array(1, 4, 4)
    cuda.linear_attention(packed, packed, packed, cu_seqlens=[0, 4], stream=65)
    del q, y, state, token, lists, packed
    gc.collect()
    assert trace.host_waits() == 0


def test_more_blocks_than_a_grid_has_are_refused(shim: Shim) -> None:
    native, shape = _runtime.module(), (2**32, 1, 1)
    same, out = (2**45, shape, (0, 0, 0)), (2**44, shape, (1, 0, 0))
    multiplier = native.Multiplier(tuple(Multiplier().spec("mul")))
    for code in (_arrays.DTYPES.index("float32"), _arrays.DTYPES.index("float64")):
        with pytest.raises(RuntimeError, match=r"^CUDA: "):
            native.matmul(multiplier, code, same, same, out, 0, 1)
    with pytest.raises(RuntimeError, match=r"^CUDA: "):
        native.lut_matmul(same, same, np.zeros((256, 256), np.int32), False, out, 0, 1)


# --- refusals ----------------------------------------------------------------------------------------------------------------


def ones(*shape: int, dtype: Any = np.float32, **changes: Any) -> Fake:
    return Fake(np.ones(shape, dtype), **changes)


def off_by_one(array: Any) -> Fake:
    """A copy that is not aligned to its elements."""
    bytes_of = np.zeros(array.nbytes + 1, np.uint8)
    return Fake(bytes_of[1:].view(array.dtype).reshape(array.shape))


def test_out_of_lut_matmul_is_aligned(shim: Shim) -> None:
    a, table = ones(2, 2, dtype=np.uint8), np.ones((256, 256), np.int32)
    for dtype in (np.int32, np.int64):
        with pytest.raises(ValueError, match=r"^out must be aligned to its elements"):
            cuda.lut_matmul(a, a, table, out=off_by_one(np.zeros((2, 2), dtype)))


REFUSED = {
    "host array": (lambda: (np.ones(3),), TypeError, r"^a must be an array on a GPU .*, got an array of shape"),
    "list": (lambda: ([1.0],), TypeError, r"^a must be an array on a GPU .*, got an object of type list"),
    "number": (lambda: (1.0,), TypeError, r"^a must be an array on a GPU .*, got 1.0"),
    "None": (lambda: (None,), TypeError, r"^a must be an array on a GPU .*, got None"),
    "integers": (lambda: (ones(3, dtype=np.int32),), TypeError, r"^a must be of dtype float16.*, got int32"),
    "complex": (lambda: (ones(3, dtype=np.complex64),), TypeError, r"^a must be of dtype float16.*, got <c8"),
    "byte order": (lambda: (ones(3, dtype=">f4"),), TypeError, r"^a must be in native byte order, got >f4"),
    "mask": (lambda: (ones(3, mask=ones(3)),), TypeError, r"^a must be an array without a mask"),
    "stream 0": (lambda: (ones(3, stream=0),), ValueError, r"^a must be on a stream other than 0"),
    "incomplete": (lambda: (ones(3, data=5),), TypeError, r"^a must be an array on a GPU, got one whose"),
    "tensor of the CPU": (
        lambda: (FakeTensor(np.ones(3), "cpu"),),
        TypeError,
        r"^a must be a tensor on a GPU, got one on cpu",
    ),
    "strides": (lambda: (ones(3, strides=(5,)),), ValueError, r"^a must be of strides in whole elements"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_array_on_a_gpu_is_refused(shim: Shim, name: str) -> None:
    make, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        cuda.mitchell_sqrt(*make())


def test_operands_that_do_not_fit_are_refused(shim: Shim) -> None:
    for b, kind, text in (
        (ones(3, dtype=np.float64), TypeError, r"^b must be of dtype float32, as a, got float64"),
        (ones(4), ValueError, r"^b must be of a shape that broadcasts with \(3,\), got \(4,\)"),
        (
            FakeTensor(np.ones(3, np.float32), "cuda:1"),
            ValueError,
            r"^b must be on device 0, where a is, got .* device 1",
        ),
    ):
        with pytest.raises(kind, match=text):
            cuda.mitchell_mul(ones(3), b, stream=1)
    with pytest.raises(ValueError, match=r"^multiplier must be one that defines div"):
        cuda.mitchell_div(ones(3), 2.0, multiplier=Multiplier("lmul"))
    with pytest.raises(TypeError, match=r"^multiplier must be a fastops.Multiplier"):
        cuda.mitchell_mul(ones(3), 2.0, multiplier="lmul")


def test_results_that_do_not_fit_are_refused(shim: Shim) -> None:
    a = np.ones(8, np.float32)
    for out, kind, text in (
        (ones(8, dtype=np.float64), TypeError, r"^out must be of dtype float32, got float64"),
        (ones(7), ValueError, r"^out must be of shape \(8,\), got \(7,\)"),
        (ones(8, read_only=True), ValueError, r"^out must be writable"),
        (
            Fake(np.broadcast_to(np.float32(1), (8,))),
            ValueError,
            r"^out must be an array whose elements are all distinct",
        ),
        (np.ones(8, np.float32), TypeError, r"^out must be an array on a GPU"),
    ):
        with pytest.raises(kind, match=text):
            cuda.mitchell_sqrt(Fake(a), out=out)
    long = np.ones(9, np.float32)
    with pytest.raises(ValueError, match=r"^out must be memory apart from a, or exactly it"):
        cuda.mitchell_sqrt(Fake(long[:8]), out=Fake(long[1:]))
    with pytest.raises(ValueError, match=r"^arrays must have at most 8 axes"):
        cuda.mitchell_sqrt(Fake(np.ones((3,) * 9, np.float32)[(slice(None, None, 2),) * 9]))


def test_cpu_functions_name_the_way_to_the_gpu(shim: Shim) -> None:
    for call in (
        lambda: fastops.mitchell_matmul(ones(2, 2), ones(2, 2)),
        lambda: fastops.ema_update_([ones(2)], [ones(2)], 0.5),
    ):
        with pytest.raises(TypeError, match=r"host memory.*fastops\.cuda|fastops\.cuda.*"):
            call()


# --- gradients, element by element -------------------------------------------------------------------------------------------

MODES = ("exact", "ste", "mimic")


def native(name: str, *operands: Any, **options: Any) -> Any:
    """The CPU's kernel on a level with FMA."""
    from fastops.native import mitchell

    with np.errstate(all="ignore"):
        return getattr(mitchell, name)(*operands, **({"multiplier": Multiplier()} | options))


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", BINARY)
def test_gradients_have_the_bits_of_the_cpu(
    gpu: Any, op: str, mode: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = f"mitchell_{op}_grad"
    row, column = specials(name), specials(name)[:, np.newaxis]
    special = [np.ascontiguousarray(x) for x in np.broadcast_arrays(row, column, row[::-1])]
    samples = [special, [sample(name, 2051, seed) for seed in range(3)]]
    samples.append([x[:2040].reshape(40, 51).T for x in samples[1]])
    for operands in samples:
        got = made_by(gpu, function, monkeypatch, *operands, mode=mode)
        want = native(function, *operands, mode=mode)
        for x, y in zip(got, want, strict=True):
            assert_same_bits(x, y, *operands)
    operands = [sample(name, 301, seed) for seed in range(3)]
    for kind, options in MULTIPLIERS.items():
        multiplier = Multiplier(**options)
        if kind != "plain" and multiplier._has(op):
            got = made_by(gpu, function, monkeypatch, *operands, multiplier=multiplier, mode=mode)
            want = native(function, *operands, multiplier=multiplier, mode=mode)
            for x, y in zip(got, want, strict=True):
                assert_same_bits(x, y, *operands)


@pytest.mark.parametrize("name", FLOATS)
def test_gradients_are_summed_to_the_operands(gpu: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((5, 1), (7,)),
        ((3, 1, 4), (1, 5, 1)),
        ((), (6,)),
        ((), ()),
        ((0, 3), (3,)),
        ((1,), (0,)),
        # In several parts, by threads side by side and one behind the other.
        ((5000, 40), (40,)),
        ((3, 20000), (3, 1)),
    ]
    for i, (first, second) in enumerate(shapes):
        whole = np.broadcast_shapes(first, second)
        a, b, dy = (near_one(FLOATS[name], int(np.prod(s)), i).reshape(s) for s in (first, second, whole))
        dy = dy / dy.dtype.type(16)  # what is summed stays within float16
        op, multiplier = BINARY[i % 2], Multiplier(segments=4) if i % 3 == 1 else Multiplier()
        options = {"multiplier": multiplier, "mode": MODES[i % 3]}
        got = made_by(gpu, f"mitchell_{op}_grad", monkeypatch, a, b, dy, **options)
        every = [np.array(np.broadcast_to(x, whole)) for x in (a, b)]
        each = [x.astype(np.float64) for x in native(f"mitchell_{op}_grad", *every, dy, **options)]
        for x, terms, shape in zip(got, each, (first, second), strict=True):
            assert x.shape == shape
            assert x.dtype == FLOATS[name]
            want, size = (np.asarray(sum_to(y, shape)) for y in (terms, np.abs(terms)))
            bound = tolerance.matmul(size, max(1, terms.size // max(1, x.size)), FLOATS[name])
            assert (np.abs(x.astype(np.float64) - want) <= bound).all(), (op, shapes[i])


def test_gradients_refuse_what_does_not_fit(shim: Shim) -> None:
    for name in ("mitchell_mul_grad", "mitchell_div_grad"):
        function = getattr(cuda, name)
        for operands, kind, text in (
            ((ones(3), ones(4), ones(3)), ValueError, r"^b must be of a shape that broadcasts with \(3,\), got \(4,\)"),
            ((ones(3), ones(1), ones(1)), ValueError, r"^dy must be of shape \(3,\), got \(1,\)"),
            ((ones(3), ones(3), ones(3, dtype=np.float64)), TypeError, r"^dy must be of dtype float32, as a"),
            ((ones(3), 2.0, ones(3)), TypeError, r"^b must be an array on a GPU, got 2.0"),
            ((ones(3), ones(3), np.ones(3)), TypeError, r"^dy must be an array on a GPU"),
        ):
            with pytest.raises(kind, match=text):
                function(*operands)
        with pytest.raises(ValueError, match=r"^mode must be 'exact' or 'ste' or 'mimic', got 'mimik'; did you mean"):
            function(ones(3), ones(3), ones(3), mode="mimik")
    with pytest.raises(ValueError, match=r"^multiplier must be one that defines div"):
        cuda.mitchell_div_grad(ones(3), ones(3), ones(3), multiplier=Multiplier("lmul"))


# --- matrix products ---------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (2, 3, 4), (5, 8, 3), (17, 9, 33), (64, 16, 64), (65, 31, 70), (3, 200, 2), (0, 3, 2), (2, 0, 3)]


def matrix(name: str, shape: tuple[int, ...], seed: int) -> Any:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    x[rng.random(shape) < 0.2] = 0.0
    return (x * rng.choice([-1.0, 1.0], shape)).astype(FLOATS[name])


def product(gpu: Any, a: Any, b: Any, **options: Any) -> Any:
    shape = np.matmul(np.zeros(a.shape), np.zeros(b.shape)).shape
    out = options.pop("out", None)
    out = gpu.empty(shape, a.dtype) if out is None else out
    result = cuda.mitchell_matmul(gpu.put(a), gpu.put(b), out=out, **(gpu.options | options))
    assert result is out
    return gpu.get(result)


def check_product(got: Any, a: Any, b: Any, multiplier: Multiplier) -> None:
    two = [x[None] if i == 0 and x.ndim == 1 else x[:, None] if x.ndim == 1 else x for i, x in enumerate((a, b))]
    with np.errstate(all="ignore"):
        want = reference.mitchell_matmul(*two, multiplier=multiplier, out=None).reshape(got.shape).astype(np.float64)
        size = reference.mitchell_matmul(*(np.abs(x) for x in two), multiplier=multiplier, out=None)
        bound = tolerance.matmul(size.astype(np.float64), a.shape[-1], a.dtype).reshape(got.shape)
        x = got.astype(np.float64)
        same = (x == want) | (np.isnan(x) & np.isnan(want))
        assert (same | (np.abs(x - want) <= bound)).all(), np.abs(x - want).max()


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_is_within_tolerance(gpu: Any, shape: tuple[int, int, int], name: str) -> None:
    m, k, n = shape
    a, b = matrix(name, (m, k), 1), matrix(name, (k, n), 2)
    check_product(product(gpu, a, b), a, b, Multiplier())


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("kind", MULTIPLIERS)
def test_matmul_of_every_multiplier_is_within_tolerance(gpu: Any, kind: str, name: str) -> None:
    multiplier = Multiplier(**MULTIPLIERS[kind])
    a, b = matrix(name, (18, 19), 1), matrix(name, (19, 20), 2)
    check_product(product(gpu, a, b, multiplier=multiplier), a, b, multiplier)


def test_matmul_of_large_tiles_is_within_tolerance(gpu: Any) -> None:
    # Enough tiles of 128 x 128 in the batch to be worth them.
    a, b = matrix("f32", (128, 2, 9), 1), matrix("f32", (9, 3), 2)
    check_product(product(gpu, a, b), a, b, Multiplier())


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_matmul_with_zeros_is_zero(gpu: Any, name: str) -> None:
    # A zero of b leaves the mantissa of a without an exponent, which must not count.
    a, b = np.full((3, 4), 1.5 * 2.0**60, FLOATS[name]), np.zeros((4, 2), FLOATS[name])
    for kind in ("plain", "min-mse", "segments-16"):
        assert not product(gpu, a, b, multiplier=Multiplier(**MULTIPLIERS[kind])).any()


def operands() -> Iterator[tuple[str, Any, Any]]:
    a, b = matrix("f32", (4, 20, 30), 1), matrix("f32", (4, 30, 10), 2)
    yield "batch", a, b
    yield "batch of one", a[:1], b
    yield "batch beside a matrix", a, b[0]
    yield "two axes of batch", a.reshape(2, 2, 20, 30), b[:2, None]
    yield "transposed", matrix("f32", (30, 20), 1).T, matrix("f32", (10, 30), 2).T
    yield "steps", a[0, ::2, ::3], b[0, ::3, ::2]
    yield "reversed", a[0, ::-1, ::-1], b[0, ::-1]
    yield "row", a[0, 0], b[0]
    yield "column", a[0], b[0, :, 0]
    yield "row and column", a[0, 0], b[0, :, 0]


@pytest.mark.parametrize(("a", "b"), [pytest.param(a, b, id=name) for name, a, b in operands()])
def test_matmul_of_every_layout_is_within_tolerance(gpu: Any, a: Any, b: Any) -> None:
    check_product(product(gpu, a, b), a, b, Multiplier())


def test_matmul_writes_where_it_is_told(gpu: Any) -> None:
    a, b = matrix("f32", (20, 30), 1), matrix("f32", (30, 10), 2)
    check_product(product(gpu, a, b, out=gpu.put(np.empty((10, 20), np.float32).T)), a, b, Multiplier())


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("kind", ["plain", "minimax", "segments-16", "equation", "k1", "flush"])
def test_matmul_of_special_values_is_that_of_the_reference(gpu: Any, kind: str, name: str) -> None:
    values = specials(name)
    for value in values:
        # One special value in a product of few terms; the others are powers of two.
        a, b = np.full((3, 5), 2.0, FLOATS[name]), np.full((5, 4), 0.5, FLOATS[name])
        a[1, 2], b[3, 1] = value, values[7]
        multiplier = Multiplier(**MULTIPLIERS[kind])
        check_product(product(gpu, a, b, multiplier=multiplier), a, b, multiplier)
        check_product(product(gpu, b.T, a.T, multiplier=multiplier), b.T, a.T, multiplier)


@pytest.mark.parametrize(("left", "right"), [("uint8", "uint8"), ("int8", "uint8"), ("int8", "int8")])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 7), (64, 32, 64), (70, 3, 66), (2, 0, 3)])
def test_lut_matmul_is_exact(gpu: Any, shape: tuple[int, int, int], left: str, right: str) -> None:
    m, k, n = shape
    rng = np.random.default_rng(5)
    a, b = (rng.integers(0, 256, s, dtype=np.uint8).view(t) for s, t in (((m, k), left), ((k, n), right)))
    for table in (Multiplier().table(8), rng.integers(-(2**31), 2**31, (256, 256)), rng.integers(0, 2**32, (256, 256))):
        want = fastops.lut_matmul(a, b, table)
        out = gpu.empty(want.shape, want.dtype)
        assert cuda.lut_matmul(gpu.put(a), gpu.put(b), table, out=out, **gpu.options) is out
        assert_same_bits(gpu.get(out), want)


def test_matmul_refuses_what_does_not_fit(shim: Shim) -> None:
    a = ones(2, 3)
    for b, kind, text in (
        (ones(4, 2), ValueError, r"^b must be of shape \(\.\.\., 3, N\) to follow a of shape \(2, 3\), got \(4, 2\)"),
        (ones(3, 2, dtype=np.float64), TypeError, r"^b must be of dtype float32, as a"),
        (2.0, TypeError, r"^b must be an array on a GPU, got 2.0"),
        (Fake(np.float32(1)[...]), ValueError, r"^b must be an array of at least 1 dimension"),
    ):
        with pytest.raises(kind, match=text):
            cuda.mitchell_matmul(a, b)
    with pytest.raises(ValueError, match=r"^b must be of leading dimensions that broadcast"):
        cuda.mitchell_matmul(ones(2, 2, 3), ones(3, 3, 2))
    square = np.ones((3, 3), np.float32)
    with pytest.raises(ValueError, match=r"^out must be memory apart from a"):
        cuda.mitchell_matmul(Fake(square), ones(3, 3), out=Fake(square))
    with pytest.raises(TypeError, match=r"^a must be of dtype uint8 or int8, got float32"):
        cuda.lut_matmul(a, a, Multiplier().table(8))


# --- lists of tensors --------------------------------------------------------------------------------------------------------

# On both sides of what a thread, a block and a chunk take.
SIZES = (0, 1, 3, 4, 5, 31, 33, 1000, 1027, 16384, 16389, 40001)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The CPU's functions on a level with FMA, whose bits the GPU's are."""
    from fastops import native, optim

    levels = [level for level in ("v3", "v4", "neon") if level in fastops.show_config("dict")["targets_runnable"]]
    if not levels:
        pytest.skip("this CPU has no level with FMA")
    monkeypatch.setattr(optim, "_backend", native)
    with fastops.target(levels[0]):
        yield optim


def tensors(dtype: Any, seed: int, sizes: Any = SIZES) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(n).astype(dtype) for n in sizes]


def check_lists(gpu: Any, cpu: Any, call: Any, *lists: list[Any], **options: Any) -> None:
    """`call` on the GPU against `cpu`, which changes copies."""
    host = [[x.copy() for x in arrays] for arrays in lists]
    device = [[gpu.put(x.copy()) for x in arrays] for arrays in lists]
    with np.errstate(all="ignore"):
        cpu(*host, **options)
    call(*device, **(gpu.options | options))
    for want, got in zip(host, device, strict=True):
        for x, y in zip(want, got, strict=True):
            assert_same_bits(gpu.get(y), x)


PAIRS = [(s, p) for s in ("f32", "f64") for p in FLOATS]


@pytest.mark.parametrize(("s", "p"), PAIRS, ids=[f"{s}-{p}" for s, p in PAIRS])
@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 0.999, 1.0])
def test_ema_has_the_bits_of_the_cpu(gpu: Any, fused: Any, decay: float, s: str, p: str) -> None:
    check_lists(gpu, fused.ema_update_, cuda.ema_update_, tensors(FLOATS[s], 1), tensors(FLOATS[p], 2), decay=decay)


@pytest.mark.parametrize("p", FLOATS)
def test_stochastic_ema_has_the_bits_of_the_cpu(gpu: Any, fused: Any, p: str) -> None:
    if "bf16" not in FLOATS:
        pytest.skip("ml_dtypes is not installed")
    for decay in (0.0, 0.9, 0.3):
        options = {"decay": decay, "rounding": "stochastic", "seed": 12345678901234567890}
        check_lists(
            gpu, fused.ema_update_, cuda.ema_update_, tensors(FLOATS["bf16"], 1), tensors(FLOATS[p], 2), **options
        )


def test_ema_of_edge_values_has_the_bits_of_the_cpu(gpu: Any, fused: Any) -> None:
    for s in ("f32", "f64"):
        shadows = [np.repeat(specials(s), 12), patterns(FLOATS[s], 1000, 1)]
        params = [np.tile(specials(s), 12), patterns(FLOATS[s], 1000, 2)]
        check_lists(gpu, fused.ema_update_, cuda.ema_update_, shadows, params, decay=0.7)


def test_ema_takes_a_decay_for_each_tensor(gpu: Any, fused: Any) -> None:
    decay = [i / (len(SIZES) - 1) for i in range(len(SIZES))]
    check_lists(gpu, fused.ema_update_, cuda.ema_update_, tensors(np.float32, 1), tensors(np.float16, 2), decay=decay)


def test_ema_of_tensors_that_are_not_aligned_has_the_bits_of_the_cpu(shim: Shim, fused: Any) -> None:
    shadows, params = tensors(np.float32, 1), tensors(np.float16, 2)
    device = (
        [Fake(np.concatenate([x[:1], x])[1:]) for x in shadows],
        [Fake(np.concatenate([x[:1], x])[1:]) for x in params],
    )
    cuda.ema_update_(*device, decay=0.9)
    fused.ema_update_(shadows, params, decay=0.9)
    for x, y in zip(shadows, device[0], strict=True):
        assert_same_bits(y.array, x)


def test_ema_takes_thousands_of_tensors_of_mixed_dtypes(gpu: Any, fused: Any) -> None:
    sizes = [n % 7 for n in range(1500)]
    mixed = [
        [
            a if n % 2 else b
            for n, (a, b) in enumerate(zip(tensors(np.float32, i, sizes), tensors(np.float64, i, sizes), strict=True))
        ]
        for i in (1, 2)
    ]
    check_lists(gpu, fused.ema_update_, cuda.ema_update_, *mixed, decay=0.9)


def test_ema_takes_any_order_of_the_axes(gpu: Any, fused: Any) -> None:
    shadows, params = ([np.asfortranarray(x.reshape(7, 11)) for x in tensors(np.float32, i, (77,))] for i in (1, 2))
    want = [x.copy(order="K") for x in shadows]
    fused.ema_update_(want, params, decay=0.9)
    device = [gpu.put(x) for x in shadows]
    cuda.ema_update_(device, [gpu.put(x) for x in params], decay=0.9, **gpu.options)
    assert_same_bits(gpu.get(device[0]), want[0])


STEPS = [(p, g) for p, g in (("f32", "f32"), ("f32", "f16"), ("f32", "bf16"), ("f64", "f64")) if g in FLOATS]


@pytest.mark.parametrize(("p", "g"), STEPS, ids=[f"{p}-{g}" for p, g in STEPS])
@pytest.mark.parametrize("follows", [False, True])
def test_adamw_has_the_bits_of_the_cpu(gpu: Any, fused: Any, p: str, g: str, follows: bool) -> None:
    dtype = FLOATS[p]
    lists = [tensors(dtype, 1), tensors(FLOATS[g], 2), tensors(dtype, 3), [np.abs(x) for x in tensors(dtype, 4)]]
    for options in ({}, {"weight_decay": 0.1, "zero_grad": True}, {"weight_decay": 0.1, "decoupled": False}):
        if follows:
            steps = [
                lambda *x, f=f, **k: f(*x[:4], ema=x[4], ema_decay=0.9, **k)
                for f in (fused.adamw_step_, cuda.adamw_step_)
            ]
            check_lists(gpu, *steps, *lists, tensors(dtype, 5), step=3, lr=0.01, **options)
        else:
            check_lists(gpu, fused.adamw_step_, cuda.adamw_step_, *lists, step=3, lr=0.01, **options)


@pytest.mark.parametrize(("p", "g"), STEPS, ids=[f"{p}-{g}" for p, g in STEPS])
def test_sgd_has_the_bits_of_the_cpu(gpu: Any, fused: Any, p: str, g: str) -> None:
    dtype = FLOATS[p]
    lists = [tensors(dtype, 1), tensors(FLOATS[g], 2), tensors(dtype, 3)]
    for options in (
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "zero_grad": True},
        {"momentum": 0.9, "dampening": 0.5, "accumulate": (0, 2)},
        {"momentum": 0.9, "accumulate": (1, 2)},
    ):
        check_lists(gpu, fused.sgd_step_, cuda.sgd_step_, *lists, lr=0.1, **options)
        steps = [
            lambda *x, f=f, **k: f(*x[:3], ema=x[3], ema_decay=0.9, **k) for f in (fused.sgd_step_, cuda.sgd_step_)
        ]
        check_lists(gpu, *steps, *lists, tensors(dtype, 5), lr=0.1, **options)
    for options in ({}, {"weight_decay": 0.01}):
        plain = [lambda *x, f=f, **k: f(*x[:2], None, **k) for f in (fused.sgd_step_, cuda.sgd_step_)]
        check_lists(gpu, *plain, *lists[:2], lr=0.1, **options)
        steps = [
            lambda *x, f=f, **k: f(*x[:2], None, ema=x[2], ema_decay=0.9, **k)
            for f in (fused.sgd_step_, cuda.sgd_step_)
        ]
        check_lists(gpu, *steps, *lists, lr=0.1, **options)


@pytest.mark.parametrize("decay", [0.5, [0.5]])
def test_a_list_is_read_anew_in_every_call_unless_it_says_not_to(shim: Shim, decay: Any) -> None:
    first, second = np.zeros(5, np.float32), np.zeros(5, np.float32)
    params = [ones(5)]
    for verify, moved in ((True, second), (False, first)):
        first[...] = second[...] = 0.0
        tensor = FakeTensor(first)
        shadows = cuda.TensorList([tensor], verify=verify)
        kept = cuda.TensorList(params, verify=verify)
        cuda.ema_update_(shadows, kept, decay, stream=1)
        assert first[0] == 0.5
        tensor.array = second
        cuda.ema_update_(shadows, kept, decay, stream=1)
        assert (first[0], second[0]) == ((0.5, 0.5) if moved is second else (0.75, 0.0))
        shadows.refresh()
        cuda.ema_update_(shadows, kept, decay, stream=1)
        assert second[0] == (0.75 if moved is second else 0.5)


def test_plans_are_shared_by_calls_with_the_same_memory(shim: Shim) -> None:
    native = _runtime.module()
    lists = [ones(5), ones(6)], [ones(5), ones(6)]
    from fastops import _tensors

    roles = _tensors.ema_roles(1)
    plan = native.plan(roles, lists, described, 1)
    assert native.plan(roles, lists, described, 1) is plan
    assert native.plan(roles, ([ones(5), ones(6)], lists[1]), described, 1) is not plan
    native.forget_plans()
    assert native.plan(roles, lists, described, 1) is not plan


def test_a_list_outlives_the_streams_that_it_was_used_on(shim: Shim) -> None:
    """Its table waits for events of its own: the handle of a stream that is gone names nothing, or another stream."""
    runtime = ctypes.CDLL(_runtime.module().__file__)
    native = _runtime.module()
    native.forget_plans()
    runtime.fastops_shim_faults()
    shadows, params = [Fake(np.zeros(3, np.float32))], [ones(3)]
    for stream in (64, 65, 66):
        cuda.ema_update_(shadows, params, 0.5, stream=stream)
        runtime.fastops_shim_end_stream(ctypes.c_void_p(stream))
    assert shadows[0].array.tolist() == [0.875] * 3
    native.forget_plans()
    assert runtime.fastops_shim_faults() == 0


def test_a_graph_takes_a_call_whose_table_is_there(shim: Shim) -> None:
    runtime = ctypes.CDLL(_runtime.module().__file__)
    shadows, params = [Fake(np.zeros(3, np.float32))], [ones(3)]
    cuda.ema_update_(shadows, params, 0.5, stream=64)
    for there in (False, True):
        runtime.fastops_shim_capture(ctypes.c_void_p(64), 0)
        try:
            if there:
                cuda.ema_update_(shadows, params, 0.5, stream=64)
            else:
                with pytest.raises(RuntimeError, match="a call whose list is not on the GPU yet"):
                    cuda.ema_update_(shadows, params, 0.5, stream=64)
        finally:
            runtime.fastops_shim_capture(None, 0)
        runtime.fastops_shim_finish_stream(ctypes.c_void_p(64))
    assert runtime.fastops_shim_faults() == 0
    assert shadows[0].array.tolist() == [0.75] * 3


def test_a_graph_refuses_what_comes_from_host_memory(shim: Shim) -> None:
    """It would copy from memory that holds something else by then."""
    runtime = ctypes.CDLL(_runtime.module().__file__)
    first, second, params = [Fake(np.zeros(3, np.float32))], [Fake(np.zeros(3, np.float32))], [ones(3)]
    cuda.ema_update_(first, params, 0.5, stream=64)
    array = cuda.mitchell_square(ones(3), stream=64)
    cuda.ema_update_([array], params, 0.5, stream=64)
    runtime.fastops_shim_idle_waits()
    row = Fake(np.ones((1, 5, 4), np.float32))
    numbers, out = Fake(np.ones((2, 2), np.uint8)), Fake(np.zeros((2, 2), np.int32))
    table = np.ones((256, 256), np.int32)
    runtime.fastops_shim_capture(ctypes.c_void_p(64), 0)
    runtime.fastops_shim_allocations()
    try:
        with pytest.raises(RuntimeError, match=r"^CUDA graphs cannot capture a call whose list is not on the GPU yet"):
            cuda.ema_update_(second, params, 0.5, stream=64)
        with pytest.raises(RuntimeError, match=r"^CUDA graphs cannot capture decays of every tensor"):
            cuda.ema_update_(first, params, [0.5], stream=64)
        with pytest.raises(RuntimeError, match=r"^CUDA graphs cannot capture decays of every tensor"):
            cuda.ema_update_([array], params, [0.5], stream=64)
        del array  # which no graph has
        assert runtime.fastops_shim_idle_waits() == 0
        with pytest.raises(RuntimeError, match=r"^CUDA graphs cannot capture offsets in host memory"):
            cuda.linear_attention(row, row, row, cu_seqlens=[0, 5], stream=64)
        for given in (out, None):
            with pytest.raises(RuntimeError, match=r"^CUDA graphs cannot capture tables in host memory"):
                cuda.lut_matmul(numbers, numbers, table, out=given, stream=64)
        none = Fake(np.ones((2, 0), np.uint8))
        cuda.lut_matmul(numbers, none, table, out=Fake(np.zeros((2, 0), np.int32)), stream=64)
    finally:
        runtime.fastops_shim_capture(None, 0)
    assert runtime.fastops_shim_allocations() == 0
    assert runtime.fastops_shim_faults() == 0
    assert (first[0].array.tolist(), second[0].array.tolist()) == ([0.5] * 3, [0.0] * 3)
    cuda.ema_update_(second, params, 0.5, stream=64)
    assert second[0].array.tolist() == [0.5] * 3


def test_a_stream_that_is_gone_is_refused_by_the_shim(shim: Shim) -> None:
    """Without which the test above could not fail."""
    runtime = ctypes.CDLL(_runtime.module().__file__)
    runtime.fastops_shim_end_stream(ctypes.c_void_p(64))
    try:
        with pytest.raises(RuntimeError, match="CUDA: an error of the shim"):
            cuda.ema_update_([Fake(np.zeros(3, np.float32))], [ones(3)], 0.5, stream=64)
    finally:
        assert runtime.fastops_shim_faults() > 0


def test_a_list_is_gone_with_its_last_reference(shim: Shim) -> None:
    """Not when the collector runs: that may be long after the GPU's memory was wanted."""
    arrays = [Fake(np.ones(3, np.float32), stream=1) for _ in range(2)]
    params, shadows = (cuda.TensorList([x], verify=False) for x in arrays)
    before = [weakref.ref(x) for x in arrays]
    gc.disable()
    try:
        cuda.ema_update_(shadows, params, 0.5, stream=1)
        del params, shadows, arrays
        assert [x() for x in before] == [None, None]
    finally:
        gc.enable()


def test_a_tensor_alone_is_a_list_also_where_it_refuses_the_interface(shim: Shim) -> None:
    class Recorded(FakeTensor):
        """As torch's tensors with requires_grad."""

        requires_grad = True

        @property
        def __cuda_array_interface__(self) -> Any:
            raise RuntimeError("requires grad")

        def __len__(self) -> int:
            raise AssertionError("it is no list")

        def __dlpack__(self, **_: object) -> Any:
            raise AssertionError("nor exported")

    p, s = np.ones(3, np.float32), np.zeros(3, np.float32)
    cuda.ema_update_(Fake(s), Recorded(p), 0.75, stream=1)
    assert s.tolist() == [0.25] * 3


def test_lists_that_do_not_fit_are_refused_before_anything_is_written(shim: Shim) -> None:
    good = np.zeros(4, np.float32)
    whole = np.zeros(8, np.float32)
    for shadows, params, kind, text in (
        ([Fake(good)], [], ValueError, r"^shadows must be a list of 0 arrays, as many as params, got 1"),
        (
            [Fake(good), ones(3)],
            [ones(4), ones(4)],
            ValueError,
            r"^shadows\[1\] must be of shape \(4,\) as params\[1\], got \(3,\)",
        ),
        (
            [Fake(good), ones(4, dtype=np.int32)],
            [ones(4), ones(4)],
            TypeError,
            r"^shadows\[1\] must be of dtype float16",
        ),
        (
            [Fake(good), ones(4, dtype=np.float16)],
            [ones(4), ones(4)],
            TypeError,
            r"^shadows\[1\] must be of dtype bfloat16, float32",
        ),
        ([Fake(good), ones(4, read_only=True)], [ones(4), ones(4)], ValueError, r"^shadows\[1\] must be writable"),
        (
            [Fake(good), Fake(whole[::2])],
            [ones(4), ones(4)],
            ValueError,
            r"^shadows\[1\] must be in the memory order of params\[1\]",
        ),
        ([Fake(good), ones(4)], [ones(4), Fake(whole[::2])], ValueError, r"^params\[1\] must be an array without gaps"),
        (
            [Fake(good), Fake(good)],
            [ones(4), ones(4)],
            ValueError,
            r"^shadows\[\d\] must be memory apart from shadows\[\d\]",
        ),
        (
            [Fake(good), Fake(whole[:4])],
            [ones(4), Fake(whole[3:7])],
            ValueError,
            r"^shadows\[1\] must be memory apart from params\[1\]",
        ),
        ([Fake(good), np.ones(4)], [ones(4), ones(4)], TypeError, r"^shadows\[1\] must be an array on a GPU"),
        (
            [Fake(good), FakeTensor(np.ones(4, np.float32), "cuda:1")],
            [ones(4), ones(4)],
            ValueError,
            r"^shadows\[1\] must be on device 0",
        ),
    ):
        with pytest.raises(kind, match=text):
            cuda.ema_update_(shadows, params, 0.5, stream=1)
    assert not good.any()
    with pytest.raises(ValueError, match=r"^decay must be a finite number in \[0, 1\]"):
        cuda.ema_update_([Fake(good)], [ones(4)], 1.5)
    with pytest.raises(ValueError, match=r"^decay must be a number or 1 of them"):
        cuda.ema_update_([Fake(good)], [ones(4)], [0.5, 0.5])
    if "bf16" in FLOATS:
        with pytest.raises(
            TypeError, match=r"^shadows\[0\] must be of dtype float32 or float64, or bfloat16 with rounding"
        ):
            cuda.ema_update_([FakeTensor(good.astype(FLOATS["bf16"]))], [ones(4)], 0.5, stream=1)
    with pytest.raises(TypeError, match=r"^params\[0\] must be of dtype float32 or float64, got float16"):
        cuda.adamw_step_(*([ones(4, dtype=np.float16)] for _ in range(4)), step=1, lr=0.1)
    with pytest.raises(
        TypeError, match=r"^grads\[0\] must be of dtype float64, as the first list has there, got float32"
    ):
        cuda.sgd_step_([ones(4, dtype=np.float64)], [ones(4)], None, lr=0.1)
    assert not good.any()
