# SPDX-License-Identifier: BSD-3-Clause
"""Linear attention on a GPU: the checks of the CPU's on the arrays' shapes, and the launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import _attention, _validate
from .._attention import LinearOptions, Problem
from .._validate import Text, clip
from ._arrays import DTYPES, FLOATS, View, is_torch, same_memory
from ._calls import Call, returned

__all__ = ["linear_attention", "linear_attention_backward", "linear_attention_step_"]

_DTYPES = FLOATS[:3]
_F32 = DTYPES.index("float32")
# As the compiled module numbers them.
_MAPS = ("elu", "relu", "relu2", "identity", "cosine", "exp", "favor", "softmax")
_BATCH = 4
_WIDE = np.dtype(np.float32)
State = Sequence[Any]


def shape_of(x: View) -> Any:
    """An array of this shape that takes no memory, for checks that look at shapes alone."""
    return np.broadcast_to(np.zeros((), np.float32), x.shape)


class Rows(NamedTuple):
    """An array's strides in elements, those of leading dimensions one by one."""

    data: int
    batch: tuple[int, ...]
    head: int
    row: int
    col: int


class OfHeads:
    """What calls of attention share: operands as rows of heads, and their results."""

    call: Call
    p: Problem
    dtype: int
    step = False
    rows: dict[str, Rows]

    def _operand(self, x: View) -> Rows:
        """Strides of an array like q, in the caller's order of axes."""
        strides = x.strides
        if self.step:
            return Rows(x.data, strides[:-2], strides[-2] if self.p.heads else 0, 0, strides[-1])
        if not self.p.heads:
            return Rows(x.data, (), 0, strides[-2], strides[-1])
        head, row = (-2, -3) if self.p.layout == "bnhd" else (-3, -2)
        return Rows(x.data, strides[:-3], strides[head], strides[row], strides[-1])

    def mask(self) -> View | None:
        """The key mask, where there is one."""
        x = self.call.views.get("key_mask")
        if x is not None and x.dtype_name != "bool":
            raise _validate.wrong_type("key_mask", "of dtype bool (True where a key counts)", Text(x.dtype_name))
        return x

    def output(self, out: Any) -> Any:
        """The result y."""
        p = self.p
        if self.step:
            shape = (*p.batch, *((p.hq,) if p.heads else ()), p.e)
        elif not p.heads:
            shape = (p.nq, p.e)
        else:
            shape = (*p.batch, *((p.nq, p.hq) if p.layout == "bnhd" else (p.hq, p.nq)), p.e)
        result, memory = self.call.output(out, shape, (self.dtype,))
        if out is not None:
            self.want_apart("out")
        self.rows["out"] = self._operand(memory)
        return result

    def want_apart(self, *names: str) -> None:
        """Refuses memory that is written and is that of another argument too."""
        views = self.call.views
        for name in names:
            for other, x in views.items():
                if other != name and same_memory(views[name], x):
                    raise _validate.wrong_value(name, f"memory apart from {other}", Text("arrays that overlap"))

    def new(self, shape: tuple[int, ...], code: int) -> tuple[Any, View]:
        """An array of the caller's kind."""
        return self.call.new(shape, code)

    def gradient(self, name: str, of: str) -> Any:
        """Memory for the gradient of an argument."""
        made, memory = self.new(self.call.views[of].shape, self.dtype)
        self.rows[name] = self._operand(memory)
        return made

    def returned(self, *results: Any) -> tuple[Any, ...]:
        """What the caller gets of new arrays."""
        return tuple(returned(self.call.like, x) for x in results)


class _Linear(OfHeads):
    """A call whose arguments are checked: what the compiled module takes."""

    def __init__(
        self,
        stream: object,
        arrays: dict[str, Any],
        out: Any,
        conditions: dict[str, Any],
        layout: object,
        options: tuple[object, ...],
        *,
        tf32: bool = False,
    ) -> None:
        self._states = {name: _parts(name, x) for name, x in conditions.items() if name.endswith("state")}
        offsets = conditions.get("cu_seqlens")
        on_host = offsets is not None and _is_host(offsets)
        self._host_offsets = b""
        flat = {f"{name}[{i}]": x for name, pair in self._states.items() for i, x in enumerate(pair or ())}
        more = {"cu_seqlens": None if on_host else offsets, "out": out, **flat}
        more |= {name: conditions.get(name) for name in ("key_mask", "decay")}
        more["projection"] = options[-1]
        self.call = call = Call(stream, **arrays, **more)
        for name in (*arrays, *flat, *(key for key, x in more.items() if x is not None)):
            if name not in call.views:
                raise _validate.wrong_type(name, "an array on a GPU", {**arrays, **more}[name])
        self.dtype = call.dtype(_DTYPES, *arrays)
        self.step = layout is _attention._STEP
        given = {name: shape_of(call.views[name]) for name in arrays}
        if self.step:
            for name, x in given.items():
                if x.ndim < 1:
                    raise _validate.wrong_value(
                        name, "of shape (..., H, D), the rows of one token", Text("a 0-d array")
                    )
            given = {name: x[..., np.newaxis, :] for name, x in given.items()}
        self.p = Problem(layout, *(given.pop(name) for name in "qkv"), **given)
        self.options = self._options(options)
        self.tf32 = _validate.boolean("tf32", tf32)
        self.rows = {name: self._operand(call.views[name]) for name in arrays}
        self.numbers: dict[str, Any] = {}
        self._take_mask()
        self._take_offsets(offsets)
        self._take_decay()
        for name, pair in self._states.items():
            if pair is not None:
                self.numbers[name] = self._state(name)

    # Arguments.

    def _options(self, given: tuple[object, ...]) -> LinearOptions:
        causal, feature_map, normalize, eps, kernel_eps, scale, _ = given
        x = self.call.views.get("projection")
        if x is not None:
            self.call.dtype(FLOATS, "projection")
        options = _attention.linear_options(
            self.p.d, _WIDE, causal, feature_map, normalize, eps, kernel_eps, scale, None if x is None else shape_of(x)
        )
        if x is not None and not is_contiguous(x):
            raise _validate.wrong_value("projection", "C-contiguous on a GPU", Text("other strides"))
        return options

    def _take_mask(self) -> None:
        x = self.mask()
        if x is None:
            return
        p = self.p
        p.key_mask(shape_of(x).astype(bool) if not math.prod(x.shape) else np.broadcast_to(np.True_, x.shape))
        own = len(x.shape) > len(p.batch) + 1
        last = x.strides[-1]
        self.rows["key_mask"] = Rows(x.data, x.strides[: len(p.batch)], x.strides[-2] if own else 0, last, 0)

    def _take_offsets(self, value: Any) -> None:
        self.sequences: int | None = None
        if value is None:
            return
        call, p = self.call, self.p
        x = call.views.get("cu_seqlens")
        if x is None:
            checked = p.offsets(np.asarray(value.numpy() if is_torch(value) else value))
            assert checked is not None
            call.refuse_capture("offsets in host memory: put cu_seqlens on the GPU before")
            self._host_offsets = checked.tobytes()
            data, wide, count = 0, True, len(checked)
        else:
            if x.dtype_name not in ("int32", "int64") or len(x.shape) != 1:
                got = Text(f"an array of shape {clip(str(x.shape))} and dtype {x.dtype_name}")
                raise _validate.wrong_type("cu_seqlens", "a 1-D array of int32 or int64", got)
            like = np.zeros(x.shape, np.int64)
            like[-1:] = p.nk
            p.offsets(like)
            if x.shape[0] > 1 and x.strides[0] != 1:
                raise _validate.wrong_value("cu_seqlens", "contiguous on a GPU", Text("another stride"))
            data, wide, count = x.data, x.dtype_name == "int64", x.shape[0]
        self.sequences = count - 1
        self.numbers["cu_seqlens"] = data
        self.numbers["wide_offsets"] = wide

    def _take_decay(self) -> None:
        x = self.call.views.get("decay")
        if x is None:
            return
        self.call.dtype(FLOATS, "decay")
        if self.options.feature_map in _attention.EXPONENTIAL:
            raise _validate.not_offered(
                "decay", f"None with feature_map={self.options.feature_map!r} on a GPU", Text("one")
            )
        p = self.p
        if self.step:
            head, token = ((p.hkv,), (*p.batch, p.hkv)) if p.heads else ((), ())
            if x.shape not in (head, token):
                raise _validate.wrong_value("decay", f"of shape {head} or {token}", Text(clip(str(x.shape), 40)))
            own = len(x.shape) == len(token)
            last = x.strides[-1] if p.heads else 0
            self.rows["decay"] = Rows(x.data, x.strides[: len(p.batch)] if own else (0,) * len(p.batch), last, 0, 0)
        else:
            p.decay(shape_of(x), self.options)
            if len(x.shape) > 1 or (not p.heads and x.shape == (p.nk,)):
                own_head = x.strides[-2] if p.heads else 0
                self.rows["decay"] = Rows(x.data, x.strides[: len(p.batch)], own_head, x.strides[-1], 0)
            else:
                self.rows["decay"] = Rows(x.data, (0,) * len(p.batch), x.strides[0], 0, 0)
        self.numbers["decay_dtype"] = x.dtype

    def state_shapes(self, name: str) -> list[tuple[int, ...]]:
        """The shapes of S and z, and of m but for gradients."""
        offsets = None if self.sequences is None else np.zeros(self.sequences + 1, np.int64)
        return self.p.state_shapes(self.options, offsets)[: 2 if name.startswith("d_") else 3]

    def _state(self, name: str) -> tuple[int, ...]:
        found = []
        shapes = self.state_shapes(name)
        count = len(self._states[name] or ())
        if count != len(shapes):
            wanted = f"{len(shapes)} arrays ({', '.join('Szm'[: len(shapes)])})"
            raise _validate.wrong_value(name, wanted, Text(str(count)))
        for i, shape in enumerate(shapes):
            x = self.call.views[f"{name}[{i}]"]
            if x.dtype != _F32:
                raise _validate.wrong_type(f"{name}[{i}]", "of dtype float32", Text(x.dtype_name))
            if x.shape != shape:
                raise _validate.wrong_value(f"{name}[{i}]", f"of shape {clip(str(shape))}", Text(clip(str(x.shape))))
            if not is_contiguous(x):
                raise _validate.wrong_value(f"{name}[{i}]", "C-contiguous", Text("other strides"))
            found.append(x.data)
        return tuple(found)

    def new_state(self, name: str) -> tuple[Any, ...]:
        """Memory for a state."""
        made = [self.new(shape, _F32) for shape in self.state_shapes(name)]
        self.numbers[name] = tuple(memory.data for _, memory in made)
        return tuple(x for x, _ in made)

    def run(self, kind: str = "") -> None:
        """The launches."""
        call = self.call
        with call:
            if self._host_offsets:
                memory = call.native.uploaded(self._host_offsets, call.device, call.stream)
                call.end_with_it(memory)
                self.numbers["cu_seqlens"] = memory.address
            if self.p.b * self.p.hq:
                self._launch(kind)

    def _launch(self, kind: str) -> None:
        p, o, native = self.p, self.options, self.call.native
        shape, rows = walked(p.batch, self.rows)
        options = (
            self.dtype,
            _MAPS.index(o.feature_map),
            o.causal,
            o.normalize,
            o.eps,
            o.kernel_eps,
            o.scale,
            self.tf32,
        )
        tokens = (1, 1) if self.step else (p.nq, p.nk)
        sizes = (*shape, p.hq, p.hkv, *tokens, p.d, p.e, o.features(p.d), self.sequences or 0)
        arrays = {**self.numbers, **rows}
        if o.projection is not None:
            w = self.call.views["projection"]
            arrays |= {"projection": w.data, "projection_dtype": w.dtype}
        where = (self.call.device, self.call.stream)
        if self.step:
            native.linear_attention_step(options, sizes, arrays, *where)
        else:
            native.linear_attention(options, sizes, arrays, kind == "gradient", *where)


def _is_host(value: Any) -> bool:
    if is_torch(value):
        return str(value.device.type) == "cpu"
    return isinstance(value, (list, tuple, np.ndarray))


def is_contiguous(x: View) -> bool:
    reach = 1
    for n, stride in zip(reversed(x.shape), reversed(x.strides), strict=True):
        if n > 1 and stride != reach:
            return 0 in x.shape
        reach *= n
    return True


def _parts(name: str, state: object) -> tuple[Any, ...] | None:
    if state is None:
        return None
    if not isinstance(state, (tuple, list)):
        raise _validate.wrong_type(name, "a tuple of arrays (S, z)", state)
    return tuple(state)


def walked(batch: tuple[int, ...], arrays: dict[str, Rows]) -> tuple[tuple[int, ...], dict[str, Rows]]:
    """The leading dimensions as four at most, merged where all arrays allow it."""
    lengths: list[int] = []
    strides: dict[str, list[int]] = {name: [] for name in arrays}
    for i, n in enumerate(batch):
        if n == 1:
            continue
        if lengths and all(strides[name][-1] == x.batch[i] * n for name, x in arrays.items()):
            lengths[-1] *= n
            for name, x in arrays.items():
                strides[name][-1] = x.batch[i]
            continue
        lengths.append(n)
        for name, x in arrays.items():
            strides[name].append(x.batch[i])
    if len(lengths) > _BATCH:
        wanted = f"of at most {_BATCH} leading dimensions that cannot be walked as one"
        raise _validate.wrong_value("q", wanted, Text(str(len(lengths))))
    missing = _BATCH - len(lengths)
    found = {name: x._replace(batch=(0,) * missing + tuple(strides[name])) for name, x in arrays.items()}
    return (1,) * missing + tuple(lengths), found


def linear_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    feature_map: str = "elu",
    normalize: bool | None = None,
    eps: float = 0.0,
    kernel_eps: float | None = None,
    scale: float | None = None,
    projection: Any = None,
    key_mask: Any = None,
    cu_seqlens: Any = None,
    decay: Any = None,
    initial_state: State | None = None,
    return_state: bool = False,
    layout: str = "bhnd",
    out: Any = None,
    tf32: bool = False,
    stream: Any = None,
) -> Any:
    """Attend on a GPU with weights f(q).f(k), at a cost that grows linearly with the length.

    Parameters
    ----------
    q : (..., H, N, D) or (N, D) array of float16, bfloat16 or float32
        On a GPU, of any strides, as are the others. Options are those of `fastops.linear_attention`.
    k : (..., H_kv, M, D) or (M, D) array
        Of the same dtype and device.
    v : (..., H_kv, M, E) or (M, E) array
        Likewise.
    causal : bool
        Row i sees the keys j <= i + M - N.
    feature_map : {"elu", "relu", "relu2", "identity", "exp", "softmax", "favor", "cosine"}
        What turns rows into features.
    normalize : bool, optional
        Divide by the sum of the weights.
    eps : float
        Added to that sum.
    kernel_eps : float, optional
        Added to the features of "relu" and "relu2".
    scale : float, optional
        Within the exponent or of the weights.
    projection : (m, D) array of floats, optional
        The directions of "favor", C-contiguous, on the same GPU.
    key_mask : (..., M) or (..., H_kv, M) bool array, optional
        On the same GPU; True where a key counts.
    cu_seqlens : (S + 1,) int array_like, optional
        Offsets of packed sequences. In host memory they are checked; int32 or int64 on the GPU are not, since that would wait for
        it: offsets that fall or reach beyond the tokens count as the nearest that do not, and rows outside are not written.
    decay : (H_kv,) or (..., H_kv, M) array of floats, optional
        On the same GPU: logarithms of the decay at each key. Its numbers are not looked at beforehand: positive ones count as 0.
    initial_state : tuple of float32 arrays, optional
        S and z, and m for "exp", "softmax" and "favor", to begin with: C-contiguous, on the same GPU.
    return_state : bool
        Return the sums over all keys too.
    layout : {"bhnd", "bnhd"}
        The order of heads and tokens.
    out : array, optional
        Where the result goes, of its shape and dtype, apart from the arguments in memory.
    tf32 : bool
        Let tensor cores multiply float32 with 10 bits of fraction.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Returns
    -------
    y : (..., H, N, E) array
        `out`, or a new array of the library of `q`. The call returns before the kernels have run.
    state : tuple of arrays
        With `return_state`: S (..., H_kv, F, E) and z (..., H_kv, F), and m like z for "exp", "softmax" and "favor", float32.

    Raises
    ------
    RuntimeError
        No GPU.
    TypeError
        An array that is not on a GPU, of another dtype, or within autograd.
    ValueError
        As `fastops.linear_attention`; arrays on different devices; more than four leading dimensions that cannot be walked as one.
    NotImplementedError
        A `decay` with "exp".

    Notes
    -----
    Sums, states and denominators are float32. Tensor cores multiply bfloat16, whose features and weights are rounded to it, so a
    result differs from the CPU's by some units of its last place; float16 goes through TF32, which has float16's fraction and
    float32's range; float32 is multiplied exactly unless `tf32`. Weights below 2**-126 are 0. Chunks of 64 or 128 tokens: their
    sums at once, a scan over the chunks, then all rows at once; extra memory 4 (D + 1) E bytes a chunk and head.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     q = k = v = torch.randn(1, 8, 5000, 64, device="cuda", dtype=torch.bfloat16)
    ...     y, state = fastops.cuda.linear_attention(q, k, v, causal=True, return_state=True)
    """
    given = {"key_mask": key_mask, "cu_seqlens": cu_seqlens, "decay": decay, "initial_state": initial_state}
    options = (causal, feature_map, normalize, eps, kernel_eps, scale, projection)
    with_state = _validate.boolean("return_state", return_state)
    call = _Linear(stream, {"q": q, "k": k, "v": v}, out, given, layout, options, tf32=tf32)
    result = call.output(out)
    state = call.new_state("final_state") if with_state else ()
    call.run()
    y = result if out is not None else call.returned(result)[0]
    return (y, call.returned(*state)) if with_state else y


def linear_attention_step_(
    q: Any,
    k: Any,
    v: Any,
    state: State,
    *,
    feature_map: str = "elu",
    normalize: bool | None = None,
    eps: float = 0.0,
    kernel_eps: float | None = None,
    scale: float | None = None,
    projection: Any = None,
    decay: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Take the next token of causal linear attention on a GPU: update the state in place and return the token's row.

    Parameters
    ----------
    q : (..., H, D) or (D,) array of float16, bfloat16 or float32
        The token's queries, on a GPU.
    k : (..., H_kv, D) or (D,) array
        Its keys.
    v : (..., H_kv, E) or (E,) array
        Its values.
    state : tuple of float32 arrays
        As `linear_attention` with ``return_state=True`` gives it, C-contiguous; changed in place.
    feature_map : str
        As in `linear_attention`, as are the other options.
    normalize : bool, optional
        Divide by the sum of the weights.
    eps : float
        Added to the sum of the weights.
    kernel_eps : float, optional
        Added to the features of "relu" and "relu2".
    scale : float, optional
        Within the exponent or of the weights.
    projection : array, optional
        The directions of "favor".
    decay : (H_kv,) or (..., H_kv) array, optional
        Logarithms of the token's decay.
    out : (..., H, E) array, optional
        Where the result goes.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Returns
    -------
    (..., H, E) array
        The row of the token.

    Raises
    ------
    RuntimeError, TypeError, NotImplementedError
        As `linear_attention`.
    ValueError
        As `linear_attention`; a state of other shapes, read-only, or overlapping another argument; more than 3072 features.

    Notes
    -----
    In float32 whatever the dtype. One launch; 8 D E bytes of traffic a head.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     state = torch.zeros(1, 8, 64, 64, device="cuda"), torch.zeros(1, 8, 64, device="cuda")
    ...     x = torch.randn(1, 8, 64, device="cuda")
    ...     y = fastops.cuda.linear_attention_step_(x, x, x, state)
    """
    options = (True, feature_map, normalize, eps, kernel_eps, scale, projection)
    if state is None:
        raise _validate.wrong_type("state", "a tuple of arrays (S, z)", state)
    arrays = {"q": q, "k": k, "v": v}
    call = _Linear(stream, arrays, out, {"decay": decay, "state": state}, _attention._STEP, options)
    parts = [f"state[{i}]" for i in range(len(state))]
    for name in parts:
        if call.call.views[name].read_only:
            raise _validate.wrong_value(name, "writable", Text("a read-only array"))
    call.want_apart(*parts)
    most = call.call.native.most_step_features
    if call.options.features(call.p.d) > most:
        raise _validate.wrong_value("q", f"of rows with at most {most} features", call.options.features(call.p.d))
    call.numbers["final_state"] = call.numbers.pop("state")
    result = call.output(out)
    call.run()
    return result if out is not None else call.returned(result)[0]


def linear_attention_backward(
    dy: Any,
    q: Any,
    k: Any,
    v: Any,
    y: Any,
    *,
    causal: bool = False,
    feature_map: str = "elu",
    normalize: bool | None = None,
    eps: float = 0.0,
    kernel_eps: float | None = None,
    scale: float | None = None,
    projection: Any = None,
    key_mask: Any = None,
    cu_seqlens: Any = None,
    decay: Any = None,
    initial_state: State | None = None,
    layout: str = "bhnd",
    d_state: State | None = None,
    tf32: bool = False,
    stream: Any = None,
) -> tuple[Any, ...]:
    """Differentiate `linear_attention` on a GPU with respect to q, k, v and the initial state.

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
    y : (..., H, N, E) array
        The result of the forward call.
    causal : bool
        As `linear_attention`.
    feature_map : str
        As `linear_attention`.
    normalize : bool, optional
        As `linear_attention`.
    eps : float
        As `linear_attention`.
    kernel_eps : float, optional
        As `linear_attention`.
    scale : float, optional
        As `linear_attention`.
    projection : array, optional
        The directions of "favor".
    key_mask : bool array, optional
        As `linear_attention`; the gradients of masked keys and values are 0.
    cu_seqlens : (S + 1,) int array_like, optional
        As `linear_attention`.
    decay : array, optional
        As `linear_attention`; it gets no gradient.
    initial_state : tuple of arrays, optional
        As `linear_attention`.
    layout : {"bhnd", "bnhd"}
        As `linear_attention`.
    d_state : (dS, dz), optional
        The gradient of the state that the forward call returned.
    tf32 : bool
        As `linear_attention`.
    stream : int or stream object, optional
        As in `mitchell_mul`.

    Returns
    -------
    dq, dk, dv : arrays
        Of the shapes of q, k and v, new arrays of the library of `dy`.
    d_initial_state : (dS, dz)
        Only with `initial_state`.

    Raises
    ------
    RuntimeError, TypeError, ValueError, NotImplementedError
        As `linear_attention`.

    Notes
    -----
    As `fastops.linear_attention_backward`: nothing of the forward call is kept but `y`; sums are computed anew.

    Examples
    --------
    >>> import fastops.cuda
    >>> if fastops.cuda.is_available():
    ...     import torch
    ...     q = k = v = torch.randn(1, 8, 500, 64, device="cuda")
    ...     y = fastops.cuda.linear_attention(q, k, v, causal=True)
    ...     dq, dk, dv = fastops.cuda.linear_attention_backward(torch.ones_like(y), q, k, v, y, causal=True)
    """
    given = {
        "key_mask": key_mask,
        "cu_seqlens": cu_seqlens,
        "decay": decay,
        "initial_state": initial_state,
        "d_state": d_state,
    }
    options = (causal, feature_map, normalize, eps, kernel_eps, scale, projection)
    arrays = {"dy": dy, "q": q, "k": k, "v": v, "y": y}
    call = _Linear(stream, arrays, None, given, layout, options, tf32=tf32)
    gradients = [call.gradient(f"d{name}", name) for name in "qkv"]
    first = call.new_state("d_initial_state") if initial_state is not None else ()
    call.run("gradient")
    found = call.returned(*gradients)
    return (*found, call.returned(*first)) if initial_state is not None else found
