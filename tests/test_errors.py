# SPDX-License-Identifier: BSD-3-Clause
"""Wrong calls: the type of the error, that its text names the argument, what came and what was wanted, and that nothing was written."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastops
from fastops import _backend
from fastops.analysis import error_stats

M = fastops.Multiplier
A = np.full((3, 4), 1.5, np.float32)
B = np.full((4, 5), 1.25, np.float32)
DY = np.ones((3, 5), np.float32)
X = np.full((2, 4, 6, 7), 1.5, np.float32)
W = np.full((6, 4, 3, 3), 1.5, np.float32)
BYTES = np.full((3, 3), 7, np.uint8)
TABLE = np.zeros((256, 256), np.int32)
SECRET = 98765.4321


class Wrong(NamedTuple):
    call: Callable[..., Any]
    """Called with `out`, an array full of a sentinel, where it takes one."""
    kind: type[Exception]
    name: str
    wanted: str
    got: str
    out: tuple[tuple[int, ...], str] | None = None


def _matmul(**change: Any) -> Callable[..., Any]:
    return lambda out=None: fastops.mitchell_matmul(**{"a": A, "b": B, "out": out, **change})


def _conv(**change: Any) -> Callable[..., Any]:
    return lambda out=None: fastops.mitchell_conv2d(**{"x": X, "w": W, "out": out, **change})


def _conv_grad(**change: Any) -> Callable[..., Any]:
    dy = np.ones((2, 6, 4, 5), np.float32)
    return lambda: fastops.mitchell_conv2d_grad(**{"x": X, "w": W, "dy": dy, **change})


def _lut(**change: Any) -> Callable[..., Any]:
    return lambda out=None: fastops.lut_matmul(**{"a": BYTES, "b": BYTES, "table": TABLE, "out": out, **change})


def _grad(function: Callable[..., Any], **change: Any) -> Callable[..., Any]:
    return lambda: function(**{"a": A, "b": A, "dy": A, **change})


def _lists(count: int) -> list[list[Any]]:
    return [[np.full(3, 1.5, np.float32), np.full((2, 2), SECRET, np.float32)] for _ in range(count)]


def _ema(**change: Any) -> Callable[..., Any]:
    return lambda: fastops.ema_update_(**dict(zip(("shadows", "params"), _lists(2), strict=True), decay=0.5) | change)


def _sgd(**change: Any) -> Callable[..., Any]:
    names = ("params", "grads", "momentum_buffers")
    return lambda: fastops.sgd_step_(**dict(zip(names, _lists(3), strict=True), lr=0.1) | change)


def _adamw(**change: Any) -> Callable[..., Any]:
    names = ("params", "grads", "exp_avg", "exp_avg_sq")
    return lambda: fastops.adamw_step_(**dict(zip(names, _lists(4), strict=True), step=1, lr=0.1) | change)


def _lazy(**change: Any) -> Callable[..., Any]:
    names = ("params", "grads", "exp_avg", "exp_avg_sq")
    rows = [np.array([2, 0, 1]), np.array([1, 0])]
    lists = dict(zip(names, _lists(4), strict=True), rows=rows, step=1, lr=0.1)
    return lambda: fastops.lazy_adamw_rows_(**lists | change)


def _adaptive(**change: Any) -> Callable[..., Any]:
    names = ("params", "grads", "momentum", "update", "gain")
    return lambda: fastops.adaptive_eg_step_(
        **dict(zip(names, _lists(5), strict=True), scales=np.ones(2), lr=0.1) | change
    )


def _rows(**sizes: int) -> dict[str, Any]:
    """q, k and v of (B, H, N, D)."""
    b, h, heads, n, m, d, e = ({"b": 2, "h": 4, "heads": 2, "n": 5, "m": 6, "d": 3, "e": 7} | sizes).values()
    shapes = {"q": (b, h, n, d), "k": (b, heads, m, d), "v": (b, heads, m, e)}
    return {name: np.full(shape, SECRET, np.float32) for name, shape in shapes.items()}


def _attend(**change: Any) -> Callable[..., Any]:
    return lambda out=None: fastops.linear_attention(**_rows() | {"out": out} | change)


def _causal(**change: Any) -> Callable[..., Any]:
    return _attend(causal=True, **change)


def _softmax(**change: Any) -> Callable[..., Any]:
    return lambda out=None: fastops.softmax_attention(**_rows() | {"out": out} | change)


def _nystrom(**change: Any) -> Callable[..., Any]:
    return lambda out=None: fastops.nystrom_attention(**_rows() | {"out": out} | change)


def _tapped(**change: Any) -> Callable[..., Any]:
    """Of as many queries as keys."""
    return _nystrom(**_rows(n=6) | change)


def _nystrom_backward(**change: Any) -> Callable[..., Any]:
    return lambda: fastops.nystrom_attention_backward(**_rows() | {"dy": np.full((2, 4, 5, 7), SECRET)} | change)


def _nystrom_onto(name: str) -> Callable[..., Any]:
    x = np.full((1, 2, 4, 1), SECRET, np.float32)
    given = {"conv_weight": x[0, :, :3, 0], "landmarks": (x, x.copy())}[name]
    return lambda: fastops.nystrom_attention(x.copy(), x.copy(), x.copy(), **{name: given}, out=x)


def _state(count: int = 2, d: int = 3, dtype: Any = np.float32) -> tuple[Any, ...]:
    return tuple(np.full(shape, SECRET, dtype) for shape in ((2, 2, d, 7), (2, 2, d), (2, 2, d))[:count])


def _step(**change: Any) -> Callable[..., Any]:
    def call(out: Any = None) -> Any:
        state = change.get("state", _state())
        before = [x.tobytes() for x in state] if isinstance(state, tuple) else []
        q, k, v = (x[:, :, 0] for x in _rows().values())
        try:
            return fastops.linear_attention_step_(**{"q": q, "k": k, "v": v, "state": state, "out": out} | change)
        finally:
            assert not before or before == [x.tobytes() for x in state]

    return call


def _backward(**change: Any) -> Callable[..., Any]:
    y = np.full((2, 4, 5, 7), SECRET, np.float32)
    return lambda: fastops.linear_attention_backward(**_rows() | {"dy": y, "y": y} | change)


def _attended_in_place() -> Any:
    x = np.full((1, 4, 4), SECRET, np.float32)
    return fastops.linear_attention(x, x.copy(), x.copy(), out=x)


def _attended_onto_decay() -> Any:
    x = np.full((1, 1, 4, 1), SECRET, np.float32)
    decay = np.zeros((1, 1, 4), np.float32)
    return fastops.linear_attention(x, x.copy(), x.copy(), causal=True, decay=decay, out=decay[..., np.newaxis])


def _frozen_state() -> Any:
    state = _state()
    state[1].flags.writeable = False
    return _step(state=state)()


def _shared_state() -> Any:
    s = np.full((2, 2, 3, 7), SECRET, np.float32)
    return _step(state=(s, s.reshape(-1)[:12].reshape(2, 2, 3)))()


def _state_of_keys() -> Any:
    state = _state()
    return _step(state=state, k=state[1])()


def _overlapping_out() -> Any:
    base = np.full(30, SECRET, np.float32)
    return fastops.mitchell_matmul(base[:12].reshape(3, 4), B, out=base[10:25].reshape(3, 5))


def _deep(array: Any, repeats: int) -> Any:
    """The array so many times along the first of as many dimensions as NumPy has."""
    most = 32 if np.lib.NumpyVersion(np.__version__) < "2.0.0" else 64
    return np.broadcast_to(array, (repeats,) + (1,) * (most - 1 - array.ndim) + array.shape)


def _out_is_a() -> Any:
    square = np.ones((4, 4))
    return fastops.mitchell_matmul(square, square, out=square)


def _folded_out() -> Any:
    base = np.zeros(3, np.float32)
    return fastops.mitchell_matmul(A, B, out=np.lib.stride_tricks.as_strided(base, (3, 5), (4, 0)))


def _read_only_out(out: Any) -> Any:
    out.flags.writeable = False
    return fastops.mitchell_matmul(A, B, out=out)


FLOATS = "float16, bfloat16, float32 or float64"
OUT = ((3, 5), "f4")
ROWS = ((2, 4, 5, 7), "f4")
CASES: dict[str, Wrong] = {
    # matrix products
    "matmul integers": Wrong(_matmul(a=A.astype(np.int32)), TypeError, "a", FLOATS, "int32", OUT),
    "matmul complex": Wrong(_matmul(b=B.astype(complex)), TypeError, "b", FLOATS, "complex128", OUT),
    "matmul long double": Wrong(
        _matmul(b=B.astype(np.longdouble)), TypeError, "b", FLOATS, str(np.dtype(np.longdouble)), OUT
    ),
    "matmul bool": Wrong(_matmul(a=A > 0), TypeError, "a", FLOATS, "bool", OUT),
    "matmul str": Wrong(_matmul(a="abc"), TypeError, "a", FLOATS, "<U3", OUT),
    "matmul None": Wrong(_matmul(a=None), TypeError, "a", FLOATS, "None", OUT),
    "matmul ragged": Wrong(_matmul(a=[[SECRET], [SECRET, 2.0]]), ValueError, "a", "an array", "list", OUT),
    "matmul masked": Wrong(_matmul(a=np.ma.masked_array(A)), TypeError, "a", "without a mask", "masked", OUT),
    "matmul inner": Wrong(_matmul(b=A), ValueError, "b", "(..., 4, N)", "(3, 4)", OUT),
    "matmul batch": Wrong(_matmul(a=np.ones((2, 3, 4)), b=np.ones((3, 4, 5))), ValueError, "b", "(2,)", "(3,)", OUT),
    "matmul 0-d": Wrong(_matmul(a=np.float32(SECRET)), ValueError, "a", "at least 1 dimension", "0-d", OUT),
    "matmul multiplier": Wrong(
        _matmul(multiplier="min-mse"), TypeError, "multiplier", "fastops.Multiplier", "'min-mse'", OUT
    ),
    "matmul multiplier class": Wrong(_matmul(multiplier=M), TypeError, "multiplier", "fastops.Multiplier", "type", OUT),
    "matmul out list": Wrong(_matmul(out=[[0.0] * 5] * 3), TypeError, "out", "an ndarray of dtype float32", "list"),
    "matmul out dtype": Wrong(_matmul(), TypeError, "out", "float32", "float64", ((3, 5), "f8")),
    "matmul out integer": Wrong(_matmul(), TypeError, "out", "float32", "int32", ((3, 5), "i4")),
    "matmul out byte order": Wrong(_matmul(), TypeError, "out", "float32", ">f4", ((3, 5), ">f4")),
    "matmul out shape": Wrong(_matmul(), ValueError, "out", "(3, 5)", "(5, 3)", ((5, 3), "f4")),
    "matmul out broadcast": Wrong(_matmul(), ValueError, "out", "(3, 5)", "(2, 3, 5)", ((2, 3, 5), "f4")),
    "matmul out read-only": Wrong(_read_only_out, ValueError, "out", "writable", "read-only", OUT),
    "matmul out is a": Wrong(
        _out_is_a,
        ValueError,
        "out",
        "apart from a",
        "overlaps a",
    ),
    "matmul out overlaps": Wrong(_overlapping_out, ValueError, "out", "apart from a", "overlaps a"),
    "matmul out folded": Wrong(_folded_out, ValueError, "out", "distinct in memory", "overlapping"),
    "matmul many dimensions": Wrong(
        lambda: fastops.mitchell_matmul(_deep(A, 2), _deep(B, 3)), ValueError, "b", "leading dimensions that", "(3, "
    ),
    "matmul structured": Wrong(
        _matmul(a=np.zeros((3, 4), [(f"field_{i}", "f4") for i in range(40)])), TypeError, "a", FLOATS, "..."
    ),
    "matmul too large": Wrong(
        _matmul(a=np.broadcast_to(np.float64(SECRET), (2**40, 1)), b=np.broadcast_to(np.float64(SECRET), (1, 2**40))),
        ValueError,
        "a and b",
        "2**63 bytes",
        "(1099511627776, 1099511627776)",
    ),
    "Multiplier.matmul": Wrong(lambda: M().matmul(A, A), ValueError, "b", "(..., 4, N)", "(3, 4)"),
    # gradients of matrix products
    "matmul_grad dy": Wrong(lambda: fastops.mitchell_matmul_grad(A, B, A), ValueError, "dy", "(3, 5)", "(3, 4)"),
    "matmul_grad dy dtype": Wrong(
        lambda: fastops.mitchell_matmul_grad(A, B, DY.astype(int)), TypeError, "dy", FLOATS, "int64"
    ),
    "matmul_grad mode": Wrong(
        lambda: fastops.mitchell_matmul_grad(A, B, DY, mode="mimik"),
        ValueError,
        "mode",
        "'mimic'",
        "'mimik'; did you mean 'mimic'?",
    ),
    "matmul_grad mode None": Wrong(
        lambda: fastops.mitchell_matmul_grad(A, B, DY, mode=None), TypeError, "mode", "'exact'", "None"
    ),
    # convolutions
    "conv2d 3-D": Wrong(_conv(x=X[0]), ValueError, "x", "(N, C, H, W)", "(4, 6, 7)"),
    "conv2d w 2-D": Wrong(_conv(w=A), ValueError, "w", "(O, C/groups, KH, KW)", "(3, 4)"),
    "conv2d channels": Wrong(_conv(w=W[:, :3]), ValueError, "w", "(O, 4, KH, KW)", "(6, 3, 3, 3)"),
    "conv2d groups": Wrong(
        _conv(groups=4), ValueError, "groups", "a divisor of the 4 channels of x and the 6 of w", "4"
    ),
    "conv2d groups zero": Wrong(_conv(groups=0), ValueError, "groups", "[1, 2147483647]", "0"),
    "conv2d groups float": Wrong(_conv(groups=2.0), TypeError, "groups", "an integer", "2.0"),
    "conv2d stride": Wrong(_conv(stride=0), ValueError, "stride", "[1,", "0"),
    "conv2d stride huge": Wrong(
        _conv(stride=(1, -(10**5000))), ValueError, "stride", "[1, 2147483647]", "an integer of 16610 bits"
    ),
    "conv2d stride pair": Wrong(_conv(stride=(1, 2, 3)), ValueError, "stride", "a pair", "3 items"),
    "conv2d stride bool": Wrong(_conv(stride=True), TypeError, "stride", "an integer", "True"),
    "conv2d padding": Wrong(_conv(padding=(0, -1)), ValueError, "padding", "[0,", "-1"),
    "conv2d padding str": Wrong(_conv(padding="same"), TypeError, "padding", "an integer", "'same'"),
    "conv2d dilation": Wrong(_conv(dilation=0), ValueError, "dilation", "[1,", "0"),
    "conv2d kernel": Wrong(_conv(dilation=3), ValueError, "w", "dilated height <= 6", "7"),
    "conv2d empty kernel": Wrong(_conv(w=W[:, :, :0]), ValueError, "w", "height >= 1", "(6, 4, 0, 3)"),
    "conv2d out": Wrong(_conv(), ValueError, "out", "(2, 6, 4, 5)", "(2, 6, 5, 4)", ((2, 6, 5, 4), "f4")),
    "conv2d_grad dy": Wrong(_conv_grad(stride=2), ValueError, "dy", "(2, 6, 2, 3)", "(2, 6, 4, 5)"),
    "conv2d_grad mode": Wrong(_conv_grad(mode="Exact"), ValueError, "mode", "'exact'", "'Exact'"),
    "Multiplier.conv2d": Wrong(lambda: M().conv2d(X, W, groups=3), ValueError, "groups", "a divisor", "3"),
    # tables
    "lut floats": Wrong(_lut(a=BYTES.astype(np.float32)), TypeError, "a", "uint8 or int8", "float32"),
    "lut int16": Wrong(_lut(b=BYTES.astype(np.int16)), TypeError, "b", "uint8 or int8", "int16"),
    "lut table dtype": Wrong(_lut(table=TABLE.astype(np.float64)), TypeError, "table", "an integer array", "float64"),
    "lut table shape": Wrong(_lut(table=TABLE[:16, :16]), ValueError, "table", "(256, 256)", "(16, 16)"),
    "lut table range": Wrong(_lut(table=TABLE.astype(np.int64) + 2**32), ValueError, "table", "2**32", "4294967296"),
    "lut table unsigned": Wrong(
        _lut(table=TABLE.astype(np.uint64) + np.uint64(2**63)), ValueError, "table", "2**32", str(2**63)
    ),
    "lut shapes": Wrong(_lut(b=BYTES[:2]), ValueError, "b", "(..., 3, N)", "(2, 3)"),
    "lut out dtype": Wrong(_lut(), TypeError, "out", "int32 or int64", "float32", ((3, 3), "f4")),
    "lut out too narrow": Wrong(_lut(table=TABLE + 2**30), TypeError, "out", "int64", "int32", ((3, 3), "i4")),
    # element-wise gradients
    "mul_grad shape": Wrong(_grad(fastops.mitchell_mul_grad, b=B), ValueError, "b", "(3, 4)", "(4, 5)"),
    "mul_grad many dimensions": Wrong(
        lambda: fastops.mitchell_mul_grad(_deep(A, 2), _deep(A, 3), A), ValueError, "b", "broadcasts with", "(3, "
    ),
    "mul_grad dy": Wrong(_grad(fastops.mitchell_mul_grad, dy=A[0]), ValueError, "dy", "(3, 4)", "(4,)"),
    "mul_grad dtype": Wrong(_grad(fastops.mitchell_mul_grad, a=A.astype(np.uint8)), TypeError, "a", FLOATS, "uint8"),
    "div_grad multiplier": Wrong(
        _grad(fastops.mitchell_div_grad, multiplier=M("lmul")), ValueError, "multiplier", "defines div", "lmul"
    ),
    "div_grad mode": Wrong(_grad(fastops.mitchell_div_grad, mode=3), TypeError, "mode", "'exact'", "3"),
    # multipliers
    "Multiplier name": Wrong(
        lambda: M("min_mse"), ValueError, "compensation", "'min-mse'", "'min_mse'; did you mean 'min-mse'?"
    ),
    "Multiplier long name": Wrong(lambda: M("m" * 500), ValueError, "compensation", "'minimax'", "mmm..."),
    "Multiplier constant": Wrong(lambda: M(0.5), ValueError, "compensation", "(-0.5, 0.5)", "0.5"),
    "Multiplier nan": Wrong(lambda: M(float("nan")), ValueError, "compensation", "(-0.5, 0.5)", "nan"),
    "Multiplier huge": Wrong(lambda: M(10**400), ValueError, "compensation", "(-0.5, 0.5)", "an integer of 1329 bits"),
    "Multiplier bits huge": Wrong(
        lambda: M(mantissa_bits=10**5000), ValueError, "mantissa_bits", "[1, 52]", "an integer of 16610 bits"
    ),
    "Multiplier list": Wrong(lambda: M([0.1]), TypeError, "compensation", "a name or a", "list"),
    "Multiplier segments": Wrong(lambda: M(segments=3), ValueError, "segments", "2, 4, 8, 16", "3"),
    "Multiplier segments float": Wrong(lambda: M(segments=4.0), TypeError, "segments", "an integer", "4.0"),
    "Multiplier both": Wrong(
        lambda: M("minimax", segments=4), ValueError, "compensation", "'none' or 'min-mse'", "'minimax'"
    ),
    "Multiplier bits": Wrong(lambda: M(mantissa_bits=0), ValueError, "mantissa_bits", "[1, 52]", "0"),
    "Multiplier subnormals": Wrong(
        lambda: M(subnormals="flus"), ValueError, "subnormals", "'flush'", "'flus'; did you mean 'flush'?"
    ),
    "Multiplier corrections": Wrong(lambda: M(corrections=4), ValueError, "corrections", "[0, 3]", "4"),
    "Multiplier corrections with": Wrong(
        lambda: M("lmul", corrections=1), ValueError, "compensation", "'none'", "'lmul'"
    ),
    "Multiplier corrections segments": Wrong(lambda: M(segments=2, corrections=1), ValueError, "segments", "None", "2"),
    "table bits": Wrong(lambda: M().table(13), ValueError, "bits", "[1, 12]", "13"),
    "table bits type": Wrong(lambda: M().table("8"), TypeError, "bits", "an integer", "'8'"),
    # analysis
    "optimal_offset op": Wrong(lambda: fastops.optimal_offset("mull"), ValueError, "op", "'mul'", "'mull'"),
    "optimal_offset objective": Wrong(
        lambda: fastops.optimal_offset("mul", objective="mae"), ValueError, "objective", "'mse'", "'mae'"
    ),
    "error_stats distribution": Wrong(
        lambda: error_stats(M(), 8, "gauss"), ValueError, "distribution", "'uniform'", "'gauss'"
    ),
    "error_stats exhaustive": Wrong(
        lambda: error_stats(M(), 8, exhaustive="no"), TypeError, "exhaustive", "True, False or None", "'no'"
    ),
    "error_stats overflow": Wrong(
        lambda: error_stats(M(), "f2", np.array([1e30])), ValueError, "distribution", "float16 holds", "larger ones"
    ),
    # moving averages and optimizer steps
    "ema decay": Wrong(_ema(decay=1.5), ValueError, "decay", "a finite number in [0, 1]", "1.5"),
    "ema decay nan": Wrong(_ema(decay=float("nan")), ValueError, "decay", "a finite number in [0, 1]", "nan"),
    "ema decay str": Wrong(_ema(decay="0.5"), TypeError, "decay", "a finite number", "'0.5'"),
    "ema decay bool": Wrong(_ema(decay=True), TypeError, "decay", "a finite number", "True"),
    "ema decay None": Wrong(_ema(decay=None), TypeError, "decay", "a finite number", "None"),
    "ema decay huge": Wrong(_ema(decay=10**400), TypeError, "decay", "a finite number", "an integer of 1329 bits"),
    "ema decays": Wrong(_ema(decay=[0.5] * 3), ValueError, "decay", "a number or 2 of them", "3"),
    "ema decays item": Wrong(_ema(decay=[0.5, -1.0]), ValueError, "decay[1]", "[0, 1]", "-1.0"),
    "ema rounding": Wrong(_ema(rounding="stochastik", seed=1), ValueError, "rounding", "'stochastic'", "did you mean"),
    "ema seed missing": Wrong(_ema(rounding="stochastic"), TypeError, "seed", "an integer in [0, ", "None"),
    "ema seed negative": Wrong(
        _ema(rounding="stochastic", seed=-1), ValueError, "seed", "[0, 18446744073709551615]", "-1"
    ),
    "ema seed float": Wrong(_ema(rounding="stochastic", seed=1.0), TypeError, "seed", "an integer", "1.0"),
    "ema seed without": Wrong(_ema(seed=3), ValueError, "seed", "None with rounding='nearest'", "3"),
    "ema str list": Wrong(_ema(shadows="abc"), TypeError, "shadows", "a list of arrays", "'abc'"),
    "ema dict": Wrong(_ema(params={"a": A}), TypeError, "params", "a list of arrays", "dict"),
    "ema number": Wrong(_ema(params=3), TypeError, "params", "a list of arrays", "3"),
    "ema None": Wrong(_ema(shadows=None), TypeError, "shadows", "a list of arrays", "None"),
    "ema lengths": Wrong(_ema(shadows=_lists(1)[0][:1]), ValueError, "shadows", "a list of 2 arrays", "1"),
    "ema integers": Wrong(
        _ema(shadows=[np.zeros(3, np.float32), np.zeros((2, 2), int)]),
        TypeError,
        "shadows[1]",
        "bfloat16, float32 or float64",
        "int64",
    ),
    "ema list of lists": Wrong(
        _ema(params=[[1.0], [SECRET]]), TypeError, "params[0]", "an array in host memory", "list"
    ),
    "ema shape": Wrong(_ema(shadows=_lists(1)[0][::-1]), ValueError, "shadows[0]", "(3,)", "(2, 2)"),
    "sgd lr": Wrong(_sgd(lr=-0.1), ValueError, "lr", "[0, inf)", "-0.1"),
    "sgd lr inf": Wrong(_sgd(lr=float("inf")), ValueError, "lr", "[0, inf)", "inf"),
    "sgd lr array": Wrong(_sgd(lr=np.ones(2)), TypeError, "lr", "a finite number", "an array of shape (2,)"),
    "sgd momentum": Wrong(_sgd(momentum=1.1), ValueError, "momentum", "[0, 1]", "1.1"),
    "sgd dampening": Wrong(_sgd(dampening=-1), ValueError, "dampening", "[0, 1]", "-1"),
    "sgd weight_decay": Wrong(_sgd(weight_decay=-1e-4), ValueError, "weight_decay", "[0, inf)", "-0.0001"),
    "sgd nesterov": Wrong(_sgd(nesterov=1), TypeError, "nesterov", "True or False", "1"),
    "sgd nesterov dampened": Wrong(
        _sgd(nesterov=True, dampening=0.5), ValueError, "nesterov", "False with dampening", "True"
    ),
    "sgd nesterov accumulated": Wrong(
        _sgd(nesterov=True, accumulate=(0, 2)), ValueError, "nesterov", "False with dampening or accumulate", "True"
    ),
    "sgd zero_grad": Wrong(_sgd(zero_grad="yes"), TypeError, "zero_grad", "True or False", "'yes'"),
    "sgd no buffers": Wrong(
        _sgd(momentum_buffers=None, momentum=0.9), ValueError, "momentum_buffers", "a list of arrays with", "None"
    ),
    "sgd accumulate": Wrong(_sgd(accumulate=4), TypeError, "accumulate", "a pair", "4"),
    "sgd accumulate three": Wrong(_sgd(accumulate=(1, 2, 3)), TypeError, "accumulate", "a pair", "(1, 2, 3)"),
    "sgd accumulate k": Wrong(_sgd(accumulate=(0, 0)), ValueError, "accumulate[1]", ">= 1", "0"),
    "sgd accumulate i": Wrong(_sgd(accumulate=(-1, 2)), ValueError, "accumulate[0]", ">= 0", "-1"),
    "sgd ema alone": Wrong(_sgd(ema=_lists(1)[0]), ValueError, "ema_decay", "given with ema", "None"),
    "sgd ema_decay alone": Wrong(_sgd(ema_decay=0.9), ValueError, "ema", "given with ema_decay", "None"),
    "sgd ema dtype": Wrong(
        _sgd(ema=[x.astype(np.float64) for x in _lists(1)[0]], ema_decay=0.9), TypeError, "ema[0]", "float32", "float64"
    ),
    "sgd wide gradient": Wrong(
        _sgd(grads=[x.astype(np.float64) for x in _lists(1)[0]]),
        TypeError,
        "grads[0]",
        "float16, bfloat16 or float32",
        "float64",
    ),
    "sgd half parameters": Wrong(
        _sgd(params=[np.zeros(x.shape, np.float16) for x in _lists(1)[0]]),
        TypeError,
        "params[0]",
        "float32 or float64",
        "float16",
    ),
    "adamw step": Wrong(_adamw(step=0), ValueError, "step", ">= 1", "0"),
    "adamw step float": Wrong(_adamw(step=1.0), TypeError, "step", "an integer", "1.0"),
    "adamw betas": Wrong(_adamw(betas=0.9), TypeError, "betas", "a pair", "0.9"),
    "adamw beta": Wrong(_adamw(betas=(0.9, 1.0)), ValueError, "betas[1]", "[0, 1)", "1.0"),
    "adamw eps": Wrong(_adamw(eps=-1e-8), ValueError, "eps", "[0, inf)", "-1e-08"),
    "adamw decoupled": Wrong(_adamw(decoupled=0), TypeError, "decoupled", "True or False", "0"),
    "adamw ema_decay": Wrong(
        _adamw(ema=_lists(1)[0], ema_decay=float("nan")), ValueError, "ema_decay", "[0, 1]", "nan"
    ),
    "lookahead alpha": Wrong(lambda: fastops.lookahead_sync_(*_lists(2), 2.0), ValueError, "alpha", "[0, 1]", "2.0"),
    "lazy state": Wrong(_lazy(state="freeze"), ValueError, "state", "'frozen'", "'freeze'"),
    "lazy rows": Wrong(_lazy(rows=[np.array([0, 1, 2])]), ValueError, "rows", "a list of 2 arrays", "1"),
    "lazy rows range": Wrong(
        _lazy(rows=[np.array([0, 1, 3]), np.array([0, 1])]), ValueError, "rows[0]", "[0, 3)", "indices from 0 to 3"
    ),
    "lazy rows negative": Wrong(
        _lazy(rows=[np.array([0, 1, 2]), np.array([0, -1])]), ValueError, "rows[1]", "[0, 2)", "indices from -1 to 0"
    ),
    "lazy rows repeated": Wrong(
        _lazy(rows=[np.array([0, 1, 2]), np.array([1, 1])]), ValueError, "rows[1]", "distinct", "repeated"
    ),
    "lazy rows float": Wrong(
        _lazy(rows=[np.array([0.0, 1.0, 2.0]), np.array([0, 1])]), TypeError, "rows[0]", "integer", "float64"
    ),
    "lazy rows of gradient": Wrong(
        _lazy(rows=[np.array([0, 1, 2]), np.array([1])]), ValueError, "grads[1]", "(1, 2), a row for each", "(2, 2)"
    ),
    "lazy 0-d": Wrong(
        lambda: fastops.lazy_adamw_rows_(*([np.array(1.5)] for _ in range(4)), step=1, lr=0.1),
        ValueError,
        "params[0]",
        "an array with rows",
        "0-d",
    ),
    "eg lr": Wrong(lambda: fastops.eg_step_(*_lists(2), lr=float("nan")), ValueError, "lr", "[0, inf)", "nan"),
    "adaptive scales": Wrong(_adaptive(scales=[1.0, 1.0]), TypeError, "scales", "a float64 array", "list"),
    "adaptive scales dtype": Wrong(
        _adaptive(scales=np.ones(2, np.float32)), TypeError, "scales", "a float64 array", "float32"
    ),
    "adaptive scales shape": Wrong(_adaptive(scales=np.ones(3)), ValueError, "scales", "(2,)", "(3,)"),
    "adaptive scales zero": Wrong(_adaptive(scales=np.zeros(2)), ValueError, "scales", "positive", "others"),
    "adaptive beta": Wrong(_adaptive(beta=1), ValueError, "beta", "[0, 1)", "1"),
    "adaptive bounds": Wrong(_adaptive(gain_bounds=(2.0, 1.0)), ValueError, "gain_bounds[1]", "[2, inf)", "1.0"),
    "adaptive bounds zero": Wrong(_adaptive(scale_bounds=(0, 1.0)), ValueError, "scale_bounds[0]", "(0, inf)", "0"),
    "TensorList str": Wrong(lambda: fastops.TensorList("abc"), TypeError, "arrays", "a list of arrays", "'abc'"),
    "TensorList item": Wrong(lambda: fastops.TensorList([A, 1.0]), TypeError, "arrays[1]", "an array in host", "1.0"),
    "TensorList verify": Wrong(lambda: fastops.TensorList([A], verify=1), TypeError, "verify", "True or False", "1"),
    # attention
    "attention integers": Wrong(_attend(q=np.ones((2, 4, 5, 3), int)), TypeError, "q", FLOATS, "int64", ROWS),
    "attention complex": Wrong(_attend(v=np.ones((2, 2, 6, 7), complex)), TypeError, "v", FLOATS, "complex128", ROWS),
    "attention bool": Wrong(_attend(k=np.ones((2, 2, 6, 3), bool)), TypeError, "k", FLOATS, "bool", ROWS),
    "attention None": Wrong(_attend(v=None), TypeError, "v", FLOATS, "None", ROWS),
    "attention masked array": Wrong(
        _attend(q=np.ma.masked_array(np.ones((2, 4, 5, 3)))), TypeError, "q", "without a mask", "masked", ROWS
    ),
    "attention 1-D": Wrong(_attend(q=A[0]), ValueError, "q", "(..., H, N, D), or (N, D)", "(4,)", ROWS),
    "attention 2-D of bnhd": Wrong(
        lambda: fastops.linear_attention(A, A, A, layout="bnhd"), ValueError, "q", "(..., N, H, D)", "(3, 4)"
    ),
    "attention D": Wrong(_attend(k=_rows(d=4)["k"]), ValueError, "k", "(2, H, N, 3)", "(2, 2, 6, 4)", ROWS),
    "attention D of bnhd": Wrong(
        lambda: fastops.linear_attention(X, X[..., :5], X, layout="bnhd"),
        ValueError,
        "k",
        "(2, N, H, 7)",
        "(2, 4, 6, 5)",
    ),
    "attention batch": Wrong(_attend(k=_rows(b=3)["k"]), ValueError, "k", "(2, H, N, 3)", "(3, 2, 6, 3)", ROWS),
    "attention dimensions": Wrong(_attend(k=_rows()["k"][0]), ValueError, "k", "(2, H, N, 3)", "(2, 6, 3)", ROWS),
    "attention values": Wrong(_attend(v=_rows(m=5)["v"]), ValueError, "v", "(2, 2, 6, E)", "(2, 2, 5, 7)", ROWS),
    "attention heads of values": Wrong(
        _attend(v=_rows(heads=4)["v"]), ValueError, "v", "(2, 2, 6, E)", "(2, 4, 6, 7)", ROWS
    ),
    "attention heads": Wrong(
        lambda: fastops.linear_attention(**_rows(h=3)),
        ValueError,
        "q",
        "a multiple of the 2 heads of k and v",
        "3 heads",
    ),
    "attention no query heads": Wrong(
        lambda: fastops.linear_attention(**_rows(h=0)), ValueError, "q", "a multiple of the 2 heads", "0 heads"
    ),
    "attention no key heads": Wrong(
        lambda: fastops.linear_attention(**_rows(heads=0)), ValueError, "q", "a multiple of the 0 heads", "4 heads"
    ),
    "attention no D": Wrong(
        lambda: fastops.linear_attention(**_rows(d=0)), ValueError, "q", "at least one number", "(2, 4, 5, 0)"
    ),
    "attention no E": Wrong(
        lambda: fastops.linear_attention(**_rows(e=0)), ValueError, "v", "at least one number", "(2, 2, 6, 0)"
    ),
    "attention layout": Wrong(_attend(layout="bndh"), ValueError, "layout", "'bnhd'", "did you mean", ROWS),
    "attention causal": Wrong(_attend(causal=1), TypeError, "causal", "True or False", "1", ROWS),
    "attention return_state": Wrong(
        _attend(return_state="yes"), TypeError, "return_state", "True or False", "'yes'", ROWS
    ),
    "attention map": Wrong(
        _attend(feature_map="elu+1"), ValueError, "feature_map", "'elu'", "'elu+1'; did you mean 'elu'?", ROWS
    ),
    "attention map type": Wrong(_attend(feature_map=np.exp), TypeError, "feature_map", "'favor'", "ufunc", ROWS),
    "attention normalize": Wrong(_attend(normalize=0), TypeError, "normalize", "True or False", "0", ROWS),
    "attention normalize of softmax": Wrong(
        _attend(feature_map="softmax", normalize=False), ValueError, "normalize", "None or True", "False", ROWS
    ),
    "attention eps": Wrong(_attend(eps=-1e-6), ValueError, "eps", "[0, inf)", "-1e-06", ROWS),
    "attention eps array": Wrong(_attend(eps=np.ones(2)), TypeError, "eps", "a finite number", "shape (2,)", ROWS),
    "attention eps of softmax": Wrong(
        _attend(feature_map="softmax", eps=1e-6), ValueError, "eps", "0 with feature_map='softmax'", "1e-06", ROWS
    ),
    "attention eps of sums": Wrong(
        _attend(feature_map="identity", eps=1e-6), ValueError, "eps", "0 without a normaliser", "1e-06", ROWS
    ),
    "attention kernel_eps": Wrong(
        _attend(kernel_eps=1e-3), ValueError, "kernel_eps", "None with feature_map='elu'", "0.001", ROWS
    ),
    "attention kernel_eps negative": Wrong(
        _attend(feature_map="relu", kernel_eps=-1.0), ValueError, "kernel_eps", "[0, inf)", "-1.0", ROWS
    ),
    "attention scale": Wrong(_attend(scale=float("inf")), ValueError, "scale", "(-inf, inf)", "inf", ROWS),
    "attention scale nan": Wrong(_attend(scale=float("nan")), ValueError, "scale", "(-inf, inf)", "nan", ROWS),
    "attention scale of favor": Wrong(
        _attend(feature_map="favor", projection=np.ones((4, 3)), scale=0.0),
        ValueError,
        "scale",
        "(0, inf)",
        "0.0",
        ROWS,
    ),
    "attention no projection": Wrong(
        _attend(feature_map="favor"), ValueError, "projection", "fastops.favor_projection", "None", ROWS
    ),
    "attention projection": Wrong(
        _attend(projection=np.ones((4, 3))), ValueError, "projection", "None with feature_map='elu'", "(4, 3)", ROWS
    ),
    "attention projection shape": Wrong(
        _attend(feature_map="favor", projection=np.ones((3, 4))), ValueError, "projection", "(m, 3)", "(3, 4)", ROWS
    ),
    "attention projection integers": Wrong(
        _attend(feature_map="favor", projection=np.ones((4, 3), int)), TypeError, "projection", FLOATS, "int64", ROWS
    ),
    "attention mask of pairs": Wrong(
        _attend(key_mask=np.ones((5, 6), bool)), ValueError, "key_mask", "scaled_dot_product_attention", "(5, 6)", ROWS
    ),
    "attention mask of pairs with heads": Wrong(
        _attend(key_mask=np.ones((2, 4, 5, 6), bool)),
        ValueError,
        "key_mask",
        "(2, 6) or (2, 2, 6) (for a mask of pairs, torch's scaled_dot_product_attention)",
        "(2, 4, 5, 6)",
        ROWS,
    ),
    "attention mask of query heads": Wrong(
        _attend(key_mask=np.ones((2, 4, 6), bool)), ValueError, "key_mask", "(2, 2, 6)", "(2, 4, 6)", ROWS
    ),
    "attention mask of one sequence": Wrong(
        _attend(key_mask=np.ones(6, bool)), ValueError, "key_mask", "(2, 6)", "(6,)", ROWS
    ),
    "attention mask of numbers": Wrong(
        _attend(key_mask=np.ones((2, 6), np.float32)), TypeError, "key_mask", "bool", "float32", ROWS
    ),
    "attention lengths as mask": Wrong(_attend(key_mask=[3, 6]), TypeError, "key_mask", "bool", "int64", ROWS),
    "attention offsets of a batch": Wrong(
        _attend(cu_seqlens=[0, 6]), ValueError, "cu_seqlens", "a batch of 1", "a batch of 2", ROWS
    ),
    "attention offsets of other lengths": Wrong(
        lambda: fastops.linear_attention(**_rows(b=1), cu_seqlens=[0, 6]),
        ValueError,
        "cu_seqlens",
        "one length",
        "5 and 6",
    ),
    "attention offsets that fall": Wrong(
        lambda: fastops.linear_attention(**_rows(b=1, n=6), cu_seqlens=[0, 4, 3, 6]),
        ValueError,
        "cu_seqlens",
        "rise from 0 to 6",
        "3 after 4",
    ),
    "attention offsets that end early": Wrong(
        lambda: fastops.linear_attention(**_rows(b=1, n=6), cu_seqlens=[0, 5]),
        ValueError,
        "cu_seqlens",
        "0 to 6",
        "5 as the last",
    ),
    "attention offsets that wrap": Wrong(
        lambda: fastops.linear_attention(**_rows(b=1, n=6), cu_seqlens=np.array([0, 2**64 - 6, 6], np.uint64)),
        ValueError,
        "cu_seqlens",
        "0 to 6",
        "-6 after 0",
    ),
    "attention no offsets": Wrong(
        lambda: fastops.linear_attention(**_rows(b=1, n=6), cu_seqlens=np.zeros(0, int)),
        ValueError,
        "cu_seqlens",
        "0 to 6",
        "none",
    ),
    "attention offsets of floats": Wrong(
        lambda: fastops.linear_attention(**_rows(b=1, n=6), cu_seqlens=[0.0, 6.0]),
        TypeError,
        "cu_seqlens",
        "a 1-D integer array",
        "float64",
    ),
    "attention decay of all": Wrong(
        _attend(decay=np.zeros(2)), ValueError, "decay", "None without causal=True", "(2,)", ROWS
    ),
    "attention decay of favor": Wrong(
        _causal(feature_map="favor", projection=np.ones((4, 3)), decay=np.zeros(2)),
        ValueError,
        "decay",
        "None with feature_map='favor'",
        "(2,)",
        ROWS,
    ),
    "attention decay of softmax": Wrong(
        _causal(feature_map="softmax", decay=np.zeros(2)),
        ValueError,
        "decay",
        "None with feature_map='softmax'",
        "(2,)",
        ROWS,
    ),
    "attention decay positive": Wrong(
        _causal(decay=np.array([-1.0, SECRET])), ValueError, "decay", "<= 0", "positive ones or nan", ROWS
    ),
    "attention decay nan": Wrong(
        _causal(decay=np.full((2, 2, 6), np.nan)), ValueError, "decay", "<= 0", "positive ones or nan", ROWS
    ),
    "attention decay shape": Wrong(_causal(decay=np.zeros(4)), ValueError, "decay", "(2,) or (2, 2, 6)", "(4,)", ROWS),
    "attention decay without heads": Wrong(
        _causal(decay=np.zeros((2, 6))), ValueError, "decay", "(2,) or (2, 2, 6)", "(2, 6)", ROWS
    ),
    "attention decay integers": Wrong(_causal(decay=[0, -1]), TypeError, "decay", FLOATS, "int64", ROWS),
    "attention state": Wrong(
        _attend(initial_state=np.ones((2, 2, 3, 7))),
        TypeError,
        "initial_state",
        "a tuple of 2 arrays (S, z)",
        "shape",
        ROWS,
    ),
    "attention state without maximum": Wrong(
        _attend(feature_map="exp", initial_state=_state()), ValueError, "initial_state", "3 arrays (S, z, m)", "2", ROWS
    ),
    "attention state with maximum": Wrong(
        _attend(initial_state=_state(3)), ValueError, "initial_state", "2 arrays (S, z)", "3", ROWS
    ),
    "attention state dtype": Wrong(
        _attend(initial_state=_state(dtype=np.float64)), TypeError, "initial_state[0]", "float32", "float64", ROWS
    ),
    "attention state shape": Wrong(
        _attend(feature_map="cosine", initial_state=_state()),
        ValueError,
        "initial_state[0]",
        "(2, 2, 4, 7)",
        "(2, 2, 3, 7)",
        ROWS,
    ),
    "attention out shape": Wrong(_attend(), ValueError, "out", "(2, 4, 5, 7)", "(2, 5, 4, 7)", ((2, 5, 4, 7), "f4")),
    "attention out dtype": Wrong(_attend(), TypeError, "out", "float32", "float64", ((2, 4, 5, 7), "f8")),
    "attention out byte order": Wrong(_attend(), TypeError, "out", "float32", ">f4", ((2, 4, 5, 7), ">f4")),
    "attention out list": Wrong(_attend(out=[1.0]), TypeError, "out", "an ndarray", "list"),
    "attention out is q": Wrong(_attended_in_place, ValueError, "out", "apart from q", "overlaps q"),
    "attention out is decay": Wrong(_attended_onto_decay, ValueError, "out", "apart from decay", "overlaps decay"),
    "attention too large": Wrong(
        lambda: fastops.linear_attention(
            np.broadcast_to(np.float32(1), (2**40, 1, 2**20, 1)),
            np.broadcast_to(np.float32(1), (2**40, 1, 1, 1)),
            np.broadcast_to(np.float32(1), (2**40, 1, 1, 4)),
        ),
        ValueError,
        "q and v",
        "2**63 bytes",
        "1048576, 4)",
    ),
    "step 0-d": Wrong(_step(q=np.float32(1)), ValueError, "q", "(..., H, D)", "0-d"),
    "step shape": Wrong(_step(k=np.ones((2, 2, 4), np.float32)), ValueError, "k", "(2, H, 3)", "(2, 2, 4)"),
    "step integers": Wrong(_step(v=np.ones((2, 2, 7), int)), TypeError, "v", FLOATS, "int64"),
    "step state list": Wrong(_step(state=3), TypeError, "state", "a tuple of 2 arrays (S, z)", "3"),
    "step state parts": Wrong(_step(state=_state(3)), ValueError, "state", "2 arrays (S, z)", "3"),
    "step state dtype": Wrong(_step(state=_state(dtype=np.float64)), TypeError, "state[0]", "float32", "float64"),
    "step state shape": Wrong(_step(state=_state(d=4)), ValueError, "state[0]", "(2, 2, 3, 7)", "(2, 2, 4, 7)"),
    "step state read-only": Wrong(_frozen_state, ValueError, "state[1]", "writable", "read-only"),
    "step state strides": Wrong(
        _step(state=(np.asfortranarray(_state()[0]), _state()[1])),
        ValueError,
        "state[0]",
        "C-contiguous",
        "other strides",
    ),
    "step state shared": Wrong(_shared_state, ValueError, "state[1]", "apart from state[0]", "overlap"),
    "step state of keys": Wrong(_state_of_keys, ValueError, "state[1]", "apart from k", "overlap"),
    "step decay": Wrong(_step(decay=np.zeros((2, 4))), ValueError, "decay", "(2,) or (2, 2)", "(2, 4)"),
    "step decay positive": Wrong(_step(decay=np.ones(2)), ValueError, "decay", "<= 0", "positive"),
    "step normalize": Wrong(_step(normalize=1), TypeError, "normalize", "True or False", "1"),
    "step eps": Wrong(_step(eps=np.ones(1)), TypeError, "eps", "a finite number", "shape (1,)"),
    "step map": Wrong(_step(feature_map=["elu"]), TypeError, "feature_map", "'elu'", "list"),
    "step out": Wrong(_step(), ValueError, "out", "(2, 4, 7)", "(2, 4, 1, 7)", ((2, 4, 1, 7), "f4")),
    "backward dy": Wrong(
        _backward(dy=np.ones((2, 4, 5, 6), np.float32)), ValueError, "dy", "(2, 4, 5, 7)", "(2, 4, 5, 6)"
    ),
    "backward y": Wrong(
        _backward(y=np.ones((2, 4, 6, 7), np.float32)), ValueError, "y", "(2, 4, 5, 7)", "(2, 4, 6, 7)"
    ),
    "backward integers": Wrong(_backward(dy=np.ones((2, 4, 5, 7), int)), TypeError, "dy", FLOATS, "int64"),
    "backward d_state": Wrong(_backward(d_state=_state(3)), ValueError, "d_state", "2 arrays (S, z)", "3"),
    "backward d_state dtype": Wrong(
        _backward(d_state=_state(dtype=np.float64)), TypeError, "d_state[0]", "float32", "float64"
    ),
    "softmax_attention integers": Wrong(_softmax(q=np.ones((2, 4, 5, 3), int)), TypeError, "q", FLOATS, "int64", ROWS),
    "softmax_attention mask": Wrong(
        _softmax(key_mask=np.ones((2, 5, 6), bool)),
        ValueError,
        "key_mask",
        "scaled_dot_product_attention",
        "(2, 5, 6)",
        ROWS,
    ),
    "softmax_attention scale": Wrong(_softmax(scale="1"), TypeError, "scale", "a finite number", "'1'", ROWS),
    "softmax_attention causal": Wrong(_softmax(causal=None), TypeError, "causal", "True or False", "None", ROWS),
    "softmax_attention logn": Wrong(_softmax(logn="key"), ValueError, "logn", "'keys'", "did you mean", ROWS),
    "softmax_attention logn shape": Wrong(
        _softmax(logn=np.ones(6)), ValueError, "logn", "broadcasts to (2, 4, 5)", "(6,)", ROWS
    ),
    "softmax_attention logn integers": Wrong(_softmax(logn=3), TypeError, "logn", FLOATS, "int64", ROWS),
    "softmax_attention out": Wrong(_softmax(), ValueError, "out", "(2, 4, 5, 7)", "(5, 7)", ((5, 7), "f4")),
    "nystrom integers": Wrong(_nystrom(q=np.ones((2, 4, 5, 3), int)), TypeError, "q", FLOATS, "int64", ROWS),
    "nystrom D": Wrong(_nystrom(k=_rows(d=4)["k"]), ValueError, "k", "(2, H, N, 3)", "(2, 2, 6, 4)", ROWS),
    "nystrom heads": Wrong(_nystrom(**_rows(h=3)), ValueError, "q", "a multiple of the 2 heads", "3 heads"),
    "nystrom landmarks none": Wrong(_nystrom(num_landmarks=0), ValueError, "num_landmarks", "[1, 4096]", "0", ROWS),
    "nystrom landmarks many": Wrong(
        _nystrom(num_landmarks=4097), ValueError, "num_landmarks", "[1, 4096]", "4097", ROWS
    ),
    "nystrom landmarks float": Wrong(
        _nystrom(num_landmarks=4.0), TypeError, "num_landmarks", "an integer", "4.0", ROWS
    ),
    "nystrom landmarks bool": Wrong(
        _nystrom(num_landmarks=True), TypeError, "num_landmarks", "an integer", "True", ROWS
    ),
    "nystrom iterations": Wrong(_nystrom(iterations=-1), ValueError, "iterations", "[0, ", "-1", ROWS),
    "nystrom iterations float": Wrong(_nystrom(iterations=6.0), TypeError, "iterations", "an integer", "6.0", ROWS),
    "nystrom pinv": Wrong(_nystrom(pinv="svd"), ValueError, "pinv", "'newton' or 'ridge'", "'svd'", ROWS),
    "nystrom pinv type": Wrong(_nystrom(pinv=None), TypeError, "pinv", "'ridge'", "None", ROWS),
    "nystrom ridge": Wrong(_nystrom(pinv="ridge", ridge=0.0), ValueError, "ridge", "(0, inf)", "0", ROWS),
    "nystrom ridge of newton": Wrong(
        _nystrom(ridge=-1e-3), ValueError, "ridge", "None with pinv='newton'", "-0.001", ROWS
    ),
    "nystrom ridge nan": Wrong(
        _nystrom(pinv="ridge", ridge=float("nan")), ValueError, "ridge", "(0, inf)", "nan", ROWS
    ),
    "nystrom scale": Wrong(_nystrom(scale=float("inf")), ValueError, "scale", "(-inf, inf)", "inf", ROWS),
    "nystrom init": Wrong(_nystrom(init="global"), ValueError, "init", "'matrix' or 'batch'", "'global'", ROWS),
    "nystrom init of ridge": Wrong(
        _nystrom(init="batch", pinv="ridge"), ValueError, "init", "'matrix' with pinv='ridge'", "'batch'", ROWS
    ),
    "nystrom normalize": Wrong(_nystrom(normalize=1), TypeError, "normalize", "True or False", "1", ROWS),
    "nystrom return_info": Wrong(_nystrom(return_info=1), TypeError, "return_info", "True or False", "1", ROWS),
    "nystrom causal": Wrong(
        _nystrom(causal=True), NotImplementedError, "causal", "False, since the means of segments", "True", ROWS
    ),
    "nystrom causal type": Wrong(_nystrom(causal=None), TypeError, "causal", "True or False", "None", ROWS),
    "nystrom mask of pairs": Wrong(
        _nystrom(key_mask=np.ones((5, 6), bool)), ValueError, "key_mask", "of shape (2, 6)", "(5, 6)", ROWS
    ),
    "nystrom mask of heads": Wrong(
        _nystrom(key_mask=np.ones((2, 2, 6), bool)), ValueError, "key_mask", "one for all heads", "(2, 2, 6)", ROWS
    ),
    "nystrom mask of queries": Wrong(
        _nystrom(key_mask=np.ones((2, 5), bool)), ValueError, "key_mask", "of shape (2, 6)", "(2, 5)", ROWS
    ),
    "nystrom mask of numbers": Wrong(
        _nystrom(key_mask=np.ones((2, 6))), TypeError, "key_mask", "bool", "float64", ROWS
    ),
    "nystrom lengths as mask": Wrong(_nystrom(key_mask=[3, 6]), TypeError, "key_mask", "bool", "int64", ROWS),
    "nystrom taps even": Wrong(
        _tapped(conv_weight=np.ones((4, 2))), ValueError, "conv_weight", "(4, taps), taps odd", "(4, 2)"
    ),
    "nystrom no taps": Wrong(_tapped(conv_weight=np.ones((4, 0))), ValueError, "conv_weight", "taps odd", "(4, 0)"),
    "nystrom taps of key heads": Wrong(
        _tapped(conv_weight=np.ones((2, 3))), ValueError, "conv_weight", "(4, taps)", "(2, 3)"
    ),
    "nystrom taps of all heads": Wrong(_tapped(conv_weight=np.ones(3)), ValueError, "conv_weight", "(4, taps)", "(3,)"),
    "nystrom taps of torch": Wrong(
        _tapped(conv_weight=np.ones((4, 1, 3, 1))), ValueError, "conv_weight", "(4, taps)", "(4, 1, 3, 1)"
    ),
    "nystrom taps integers": Wrong(_tapped(conv_weight=[[1]] * 4), TypeError, "conv_weight", FLOATS, "int64"),
    "nystrom taps of other lengths": Wrong(
        _nystrom(conv_weight=np.ones((4, 3))), ValueError, "conv_weight", "q and k of one length", "5 and 6", ROWS
    ),
    "nystrom landmarks array": Wrong(
        _nystrom(landmarks=np.ones((2, 2))), TypeError, "landmarks", "a tuple of two arrays", "an array", ROWS
    ),
    "nystrom landmarks one": Wrong(
        _nystrom(landmarks=(np.ones((2, 4, 2, 3)),)), ValueError, "landmarks", "two arrays", "1", ROWS
    ),
    "nystrom landmarks heads": Wrong(
        _nystrom(landmarks=(np.ones((2, 4, 2, 3)),) * 2),
        ValueError,
        "landmarks[1]",
        "(2, 2, 2, 3)",
        "(2, 4, 2, 3)",
        ROWS,
    ),
    "nystrom landmarks D": Wrong(
        _nystrom(landmarks=(np.ones((2, 4, 2, 4)), np.ones((2, 2, 2, 3)))),
        ValueError,
        "landmarks[0]",
        "(2, 4, m, 3)",
        "(2, 4, 2, 4)",
        ROWS,
    ),
    "nystrom landmarks differ": Wrong(
        _nystrom(landmarks=(np.ones((2, 4, 3, 3)), np.ones((2, 2, 2, 3)))),
        ValueError,
        "landmarks[1]",
        "(2, 2, 3, 3)",
        "(2, 2, 2, 3)",
        ROWS,
    ),
    "nystrom no landmarks": Wrong(
        _nystrom(landmarks=(np.ones((2, 4, 0, 3)), np.ones((2, 2, 0, 3)))),
        ValueError,
        "landmarks[0]",
        "1 to 4096 rows",
        "0",
        ROWS,
    ),
    "nystrom landmarks integers": Wrong(
        _nystrom(landmarks=(np.ones((2, 4, 2, 3), int),) * 2), TypeError, "landmarks[0]", FLOATS, "int64", ROWS
    ),
    "nystrom out": Wrong(_nystrom(), ValueError, "out", "(2, 4, 5, 7)", "(5, 7)", ((5, 7), "f4")),
    "nystrom out dtype": Wrong(_nystrom(), TypeError, "out", "float32", "float64", ((2, 4, 5, 7), "f8")),
    "nystrom out is taps": Wrong(_nystrom_onto("conv_weight"), ValueError, "out", "apart from conv_weight", "overlaps"),
    "nystrom out is landmarks": Wrong(
        _nystrom_onto("landmarks"), ValueError, "out", "apart from landmarks[0]", "overlaps"
    ),
    "nystrom_backward dy": Wrong(
        _nystrom_backward(dy=np.ones((2, 4, 6, 7))), ValueError, "dy", "(2, 4, 5, 7)", "(2, 4, 6, 7)"
    ),
    "nystrom_backward iterations": Wrong(_nystrom_backward(iterations=-2), ValueError, "iterations", "[0, ", "-2"),
    "nystrom_backward causal": Wrong(_nystrom_backward(causal=True), NotImplementedError, "causal", "False", "True"),
    "logn_scale n": Wrong(lambda: fastops.logn_scale("512"), TypeError, "n", "real numbers", "<U3"),
    "logn_scale complex": Wrong(lambda: fastops.logn_scale(1j), TypeError, "n", "real numbers", "complex128"),
    "logn_scale base": Wrong(lambda: fastops.logn_scale(3, base=1), ValueError, "base", "(1, inf)", "1"),
    "logn_scale min_n": Wrong(lambda: fastops.logn_scale(3, min_n=0), ValueError, "min_n", "[1, inf)", "0"),
    "logn_scale clip": Wrong(lambda: fastops.logn_scale(3, clip=1), TypeError, "clip", "True or False", "1"),
    "favor_projection D": Wrong(lambda: fastops.favor_projection(0, 4), ValueError, "D", ">= 1", "0"),
    "favor_projection m": Wrong(lambda: fastops.favor_projection(4, 2.0), TypeError, "m", "an integer", "2.0"),
    "favor_projection rng": Wrong(
        lambda: fastops.favor_projection(4, 4, rng="seed"), TypeError, "rng", "an integer", "'seed'"
    ),
    "favor_projection too large": Wrong(
        lambda: fastops.favor_projection(2**40, 2**40), ValueError, "D and m", "2**63 bytes", "1099511627776)"
    ),
    # configuration
    "show_config mode": Wrong(lambda: fastops.show_config("yaml"), ValueError, "mode", "'json'", "'yaml'"),
    "show_config mode type": Wrong(lambda: fastops.show_config(1), TypeError, "mode", "'json'", "1"),
    "target": Wrong(lambda: fastops.target("v7"), ValueError, "name", "", "'v7'"),
    "target type": Wrong(lambda: fastops.target(None), TypeError, "name", "the name of a target", "None"),
    "set_num_threads": Wrong(lambda: fastops.set_num_threads(0), ValueError, "n", "[1, 1024]", "0"),
    "set_num_threads type": Wrong(lambda: fastops.set_num_threads(1.5), TypeError, "n", "[1, 1024]", "1.5"),
}


def test_the_table_is_long_enough():
    assert len(CASES) >= 100


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_wrong_call(case: Wrong):
    inputs = [array.tobytes() for array in (A, B, DY, X, W, BYTES, TABLE)]
    threads = fastops.get_num_threads()
    arguments = {}
    if case.out is not None:
        arguments["out"] = np.full(case.out[0], 77, case.out[1])
    with pytest.raises(case.kind) as caught:
        case.call(**arguments)
    assert type(caught.value) is case.kind
    text = str(caught.value)
    assert text.startswith(f"{case.name} must be "), text
    wanted, _, got = text.partition(", got ")
    assert case.wanted in wanted, text
    assert case.got in got, text
    assert len(text) < 200, text
    assert "98765" not in text, text
    assert all((item == 77).all() for item in arguments.values())
    assert inputs == [array.tobytes() for array in (A, B, DY, X, W, BYTES, TABLE)]
    assert fastops.get_num_threads() == threads


def test_float16_and_bfloat16_have_no_common_dtype():
    half = pytest.importorskip("ml_dtypes").bfloat16
    with pytest.raises(TypeError, match=r"^a and b must be of dtypes with a common one .*, got float16 and bfloat16$"):
        fastops.mitchell_matmul(A.astype(np.float16), B.astype(half))


def test_a_tensor_list_does_not_pickle():
    with pytest.raises(TypeError, match=r"^a TensorList must not be pickled: it stands for memory of this process"):
        pickle.dumps(fastops.TensorList([A]))


ELEMENTWISE: dict[str, tuple[Callable[[Any], Any], type[Exception], tuple[int, ...], str]] = {
    "complex": (lambda out: fastops.mitchell_mul(A.astype(complex), A, out=out), TypeError, (3, 4), "f4"),
    "object": (lambda out: fastops.mitchell_mul(A.astype(object), A, out=out), TypeError, (3, 4), "f4"),
    "str": (lambda out: fastops.mitchell_mul("a", A, out=out), TypeError, (3, 4), "f4"),
    "shapes": (lambda out: fastops.mitchell_mul(A, B, out=out), ValueError, (3, 4), "f4"),
    "one operand": (lambda out: fastops.mitchell_mul(A, out=out), TypeError, (3, 4), "f4"),
    "two operands": (lambda out: fastops.mitchell_square(A, A, A, out=out), TypeError, (3, 4), "f4"),
    "out shape": (lambda out: fastops.mitchell_mul(A, A, out=out), ValueError, (2, 4), "f4"),
    "out dtype": (lambda out: fastops.mitchell_mul(A, A, out=out), TypeError, (3, 4), "i4"),
    "out half": (lambda out: fastops.mitchell_sqrt(A, out=out), TypeError, (3, 4), "i8"),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_wrong_elementwise_call(name: str):
    call, kind, shape, dtype = ELEMENTWISE[name]
    out = np.full(shape, 77, dtype)
    with pytest.raises(kind) as caught:
        call(out)
    assert isinstance(caught.value, kind)
    assert (out == 77).all()


def test_elementwise_out_must_be_writable():
    out = np.full((3, 4), 77, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        fastops.mitchell_mul(A, A, out=out)
    assert (out == 77).all()


def test_a_multiplier_without_an_operation_says_so():
    for multiplier in (M("lmul"), M("lmul-equation"), M(corrections=1)):
        for op in ("div", "reciprocal", "sqrt", "rsqrt"):
            with pytest.raises(AttributeError, match=f"has no {op}: it is a multiplier only"):
                getattr(multiplier, op)
            assert not hasattr(multiplier, op)


def test_a_multiplier_cannot_change():
    multiplier = M("min-mse")
    with pytest.raises(AttributeError, match="immutable"):
        multiplier.segments = 2
    with pytest.raises(AttributeError, match="immutable"):
        del multiplier.segments
    assert multiplier == M("min-mse")


@pytest.mark.skipif(
    _backend.name != "native", reason="the checks of the compiled module are those of the native backend"
)
def test_the_compiled_module_protects_memory():
    from fastops import _core

    spec = tuple(M().spec("mul"))
    good = np.zeros((3, 5), np.float32)
    frozen = np.zeros((3, 5), np.float32)
    frozen.flags.writeable = False
    for arguments in (
        (A, B, spec, np.zeros((3, 4), np.float32)),
        (A, B, spec, np.zeros((3, 5), np.float64)),
        (A, B.astype(np.float64), spec, good),
        (A, A, spec, good),
        (A.astype(np.int32), B, spec, good),
        (A, B, spec, frozen),
        (A, B, spec[:-1], good),
        (A, B, (0, 0, 0, 0, 16, 0.0, (1.0,)), good),
        (A, B, (7, 0, 0, 0, 0, 0.0, ()), good),
    ):
        with pytest.raises((TypeError, ValueError)):
            _core.matmul(*arguments)
        assert not good.any()
    for arguments in (("nonsense", "f", "", spec), ("mul", "f", "", (0, 0, 0, 0, 3, 0.0, ()))):
        with pytest.raises((TypeError, ValueError)):
            _core.make_ufunc(*arguments)
    with pytest.raises((TypeError, ValueError)):
        _core.lut_matmul(BYTES, BYTES, TABLE[:2], np.zeros((3, 3), np.int32))
    with pytest.raises((TypeError, ValueError)):
        _core.mul_grad(A, A, A, spec, 5, np.zeros_like(A), np.zeros_like(A))
