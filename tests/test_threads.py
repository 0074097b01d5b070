# SPDX-License-Identifier: BSD-3-Clause
"""Threads: the same bits for every number of them and from many callers at once; the refusal of CPUs below v2."""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fastops
from fastops import _tensors
from fastops._attention import LinearOptions

Array = NDArray[Any]


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = fastops.get_num_threads()
    yield
    fastops.set_num_threads(before)


def _calls(module: ModuleType) -> dict[str, Callable[[], tuple[Array, ...]]]:
    """Calls large enough for the pool, of sizes that no split divides."""
    rng = np.random.default_rng(4)
    a, b = (rng.standard_normal((211, 173)).astype(np.float32) for _ in range(2))
    tall, batch = a.T.copy(), rng.standard_normal((7, 60, 173)).astype(np.float32)
    x = rng.standard_normal((3, 4, 19, 17)).astype(np.float32)
    w = rng.standard_normal((6, 4, 3, 3)).astype(np.float32)
    data = rng.integers(0, 256, (120, 130), dtype=np.uint8)
    table = fastops.Multiplier().table(8).astype(np.int32)
    long = rng.standard_normal(400_003).astype(np.float32)
    out = np.empty((120, 120), np.int64)
    plain, pair = fastops.Multiplier(), (1, 1)
    conv = {"stride": pair, "padding": pair, "dilation": pair, "groups": 1, "multiplier": plain}
    dy = module.mitchell_conv2d(x, w, **conv)
    tensors = [long, long[:5], long[5:70_000].reshape(5, -1)]
    adam = _tensors.AdamStep(0.999, 0.0, 0.1, 0.999, 0.001, 0.01, 1.5, 1e-8, 0.1, True)

    def step() -> tuple[Array, ...]:
        lists = [[np.abs(x) for x in tensors] for _ in range(5)]
        module.adamw_step(*lists, adam)
        module.ema_update((lists[0],), lists[1], (0.3,), None)
        return tuple(x for items in lists for x in items)

    rows = rng.standard_normal((1, 3, 301, 24)).astype(np.float32)
    elu = LinearOptions("elu", True, True, 0.0, 0.0, 1.0, None)

    def attend(causal: bool) -> tuple[Array, ...]:
        y, gradients = np.empty_like(rows), tuple(np.empty_like(rows) for _ in range(3))
        state = np.empty((1, 3, 24, 24), np.float32), np.empty((1, 3, 24), np.float32)
        options, none = elu._replace(causal=causal), (None,) * 4
        module.linear_attention(rows, rows, rows, y, options, *none, state)
        module.linear_attention_backward(rows, rows, rows, rows, y, *gradients, options, *none, None, None)
        return (y, *state, *gradients)

    def softmax() -> tuple[Array, ...]:
        y = np.empty_like(rows)
        module.softmax_attention(rows, rows, rows, y, True, 0.2, None, None, None)
        return (y,)

    return {
        "linear attention": lambda: attend(False),
        "linear attention, causal": lambda: attend(True),
        "softmax attention": softmax,
        "step": step,
        "mul": lambda: (module.mitchell_mul(long, long),),
        "matmul": lambda: (module.mitchell_matmul(a, tall, multiplier=plain),),
        "matmul, batch": lambda: (module.mitchell_matmul(batch, tall, multiplier=plain),),
        "matmul, long depth": lambda: (module.mitchell_matmul(long[None, :], long[:, None], multiplier=plain),),
        "matmul, float16": lambda: (
            module.mitchell_matmul(a.astype(np.float16), tall.astype(np.float16), multiplier=plain),
        ),
        "matmul_grad": lambda: module.mitchell_matmul_grad(a, tall, a @ tall, multiplier=plain, mode="exact"),
        "conv2d": lambda: (module.mitchell_conv2d(x, w, **conv),),
        "conv2d_grad": lambda: module.mitchell_conv2d_grad(x, w, dy, mode="exact", **conv),
        "mul_grad": lambda: module.mitchell_mul_grad(a, b, a, multiplier=plain, mode="exact"),
        "lut_matmul": lambda: (module.lut_matmul(data, data.T, table, out=out).copy(),),
    }


def _same(got: tuple[Array, ...], want: tuple[Array, ...]) -> bool:
    return all(
        np.array_equal(np.atleast_1d(g).view(np.uint8), np.atleast_1d(w).view(np.uint8))
        for g, w in zip(got, want, strict=True)
    )


def test_results_do_not_depend_on_the_number_of_threads(native: ModuleType, target: str) -> None:
    calls = _calls(native)
    fastops.set_num_threads(1)
    want = {name: call() for name, call in calls.items()}
    for count in (2, 3, 5, 16):
        fastops.set_num_threads(count)
        different = [name for name, call in calls.items() if not _same(call(), want[name])]
        assert not different, f"{count} threads"


def test_sixteen_callers_at_once_get_equal_bits(native: ModuleType, target: str) -> None:
    calls = {name: call for name, call in _calls(native).items() if name != "lut_matmul"}  # its out is shared
    want = {name: call() for name, call in calls.items()}
    fastops.set_num_threads(4)
    wrong: list[str] = []
    start = threading.Barrier(16)

    def use(i: int) -> None:
        start.wait()
        names = list(calls)
        order = names[i % len(names) :] + names[: i % len(names)]
        wrong.extend(name for name in order if not _same(calls[name](), want[name]))

    callers = [threading.Thread(target=use, args=(i,)) for i in range(16)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_number_of_threads_is_set_from_many_threads() -> None:
    seen: list[int] = []

    def settings(i: int) -> None:
        for n in range(200):
            fastops.set_num_threads(1 + (i + n) % 7)
            seen.append(fastops.get_num_threads())

    setters = [threading.Thread(target=settings, args=(i,)) for i in range(8)]
    for setter in setters:
        setter.start()
    for setter in setters:
        setter.join()
    assert set(seen) <= set(range(1, 8))


def test_cpu_below_v2_is_refused_in_one_line(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastops import _core

    monkeypatch.setattr(_core, "cpu_info", lambda: {"architecture": "x86_64", "brand": "old", "level": 1})
    with pytest.raises(ImportError, match="x86-64-v2") as caught:
        importlib.reload(native)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="there is no /proc here")
def test_workers_keep_their_cpus(native: ModuleType) -> None:
    """A worker that sleeps is barred from its waker's CPU, and takes it back: none stays behind with fewer CPUs."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU leaves no choice")
    ones = np.ones(2**22, np.float32)  # blocks for all workers that other tests have started
    out = np.empty_like(ones)

    def cpus() -> list[set[int]]:
        tasks = [
            int(path.parent.name) for path in Path("/proc/self/task").glob("*/comm") if path.read_text() == "fastops\n"
        ]
        return [os.sched_getaffinity(task) for task in tasks]

    fastops.set_num_threads(max(3, len(cpus()) + 1))
    for _ in range(20):
        native.mitchell_mul(ones, ones, out=out)
        time.sleep(0.002)  # the workers fall asleep
    end = time.monotonic() + 5
    while any(has != os.sched_getaffinity(0) for has in cpus()) and time.monotonic() < end:
        native.mitchell_mul(ones, ones, out=out)
        time.sleep(0.01)
    assert len(cpus()) >= 2
    assert all(has == os.sched_getaffinity(0) for has in cpus())
