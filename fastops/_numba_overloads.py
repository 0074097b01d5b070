# SPDX-License-Identifier: BSD-3-Clause
"""fastops inside Numba's `@njit`: the ufuncs on scalars and arrays, the matrix product, and `Multiplier` objects.

Numba calls `register` by the entry point `numba_extensions` when it compiles its first function. Compiled code calls
libfastops by a table, so that it can be cached; what a `Multiplier` needs is in the code itself, as data.
"""

from __future__ import annotations

import ctypes
import struct
import zlib
from typing import Any, Final

import numba
import numpy as np
from llvmlite import binding, ir
from numba import extending
from numba.core import cgutils as _cgutils
from numba.core import errors, imputils
from numba.core.typing import templates
from numba.np import numpy_support

from . import _backend
from ._multiplier import OPS, Multiplier

# Of no type to the checker, whatever this version of Numba declares.
types: Any = numba.types
cgutils: Any = _cgutils
TypingError: Any = errors.TypingError
lower_constant: Any = imputils.lower_constant
as_dtype: Any = numpy_support.as_dtype
from_dtype: Any = numpy_support.from_dtype
builtin_registry: Any = templates.builtin_registry
NativeValue: Any = extending.NativeValue
intrinsic: Any = extending.intrinsic
models: Any = extending.models
overload: Any = extending.overload
overload_method: Any = extending.overload_method
register_jitable: Any = extending.register_jitable
register_model: Any = extending.register_model
typeof_impl: Any = extending.typeof_impl
unbox: Any = extending.unbox

_BINARY: Final = ("mul", "div")
# Operand, result and the C interface's number of the type, in NumPy's order, which is that of the search for a loop.
_INTEGERS: Final = [
    ("i1", "i2", 4),
    ("u1", "u2", 5),
    ("i2", "i4", 6),
    ("u2", "u4", 7),
    ("i4", "i8", 8),
    ("u4", "u8", 9),
    ("i8", "i8", 10),
    ("u8", "u8", 11),
]
# Numba has no float16 on a CPU.
_FLOATS: Final = [("f4", "f4", 2), ("f8", "f8", 3)]
_SCALARS: Final = ("mul", "div", "square", "reciprocal", "sqrt", "rsqrt", "log2", "exp2")
_SYMBOLS: Final = (
    "fastops_mitchell_create",
    "fastops_mitchell_destroy",
    "fastops_mitchell_apply",
    "fastops_mitchell_matmul_flat",
    *(f"fastops_{name}_{kind}" for name in (*(f"mitchell_{op}" for op in _SCALARS), "lmul") for kind in ("f32", "f64")),
)
# FASTOPS_ABI_VERSION of the header.
_ABI: Final = 1
_NO_MEMORY: Final = "fastops has no memory for a result"
# Numba's cache outlives versions and choices of a backend, and a symbol that is missing ends the process. So compiled code knows
# one symbol, a table of functions that begins with what says which functions these are, or with 0 where there are none.
_TABLE: Final = "fastops_functions"
_KIND: Final = zlib.crc32("\n".join((str(_ABI), *_SYMBOLS)).encode())
_table: Final = (ctypes.c_uint64 * (1 + len(_SYMBOLS)))()
_ABSENT: Final = (
    "the backend must be the native one of the version of fastops that this function was compiled for, got another "
    "(delete Numba's cache, or choose FASTOPS_BACKEND=native)"
)

_registered = False


def register() -> None:
    """Makes the native backend's functions known to Numba; where another backend was chosen, none."""
    global _registered
    binding.add_symbol(_TABLE, ctypes.addressof(_table))
    if _registered or getattr(_backend, "name", None) != "native":
        return
    _registered = True

    from . import _core
    from .native import mitchell

    # A library finds the symbols of those it is linked to, so these are of the very libfastops that Python uses.
    library = ctypes.CDLL(_core.__file__)
    _table[1:] = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _SYMBOLS]
    _table[0] = _KIND
    _register_multiplier()
    _register_matmul()
    for (op, multiplier), ufunc in list(mitchell._ufuncs.items()):
        add(op, multiplier, ufunc)


def add(op: str, multiplier: Multiplier, ufunc: Any) -> None:
    """Makes one ufunc known to Numba."""
    if _registered:

        def of_arrays() -> None:
            """In the ufunc's place: Numba makes a loop over scalars of what it knows to be a ufunc."""

        overload(of_arrays, strict=False)(_element_wise(op, multiplier))
        kind = next(kind for value, kind in reversed(builtin_registry.globals) if value is of_arrays)
        builtin_registry.register_global(ufunc, kind)


# What compiled code calls.


def _function(context: Any, builder: Any, result: Any, arguments: list[Any], name: str) -> Any:
    """A function of the library, by the table; compiled code raises where the table is of another kind or empty."""
    word = ir.IntType(64)
    kind = ir.ArrayType(word, len(_table))
    table = builder.module.globals.get(_TABLE) or cgutils.add_global_variable(builder.module, kind, _TABLE)

    def item(index: int) -> Any:
        value = builder.load(builder.gep(table, [ir.Constant(word, 0), ir.Constant(word, index)]))
        value.set_metadata("invariant.load", builder.module.add_metadata([]))
        return value

    with builder.if_then(builder.icmp_unsigned("!=", item(0), ir.Constant(word, _KIND)), likely=False):
        context.call_conv.return_user_exc(builder, RuntimeError, (_ABSENT,))
    return builder.inttoptr(item(1 + _SYMBOLS.index(name)), ir.FunctionType(result, arguments).as_pointer())


def _parameters(op: str, multiplier: Multiplier) -> bytes:
    """A `fastops_mitchell_params`."""
    spec = multiplier.spec(op)
    table = [0.0] * 256
    table[: len(spec.table)] = spec.table
    numbers = (spec.form, spec.flush, spec.corrections, spec.mantissa_bits, spec.segments)
    return struct.pack("@5id256d", *numbers, spec.c, *table)


def _handle(context: Any, builder: Any, op: str, multiplier: Multiplier) -> Any:
    """The `fastops_mitchell*` of this code, made when it is first needed; whichever thread is first makes it."""

    pointer = cgutils.voidptr_t
    module = builder.module
    name = f"fastops_{multiplier._op_name(op)}"
    cell = module.globals.get(f"{name}.handle")
    if cell is None:
        data = cgutils.make_bytearray(_parameters(op, multiplier))
        constant = cgutils.global_constant(module, f"{name}.parameters", data)
        constant.align = 16
        cell = cgutils.add_global_variable(module, pointer, f"{name}.handle")
        cell.linkage = "internal"
        cell.initializer = ir.Constant(pointer, None)
    else:
        constant = module.globals[f"{name}.parameters"]
    found = cgutils.alloca_once_value(builder, builder.load_atomic(cell, "acquire", 8))
    with builder.if_then(cgutils.is_null(builder, builder.load(found)), likely=False):
        made = cgutils.alloca_once(builder, pointer)
        builder.store(ir.Constant(pointer, None), made)
        status = ir.IntType(32)
        create = _function(context, builder, status, [pointer, pointer], "fastops_mitchell_create")
        builder.call(create, [builder.bitcast(constant, pointer), builder.bitcast(made, pointer)])
        new = builder.load(made)
        swapped = builder.cmpxchg(cell, ir.Constant(pointer, None), new, "acq_rel", "acquire")
        builder.store(new, found)
        with builder.if_then(builder.not_(builder.extract_value(swapped, 1)), likely=False):
            destroy = _function(context, builder, ir.VoidType(), [pointer], "fastops_mitchell_destroy")
            builder.call(destroy, [new])
            builder.store(builder.extract_value(swapped, 0), found)
    return builder.load(found)


def _call_apply(
    context: Any, builder: Any, op: str, multiplier: Multiplier, code: int, operands: list[Any], count: Any
) -> Any:
    """Calls fastops_mitchell_apply with pairs of address and stride."""

    pointer, word, status = cgutils.voidptr_t, ir.IntType(64), ir.IntType(32)
    arguments = [pointer, status, status, *[pointer, word] * 3, word]
    function = _function(context, builder, status, arguments, "fastops_mitchell_apply")
    return builder.call(
        function,
        [
            _handle(context, builder, op, multiplier),
            ir.Constant(status, OPS.index(op)),
            ir.Constant(status, code),
            *operands,
            count,
        ],
    )


def _element(op: str, multiplier: Multiplier, loop: tuple[str, str, int]) -> Any:
    """A function of scalars of the loop's operand type, for compiled code."""

    operand, result = from_dtype(np.dtype(loop[0])), from_dtype(np.dtype(loop[1]))
    quick = {Multiplier(): f"mitchell_{op}", Multiplier("lmul"): "lmul" if op == "mul" else ""}.get(multiplier, "")
    quick = f"fastops_{quick}_{'f32' if loop[0] == 'f4' else 'f64'}" if quick and loop[0] in ("f4", "f8") else ""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if quick:
            number = context.get_value_type(operand)
            return builder.call(_function(context, builder, number, [number] * len(args), quick), args)
        places = [cgutils.alloca_once_value(builder, value) for value in args]
        places = [places[0], places[-1], cgutils.alloca_once(builder, context.get_value_type(result), zfill=True)]
        zero = ir.Constant(ir.IntType(64), 0)
        operands = [item for place in places for item in (builder.bitcast(place, cgutils.voidptr_t), zero)]
        _call_apply(context, builder, op, multiplier, loop[2], operands, ir.Constant(ir.IntType(64), 1))
        return builder.load(places[2])

    if op in _BINARY:

        @intrinsic  # type: ignore[untyped-decorator]
        def two(typingctx: Any, x1: Any, x2: Any) -> Any:
            return result(operand, operand), generate

        return two

    @intrinsic  # type: ignore[untyped-decorator]
    def one(typingctx: Any, x1: Any) -> Any:
        return result(operand), generate

    return one


def _row(op: str, multiplier: Multiplier, loop: tuple[str, str, int]) -> Any:
    """A function of arrays, each with an offset and a stride in bytes, and the number of elements, for compiled code."""

    @intrinsic  # type: ignore[untyped-decorator]
    def row(
        typingctx: Any, a: Any, at_a: Any, by_a: Any, b: Any, at_b: Any, by_b: Any, out: Any, at: Any, by: Any, n: Any
    ) -> Any:
        arrays = (a, b, out)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            operands = []
            for i, kind in enumerate(arrays):
                array = context.make_array(kind)(context, builder, args[3 * i])
                data = builder.bitcast(array.data, cgutils.voidptr_t)
                operands += [cgutils.pointer_add(builder, data, args[3 * i + 1]), args[3 * i + 2]]
            return _call_apply(context, builder, op, multiplier, loop[2], operands, args[9])

        position = types.intp
        return types.int32(a, position, position, b, position, position, out, position, position, position), generate

    return row


@register_jitable
def _bounds(x):  # type: ignore[no-untyped-def]
    low = high = np.intp(x.ctypes.data)
    for axis in range(x.ndim):
        reach = x.strides[axis] * (x.shape[axis] - 1)
        low, high = low + min(reach, 0), high + max(reach, 0)
    return low, high + x.itemsize


@register_jitable
def _overlap(x, y):  # type: ignore[no-untyped-def]
    (low, high), (first, last) = _bounds(x), _bounds(y)
    return x.size > 0 and y.size > 0 and low < last and first < high


# Element-wise operations.


def _is_none(kind: Any) -> bool:

    return kind is None or isinstance(kind, (types.NoneType, types.Omitted))


def _find_loop(op: str, kinds: list[Any]) -> tuple[str, str, int] | None:
    """The first loop that takes all operands without loss, as NumPy chooses; None where an operand is no number."""

    dtypes = []
    for kind in kinds:
        element = kind.dtype if isinstance(kind, types.Array) else types.unliteral(kind)
        if not isinstance(element, (types.Number, types.Boolean)):
            return None
        dtypes.append(np.dtype(as_dtype(element)))
    for loop in [*(_INTEGERS if op in ("mul", "square") else []), *_FLOATS]:
        wanted = np.dtype(loop[0])
        if all(np.can_cast(dtype, wanted) for dtype in dtypes):
            return loop
    return None


def _check_out(out: Any, dtype: Any, ndim: int) -> None:

    if not isinstance(out, types.Array) or out.dtype != dtype or out.ndim != ndim or not out.mutable:
        raise TypingError(f"out must be a writable array of {ndim} dimensions and dtype {dtype}, got {out}")


def _element_wise(op: str, multiplier: Multiplier) -> Any:
    """What Numba asks for an implementation, given types."""
    name = multiplier._op_name(op)

    def implement(kinds: list[Any], out: Any) -> Any:
        loop = _find_loop(op, kinds)
        if loop is None:
            raise TypingError(f"{name} takes numbers and arrays of them that NumPy's ufunc takes, got {kinds}")
        ndim = max((kind.ndim for kind in kinds if isinstance(kind, types.Array)), default=0)
        if ndim == 0:
            if not _is_none(out):
                raise TypingError(f"out must be None for scalars, got {out}")
            return _on_scalars(op, multiplier, loop, kinds)
        return _on_arrays(op, multiplier, loop, kinds, out, ndim)

    if op in _BINARY:

        def binary(x1: Any, x2: Any, out: Any = None) -> Any:
            return implement([x1, x2], out)

        return binary

    def unary(x1: Any, out: Any = None) -> Any:
        return implement([x1], out)

    return unary


def _as_scalar(kind: Any, dtype: str) -> Any:
    """A function that makes a scalar of a scalar or 0-d array."""

    wanted = from_dtype(np.dtype(dtype))
    if isinstance(kind, types.Array):
        return register_jitable(lambda x: wanted(x[()])) if kind.dtype != wanted else register_jitable(lambda x: x[()])
    if types.unliteral(kind) == wanted:
        return register_jitable(lambda x: x)
    return register_jitable(lambda x: wanted(x))


def _on_scalars(op: str, multiplier: Multiplier, loop: tuple[str, str, int], kinds: list[Any]) -> Any:
    compute = _element(op, multiplier, loop)
    first, second = _as_scalar(kinds[0], loop[0]), _as_scalar(kinds[-1], loop[0])
    if op in _BINARY:
        return lambda x1, x2, out=None: compute(first(x1), second(x2))
    return lambda x1, out=None: compute(first(x1))


def _as_array(kind: Any, dtype: str) -> Any:
    """A function that makes an array of that dtype, of at least one dimension, of a scalar or array."""

    wanted = np.dtype(dtype)
    if not isinstance(kind, types.Array):
        return register_jitable(lambda x: np.full(1, x, wanted))
    if kind.dtype == from_dtype(wanted):
        return register_jitable(lambda x: x) if kind.ndim else register_jitable(lambda x: np.full(1, x[()], wanted))
    return (
        register_jitable(lambda x: x.astype(wanted))
        if kind.ndim
        else register_jitable(lambda x: np.full(1, x[()], wanted))
    )


def _on_arrays(
    op: str, multiplier: Multiplier, loop: tuple[str, str, int], kinds: list[Any], out: Any, ndim: int
) -> Any:

    row = _row(op, multiplier, loop)
    first, second = _as_array(kinds[0], loop[0]), _as_array(kinds[-1], loop[0])
    result = np.dtype(loop[1])
    size, result_size = np.dtype(loop[0]).itemsize, result.itemsize
    if not _is_none(out):
        _check_out(out, from_dtype(result), ndim)
    # Whether elements lie one behind the other is known of most types.
    dense = all(isinstance(kind, types.Array) and kind.ndim == ndim and kind.layout == "C" for kind in kinds) and (
        _is_none(out) or out.layout == "C"
    )

    @register_jitable
    def rows(a, b, to):  # type: ignore[no-untyped-def]
        shape = to.shape
        if dense and a.shape == shape and b.shape == shape:
            return row(a, 0, size, b, 0, size, to, 0, result_size, to.size)
        left, right = np.broadcast_to(a, shape), np.broadcast_to(b, shape)
        return strided(left, right, to)

    if ndim == 1:

        @register_jitable
        def strided(a, b, to):  # type: ignore[no-untyped-def]
            return row(a, 0, a.strides[0], b, 0, b.strides[0], to, 0, to.strides[0], to.size)
    else:

        @register_jitable
        def strided(a, b, to):  # type: ignore[no-untyped-def]
            status = 0
            if to.size == 0:
                return status
            last = ndim - 1
            for index in np.ndindex(to.shape[:-1]):
                at_a, at_b, at = 0, 0, 0
                for axis in range(last):
                    at_a += index[axis] * a.strides[axis]
                    at_b += index[axis] * b.strides[axis]
                    at += index[axis] * to.strides[axis]
                status |= row(
                    a, at_a, a.strides[last], b, at_b, b.strides[last], to, at, to.strides[last], to.shape[last]
                )
            return status

    new = _is_none(out)

    @register_jitable
    def changes(x, to):  # type: ignore[no-untyped-def]
        """Whether `to`, written from its beginning, changes elements of `x` that are still to be read."""
        if not _overlap(x, to):
            return False
        return x.shape != to.shape or x.strides != to.strides or x.ctypes.data != to.ctypes.data or size != result_size

    @register_jitable
    def into(a, b, shape, out):  # type: ignore[no-untyped-def]
        if new:
            to = np.empty(shape, result)
            status = rows(a, b, to)
        else:
            to = out
            if to.shape != shape:
                raise ValueError("out must have the shape of the result")
            # As NumPy: the result is that of the operands as they were.
            status = rows(a.copy(), b.copy(), to) if changes(a, to) or changes(b, to) else rows(a, b, to)
        if status != 0:
            raise MemoryError(_NO_MEMORY)
        return to

    if op in _BINARY:

        def binary(x1, x2, out=None):  # type: ignore[no-untyped-def]
            a, b = first(x1), second(x2)
            for axis in range(1, 1 + min(a.ndim, b.ndim)):
                if a.shape[-axis] != b.shape[-axis] and a.shape[-axis] != 1 and b.shape[-axis] != 1:
                    raise ValueError("x1 and x2 must have shapes that broadcast with each other")
            return into(a, b, np.broadcast_shapes(a.shape, b.shape), out)

        return binary

    def unary(x1, out=None):  # type: ignore[no-untyped-def]
        a = first(x1)
        return into(a, a, a.shape, out)

    return unary


# Multipliers as values.


class MultiplierType(types.Opaque):  # type: ignore[misc]
    """Numba's type of one `Multiplier`."""

    def __init__(self, multiplier: Multiplier) -> None:
        self.multiplier = multiplier
        super().__init__(f"fastops.{multiplier!r}")

    @property
    def key(self) -> Multiplier:
        return self.multiplier


def _register_multiplier() -> None:

    register_model(MultiplierType)(models.OpaqueModel)

    @typeof_impl.register(Multiplier)  # type: ignore[untyped-decorator]
    def typeof_multiplier(value: Multiplier, c: Any) -> Any:
        return MultiplierType(value)

    @unbox(MultiplierType)  # type: ignore[untyped-decorator]
    def unbox_multiplier(kind: Any, value: Any, c: Any) -> Any:
        return NativeValue(c.context.get_dummy_value())

    @lower_constant(MultiplierType)  # type: ignore[untyped-decorator]
    def constant_multiplier(context: Any, builder: Any, kind: Any, value: Any) -> Any:
        return ir.Constant(cgutils.voidptr_t, None)

    for op in OPS:
        overload_method(MultiplierType, op, strict=False)(_method(op))
    overload_method(MultiplierType, "matmul", strict=False)(_method_matmul)


def _method(op: str) -> Any:
    def of(self: Any) -> Any:
        if not self.multiplier._has(op):
            raise TypingError(f"{self.multiplier!r} has no {op}: it is a multiplier only")
        return _element_wise(op, self.multiplier)

    if op in _BINARY:

        def binary(self: Any, x1: Any, x2: Any, out: Any = None) -> Any:
            compute = of(self)(x1, x2, out)
            inner = register_jitable(compute)
            return lambda self, x1, x2, out=None: inner(x1, x2, out)

        return binary

    def unary(self: Any, x1: Any, out: Any = None) -> Any:
        compute = of(self)(x1, out)
        inner = register_jitable(compute)
        return lambda self, x1, out=None: inner(x1, out)

    return unary


def _method_matmul(self: Any, a: Any, b: Any, out: Any = None) -> Any:

    inner = register_jitable(_matmul(a, b, self.multiplier, out))
    return lambda self, a, b, out=None: inner(a, b, None, out)


# The matrix product.


def _register_matmul() -> None:

    from .mitchell import mitchell_matmul

    @overload(mitchell_matmul, strict=False)  # type: ignore[untyped-decorator]
    def typed(a: Any, b: Any, multiplier: Any = None, out: Any = None) -> Any:
        if not _is_none(multiplier) and not isinstance(multiplier, MultiplierType):
            raise TypingError(f"multiplier must be a fastops.Multiplier or None, got {multiplier}")
        return _matmul(a, b, Multiplier() if _is_none(multiplier) else multiplier.multiplier, out)


def _matmul(a: Any, b: Any, multiplier: Multiplier, out: Any) -> Any:

    for name, kind in (("a", a), ("b", b)):
        if not isinstance(kind, types.Array) or not kind.ndim or kind.dtype not in (types.float32, types.float64):
            raise TypingError(f"{name} must be an array of 1 or more dimensions of float32 or float64, got {kind}")
    dtype = np.result_type(as_dtype(a.dtype), as_dtype(b.dtype))
    code = {4: 2, 8: 3}[dtype.itemsize]
    element = from_dtype(dtype)
    call = _matmul_call(multiplier, code)
    flat_a, flat_b = a.ndim == 1, b.ndim == 1
    cast_a, cast_b = a.dtype != element, b.dtype != element
    new = _is_none(out)
    plain = a.ndim <= 2 and b.ndim <= 2
    if not new:
        _check_out(out, element, max(a.ndim, b.ndim))
        if flat_a or flat_b or out.layout != "C":
            raise TypingError("out must be C-contiguous, and the operands of 2 or more dimensions, in compiled code")
    readable = register_jitable(
        (lambda x: np.ascontiguousarray(x.astype(dtype))) if cast_a else (lambda x: np.ascontiguousarray(x))
    )
    readable_b = register_jitable(
        (lambda x: np.ascontiguousarray(x.astype(dtype))) if cast_b else (lambda x: np.ascontiguousarray(x))
    )
    as_matrix = register_jitable((lambda x: x.reshape((1, x.size))) if flat_a else (lambda x: x))
    as_matrix_b = register_jitable((lambda x: x.reshape((x.size, 1))) if flat_b else (lambda x: x))
    if flat_a and flat_b:
        drop = register_jitable(lambda x: x[0, 0])
    elif flat_a:
        drop = register_jitable(lambda x: x[..., 0, :])
    elif flat_b:
        drop = register_jitable(lambda x: x[..., 0])
    else:
        drop = register_jitable(lambda x: x)

    if plain:

        @register_jitable
        def lead(x, y):  # type: ignore[no-untyped-def]
            return ()

        @register_jitable
        def offsets(x, shape):  # type: ignore[no-untyped-def]
            return np.zeros(1, np.intp)

    else:

        @register_jitable
        def lead(x, y):  # type: ignore[no-untyped-def]
            return np.broadcast_shapes(x.shape[:-2], y.shape[:-2])

        @register_jitable
        def offsets(x, shape):  # type: ignore[no-untyped-def]
            wide = np.broadcast_to(x, shape + x.shape[-2:])
            count = 1
            for length in shape:
                count *= length
            result = np.zeros(count, np.intp)
            for i, index in enumerate(np.ndindex(shape)):
                for axis in range(len(shape)):
                    result[i] += index[axis] * wide.strides[axis]
            return result

    @register_jitable
    def multiply(x, y, out):  # type: ignore[no-untyped-def]
        rows, inner, columns = x.shape[-2], x.shape[-1], y.shape[-1]
        if y.shape[-2] != inner:
            raise ValueError("b must have as many rows as a has columns")
        shape = lead(x, y)
        full = shape + (rows, columns)  # noqa: RUF005 (Numba joins tuples by +)
        if new:
            to = np.empty(full, dtype)
        else:
            to = out
            if to.shape != full:
                raise ValueError("out must have the shape of the result")
        sizes = np.array([rows, inner, inner, 1, inner, columns, columns, 1, rows, columns, columns, 1], np.intp)
        if to.size and call(x, offsets(x, shape), y, offsets(y, shape), to, offsets(to, shape), sizes) != 0:
            raise MemoryError(_NO_MEMORY)
        return to

    if new:
        check = register_jitable(lambda a, b, out: None)
    else:

        @register_jitable
        def check(a, b, out):  # type: ignore[no-untyped-def]
            if _overlap(out, a):
                raise ValueError("out must be memory apart from a, got an array that overlaps a")
            if _overlap(out, b):
                raise ValueError("out must be memory apart from b, got an array that overlaps b")

    def impl(a, b, multiplier=None, out=None):  # type: ignore[no-untyped-def]
        check(a, b, out)
        return drop(multiply(as_matrix(readable(a)), as_matrix_b(readable_b(b)), out))

    return impl


def _matmul_call(multiplier: Multiplier, code: int) -> Any:
    """A function of three arrays, each with the offsets in bytes of its matrices, and their sizes, for compiled code."""

    @intrinsic  # type: ignore[untyped-decorator]
    def call(typingctx: Any, a: Any, at_a: Any, b: Any, at_b: Any, out: Any, at: Any, sizes: Any) -> Any:
        signature = types.int32(a, at_a, b, at_b, out, at, sizes)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer, word, status = cgutils.voidptr_t, ir.IntType(64), ir.IntType(32)
            made = [
                context.make_array(kind)(context, builder, value)
                for kind, value in zip(signature.args, args, strict=True)
            ]
            count = builder.extract_value(made[5].shape, 0)
            lists = []
            # Offsets become addresses where they lie.
            for array, places in ((made[0], made[1]), (made[2], made[3]), (made[4], made[5])):
                base = builder.ptrtoint(array.data, word)
                with cgutils.for_range(builder, count) as loop:
                    place = builder.gep(places.data, [loop.index])
                    builder.store(builder.add(builder.load(place), base), place)
                lists.append(builder.bitcast(places.data, pointer))
            shapes = [builder.bitcast(builder.gep(made[6].data, [ir.Constant(word, 4 * i)]), pointer) for i in range(3)]
            arguments = [pointer, status, word, *[pointer] * 6]
            function = _function(context, builder, status, arguments, "fastops_mitchell_matmul_flat")
            pairs = [item for pair in zip(lists, shapes, strict=True) for item in pair]
            handle = _handle(context, builder, "mul", multiplier)
            return builder.call(function, [handle, ir.Constant(status, code), count, *pairs])

        return signature, generate

    return call
