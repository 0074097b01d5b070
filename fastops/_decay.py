# SPDX-License-Identifier: BSD-3-Clause
"""The gradient of a decay of linear attention, which the frameworks ask for beside those of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from . import attention
from ._validate import AnyArray


def gradient(given: dict[str, Any], operands: Sequence[Any]) -> AnyArray:
    """The derivative with respect to a decay of each key, (B, H_kv, M) of float64.

    `given` are the arguments of `attention.linear_attention`; `operands` are dy, dS, dz, q, k, v, y, dv and the last state's S and z,
    of four axes, heads first (states of packed sequences are those of each). dS, dz, S and z may be None.

    With b the running sum of the decays, weights are exp(b_i - b_j) times what does not depend on it. So dL/db = (sum over j of w
    dL/dw in row i) - (sum over i in column j), and a decay takes part in all b from its token on. A row sums to dy.y, and to 0 where
    it is divided by its weights; a column to v.dv and what reaches it through the divisors, which is the gradient of values that are
    1 (Dao and Gu, "Transformers are SSMs", ICML 2024, section 6 for weights of that form).
    """
    dy, ds, dz, q, k, v, y, dv, last_s, last_z = operands
    wide = np.float64
    b, h, m = k.shape[:3]
    n = q.shape[2]
    of_rows = _rowwise(dy, y)
    mask, offsets, name = given["key_mask"], given["cu_seqlens"], given["feature_map"]
    if mask is not None:
        # What a masked key holds may be nan, and 0 times nan is nan.
        seen = mask if mask.ndim == 3 else mask[:, np.newaxis]
        v = np.where(seen[..., np.newaxis], v, np.zeros((), q.dtype))
    of_keys = _rowwise(dv, v)
    normalizes = name != "identity" if given["normalize"] is None else given["normalize"]
    if normalizes or dz is not None:
        # The same weights over values that are 1, without a divisor: what reaches keys through the divisors and the last z.
        state, eps = given["initial_state"], given["eps"]
        begin = None if state is None else (state[1][..., np.newaxis], state[1], *state[2:])
        plain = {**given, "normalize": False, "eps": 0.0, "initial_state": begin, "layout": "bhnd"}
        ones = (q, k, np.ones((b, h, m, 1), q.dtype))
        upper = np.zeros_like(of_rows)
        if normalizes:
            sums = attention.linear_attention(*ones, **plain)[..., 0].astype(wide) + eps
            np.divide(-of_rows, sums, out=upper, where=sums != 0)
            of_rows += upper * (sums - eps)
        into = upper[..., np.newaxis].astype(q.dtype)
        end = None if dz is None else (dz[..., np.newaxis], np.zeros_like(dz))
        found = attention.linear_attention_backward(into, *ones, np.zeros_like(into), **plain, d_state=end)
        of_keys += found[2][..., 0]
    # Row i is at key i + m - n, and rows before the first key see nothing.
    change = -of_keys
    change[..., max(m - n, 0) :] += of_rows.reshape((b, h, -1, n)).sum(2)[..., max(n - m, 0) :]
    full = np.empty_like(change)
    for i, (low, high) in enumerate(pairwise([0, m] if offsets is None else offsets.tolist())):
        full[..., low:high] = change[..., low:high][..., ::-1].cumsum(-1)[..., ::-1]
        if ds is not None and dz is not None and last_s is not None and last_z is not None:
            one = slice(None) if offsets is None else slice(i, i + 1)
            sums = np.einsum("bhfe,bhfe->bh", last_s[one], ds[one], dtype=wide)
            sums += np.einsum("bhf,bhf->bh", last_z[one], dz[one], dtype=wide)
            full[..., low:high] += sums[..., np.newaxis]
    return full


def _rowwise(a: Any, b: Any) -> AnyArray:
    found: AnyArray = np.einsum("bhnd,bhnd->bhn", a, b, dtype=np.float64)
    return found


def summed(full: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """The derivative with respect to a decay of a shape that broadcasts to (B, H_kv, M)."""
    axes = tuple(i for i in range(3) if shape[i] == 1 and full.shape[i] != 1)
    found: AnyArray = full.sum(axes, keepdims=True)
    return found
