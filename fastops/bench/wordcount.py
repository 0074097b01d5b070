# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of word counting: files of English, of a large vocabulary, of many scripts and of Chinese.

Texts are made once in a folder of the system's temporary files: English from the King James Bible in the folder FASTOPS_BENCH_DATA,
lines in another order each time it is repeated, some words with a number added; random words where that file is absent.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from fastops.bench.case import Case, Implementation, Machine, Task, WrongResult

REFERENCE = "reference"
COUNTER = "Counter loop"
# Rows slower than others read only the begin of the text.
_PART = {
    COUNTER: 20_000_000,
    REFERENCE: 1_000_000,
    "numba": 20_000_000,
    "re.findall": 20_000_000,
    "CountVectorizer": 5_000_000,
    "jieba": 200_000,
    "rjieba": 3_000_000,
}
_VERSION = 1  # of the texts
# Different words, different and all tokens, and the most frequent with their counts.
Summary = tuple[int, int, list[tuple[bytes, int]]]
_TOP = 20


@dataclass(frozen=True)
class _Kind:
    """An operation: the tokenizer, and whether ASCII letters are made small first."""

    tokenizer: str
    lower: bool
    text: str


_KINDS = {
    "whitespace": _Kind("whitespace", True, "english"),
    "whitespace zipf": _Kind("whitespace", True, "zipf"),
    "word": _Kind("word", True, "english"),
    "word scripts": _Kind("word", False, "scripts"),
    "unicode": _Kind("unicode", True, "english"),
    "unicode scripts": _Kind("unicode", False, "scripts"),
    "zh": _Kind("zh", False, "chinese"),
}


def _case(op: str, size: int, quick: bool = False) -> Case:
    return Case("wordcount", f"count {op}", "UTF-8", f"{size / 1e6:g} MB", (size,), "byte", quick, _YARDSTICKS)


_YARDSTICKS = ("countwords", "re.findall", "rjieba", "jieba", COUNTER, REFERENCE)


def cases() -> list[Case]:
    """Every case of the family, in the order of the table."""
    return [
        _case("whitespace", 10_000_000, quick=True),
        _case("whitespace", 100_000_000),
        _case("whitespace zipf", 40_000_000),
        _case("word", 100_000_000),
        _case("word scripts", 20_000_000),
        _case("unicode", 100_000_000),
        _case("unicode scripts", 20_000_000),
        _case("zh", 8_000_000),
    ]


def _kind(case: Case) -> _Kind:
    return _KINDS[case.op.removeprefix("count ")]


def implementations(case: Case, machine: Machine) -> list[Implementation]:
    """Rows of a case on a machine: the peers first, the native ones last."""
    kind = _kind(case)
    many = machine.threads
    rows: list[Implementation] = []
    if kind.text in ("scripts", "chinese") and _source(kind.text) is None:
        return []
    if kind.tokenizer == "zh":
        if "jieba" not in machine.modules:
            return []
        rows.append(Implementation("jieba", "jieba"))
        if "rjieba" in machine.modules:
            rows.append(Implementation("rjieba", "rjieba"))
    if kind.tokenizer == "word":
        rows.append(Implementation("re.findall", "findall"))
    if kind.tokenizer == "whitespace":
        rows.append(Implementation(COUNTER, "counter"))
        if _peer_source() is not None and shutil.which("cc"):
            rows.append(Implementation("countwords C", "countwords"))
        if "polars" in machine.modules:
            rows.append(
                Implementation(
                    f"polars{_threads(many)}", "polars", threads=many, env=(("POLARS_MAX_THREADS", str(many)),)
                )
            )
        if "duckdb" in machine.modules:
            rows.append(Implementation(f"duckdb{_threads(many)}", "duckdb", threads=many))
        if "sklearn" in machine.modules:
            rows.append(Implementation("CountVectorizer", "sklearn"))
    rows.append(Implementation(REFERENCE, "fastops"))
    if "numba" in machine.backends and kind.tokenizer == "whitespace":
        rows.append(Implementation("numba", "fastops", "numba"))
    if machine.backends[0] == "native":
        best = machine.targets[0]
        rows.append(Implementation(f"native {best}", "fastops", "native", best))
        if many > 1:
            rows.append(Implementation(f"native {best}{_threads(many)}", "fastops", "native", best, many))
    return rows


def _threads(many: int) -> str:
    return f", {many} threads" if many > 1 else ""


# --- texts ---------------------------------------------------------------------------------------------------------------------

_SOURCES = {"english": "kjv.txt", "scripts": "udhr_multi.txt", "chinese": "zh_classics_crlf.txt"}


def _source(text: str) -> Path | None:
    """A real text, where the folder of them is known: FASTOPS_BENCH_DATA, else shared/data beside the source tree."""
    folder = os.environ.get("FASTOPS_BENCH_DATA")
    place = Path(folder) if folder else Path(__file__).resolve().parents[3] / "shared" / "data"
    path = place / _SOURCES.get(text, "")
    return path if path.is_file() else None


def _peer_source() -> Path | None:
    path = Path(__file__).resolve().parents[2] / "bench" / "peers" / "countwords.c"
    return path if path.is_file() else None


def _english(source: bytes) -> Iterator[bytes]:
    """Lines for ever: the text's in random order, in six of a hundred a word with a number of Pareto's distribution."""
    lines = [line.split() for line in source.splitlines()]
    rng = np.random.default_rng(1)
    while True:
        numbers = (rng.pareto(0.5, len(lines)) * 100 % 1e12).astype(np.int64).tolist()
        chosen = (rng.random(len(lines)) < 0.06).tolist()
        places = rng.random(len(lines)).tolist()
        for i in rng.permutation(len(lines)).tolist():
            words = lines[i]
            if chosen[i] and words:
                place = int(places[i] * len(words))
                words = [*words[:place], words[place] + b"%x" % numbers[i], *words[place + 1 :]]
            yield b" ".join(words) + b"\n"


def _zipf(types: int) -> Iterator[bytes]:
    """Lines of twelve random words, the r-th of frequency 1 / (r + 2.7)."""
    rng = np.random.default_rng(2)
    letters = rng.integers(ord("a"), ord("z") + 1, 12 * types, np.uint8).tobytes()
    lengths = rng.integers(3, 13, types).tolist()
    words = [letters[12 * i : 12 * i + length] for i, length in enumerate(lengths)]
    shares = np.cumsum(1.0 / (np.arange(types) + 2.7))
    # Each word once at least.
    order = iter(rng.permutation(types).tolist())
    while True:
        ranks = np.searchsorted(shares, rng.random(120_000) * shares[-1]).tolist()
        for i in range(0, len(ranks), 12):
            line = [words[min(rank, types - 1)] for rank in ranks[i : i + 9]]
            line += [words[rank] for rank, _ in zip(order, range(3), strict=False)]
            yield b" ".join(line) + b"\n"


def _lines(text: str, size: int) -> Iterator[bytes]:
    source = _source(text)
    if text == "english" and source is not None:
        yield from _english(source.read_bytes())
    if text in ("english", "zipf") or source is None:
        yield from _zipf(5_000 if text == "english" else max(size // 40, 100))
    assert source is not None
    while True:
        yield from source.read_bytes().splitlines(keepends=True)


@lru_cache(16)
def _file(text: str, size: int) -> Path:
    """A text of about `size` bytes that ends with a line; made where it is not there yet."""
    folder = Path(tempfile.gettempdir()) / f"fastops-bench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():  # no link of somebody else's either
        raise PermissionError(f"{folder} belongs to somebody else")
    origin = "" if (source := _source(text)) is None else f"{source}{source.stat().st_mtime_ns}"
    name = hashlib.sha256(f"{_VERSION} {text} {size} {origin}".encode()).hexdigest()[:16]
    path = folder / f"{text}-{size}-{name}.txt"
    if not path.is_file():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            left = size
            for line in _lines(text, size):
                file.write(line)
                left -= len(line)
                if left <= 0:
                    break
        os.replace(file.name, path)
    return path


def _begin(path: Path, size: int) -> Path:
    """A file of the first `size` bytes, up to a line's end."""
    if path.stat().st_size <= size:
        return path
    part = path.with_suffix(f".{size}.txt")
    if not part.is_file():
        with path.open("rb") as file:
            data = file.read(size) + file.readline()
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file_:
            file_.write(data)
        os.replace(file_.name, part)
    return part


# --- recipes -------------------------------------------------------------------------------------------------------------------


def _summary(counts: dict[bytes, int]) -> Summary:
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_TOP]
    return len(counts), sum(counts.values()), top


def _counter(path: Path) -> dict[bytes, int]:
    """The plain loop that everybody writes; bytes.split() and bytes.lower() know ASCII alone."""
    counts: Counter[bytes] = Counter()
    with path.open("rb") as file:
        for line in file:
            counts.update(line.lower().split())
    return counts


def _by_line(path: Path, split: Callable[[str], list[str]], lower: bool) -> dict[str, int]:
    counts: Counter[str] = Counter()
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            counts.update(split((line.lower() if lower else line).removesuffix("\n").removesuffix("\r")))
    return counts


@lru_cache(1)
def _countwords() -> Any:
    """The C program as a library, compiled for this machine."""
    source = _peer_source()
    assert source is not None
    name = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    library = _file("english", 1000).parent / f"countwords-{name}.so"
    if not library.is_file():
        with tempfile.NamedTemporaryFile(dir=library.parent, delete=False) as file:
            pass
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, "-o", file.name, str(source)], check=True, timeout=60)
        os.replace(file.name, library)
    return ctypes.CDLL(str(library))


def _c(path: Path) -> tuple[int, int]:
    types, tokens = ctypes.c_uint64(), ctypes.c_uint64()
    if _countwords().countwords(os.fsencode(path), ctypes.byref(types), ctypes.byref(tokens)):
        raise OSError(f"countwords cannot count {path}")
    return types.value, tokens.value


def _polars(path: Path) -> Any:
    import polars as pl

    lines = pl.scan_csv(path, has_header=False, new_columns=["line"], separator="\x01", quote_char=None)
    words = lines.select(pl.col("line").str.to_lowercase().str.split(" ").explode())
    return words.filter(pl.col("line") != "").group_by("line").len().collect(engine="streaming")


def _duckdb(path: Path, threads: int) -> Any:
    import duckdb

    connection = duckdb.connect(config={"threads": threads})
    read = f"read_csv('{path}', header=false, columns={{'line': 'VARCHAR'}}, delim='\x01', quote='', escape='')"
    words = f"SELECT unnest(string_split(lower(line), ' ')) AS word FROM {read}"
    return connection.sql(f"SELECT word, count(*) FROM ({words}) WHERE word <> '' GROUP BY word").fetchnumpy()


def _sklearn(path: Path) -> tuple[list[str], Any]:
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(token_pattern=r"\S+")
    with path.open(encoding="utf-8") as file:
        matrix = vectorizer.fit_transform(file)
    return list(vectorizer.get_feature_names_out()), np.asarray(matrix.sum(axis=0)).ravel()


def _ours(path: Path, kind: _Kind, row: Implementation) -> Any:
    """`count_files` where this process runs the row's backend, else the backend's own counter."""
    import fastops
    from fastops import _backend
    from fastops._rule import Rule

    lowercase = "ascii" if kind.lower else None
    if row.backend == _backend.name:
        return partial(fastops.count_files, path, tokenizer=kind.tokenizer, lowercase=lowercase, workers=row.threads)
    zh = None
    if kind.tokenizer == "zh":
        from fastops._zh import default_tokenizer

        zh = default_tokenizer()
    rule = Rule(kind.tokenizer, lowercase, zh=zh)

    def count() -> Any:
        counter = _backend.load(row.backend).word_counter(rule)
        with path.open("rb") as file:
            counter.file(file.fileno(), 0, path.stat().st_size)
        return counter.finish()

    return count


def _encoded(counts: dict[str, int]) -> dict[bytes, int]:
    return {word.encode("utf-8", "surrogateescape"): count for word, count in counts.items()}


def _of_table(result: Any) -> Summary:
    """The summary of a `WordCounts` or of a backend's table."""
    if hasattr(result, "top"):
        blob, offsets, counts, _ = result.top(_TOP)
        words = [bytes(blob[a:b]) for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)]
        return len(result), result.total(), list(zip(words, counts.tolist(), strict=True))
    return len(result), result.total(), [(w.encode("utf-8", "surrogateescape"), n) for w, n in result.most_common(_TOP)]


# --- tasks ---------------------------------------------------------------------------------------------------------------------


@lru_cache(1)
def _jieba_cut() -> Callable[[str], list[str]]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jieba
    jieba.setLogLevel(60)
    return jieba.lcut  # type: ignore[no-any-return]


def _oracle(path: Path, kind: _Kind) -> Summary:
    """What counting gives, by Python's own means and the plain rules; kept beside the text."""
    kept = path.with_suffix(f".{kind.tokenizer}{'.lower' * kind.lower}.json")
    if kept.is_file():
        types, total, top = json.loads(kept.read_text(encoding="utf-8"))
        return types, total, [(word.encode(), count) for word, count in top]
    if kind.tokenizer == "whitespace":
        found = _summary(_counter(path))
    elif kind.tokenizer == "word":
        found = _summary(_encoded(_by_line(path, re.compile(r"\w+").findall, kind.lower)))
    elif kind.tokenizer == "unicode":
        from fastops.reference import _breaks

        found = _summary(_encoded(_by_line(path, _breaks.words, kind.lower)))
    else:
        found = _summary(_encoded(_by_line(path, _jieba_cut(), kind.lower)))
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump([found[0], found[1], [(word.decode(), count) for word, count in found[2]]], file)
    os.replace(file.name, kept)
    return found


# The oracle of slow rules looks at the begin of the text alone.
_CHECKED = {"unicode": 1_000_000, "zh": 400_000}


def prepare(case: Case, row: Implementation) -> Task:
    """The text and the call of one row."""
    kind = _kind(case)
    whole = _file(kind.text, case.shape[0])
    path = _begin(whole, _PART.get(row.name, case.shape[0]))
    call = _call(kind, row, path)

    def check() -> float:
        small = _begin(path, _CHECKED.get(kind.tokenizer, case.shape[0]))
        result = (_call(kind, row, small) if small != path else call)()
        want = _oracle(small, kind)
        got = _result(row, result)
        if got[:2] != want[:2] or (len(got) > 2 and got[2] != want[2]):
            raise WrongResult(f"{got[0]:,} words of {got[1]:,} tokens, wanted {want[0]:,} of {want[1]:,}")
        return 0.0

    size, all_ = path.stat().st_size, whole.stat().st_size
    note = f"timed on {size:,} of {all_:,} bytes" if size < all_ else ""
    return Task(call, (), float(size), float(all_), check, note, memory=row.recipe == "fastops")


def _call(kind: _Kind, row: Implementation, path: Path) -> Callable[[], Any]:
    if row.recipe == "counter":
        return partial(_counter, path)
    if row.recipe == "findall":
        return partial(_by_line, path, re.compile(r"\w+").findall, kind.lower)
    if row.recipe == "jieba":
        return partial(_by_line, path, _jieba_cut(), kind.lower)
    if row.recipe == "rjieba":
        import rjieba

        return partial(_by_line, path, rjieba.cut, kind.lower)
    if row.recipe == "countwords":
        _countwords()
        return partial(_c, path)
    if row.recipe == "polars":
        return partial(_polars, path)
    if row.recipe == "duckdb":
        return partial(_duckdb, path, row.threads)
    if row.recipe == "sklearn":
        return partial(_sklearn, path)
    call: Callable[[], Any] = _ours(path, kind, row)
    return call


def _result(row: Implementation, result: Any) -> Any:
    if row.recipe == "countwords":
        return result
    if row.recipe == "polars":
        return result.height, int(result["len"].sum())
    if row.recipe == "duckdb":
        _, counts = result.values()
        return len(counts), int(counts.sum())
    if row.recipe == "sklearn":
        return _summary(_encoded(dict(zip(result[0], result[1].tolist(), strict=True))))
    if row.recipe == "fastops":
        return _of_table(result)
    return _summary(result if row.recipe == "counter" else _encoded(result))
