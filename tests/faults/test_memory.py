# SPDX-License-Identifier: BSD-3-Clause
"""Memory and threads that cannot be had: every single allocation of a call fails once, and then for good."""

from __future__ import annotations

import pytest
from child import once, run, unsanitized

pytestmark = [once, unsanitized]

# Calls by name, each with warm caches; `new_ufunc` has none on purpose.
CALLS = """
rng = np.random.default_rng(3)
def f32(*shape): return rng.standard_normal(shape).astype(np.float32)
a, b, dy = f32(9, 17), f32(17, 5), f32(9, 5)
big = f32(400, 400)
x, w = f32(2, 4, 8, 8), f32(6, 4, 3, 3)
u8 = rng.integers(0, 256, (20, 30), dtype=np.uint8)
segmented = fastops.Multiplier("min-mse", segments=4)
table = fastops.Multiplier().table(8)
y = fastops.mitchell_conv2d(x, w)
ARRAY_LEVEL = {
    "matmul": lambda: fastops.mitchell_matmul(a, b),
    "matmul, threads": lambda: fastops.mitchell_matmul(big, big),
    "matmul, batch": lambda: fastops.mitchell_matmul(np.broadcast_to(a, (3, 9, 17)), b),
    "matmul, strides": lambda: fastops.mitchell_matmul(b.T, a.T),
    "matmul, segments": lambda: fastops.mitchell_matmul(a, b, multiplier=segmented),
    "matmul, float16": lambda: fastops.mitchell_matmul(a.astype(np.float16), b.astype(np.float16)),
    "matmul, float64": lambda: fastops.mitchell_matmul(a.astype(np.float64), b.astype(np.float64)),
    "conv2d": lambda: fastops.mitchell_conv2d(x, w, padding=1),
    "lut_matmul": lambda: fastops.lut_matmul(u8, u8.T, table),
    "mul_grad": lambda: fastops.mitchell_mul_grad(a, f32_fixed, a),
    "div_grad": lambda: fastops.mitchell_div_grad(a, f32_fixed, a, mode="mimic"),
    "matmul_grad": lambda: fastops.mitchell_matmul_grad(a, b, dy),
    "matmul_grad, threads": lambda: fastops.mitchell_matmul_grad(big, big, big),
    "conv2d_grad": lambda: fastops.mitchell_conv2d_grad(x, w, y),
}
queries, keys, values = f32(1, 4, 40, 8), f32(1, 2, 40, 8), f32(1, 2, 40, 5)
seen = rng.random((1, 40)) < 0.7
decay = -abs(f32(1, 2, 40))
long = f32(1, 2, 3000, 16)
attended = fastops.linear_attention(queries, keys, values, causal=True)
_, state = fastops.linear_attention(queries, keys, values, feature_map="exp", return_state=True)
def flat(results):
    return tuple(x for item in results for x in (item if isinstance(item, tuple) else (item,)))
ARRAY_LEVEL["linear attention"] = lambda: fastops.linear_attention(queries, keys, values, key_mask=seen)
ARRAY_LEVEL["linear attention, threads"] = lambda: fastops.linear_attention(long, long, long, causal=True)
ARRAY_LEVEL["linear attention, state"] = lambda: flat(fastops.linear_attention(
    queries, keys, values, causal=True, feature_map="exp", initial_state=state, return_state=True))
ARRAY_LEVEL["linear attention, backward"] = lambda: flat(fastops.linear_attention_backward(
    attended, queries, keys, values, attended, causal=True, feature_map="exp", initial_state=state, d_state=state[:2]))
ARRAY_LEVEL["softmax attention"] = lambda: fastops.softmax_attention(
    queries, keys, values, causal=True, key_mask=seen, logn="keys")
ARRAY_LEVEL["linear attention, decay, float16"] = lambda: fastops.linear_attention(
    queries.astype(np.float16), keys.astype(np.float16), values.astype(np.float16), causal=True, decay=decay)
ARRAY_LEVEL["linear attention, packed, strides"] = lambda: fastops.linear_attention(
    queries[..., ::-1], keys[..., ::-1], values[..., ::-1], causal=True, cu_seqlens=[0, 7, 40])
weights = f32(4, 3)
for pinv in ("newton", "ridge"):
    of = {"num_landmarks": 5, "pinv": pinv, "key_mask": seen, "conv_weight": weights}
    ARRAY_LEVEL[f"nystrom, {pinv}"] = lambda of=of: flat(fastops.nystrom_attention(
        queries, keys, values, **of, return_info=True))
    ARRAY_LEVEL[f"nystrom, {pinv}, backward"] = lambda of=of: fastops.nystrom_attention_backward(
        attended, queries, keys, values, **of)
own = queries[:, :, :6].copy(), keys[:, :, :6].copy()
ARRAY_LEVEL["nystrom, batch"] = lambda: fastops.nystrom_attention(queries, keys, values, num_landmarks=5, init="batch")
ARRAY_LEVEL["nystrom, batch, backward"] = lambda: fastops.nystrom_attention_backward(
    attended, queries, keys, values, num_landmarks=5, init="batch")
ARRAY_LEVEL["nystrom, landmarks, backward"] = lambda: flat(fastops.nystrom_attention_backward(
    attended, queries, keys, values, landmarks=own, return_d_landmarks=True))
ARRAY_LEVEL["nystrom, threads"] = lambda: fastops.nystrom_attention(long, long, long)
ARRAY_LEVEL["nystrom, threads, backward"] = lambda: fastops.nystrom_attention_backward(long, long, long, long)
ARRAY_LEVEL["nystrom, strides, float16"] = lambda: fastops.nystrom_attention(
    *(x.astype(np.float16)[..., ::-1] for x in (queries, keys, values)), num_landmarks=5)
ARRAY_LEVEL["softmax attention, threads"] = lambda: fastops.softmax_attention(long, long, long, causal=True)
tokens = [x[:, :, 0] for x in (queries, keys, values)]
def take_step(state, *arrays, **options):
    mine = tuple(x.copy() for x in state)
    before = [x.copy() for x in mine]
    try:
        y = fastops.linear_attention_step_(*arrays, mine, feature_map="exp", **options)
    except MemoryError:
        disarm()  # the comparison allocates as well
        if not all(np.array_equal(x, y) for x, y in zip(mine, before)):
            raise RuntimeError("half a step") from None
        raise
    return (y, *mine)
ARRAY_LEVEL["step"] = lambda: take_step(state, *tokens)
ARRAY_LEVEL["step, any form"] = lambda: take_step(state, *(np.asfortranarray(x) for x in tokens), decay=decay[:, :, 0])
START = [[f32(*shape) for shape in ((5,), (40, 30), (), (70_000,))] for _ in range(5)]
def step(name, used, call):
    # A step in place from the same start; where memory fails, nothing may have been written.
    lists = [[x.copy() for x in items] for items in START[:used]]
    strided = [[x.copy(order="F") for x in items] for items in lists]
    plans = [fastops.TensorList(items) for items in lists]
    def run(arguments, values):
        for items, start in zip(values, START):
            for x, y in zip(items, start):
                x[...] = y
        try:
            call(*arguments)
        except MemoryError:
            if not all(np.array_equal(x, y) for items, start in zip(values, START) for x, y in zip(items, start)):
                raise RuntimeError("half a result") from None
            raise
        return tuple(x.copy() for items in values for x in items)
    ARRAY_LEVEL[name] = lambda: run(lists, lists)
    ARRAY_LEVEL[name + ", strides"] = lambda: run(strided, strided)
    ARRAY_LEVEL[name + ", TensorList"] = lambda: run(plans, lists)
step("ema", 2, lambda s, p: fastops.ema_update_(s, p, 0.9))
step("ema, a decay each", 2, lambda s, p: fastops.ema_update_(s, p, [0.9, 0.8, 0.7, 0.6]))
step("adamw", 5, lambda p, g, m, v, s: fastops.adamw_step_(p, g, m, v, step=1, lr=0.1, ema=s, ema_decay=0.9, zero_grad=True))
step("sgd", 3, lambda p, g, m: fastops.sgd_step_(p, g, m, lr=0.1, momentum=0.9))
scales = np.ones(4)
def adaptive(*lists):
    scales[:] = 1
    fastops.adaptive_eg_step_(*lists, scales, lr=0.1)
step("adaptive", 5, adaptive)
f32_fixed = f32(9, 17)
mixed = f32(40, 2)[:, 0]
UFUNCS = {
    "float32": (lambda f: f(a, f32_fixed)),
    "casts": (lambda f: f(mixed.astype(np.float64)[::2], mixed[::2])),
    "integers": (lambda f: f(u8, u8)),
    "out": (lambda f: f(a, f32_fixed, out=out)),
    "reduce": (lambda f: f.reduce(a, axis=1)),
    "outer": (lambda f: f.outer(mixed, mixed)),
}
out = np.empty_like(a)
tables, rows = [[abs(f32(50, 3))] for _ in range(4)], [np.array([7, 3])]
def lazy_rows():
    lists = [[x[0].copy()] for x in tables]
    fastops.lazy_adamw_rows_(lists[0], [lists[1][0][:2]], lists[2], lists[3], rows, step=1, lr=0.1)
    return lists[0][0], lists[2][0]
ARRAY_LEVEL["lazy rows"] = lazy_rows
fastops.set_num_threads(3)
ARRAY_LEVEL["matmul, threads"]()
assert pool_threads(1) > 0, "the pool is in use"
"""

SWEEP = """
import ctypes, signal
shim = ctypes.CDLL(None)
arm, disarm = shim.fail_arm, shim.fail_disarm
arm.argtypes, disarm.argtypes, disarm.restype = (ctypes.c_long, ctypes.c_int), (), ctypes.c_long

def equal(got, want):
    got, want = (r if isinstance(r, tuple) else (r,) for r in (got, want))
    return len(got) == len(want) and all(np.array_equal(g, w, equal_nan=True) for g, w in zip(got, want))

# How a call whose k-th allocation fails ends, each in a fork: "ok", "memory" or what went wrong.
KINDS = ["ok", "memory", "another exception", "a wrong result", "the next call wrong", "the harness"]
def outcome(call, want, k, for_good):
    child = os.fork()
    if child == 0:
        code = 5
        try:
            signal.alarm(10)
            arm(k, for_good)
            try:
                result = call()
                disarm()
                code = 0 if equal(result, want) else 3
            except MemoryError:
                disarm()
                code = 1
            except BaseException as error:
                disarm()
                code = 2
                print(type(error), error, file=sys.stderr)
            if code < 2 and not equal(call(), want):
                code = 4
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else KINDS[os.WEXITSTATUS(status)]

# The number of allocations, counted in a fork as well: some happen only the first time.
def count(call):
    reader, writer = os.pipe()
    if os.fork() == 0:
        arm(0, 0)
        call()
        os.write(writer, str(disarm()).encode())
        os._exit(0)
    os.wait()
    found = int(os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    return found

def sweep(call):
    want = call()
    total = count(call)
    ends = {}
    for for_good in (0, 1):
        for k in range(1, min(total, 500) + 1):
            ends.setdefault(outcome(call, want, k, for_good), []).append((k, for_good))
    return total, ends
"""


def test_allocation_failure_is_a_memory_error(failing_malloc: str) -> None:
    code = """
    bad, failures = [], 0
    for name, call in ARRAY_LEVEL.items():
        total, ends = sweep(call)
        print(f"{name}: {total} allocations", {end: len(where) for end, where in ends.items()})
        failures += len(ends.pop("memory", ()))
        ends.pop("ok", None)
        bad += [(name, end, where[:5]) for end, where in ends.items()]
    assert not bad, bad
    assert failures > 30, failures  # the injection works
    """
    run(CALLS, SWEEP, code, env={"LD_PRELOAD": failing_malloc}, timeout=180)


def test_allocation_failure_of_a_new_ufunc(failing_malloc: str) -> None:
    code = """
    made = iter(range(10**6))
    def new_ufunc():
        value = 0.001 + next(made) * 1e-7
        return fastops.Multiplier(value).mul(np.float32(1), np.float32(1)) > 0
    total, ends = sweep(new_ufunc)
    print(total, {end: len(where) for end, where in ends.items()})
    assert set(ends) <= {"ok", "memory"}, ends
    assert ends["memory"]
    """
    run(CALLS, SWEEP, code, env={"LD_PRELOAD": failing_malloc})


def test_allocation_failure_of_ufuncs_is_no_worse_than_numpys(failing_malloc: str) -> None:
    code = """
    worse = []
    for name, case in UFUNCS.items():
        rows = {}
        for f in (np.multiply, fastops.mitchell_mul):
            total, ends = sweep(lambda: case(f))
            rows[f] = {end: len(where) for end, where in ends.items() if end not in ("ok", "memory")}
            print(f"{name}, {f.__name__}: {total} allocations", {end: len(where) for end, where in ends.items()})
        ours, theirs = (sum(rows[f].values()) for f in (fastops.mitchell_mul, np.multiply))
        if ours > theirs:
            worse.append((name, rows))
    assert not worse, worse
    """
    run(CALLS, SWEEP, code, env={"LD_PRELOAD": failing_malloc})


def test_failed_calls_leave_nothing_behind(failing_malloc: str) -> None:
    code = """
    def held():
        with open("/proc/self/status") as file:
            status = dict(line.split(":", 1) for line in file)
        return int(status["VmRSS"].split()[0]), int(status["Threads"]), len(os.listdir("/proc/self/fd"))
    def failing_round():
        failed = 0
        for name, call in ARRAY_LEVEL.items():
            for k in range(1, 12):
                arm(k, 1)
                try:
                    call()
                except MemoryError:
                    failed += 1
                finally:
                    disarm()
        return failed
    for call in ARRAY_LEVEL.values():
        call()
    for _ in range(3):
        failed = failing_round()
    before = held()
    for _ in range(20):
        failed += failing_round()
    after = held()
    print(failed, "failures", before, after)
    assert failed > 500
    assert after[0] <= before[0] + 1024, "kB"
    assert after[1:] == before[1:]
    """
    run(CALLS, SWEEP, code, env={"LD_PRELOAD": failing_malloc})


def test_address_space_limit_is_a_memory_error() -> None:
    code = """
    import resource
    a, b = np.ones((4096, 16), np.float32), np.ones((16, 4096), np.float32)
    want = fastops.mitchell_matmul(a[:64], b)
    fastops.set_num_threads(3)
    ends = []
    for step in range(16):
        child = os.fork()
        if child == 0:
            code = 5
            try:
                pages = int(open("/proc/self/statm").read().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + step * 2**24,) * 2)
                try:
                    code = 0 if np.array_equal(fastops.mitchell_matmul(a, b)[:64], want) else 3
                except MemoryError:
                    code = 1
                if not np.array_equal(fastops.mitchell_matmul(a[:64], b[:, :64]), want[:, :64]):
                    code = 4
            finally:
                os._exit(code)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(ends)
    assert set(ends) == {0, 1}, ends
    """
    run(code)


@pytest.mark.parametrize("left", [0, 1])
def test_threads_that_cannot_start_only_cost_time(failing_malloc: str, left: int) -> None:
    code = """
    import ctypes, threading
    shim = ctypes.CDLL(None)
    shim.fail_threads.argtypes = (ctypes.c_long,)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((900, 900)).astype(np.float32) for _ in range(2))
    fastops.set_num_threads(1)
    want = fastops.mitchell_matmul(a, b)
    fastops.set_num_threads(4)
    shim.fail_threads(int(sys.argv[1]))
    for _ in range(5):
        assert np.array_equal(fastops.mitchell_matmul(a, b), want)
    left = int(sys.argv[1])
    assert pool_threads(left) == left, pool_threads()
    shim.fail_threads(-1)
    assert np.array_equal(fastops.mitchell_matmul(a, b), want)
    assert pool_threads(left + 1) > left, "threads that can be had again are started"
    """
    run(code, arguments=[str(left)], env={"LD_PRELOAD": failing_malloc, "OPENBLAS_NUM_THREADS": "1"})


@pytest.mark.parametrize("threads", [1, 16])
def test_many_heads_share_the_memory_of_their_threads(threads: int) -> None:
    """The states of these heads alone would be 128 MiB; what is allowed is half a MiB a thread, and 2 for all."""
    code = """
    def held(name):
        with open("/proc/self/status") as file:
            return int(dict(line.split(":", 1) for line in file)[name].split()[0]) * 1024
    fastops.set_num_threads(int(sys.argv[1]))
    rows = np.broadcast_to(np.ones(64, np.float32), (2**10, 8, 4, 64))
    few = rows[:1, :1]
    y = np.ones(rows.shape, np.float32)  # touched
    calls = {}
    for causal in (False, True):
        calls["linear", causal] = lambda x, out, causal=causal: fastops.linear_attention(x, x, x, causal=causal, out=out)
        calls["backward", causal] = (
            lambda x, out, causal=causal: fastops.linear_attention_backward(x, x, x, x, x, causal=causal)
        )
        calls["softmax", causal] = lambda x, out, causal=causal: fastops.softmax_attention(x, x, x, causal=causal, out=out)
        pinv = "ridge" if causal else "newton"
        of = {"num_landmarks": 2, "pinv": pinv}
        calls["nystrom", pinv] = lambda x, out, of=of: fastops.nystrom_attention(x, x, x, **of, out=out)
        calls["nystrom, backward", pinv] = lambda x, out, of=of: fastops.nystrom_attention_backward(x, x, x, x, **of)
    calls["exp", True] = lambda x, out: fastops.linear_attention(x, x, x, causal=True, feature_map="exp", out=out)
    allowed = 2**21 + int(sys.argv[1]) * 2**19
    for name, call in calls.items():
        call(few, y[:1, :1].copy())
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the highest mark is what is held now
        before = held("VmRSS")
        results = call(rows, y)
        own = sum(x.nbytes for x in results) if isinstance(results, tuple) else 0
        extra = held("VmHWM") - before - own
        print(name, f"{extra / 2**20:.2f} MiB")
        del results
        assert extra <= allowed, (name, extra, allowed)
    """
    run(code, arguments=[str(threads)])


@pytest.mark.parametrize("heads", [1, 2, 3, 16])
def test_nystrom_needs_no_memory_for_the_length(failing_malloc: str, heads: int) -> None:
    """All that a call asks for beyond its results: 1 MiB a thread, 2.5 for the gradient, which keeps every step's matrix."""
    code = """
    import ctypes
    shim = ctypes.CDLL(None)
    shim.fail_arm.argtypes, shim.fail_disarm.argtypes = (ctypes.c_long, ctypes.c_int), ()
    shim.fail_bytes.restype = ctypes.c_long
    def extra(call):
        call()  # the pool's threads
        shim.fail_arm(0, 0)
        results = call()
        shim.fail_disarm()
        return shim.fail_bytes() - sum(y.nbytes for y in results)
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16):
        for threads in (1, 2, 5) if dtype is np.float32 else (2,):
            fastops.set_num_threads(threads)
            for m in (64, 128):
                for pinv in ("newton", "ridge"):
                    of = {"num_landmarks": m, "pinv": pinv}
                    asked = []
                    for n in (8_200, 10_000):
                        x = rng.standard_normal((1, int(sys.argv[1]), n, 64), np.float32).astype(dtype)
                        asked.append([extra(lambda: (fastops.nystrom_attention(x, x, x, **of),))])
                        # Rows of gradients in half precision are added up in float32.
                        if dtype is np.float32:
                            asked[-1].append(extra(lambda: fastops.nystrom_attention_backward(x, x, x, x, **of)))
                    mib = [bytes / 2**20 / threads for bytes in asked[-1]]
                    print(dtype.__name__, threads, "threads", m, pinv, *(f"{x:.2f} MiB a thread" for x in mib))
                    assert all(abs(x - y) < 2**12 for x, y in zip(*asked)), asked
                    assert all(x <= most + 0.01 for x, most in zip(mib, (1, 2.5))), mib
    """
    run(code, arguments=[str(heads)], env={"LD_PRELOAD": failing_malloc}, timeout=120)
