# SPDX-License-Identifier: BSD-3-Clause
"""show_config, the CPU level, the number of threads, and the environment variables that set them."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

import fastops
from fastops import _backend, _config


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with these variables set (None unsets)."""
    values = {**os.environ, "FASTOPS_BACKEND": None, "FASTOPS_TARGET": None, "FASTOPS_NUM_THREADS": None, **environment}
    env = {key: value for key, value in values.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, check=False
    )


def test_show_config_says_everything(capsys: pytest.CaptureFixture[str]):
    settings = fastops.show_config("dict")
    wanted = {
        "fastops", "python", "numpy", "platform", "cpu", "backend", "backend_reason", "targets_compiled", "targets_runnable",
        "target", "target_reason", "threads", "threads_reason", "cuda", "jax", "jax_handlers",
        "ml_dtypes", "numba",
    }  # fmt: skip
    assert wanted <= set(settings)
    for key, value in settings.items():
        assert value not in ("", None, [], {}), key
    assert json.loads(fastops.show_config("json")) == settings
    assert fastops.show_config() is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(settings)
    assert settings["numpy"] == np.__version__
    assert settings["backend"] == _backend.name
    assert settings["cuda"] in ("built", "not built")
    assert settings["jax_handlers"] in ("built", "not built")
    assert (settings["numba"] == "not installed") == (importlib.util.find_spec("numba") is None)


def test_target_sets_at_once_and_puts_back(native: ModuleType):
    if _backend.name != "native":
        pytest.skip("native is not the default backend of this run")
    before = _config.get_target()
    assert before in _config.targets()
    for name in _config.targets():
        with fastops.target(name) as chosen:
            assert chosen.name == name
            assert _config.get_target() == fastops.show_config("dict")["target"] == name
        assert _config.get_target() == before
    fastops.target(_config.targets()[0])
    assert _config.get_target() == _config.targets()[0]
    fastops.target(before)
    assert _config.get_target() == before
    with pytest.raises(RuntimeError, match="boom"), fastops.target(_config.targets()[0]):
        raise RuntimeError("boom")
    assert _config.get_target() == before


def test_unknown_target_names_the_choices():
    before = _config.get_target()
    with pytest.raises(ValueError, match="name") as caught:
        fastops.target("v33")
    for name in _config.targets():
        assert repr(name) in str(caught.value)
    with pytest.raises(TypeError, match="name"):
        fastops.target(3)
    assert _config.get_target() == before


def test_a_level_that_this_cpu_lacks_is_refused(native: ModuleType):
    if _backend.name != "native":
        pytest.skip("native is not the default backend of this run")
    from fastops import _core

    lacking = [name for name in _core.compiled_targets() if name not in _core.targets()]
    if not lacking:
        pytest.skip("this CPU runs every compiled level")
    before = _config.get_target()
    for name in lacking:
        with pytest.raises(ValueError, match=f"name must be .* on this CPU, got '{name}'"):
            fastops.target(name)
        with pytest.raises(ValueError, match=name):
            _core.set_target(name)
        ran = python("import fastops", FASTOPS_TARGET=name)
        assert ran.returncode == 1
        assert f"got '{name}'" in ran.stderr
    assert _config.get_target() == before


def test_threads_set_and_read():
    before = fastops.get_num_threads()
    try:
        for n in (1, 2, 3, 1024):
            fastops.set_num_threads(n)
            assert fastops.get_num_threads() == fastops.show_config("dict")["threads"] == n
        for bad, kind in (
            (0, ValueError),
            (-1, ValueError),
            (1025, ValueError),
            (2.0, TypeError),
            ("2", TypeError),
            (True, TypeError),
        ):
            with pytest.raises(kind, match="n must be an integer in"):
                fastops.set_num_threads(bad)
            assert fastops.get_num_threads() == 1024
        fastops.set_num_threads(np.int64(2))
        assert fastops.get_num_threads() == 2
    finally:
        fastops.set_num_threads(before)


def test_default_threads_stay_within_affinity_and_quota():
    ran = python("import fastops; print(fastops.get_num_threads())", FASTOPS_BACKEND=_backend.name)
    assert ran.returncode == 0, ran.stderr
    assert 1 <= int(ran.stdout) <= _config.affinity()
    if hasattr(os, "sched_setaffinity"):
        ran = python(
            "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); import fastops; "
            "print(fastops.get_num_threads(), fastops.show_config('dict')['threads_reason'])",
            FASTOPS_BACKEND=_backend.name,
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.split()[0] == "1"
        assert "affinity 1" in ran.stdout


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        ("0::/a\n", {"a/cpu.max": "rubbish\n"}, None),
        ("0::/a\n", {"a/cpu.max": "1 0\n"}, None),
        ("0::/../a\n", {"a/cpu.max": "100000 100000\n"}, 1.0),
        ("0::/a\n", {"unified/a/cpu.max": "250000 100000\n"}, 2.5),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "200000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 2.0),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
        ("7:memory:/x\n", {"cpu.max": "100000 100000\n"}, None),
        ("", {}, None),
    ],
)
def test_cgroup_quota(tmp_path: pathlib.Path, cgroup: str, files: dict[str, str], quota: float | None):
    (tmp_path / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert _config.cgroup_quota(str(tmp_path / "cgroup"), str(tmp_path / "fs")) == quota
    assert _config.cgroup_quota(str(tmp_path / "absent"), str(tmp_path / "fs")) is None


def test_thread_variable():
    code = "import fastops; print(fastops.get_num_threads(), fastops.show_config('dict')['threads_reason'])"
    ran = python(code, FASTOPS_BACKEND=_backend.name, FASTOPS_NUM_THREADS="3")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("3 FASTOPS_NUM_THREADS=3")
    # Importing numba takes seconds each time.
    wrong = (
        ("0", "two")
        if _backend.name == "numba"
        else ("0", "-1", "two", "1025", "1.5", "9" * 5000, "\u0663", "2 ", "1_0")
    )
    for bad in wrong:
        ran = python("import fastops", FASTOPS_BACKEND=_backend.name, FASTOPS_NUM_THREADS=bad)
        assert ran.returncode == 1
        assert "ValueError: FASTOPS_NUM_THREADS must be an integer in [1, 1024], got" in ran.stderr.splitlines()[-1]


def test_unknown_backend_names_the_choices():
    ran = python("import fastops", FASTOPS_BACKEND="nativ")
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert last == (
        "ValueError: FASTOPS_BACKEND must be 'native' or 'numba' or 'reference', got 'nativ'; did you mean 'native'?"
    )


@pytest.mark.parametrize("name", _backend.CHOICES)
def test_the_variable_picks_the_backend(name: str):
    if name == "numba" and importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed")
    if name == "native" and importlib.util.find_spec("fastops._core") is None:
        pytest.skip("fastops._core is not built")
    code = (
        "import sys, fastops; c = fastops.show_config('dict'); "
        "print(c['backend'], c['backend_reason'], 'numba' in sys.modules, float(fastops.mitchell_mul(3.0, 3.0)))"
    )
    ran = python(code, FASTOPS_BACKEND=name)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [name, f"FASTOPS_BACKEND={name}", str(name == "numba"), "8.0"]


def test_unknown_target_variable_names_the_choices():
    ran = python("import fastops", FASTOPS_BACKEND=_backend.name, FASTOPS_TARGET="v9")
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("ValueError: FASTOPS_TARGET must be 'v2' or ") or "neon" in last
    assert "got 'v9'" in last


def test_target_variable_sets_the_level(native: ModuleType):
    from fastops import _core

    for name in _core.targets():
        ran = python(
            "import fastops; c = fastops.show_config('dict'); print(c['target'], c['target_reason'])",
            FASTOPS_TARGET=name,
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.split() == [name, f"FASTOPS_TARGET={name}"]


def test_backends_without_targets_say_so():
    code = (
        "import fastops\n"
        "c = fastops.show_config('dict')\nassert c['target'] == 'none: native is not in use', c\n"
        "try:\n    fastops.target('v3')\nexcept ValueError as error:\n    print(error)"
    )
    ran = python(code, FASTOPS_BACKEND="reference", FASTOPS_TARGET="v3")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "name must be absent: the reference backend has no targets, got 'v3'"
