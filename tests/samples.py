# SPDX-License-Identifier: BSD-3-Clause
"""Inputs that the tests share (bit patterns, special values, views of every kind) comparison bit by bit, and the run of an EMA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

FLOATS: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in (("f16", np.float16), ("bf16", bfloat16), ("f32", np.float32), ("f64", np.float64))
    if kind is not None
}
MANTISSA = {"f16": 10, "bf16": 7, "f32": 23, "f64": 52}
EXPONENT_BIAS = {"f16": 15, "bf16": 127, "f32": 127, "f64": 1023}
INTEGERS = tuple(np.dtype(c) for c in "bBhHiIlL")
WIDER = {"b": "h", "B": "H", "h": "i", "H": "I", "i": "l", "I": "L", "l": "l", "L": "L"}

UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits(x: Array) -> Array:
    """The bit patterns of floats, of integers themselves."""
    x = np.asarray(x)
    if x.dtype.kind in "iub":
        return x
    return np.ascontiguousarray(x).view(UNSIGNED[x.dtype.itemsize])


def assert_same_bits(got: Any, want: Any, *operands: Any) -> None:
    """Equal dtype, shape and bit patterns; one NaN is as good as another. Shows the first few differences."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    differ = bits(got) != bits(want)
    if got.dtype.kind not in "iub":
        differ &= ~(np.isnan(got) & np.isnan(want))
    if differ.any():
        where = np.argwhere(differ)[:5]
        lines = [
            f"at {tuple(map(int, i))}: got {got[tuple(i)]!r}, want {want[tuple(i)]!r}, operands "
            + ", ".join(repr(np.broadcast_to(x, got.shape)[tuple(i)]) for x in operands)
            for i in where
        ]
        raise AssertionError(f"{int(differ.sum())} of {got.size} elements differ\n" + "\n".join(lines))


def patterns(dtype: np.dtype[Any], n: int, seed: int) -> Array:
    """Random bit patterns: every exponent, subnormals, infinities and NaN come as they fall."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, n * dtype.itemsize, dtype=np.uint8)
    if dtype.kind in "iu":
        return raw.view(dtype)
    # A narrower view of ml_dtypes arrays goes through the unsigned integers.
    return raw.view(UNSIGNED[dtype.itemsize]).view(dtype)


def near_one(dtype: np.dtype[Any], n: int, seed: int) -> Array:
    """Normal numbers of moderate size and either sign; no product of two of them leaves the normal range."""
    rng = np.random.default_rng(seed)
    return (rng.choice([-1.0, 1.0], n) * rng.uniform(0.25, 4.0, n)).astype(dtype)


def specials(name: str) -> Array:
    """Twelve values: zeros, infinities, NaN, the ends of the normal and the subnormal range, ones."""
    dtype = FLOATS[name]
    m = MANTISSA[name]
    top = (1 << (dtype.itemsize * 8 - 1)) - (1 << m)
    sign = 1 << (dtype.itemsize * 8 - 1)
    one = EXPONENT_BIAS[name] << m
    raw = [
        0,
        sign,
        top,
        top | sign,
        top | 1 << (m - 1),
        1,
        (1 << m) - 1 | sign,
        1 << m,
        top - 1,
        one,
        one | sign,
        one | (1 << (m - 1)),
    ]
    return np.array(raw, UNSIGNED[dtype.itemsize]).view(dtype)


def edge_integers(dtype: np.dtype[Any]) -> Array:
    """The ends of the range, zero, powers of two and their neighbours."""
    info = np.iinfo(dtype)
    values = {0, 1, info.min, info.max}
    for k in range(info.bits):
        values |= {v for v in (2**k - 1, 2**k, 2**k + 1, 3 * 2**k // 2) for v in (v, -v) if info.min <= v <= info.max}
    return np.array(sorted(values), dtype)


def views(make: Callable[[int], Array], n: int) -> Iterator[tuple[str, Array]]:
    """Arrays of n elements in every layout that a loop may meet, each with its name."""
    plain = make(n)
    yield "contiguous", plain
    yield "reversed", make(n)[::-1]
    yield "step 3", make(3 * n)[::3]
    yield "step -2", make(2 * n)[::-2]
    yield "zero stride", np.broadcast_to(make(1), (n,))
    yield "column", np.ascontiguousarray(make(2 * n).reshape(n, 2))[:, 1]
    misaligned = np.zeros(plain.nbytes + 1, np.uint8)[1:].view(np.uint8)
    misaligned[:] = plain.view(np.uint8)
    yield "misaligned", np.ndarray(plain.shape, plain.dtype, misaligned.data)
    if plain.dtype.type.__module__ == "numpy":
        # The dtypes of ml_dtypes know no byte order.
        yield "byte-swapped", plain.astype(plain.dtype.newbyteorder())
    frozen = make(n)
    frozen.flags.writeable = False
    yield "read-only", frozen


def follow(ema: Any, p: Array, values: Any) -> list[bool]:
    """Updates with the parameter set to each of the values in turn."""
    moved = []
    for value in values:
        p[...] = value
        moved.append(ema.update())
    return moved


MULTIPLIERS = {
    "plain": {},
    "zero-mean": {"compensation": "zero-mean"},
    "min-mse": {"compensation": "min-mse"},
    "minimax": {"compensation": "minimax"},
    "lmul": {"compensation": "lmul"},
    "lmul-m4": {"compensation": "lmul", "mantissa_bits": 4},
    "equation": {"compensation": "lmul-equation"},
    "equation-m3": {"compensation": "lmul-equation", "mantissa_bits": 3},
    "float": {"compensation": 0.0461},
    "negative": {"compensation": -0.2},
    "segments-2": {"segments": 2},
    "segments-4": {"compensation": "min-mse", "segments": 4},
    "segments-8-m5": {"segments": 8, "mantissa_bits": 5},
    "segments-16": {"segments": 16},
    "m1": {"mantissa_bits": 1},
    "m7": {"mantissa_bits": 7},
    "m52": {"mantissa_bits": 52},
    "flush": {"subnormals": "flush"},
    "flush-minimax": {"compensation": "minimax", "subnormals": "flush"},
    "k0": {"corrections": 0},
    "k1": {"corrections": 1},
    "k2-m6": {"corrections": 2, "mantissa_bits": 6},
    "k3": {"corrections": 3},
    "k1-flush": {"corrections": 1, "subnormals": "flush"},
}
