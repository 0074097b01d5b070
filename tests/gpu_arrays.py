# SPDX-License-Identifier: BSD-3-Clause
"""Arrays for the tests of fastops.cuda: in host memory for the shim, where kernels run as fibers, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

import fastops.cuda
from fastops.cuda import _arrays, _calls, _runtime

Array = np.ndarray[Any, np.dtype[Any]]


class Fake:
    """A NumPy array that says it is on a GPU, by `__cuda_array_interface__`."""

    def __init__(self, array: Array, *, stream: int | None = None, read_only: bool = False, **changes: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.__array_interface__["data"][0], read_only),
            "strides": None if array.flags.c_contiguous else array.strides,
            "stream": stream,
        } | changes


class FakeTensor:
    """The same for bfloat16, which that interface cannot name, as torch's tensors look."""

    requires_grad = False
    layout = "torch.strided"

    def __init__(self, array: Array, device: str = "cuda:0") -> None:
        self.array = array
        self.shape = array.shape
        self.dtype = f"torch.{array.dtype.name}"
        kind, _, index = device.partition(":")
        self.device = type("Device", (), {"type": kind, "index": int(index or 0), "__str__": lambda _: device})()

    def data_ptr(self) -> int:
        return int(self.array.__array_interface__["data"][0])

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def numel(self) -> int:
        return self.array.size

    def element_size(self) -> int:
        return self.array.itemsize

    def storage_offset(self) -> int:
        return 0

    def untyped_storage(self) -> Any:
        size = 1 + sum((n - 1) * abs(s) for n, s in zip(self.array.shape, self.stride(), strict=True))
        return type("Storage", (), {"nbytes": lambda _: size * self.array.itemsize})()

    def is_neg(self) -> bool:
        return False

    def detach(self) -> FakeTensor:
        return self


class Shim:
    """Kernels of the same sources, run on the CPU."""

    # Options of every call: FakeTensor has no library that knows a current stream.
    options: ClassVar[dict[str, Any]] = {"stream": 1}

    def put(self, array: Array) -> Any:
        return FakeTensor(array) if array.dtype.name == "bfloat16" else Fake(array)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        return self.put(np.empty(shape, dtype))

    def get(self, value: Any) -> Array:
        if isinstance(value, _arrays.Array):
            dtype = np.dtype(
                importlib.import_module("ml_dtypes").bfloat16 if value.dtype == "bfloat16" else value.dtype
            )
            size = int(np.prod(value.shape)) * dtype.itemsize
            memory = (ctypes.c_char * size).from_address(value._memory.address) if size else b""
            return np.ndarray(value.shape, np.dtype(f"u{dtype.itemsize}"), memory).view(dtype).copy()
        return value.array


class Device:
    """A GPU, through torch's tensors."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, torch: ModuleType) -> None:
        self.torch = torch

    def _dtype(self, dtype: np.dtype[Any]) -> Any:
        return getattr(self.torch, dtype.name)

    def put(self, array: Array) -> Any:
        flat = np.ascontiguousarray(array)
        raw = self.torch.from_numpy(flat.view(np.int16) if array.dtype.name == "bfloat16" else flat.copy())
        plain = raw.cuda().view(self._dtype(array.dtype)).reshape(array.shape)
        if array.flags.c_contiguous:
            return plain
        if any(s < 0 for s in array.strides):
            pytest.skip("torch has no negative strides")
        steps = [s // array.itemsize for s in array.strides]
        return self.torch.empty_strided(array.shape, steps, dtype=plain.dtype, device="cuda").copy_(plain)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        return self.torch.empty(shape, dtype=self._dtype(dtype), device="cuda")

    def get(self, value: Any) -> Array:
        host = value.cpu()
        if value.dtype is self.torch.bfloat16:
            return np.asarray(host.view(self.torch.int16).numpy().view(importlib.import_module("ml_dtypes").bfloat16))
        return np.asarray(host.numpy())


def made_by(gpu: Any, name: str, monkeypatch: pytest.MonkeyPatch, *operands: Array, **options: Any) -> list[Array]:
    """The results of a function of fastops.cuda that makes arrays of its own, which for a FakeTensor no library does."""
    if isinstance(gpu, Shim):
        monkeypatch.setattr(
            _calls, "empty_like", lambda like, shape, code, device, stream: _arrays.Array(shape, code, device, stream)
        )
    found = getattr(fastops.cuda, name)(*map(gpu.put, operands), **(gpu.options | options))
    return [gpu.get(x) for x in (found if isinstance(found, tuple) else (found,))]


def shim_module() -> ModuleType | None:
    """The test's build of the module, where the tests were built."""
    if importlib.util.find_spec("fastops._cuda_shim") is None:
        return None
    return importlib.import_module("fastops._cuda_shim")


def open_platform(kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The platform, or a skip that says why there is none."""
    if kind == "shim":
        module = shim_module()
        if module is None:
            pytest.skip("the shim is built with FASTOPS_CUDA_SHIM=ON, or FASTOPS_BUILD_TESTS=ON")
        monkeypatch.setattr(_runtime, "_loaded", module)
        _calls.kept.clear()  # of other tests, since events of the shim are not done by themselves
        return Shim()
    if not fastops.cuda.is_available():
        pytest.skip("no GPU")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch is built without CUDA")
    return Device(torch)


PLATFORMS = [pytest.param("shim", id="shim"), pytest.param("device", id="device", marks=pytest.mark.gpu)]
