# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the options of Nystrom attention, and of the arrays that it has beyond q, k and v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _validate
from ._attention import Problem, floats, reshaped
from ._validate import AnyArray, Text

# Matrices of m x m are held whole.
MAX_LANDMARKS = 4096
# About the cut-off of six steps of the iteration: they multiply small singular values by 3.25 each.
RIDGE = 1 / 1178
_MOST_STEPS = 2**31 - 1


class NystromOptions(NamedTuple):
    """What makes one Nystrom attention another, checked and complete."""

    landmarks: int
    iterations: int
    pinv: str
    ridge: float
    scale: float
    batch_init: bool
    normalize: bool


class NystromExtras(NamedTuple):
    """The arrays beyond q, k and v, as backends read them."""

    key_mask: AnyArray | None
    conv_weight: AnyArray | None
    q_landmarks: AnyArray | None
    k_landmarks: AnyArray | None


def prepare(
    p: Problem,
    num_landmarks: object,
    iterations: object,
    pinv: object,
    ridge: object,
    scale: object,
    key_mask: object,
    conv_weight: object,
    landmarks: object,
    init: object,
    normalize: object,
    causal: object,
) -> tuple[NystromOptions, NystromExtras]:
    """Options and arrays of a call, checked."""
    refuse_causal(causal)
    made = options(p.d, num_landmarks, iterations, pinv, ridge, scale, init, normalize)
    mask = checked_mask(p, key_mask)
    taps = checked_taps(p, conv_weight)
    pair: list[AnyArray] | list[None] = [None, None]
    if landmarks is not None:
        pair = _landmarks(p, landmarks)
        made = made._replace(landmarks=pair[0].shape[2])
    return made, NystromExtras(mask, taps, *pair)


def refuse_causal(causal: object) -> None:
    """Only False will do."""
    if _validate.boolean("causal", causal):
        raise _validate.not_offered("causal", "False, since the means of segments hold keys after a row's own", causal)


def options(
    d: int,
    num_landmarks: object,
    iterations: object,
    pinv: object,
    ridge: object,
    scale: object,
    init: object,
    normalize: object,
) -> NystromOptions:
    """The options, checked, for rows of `d` numbers."""
    m = _validate.integer("num_landmarks", num_landmarks, 1, MAX_LANDMARKS)
    steps = _validate.integer("iterations", iterations, 0, _MOST_STEPS)
    solver = _validate.choice("pinv", pinv, ("newton", "ridge"))
    if ridge is None:
        added = RIDGE
    elif solver != "ridge":
        raise _validate.wrong_value("ridge", f"None with pinv={solver!r}, which adds none", ridge)
    else:
        added = _validate.number("ridge", ridge, 0.0, open_low=True)
    factor = d**-0.5 if scale is None else _validate.number("scale", scale, -np.inf, open_low=True)
    start = _validate.choice("init", init, ("matrix", "batch"))
    if solver == "ridge" and start == "batch":
        raise _validate.wrong_value("init", "'matrix' with pinv='ridge', which begins nowhere", start)
    divides = _validate.boolean("normalize", normalize)
    return NystromOptions(m, steps, solver, added, factor, start == "batch", divides)


def kernel_size(conv_kernel_size: object) -> int | None:
    """The taps of a layer's convolution."""
    if conv_kernel_size is None:
        return None
    size = _validate.integer("conv_kernel_size", conv_kernel_size, 1)
    if not size % 2:
        raise _validate.wrong_value("conv_kernel_size", "an odd number", size)
    return size


def checked_mask(p: Problem, value: object) -> AnyArray | None:
    """(B, Nk) bool, a view."""
    if value is None:
        return None
    mask = _validate.array("key_mask", value)
    if mask.dtype != np.bool_:
        raise _validate.wrong_type("key_mask", "of dtype bool (True where a key counts)", _validate.dtype_of(mask))
    wanted = (*p.batch, p.nk)
    if mask.shape != wanted:
        way = reshaped(mask, [wanted])
        hint = f" ({way})" if way else ", one for all heads of a sample"
        raise _validate.wrong_value(
            "key_mask",
            f"of shape {_validate.clip(str(wanted), 40)}{hint}",
            Text(_validate.clip(str(mask.shape), 40)),
        )
    p.inputs["key_mask"] = mask
    return mask.reshape((p.b, p.nk))


def checked_taps(p: Problem, value: object) -> AnyArray | None:
    """(H, taps) of the compute dtype, C-contiguous."""
    if value is None:
        return None
    w = floats("conv_weight", value, p.wide)
    if w.ndim != 2 or len(w) != p.hq or w.shape[1] % 2 == 0:
        raise _validate.wrong_value(
            "conv_weight", f"of shape ({p.hq}, taps), taps odd", Text(_validate.clip(str(w.shape), 40))
        )
    if p.nq != p.nk:
        raise _validate.wrong_value(
            "conv_weight", "None, or given with q and k of one length", Text(f"{p.nq} and {p.nk}")
        )
    p.inputs["conv_weight"] = w
    return np.require(w, requirements=("C", "A"))


def _landmarks(p: Problem, value: object) -> list[AnyArray]:
    """(B, H, m, D) and (B, H_kv, m, D) of the compute dtype, C-contiguous."""
    pair = [floats(f"landmarks[{i}]", x, p.wide) for i, x in enumerate(two_landmarks(value))]
    want_landmarks(p, pair)
    p.inputs.update({f"landmarks[{i}]": x for i, x in enumerate(pair)})
    return [
        np.require(x, requirements=("C", "A")).reshape((p.b, heads, *x.shape[-2:]))
        for x, heads in zip(pair, (p.hq, p.hkv), strict=True)
    ]


def two_landmarks(value: object) -> tuple[Any, Any]:
    """The landmarks of q and of k, whatever they are."""
    if not isinstance(value, (tuple, list)):
        raise _validate.wrong_type("landmarks", "a tuple of two arrays, of q and of k", value)
    if len(value) != 2:
        raise _validate.wrong_value("landmarks", "two arrays, of q and of k", Text(str(len(value))))
    return value[0], value[1]


def want_landmarks(p: Problem, pair: Sequence[Any]) -> None:
    """Refuses landmarks of other shapes than (..., H, m, D) and (..., H_kv, m, D)."""
    m: Any = "m"
    for i, (x, heads) in enumerate(zip(pair, (p.hq, p.hkv), strict=True)):
        name = f"landmarks[{i}]"
        wanted = (*p.batch, *((heads,) if p.heads else ()), m, p.d)
        if len(x.shape) != len(wanted) or any(
            got != length and length != "m" for got, length in zip(x.shape, wanted, strict=True)
        ):
            text = "(" + ", ".join(map(str, wanted)) + ")"
            raise _validate.wrong_value(
                name, f"of shape {_validate.clip(text, 40)}", Text(_validate.clip(str(x.shape), 40))
            )
        m = x.shape[-2]
        if not 1 <= m <= MAX_LANDMARKS:
            raise _validate.wrong_value(name, f"of 1 to {MAX_LANDMARKS} rows a head", Text(str(m)))
