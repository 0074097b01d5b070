# SPDX-License-Identifier: BSD-3-Clause
"""The compiled loops of the Numba backend's Mitchell arithmetic: bit patterns in, bit patterns out, options as runtime values.

Each kernel has one signature and is compiled at its first call (or read from Numba's cache), so that few of them serve every
dtype and every multiplier. Bit patterns travel as int64, since Numba turns a mix of uint64 and int64 into float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from llvmlite import ir

from ._kernel import given as _given
from ._kernel import intrinsic, kernel, njit, types

MUL: Final = 0
DIV: Final = 1
SQUARE: Final = 2
RECIPROCAL: Final = 3
SQRT: Final = 4
RSQRT: Final = 5
LOG2: Final = 6
EXP2: Final = 7

INVALID: Final = 1
DIVIDE: Final = 2
OVERFLOW: Final = 4
UNDERFLOW: Final = 8

# Slots of the parameter vector.
MANTISSA: Final = 0
EXPONENT: Final = 1
FORM: Final = 2
FLUSH: Final = 3
CORRECTIONS: Final = 4
KEEP: Final = 5
SEGMENTS: Final = 6
SEGMENT_SHIFT: Final = 7
CONSTANT: Final = 8
SLOTS: Final = 9

_EQUATION: Final = 1
_ITERATIVE: Final = 2
_TOP: Final = 1 << 62
_MAX: Final = (1 << 63) - 1
_LOW27: Final = (1 << 27) - 1

_WORDS = _given(types.int64)


@intrinsic  # type: ignore[untyped-decorator]
def _leading_zeros(typingctx: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _as_float(typingctx: Any, value: Any, like: Any) -> Any:
    """The float of the type of `like` whose bits are the low bits of `value`."""
    bits = like.bitwidth

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        low = args[0] if bits == 64 else builder.trunc(args[0], ir.IntType(bits))
        return builder.bitcast(low, ir.DoubleType() if bits == 64 else ir.FloatType())

    return like(types.int64, like), generate


@njit
def _floor_log2(value):  # type: ignore[no-untyped-def]
    return 63 - _leading_zeros(value)


@njit
def _residue(value, corrections):  # type: ignore[no-untyped-def]
    """`value` without its `corrections` + 1 highest set bits."""
    for _ in range(corrections + 1):
        if value == 0:
            break
        value ^= 1 << _floor_log2(value)
    return value


# Element-wise.


@kernel(types.int64(types.int64, _WORDS, _WORDS, types.int64[::1], _WORDS, _WORDS))
def floats(op, a, b, out, p, table):  # type: ignore[no-untyped-def]
    """Any operation of rule A on the bit patterns of a float dtype; returns the IEEE flags that it raised.

    Unary operations take the same array twice. `out` may be `a` or `b`.
    """
    m = p[MANTISSA]
    form = p[FORM]
    flush = p[FLUSH] != 0
    corrections = p[CORRECTIONS]
    keep = p[KEEP]
    segments = p[SEGMENTS]
    segment_shift = p[SEGMENT_SHIFT]
    width = m + p[EXPONENT]
    bias = (1 << (p[EXPONENT] - 1)) - 1
    one = 1 << m
    fraction = one - 1
    magnitude = (1 << width) - 1
    inf = magnitude ^ fraction
    nan = inf | (one >> 1)
    emin = 1 - bias
    flags = 0
    for i in range(a.size):
        sa = (a[i] >> width) & 1
        sb = (b[i] >> width) & 1
        ma = a[i] & magnitude
        mb = b[i] & magnitude
        if flush:
            if ma < one:
                ma = 0
            if mb < one:
                mb = 0
        if op == RECIPROCAL:
            sa = 0
            ma = bias << m
        sign = (sa ^ sb if op <= RECIPROCAL else sa) << width

        if ma == 0 or mb == 0 or ma >= inf or mb >= inf:
            r = sign
            if ma > inf or mb > inf:
                r = nan
                # A signalling NaN has the top mantissa bit clear.
                if (ma > inf and ma < nan) or (mb > inf and mb < nan):
                    flags |= INVALID
            elif op in (MUL, SQUARE):
                if ma == inf or mb == inf:
                    r = sign | inf
                    if ma == 0 or mb == 0:
                        r = nan
                        flags |= INVALID
            elif op in (DIV, RECIPROCAL):
                if (ma == inf and mb == inf) or (ma == 0 and mb == 0):
                    r = nan
                    flags |= INVALID
                elif ma == inf:
                    r = sign | inf
                elif mb == 0:
                    r = sign | inf
                    flags |= DIVIDE
            elif op == EXP2:
                r = bias << m
                if ma != 0:
                    r = 0 if sa != 0 else inf
            elif ma == 0:
                if op == RSQRT:
                    r = sign | inf
                    flags |= DIVIDE
                elif op == LOG2:
                    r = (1 << width) | inf
                    flags |= DIVIDE
            elif sa != 0:
                r = nan
                flags |= INVALID
            else:
                r = 0 if op == RSQRT else inf
            out[i] = r
            continue
        if sa != 0 and (op in (SQRT, RSQRT, LOG2)):
            out[i] = nan
            flags |= INVALID
            continue

        ea = ma >> m
        x = ma & fraction
        if ea == 0:
            ea = _floor_log2(ma) - m + 1
            x = (ma << (1 - ea)) & fraction
        ea -= bias

        # The result is sig 2^scale, and less than one unit of sig more where `sticky` is set.
        sticky = 0
        if op <= RECIPROCAL:
            eb = mb >> m
            y = mb & fraction
            if eb == 0:
                eb = _floor_log2(mb) - m + 1
                y = (mb << (1 - eb)) & fraction
            eb -= bias
            x &= keep
            y &= keep
            if form == _ITERATIVE:
                # u v - u' v' of up to 106 bits: high 2^54 + low.
                u = one | x
                v = one | y
                low = (u & _LOW27) * (v & _LOW27)
                cross = (u >> 27) * (v & _LOW27) + (u & _LOW27) * (v >> 27) + (low >> 27)
                high = (u >> 27) * (v >> 27) + (cross >> 27)
                low = ((cross & _LOW27) << 27) | (low & _LOW27)
                u = _residue(u, corrections)
                v = _residue(v, corrections)
                less = (u & _LOW27) * (v & _LOW27)
                cross = (u >> 27) * (v & _LOW27) + (u & _LOW27) * (v >> 27) + (less >> 27)
                high -= (u >> 27) * (v >> 27) + (cross >> 27)
                low -= ((cross & _LOW27) << 27) | (less & _LOW27)
                if low < 0:
                    low += 1 << 54
                    high -= 1
                sig = low
                scale = ea + eb - 2 * m
                if high != 0:
                    drop = max(_floor_log2(high) - 7, 0)
                    sig = (high << (54 - drop)) | (low >> drop)
                    sticky = low & ((1 << drop) - 1)
                    scale += drop
            else:
                c = p[CONSTANT]
                if segments != 0:
                    column = (y >> segment_shift) & (segments - 1)
                    if op in (MUL, DIV):
                        column += ((x >> segment_shift) & (segments - 1)) * segments
                    c = table[column]
                if op in (MUL, SQUARE):
                    s = x + y + c
                    scale = ea + eb - m
                else:
                    s = x - y + c
                    scale = ea - eb - m
                if form == _EQUATION:
                    sig = one + s
                else:
                    sig = one | (s & fraction)
                    scale += s >> m
        elif op == EXP2:
            sign = 0
            if ea > 11:
                # Beyond every exponent range.
                sig = 1
                scale = -4096 if sa != 0 else 4096
            else:
                u = one | x
                whole = 0
                part = 0  # in units of 2^-62
                shift = m - ea
                if shift <= 0:
                    whole = u << -shift
                elif shift <= 62:
                    whole = u >> shift
                    part = (u & ((1 << shift) - 1)) << (62 - shift)
                elif shift <= 124:
                    part = u >> (shift - 62)
                    sticky = u & ((1 << (shift - 62)) - 1)
                else:
                    sticky = 1
                if sa != 0:
                    whole = -whole
                    if part != 0 or sticky != 0:
                        whole -= 1
                        part = _TOP - part - (1 if sticky != 0 else 0)
                sig = _TOP + part
                scale = whole - 62
        else:
            s = (ea << m) + x
            if op == LOG2:
                if s == 0:
                    out[i] = 0
                    continue
                sign = (1 << width) if s < 0 else 0
                sig = abs(s)
                scale = -m
            else:
                x &= keep
                c = p[CONSTANT]
                if segments != 0:
                    c = table[(x >> segment_shift) & (segments - 1)]
                s = (ea << m) + x
                s = 2 * c - s if op == RSQRT else 2 * c + s
                half = s >> 1
                half += s & half & 1
                # Neither root leaves the normal range.
                out[i] = half + (bias << m)
                continue

        # The one rounding, to nearest even.
        k = _floor_log2(sig)
        e = k + scale
        if e > bias:
            out[i] = sign | inf
            flags |= OVERFLOW
            continue
        if e < emin and flush:
            out[i] = sign
            continue
        tiny = e < emin
        shift = emin - m - scale if tiny else k - m
        if shift <= 0:
            r = sig << -shift
        elif shift > 63:
            r = 0
            flags |= UNDERFLOW
        else:
            # A shift by 63 leaves nothing of sig < 2^63, which is then all rest.
            r = sig >> shift
            rest = sig & ((1 << shift) - 1) if shift < 63 else sig
            middle = 1 << (shift - 1)
            if rest > middle or (rest == middle and (sticky != 0 or (r & 1) != 0)):
                r += 1
            if tiny and (rest != 0 or sticky != 0):
                flags |= UNDERFLOW
        if not tiny:
            # r brings its leading one; a carry runs into the exponent as it should.
            r += (e - emin) << m
            if r >= inf:
                flags |= OVERFLOW
        out[i] = sign | r
    return flags


def _word_operation(emit: Callable[..., Any]) -> Any:
    """An operation on two words of one width that stays at that width, where Numba would widen to 64 bits."""

    def operation(typingctx: Any, x: Any, y: Any) -> Any:
        return x(x, y), lambda context, builder, signature, args: emit(builder, *args)

    return intrinsic(operation)


_add = _word_operation(lambda builder, x, y: builder.add(x, y))
_sub = _word_operation(lambda builder, x, y: builder.sub(x, y))
_and = _word_operation(lambda builder, x, y: builder.and_(x, y))
_or = _word_operation(lambda builder, x, y: builder.or_(x, y))
_xor = _word_operation(lambda builder, x, y: builder.xor(x, y))
_without = _word_operation(lambda builder, x, y: builder.and_(x, builder.not_(y)))
# All bits set where the comparison holds.
_below = _word_operation(lambda builder, x, y: builder.sext(builder.icmp_unsigned("<", x, y), x.type))
_same = _word_operation(lambda builder, x, y: builder.sext(builder.icmp_unsigned("==", x, y), x.type))


def _fast(a, b, out, odd, block, keep_a, keep_b, sign_a, turn, offset, one, span, both):  # type: ignore[no-untyped-def]
    """Products and quotients of normal numbers and zeros, without a table: one integer sum each.

    |out| = (|a| & keep_a) + (|b| & keep_b, negated where `turn` has all bits set) + offset; zero where a is zero, or where b is
    and `both` has all bits set. Blocks with any other operand or result are marked in `odd`; `out` is to be computed again there.
    """
    none = a.dtype.type(0)
    low = a.dtype.type(_MAX >> (64 - 8 * a.itemsize))
    for k in range(odd.size):
        # Indices from 0 on are known to be no negative ones, which would have to wrap: that is what lets the loop vectorise.
        piece = slice(k * block, (k + 1) * block)
        left = a[piece]
        right = b[piece]
        result = out[piece]
        fine = _same(none, none)
        for i in range(result.size):
            x = left[i]
            y = right[i]
            u = _and(x, low)
            v = _and(y, low)
            r = _add(_add(_and(u, keep_a), _sub(_xor(_and(v, keep_b), turn), turn)), offset)
            zero_u = _same(u, none)
            zero_v = _and(_same(v, none), both)
            normal_u = _below(_sub(u, one), span)
            normal_v = _below(_sub(v, one), span)
            zero = _or(_and(zero_u, _or(normal_v, zero_v)), _and(zero_v, normal_u))
            normal = _and(_and(normal_u, normal_v), _below(_sub(r, one), span))
            fine = _and(fine, _or(normal, zero))
            result[i] = _or(_without(_xor(_and(x, sign_a), y), low), _without(r, zero))
        odd[k] = fine == none


def _fast_signature(word: Any) -> Any:
    return types.void(_given(word), _given(word), word[::1], types.boolean[::1], types.int64, *[word] * 8)


fast32 = kernel(_fast_signature(types.uint32))(_fast)
fast64 = kernel(_fast_signature(types.uint64))(_fast)


@kernel(
    types.void(types.int64, _WORDS, _WORDS, types.int64[::1], types.int64, types.int64, types.int64, _WORDS, _WORDS)
)
def integers(op, a, b, out, signed, bits, saturate, p, table):  # type: ignore[no-untyped-def]
    """Products of integers: sign and magnitude, truncated towards zero; the low 64 bits where they do not fit.

    Mantissas and constants have 63 bits; `bits` is the width of the result's magnitude.
    """
    form = p[FORM]
    corrections = p[CORRECTIONS]
    keep = p[KEEP]
    segments = p[SEGMENTS]
    segment_shift = p[SEGMENT_SHIFT]
    for i in range(a.size):
        u = a[i]
        v = b[i]
        if u == 0 or v == 0:
            out[i] = 0
            continue
        negative = False
        if signed != 0:
            negative = (u < 0) != (v < 0)
            # The magnitude of -2^63 is its own bit pattern.
            u = abs(u)
            v = abs(v)
        ea = _floor_log2(u)
        eb = _floor_log2(v)
        e = ea + eb
        x = ((u ^ (1 << ea)) << (63 - ea)) & keep
        y = ((v ^ (1 << eb)) << (63 - eb)) & keep
        if form == _ITERATIVE:
            if keep != _MAX:
                # Arithmetic shifts of non-negative numbers; bit 63 is put in last.
                u = (x >> (63 - ea)) | (1 << ea)
                v = (y >> (63 - eb)) | (1 << eb)
            r = u * v - _residue(u, corrections) * _residue(v, corrections)
        else:
            c = p[CONSTANT]
            if segments != 0:
                column = y >> segment_shift
                if op == MUL:
                    column += (x >> segment_shift) * segments
                c = table[column]
            s = x + y
            carry = 0
            if s < 0:
                carry = 1
                s &= _MAX
            s += c
            if s < 0:
                carry += 1 if c > 0 else -1
                s &= _MAX
            if form == _EQUATION:
                # 1 + carry + s 2^-63, below 4: in units that leave the sign bit alone where it is shifted down.
                if e <= 61:
                    r = (((1 + carry) << 61) + (s >> 2)) >> (61 - e)
                elif e == 62:
                    r = ((1 + carry) << 62) + (s >> 1)
                else:
                    r = (((1 + carry) << 63) + s) << (e - 63) if e < 127 else 0
            else:
                e += carry
                if saturate != 0 and e >= bits:
                    r = (1 << bits) - 1 if bits < 64 else -1
                elif e < 0:
                    r = 0
                elif e <= 62:
                    r = (1 << e) | (s >> (63 - e))
                elif e < 127:
                    r = (s | (-_MAX - 1)) << (e - 63)
                else:
                    r = 0
        out[i] = -r if negative else r


@kernel(
    types.void(
        types.boolean, _WORDS, _WORDS, _given(types.float64), types.float64[::1], types.float64[::1], _WORDS, _WORDS
    ),
    error_model="numpy",
)
def slopes(divide, a, b, dy, da, db, p, table):  # type: ignore[no-untyped-def]
    """dy times the slopes of the product or quotient, for operands of any float dtype given as the bits of float64.

    The slope is that of the linear piece; a zero or infinite operand has the mantissa of a power of two there. Where the other operand
    is zero, infinite or NaN, the exact operation's slope stands.
    """
    m = p[MANTISSA]
    form = p[FORM]
    corrections = p[CORRECTIONS]
    keep = p[KEEP]
    segments = p[SEGMENTS]
    segment_shift = p[SEGMENT_SHIFT]
    for i in range(a.size):
        u = _as_float(a[i], 0.0)
        v = _as_float(b[i], 0.0)
        g = dy[i]
        regular_u = u != 0.0 and abs(u) < np.inf
        regular_v = v != 0.0 and abs(v) < np.inf
        bits = a[i] & _MAX if regular_u else 1023 << 52
        ea = bits >> 52
        x = bits & ((1 << 52) - 1)
        if ea == 0:
            ea = _floor_log2(bits) - 51
            x = (bits << (1 - ea)) & ((1 << 52) - 1)
        ea -= 1023
        bits = b[i] & _MAX if regular_v else 1023 << 52
        eb = bits >> 52
        y = bits & ((1 << 52) - 1)
        if eb == 0:
            eb = _floor_log2(bits) - 51
            y = (bits << (1 - eb)) & ((1 << 52) - 1)
        eb -= 1023
        x = (x >> (52 - m)) & keep
        y = (y >> (52 - m)) & keep
        sign_u = math.copysign(g, u) * math.copysign(1.0, g)
        sign_v = math.copysign(g, v) * math.copysign(1.0, g)
        c = p[CONSTANT]
        if segments != 0:
            c = table[(x >> segment_shift) * segments + (y >> segment_shift)]
        if divide:
            carry = (x - y + c) >> m
            left = math.ldexp(sign_v, carry - eb) if regular_v else g / v
            right = math.ldexp(-sign_u, ea + carry - 2 * eb) if regular_u and regular_v else -g * u / (v * v)
        else:
            if form == _ITERATIVE:
                x |= 1 << m
                y |= 1 << m
                sign_u *= x - _residue(x, corrections)
                sign_v *= y - _residue(y, corrections)
                carry = -m
            elif form == _EQUATION:
                carry = 0
            else:
                carry = (x + y + c) >> m
            left = math.ldexp(sign_v, eb + carry) if regular_v else g * v
            right = math.ldexp(sign_u, ea + carry) if regular_u else g * u
            if np.isnan(v):
                right = np.nan
        da[i] = np.nan if np.isnan(u) else left
        db[i] = right


# Matrix products.


@njit
def _survey(row, one, least, span):  # type: ignore[no-untyped-def]
    """1 where zeros or subnormals occur, plus 2 where normal numbers outside [least, least + span), infinities or NaN do."""
    low = row.dtype.type(_MAX >> (64 - 8 * row.itemsize))
    zeros = row.dtype.type(0)
    fine = row.dtype.type(-1)
    for j in range(row.size):
        size = _and(row[j], low)
        tiny = _below(size, one)
        zeros = _or(zeros, tiny)
        fine = _and(fine, _or(tiny, _below(_sub(size, least), span)))
    return (1 if zeros != 0 else 0) + (2 if fine == 0 else 0)


@njit
def _copy_normal(row, one, keep, out):  # type: ignore[no-untyped-def]
    """The bits of `keep`, and 0 for zeros and subnormals."""
    low = row.dtype.type(_MAX >> (64 - 8 * row.itemsize))
    for j in range(row.size):
        out[j] = _without(_and(row[j], keep), _below(_and(row[j], low), one))


# Terms and columns of a packed panel, which stays in the second-level cache, and terms for which the first operand is prepared.
_DEPTH: Final = 64
_WIDTH: Final = 256
_CHUNK: Final = 512


def _matmul(a, b, acc, p, table):  # type: ignore[no-untyped-def]
    """acc += a b for bit patterns a and b under the log-add form; subnormals count as zero.

    A term is float(bits(b) + mantissa of a + constant) times 2^exponent of a. Zeros, infinities and NaN of a travel in that factor. A panel
    of b with zeros masks them, and one with values that the sum could carry out of the normal range splits b as well.
    """
    m = p[MANTISSA]
    keep = p[KEEP]
    segments = p[SEGMENTS]
    segment_shift = p[SEGMENT_SHIFT]
    one = 1 << m
    fraction = one - 1
    inf = ((1 << p[EXPONENT]) - 1) << m
    bias = (inf >> 1) & ~fraction
    magnitude = inf | fraction
    # Mantissa sums reach from -1/2 to 5/2: one binade down, two up.
    least = one << 1
    span = inf - 2 * one - least
    word = a.dtype.type
    zero = acc.dtype.type(0)
    nan = acc.dtype.type(np.nan)
    depth = _DEPTH
    width = _WIDTH if segments == 0 else 64
    rows, terms = a.shape
    columns = b.shape[1]
    mantissa = np.empty((rows, _CHUNK), a.dtype)
    factor = np.empty((rows, _CHUNK), acc.dtype)
    place = np.empty((rows, _CHUNK), np.int32)
    panel = np.empty((max(segments, 1) * depth, width), a.dtype)
    power = np.empty((depth, width), acc.dtype)
    for start in range(0, terms, _CHUNK):
        length = min(_CHUNK, terms - start)
        for i in range(rows):
            for k in range((length + 3) // 4 * 4):
                mantissa[i, k] = 0
                factor[i, k] = zero
                place[i, k] = k % depth
            for k in range(length):
                bits = np.int64(a[i, start + k])
                size = bits & magnitude
                if size >= one:
                    x = bits & fraction & keep
                    factor[i, k] = _as_float(bits & ~fraction, zero) if size <= inf else nan
                    if segments != 0:
                        place[i, k] += (x >> segment_shift) * depth
                        mantissa[i, k] = x
                    else:
                        mantissa[i, k] = x + p[CONSTANT]
        for j0 in range(0, columns, width):
            nj = min(width, columns - j0)
            for k0 in range(0, length, depth):
                n = min(depth, length - k0)
                padded = (n + 3) // 4 * 4
                top = start + k0
                state = 0
                for k in range(n):
                    state |= _survey(b[top + k, j0 : j0 + nj], word(one), word(least), word(span))
                some_zero = state & 1 != 0
                some_wild = state & 2 != 0
                plain = segments == 0 and not some_wild
                for k in range(padded):
                    if k >= n:
                        # Any normal number: the factor is zero.
                        panel[k::depth] = bias
                        continue
                    if plain:
                        _copy_normal(b[top + k, j0 : j0 + nj], word(one), word(~fraction | keep), panel[k])
                        continue
                    for j in range(nj):
                        bits = np.int64(b[top + k, j0 + j])
                        size = bits & magnitude
                        y = bits & fraction & keep
                        packed = 0
                        if some_wild:
                            packed = bias | y
                            power[k, j] = zero
                            if size > inf:
                                power[k, j] = nan
                            elif size >= one:
                                power[k, j] = _as_float(bits & ~fraction, zero)
                        elif size >= one:
                            packed = (bits & ~fraction) | y
                        column = y >> segment_shift
                        for s in range(max(segments, 1)):
                            panel[s * depth + k, j] = packed + table[s * segments + column] if packed != 0 else 0
                for i in range(rows):
                    # Slices, since indices from 0 on are known not to wrap: that lets the loops vectorise.
                    total = acc[i, j0 : j0 + nj]
                    r = place[i, k0 : k0 + padded]
                    x = mantissa[i, k0 : k0 + padded]
                    f = factor[i, k0 : k0 + padded]
                    if some_wild:
                        for k in range(n):
                            m0 = x[k]
                            f0 = f[k]
                            p0 = panel[r[k]]
                            for j in range(nj):
                                v = _as_float(_add(p0[j], m0), zero)
                                g = power[k, j]
                                # The smaller factor first: the product overflows where the result does.
                                total[j] += (v * f0) * g if abs(f0) < abs(g) else (v * g) * f0
                        continue
                    for k in range(0, padded, 4):
                        p0, p1, p2, p3 = panel[r[k]], panel[r[k + 1]], panel[r[k + 2]], panel[r[k + 3]]
                        m0, m1, m2, m3 = x[k], x[k + 1], x[k + 2], x[k + 3]
                        f0, f1, f2, f3 = f[k], f[k + 1], f[k + 2], f[k + 3]
                        if some_zero:
                            for j in range(nj):
                                b0, b1, b2, b3 = p0[j], p1[j], p2[j], p3[j]
                                total[j] += (
                                    (_as_float(_add(b0, m0), zero) if b0 != 0 else zero) * f0
                                    + (_as_float(_add(b1, m1), zero) if b1 != 0 else zero) * f1
                                    + (_as_float(_add(b2, m2), zero) if b2 != 0 else zero) * f2
                                    + (_as_float(_add(b3, m3), zero) if b3 != 0 else zero) * f3
                                )
                        else:
                            for j in range(nj):
                                total[j] += (
                                    _as_float(_add(p0[j], m0), zero) * f0
                                    + _as_float(_add(p1[j], m1), zero) * f1
                                    + _as_float(_add(p2[j], m2), zero) * f2
                                    + _as_float(_add(p3[j], m3), zero) * f3
                                )


def _matmul_signature(word: Any, real: Any) -> Any:
    return types.void(_given(word, 2, "A"), _given(word, 2), real[:, ::1], _WORDS, _WORDS)


matmul32 = kernel(_matmul_signature(types.int32, types.float32), fastmath={"contract"})(_matmul)
matmul64 = kernel(_matmul_signature(types.int64, types.float64), fastmath={"contract"})(_matmul)


def _matmul_slope(a, b, dy, acc, p, table):  # type: ignore[no-untyped-def]
    """acc[i, k] += sum over j of dy[i, j] times the slope of M(a[i, k], b[j, k]) along a, log-add form.

    The slope is the sign and the exponent of the sum of bit patterns that the product itself is.
    """
    m = p[MANTISSA]
    keep = p[KEEP]
    segments = p[SEGMENTS]
    segment_shift = p[SEGMENT_SHIFT]
    one = 1 << m
    fraction = one - 1
    inf = ((1 << p[EXPONENT]) - 1) << m
    bias = (inf >> 1) & ~fraction
    magnitude = inf | fraction
    word = a.dtype.type
    upper = word(~fraction)
    least = one << 1
    span = inf - 2 * one - least
    zero = acc.dtype.type(0)
    nan = acc.dtype.type(np.nan)
    rows, columns = a.shape
    terms = b.shape[0]
    depth = _DEPTH
    width = _WIDTH
    mantissa = np.empty((rows, width), a.dtype)
    place = np.empty((rows, width), np.int64)
    panel = np.empty((depth, width), a.dtype)
    column = np.empty((depth, width), np.int64)
    power = np.empty((depth, width), acc.dtype)
    for k0 in range(0, columns, width):
        nk = min(width, columns - k0)
        for i in range(rows):
            for k in range(nk):
                bits = np.int64(a[i, k0 + k])
                size = bits & magnitude
                x = bits & fraction & keep if size >= one and size < inf else 0
                place[i, k] = (x >> segment_shift) * segments
                mantissa[i, k] = x + p[CONSTANT] if segments == 0 else x
                if size > inf:
                    acc[i, k0 + k] = nan
        for j0 in range(0, terms, depth):
            n = min(depth, terms - j0)
            state = 0
            for j in range(n):
                state |= _survey(b[j0 + j, k0 : k0 + nk], word(one), word(least), word(span))
            general = segments != 0 or state & 2 != 0
            # A row of zeros, with a zero for dy, makes the rows even in number.
            padded = (n + 1) // 2 * 2
            panel[padded - 1] = 0
            for j in range(n):
                if not general:
                    _copy_normal(b[j0 + j, k0 : k0 + nk], word(one), word(~fraction | keep), panel[j])
                    continue
                for k in range(nk):
                    bits = np.int64(b[j0 + j, k0 + k])
                    size = bits & magnitude
                    y = bits & fraction & keep
                    column[j, k] = y >> segment_shift
                    panel[j, k] = bias | y
                    power[j, k] = zero
                    if size > inf:
                        power[j, k] = nan
                    elif size >= one:
                        power[j, k] = _as_float(bits & ~fraction, zero)
            for i in range(rows):
                total = acc[i, k0 : k0 + nk]
                x = mantissa[i]
                if general:
                    for j in range(n):
                        g = dy[i, j0 + j]
                        for k in range(nk):
                            c = table[place[i, k] + column[j, k]]
                            v = _as_float((panel[j, k] + x[k] + c) & ~fraction, zero)
                            total[k] += g * power[j, k] * v
                    continue
                for j in range(0, padded, 2):
                    g0, g1 = dy[i, j0 + j], dy[i, j0 + j + 1] if j + 1 < n else zero
                    p0, p1 = panel[j], panel[j + 1]
                    for k in range(nk):
                        b0, b1 = p0[k], p1[k]
                        total[k] += (_as_float(_and(_add(b0, x[k]), upper), zero) if b0 != 0 else zero) * g0 + (
                            _as_float(_and(_add(b1, x[k]), upper), zero) if b1 != 0 else zero
                        ) * g1


def _slope_signature(word: Any, real: Any) -> Any:
    return types.void(_given(word, 2, "A"), _given(word, 2), _given(real, 2, "A"), real[:, ::1], _WORDS, _WORDS)


matmul_slope32 = kernel(_slope_signature(types.int32, types.float32), fastmath={"contract"})(_matmul_slope)
matmul_slope64 = kernel(_slope_signature(types.int64, types.float64), fastmath={"contract"})(_matmul_slope)


@kernel(types.void(_given(types.uint8, 2), _given(types.uint8, 2), _given(types.int64, 2), types.int64[:, ::1]))
def lut_matmul(a, b, table, acc):  # type: ignore[no-untyped-def]
    """acc += the sums of table[a, b]."""
    rows, terms = a.shape
    columns = b.shape[1]
    whole = terms // 4 * 4
    for i in range(rows):
        for k in range(0, whole, 4):
            r0, r1, r2, r3 = a[i, k], a[i, k + 1], a[i, k + 2], a[i, k + 3]
            for j in range(columns):
                acc[i, j] += (
                    table[r0, b[k, j]] + table[r1, b[k + 1, j]] + table[r2, b[k + 2, j]] + table[r3, b[k + 3, j]]
                )
        for k in range(whole, terms):
            r0 = a[i, k]
            for j in range(columns):
                acc[i, j] += table[r0, b[k, j]]
