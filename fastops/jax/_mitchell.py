# SPDX-License-Identifier: BSD-3-Clause
"""Mitchell arithmetic as differentiable operations of jax."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _validate, mitchell
from .._backend import backend as _backend
from .._multiplier import Multiplier
from .._validate import AnyArray
from . import _ops
from ._ops import Shape, spec, stand_in

__all__ = ["mitchell_conv2d", "mitchell_div", "mitchell_matmul", "mitchell_mul"]


class Options(NamedTuple):
    """What is fixed when a product is traced."""

    multiplier: Multiplier
    mode: str
    route: str
    steps: tuple[Any, ...] = ()


def _options(multiplier: Multiplier | None, op: str, mode: str) -> Options:
    _validate.choice("mode", mode, _validate.GRADIENT_MODES)
    return Options(mitchell._multiplier(multiplier, op), mode, _ops.route())


@lru_cache(maxsize=256)
def _attributes(multiplier: Multiplier, op: str) -> dict[str, Any]:
    """A multiplier as handlers take it."""
    s = multiplier.spec(op)
    numbers = [s.form, s.flush, s.corrections, s.mantissa_bits, s.segments, s.c, *s.table]
    return {"multiplier": np.asarray(numbers, np.float64)}


def _of_one_rank(a: Any, b: Any) -> tuple[Any, Any]:
    """With leading axes of length 1, so that samples of `vmap` stay apart from the operands' own axes."""
    rank = max(a.ndim, b.ndim)
    return a.reshape((*(1,) * (rank - a.ndim), *a.shape)), b.reshape((*(1,) * (rank - b.ndim), *b.shape))


# --- element by element ------------------------------------------------------------------------------------------------------------


def _elementwise(op: str, gradient: Callable[..., Any]) -> Callable[..., Any]:
    """The operation mitchell_`op` on two arrays of one dtype and any shapes."""
    name = f"mitchell_{op}"

    @partial(jax.custom_vjp, nondiff_argnums=(2,))
    def forward(a: Any, b: Any, options: Options) -> Any:
        function = _backend.mitchell_op(op, options.multiplier)

        def host(x: AnyArray, y: AnyArray) -> list[Any]:
            return [function(x, y)]

        result = Shape(jnp.broadcast_shapes(a.shape, b.shape), a.dtype)
        attributes = {"op": np.int32(op == "div"), **_attributes(options.multiplier, op)}
        return _ops.call(
            options.route, "fastops_mitchell", attributes, host, [result], a, b, many=lambda axes, x, y: host(x, y)
        )[0]

    @_ops.refuse_twice(name)
    def backward(options: Options, dy: Any, a: Any, b: Any) -> Any:
        def host(d: AnyArray, x: AnyArray, y: AnyArray) -> Any:
            return gradient(x, y, d, multiplier=options.multiplier, mode=options.mode)

        def many(axes: tuple[int, ...], d: AnyArray, x: AnyArray, y: AnyArray) -> Any:
            return host(*(_ops.spread(z, axes, z.ndim - len(axes)) for z in (d, x, y)))

        # Sums over broadcast axes are those of the functions for arrays.
        attributes = None
        if a.shape == b.shape:
            mode = np.int32(_validate.GRADIENT_MODES.index(options.mode))
            fixed = {"op": np.int32(op == "div"), "mode": mode, "rank": np.int32(a.ndim)}
            attributes = {**fixed, **_attributes(options.multiplier, op)}
        results = [Shape(a.shape, a.dtype), Shape(b.shape, b.dtype)]
        return _ops.call(options.route, "fastops_mitchell_grad", attributes, host, results, dy, a, b, many=many)

    forward.defvjp(
        lambda a, b, options: (forward(a, b, options), (a, b)),
        lambda options, kept, dy: tuple(backward(options, dy, *kept)),
    )

    @partial(jax.jit, static_argnums=(2,))
    def whole(a: Any, b: Any, options: Options) -> Any:
        return forward(*_of_one_rank(jnp.asarray(a), jnp.asarray(b)), options)

    return whole


_mul = _elementwise("mul", mitchell.mitchell_mul_grad)
_div = _elementwise("div", mitchell.mitchell_div_grad)


def _pair(a: Any, b: Any) -> list[Any]:
    a, b = _ops.floats(a=a, b=b)
    if a.shape != b.shape:
        _validate.broadcast_shape(a=stand_in(spec(a)), b=stand_in(spec(b)))
    return [a, b]


def mitchell_mul(a: Any, b: Any, *, multiplier: Multiplier | None = None, mode: str = "exact") -> jax.Array:
    """Multiply approximately, element by element: `fastops.mitchell_mul` for jax's arrays, with a gradient.

    Parameters
    ----------
    a : Array of float16, bfloat16, float32 or float64, or number
        Of jax or NumPy, traced or not.
    b : Array or number
        Its shape broadcasts with that of `a`, and dtypes are promoted as in ``a * b``.
    multiplier : fastops.Multiplier, optional
        Mitchell's multiplier by default.
    mode : {"exact", "ste", "mimic"}
        The gradient, as in `fastops.mitchell_mul_grad`: of the approximation, of the exact product ("straight through"), or that
        formula with the approximate multiplier.

    Returns
    -------
    Array
        Of the common dtype.

    Raises
    ------
    TypeError
        An array that is not of a floating-point dtype; no array at all.
    ValueError
        Shapes that do not broadcast, an unknown `mode`.
    NotImplementedError
        A second derivative.

    Notes
    -----
    Values and gradients are those of `fastops.mitchell_mul` and `fastops.mitchell_mul_grad`, bit by bit.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from fastops.jax import mitchell_mul
    >>> x = jnp.array([1.5, 1.25])
    >>> mitchell_mul(x, 3.0)
    Array([4. , 3.5], dtype=float32)
    >>> jax.grad(lambda x: mitchell_mul(x, 3.0).sum())(x)
    Array([4., 2.], dtype=float32)
    """
    options = _options(multiplier, "mul", mode)
    return _mul(*_pair(a, b), options)


def mitchell_div(a: Any, b: Any, *, multiplier: Multiplier | None = None, mode: str = "exact") -> jax.Array:
    """Divide approximately, element by element: `fastops.mitchell_div` for jax's arrays, with a gradient.

    Parameters
    ----------
    a : Array of float16, bfloat16, float32 or float64, or number
        The numerator.
    b : Array or number
        The denominator.
    multiplier : fastops.Multiplier, optional
        One that defines `div`.
    mode : {"exact", "ste", "mimic"}
        The gradient, as in `fastops.mitchell_div_grad`.

    Returns
    -------
    Array
        Of the common dtype.

    Raises
    ------
    TypeError
        As `mitchell_mul`.
    ValueError
        As `mitchell_mul`; a multiplier without `div`.
    NotImplementedError
        A second derivative.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from fastops.jax import mitchell_div
    >>> mitchell_div(jnp.array([3.0]), 2.5)
    Array([1.25], dtype=float32)
    """
    options = _options(multiplier, "div", mode)
    return _div(*_pair(a, b), options)


# --- matrix products ---------------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(a: Any, b: Any, options: Options) -> Any:
    """Of (..., M, K) and (..., K, N) with as many axes."""

    def host(x: AnyArray, y: AnyArray) -> list[Any]:
        return [mitchell.mitchell_matmul(x, y, multiplier=options.multiplier)]

    shape = (*jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    attributes = _attributes(options.multiplier, "mul")
    results = [Shape(shape, a.dtype)]
    return _ops.call(
        options.route, "fastops_matmul", attributes, host, results, a, b, many=lambda axes, x, y: host(x, y)
    )[0]


@_ops.refuse_twice("mitchell_matmul")
def _product_backward(options: Options, dy: Any, a: Any, b: Any) -> Any:
    def host(d: AnyArray, x: AnyArray, y: AnyArray) -> Any:
        return mitchell.mitchell_matmul_grad(x, y, d, multiplier=options.multiplier, mode=options.mode)

    def many(axes: tuple[int, ...], d: AnyArray, x: AnyArray, y: AnyArray) -> Any:
        return host(*(_ops.spread(z, axes, z.ndim - len(axes)) for z in (d, x, y)))

    attributes = None
    if a.shape[:-2] == b.shape[:-2]:
        mode = np.int32(_validate.GRADIENT_MODES.index(options.mode))
        attributes = {"mode": mode, **_attributes(options.multiplier, "mul")}
    results = [Shape(a.shape, a.dtype), Shape(b.shape, b.dtype)]
    return _ops.call(options.route, "fastops_matmul_grad", attributes, host, results, dy, a, b, many=many)


_product.defvjp(
    lambda a, b, options: (_product(a, b, options), (a, b)),
    lambda options, kept, dy: tuple(_product_backward(options, dy, *kept)),
)


@partial(jax.jit, static_argnums=(2,))
def _matmul(a: Any, b: Any, options: Options) -> Any:
    a, b = jnp.asarray(a), jnp.asarray(b)
    left, right = a[None] if a.ndim < 2 else a, b[:, None] if b.ndim < 2 else b
    y = _product(*_of_one_rank(left, right), options)
    y = y[..., 0] if b.ndim < 2 else y
    return y[..., 0] if b.ndim < 2 and a.ndim < 2 else y[..., 0, :] if a.ndim < 2 else y


def mitchell_matmul(a: Any, b: Any, *, multiplier: Multiplier | None = None, mode: str = "exact") -> jax.Array:
    """Multiply matrices approximately: `fastops.mitchell_matmul` for jax's arrays, with a gradient.

    Parameters
    ----------
    a : (..., M, K) or (K,) Array of float16, bfloat16, float32 or float64
        Of jax or NumPy, traced or not.
    b : (..., K, N) or (K,) Array
        Leading dimensions broadcast as in `jax.numpy.matmul`.
    multiplier : fastops.Multiplier, optional
        Mitchell's multiplier by default.
    mode : {"exact", "ste", "mimic"}
        The gradient, as in `fastops.mitchell_matmul_grad`.

    Returns
    -------
    (..., M, N) Array
        Of the common dtype.

    Raises
    ------
    TypeError
        As `mitchell_mul`.
    ValueError
        Shapes that do not multiply, an unknown `mode`.
    NotImplementedError
        A second derivative.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from fastops.jax import mitchell_matmul
    >>> x = jnp.full((2, 2), 3.0)
    >>> mitchell_matmul(x, x)
    Array([[16., 16.],
           [16., 16.]], dtype=float32)
    """
    options = _options(multiplier, "mul", mode)
    a, b = _ops.floats(a=a, b=b)
    left, right, _ = _validate.at_least_2d(stand_in(spec(a)), stand_in(spec(b)))
    _validate.fits_memory("a and b", _validate.matmul_shape(left, right), left.itemsize)
    return _matmul(a, b, options)


# --- convolutions ------------------------------------------------------------------------------------------------------------------


def _conv_attributes(options: Options) -> dict[str, Any]:
    stride, padding, dilation, groups = options.steps
    numbers = np.asarray([*stride, *padding, *dilation, groups], np.int64)
    return {"steps": numbers, **_attributes(options.multiplier, "mul")}


def _steps(options: Options) -> dict[str, Any]:
    return dict(zip(("stride", "padding", "dilation", "groups"), options.steps, strict=True))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(x: Any, w: Any, options: Options) -> Any:
    steps = _steps(options)

    def host(image: AnyArray, kernel: AnyArray) -> list[AnyArray]:
        return [mitchell.mitchell_conv2d(image, kernel, **steps, multiplier=options.multiplier)]

    def many(axes: tuple[int, ...], image: AnyArray, kernel: AnyArray) -> list[AnyArray] | None:
        # With kernels in common the samples' images are one batch.
        if not _ops.is_shared(kernel, 4):
            return None
        n = image.shape[len(axes)]
        every = _ops.spread(image, axes, 4).reshape((-1, *image.shape[-3:]))
        (y,) = host(every, kernel.reshape(kernel.shape[len(axes) :]))
        return [y.reshape((*axes, n, *y.shape[1:]))]

    shape = _validate.conv2d_shape(stand_in(spec(x)), stand_in(spec(w)), **steps)
    results = [Shape(shape, x.dtype)]
    return _ops.call(options.route, "fastops_conv2d", _conv_attributes(options), host, results, x, w, many=many)[0]


@_ops.refuse_twice("mitchell_conv2d")
def _convolution_backward(options: Options, dy: Any, x: Any, w: Any) -> Any:
    def host(d: AnyArray, image: AnyArray, kernel: AnyArray) -> Any:
        chosen, mode = options.multiplier, options.mode
        return mitchell.mitchell_conv2d_grad(image, kernel, d, **_steps(options), multiplier=chosen, mode=mode)

    mode = np.int32(_validate.GRADIENT_MODES.index(options.mode))
    attributes = {"mode": mode, **_conv_attributes(options)}
    results = [Shape(x.shape, x.dtype), Shape(w.shape, w.dtype)]
    return _ops.call(options.route, "fastops_conv2d_grad", attributes, host, results, dy, x, w)


_convolution.defvjp(
    lambda x, w, options: (_convolution(x, w, options), (x, w)),
    lambda options, kept, dy: tuple(_convolution_backward(options, dy, *kept)),
)


@partial(jax.jit, static_argnums=(2,))
def _conv2d(x: Any, w: Any, options: Options) -> Any:
    return _convolution(jnp.asarray(x), jnp.asarray(w), options)


def mitchell_conv2d(
    x: Any,
    w: Any,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    multiplier: Multiplier | None = None,
    mode: str = "exact",
) -> jax.Array:
    """Convolve images approximately: `fastops.mitchell_conv2d` for jax's arrays, with a gradient.

    Parameters
    ----------
    x : (N, C, H, W) Array of float16, bfloat16, float32 or float64
        Images.
    w : (O, C / groups, KH, KW) Array
        Kernels.
    stride, padding, dilation : int or (int, int)
        In pixels.
    groups : int
        Number of groups of channels that do not mix.
    multiplier : fastops.Multiplier, optional
        Mitchell's multiplier by default.
    mode : {"exact", "ste", "mimic"}
        The gradient, as in `fastops.mitchell_conv2d_grad`.

    Returns
    -------
    (N, O, OH, OW) Array
        Of the common dtype.

    Raises
    ------
    TypeError
        As `mitchell_mul`.
    ValueError
        Shapes that do not fit, sizes out of range, an unknown `mode`.
    NotImplementedError
        A second derivative.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from fastops.jax import mitchell_conv2d
    >>> x = jnp.full((1, 1, 3, 3), 3.0)
    >>> mitchell_conv2d(x, x[:, :, :2, :2])
    Array([[[[32., 32.],
             [32., 32.]]]], dtype=float32)
    """
    options = _options(multiplier, "mul", mode)
    x, w = _ops.floats(x=x, w=w)
    steps = mitchell._conv_settings(stride, padding, dilation, groups)
    shape = _validate.conv2d_shape(stand_in(spec(x)), stand_in(spec(w)), **steps)
    _validate.fits_memory("x and w", shape, x.dtype.itemsize)
    return _conv2d(x, w, options._replace(steps=tuple(steps.values())))
