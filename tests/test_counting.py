# SPDX-License-Identifier: BSD-3-Clause
"""The driver of word counting: the same table whatever the workers, the kind of the input and how it is cut."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import itertools
import json
import lzma
import os
import random
import subprocess
import sys
import threading
import time
import unicodedata
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parallel import Shorten, fails, same, shout, split_words

import fastops
from fastops import _counting, _sources
from fastops._counting import Options, count_sources, count_texts
from fastops._rule import DecodeError, Rule, TokenTooLong
from fastops.reference import wordcount as plain

WORDS = [
    "the",
    "The",
    "of",
    "Straße",
    "ΣΑΣ",
    "e\u0301",
    "é",
    "ﬁ",
    "Ａ",
    "字",
    "क़",
    "가",
    "ᄀ",
    "ᅡ",
    "ᆨ",
    "x" * 40,
    "\u2028",
    "\x1c",
]


def text_of(seed: int, lines: int) -> bytes:
    rng = random.Random(seed)
    out = []
    for _ in range(lines):
        line = " ".join(rng.choices(WORDS, k=rng.randrange(12))).encode()
        if rng.random() < 0.05:
            line += rng.choice([b"\xff", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\x00"]) + b" z"
        out.append(line + rng.choice([b"\n", b"\n", b"\r\n", b"\r\r\n"]))
    return b"".join(out) + b"the last"


RULES = [
    Rule(),
    Rule("word", "unicode", ngrams=(1, 2), doc_freq=True),
    Rule("char", "casefold", "NFKC"),
    Rule("whitespace", "ascii", "NFC", errors="ignore", lines=False),
    Rule("word", ngrams=(2, 3), lines=False, doc_freq=True, errors="surrogateescape"),
    Rule("word", stop_words=frozenset([b"the"]), errors="surrogateescape", normalize="NFC"),
]


def entries(table: Any) -> tuple[dict[bytes, tuple[int, int]], int, int]:
    blob, offsets, _, _ = table.top()
    bounds = [int(x) for x in offsets]
    keys = [bytes(blob)[a:b] for a, b in itertools.pairwise(bounds)]
    return {key: table.get(key) for key in keys}, table.documents, table.error_bound


def wanted(rule: Rule, texts: list[bytes], tokenizer: Any = None) -> Any:
    counter = plain.Counter(rule)
    for text in texts:
        if tokenizer is None:
            counter.documents([text])
        else:
            for batch in _counting.str_documents("x", (text,), rule):
                for document in batch:
                    counter.tokens(list(tokenizer(document)))
    return entries(counter.finish())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts where they show: slices and spans of some hundred bytes."""
    monkeypatch.setattr(_counting, "_LARGE", 1000)
    monkeypatch.setattr(_counting, "_SLICE", 300)
    monkeypatch.setattr(_counting, "_PYTHON_SLICE", 300)
    monkeypatch.setattr(_counting, "PIECE", 300)
    monkeypatch.setattr(_sources, "PIECE", 300)
    monkeypatch.setattr(_sources, "_READ", 200)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    packers = [bytes, gzip.compress, bz2.compress, lzma.compress, bytes]
    paths = []
    for i, pack in enumerate(packers):
        path = tmp_path / f"file{i}"
        path.write_bytes(pack(text_of(i, 60)))
        paths.append(path)
    (tmp_path / "file5").write_bytes(b"\xef\xbb\xbfbom the\n\xef\xbb\xbfbom")
    (tmp_path / "file6").write_bytes(b"")
    return [*paths, tmp_path / "file5", tmp_path / "file6"]


def plain_texts(files: list[Path]) -> list[bytes]:
    return [text_of(i, 60) for i in range(5)] + [path.read_bytes() for path in files[5:]]


@pytest.mark.usefixtures("over_backend", "small")
@pytest.mark.parametrize("workers", [1, 2, 5, 16])
@pytest.mark.parametrize("rule", RULES)
def test_files_give_one_table_whatever_the_workers(rule: Rule, workers: int, files: list[Path]) -> None:
    want = wanted(rule, plain_texts(files))
    for more in ({}, {"on_error": "skip"}, {"memory_limit": 2**20}):
        table, skipped = count_sources(files, rule, None, Options(workers=workers, **more))
        assert entries(table) == want
        assert skipped == []


@pytest.mark.usefixtures("over_backend", "small")
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_texts_give_one_table_whatever_the_workers(rule: Rule, workers: int) -> None:
    texts = [text_of(i, 7) for i in range(40)]
    strings = [text.decode("utf-8", "surrogateescape") for text in texts]
    for more in ({}, {"on_error": "skip"}, {"memory_limit": 2**20}):
        options = Options(workers=workers, **more)
        assert entries(count_texts(iter(texts), rule, None, options)[0]) == wanted(rule, texts)
        assert entries(count_texts(strings, rule, None, options)[0]) == wanted(rule, texts)
        one = text_of(9, 300)
        for form in (one, one.decode("utf-8", "surrogateescape"), bytearray(one), memoryview(one)):
            assert entries(count_texts(form, rule, None, options)[0]) == wanted(rule, [one])
    assert entries(count_texts([], rule, None, options)[0]) == wanted(rule, [])
    assert entries(count_texts("", rule, None, options)[0]) == wanted(rule, [b""])


@pytest.mark.usefixtures("over_backend")
def test_arrow_texts() -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    texts = [text_of(i, 3).decode("utf-8", "replace") for i in range(50)]
    want = wanted(RULES[1], [text.encode() for text in texts])
    for array in (pa.array(texts), pa.array(texts, pa.large_string()), pa.chunked_array([texts[:9], texts[9:]])):
        for workers in (1, 2):
            assert entries(count_texts(array, RULES[1], None, Options(workers=workers))[0]) == want


@pytest.mark.parametrize("mark", ["\ufeff", "\udcff\udcfe", "\0"])
def test_lines_that_begin_like_a_mark_are_no_beginnings(
    mark: str, small: None, backend: ModuleType, over_backend: None
) -> None:
    text = f"first\n{mark}word\n" * 100
    data = text.encode("utf-8", "surrogateescape")
    for form in (text, data):
        assert entries(count_texts(form, Rule(), None, Options(workers=2))[0]) == wanted(Rule(), [data])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("rule", [RULES[0], RULES[1], RULES[4], replace(RULES[2], tokenizer="whitespace")])
@pytest.mark.parametrize("tokenizer", [split_words, shout])
def test_python_tokenizers(tokenizer: Any, rule: Rule, workers: int, files: list[Path], monkeypatch: Any) -> None:
    monkeypatch.setattr(_counting, "PIECE", 300)
    want = wanted(rule, plain_texts(files), tokenizer)
    for more in ({}, {"on_error": "skip"}):
        options = Options(workers=workers, **more)
        assert entries(count_sources(files, rule, tokenizer, options)[0]) == want
        assert entries(count_texts(iter(plain_texts(files)), rule, tokenizer, options)[0]) == want
    objects = [io.BytesIO(path.read_bytes()) for path in files]
    assert entries(count_sources(objects, rule, tokenizer, options)[0]) == want
    assert entries(count_sources(files[0], rule, tokenizer, options)[0]) == wanted(
        rule, plain_texts(files)[:1], tokenizer
    )


@pytest.mark.usefixtures("over_backend")
@pytest.mark.parametrize("tokenizer", [None, split_words])
@pytest.mark.parametrize("lines", [True, False])
def test_records(lines: bool, tokenizer: Any, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    rule = Rule(lines=lines, doc_freq=True, ngrams=(1, 2))
    texts = [text_of(i, 4).decode("utf-8", "replace") for i in range(30)] + ["", None]
    want = wanted(rule, [(text or "").encode() for text in texts], tokenizer)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps({"body": text}).encode() + b"\n" for text in texts)))
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": texts}), table, row_group_size=7)
    for workers in (1, 2):
        options = Options(workers=workers)
        assert entries(count_sources(path, rule, tokenizer, options, field="body")[0]) == want
        assert entries(count_sources(table, rule, tokenizer, options, column="body")[0]) == want
    with pytest.raises(ValueError, match="field and column"):
        count_sources(path, rule, tokenizer, options, field="body", column="body")


@pytest.mark.usefixtures("over_backend")
@pytest.mark.parametrize("tokenizer", [None, split_words])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_skipped_file_leaves_nothing(workers: int, tokenizer: Any, files: list[Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(b"never counted\n" * 100_000)[:-3])
    wide = tmp_path / "utf16"
    wide.write_text("never", encoding="utf-16")
    options = Options(workers=workers, on_error="skip")
    table, skipped = count_sources([files[0], cut, *files[1:], wide], RULES[0], tokenizer, options)
    assert entries(table) == wanted(RULES[0], plain_texts(files), tokenizer)
    assert [name for name, _ in skipped] == [str(cut), str(wide)]
    assert "end before the end mark" in skipped[0][1]
    assert "UTF-16" in skipped[1][1]
    with pytest.raises(_sources.DamagedFile, match=r"cut\.gz"):
        count_sources([files[0], cut, *files[1:]], RULES[0], tokenizer, Options(workers=workers))


@pytest.mark.usefixtures("over_backend")
def test_counters_of_failed_inputs_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / str(i) for i in range(20)]
    for path in paths:
        path.write_bytes(b"\xff\n")
    texts = [b"\xff" * 2**20 for _ in range(20)]
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    make = _counting._backend.word_counter

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal most
        counter = make(*args, **options)
        alive.add(counter)
        most = max(most, len(alive))
        return counter

    monkeypatch.setattr(_counting._backend, "word_counter", counted)
    rule, options = Rule(errors="strict"), Options(workers=1, on_error="skip")
    assert len(count_sources(paths, rule, None, options)[1]) == 20
    assert len(count_texts(texts, rule, None, options)[1]) == 20
    assert most < 5


@pytest.mark.usefixtures("over_backend")
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("tokenizer", [None, Shorten])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_becomes_shorter_is_no_result(
    workers: int, tokenizer: Any, skip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"some words\n" * 300_000)
    monkeypatch.setattr(_counting, "_LARGE", 1000)
    slices = _counting._FileJob._slices
    opened: list[Any] = []

    def shorten(job: Any, stream: Any) -> bool:
        found = slices(job, stream)
        opened.append(stream)
        # With several workers it is asked once before: that is another opening of the file.
        if len(opened) == workers:
            os.truncate(path, 11 * 200_000)
        return found

    if tokenizer is None:
        # After it was opened, before it is counted.
        monkeypatch.setattr(_counting._FileJob, "_slices", shorten)
    else:
        tokenizer = Shorten(str(path), 11 * 200_000)
    options = Options(workers=workers, on_error="skip" if skip else "raise")
    if skip:
        table, skipped = count_sources(path, Rule(lines=True), tokenizer, options)
        assert entries(table)[0] == {}
        assert [name for name, _ in skipped] == [str(path)]
        assert "became shorter" in skipped[0][1]
        return
    with pytest.raises(_sources.DamagedFile, match="became shorter while they were read: 2200000 of"):
        count_sources(path, Rule(lines=True), tokenizer, options)


@pytest.mark.usefixtures("over_backend")
@pytest.mark.parametrize("workers", [1, 3])
def test_a_skipped_text_is_named(workers: int) -> None:
    rule = Rule(max_token_bytes=10, errors="strict")
    texts: list[str | bytes] = ["some words"] * 100_000
    texts[70_001] = "a" * 11
    texts[4] = b"\xff"
    table, skipped = count_texts(texts, rule, None, Options(workers=workers, on_error="skip"))
    assert table.get(b"some") == (99_998, 0)
    assert table.documents == 99_998
    assert [name for name, _ in skipped] == ["text 4", "text 70001"]
    with pytest.raises(TokenTooLong, match="text 70001"):
        count_texts(texts[5:70_001] + ["x"] * 5 + texts[70_001:], rule, None, Options(workers=workers))
    with pytest.raises(DecodeError, match="text 4 must be UTF-8"):
        count_texts(texts[:70_000], rule, None, Options(workers=workers))


@pytest.mark.usefixtures("over_backend")
@pytest.mark.parametrize("tokenizer", [None, split_words])
@pytest.mark.parametrize("mark", ["\ufeff", "\ufeff\ufeff"])
@pytest.mark.parametrize("normalize", [None, "NFC"])
def test_a_span_may_begin_with_a_mark(normalize: str | None, mark: str, tokenizer: Any, tmp_path: Path) -> None:
    """Only at byte 0 it is a mark of the encoding; where an engine cuts a file it is a part of the word."""
    data = f"{mark}one é\n{mark}two e\u0301\n{mark}two\n".encode()
    path = tmp_path / "text"
    path.write_bytes(data)
    (source,) = _sources.sources(path)
    rule = Rule(normalize=normalize)
    job = _counting._FileJob(rule, Options(workers=1), None, None, tokenizer)
    want = wanted(rule, [data], tokenizer)
    for cut in range(1, len(data)):
        parts = [(0, source, 0, cut), (0, source, cut, len(data))]
        tables = [_counting.count_parts(job, [part])[0] for part in parts]
        tables[0].merge(tables[1])
        assert entries(tables[0]) == want, cut


@pytest.mark.usefixtures("over_backend")
@pytest.mark.parametrize("workers", [1, 3])
def test_rough_counts_of_files_that_may_fail_are_as_few(workers: int, tmp_path: Path) -> None:
    paths = []
    for i in range(6):
        paths.append(tmp_path / str(i))
        paths[-1].write_bytes(b"".join(b"common %d-%d\n" % (i, j) * (j + 2) for j in range(14)))
    data = [path.read_bytes() for path in paths]
    total = sum(len(text.split()) for text in data)
    for on_error in ("raise", "skip"):
        options = Options(workers=workers, approx=10, on_error=on_error)
        for table, _ in (
            count_sources(paths, Rule(), None, options),
            count_texts(data, Rule(), None, options),
        ):
            assert len(table) <= 10
            assert 0 < table.error_bound <= total // 11
            assert total // 2 - table.error_bound <= table.get(b"common")[0] <= total // 2


def test_what_is_no_text_is_a_type_error() -> None:
    for workers in (1, 2):
        with pytest.raises(TypeError, match=r"texts\[1\] must be str or bytes, got 3"):
            count_texts(["a", 3], Rule(), None, Options(workers=workers))
    with pytest.raises(TypeError, match=r"texts must be a str"):
        count_texts(3, Rule(), None, Options())


def columns_of(texts: list[str | None]) -> Iterator[tuple[str, Any]]:
    """The same texts as columns of every library that is there."""
    if importlib.util.find_spec("pyarrow"):
        import pyarrow as pa

        for kind in (pa.string(), pa.large_string(), pa.string_view()):
            yield f"arrow {kind}", pa.array(texts, kind)
            yield (
                f"arrow dictionary of {kind}",
                pa.DictionaryArray.from_arrays(
                    pa.array([None if text is None else i for i, text in enumerate(texts)], pa.uint32()),
                    pa.array([text or "" for text in texts], kind),
                ),
            )
        yield "arrow, chunked", pa.chunked_array([texts[:2], texts[2:]], pa.string())
    if importlib.util.find_spec("pandas"):
        import pandas as pd

        for kind in ("object", "string", "category"):
            yield f"pandas {kind}", pd.Series(texts, dtype=kind)
            yield f"pandas {kind}, NaN", pd.Series([float("nan") if t is None else t for t in texts], dtype=kind)
            yield f"pandas {kind}, NA", pd.Series([pd.NA if t is None else t for t in texts], dtype=kind)
        yield "pandas, index", pd.Index(texts)
        yield "pandas, array", pd.array(texts, dtype="string")
        yield "pandas, named columns", pd.Series(texts, index=["columns", *range(1, len(texts))])
    if importlib.util.find_spec("polars"):
        import polars as pl

        for kind in (pl.String, pl.Categorical, pl.Enum(sorted({text for text in texts if text is not None}))):
            yield f"polars {kind}", pl.Series("x", texts, dtype=kind)


@pytest.mark.usefixtures("over_backend")
def test_missing_values_are_documents_without_words() -> None:
    texts = ["nan a", None, "", "a b\nb", None, "a b\nb"]
    found = list(columns_of(texts))
    if not found:
        pytest.skip("none of pyarrow, pandas and polars is installed")
    want = fastops.count_words([text or "" for text in texts], doc_freq=True)
    ids = [row.tolist() for row in want.encode([text or "" for text in texts])]
    assert (want.documents, want["nan"]) == (6, 1)
    for name, column in found:
        for workers in (1, 2):
            got = fastops.count_words(column, doc_freq=True, workers=workers)
            assert got == want, name
            assert dict(got.doc_freq) == dict(want.doc_freq), name
            assert got.documents == 6, name
        assert [row.tolist() for row in got.encode(column)] == ids, name
        assert fastops.count_words(column, tokenizer=split_words, workers=1) == want, name


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_values_of_a_list_are_named(missing: Any) -> None:
    with pytest.raises(TypeError, match=r"texts\[1\] must be str or bytes, got (None|nan)"):
        fastops.count_words(["a", missing])
    with pytest.raises(TypeError, match=r"texts\[1\] must be a str or bytes, got (None|nan)"):
        fastops.count_words("a").encode(["a", missing])


def test_columns_of_no_text_are_a_type_error() -> None:
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    with pytest.raises(TypeError, match=r"texts\[0\] must be str or bytes"):
        fastops.count_words(pd.Series([1.5, 2.5]))
    for what in (pd.DataFrame({"a": ["x"]}),):
        with pytest.raises(TypeError, match="texts must be"):
            fastops.count_words(what)
        with pytest.raises(TypeError, match="texts must be"):
            fastops.count_words("x").encode(what)


def test_an_error_of_the_iterable_is_raised() -> None:
    def texts() -> Iterator[str]:
        for _ in range(50):
            yield "a " * 100_000
        raise LookupError("the source is dry")

    before = threading.active_count()
    for workers in (1, 2):
        with pytest.raises(LookupError, match="dry"):
            count_texts(texts(), Rule(), None, Options(workers=workers))
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("tokenizer", [None, split_words])
def test_timeout(workers: int, tokenizer: Any, tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        while True:
            yield "some words and more words " * 100

    before = threading.active_count()
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"timeout=0\.5 s"):
        count_texts(texts(), Rule(), tokenizer, Options(workers=workers, timeout=0.5))
    path = tmp_path / "large"
    path.write_bytes(b"some words and more words\n" * 1_000_000)
    if tokenizer is None or workers > 1:
        with pytest.raises(TimeoutError, match=r"timeout=0\.01 s"):
            count_sources(path, Rule("word", ngrams=(1, 3)), tokenizer, Options(workers=workers, timeout=0.01))
    assert time.monotonic() - start < 30
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("tokenizer", [None, split_words])
def test_progress_is_told(workers: int, tokenizer: Any, tmp_path: Path) -> None:
    paths = []
    for i in range(5):
        path = tmp_path / f"{i}.gz"
        path.write_bytes(gzip.compress(text_of(i, 3000)))
        paths.append(path)
    total = sum(path.stat().st_size for path in paths)
    told: list[tuple[int, int | None]] = []
    count_sources(paths, Rule(), tokenizer, Options(workers=workers, progress=lambda *numbers: told.append(numbers)))
    assert told[-1] == (total, total)
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(told))
    told.clear()
    count_texts(
        ["a b"] * 10, Rule(), tokenizer, Options(workers=workers, progress=lambda *numbers: told.append(numbers))
    )
    assert told[-1] == (30, None)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("tokenizer", [None, split_words])
def test_a_slow_iterable_is_left_at_the_timeout(workers: int, tokenizer: Any) -> None:
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        while read < 200:
            read += 1
            time.sleep(0.05)
            yield "a b"

    with pytest.raises(TimeoutError, match=r"timeout=0\.3 s"):
        count_texts(texts(), Rule(), tokenizer, Options(workers=workers, timeout=0.3))
    assert read < 100


def told_by(count: Any, *arguments: Any, workers: int = 2, **options: Any) -> list[tuple[int, int | None]]:
    told: list[tuple[int, int | None]] = []
    count(*arguments, Options(workers=workers, progress=lambda *numbers: told.append(numbers), **options))
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(told))
    return told


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("tokenizer", [None, split_words])
def test_progress_of_several_large_files_adds_up(workers: int, tokenizer: Any, tmp_path: Path, small: None) -> None:
    paths = []
    for i, pack in enumerate((bytes, gzip.compress, bytes, lzma.compress, bytes)):
        paths.append(tmp_path / str(i))
        paths[-1].write_bytes(pack(text_of(i, 200 + 100 * i)))
    total = sum(path.stat().st_size for path in paths)
    assert told_by(count_sources, paths, Rule(), tokenizer, workers=workers)[-1] == (total, total)
    # A damaged file is done with, too.
    paths[1].write_bytes(paths[1].read_bytes()[:-3])
    told = told_by(count_sources, paths, Rule(), tokenizer, workers=workers, on_error="skip")
    assert told[-1] == (total - 3, total - 3)


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_knows_all_bytes_or_says_that_it_does_not(workers: int, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"some words\n")
    assert told_by(count_sources, [path, io.BytesIO(b"a b\n")], Rule(), None, workers=workers)[-1] == (15, None)
    near, far = os.pipe()
    os.write(far, b"a b c\n")
    os.close(far)
    with open(near, "rb") as pipe:
        assert told_by(count_sources, pipe, Rule(), None, workers=workers)[-1] == (6, None)
    for text, size in (("äöü " * 700_000, 7 * 700_000), (b"a b" * 5, 15), ("a b", 3)):
        assert told_by(count_texts, text, Rule(), None, workers=workers)[-1] == (size, size)
    # What is left out is done with.
    texts = ["a" * 20, "b", "c" * 20] * 3
    told = told_by(count_texts, texts, Rule(max_token_bytes=10), None, workers=workers, on_error="skip")
    assert told[-1] == (3 * 41, None)
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    for array in (pa.array(["é", None, "abc"]), pa.array(["é", None, "abc"])[1:], pa.nulls(3, pa.string())):
        done, size = told_by(count_texts, array, Rule(), None, workers=workers)[-1]
        assert done == size == sum(len((text or "").encode()) for text in array.to_pylist())


def test_an_error_of_the_progress_function_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"some words and more words\n" * 300_000)

    def progress(done: int, total: int | None) -> None:
        raise LookupError("no")

    with pytest.raises(LookupError):
        count_sources([path] * 3, Rule(), None, Options(workers=2, progress=progress))


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_a_python_tokenizer(workers: int, files: list[Path]) -> None:
    options = Options(workers=workers)
    with pytest.raises(LookupError, match="no words") as caught:
        count_sources(files, Rule(), fails, options)
    notes = "\n".join(caught.value.__notes__)
    assert "file" in notes
    assert "document 1" in notes
    if workers == 2:
        assert "in fails" in str(caught.value.__cause__)
    with pytest.raises(TypeError, match="tokenizer must be a callable that returns an iterable of str, got 'one text'"):
        count_texts(["one text"], Rule(), same, options)
    if workers == 2:
        with pytest.raises(TypeError, match="tokenizer must be picklable"):
            count_texts(["one text"], Rule(), lambda text: [text], options)


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
@given(
    st.lists(st.text(alphabet="aé e\u0301\u0327\u0338=ﬁＡ가각क़\u093c\u09c7\u09be\uff76\uff9eか\u3099\n\r", max_size=6)),
    st.integers(1, 5),
)
def test_normalizing_in_blocks_is_normalizing_the_whole(form: str, parts: list[str], size: int) -> None:
    data = "".join(parts).encode()
    blocks = [data[at : at + size] for at in range(0, len(data), size)]
    rule = Rule(normalize=form)
    got = b"".join(_counting.normalized("x", blocks, rule))
    assert got.decode() == unicodedata.normalize(form, data.decode())  # type: ignore[arg-type]


@given(st.lists(st.binary(max_size=5)), st.sampled_from(["replace", "ignore", "surrogateescape"]))
def test_normalizing_decodes_in_blocks_as_in_one(blocks: list[bytes], errors: str) -> None:
    data = b"".join(blocks)
    if data.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        return
    want = unicodedata.normalize("NFC", data.decode("utf-8", errors)).encode("utf-8", "surrogateescape")
    assert b"".join(_counting.normalized("x", blocks, Rule(normalize="NFC", errors=errors))) == want


def test_normalizing_holds_little() -> None:
    for letter in ("a", "字", "가", "é"):
        block = letter.encode() * 100_000
        pieces = list(_counting.normalized("x", [block] * 20, Rule(normalize="NFC")))
        assert max(map(len, pieces)) <= 2 * len(block)
    with pytest.raises(TokenTooLong, match="x must have no run of"):
        list(_counting.normalized("x", ["\u0301".encode() * 100_000] * 20, Rule(normalize="NFC")))


@given(st.text(alphabet="ab\n\r", max_size=30), st.lists(st.integers(0, 30), max_size=4))
def test_spans_hold_each_line_once(text: str, cuts: list[int]) -> None:
    data = text.encode()
    bounds = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    fd = os.memfd_create("test")
    try:
        os.write(fd, data)
        spans = [b"".join(_counting.span_blocks(fd, a, b)) for a, b in itertools.pairwise(bounds)]
    finally:
        os.close(fd)
    assert b"".join(spans) == data
    assert all(span.endswith(b"\n") or not span for span in spans[:-1] if span and not data.endswith(span))


def test_a_tokenizer_gets_whole_documents_and_a_text_is_skipped_whole() -> None:
    text = "some words\n" * 300_000
    seen: list[int] = []

    def tokenizer(document: str) -> list[str]:
        seen.append(len(document))
        return document.split()

    count_texts(text, Rule(lines=False), tokenizer, Options(workers=1))
    assert seen == [len(text)]
    for workers in (1, 2):
        options = Options(workers=workers, on_error="skip")
        table, skipped = count_texts(text + "a" * 11, Rule(lines=False, max_token_bytes=10), None, options)
        assert len(table) == 0
        assert [name for name, _ in skipped] == ["text 0"]
        with pytest.raises(TokenTooLong, match=r"text 0, from \d+ on, must have no token"):
            count_texts(text + "a" * 11, Rule(max_token_bytes=10), None, Options(workers=workers))


def test_what_is_skipped_by_workers_is_named(tmp_path: Path) -> None:
    good, gone = tmp_path / "good", tmp_path / "gone"
    good.write_bytes(b"some words\n")
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(b"words")[:5])
    gone.symlink_to(tmp_path / "nowhere")
    options = Options(workers=2, on_error="skip")
    table, skipped = count_sources([good, cut, gone, good], Rule(), split_words, options)
    assert table.get(b"some") == (2, 0)
    assert [name for name, _ in skipped] == [str(cut), str(gone)]


def test_texts_have_a_largest_size() -> None:
    assert count_texts(["a" * 50] * 4, Rule(), None, Options(max_output_bytes=200))[0].get(b"a" * 50) == (4, 0)
    with pytest.raises(ValueError, match=r"texts must have at most 199 bytes \(max_output_bytes\), got more"):
        count_texts(["a" * 50] * 4, Rule(), None, Options(max_output_bytes=199))


PEAK = """
import re, sys
import fastops
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) >> 10
fastops.count_files(sys.argv[1], workers=1)
before = peak()
assert len(fastops.count_files(sys.argv[2], workers=1)) == 1_400_000
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc with a process's peak of memory")
def test_a_table_that_grows_takes_no_more_memory_than_it_has_then(tmp_path: Path) -> None:
    # 128 MiB of slots, made out of 64 MiB of them.
    pytest.importorskip("fastops._core", reason="this build has no native backend")
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_text("\n".join(f"{i:x}" for i in range(1_400_000)))
    small.write_text("a")
    environment = {**os.environ, "FASTOPS_BACKEND": "native"}
    command = [sys.executable, "-P", "-c", PEAK, small, large]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 64 < int(done.stdout) < 160
