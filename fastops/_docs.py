# SPDX-License-Identifier: BSD-3-Clause
"""The docstrings of the element-wise operations, shared by the backends (a ufunc takes its text when it is made)."""

from __future__ import annotations

from ._multiplier import Multiplier

_KEYWORDS = """out : ndarray or tuple of ndarray, optional
    Where the result goes; a fresh array otherwise.
where : array_like of bool, optional
    Elements where it is False keep what `out` held.
casting : str, optional
    What `numpy.can_cast` must allow of operands and result (native backend; "same_kind" by default).
order : {"K", "A", "C", "F"}, optional
    The memory order of a fresh result (native backend).
dtype : dtype, optional
    The dtype of the result, which picks the loop.
subok : bool, optional
    Whether subclasses of ndarray pass through (native backend; they do by default).
signature : str or tuple of dtype, optional
    The loop by its dtypes (native backend)."""

_PARAMETERS_1 = """x : array_like
    {accepts}
"""

_PARAMETERS_2 = """x1 : array_like
    {accepts}
x2 : array_like
    Likewise; the shapes broadcast.
"""

_FLOATS = "Float16, bfloat16 (with ml_dtypes), float32 or float64; integers are cast to float as NumPy does."
_INTEGERS = (
    "Float16, bfloat16 (with ml_dtypes), float32, float64 or any integer; integers give the next wider integer (64-bit "
    "ones stay and wrap)."
)

_TEMPLATE = """{summary}

Parameters
----------
{parameters}{keywords}

Returns
-------
ndarray or scalar
    {returns}

Raises
------
TypeError
    No loop for the dtypes, or a result that does not cast to the dtype of `out`.
ValueError
    Shapes that do not broadcast, or a read-only `out`.

Notes
-----
{notes}

Examples
--------
{examples}
"""

_SPECIALS = (
    "Subnormal numbers take part with their true exponent and the result is rounded once, to nearest even. Zeros,\n"
    "infinities and NaN give what {exact} gives."
)

_SOURCE = 'J. N. Mitchell, "Computer multiplication and division using binary logarithms", IRE Trans. EC-11, 1962.'

# op: (summary, accepts, returns, notes, examples)
_TEXTS: dict[str, tuple[str, str, str, str, str]] = {
    "mul": (
        "Multiply element-wise by adding approximate logarithms.",
        _INTEGERS,
        "The product, with a relative error in [-1/9, 0]; exact where an operand is a power of two.",
        "With a = 2^i (1 + x) and b = 2^j (1 + y) the product is 2^(i+j) (1 + x + y), or 2^(i+j+1) (x + y) once x + y >= 1:\n"
        "log2(1 + x) is taken to be x. One integer addition of the bit patterns does it.\n"
        + _SPECIALS.format(exact="`numpy.multiply`")
        + "\nSmall integers need `dtype=` in `reduce` and `accumulate`, since the loops widen.\n"
        "Mean relative error over uniform mantissas: -3.85 %, root mean square 4.84 %.",
        ">>> import fastops\n>>> float(fastops.mitchell_mul(3.0, 3.0))\n8.0\n>>> float(fastops.mitchell_mul(4.0, 2.5))\n10.0",
    ),
    "div": (
        "Divide element-wise by subtracting approximate logarithms.",
        _FLOATS,
        "The quotient, with a relative error in [0, 1/8]; exact where x2 is a power of two.",
        "With a = 2^i (1 + x) and b = 2^j (1 + y) the quotient is 2^(i-j) (1 + x - y), or 2^(i-j-1) (2 + x - y) where x < y.\n"
        + _SPECIALS.format(exact="`numpy.divide`")
        + "\nMean relative error over uniform mantissas: +4.10 %, root mean square 5.23 %.",
        ">>> import fastops\n>>> float(fastops.mitchell_div(2.0, 1.5))\n1.5",
    ),
    "square": (
        "Square element-wise by doubling the approximate logarithm.",
        _INTEGERS,
        "The square, with a relative error in [-1/9, 0].",
        "The same as `mitchell_mul(x, x)`.\n" + _SPECIALS.format(exact="`numpy.square`"),
        ">>> import fastops\n>>> float(fastops.mitchell_square(3.0))\n8.0",
    ),
    "reciprocal": (
        "Take the reciprocal element-wise by negating the approximate logarithm.",
        _FLOATS,
        "The reciprocal, with a relative error in [0, 1/8].",
        "The same as `mitchell_div(1, x)`.\n" + _SPECIALS.format(exact="`numpy.reciprocal`"),
        ">>> import fastops\n>>> float(fastops.mitchell_reciprocal(1.5))\n0.75",
    ),
    "sqrt": (
        "Take the square root element-wise by halving the approximate logarithm.",
        _FLOATS,
        "The square root of x with a relative error in [0, 6.07 %]; exact where x is an even power of two.",
        "Half of e + x, the approximate logarithm of 2^e (1 + x), goes through the inverse approximation.\n"
        + _SPECIALS.format(exact="`numpy.sqrt`"),
        ">>> import fastops\n>>> float(fastops.mitchell_sqrt(2.0))\n1.5",
    ),
    "rsqrt": (
        "Take the reciprocal square root element-wise by halving the approximate logarithm.",
        _FLOATS,
        "The reciprocal square root, with a relative error in [0, 8.87 %]; exact where x is an even power of two.",
        "Minus half of e + x, the approximate logarithm of 2^e (1 + x), goes through the inverse approximation.\n"
        + _SPECIALS.format(exact="`1 / numpy.sqrt`"),
        ">>> import fastops\n>>> float(fastops.mitchell_rsqrt(4.0))\n0.5",
    ),
    "log2": (
        "Approximate the base-2 logarithm element-wise by reading the exponent and the mantissa.",
        _FLOATS,
        "The sum e + x for 2^e (1 + x): an absolute error in [-0.0861, 0] before rounding; exact at powers of two.",
        (
            "log2(1 + x) is taken to be x, for subnormal numbers too; the result is rounded once. Zeros, negative numbers,\n"
            "infinities and NaN give what `numpy.log2` gives."
        ),
        ">>> import fastops\n>>> float(fastops.mitchell_log2(3.0))\n1.5",
    ),
    "exp2": (
        "Approximate 2**x element-wise by writing the exponent and the mantissa.",
        _FLOATS,
        "The power 2^floor(x) (1 + x - floor(x)): a relative error in [0, 6.15 %]; exact at integers.",
        (
            "The inverse of `mitchell_log2`; the result is rounded once, with gradual underflow. Infinities and NaN give what\n"
            "`numpy.exp2` gives."
        ),
        ">>> import fastops\n>>> float(fastops.mitchell_exp2(1.5))\n3.0",
    ),
}

_LMUL = (
    "Multiply element-wise as L-Mul does: an integer addition of the bit patterns with an offset.",
    _INTEGERS,
    "The product, with a relative error in [-7.29 %, +6.25 %] for every float dtype here.",
    '`Multiplier("lmul").mul`: Mitchell\'s product with 2^-l added to the sum of the mantissas, l = 4 for mantissas of more\n'
    "than 4 bits, 3 for 4 bits, and the width itself below.\n"
    + _SPECIALS.format(exact="`numpy.multiply`")
    + '\nH. Luo, W. Sun, "Addition is all you need for energy-efficient language models", arXiv 2410.00907, 2024. The\n'
    'integer form carries into the exponent; `Multiplier("lmul-equation")` is the paper\'s equation, which does not.',
    ">>> import fastops\n>>> float(fastops.lmul(1.0, 1.0))\n1.0625",
)


def ufunc_doc(name: str, op: str, multiplier: Multiplier) -> str:
    """The docstring of an element-wise operation under a multiplier."""
    summary, accepts, returns, notes, examples = _LMUL if name == "lmul" else _TEXTS[op]
    if name != "lmul" and name != f"mitchell_{op}":
        summary = f"{summary[:-1]}, under {multiplier!r}."
        returns = "The approximation under the options of the multiplier."
        notes = "The same operation without options:\n" + notes
        examples = f">>> import fastops\n>>> fastops.{multiplier!r}.{op} is fastops.{name}\nTrue"
    elif name != "lmul":
        notes += "\n" + _SOURCE
    parameters = (_PARAMETERS_2 if op in ("mul", "div") else _PARAMETERS_1).format(accepts=accepts)
    return _TEMPLATE.format(
        summary=summary, parameters=parameters, keywords=_KEYWORDS, returns=returns, notes=notes, examples=examples
    )
