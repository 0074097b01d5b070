# SPDX-License-Identifier: BSD-3-Clause
"""A process that times one implementation: it reads requests as JSON lines on stdin and answers on its first stdout."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from fastops.bench.case import Implementation, Task


def time_batch(task: Task, calls: int, warm: bool = True) -> float:
    """Seconds a call, over `calls` calls in a row; `warm` makes an untimed one first, for the caches."""
    call, args = task.call, task.args
    collecting = gc.isenabled()
    gc.disable()
    try:
        if warm:
            call(*args)
        start = time.perf_counter_ns()
        for _ in itertools.repeat(None, calls):
            call(*args)
        return (time.perf_counter_ns() - start) / calls * 1e-9
    finally:
        if collecting:
            gc.enable()


def calibrate(task: Task, seconds: float) -> tuple[int, float]:
    """Calls that make a batch of about `seconds`, and the seconds of one call."""
    calls = 1
    while True:
        once = time_batch(task, calls)
        if once * calls >= seconds / 4 or calls >= 1 << 20:
            return max(1, round(seconds / max(once, 1e-9))), once
        calls *= 4


def extra_memory(task: Task) -> float | None:
    """Bytes by which the resident memory of this process grows during a call, at its peak; None where Linux does not say."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        # What earlier calls freed would be taken again without a trace.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        before = _status("VmRSS")
        result = task.call(*task.args)
        peak = _status("VmHWM")
    except (OSError, KeyError):
        return None
    del result
    return max(peak - before, 0.0)


def _status(name: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    return 1024.0 * float(lines[name].split()[0])


def _libraries(recipe: str) -> dict[str, str]:
    """Versions of what this process loaded, the BLAS with the kernel that it picked among them."""
    found: dict[str, str] = {}
    for name in ("numpy", "numba", "torch", "jax"):
        if name in sys.modules:
            found[name] = sys.modules[name].__version__
    if recipe == "exact":
        try:
            import threadpoolctl
        except ImportError:
            return found
        for pool in threadpoolctl.threadpool_info():
            if pool["user_api"] == "blas":
                kernel = pool.get("architecture") or "unknown kernel"
                found["blas"] = f"{pool['internal_api']} {pool['version']}, {kernel}, {pool['num_threads']} threads"
    return found


class Server:
    """State of one worker: at most one prepared task."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.row: Implementation | None = None
        self.warm = True

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request; `hello`, `prepare`, `calibrate`, `batch` and `release` are known."""
        action = request["action"]
        if action == "hello":
            import fastops

            return {"file": fastops.__file__}
        if action == "prepare":
            self.task = None
            family = importlib.import_module(f"fastops.bench.{request['family']}")
            case = next(case for case in family.cases() if case.group == request["group"])
            row = request["row"]
            self.row = Implementation(**(row | {"env": tuple(map(tuple, row["env"]))}))
            task: Task = family.prepare(case, self.row)
            error = task.check()
            self.task = task
            figures = {"error": error, "work": task.work, "whole": task.whole, "note": task.note}
            figures["memory"] = extra_memory(task) if task.memory else None
            return figures | {"libraries": _libraries(self.row.recipe)}
        if action == "release":
            self.task = None
            return {}
        assert self.task is not None
        if action == "calibrate":
            calls, seconds = calibrate(self.task, request["seconds"])
            # Refilling the caches is nothing to a call that takes this long.
            self.warm = seconds < 0.02
            return {"calls": calls, "seconds": seconds}
        assert action == "batch"
        return {"seconds": time_batch(self.task, request["calls"], self.warm)}


def serve(lines: Iterator[str], answers: TextIO) -> None:
    """Answer until stdin ends, which it does when the parent is gone."""
    server = Server()
    for line in lines:
        try:
            reply = server.handle(json.loads(line))
        except Exception as problem:  # noqa: BLE001 (the row fails, with its reason, and the run goes on)
            reply = {"failed": f"{type(problem).__name__}: {problem}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def main() -> None:
    """Keep the protocol's stream apart from whatever a library prints."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(iter(sys.stdin), answers)


if __name__ == "__main__":
    main()
