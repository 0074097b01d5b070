# SPDX-License-Identifier: BSD-3-Clause
"""Projects outside the tree build against the installed package by CMake, Cython and Numba, and compute what Python does."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import fastops

PROJECTS = Path(__file__).parent / "downstream"

pytestmark = pytest.mark.skipif(
    fastops.show_config("dict")["backend"] != "native", reason="other projects link to the native backend"
)


def at_best() -> fastops.target:
    """The level of a program of its own, which knows nothing of FASTOPS_TARGET."""
    return fastops.target(fastops.show_config("dict")["targets_runnable"][-1])


def folder(option: str) -> Path:
    """What the command line says, without the source tree on the path of the asked interpreter."""
    command = [sys.executable, "-P", "-m", "fastops", option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 2:
        pytest.skip(f"fastops is not installed with {option}: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def run(command: Sequence[str | Path], **options: object) -> str:
    """The standard output of a command that succeeds."""
    done = subprocess.run(
        [str(item) for item in command], capture_output=True, text=True, timeout=280, check=False, **options
    )  # type: ignore[call-overload]
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def build(project: str, to: Path, *settings: str) -> Path:
    """A copy of the project away from the tree, configured and built."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    source = to / project
    shutil.copytree(PROJECTS / project, source)
    where = [f"-DCMAKE_PREFIX_PATH={folder('--cmake-dir')}"] if project != "cython" else []
    run(["cmake", "-S", source, "-B", to / "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *where, *settings])
    run(["cmake", "--build", to / "build", "-j", "1"])
    return to / "build"


def numbers(text: str, name: str) -> list[float]:
    """The hexadecimal numbers of the lines that begin with the name."""
    rows = (line.split() for line in text.splitlines())
    return [float.fromhex(value) for key, value in rows if key == name]


@pytest.fixture(scope="module")
def c_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("c", tmp_path_factory.mktemp("c"))


@pytest.fixture(scope="module")
def cython_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("Cython") is None:
        pytest.skip("Cython is not installed")
    folder("--cmake-dir")
    settings = f"-DPython_EXECUTABLE={sys.executable}"
    return build("cython", tmp_path_factory.mktemp("cython"), settings)


def check_c_program(text: str) -> None:
    a = np.array([1.5, 3.0, -2.5, 0.1, 7.0, 1e-3], np.float32)
    b = np.array([1.5, 5.0, 3.25, 0.3, -7.0, 1e3], np.float32)
    multiplier = fastops.Multiplier(mantissa_bits=7)
    assert numbers(text, "mul") == multiplier.mul(a, b).tolist()
    with at_best():
        product = multiplier.matmul(a.reshape(2, 3), b.reshape(3, 2))
    assert numbers(text, "matmul") == product.ravel().tolist()
    assert numbers(text, "one") == [float(fastops.mitchell_div(1.0, 3.0))]
    assert numbers(text, "ema") == [0.25, 0.5, 0.75]


def test_c_program_computes_what_python_does(c_build: Path) -> None:
    check_c_program(run([c_build / "program"]))


def test_c_program_of_the_archive_stands_alone(c_build: Path) -> None:
    program = c_build / "program_static"
    if not program.exists():
        pytest.skip("fastops was built with FASTOPS_STATIC_LIBRARY=OFF")
    check_c_program(run([program]))
    assert "libfastops" not in run(["ldd", program])


def test_cxx_program_computes_what_python_does(tmp_path: Path) -> None:
    text = run([build("cxx", tmp_path) / "program"])
    i = np.arange(2 * 5 * 4).reshape(1, 2, 5, 4)
    q, k, v = i % 7 / 4 - 0.5, i % 5 / 4 - 0.5, i % 11 / 8
    with at_best():
        wanted = fastops.linear_attention(*(x.astype(np.float32) for x in (q, k, v)), causal=True)
    assert numbers(text, "attention") == wanted.ravel().tolist()


STANDARDS = [("cc", f"c{n}") for n in ("99", "11", "17", "2x")] + [("c++", f"c++{n}") for n in ("17", "20", "2b")]


@pytest.mark.parametrize(("compiler", "standard"), STANDARDS)
def test_header_has_no_warnings(compiler: str, standard: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    source = tmp_path / ("header.c" if compiler == "cc" else "header.cpp")
    source.write_text(
        "#include <fastops/fastops.h>\nint main(void) { return fastops_abi_version() == FASTOPS_ABI_VERSION ? 0 : 1; }\n"
    )
    # As a header of one's own: warnings of system headers would be hidden.
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wshadow", "-Wconversion", "-Wundef"]
    own = ["-Wstrict-prototypes", "-Wc++-compat"] if compiler == "cc" else ["-Wold-style-cast", "-fno-exceptions"]
    include = folder("--include-dir")
    run([compiler, f"-std={standard}", *warnings, *own, f"-I{include}", "-c", source, "-o", tmp_path / "header.o"])


def test_version_that_is_not_there_is_refused(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(p LANGUAGES NONE)\nfind_package(fastops 99 CONFIG REQUIRED)\n"
    )
    command = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "b"), f"-Dfastops_DIR={folder('--cmake-dir')}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "99" in done.stderr


def in_child(code: str, *paths: Path) -> str:
    """A program of this interpreter that finds modules in these folders."""
    path = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    return run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, "FASTOPS_BACKEND": "native"})


def test_cython_module_computes_what_python_does(cython_build: Path) -> None:
    code = """
import numpy as np, fastops, mine
for dtype in (np.float32, np.float64):
    a, b = np.random.default_rng(0).standard_normal((2, 50)).astype(dtype)
    total = dtype(0)
    for product in fastops.mitchell_mul(a, b):
        total = dtype(total + product)
    assert mine.dot(a, b) == total
    out = np.empty_like(a)
    assert mine.multiply(a, b, out) == 0
    assert np.array_equal(out, fastops.mitchell_mul(a, b))
    matrix = np.empty((5, 5), dtype)
    assert mine.matmul(a.reshape(5, 10), b.reshape(10, 5), matrix) == 0
    assert np.array_equal(matrix, fastops.mitchell_matmul(a.reshape(5, 10), b.reshape(10, 5)))
    q, k, v = np.random.default_rng(1).standard_normal((3, 1, 2, 6, 4)).astype(dtype)
    y = np.empty_like(v)
    assert mine.attention(q, k, v, y) == 0
    assert np.array_equal(y, fastops.linear_attention(q, k, v, causal=True))
    shadow, same = b.copy(), b.copy()
    assert mine.average(shadow, a, 0.9) == 0
    fastops.ema_update_(same, a, 0.9)
    assert np.array_equal(shadow, same)
for x in (1.7, 5e-324, 0.0, np.inf, 1e308):
    wanted = [f(x) for f in (fastops.mitchell_square, fastops.mitchell_reciprocal, fastops.mitchell_sqrt,
              fastops.mitchell_rsqrt, fastops.mitchell_log2, fastops.mitchell_exp2)]
    wanted += [fastops.mitchell_div(x, 3.0), fastops.lmul(x, 3.0)]
    assert list(mine.unary(x)) == [float(value) for value in wanted], x
"""
    in_child("import warnings; warnings.simplefilter('ignore')\n" + code, cython_build)


def test_one_state_for_python_c_and_cython(c_build: Path, cython_build: Path) -> None:
    """There cannot be two: the module of Python, that of Cython and a library of one's own share one libfastops.so."""
    code = f"""
import ctypes, fastops, mine
from fastops import _core
plugin = ctypes.CDLL({str(c_build / "libplugin.so")!r})
plugin.plugin_get_target.restype = ctypes.c_char_p
def seen():
    return {{fastops.show_config("dict")["target"], _core.get_target(), mine.get_target(),
            plugin.plugin_get_target().decode()}}
for level in _core.targets():
    with fastops.target(level):
        assert seen() == {{level}}, seen()
for level in _core.targets():
    assert mine.set_target(level) == 0
    assert seen() == {{level}}, seen()
for level in reversed(_core.targets()):
    assert plugin.plugin_set_target(level.encode()) == 0
    assert seen() == {{level}}, seen()
setters = (fastops.set_num_threads, mine.set_num_threads, plugin.plugin_set_num_threads)
for count, put in enumerate(setters, 2):
    put(count)
    got = {{fastops.get_num_threads(), mine.get_num_threads(), plugin.plugin_get_num_threads()}}
    assert got == {{count}}, got
with open("/proc/self/maps") as maps:
    libraries = {{line.split()[-1] for line in maps if "libfastops" in line}}
assert len(libraries) == 1, libraries
"""
    in_child(code, cython_build)


def test_one_state_for_python_and_cython_as_installed() -> None:
    """The same without a compiler: the functions that cyfastops offers to other modules, by their addresses."""
    code = """
import ctypes, fastops
from fastops import _core, cyfastops
name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
def function(which, *types):
    capsule = cyfastops.__pyx_capi__[which]
    return ctypes.CFUNCTYPE(*types)(pointer(capsule, name(capsule)))
get, put = function("get_target", ctypes.c_char_p), function("set_target", ctypes.c_int, ctypes.c_char_p)
for level in _core.targets():
    with fastops.target(level):
        assert get().decode() == level
    assert put(level.encode()) == 0
    assert _core.get_target() == fastops.show_config("dict")["target"] == level
with open("/proc/self/maps") as maps:
    libraries = {line.split()[-1] for line in maps if "libfastops" in line}
assert len(libraries) == 1, libraries
"""
    in_child(code)


def test_numba_functions_are_found_cached_and_right(tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    if not any(
        entry.value.startswith("fastops.") for entry in importlib.metadata.entry_points(group="numba_extensions")
    ):
        pytest.skip("fastops is on the path, not installed: it has no entry points")
    shutil.copy(PROJECTS / "numba" / "program.py", tmp_path)
    runs = [json.loads(run([sys.executable, tmp_path / "program.py"], cwd=tmp_path)) for _ in range(2)]
    x = np.linspace(-2.0, 3.0, 12)
    matrix = x.reshape(3, 4)
    cheap = fastops.Multiplier("min-mse", mantissa_bits=7)
    total = 0.0
    for product in fastops.mitchell_mul(x, x).tolist():
        total += product
    layer = cheap.mul(fastops.mitchell_matmul(matrix, matrix.T.copy(), multiplier=cheap), x[:3])
    for result in runs:
        assert result["dot"] == total
        assert result["layer"] == layer.tolist()
        assert result["squares"] == fastops.mitchell_square(x).tolist()
    assert [result["hits"] for result in runs] == [[0, 0, 0], [1, 1, 1]]
