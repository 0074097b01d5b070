# SPDX-License-Identifier: BSD-3-Clause
"""Nystrom attention by its formulas, all matrices whole and in float64: what the backends, the reference too, are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from quadratic import softmax_rows, wide

Float = NDArray[np.float64]


def softmax(x: Float) -> Float:
    w = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(w / w.sum(-1, keepdims=True))


def averages(x: Float, m: int) -> Float:
    """The rows in m runs, the first m - n mod m of which have n // m of them and the others one more."""
    short = m - len(x) % m
    means, first = [], 0
    for i in range(m):
        last = first + len(x) // m + (i >= short)
        means.append(x[first:last].sum(0) / (last - first))
        first = last
    assert first == len(x)
    return np.array(means)


def inverse(a: Float, pinv: str, iterations: int, ridge: float, largest: tuple[float, float]) -> Float:
    """Z, by the residual R = I - A Z of each step where the implementations have A Z."""
    c = largest[0] * largest[1]
    one = np.eye(len(a))
    if pinv == "ridge":
        u, s, vt = np.linalg.svd(a)
        return np.asarray((vt.T * (s / (s * s + ridge * c))) @ u.T)
    z = a.T / c
    for _ in range(iterations):
        r = one - a @ z
        z = z @ (one + r + r @ r + r @ r @ r / 4)
    return np.asarray(z)


def convolution(v: Float, w: Float) -> Float:
    """Each row's neighbours by the taps."""
    half = len(w) // 2
    padded = np.pad(v, ((half, half), (0, 0)))
    return np.asarray(sum(w[t] * padded[t : t + len(v)] for t in range(len(w))))


class Nystrom:
    """Rows of (B, H, N, D) arrays, and of each head what `return_info` tells."""

    def __init__(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        num_landmarks: int = 64,
        iterations: int = 6,
        pinv: str = "newton",
        ridge: float = 1 / 1178,
        scale: float | None = None,
        key_mask: Any = None,
        conv_weight: Any = None,
        landmarks: Any = None,
        init: str = "matrix",
        normalize: bool = False,
    ) -> None:
        b, h, n, d = q.shape
        heads, length = k.shape[1:3]
        s = d**-0.5 if scale is None else scale
        self.y, self.info = np.zeros((b, h, n, v.shape[-1])), np.full((b, h, 4), np.nan)
        parts = {}
        for i, j in np.ndindex(b, h):
            g = j // (h // heads)
            keys = np.ones(length, bool) if key_mask is None else np.asarray(key_mask)[i]
            rows = keys if n == length else np.ones(n, bool)
            qq, kk, vv = (wide(x) for x in (q[i, j][rows], k[i, g][keys], v[i, g][keys]))
            if landmarks is None and min(len(qq), len(kk)) <= num_landmarks:
                exact, _, _ = softmax_rows(qq[None, None], kk[None, None], vv[None, None], scale=s)
                self.y[i, j][rows] = exact[0, 0]
                continue
            if landmarks is None:
                qt, kt = averages(qq, num_landmarks), averages(kk, num_landmarks)
            else:
                qt, kt = wide(landmarks[0][i, j]), wide(landmarks[1][i, g])
            parts[i, j] = rows, qq, kk, vv, qt, kt, softmax(s * qt @ kt.T)
        norms = {at: (part[-1].sum(0).max(), part[-1].sum(1).max()) for at, part in parts.items()}
        for at, (rows, qq, kk, vv, qt, kt, a) in parts.items():
            largest = (
                norms[at]
                if init == "matrix"
                else (max(x for x, _ in norms.values()), max(x for _, x in norms.values()))
            )
            z = inverse(a, pinv, iterations, ridge, largest)
            product = softmax(s * qq @ kt.T) @ z
            w = product @ softmax(s * qt @ kk.T) if len(kk) else np.zeros((len(qq), 0))
            sums = w.sum(1, keepdims=True)
            y = w @ vv
            if normalize:
                y = y / np.where(sums == 0, np.inf, sums)
            self.y[at][rows] = y
            residual = np.linalg.norm(a @ z @ a - a) / np.linalg.norm(a)
            self.info[at] = residual, 1 / (largest[0] * largest[1]), sums.min(), sums.max()
        if conv_weight is not None:
            for i, j in np.ndindex(b, h):
                keys = np.ones(length, bool) if key_mask is None else np.asarray(key_mask)[i]
                values = np.where(keys[:, None], wide(v[i, j // (h // heads)]), 0)
                self.y[i, j] += keys[:, None] * convolution(values, wide(conv_weight[j]))
