# SPDX-License-Identifier: BSD-3-Clause
"""fastops.keras over each of Keras's backends: a process for each, since Keras chooses its backend when it is imported."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from child import SANITIZED, once

HERE = Path(__file__).parent
FILES = ("keras_averaging.py", "keras_layers.py")
# The backend numpy needs nothing, and has no training.
RUNS = [("torch", FILES), ("jax", FILES), ("numpy", ("keras_layers.py",))]

pytestmark = [
    once,
    pytest.mark.skipif(SANITIZED, reason="the frameworks are not instrumented"),
    pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="keras is not installed"),
]


def tests_of(name: str) -> list[str]:
    tree = ast.parse((HERE / name).read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def python(backend: str, *arguments: str, timeout: float = 840.0, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=timeout, check=False
    )


Results = dict[tuple[str, str], list[str]]


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], Results]:
    """By backend and file, once they are asked for: by test, the texts of those of its cases that failed."""
    return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs, which share what jax has compiled."""
    return tmp_path_factory.mktemp("keras")


def run(backend: str, file: str, folder: Path) -> Results:
    report = folder / f"{backend}-{file}.xml"
    # Each small model is compiled anew, and most are alike: jax keeps what it has compiled, and need not make it fast.
    compiles = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(HERE / file))
    ran = python(backend, *command, **compiles)
    assert report.exists(), ran.stdout[-3000:] + ran.stderr[-3000:]
    found: Results = {}
    for case in ET.parse(report).iter("testcase"):
        name = (case.get("name") or "").partition("[")[0]
        bad = [x for x in case if x.tag in ("failure", "error")]
        found.setdefault((file, name), []).extend(f"{case.get('name')}\n{x.text}" for x in bad)
    return found


@pytest.mark.parametrize(
    ("framework", "file", "name"),
    [
        pytest.param(framework, file, name, id=f"{framework}-{file[6:-3]}-{name[5:]}")
        for framework, files in RUNS
        for file in files
        for name in tests_of(file)
    ],
)
@pytest.mark.timeout(
    900
)  # the first of a file waits for all; over jax a minute of compilations where nobody else computes
def test_keras(
    framework: str,
    file: str,
    name: str,
    results: dict[tuple[str, str], Results],
    folder: Path,
) -> None:
    if framework != "numpy" and importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    if (framework, file) not in results:
        results[framework, file] = run(framework, file, folder)
    found = results[framework, file]
    assert (file, name) in found, "it was not run"
    failures = found[file, name]
    assert not failures, "\n\n".join(failures)


def test_keras_without_its_backend_says_what_to_set() -> None:
    ran = python("tensorflow", "-c", "import sys; sys.modules['tensorflow'] = None\nimport fastops.keras", timeout=60)
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("ImportError: fastops.keras works with Keras's backends torch and jax: set KERAS_BACKEND")


def test_fastops_imports_no_keras() -> None:
    code = "import sys, fastops; assert 'keras' in dir(fastops); print('keras' in sys.modules)"
    ran = python("torch", "-c", code, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "False\n"), ran.stderr
