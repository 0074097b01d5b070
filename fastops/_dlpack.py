# SPDX-License-Identifier: BSD-3-Clause
"""Arrays of other libraries that have DLPack and nothing else: the producer's own memory as an ndarray, or words why not."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _validate
from ._validate import AnyArray, Text

# kDLCPU and kDLCUDAHost, which any CPU may read.
_HOST = (1, 3)
_CUDA = (2, 13)
_GPUS = (7, 8, 10, 14, 15)
_BFLOAT16 = (4, 16, 1)
_READ_ONLY = 1


def is_bare(value: object) -> bool:
    """Whether DLPack is the one way to the elements of this object."""
    return hasattr(value, "__dlpack__") and not (hasattr(value, "__array__") or hasattr(value, "__array_interface__"))


def is_own_memory(value: object) -> bool:
    """Whether the array that NumPy makes of this object is the object's own memory, so that it may be written in place."""
    return isinstance(value, np.ndarray) or (
        not isinstance(value, np.generic) and (hasattr(value, "__array_interface__") or is_bare(value))
    )


def from_dlpack(name: str, value: Any) -> AnyArray:
    """The memory of a producer in host memory, never a copy.

    Read-only where the producer says so, and where it speaks a version of DLPack that cannot say.
    """
    try:
        device = int(value.__dlpack_device__()[0])
    except Exception as error:
        raise _refused(name, value) from error
    if device not in _HOST:
        got = Text("an array on a GPU" if device in _GPUS else f"an array on DLPack's device type {device}")
        raise _validate.wrong_type(name, "an array in host memory", _validate.ON_CUDA if device in _CUDA else got)
    try:
        return np.from_dlpack(value)
    except MemoryError:
        raise
    except Exception as error:
        # NumPy has no bfloat16 of its own.
        found = _from_bfloat16(name, value)
        if found is None:
            raise _refused(name, value) from error
        return found


def _refused(name: str, value: object) -> TypeError:
    got = Text(f"an object of type {_validate.clip(type(value).__name__, 30)} that does not export it")
    return _validate.wrong_type(name, "an array in host memory that NumPy can read by DLPack", got)


class _Memory:
    """Elements of 16 bits at an address, and the capsule that keeps them: its own destructor frees them."""

    def __init__(
        self, capsule: object, address: int, shape: tuple[int, ...], strides: tuple[int, ...], read_only: bool
    ) -> None:
        self.capsule = capsule
        self.__array_interface__ = {
            "version": 3,
            "data": (address, read_only),
            "shape": shape,
            "strides": strides,
            "typestr": "<u2",
        }


def _from_bfloat16(name: str, value: Any) -> AnyArray | None:
    """The producer's memory where its type is bfloat16, else None."""
    import ctypes

    class Tensor(ctypes.Structure):
        """DLTensor."""

        _fields_ = (
            ("data", ctypes.c_void_p),
            ("device", ctypes.c_int32 * 2),
            ("ndim", ctypes.c_int32),
            ("code", ctypes.c_uint8),
            ("bits", ctypes.c_uint8),
            ("lanes", ctypes.c_uint16),
            ("shape", ctypes.POINTER(ctypes.c_int64)),
            ("strides", ctypes.POINTER(ctypes.c_int64)),
            ("byte_offset", ctypes.c_uint64),
        )

    class Versioned(ctypes.Structure):
        """DLManagedTensorVersioned."""

        _fields_ = (
            ("version", ctypes.c_uint32 * 2),
            ("context", ctypes.c_void_p),
            ("deleter", ctypes.c_void_p),
            ("flags", ctypes.c_uint64),
            ("tensor", Tensor),
        )

    try:
        try:
            capsule = value.__dlpack__(max_version=(1, 0))
        except TypeError:
            capsule = value.__dlpack__()
    except Exception:  # noqa: BLE001
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    is_valid = ctypes.pythonapi.PyCapsule_IsValid
    is_valid.restype, is_valid.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]
    read_only = True
    if is_valid(capsule, b"dltensor_versioned"):
        managed = Versioned.from_address(pointer(capsule, b"dltensor_versioned"))
        if managed.version[0] != 1:
            return None
        tensor, read_only = managed.tensor, bool(managed.flags & _READ_ONLY)
    elif is_valid(capsule, b"dltensor"):
        tensor = Tensor.from_address(pointer(capsule, b"dltensor"))
    else:
        return None
    if (tensor.code, tensor.bits, tensor.lanes) != _BFLOAT16:
        return None
    dtype = _validate.bfloat16()
    if dtype is None:
        raise _validate.wrong_type(name, "of a dtype that NumPy knows", Text("bfloat16 without ml_dtypes"))
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        strides = tuple(2 * stride for stride in tensor.strides[: tensor.ndim])
    else:
        strides = np.empty(shape, np.uint16).strides
    if 0 in shape:
        return np.empty(shape, dtype)
    address = (tensor.data or 0) + tensor.byte_offset
    return np.asarray(_Memory(capsule, address, shape, strides, read_only)).view(dtype)
