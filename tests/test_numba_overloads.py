# SPDX-License-Identifier: BSD-3-Clause
"""fastops within functions that Numba compiles: the bits of the ufuncs and the matrix product, or an error in words."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fastops

numba = pytest.importorskip("numba", reason="numba is not installed")
pytestmark = pytest.mark.skipif(
    fastops.show_config("dict")["backend"] != "native", reason="compiled code calls the native backend"
)

CHEAP = fastops.Multiplier("min-mse", mantissa_bits=7)
SEGMENTS = fastops.Multiplier(segments=4)
cheap_mul = CHEAP.mul
SPECIAL = (1.7, -2.9, 0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, 1e-310, 1.2e-38, 1e308, 3e38)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """Where fastops is installed, its entry point has done it already."""
    from fastops import _numba_overloads

    _numba_overloads.register()


@numba.njit
def binary_scalars(x, y):  # type: ignore[no-untyped-def]
    return (
        fastops.mitchell_mul(x, y),
        fastops.mitchell_div(x, y),
        fastops.lmul(x, y),
        cheap_mul(x, y),
        SEGMENTS.div(x, y),
    )


@numba.njit
def unary_scalars(x):  # type: ignore[no-untyped-def]
    return (
        fastops.mitchell_square(x),
        fastops.mitchell_reciprocal(x),
        fastops.mitchell_sqrt(x),
        fastops.mitchell_rsqrt(x),
        fastops.mitchell_log2(x),
        fastops.mitchell_exp2(x),
    )


@numba.njit
def mul(x, y):  # type: ignore[no-untyped-def]
    return fastops.mitchell_mul(x, y)


@numba.njit
def matmul(a, b):  # type: ignore[no-untyped-def]
    return fastops.mitchell_matmul(a, b)


def words(value: Any) -> bytes:
    """The bits, with every nan the same."""
    value = np.asarray(value)
    return np.where(np.isnan(value), value.dtype.type(np.nan), value).tobytes()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scalars_have_the_bits_of_the_ufuncs(dtype: type, native: ModuleType) -> None:
    for x in map(dtype, SPECIAL):
        wanted = [f(x) for f in (fastops.mitchell_square, fastops.mitchell_reciprocal, fastops.mitchell_sqrt)]
        wanted += [f(x) for f in (fastops.mitchell_rsqrt, fastops.mitchell_log2, fastops.mitchell_exp2)]
        assert [words(dtype(r)) for r in unary_scalars(x)] == [words(w) for w in wanted], x
        for y in map(dtype, SPECIAL):
            operations = (fastops.mitchell_mul, fastops.mitchell_div, fastops.lmul, cheap_mul, SEGMENTS.div)
            got = binary_scalars(x, y)
            assert [words(dtype(r)) for r in got] == [words(f(x, y)) for f in operations], (x, y)


def test_scalars_promote_as_numpy(native: ModuleType) -> None:
    assert mul(3, 5) == fastops.mitchell_mul(3, 5)
    assert mul(np.int8(100), np.int8(100)) == fastops.mitchell_mul(np.int8(100), np.int8(100))
    assert mul(np.float32(0.1), 3) == fastops.mitchell_mul(np.float64(np.float32(0.1)), 3)


OPERANDS: dict[str, Callable[[np.ndarray], Any]] = {
    "same": lambda a: a,
    "row": lambda a: a[:1],
    "column": lambda a: a[:, :1],
    "vector": lambda a: a[0],
    "reversed": lambda a: a[::-1, ::-1],
    "Fortran": np.asfortranarray,
    "scalar": lambda a: np.float32(1.7),
    "0-d": lambda a: np.array(1.7, np.float32),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_arrays_broadcast_as_the_ufunc(name: str, native: ModuleType) -> None:
    a = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    b = OPERANDS[name](a)
    got, wanted = mul(a, b), fastops.mitchell_mul(a, b)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)


def test_arrays_of_two_dtypes_promote_as_numpy(native: ModuleType) -> None:
    a = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    for b in (a.astype(np.float64), np.arange(9, dtype=np.int16), np.arange(9) > 4):
        got, wanted = mul(a, b), fastops.mitchell_mul(a, b)
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)
    i = np.arange(-4, 5, dtype=np.int16)
    assert mul(i, i).dtype == np.int32
    np.testing.assert_array_equal(mul(i, i), fastops.mitchell_mul(i, i))


def test_numbers_of_python_have_numbas_types(native: ModuleType) -> None:
    @numba.njit
    def scaled(x):  # type: ignore[no-untyped-def]
        return fastops.mitchell_mul(x, 3), fastops.mitchell_mul(x, 3.0), fastops.mitchell_mul(x, np.float32(3))

    x = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    for got, three in zip(scaled(x), (np.int64(3), np.float64(3), np.float32(3)), strict=True):
        wanted = fastops.mitchell_mul(x, three)
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


def test_arrays_without_elements(native: ModuleType) -> None:
    assert mul(np.empty((0, 3)), np.empty((0, 3))).shape == (0, 3)
    assert mul(np.empty((2, 0)), np.empty((2, 1))).shape == (2, 0)


def test_arrays_go_to_out(native: ModuleType) -> None:
    @numba.njit
    def into(x, y, out):  # type: ignore[no-untyped-def]
        fastops.mitchell_mul(x, y, out=out)
        return fastops.mitchell_square(out, out)

    x = np.random.default_rng(0).standard_normal((4, 6))
    out = np.empty((6, 4)).T
    assert into(x, x, out).ctypes.data == out.ctypes.data
    np.testing.assert_array_equal(out, fastops.mitchell_square(fastops.mitchell_mul(x, x)))
    with pytest.raises(ValueError, match="out must have the shape of the result"):
        into(x, x, np.empty((6, 4)).T[:3])
    frozen = np.empty_like(x)
    frozen.flags.writeable = False
    for wrong in (frozen, np.empty((4, 6), np.float32), np.empty(24)):
        with pytest.raises(numba.TypingError, match="out must be a writable array of 2 dimensions and dtype float64"):
            into(x, x, wrong)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_out_that_overlaps_is_as_numpy_has_it(dtype: type, native: ModuleType) -> None:
    @numba.njit
    def into(x, y, out):  # type: ignore[no-untyped-def]
        return fastops.mitchell_mul(x, y, out)

    @numba.njit
    def root(x, out):  # type: ignore[no-untyped-def]
        return fastops.mitchell_square(x, out)

    wide = fastops.mitchell_mul(dtype(1), dtype(1)).dtype
    views: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]] = {
        "itself": lambda m: (m, m, m),
        "shifted": lambda m: (m[:-1], m[:-1], m[1:]),
        "shifted back": lambda m: (m[1:], m[1:], m[:-1]),
        "reversed": lambda m: (m, m, m[::-1]),
        "transposed": lambda m: (m, m, m.T),
        "a row of it": lambda m: (m[3], m, m),
        "every second": lambda m: (m[::2], m[::2], m[1::2]),
        "a number of it": lambda m: (m[0, 1], m, m),
    }
    for name, view in views.items():
        memory, wanted = (np.arange(1, 65).reshape(8, 8).astype(wide) for _ in range(2))
        if wide == dtype:
            into(*view(memory))
            x, y, out = view(wanted)
            fastops.mitchell_mul(x, y, out=out)
            np.testing.assert_array_equal(memory, wanted, err_msg=name)
            root(view(memory)[1], view(memory)[2])
            fastops.mitchell_square(view(wanted)[1], out=view(wanted)[2])
            np.testing.assert_array_equal(memory, wanted, err_msg=name)
        else:
            # Operands of half the width, in the same memory.
            narrow, out = memory.ravel().view(dtype)[:64], memory.ravel()
            want = fastops.mitchell_mul(narrow, narrow)
            into(narrow, narrow, out)
            np.testing.assert_array_equal(out, want)


def test_shapes_that_do_not_fit_are_named(native: ModuleType) -> None:
    for a, b in ((np.ones((4, 6)), np.ones((4, 5))), (np.ones(3), np.ones((2, 4)))):
        with pytest.raises(ValueError, match=r"^x1 and x2 must have shapes that broadcast with each other$"):
            mul(a, b)


def test_operations_on_arrays_are_calls_of_the_kernels(native: ModuleType) -> None:
    """Numba would make loops over scalars of what it knows to be a ufunc: some hundred times as slow here."""

    @numba.njit
    def root(x):  # type: ignore[no-untyped-def]
        return fastops.mitchell_sqrt(x)

    def quickest(f: Callable[[np.ndarray], Any], x: np.ndarray) -> float:
        f(x)
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            f(x)
            times.append(time.perf_counter() - begin)
        return min(times)

    x = np.random.default_rng(0).random(50_000)
    np.testing.assert_array_equal(root(x), fastops.mitchell_sqrt(x))
    assert quickest(root, x) < 10 * quickest(fastops.mitchell_sqrt, x)


SHAPES = [
    ((5, 7), (7, 4)),
    ((3, 5, 7), (7, 4)),
    ((3, 1, 5, 7), (2, 7, 4)),
    ((7,), (7, 4)),
    ((5, 7), (7,)),
    ((2, 0), (0, 3)),
]


@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_matmul_has_the_bits_of_pythons(left: tuple[int, ...], right: tuple[int, ...], native: ModuleType) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(left), rng.standard_normal(right)
    np.testing.assert_array_equal(matmul(a, b), fastops.mitchell_matmul(a, b))


def test_matmul_of_vectors_strides_and_dtypes(native: ModuleType) -> None:
    x = np.arange(1.0, 4.0)
    assert matmul(x, x) == fastops.mitchell_matmul(x, x)
    a = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)[:, ::2]
    np.testing.assert_array_equal(matmul(a.T, a), fastops.mitchell_matmul(a.T, a))
    wide = matmul(a.T, a.astype(np.float64))
    assert wide.dtype == np.float64
    with pytest.raises(ValueError, match="b must have as many rows as a has columns"):
        matmul(a, a)
    with pytest.raises(numba.TypingError, match="a must be an array of 1 or more dimensions of float32 or float64"):
        matmul(np.arange(3), a)


@pytest.mark.parametrize("n", [3, 513])
def test_matmul_refuses_an_out_that_overlaps(n: int, native: ModuleType) -> None:
    @numba.njit
    def into(a, b, out):  # type: ignore[no-untyped-def]
        return fastops.mitchell_matmul(a, b, None, out=out)

    memory = np.random.default_rng(0).standard_normal(4 * n * n)
    a, b, after, out = memory.reshape(4, n, n)
    want = fastops.mitchell_matmul(a, b)
    for left, right, to, name in (
        (a, b, a, "a"),
        (a, b, b, "b"),
        (a.T, b, a, "a"),
        (a, b[::-1, ::-1], b, "b"),
        (a, b, memory[n * n // 2 :][: n * n].reshape(n, n), "a"),
        (a, b, memory[2 * n * n - 1 :][: n * n].reshape(n, n), "b"),
    ):
        for call in (into, lambda x, y, out: fastops.mitchell_matmul(x, y, out=out)):
            with pytest.raises(ValueError, match=rf"^out must be memory apart from {name}, got an array that overlaps"):
                call(left, right, to)
    np.testing.assert_array_equal(into(a, b, after), want)
    np.testing.assert_array_equal(into(a, b, out), want)
    assert not into(np.empty((n, 0)), np.empty((0, n)), out).any()


def test_matmul_of_half_precision_is_refused(native: ModuleType) -> None:
    half, single = np.ones((2, 2), np.float16), np.ones((2, 2), np.float32)
    for a, b in ((half, half), (half, single), (single, half)):
        with pytest.raises(numba.TypingError, match="must be an array of 1 or more dimensions of float32 or float64"):
            matmul(a, b)


def test_multipliers_are_values(native: ModuleType) -> None:
    @numba.njit
    def both(m, a, b):  # type: ignore[no-untyped-def]
        return m.mul(a, b), m.matmul(a, b), fastops.mitchell_matmul(a, b, multiplier=CHEAP)

    a = np.random.default_rng(0).standard_normal((4, 4))
    for m in (CHEAP, SEGMENTS):
        product, matrix, cheap = both(m, a, a)
        np.testing.assert_array_equal(product, m.mul(a, a))
        np.testing.assert_array_equal(matrix, m.matmul(a, a))
        np.testing.assert_array_equal(cheap, CHEAP.matmul(a, a))


def test_multipliers_made_later_are_known(native: ModuleType) -> None:
    late = fastops.Multiplier(0.01375).mul

    @numba.njit
    def use(x):  # type: ignore[no-untyped-def]
        return late(x, x)

    assert use(3.3) == late(3.3, 3.3)


def test_multipliers_are_made_while_the_module_is_imported(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # As another thread sees it before its first line has run.
    monkeypatch.setitem(sys.modules, "fastops._numba_overloads", ModuleType("fastops._numba_overloads"))
    assert fastops.Multiplier(0.01625).mul(1.0, 1.0) > 1


def test_what_cannot_be_compiled_is_said(native: ModuleType) -> None:
    only = fastops.Multiplier("lmul")

    @numba.njit
    def divide(x):  # type: ignore[no-untyped-def]
        return only.div(x, x)

    with pytest.raises(numba.TypingError, match="it is a multiplier only"):
        divide(1.5)
    with pytest.raises(numba.TypingError, match="mitchell_mul takes numbers and arrays of them"):
        mul("x", 1.5)


@pytest.mark.filterwarnings("ignore::numba.NumbaPerformanceWarning")
def test_prange_over_elements(native: ModuleType) -> None:
    @numba.njit(parallel=True)
    def products(x):  # type: ignore[no-untyped-def]
        out = np.empty_like(x)
        for i in numba.prange(x.size):
            out[i] = fastops.mitchell_mul(x[i], x[i]) + SEGMENTS.mul(x[i], x[i])
        return out

    x = np.random.default_rng(0).standard_normal(5000)
    np.testing.assert_array_equal(products(x), fastops.mitchell_mul(x, x) + SEGMENTS.mul(x, x))


def test_many_threads_make_a_multiplier_once_needed(native: ModuleType) -> None:
    m = fastops.Multiplier(0.0271)

    @numba.njit("float64(float64)", nogil=True)
    def use(x):  # type: ignore[no-untyped-def]
        return m.mul(x, x)

    barrier = threading.Barrier(8)
    seen: list[float] = []

    def work() -> None:
        barrier.wait()
        seen.append(use(3.3))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [float(m.mul(3.3, 3.3))] * 8


def test_functions_of_another_version_are_refused(native: ModuleType) -> None:
    from fastops import _core, _numba_overloads

    assert ctypes.CDLL(_core.__file__).fastops_abi_version() == _numba_overloads._ABI
    a = np.ones((2, 2))
    calls = (lambda: mul(1.5, 1.5), lambda: mul(a, a), lambda: matmul(a, a), lambda: binary_scalars(1.5, 1.5))
    for call in calls:
        call()
    table = _numba_overloads._table
    kind, table[0] = table[0], 1
    try:
        for call in calls:
            with pytest.raises(RuntimeError, match=r"^the backend must be the native one of the version"):
                call()
    finally:
        table[0] = kind


def test_cached_functions_without_their_backend_raise(tmp_path: Path) -> None:
    """They ended the process."""
    (tmp_path / "cached.py").write_text(
        "import numba, numpy as np, fastops\n"
        "from fastops import _numba_overloads\n"
        "_numba_overloads.register()\n"
        "@numba.njit(cache=True)\n"
        "def use(x): return fastops.mitchell_mul(x, x)\n"
        "for x in (1.5, np.ones(3)):\n"
        "    try: print(use(x))\n"
        "    except RuntimeError as error: print(error)\n"
    )
    said = []
    for chosen in ("native", "reference", "native"):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "cached.py")],
            env={**os.environ, "FASTOPS_BACKEND": chosen},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
    assert said[0] == said[2] == ["2.0", "[1. 1. 1.]"]
    assert len(said[1]) == 2
    assert all(line.startswith("the backend must be the native one") for line in said[1])


@pytest.mark.parametrize("chosen", ["native", "reference"])
def test_import_of_fastops_needs_no_numba(chosen: str) -> None:
    code = "import sys, fastops; fastops.mitchell_mul(1.5, 2.5); assert 'numba' not in sys.modules"
    env = {**os.environ, "FASTOPS_BACKEND": chosen}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_registration_leaves_other_backends_alone() -> None:
    code = (
        "from fastops import _numba_overloads as o\n"
        "o.register()\n"
        "assert not o._registered\n"
        "import numba, fastops\n"
        "assert numba.njit(lambda x: x + 1)(1) == 2"
    )
    env = {**os.environ, "FASTOPS_BACKEND": "reference"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
