# SPDX-License-Identifier: BSD-3-Clause
"""Runs a piece of Python in an interpreter of its own, so that a crash or a hang is a failure of one test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence

import pytest

# Instrumented code is several times slower and brings an allocator of its own.
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")

# A run with FASTOPS_TARGET repeats what depends on the level; the rest was done by the run without.
once = pytest.mark.skipif(
    bool(os.environ.get("FASTOPS_TARGET")), reason="does not depend on the CPU level: done without FASTOPS_TARGET"
)
unsanitized = pytest.mark.skipif(SANITIZED, reason="a sanitizer's allocator and threads stand in the way")

PREAMBLE = """
import os, sys, time
import numpy as np
import fastops
assert fastops.show_config("dict")["backend"] == "native"
def pool_threads(at_least=0):
    # A thread names itself when it first runs, on a crowded machine after the call that started it has ended.
    deadline = time.monotonic() + 10
    while True:
        found = 0
        for task in os.listdir("/proc/self/task"):
            try:
                with open(f"/proc/self/task/{task}/comm") as file:
                    found += file.read().strip() == "fastops"
            except OSError:
                pass  # it has just ended
        if found >= at_least or time.monotonic() > deadline:
            return found
        time.sleep(0.01)
"""

# Pieces for `run`: Ctrl-C on a call, and the end of a child of the child.
INTERRUPT = """
import signal, threading
sent = None
def send():
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)
def interrupted(name, after, call):
    # The call ends within 300 ms of Ctrl-C, or later where others crowd the CPUs.
    timer = threading.Timer(after, send)
    timer.start()
    try:
        call()
        seen = None
    except KeyboardInterrupt:
        seen = time.monotonic()
    timer.join()
    assert seen is not None, "the call ended by itself: too short for this test" if sent is None else "not interrupted"
    crowd = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
    print(f"{name}: {1e3 * (seen - sent):.0f} ms, {crowd:.1f} runnable threads a CPU")
    assert seen - sent < 0.3 * crowd, seen - sent
"""
END = """
def end(child, seconds=10.0):
    # The exit status of a child; "hangs" where it does not end.
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hangs"
"""


def run(
    *code: str,
    arguments: Sequence[str] = (),
    timeout: float = 30.0,
    env: Mapping[str, str] | None = None,
    want: int = 0,
) -> str:
    """PREAMBLE and the pieces of `code` in a child; its output. Fails the test unless it ends with `want` in time."""
    text = "\n".join([PREAMBLE, *map(textwrap.dedent, code)])
    environment = {**os.environ, "FASTOPS_BACKEND": "native", "PYTHONFAULTHANDLER": "1", **(env or {})}
    command = [sys.executable, "-P", "-W", "error", "-c", text, *arguments]
    # A session of its own: what the child leaves running ends with it.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout * (5 if SANITIZED else 1))
        except subprocess.TimeoutExpired:
            _end_group(process.pid)
            out, err = process.communicate()
            pytest.fail(f"the child was still running after {timeout} s\n{out[-2000:]}\n{err[-3000:]}")
        finally:
            _end_group(process.pid)
    if process.returncode != want:
        pytest.fail(f"the child ended with {process.returncode}, wanted {want}\n{out[-2000:]}\n{err[-3000:]}")
    print(out, end="")
    return out


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
