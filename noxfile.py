#!/usr/bin/env -S uv run --script
# SPDX-License-Identifier: BSD-3-Clause
# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.10.14"]
# ///
"""Developer tasks: ``nox -s lint tests``; ``nox -l`` lists them all."""

import hashlib
import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "uv|virtualenv"

PROJECT = nox.project.load_toml("pyproject.toml")


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, stubs, spelling and the repository's own form."""
    session.install(".[test]", *nox.project.dependency_groups(PROJECT, "lint"))
    session.run("bash", "tools/lint.sh", external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite; arguments go to pytest."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session(default=False)
def torch(session: nox.Session) -> None:
    """The tests that need torch, and timm's for those of its averages; arguments go to pytest."""
    session.install(".[test,torch]", "timm>=1.0")
    files = sorted(map(str, Path("tests").glob("test_*torch*.py")))
    session.run("pytest", *(session.posargs or [*files, "tests/test_examples.py", "tests/test_tensor_memory.py"]))


@nox.session(default=False)
def jax(session: nox.Session) -> None:
    """The tests that need jax, by handlers and by callback; arguments go to pytest."""
    session.install("jax>=0.8")
    headers = session.run("python", "-c", "import jax; print(jax.ffi.include_dir())", silent=True)
    session.install(".[test,jax]", env={"FASTOPS_JAX": str(headers).strip()})
    session.run("pytest", *(session.posargs or sorted(map(str, Path("tests").glob("test_jax*.py")))))


@nox.session(default=False)
def keras(session: nox.Session) -> None:
    """The tests that need Keras, over torch and jax; arguments go to pytest."""
    session.install(".[test,keras,torch,jax]")
    session.run(
        "pytest",
        *(session.posargs or ["tests/test_keras.py", "tests/test_examples.py", "tests/test_readme.py", "-k", "keras"]),
    )


@nox.session(default=False)
def interop(session: nox.Session) -> None:
    """The tests that need other projects' arrays, and those that build other projects; arguments go to pytest."""
    session.install(".[test]", "dask[array]", "pandas", "xarray")
    tests = [
        "tests/test_containers.py",
        "tests/test_dlpack.py",
        "tests/test_downstream.py",
        "tests/test_numba_overloads.py",
    ]
    session.run("pytest", *(session.posargs or tests))


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """pytest-benchmark over the cases of ``fastops bench``; arguments go to pytest."""
    session.install(".[test]")
    session.run("pytest", "bench", "--benchmark-group-by=group", *session.posargs)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """The site, warnings as errors, into docs/_build/html."""
    session.install(".[docs]")
    session.run("python", "tools/check_docstrings.py")
    session.run("sphinx-build", "-n", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html", *session.posargs)


@nox.session(default=False)
def sanitize(session: nox.Session) -> None:
    """The suite over the native backend under AddressSanitizer and UndefinedBehaviorSanitizer."""
    options = {"FASTOPS_SANITIZE": "ON", "FASTOPS_CUDA": "off", "FASTOPS_CUDA_SHIM": "ON"}
    session.install(*(f"--config-settings=cmake.define.{k}={v}" for k, v in options.items()), ".[test]")
    session.run("bash", "tools/run_sanitized.sh", *session.posargs, external=True)


@nox.session(default=False)
@nox.parametrize("configuration", ["TINY", "COLLISIONS"])
def wordcount(session: nox.Session, configuration: str) -> None:
    """The tests of word counting with blocks of 64 bytes and tables of 4 slots, and with all keys in one slot."""
    session.install(f"--config-settings=cmake.define.FASTOPS_TEST_CONFIGURATION={configuration}", ".[test]")
    tests = [
        "tests/test_wordcount.py",
        "tests/test_wordcount_unicode.py",
        "tests/test_wordcount_zh.py",
        "tests/test_wordcounts.py",
    ]
    session.run(
        "pytest", *(session.posargs or tests), env={"FASTOPS_TEST_BACKENDS": "native", "FASTOPS_BACKEND": "native"}
    )


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """The fuzz targets, 600 seconds each; arguments go to tools/fuzz.sh."""
    session.run("bash", "tools/fuzz.sh", *(session.posargs or ["600"]), external=True)


@nox.session(default=False)
def aarch64(session: nox.Session) -> None:
    """The kernels cross-compiled for aarch64, their native tests run under qemu-user."""
    session.install("cmake>=3.25", "ninja")
    session.run("cmake", "--preset", "aarch64")
    session.run("cmake", "--build", "--preset", "aarch64")
    session.run("ctest", "--preset", "aarch64")


@nox.session(default=False)
def reproducible(session: nox.Session) -> None:
    """Source distribution and wheel twice, each from a folder of its own: equal bytes."""
    session.install("build")
    digests = []
    for name in ("first", "second"):
        out = Path(session.create_tmp()).resolve() / name
        shutil.rmtree(out, ignore_errors=True)
        session.run("python", "-m", "build", "--outdir", str(out), env={"SOURCE_DATE_EPOCH": "1767225600"})
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.iterdir())})
    if digests[0] != digests[1]:
        session.error(f"two builds differ: {digests}")
    session.log(f"equal: {digests[0]}")


@nox.session(default=False)
def nightly(session: nox.Session) -> None:
    """What takes too long for every change: exhaustive pairs, the distribution files twice, the suite under the sanitizers."""
    session.install(".[test]", "build", "check-wheel-contents")
    session.run("pytest", "-m", "nightly", "--timeout=7200", *session.posargs)
    out = Path(session.create_tmp()) / "dist"
    shutil.rmtree(out, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(out))
    session.run("check-wheel-contents", *map(str, out.glob("*.whl")))
    session.notify("reproducible")
    session.notify("sanitize")
    session.notify("wordcount(configuration='TINY')")
    session.notify("wordcount(configuration='COLLISIONS')")
    if shutil.which("clang++") or shutil.which("clang++-14"):
        session.notify("fuzz")
    if os.environ.get("FASTOPS_NIGHTLY_QEMU", "1") != "0":
        session.notify("aarch64")


if __name__ == "__main__":
    nox.main()
