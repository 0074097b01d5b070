# SPDX-License-Identifier: BSD-3-Clause
"""Fault injection: the C helpers, compiled for the run; every test here is of the native backend."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


def _compile(name: str, folder: Path) -> str:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler")
    library = folder / f"{name}.so"
    command = [*compiler.split(), "-O1", "-fPIC", "-shared", "-o", str(library), str(HERE / f"{name}.c"), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{name}.c does not build here: {done.stderr[-200:]}")
    return str(library)


@pytest.fixture(scope="session")
def failing_malloc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library to preload: allocations and new threads fail on demand."""
    return _compile("failing_malloc", tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def fp_control(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that reads and writes the control register of the floating-point unit."""
    return _compile("fp_control", tmp_path_factory.mktemp("faults"))


@pytest.fixture(autouse=True)
def _native_only(native: ModuleType) -> None:
    """Skips where the run does not cover the native backend."""
