# SPDX-License-Identifier: BSD-3-Clause
"""Mitchell arithmetic in plain NumPy: what every other backend must return, written to be read.

A finite non-zero value, subnormals included, is s 2**e (1 + X / 2**M): X an integer of M mantissa bits, e unbounded.
Taking X / 2**M for log2(1 + X / 2**M) turns a product into the integer sum S = X + Y + C of mantissas, whose carry
S >> M goes into the exponent (Mitchell 1962). All sums are integers, so that the only rounding is the last one, to the
result's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._docs import ufunc_doc
from .._multiplier import EQUATION, ITERATIVE, LOG_ADD, Multiplier, OpSpec
from .._validate import broadcast_shapes

try:
    from ml_dtypes import bfloat16 as _bfloat16
except ImportError:
    _bfloat16 = None

Array = NDArray[Any]
Pair = tuple[int, int]


class Format(NamedTuple):
    """A floating-point dtype: mantissa bits M, exponent of the smallest normal number."""

    bits: int
    emin: int


FORMATS = {
    "float16": Format(10, -14),
    "bfloat16": Format(7, -126),
    "float32": Format(23, -126),
    "float64": Format(52, -1022),
}

_FLOATS = [np.dtype(t) for t in (np.float16, _bfloat16, np.float32, np.float64) if t is not None]
# Products of integers are twice as wide, those of 64 bits wrap.
_INTEGERS = [np.dtype(c) for c in "bBhHiIlLqQ"]
_PRODUCTS = [np.dtype(c) for c in "hHiIlLlLqQ"]

PLAIN = Multiplier()

# Elements of the largest temporary array in a matrix product, unless one slice of it has more.
_BLOCK = 2**17


# Integers are arrays of int64, or of Python integers (dtype object) where 64 bits do not suffice.

_bit_length = np.frompyfunc(int.bit_length, 1, 1)


def _floor_log2(n: Array) -> Array:
    """floor(log2(n)); -1 for 0. Exact for int64 below 2**53 and for Python integers."""
    return np.asarray(_bit_length(n) if n.dtype == object else np.frexp(n.astype(np.float64))[1].astype(np.int64)) - 1


def _shift(n: Array, by: Array) -> Array:
    """n 2**by towards zero, for n >= 0."""
    return np.where(by >= 0, n << np.maximum(by, 0), n >> np.maximum(-by, 0))


def _residue(n: Array, corrections: int) -> Array:
    """n without its top corrections + 1 set bits."""
    for _ in range(corrections + 1):
        n = n - np.where(n > 0, (n * 0 + 1) << np.maximum(_floor_log2(n), 0), 0)
    return n


def _keep(x: Array, bits: int, kept: int) -> Array:
    """The top `kept` of the `bits` mantissa bits; 0 keeps all."""
    return x & -(1 << (bits - kept)) if 0 < kept < bits else x


def _constant(spec: OpSpec, bits: int, x: Array, y: Array | None = None, round_to: int | None = None) -> Any:
    """C of each pair in units of 2**-bits, after rounding to multiples of 2**-round_to (the dtype's own M)."""
    rounded = bits if round_to is None else round_to
    table = np.rint(np.array(spec.table or (spec.c,)) * 2.0**rounded).astype(np.int64)
    if not spec.segments:
        return int(table[0]) << (bits - rounded)
    shift = bits - (spec.segments.bit_length() - 1)
    index = x >> shift if y is None else (x >> shift) * spec.segments + (y >> shift)
    c = table[index.astype(np.int64)]
    return c.astype(x.dtype) << (bits - rounded)


def _decompose(a: Array, bits: int, kept: int = 0) -> tuple[Array, Array]:
    """Exponent e and mantissa X of finite non-zero float64 values of a dtype with `bits` mantissa bits."""
    fraction, exponent = np.frexp(np.abs(a))
    x = np.ldexp(fraction, bits + 1).astype(np.int64) - (1 << bits)
    return exponent.astype(np.int64) - 1, _keep(x, bits, kept)


def _logarithm(op: str, spec: OpSpec, bits: int, *args: Array) -> tuple[Array, Array]:
    """Mitchell's logarithm of |op(*args)| as integers (e, S), meaning e + S / 2**bits."""
    (e, x), *rest = (_decompose(v, bits, spec.mantissa_bits) for v in args)
    if rest:
        f, y = rest[0]
        c = _constant(spec, bits, x, y)
        return (e + f, x + y + c) if op == "mul" else (e - f, x - y + c)
    c = _constant(spec, bits, x)
    if op == "square":
        return 2 * e, 2 * x + c
    if op == "reciprocal":
        return -e, c - x
    u = (e << bits) + x
    if op == "log2":
        return 0 * e, u
    u = (u if op == "sqrt" else -u) + 2 * c
    half = u >> 1
    return 0 * e, half + (u & half & 1)  # ties to even


def _magnitude(op: str, spec: OpSpec, bits: int, *args: Array, exact: bool = True) -> tuple[Array, Array]:
    """|op(*args)| of finite non-zero float64 values as (n, e), meaning n 2**e.

    n is an int64; for float64 under the forms that need more bits, a Python integer, or without `exact` a float64.
    """
    if spec.form == LOG_ADD:
        e, s = _logarithm(op, spec, bits, *args)
        return (s & ((1 << bits) - 1)) + (1 << bits), e + (s >> bits) - bits
    (e, x), (f, y) = (_decompose(v, bits, spec.mantissa_bits) for v in (args * 2)[:2])
    kind: Any = np.int64 if bits < 52 else object if exact else np.float64
    x, y = x + (1 << bits), y + (1 << bits)
    if spec.form == EQUATION:
        return x.astype(kind) + y.astype(kind) + (_constant(spec, bits, x) - (1 << bits)), e + f - bits
    xr, yr = _residue(x, spec.corrections), _residue(y, spec.corrections)
    return x.astype(kind) * y.astype(kind) - xr.astype(kind) * yr.astype(kind), e + f - 2 * bits


def _divide_or_inf(n: int, e: int) -> float:
    # Python's division of integers rounds once, to nearest even, subnormal results included.
    try:
        return (n << e) / 1 if e >= 0 else n / (1 << -e)
    except OverflowError:
        return float("inf")


_scale_exactly = np.frompyfunc(_divide_or_inf, 2, 1)


def _scale(n: Array, e: Array) -> Array:
    """n 2**e as float64, rounded once."""
    if n.dtype == object:
        return np.asarray(_scale_exactly(n, e.astype(object))).astype(np.float64)
    return np.ldexp(n.astype(np.float64), e)


def _round(value: Array, dtype: np.dtype[Any]) -> Array:
    """float64 values, infinite where they overflowed, in `dtype`; raises the overflow flag for every dtype alike."""
    with np.errstate(all="ignore"):
        result = value.astype(dtype)
    if np.isinf(result).any():
        np.multiply(np.full(1, 1e300), 1e300)
    return result


_IEEE: dict[str, Callable[..., Array]] = {
    "mul": np.multiply,
    "div": np.divide,
    "square": lambda a: np.multiply(a, a),
    "reciprocal": lambda a: np.divide(1.0, a),
    "sqrt": np.sqrt,
    "rsqrt": lambda a: np.divide(1.0, np.sqrt(a)),
    "log2": np.log2,
    "exp2": np.exp2,
}


def _is_regular(op: str, args: Sequence[Array]) -> Array:
    """Where rule A applies; elsewhere (zeros, infinities, nan, negative roots) the result is IEEE's."""
    regular: Array = np.isfinite(args[0]) & ((args[0] != 0) | (op == "exp2"))
    if op in ("sqrt", "rsqrt", "log2"):
        regular &= args[0] > 0
    if len(args) == 2:
        regular = regular & np.isfinite(args[1]) & (args[1] != 0)
    return regular


def _flush(value: Array, form: Format) -> Array:
    return np.where(np.abs(value) < 2.0**form.emin, np.copysign(0.0, value), value)


def _float_op(op: str, spec: OpSpec, dtype: np.dtype[Any], args: Sequence[Array]) -> Array:
    """Rule A on arrays of `dtype`, of one shape."""
    form = FORMATS[dtype.name]
    args = [v.astype(np.float64) for v in args]
    if spec.flush:
        args = [_flush(v, form) for v in args]
    regular = _is_regular(op, args)
    special = _IEEE[op](*(np.where(regular, 1.0, v) for v in args))
    args = [np.where(regular, v, 1.0) for v in args]
    with np.errstate(all="ignore"):
        if op == "log2":
            value = np.ldexp(_logarithm(op, spec, form.bits, *args)[1].astype(np.float64), -form.bits)
        elif op == "exp2":
            whole = np.floor(args[0])
            # In (-1, 0) the sum 1 + (x + 1) would round twice.
            n = np.where(whole == -1.0, 2.0 + args[0], 1.0 + (args[0] - whole))
            e = np.clip(whole, -3000, 3000).astype(np.int64)
            value = np.where((e < form.emin) & bool(spec.flush), 0.0, np.ldexp(n, e))
        else:
            n, e = _magnitude(op, spec, form.bits, *args)
            value = _scale(n, e)
            if spec.flush:
                value = np.where((_floor_log2(n) + e).astype(np.int64) < form.emin, 0.0, value)
            if op in ("mul", "div", "reciprocal"):
                for v in args:
                    value = np.copysign(1.0, v) * value
    return np.where(regular, _round(value, dtype), special.astype(dtype))


def _integer_op(spec: OpSpec, dtype: np.dtype[Any], result: np.dtype[Any], a: Array, b: Array) -> Array:
    """The same definition on sign and magnitude of integers, truncated towards zero."""
    wide: Any = np.int64 if dtype.itemsize <= 2 else object
    bits, round_to = (23, 23) if dtype.itemsize <= 2 else (63, 52)
    a, b = a.astype(wide), b.astype(wide)
    zero = (a == 0) | (b == 0)
    negative = (a < 0) != (b < 0)
    a, b = (np.where(zero, 1, np.abs(v)).astype(wide) for v in (a, b))
    e, f = _floor_log2(a), _floor_log2(b)
    x, y = (_keep((v << (bits - k)) - (1 << bits), bits, spec.mantissa_bits) for v, k in ((a, e), (b, f)))
    if spec.form == ITERATIVE:
        x, y = x + (1 << bits), y + (1 << bits)
        product = _shift(x * y - _residue(x, spec.corrections) * _residue(y, spec.corrections), e + f - 2 * bits)
    else:
        unary = len(spec.table) == spec.segments
        s = x + y + _constant(spec, bits, x, None if unary else y, round_to)
        if spec.form == LOG_ADD:
            e, s = e + (s >> bits), s & ((1 << bits) - 1)
        product = _shift(s + (1 << bits), e + f - bits)
    product = np.where(zero, 0, np.where(negative, -product, product))
    if result != dtype:
        return np.minimum(product, int(np.iinfo(result).max)).astype(result)
    return np.asarray(product & (2**64 - 1)).astype(np.uint64).view(result)


def resolve(op: str, name: str, args: Sequence[Any], dtype: Any) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Dtypes of operands and result, found as NumPy finds a ufunc's loop: the first that takes the operands safely."""
    weak = [type(v) in (int, float) for v in args]
    dtypes = [np.asarray(v).dtype for v, w in zip(args, weak, strict=True) if not w]
    common = np.result_type(*dtypes) if dtypes else np.result_type(*args)
    if any(weak) and common.kind in "biu":
        common = np.result_type(*(v if w else np.asarray(v).dtype for v, w in zip(args, weak, strict=True)))
    loops = list(zip(_FLOATS, _FLOATS, strict=True))
    if op in ("mul", "square"):
        loops = list(zip(_INTEGERS, _PRODUCTS, strict=True)) + loops
    want = None if dtype is None else np.dtype(dtype)
    for operand, result in loops:
        if np.can_cast(common, operand, "safe" if want is None else "same_kind") and (want is None or want == result):
            return operand, result
    raise TypeError(f"{name} takes float16, bfloat16, float32, float64 or integers, got {common}, dtype {want}")


def _apply(op: str, name: str, spec: OpSpec, args: Sequence[Any], out: Any, where: Any, dtype: Any) -> Any:
    operand, result = resolve(op, name, args, dtype)
    arrays = [np.asarray(v).astype(operand) for v in args]
    mask = np.asarray(where, dtype=bool)
    if isinstance(out, tuple):
        (out,) = out
    if out is not None and not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an array, got an object of type {type(out).__name__}")
    shape = broadcast_shapes(mask.shape, *(v.shape for v in arrays), *(() if out is None else (out.shape,)))
    if out is not None and out.shape != shape:
        raise ValueError(f"out must be of shape {shape}, got {out.shape}")
    if out is not None and not np.can_cast(result, out.dtype, "same_kind"):
        raise TypeError(f"out must be of a dtype that {result} casts to, got {out.dtype}")
    used = np.broadcast_to(mask, shape or (1,))
    arrays = [np.where(used, np.broadcast_to(v, used.shape), operand.type(1)) for v in arrays]
    if operand in _INTEGERS:
        value = _integer_op(spec, operand, result, *(arrays * 2)[:2])
    else:
        value = _float_op(op, spec, operand, arrays)
    value = value.reshape(shape)
    if out is None:
        return value[()]
    np.copyto(out, value, where=mask, casting="same_kind")
    return out


def ufunc_of_tensors(ufunc: Any, a: Any, b: Any) -> None:
    """No shorter way for tensors here: None sends them through arrays."""


@cache
def mitchell_op(op: str, multiplier: Multiplier) -> Callable[..., Any]:
    """The element-wise operation `op` of a multiplier: f(a[, b], /, out=None, *, where=True, dtype=None)."""
    spec = multiplier.spec(op)
    name = multiplier._op_name(op)

    def binary(a: Any, b: Any, /, out: Any = None, *, where: Any = True, dtype: Any = None) -> Any:
        return _apply(op, name, spec, (a, b), out, where, dtype)

    def unary(a: Any, /, out: Any = None, *, where: Any = True, dtype: Any = None) -> Any:
        return _apply(op, name, spec, (a,), out, where, dtype)

    function: Callable[..., Any] = binary if op in ("mul", "div") else unary
    function.__name__ = function.__qualname__ = name
    function.__module__ = "fastops"
    function.__doc__ = ufunc_doc(name, op, multiplier)
    return function


mitchell_mul = mitchell_op("mul", Multiplier())
mitchell_div = mitchell_op("div", Multiplier())
mitchell_square = mitchell_op("square", Multiplier())
mitchell_reciprocal = mitchell_op("reciprocal", Multiplier())
mitchell_sqrt = mitchell_op("sqrt", Multiplier())
mitchell_rsqrt = mitchell_op("rsqrt", Multiplier())
mitchell_log2 = mitchell_op("log2", Multiplier())
mitchell_exp2 = mitchell_op("exp2", Multiplier())
lmul = mitchell_op("mul", Multiplier("lmul"))


def _matmul_operand(a: Array, spec: OpSpec) -> Array:
    """As float64, with zeros for subnormals but those of float16, which are normal numbers in the accumulator."""
    value = a.astype(np.float64)
    return value if a.dtype == np.float16 and not spec.flush else _flush(value, FORMATS[a.dtype.name])


def _product(spec: OpSpec, dtype: np.dtype[Any], a: Array, b: Array) -> Array:
    """Element-wise products of float64 operands, not rounded to `dtype`; infinite beyond the accumulator's range."""
    regular = _is_regular("mul", (a, b))
    n, e = _magnitude("mul", spec, FORMATS[dtype.name].bits, *(np.where(regular, v, 1.0) for v in (a, b)), exact=False)
    value = np.where(regular, np.copysign(1.0, a) * np.copysign(1.0, b) * _scale(n, e), a * b)
    if dtype != np.float64:
        rounded = value.astype(np.float32)
        value = np.where(np.isinf(rounded), rounded, value)
    return value


def _blocked_sum(
    term: Callable[[slice], Array], axis: int, length: int, shape: tuple[int, ...], dtype: Any = np.float64
) -> Array:
    """The sum along `axis` of term(block) over blocks of range(length); temporaries are of one block."""
    total = np.zeros(shape, dtype)
    step = max(1, _BLOCK // max(1, total.size))
    for start in range(0, length if total.size else 0, step):
        total += term(slice(start, start + step)).sum(axis=axis, dtype=dtype)
    return total


def _matmul(spec: OpSpec, dtype: np.dtype[Any], a: Array, b: Array) -> Array:
    """Matrix product in float64 of float64 operands."""
    shape = (*broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    return _blocked_sum(
        lambda k: _product(spec, dtype, a[..., :, k, np.newaxis], b[..., np.newaxis, k, :]), -2, a.shape[-1], shape
    )


def _store(value: Array, dtype: np.dtype[Any], out: Array | None) -> Array:
    result = value.astype(dtype)
    if out is None:
        return result
    out[...] = result
    return out


def mitchell_matmul(a: Array, b: Array, *, multiplier: Multiplier = PLAIN, out: Array | None = None) -> Array:
    """a (..., M, K) times b (..., K, N); sums of products in float64, rounded once."""
    spec = multiplier.spec("mul")
    with np.errstate(all="ignore"):
        return _store(_matmul(spec, a.dtype, _matmul_operand(a, spec), _matmul_operand(b, spec)), a.dtype, out)


def lut_matmul(a: Array, b: Array, table: Array, *, out: Array) -> Array:
    """Sums over K of table[a[..., m, k], b[..., k, n]], the table indexed by the raw bytes."""
    a, b = a.astype(np.uint8), b.astype(np.uint8)
    out[...] = _blocked_sum(
        lambda k: table[a[..., :, k, np.newaxis], b[..., np.newaxis, k, :]], -2, a.shape[-1], out.shape, np.int64
    )
    return out


def im2col(x: Array, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> tuple[Array, Pair]:
    """Patches of x as (N, groups, C / groups * KH * KW, OH * OW), and (OH, OW). Padding is zeros like any other."""
    padded = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    extent = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, extent, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    n, c, oh, ow, kh, kw = windows.shape
    return windows.transpose(0, 1, 4, 5, 2, 3).reshape(n, groups, c // groups * kh * kw, oh * ow), (oh, ow)


def col2im(
    columns: Array, shape: tuple[int, ...], kernel: Pair, size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Array:
    """The adjoint of `im2col`: patches summed into an image of `shape`."""
    n, c, h, w = shape
    (kh, kw), (oh, ow) = kernel, size
    patches = columns.reshape(n, c, kh, kw, oh, ow)
    image = np.zeros((n, c, h + 2 * padding[0], w + 2 * padding[1]))
    for i in range(kh):
        for j in range(kw):
            top, left = i * dilation[0], j * dilation[1]
            rows = slice(top, top + (oh - 1) * stride[0] + 1, stride[0])
            image[:, :, rows, left : left + (ow - 1) * stride[1] + 1 : stride[1]] += patches[:, :, i, j]
    return image[:, :, padding[0] : padding[0] + h, padding[1] : padding[1] + w]


def mitchell_conv2d(
    x: Array,
    w: Array,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    multiplier: Multiplier = PLAIN,
    out: Array | None = None,
) -> Array:
    """Cross-correlation of x (N, C, H, W) with w (O, C / groups, KH, KW): a matrix product with the patches of x."""
    spec = multiplier.spec("mul")
    o, _, kh, kw = w.shape
    with np.errstate(all="ignore"):
        columns, size = im2col(_matmul_operand(x, spec), (kh, kw), stride, padding, dilation, groups)
        kernels = _matmul_operand(w, spec).reshape(groups, o // groups, columns.shape[2])
        return _store(_matmul(spec, x.dtype, kernels, columns).reshape(x.shape[0], o, *size), x.dtype, out)


# Gradients.
# "exact": of the linear piece that the operands lie in (the carry of S stands still); truncation of the mantissa counts
# as the identity. "ste": of the exact product. "mimic": the exact product's gradient, computed with the approximate
# operations themselves.


def sum_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of a broadcast operand: summed over the axes along which it was repeated."""
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    return np.asarray(gradient.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True).reshape(shape))


def _reduced(gradient: Array, operand: Array) -> Array:
    """The gradient with the operand's shape and dtype, summed in float64."""
    return sum_to(gradient.astype(np.float64), operand.shape).astype(operand.dtype)


def _mul_slope(spec: OpSpec, dtype: np.dtype[Any], a: Array, b: Array, dy: Array) -> Array:
    """dy times the slope of the product along a, float64; a zero or infinite a has the mantissa of a power of two."""
    bits = FORMATS[dtype.name].bits
    a1, b1 = (np.where(np.isfinite(v) & (v != 0), v, 1.0) for v in (a, b))
    e, y = _decompose(b1, bits, spec.mantissa_bits)
    factor = np.copysign(1.0, b1)
    if spec.form == LOG_ADD:
        ea, _ = _decompose(a1, bits)
        f, s = _logarithm("mul", spec, bits, a1, b1)
        e = f - ea + (s >> bits)
    elif spec.form == ITERATIVE:
        y = y + (1 << bits)
        factor = factor * (y - _residue(y, spec.corrections)) * 2.0**-bits
    slope = np.where(np.isfinite(b) & (b != 0), np.ldexp(dy * factor, e), dy * b)
    return np.where(np.isnan(a), np.nan, slope)


def _div_slopes(spec: OpSpec, dtype: np.dtype[Any], a: Array, b: Array, dy: Array) -> tuple[Array, Array]:
    """dy times the slopes of the quotient along a and b, float64."""
    bits = FORMATS[dtype.name].bits
    a1, b1 = (np.where(np.isfinite(v) & (v != 0), v, 1.0) for v in (a, b))
    (ea, _), (eb, _) = _decompose(a1, bits), _decompose(b1, bits)
    e, s = _logarithm("div", spec, bits, a1, b1)
    e = e + (s >> bits)
    regular_b = np.isfinite(b) & (b != 0)
    da = np.where(regular_b, np.ldexp(dy * np.copysign(1.0, b1), e - ea), dy / b)
    db = np.where(
        regular_b & np.isfinite(a) & (a != 0), np.ldexp(dy * -np.copysign(1.0, a1), e - eb), -dy * a / (b * b)
    )
    return np.where(np.isnan(a), np.nan, da), db


def mitchell_mul_grad(
    a: Array, b: Array, dy: Array, *, multiplier: Multiplier = PLAIN, mode: str = "exact"
) -> tuple[Array, Array]:
    """Gradients of sum(dy * mul(a, b)) with respect to a and b."""
    spec = multiplier.spec("mul")
    with np.errstate(all="ignore"):
        if mode == "mimic":
            mul = mitchell_op("mul", multiplier)
            da, db = np.asarray(mul(dy, b)), np.asarray(mul(dy, a))
        x, y, g = (v.astype(np.float64) for v in (a, b, dy))
        if mode == "ste":
            da, db = g * y, g * x
        elif mode == "exact":
            if spec.flush:
                x, y = (_flush(v, FORMATS[a.dtype.name]) for v in (x, y))
            da, db = _mul_slope(spec, a.dtype, x, y, g), _mul_slope(spec, a.dtype, y, x, g)
        return _reduced(da, a), _reduced(db, b)


def mitchell_div_grad(
    a: Array, b: Array, dy: Array, *, multiplier: Multiplier = PLAIN, mode: str = "exact"
) -> tuple[Array, Array]:
    """Gradients of sum(dy * div(a, b)) with respect to a and b."""
    spec = multiplier.spec("div")
    with np.errstate(all="ignore"):
        if mode == "mimic":
            mul, div = mitchell_op("mul", multiplier), mitchell_op("div", multiplier)
            da, db = np.asarray(div(dy, b)), np.asarray(-div(mul(dy, a), mul(b, b)))
        x, y, g = (v.astype(np.float64) for v in (a, b, dy))
        if mode == "ste":
            da, db = g / y, -g * x / (y * y)
        elif mode == "exact":
            if spec.flush:
                x, y = (_flush(v, FORMATS[a.dtype.name]) for v in (x, y))
            da, db = _div_slopes(spec, a.dtype, x, y, g)
        return _reduced(da, a), _reduced(db, b)


def _matmul_grad(spec: OpSpec, dtype: np.dtype[Any], a: Array, b: Array, dy: Array, mode: str) -> tuple[Array, Array]:
    """Gradients of sum(dy * (a @ b)) in float64, of float64 operands."""
    at, bt = np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)
    if mode == "ste":
        return sum_to(dy @ bt, a.shape), sum_to(at @ dy, b.shape)
    if mode == "mimic":
        return sum_to(_matmul(spec, dtype, dy, bt), a.shape), sum_to(_matmul(spec, dtype, at, dy), b.shape)
    batch, new = dy.shape[:-2], np.newaxis

    def along_a(n: slice) -> Array:
        return _mul_slope(spec, dtype, a[..., :, :, new], b[..., new, :, n], dy[..., :, new, n])

    def along_b(m: slice) -> Array:
        return _mul_slope(spec, dtype, b[..., new, :, :], a[..., m, :, new], dy[..., m, new, :])

    da = _blocked_sum(along_a, -1, dy.shape[-1], batch + a.shape[-2:])
    db = _blocked_sum(along_b, -3, dy.shape[-2], batch + b.shape[-2:])
    return sum_to(da, a.shape), sum_to(db, b.shape)


def mitchell_matmul_grad(
    a: Array, b: Array, dy: Array, *, multiplier: Multiplier = PLAIN, mode: str = "exact"
) -> tuple[Array, Array]:
    """Gradients of sum(dy * matmul(a, b)) with respect to a (..., M, K) and b (..., K, N); dy (..., M, N)."""
    spec = multiplier.spec("mul")
    with np.errstate(all="ignore"):
        x, y = (v.astype(np.float64) if mode == "ste" else _matmul_operand(v, spec) for v in (a, b))
        g = _matmul_operand(dy, spec) if mode == "mimic" else dy.astype(np.float64)
        da, db = _matmul_grad(spec, a.dtype, x, y, g, mode)
        return da.astype(a.dtype), db.astype(b.dtype)


def mitchell_conv2d_grad(
    x: Array,
    w: Array,
    dy: Array,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    multiplier: Multiplier = PLAIN,
    mode: str = "exact",
) -> tuple[Array, Array]:
    """Gradients of sum(dy * conv2d(x, w)) along x (N, C, H, W) and w (O, C / groups, KH, KW); dy (N, O, OH, OW)."""
    spec = multiplier.spec("mul")
    o, _, kh, kw = w.shape
    with np.errstate(all="ignore"):
        image, kernels = (v.astype(np.float64) if mode == "ste" else _matmul_operand(v, spec) for v in (x, w))
        g = _matmul_operand(dy, spec) if mode == "mimic" else dy.astype(np.float64)
        columns, size = im2col(image, (kh, kw), stride, padding, dilation, groups)
        dw, dcolumns = _matmul_grad(
            spec,
            x.dtype,
            kernels.reshape(groups, o // groups, columns.shape[2]),
            columns,
            g.reshape(x.shape[0], groups, o // groups, columns.shape[3]),
            mode,
        )
        dx = col2im(dcolumns, x.shape, (kh, kw), size, stride, padding, dilation)
        return dx.astype(x.dtype), dw.reshape(w.shape).astype(w.dtype)
