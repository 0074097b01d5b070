# SPDX-License-Identifier: BSD-3-Clause
"""Which backends and CPU levels a run covers: the fixtures `backend` and `target`, the header, and hypothesis' profiles."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import hypothesis
import pytest
from gpu_arrays import PLATFORMS, Shim, open_platform

import fastops
from fastops import _backend

# Children of a test import what this process imports: `-m` and `-c` would put the source tree, their folder, first.
os.environ["PYTHONSAFEPATH"] = "1"
# A shell without job control starts what runs in its background deaf to Ctrl-C, and so would children be.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the first call of a Numba kernel compiles it. Shared machines stall too.
hypothesis.settings.register_profile("default", max_examples=30, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("nightly", max_examples=20_000, deadline=None, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _asked_backends() -> list[str]:
    """FASTOPS_TEST_BACKENDS (a list), else what the one configuration under test says, else all."""
    listed = os.environ.get("FASTOPS_TEST_BACKENDS")
    if listed:
        names = [name.strip() for name in listed.split(",")]
        unknown = [name for name in names if name not in _backend.CHOICES]
        if unknown:
            raise pytest.UsageError(f"FASTOPS_TEST_BACKENDS: unknown {unknown}, choices are {_backend.CHOICES}")
        return names
    if os.environ.get("FASTOPS_BACKEND"):
        return [_backend.name]
    if os.environ.get("FASTOPS_TARGET"):
        return ["native"]
    return list(_backend.CHOICES)


def _missing(backend: str) -> str | None:
    """Why a backend cannot run here."""
    if backend == "native":
        try:
            importlib.import_module("fastops.native")
        except ImportError as error:
            return f"fastops.native: {error}"
    if backend == "numba" and importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    return None


BACKENDS = _asked_backends()
MISSING = {name: why for name in BACKENDS if (why := _missing(name)) is not None}


def _targets() -> dict[str, str | None]:
    """Every compiled level that the run covers, with the reason why this CPU cannot run it."""
    if "native" not in BACKENDS or "native" in MISSING:
        return {}
    from fastops import _core

    runnable = _core.targets()
    asked = os.environ.get("FASTOPS_TARGET")
    return {
        name: None if name in runnable else f"this CPU does not run {name}"
        for name in _core.compiled_targets()
        if not asked or name == asked
    }


TARGETS = _targets()


def pytest_report_header() -> list[str]:
    return [
        f"fastops {fastops.__version__} from {os.path.dirname(fastops.__file__)}, default backend {_backend.name}",
        "backends: "
        + ", ".join(f"{name} (skipped: {MISSING[name]})" if name in MISSING else name for name in BACKENDS),
        "native targets: " + (", ".join(f"{n} (skipped: {w})" if w else n for n, w in TARGETS.items()) or "none"),
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "native" in metafunc.fixturenames and "target" in metafunc.fixturenames:
        metafunc.parametrize("target", list(TARGETS) or ["-"], indirect=True)
    elif "target" in metafunc.fixturenames:
        pairs = []
        for backend in BACKENDS:
            if backend == "native" and backend not in MISSING:
                pairs += [(backend, target) for target in TARGETS]
            else:
                pairs.append((backend, "-"))
        metafunc.parametrize(
            ("backend", "target"), pairs, indirect=True, ids=[f"{b}-{t}" if t != "-" else b for b, t in pairs]
        )
    elif "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture(params=PLATFORMS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where kernels of fastops.cuda run."""
    return open_platform(request.param, monkeypatch)


@pytest.fixture
def shim(monkeypatch: pytest.MonkeyPatch) -> Shim:
    """Those kernels on the CPU, for what needs no GPU to be seen."""
    found = open_platform("shim", monkeypatch)
    assert isinstance(found, Shim)
    return found


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> ModuleType:
    """The module of a backend."""
    if request.param in MISSING:
        pytest.skip(MISSING[request.param])
    return importlib.import_module(f"fastops.{request.param}")


@pytest.fixture
def over_backend(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions, `EMA` and `WordCounts` on the backend under test."""
    for name in ("_counting", "_counts", "attention", "averaging", "mitchell", "optim"):
        monkeypatch.setattr(importlib.import_module(f"fastops.{name}"), "_backend", backend)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """A CPU level, in force during the test ("-" for the backends without levels)."""
    if request.param == "-":
        yield request.param
        return
    if TARGETS[request.param] is not None:
        pytest.skip(str(TARGETS[request.param]))
    from fastops import _core

    before = _core.get_target()
    _core.set_target(request.param)
    yield request.param
    _core.set_target(before)


@pytest.fixture
def native() -> ModuleType:
    """The native backend, for what it alone offers."""
    if "native" not in BACKENDS:
        pytest.skip("this run does not cover the native backend")
    if "native" in MISSING:
        pytest.skip(MISSING["native"])
    return importlib.import_module("fastops.native")
