# SPDX-License-Identifier: BSD-3-Clause
"""Attention by its definition, over all pairs in float64: what the backends, the reference too, are compared with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

MAPS = ("elu", "relu", "relu2", "identity", "exp", "softmax", "favor", "cosine")
EXPONENTIAL = ("exp", "softmax", "favor")
DECAYING = tuple(name for name in MAPS if name not in ("softmax", "favor"))


def wide(x: Any) -> Any:
    return np.asarray(x).astype(np.float64)


def features(x: Any, name: str, scale: float, projection: Any = None, kernel_eps: float = 0.0) -> Float:
    x = wide(x)
    if name == "elu":
        return np.where(x >= 0, x + 1, np.exp(np.minimum(x, 0)))
    if name == "relu":
        return np.maximum(x, 0) + kernel_eps
    if name == "relu2":
        return np.maximum(x, 0) ** 2 + kernel_eps
    if name in ("exp", "softmax"):
        return np.exp(scale * x)
    if name == "favor":
        x = math.sqrt(scale) * x
        w = wide(projection)
        return np.exp(np.einsum("...d,rd->...r", x, w) - 0.5 * (x**2).sum(-1, keepdims=True)) / math.sqrt(len(w))
    if name == "cosine":
        norm = np.linalg.norm(x, axis=-1, keepdims=True)
        return np.concatenate([x / np.where(norm == 0, 1, norm), np.ones_like(norm)], -1)
    return np.asarray(x)


def visible(n: int, m: int, causal: bool) -> NDArray[np.bool_]:
    """Which keys each row sees; the last row of a causal call sees all."""
    pairs = np.ones((n, m), bool)
    return np.tril(pairs, m - n) if causal else pairs


class Definition:
    """Linear attention of (B, H, N, D) arrays, and the magnitudes that bound its rounding errors."""

    def __init__(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        causal: bool = False,
        feature_map: str = "elu",
        normalize: bool | None = None,
        eps: float = 0.0,
        kernel_eps: float | None = None,
        scale: float | None = None,
        projection: Any = None,
        key_mask: Any = None,
        decay: Any = None,
        initial_state: Any = None,
    ) -> None:
        b, h, n, d = q.shape
        heads, m = k.shape[1:3]
        repeats = h // max(heads, 1)
        self.map = feature_map
        default = d**-0.5 if feature_map in ("identity", "exp", "favor") else 1.0
        self.scale = default if scale is None else scale
        self.normalize = feature_map != "identity" if normalize is None else normalize
        self.eps = eps
        added = (1e-3 if feature_map == "relu" else 0.0) if kernel_eps is None else kernel_eps
        self.q, self.k, self.projection = q, k, projection
        self.fq = features(q, feature_map, self.scale, projection, added)
        # Hidden keys may hold anything.
        seen = np.broadcast_to(visible(n, m, causal), (b, heads, n, m))
        if key_mask is not None:
            mask = np.broadcast_to(key_mask if key_mask.ndim == 3 else key_mask[:, np.newaxis], (b, heads, m))
            seen = seen & mask[:, :, np.newaxis]
            k, v = (np.where(mask[..., np.newaxis], wide(x), 0) for x in (k, v))
        self.fk, self.v = features(k, feature_map, self.scale, projection, added), wide(v)
        weight = seen.astype(np.float64)
        begin = np.ones((b, heads, n))
        if decay is not None:
            g = np.broadcast_to(wide(decay)[:, np.newaxis] if np.ndim(decay) == 1 else wide(decay), (b, heads, m))
            # Factors of 0 are counted: their logarithms have no differences.
            zero = np.isneginf(g)
            log, cuts = (
                np.concatenate([np.zeros((b, heads, 1)), np.cumsum(x, -1)], -1) for x in (np.where(zero, 0, g), zero)
            )
            rows = np.clip(np.arange(n) + m - n + 1, 0, m)
            row, cut = log[:, :, rows], cuts[:, :, rows]
            weight = weight * np.exp(np.minimum(row[..., np.newaxis] - log[:, :, np.newaxis, 1:], 0))
            weight = weight * (cut[..., np.newaxis] <= cuts[:, :, np.newaxis, 1:])
            begin = np.exp(row) * (cut == 0)
        if initial_state is not None:
            # A state is as many keys as it has features, one of each.
            s, z, *exponent = (wide(x) for x in initial_state)
            power = 2.0 ** exponent[0] if exponent else np.ones_like(z)
            values = s / np.where(z == 0, 1, z)[..., np.newaxis]
            self.fk = np.concatenate([(z * power)[..., np.newaxis] * np.eye(z.shape[-1]), self.fk], 2)
            self.v = np.concatenate([values, self.v], 2)
            first = np.broadcast_to(begin[..., np.newaxis], (b, heads, n, z.shape[-1]))
            weight = np.concatenate([first, weight], -1)
        self.fk, self.v, self.weight = (np.repeat(x, repeats, 1) for x in (self.fk, self.v, weight))
        self.factor = 1.0 if feature_map in EXPONENTIAL else self.scale

    def _softmax_sums(self, v: Float, fk: Float) -> tuple[Float, Float]:
        num = np.einsum("bhij,bhjd,bhje->bhide", self.weight, fk, v)
        return num, np.einsum("bhij,bhjd->bhid", self.weight, fk)

    def result(self) -> tuple[Float, Float]:
        """y and the sum of the magnitudes behind each of its elements, what their rounding errors are relative to."""
        if self.map == "softmax":
            p = self.fq / self.fq.sum(-1, keepdims=True)
            num, z = self._softmax_sums(self.v, self.fk)
            size, _ = self._softmax_sums(np.abs(self.v), self.fk)
            z = np.where(z == 0, np.inf, z)[..., np.newaxis]
            return np.einsum("bhid,bhide->bhie", p, num / z), 2 * np.einsum("bhid,bhide->bhie", p, size / z)
        w = self.factor * np.einsum("bhid,bhjd->bhij", self.fq, self.fk) * self.weight
        size = abs(self.factor) * np.einsum("bhid,bhjd->bhij", np.abs(self.fq), np.abs(self.fk)) * self.weight
        num, magnitude = w @ self.v, size @ np.abs(self.v)
        if not self.normalize:
            return num, magnitude
        den = w.sum(-1, keepdims=True) + self.eps
        den = np.where(den == 0, np.inf, den)
        y = num / den
        return y, (magnitude + np.abs(y) * size.sum(-1, keepdims=True)) / np.abs(den)

    def exponent(self) -> float:
        """The largest exponent, whose own rounding is a relative error of a feature."""
        if self.map not in EXPONENTIAL or not (self.q.size and self.k.size):
            return 0.0
        largest = 0.0
        for x in (wide(self.q), wide(self.k)):
            x = x[np.isfinite(x).all(-1)]
            if self.map == "favor":
                x = math.sqrt(self.scale) * x
                each = np.abs(x) @ np.abs(wide(self.projection)).T + 0.5 * (x**2).sum(-1, keepdims=True)
            else:
                each = np.abs(self.scale * x)
            largest += float(each.max(initial=0))
        return largest

    def sums(self) -> tuple[Float, Float]:
        """S and z over all keys of (B, H) heads, without decay and state."""
        seen = self.weight[:, :, -1, :, np.newaxis] * self.fk
        return np.einsum("bhjd,bhje->bhde", seen, self.v), seen.sum(2)


def softmax_rows(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Any = None,
    logn: Any = None,
) -> tuple[Float, Float, float]:
    """Softmax attention, the magnitudes behind it, and the largest logit."""
    b, h, n, d = q.shape
    heads, m = k.shape[1:3]
    factor = d**-0.5 if scale is None else scale
    seen = np.broadcast_to(visible(n, m, causal), (b, heads, n, m))
    k, v = wide(k), wide(v)
    if key_mask is not None:
        mask = np.broadcast_to(key_mask if key_mask.ndim == 3 else key_mask[:, np.newaxis], (b, heads, m))
        seen = seen & mask[:, :, np.newaxis]
        k, v = (np.where(mask[..., np.newaxis], x, 0) for x in (k, v))
    k, v, seen = (np.repeat(x, h // max(heads, 1), 1) for x in (k, v, seen))
    rows = factor * wide(q) * (1.0 if logn is None else wide(logn)[..., np.newaxis])
    scores = np.where(seen, np.einsum("bhid,bhjd->bhij", rows, k), -np.inf)
    largest = float(np.einsum("bhid,bhjd->bhij", np.abs(rows), np.abs(k)).max(initial=0))
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    w = np.exp(scores - np.where(top == -np.inf, 0, top))
    total = w.sum(-1, keepdims=True)
    total = np.where(total == 0, 1, total)
    return (w @ v) / total, 2 * (w @ np.abs(v)) / total, largest
