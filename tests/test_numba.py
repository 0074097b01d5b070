# SPDX-License-Identifier: BSD-3-Clause
"""What only the Numba backend has: fast and general loops that must agree, few signatures, a cache that may fail.

From an empty cache all its kernels compile in about 13 s of one core; the tests below run in about 5 s more.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest
from child import run
from samples import FLOATS, assert_same_bits, near_one, patterns, specials

from fastops import Multiplier, reference

if "numba" not in (
    os.environ.get("FASTOPS_TEST_BACKENDS")
    or os.environ.get("FASTOPS_BACKEND")
    or ("native" if os.environ.get("FASTOPS_TARGET") else "numba")
):
    pytest.skip("this run does not cover the numba backend", allow_module_level=True)
pytest.importorskip("numba")

from fastops import numba as backend
from fastops.numba import _kernel
from fastops.numba import _mitchell_kernels as kernels
from fastops.numba import mitchell as module

OPS = ("mul", "div", "square", "reciprocal", "sqrt", "rsqrt", "log2", "exp2")
BINARY = ("mul", "div")


def operands(op: str, a: Any, b: Any) -> tuple[Any, ...]:
    return (a, b) if op in BINARY else (a,)


@pytest.mark.parametrize("op", BINARY)
def test_float16_pairs_equal_the_reference(op: str) -> None:
    """Every bit pattern against a sample of bit patterns that has every exponent."""
    everything = np.arange(2**16, dtype=np.uint16).view(np.float16)
    rows = np.arange(0, 2**16, 1531, dtype=np.uint16).view(np.float16)[:, np.newaxis]
    with np.errstate(all="ignore"):
        got, want = (
            getattr(backend, f"mitchell_{op}")(rows, everything),
            getattr(reference, f"mitchell_{op}")(rows, everything),
        )
    assert_same_bits(got, want, rows, everything)


@pytest.mark.parametrize("op", [op for op in OPS if op not in BINARY])
@pytest.mark.parametrize("name", [name for name, dtype in FLOATS.items() if dtype.itemsize == 2])
def test_every_half_equals_the_reference(op: str, name: str) -> None:
    x = np.arange(2**16, dtype=np.uint16).view(FLOATS[name])
    with np.errstate(all="ignore"):
        assert_same_bits(getattr(backend, f"mitchell_{op}")(x), getattr(reference, f"mitchell_{op}")(x), x)


@pytest.mark.parametrize("name", ["f32", "f64"])
@pytest.mark.parametrize("op", ["mul", "div", "square", "reciprocal"])
@pytest.mark.parametrize(
    "options", [{}, {"compensation": -0.4}, {"mantissa_bits": 5}, {"subnormals": "flush"}], ids=str
)
def test_fast_loop_equals_the_general_one(name: str, op: str, options: dict[str, Any]) -> None:
    """The loop of one integer sum leaves to the general loop what it cannot do, and nothing that it gets wrong."""
    dtype = FLOATS[name]
    plan = module._Operation(op, Multiplier(**options).spec(op), op).plan(dtype)
    assert plan.fast is not None
    n = 40 * module._BLOCK + 77
    a, b = near_one(dtype, n, 1), near_one(dtype, n, 2)
    # Blocks 0 to 9: one special operand at their start or end. 20 to 23: zeros. 30 to 39: any bit patterns.
    for block, value in enumerate(specials(name)[:10]):
        (a if block % 2 else b)[block * module._BLOCK + (module._BLOCK - 1) * (block % 3 == 0)] = value
    a[20 * module._BLOCK : 22 * module._BLOCK : 3] = 0
    b[21 * module._BLOCK : 24 * module._BLOCK : 5] = -0.0
    for x, seed in ((a, 3), (b, 4)):
        x[30 * module._BLOCK :] = patterns(dtype, n - 30 * module._BLOCK, seed)
    a, b = a.view(plan.word), (a if len(operands(op, a, b)) == 1 else b).view(plan.word)
    got, want = np.empty_like(a), np.empty_like(a)
    flags = module._run(plan, a, b, got), module._any_operands(plan, a, b, want)
    assert_same_bits(got.view(dtype), want.view(dtype), a.view(dtype), b.view(dtype))
    assert flags[0] == flags[1]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("op", OPS)
def test_flags_are_those_of_the_reference(name: str, op: str) -> None:
    """Each special value, or pair of them, alone: invalid, divide and overflow where the reference raises them."""
    values = specials(name)
    for a in values:
        for b in values if op in BINARY else values[:1]:
            raised = []
            for one in (backend, reference):
                seen: set[str] = set()
                with np.errstate(all="call", under="ignore", call=lambda kind, _, seen=seen: seen.add(kind)):
                    getattr(one, f"mitchell_{op}")(*operands(op, np.full(1, a), np.full(1, b)))
                raised.append(seen)
            assert raised[0] == raised[1], (a, b)


def test_kernels_have_one_signature() -> None:
    """Compile time is what this backend pays with; operands of any layout must not add a second version of a loop."""
    a = np.ones((6, 4), np.float32)
    frozen = a[::2].T
    frozen.flags.writeable = False
    for x in (a[:4], a[::-1][:4], np.asfortranarray(a[:4]), frozen[:, :3]):
        backend.mitchell_mul(x, x)
        backend.mitchell_matmul(x, x.T, multiplier=Multiplier())
        backend.mitchell_matmul_grad(x, x.T, np.ones((4, 4), np.float32), multiplier=Multiplier(), mode="exact")
    compiled = [
        k._compiled for k in vars(kernels).values() if isinstance(k, _kernel.Kernel) and k._compiled is not None
    ]
    assert len(compiled) >= 3
    assert all(len(loop.signatures) == 1 for loop in compiled)


def test_cache_that_cannot_be_used_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba raises RuntimeError where it finds no directory for its cache and OSError where writing fails."""
    njit, errors = _kernel.njit, iter([RuntimeError("no locator"), OSError("disk full")])

    def failing(signature: Any, *, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise next(errors)
        return njit(signature, **options)

    monkeypatch.setattr(_kernel, "njit", failing)
    for _ in range(2):
        loop = _kernel.Kernel(lambda x: x + 1, _kernel.types.int64(_kernel.types.int64), {})
        assert loop(2) == 3
    assert next(errors, None) is None


def test_first_calls_at_once_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    njit = _kernel.njit

    def counting(*args: Any, **options: Any) -> Any:
        compiled.append(1)
        return njit(*args, **options)

    monkeypatch.setattr(_kernel, "njit", counting)
    loop = _kernel.Kernel(lambda x: x * x, _kernel.types.int64(_kernel.types.int64), {})
    results: list[int] = []
    barrier = threading.Barrier(4)

    def call() -> None:
        barrier.wait()
        results.append(loop(3))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [9] * 4
    # The attempt with the cache, and one without where a lambda has no file to cache beside.
    assert len(compiled) <= 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_a_kernel_compiles() -> None:
    """The child finds the lock free and no half of a compilation; by Numba's own lock too, so the fork waits for its end."""
    code = """
    import threading, warnings
    from fastops.numba import _kernel as kernels
    compiling = threading.Event()
    def slow(*signature, **options):
        compiling.set()
        time.sleep(0.3)
        return lambda function: function
    kernels.njit = slow
    loops = [kernels.Kernel(lambda x: x + 1, kernels.types.int64(kernels.types.int64), {}) for _ in range(2)]
    thread = threading.Thread(target=loops[0], args=(1,))
    thread.start()
    compiling.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: the process has threads
        child = os.fork()
    if child == 0:
        os._exit(0 if [loop(2) for loop in loops] == [3, 3] else 1)
    end = time.monotonic() + 10
    while (state := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    thread.join()
    assert loops[1](2) == 3
    assert state == (child, 0), state
    """
    run(code, timeout=60)


@pytest.mark.parametrize("threads", [2, 5])
def test_an_error_in_a_piece_reaches_the_caller(threads: int) -> None:
    before = module._threads
    backend.set_num_threads(threads)
    try:
        done = []

        def work(piece: int) -> None:
            if piece == 3:
                raise MemoryError("piece 3")
            done.append(piece)

        with pytest.raises(MemoryError, match="piece 3"):
            module._share([(i,) for i in range(1000)], work, 1 << 40)
        assert len(done) < 999
        assert all(thread.name != "fastops" for thread in threading.enumerate())
    finally:
        backend.set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "a", "b", "finite"),
    [
        # The exact product is 2.0075 * 2**127, the approximate one 1.98 * 2**127.
        ({"corrections": 1}, [1.375, 0.0], [1.46, 0.0], True),
        # The first product is 2.8 * 2**127: infinite, though the second would cancel enough of it.
        ({"compensation": "lmul-equation"}, [1.9, 1.0], [1.9, -1.5], False),
    ],
    ids=["iterative", "equation"],
)
def test_exact_forms_near_overflow_go_term_by_term(options: dict[str, Any], a: Any, b: Any, finite: bool) -> None:
    multiplier = Multiplier(**options)
    x, y = (np.array([a]) * 2.0**63).astype(np.float32), (np.array([b]) * 2.0**64).astype(np.float32).T
    got = backend.mitchell_matmul(x, y, multiplier=multiplier)
    assert np.isfinite(got).all() == finite
    np.testing.assert_array_equal(got, reference.mitchell_matmul(x, y, multiplier=multiplier))
