# SPDX-License-Identifier: BSD-3-Clause
"""Memory beyond the arrays: guard pages on both sides for every length and offset, and sizes beyond any memory."""

from __future__ import annotations

import pytest
from child import SANITIZED, once, run, unsanitized

# An array of any length that ends at an unreadable page, or begins after one.
GUARDED = """
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
PAGE = mmap.PAGESIZE
class Guarded:
    def __init__(self, pages):
        self.size = pages * PAGE
        base = libc.mmap(None, self.size + 2 * PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value)
        self.start = base + PAGE
        assert libc.mprotect(self.start, self.size, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.start))
    def at_end(self, shape, dtype, before_end=0):
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        stop = self.size - before_end
        return self.bytes[stop - count : stop].view(dtype).reshape(shape)
    def at_start(self, shape, dtype, offset=0):
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[offset : offset + count].view(dtype).reshape(shape)
first, second, third, result, more = (Guarded(16) for _ in range(5))
rng = np.random.default_rng(1)
def fill(array):
    if array.dtype.kind in "iu":
        array[...] = rng.integers(0, 100, array.shape)
    else:
        array[...] = rng.standard_normal(array.shape)
    return array
try:
    from ml_dtypes import bfloat16
    FLOATS = [np.float16, bfloat16, np.float32, np.float64]
except ImportError:
    FLOATS = [np.float16, np.float32, np.float64]
# Lanes of the widest level, four times, and one.
def lengths(dtype):
    return range(4 * 64 // np.dtype(dtype).itemsize + 2)
"""


def test_guard_pages_are_felt() -> None:
    """The harness itself: one element further is a fault."""
    code = """
    data = first.at_end((4,), np.float32)
    outside = np.lib.stride_tricks.as_strided(data, (5,), (4,))
    print(fastops.mitchell_mul(outside, outside))
    """
    run(GUARDED, code, want=1 if SANITIZED else -11)


def test_elementwise_stays_inside(target: str) -> None:
    code = """
    fastops.set_num_threads(1)
    op = fastops.Multiplier("min-mse", segments=4)
    BINARY = [fastops.mitchell_mul, fastops.mitchell_div, op.mul]
    UNARY = [fastops.mitchell_square, fastops.mitchell_reciprocal, fastops.mitchell_sqrt, fastops.mitchell_rsqrt,
             fastops.mitchell_log2, fastops.mitchell_exp2, op.sqrt]
    INTEGERS = [(np.uint8, np.uint16), (np.int16, np.int32), (np.uint32, np.uint64), (np.int64, np.int64)]
    with np.errstate(all="ignore"):
        for dtype in FLOATS:
            size = np.dtype(dtype).itemsize
            for n in lengths(dtype):
                places = [Guarded.at_end] if n % 3 else [Guarded.at_end, Guarded.at_start]
                for place in places:
                    a, b, out = fill(place(first, (n,), dtype)), fill(place(second, (n,), dtype)), place(result, (n,), dtype)
                    for f in BINARY:
                        f(a, b, out=out)
                        assert np.array_equal(out, f(a.copy(), b.copy()), equal_nan=True)
                    for f in UNARY:
                        f(a, out=out)
                    f(a, out=a)
            # Every byte offset: misaligned operands and results at the page's end.
            for offset in range(1, 64):
                for n in (1, 7, 16, 33):
                    a, out = fill(first.at_end((n,), dtype, offset)), result.at_end((n,), dtype, offset)
                    b = fill(second.at_end((n,), dtype))
                    fastops.mitchell_mul(a, b, out=out)
                    assert np.array_equal(out, fastops.mitchell_mul(a.copy(), b.copy()), equal_nan=True)
                    a, out = fill(first.at_start((n,), dtype, offset)), result.at_start((n,), dtype, offset)
                    fastops.mitchell_mul(a, a, out=out)
        for small, wide in INTEGERS:
            for n in lengths(small):
                a, b = fill(first.at_end((n,), small)), fill(second.at_end((n,), small))
                out = result.at_end((n,), wide)
                fastops.mitchell_mul(a, b, out=out)
                fastops.mitchell_square(a, out=out)
        # Strides in both directions.
        for n in range(1, 70):
            a = fill(first.at_end((2 * n - 1,), np.float32))
            out = result.at_end((2 * n - 1,), np.float32)
            fastops.mitchell_mul(a[::2], a[::-2], out=out[::-2])
    """
    run(GUARDED, code, env={"FASTOPS_TARGET": target} if target != "-" else {})


def test_products_stay_inside(target: str) -> None:
    code = """
    fastops.set_num_threads(2)
    table = fastops.Multiplier().table(8)
    FORMS = [fastops.Multiplier(), fastops.Multiplier("min-mse", segments=4), fastops.Multiplier(corrections=1)]
    shapes = [(m, k, n) for m in (1, 2, 5, 7, 13) for k in (1, 2, 9) for n in (1, 3, 15, 16, 17, 31, 33, 49, 65)]
    for i, (m, k, n) in enumerate(shapes):
        for dtype in FLOATS:
            for place in (Guarded.at_end, Guarded.at_start):
                a, b = fill(place(first, (m, k), dtype)), fill(place(second, (k, n), dtype))
                out = place(result, (m, n), dtype)
                form = FORMS[i % 3]
                fastops.mitchell_matmul(a, b, multiplier=form, out=out)
                assert np.array_equal(out, fastops.mitchell_matmul(a.copy(), b.copy(), multiplier=form))
                fastops.mitchell_matmul(fill(place(first, (k, m), dtype)).T, fill(place(second, (n, k), dtype)).T, out=out)
        dy = fill(third.at_end((m, n), np.float32))
        fastops.mitchell_matmul_grad(fill(first.at_end((m, k), np.float32)), fill(second.at_end((k, n), np.float32)), dy)
        u, v = fill(first.at_end((m, k), np.uint8)), fill(second.at_end((k, n), np.uint8))
        out = result.at_end((m, n), np.int64)
        fastops.lut_matmul(u, v, table, out=out)
        assert np.array_equal(out, fastops.lut_matmul(u.copy(), v.copy(), table))
    for m, k, n in ((5, 400, 70), (33, 8, 401), (40, 33, 97)):
        for place in (Guarded.at_end, Guarded.at_start):
            u, v = fill(place(first, (m, k), np.uint8)), fill(place(second, (k, n), np.uint8))
            out = place(result, (m, n), np.int32)
            fastops.lut_matmul(u, v, table, out=out)
            assert np.array_equal(out, fastops.lut_matmul(u.copy(), v.copy(), table))
            fastops.lut_matmul(fill(place(first, (k, m), np.uint8)).T, fill(place(second, (n, k), np.uint8)).T, table, out=out)
    for h, w_ in ((3, 3), (4, 7), (8, 16), (5, 17), (8, 9)):
        for c, o, kernel in ((1, 1, 1), (3, 5, 2), (4, 6, 3)):
            x, w = fill(first.at_end((2, c, h, w_), np.float32)), fill(second.at_end((o, c, kernel, kernel), np.float32))
            y = fastops.mitchell_conv2d(x, w, padding=1)
            out = result.at_end(y.shape, np.float32)
            fastops.mitchell_conv2d(x, w, padding=1, out=out)
            assert np.array_equal(out, y)
            dy = fill(third.at_end(y.shape, np.float32))
            fastops.mitchell_conv2d_grad(x, w, dy, padding=1)
    for n in range(0, 70):
        a, b, dy = (fill(g.at_end((n,), np.float32)) for g in (first, second, third))
        fastops.mitchell_mul_grad(a, b, dy)
        fastops.mitchell_div_grad(a, b, dy, mode="mimic")
    """
    run(GUARDED, code, env={"FASTOPS_TARGET": target} if target != "-" else {})


def test_attention_stays_inside(target: str) -> None:
    code = """
    fastops.set_num_threads(2)
    MAPS = ("elu", "relu", "relu2", "identity", "exp", "softmax", "favor", "cosine")
    guards = [Guarded(16) for _ in range(18)]
    turn = 0
    for dtype in FLOATS:
        wide = np.float64 if dtype is np.float64 else np.float32
        for n, m in ((1, 1), (7, 7), (16, 16), (33, 33), (9, 40), (35, 3)):
            for d, e in ((1, 1), (3, 7), (8, 16), (17, 9), (4, 33)):
                place = Guarded.at_end if turn % 3 else Guarded.at_start
                name, causal = MAPS[turn % 8], turn // 8 % 2 == 0
                turn += 1
                free = iter(guards)
                def put(shape, kind=dtype):
                    return fill(place(next(free), shape, kind)) if kind is not bool else place(next(free), shape, bool)
                q, k, v, y = put((1, 2, n, d)), put((1, 1, m, d)), put((1, 1, m, e)), put((1, 2, n, e))
                options = {"causal": causal, "feature_map": name}
                options["key_mask"] = put((1, m), bool)
                options["key_mask"][...] = np.arange(m) % 3 != 1
                features = d
                if name == "favor":
                    features, options["projection"] = 5, put((5, d), wide)
                if name == "cosine":
                    features = d + 1
                if causal and name not in ("softmax", "favor"):
                    options["decay"] = put((1, 1, m), wide)
                    options["decay"][...] = -abs(options["decay"])
                shapes = [(1, 1, features, e), (1, 1, features)]
                state = [put(shape, wide) for shape in shapes]
                state[1][...] = 1
                if name in ("exp", "softmax", "favor"):
                    state.append(put(shapes[1], wide))
                    state[2][...] = 2
                got, after = fastops.linear_attention(q, k, v, **options, initial_state=state, return_state=True, out=y)
                copies = {key: x.copy() if hasattr(x, "copy") else x for key, x in options.items()}
                plain = [x.copy() for x in (q, k, v)], [x.copy() for x in state]
                want, _ = fastops.linear_attention(*plain[0], **copies, initial_state=plain[1], return_state=True)
                assert got is y and np.array_equal(y, want, equal_nan=True)
                dy, seeds = put(y.shape), [put(shape, wide) for shape in shapes]
                found = fastops.linear_attention_backward(dy, q, k, v, y, **options, initial_state=state, d_state=seeds)
                again = fastops.linear_attention_backward(
                    dy.copy(), *plain[0], want, **copies, initial_state=plain[1], d_state=[x.copy() for x in seeds]
                )
                for x, same in zip([*found[:3], *found[3]], [*again[:3], *again[3]]):
                    assert np.array_equal(x, same, equal_nan=True)
                kept = {key: options[key] for key in ("feature_map", "projection") if key in options}
                fastops.linear_attention_step_(q[:, :, -1], k[:, :, -1], v[:, :, -1], state, **kept, out=y[:, :, 0])
                fastops.softmax_attention(q, k, v, causal=causal, key_mask=options["key_mask"], logn="keys", out=y)
                want = fastops.softmax_attention(*plain[0], causal=causal, key_mask=copies["key_mask"], logn="keys")
                assert np.array_equal(y, want, equal_nan=True)
                of = {"num_landmarks": 4, "pinv": ("newton", "ridge")[turn % 2], "normalize": turn % 3 == 0}
                of["key_mask"] = options["key_mask"]
                if turn % 4 == 0:
                    of["landmarks"] = tuple(put((1, h, 5, d), wide) for h in (2, 1))
                if n == m:
                    of["conv_weight"] = put((2, 3), wide)
                copies = {
                    key: tuple(map(np.copy, x)) if key == "landmarks" else x.copy() if hasattr(x, "copy") else x
                    for key, x in of.items()
                }
                fastops.nystrom_attention(q, k, v, **of, out=y)
                assert np.array_equal(y, fastops.nystrom_attention(*plain[0], **copies), equal_nan=True)
                for x, same in zip(
                    fastops.nystrom_attention_backward(dy, q, k, v, **of),
                    fastops.nystrom_attention_backward(dy.copy(), *plain[0], **copies),
                ):
                    assert np.array_equal(x, same, equal_nan=True)
    # Rows of other strides, and packed sequences.
    for n in range(1, 40):
        q, k, v = (fill(g.at_end((1, 2, 2 * n - 1, 5), np.float32))[:, :, ::2] for g in guards[:3])
        y = guards[3].at_end((1, 2, 2 * n - 1, 5), np.float32)[:, :, ::-2]
        ends = guards[4].at_end((3,), np.int64)
        ends[...] = 0, n // 3, n
        fastops.linear_attention(q, k, v, causal=True, cu_seqlens=ends, out=y)
        fastops.softmax_attention(q[:, ::-1], k, v, causal=True, cu_seqlens=ends, out=y)
        for m in (1, 5):
            fastops.nystrom_attention(q, k, v, num_landmarks=m, out=y)
            fastops.nystrom_attention_backward(y, q, k, v, num_landmarks=m)
    """
    run(GUARDED, code, env={"FASTOPS_TARGET": target} if target != "-" else {})


@once
@unsanitized
@pytest.mark.parametrize(
    "call",
    [
        "fastops.linear_attention(wide(2**31, 1), wide(2**31, 1), wide(2**31, 2**31))",
        "fastops.linear_attention(wide(2**40, 1), wide(1, 1), wide(1, 1))",
        "fastops.linear_attention(wide(1, 2**40), wide(1, 2**40), wide(1, 1))",
        "fastops.linear_attention(wide(2**20, 1), wide(1, 1), wide(1, 2**40))",
        "fastops.linear_attention(wide(2**40, 1, 1, 1), wide(2**40, 1, 1, 1), wide(2**40, 1, 1, 2**40), return_state=True)",
        "fastops.linear_attention(wide(1, 4), wide(2**40, 4), wide(2**40, 1), causal=True, decay=np.full(2**40, -1.0))",
        "fastops.linear_attention_backward(wide(1, 1), wide(1, 4), wide(2**40, 4), wide(2**40, 1), wide(1, 1))",
        "fastops.softmax_attention(wide(2**40, 1), wide(1, 1), wide(1, 1))",
        "fastops.softmax_attention(wide(2**33, 1), wide(1, 1), wide(1, 1), logn='keys')",
        "fastops.favor_projection(2**20, 2**20)",
        "fastops.mitchell_matmul(wide(2**33, 1), wide(1, 2**33))",
        "fastops.mitchell_matmul(wide(2**30, 4), wide(4, 2**30))",
        "fastops.mitchell_matmul(wide(2**40, 1), wide(1, 4))",
        "fastops.mitchell_matmul(wide(2**20, 2**12, 8), wide(2**20, 8, 2**20))",
        "fastops.lut_matmul(wide(2**33, 1, dtype=np.uint8), wide(1, 2**33, dtype=np.uint8), table)",
        "fastops.mitchell_conv2d(wide(2**20, 1, 2**15, 2**15), wide(2**15, 1, 1, 1))",
        "fastops.mitchell_conv2d(wide(1, 1, 2**31 - 1, 2**31 - 1), wide(2**10, 1, 1, 1))",
        "fastops.mitchell_conv2d(small, small, padding=2**31 - 1)",
        "fastops.mitchell_mul_grad(wide(2**40), wide(1), wide(2**40))",
        "fastops.mitchell_mul_grad(wide(2**31, 1), wide(1, 2**31), wide(2**31, 2**31))",
        "fastops.mitchell_matmul_grad(wide(2**33, 1), wide(1, 2**33), wide(2**33, 2**33))",
        "fastops.mitchell_conv2d_grad(wide(2**20, 1, 2**15, 2**15), wide(2**15, 1, 1, 1), wide(2**20, 2**15, 2**15, 2**15))",
        "fastops.mitchell_mul(wide(2**40), wide(2**40))",
    ],
)
def test_size_beyond_memory_is_refused(call: str) -> None:
    code = f"""
    def wide(*shape, dtype=np.float32):
        return np.broadcast_to(np.ones((), dtype), shape)
    table = fastops.Multiplier().table(8)
    small = np.ones((1, 1, 3, 3), np.float32)
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))  # a machine whose kernel promises any amount
    try:
        {call}
    except (MemoryError, ValueError) as error:
        print(type(error).__name__, error)
        assert len(str(error)) < 200
    else:
        raise AssertionError("accepted")
    assert fastops.mitchell_matmul(small, small).shape == (1, 1, 3, 3)
    """
    run(code)
