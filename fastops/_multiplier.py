# SPDX-License-Identifier: BSD-3-Clause
"""The description of an approximate multiplier: which form, which correction constant, how many mantissa bits.

A description computes nothing itself. It turns into an `OpSpec` per operation, which every backend (and the C ABI)
takes.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import numpy as np

from . import _validate

if TYPE_CHECKING:
    from .analysis import Distribution, ErrorStats

__all__ = ["COMPENSATIONS", "OPS", "Multiplier", "OpSpec"]

OPS: Final = ("mul", "div", "square", "reciprocal", "sqrt", "rsqrt", "log2", "exp2")
COMPENSATIONS: Final = ("none", "zero-mean", "min-mse", "minimax", "lmul", "lmul-equation")
SEGMENTS: Final = (2, 4, 8, 16)
SUBNORMALS: Final = ("keep", "flush")

LOG_ADD: Final = 0
EQUATION: Final = 1
ITERATIVE: Final = 2

# Log-domain constants over uniform mantissas; those of mul and div are the printed integers on float32's bits.
_CONSTANTS: Final[dict[str, dict[str, float]]] = {
    "zero-mean": {
        "mul": 474991 / 2**23,
        "div": -486498 / 2**23,
        "square": 0.056374,
        "reciprocal": -0.115470,
        "sqrt": -0.028888,
        "rsqrt": -0.086279,
    },
    "min-mse": {
        "mul": 463511 / 2**23,
        "div": -498358 / 2**23,
        "square": 0.053301,
        "reciprocal": -0.118772,
        "sqrt": -0.028795,
        "rsqrt": -0.087618,
    },
    "minimax": {
        "mul": 578814 / 2**23,
        "div": -629146 / 2**23,
        "square": 0.0688,
        "reciprocal": -0.1010,
        "sqrt": -0.0366,
        "rsqrt": -0.0673,
    },
}


class OpSpec(NamedTuple):
    """What one operation of a multiplier needs; mirrors `fastops_mitchell_params` of the C ABI."""

    form: int
    """0: add of logarithms with carry (Mitchell); 1: L-Mul's equation, no carry; 2: iterative (Babic)."""
    flush: int
    """1: subnormal operands and results count as zeros."""
    corrections: int
    """Correction blocks of the iterative form."""
    mantissa_bits: int
    """Mantissa bits that take part; 0 for all."""
    segments: int
    """Segments an axis of the table; 0 without a table."""
    c: float
    """The constant added to the logarithm; it counts where there is no table."""
    table: tuple[float, ...]
    """Constants per segment: row-major, the first operand's segment is the row; one row for unary operations."""


class Multiplier:
    """An immutable description of an approximate multiplier.

    Parameters
    ----------
    compensation : str or float, default "none"
        What is added to the sum of the two logarithms. "none": nothing (Mitchell 1962). "zero-mean", "min-mse",
        "minimax": the constant that is best in that sense over uniform mantissas, one per operation. "lmul": L-Mul's
        2**-l(m), the carry going into the exponent. "lmul-equation": L-Mul's equation as printed, no carry. A float in
        (-0.5, 0.5): that constant, for every operation.
    segments : {2, 4, 8, 16}, optional
        One constant of least mean squared error per segment (pair of segments) of the mantissas; `compensation` is then
        "none" or "min-mse", which mean the same here.
    mantissa_bits : int in [1, 52], optional
        The operands' mantissas are truncated to so many bits first; more than the dtype has changes nothing.
    subnormals : {"keep", "flush"}, default "keep"
        "flush" takes subnormal operands and results as signed zeros, as cheap hardware does.
    corrections : {0, 1, 2, 3}, optional
        Babic's iterative multiplier with so many correction blocks; with `compensation` "none" and no `segments`.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        A value outside those above, or two arguments that exclude each other.

    Notes
    -----
    With a = s 2**ea (1 + x) and b likewise, the product is s 2**(ea + eb) PL(x + y + c), with
    PL(S) = 2**floor(S) (1 + S - floor(S)). The constant is rounded once per dtype to a multiple of 2**-M, M the dtype's
    mantissa bits. It costs nothing, and it costs exactness at powers of two: 1 * 1 gives 1 + c. Mitchell, IRE Trans.
    EC-11, 1962; Saadat et al. (REALM), DATE 2020; Luo & Sun (L-Mul), arXiv 2410.00907; Babic et al., Microprocessors
    and Microsystems 35, 2011.

    Instances are hashable, compare by value, pickle, and threads may share them.

    Examples
    --------
    >>> from fastops import Multiplier
    >>> Multiplier("min-mse", mantissa_bits=7)
    Multiplier('min-mse', mantissa_bits=7)
    >>> float(Multiplier().mul(1.5, 1.5)), float(Multiplier(segments=16).mul(1.5, 1.5))
    (2.0, 2.220...)
    """

    __slots__ = ("_compensation", "_corrections", "_hash", "_mantissa_bits", "_segments", "_subnormals")

    _compensation: str | float
    _segments: int | None
    _mantissa_bits: int | None
    _subnormals: str
    _corrections: int | None
    _hash: int

    def __init__(
        self,
        compensation: str | float = "none",
        *,
        segments: int | None = None,
        mantissa_bits: int | None = None,
        subnormals: str = "keep",
        corrections: int | None = None,
    ) -> None:
        compensation = _check_compensation(compensation)
        if segments is not None:
            segments = _validate.integer("segments", segments, 2, 16)
            if segments not in SEGMENTS:
                raise _validate.wrong_value("segments", "2, 4, 8, 16 or None", segments)
            if compensation not in ("none", "min-mse"):
                raise _validate.wrong_value("compensation", "'none' or 'min-mse' where segments is given", compensation)
        if mantissa_bits is not None:
            mantissa_bits = _validate.integer("mantissa_bits", mantissa_bits, 1, 52)
        subnormals = _validate.choice("subnormals", subnormals, SUBNORMALS)
        if corrections is not None:
            corrections = _validate.integer("corrections", corrections, 0, 3)
            if compensation != "none":
                raise _validate.wrong_value("compensation", "'none' where corrections is given", compensation)
            if segments is not None:
                raise _validate.wrong_value("segments", "None where corrections is given", segments)
        fields = (compensation, segments, mantissa_bits, subnormals, corrections)
        for name, value in zip(_FIELDS, fields, strict=True):
            object.__setattr__(self, f"_{name}", value)
        object.__setattr__(self, "_hash", hash(fields))

    @property
    def compensation(self) -> str | float:
        """The name of the constant, or the constant."""
        return self._compensation

    @property
    def segments(self) -> int | None:
        """Segments an axis of the table of constants, or None."""
        return self._segments

    @property
    def mantissa_bits(self) -> int | None:
        """Mantissa bits that take part, or None for all."""
        return self._mantissa_bits

    @property
    def subnormals(self) -> str:
        """ "keep" or "flush"."""
        return self._subnormals

    @property
    def corrections(self) -> int | None:
        """Correction blocks of the iterative multiplier, or None."""
        return self._corrections

    def _fields(self) -> tuple[str | float, int | None, int | None, str, int | None]:
        return self._compensation, self._segments, self._mantissa_bits, self._subnormals, self._corrections

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"Multiplier is immutable: make a new one instead of setting {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"Multiplier is immutable: {name} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if isinstance(other, Multiplier) else NotImplemented

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        parts = [repr(self._compensation)] if self._compensation != "none" else []
        for name, value, default in zip(_FIELDS[1:], self._fields()[1:], (None, None, "keep", None), strict=True):
            if value != default:
                parts.append(f"{name}={value!r}")
        return f"Multiplier({', '.join(parts)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._fields()

    def _form(self) -> int:
        if self._corrections is not None:
            return ITERATIVE
        return EQUATION if self._compensation == "lmul-equation" else LOG_ADD

    def _has(self, op: str) -> bool:
        """Whether `op` is defined: L-Mul and the iterative multiplier are multipliers only."""
        only_multiplies = self._corrections is not None or self._compensation in ("lmul", "lmul-equation")
        return op in ("mul", "square") or not only_multiplies

    def spec(self, op: str) -> OpSpec:
        """What a backend needs for `op`, one of "mul", "div", "square", "reciprocal", "sqrt", "rsqrt", "log2", "exp2".

        Parameters
        ----------
        op : str
            The operation.

        Returns
        -------
        OpSpec
            Form, options and constants. "log2" and "exp2" are Mitchell's own approximations: of the options they heed
            `subnormals` only.

        Raises
        ------
        ValueError
            An unknown operation, or one that this multiplier does not define.

        Examples
        --------
        >>> from fastops import Multiplier
        >>> Multiplier("lmul").spec("mul").c
        0.0625
        """
        _validate.choice("op", op, OPS)
        flush = int(self._subnormals == "flush")
        if op in ("log2", "exp2"):
            return OpSpec(LOG_ADD, flush, 0, 0, 0, 0.0, ())
        if not self._has(op):
            raise ValueError(f"op must be 'mul' or 'square' for {self!r}, which is a multiplier only, got {op!r}")
        bits = self._mantissa_bits or 0
        if self._segments is not None:
            from ._segments import segment_table

            return OpSpec(LOG_ADD, flush, 0, bits, self._segments, 0.0, segment_table(op, self._segments))
        return OpSpec(self._form(), flush, self._corrections or 0, bits, 0, self._constant(op), ())

    def _constant(self, op: str) -> float:
        if isinstance(self._compensation, float):
            return self._compensation
        if self._compensation in ("lmul", "lmul-equation"):
            bits = self._mantissa_bits or 52
            return math.ldexp(1.0, -(bits if bits <= 3 else 3 if bits == 4 else 4))
        return _CONSTANTS[self._compensation][op] if self._compensation != "none" else 0.0

    def _token(self) -> str:
        """The description as text for a name: letters, digits and underscores, parts split by two underscores."""
        c = self._compensation
        if isinstance(c, float):
            text = c.hex().replace(".", "_").replace("-", "m").replace("+", "")
        else:
            text = c.replace("-", "_")
        parts = [f"c_{text}"]
        for letter, value in (("s", self._segments), ("m", self._mantissa_bits), ("k", self._corrections)):
            if value is not None:
                parts.append(f"{letter}{value}")
        if self._subnormals == "flush":
            parts.append("flush")
        return "__".join(parts)

    @classmethod
    def _from_token(cls, token: str) -> Multiplier:
        """The multiplier whose `_token` this is; ValueError for any other text."""
        first, *rest = token.split("__")
        options: dict[str, Any] = {}
        names = {"s": "segments", "m": "mantissa_bits", "k": "corrections"}
        for part in rest:
            if part == "flush":
                options["subnormals"] = part
            elif part[:1] in names and part[1:].isascii() and part[1:].isdigit():
                options[names[part[0]]] = int(part[1:])
        text = first.removeprefix("c_")
        c: str | float = text.replace("_", "-")
        if text.lstrip("m").startswith("0x"):
            c = float.fromhex(text.replace("_", ".", 1).replace("m", "-"))
        multiplier = cls(c, **options)
        if multiplier._token() != token:
            raise _validate.wrong_value("name", "one that a Multiplier's operations have", token)
        return multiplier

    def _op_name(self, op: str) -> str:
        """The public name of an operation, under which `fastops` finds it again: pickles of it hold this name."""
        if op == "mul" and self == Multiplier("lmul"):
            return "lmul"
        return f"mitchell_{op}" if self == Multiplier() else f"mitchell_{op}__{self._token()}"

    def _op(self, op: str) -> Any:
        if not self._has(op):
            raise AttributeError(f"{self!r} has no {op}: it is a multiplier only (mul, square, matmul, conv2d)")
        return _backend().mitchell_op(op, self)

    @property
    def mul(self) -> Any:
        """Element-wise product ``mul(a, b)``: a ufunc (a function with `out` and `where` on the fallback backends)."""
        return self._op("mul")

    @property
    def div(self) -> Any:
        """Element-wise quotient ``div(a, b)``."""
        return self._op("div")

    @property
    def square(self) -> Any:
        """Element-wise square ``square(a)``."""
        return self._op("square")

    @property
    def reciprocal(self) -> Any:
        """Element-wise reciprocal ``reciprocal(a)``."""
        return self._op("reciprocal")

    @property
    def sqrt(self) -> Any:
        """Element-wise square root ``sqrt(a)``."""
        return self._op("sqrt")

    @property
    def rsqrt(self) -> Any:
        """Element-wise reciprocal square root ``rsqrt(a)``."""
        return self._op("rsqrt")

    def matmul(self, a: Any, b: Any, out: Any = None) -> Any:
        """Matrix product with this multiplier: `fastops.mitchell_matmul` with ``multiplier=self``.

        Parameters
        ----------
        a : (..., M, K) float array
            Any strides; the leading dimensions broadcast with those of `b`.
        b : (..., K, N) float array
            Of `a`'s dtype, or promoted with it to the common one.
        out : (..., M, N) array, optional
            Where the result goes.

        Returns
        -------
        (..., M, N) array
            Of the operands' common dtype.

        Raises
        ------
        TypeError, ValueError
            As `fastops.mitchell_matmul`.

        Examples
        --------
        >>> import numpy as np
        >>> from fastops import Multiplier
        >>> Multiplier().matmul(np.full((1, 2), 1.5), np.full((2, 1), 1.5))
        array([[4.]])
        """
        from . import mitchell

        return mitchell.mitchell_matmul(a, b, multiplier=self, out=out)

    def conv2d(
        self,
        x: Any,
        w: Any,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        out: Any = None,
    ) -> Any:
        """2-D convolution with this multiplier: `fastops.mitchell_conv2d` with ``multiplier=self``.

        Parameters
        ----------
        x : (N, C, H, W) float array
            The images.
        w : (O, C / groups, KH, KW) float array
            The kernels, of `x`'s dtype.
        stride, padding, dilation : int or (int, int)
            In pixels, vertical first.
        groups : int
            Into how many independent parts the channels are split.
        out : (N, O, OH, OW) array, optional
            Where the result goes.

        Returns
        -------
        (N, O, OH, OW) array
            Of the operands' common dtype.

        Raises
        ------
        TypeError, ValueError
            As `fastops.mitchell_conv2d`.

        Examples
        --------
        >>> import numpy as np
        >>> from fastops import Multiplier
        >>> Multiplier().conv2d(np.full((1, 1, 2, 2), 1.5), np.full((1, 1, 2, 2), 1.5))
        array([[[[8.]]]])
        """
        from . import mitchell

        return mitchell.mitchell_conv2d(
            x, w, stride=stride, padding=padding, dilation=dilation, groups=groups, multiplier=self, out=out
        )

    def table(self, bits: int) -> np.ndarray[Any, np.dtype[Any]]:
        """The products of all pairs of unsigned `bits`-bit integers.

        Parameters
        ----------
        bits : int in [1, 12]
            The width of the operands.

        Returns
        -------
        (2**bits, 2**bits) array
            Entry [i, j] is the product of i and j; uint16 up to 8 bits, uint32 above.

        Raises
        ------
        TypeError, ValueError
            `bits` that is no integer, or out of its range.

        Notes
        -----
        With ``bits=8`` it is what `fastops.lut_matmul` takes for unsigned operands.

        Examples
        --------
        >>> from fastops import Multiplier
        >>> int(Multiplier().table(8).sum(dtype="int64"))
        1025628691
        """
        bits = _validate.integer("bits", bits, 1, 12)
        values = np.arange(2**bits, dtype=np.uint8 if bits <= 8 else np.uint16)
        table: np.ndarray[Any, np.dtype[Any]] = self.mul(values[:, np.newaxis], values[np.newaxis, :])
        return table

    def error_stats(self, dtype_or_bits: Any, distribution: Distribution = "uniform") -> ErrorStats:
        """The error of ``mul`` against the exact product, with EvoApproxLib's names.

        Parameters
        ----------
        dtype_or_bits : dtype or int
            A floating-point dtype (mantissas of it), an integer dtype, or the width in bits of unsigned integers.
        distribution : "uniform", "normal" or array, default "uniform"
            The operands, as in `fastops.analysis.error_stats`.

        Returns
        -------
        fastops.analysis.ErrorStats
            The figures, one attribute each.

        Raises
        ------
        TypeError, ValueError
            As `fastops.analysis.error_stats`.

        Examples
        --------
        >>> from fastops import Multiplier
        >>> Multiplier().error_stats(8).wce
        4096.0
        """
        from .analysis import error_stats

        return error_stats(self, dtype_or_bits, distribution)


_FIELDS: Final = ("compensation", "segments", "mantissa_bits", "subnormals", "corrections")


def _rebuild(
    compensation: str | float, segments: Any, mantissa_bits: Any, subnormals: str, corrections: Any
) -> Multiplier:
    return Multiplier(
        compensation, segments=segments, mantissa_bits=mantissa_bits, subnormals=subnormals, corrections=corrections
    )


def _backend() -> ModuleType:
    from ._backend import backend

    return backend


def _check_compensation(value: object) -> str | float:
    if isinstance(value, str):
        return _validate.choice("compensation", str(value), COMPENSATIONS)
    wanted = "a name or a finite number in (-0.5, 0.5)"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise _validate.wrong_type("compensation", wanted, value)
    try:
        c = float(value) + 0.0  # -0.0 becomes 0.0: equal descriptions have one text
    except OverflowError:
        raise _validate.wrong_value("compensation", wanted, value) from None
    if not abs(c) < 0.5:
        raise _validate.wrong_value("compensation", wanted, c)
    return c
