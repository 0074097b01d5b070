# SPDX-License-Identifier: BSD-3-Clause
"""`parallel_apply`: right results, and an error in time for everything that may happen to a worker."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parallel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastops import WorkerDied, _workers, parallel_apply


@pytest.fixture(scope="session")
def fork_server() -> None:
    """The server that starts workers, and stays, has its descriptors before a test counts them."""
    process = multiprocessing.get_context("forkserver").Process(target=parallel.same, args=(0,))
    process.start()
    process.join()


@pytest.fixture(autouse=True)
def nothing_is_left(fork_server: None) -> Iterator[None]:
    """No process, thread or descriptor stays behind."""
    list(parallel_apply(parallel.same, [0], 1))
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    deadline = time.monotonic() + 2
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert multiprocessing.active_children() == []
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


@pytest.fixture(params=["spawn", "forkserver", "fork"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How workers are started."""
    context = multiprocessing.get_context(request.param)
    monkeypatch.setattr(_workers, "default_context", lambda: context)
    return str(request.param)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers by fork: what is tested does not depend on how they start."""
    monkeypatch.setattr(_workers, "default_context", lambda: multiprocessing.get_context("fork"))


pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("ordered", [True, False])
def test_results_are_those_of_map(ordered: bool, workers: int, method: str) -> None:
    results = list(parallel_apply(math.sqrt, range(100), workers, ordered=ordered))
    assert (results if ordered else sorted(results)) == [math.sqrt(i) for i in range(100)]


@pytest.mark.usefixtures("quick")
def test_callback_gets_every_result() -> None:
    got: list[float] = []
    assert parallel_apply(math.sqrt, range(50), 2, callback=got.append, ordered=True) is None
    assert got == [math.sqrt(i) for i in range(50)]


@pytest.mark.usefixtures("quick")
def test_work_is_shared_and_workers_are_started_as_needed() -> None:
    assert len(set(parallel_apply(parallel.pid, range(20), 2))) == 2
    assert len(set(parallel_apply(parallel.pid, range(1), 9))) == 1
    assert list(parallel_apply(parallel.pid, [], 9)) == []


@pytest.mark.usefixtures("quick")
def test_large_items_and_results_pass_each_other() -> None:
    items = [bytes([i]) * size for i, size in enumerate([5_000_000, 0, 70_000, 5_000_000, 1, 2**16, 2**20] * 3)]
    assert list(parallel_apply(parallel.same, items, 2, ordered=True)) == items


@pytest.mark.usefixtures("quick")
@settings(max_examples=15)
@given(st.lists(st.integers(0, 200_000), max_size=12), st.integers(1, 3))
def test_any_sizes_come_back(sizes: list[int], workers: int) -> None:
    items = [b"x" * size for size in sizes]
    assert list(parallel_apply(parallel.same, items, workers, ordered=True)) == items


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("ordered", [True, False])
def test_items_are_read_as_needed(ordered: bool) -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield read

    results = parallel_apply(parallel.same, items(), 2, ordered=ordered)
    assert isinstance(results, Iterator)
    assert read == 0
    for _ in range(10):
        next(results)
    assert read < 60
    results.close()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("quick")
def test_a_slow_first_item_holds_back_what_is_read() -> None:
    read = 0

    def items() -> Iterator[float]:
        nonlocal read
        for read in range(1000):
            yield 0.5 if read == 0 else 0.0

    results = parallel_apply(parallel.sleeps, items(), 2, ordered=True)
    assert next(results) == 0.5
    assert read <= 20
    assert len(list(results)) == 999


def test_an_exception_arrives_with_its_traceback(method: str) -> None:
    with pytest.raises(ValueError, match="no good: 3") as caught:
        list(parallel_apply(parallel.fails_at_3, range(10), 2))
    assert caught.value.__notes__ == ["in a worker process, at item 3"]
    assert "in fails_at_3" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("func", "how"),
    [
        (parallel.killed_at_3, "was ended by SIGKILL"),
        (parallel.ends_at_3, "ended with exit code 7"),
    ],
)
def test_a_dead_worker_is_an_error_within_2_seconds(func: Any, how: str, method: str) -> None:
    seen = [time.monotonic()]
    results = (seen.append(time.monotonic()) or result for result in parallel_apply(func, range(10), 2))
    with pytest.raises(WorkerDied, match=rf"worker \d {how} at item 3"):
        list(results)
    assert time.monotonic() - seen[-1] < 2


@pytest.mark.usefixtures("quick")
def test_a_worker_that_leaves_a_child_is_seen_to_be_dead() -> None:
    start = time.monotonic()
    with pytest.raises(WorkerDied, match="SIGKILL at item 0"):
        list(parallel_apply(parallel.daemonic_grandchild, [0], 1))
    assert time.monotonic() - start < 2


def test_a_stopped_worker_is_waited_for_up_to_the_timeout(method: str) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"item 3 took longer than 0\.5 s"):
        list(parallel_apply(parallel.stops_at_3, range(10), 2, timeout=0.5))
    assert time.monotonic() - start < 10


def test_workers_are_spawned_every_time() -> None:
    """The first spawn of a process settles multiprocessing's default, fork; the program's choice stays open all the same."""
    code = """
    import multiprocessing, parallel
    from fastops import parallel_apply
    parallel.MARK = "inherited"
    for turn in range(3):
        assert list(parallel_apply(parallel.mark, [0, 1], 2)) == ["as imported"] * 2, turn
        assert multiprocessing.get_start_method(allow_none=True) is None
    multiprocessing.set_start_method("fork")
    assert list(parallel_apply(parallel.mark, [0], 1)) == ["inherited"]
    """
    tests = str(Path(parallel.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("quick")
def test_a_stopped_worker_that_goes_on_is_no_error() -> None:
    results = parallel_apply(parallel.pid, range(40), 1)
    worker = next(results)
    os.kill(worker, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (worker, signal.SIGCONT)).start()
    assert list(results) == [worker] * 39


@pytest.mark.usefixtures("quick")
def test_a_stopped_worker_does_not_hold_up_a_large_item() -> None:
    def items() -> Iterator[bytes]:
        yield b"x"
        # Its answer comes first, or has come: a worker that is stopped before it times out at item 0.
        _workers._ready(channels, 5)
        os.kill(pids[0], signal.SIGSTOP)
        yield b"x" * 10_000_000

    pids: list[int] = []
    channels: list[Any] = []
    results = parallel_apply(parallel.same, items(), 1, timeout=2)
    real = _workers._Worker

    class Watched(real):  # type: ignore[misc, valid-type]
        def __init__(self, *rest: Any) -> None:
            super().__init__(*rest)
            pids.append(self.process.pid)
            channels.append(self.channel)

    _workers._Worker = Watched  # type: ignore[misc]
    try:
        with pytest.raises(TimeoutError, match="item 1 took longer"):
            list(results)
    finally:
        _workers._Worker = real  # type: ignore[misc]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("ordered", [True, False])
def test_a_slow_consumer_is_no_slow_item(ordered: bool) -> None:
    got = []
    for result in parallel_apply(parallel.sleeps, [0.05] * 16, 2, ordered=ordered, timeout=0.6):
        got.append(result)
        # The items that the workers hold are done long before this.
        time.sleep(0.8 if 2 < len(got) < 6 else 0)
    assert got == [0.05] * 16


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("items", [0, 1, 2, 3])
def test_no_more_workers_than_items_are_started(items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    real = _workers._Worker
    monkeypatch.setattr(_workers, "_Worker", lambda *rest: started.append(rest) or real(*rest))
    assert sorted(parallel_apply(parallel.same, range(items), 9)) == list(range(items))
    assert len(started) <= items


@pytest.mark.usefixtures("quick")
def test_slow_items_within_the_timeout_are_no_error() -> None:
    assert sorted(parallel_apply(parallel.sleeps, [0.2] * 6, 2, timeout=0.8)) == [0.2] * 6


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("func", "items", "error", "words"),
    [
        (lambda x: x, [1], TypeError, "func must be picklable to be sent to worker processes"),
        (math.sqrt, [threading.Lock()], TypeError, "item 0 must be picklable"),
        (parallel.function_result, [1], TypeError, "the result must be picklable to be sent back"),
        (
            parallel.bad_result,
            [1],
            TypeError,
            "the result of item 0 cannot be unpickled: LookupError: not to be loaded",
        ),
        (parallel.BadAtLoading(), [1], TypeError, "func must be callable"),
        (parallel.same, [parallel.BadAtLoading()], LookupError, "not to be loaded"),
        (parallel.odd_error, [1], RuntimeError, "OddError: odd 1 2"),
        (parallel.mute_error, [1], RuntimeError, r"Mute: \(its text cannot be had\)"),
        (parallel.leaves_at_3, [3], RuntimeError, "SystemExit: 7"),
    ],
)
def test_what_cannot_be_carried_is_an_error(func: Any, items: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        list(parallel_apply(func, items, 2))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((3, [1]), {}, TypeError, "func must be callable, got 3"),
        ((math.sqrt, 3), {}, TypeError, "iterable must be an iterable, got 3"),
        ((math.sqrt, [1], 0), {}, ValueError, r"workers must be an integer in \[1, 1024\], got 0"),
        ((math.sqrt, [1], 1.5), {}, TypeError, "workers must be an integer"),
        ((math.sqrt, [1]), {"callback": 3}, TypeError, "callback must be callable or None, got 3"),
        ((math.sqrt, [1]), {"ordered": 1}, TypeError, "ordered must be True or False, got 1"),
        ((math.sqrt, [1]), {"timeout": 0}, ValueError, "timeout must be a finite number in"),
    ],
)
def test_arguments_are_checked_before_any_work(
    arguments: Any, options: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        parallel_apply(*arguments, **options)


@pytest.mark.usefixtures("quick")
def test_errors_around_the_workers_end_them() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise LookupError("dry")

    with pytest.raises(LookupError, match="dry"):
        list(parallel_apply(parallel.same, items(), 2))

    def fails(result: object) -> None:
        raise LookupError("callback")

    with pytest.raises(LookupError, match="callback") as caught:
        parallel_apply(parallel.same, range(100), 2, callback=fails)
    # Not when the error is forgotten, whose traceback may be kept for long.
    assert caught.value is not None
    assert multiprocessing.active_children() == []
    # Left in the middle.
    for _ in parallel_apply(parallel.same, range(100), 2):
        break


def test_an_alarm_while_workers_are_started_leaves_the_handlers() -> None:
    """Its handler raises within the calls that set them back."""

    def alarm(*_: Any) -> None:
        raise TimeoutError("alarm")

    def starts() -> None:
        with _workers._uninterrupted():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            os.kill(os.getpid(), signal.SIGALRM)  # heard when the mask is what it was

    handler, mine = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGALRM, alarm)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        with pytest.raises(TimeoutError, match="alarm"):
            starts()
        assert signal.getsignal(signal.SIGINT) is handler
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGALRM, mine)


@pytest.mark.usefixtures("quick")
def test_several_at_once() -> None:
    first, second = (parallel_apply(parallel.same, range(30), 2, ordered=True) for _ in range(2))
    assert list(zip(first, second, strict=True)) == [(i, i) for i in range(30)]
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(list(parallel_apply(parallel.same, range(30), 2, ordered=True))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [list(range(30))] * 4


def script(folder: Path, code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(code))
    settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60} | options
    return subprocess.run([sys.executable, str(path)], check=False, **settings)


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_script_without_a_guard_is_told_so(start: str, tmp_path: Path) -> None:
    done = script(
        tmp_path,
        f"""
        import math, multiprocessing
        from fastops import parallel_apply
        multiprocessing.set_start_method({start!r}, force=True)
        print(list(parallel_apply(math.sqrt, [1, 4], 2)))
        """,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "__name__" in done.stderr.splitlines()[-1], done.stderr
    assert len(done.stderr) < 20_000


@pytest.mark.parametrize("options", ["", "-O", "-OO", "-X dev"])
def test_a_script_with_a_guard(options: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        textwrap.dedent(
            """
            from fastops import parallel_apply
            def double(x):
                return 2 * x
            if __name__ == "__main__":
                print(list(parallel_apply(double, range(4), 2, ordered=True)))
            """
        )
    )
    command = [sys.executable, *options.split(), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 2, 4, 6]\n", "")


def test_a_function_of_an_interactive_session_is_told_so() -> None:
    code = "from fastops import parallel_apply\ndef f(x): return x\nlist(parallel_apply(f, [1], 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "TypeError: the function cannot be loaded in a worker process" in done.stderr


def test_a_generator_that_is_never_ended_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    done = script(
        tmp_path,
        """
        import time
        from fastops import parallel_apply
        if __name__ == "__main__":
            results = parallel_apply(time.sleep, [0, 60, 60, 60], 2)
            next(results)
        """,
        timeout=20,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
