# SPDX-License-Identifier: BSD-3-Clause
"""What all operations share: tensors as arrays and back, without copies, and an operator of torch made of a few functions."""

from __future__ import annotations

import contextvars
import threading
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _validate
from .._validate import AnyArray, Text

LIBRARY = torch.library.Library("fastops", "FRAGMENT")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BFLOAT16 = _validate.bfloat16()
PLAIN = (Tensor, torch.nn.Parameter)
_TAGS = (torch.Tag.pt2_compliant_tag,)


# --- tensors and arrays ------------------------------------------------------------------------------------------------------------


def array(name: str, x: Tensor) -> AnyArray:
    """The memory of a tensor as an ndarray, never a copy."""
    try:
        if x.requires_grad:
            x = x.detach()
        if x.dtype is torch.bfloat16 and _BFLOAT16 is not None:
            return x.view(torch.int16).numpy().view(_BFLOAT16)
        return x.numpy()
    except (RuntimeError, TypeError):
        if x.is_cpu and x.layout is torch.strided and (x.is_neg() or x.is_conj()):
            return array(name, x.resolve_neg().resolve_conj())
        _refuse(name, x)


def _refuse(name: str, x: Tensor) -> NoReturn:
    """Raises for a tensor whose memory NumPy cannot share."""
    if x.dtype is torch.bfloat16 and _BFLOAT16 is None and x.is_cpu:
        raise _validate.wrong_type(name, "of a dtype that NumPy knows", Text("bfloat16 without ml_dtypes")) from None
    layout = str(x.layout).removeprefix("torch.")
    if not x.is_cpu:
        raise _validate.wrong_type(name, "a tensor on the CPU (its cpu())", Text(f"one on {x.device}")) from None
    if layout != "strided":
        raise _validate.wrong_type(name, "a dense tensor", Text(f"one of layout {layout}")) from None
    kind = _validate.clip(type(x).__name__, 30)
    raise _validate.wrong_type(name, "a tensor that NumPy can share", Text(f"a {kind} of {x.dtype}")) from None


def tensor(x: AnyArray) -> Tensor:
    """A tensor over the memory of an array that is ours."""
    if x.dtype == _BFLOAT16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def like(result: object, x: AnyArray) -> Tensor:
    """The result of a ufunc, which for 0-d operands is a scalar, as a contiguous tensor."""
    return tensor(np.asarray(result, dtype=x.dtype, order="C"))


class _Silent(threading.local):
    """Calls a ufunc without floating-point warnings, which torch does not give: at 0.1 us, where `numpy.errstate` takes 0.6."""

    call: Callable[..., Any]

    def __init__(self) -> None:
        if np.lib.NumpyVersion(np.__version__) < "2.0.0":
            self.call = np.errstate(all="ignore")(lambda function, *args: function(*args))
            return
        with np.errstate(all="ignore"):
            # A context serves one thread at a time.
            self.call = contextvars.copy_context().run


silent = _Silent()


# --- arguments ---------------------------------------------------------------------------------------------------------------------


def want_tensor(name: str, x: object) -> None:
    """Refuses what is no tensor."""
    if not isinstance(x, Tensor):
        way = " (torch.from_numpy shares the memory of an array)" if isinstance(x, np.ndarray) else ""
        raise _validate.wrong_type(name, f"a torch.Tensor{way}", x)


def pair(**values: Any) -> list[Tensor]:
    """`floats` of two, which mostly are such tensors already."""
    a, b = values.values()
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype is b.dtype and a.dtype in FLOATS:
        return [a, b]
    return floats(**values)


def floats(**values: object) -> list[Tensor]:
    """The arguments as tensors of one floating-point dtype, promoted as torch promotes."""
    tensors = {name: x for name, x in values.items() if isinstance(x, Tensor)}
    for name, x in values.items():
        if not isinstance(x, (int, float)) or isinstance(x, bool):
            want_tensor(name, x)
    # Compilers do not know torch.result_type: tensors without axes give way to others.
    known = [x for x in tensors.values() if x.dtype in FLOATS]
    dtypes = [x.dtype for x in known if x.ndim] or [x.dtype for x in known]
    if not dtypes or any(x.is_complex() for x in tensors.values()):
        got = _text(" and ".join([str(x.dtype) for x in tensors.values()]) or "numbers")
        raise _validate.wrong_type(" and ".join(values), f"tensors of {_validate.FLOAT_NAMES}", got)
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    device = known[0].device
    made: list[Any] = list(values.values())
    return [x.to(dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device) for x in made]


def _text(text: str) -> Text:
    return Text(_validate.clip(text))


_compiling = torch.compiler.is_dynamo_compiling
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
records = torch.is_grad_enabled
# What `Tensor.numpy` takes as it is.
_SHARED = (torch.float32, torch.float64, torch.float16)


def direct(*tensors: Tensor) -> bool:
    """Whether a kernel may be called without torch's dispatcher: no autograd, no transform, no mode, no compiler."""
    if _compiling():
        return False
    recorded = records()
    for x in tensors:
        if type(x) not in PLAIN or not x.is_cpu or (recorded and x.requires_grad):
            return False
    return ordinary()


def ordinary() -> bool:
    """Whether a call is what it seems: no compiler, no transform, no mode, no forward-mode derivative."""
    return not (_compiling() or _modes() or _transforms() or _tracing() or forward_ad._current_level >= 0)


def direct_pair(a: Any, b: Any) -> bool:
    """`direct` of two tensors of one dtype that NumPy knows and that never require a gradient: the quickest way."""
    return (
        not _compiling()
        and type(a) is Tensor
        and type(b) is Tensor
        and (dtype := a.dtype) is b.dtype
        and dtype in _SHARED
        and a.is_cpu
        and b.is_cpu
        and not (
            a.requires_grad or b.requires_grad or a.is_neg() or b.is_neg() or _modes() or _transforms() or _tracing()
        )
        and forward_ad._current_level < 0
    )


def without_tangent(args: Iterable[Any]) -> None:
    """Refuses tensors of forward-mode derivatives: results would be without, silently."""
    if forward_ad._current_level >= 0:
        for x in args:
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise _validate.not_offered(
                    "a derivative", "taken backward", Text("a tensor with a forward-mode tangent")
                )


def without_gradient(**tensors: Tensor | None) -> None:
    """Refuses tensors that ask for a gradient which is not offered: autograd would leave it out silently."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x is not None and x.requires_grad:
                got = Text("one with requires_grad=True")
                raise _validate.wrong_type(name, "a tensor outside autograd (its detach()): it gets no gradient", got)


# --- operators ---------------------------------------------------------------------------------------------------------------------


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
    casts: Sequence[int] = (),
) -> Callable[..., Any]:
    """What calls the operator `torch.ops.fastops.NAME`, made here; `casts` are the arguments that autocast casts.

    The call goes past torch's dispatcher where nobody would see it, neither a compiler nor a mode nor a transform: the dispatcher
    takes several microseconds for an operator that is written in Python, and several times as many where autograd records.

    An operator without `backward` refuses to be differentiated. The kernel is registered for every device, since it is the one
    that says which it runs on.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=_TAGS)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    full = f"fastops::{name}"
    torch.library.register_fake(full, fake, lib=LIBRARY)
    op = getattr(torch.ops.fastops, name).default

    def refuse(_: Any, *__: Any) -> Any:
        raise _validate.not_offered(name, "differentiated once", Text("a second time"))

    def samples(info: Any, dims: Sequence[int | None], *args: Any) -> Any:
        return loop(call, info, dims, args)

    derive, batch = backward or refuse, vmap or samples
    torch.library.register_autograd(full, derive, setup_context=setup, lib=LIBRARY)
    torch.library.register_vmap(full, batch, lib=LIBRARY)
    if casts:
        for device in ("cpu", "cuda"):
            LIBRARY.impl(name, _casting(op, tuple(casts), device), f"Autocast{device.upper()}")

    # The autograd of a registered operator does not take part in torch.func; a function with `setup_context` does.
    parts = {
        "forward": op,
        "setup_context": setup or (lambda ctx, inputs, output: None),
        "backward": derive,
        "vmap": batch,
    }
    body = {key: staticmethod(part) for key, part in parts.items()}
    function: Any = types.new_class(name, (torch.autograd.Function,), exec_body=lambda space: space.update(body))

    class Eager(torch.autograd.Function):
        """The operator past the dispatcher."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = kernel(*args)
            if setup is not None:
                setup(ctx, args, output)
            return output

        backward = staticmethod(derive)

    def call(*args: Any) -> Any:
        if _compiling():
            return op(*args)
        if _transforms():
            return function.apply(*args)
        if _modes() or _tracing() or (casts and torch.is_autocast_enabled("cpu")):
            return op(*args)
        without_tangent(args)
        needed = False
        for x in args:
            if isinstance(x, Tensor):
                if type(x) not in PLAIN or not x.is_cpu:
                    return op(*args)
                needed = needed or x.requires_grad
        return Eager.apply(*args) if needed and records() else kernel(*args)

    return call


def _casting(op: Any, casts: tuple[int, ...], device: str) -> Callable[..., Any]:
    """The operator under autocast: as torch's own products, in the lower precision."""

    def cast(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        wide = torch.float64
        with torch.autocast(device, enabled=False):
            return op(
                *(
                    x.to(dtype) if i in casts and x is not None and x.dtype is not wide else x
                    for i, x in enumerate(args)
                )
            )

    return cast


def loop(op: Callable[..., Any], info: Any, dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """The batching rule of an operator that takes one sample at a time."""
    if not info.batch_size:
        # Of no samples only the shapes are known.
        one = (
            x.new_ones((*x.shape[:d], *x.shape[d + 1 :])) if isinstance(d, int) else x
            for x, d in zip(args, dims, strict=True)
        )
        made = op(*one)
        empty = [x.new_empty((0, *x.shape)) for x in (made if isinstance(made, tuple) else (made,))]
        return (tuple(empty), (0,) * len(empty)) if isinstance(made, tuple) else (empty[0], 0)
    found = [
        op(*(x.select(d, i) if isinstance(d, int) else x for x, d in zip(args, dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(found[0], tuple):
        return tuple(torch.stack(x) for x in zip(*found, strict=True)), (0,) * len(found[0])
    return torch.stack(found), 0


def batched(x: Tensor, dim: int | None, size: int, rank: int) -> Tensor:
    """`x` with its batch first, then axes of length 1 up to `rank` axes beside the batch."""
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.reshape(size, *(1,) * (rank + 1 - x.ndim), *x.shape[1:])
