# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the arguments of attention, and their canonical form: 4-D arrays whose last axis is contiguous."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _dlpack, _validate
from ._validate import AnyArray, Text

FEATURE_MAPS = ("elu", "relu", "relu2", "identity", "exp", "softmax", "favor", "cosine")
# Maps whose state has a running maximum of its exponents.
EXPONENTIAL = ("exp", "softmax", "favor")
# What a row of features would need to be multiplied by to be attention's own 1 / sqrt(D).
_SCALED = ("identity", "exp", "favor")
_LAYOUTS = ("bhnd", "bnhd")
# What a step gives in its place: no text that a user could.
_STEP = object()
# Dimensions that an array may have.
_MOST = 32 if np.lib.NumpyVersion(np.__version__) < "2.0.0" else 64
_KERNEL_EPS = {"relu": 1e-3, "relu2": 0.0}


class LinearOptions(NamedTuple):
    """What makes one linear attention another, checked and complete."""

    feature_map: str
    causal: bool
    normalize: bool
    eps: float
    kernel_eps: float
    scale: float
    projection: AnyArray | None

    def features(self, d: int) -> int:
        """How many features a row of `d` numbers has."""
        if self.projection is not None:
            return int(self.projection.shape[0])
        return d + (self.feature_map == "cosine")

    @property
    def parts(self) -> int:
        """Of how many arrays a state consists."""
        return 3 if self.feature_map in EXPONENTIAL else 2


def layer_features(feature_map: object, num_features: object) -> tuple[str, int | None]:
    """The feature map of a layer, and of how many directions it draws its features."""
    name = _validate.choice("feature_map", feature_map, FEATURE_MAPS)
    if (num_features is None) == (name == "favor"):
        wanted = "given with feature_map='favor' and with no other"
        raise _validate.wrong_value("num_features", wanted, num_features)
    return name, None if num_features is None else _validate.integer("num_features", num_features, 1)


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of features, sums and states."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def linear_options(
    d: int,
    dtype: np.dtype[Any],
    causal: object,
    feature_map: object,
    normalize: object,
    eps: object,
    kernel_eps: object,
    scale: object,
    projection: object,
) -> LinearOptions:
    """The options, checked, for rows of `d` numbers and features of `dtype`."""
    name = _validate.choice("feature_map", feature_map, FEATURE_MAPS)
    here = f"with feature_map={name!r}"
    divides = name != "identity" if normalize is None else _validate.boolean("normalize", normalize)
    if name == "softmax" and not divides:
        raise _validate.wrong_value("normalize", f"None or True {here}, whose weights add up to 1", normalize)
    added = _validate.number("eps", eps, 0.0)
    if added and (name == "softmax" or not divides):
        raise _validate.wrong_value("eps", f"0 {here}" if divides else "0 without a normaliser", added)
    if kernel_eps is None:
        floor = _KERNEL_EPS.get(name, 0.0)
    elif name not in _KERNEL_EPS:
        raise _validate.wrong_value("kernel_eps", f"None {here}", kernel_eps)
    else:
        floor = _validate.number("kernel_eps", kernel_eps, 0.0)
    if scale is None:
        factor = d**-0.5 if name in _SCALED else 1.0
    else:
        factor = _validate.number("scale", scale, 0.0 if name == "favor" else -np.inf, open_low=True)
    return LinearOptions(
        name,
        _validate.boolean("causal", causal),
        divides,
        added,
        floor,
        factor,
        _projection(projection, name, d, dtype),
    )


def _projection(value: object, name: str, d: int, dtype: np.dtype[Any]) -> AnyArray | None:
    if value is None:
        if name == "favor":
            raise _validate.wrong_value("projection", "given with feature_map='favor' (fastops.favor_projection)", None)
        return None
    if name != "favor":
        raise _validate.wrong_value("projection", f"None with feature_map={name!r}", value)
    w = floats("projection", value, dtype)
    if w.ndim != 2 or w.shape[1] != d or not len(w):
        raise _validate.wrong_value("projection", f"of shape (m, {d}), m >= 1", Text(_validate.clip(str(w.shape), 40)))
    return np.ascontiguousarray(w)


def floats(name: str, value: object, dtype: np.dtype[Any]) -> AnyArray:
    """`value` as an array of `dtype`; of axes with stride 0 one element is converted."""
    result = _validate.array(name, value)
    if result.dtype.newbyteorder("=") not in _validate.FLOAT_DTYPES:
        raise _validate.wrong_type(name, f"of dtype {_validate.FLOAT_NAMES}", _validate.dtype_of(result))
    if result.dtype == dtype and result.dtype.isnative:
        # Misaligned: one copy, here of all elements.
        return result if result.flags.aligned else result.copy()
    with np.errstate(all="ignore"):
        return np.broadcast_to(distinct(result).astype(dtype), result.shape)


def distinct(x: AnyArray) -> AnyArray:
    """A view with one element of every axis along which all are the same."""
    if 0 not in x.strides or not x.size:
        return x
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides)]


def new(shape: tuple[int, ...], dtype: np.dtype[Any]) -> AnyArray:
    """An array whose last axis is contiguous, also where it has no elements: NumPy gives those strides of 0."""
    x = np.empty(shape, dtype)
    return x if x.size else np.lib.stride_tricks.as_strided(x, shape, (*(0,) * (len(shape) - 1), dtype.itemsize))


def canonical(x: AnyArray) -> AnyArray:
    """`x`, or a copy where its last axis is not contiguous or its elements are not aligned."""
    if not x.size:
        return new(x.shape, x.dtype)
    if x.flags.aligned:
        if x.strides[-1] == x.itemsize:
            return x
        if x.shape[-1] == 1:
            return np.lib.stride_tricks.as_strided(x, x.shape, (*x.strides[:-1], x.itemsize))
    few = distinct(x)
    return np.broadcast_to(np.array(np.broadcast_to(few, (*few.shape[:-1], x.shape[-1])), order="C"), x.shape)


def target(given: AnyArray, kept: int) -> AnyArray:
    """An array to write in the place of `given`: a view of it, or new memory where backends could not write there."""
    plain = canonical(merged(given, kept))
    return plain if np.may_share_memory(plain, given) else new(plain.shape, plain.dtype)


def merged(x: AnyArray, kept: int) -> AnyArray:
    """`x` with the axes before its last `kept` as one; a copy only where more than one cannot be walked as one."""
    lead = x.ndim - kept
    if lead == 1:
        return x
    if lead == 0:
        return x[np.newaxis]
    return x.reshape((math.prod(x.shape[:lead]), *x.shape[lead:]))


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """NumPy's ufuncs and indexing lose the MemoryError of their buffers."""
    try:
        yield
    except SystemError:
        raise MemoryError from None


def reshaped(mask: AnyArray, shapes: Sequence[tuple[int, ...]]) -> str:
    """What makes a mask with axes of length 1 too many, as other libraries broadcast it, one of those shapes; or nothing."""
    for shape in shapes:
        if [n for n in mask.shape if n != 1] == [n for n in shape if n != 1]:
            return f"its reshape({_validate.clip(str(shape), 30)})"
    return ""


def check_offsets(offsets: AnyArray, last: int) -> None:
    """Refuses offsets of packed sequences that do not rise from 0 to `last`."""
    if len(offsets) and offsets[0] == 0 and offsets[-1] == last and rises(offsets):
        return
    falls = np.flatnonzero(offsets[1:] < offsets[:-1])
    if not len(offsets):
        got = "none"
    elif offsets[0] != 0:
        got = f"{offsets[0]} as the first"
    elif len(falls):
        got = f"{offsets[falls[0] + 1]} after {offsets[falls[0]]}"
    else:
        got = f"{offsets[-1]} as the last"
    raise _validate.wrong_value("cu_seqlens", f"offsets that rise from 0 to {last}", Text(got))


def rises(index: AnyArray) -> bool:
    """Whether no item is less than the one before it."""
    # Not all(): NumPy's reductions lose the MemoryError of their buffers.
    return bool(np.count_nonzero(index[1:] >= index[:-1]) == max(len(index) - 1, 0))


class Problem:
    """The arrays q, k and v of a call (and dy and y), checked and canonical, and the checks that need their sizes."""

    __slots__ = ("arrays", "batch", "d", "dtype", "e", "heads", "hkv", "hq", "inputs", "layout", "nk", "nq", "wide")

    def __init__(self, layout: object, q: object, k: object, v: object, **more: object) -> None:
        self.layout = _STEP if layout is _STEP else _validate.choice("layout", layout, _LAYOUTS)
        values = {"q": q, "k": k, "v": v, **more}
        self.inputs = {name: _validate.array(name, value) for name, value in values.items()}
        arrays = _validate.float_arrays(**self.inputs)
        least, rows = (3, "(..., N, H, {})") if layout == "bnhd" else (2, "(..., H, N, {})")
        for name, x in zip(values, arrays, strict=True):
            if x.ndim < least:
                wanted = rows.format("E" if name == "v" else "D") + (", or (N, D)" if least == 2 else "")
                raise _validate.wrong_value(name, f"of shape {wanted}", Text(_validate.clip(str(x.shape), 40)))
        if layout == "bnhd":
            arrays = [x.swapaxes(-3, -2) for x in arrays]
        first, second, third = arrays[:3]
        self.dtype, self.wide = first.dtype, compute_dtype(first.dtype)
        self.heads = first.ndim > 2
        self.batch = first.shape[:-3]
        self.hq: int = first.shape[-3] if self.heads else 1
        self.hkv: int = second.shape[-3] if second.ndim > 2 else 1
        self.nq, self.d = first.shape[-2:]
        self.nk, self.e = second.shape[-2], third.shape[-1]
        if self.d < 1:
            raise _validate.wrong_value("q", "of at least one number a row", Text(self._text(first.shape)))
        self._want("k", second, self._shape("H", "N", self.d))
        self._want("v", third, self._shape(self.hkv, self.nk, "E"))
        if self.e < 1:
            raise _validate.wrong_value("v", "of at least one number a row", Text(self._text(third.shape)))
        if self.hq != self.hkv and (not self.hkv or not self.hq or self.hq % self.hkv):
            raise _validate.wrong_value(
                "q", f"of a multiple of the {self.hkv} heads of k and v", Text(f"{self.hq} heads")
            )
        for name, x in zip(more, arrays[3:], strict=True):
            self._want(name, x, self._shape(self.hq, self.nq, self.e))
        self.arrays = [canonical(merged(x, 3)) if self.heads else canonical(x)[np.newaxis, np.newaxis] for x in arrays]

    def _shape(self, heads: Any, rows: Any, last: Any) -> tuple[Any, ...]:
        return (*self.batch, *((heads,) if self.heads else ()), rows, last)

    def _text(self, shape: Sequence[Any]) -> str:
        """A shape in words, in the caller's order of axes."""
        if self.layout == "bnhd":
            shape = (*shape[:-3], shape[-2], shape[-3], shape[-1])
        elif self.layout is _STEP:
            shape = (*shape[:-2], shape[-1])
        return _validate.clip("(" + ", ".join(map(str, shape)) + ")", 50)

    def _want(self, name: str, x: AnyArray, wanted: tuple[Any, ...]) -> None:
        if len(x.shape) != len(wanted) or any(
            not isinstance(length, str) and length != got for got, length in zip(x.shape, wanted, strict=True)
        ):
            raise _validate.wrong_value(name, f"of shape {self._text(wanted)}", Text(self._text(x.shape)))

    @property
    def b(self) -> int:
        """The batch as one axis."""
        return math.prod(self.batch)

    def key_mask(self, value: object) -> AnyArray | None:
        """(B, H_kv, Nk) bool, a view."""
        if value is None:
            return None
        mask = _validate.array("key_mask", value)
        if mask.dtype != np.bool_:
            raise _validate.wrong_type("key_mask", "of dtype bool (True where a key counts)", _validate.dtype_of(mask))
        shapes = [(*self.batch, self.nk)] + ([(*self.batch, self.hkv, self.nk)] if self.heads else [])
        if mask.shape not in shapes:
            wanted = " or ".join(_validate.clip(str(shape), 35) for shape in shapes)
            hint = reshaped(mask, shapes) or "for a mask of pairs, torch's scaled_dot_product_attention"
            got = Text(_validate.clip(str(mask.shape), 35))
            raise _validate.wrong_value("key_mask", f"of shape {wanted} ({hint})", got)
        self.inputs["key_mask"] = mask
        if mask.ndim == len(self.batch) + 1:
            mask = mask[..., np.newaxis, :]
        return np.broadcast_to(merged(mask, 2), (self.b, self.hkv, self.nk))

    def offsets(self, value: object) -> AnyArray | None:
        """(S + 1,) int64, C-contiguous."""
        if value is None:
            return None
        index = _validate.array("cu_seqlens", value)
        if index.dtype.kind not in "iu" or index.ndim != 1:
            raise _validate.wrong_type("cu_seqlens", "a 1-D integer array", index)
        if self.b != 1:
            raise _validate.wrong_value("cu_seqlens", "None, or given with a batch of 1", Text(f"a batch of {self.b}"))
        if self.nq != self.nk:
            got = f"{self.nq} and {self.nk}"
            raise _validate.wrong_value("cu_seqlens", "None, or given with q and k of one length", Text(got))
        self.inputs["cu_seqlens"] = index
        # A copy that no other thread changes after the check.
        own = np.array(index, dtype=np.int64, order="C")
        check_offsets(own, self.nk)
        return own

    def decay(self, value: object, options: LinearOptions) -> AnyArray | None:
        """(B, H_kv, Nk) of the compute dtype, a view."""
        if value is None:
            return None
        if not options.causal:
            raise _validate.wrong_value("decay", "None without causal=True", value)
        g = decays(value, options, self.wide)
        head, token = ((self.hkv,), (*self.batch, self.hkv, self.nk)) if self.heads else ((1,), (self.nk,))
        if g.shape == token:
            self.inputs["decay"] = g
            g = g if self.heads else g[np.newaxis]
            return np.broadcast_to(merged(g, 2), (self.b, self.hkv, self.nk))
        if g.shape == head:
            self.inputs["decay"] = g
            return np.broadcast_to(g[:, np.newaxis], (self.b, self.hkv, self.nk))
        raise _validate.wrong_value(
            "decay", f"of shape {head} or {_validate.clip(str(token), 40)}", Text(_validate.clip(str(g.shape), 40))
        )

    def state_shapes(self, options: LinearOptions, offsets: AnyArray | None) -> list[tuple[int, ...]]:
        """The shapes of a state as users see it: one for each sequence where there are `offsets`."""
        lead = self.batch if offsets is None else (len(offsets) - 1,)
        lead += (self.hkv,) if self.heads else ()
        f = options.features(self.d)
        return [(*lead, f, self.e), *[(*lead, f)] * (options.parts - 1)]

    def backend_state(self, state: Sequence[AnyArray]) -> tuple[AnyArray, ...]:
        """A C-contiguous state as backends see it, a view: (B, H_kv, ...)."""
        shape = state[0].shape
        count = math.prod(shape[: -3 if self.heads else -2])
        lasts = [shape[-2:], *[shape[-2:-1]] * (len(state) - 1)]
        return tuple(x.reshape((count, self.hkv, *last)) for x, last in zip(state, lasts, strict=True))

    def state(
        self, name: str, value: object, options: LinearOptions, offsets: AnyArray | None, parts: int = 0
    ) -> tuple[AnyArray, ...] | None:
        """The state as backends read it, C-contiguous."""
        if value is None:
            return None
        parts = parts or options.parts
        shapes = self.state_shapes(options, offsets)[:parts]
        arrays = state_arrays(name, value, shapes, self.wide)
        self.inputs.update({f"{name}[{i}]": x for i, x in enumerate(arrays)})
        return self.backend_state([np.require(x, requirements=("C", "A")) for x in arrays])

    def new_state(self, options: LinearOptions, offsets: AnyArray | None) -> tuple[AnyArray, ...]:
        """A state to be written, as users see it."""
        shapes = self.state_shapes(options, offsets)
        for shape in shapes:
            _validate.fits_memory("q, k and v", shape, self.wide.itemsize)
        return tuple(np.empty(shape, self.wide) for shape in shapes)

    def output(self, out: object) -> tuple[AnyArray, AnyArray, AnyArray]:
        """The result as users see it, as backends write it, and a view of the first in the order of axes of the second."""
        lead = (*self.batch, *((self.nq, self.hq) if self.layout == "bnhd" else (self.hq, self.nq)))
        shape = (*lead, self.e) if self.heads else (self.nq, self.e)
        if out is None:
            _validate.fits_memory("q and v", shape, self.dtype.itemsize)
            y = np.empty(shape, self.dtype)
        else:
            y = _validate.out_array(out, shape, (self.dtype,), self.inputs)
        given = np.asarray(y).swapaxes(-3, -2) if self.layout == "bnhd" else np.asarray(y)
        given = given if self.heads else given[np.newaxis]
        return y, target(given, 3), given

    def gradients(self) -> list[AnyArray]:
        """Arrays for dq, dk and dv as backends write them."""
        shapes = [
            (self.b, self.hq, self.nq, self.d),
            (self.b, self.hkv, self.nk, self.d),
            (self.b, self.hkv, self.nk, self.e),
        ]
        for name, shape in zip("qkv", shapes, strict=True):
            _validate.fits_memory(name, shape, self.dtype.itemsize)
        return [new(shape, self.dtype) for shape in shapes]

    def given(self, x: AnyArray) -> AnyArray:
        """A C-contiguous (B, H, N, D) array in the caller's dimensions, a view."""
        if self.heads:
            x = x.reshape((*self.batch, *x.shape[1:]))
            return x.swapaxes(-3, -2) if self.layout == "bnhd" else x
        return x.reshape(x.shape[2:])


def state_parts(name: str, state: object, is_array: Callable[[object], bool], array: str) -> tuple[Any, Any, Any]:
    """S, z and m or None of a framework's state; `array` says what its parts must be."""
    if not isinstance(state, (tuple, list)) or len(state) not in (2, 3):
        raise _validate.wrong_type(name, "a tuple of 2 or 3 arrays (S, z, m)", state)
    for i, x in enumerate(state):
        if not is_array(x):
            raise _validate.wrong_type(f"{name}[{i}]", array, x)
    s, z, *m = state
    return s, z, m[0] if m else None


def state_arrays(name: str, value: object, shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any]) -> list[AnyArray]:
    """The arrays of a state: their number, dtype and shapes."""
    parts = ("S", "z", "m")[: len(shapes)]
    wanted = f"{len(shapes)} arrays ({', '.join(parts)})"
    if not isinstance(value, (tuple, list)):
        raise _validate.wrong_type(name, f"a tuple of {wanted}", value)
    if len(value) != len(shapes):
        raise _validate.wrong_value(name, wanted, Text(str(len(value))))
    arrays = []
    for i, (item, shape) in enumerate(zip(value, shapes, strict=True)):
        x = _validate.array(f"{name}[{i}]", item)
        if x.dtype != dtype:
            raise _validate.wrong_type(f"{name}[{i}]", f"of dtype {dtype}", _validate.dtype_of(x))
        _validate.same_shape(f"{name}[{i}]", x, shape)
        arrays.append(x)
    return arrays


def decays(value: object, options: LinearOptions, dtype: np.dtype[Any]) -> AnyArray:
    """Logarithms of decay factors, checked: none is positive or nan."""
    if options.feature_map in ("softmax", "favor"):
        raise _validate.wrong_value("decay", f"None with feature_map={options.feature_map!r}", value)
    g = floats("decay", value, dtype)
    few = distinct(g)
    with memory_errors():
        negative = np.count_nonzero(few <= 0)
    if negative != few.size:
        raise _validate.wrong_value("decay", "<= 0 everywhere, the logarithm of a factor", Text("positive ones or nan"))
    return g


class Step(NamedTuple):
    """The operands of a step as backends take them."""

    q: AnyArray
    k: AnyArray
    v: AnyArray
    out: AnyArray
    decay: AnyArray | None
    state: tuple[AnyArray, ...]
    result: AnyArray
    """What the caller gets."""
    given: AnyArray
    """`result` with the axes of `out`, whose memory `out` is or will be copied to."""


def prepare_step(
    q: object, k: object, v: object, out: object, decay: object, state: object, options: tuple[object, ...]
) -> tuple[Step, LinearOptions]:
    """The operands of a step of any form, checked."""
    named = {"q": q, "k": k, "v": v}
    inputs = {name: _validate.array(name, value) for name, value in named.items()}
    for name, x in inputs.items():
        if x.ndim < 1:
            got = _validate.dtype_of(x) if x.dtype == object else Text("a 0-d array")
            raise _validate.wrong_value(name, "of shape (..., H, D), the rows of one token", got)
        if x.ndim >= _MOST:
            raise _validate.wrong_value(name, f"of less than {_MOST} dimensions", Text(str(x.ndim)))
    given_q = inputs["q"].shape
    of_state = state[0] if isinstance(state, (tuple, list)) and state else None
    # As many axes as S: the one of tokens is still there, and k or S would be what does not fit.
    same = getattr(of_state, "ndim", None) == inputs["k"].ndim == len(given_q)
    if same and len(given_q) > 1 and (given_q[-2] == 1 or len(given_q) > 3):
        wanted = "of shape (..., H, D), without an axis of tokens"
        raise _validate.wrong_value("q, k and v", wanted, Text(_validate.clip(str(given_q), 40)))
    # A step is a problem of one token.
    p = Problem(_STEP, *(x[..., np.newaxis, :] for x in inputs.values()))
    checked = linear_options(p.d, p.wide, True, *options)
    shapes = p.state_shapes(checked, None)
    arrays = state_arrays("state", state, shapes, p.wide)
    for i, x in enumerate(arrays):
        name = f"state[{i}]"
        if not _dlpack.is_own_memory(state[i]):  # type: ignore[index]
            raise _validate.wrong_type(name, "an ndarray, since it is changed in place", state[i])  # type: ignore[index]
        _validate.writable(name, x)
        if not (x.flags.c_contiguous and x.flags.aligned):
            raise _validate.wrong_value(name, "C-contiguous, since it is changed in place", Text("other strides"))
    g = None
    if decay is not None:
        g = decays(decay, checked, p.wide)
        head, token = ((p.hkv,), (*p.batch, p.hkv)) if p.heads else ((), ())
        if g.shape not in (head, token):
            raise _validate.wrong_value("decay", f"of shape {head} or {token}", Text(_validate.clip(str(g.shape), 40)))
        inputs["decay"] = g
        g = merged(np.broadcast_to(g, (*p.batch, p.hkv)), 1)
    if checked.projection is not None:
        inputs["projection"] = checked.projection
    for i, x in enumerate(arrays):
        for name, other in [*inputs.items(), *((f"state[{j}]", arrays[j]) for j in range(i))]:
            if _validate.share_memory(x, other):
                raise _validate.wrong_value(f"state[{i}]", f"memory apart from {name}", Text("arrays that overlap"))
    shape = (*p.batch, *((p.hq,) if p.heads else ()), p.e)
    if out is None:
        result = np.empty(shape, p.dtype)
    else:
        beside = {**inputs, **{f"state[{i}]": x for i, x in enumerate(arrays)}}
        result = _validate.out_array(out, shape, (p.dtype,), beside)
    given = np.asarray(result) if p.heads else np.asarray(result)[np.newaxis]
    q, k, v = (x[:, :, 0] for x in p.arrays)
    return Step(q, k, v, target(given, 2), g, p.backend_state(arrays), result, given), checked


def settle(written: AnyArray, given: AnyArray) -> None:
    """Copies what a backend wrote to where it belongs, unless it is there already."""
    if not np.may_share_memory(written, given):
        given[...] = written.reshape(given.shape)


def visible_keys(p: Problem, causal: bool, mask: AnyArray | None, offsets: AnyArray | None) -> AnyArray:
    """How many keys each row sees: an integer array that broadcasts to (B, H_kv, Nq)."""
    rows = np.arange(p.nq)
    if offsets is None:
        low, high = np.zeros_like(rows), np.full_like(rows, p.nk)
        last = rows + (p.nk - p.nq) + 1
    else:
        low, high = (np.repeat(ends, np.diff(offsets)) for ends in (offsets[:-1], offsets[1:]))
        last = rows + 1
    if causal:
        high = np.minimum(np.maximum(last, low), high)
    if mask is None:
        return (high - low)[np.newaxis, np.newaxis]
    few = distinct(mask)
    few = np.broadcast_to(few, (*few.shape[:-1], p.nk))
    counts = np.zeros((*few.shape[:-1], p.nk + 1), np.int64)
    with memory_errors():
        np.cumsum(few.astype(np.int64), axis=-1, out=counts[..., 1:])
        return counts[..., high] - counts[..., low]


def row_factors(p: Problem, factors: AnyArray) -> AnyArray:
    """Factors of each row, (B or 1, H_kv or 1, Nq), as backends read them: (B, H_q, Nq) of the compute dtype."""
    factors = factors.astype(p.wide)
    if factors.shape[1] not in (1, p.hq):
        factors = np.repeat(factors, p.hq // p.hkv, axis=1)
    return np.broadcast_to(factors, (p.b, p.hq, p.nq))


def given_factors(p: Problem, value: object) -> AnyArray:
    """Factors that the caller gives, in the same form."""
    factors = floats("logn", value, p.wide)
    shape = (*p.batch, *((p.hq,) if p.heads else ()), p.nq)
    try:
        factors = np.broadcast_to(factors, shape)
    except ValueError:
        raise _validate.wrong_value(
            "logn",
            f"'keys' or of a shape that broadcasts to {_validate.clip(str(shape), 40)}",
            Text(_validate.clip(str(factors.shape), 40)),
        ) from None
    p.inputs["logn"] = factors
    return merged(factors if p.heads else factors[np.newaxis], 2)
