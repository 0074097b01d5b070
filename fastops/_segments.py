# SPDX-License-Identifier: BSD-3-Clause
"""Tables of compensation constants, one a segment of the mantissas; loaded with the first multiplier that has segments."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


@cache
def segment_table(op: str, segments: int) -> tuple[float, ...]:
    """Per segment (pair of segments) of the mantissas, the constant c of least mean squared relative error.

    Uniform mantissas; integrals by Gauss-Legendre between the kinks of PL. With t the exact result and S the
    uncompensated logarithm the derivative of the error is 2 E[(PL(S + c)/t - 1) r], r = 2**floor(S + c)/t, as PL is
    continuous; its zero is found by steps that take the second derivative for 2 E[r**2], what it is where no kink
    moves. Constants are multiples of 2**-30, so that the last bits of this machine's arithmetic do not show.
    """
    edges = np.arange(segments) / segments
    inner, inner_weight = (0.5 * (v + s) for v, s in zip(np.polynomial.legendre.leggauss(6), (1.0, 0.0), strict=True))
    low = np.full((1, 1, 1), 0.0)
    if op in ("mul", "div"):
        # Cells (row, column) x outer nodes of the first mantissa: along the second one the logarithm is
        # start + slope * y.
        outer, outer_weight = (
            0.5 * (v + s) for v, s in zip(np.polynomial.legendre.leggauss(16), (1.0, 0.0), strict=True)
        )
        x = (edges[:, None, None] + outer / segments).repeat(segments, axis=1).reshape(segments**2, -1, 1)
        low = np.tile(edges, segments).reshape(-1, 1, 1)
        slope = 1.0 if op == "mul" else -1.0
        start = x
        scale = 1.0 + x
        power = slope
        weight = outer_weight[:, None]
    else:
        # log2 of the result is start + slope * x; roots have period 2 in the exponent, so both of its parities count.
        power = {"square": 2.0, "reciprocal": -1.0, "sqrt": 0.5, "rsqrt": -0.5}[op]
        slope = power
        parity = np.arange(2.0)[:, None] if op in ("sqrt", "rsqrt") else np.zeros((1, 1))
        start = parity * slope
        scale = 2.0**start
        low = edges.reshape(-1, 1, 1)
        weight = np.full(parity.shape, 1.0)
    high = low + 1.0 / segments
    kinks = np.arange(-1.0, 3.0)

    def correction(c: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        at = np.clip((kinks - start - c[:, None, None]) / slope, low, high)
        ends = [np.broadcast_to(v, (*at.shape[:2], 1)) for v in (low, high)]
        cuts = np.sort(np.concatenate([*ends, at], axis=2), axis=2)
        width = np.diff(cuts, axis=2)[..., None]
        v = cuts[..., :-1, None] + width * inner
        log = start[..., None] + slope * v + c[:, None, None, None]
        floor = np.floor(log)
        step = np.exp2(floor) / (scale[..., None] * (1.0 + v) ** power)
        part = step * width * inner_weight * weight[..., None]
        error = step * (1.0 + log - floor) - 1.0
        return np.asarray((error * part).sum(axis=(1, 2, 3)) / (step * part).sum(axis=(1, 2, 3)))

    best = np.zeros(low.shape[0])
    for _ in range(60):
        change = correction(best)
        best = best - change
        if np.abs(change).max() < 2.0**-33:
            break
    if op == "mul":
        square = best.reshape(segments, segments)
        best = np.ravel(0.5 * (square + square.T))  # the product commutes to the last bit
    return tuple(float(c) for c in np.rint(best * 2**30) / 2**30)
