# SPDX-License-Identifier: BSD-3-Clause
"""Mitchell arithmetic on a GPU: validation, and one launch a call."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from .. import _validate, mitchell
from .._multiplier import OPS, Multiplier
from .._validate import Text, clip
from ._arrays import FLOATS
from ._calls import Call, returned

__all__ = [
    "lmul",
    "mitchell_div",
    "mitchell_div_grad",
    "mitchell_exp2",
    "mitchell_log2",
    "mitchell_mul",
    "mitchell_mul_grad",
    "mitchell_reciprocal",
    "mitchell_rsqrt",
    "mitchell_sqrt",
    "mitchell_square",
]

_LMUL = Multiplier("lmul")


@lru_cache(maxsize=256)
def _constants(native: Any, op: str, multiplier: Multiplier) -> Any:
    return native.Multiplier(tuple(multiplier.spec(op)))


def _broadcast(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return _validate.broadcast_shapes(*shapes.values())
    except ValueError:
        (_, first), *others = shapes.items()
        name, other = others[-1]
        wanted = f"of a shape that broadcasts with {clip(str(first))}"
        raise _validate.wrong_value(name, wanted, Text(clip(str(other)))) from None


def _apply(op: str, a: Any, b: Any, multiplier: Multiplier | None, out: Any, stream: Any) -> Any:
    chosen = mitchell._multiplier(multiplier, op)
    binary = op in ("mul", "div")
    call = Call(stream, a=a, b=b, out=out) if binary else Call(stream, a=a, out=out)
    if "a" not in call.views and "b" not in call.views:
        raise _validate.wrong_type("a", "an array on a GPU, or a number beside one", a)
    dtype = call.dtype(FLOATS, "a", "b")
    shape = _broadcast({name: call.views[name].shape for name in ("a", "b") if name in call.views})
    result, memory = call.output(out, shape, (dtype,))
    operands = [
        call.views[name].triple if name in call.views else float(value or 0.0) for name, value in (("a", a), ("b", b))
    ]
    with call:
        call.native.apply(
            _constants(call.native, op, chosen),
            OPS.index(op),
            dtype,
            *operands,
            memory.triple,
            call.device,
            call.stream,
        )
    return result if out is not None else returned(call.like, result)


def arrays_of(stream: object, out: Any = None, **values: Any) -> Call:
    """A call whose operands are arrays all, none of them a number."""
    call = Call(stream, **values, out=out)
    for name, value in values.items():
        if name not in call.views:
            raise _validate.wrong_type(name, "an array on a GPU", value)
    return call


def gradient_mode(mode: str) -> int:
    """What the compiled module takes."""
    return _validate.GRADIENT_MODES.index(_validate.choice("mode", mode, _validate.GRADIENT_MODES))


def _gradients(
    op: str, a: Any, b: Any, dy: Any, multiplier: Multiplier | None, mode: str, stream: Any
) -> tuple[Any, Any]:
    chosen = mitchell._multiplier(multiplier, op)
    code = gradient_mode(mode)
    call = arrays_of(stream, a=a, b=b, dy=dy)
    dtype = call.dtype(FLOATS, "a", "b", "dy")
    shape = _broadcast({name: call.views[name].shape for name in ("a", "b")})
    _validate.same_shape("dy", call.views["dy"], shape)
    results = [call.output(None, call.views[name].shape, (dtype,)) for name in ("a", "b")]
    with call:
        call.native.grad(
            _constants(call.native, op, chosen),
            _constants(call.native, "mul", chosen),
            OPS.index(op),
            code,
            dtype,
            *(call.views[name].triple for name in ("a", "b", "dy")),
            *(memory.triple for _, memory in results),
            call.device,
            call.stream,
        )
    da, db = (returned(call.like, result) for result, _ in results)
    return da, db


_ARRAY = """Array on a GPU of float16, bfloat16, float32 or float64: torch's, cupy's, jax's, or any other with
        ``__cuda_array_interface__`` or DLPack; any strides, at most 8 axes that do not lie behind one another."""
_REST = """    multiplier : fastops.Multiplier, optional
        Mitchell's multiplier by default.
    out : array, optional
        Where the result goes, of the same dtype and device; an operand itself, or apart from it.
    stream : int or stream object, optional
        Where the kernel is queued. By default the current stream of torch or cupy whose arrays come, else the stream that the
        arrays name, else the default stream.

    Returns
    -------
    array
        `out`, or a new array of the first operand's library (`fastops.cuda.Array` where that makes none). The call returns
        before the kernel has run.

    Raises
    ------
    RuntimeError
        No GPU.
    TypeError
        An array that is not on a GPU, of another dtype, or within autograd.
    ValueError
        Shapes that do not fit, arrays on different devices, an `out` that is read-only or overlaps an operand.

    Notes
    -----
    The bits of `fastops.{name}` on CPUs with FMA, a nan being a nan. {bytes}
    J. N. Mitchell, IRE Trans. EC-11, 1962.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     y = fastops.cuda.{name}({example})
"""


def _document(function: Any, summary: str, names: str, example: str, traffic: str) -> Any:
    name = function.__name__
    parameters = "".join(f"    {each} : array\n        {_ARRAY}\n" for each in names.split())
    if names == "a b":
        parameters = (
            f"    a : array or number\n        {_ARRAY}\n"
            "    b : array or number\n        Of the same dtype and device; its shape broadcasts with that of `a`.\n"
        )
    rest = _REST.format(name=name, example=example, bytes=traffic)
    function.__doc__ = f"{summary}\n\n    Parameters\n    ----------\n{parameters}{rest}    "
    return function


def _binary(op: str, name: str, summary: str) -> Any:
    def function(a: Any, b: Any, *, multiplier: Multiplier | None = None, out: Any = None, stream: Any = None) -> Any:
        return _apply(op, a, b, multiplier, out, stream)

    function.__name__ = function.__qualname__ = name
    return _document(function, summary, "a b", "torch.ones(2, device='cuda'), 3.0", "Three elements of traffic.")


def _unary(op: str, name: str, summary: str) -> Any:
    def function(a: Any, *, multiplier: Multiplier | None = None, out: Any = None, stream: Any = None) -> Any:
        return _apply(op, a, None, multiplier, out, stream)

    function.__name__ = function.__qualname__ = name
    return _document(function, summary, "a", "torch.ones(2, device='cuda')", "Two elements of traffic.")


mitchell_mul = _binary("mul", "mitchell_mul", "Multiply approximately, element by element, on a GPU.")
mitchell_div = _binary("div", "mitchell_div", "Divide approximately, element by element, on a GPU.")
mitchell_square = _unary("square", "mitchell_square", "Square approximately on a GPU.")
mitchell_reciprocal = _unary("reciprocal", "mitchell_reciprocal", "Take approximate reciprocals on a GPU.")
mitchell_sqrt = _unary("sqrt", "mitchell_sqrt", "Take approximate square roots on a GPU.")
mitchell_rsqrt = _unary("rsqrt", "mitchell_rsqrt", "Take approximate reciprocal square roots on a GPU.")
mitchell_log2 = _unary("log2", "mitchell_log2", "Take approximate binary logarithms on a GPU.")
mitchell_exp2 = _unary("exp2", "mitchell_exp2", "Raise 2 to approximate powers on a GPU.")


def mitchell_mul_grad(
    a: Any, b: Any, dy: Any, *, multiplier: Multiplier | None = None, mode: str = "exact", stream: Any = None
) -> tuple[Any, Any]:
    """Differentiate `mitchell_mul` with respect to its operands, on a GPU.

    Parameters
    ----------
    a : array of float16, bfloat16, float32 or float64
        The first operand: on a GPU, of any strides.
    b : array
        The second one, of the same dtype and device; its shape broadcasts with that of `a`.
    dy : array
        The gradient of the result, of the broadcast shape.
    multiplier : fastops.Multiplier, optional
        That of the product.
    mode : {"exact", "ste", "mimic"}
        As in `fastops.mitchell_mul_grad`.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Returns
    -------
    da : array
        New, of the library of `a`, summed to its shape. The call returns before the kernel has run.
    db : array
        Likewise for `b`.

    Raises
    ------
    RuntimeError
        No GPU.
    TypeError
        An argument that is not an array on a GPU, of another dtype, or within autograd.
    ValueError
        Shapes that do not fit, arrays on different devices, an unknown `mode`.

    Notes
    -----
    The bits of `fastops.mitchell_mul_grad` where nothing is summed; sums have another order than the CPU's, which depends on the
    shapes alone. Five elements of traffic; sums of few elements take memory for at most 1024 parts of them.
    A. Kosson and M. Jaggi, NeurIPS 2023, section 3.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     x = torch.ones(2, device="cuda")
    ...     da, db = fastops.cuda.mitchell_mul_grad(x, x, x)
    """
    return _gradients("mul", a, b, dy, multiplier, mode, stream)


def mitchell_div_grad(
    a: Any, b: Any, dy: Any, *, multiplier: Multiplier | None = None, mode: str = "exact", stream: Any = None
) -> tuple[Any, Any]:
    """Differentiate `mitchell_div` with respect to its operands, on a GPU.

    Parameters
    ----------
    a : array of float16, bfloat16, float32 or float64
        The numerator: on a GPU, of any strides.
    b : array
        The denominator, of the same dtype and device; its shape broadcasts with that of `a`.
    dy : array
        The gradient of the result, of the broadcast shape.
    multiplier : fastops.Multiplier, optional
        That of the quotient; one that defines `div`.
    mode : {"exact", "ste", "mimic"}
        As in `fastops.mitchell_div_grad`.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Returns
    -------
    da, db : array
        As `mitchell_mul_grad`.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As `mitchell_mul_grad`; a `multiplier` without `div`.

    Notes
    -----
    The bits of `fastops.mitchell_div_grad` where nothing is summed. A. Kosson and M. Jaggi, NeurIPS 2023, section 3.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     x = torch.ones(2, device="cuda")
    ...     da, db = fastops.cuda.mitchell_div_grad(x, x, x)
    """
    return _gradients("div", a, b, dy, multiplier, mode, stream)


def lmul(a: Any, b: Any, *, out: Any = None, stream: Any = None) -> Any:
    """Multiply by L-Mul, element by element, on a GPU.

    Parameters
    ----------
    a, b : array or number
        As in `mitchell_mul`.
    out : array, optional
        As in `mitchell_mul`.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Returns
    -------
    array
        As `mitchell_mul` with ``Multiplier("lmul")``.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As `mitchell_mul`.

    Notes
    -----
    The bits of `fastops.lmul` on CPUs with FMA. Luo and Sun, arXiv 2410.00907.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     y = fastops.cuda.lmul(torch.ones(2, device='cuda'), 3.0)
    """
    return _apply("mul", a, b, _LMUL, out, stream)
