# SPDX-License-Identifier: BSD-3-Clause
"""What all operations share: arguments checked before anything runs, the two routes to the kernels, and samples of `vmap`."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _backend, _validate
from .._validate import AnyArray, Text

ROUTES = ("ffi", "callback")
VARIABLE = "FASTOPS_JAX_ROUTE"


# --- routes ------------------------------------------------------------------------------------------------------------------------


def _module() -> Any:
    """The module of FFI handlers, its handlers registered; None where the build left it out or another backend is in use."""
    if _backend.name != "native":
        return None
    try:
        module = import_module("fastops._jax")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        text = _validate.clip(str(error), 100)
        warnings.warn(f"fastops._jax cannot be loaded, callbacks are used: {text}", stacklevel=2)
        return None
    # XLA looks at the version late, and then has no CPU at all.
    version = _api_version()
    if version != module.api_version:
        got = f"its interface is {module.api_version}, jaxlib's {version}"
        warnings.warn(f"fastops._jax was built for another jaxlib, callbacks are used: {got}", stacklevel=2)
        return None
    for name, handler in module.handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return module


def _api_version() -> tuple[int, ...] | None:
    """The version of XLA's interface of handlers, of jaxlib's headers."""
    try:
        text = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.findall(r"^#define XLA_FFI_API_M(?:AJ|IN)OR (\d+)", text, re.MULTILINE)
    return tuple(map(int, found))


MODULE = _module()


def _first() -> str:
    asked = os.environ.get(VARIABLE, "")
    return _known(VARIABLE, asked) if asked else "callback" if MODULE is None else "ffi"


def _known(argument: str, name: object) -> str:
    chosen = _validate.choice(argument, name, ROUTES)
    if chosen == "ffi" and MODULE is None:
        raise _validate.wrong_value(argument, "'callback': this build has no module of handlers for this backend", name)
    return chosen


_route = _first()


def get_route() -> str:
    """Say how jax reaches the kernels.

    Returns
    -------
    str
        "ffi": handlers that XLA calls itself, in the module that is built where jaxlib is there at build time. "callback": XLA calls
        back into Python, which gives the same values and costs some 60 us more a call and a copy of the results.

    Examples
    --------
    >>> from fastops.jax import get_route
    >>> get_route() in ("ffi", "callback")
    True
    """
    return _route


def set_route(name: str) -> None:
    """Choose how jax reaches the kernels, for what is traced from now on, in the whole process.

    Parameters
    ----------
    name : {"ffi", "callback"}
        As `get_route`. The environment variable FASTOPS_JAX_ROUTE sets it at import.

    Raises
    ------
    TypeError
        `name` is not a str.
    ValueError
        An unknown name, or "ffi" where the build has no handlers or the backend is not native.

    Notes
    -----
    Functions that the caller has compiled keep the route that they were traced with. Arrays on other devices than CPUs always take
    "callback".

    Examples
    --------
    >>> from fastops.jax import get_route, set_route
    >>> before = get_route()
    >>> set_route("callback")
    >>> get_route()
    'callback'
    >>> set_route(before)
    """
    global _route
    _route = _known("name", name)


@lru_cache(maxsize=1)
def _only_cpus() -> bool:
    try:
        from jax.extend.backend import backends
    except ImportError:
        return bool(jax.default_backend() == "cpu")
    return set(backends()) <= {"cpu", "interpreter"}


def route() -> str:
    """The route for a trace that begins now."""
    return _route if _route == "callback" or _only_cpus() else "callback"


class Shape(NamedTuple):
    """Of a result."""

    shape: tuple[int, ...]
    dtype: Any


def call(
    route: str,
    target: str,
    attributes: dict[str, Any] | None,
    host: Callable[..., Sequence[Any]],
    results: Sequence[Shape],
    *operands: Any,
    many: Callable[..., Sequence[Any] | None] | None = None,
    spread_out: bool = False,
    aliases: dict[int, int] | None = None,
) -> list[Any]:
    """The results of a handler, or of `host` on NumPy's arrays where the route or the lack of `attributes` says so.

    Samples of `vmap` are leading axes of all operands, of length 1 where an operand has none. Handlers get them so (in full with
    `spread_out`), and so does `many` after the axes in full; it may answer None, and where there is no `many`, `host` gets one sample
    after the other. Operands that are None reach `host` as None, and handlers as an array of no axes and type bool.
    """
    shapes = [jax.ShapeDtypeStruct(*x) for x in results]
    if route == "ffi" and attributes is not None:
        given = [_ABSENT if x is None else x for x in operands]
        method = "broadcast_all" if spread_out else "expand_dims"
        function = jax.ffi.ffi_call(target, shapes, vmap_method=method, input_output_aliases=aliases)
        return list(function(*given, **attributes))
    ranks = [0 if x is None else x.ndim for x in operands]

    def silent(*arrays: Any) -> list[AnyArray]:
        # Nothing of jax may be called from here on: it could wait for this very thread.
        given = [None if x is None else np.asarray(x) for x in arrays]
        axes = _lead(given, ranks)
        with _default_control(), np.errstate(all="ignore"):
            found = host(*given) if not axes else None if many is None else many(axes, *given)
            if found is None:
                found = _each(host, axes, given, ranks, results)
        return [np.asarray(y, dtype=x.dtype) for x, y in zip(results, found, strict=True)]

    return _callback(silent, shapes, operands)


_ABSENT = np.zeros((), np.bool_)
# Of glibc's and musl's <fenv.h>; more than the largest environment that they store.
_DEFAULT_ENVIRONMENT, _ENVIRONMENT_BYTES = -1, 256


@lru_cache(maxsize=1)
def _environment() -> Any:
    """C's functions of the floating-point environment, where they are known."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    for name in ("libm.so.6", None):
        try:
            library = ctypes.PyDLL(name)
            library.fesetenv.argtypes = library.fegetenv.argtypes = (ctypes.c_void_p,)
        except (AttributeError, OSError):
            continue
        return library, partial(ctypes.create_string_buffer, _ENVIRONMENT_BYTES)
    return None


@contextlib.contextmanager
def _default_control() -> Iterator[None]:
    """Lets subnormal numbers be: XLA's threads take them for 0, and so would what NumPy computes there."""
    found = _environment()
    if found is None:
        yield
        return
    library, buffer = found
    before = buffer()
    library.fegetenv(before)
    library.fesetenv(_DEFAULT_ENVIRONMENT)
    try:
        yield
    finally:
        library.fesetenv(before)


@lru_cache(maxsize=1)
def _direct() -> Any:
    """A primitive that calls back with NumPy's arrays; None where this jax has not what it is made of.

    `jax.pure_callback` makes jax's arrays of them first, on the thread that XLA waits for: several times slower, and with large
    arrays a known cause of deadlocks.
    """
    try:
        from jax.extend.core import Primitive
        from jax.interpreters import batching, mlir

        emit = mlir.emit_python_callback
    except (AttributeError, ImportError):
        return None
    options = {"has_side_effect": False}
    # Of jax 0.10; the releases before it have none and return one all the same.
    if "returns_token" in inspect.signature(emit).parameters:
        options["returns_token"] = False

    def lower(ctx: Any, *operands: Any, function: Any, results: Any) -> Any:
        return emit(ctx, function, None, operands, ctx.avals_in, ctx.avals_out, **options)[0]

    def run(*operands: Any, function: Any, results: Any) -> list[Any]:
        return [jnp.asarray(x) for x in function(*map(np.asarray, operands))]

    def shapes(*operands: Any, function: Any, results: Any) -> Any:
        return [jax.core.ShapedArray(*x) for x in results]

    def batch(operands: Any, axes: Any, *, function: Any, results: Any) -> Any:
        size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
        full = [x[None] if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
        wider = tuple(Shape((size, *x.shape), x.dtype) for x in results)
        found = primitive.bind(*full, function=function, results=wider)
        return found, [0] * len(found)

    primitive = Primitive("fastops_callback")
    primitive.multiple_results = True
    primitive.def_impl(run)
    primitive.def_abstract_eval(shapes)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lower)
    return primitive


def _callback(function: Callable[..., Any], shapes: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    """The results of a function of NumPy's arrays; some operands may be None."""
    primitive = _direct()
    if primitive is None:
        return list(jax.pure_callback(function, shapes, *operands, vmap_method="expand_dims"))
    given = [x is not None for x in operands]

    def fill(*arrays: Any) -> Any:
        rest = iter(arrays)
        return function(*(next(rest) if there else None for there in given))

    results = tuple(Shape(x.shape, x.dtype) for x in shapes)
    return list(primitive.bind(*(x for x in operands if x is not None), function=fill, results=results))


def refuse_twice(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function of an operation's gradient say that it has none itself; its first argument is its options."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        once = jax.custom_jvp(function, nondiff_argnums=(0,))

        def refuse(options: Any, primals: Any, tangents: Any) -> Any:
            raise _validate.not_offered(name, "differentiated once", Text("a second time"))

        once.defjvp(refuse)
        return once

    return wrap


# --- arguments ---------------------------------------------------------------------------------------------------------------------

_NUMBERS = (int, float)


def is_array(value: object) -> bool:
    """Whether jax takes it for an array: its own, a tracer, or one of NumPy's."""
    return isinstance(value, (jax.Array, np.ndarray, np.generic))


def floats(**values: object) -> list[Any]:
    """The arguments as arrays of one floating-point dtype, promoted as jax promotes."""
    for name, x in values.items():
        if not is_array(x) and (not isinstance(x, _NUMBERS) or isinstance(x, bool)):
            raise _validate.wrong_type(name, "a jax.Array", x)
    items: list[Any] = list(values.values())
    first = getattr(items[0], "dtype", None)
    if first in _validate.FLOAT_DTYPES and all(
        isinstance(x, jax.Array) and x.dtype == first and not x.weak_type for x in items
    ):
        return items
    dtypes = [x.dtype for x in items if is_array(x)]
    try:
        # Not for NumPy's float64 alone, which is jax's float32 without jax_enable_x64.
        dtype = np.dtype(jnp.result_type(*items)) if dtypes else None
    except (TypeError, ValueError):  # a dtype that jax does not know
        dtype = None
    if dtype not in _validate.FLOAT_DTYPES or not any(jnp.issubdtype(x, jnp.floating) for x in dtypes):
        got = Text(_validate.clip(" and ".join(str(x) for x in dtypes) or "numbers"))
        raise _validate.wrong_type(" and ".join(values), f"arrays of {_validate.FLOAT_NAMES}", got)
    return [_cast(x, dtype) for x in items]


def _cast(x: Any, dtype: Any) -> Any:
    if isinstance(x, jax.Array):
        return x if x.dtype == dtype and not x.weak_type else jax.lax.convert_element_type(x, dtype)
    return np.asarray(x).astype(dtype)


def given(name: str, value: Any) -> Any:
    """An argument that may be absent."""
    if value is None or is_array(value):
        return value
    if isinstance(value, (list, tuple)):
        value = np.asarray(value)
        if value.dtype != object:
            return value
    raise _validate.wrong_type(name, "a jax.Array or None", value)


Spec = tuple[tuple[int, ...], np.dtype[Any]] | None


def spec(x: Any) -> Spec:
    """What is known of an array when it is traced."""
    return None if x is None else (tuple(x.shape), np.dtype(x.dtype))


@lru_cache(maxsize=64)
def _zero(dtype: np.dtype[Any]) -> AnyArray:
    return np.zeros((), dtype)


def stand_in(x: Spec) -> Any:
    """An array of no memory for the checks that look at shapes and dtypes alone."""
    return None if x is None else np.broadcast_to(_zero(x[1]), x[0])


def is_known(x: Any) -> bool:
    """Whether the values of an argument are there, and are not those of a trace."""
    return x is not None and not isinstance(x, jax.core.Tracer)


def without_gradient(**values: Any) -> None:
    """Refuses, within a rule of differentiation, arguments that get no gradient: it would be left out silently."""
    for name, x in values.items():
        if x is not None and x.perturbed:
            wanted = "an array outside differentiation (its jax.lax.stop_gradient): it gets no gradient"
            raise _validate.wrong_type(name, wanted, Text("one that is differentiated"))


def values(tree: Any) -> Any:
    """The arrays of arguments as a rule of differentiation gets them."""
    return jax.tree.map(lambda x: x.value, tree, is_leaf=lambda x: hasattr(x, "perturbed"))


def is_zero(x: Any) -> bool:
    """Whether a cotangent is known to be 0."""
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


def solid(x: Any) -> Any:
    """A cotangent as an array."""
    return jnp.zeros(x.shape, x.dtype) if is_zero(x) else x


# --- samples of vmap ---------------------------------------------------------------------------------------------------------------


def _lead(operands: Sequence[Any], ranks: Sequence[int]) -> tuple[int, ...]:
    """The samples' axes in full, of operands that have `ranks` axes without them."""
    return _validate.broadcast_shapes(
        *(x.shape[: x.ndim - rank] for x, rank in zip(operands, ranks, strict=True) if x is not None)
    )


def _each(
    host: Callable[..., Sequence[Any]],
    axes: tuple[int, ...],
    operands: Sequence[Any],
    ranks: Sequence[int],
    results: Sequence[Shape],
) -> list[AnyArray]:
    full = [None if x is None else spread(x, axes, rank) for x, rank in zip(operands, ranks, strict=True)]
    found = [np.empty((*axes, *x.shape), x.dtype) for x in results]
    for i in np.ndindex(axes):
        for whole, part in zip(found, host(*(None if x is None else x[i] for x in full)), strict=True):
            whole[i] = part
    return found


def spread(x: AnyArray, axes: tuple[int, ...], rank: int) -> AnyArray:
    """An operand with the samples' axes in full, a view."""
    return np.broadcast_to(x, (*axes, *x.shape[x.ndim - rank :]))


def is_shared(x: AnyArray | None, rank: int) -> bool:
    """Whether all samples have this operand in common."""
    return x is None or all(n == 1 for n in x.shape[: x.ndim - rank])


def alone(x: AnyArray | None, rank: int) -> AnyArray | None:
    """A shared operand without the samples' axes."""
    return None if x is None else x.reshape(x.shape[x.ndim - rank :])
