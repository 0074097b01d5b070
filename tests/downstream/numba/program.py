# SPDX-License-Identifier: BSD-3-Clause
"""fastops inside Numba: compiled once, kept in Numba's cache for the processes that follow."""

import json

import numba
import numpy as np

import fastops

cheap = fastops.Multiplier("min-mse", mantissa_bits=7)


@numba.njit(cache=True)
def dot(a, b):
    """The sum of the approximate products."""
    total = 0.0
    for i in range(a.size):
        total += fastops.mitchell_mul(a[i], b[i])
    return total


@numba.njit(cache=True)
def layer(x, w, bias):
    """A matrix product by an approximate multiplier, and a product of whole arrays that broadcast."""
    y = fastops.mitchell_matmul(x, w, multiplier=cheap)
    return cheap.mul(y, bias)


@numba.njit(parallel=True, cache=True)
def squares(x):
    """One element at a time, in threads."""
    out = np.empty_like(x)
    for i in numba.prange(x.size):
        out[i] = fastops.mitchell_square(x[i])
    return out


if __name__ == "__main__":
    x = np.linspace(-2.0, 3.0, 12)
    matrix = x.reshape(3, 4)
    result = {
        "dot": dot(x, x),
        "layer": layer(matrix, matrix.T.copy(), x[:3]).tolist(),
        "squares": squares(x).tolist(),
        "hits": [sum(f.stats.cache_hits.values()) for f in (dot, layer, squares)],
    }
    print(json.dumps(result))
