# SPDX-License-Identifier: BSD-3-Clause
"""What a benchmark case is: one group of implementations that do the same work on the same inputs."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fastops._backend import installed

# The optional modules whose presence adds rows.
PEERS = (
    *(
        "numba",
        "torch",
        "jax",
        "ml_dtypes",
        "timm",
        "torch_ema",
        "fast_transformers",
        "nystrom_attention",
        "transformers",
    ),
    *("duckdb", "jieba", "polars", "rjieba", "sklearn"),
)


class WrongResult(Exception):
    """An implementation's result differs from the oracle's by more than its bound."""


@dataclass(frozen=True)
class Machine:
    """What can be measured here.

    `targets` are the CPU levels that run, best first; empty without the native backend.
    """

    backends: tuple[str, ...]
    targets: tuple[str, ...]
    threads: int
    modules: frozenset[str]

    @staticmethod
    def probe(threads: int | None = None) -> Machine:
        """Ask the installation; `threads` replaces the number that the pool would use."""
        import fastops

        backends = ["reference"]
        targets: tuple[str, ...] = ()
        modules = frozenset(name for name in PEERS if installed(name))
        if "numba" in modules:
            backends.insert(0, "numba")
        with contextlib.suppress(ImportError):
            core = importlib.import_module("fastops._core")
            backends.insert(0, "native")
            targets = tuple(reversed(core.targets()))
        return Machine(tuple(backends), targets, threads or fastops.get_num_threads(), modules)


@dataclass(frozen=True)
class Implementation:
    """One row of a group: a recipe of the family and the process that it runs in."""

    name: str
    recipe: str
    backend: str = "reference"
    target: str = ""
    threads: int = 1
    env: tuple[tuple[str, str], ...] = ()

    @property
    def process(self) -> str:
        """Rows with equal keys share a process, no others do."""
        return "|".join([self.recipe, self.backend, self.target, str(self.threads), *map("=".join, self.env)])

    def environment(self) -> dict[str, str]:
        """Variables that the row's process is started with: pools of a known size that do not spin while others run."""
        threads = str(self.threads)
        env = {
            "OMP_WAIT_POLICY": "passive",
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "NUMBA_NUM_THREADS": threads,
            "FASTOPS_NUM_THREADS": threads,
            "FASTOPS_BACKEND": self.backend,
        }
        if self.target:
            env["FASTOPS_TARGET"] = self.target
        return env | dict(self.env)


@dataclass(frozen=True)
class Case:
    """One group: an operation, a dtype and a size.

    `unit` is what a rate counts, `yardsticks` the row names that ratios are taken to: the first that is present.
    """

    family: str
    op: str
    dtype: str
    size: str
    shape: tuple[int, ...]
    unit: str
    quick: bool = False
    yardsticks: tuple[str, ...] = ("exact",)

    @property
    def group(self) -> str:
        """Unique name of the case."""
        return f"{self.op} {self.dtype} {self.size}"


@dataclass
class Task:
    """A prepared row: call(*args) does `work` of the problem's `whole` units; `check` calls it and asks the oracle.

    `memory`: what the call takes at its peak is measured too.
    """

    call: Callable[..., object]
    args: tuple[Any, ...]
    work: float
    whole: float
    check: Callable[[], float]
    note: str = ""
    keep: list[object] = field(default_factory=list)
    memory: bool = False


def aligned(array: npt.NDArray[Any], slot: int = 0) -> npt.NDArray[Any]:
    """Copy `array` to 64-byte alignment; `slot` moves it by 17 cache lines each, against 4 KiB aliasing.

    Every process then sees the same placement, which would otherwise differ by chance from one to the next.
    """
    shift = slot * 17 * 64
    raw = np.empty(array.nbytes + 4096 + shift, np.uint8)
    start = -raw.ctypes.data % 4096 + shift
    out = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out
