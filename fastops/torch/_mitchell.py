# SPDX-License-Identifier: BSD-3-Clause
"""Mitchell arithmetic as differentiable operators of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _validate, mitchell
from .._backend import backend as _backend
from .._multiplier import Multiplier
from .._validate import AnyArray
from . import _ops
from ._ops import array, like, silent, tensor

__all__ = ["mitchell_conv2d", "mitchell_div", "mitchell_matmul", "mitchell_mul", "token"]

_PLAIN = Multiplier()._token()

# Compilers then take a multiplier as a constant that they may look into.
torch.utils._pytree.register_constant(Multiplier)


def token(multiplier: Multiplier | None, op: str = "mul") -> str:
    """The text that stands for a multiplier in the schema of an operator."""
    return _PLAIN if multiplier is None else mitchell._multiplier(multiplier, op)._token()


@lru_cache(maxsize=256)
def described(text: str) -> Multiplier:
    """The multiplier that a text stands for."""
    return Multiplier._from_token(text)


@lru_cache(maxsize=256)
def _ufunc(op: str, text: str) -> Any:
    return _backend.mitchell_op(op, described(text))


# Of ufuncs; functions of the other backends give what they give.
_ORDER: dict[str, Any] = {"order": "C"} if isinstance(_backend.mitchell_mul, np.ufunc) else {}


# The native backend reads tensors by itself where they are alike and dense.
_of_tensors = _backend.ufunc_of_tensors


@lru_cache(maxsize=256)
def _chosen(op: str, multiplier: Multiplier | None) -> Any:
    return _ufunc(op, token(multiplier, op))


def _quick(function: Any, a: Tensor, b: Tensor) -> Tensor:
    """The call for what `direct_pair` says."""
    y: Tensor | None = _of_tensors(function, a, b)
    if y is not None:
        return y
    try:
        x = silent.call(function, a.numpy(), b.numpy(), **_ORDER)
    except (RuntimeError, TypeError):
        x = silent.call(function, array("a", a), array("b", b), **_ORDER)
    return torch.from_numpy(x) if type(x) is np.ndarray and _ORDER else like(x, np.asarray(x))


def _options(multiplier: Multiplier | None, op: str, mode: str) -> tuple[str, str]:
    """The multiplier and the mode as operators take them, checked."""
    text = token(multiplier, op)
    if mode not in _validate.GRADIENT_MODES:
        _validate.choice("mode", mode, _validate.GRADIENT_MODES)
    return text, mode


# --- operators of two operands -----------------------------------------------------------------------------------------------------


def _operator(
    name: str,
    compute: Callable[[AnyArray, AnyArray, str], Tensor],
    gradient: Callable[..., Any],
    shape: Callable[[Tensor, Tensor], Sequence[int]],
    casts: Sequence[int] = (),
) -> Callable[..., Any]:
    """The operator `name` of two tensors of one dtype whose leading axes broadcast."""

    def kernel(a: Tensor, b: Tensor, multiplier: str, mode: str) -> Tensor:
        if a.is_cuda:
            y: Tensor = _on_gpu(name, a, b, multiplier=described(multiplier))
            return y
        return compute(array("a", a), array("b", b), multiplier)

    def fake(a: Tensor, b: Tensor, multiplier: str, mode: str) -> Tensor:
        return torch.empty(shape(a, b), dtype=a.dtype, device=a.device)

    def kernel_backward(dy: Tensor, a: Tensor, b: Tensor, multiplier: str, mode: str) -> tuple[Tensor, Tensor]:
        if a.is_cuda:
            found: tuple[Tensor, Tensor] = _on_gpu(
                f"{name}_grad", a, b, dy, multiplier=described(multiplier), mode=mode
            )
            return found
        x, y, d = array("a", a), array("b", b), array("dy", dy)
        da, db = gradient(x, y, d, multiplier=described(multiplier), mode=mode)
        return like(da, x), like(db, y)

    def fake_backward(dy: Tensor, a: Tensor, b: Tensor, multiplier: str, mode: str) -> tuple[Tensor, Tensor]:
        return _new(a), _new(b)

    def vmap(info: Any, dims: Sequence[Any], a: Tensor, b: Tensor, multiplier: str, mode: str) -> tuple[Tensor, int]:
        rank = max(a.ndim - (dims[0] is not None), b.ndim - (dims[1] is not None))
        x, y = (_ops.batched(t, d, info.batch_size, rank) for t, d in zip((a, b), dims, strict=False))
        return forward(x, y, multiplier, mode), 0

    def vmap_backward(
        info: Any, dims: Sequence[Any], dy: Tensor, a: Tensor, b: Tensor, multiplier: str, mode: str
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        n = info.batch_size
        rank = dy.ndim - (dims[0] is not None)
        x, y, z = (_ops.batched(t, d, n, rank) for t, d in zip((dy, a, b), dims, strict=False))
        da, db = backward(x, y, z, multiplier, mode)
        shapes = (_ops.batched(t, d, n, 0).shape for t, d in zip((a, b), dims[1:], strict=False))
        first, second = (g.reshape(shape) for g, shape in zip((da, db), shapes, strict=True))
        return (first, second), (0, 0)

    options = "str multiplier, str mode"
    backward = _ops.define(
        f"{name}_backward(Tensor dy, Tensor a, Tensor b, {options}) -> (Tensor, Tensor)",
        kernel_backward,
        fake_backward,
        vmap=vmap_backward,
    )
    forward = _ops.define(
        f"{name}(Tensor a, Tensor b, {options}) -> Tensor",
        kernel,
        fake,
        setup=_keep,
        backward=_derive(backward),
        vmap=vmap,
        casts=casts,
    )
    return forward


def _on_gpu(name: str, *tensors: Tensor, **options: Any) -> Any:
    from .. import cuda

    return getattr(cuda, name)(*(x.detach() for x in tensors), **options)


def _new(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, *ctx.options = inputs
    ctx.save_for_backward(a, b)


def _derive(op: Any) -> Callable[..., Any]:
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return (*op(dy, *ctx.saved_tensors, *ctx.options), *(None for _ in ctx.options))

    return backward


# --- element by element ------------------------------------------------------------------------------------------------------------


def _elementwise(op: str, gradient: Callable[..., Any]) -> Callable[..., Any]:
    """The operator mitchell_`op`."""

    def compute(x: AnyArray, y: AnyArray, multiplier: str) -> Tensor:
        return like(silent.call(_ufunc(op, multiplier), x, y), x)

    def derive(*arrays: AnyArray, **options: Any) -> Any:
        return silent.call(lambda: gradient(*arrays, **options))

    return _operator(f"mitchell_{op}", compute, derive, lambda a, b: torch.broadcast_shapes(a.shape, b.shape))


_mul = _elementwise("mul", mitchell.mitchell_mul_grad)
_div = _elementwise("div", mitchell.mitchell_div_grad)


def mitchell_mul(
    a: Tensor | float, b: Tensor | float, *, multiplier: Multiplier | None = None, mode: str = "exact"
) -> Tensor:
    """Multiply approximately, element by element: `fastops.mitchell_mul` for tensors, with a gradient.

    Parameters
    ----------
    a : Tensor of float16, bfloat16, float32 or float64, or number
        On the CPU or on an NVIDIA GPU (`fastops.cuda`), of any strides; read in place.
    b : Tensor or number
        Its shape broadcasts with that of `a`, and dtypes are promoted as in ``a * b``.
    multiplier : fastops.Multiplier, optional
        Mitchell's multiplier by default.
    mode : {"exact", "ste", "mimic"}
        The gradient, as in `fastops.mitchell_mul_grad`: of the approximation, of the exact product ("straight through"), or that
        formula with the approximate multiplier.

    Returns
    -------
    Tensor
        Contiguous, of the common dtype.

    Raises
    ------
    TypeError
        A tensor that is not of a floating-point dtype, dense and on a device named above; no tensor at all.
    ValueError
        Shapes that do not broadcast, an unknown `mode`.
    NotImplementedError
        A second derivative.

    Notes
    -----
    Values and gradients are those of `fastops.mitchell_mul` and `fastops.mitchell_mul_grad`, bit by bit; on a GPU those of
    `fastops.cuda`, with their bits of CPUs that have FMA and another order of sums.

    Examples
    --------
    >>> import torch
    >>> from fastops.torch import mitchell_mul
    >>> x = torch.tensor([1.5, 1.25], requires_grad=True)
    >>> y = mitchell_mul(x, 3.0)
    >>> y.sum().backward()
    >>> y.detach(), x.grad
    (tensor([4.0000, 3.5000]), tensor([4., 2.]))
    """
    if _ops.direct_pair(a, b) and mode in _validate.GRADIENT_MODES:
        return _quick(_chosen("mul", multiplier), a, b)
    options = _options(multiplier, "mul", mode)
    return _mul(*_ops.pair(a=a, b=b), *options)


def mitchell_div(
    a: Tensor | float, b: Tensor | float, *, multiplier: Multiplier | None = None, mode: str = "exact"
) -> Tensor:
    """Divide approximately, element by element: `fastops.mitchell_div` for tensors, with a gradient.

    Parameters
    ----------
    a : Tensor of float16, bfloat16, float32 or float64, or number
        The numerator, where `mitchell_mul` takes tensors.
    b : Tensor or number
        The denominator.
    multiplier : fastops.Multiplier, optional
        One that defines `div`.
    mode : {"exact", "ste", "mimic"}
        The gradient, as in `fastops.mitchell_div_grad`.

    Returns
    -------
    Tensor
        Contiguous, of the common dtype.

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
    >>> import torch
    >>> from fastops.torch import mitchell_div
    >>> mitchell_div(torch.tensor(3.0), 2.5)
    tensor(1.2500)
    """
    if _ops.direct_pair(a, b) and mode in _validate.GRADIENT_MODES:
        return _quick(_chosen("div", multiplier), a, b)
    options = _options(multiplier, "div", mode)
    return _div(*_ops.pair(a=a, b=b), *options)


# --- matrix products ---------------------------------------------------------------------------------------------------------------


def _product_shape(a: Tensor, b: Tensor) -> list[int]:
    return [*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]]


def _matmul_array(x: AnyArray, y: AnyArray, multiplier: str) -> Tensor:
    return tensor(mitchell.mitchell_matmul(x, y, multiplier=described(multiplier)))


_matmul = _operator("mitchell_matmul", _matmul_array, mitchell.mitchell_matmul_grad, _product_shape, casts=(0, 1))


def mitchell_matmul(a: Tensor, b: Tensor, *, multiplier: Multiplier | None = None, mode: str = "exact") -> Tensor:
    """Multiply matrices approximately: `fastops.mitchell_matmul` for tensors, with a gradient.

    Parameters
    ----------
    a : (..., M, K) or (K,) Tensor of float16, bfloat16, float32 or float64
        On the CPU or on an NVIDIA GPU (`fastops.cuda`), of any strides; read in place.
    b : (..., K, N) or (K,) Tensor
        Leading dimensions broadcast as in `torch.matmul`.
    multiplier : fastops.Multiplier, optional
        Mitchell's multiplier by default.
    mode : {"exact", "ste", "mimic"}
        The gradient, as in `fastops.mitchell_matmul_grad`.

    Returns
    -------
    (..., M, N) Tensor
        Of the common dtype; under autocast of its dtype.

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
    >>> import torch
    >>> from fastops.torch import mitchell_matmul
    >>> x = torch.full((2, 2), 3.0)
    >>> mitchell_matmul(x, x)
    tensor([[16., 16.],
            [16., 16.]])
    """
    options = _options(multiplier, "mul", mode)
    a, b = _ops.pair(a=a, b=b)
    return _vectors(a, b, options) if a.ndim < 2 or b.ndim < 2 else _product(a, b, options)


def _product(a: Tensor, b: Tensor, options: tuple[str, str]) -> Tensor:
    # Before an operator is entered, which would wrap the error.
    if a.shape[-1] != b.shape[-2]:
        got = _validate.Text(_validate.clip(str(tuple(b.shape))))
        raise _validate.wrong_value("b", f"of shape (..., {a.shape[-1]}, N) to follow a", got)
    return _matmul(a, b, *options)


def _vectors(a: Tensor, b: Tensor, options: tuple[str, str]) -> Tensor:
    for name, x in (("a", a), ("b", b)):
        if not x.ndim:
            raise _validate.wrong_value(name, "a tensor of at least 1 dimension", _validate.Text("a 0-d tensor"))
    y = _product(a.unsqueeze(0) if a.ndim < 2 else a, b.unsqueeze(1) if b.ndim < 2 else b, options)
    y = y.squeeze(-1) if b.ndim < 2 else y
    return y.squeeze(-1 if b.ndim < 2 else -2) if a.ndim < 2 else y


# --- convolutions ------------------------------------------------------------------------------------------------------------------


def _conv_kernel(
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    multiplier: str,
    mode: str,
) -> Tensor:
    options = {**_steps(stride, padding, dilation, groups), "multiplier": described(multiplier)}
    if x.is_cuda:
        y: Tensor = _on_gpu("mitchell_conv2d", x, w, **options)
        return y
    return tensor(mitchell.mitchell_conv2d(array("x", x), array("w", w), **options))


def _steps(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> dict[str, Any]:
    return {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation), "groups": groups}


def _conv_fake(
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    multiplier: str,
    mode: str,
) -> Tensor:
    size = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return torch.empty([x.shape[0], w.shape[0], *size], dtype=x.dtype, device=x.device)


def _conv_backward_kernel(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    multiplier: str,
    mode: str,
) -> tuple[Tensor, Tensor]:
    options = {**_steps(stride, padding, dilation, groups), "multiplier": described(multiplier), "mode": mode}
    if x.is_cuda:
        found: tuple[Tensor, Tensor] = _on_gpu("mitchell_conv2d_grad", x, w, dy, **options)
        return found
    dx, dw = mitchell.mitchell_conv2d_grad(array("x", x), array("w", w), array("dy", dy), **options)
    return tensor(dx), tensor(dw)


def _conv_backward_fake(dy: Tensor, x: Tensor, w: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _new(x), _new(w)


def _conv_vmap(info: Any, dims: Sequence[Any], x: Tensor, w: Tensor, *options: Any) -> tuple[Tensor, int]:
    if dims[1] is not None:
        found: tuple[Tensor, int] = _ops.loop(_conv, info, dims, (x, w, *options))
        return found
    x = x.movedim(dims[0], 0)
    y = _conv(x.flatten(0, 1), w, *options)
    return y.unflatten(0, x.shape[:2]), 0


_STEPS = "int[2] stride, int[2] padding, int[2] dilation, int groups, str multiplier, str mode"
_conv_backward = _ops.define(
    f"mitchell_conv2d_backward(Tensor dy, Tensor x, Tensor w, {_STEPS}) -> (Tensor, Tensor)",
    _conv_backward_kernel,
    _conv_backward_fake,
)
_conv = _ops.define(
    f"mitchell_conv2d(Tensor x, Tensor w, {_STEPS}) -> Tensor",
    _conv_kernel,
    _conv_fake,
    setup=_keep,
    backward=_derive(_conv_backward),
    vmap=_conv_vmap,
    casts=(0, 1),
)


def mitchell_conv2d(
    x: Tensor,
    w: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    multiplier: Multiplier | None = None,
    mode: str = "exact",
) -> Tensor:
    """Convolve images approximately: `fastops.mitchell_conv2d` for tensors, with a gradient.

    Parameters
    ----------
    x : (N, C, H, W) Tensor of float16, bfloat16, float32 or float64
        Images, on the CPU or on an NVIDIA GPU (`fastops.cuda`), of any strides.
    w : (O, C / groups, KH, KW) Tensor
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
    (N, O, OH, OW) Tensor
        Contiguous, of the common dtype; under autocast of its dtype.

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
    >>> import torch
    >>> from fastops.torch import mitchell_conv2d
    >>> x = torch.full((1, 1, 3, 3), 3.0)
    >>> mitchell_conv2d(x, x[:, :, :2, :2])
    tensor([[[[32., 32.],
              [32., 32.]]]])
    """
    options = _options(multiplier, "mul", mode)
    x, w = _ops.pair(x=x, w=w)
    steps = mitchell._conv_settings(stride, padding, dilation, groups)
    _validate.conv2d_shape(x, w, **steps)
    given = (list(steps["stride"]), list(steps["padding"]), list(steps["dilation"]), steps["groups"])
    return _conv(x, w, *given, *options)
