# SPDX-License-Identifier: BSD-3-Clause
"""Forks, threads that come and go, processes of multiprocessing, the end of the interpreter, subinterpreters."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from child import END, once, run, unsanitized

pytestmark = once

WORK = (
    END
    + """
rng = np.random.default_rng(5)
a, b = (rng.standard_normal((400, 400)).astype(np.float32) for _ in range(2))
x = rng.standard_normal((2, 3, 12, 12)).astype(np.float32)
w = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
u8 = rng.integers(0, 256, (64, 64), dtype=np.uint8)
table = fastops.Multiplier().table(8)
long = np.linspace(0.1, 9, 300_000, dtype=np.float32)
tensors = [rng.standard_normal(n).astype(np.float32) for n in (3, 200_000, 77)]
def stepped():
    lists = [[x.copy() for x in tensors] for _ in range(5)]
    fastops.adamw_step_(*lists[:4], step=1, lr=0.1, ema=fastops.TensorList(lists[4]), ema_decay=0.9)
    fastops.ema_update_(lists[4], lists[0], 0.99)
    return np.concatenate([x for items in lists for x in items])
rows = rng.standard_normal((1, 2, 1500, 32)).astype(np.float32)
def attended():
    y, state = fastops.linear_attention(rows, rows, rows, causal=True, return_state=True)
    some = rows[:, :, :200]
    landmarks = [
        x
        for pinv in ("newton", "ridge")
        for x in (
            fastops.nystrom_attention(rows, rows, rows, num_landmarks=32, pinv=pinv),
            *fastops.nystrom_attention_backward(rows, rows, rows, rows, num_landmarks=32, pinv=pinv),
        )
    ]
    return np.concatenate([x.ravel() for x in (y, *state, fastops.softmax_attention(some, some, some), *landmarks)])
def answers():
    return (stepped(), fastops.mitchell_matmul(a, b), fastops.mitchell_conv2d(x, w), fastops.lut_matmul(u8, u8, table),
            fastops.mitchell_mul(long, long), fastops.Multiplier(0.03).mul(a, b), attended())
def right():
    return all(np.array_equal(got, want, equal_nan=True) for got, want in zip(answers(), WANT))
def answer_in_child(threads=None):
    code = 1
    try:
        if threads:
            fastops.set_num_threads(threads)
        code = 0 if right() and right() else 3
        if code == 0 and fastops.get_num_threads() > 1 and pool_threads(1) == 0:
            code = 4  # the child has no pool of its own
    finally:
        os._exit(code)
fastops.set_num_threads(4)
WANT = answers()
assert pool_threads(1) > 0, "the pool is in use"
"""
)


def test_fork_after_use() -> None:
    code = """
    ends = []
    for i in range(100):
        child = os.fork()
        if child == 0:
            answer_in_child(1 + i % 4 if i % 2 else None)
        assert right(), "the parent goes on using the pool"
        ends.append(end(child))
    assert ends == [0] * 100, ends
    """
    run(WORK, code)


@pytest.mark.parametrize("seconds", [6, pytest.param(120, marks=pytest.mark.nightly)])
@unsanitized
def test_fork_at_any_moment(seconds: int) -> None:
    """Another thread forks while this one and a third are inside calls."""
    code = """
    import random, threading
    stop, ends, wrong = threading.Event(), [], []
    def use(seed):
        while not stop.is_set():
            if not right():
                wrong.append(seed)
            fastops.Multiplier(random.random() / 4).mul(a, b)  # a new ufunc: Python's locks are held too
    def forks():
        deadline = time.monotonic() + float(sys.argv[1])
        while time.monotonic() < deadline or len(ends) < 20:
            time.sleep(random.random() * 0.01)
            child = os.fork()
            if child == 0:
                answer_in_child()
            ends.append(end(child))
    users = [threading.Thread(target=use, args=(i,)) for i in range(2)]
    forker = threading.Thread(target=forks)
    for thread in (*users, forker):
        thread.start()
    forker.join()
    stop.set()
    for thread in users:
        thread.join()
    print(len(ends), "forks")
    assert set(ends) == {0}, ends
    assert not wrong
    """
    # Python 3.12 warns of forks beside threads; that is what is tested.
    run(
        WORK, code, arguments=[str(seconds)], timeout=seconds + 24, env={"PYTHONWARNINGS": "ignore::DeprecationWarning"}
    )


def test_fork_while_another_thread_holds_a_python_lock() -> None:
    code = """
    from fastops.native import mitchell
    with mitchell._lock:  # as a thread that makes a ufunc holds it
        child = os.fork()
        if child == 0:
            fastops.Multiplier(0.0123).mul(a, b)
            answer_in_child()
    assert end(child) == 0
    """
    run(WORK, code, env={"PYTHONWARNINGS": "ignore::DeprecationWarning"})


def test_fork_from_a_signal_handler_in_a_call() -> None:
    """The poll of a long call runs Python's handlers: one that forks leaves a child without the pool's threads."""
    code = """
    import signal, threading
    child = None
    def forks(number, frame):
        global child
        if child is None:
            child = os.fork()
    signal.signal(signal.SIGUSR1, forks)
    big = np.ones((1800, 1800), np.float32)
    parent = os.getpid()
    threading.Timer(0.05, lambda: os.kill(parent, signal.SIGUSR1)).start()
    whole = True
    try:
        # In the child the call may end with an error, but must end, and not with half a result.
        while child is None and whole:
            whole = bool((fastops.mitchell_matmul(big, big) == 1800).all())
    except RuntimeError as error:
        assert os.getpid() != parent, repr(error)
        whole = True
    if os.getpid() != parent:
        if not whole:
            os._exit(6)
        answer_in_child()
    assert whole
    assert child is not None and end(child) == 0
    assert right()
    """
    run(WORK, code, env={"PYTHONWARNINGS": "ignore::DeprecationWarning"})


@pytest.mark.parametrize("count", [800, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_thread_churn_leaves_nothing(count: int) -> None:
    """Short threads call kernels while eight others set the number of threads."""
    code = """
    import threading
    def held():
        with open("/proc/self/status") as file:
            status = dict(line.split(":", 1) for line in file)
        return int(status["Threads"]), len(os.listdir("/proc/self/fd")), int(status["VmRSS"].split()[0])
    stop, wrong = threading.Event(), []
    def settings(i):
        n = i
        while not stop.is_set():
            n += 1
            fastops.set_num_threads(1 + n % 4)
            if not 1 <= fastops.get_num_threads() <= 4:
                wrong.append(n)
            time.sleep(0.001)
    def short():
        if not np.array_equal(fastops.mitchell_matmul(a, b), WANT[1]):
            wrong.append("matmul")
    def churn(count):
        for start in range(0, count, 10):
            threads = [threading.Thread(target=short) for _ in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    setters = [threading.Thread(target=settings, args=(i,)) for i in range(8)]
    for thread in setters:
        thread.start()
    churn(200)
    before = held()
    churn(int(sys.argv[1]))
    after = held()
    stop.set()
    for thread in setters:
        thread.join()
    print(before, after)
    assert not wrong, wrong[:5]
    assert after[0] <= before[0] + 3 and after[1] == before[1]  # the pool itself may still have grown to its 3 threads
    assert after[2] <= before[2] + 2048, "kB"
    """
    # Large blocks straight from the system and back: what the allocator keeps for each thread is not a leak.
    run(
        WORK,
        code,
        arguments=[str(count)],
        timeout=30 if count < 5000 else 300,
        env={"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )


def test_workers_of_every_start_method(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import multiprocessing, sys
import numpy as np
import fastops

def work(seed):
    a = np.random.default_rng(seed).standard_normal((150, 150)).astype(np.float32)
    return fastops.mitchell_matmul(a, a), fastops.Multiplier("min-mse").mul

if __name__ == "__main__":
    fastops.set_num_threads(2)
    want = [work(seed) for seed in range(4)]  # the pool is in use before the workers start
    for method in ("spawn", "forkserver", "fork"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            for (got, ufunc), (result, same) in zip(pool.map(work, range(4)), want):
                assert np.array_equal(got, result), method
                assert ufunc is same, method
        print(method)
"""
    )
    done = subprocess.run(
        [sys.executable, "-P", str(program)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["spawn", "forkserver", "fork"]


DAEMON = """
import threading, atexit
big = np.ones((1500, 1500), np.float32)
long = np.ones(3_000_000, np.float32)
fastops.set_num_threads(2)
started = threading.Event()
def calls():
    while True:
        started.set()
        if sys.argv[1] == "matmul":
            fastops.mitchell_matmul(big, big)
        else:
            fastops.mitchell_mul(long, long)
threading.Thread(target=calls, daemon=True).start()
started.wait()
time.sleep(0.02 + 0.01 * float(sys.argv[3]))
if sys.argv[2] == "atexit":
    atexit.register(lambda: fastops.mitchell_matmul(big[:200], big))
if sys.argv[2] == "del":
    for name in [name for name in sys.modules if name.startswith("fastops")]:
        del sys.modules[name]
    del fastops
if sys.argv[2] == "os._exit":
    os._exit(7)
sys.exit(7)
"""


@pytest.mark.parametrize("repeats", [2, pytest.param(25, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("what", ["matmul", "ufunc"])
@pytest.mark.parametrize("how", ["plain", "atexit", "del", "os._exit"])
def test_exit_while_a_daemon_thread_is_in_a_kernel(what: str, how: str, repeats: int) -> None:
    for i in range(repeats):
        start = time.monotonic()
        run(DAEMON, arguments=[what, how, str(i)], want=7, timeout=20)
        assert time.monotonic() - start < 15


@pytest.mark.skipif(sys.version_info < (3, 12), reason="subinterpreters with a GIL of their own came with Python 3.12")
def test_subinterpreter_is_refused_or_works() -> None:
    """A clean ImportError (NumPy's own, as of today) and never a crash; the main interpreter goes on."""
    code = """
    try:
        import _interpreters as interpreters
    except ImportError:
        import _xxsubinterpreters as interpreters
    inner = [
        "try:",
        "    import fastops",
        "    assert fastops.mitchell_mul(3.0, 3.0) == 8.0",
        "except ImportError as error:",
        "    assert 'interpreter' in str(error), error",
    ]
    for _ in range(3):
        child = interpreters.create()
        failure = interpreters.run_string(child, chr(10).join(inner))
        assert failure is None, failure
        interpreters.destroy(child)
    assert right()
    """
    run(WORK, code)


def test_lists_and_averages_that_a_fork_interrupts_are_free_in_the_child():
    run(
        WORK,
        """
        import threading
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks in a process with threads, from Python 3.12 on
        shadows, params = (fastops.TensorList([np.zeros(3_000_000, np.float32)]) for _ in range(2))
        ema = fastops.EMA([np.zeros(3_000_000, np.float32)])
        stop = threading.Event()
        def loop():
            while not stop.is_set():
                fastops.ema_update_(shadows, params, 0.5)
                ema.update()
        thread = threading.Thread(target=loop)
        thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    fastops.ema_update_(shadows, params, 0.5)
                    ema.update()
                    code = 0
                finally:
                    os._exit(code)
            ended = end(child)
            assert ended == 0, ended
        stop.set()
        thread.join()
        """,
        timeout=60,
    )
