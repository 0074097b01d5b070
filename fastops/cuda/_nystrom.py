# SPDX-License-Identifier: BSD-3-Clause
"""Nystrom attention on a GPU: the checks of the CPU's on the arrays' shapes, and the launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import _nystrom, _validate
from .._attention import Problem
from .._validate import Text
from ..attention import NystromInfo
from ._arrays import DTYPES, FLOATS
from ._attention import OfHeads, Rows, is_contiguous, shape_of, walked
from ._calls import Call

__all__ = ["nystrom_attention", "nystrom_attention_backward"]

_DTYPES = FLOATS[:3]
_F32 = DTYPES.index("float32")


class _Nystrom(OfHeads):
    """A call whose arguments are checked: what the compiled module takes."""

    def __init__(
        self,
        stream: object,
        arrays: dict[str, Any],
        out: Any,
        more: dict[str, Any],
        landmarks: object,
        layout: object,
        options: tuple[object, ...],
        causal: object,
        tf32: object,
    ) -> None:
        _nystrom.refuse_causal(causal)
        pair = (None, None) if landmarks is None else _nystrom.two_landmarks(landmarks)
        more = {**more, **{f"landmarks[{i}]": x for i, x in enumerate(pair)}}
        self.call = call = Call(stream, **arrays, **more, out=out)
        for name, x in {**arrays, **more, "out": out}.items():
            if name not in call.views and (x is not None or name in arrays):
                raise _validate.wrong_type(name, "an array on a GPU", x)
        self.dtype = call.dtype(_DTYPES, *arrays)
        given = {name: shape_of(call.views[name]) for name in arrays}
        self.p = p = Problem(layout, *(given.pop(name) for name in "qkv"), **given)
        self.options = _nystrom.options(p.d, *options)
        self.tf32 = _validate.boolean("tf32", tf32)
        self.rows = {name: self._operand(call.views[name]) for name in arrays}
        self.numbers: dict[str, Any] = {}
        self.taps = 0
        self._take_mask()
        self._take_taps()
        if landmarks is not None:
            self._take_landmarks()

    def _take_mask(self) -> None:
        x = self.mask()
        if x is None:
            return
        _nystrom.checked_mask(self.p, np.broadcast_to(np.True_, x.shape))
        self.rows["key_mask"] = Rows(x.data, x.strides[:-1], 0, x.strides[-1], 0)

    def _take_taps(self) -> None:
        x = self.call.views.get("conv_weight")
        if x is None:
            return
        self.call.dtype(FLOATS, "conv_weight")
        _nystrom.checked_taps(self.p, shape_of(x))
        self.taps = x.shape[1]
        self._take_floats("conv_weight")

    def _take_landmarks(self) -> None:
        views = [self.call.views[f"landmarks[{i}]"] for i in range(2)]
        for i in range(2):
            self.call.dtype(FLOATS, f"landmarks[{i}]")
        _nystrom.want_landmarks(self.p, views)
        self.options = self.options._replace(landmarks=views[0].shape[-2])
        for i in range(2):
            self._take_floats(f"landmarks[{i}]")

    def _take_floats(self, name: str) -> None:
        x = self.call.views[name]
        if not is_contiguous(x):
            raise _validate.wrong_value(name, "C-contiguous on a GPU", Text("other strides"))
        self.numbers[name] = (x.data, x.dtype)

    def floats(self, name: str, shape: tuple[int, ...]) -> Any:
        """Memory for a result of float32 in C order."""
        made, memory = self.new(shape, _F32)
        self.numbers[name] = memory.data
        return made

    def run(self, *, gradient: bool = False) -> None:
        """The launches."""
        with self.call:
            if self.p.b * self.p.hq or gradient:
                self._launch(gradient)

    def _launch(self, gradient: bool) -> None:
        p, o = self.p, self.options
        shape, rows = walked(p.batch, self.rows)
        ridges = o.pinv == "ridge"
        steps = 0 if ridges else o.iterations
        options = (self.dtype, steps, ridges, o.ridge, o.scale, o.batch_init, o.normalize, self.tf32)
        sizes = (*shape, p.hq, p.hkv, p.nq, p.nk, p.d, p.e, o.landmarks, self.taps)
        native = self.call.native
        native.nystrom_attention(options, sizes, {**self.numbers, **rows}, gradient, self.call.device, self.call.stream)


def nystrom_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    num_landmarks: int = 64,
    iterations: int = 6,
    pinv: str = "newton",
    ridge: float | None = None,
    scale: float | None = None,
    key_mask: Any = None,
    conv_weight: Any = None,
    landmarks: Sequence[Any] | None = None,
    init: str = "matrix",
    normalize: bool = False,
    causal: bool = False,
    layout: str = "bhnd",
    out: Any = None,
    return_info: bool = False,
    tf32: bool = False,
    stream: Any = None,
) -> Any:
    """Approximate softmax attention on a GPU through landmarks, at a cost that grows linearly with the length.

    Parameters
    ----------
    q : (..., H, N, D) or (N, D) array of float16, bfloat16 or float32
        On a GPU, of any strides, as are k and v. Options are those of `fastops.nystrom_attention`.
    k : (..., H_kv, M, D) or (M, D) array
        Of the same dtype and device.
    v : (..., H_kv, M, E) or (M, E) array
        Likewise.
    num_landmarks : int
        Segments of queries and of keys, 1 to 4096.
    iterations : int
        Steps towards the inverse.
    pinv : {"newton", "ridge"}
        How it is found.
    ridge : float, optional
        Of pinv="ridge".
    scale : float, optional
        Factor of q.k, D**-0.5 by default.
    key_mask : (..., M) bool array, optional
        On the same GPU; True where a key counts, and where N = M a query.
    conv_weight : (H, taps) array of floats, optional
        Weights of a convolution of v, C-contiguous, on the same GPU.
    landmarks : tuple of (..., H, m, D) and (..., H_kv, m, D) array of floats, optional
        In place of the means of segments: C-contiguous, on the same GPU.
    init : {"matrix", "batch"}
        The coefficient with which the iteration begins.
    normalize : bool
        Divide each row by the sum of its weights.
    causal : bool
        Must be False.
    layout : {"bhnd", "bnhd"}
        The order of heads and tokens.
    out : array, optional
        Where the result goes, of its shape and dtype, apart from the arguments in memory.
    return_info : bool
        Return a `fastops.NystromInfo` too, of float32 arrays on the GPU.
    tf32 : bool
        Let tensor cores multiply float32 with 10 bits of fraction.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Returns
    -------
    y : (..., H, N, E) array
        `out`, or a new array of the library of `q`. The call returns before the kernels have run.
    info : NystromInfo
        With `return_info`.

    Raises
    ------
    RuntimeError
        No GPU.
    TypeError
        An array that is not on a GPU, of another dtype, or within autograd.
    ValueError
        As `fastops.nystrom_attention`; arrays on different devices; more than four leading dimensions that cannot be walked as one.
    NotImplementedError
        ``causal=True``.

    Notes
    -----
    Landmarks, A, Z, weights and sums are float32 (A and Z float64 beyond 8 iterations and with "ridge") whatever the dtype. float32
    is multiplied exactly; of float16 and bfloat16 tensor cores multiply each number as the sum of two of TF32, and so they do of
    float32 with `tf32`, of which elements of q, k and v are one, rounded. How many keys a mask leaves is found on the GPU, and so is
    whether a sample's attention is exact. 4 m (2 (D + E) + 6 m) bytes of memory a head, and some 8 MiB of sums of parts of the keys.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     q = k = v = torch.randn(1, 8, 5000, 64, device="cuda", dtype=torch.bfloat16)
    ...     y = fastops.cuda.nystrom_attention(q, k, v, num_landmarks=64)
    """
    told = _validate.boolean("return_info", return_info)
    more = {"key_mask": key_mask, "conv_weight": conv_weight}
    options = (num_landmarks, iterations, pinv, ridge, scale, init, normalize)
    call = _Nystrom(stream, {"q": q, "k": k, "v": v}, out, more, landmarks, layout, options, causal, tf32)
    result = call.output(out)
    shape = (*call.p.batch, call.p.hq) if call.p.heads else ()
    info = [call.floats(name, shape) for name in NystromInfo._fields] if told else []
    call.run()
    y = result if out is not None else call.returned(result)[0]
    return (y, NystromInfo(*call.returned(*info))) if told else y


def nystrom_attention_backward(
    dy: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    num_landmarks: int = 64,
    iterations: int = 6,
    pinv: str = "newton",
    ridge: float | None = None,
    scale: float | None = None,
    key_mask: Any = None,
    conv_weight: Any = None,
    landmarks: Sequence[Any] | None = None,
    init: str = "matrix",
    normalize: bool = False,
    causal: bool = False,
    layout: str = "bhnd",
    return_d_landmarks: bool = False,
    tf32: bool = False,
    stream: Any = None,
) -> tuple[Any, ...]:
    """Differentiate `nystrom_attention` on a GPU with respect to q, k, v, the weights of the convolution and given landmarks.

    Parameters
    ----------
    dy : (..., H, N, E) array of float16, bfloat16 or float32
        The gradient of the result, on a GPU.
    q : (..., H, N, D) array
        As in the forward call, as are all options.
    k : (..., H_kv, M, D) array
        Keys.
    v : (..., H_kv, M, E) array
        Values.
    num_landmarks : int
        As `nystrom_attention`.
    iterations : int
        As `nystrom_attention`.
    pinv : {"newton", "ridge"}
        As `nystrom_attention`.
    ridge : float, optional
        As `nystrom_attention`.
    scale : float, optional
        As `nystrom_attention`.
    key_mask : bool array, optional
        As `nystrom_attention`; what does not count gets gradients of 0.
    conv_weight : (H, taps) array, optional
        As `nystrom_attention`.
    landmarks : tuple of two arrays, optional
        As `nystrom_attention`; constants unless their gradients are asked for.
    init : {"matrix", "batch"}
        As `nystrom_attention`; the coefficient of a batch counts as a constant.
    normalize : bool
        As `nystrom_attention`.
    causal : bool
        Must be False.
    layout : {"bhnd", "bnhd"}
        As `nystrom_attention`.
    return_d_landmarks : bool
        Return the gradients of given landmarks too.
    tf32 : bool
        As `nystrom_attention`.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Returns
    -------
    dq, dk, dv : arrays
        Of the shapes of q, k and v, new arrays of the library of `dy`.
    d_conv_weight : (H, taps) array
        Only with `conv_weight`: float32.
    d_landmarks : tuple of (..., H, m, D) and (..., H_kv, m, D) array
        Only with `return_d_landmarks`: float32.

    Raises
    ------
    RuntimeError, TypeError, ValueError, NotImplementedError
        As `nystrom_attention`.

    Notes
    -----
    As `fastops.nystrom_attention_backward`: nothing of the forward call is kept; every step of the iteration is computed anew,
    kept, and differentiated, in 4 m**2 (iterations + 13) bytes a head (twice that for float64).

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     q = k = v = torch.randn(1, 8, 500, 64, device="cuda")
    ...     dq, dk, dv = fastops.cuda.nystrom_attention_backward(torch.ones_like(v), q, k, v)
    """
    told = _validate.boolean("return_d_landmarks", return_d_landmarks)
    more = {"key_mask": key_mask, "conv_weight": conv_weight}
    options = (num_landmarks, iterations, pinv, ridge, scale, init, normalize)
    arrays = {"dy": dy, "q": q, "k": k, "v": v}
    call = _Nystrom(stream, arrays, None, more, landmarks, layout, options, causal, tf32)
    if told and landmarks is None:
        raise _validate.wrong_value("return_d_landmarks", "False without landmarks", told)
    found = [call.gradient(f"d{name}", name) for name in "qkv"]
    views = call.call.views
    if conv_weight is not None:
        found.append(call.floats("d_conv_weight", views["conv_weight"].shape))
    names = [f"landmarks[{i}]" for i in range(2)] if told else []
    marks = [call.floats(f"d_{name}", views[name].shape) for name in names]
    call.run(gradient=True)
    results = call.returned(*found)
    return (*results, call.returned(*marks)) if told else results
