# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions on a GPU: shapes, and one launch a call; gradients have one for each phase of the stride."""

from __future__ import annotations

from typing import Any

from .. import _validate, mitchell
from .._multiplier import Multiplier
from .._validate import Text, clip
from ._arrays import FLOATS
from ._calls import Call, returned
from ._mitchell import _constants, arrays_of, gradient_mode

__all__ = ["mitchell_conv2d", "mitchell_conv2d_grad"]

# Of the kernels, which count pixels in 32 bits.
_MOST_PIXELS = 2**29


def _shape(call: Call, settings: dict[str, Any]) -> tuple[int, int, int, int]:
    """The shape of the result, checked."""
    x, w = call.views["x"], call.views["w"]
    shape = _validate.conv2d_shape(x, w, **settings)
    if any(n + 2 * p >= _MOST_PIXELS for n, p in zip(x.shape[2:], settings["padding"], strict=True)):
        raise _validate.wrong_value("x", f"of padded sides below {_MOST_PIXELS} on a GPU", Text(clip(str(x.shape))))
    if any(n >= _MOST_PIXELS for name in ("stride", "dilation") for n in settings[name]):
        raise _validate.wrong_value("stride and dilation", f"below {_MOST_PIXELS} on a GPU", Text("larger ones"))
    return shape


def mitchell_conv2d(
    x: Any,
    w: Any,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    multiplier: Multiplier | None = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Convolve images on a GPU with an approximate multiplier and exact sums.

    Parameters
    ----------
    x : (N, C, H, W) array of float16, bfloat16, float32 or float64
        Images: on a GPU, of any strides.
    w : (O, C / groups, KH, KW) array
        Kernels, not flipped, of the same dtype and device.
    stride : int or (int, int)
        Step in pixels, at least 1.
    padding : int or (int, int)
        Zeros on each side in pixels, at least 0.
    dilation : int or (int, int)
        Distance between the kernel's taps in pixels, at least 1.
    groups : int
        Number of groups of channels that do not mix; it divides C and O.
    multiplier : fastops.Multiplier, optional
        Mitchell's multiplier by default.
    out : (N, O, OH, OW) array, optional
        Where the result goes, of the same dtype and device, apart from the operands in memory; any strides.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Returns
    -------
    (N, O, OH, OW) array
        `out`, or a new array of the library of `x`. The call returns before the kernel has run.

    Raises
    ------
    RuntimeError, TypeError
        As `mitchell_mul`.
    ValueError
        Shapes that do not fit, sizes out of range (padded sides of 2**29 pixels and more among them), arrays on different devices,
        an `out` that does not fit or overlaps an operand.

    Notes
    -----
    Products and sums as in `mitchell_matmul`: one product of the kernels with the patches of all images, which are read from where
    they lie. Groups of at most 16 filters, depthwise convolutions among them, have a kernel that reads each pixel once for all of
    its taps. N O OH OW KH KW C / groups products.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     x = torch.ones(1, 3, 8, 8, device="cuda")
    ...     y = fastops.cuda.mitchell_conv2d(x, x[:, :, :3, :3], padding=1)
    """
    chosen = mitchell._multiplier(multiplier)
    settings = mitchell._conv_settings(stride, padding, dilation, groups)
    call = arrays_of(stream, out, x=x, w=w)
    dtype = call.dtype(FLOATS, "x", "w")
    result, memory = call.output(out, _shape(call, settings), (dtype,))
    with call:
        call.native.conv2d(
            _constants(call.native, "mul", chosen),
            dtype,
            call.views["x"].triple,
            call.views["w"].triple,
            *settings.values(),
            memory.triple,
            call.device,
            call.stream,
        )
    return result if out is not None else returned(call.like, result)


def mitchell_conv2d_grad(
    x: Any,
    w: Any,
    dy: Any,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    multiplier: Multiplier | None = None,
    mode: str = "exact",
    stream: Any = None,
) -> tuple[Any, Any]:
    """Differentiate `mitchell_conv2d` with respect to the images and the kernels, on a GPU.

    Parameters
    ----------
    x : (N, C, H, W) array of float16, bfloat16, float32 or float64
        Images: on a GPU, of any strides.
    w : (O, C / groups, KH, KW) array
        Kernels, of the same dtype and device.
    dy : (N, O, OH, OW) array
        The gradient of the result, of the same dtype and device.
    stride, padding, dilation : int or (int, int)
        Those of the convolution, in pixels.
    groups : int
        That of the convolution.
    multiplier : fastops.Multiplier, optional
        That of the convolution.
    mode : {"exact", "ste", "mimic"}
        As in `fastops.mitchell_conv2d_grad`.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Returns
    -------
    dx : (N, C, H, W) array
        New, of the library of `x`. The call returns before the kernels have run.
    dw : (O, C / groups, KH, KW) array
        Likewise.

    Raises
    ------
    RuntimeError, TypeError
        As `mitchell_mul_grad`.
    ValueError
        As `mitchell_conv2d`; an unknown `mode`.

    Notes
    -----
    The slopes are those of `fastops.mitchell_matmul_grad`. Each pixel of `dx` is one sum, over the results that the pixel has a part
    in: with a stride those differ from pixel to pixel, with at most min(stride, KH) min(stride, KW) cases, a launch each.
    2 N O OH OW KH KW C / groups products.
    A. Kosson and M. Jaggi, NeurIPS 2023, section 3.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     x = torch.ones(1, 1, 4, 4, device="cuda")
    ...     dx, dw = fastops.cuda.mitchell_conv2d_grad(x, x[:, :, :3, :3], x[:, :, :2, :2])
    """
    chosen = mitchell._multiplier(multiplier)
    code = gradient_mode(mode)
    settings = mitchell._conv_settings(stride, padding, dilation, groups)
    call = arrays_of(stream, x=x, w=w, dy=dy)
    dtype = call.dtype(FLOATS, "x", "w", "dy")
    _validate.same_shape("dy", call.views["dy"], _shape(call, settings))
    results = [call.output(None, call.views[name].shape, (dtype,)) for name in ("x", "w")]
    with call:
        call.native.conv2d_grad(
            _constants(call.native, "mul", chosen),
            code,
            dtype,
            *(call.views[name].triple for name in ("x", "w", "dy")),
            *settings.values(),
            *(memory.triple for _, memory in results),
            call.device,
            call.stream,
        )
    dx, dw = (returned(call.like, result) for result, _ in results)
    return dx, dw
