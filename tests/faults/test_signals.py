# SPDX-License-Identifier: BSD-3-Clause
"""Ctrl-C, storms of other signals, small stacks."""

from __future__ import annotations

import pytest
from child import INTERRUPT, SANITIZED, once, run, unsanitized

pytestmark = once

LONG = """
import signal, threading
n = 5000
a = np.ones((n, n), np.float32)
small = np.ones((150, 150), np.float32)
table = fastops.Multiplier().table(8)
u8 = np.ones((2500, 2500), np.uint8)
image = np.broadcast_to(np.ones((64, 120, 120), np.float32), (48, 64, 120, 120))
kernel = np.ones((128, 64, 3, 3), np.float32)
# Keys of stride 0 by the million; a row is 64 numbers.
ones = np.ones((1, 64), np.float32)
keys, some = np.broadcast_to(ones, (2**24, 64)), np.broadcast_to(ones, (400_000, 64))
rows = np.ones((3000, 64), np.float32)
different = np.random.default_rng(0).standard_normal((4000, 16), np.float32)
few = np.arange(2**24) % 2**20 < 3  # seen
# Heads of some microseconds, by the hundred thousand.
heads, column = (np.broadcast_to(np.ones(n, np.float32), (2**16, 8, 24, n)) for n in (64, 1))
four, short = (np.broadcast_to(np.ones(n, np.float32), (2**17, 8, 4, n)) for n in (4, 1))
CALLS = {
    "linear attention": lambda: fastops.linear_attention(ones, keys, keys),
    "linear attention, causal": lambda: fastops.linear_attention(ones, keys, keys, causal=True),
    "linear attention, exp": lambda: fastops.linear_attention(ones, keys, keys, causal=True, feature_map="exp"),
    "linear attention, backward": lambda: fastops.linear_attention_backward(some, some, some, some, some, causal=True),
    "softmax attention": lambda: fastops.softmax_attention(rows, keys, keys, causal=True),
    "small heads": lambda: fastops.linear_attention(heads, heads, column),
    "small heads, causal": lambda: fastops.linear_attention(heads, heads, column, causal=True),
    "small heads, backward": lambda: fastops.linear_attention_backward(short, four, four, short, short, causal=True),
    "small heads, softmax": lambda: fastops.softmax_attention(heads, heads, column),
    "nystrom": lambda: fastops.nystrom_attention(ones, keys, keys, landmarks=(rows[:64], rows[:64])),
    "nystrom, means": lambda: fastops.nystrom_attention(keys, keys, keys, num_landmarks=4, key_mask=few),
    "nystrom, many landmarks": lambda: fastops.nystrom_attention(different, different, different, num_landmarks=2500),
    "nystrom, many steps": lambda: fastops.nystrom_attention(rows, rows, rows, num_landmarks=600, iterations=10**6),
    "nystrom, ridge": lambda: fastops.nystrom_attention(
        different, different, different, num_landmarks=3500, pinv="ridge"),
    "nystrom, backward": lambda: fastops.nystrom_attention_backward(some, some, some, some),
    "nystrom, many landmarks, backward": lambda: fastops.nystrom_attention_backward(
        different, different, different, different, num_landmarks=1500),
    "nystrom, ridge, backward": lambda: fastops.nystrom_attention_backward(
        different, different, different, different, num_landmarks=2500, pinv="ridge"),
    "small heads, nystrom": lambda: fastops.nystrom_attention(heads, heads, column, num_landmarks=3),
    "small heads, nystrom, batch": lambda: fastops.nystrom_attention(heads, heads, column, num_landmarks=3, init="batch"),
    "small heads, nystrom, backward": lambda: fastops.nystrom_attention_backward(
        short, four, four, short, num_landmarks=2),
    "matmul": lambda: fastops.mitchell_matmul(a, a),
    "matmul, segments": lambda: fastops.mitchell_matmul(a, a, multiplier=fastops.Multiplier("min-mse", segments=4)),
    "matmul_grad": lambda: fastops.mitchell_matmul_grad(a, a, a),
    "lut_matmul": lambda: fastops.lut_matmul(u8, u8, table),
    "conv2d": lambda: fastops.mitchell_conv2d(image, kernel),
}
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "call",
    [
        "matmul",
        "matmul, segments",
        "matmul_grad",
        "lut_matmul",
        "conv2d",
        "linear attention",
        "linear attention, causal",
        "linear attention, exp",
        "linear attention, backward",
        "softmax attention",
        "small heads",
        "small heads, causal",
        "small heads, backward",
        "small heads, softmax",
        "nystrom",
        "nystrom, means",
        "nystrom, many landmarks",
        "nystrom, many steps",
        "nystrom, ridge",
        "nystrom, backward",
        "nystrom, many landmarks, backward",
        "nystrom, ridge, backward",
        "small heads, nystrom",
        "small heads, nystrom, batch",
        "small heads, nystrom, backward",
    ],
)
@unsanitized
def test_interrupt_ends_a_long_call(call: str, threads: int) -> None:
    """KeyboardInterrupt within 100 ms on an idle machine; 300 ms are allowed, and more where others crowd the CPUs."""
    code = """
    fastops.set_num_threads(int(sys.argv[2]))
    interrupted(sys.argv[1], 0.08, CALLS[sys.argv[1]])
    assert fastops.mitchell_matmul(small, small)[3, 3] == 150, "usable afterwards"
    """
    run(INTERRUPT, LONG, code, arguments=[call, str(threads)])


def test_interrupt_in_another_thread_waits_for_the_main_one() -> None:
    """Python delivers signals in its main thread: a call in another thread is not interrupted."""
    code = """
    result = []
    thread = threading.Thread(target=lambda: result.append(fastops.mitchell_matmul(a[:800, :800], a[:800, :800])))
    thread.start()
    try:
        send()
        time.sleep(5)
    except KeyboardInterrupt:
        pass
    thread.join()
    assert result[0][5, 5] == 800
    """
    run(INTERRUPT, LONG, code)


def test_signal_storm_changes_nothing() -> None:
    code = """
    seen = 0
    def count(number, frame):
        global seen
        seen += 1
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((600, 600)).astype(np.float32) for _ in range(2))
    want = fastops.mitchell_matmul(x, y)
    shadows, params = [np.zeros(150_000, np.float32)], [np.ones(150_000, np.float32)]
    signal.signal(signal.SIGUSR1, count)
    stop = threading.Event()
    def storm():
        while not stop.is_set():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.001)
    thread = threading.Thread(target=storm)
    thread.start()
    end = time.monotonic() + 1.5
    rounds = 0
    while time.monotonic() < end:
        assert np.array_equal(fastops.mitchell_matmul(x, y), want)
        for shadow in shadows:
            shadow[:] = 0
        fastops.ema_update_(shadows, params, 0.5)
        assert all((shadow == 0.5).all() for shadow in shadows)
        rounds += 1
    stop.set()
    thread.join()
    print(seen, "signals,", rounds, "products")
    assert seen > 50 and rounds > 2
    """
    run(LONG, code)


@pytest.mark.parametrize("threads", [1, 2])
def test_interrupt_leaves_a_step_whole(threads: int) -> None:
    """A call that has begun is finished: Ctrl-C is heard before or after it, never in the middle."""
    code = """
    import random
    fastops.set_num_threads(int(sys.argv[1]))
    shadows = [np.zeros(n, np.float32) for n in (2_000_000, 7, 500_000)]
    params = [np.ones(x.shape, np.float32) for x in shadows]
    heard = 0
    for _ in range(30):
        for shadow in shadows:
            shadow[:] = 0
        calls = 0
        try:
            timer = threading.Timer(random.random() * 0.01, send)
            timer.start()
            while calls < 500:
                fastops.ema_update_(shadows, params, 0.5)
                calls += 1
        except KeyboardInterrupt:
            heard += 1
        timer.join()
        values = {float(x) for shadow in shadows for x in (shadow.min(), shadow.max())}
        assert len(values) == 1, values
    assert heard >= 28, heard
    fastops.ema_update_(shadows, params, 0.0)
    assert (shadows[0] == 1).all()
    """
    run(INTERRUPT, LONG, code, arguments=[str(threads)])


def test_handler_that_raises_ends_the_call_with_its_own_error() -> None:
    code = """
    class Stop(Exception):
        pass
    def raises(number, frame):
        raise Stop
    signal.signal(signal.SIGALRM, raises)
    signal.setitimer(signal.ITIMER_REAL, 0.08)
    try:
        CALLS["matmul"]()
        raise SystemExit("not interrupted")
    except Stop:
        pass
    assert fastops.mitchell_matmul(small, small)[3, 3] == 150
    """
    run(LONG, code)


def test_small_thread_stack_is_enough() -> None:
    code = """
    threading.stack_size(int(sys.argv[1]))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 10, 10)).astype(np.float32)
    w = rng.standard_normal((6, 4, 3, 3)).astype(np.float32)
    m = rng.standard_normal((120, 120)).astype(np.float32)
    bytes_ = rng.integers(0, 256, (90, 90), dtype=np.uint8)
    segmented = fastops.Multiplier("min-mse", segments=8)
    def everything():
        yield fastops.mitchell_mul(m, m)
        yield fastops.mitchell_mul(m.astype(np.float16), m.astype(np.float16))
        yield fastops.mitchell_div(m.astype(np.float64), 3.0)
        for multiplier in (None, segmented, fastops.Multiplier(corrections=2)):
            for dtype in (np.float16, np.float32, np.float64):
                yield fastops.mitchell_matmul(m.astype(dtype), m.astype(dtype), multiplier=multiplier)
            yield fastops.mitchell_conv2d(x, w, multiplier=multiplier)
        yield from fastops.mitchell_matmul_grad(m, m, m)
        yield from fastops.mitchell_conv2d_grad(x, w, fastops.mitchell_conv2d(x, w))
        yield from fastops.mitchell_mul_grad(m, m, m)
        yield fastops.lut_matmul(bytes_, bytes_, table)
        for layout in ("C", "F"):
            lists = [[m.copy(order=layout), m[0].copy(), abs(m)] for _ in range(5)]
            fastops.ema_update_(lists[0], lists[1], 0.9)
            fastops.adamw_step_(*lists[:4], step=1, lr=0.1, ema=lists[4], ema_decay=0.9)
            fastops.sgd_step_(*lists[:3], lr=0.1, momentum=0.9)
            fastops.adaptive_eg_step_(*lists, np.ones(3), lr=0.1)
            fastops.lazy_adamw_rows_(*lists[:4], step=1, lr=0.1)
            for items in lists:
                yield from items
    want = list(everything())
    for count in (1, 3):
        fastops.set_num_threads(count)
        got = []
        thread = threading.Thread(target=lambda: got.extend(everything()))
        thread.start()
        thread.join()
        assert len(got) == len(want)
        assert all(np.array_equal(g, w_, equal_nan=True) for g, w_ in zip(got, want))
    """
    run(LONG, code, arguments=[str((1024 if SANITIZED else 64) * 1024)])
