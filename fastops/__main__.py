# SPDX-License-Identifier: BSD-3-Clause
"""The command line: `fastops bench`, `fastops config`, and where a C or CMake build finds the headers."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import fastops
from fastops._backend import installed
from fastops._validate import MAX_THREADS
from fastops.bench import FAMILIES


class UsageError(Exception):
    """One line for the user; ends the command with status 2."""


def _positive(kind: Callable[[str], Any], text: str, wanted: str, high: int) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value <= high:
        raise argparse.ArgumentTypeError(f"wanted {wanted}, got {text!r}")
    return value


def _threads(text: str) -> int:
    value: int = _positive(int, text, f"a number of threads in [1, {MAX_THREADS}]", MAX_THREADS)
    return value


def _seconds(text: str) -> float:
    value: float = _positive(float, text, "seconds above 0, a day at most", 86400)
    return value


def _output(text: str) -> str:
    """A path that can be written, so that a long run does not end in an error."""
    folder = os.path.dirname(text) or "."
    if text != "-" and (not os.path.isdir(folder) or not os.access(folder, os.W_OK) or os.path.isdir(text)):
        raise argparse.ArgumentTypeError(f"cannot write {text!r}")
    return text


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="fastops", description="Native-accelerated numeric operations.")
    top.add_argument("--version", action="version", version=f"fastops {fastops.__version__}")
    top.add_argument("--include-dir", action="store_true", help="print the folder of the C headers")
    top.add_argument("--cmake-dir", action="store_true", help="print the folder of the CMake package")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    bench = commands.add_parser(
        "bench",
        help="measure this machine against NumPy, Numba and the peers that are installed",
        description="Measures every operation against plain NumPy, Numba and the peers that are installed, each in a "
        "process of its own, and prints one table of ratios (tab-separated values where the output is no terminal).",
    )
    bench.add_argument("--family", choices=FAMILIES, help="only this family's operations")
    bench.add_argument("--only", metavar="TEXT", help="only the groups whose name contains TEXT")
    bench.add_argument("--quick", action="store_true", help="fewer groups, in less than a minute")
    bench.add_argument("--budget", type=_seconds, metavar="SECONDS", help="about how long to measure")
    bench.add_argument("--threads", type=_threads, metavar="N", help="threads of the rows that use several")
    bench.add_argument("--html", type=_output, metavar="FILE", help="write a report with plots")
    bench.add_argument("--picture", type=_output, metavar="FILE", help="write the ratios as an SVG picture")
    bench.add_argument(
        "--lengths", type=_output, metavar="FILE", help="write time and memory over lengths as an SVG picture"
    )
    bench.add_argument("--markdown", type=_output, metavar="FILE", help="write the ratios as a Markdown table")
    bench.add_argument("--json", type=_output, metavar="FILE", help="write JSON like pytest-benchmark's, - for stdout")
    bench.add_argument("--compare", metavar="OLD.json", help="show how the ratios changed since a --json file")
    config = commands.add_parser("config", help="what is compiled in, what this machine runs, what was chosen")
    config.add_argument("--json", action="store_true", help="as JSON")
    return top


def _stdout() -> TextIO:
    """Standard output, or nowhere when the shell closed it."""
    return sys.stdout if sys.stdout is not None else io.StringIO()


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _write(path: str, text: str) -> None:
    """All or nothing: a temporary name, renamed when complete."""
    import tempfile

    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix=".fastops-", dir=folder)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _require(wanted: Sequence[str], extra: str = "bench") -> None:
    missing = [name for name in wanted if not installed(name)]
    if missing:
        raise UsageError(f"{', '.join(missing)} not installed: pip install 'fastops[{extra}]'")


@contextmanager
def _progress() -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr when it is a terminal, else nothing."""
    if not _is_terminal(sys.stderr):
        yield lambda fraction, text: None
        return
    from tqdm import tqdm

    form = "{percentage:3.0f}%|{bar}| {elapsed} {desc}"
    with tqdm(total=1.0, file=sys.stderr, leave=False, bar_format=form, dynamic_ncols=True, miniters=0) as bar:

        def report(fraction: float, text: str) -> None:
            bar.set_description_str(text, refresh=False)
            bar.update(max(0.0, fraction - bar.n))

        yield report


def _nearest_first(text: str, names: Sequence[str]) -> list[str]:
    """The names, those with most of the words of `text` before others, and among them the most alike."""
    from difflib import SequenceMatcher

    words = text.lower().split()

    def far(name: str) -> tuple[int, float]:
        alike = SequenceMatcher(None, text.lower(), name.lower()).ratio()
        return -sum(word in name.lower() for word in words), -alike

    return sorted(dict.fromkeys(names), key=far)


def _bench(arguments: argparse.Namespace) -> int:
    wanted = ["rich"] if _is_terminal(sys.stdout) and arguments.json != "-" else []
    wanted += ["tqdm"] if _is_terminal(sys.stderr) else []
    wanted += ["jinja2"] if arguments.html else []
    wanted += ["matplotlib"] if arguments.html or arguments.picture or arguments.lengths else []
    _require(wanted)

    from fastops.bench import report, runner
    from fastops.bench.case import Machine

    try:
        old = report.read_old(arguments.compare) if arguments.compare else None
    except (OSError, ValueError) as problem:
        raise UsageError(str(problem)) from None
    families = [arguments.family] if arguments.family else FAMILIES
    cases = [case for family in families for case in importlib.import_module(f"fastops.bench.{family}").cases()]
    cases = [case for case in cases if case.quick or not arguments.quick]
    if arguments.only:
        groups = [case.group for case in cases]
        cases = [case for case in cases if arguments.only in case.group]
        if not cases:
            raise UsageError(
                f"--only: no group's name contains {arguments.only!r}; those there are, the nearest first:\n  "
                + "\n  ".join(_nearest_first(arguments.only, groups))
            )
    if arguments.family == "torch":
        _require(["torch"], "torch")
    settings = runner.Settings.of(arguments.quick, arguments.budget)
    with _progress() as progress:
        run = runner.run(cases, Machine.probe(arguments.threads), settings, progress)
    out = _stdout()
    if arguments.json == "-":
        json.dump(report.to_json(run), out, indent=1)
        out.write("\n")
    elif _is_terminal(out):
        report.print_table(run, out, old)
    else:
        report.print_tsv(run, out, old)
    out.flush()
    if arguments.json and arguments.json != "-":
        _write(arguments.json, json.dumps(report.to_json(run), indent=1))
    if arguments.html:
        _write(arguments.html, report.html(run, old))
    if arguments.markdown:
        _write(arguments.markdown, report.markdown(run))
    for path, draw in ((arguments.picture, report.picture), (arguments.lengths, report.lengths)):
        if path:
            try:
                _write(path, draw(run))
            except ValueError as problem:
                raise UsageError(str(problem)) from None
    for note in run.notes:
        _complain(note)
    for row in run.wrong:
        _complain(f"wrong result: {row}")
    return 1 if run.wrong else 0


def _complain(text: str) -> None:
    if sys.stderr is not None:
        print(f"fastops: {text}", file=sys.stderr)


def _folder(name: str, what: str) -> str:
    """A folder of the installed package; in an editable install it lies beside the compiled module."""
    places = [Path(fastops.__file__).parent]
    core = importlib.util.find_spec("fastops._core")
    if core is not None and core.origin:
        places.append(Path(core.origin).parent)
    for place in places:
        if (place / name).is_dir():
            return str(place / name)
    raise UsageError(f"this installation has no {what}")


def _run(argv: Sequence[str] | None) -> int:
    grammar = parser()
    arguments = grammar.parse_args(argv)
    if arguments.include_dir or arguments.cmake_dir:
        if arguments.include_dir:
            print(_folder("include", "C headers"))
        if arguments.cmake_dir:
            print(_folder("share/cmake/fastops", "CMake package"))
        return 0
    if arguments.command == "bench":
        return _bench(arguments)
    if arguments.command == "config":
        if arguments.json:
            print(fastops.show_config("json"))
        else:
            fastops.show_config()
        return 0
    grammar.print_help(sys.stderr)
    return 2


def _give_up_stdout() -> None:
    """Python flushes stdout once more at its end, and would complain again where that cannot work."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (141 when the reader of the output went away)."""
    try:
        try:
            status = _run(argv)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        _give_up_stdout()
        return 141
    except KeyboardInterrupt:
        return 130
    except UsageError as problem:
        _complain(str(problem))
        return 2
    except OSError as problem:
        _give_up_stdout()
        _complain(str(problem))
        return 1


if __name__ == "__main__":
    sys.exit(main())
