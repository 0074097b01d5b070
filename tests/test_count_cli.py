# SPDX-License-Identifier: BSD-3-Clause
"""`fastops count`: what it prints and writes, whatever the locale, and how it ends when something is wrong."""

from __future__ import annotations

import fcntl
import gzip
import importlib.util
import io
import json
import os
import pty
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
from fastops import _zipf

COMMAND = [sys.executable, "-m", "fastops", "count"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("To be or not to be\nthat is the Über question\n", encoding="utf-8")
    return path


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    settings: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "timeout": 120} | options
    return subprocess.run([*COMMAND, *map(str, arguments)], check=False, **settings)


def count(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = cli.main(["count", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_top_words_are_lines_of_word_and_count(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert count(capsys, text, "--top", 2) == (0, "be\t2\nTo\t1\n", "")
    assert count(capsys, text, "--lowercase", "unicode", "--min-count", 2) == (0, "be\t2\nto\t2\n", "")
    assert count(capsys, text, "--top", 0) == (0, "", "")


@pytest.mark.parametrize(
    ("options", "same"),
    [
        (["--tokenizer", "char", "--ngrams", "2", "3"], {"tokenizer": "char", "ngrams": (2, 3)}),
        (
            ["--tokenizer", "word", "--lowercase", "casefold", "--normalize", "NFKC"],
            {"tokenizer": "word", "lowercase": "casefold", "normalize": "NFKC"},
        ),
        (["--document", "file", "--ngrams", "1", "2", "--jobs", "2"], {"document": "file", "ngrams": (1, 2)}),
        (["--errors", "ignore", "--memory-limit", "2M"], {"errors": "ignore"}),
    ],
)
def test_options_are_those_of_count_files(
    options: list[str], same: Any, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = count(capsys, text, "--json", "--top", 1000, *options)
    said = json.loads(out)
    want = fastops.count_files(text, **same)
    assert status == 0
    assert said["counts"] == [list(pair) for pair in want.items()]
    assert (said["words"], said["total"], said["documents"]) == (len(want), want.total(), want.documents)
    assert (said["error_bound"], said["skipped"]) == (0, [])


def test_documents_are_a_third_column(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert count(capsys, text, "--top", 1, "--doc-freq") == (0, "be\t2\t1\n", "")
    status, out, _ = count(capsys, text, "--top", 1, "--doc-freq", "--json")
    assert (status, json.loads(out)["counts"]) == (0, [["be", 2, 1]])


@pytest.mark.parametrize("more", [["--json"], ["--top", "3"]])
def test_words_on_stdout_are_alone_there(more: list[str], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = count(capsys, text, "--output", "-", *more)
    assert (status, out) == (2, "")
    assert "--output - takes all of stdout" in err


def test_sizes_that_are_too_large_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "words.gz"
    path.write_bytes(gzip.compress(b"a" * 3000 + b"\n"))
    for option, size in (("--max-token-bytes", "2K"), ("--max-output-bytes", "1K")):
        status, out, err = count(capsys, path, option, size)
        assert (status, out) == (1, "")
        assert "words.gz" in err


def test_stop_words_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "a b c a"}\n{"body": "a"}\n')
    stops = tmp_path / "stops"
    stops.write_text("b\nc")
    assert count(capsys, rows, "--field", "body", "--stop-words", stops) == (0, "a\t3\n", "")
    status, out, err = count(capsys, rows, "--field", "text")
    assert (status, out, err) == (1, "", f"fastops: {rows}, line 1: no field 'text'\n")


def test_output_is_written_whole_or_not_at_all(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "counts.tsv"
    assert count(capsys, text, "--output", out) == (0, "", "")
    assert out.read_text(encoding="utf-8").splitlines()[:3] == ["be\t2", "To\t1", "is\t1"]
    assert count(capsys, text, "--output", "-") == (0, out.read_text(encoding="utf-8"), "")
    assert count(capsys, text, "--output", out, "--top", 1) == (0, "be\t2\n", "")

    def no_space(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    status, _, err = count(capsys, text, "--output", out, "--tokenizer", "word")
    assert (status, err) == (1, "fastops: [Errno 28] No space left on device\n")
    assert [path.name for path in folder.iterdir()] == ["counts.tsv"]
    monkeypatch.undo()
    # A tab cannot be written in this format.
    text.write_text("a\tb")
    status, _, err = count(capsys, text, "--output", out, "--tokenizer", "char")
    assert status == 1
    assert err.startswith("fastops: --output: words must be free of tabs")
    assert [path.name for path in folder.iterdir()] == ["counts.tsv"]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot(kind: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / f"zipf.{kind}"
    text.write_text("$x^2$ $ the the \u1234字 _ & <b>\n", encoding="utf-8")
    for _ in range(2):
        assert count(capsys, text, "--plot", path, "--top", 1) == (0, "the\t2\n", "")
        first = path.read_bytes()
    assert path.read_bytes() == first
    if kind == "png":
        assert first.startswith(b"\x89PNG")
    else:
        assert ET.parse(path).getroot().tag.endswith("svg")
        assert b"one over the rank" in first


@pytest.mark.parametrize("size", [0, 1, 2, 3000])
def test_plot_of_any_number_of_words(size: int) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    numbers = [max(1, size // (i + 1)) for i in range(size)]
    assert _zipf.picture(numbers, [f"w{i}" for i in range(size)], ".svg").startswith(b"<?xml")


def test_plot_needs_matplotlib(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else genuine(name, *rest)
    )
    status, out, err = count(capsys, text, "--plot", tmp_path / "x.png")
    assert (status, out, err) == (2, "", "fastops: matplotlib not installed: pip install 'fastops[bench]'\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--tokenizer", "words"], ["--tokenizer", "'words'", "whitespace"]),
        (["x", "--top", "-1"], ["--top", "an integer >= 0", "'-1'"]),
        (["x", "--ngrams", "0", "1"], ["--ngrams", "an integer >= 1", "'0'"]),
        (["x", "--ngrams", "2", "1"], ["--ngrams", "2 1"]),
        (["x", "--memory-limit", "2X"], ["--memory-limit", "500M", "'2X'"]),
        (["x", "--memory-limit", "nan"], ["--memory-limit", "'nan'"]),
        (["x", "--plot", "a.gif"], ["--plot", ".png or .svg", "'a.gif'"]),
        (["x", "--plot", "/no/such/folder/a.png"], ["--plot", "cannot write"]),
        (["x", "--output", "/no/such/folder/a.tsv"], ["--output", "cannot write"]),
        (["x", "--field", "a", "--column", "b"], ["--field", "--column"]),
        (["x", "--jobs", "0"], ["--jobs", "'0'"]),
        ([], ["FILE"]),
    ],
)
def test_bad_arguments_end_with_status_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = count(capsys, *arguments)
    assert (status, out) == (2, "")
    for word in words:
        assert word in err


def test_sizes_have_units() -> None:
    sizes = [cli._size(text) for text in ("1048576", "2G", "1.5k", "3MiB", "1tb")]
    assert sizes == [2**20, 2**31, 1536, 3 * 2**20, 2**40]


def test_files_that_cannot_be_counted_are_one_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = count(capsys, text, tmp_path / "none")
    assert (status, out) == (1, "")
    assert err == f"fastops: [Errno 2] No such file or directory: '{tmp_path}/none'\n"
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(b"words " * 1000)[:-5])
    status, out, err = count(capsys, text, cut)
    assert (status, out, err) == (1, "", f"fastops: {cut}: gzip data end before the end mark\n")
    status, out, err = count(capsys, cut, text, tmp_path / "none", "--skip-errors", "--top", 1)
    assert (status, out) == (1, "be\t2\n")
    assert err.splitlines() == [
        f"fastops: skipped {cut}: {cut}: gzip data end before the end mark",
        f"fastops: skipped {tmp_path}/none: [Errno 2] No such file or directory: '{tmp_path}/none'",
    ]
    status, out, err = count(capsys, f"{tmp_path}/*.nothing")
    assert (status, err) == (1, f"fastops: [Errno 2] No file matches: '{tmp_path}/*.nothing'\n")


def test_patterns_and_standard_input(text: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("be")
    done = run(f"{tmp_path}/*.txt", "--top", 1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "be\t3\n", "")
    done = run("-", "--top", 1, input="to be to")
    assert (done.returncode, done.stdout, done.stderr) == (0, "to\t2\n", "")
    done = subprocess.run(
        [*COMMAND, "-"],
        stdin=None,
        capture_output=True,
        text=True,
        check=False,
        close_fds=True,
        preexec_fn=lambda: os.close(0),
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("fastops: ")
    assert "Traceback" not in done.stderr


def test_approximate_counts_say_so(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = count(capsys, text, "--approx", 3)
    assert status == 0
    assert err.startswith("fastops: each count is at most ")


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
@pytest.mark.parametrize("utf8", ["0", "1"])
def test_output_does_not_depend_on_the_locale(locale: str, utf8: str, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    name = folder + b"/\xff\n.txt"
    with open(name, "wb") as file:
        file.write("über \xff".encode() + b" \xfe\n")
    environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0"}
    environment.pop("PYTHONIOENCODING", None)
    done = subprocess.run(
        [*map(os.fsencode, COMMAND), name, folder + b"/none\xfe", b"--errors", b"surrogateescape", b"--skip-errors"],
        capture_output=True,
        env=environment,
        check=False,
        timeout=60,
    )
    assert done.stdout == b"\xc3\xbc" + "ber\t1\nÿ\t1\n\\xfe\t1\n".encode()
    assert done.returncode == 1
    assert b"skipped " in done.stderr
    assert rb"/none\xfe: " in done.stderr
    assert b"Traceback" not in done.stderr


def test_progress_is_a_bar_on_a_terminal_alone(tmp_path: Path) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    path = tmp_path / "text"
    path.write_bytes(b"some words in a line\n" * 200_000)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([*COMMAND, str(path), "--top", "1"], stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert out == b"a\t200000\n"
    assert b"%" in shown
    done = run(path, "--top", 1)
    assert done.stderr == ""


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(" ".join(f"word{i}" for i in range(100_000)))
    process = subprocess.Popen([*COMMAND, str(path), "--top", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 141)
    process.stderr.close()
    for redirect, statuses in ((">&-", (0, 1)), ("2>&-", (0,)), (">/dev/full", (1,)), ("</dev/null", (0,))):
        command = f"'{sys.executable}' -m fastops count '{path}' --top 3 {redirect}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode in statuses, (redirect, done.stderr)
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) <= 1


def test_timeout_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    keep = os.open(path, os.O_RDWR)
    start = time.monotonic()
    done = run(path, "--timeout", 0.5)
    os.close(keep)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "fastops: counting took longer than timeout=0.5 s\n"
    assert time.monotonic() - start < 20


def test_words_are_text_where_stdout_has_no_bytes(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["count", str(text), "--top", "1"]) == 0
    assert out.getvalue() == "be\t2\n"
