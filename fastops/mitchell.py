# SPDX-License-Identifier: BSD-3-Clause
"""Mitchell arithmetic: element-wise operations, matrix products, convolutions and their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _validate
from ._backend import backend as _backend
from ._multiplier import Multiplier
from ._validate import AnyArray

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "lmul",
    "lut_matmul",
    "mitchell_conv2d",
    "mitchell_conv2d_grad",
    "mitchell_div",
    "mitchell_div_grad",
    "mitchell_exp2",
    "mitchell_log2",
    "mitchell_matmul",
    "mitchell_matmul_grad",
    "mitchell_mul",
    "mitchell_mul_grad",
    "mitchell_reciprocal",
    "mitchell_rsqrt",
    "mitchell_sqrt",
    "mitchell_square",
]

mitchell_mul: np.ufunc = _backend.mitchell_mul
mitchell_div: np.ufunc = _backend.mitchell_div
mitchell_square: np.ufunc = _backend.mitchell_square
mitchell_reciprocal: np.ufunc = _backend.mitchell_reciprocal
mitchell_sqrt: np.ufunc = _backend.mitchell_sqrt
mitchell_rsqrt: np.ufunc = _backend.mitchell_rsqrt
mitchell_log2: np.ufunc = _backend.mitchell_log2
mitchell_exp2: np.ufunc = _backend.mitchell_exp2
lmul: np.ufunc = _backend.lmul

_PLAIN = Multiplier()


def _multiplier(value: Multiplier | None, op: str = "mul") -> Multiplier:
    if value is None:
        return _PLAIN
    if not isinstance(value, Multiplier):
        raise _validate.wrong_type("multiplier", "a fastops.Multiplier or None", value)
    if not value._has(op):
        raise _validate.wrong_value("multiplier", f"one that defines {op}", _validate.Text(repr(value)))
    return value


def mitchell_matmul(
    a: ArrayLike, b: ArrayLike, *, multiplier: Multiplier | None = None, out: AnyArray | None = None
) -> Any:
    """Multiply matrices with an approximate multiplier and exact sums.

    Parameters
    ----------
    a : (..., M, K) array_like of float16, bfloat16, float32 or float64
        Any strides. The leading dimensions broadcast with those of `b`, and 1-D operands stand for a row and a column, as
        in `numpy.matmul`.
    b : (..., K, N) array_like of float16, bfloat16, float32 or float64
        Operands of two dtypes are promoted to the common one.
    multiplier : Multiplier, optional
        Mitchell's multiplier by default.
    out : (..., M, N) ndarray, optional
        Where the result goes, of the operands' common dtype and apart from them in memory; any strides.

    Returns
    -------
    (..., M, N) ndarray or scalar
        Of the operands' common dtype; zeros where K is 0.

    Raises
    ------
    TypeError
        An operand or `out` of another dtype, a `multiplier` that is not one.
    ValueError
        Shapes that do not multiply; an `out` of the wrong shape, read-only, or overlapping an operand.

    Notes
    -----
    y[i, j] = sum over k of M(a[i, k], b[k, j]), M as `mitchell_mul` but without rounding each product. float32 and float64
    accumulate in their own precision, float16 and bfloat16 in float32 with one rounding at the end. Subnormal operands of
    float32 and float64 count as zero. The order of the sum is not specified; it depends on the CPU level and never on the
    number of threads. The error against a float64 sum is at most K eps sum(abs(M(a, b))).
    M N K products; the packed panels take O(K (M + N)) extra memory at most.
    J. N. Mitchell, IRE Trans. EC-11, 1962; A. Kosson and M. Jaggi, "Multiplication-free transformer training via piecewise
    affine operations", NeurIPS 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> a = np.array([[1.5, 2.0], [3.0, 4.0]], np.float32)
    >>> fastops.mitchell_matmul(a, a)
    array([[ 8., 11.],
           [16., 22.]], dtype=float32)
    """
    chosen = _multiplier(multiplier)
    left, right = _validate.float_arrays(a=a, b=b)
    left, right, drop = _validate.at_least_2d(left, right)
    shape = _validate.matmul_shape(left, right)
    _validate.fits_memory("a and b", shape, left.itemsize)
    few_left, few_right, ones = _validate.without_common_ones(left, right)
    if not drop and not ones:
        if out is not None:
            _validate.out_array(out, shape, (left.dtype,), {"a": left, "b": right})
        return _backend.mitchell_matmul(left, right, multiplier=chosen, out=out)
    kept = tuple(n for i, n in enumerate(shape, -len(shape)) if i not in drop)
    if out is not None:
        _validate.out_array(out, kept, (left.dtype,), {"a": left, "b": right})
        _backend.mitchell_matmul(few_left, few_right, multiplier=chosen, out=np.expand_dims(out, drop).squeeze(ones))
        return out
    return _backend.mitchell_matmul(few_left, few_right, multiplier=chosen, out=None).reshape(kept)[()]


def mitchell_matmul_grad(
    a: ArrayLike, b: ArrayLike, dy: ArrayLike, *, multiplier: Multiplier | None = None, mode: str = "exact"
) -> tuple[AnyArray, AnyArray]:
    """Differentiate `mitchell_matmul` with respect to its operands.

    Parameters
    ----------
    a : (..., M, K) array_like of float16, bfloat16, float32 or float64
        The first operand of the product.
    b : (..., K, N) array_like of float16, bfloat16, float32 or float64
        The second operand.
    dy : (..., M, N) array_like of float16, bfloat16, float32 or float64
        The gradient of the result.
    multiplier : Multiplier, optional
        That of the product.
    mode : {"exact", "ste", "mimic"}
        "exact" differentiates the approximation, which is linear piece by piece; "ste" (straight-through) takes the
        gradient of the exact product; "mimic" takes that formula with the approximate multiplier.

    Returns
    -------
    da : (..., M, K) ndarray
        Of the common dtype, summed to the shape of `a`.
    db : (..., K, N) ndarray
        Likewise for `b`.

    Raises
    ------
    TypeError
        An argument of the wrong type or dtype.
    ValueError
        Shapes that do not fit, an unknown `mode`.

    Notes
    -----
    In "exact" mode dM/da = s_b 2^(e_b + floor(x + y + c)), the slope of the piece that (a, b) is in; 0 where b is 0.
    2 M N K products. Subnormal operands and sums as in `mitchell_matmul`.
    A. Kosson and M. Jaggi, NeurIPS 2023, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> a = np.array([[1.5, 1.25]], np.float32)
    >>> da, db = fastops.mitchell_matmul_grad(a, a.T, np.ones((1, 1), np.float32))
    >>> da
    array([[2., 1.]], dtype=float32)
    """
    chosen = _multiplier(multiplier)
    _validate.choice("mode", mode, _validate.GRADIENT_MODES)
    left, right, upper = _validate.float_arrays(a=a, b=b, dy=dy)
    shapes = left.shape, right.shape
    left, right, drop = _validate.at_least_2d(left, right)
    shape = _validate.matmul_shape(left, right)
    _validate.same_shape("dy", upper, tuple(n for i, n in enumerate(shape, -len(shape)) if i not in drop))
    left, right, ones = _validate.without_common_ones(left, right)
    upper = upper.reshape(shape).squeeze(ones)
    da, db = _backend.mitchell_matmul_grad(left, right, upper, multiplier=chosen, mode=mode)
    return da.reshape(shapes[0]), db.reshape(shapes[1])


def mitchell_conv2d(
    x: ArrayLike,
    w: ArrayLike,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    multiplier: Multiplier | None = None,
    out: AnyArray | None = None,
) -> AnyArray:
    """Convolve images with an approximate multiplier and exact sums.

    Parameters
    ----------
    x : (N, C, H, W) array_like of float16, bfloat16, float32 or float64
        Images.
    w : (O, C / groups, KH, KW) array_like of float16, bfloat16, float32 or float64
        Kernels, not flipped (a cross-correlation, as in neural networks).
    stride : int or (int, int)
        Step in pixels, at least 1.
    padding : int or (int, int)
        Zeros on each side in pixels, at least 0.
    dilation : int or (int, int)
        Distance between the kernel's taps in pixels, at least 1.
    groups : int
        Number of groups of channels that do not mix; it divides C and O.
    multiplier : Multiplier, optional
        Mitchell's multiplier by default.
    out : (N, O, OH, OW) ndarray, optional
        Where the result goes, of the operands' common dtype and apart from them in memory; any strides.

    Returns
    -------
    (N, O, OH, OW) ndarray
        Of the operands' common dtype; OH = (H + 2 padding - dilation (KH - 1) - 1) // stride + 1, OW likewise.

    Raises
    ------
    TypeError
        An argument of the wrong type or dtype.
    ValueError
        Shapes that do not fit, sizes out of range, an `out` of the wrong shape, read-only, or overlapping an operand.

    Notes
    -----
    Products and sums as in `mitchell_matmul`; the panels are packed from the image (padded, for steps of one pixel), without an im2col array.
    N O OH OW KH KW C / groups products.
    J. N. Mitchell, IRE Trans. EC-11, 1962.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> x = np.full((1, 1, 3, 3), 3.0, np.float32)
    >>> fastops.mitchell_conv2d(x, x[:, :, :2, :2])
    array([[[[32., 32.],
             [32., 32.]]]], dtype=float32)
    """
    chosen = _multiplier(multiplier)
    steps = _conv_settings(stride, padding, dilation, groups)
    image, kernel = _validate.float_arrays(x=x, w=w)
    shape = _validate.conv2d_shape(image, kernel, **steps)
    _validate.fits_memory("x and w", shape, image.itemsize)
    if out is not None:
        _validate.out_array(out, shape, (image.dtype,), {"x": image, "w": kernel})
    result: AnyArray = _backend.mitchell_conv2d(image, kernel, **steps, multiplier=chosen, out=out)
    return result


def mitchell_conv2d_grad(
    x: ArrayLike,
    w: ArrayLike,
    dy: ArrayLike,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    multiplier: Multiplier | None = None,
    mode: str = "exact",
) -> tuple[AnyArray, AnyArray]:
    """Differentiate `mitchell_conv2d` with respect to the images and the kernels.

    Parameters
    ----------
    x : (N, C, H, W) array_like of float16, bfloat16, float32 or float64
        Images.
    w : (O, C / groups, KH, KW) array_like of float16, bfloat16, float32 or float64
        Kernels.
    dy : (N, O, OH, OW) array_like of float16, bfloat16, float32 or float64
        The gradient of the result.
    stride, padding, dilation : int or (int, int)
        Those of the convolution, in pixels.
    groups : int
        That of the convolution.
    multiplier : Multiplier, optional
        That of the convolution.
    mode : {"exact", "ste", "mimic"}
        As in `mitchell_matmul_grad`.

    Returns
    -------
    dx : (N, C, H, W) ndarray
        Of the common dtype.
    dw : (O, C / groups, KH, KW) ndarray
        Of the common dtype.

    Raises
    ------
    TypeError
        An argument of the wrong type or dtype.
    ValueError
        Shapes that do not fit, sizes out of range, an unknown `mode`.

    Notes
    -----
    The slopes are those of `mitchell_matmul_grad`. 2 N O OH OW KH KW C / groups products.
    A. Kosson and M. Jaggi, NeurIPS 2023, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> x = np.full((1, 1, 2, 2), 1.5, np.float32)
    >>> dx, dw = fastops.mitchell_conv2d_grad(x, x, np.ones((1, 1, 1, 1), np.float32))
    >>> dw
    array([[[[2., 2.],
             [2., 2.]]]], dtype=float32)
    """
    chosen = _multiplier(multiplier)
    _validate.choice("mode", mode, _validate.GRADIENT_MODES)
    steps = _conv_settings(stride, padding, dilation, groups)
    image, kernel, upper = _validate.float_arrays(x=x, w=w, dy=dy)
    shape = _validate.conv2d_shape(image, kernel, **steps)
    _validate.same_shape("dy", upper, shape)
    dx, dw = _backend.mitchell_conv2d_grad(image, kernel, upper, **steps, multiplier=chosen, mode=mode)
    return dx, dw


def _conv_settings(stride: object, padding: object, dilation: object, groups: object) -> dict[str, Any]:
    return {
        "stride": _validate.integer_pair("stride", stride, 1),
        "padding": _validate.integer_pair("padding", padding, 0),
        "dilation": _validate.integer_pair("dilation", dilation, 1),
        "groups": _validate.integer("groups", groups, 1, 2**31 - 1),
    }


def lut_matmul(a: ArrayLike, b: ArrayLike, table: ArrayLike, *, out: AnyArray | None = None) -> Any:
    """Multiply 8-bit matrices with any multiplier that a table describes.

    Parameters
    ----------
    a : (..., M, K) array_like of uint8 or int8
        Any strides. The leading dimensions broadcast with those of `b`, and 1-D operands stand for a row and a column, as
        in `numpy.matmul`.
    b : (..., K, N) array_like of uint8 or int8
        It may have the other of the two dtypes.
    table : (256, 256) array_like of integers
        The products, indexed by the raw bytes: row by that of `a`, column by that of `b` (-1 as int8 is byte 255). Entries
        lie in [-2**31, 2**32).
    out : (..., M, N) ndarray of int32 or int64, optional
        Where the result goes, apart from the operands in memory; any strides. int32 is refused where the sum could
        overflow it.

    Returns
    -------
    (..., M, N) ndarray or scalar
        Exact sums: int32 where K max(abs(table)) fits, int64 otherwise.

    Raises
    ------
    TypeError
        Operands that are not 8-bit integers, a `table` of another kind than integers, an `out` of the wrong dtype.
    ValueError
        Shapes that do not multiply, entries out of range, an `out` of the wrong shape, read-only, or overlapping.

    Notes
    -----
    y[i, j] = sum over k of table[a[i, k], b[k, j]]: M N K look-ups. `Multiplier.table` makes the table of a multiplier;
    those of EvoApproxLib fit as they are.
    V. Mrazek et al., "EvoApprox8b", DATE 2017.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> a = np.array([[3, 5], [7, 11]], np.uint8)
    >>> fastops.lut_matmul(a, a, fastops.Multiplier().table(8))
    array([[ 40,  66],
           [ 92, 144]], dtype=int32)
    """
    left, right = _validate.byte_array("a", a), _validate.byte_array("b", b)
    entries, largest = _validate.table("table", table)
    left, right, drop = _validate.at_least_2d(left, right)
    shape = _validate.matmul_shape(left, right)
    bound = largest * left.shape[-1]
    if bound > np.iinfo(np.int64).max:
        raise _validate.wrong_value("a", "of fewer columns than overflow int64 sums", _validate.Text(str(left.shape)))
    wide = bound > np.iinfo(np.int32).max
    dtypes = (np.dtype(np.int64),) if wide else (np.dtype(np.int32), np.dtype(np.int64))
    _validate.fits_memory("a and b", shape, dtypes[0].itemsize)
    kept = tuple(n for i, n in enumerate(shape, -len(shape)) if i not in drop)
    if out is not None:
        _validate.out_array(out, kept, dtypes, {"a": left, "b": right, "table": entries})
    result = np.empty(kept, dtypes[0]) if out is None else out
    left, right, ones = _validate.without_common_ones(left, right)
    _backend.lut_matmul(
        left, right, entries, out=np.expand_dims(result, drop).squeeze(ones) if drop or ones else result
    )
    return result if out is not None or not drop else result[()]


def mitchell_mul_grad(
    a: ArrayLike, b: ArrayLike, dy: ArrayLike, *, multiplier: Multiplier | None = None, mode: str = "exact"
) -> tuple[AnyArray, AnyArray]:
    """Differentiate `mitchell_mul` with respect to its operands.

    Parameters
    ----------
    a : array_like of float16, bfloat16, float32 or float64
        The first operand.
    b : array_like of float16, bfloat16, float32 or float64
        The second operand; its shape broadcasts with that of `a`.
    dy : array_like of float16, bfloat16, float32 or float64
        The gradient of the result, of the broadcast shape.
    multiplier : Multiplier, optional
        That of the product.
    mode : {"exact", "ste", "mimic"}
        "exact" differentiates the approximation, which is linear piece by piece; "ste" (straight-through) takes the
        gradient of the exact product; "mimic" takes that formula with the approximate multiplier.

    Returns
    -------
    da : ndarray
        Of the common dtype, summed to the shape of `a`.
    db : ndarray
        Likewise for `b`.

    Raises
    ------
    TypeError
        An argument of the wrong type or dtype.
    ValueError
        Shapes that do not fit, an unknown `mode`.

    Notes
    -----
    In "exact" mode da = dy s_b 2^(e_b + floor(x + y + c)), the slope of the piece that (a, b) is in; 0 where b is 0, and
    with x = 0 where a is 0.
    A. Kosson and M. Jaggi, NeurIPS 2023, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> da, db = fastops.mitchell_mul_grad(np.float32([1.5, 1.25]), np.float32([3.0, 2.5]), np.float32([1.0, 1.0]))
    >>> da
    array([4., 2.], dtype=float32)
    """
    chosen = _multiplier(multiplier)
    left, right, upper = _grad_arrays(a, b, dy, mode)
    da, db = _backend.mitchell_mul_grad(left, right, upper, multiplier=chosen, mode=mode)
    return da, db


def mitchell_div_grad(
    a: ArrayLike, b: ArrayLike, dy: ArrayLike, *, multiplier: Multiplier | None = None, mode: str = "exact"
) -> tuple[AnyArray, AnyArray]:
    """Differentiate `mitchell_div` with respect to its operands.

    Parameters
    ----------
    a : array_like of float16, bfloat16, float32 or float64
        The numerator.
    b : array_like of float16, bfloat16, float32 or float64
        The denominator; its shape broadcasts with that of `a`.
    dy : array_like of float16, bfloat16, float32 or float64
        The gradient of the result, of the broadcast shape.
    multiplier : Multiplier, optional
        That of the quotient; one that defines `div`.
    mode : {"exact", "ste", "mimic"}
        As in `mitchell_mul_grad`; "mimic" is D(dy, b) and -D(M(dy, a), M(b, b)) with the multiplier's own product M and
        quotient D.

    Returns
    -------
    da : ndarray
        Of the common dtype, summed to the shape of `a`.
    db : ndarray
        Likewise for `b`.

    Raises
    ------
    TypeError
        An argument of the wrong type or dtype.
    ValueError
        Shapes that do not fit, an unknown `mode`, a `multiplier` without `div`.

    Notes
    -----
    In "exact" mode da = dy s_b 2^(-e_b + floor(x - y + c)) and db = -dy s_a 2^(e_a - 2 e_b + floor(x - y + c)).
    A. Kosson and M. Jaggi, NeurIPS 2023, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> da, db = fastops.mitchell_div_grad(np.float32(3.0), np.float32(2.5), np.float32(1.0))
    >>> float(da), float(db)
    (0.5, -0.5)
    """
    chosen = _multiplier(multiplier, "div")
    left, right, upper = _grad_arrays(a, b, dy, mode)
    da, db = _backend.mitchell_div_grad(left, right, upper, multiplier=chosen, mode=mode)
    return da, db


def _grad_arrays(a: object, b: object, dy: object, mode: object) -> list[AnyArray]:
    _validate.choice("mode", mode, _validate.GRADIENT_MODES)
    arrays = _validate.float_arrays(a=a, b=b, dy=dy)
    _validate.same_shape("dy", arrays[2], _validate.broadcast_shape(a=arrays[0], b=arrays[1]))
    return arrays
