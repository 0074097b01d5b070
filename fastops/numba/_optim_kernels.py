# SPDX-License-Identifier: BSD-3-Clause
"""The compiled loops of the Numba backend's moving averages and optimizer steps, over contiguous pieces of tensors.

Each is a pair, for float32 and for float64: the arithmetic is that of the arrays, with numbers that were rounded from double once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ._kernel import Kernel, given, kernel, njit, types

Pair = dict[np.dtype[Any], Kernel]

_HALVES = given(types.uint16)


def _pair(signature: Callable[[Any, Any, Any], Any], **options: Any) -> Callable[[Callable[..., Any]], Pair]:
    """Makes kernels for both precisions; `signature` gets the number, the array that is read and the one that is written."""

    def make(function: Callable[..., Any]) -> Pair:
        return {
            np.dtype(real.name): kernel(signature(real, given(real), real[::1]), error_model="numpy", **options)(
                function
            )
            for real in (types.float32, types.float64)
        }

    return make


# Moving averages.


@_pair(lambda real, read, write: types.void(write, read, real, real, types.boolean))
def ema(s, p, w, rest, near):  # type: ignore[no-untyped-def]
    """s += w (p - s); `rest` is w - 1, and `near` says that w < 1/2."""
    if near:
        for i in range(s.size):
            s[i] += w * (p[i] - s[i])
    else:
        for i in range(s.size):
            s[i] = p[i] + rest * (p[i] - s[i])


NEAR, FAR, COPY = 0, 1, 2


@njit
def _bits(x):  # type: ignore[no-untyped-def]
    return np.float32(x).view(np.uint32)


@njit
def _number(u):  # type: ignore[no-untyped-def]
    return np.uint32(u).view(np.float32)


@kernel(
    types.void(
        types.uint16[::1],
        given(types.float32),
        types.float32,
        types.float32,
        types.int64,
        types.uint32,
        types.uint32,
        types.uint64,
    )
)
def ema_random(s, p, w, rest, how, low, high, start):  # type: ignore[no-untyped-def]
    """The same of bfloat16 bit patterns, rounded stochastically; the key's halves, and the index of the first element."""
    for i in range(s.size):
        e = start + np.uint64(i)
        pair = (e >> np.uint64(5) << np.uint64(4)) | (e & np.uint64(15))
        x = np.uint32(np.uint32(pair) + low)
        x ^= x >> np.uint32(16)
        x = np.uint32(x * np.uint32(0x21F0AAAD))
        x ^= x >> np.uint32(15)
        x ^= np.uint32(high + np.uint32(np.uint32(pair >> np.uint64(32)) * np.uint32(0x9E3779B9)))
        x = np.uint32(x * np.uint32(0x735A2D97))
        x ^= x >> np.uint32(15)
        r = x >> np.uint32(16) if e & np.uint64(16) else x & np.uint32(0xFFFF)

        old = _number(np.uint32(s[i]) << np.uint32(16))
        if how == NEAR:
            new = np.float32(old + w * (p[i] - old))
        elif how == FAR:
            new = np.float32(p[i] + rest * (p[i] - old))
        else:
            new = p[i]
        u = _bits(new)
        if u & np.uint32(0x7F800000) != np.uint32(0x7F800000):
            u = np.uint32(u + r)
        elif u & np.uint32(0x7FFFFF):
            u |= np.uint32(0x400000)
        s[i] = np.uint16(u >> np.uint32(16))


@kernel(types.void(_HALVES, types.float32[::1]))
def widen_bfloat16(x, out):  # type: ignore[no-untyped-def]
    """bfloat16 bit patterns as float32."""
    for i in range(x.size):
        out[i] = _number(np.uint32(x[i]) << np.uint32(16))


@kernel(types.void(_HALVES, types.float32[::1]))
def widen_float16(x, out):  # type: ignore[no-untyped-def]
    """float16 bit patterns as float32: as a mantissa and exponent 112 too low, which a product mends, subnormals too."""
    for i in range(x.size):
        u = np.uint32(x[i])
        magnitude = np.uint32((u & np.uint32(0x7FFF)) << np.uint32(13))
        scaled = _bits(np.float32(_number(magnitude) * np.float32(2.0**112)))
        if u & np.uint32(0x7C00) == np.uint32(0x7C00):
            scaled = magnitude | np.uint32(0x7F800000)
        out[i] = _number(scaled | (u & np.uint32(0x8000)) << np.uint32(16))


@_pair(lambda real, read, write: types.boolean(read))
def finite(x):  # type: ignore[no-untyped-def]
    """Whether no element is inf or nan."""
    found = 0
    for i in range(x.size):
        # nan for inf and nan alone.
        found += x[i] - x[i] != 0
    return found == 0


@kernel(types.boolean(_HALVES, types.uint16))
def finite_half(x, mask):  # type: ignore[no-untyped-def]
    """The same of half types, whose exponent's bits are `mask`."""
    found = 0
    for i in range(x.size):
        found += x[i] & mask == mask
    return found == 0


# Steps.


@_pair(lambda real, read, write: types.void(write, read, real, real))
def sgd_plain(p, g, lr, weight_decay):  # type: ignore[no-untyped-def]
    """p -= lr (g + weight_decay p)."""
    if weight_decay == 0:
        for i in range(p.size):
            p[i] -= lr * g[i]
    else:
        for i in range(p.size):
            p[i] -= lr * (g[i] + weight_decay * p[i])


@_pair(lambda real, read, write: types.void(write, read, read, real, real, real))
def sgd_buffer(m, g, p, keep, gain, weight_decay):  # type: ignore[no-untyped-def]
    """m = keep m + gain (g + weight_decay p)."""
    if weight_decay == 0:
        for i in range(m.size):
            m[i] = keep * m[i] + gain * g[i]
    else:
        for i in range(m.size):
            m[i] = keep * m[i] + gain * (g[i] + weight_decay * p[i])


@_pair(lambda real, read, write: types.void(write, read, write, types.boolean, *(real,) * 5))
def sgd_momentum(p, g, m, nesterov, lr, momentum, keep, gain, weight_decay):  # type: ignore[no-untyped-def]
    """The buffer's step, then p -= lr m, or p -= lr (g + weight_decay p + momentum m) with `nesterov`."""
    if not nesterov and weight_decay == 0:
        for i in range(p.size):
            m[i] = keep * m[i] + gain * g[i]
            p[i] -= lr * m[i]
    elif not nesterov:
        for i in range(p.size):
            m[i] = keep * m[i] + gain * (g[i] + weight_decay * p[i])
            p[i] -= lr * m[i]
    else:
        for i in range(p.size):
            gradient = g[i]
            if weight_decay != 0:
                gradient += weight_decay * p[i]
            m[i] = keep * m[i] + gain * gradient
            p[i] -= lr * (gradient + momentum * m[i])


@njit(error_model="numpy")
def _adam(p, g, m, v, i, decay, w1, beta2, w2, step_size, scale, eps):  # type: ignore[no-untyped-def]
    first = m[i] + w1 * (g - m[i])
    second = beta2 * v[i] + w2 * (g * g)
    m[i] = first
    v[i] = second
    p[i] = decay * p[i] - step_size * (first / (math.sqrt(second) * scale + eps))


@_pair(lambda real, read, write: types.void(write, read, write, write, *(real,) * 8))
def adam(p, g, m, v, decay, l2, w1, beta2, w2, step_size, scale, eps):  # type: ignore[no-untyped-def]
    """One step of AdamW, or of Adam where l2 is not 0."""
    if l2 == 0:
        for i in range(p.size):
            _adam(p, g[i], m, v, i, decay, w1, beta2, w2, step_size, scale, eps)
    else:
        for i in range(p.size):
            _adam(p, g[i] + l2 * p[i], m, v, i, decay, w1, beta2, w2, step_size, scale, eps)


@njit
def _exp(x):  # type: ignore[no-untyped-def]
    """exp of a double to some units of 2**-52, without a call, so that loops of it become vectors."""
    if x > 800.0:
        x = 800.0
    elif x < -800.0:
        x = -800.0
    n = np.rint(x * 1.4426950408889634)
    # log(2) in two parts, the first of few bits.
    r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    # Taylor's series: |r| <= log(2) / 2, whose 14th power over 14! is 4e-18.
    y = 1.0 / 479001600.0 + r * (1.0 / 6227020800.0)
    y = 1.0 / 39916800.0 + r * y
    y = 1.0 / 3628800.0 + r * y
    y = 1.0 / 362880.0 + r * y
    y = 1.0 / 40320.0 + r * y
    y = 1.0 / 5040.0 + r * y
    y = 1.0 / 720.0 + r * y
    y = 1.0 / 120.0 + r * y
    y = 1.0 / 24.0 + r * y
    y = 1.0 / 6.0 + r * y
    y = 1.0 / 2.0 + r * y
    y = 1.0 + r * (1.0 + r * y)
    # 2**n in two factors, neither of which leaves the range.
    half = np.floor(n * 0.5)
    return y * _power(half) * _power(n - half)


@njit
def _power(n):  # type: ignore[no-untyped-def]
    """2**n of a whole number in a double, between -1022 and 1023: the bits of n + 1.5 * 2**52 hold it."""
    shifted = n + (1023.0 + 6755399441055744.0)
    return np.int64(np.float64(shifted).view(np.int64) << 52).view(np.float64)


@_pair(lambda real, read, write: types.void(write, read, types.float64))
def eg(p, g, lr):  # type: ignore[no-untyped-def]
    """p *= exp(-lr g)."""
    for i in range(p.size):
        p[i] = p[i] * _exp(-lr * np.float64(g[i]))


@_pair(lambda real, read, write: types.UniTuple(types.float64, 3)(read, read), fastmath={"reassoc", "contract", "nsz"})
def products(h, g):  # type: ignore[no-untyped-def]
    """h.g, h.h and g.g, summed in double."""
    hg = hh = gg = 0.0
    for i in range(h.size):
        x = np.float64(h[i])
        y = np.float64(g[i])
        hg += x * y
        hh += x * x
        gg += y * y
    return hg, hh, gg


@_pair(lambda real, read, write: types.void(write, read, write, write, write, *(real,) * 9))
def adaptive_eg(p, g, m, h, q, lr, beta, weight, mu, up, down, low, high, scale):  # type: ignore[no-untyped-def]
    """The step with gains q, which go `up` or `down` as m and g agree or not, within [low, high]; `weight` is 1 - beta."""
    for i in range(p.size):
        agree = (m[i] > 0 and g[i] > 0) or (m[i] < 0 and g[i] < 0)
        differ = (m[i] > 0 and g[i] < 0) or (m[i] < 0 and g[i] > 0)
        gain = q[i]
        if agree:
            gain *= up
        elif differ:
            gain *= down
        elif math.isnan(m[i]) or math.isnan(g[i]):
            gain = m[i] + g[i]
        if gain < low:
            gain = low
        elif gain > high:
            gain = high
        q[i] = gain
        m[i] = beta * m[i] + weight * g[i]
        h[i] = mu * h[i] + lr * gain * g[i]
        p[i] -= scale * h[i]
