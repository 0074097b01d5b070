# SPDX-License-Identifier: BSD-3-Clause
"""Functions that worker processes of the tests import."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any


def same(item: Any) -> Any:
    return item


def pid(item: Any) -> int:
    time.sleep(0.02)
    return os.getpid()


MARK = "as imported"


def mark(item: Any) -> str:
    """A worker that was forked has what its parent put here."""
    return MARK


def fails_at_3(item: int) -> int:
    if item == 3:
        raise ValueError(f"no good: {item}")
    return item


def killed_at_3(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def ends_at_3(item: int) -> int:
    if item == 3:
        os._exit(7)
    return item


def leaves_at_3(item: int) -> int:
    if item == 3:
        sys.exit(7)
    return item


def stops_at_3(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    return item


def sleeps(item: float) -> float:
    time.sleep(item)
    return item


def function_result(item: Any) -> Any:
    return lambda: item


class BadAtLoading:
    """Can be pickled, and not be loaded."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise LookupError("not to be loaded")


def bad_result(item: Any) -> Any:
    return BadAtLoading()


class OddError(Exception):
    """An exception whose pickle cannot be loaded."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"odd {first} {second}")


def odd_error(item: Any) -> Any:
    raise OddError(1, 2)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    def __reduce__(self) -> Any:
        raise TypeError("no pickle")


def mute_error(item: Any) -> Any:
    raise Mute


def daemonic_grandchild(item: int) -> int:
    """A process that outlives this one holds copies of all that is open here."""
    if os.fork() == 0:
        time.sleep(3)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
    return item


def split_words(text: str) -> list[str]:
    return text.split()


def shout(text: str) -> Iterator[str]:
    return iter(text.upper().split())


def slow_split(text: str) -> list[str]:
    time.sleep(0.0005)
    return text.split()


def killed_at_death(text: str) -> list[str]:
    if "death" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    return text.split()


def slow_words(text: str) -> list[str]:
    time.sleep(0.0001)
    return text.split()


class Shorten:
    """A tokenizer that cuts the file it is counting."""

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        self.size = size

    def __call__(self, text: str) -> list[str]:
        if os.path.getsize(self.path) > self.size:
            os.truncate(self.path, self.size)
        return text.split()


def fails(text: str) -> list[str]:
    raise LookupError("no words")
