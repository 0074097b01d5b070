# SPDX-License-Identifier: BSD-3-Clause
"""Importing: silent, cheap, without threads, from many threads at once; refused in words where it cannot be done."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

import fastops
from fastops import _backend


def run(
    *arguments: str, cwd: pathlib.Path | None = None, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """The interpreter with these arguments, under the backend of this run."""
    values = {**os.environ, "FASTOPS_BACKEND": _backend.name, **environment}
    env = {key: value for key, value in values.items() if value is not None}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=120, check=False, cwd=cwd
    )


def test_the_package_under_test_is_the_installed_one():
    prefix = os.environ.get("FASTOPS_TEST_PREFIX")
    if prefix is not None:
        # Sanitizer and coverage runs set it: an editable install elsewhere on the path would win silently.
        assert pathlib.Path(fastops.__file__).resolve().is_relative_to(pathlib.Path(prefix).resolve())
    try:
        installed = importlib.metadata.version("fastops")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastops is on the path, not installed")
    assert fastops.__version__ == installed


def test_import_says_nothing_and_leaves_the_environment_alone():
    if _backend.name == "numba":
        pytest.skip("the compiled packages below numba warn by themselves under -X dev")
    code = (
        "import os, sys, numpy; before = dict(os.environ); import fastops; assert dict(os.environ) == before; "
        "import signal; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    ran = run("-X", "dev", "-W", "error", "-c", code)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_import_adds_few_modules_and_no_thread(native: ModuleType):
    code = (
        "import sys, os, threading, numpy\n"
        "try:\n    import ml_dtypes\nexcept ImportError:\n    pass\n"
        "tasks = lambda: len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else threading.active_count()\n"
        "before, threads = set(sys.modules), tasks()\n"
        "import fastops\n"
        "assert tasks() == threads and threading.active_count() == 1\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    ran = run("-c", code, FASTOPS_BACKEND="native")
    assert ran.returncode == 0, ran.stderr
    new = ran.stdout.split()
    assert len(new) <= 12, new
    assert [name for name in new if not name.startswith("fastops")] in ([], ["__future__"])


def test_import_without_ml_dtypes(tmp_path: pathlib.Path):
    (tmp_path / "ml_dtypes.py").write_text("raise ImportError('hidden')\n")
    code = "import numpy as np, fastops; assert fastops.mitchell_mul(np.float16(3), np.float16(3)) == 8; print(fastops.__file__)"
    ran = run("-W", "error", "-c", code, PYTHONPATH=os.pathsep.join([str(tmp_path), *_path()]))
    assert ran.returncode == 0, ran.stderr
    assert pathlib.Path(ran.stdout.strip()) == pathlib.Path(fastops.__file__)


def _path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def test_reload_keeps_the_operations():
    ufunc, multiplier = fastops.mitchell_mul, fastops.Multiplier("min-mse").mul
    again = importlib.reload(fastops)
    assert again is fastops
    assert fastops.mitchell_mul is ufunc
    assert fastops.Multiplier("min-mse").mul is multiplier


def test_reload_of_every_module():
    code = (
        "import importlib, sys, fastops\n"
        "for name in sorted((n for n in sys.modules if n.startswith('fastops.') and '_core' not in n), key=len, reverse=True):\n"
        "    importlib.reload(sys.modules[name])\n"
        "importlib.reload(fastops)\n"
        "assert fastops.mitchell_mul(3.0, 3.0) == 8.0 and fastops.lmul(1.0, 1.0) == 1.0625"
    )
    if _backend.name == "numba":
        pytest.skip("compiled functions of Numba are made once per module")
    ran = run("-W", "error", "-c", code)
    assert ran.returncode == 0, ran.stderr


def test_thirty_two_threads_import_at_once():
    code = (
        "import threading, sys\n"
        "barrier, errors = threading.Barrier(32), []\n"
        "def work():\n"
        "    barrier.wait()\n"
        "    try:\n"
        "        import fastops\n"
        "        m = fastops.Multiplier(0.0123)\n"
        "        seen.append(m.mul)\n"
        "        assert fastops.mitchell_mul(3.0, 3.0) == 8.0\n"
        "    except BaseException as error:\n"
        "        errors.append(error)\n"
        "seen = []\n"
        "threads = [threading.Thread(target=work) for _ in range(32)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert not errors, errors\n"
        "assert len(seen) == 32 and all(f is seen[0] for f in seen)"
    )
    ran = run("-c", code)
    assert ran.returncode == 0, ran.stderr


def test_sub_interpreter_is_refused_or_works():
    module = next((name for name in ("_interpreters", "_xxsubinterpreters") if importlib.util.find_spec(name)), None)
    if sys.version_info < (3, 12) or module is None:
        pytest.skip("isolated sub-interpreters came with Python 3.12")
    code = (
        f"import {module} as interpreters\n"
        "i = interpreters.create()\n"
        "try:\n"
        "    r = interpreters.exec(i, 'import fastops') if hasattr(interpreters, 'exec') else interpreters.run_string(i, 'import fastops')\n"
        "    print('refused' if r is not None and 'ImportError' in str(getattr(r, 'type', r)) else r)\n"
        "except Exception as error:\n"
        "    print('refused' if 'ImportError' in repr(error) else repr(error))\n"
        "import fastops\nassert fastops.mitchell_mul(3.0, 3.0) == 8.0"
    )
    ran = run("-c", code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() in ("refused", "None")


def test_sub_interpreter_cannot_load_the_compiled_module(native: ModuleType):
    if sys.version_info < (3, 13):
        pytest.skip("_interpreters came with Python 3.13")
    from fastops import _core

    code = (
        "import _interpreters\n"
        "load = 'import importlib.util as u; s = u.spec_from_file_location(\"fastops._core\", ' + repr(path) + '); u.module_from_spec(s)'\n"
        "r = _interpreters.exec(_interpreters.create(), load)\n"
        "print(r.type.__name__, r.msg)"
    )
    ran = run("-c", f"path = {_core.__file__!r}\n{code}", FASTOPS_BACKEND="native")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("ImportError module fastops._core does not support loading in subinterpreters")


def _bare_tree(tmp_path: pathlib.Path) -> str:
    """The Python files of the package alone, as a source tree that nobody built."""
    ignored = shutil.ignore_patterns(
        "_core.*", "*.so", "__pycache__", "_version.py", "_install.py", "bench", "lib", "include"
    )
    shutil.copytree(pathlib.Path(fastops.__file__).parent, tmp_path / "fastops", ignore=ignored)
    # -S below keeps an editable install's import hook out; the packages it would find come back by their folders.
    folders = {str(pathlib.Path(np.__file__).parents[1])}
    return os.pathsep.join([str(tmp_path), *sorted(folders)])


def test_a_missing_core_says_how_to_build(tmp_path: pathlib.Path):
    path = _bare_tree(tmp_path)
    ran = run("-S", "-c", "import fastops", cwd=tmp_path, PYTHONPATH=path, FASTOPS_BACKEND=None)
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("ImportError: fastops has no compiled module _core: build it with 'pip install .'")
    assert "FASTOPS_BACKEND" in last
    code = "import fastops; assert fastops.mitchell_mul(3.0, 3.0) == 8.0; print(fastops.__file__, fastops.__version__)"
    ran = run("-S", "-c", code, cwd=tmp_path, PYTHONPATH=path, FASTOPS_BACKEND="reference")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(tmp_path / "fastops" / "__init__.py"), "0+unknown"]
    code = "import fastops\ntry:\n    fastops.native\nexcept ImportError as error:\n    print(error)"
    ran = run("-S", "-c", code, cwd=tmp_path, PYTHONPATH=path, FASTOPS_BACKEND="reference")
    assert ran.stdout.startswith("fastops has no compiled module _core")


def test_an_install_without_native_falls_back(tmp_path: pathlib.Path):
    path = _bare_tree(tmp_path)
    (tmp_path / "fastops" / "_install.py").write_text("NATIVE = False\n")
    (tmp_path / "numba.py").write_text("")
    code = "import importlib.util\nfind = importlib.util.find_spec\nimportlib.util.find_spec = lambda n, *a: None if n == 'numba' else find(n, *a)\n"
    code += "import fastops; c = fastops.show_config('dict'); print(c['backend'], '|', c['backend_reason'])"
    ran = run("-S", "-c", code, cwd=tmp_path, PYTHONPATH=path, FASTOPS_BACKEND=None)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "reference | installed with FASTOPS_NATIVE=off, and numba is not there"
    ran = run("-S", "-c", "import fastops", cwd=tmp_path, PYTHONPATH=path, FASTOPS_BACKEND="native")
    assert ran.returncode == 1
    assert "no compiled module _core" in ran.stderr.splitlines()[-1]


def test_numba_asked_for_and_absent_says_what_to_install(tmp_path: pathlib.Path):
    path = _bare_tree(tmp_path)
    code = "import importlib.util\nfind = importlib.util.find_spec\nimportlib.util.find_spec = lambda n, *a: None if n == 'numba' else find(n, *a)\nimport fastops"
    ran = run("-S", "-c", code, cwd=tmp_path, PYTHONPATH=path, FASTOPS_BACKEND="numba")
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == "ImportError: FASTOPS_BACKEND=numba needs numba: pip install 'fastops[numba]'"


@pytest.mark.parametrize("name", ["jax", "keras", "torch"])
def test_a_framework_asked_for_and_absent_says_what_to_install(name: str):
    ran = run("-W", "error", "-c", f"import sys; sys.modules['{name}'] = None\nimport fastops.{name}")
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == f"ImportError: fastops.{name} needs {name}: pip install 'fastops[{name}]'"
    code = f"import sys; sys.modules['{name}'] = None\nimport fastops; print('{name}' in dir(fastops))"
    ran = run("-c", code)
    assert (ran.returncode, ran.stdout) == (0, "False\n"), ran.stderr
