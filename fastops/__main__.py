# SPDX-License-Identifier: BSD-3-Clause
"""The command line: `fastops count`, `fastops bench`, `fastops config`, and where a C or CMake build finds the headers."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import fastops
from fastops._folders import FOLDERS, folder
from fastops._rule import DOCUMENTS, ERRORS, LOWERCASE, NORMALIZE, TOKENIZERS
from fastops.bench import FAMILIES

if TYPE_CHECKING:
    from fastops import WordCounts


class UsageError(Exception):
    """One line for the user; ends the command with status 2."""


class InputError(Exception):
    """One line for the user about what was read; ends the command with status 1."""


def _positive(kind: Callable[[str], Any], text: str, wanted: str, high: float) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value <= high:
        raise argparse.ArgumentTypeError(f"wanted {wanted}, got {text!r}")
    return value


def _threads(text: str) -> int:
    from fastops._validate import MAX_THREADS

    value: int = _positive(int, text, f"a number of threads in [1, {MAX_THREADS}]", MAX_THREADS)
    return value


def _seconds(text: str) -> float:
    value: float = _positive(float, text, "seconds above 0, a day at most", 86400)
    return value


def _at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value: int = _positive(lambda digits: int(digits) - low + 1, text, f"an integer >= {low}", 2**62)
        return value + low - 1

    return number


def _size(text: str) -> int:
    """Bytes: a number, with K, M, G or T for powers of 1024."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    number = text.upper().removesuffix("B").removesuffix("I")
    factor = units.get(number[-1:], 1)
    digits = number[:-1] if factor > 1 else number
    value: float = _positive(lambda _: float(digits), text, "bytes such as 500M or 2G", 2**62 / factor)
    return int(value * factor)


def _picture(text: str) -> str:
    if not text.endswith((".png", ".svg")):
        raise argparse.ArgumentTypeError(f"wanted a name that ends in .png or .svg, got {text!r}")
    return _output(text)


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
    top.add_argument("--lib-dir", action="store_true", help="print the folder of libfastops")
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
    count = commands.add_parser(
        "count",
        help="count the words of files",
        description="Counts the words of text files, compressed or not (gzip, bzip2, xz, zstd), and prints the most "
        "frequent as lines of a word, a tab and its count. Ends with status 1 where a file could not be counted.",
    )
    _add_count(count)
    config = commands.add_parser("config", help="what is compiled in, what this machine runs, what was chosen")
    config.add_argument("--json", action="store_true", help="as JSON")
    return top


def _add_count(count: argparse.ArgumentParser) -> None:
    count.add_argument("files", nargs="+", metavar="FILE", help="a file, a quoted pattern, or - for standard input")
    count.add_argument("--top", type=_at_least(0), metavar="N", help="how many words to print (20; 0 with --output)")
    count.add_argument("--tokenizer", choices=TOKENIZERS, default="whitespace", help="what a word is (whitespace)")
    count.add_argument("--lowercase", choices=LOWERCASE, help="lower the letters: A-Z alone, or all of Unicode's")
    count.add_argument("--normalize", choices=NORMALIZE, help="Unicode normalization, before all else")
    count.add_argument(
        "--ngrams", type=_at_least(1), nargs=2, default=(1, 1), metavar=("LOW", "HIGH"), help="sequences of words (1 1)"
    )
    count.add_argument("--document", choices=DOCUMENTS, default="line", help="what n-grams do not cross (line)")
    count.add_argument("--stop-words", metavar="FILE", help="words that are not counted, separated by white space")
    count.add_argument("--min-count", type=_at_least(1), default=1, metavar="N", help="leave out what is rarer")
    count.add_argument("--errors", choices=ERRORS, default="replace", help="what becomes of invalid UTF-8 (replace)")
    count.add_argument("--field", metavar="NAME", help="count this field of JSON lines")
    count.add_argument("--column", metavar="NAME", help="count this column of Parquet files")
    count.add_argument(
        "--doc-freq", action="store_true", help="also count the documents that a word is in, a third column"
    )
    count.add_argument(
        "--max-token-bytes", type=_size, default=2**20, metavar="SIZE", help="a longer word is an error (1M)"
    )
    count.add_argument(
        "--max-output-bytes", type=_size, metavar="SIZE", help="what a compressed file may become, as 2G"
    )
    count.add_argument("--jobs", type=_threads, metavar="N", help="threads (as many as there are CPUs)")
    count.add_argument("--memory-limit", type=_size, metavar="SIZE", help="spill to temporary files from here, as 2G")
    count.add_argument("--approx", type=_at_least(1), metavar="K", help="keep K words, and say how far counts are off")
    count.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="end with an error after so long")
    count.add_argument("--skip-errors", action="store_true", help="leave out, and name, the files that cannot be read")
    count.add_argument("--output", type=_output, metavar="FILE", help="write all words and counts, - for stdout")
    count.add_argument("--plot", type=_picture, metavar="FILE", help="draw counts over ranks as a PNG or SVG picture")
    count.add_argument("--json", action="store_true", help="print JSON")


def _stdout() -> TextIO:
    """Standard output, or nowhere when the shell closed it."""
    return sys.stdout if sys.stdout is not None else io.StringIO()


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _write(path: str, text: str | bytes) -> None:
    """All or nothing: a temporary name, renamed when complete."""
    from ._counts import _replacing

    with _replacing(path) as file:
        file.write(text.encode() if isinstance(text, str) else text)


def _require(wanted: Sequence[str], extra: str = "bench") -> None:
    from fastops._backend import installed

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
    if arguments.family in ("jax", "torch"):
        _require([arguments.family], arguments.family)
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


def _count(arguments: argparse.Namespace) -> int:
    _require(["matplotlib"] if arguments.plot else [])
    from fastops import _zipf
    from fastops._sources import printable

    if arguments.ngrams[0] > arguments.ngrams[1]:
        raise UsageError(f"--ngrams: the smaller number comes first, got {' '.join(map(str, arguments.ngrams))}")
    if arguments.field is not None and arguments.column is not None:
        raise UsageError("--field is of JSON lines and --column of Parquet files: not both")
    if arguments.output == "-" and (arguments.json or arguments.top):
        raise UsageError("--output - takes all of stdout: without --json and --top")
    stop_words = Path(arguments.stop_words).read_bytes().split() if arguments.stop_words else None
    try:
        counts = fastops.count_files(
            arguments.files,
            field=arguments.field,
            column=arguments.column,
            tokenizer=arguments.tokenizer,
            lowercase=arguments.lowercase,
            normalize=arguments.normalize,
            ngrams=tuple(arguments.ngrams),
            document=arguments.document,
            min_count=arguments.min_count,
            stop_words=stop_words,
            errors=arguments.errors,
            workers=arguments.jobs,
            memory_limit=arguments.memory_limit,
            approx=arguments.approx,
            doc_freq=arguments.doc_freq,
            max_token_bytes=arguments.max_token_bytes,
            max_output_bytes=arguments.max_output_bytes,
            on_error="skip" if arguments.skip_errors else "raise",
            timeout=arguments.timeout,
            progress=True,
        )
    except ImportError as problem:
        raise UsageError(str(problem)) from None
    except (TimeoutError, ValueError, fastops.WorkerDied) as problem:
        raise InputError(str(problem)) from None
    top = arguments.top if arguments.top is not None else 0 if arguments.output else 20
    shown: list[tuple[Any, ...]] = list(counts.most_common(top))
    if arguments.doc_freq:
        shown = [(word, count, counts.doc_freq[word]) for word, count in shown]
    out = _stdout()
    if arguments.json:
        said = {
            "words": len(counts),
            "total": counts.total(),
            "documents": counts.documents,
            "error_bound": counts.error_bound,
            "skipped": counts.skipped,
            "counts": [[word, *numbers] for word, *numbers in shown],
        }
        # Escapes: any locale can print them, and a byte that is no UTF-8 stays apart from text.
        out.write(json.dumps(said, indent=1) + "\n")
    else:
        _write_words(out, "".join("\t".join((printable(word), *map(str, numbers))) + "\n" for word, *numbers in shown))
    try:
        if arguments.output == "-":
            _write_words(out, _tsv(counts))
        elif arguments.output:
            counts.to_tsv(arguments.output)
    except ValueError as problem:
        raise InputError(f"--output: {problem}") from None
    if arguments.plot:
        words = [printable(word) for word, _ in counts.most_common(1000)]
        _write(arguments.plot, _zipf.picture(list(counts.values()), words, arguments.plot[-4:]))
    out.flush()
    if counts.error_bound and not arguments.json:
        _complain(f"each count is at most {counts.error_bound} too low")
    for name, why in counts.skipped:
        _complain(f"skipped {name}: {why}")
    return 1 if counts.skipped else 0


def _tsv(counts: WordCounts) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="fastops-") as folder:
        path = Path(folder) / "counts.tsv"
        counts.to_tsv(path)
        return path.read_bytes()


def _write_words(out: TextIO, text: str | bytes) -> None:
    """UTF-8 whatever the locale: the same file from everywhere."""
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    buffer = getattr(out, "buffer", None)
    if buffer is None:
        out.write(data.decode("utf-8", "replace"))
        return
    out.flush()
    # Under PYTHONUNBUFFERED this is a raw file, which may take a part.
    view = memoryview(data)
    while view:
        view = view[buffer.write(view) :]


def _complain(text: str) -> None:
    if sys.stderr is not None:
        print(f"fastops: {text}", file=sys.stderr)


def _run(argv: Sequence[str] | None) -> int:
    grammar = parser()
    arguments = grammar.parse_args(argv)
    asked = [option for option in FOLDERS if getattr(arguments, option[2:].replace("-", "_"))]
    for option in asked:
        found = folder(option)
        if found is None:
            raise UsageError(f"this installation has no {FOLDERS[option][1]}")
        print(found)
    if asked:
        return 0
    if arguments.command == "bench":
        return _bench(arguments)
    if arguments.command == "count":
        return _count(arguments)
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
    except InputError as problem:
        _complain(str(problem))
        return 1
    except MemoryError:
        _complain("out of memory")
        return 1
    except OSError as problem:
        _give_up_stdout()
        _complain(str(problem))
        return 1


if __name__ == "__main__":
    sys.exit(main())
