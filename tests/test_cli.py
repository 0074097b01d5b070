# SPDX-License-Identifier: BSD-3-Clause
"""The command line: what it prints, how it refuses, and that a closed or full output ends it without a traceback."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import fastops
from fastops import __main__ as cli
from fastops.bench import FAMILIES
from fastops.bench.case import Machine

COMMAND = [sys.executable, "-m", "fastops"]
# One group and two rows: what the harness itself costs.
SHORT = ["bench", "--only", "mul float32 n=1e3", "--budget", "1"]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    # Buffered as a user's Python is: a broken pipe then shows at the last flush.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120, "env": env} | options
    return subprocess.run([*COMMAND, *arguments], check=False, **settings)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a group, so that a test takes a second."""
    machine = Machine(("reference",), (), 1, frozenset())
    monkeypatch.setattr(Machine, "probe", staticmethod(lambda threads=None: machine))


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fastops {fastops.__version__}\n", "")


def test_config_is_that_of_show_config() -> None:
    done = run("config", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert said.keys() == fastops.show_config("dict").keys()
    assert said["backend"] == fastops.show_config("dict")["backend"]
    text = run("config")
    assert text.returncode == 0
    assert len(text.stdout.splitlines()) == len(said)


def test_config_needs_numpy_alone() -> None:
    blocked = ("rich", "tqdm", "jinja2", "matplotlib", "threadpoolctl", "sklearn", "torch", "pandas")
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        "from fastops.__main__ import main\nsys.exit(main(['config', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["numpy"]


def test_import_parses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastops", "--no-such-option"])
    importlib.reload(cli)


def test_include_dir_has_the_header() -> None:
    done = run("--include-dir")
    if importlib.util.find_spec("fastops._core") is None:
        assert (done.returncode, done.stderr) == (2, "fastops: this installation has no C headers\n")
        return
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "fastops" / "fastops.h").is_file()


def test_folders_are_told_without_numpy(tmp_path: Path) -> None:
    """A build asks for them, and may have no more than the package. Whatever else is asked needs the whole package."""
    (tmp_path / "numpy.py").write_text("raise ImportError('no NumPy')\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path}
    options = ("--include-dir", "--lib-dir", "--cmake-dir")
    for arguments in (*((x,) for x in options), options[:2]):
        with_numpy, without = run(*arguments), run(*arguments, env=env)
        assert (without.returncode, without.stdout) == (with_numpy.returncode, with_numpy.stdout), without.stderr
    assert "no NumPy" in run("--include-dir", "config", env=env).stderr
    # Another module that is run with such an option is not this one.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import fastops\nprint('imported')\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "other", "--cmake-dir"], capture_output=True, text=True, timeout=60, check=False, env=env
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stdout


@pytest.mark.parametrize(
    ("option", "file", "what"),
    [("--lib-dir", "libfastops.so", "C library"), ("--cmake-dir", "fastopsConfig.cmake", "CMake package")],
)
def test_folders_have_what_is_linked_to(option: str, file: str, what: str) -> None:
    done = run(option)
    if done.returncode == 2:
        assert done.stderr == f"fastops: this installation has no {what}\n"
        return
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / file).is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--family", "mitchel"], ["--family", "'mitchel'", *FAMILIES]),
        (["bench", "--threads", "0"], ["--threads", "[1, 1024]", "'0'"]),
        (["bench", "--threads", "many"], ["--threads", "'many'"]),
        (["bench", "--threads", "5000"], ["--threads", "'5000'"]),
        (["bench", "--budget", "nan"], ["--budget", "'nan'"]),
        (["bench", "--budget", "-1"], ["--budget", "'-1'"]),
        (["bench", "--html", "/no/such/folder/report.html"], ["--html", "/no/such/folder/report.html"]),
        (["bench", "--json", "/"], ["--json", "cannot write '/'"]),
        (["bench", "--only", "cuneiform"], ["--only", "'cuneiform'", "mul float32 n=1e3", "step float32 1x8x64"]),
        (["bench", "--compare", "/no/such/old.json"], ["/no/such/old.json"]),
        (["benhc"], ["'benhc'", "bench", "config"]),
        ([], ["usage"]),
    ],
)
def test_bad_arguments_end_with_status_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_groups_that_are_near_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--only", "Softmax Causal 4096"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "softmax causal float32 1x8x4096x64" in lines[1]
    assert len(lines) > 20


@pytest.mark.parametrize(("option", "module"), [("--html", "jinja2"), ("--picture", "matplotlib")])
def test_missing_extra_is_named_in_one_line(
    option: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    genuine = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == module else genuine(name, *rest)
    )
    assert cli.main(["bench", option, str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"fastops: {module} not installed: pip install 'fastops[bench]'\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["jax", "torch"])
def test_a_framework_is_named_where_its_benchmarks_are_asked_for(
    family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    genuine = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == family else genuine(name, *rest)
    )
    assert cli.main(["bench", "--family", family]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"fastops: {family} not installed: pip install 'fastops[{family}]'\n")


@pytest.mark.usefixtures("plain")
def test_bench_writes_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    page, document, picture = tmp_path / "r.html", tmp_path / "r.json", tmp_path / "r.svg"
    arguments = [*SHORT, "--html", str(page), "--json", str(document), "--picture", str(picture)]
    # There is no row of ours to draw, which is said after the others are written.
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert [line.split("\t")[1] for line in out.splitlines()] == ["implementation", "NumPy exact", "reference"]
    assert err == "fastops: --picture: no group has a row of ours to compare\n"
    assert "<svg" in page.read_text(encoding="utf-8")
    assert [bench["param"] for bench in json.loads(document.read_text())["benchmarks"]] == ["NumPy exact", "reference"]
    assert not picture.exists()
    assert cli.main([*SHORT, "--compare", str(document)]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("\tverdict\tratio_since")


@pytest.mark.usefixtures("plain")
def test_bench_json_on_stdout_is_all_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SHORT, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert len(json.loads(out)["benchmarks"]) == 2


@pytest.mark.usefixtures("plain")
def test_wrong_result_is_an_error_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fastops.bench import runner

    def prepare(case: Any, entries: Any, *rest: Any) -> dict[str, str]:
        for entry in entries:
            entry.measurement.failed, entry.measurement.wrong = "WrongResult: it is off", True
        return {}

    monkeypatch.setattr(runner, "_prepare", prepare)
    assert cli.main(SHORT) == 1
    assert "fastops: wrong result: mul float32 n=1e3, reference\n" in capsys.readouterr().err


def test_bench_on_a_terminal_draws_a_bar_and_a_table() -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    code = (
        "import sys\nfrom fastops.bench.case import Machine\n"
        "Machine.probe = staticmethod(lambda threads=None: Machine(('reference',), (), 1, frozenset()))\n"
        f"from fastops.__main__ import main\nsys.exit(main({SHORT!r}))"
    )
    env = os.environ | {"COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    seen = b""
    while True:
        try:
            data = os.read(master, 1 << 16)
        except OSError:
            break
        if not data:
            break
        seen += data
    os.close(master)
    assert process.wait(60) == 0
    text = seen.decode()
    assert "%|" in text
    assert "fastops bench" in text
    assert "yardstick" in text


@pytest.mark.parametrize("arguments", [["config"], ["config", "--json"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_leaves_ends_it_quietly(arguments: list[str], unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with os.fdopen(write, "w") as gone:
        done = run(*arguments, capture_output=False, stdout=gone, stderr=subprocess.PIPE, env=env)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("arguments", ["config", "--version", "config --json", "--include-dir"])
def test_closed_stdout_has_no_traceback(arguments: str) -> None:
    command = f'"{sys.executable}" -m fastops {arguments} >&-'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 1, 2)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = run("config", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.startswith("fastops: ")
    assert len(done.stderr.splitlines()) == 1


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def no_space(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        cli._write(str(path), "new")
    assert [entry.read_text(encoding="utf-8") for entry in tmp_path.iterdir()] == ["old"]


def test_interrupt_ends_the_workers_too() -> None:
    process = subprocess.Popen([*COMMAND, "bench", "--budget", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        process.communicate()
        pytest.skip("this system does not list the children of a process")
    workers: list[str] = []
    deadline = time.monotonic() + 60
    while not workers and process.poll() is None and time.monotonic() < deadline:
        workers = children.read_text().split()
        time.sleep(0.05)
    assert workers
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.nightly
def test_quick_bench_ends_within_a_minute(tmp_path: Path) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "ratios.svg"
    done = run("bench", "--quick", "--html", str(page), "--picture", str(picture), timeout=60)
    assert done.returncode == 0, done.stderr
    assert page.stat().st_size < 1_000_000
    assert ET.parse(picture).getroot().tag.endswith("svg")
