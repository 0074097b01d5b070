# SPDX-License-Identifier: BSD-3-Clause
"""The compiled loops of the Numba backend's attention, over the rows of one head that the caller hands over.

Linear attention goes in chunks of `CHUNK` tokens: what came before them is the state S (features, columns of v), what is between
them a triangle. Both are products of matrices whose innermost loops run along rows, so that they become vectors without a sum
being reordered. Each loop is compiled for float32 and for float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import core, extending

from ._kernel import Kernel, given, intrinsic, kernel, njit, types

Pair = dict[np.dtype[Any], Kernel]

cgutils: Any = core.cgutils

# Of the loops below; nothing else calls it.
_part: Any = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

# Tokens of a chunk at most, and keys of a block of softmax attention.
CHUNK = 32
BLOCK = 64

ELU, RELU, RELU2, IDENTITY, COSINE, EXP, FAVOR, SOFTMAX = range(8)
# What the sums hold: features as they are, features over 2**m, or the same divided by each feature's own sum.
PLAIN, SCALED, EACH = range(3)

# Within a chunk the features of all its rows are held over one power of two: rows whose own maxima are further apart than this
# do not share a chunk, or a later key would push earlier ones out of the range of the numbers.
_WINDOW = 16.0


def _pair(signature: Callable[[Any, Any, Any], Any]) -> Callable[[Callable[..., Any]], Pair]:
    """Makes kernels for both precisions; `signature` gets the number, what is read and what is written, by dimensions."""

    def make(function: Callable[..., Any]) -> Pair:
        return {
            np.dtype(real.name): kernel(
                signature(
                    real,
                    lambda ndim, real=real: given(real, ndim),
                    lambda ndim, real=real: types.Array(real, ndim, "C"),
                ),
                error_model="numpy",
            )(function)
            for real in (types.float32, types.float64)
        }

    return make


# Exponentials.


def _exp(x: Any, m: Any) -> Any:
    """exp(x) * 2**-m for whole m: to some units of the dtype, without a call, so that loops of it become vectors."""
    raise NotImplementedError


@_part
def _power32(n):  # type: ignore[no-untyped-def]
    """2**n of a whole number in [-126, 127]: the bits of n + 1.5 * 2**23 hold it."""
    shifted = np.float32(n + np.float32(127.0 + 12582912.0))
    return np.int32(shifted.view(np.int32) << np.int32(23)).view(np.float32)


@_part
def _power64(n):  # type: ignore[no-untyped-def]
    shifted = n + (1023.0 + 6755399441055744.0)
    return np.int64(np.float64(shifted).view(np.int64) << 52).view(np.float64)


@intrinsic  # type: ignore[untyped-decorator]
def _fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, in one rounding where the CPU has that at no cost."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        name = f"llvm.fmuladd.f{signature.return_type.bitwidth}"
        return builder.call(
            cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name), args
        )

    return a(a, a, a), generate


@_part
def _exp32(x, m):  # type: ignore[no-untyped-def]
    # Adding 1.5 * 2**23 rounds to whole numbers.
    n = _fma(x, np.float32(1.44269504), np.float32(12582912.0)) - np.float32(12582912.0)
    # log(2) in two parts, the first of nine bits.
    r = _fma(n, np.float32(2.12194440e-4), _fma(n, np.float32(-0.693359375), x))
    s = n - m
    if s < np.float32(-200.0):
        s = np.float32(-200.0)
        r = np.float32(0.0)
    s = min(s, np.float32(250.0))
    # Taylor's series: |r| <= log(2) / 2, whose 8th power over 8! is 5e-9.
    y = _fma(r, np.float32(1.0 / 5040.0), np.float32(1.0 / 720.0))
    y = _fma(r, y, np.float32(1.0 / 120.0))
    y = _fma(r, y, np.float32(1.0 / 24.0))
    y = _fma(r, y, np.float32(1.0 / 6.0))
    y = _fma(r, y, np.float32(0.5))
    y = _fma(r, y, np.float32(1.0))
    y = _fma(r, y, np.float32(1.0))
    # In two factors, neither of which leaves the range.
    half = _fma(s, np.float32(0.5), np.float32(12582912.0)) - np.float32(12582912.0)
    return y * _power32(half) * _power32(s - half)


@_part
def _exp64(x, m):  # type: ignore[no-untyped-def]
    n = _fma(x, 1.4426950408889634, 6755399441055744.0) - 6755399441055744.0
    r = _fma(n, -1.90821492927058770002e-10, _fma(n, -0.693147180369123816490, x))
    s = n - m
    if s < -1500.0:
        s = -1500.0
        r = 0.0
    s = min(s, 2000.0)
    y = _fma(r, 1.0 / 6227020800.0, 1.0 / 479001600.0)
    y = _fma(r, y, 1.0 / 39916800.0)
    y = _fma(r, y, 1.0 / 3628800.0)
    y = _fma(r, y, 1.0 / 362880.0)
    y = _fma(r, y, 1.0 / 40320.0)
    y = _fma(r, y, 1.0 / 5040.0)
    y = _fma(r, y, 1.0 / 720.0)
    y = _fma(r, y, 1.0 / 120.0)
    y = _fma(r, y, 1.0 / 24.0)
    y = _fma(r, y, 1.0 / 6.0)
    y = _fma(r, y, 0.5)
    y = _fma(r, y, 1.0)
    y = _fma(r, y, 1.0)
    half = _fma(s, 0.5, 6755399441055744.0) - 6755399441055744.0
    return y * _power64(half) * _power64(s - half)


@extending.overload(_exp)
def _choose_exp(x, m):  # type: ignore[no-untyped-def]
    if x == types.float32:
        return lambda x, m: _exp32(x, m)
    return lambda x, m: _exp64(x, m)


# Products of small matrices.


def _block(context: Any, builder: Any, real: Any, lanes: int) -> tuple[Any, Callable[[Any], Any]]:
    """The type of so many lanes, and what makes one of a number."""
    if lanes == 1:
        return real, lambda x: x
    vector = ir.VectorType(real, lanes)
    mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)

    def spread(x: Any) -> Any:
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), x, ir.IntType(32)(0))
        return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)

    return vector, spread


@intrinsic  # type: ignore[untyped-decorator]
def _multiply(typingctx: Any, c: Any, a: Any, b: Any, i0: Any, i1: Any, p0: Any, p1: Any, columns: Any) -> Any:
    """c[i0:i1, :columns] += a[i0:i1, p0:p1] b[p0:p1, :columns], each element in the order of p, whatever its neighbours.

    Four rows by two vectors stay in registers, which no loop of Numba's own would do.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # Not once for each place that calls the function around it: that is most of what there is to compile.
        builder.function.attributes.add("noinline")
        arrays = [context.make_array(t)(context, builder, x) for t, x in zip(signature.args[:3], args[:3], strict=True)]
        strides = [cgutils.unpack_tuple(builder, x.shape)[1] for x in arrays]
        first, last, start, stop, width = args[3:]
        real = context.get_value_type(signature.args[0].dtype)
        size = signature.args[0].dtype.bitwidth // 8
        most = 32 // size

        def place(which: int, row: Any, column: Any, kind: Any) -> Any:
            at = builder.gep(arrays[which].data, [builder.add(builder.mul(row, strides[which]), column)])
            return builder.bitcast(at, kind.as_pointer())

        def tile(row: Any, column: Any, rows: int, vectors: int, lanes: int) -> None:
            kind, spread = _block(context, builder, real, lanes)
            name = f"llvm.fmuladd.{'' if lanes == 1 else f'v{lanes}'}f{8 * size}"
            multiply_add = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
            index = row.type
            places = [
                [
                    place(0, builder.add(row, index(i)), builder.add(column, index(j * lanes)), kind)
                    for j in range(vectors)
                ]
                for i in range(rows)
            ]
            sums = [[cgutils.alloca_once(builder, kind) for _ in range(vectors)] for _ in range(rows)]
            # From zero: a sum of many blocks is then off by the blocks' number of roundings, not the terms'.
            for i in range(rows):
                for j in range(vectors):
                    builder.store(ir.Constant(kind, 0.0 if lanes == 1 else [0.0] * lanes), sums[i][j])
            with cgutils.for_range_slice(builder, start, stop, index(1)) as (p, _):
                right = [
                    builder.load(place(2, p, builder.add(column, index(j * lanes)), kind), align=size)
                    for j in range(vectors)
                ]
                for i in range(rows):
                    left = spread(builder.load(place(1, builder.add(row, index(i)), p, real), align=size))
                    for j in range(vectors):
                        total = builder.call(multiply_add, [left, right[j], builder.load(sums[i][j])])
                        builder.store(total, sums[i][j])
            for i in range(rows):
                for j in range(vectors):
                    total = builder.fadd(builder.load(places[i][j], align=size), builder.load(sums[i][j]))
                    builder.store(total, places[i][j], align=size)

        def strip(low: Any, high: Any, rows: int) -> None:
            with cgutils.for_range_slice(builder, low, high, low.type(rows)) as (row, _):
                left = low.type(0)
                for vectors, lanes in ((2, most), (1, most), (1, 1)):
                    step = low.type(vectors * lanes)
                    right = builder.sub(width, builder.srem(width, step))
                    with cgutils.for_range_slice(builder, left, right, step) as (column, _):
                        tile(row, column, rows, vectors, lanes)
                    left = right

        fours = builder.sub(last, builder.srem(builder.sub(last, first), last.type(4)))
        strip(first, fours, 4)
        strip(fours, last, 1)
        return context.get_dummy_value()

    return types.void(c, a, b, *(types.int64,) * 5), generate


@_part
def _add(c, a, b, i0, i1, p0, p1, columns):  # type: ignore[no-untyped-def]
    """c[i0:i1, :columns] += a[i0:i1, p0:p1] b[p0:p1, :columns]."""
    _multiply(c, a, b, i0, i1, p0, p1, columns)


@_part
def _add_product(c, a, b, rows, depth, columns):  # type: ignore[no-untyped-def]
    """c[:rows, :columns] += a[:rows, :depth] b[:depth, :columns]."""
    _add(c, a, b, 0, rows, 0, depth, columns)


@_part
def _add_lower(c, a, b, count, columns):  # type: ignore[no-untyped-def]
    """c[i] += a[i, : i + 1] b[: i + 1]: what lies above the diagonal is not read, nor what it would be multiplied with."""
    for i in range(0, count, 4):
        end = min(i + 4, count)
        _add(c, a, b, i, end, 0, i + 1, columns)
        for j in range(i + 1, end):
            _add(c, a, b, j, j + 1, i + 1, j + 1, columns)


@_part
def _add_upper(c, a, b, count, columns):  # type: ignore[no-untyped-def]
    """c[i] += a[i, i:count] b[i:count]."""
    for i in range(0, count, 4):
        end = min(i + 4, count)
        _add(c, a, b, i, end, end - 1, count, columns)
        for j in range(i, end - 1):
            _add(c, a, b, j, j + 1, j, end - 1, columns)


@_part
def _transpose(a, out, rows, columns):  # type: ignore[no-untyped-def]
    """out[:columns, :rows] = a[:rows, :columns] transposed."""
    for i in range(rows):
        for j in range(columns):
            out[j, i] = a[i, j]


@_part
def _add_sums(z, k, first, count, ratio, decays, sums):  # type: ignore[no-untyped-def]
    """z += the sum of the chunk's keys, each after its decay up to the chunk's end."""
    d = z.size
    sums[:] = z.dtype.type(0)
    for i in range(count):
        factor = z.dtype.type(ratio[count - 1, i]) if decays else z.dtype.type(1)
        for j in range(d):
            sums[j] += factor * k[first + i, j]
    for j in range(d):
        z[j] += sums[j]


@_part
def _sum(a, n):  # type: ignore[no-untyped-def]
    """The sum of a[:n], as four."""
    s0 = s1 = s2 = s3 = a.dtype.type(0)
    fours = n - n % 4
    for i in range(0, fours, 4):
        s0 += a[i]
        s1 += a[i + 1]
        s2 += a[i + 2]
        s3 += a[i + 3]
    for i in range(fours, n):
        s0 += a[i]
    return (s0 + s1) + (s2 + s3)


@_part
def _dot(a, b, n):  # type: ignore[no-untyped-def]
    """a[:n] . b[:n], in four sums."""
    s0 = s1 = s2 = s3 = a.dtype.type(0)
    fours = n - n % 4
    for i in range(0, fours, 4):
        s0 += a[i] * b[i]
        s1 += a[i + 1] * b[i + 1]
        s2 += a[i + 2] * b[i + 2]
        s3 += a[i + 3] * b[i + 3]
    for i in range(fours, n):
        s0 += a[i] * b[i]
    return (s0 + s1) + (s2 + s3)


# Feature maps.


@_part
def _map(x, f, kind, factor, eps, projection):  # type: ignore[no-untyped-def]
    """f = factor * features of the rows x; logarithms of them for `EXP` (of factor * x) and `FAVOR` (of rows times factor).

    `projection` is (D, features).
    """
    rows, d = x.shape
    zero = factor - factor
    one = x.dtype.type(1)
    for i in range(rows):
        if kind == ELU:
            for j in range(d):
                below = x[i, j]
                below = min(below, zero)
                y = _exp(below, zero)
                if x[i, j] >= zero:
                    y = x[i, j] + one
                f[i, j] = factor * y
        elif kind == RELU:
            for j in range(d):
                f[i, j] = factor * ((max(x[i, j], zero)) + eps)
        elif kind == RELU2:
            for j in range(d):
                y = max(x[i, j], zero)
                f[i, j] = factor * (y * y + eps)
        elif kind == COSINE:
            largest, inverse = _length(x[i], d)
            for j in range(d):
                f[i, j] = np.float64(factor) * (np.float64(x[i, j]) / largest * inverse)
            f[i, d] = factor
        elif kind == FAVOR:
            # Performers (Choromanski et al. 2021), eq. 5: exp(w.x - |x|^2 / 2) / sqrt(m).
            squares = 0.0
            for j in range(d):
                y = np.float64(factor) * np.float64(x[i, j])
                squares += y * y
            start = x.dtype.type(-0.5 * (squares + math.log(f.shape[1])))
            for r in range(f.shape[1]):
                f[i, r] = zero
            for j in range(d):
                y = factor * x[i, j]
                for r in range(f.shape[1]):
                    f[i, r] += y * projection[j, r]
            for r in range(f.shape[1]):
                f[i, r] += start
        else:
            for j in range(d):
                f[i, j] = factor * x[i, j]
            if kind == SOFTMAX:
                _softmax_row(f[i], d)


@_part
def _length(x, d):  # type: ignore[no-untyped-def]
    """The largest magnitude, and one over the length in units of it; 1 and 0 of zeros."""
    largest = 0.0
    for j in range(d):
        if abs(x[j]) > largest:
            largest = np.float64(abs(x[j]))
    if largest == 0.0:
        largest = 1.0
    squares = 0.0
    for j in range(d):
        y = np.float64(x[j]) / largest
        squares += y * y
    return largest, 1.0 / math.sqrt(squares) if squares != 0.0 else 0.0


@_part
def _softmax_row(f, d):  # type: ignore[no-untyped-def]
    high = f[0]
    for j in range(1, d):
        high = max(high, f[j])
    total = 0.0
    zero = f.dtype.type(0)
    for j in range(d):
        f[j] = _exp(f[j] - high, zero)
    for j in range(d):
        total += f[j]
    inverse = f.dtype.type(1.0 / total)
    for j in range(d):
        f[j] *= inverse


@_pair(lambda real, read, write: types.void(read(2), write(2), types.int64, real, real, read(2)))
def features(x, f, kind, factor, eps, projection):  # type: ignore[no-untyped-def]
    """Features of the rows x, or their logarithms."""
    _map(x, f, kind, factor, eps, projection)


@_pair(lambda real, read, write: types.void(read(2), read(2), write(2), types.int64, real, read(2)))
def features_back(x, df, dx, kind, factor, projection):  # type: ignore[no-untyped-def]
    """dx of the rows x from the gradient of what `features` gave; `projection` is (features, D)."""
    rows, d = x.shape
    zero = factor - factor
    two = x.dtype.type(2)
    for i in range(rows):
        if kind == ELU:
            for j in range(d):
                below = x[i, j]
                below = min(below, zero)
                dx[i, j] = factor * df[i, j] * _exp(below, zero)
        elif kind == RELU:
            for j in range(d):
                dx[i, j] = factor * df[i, j] if x[i, j] > zero else (max(zero, x[i, j]))
        elif kind == RELU2:
            for j in range(d):
                dx[i, j] = factor * df[i, j] * (two * (max(x[i, j], zero)))
        elif kind == COSINE:
            largest, inverse = _length(x[i], d)
            along = 0.0
            for j in range(d):
                along += np.float64(df[i, j]) * (np.float64(x[i, j]) / largest * inverse)
            for j in range(d):
                y = np.float64(df[i, j]) - along * (np.float64(x[i, j]) / largest * inverse)
                dx[i, j] = np.float64(factor) * inverse * y / largest
        elif kind == FAVOR:
            total = 0.0
            for r in range(df.shape[1]):
                total += np.float64(df[i, r])
            weight = x.dtype.type(total) * factor
            for j in range(d):
                dx[i, j] = zero
            for r in range(df.shape[1]):
                y = df[i, r]
                for j in range(d):
                    dx[i, j] += y * projection[r, j]
            for j in range(d):
                dx[i, j] = factor * (dx[i, j] - weight * x[i, j])
        else:
            for j in range(d):
                dx[i, j] = factor * df[i, j]


# Chunks.


@_part
def _window(u, first, most, decay, z, m, factors, low, high, last):  # type: ignore[no-untyped-def]
    """How many tokens from `first` share a chunk; their exponentials replace the logarithms u, and m becomes the chunk's.

    `factors` gets, for each feature, what the state must be multiplied with: the change of 2**m, and the first token's decay.
    """
    d = u.shape[1]
    none = u.dtype.type(-np.inf)
    log2e = u.dtype.type(1.4426950408889634)
    width = u.dtype.type(_WINDOW)
    decays = decay.size > 0
    for j in range(d):
        low[j] = high[j] = none
        last[j] = m[j]
        if decays and m[j] > none:
            # The sum itself says how far it has decayed.
            last[j] = m[j] + u.dtype.type(math.frexp(np.float64(z[j]))[1]) if z[j] > 0 else none
    count = 0
    while count < most:
        gone = u.dtype.type(decay[first + count]) * log2e if decays else u.dtype.type(0)
        apart = 0
        for j in range(d):
            x = u[first + count, j] * log2e
            y = last[j] + gone
            y = max(y, x)
            least = low[j] if low[j] < y and low[j] > none else y
            most_of = max(y, high[j])
            apart += most_of - least > width
        if apart and count:
            break
        for j in range(d):
            x = u[first + count, j] * log2e
            y = last[j] + gone
            y = max(y, x)
            last[j] = y
            low[j] = low[j] if low[j] < y and low[j] > none else y
            high[j] = max(y, high[j])
        count += 1
    start = np.float64(decay[first]) * 1.4426950408889634 if decays else 0.0
    for j in range(d):
        old = m[j]
        m[j] = np.ceil(high[j])
        if not decays and old > m[j]:
            m[j] = old
        if old == m[j] and start == 0.0:
            factors[j] = 1.0 if old > none else 0.0
        elif old == none or m[j] == none:
            factors[j] = 0.0
        else:
            factors[j] = 2.0 ** (np.float64(old) - np.float64(m[j]) + start)
        high[j] = m[j] if m[j] > none else u.dtype.type(0)
    for i in range(first, first + count):
        for j in range(d):
            u[i, j] = _exp(u[i, j], high[j])
    return count


@_part
def _rescale(s, z, factors):  # type: ignore[no-untyped-def]
    for j in range(factors.size):
        factor = s.dtype.type(factors[j])
        if factor != 1:
            z[j] *= factor
            for e in range(s.shape[1]):
                s[j, e] *= factor


@_part
def _between(decay, first, count, taken, ratio, reach):  # type: ignore[no-untyped-def]
    """ratio[i, j] = exp(sum of decay over (j, i]), reach[i] the same from before the chunk; `taken`: without the first token's."""
    product = 1.0
    for i in range(count):
        factor = math.exp(np.float64(decay[first + i]))
        if i or not taken:
            product *= factor
        reach[i] = product
        for j in range(i):
            ratio[i, j] = ratio[i - 1, j] * factor
        ratio[i, i] = 1.0


@_part
def _scale_query(q, m, d):  # type: ignore[no-untyped-def]
    """Replaces logarithms q by exp(q) 2**(m - top), whose largest is about 1; returns top."""
    none = q.dtype.type(-np.inf)
    log2e = q.dtype.type(1.4426950408889634)
    top = none
    for j in range(d):
        x = q[j] * log2e + m[j]
        top = max(top, x)
    top = np.ceil(top)
    if top - top != 0:
        top = q.dtype.type(0)
    for j in range(d):
        q[j] = _exp(q[j], top - m[j])
    return top


@_part
def _queries(q, k, m, z, running, count, first, keys, holds, tops):  # type: ignore[no-untyped-def]
    """The rows' features as factors of the state: over 2**top for `SCALED`, over each feature's own sum for `EACH`."""
    d = q.shape[1]
    zero = q.dtype.type(0)
    if holds == SCALED:
        for i in range(count):
            tops[i] = _scale_query(q[i], m, d)
    elif holds == EACH:
        for j in range(d):
            running[j] = z[j]
        for i in range(count):
            for j in range(d):
                if keys:
                    running[j] += k[first + i, j]
                q[i, j] = q[i, j] / running[j] if running[j] != zero else zero


@_part
def _segment(  # type: ignore[no-untyped-def]
    q, k, v, decay, out, s, z, m, holds, normalize, eps, turned, weights, ratio, reach, tops, factors, low, high, last
):
    """Takes keys into the state and rows out of it; where there are both, row i sees the keys up to its own."""
    groups, n_rows, d = q.shape
    n_keys, columns = v.shape
    zero = s.dtype.type(0)
    total = max(n_rows, n_keys)
    decays = decay.size > 0
    first = 0
    while first < total:
        count = min(turned.shape[1], total - first)
        taken = False
        if n_keys:
            if holds != PLAIN:
                count = _window(k, first, count, decay, z, m, factors, low, high, last)
                _rescale(s, z, factors)
                taken = True
            if decays:
                _between(decay, first, count, taken, ratio, reach)
            _transpose(k[first : first + count], turned, count, d)
        for g in range(groups if n_rows else 0):
            part = q[g, first : first + count]
            result = out[g, first : first + count]
            _queries(part, k, m, z, last, count, first, n_keys > 0, holds, tops)
            result[:] = zero
            _add_product(result, part, s, count, d, columns)
            if n_keys:
                for i in range(count):
                    for j in range(count):
                        weights[i, j] = zero
                _add_product(weights, part, turned, count, d, count)
                if decays:
                    for i in range(count):
                        factor = s.dtype.type(reach[i])
                        for e in range(columns):
                            result[i, e] *= factor
                        for j in range(i + 1):
                            weights[i, j] *= s.dtype.type(ratio[i, j])
                _add_lower(result, weights, v[first : first + count], count, columns)
            if holds == EACH:
                continue
            for i in range(count):
                if normalize:
                    sums = _dot(part[i], z, d)
                    if n_keys:
                        if decays:
                            sums *= s.dtype.type(reach[i])
                        sums += _sum(weights[i], i + 1)
                    sums += eps if holds == PLAIN or eps == zero else s.dtype.type(eps * 2.0 ** -np.float64(tops[i]))
                    for e in range(columns):
                        result[i, e] = result[i, e] / sums if sums != zero else zero
                elif holds == SCALED:
                    factor = 2.0 ** np.float64(tops[i])
                    for e in range(columns):
                        result[i, e] = s.dtype.type(np.float64(result[i, e]) * factor)
        if n_keys:
            if decays:
                factor = s.dtype.type(reach[count - 1])
                for j in range(d):
                    z[j] *= factor
                    for e in range(columns):
                        s[j, e] *= factor
                    for i in range(count):
                        turned[j, i] *= s.dtype.type(ratio[count - 1, i])
            _add_product(s, turned, v[first : first + count], d, count, columns)
            _add_sums(z, k, first, count, ratio, decays, last)
        first += count


def _work(real: Any, read: Any, write: Any) -> tuple[Any, ...]:
    """What the loops of a chunk need: see `_segment`."""
    double = types.float64
    return (write(2), write(2), types.Array(double, 2, "C"), double[::1], write(1), double[::1], *(write(1),) * 3)


@_pair(
    lambda real, read, write: types.void(
        write(3),
        write(2),
        read(2),
        given(types.float64),
        write(3),
        write(2),
        write(1),
        write(1),
        types.int64,
        types.boolean,
        real,
        *_work(real, read, write),
    )
)
def segment(  # type: ignore[no-untyped-def]
    q, k, v, decay, out, s, z, m, holds, normalize, eps, turned, weights, ratio, reach, tops, factors, low, high, last
):
    """Some tokens of a head; q and k hold features, or logarithms of them, and are overwritten."""
    _segment(
        q,
        k,
        v,
        decay,
        out,
        s,
        z,
        m,
        holds,
        normalize,
        eps,
        turned,
        weights,
        ratio,
        reach,
        tops,
        factors,
        low,
        high,
        last,
    )


@_pair(
    lambda real, read, write: types.void(
        write(3),
        write(2),
        read(2),
        given(types.float64),
        write(3),
        write(3),
        write(2),
        write(2),
        types.int64,
        types.boolean,
        real,
        *_work(real, read, write),
    )
)
def steps(  # type: ignore[no-untyped-def]
    q, k, v, decay, out, s, z, m, holds, normalize, eps, turned, weights, ratio, reach, tops, factors, low, high, last
):
    """One token of each head: q and out (heads, groups, ...), k and v (heads, ...)."""
    groups, d = q.shape[1:]
    columns = v.shape[1]
    for h in range(k.shape[0]):
        _segment(
            q[h].reshape(groups, 1, d),
            k[h : h + 1],
            v[h : h + 1],
            decay[h : h + 1],
            out[h].reshape(groups, 1, columns),
            s[h],
            z[h],
            m[h],
            holds,
            normalize,
            eps,
            turned,
            weights,
            ratio,
            reach,
            tops,
            factors,
            low,
            high,
            last,
        )


# Gradients. With w the weights, G_i = dy_i / (den_i + eps) and c_i = -dy_i.y_i / (den_i + eps): dw_ij = G_i.v_j + c_i.


@_part
def _triangles(  # type: ignore[no-untyped-def]
    q, g, c, turned, turned_v, weights, slopes, ratio, decays, count, d, columns
):
    """weights[i, j] = q_i.k_j and slopes[i, j] = dw_ij of a chunk, both times the decay between, for j <= i."""
    zero = q.dtype.type(0)
    for i in range(count):
        for j in range(count):
            weights[i, j] = zero
            slopes[i, j] = c[i]
    _add_product(weights, q, turned, count, d, count)
    _add_product(slopes, g, turned_v, count, columns, count)
    if decays:
        for i in range(count):
            for j in range(i + 1):
                weights[i, j] *= q.dtype.type(ratio[i, j])
                slopes[i, j] *= q.dtype.type(ratio[i, j])


@_pair(
    lambda real, read, write: types.int64(
        write(3),
        write(2),
        read(2),
        given(types.float64),
        write(3),
        read(3),
        write(2),
        write(3),
        write(3),
        write(2),
        write(1),
        write(1),
        types.int64,
        types.boolean,
        real,
        types.int64[::1],
        types.Array(types.float64, 2, "C"),
        write(2),
        write(2),
        write(2),
        *_work(real, read, write),
    )
)
def forth(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    decay,
    g,
    y,
    c,
    dq,
    extra,
    s,
    z,
    m,
    holds,
    normalize,
    eps,
    starts,
    changes,
    turned_v,
    turned_s,
    slopes,
    turned,
    weights,
    ratio,
    reach,
    tops,
    factors,
    low,
    high,
    last,
):
    """The forward sweep over some tokens: dq, and what `back` needs. Returns the number of chunks, which begin at `starts`.

    g is dy and becomes G, q and k become the factors of the state, dq is that of the features, or of their logarithms;
    `extra` gets what each feature's own sum passes on; `changes` what the state was multiplied with before each chunk.
    """
    groups, n_rows, d = q.shape
    n_keys, columns = v.shape
    zero = s.dtype.type(0)
    total = max(n_rows, n_keys)
    decays = decay.size > 0
    first = 0
    chunks = 0
    while first < total:
        count = min(turned.shape[1], total - first)
        starts[chunks] = first
        taken = False
        if n_keys:
            if holds != PLAIN:
                count = _window(k, first, count, decay, z, m, factors, low, high, last)
                _rescale(s, z, factors)
                changes[chunks] = factors
                taken = True
            if decays:
                _between(decay, first, count, taken, ratio, reach)
            _transpose(k[first : first + count], turned, count, d)
            _transpose(v[first : first + count], turned_v, count, columns)
        if n_rows:
            _transpose(s, turned_s, d, columns)
        for h in range(groups if n_rows else 0):
            part = q[h, first : first + count]
            slope = g[h, first : first + count]
            result = dq[h, first : first + count]
            mean = c[h, first : first + count]
            _queries(part, k, m, z, last, count, first, n_keys > 0, holds, tops)
            if normalize and holds != EACH:
                if n_keys:
                    for i in range(count):
                        for j in range(count):
                            weights[i, j] = zero
                    _add_product(weights, part, turned, count, d, count)
                for i in range(count):
                    sums = _dot(part[i], z, d)
                    if n_keys:
                        if decays:
                            sums *= s.dtype.type(reach[i])
                        for j in range(i + 1):
                            sums += weights[i, j] * s.dtype.type(ratio[i, j]) if decays else weights[i, j]
                    sums += eps if holds == PLAIN or eps == zero else s.dtype.type(eps * 2.0 ** -np.float64(tops[i]))
                    inverse = s.dtype.type(1) / sums if sums != zero else zero
                    for e in range(columns):
                        slope[i, e] *= inverse
                    mean[i] = -_dot(slope[i], y[h, first + i], columns)
            else:
                for i in range(count):
                    mean[i] = zero
                    if holds == SCALED:
                        factor = 2.0 ** np.float64(tops[i])
                        for e in range(columns):
                            slope[i, e] = s.dtype.type(np.float64(slope[i, e]) * factor)
            result[:] = zero
            _add_product(result, slope, turned_s, count, columns, d)
            for i in range(count):
                factor = s.dtype.type(reach[i]) if decays and n_keys else s.dtype.type(1)
                for j in range(d):
                    result[i, j] = factor * (result[i, j] + mean[i] * z[j])
            if n_keys:
                _triangles(part, slope, mean, turned, turned_v, weights, slopes, ratio, decays, count, d, columns)
                _add_lower(result, slopes, k[first : first + count], count, d)
            if holds == SCALED:
                for i in range(count):
                    for j in range(d):
                        result[i, j] *= part[i, j]
            elif holds == EACH:
                for j in range(d):
                    last[j] = z[j]
                for i in range(count):
                    along = _dot(part[i], result[i], d)
                    for j in range(d):
                        if n_keys:
                            last[j] += k[first + i, j]
                        own = part[i, j] * result[i, j]
                        extra[h, first + i, j] = -own / last[j] if last[j] != zero else zero
                        result[i, j] = own - part[i, j] * last[j] * along
        if n_keys:
            if decays:
                factor = s.dtype.type(reach[count - 1])
                for j in range(d):
                    z[j] *= factor
                    for e in range(columns):
                        s[j, e] *= factor
                    for i in range(count):
                        turned[j, i] *= s.dtype.type(ratio[count - 1, i])
            _add_product(s, turned, v[first : first + count], d, count, columns)
            _add_sums(z, k, first, count, ratio, decays, last)
        first += count
        chunks += 1
    starts[chunks] = total
    return chunks


@_pair(
    lambda real, read, write: types.void(
        read(3),
        read(2),
        read(2),
        given(types.float64),
        read(3),
        read(2),
        read(3),
        write(2),
        write(2),
        write(2),
        write(1),
        types.int64,
        types.int64,
        types.int64[::1],
        types.Array(types.float64, 2, "C"),
        write(2),
        write(2),
        write(2),
        *_work(real, read, write),
    )
)
def back(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    decay,
    g,
    c,
    extra,
    dk,
    dv,
    s,
    z,
    holds,
    chunks,
    starts,
    changes,
    turned_v,
    turned_s,
    slopes,
    turned,
    weights,
    ratio,
    reach,
    tops,
    factors,
    low,
    high,
    last,
):
    """The reverse sweep over the same tokens: dk and dv; s and z are the gradient of the state."""
    groups, n_rows, d = q.shape
    n_keys, columns = v.shape
    zero = s.dtype.type(0)
    decays = decay.size > 0
    for chunk in range(chunks - 1, -1, -1):
        first, end = starts[chunk], starts[chunk + 1]
        count = end - first
        if n_keys:
            if decays:
                _between(decay, first, count, holds != PLAIN, ratio, reach)
            dk_part, dv_part = dk[first:end], dv[first:end]
            dk_part[:] = zero
            dv_part[:] = zero
            _transpose(s, turned_s, d, columns)
            _add_product(dk_part, v[first:end], turned_s, count, columns, d)
            _add_product(dv_part, k[first:end], s, count, d, columns)
            for i in range(count):
                factor = s.dtype.type(ratio[count - 1, i]) if decays else s.dtype.type(1)
                for j in range(d):
                    dk_part[i, j] = factor * (dk_part[i, j] + z[j])
                for e in range(columns):
                    dv_part[i, e] *= factor
            if decays:
                factor = s.dtype.type(reach[count - 1])
                for j in range(d):
                    z[j] *= factor
                    for e in range(columns):
                        s[j, e] *= factor
        for h in range(groups if n_rows else 0):
            part, slope, mean = q[h, first:end], g[h, first:end], c[h, first:end]
            if n_keys:
                _transpose(k[first:end], turned, count, d)
                _transpose(v[first:end], turned_v, count, columns)
                _triangles(part, slope, mean, turned, turned_v, weights, slopes, ratio, decays, count, d, columns)
                # The other way round, so that a key's row of them is one.
                for i in range(count):
                    for j in range(i):
                        weights[j, i], slopes[j, i] = weights[i, j], slopes[i, j]
                _add_upper(dk_part, slopes, part, count, d)
                _add_upper(dv_part, weights, slope, count, columns)
            if holds == EACH:
                for j in range(d):
                    last[j] = zero
                for i in range(count - 1, -1, -1):
                    for j in range(d):
                        last[j] += extra[h, first + i, j]
                        if n_keys:
                            dk_part[i, j] += last[j]
                for j in range(d):
                    z[j] += last[j]
            _transpose(part, turned, count, d)
            for i in range(count):
                factor = s.dtype.type(reach[i]) if decays and n_keys else s.dtype.type(1)
                for j in range(d):
                    turned[j, i] *= factor
                    z[j] += turned[j, i] * mean[i]
            _add_product(s, turned, slope, d, count, columns)
        if n_keys and holds != PLAIN:
            for i in range(count):
                for j in range(d):
                    dk_part[i, j] *= k[first + i, j]
            _rescale(s, z, changes[chunk])


# Softmax attention.


@_pair(
    lambda real, read, write: types.void(
        read(2),
        read(2),
        read(2),
        given(types.boolean),
        read(1),
        write(2),
        types.int64,
        types.boolean,
        write(2),
        write(2),
        write(2),
        write(1),
        types.float64[::1],
    )
)
def attend(q, k, v, mask, scales, out, shift, causal, turned, scores, values, highest, sums):  # type: ignore[no-untyped-def]
    """out = softmax(scales * q k^T) v for some rows, by blocks of keys; row i sees those up to i + shift where `causal`.

    Milakov and Gimelshein (2018): the maximum runs along, what was summed before is scaled when it grows.
    """
    rows, d = q.shape
    n_keys, columns = v.shape
    zero = q.dtype.type(0)
    none = q.dtype.type(-np.inf)
    out[:] = zero
    highest[:] = none
    sums[:] = 0.0
    tile = scores.shape[0]
    end = min(n_keys, rows + shift) if causal else n_keys
    for first in range(0, end, turned.shape[1]):
        block = min(turned.shape[1], end - first)
        masked = mask.size > 0
        for j in range(block):
            if masked and not mask[first + j]:
                for p in range(d):
                    turned[p, j] = zero
                for e in range(columns):
                    values[j, e] = zero
            else:
                for p in range(d):
                    turned[p, j] = k[first + j, p]
                for e in range(columns):
                    values[j, e] = v[first + j, e]
        for row in range(0, rows, tile):
            height = min(tile, rows - row)
            if causal and row + height + shift <= first:
                continue
            for i in range(height):
                for j in range(block):
                    scores[i, j] = zero
            _add_product(scores, q[row : row + height], turned, height, d, block)
            whole = not causal or row + shift + 1 >= first + block
            for i in range(height):
                seen = block
                if causal:
                    seen = min(block, row + i + shift + 1 - first)
                if seen <= 0:
                    continue
                scale = scales[row + i]
                high = highest[row + i]
                for j in range(seen):
                    scores[i, j] *= scale
                if masked:
                    for j in range(seen):
                        if not mask[first + j]:
                            scores[i, j] = none
                for j in range(seen):
                    high = max(high, scores[i, j])
                if high > highest[row + i]:
                    if highest[row + i] > none:
                        factor = _exp(highest[row + i] - high, zero)
                        sums[row + i] *= np.float64(factor)
                        for e in range(columns):
                            out[row + i, e] *= factor
                    highest[row + i] = high
                if high == none:
                    high = zero
                for j in range(seen):
                    scores[i, j] = _exp(scores[i, j] - high, zero)
                sums[row + i] += np.float64(_sum(scores[i], seen))
                if not whole:
                    _add(out[row : row + height], scores, values, i, i + 1, 0, seen, columns)
            if whole:
                _add(out[row : row + height], scores, values, 0, height, 0, block, columns)
    for i in range(rows):
        inverse = q.dtype.type(1.0 / sums[i]) if sums[i] != 0.0 else zero
        for e in range(columns):
            out[i, e] *= inverse
