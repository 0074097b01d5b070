# SPDX-License-Identifier: BSD-3-Clause
"""Mitchell arithmetic through Numba: shapes, dtypes and the split of the work here, the arithmetic in `_mitchell_kernels`.

The first call of an operation compiles its kernel: 0.5 to 3 s each and about 13 s for all of them on one core. Numba keeps the
result beside this file, or in the user's cache directory, for the processes that follow.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _docs
from .._multiplier import EQUATION, ITERATIVE, LOG_ADD, Multiplier, OpSpec
from .._validate import broadcast_shapes
from ..reference.mitchell import FORMATS, col2im, im2col, resolve, sum_to
from . import _mitchell_kernels as kernels
from ._kernel import Kernel

Array = NDArray[Any]
Pair = tuple[int, int]

PLAIN = Multiplier()

_OPS = {
    "mul": kernels.MUL,
    "div": kernels.DIV,
    "square": kernels.SQUARE,
    "reciprocal": kernels.RECIPROCAL,
    "sqrt": kernels.SQRT,
    "rsqrt": kernels.RSQRT,
    "log2": kernels.LOG2,
    "exp2": kernels.EXP2,
}

# Elements of a chunk of the element-wise operations: its temporaries stay in the cache.
_CHUNK = 1 << 14
_BLOCK = 256
# Rows of a matrix product that are one piece of work, and multiplications in one call of a kernel (Ctrl-C waits for it).
_ROWS = 128
_WORK = 1 << 26
# Multiplications below which a second thread does not pay.
_THREAD_WORK = 1 << 24

_threads = 1


def set_num_threads(n: int) -> None:
    """Sets how many threads a matrix product may use; no result depends on it."""
    global _threads
    _threads = n


# What the kernels take.


def _parameters(spec: OpSpec, mantissa: int, exponent: int, *, constant_bits: int | None = None) -> tuple[Array, Array]:
    """The parameter vector and the table of a kernel for a float format.

    The constant is rounded to multiples of 2**-constant_bits, the dtype's own mantissa bits where it differs from the format.
    """
    own = mantissa if constant_bits is None else constant_bits
    constants = np.rint(np.array(spec.table or (0.0,)) * 2.0**own).astype(np.int64) << (mantissa - own)
    p = np.zeros(kernels.SLOTS, np.int64)
    p[kernels.MANTISSA] = mantissa
    p[kernels.EXPONENT] = exponent
    p[kernels.FORM] = spec.form
    p[kernels.FLUSH] = spec.flush
    p[kernels.CORRECTIONS] = spec.corrections
    p[kernels.KEEP] = _kept(spec, mantissa)
    p[kernels.SEGMENTS] = spec.segments
    p[kernels.SEGMENT_SHIFT] = mantissa - max(spec.segments.bit_length() - 1, 0)
    p[kernels.CONSTANT] = int(np.rint(spec.c * 2.0**own)) << (mantissa - own)
    return p, constants


def _kept(spec: OpSpec, mantissa: int) -> int:
    """The mantissa bits that take part, as a mask."""
    dropped = mantissa - spec.mantissa_bits if 0 < spec.mantissa_bits < mantissa else 0
    return ((1 << mantissa) - 1) & -(1 << dropped)


# Element-wise operations.


class _Fast(NamedTuple):
    """How a product or quotient is one integer sum, for `kernels.fast32` or `fast64`."""

    kernel: Kernel
    constants: tuple[Any, ...]


class _Plan(NamedTuple):
    """An operation for one float dtype."""

    op: int
    dtype: np.dtype[Any]
    word: np.dtype[Any]
    p: Array
    table: Array
    fast: _Fast | None


def _fast(op: str, spec: OpSpec, word: np.dtype[Any], p: Array) -> _Fast | None:
    if word.itemsize < 4 or spec.form != LOG_ADD or spec.segments or op not in ("mul", "div", "square", "reciprocal"):
        return None
    m, width = int(p[kernels.MANTISSA]), word.itemsize * 8
    one, sign = 1 << m, 1 << (width - 1)
    bias = (sign >> 1) - one
    everything = (1 << width) - 1
    keep = everything ^ sign ^ (one - 1) | int(p[kernels.KEEP])
    product = op in ("mul", "square")
    offset = int(p[kernels.CONSTANT]) + (-bias if product else bias)
    if op == "reciprocal":
        offset += bias
    constants = (
        0 if op == "reciprocal" else keep,
        keep,
        0 if op == "reciprocal" else sign,
        0 if product else everything,
        offset & everything,
        one,
        sign - 2 * one,
        everything if product else 0,
    )
    kernel = kernels.fast32 if width == 32 else kernels.fast64
    return _Fast(kernel, tuple(word.type(value) for value in constants))


def _any_operands(plan: _Plan, a: Array, b: Array, out: Array) -> int:
    """The operation by the kernel that takes whatever comes; in chunks, whose temporaries stay in the cache."""
    flags = 0
    for start in range(0, out.size, _CHUNK):
        piece = slice(start, start + _CHUNK)
        if plan.word.itemsize == 8:
            left, right, result = (v[piece].view(np.int64) for v in (a, b, out))
            flags |= kernels.floats(plan.op, left, right, result, plan.p, plan.table)
            continue
        left = a[piece].astype(np.int64)
        right = left if b is a else b[piece].astype(np.int64)
        flags |= kernels.floats(plan.op, left, right, left, plan.p, plan.table)
        out[piece] = left
    return flags


def _run(plan: _Plan, a: Array, b: Array, out: Array) -> int:
    """The operation on contiguous words of one length; `out` is apart from the operands. Returns IEEE flags."""
    if plan.fast is None:
        return _any_operands(plan, a, b, out)
    odd = np.empty(-(-out.size // _BLOCK), np.bool_)
    plan.fast.kernel(a, b, out, odd, _BLOCK, *plan.fast.constants)
    count = int(np.count_nonzero(odd))
    if count == 0:
        return 0
    if 4 * count > odd.size:
        return _any_operands(plan, a, b, out)
    # Runs of blocks that hold a special operand or result.
    flags = 0
    edges = np.flatnonzero(np.diff(odd, prepend=False, append=False))
    for first, last in zip((edges[::2] * _BLOCK).tolist(), (edges[1::2] * _BLOCK).tolist(), strict=True):
        run = slice(first, last)
        left = a[run]
        flags |= _any_operands(plan, left, left if b is a else b[run], out[run])
    return flags


_ONE = np.ones(1)
_RAISE: dict[int, Callable[[], object]] = {
    kernels.INVALID: lambda: np.multiply(np.inf * _ONE, 0.0),
    kernels.DIVIDE: lambda: np.divide(_ONE, 0.0),
    kernels.OVERFLOW: lambda: np.multiply(1e300 * _ONE, 1e300),
    kernels.UNDERFLOW: lambda: np.multiply(1e-300 * _ONE, 1e-300),
}


def _raise(flags: int) -> None:
    """Raises IEEE flags by an operation of NumPy that raises them, so that `numpy.errstate` rules."""
    for flag, provoke in _RAISE.items():
        if flags & flag:
            provoke()


_INTEGER_KINDS = "iu"


def _flat(array: Array, shape: tuple[int, ...]) -> Array:
    if array.shape != shape:
        array = np.broadcast_to(array, shape)
    return (array if _simple(array) else np.array(array, array.dtype.newbyteorder("="), order="C")).reshape(-1)


def _simple(array: Array) -> bool:
    flags = array.flags
    return flags.c_contiguous and flags.aligned and array.dtype.isnative


class _Operation:
    """One element-wise operation of a multiplier: what the functions below call."""

    def __init__(self, op: str, spec: OpSpec, name: str) -> None:
        self.op = op
        self.spec = spec
        self.name = name
        self._plans: dict[np.dtype[Any], _Plan] = {}
        self._resolved: dict[tuple[np.dtype[Any], ...], tuple[np.dtype[Any], np.dtype[Any]]] = {}

    def plan(self, dtype: np.dtype[Any]) -> _Plan:
        found = self._plans.get(dtype)
        if found is None:
            mantissa = FORMATS[dtype.name].bits
            word = np.dtype(f"u{dtype.itemsize}")
            p, table = _parameters(self.spec, mantissa, dtype.itemsize * 8 - 1 - mantissa)
            found = _Plan(_OPS[self.op], dtype, word, p, table, _fast(self.op, self.spec, word, p))
            self._plans[dtype] = found
        return found

    def resolve(self, args: Sequence[Any], dtype: Any) -> tuple[np.dtype[Any], np.dtype[Any]]:
        if dtype is not None or not all(isinstance(v, np.ndarray) for v in args):
            return resolve(self.op, self.name, args, dtype)
        key = tuple(v.dtype for v in args)
        found = self._resolved.get(key)
        if found is None:
            found = self._resolved[key] = resolve(self.op, self.name, args, None)
        return found

    def compute(self, operand: np.dtype[Any], args: Sequence[Array], out: Array) -> None:
        """The operation on flat contiguous arrays of dtype `operand`; `out` is apart from them."""
        a, b = (args[0], args[-1])
        if operand.kind in _INTEGER_KINDS:
            self._integers(operand, a, b, out)
            return
        plan = self.plan(operand)
        left = a.view(plan.word)
        flags = _run(plan, left, left if b is a else b.view(plan.word), out.view(plan.word))
        if flags:
            _raise(flags)

    def _integers(self, operand: np.dtype[Any], a: Array, b: Array, out: Array) -> None:
        p, table = _parameters(self.spec, 63, 0, constant_bits=23 if operand.itemsize <= 2 else 52)
        signed = int(operand.kind == "i")
        saturate = int(out.dtype.itemsize > operand.itemsize)
        for start in range(0, out.size, _CHUNK):
            piece = slice(start, start + _CHUNK)
            left = a[piece].astype(np.int64)
            right = left if b is a else b[piece].astype(np.int64)
            kernels.integers(
                _OPS[self.op], left, right, left, signed, out.dtype.itemsize * 8 - signed, saturate, p, table
            )
            out[piece] = left.view(np.uint64) if out.dtype.kind == "u" else left

    def __call__(self, args: tuple[Any, ...], out: Any, where: Any, dtype: Any) -> Any:
        operand, result = self.resolve(args, dtype)
        arrays = [np.asarray(v).astype(operand, copy=False) for v in args]
        if isinstance(out, tuple):
            (out,) = out
        if out is not None and not isinstance(out, np.ndarray):
            raise TypeError(f"out must be an array, got an object of type {type(out).__name__}")
        mask = None if where is True else np.asarray(where, dtype=bool)
        shapes = [v.shape for v in arrays]
        if mask is not None:
            shapes.append(mask.shape)
        shape = shapes[0] if len(set(shapes)) == 1 else broadcast_shapes(*shapes)
        if out is not None:
            if out.shape != shape and broadcast_shapes(shape, out.shape) != out.shape:
                raise ValueError(f"out must be of shape {shape}, got {out.shape}")
            if not np.can_cast(result, out.dtype, "same_kind"):
                raise TypeError(f"out must be of a dtype that {result} casts to, got {out.dtype}")
            if not out.flags.writeable:
                raise ValueError("out must be writeable, got a read-only array")
            shape = out.shape
        if mask is not None:
            return self._masked(operand, result, arrays, np.broadcast_to(mask, shape), out)
        flat = [_flat(v, shape) for v in arrays]
        if out is None:
            target = np.empty(flat[0].size, result)
            self.compute(operand, flat, target)
            return target.reshape(shape)[()]
        if out.dtype == result and _simple(out) and not any(np.may_share_memory(out, v) for v in flat):
            self.compute(operand, flat, out.reshape(-1))
        else:
            target = np.empty(flat[0].size, result)
            self.compute(operand, flat, target)
            np.copyto(out, target.reshape(shape), casting="same_kind")
        return out

    def _masked(self, operand: np.dtype[Any], result: np.dtype[Any], arrays: list[Array], mask: Array, out: Any) -> Any:
        flat = [np.broadcast_to(v, mask.shape)[mask] for v in arrays]
        target = np.empty(flat[0].size, result)
        self.compute(operand, flat, target)
        if out is None:
            out = np.empty(mask.shape, result)
            out[mask] = target
            return out[()]
        out[mask] = target
        return out


def ufunc_of_tensors(ufunc: Any, a: Any, b: Any) -> None:
    """No shorter way for tensors here: None sends them through arrays."""


@cache
def mitchell_op(op: str, multiplier: Multiplier) -> Callable[..., Any]:
    """The element-wise operation `op` of a multiplier: f(a[, b], /, out=None, *, where=True, dtype=None)."""
    spec = multiplier.spec(op)
    name = multiplier._op_name(op)
    operation = _Operation(op, spec, name)

    def binary(a: Any, b: Any, /, out: Any = None, *, where: Any = True, dtype: Any = None) -> Any:
        return operation((a, b), out, where, dtype)

    def unary(a: Any, /, out: Any = None, *, where: Any = True, dtype: Any = None) -> Any:
        return operation((a,), out, where, dtype)

    function: Callable[..., Any] = binary if op in ("mul", "div") else unary
    function.__name__ = function.__qualname__ = name
    function.__module__ = "fastops"
    function.__doc__ = _docs.ufunc_doc(name, op, multiplier)
    return function


mitchell_mul = mitchell_op("mul", PLAIN)
mitchell_div = mitchell_op("div", PLAIN)
mitchell_square = mitchell_op("square", PLAIN)
mitchell_reciprocal = mitchell_op("reciprocal", PLAIN)
mitchell_sqrt = mitchell_op("sqrt", PLAIN)
mitchell_rsqrt = mitchell_op("rsqrt", PLAIN)
mitchell_log2 = mitchell_op("log2", PLAIN)
mitchell_exp2 = mitchell_op("exp2", PLAIN)
lmul = mitchell_op("mul", Multiplier("lmul"))


# Matrix products.


def _share(pieces: Iterable[tuple[Any, ...]], work: Callable[..., None], total: int) -> None:
    """Calls work(*piece) for every piece, on several threads where `total` multiplications are many.

    The threads live as long as the call: a forked child finds none missing. The pieces do not depend on their number.
    """
    queue = deque(pieces)
    errors: list[BaseException] = []

    def drain() -> None:
        while queue:
            try:
                piece = queue.popleft()
            except IndexError:
                return
            try:
                work(*piece)
            except BaseException as error:  # noqa: BLE001 (raised again by the calling thread)
                queue.clear()
                errors.append(error)
                return

    helpers = []
    if total >= _THREAD_WORK:
        for _ in range(min(_threads, len(queue)) - 1):
            helper = threading.Thread(target=drain, name="fastops", daemon=True)
            try:
                helper.start()
            except RuntimeError:  # no more threads to be had
                break
            helpers.append(helper)
    drain()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]


class _Accumulator(NamedTuple):
    """How the matrix products of a dtype run: in the dtype itself, or in float32 for the half types."""

    real: np.dtype[Any]
    word: np.dtype[Any]
    p: Array
    table: Array
    flush_below: float


def _accumulator(spec: OpSpec, dtype: np.dtype[Any]) -> _Accumulator:
    double = dtype == np.float64
    p, table = _parameters(spec, 52 if double else 23, 11 if double else 8, constant_bits=FORMATS[dtype.name].bits)
    below = 2.0 ** FORMATS[dtype.name].emin if spec.flush or dtype != np.float16 else 0.0
    return _Accumulator(
        np.dtype(np.float64 if double else np.float32), np.dtype(np.int64 if double else np.int32), p, table, below
    )


def _operand(a: Array, how: _Accumulator) -> Array:
    """In the accumulator's dtype. The kernels take its subnormals for zeros; float16's are zeroed here where they are to be."""
    value = a.astype(how.real, copy=False)
    if a.dtype == np.float16 and how.flush_below:
        value = np.where(np.abs(value) < how.flush_below, value.dtype.type(0), value)
    return _native(value)


def _native(value: Array) -> Array:
    """Aligned and in this machine's byte order, as the kernels and views need it."""
    if _simple(value) or (
        value.flags.aligned and value.dtype.isnative and not any(s % value.itemsize for s in value.strides)
    ):
        return value
    return np.array(value, value.dtype.newbyteorder("="), order="C")


def _normal(value: Array, how: _Accumulator) -> Array:
    """Subnormals zeroed, for the forms that are exact matrix products."""
    return np.where(np.abs(value) < np.finfo(how.real).tiny, how.real.type(0), value)


def _power(value: Array) -> Array:
    """s 2**e of normal numbers; zeros, infinities and NaN as they are."""
    return np.where(
        np.isfinite(value),
        np.copysign(np.ldexp(value.dtype.type(1), np.frexp(value)[1] - 1), value) * (value != 0),
        value,
    )


def _truncated(value: Array, how: _Accumulator) -> Array:
    """Finite values with the mantissa bits that take part."""
    keep = int(how.p[kernels.KEEP])
    mask = ~((1 << int(how.p[kernels.MANTISSA])) - 1) | keep
    word = np.ascontiguousarray(value).view(how.word)
    cut: Array = (word & how.word.type(mask)).view(how.real)
    return np.where(np.isfinite(value), cut, value)


def _remainder(value: Array, how: _Accumulator) -> Array:
    """Finite values without the top corrections + 1 set bits of their mantissas; 0 for the others."""
    rest = np.where(np.isfinite(value), value, 0)
    for _ in range(int(how.p[kernels.CORRECTIONS]) + 1):
        rest = rest - _power(rest)
    return rest


def _overflows(a: Array, b: Array) -> bool:
    """Whether products of finite elements may come near the end of the range, where only term by term is right."""
    bounds = [float(np.max(np.abs(v), where=np.isfinite(v), initial=0.0)) for v in (a, b)]
    exponents = sum(np.frexp(bounds)[1].tolist())
    return bool(exponents > np.finfo(a.dtype).maxexp - 24)


def _term_by_term(how: _Accumulator, a: Array, b: Array) -> Array:
    """The sum of element-wise products, each infinite where it overflows: any form, slowly."""
    plan = _Plan(kernels.MUL, how.real, np.dtype(f"u{how.real.itemsize}"), how.p, how.table, None)
    batch = broadcast_shapes(a.shape[:-2], b.shape[:-2])
    acc = np.zeros((*batch, a.shape[-2], b.shape[-1]), how.real)
    product = np.empty(acc.size, plan.word)
    for k in range(a.shape[-1]):
        left = _flat(a[..., :, k, np.newaxis], acc.shape)
        right = _flat(b[..., np.newaxis, k, :], acc.shape)
        _run(plan, left.view(plan.word), right.view(plan.word), product)
        acc += product.view(how.real).reshape(acc.shape)
    return acc


def _bilinear(spec: OpSpec, how: _Accumulator, a: Array, b: Array) -> Array:
    """The forms without a carry, by exact matrix products: A B - A' B', or 2^e B + (x + c) 2^e 2^f."""
    a, b = (_truncated(_normal(v, how), how) for v in (a, b))
    if _overflows(a, b):
        return _term_by_term(how, a, b)
    if spec.form == ITERATIVE:
        return np.asarray(np.matmul(a, b) - np.matmul(_remainder(a, how), _remainder(b, how)))
    scale_a, scale_b = _power(a), _power(b)
    c = how.real.type(int(how.p[kernels.CONSTANT]) * 2.0 ** -int(how.p[kernels.MANTISSA]))
    finite = np.isfinite(a)
    mantissa = np.where(finite, np.where(finite, a - scale_a, 0) + c * np.where(finite, scale_a, 0), 0)
    return np.asarray(np.matmul(scale_a, b) + np.matmul(mantissa, np.where(np.isfinite(b), scale_b, 0)))


def _slabs(batch: tuple[int, ...], rows: int, columns: int) -> Iterable[tuple[tuple[int, ...], slice]]:
    """Pieces of a product: a matrix of the batch and some of its rows, as many as the shape allows."""
    step = max(8, min(_ROWS, _WORK // max(1, 64 * columns)))
    for index in np.ndindex(*batch):
        for start in range(0, rows, step):
            yield index, slice(start, start + step)


def _steps(rows: int, columns: int, terms: int) -> Iterable[slice]:
    """Pieces of the sums, one for each call of a kernel: multiples of what it packs together."""
    step = max(64, _WORK // max(1, min(rows, _ROWS) * columns) // 64 * 64)
    return [slice(start, start + step) for start in range(0, terms, step)]


def _matmul(spec: OpSpec, how: _Accumulator, a: Array, b: Array, out: Array | None = None) -> Array:
    """The product of operands in the accumulator's dtype, in it; into `out` where that is given and of this dtype."""
    batch = broadcast_shapes(a.shape[:-2], b.shape[:-2])
    rows, terms, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    if spec.form != LOG_ADD:
        return np.broadcast_to(_bilinear(spec, how, a, b), (*batch, rows, columns))
    usable = out is not None and out.dtype == how.real and out.flags.c_contiguous and out.flags.aligned
    acc = out if usable and out is not None else np.empty((*batch, rows, columns), how.real)
    acc[...] = 0
    left = np.broadcast_to(a.view(how.word), (*batch, rows, terms))
    right = np.broadcast_to(np.ascontiguousarray(b).view(how.word), (*batch, terms, columns))
    kernel = kernels.matmul32 if how.word.itemsize == 4 else kernels.matmul64
    steps = _steps(rows, columns, terms)

    def work(index: tuple[int, ...], slab: slice) -> None:
        for piece in steps:
            kernel(left[index][slab, piece], right[index][piece], acc[index][slab], how.p, how.table)

    _share(_slabs(batch, rows, columns), work, acc.size * terms)
    return acc


def _store(value: Array, dtype: np.dtype[Any], out: Array | None) -> Array:
    if out is None:
        return value.astype(dtype, copy=False)
    if out is not value:
        out[...] = value.astype(dtype, copy=False)
    return out


def mitchell_matmul(a: Array, b: Array, *, multiplier: Multiplier = PLAIN, out: Array | None = None) -> Array:
    """a (..., M, K) times b (..., K, N) under a multiplier."""
    spec = multiplier.spec("mul")
    how = _accumulator(spec, a.dtype)
    with np.errstate(all="ignore"):
        return _store(_matmul(spec, how, _operand(a, how), _operand(b, how), out), a.dtype, out)


def lut_matmul(a: Array, b: Array, table: Array, *, out: Array) -> Array:
    """Sums over K of table[a[..., m, k], b[..., k, n]], the table indexed by the raw bytes."""
    batch, (rows, columns) = out.shape[:-2], out.shape[-2:]
    terms = a.shape[-1]
    left = np.broadcast_to(a.view(np.uint8), (*batch, rows, terms))
    right = np.broadcast_to(b.view(np.uint8), (*batch, terms, columns))
    entries = np.ascontiguousarray(table, np.int64)
    steps = _steps(rows, columns, terms)

    def work(index: tuple[int, ...], slab: slice) -> None:
        acc = np.zeros((len(range(rows)[slab]), columns), np.int64)
        for piece in steps:
            kernels.lut_matmul(
                np.ascontiguousarray(left[index][slab, piece]), np.ascontiguousarray(right[index][piece]), entries, acc
            )
        out[index][slab] = acc

    _share(_slabs(batch, rows, columns), work, out.size * terms)
    return out


def _patches(x: Array, w: Array, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> tuple[Array, Array, Pair]:
    """The kernels as (groups, O / groups, K), the patches of x as (N, groups, K, OH * OW), and (OH, OW)."""
    columns, size = im2col(x, (w.shape[2], w.shape[3]), stride, padding, dilation, groups)
    return w.reshape(groups, w.shape[0] // groups, columns.shape[2]), columns, size


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
    """Cross-correlation of x (N, C, H, W) with w (O, C / groups, KH, KW): a matrix product with the patches of each image."""
    spec = multiplier.spec("mul")
    how = _accumulator(spec, x.dtype)
    with np.errstate(all="ignore"):
        image, weights = _operand(x, how), _operand(w, how)
        results = []
        for one in range(x.shape[0]):
            kernel, columns, size = _patches(image[one : one + 1], weights, stride, padding, dilation, groups)
            results.append(_matmul(spec, how, kernel, columns).reshape(1, w.shape[0], *size))
        if not results:
            size = im2col(image, (w.shape[2], w.shape[3]), stride, padding, dilation, groups)[1]
            results.append(np.empty((0, w.shape[0], *size), how.real))
        return _store(np.concatenate(results), x.dtype, out)


# Gradients.


def _elementwise_grad(op: str, a: Array, b: Array, dy: Array, multiplier: Multiplier) -> tuple[Array, Array]:
    """The "exact" gradients in float64, not yet summed over broadcast axes."""
    spec = multiplier.spec(op)
    form = FORMATS[a.dtype.name]
    p, table = _parameters(spec, form.bits, 0)
    shape = broadcast_shapes(a.shape, b.shape, dy.shape)
    x, y, g = (v.astype(np.float64) for v in (a, b, dy))
    if spec.flush:
        x, y = (np.where(np.abs(v) < 2.0**form.emin, np.copysign(0.0, v), v) for v in (x, y))
    x, y, g = (_flat(v, shape) for v in (x, y, g))
    da, db = np.empty(g.size), np.empty(g.size)
    kernels.slopes(op == "div", x.view(np.int64), y.view(np.int64), g, da, db, p, table)
    return da.reshape(shape), db.reshape(shape)


def _summed(gradients: tuple[Array, Array], a: Array, b: Array) -> tuple[Array, Array]:
    da, db = (
        sum_to(np.asarray(d).astype(np.float64), v.shape).astype(v.dtype)
        for d, v in zip(gradients, (a, b), strict=True)
    )
    return da, db


def mitchell_mul_grad(
    a: Array, b: Array, dy: Array, *, multiplier: Multiplier = PLAIN, mode: str = "exact"
) -> tuple[Array, Array]:
    """Gradients of sum(dy * mul(a, b)) with respect to a and b."""
    with np.errstate(all="ignore"):
        if mode == "exact":
            return _summed(_elementwise_grad("mul", a, b, dy, multiplier), a, b)
        if mode == "mimic":
            mul = mitchell_op("mul", multiplier)
            return _summed((mul(dy, b), mul(dy, a)), a, b)
        x, y, g = (v.astype(np.float64) for v in (a, b, dy))
        return _summed((g * y, g * x), a, b)


def mitchell_div_grad(
    a: Array, b: Array, dy: Array, *, multiplier: Multiplier = PLAIN, mode: str = "exact"
) -> tuple[Array, Array]:
    """Gradients of sum(dy * div(a, b)) with respect to a and b."""
    with np.errstate(all="ignore"):
        if mode == "exact":
            return _summed(_elementwise_grad("div", a, b, dy, multiplier), a, b)
        if mode == "mimic":
            mul, div = mitchell_op("mul", multiplier), mitchell_op("div", multiplier)
            return _summed((div(dy, b), -div(mul(dy, a), mul(b, b))), a, b)
        x, y, g = (v.astype(np.float64) for v in (a, b, dy))
        return _summed((g / y, -g * x / (y * y)), a, b)


def _one_grad(spec: OpSpec, how: _Accumulator, a: Array, b: Array, dy: Array, table: Array) -> Array:
    """Sums over j of dy[..., i, j] times the slope of M(a[..., i, k], b[..., j, k]) along a."""
    batch = dy.shape[:-2]
    if spec.form != LOG_ADD:
        b = _truncated(_normal(b, how), how)
        slope = _power(b) if spec.form == EQUATION else np.where(np.isfinite(b), b - _remainder(b, how), b)
        return np.asarray(np.where(np.isnan(a), how.real.type(np.nan), np.matmul(dy, slope)))
    rows, columns = a.shape[-2:]
    terms = b.shape[-2]
    acc = np.zeros((*batch, rows, columns), how.real)
    left = np.broadcast_to(a.view(how.word), acc.shape)
    right = np.broadcast_to(np.ascontiguousarray(b).view(how.word), (*batch, terms, columns))
    kernel = kernels.matmul_slope32 if how.word.itemsize == 4 else kernels.matmul_slope64
    steps = _steps(rows, columns, terms)

    def work(index: tuple[int, ...], slab: slice) -> None:
        for piece in steps:
            kernel(left[index][slab], right[index][piece], dy[index][slab, piece], acc[index][slab], how.p, table)

    _share(_slabs(batch, rows, columns), work, acc.size * terms)
    return acc


def _matmul_grads(spec: OpSpec, how: _Accumulator, a: Array, b: Array, dy: Array, mode: str) -> tuple[Array, Array]:
    """Gradients in the accumulator's dtype of operands in it, summed to the operands' shapes."""
    at, bt = np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)
    if mode == "ste":
        da, db = np.matmul(dy, bt), np.matmul(at, dy)
    elif mode == "mimic":
        da, db = _matmul(spec, how, dy, bt), _matmul(spec, how, at, dy)
    else:
        table = how.table
        if spec.segments:
            table = np.ascontiguousarray(table.reshape(spec.segments, -1).T).reshape(-1)
        da = _one_grad(spec, how, a, bt, dy, how.table)
        db = np.swapaxes(_one_grad(spec, how, bt, a, np.swapaxes(dy, -1, -2), table), -1, -2)
    return sum_to(da, a.shape), sum_to(db, b.shape)


def _grad_operand(v: Array, how: _Accumulator, plain: bool) -> Array:
    return _native(v.astype(how.real, copy=False)) if plain else _operand(v, how)


def mitchell_matmul_grad(
    a: Array, b: Array, dy: Array, *, multiplier: Multiplier = PLAIN, mode: str = "exact"
) -> tuple[Array, Array]:
    """Gradients of sum(dy * matmul(a, b)) with respect to a (..., M, K) and b (..., K, N); dy (..., M, N)."""
    spec = multiplier.spec("mul")
    how = _accumulator(spec, a.dtype)
    with np.errstate(all="ignore"):
        x, y = (_grad_operand(v, how, mode == "ste") for v in (a, b))
        da, db = _matmul_grads(spec, how, x, y, _grad_operand(dy, how, mode != "mimic"), mode)
        return da.astype(a.dtype, copy=False), db.astype(b.dtype, copy=False)


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
    """Gradients of sum(dy * conv2d(x, w)) with respect to x (N, C, H, W) and w (O, C / groups, KH, KW); dy (N, O, OH, OW)."""
    spec = multiplier.spec("mul")
    how = _accumulator(spec, x.dtype)
    dx = np.empty(x.shape, x.dtype)
    dw = np.zeros(w.shape, np.float64)
    with np.errstate(all="ignore"):
        image, weights = (_grad_operand(v, how, mode == "ste") for v in (x, w))
        upper = _grad_operand(dy, how, mode != "mimic")
        for one in range(x.shape[0]):
            piece = slice(one, one + 1)
            kernel, columns, size = _patches(image[piece], weights, stride, padding, dilation, groups)
            g = upper[piece].reshape(1, groups, w.shape[0] // groups, columns.shape[3])
            part, patches = _matmul_grads(spec, how, kernel, columns, g, mode)
            dw += part.reshape(w.shape)
            dx[piece] = col2im(
                patches, (1, *x.shape[1:]), (w.shape[2], w.shape[3]), size, stride, padding, dilation
            ).astype(x.dtype)
        return dx, dw.astype(w.dtype)
