# SPDX-License-Identifier: BSD-3-Clause
"""The driver of word counting: hands texts and files to counters, in threads or worker processes, and merges their tables.

The result does not depend on the number of workers: every document is counted once, wherever, and tables add up.
"""

from __future__ import annotations

import codecs
import os
import pickle
import sys
import threading
import time
import unicodedata
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

from . import _backend as _backends
from . import _sources
from ._backend import backend as _backend
from ._counts import check_texts, column_of
from ._rule import UTF8_BOM, Rule, TokenTooLong, check_bom, not_utf8
from ._sources import PIECE, Source, Stopped, Stream, encoded
from ._validate import default_workers, wrong_type
from .reference.wordcount import documents_of, transform

if TYPE_CHECKING:
    from . import _workers

Tokenizer = Callable[[str], Iterable[str]]
# A counter and a table of any backend.
Counter = Any
Table = Any

# Plain files from here on are counted by several native threads each, a slice at a time.
_LARGE = 2**25
# Bytes of a slice for each native thread: about 20 ms, after which Ctrl-C and the clock are heard.
_SLICE = 2**24
_PYTHON_SLICE = 2**20
_TICK = 0.05
# How errors of temporary files begin their name.
SPILLED = "a temporary file in "


@dataclass(frozen=True)
class Options:
    """How to count, as against what: nothing here changes a result."""

    workers: int | None = None
    memory_limit: int | None = None
    approx: int | None = None
    max_output_bytes: int | None = None
    on_error: str = "raise"
    timeout: float | None = None
    progress: bool | Callable[[int, int | None], object] = False

    @property
    def count(self) -> int:
        """The number of workers."""
        return self.workers if self.workers is not None else default_workers()

    @property
    def skip(self) -> bool:
        """Whether a failed file is reported instead of raised."""
        return self.on_error == "skip"

    @property
    def one_counter(self) -> bool:
        """Whether a single counter must see everything: it alone knows its memory, and an approximation its order."""
        return self.memory_limit is not None or self.approx is not None


Skipped = list[tuple[str, str]]


def _may_skip(problem: BaseException) -> bool:
    """Whether an error is one of its input: a full disk is not."""
    if isinstance(problem, OSError):
        return not isinstance(problem, TimeoutError) and not str(problem.filename).startswith(SPILLED)
    return isinstance(problem, ValueError)


class _Run:
    """What the threads of one call share: the stop flag, the clock, the bytes done, what was skipped."""

    def __init__(self, options: Options, total: int | None) -> None:
        self.stop = threading.Event()
        self.options = options
        self.deadline = None if options.timeout is None else time.monotonic() + options.timeout
        self.done = 0
        self.completed = 0
        self.skipped: list[tuple[int, str, str]] = []
        # Weakly: a counter whose input failed goes with all that it holds.
        self._counters: weakref.WeakSet[Counter] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._total = total
        self._next = 0.0
        self._report = options.progress if callable(options.progress) else None
        self._bar: Any = None
        if options.progress is True and sys.stderr is not None and sys.stderr.isatty() and _backends.installed("tqdm"):
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, leave=False, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.end()
        if kind is None and self._report is not None:
            self._report(self.done, self._total)
        if self._bar is not None:
            self._bar.update(self.done - self._bar.n)
            self._bar.close()

    @property
    def timed(self) -> bool:
        """Whether somebody waits for the clock or the progress."""
        return self.deadline is not None or self._report is not None or self._bar is not None

    def add(self, count: int) -> None:
        """Counts bytes as done."""
        with self._lock:
            self.done += count

    def complete(self) -> None:
        """Counts a file as done."""
        with self._lock:
            self.completed += 1

    def skip(self, order: int, name: str, problem: BaseException) -> None:
        """Takes a failed file into the report."""
        with self._lock:
            self.skipped.append((order, name, str(problem)))

    def report(self) -> Skipped:
        """The failed files in the order of the input."""
        return [(name, text) for _, name, text in sorted(self.skipped)]

    def watch(self, counter: Counter) -> Counter:
        """A counter that is to stop with the run."""
        with self._lock:
            self._counters.add(counter)
        return counter

    def end(self) -> None:
        """Stops what the threads do, within moments."""
        self.stop.set()
        with self._lock:
            for counter in self._counters:
                # Those in Python look at the flag between their pieces.
                if hasattr(counter, "stop"):
                    counter.stop()
            self._counters.clear()

    def stopped(self) -> bool:
        """`check` for whoever asks whether to stop, in the main thread."""
        self.check()
        return self.stop.is_set()

    def check(self) -> None:
        """The clock and the progress; called by the main thread often."""
        now = time.monotonic()
        if self.deadline is not None and now >= self.deadline:
            raise TimeoutError(f"counting took longer than timeout={self.options.timeout:g} s")
        if now < self._next:
            return
        self._next = now + 0.1
        if self._report is not None:
            self._report(self.done, self._total)
        if self._bar is not None:
            self._bar.update(self.done - self._bar.n)


class _Told:
    """What a run was told of a file's bytes: never more than the file has."""

    def __init__(self, run: _Run, source: Source) -> None:
        self._run = run
        self._size = source.size
        self._told = 0

    def __call__(self, consumed: int) -> None:
        now = min(consumed, self._size or consumed)
        if now > self._told:
            self._run.add(now - self._told)
            self._told = now


def _in_threads(run: _Run, works: list[Callable[[], Table]], produce: Callable[[], None] | None = None) -> list[Table]:
    """Runs every piece of work in a thread, and `produce` in this one, which goes on hearing Ctrl-C and the clock."""
    tables: list[Table] = [None] * len(works)
    errors: list[BaseException] = []
    wake = threading.Event()
    left = len(works)
    lock = threading.Lock()

    def body(i: int) -> None:
        nonlocal left
        try:
            tables[i] = works[i]()
        except Stopped:
            pass
        except BaseException as problem:  # noqa: BLE001 (raised again by the main thread)
            errors.append(problem)
            run.end()
        with lock:
            left -= 1
            if not left or errors:
                wake.set()

    threads = [threading.Thread(target=body, args=(i,), name="fastops-count", daemon=True) for i in range(len(works))]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            try:
                thread.start()
            except RuntimeError:
                # No more threads are to be had: those that run do the work.
                if not started:
                    raise
                with lock:
                    left -= 1
                    if not left:
                        wake.set()
                continue
            started.append(thread)
        if produce is not None:
            with suppress(Stopped):
                produce()
        while not wake.wait(_TICK):
            run.check()
        for thread in started:
            while thread.is_alive():
                thread.join(_TICK)
                run.check()
    except BaseException:
        run.end()
        # Slices are short.
        end = time.monotonic() + 1
        for thread in started:
            while thread.is_alive() and time.monotonic() < end and not _out_of_reach(thread):
                thread.join(0.01)
        raise
    if errors:
        # An error that is in a list of its own frames would keep the counters until the collector runs.
        problem = errors[0]
        errors.clear()
        try:
            raise problem
        finally:
            del problem
    return [table for table in tables if table is not None]


def _out_of_reach(thread: threading.Thread) -> bool:
    """Whether a thread waits inside of somebody's read(): it is left behind, and holds nothing but that."""
    since = _sources.abroad.get(thread.ident or 0)
    return since is not None and time.monotonic() > since + _TICK


def _merged(tables: Iterable[Table], rule: Rule) -> Table:
    """One table of all: the smaller ones into the largest."""
    ordered = sorted(tables, key=len, reverse=True)
    if not ordered:
        return _backend.word_table(docs=rule.doc_freq)
    whole = ordered[0]
    for table in ordered[1:]:
        whole.merge(table)
    return whole


# Normalization.


def _decoded(data: bytes, name: str, offset: int, errors: str) -> str:
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as problem:
        raise not_utf8(name, offset, problem) from None


def normalized(name: str, blocks: Iterable[bytes], rule: Rule, *, start: int = 0) -> Iterator[bytes]:
    """The text in normal form, in blocks; what rule.errors says of invalid bytes is done here, for what comes out is valid.

    A block ends before a character that no character before it can change: mostly before its last ASCII character. `start` is
    where in its file the text begins.
    """
    form = rule.normalize
    assert form is not None
    decoder = codecs.getincrementaldecoder("utf-8")(rule.errors)
    held = ""
    offset = start
    first = not start
    for block in _with_head(blocks, 4):
        if first:
            check_bom(name, block[:4])
            first = False
        pending = len(decoder.getstate()[0])
        if not pending and block.isascii() and len(held) < 2 and held.isascii():
            # One ASCII character waits for what may combine with it.
            yield held.encode() + block[:-1]
            held = chr(block[-1])
            offset += len(block)
            continue
        try:
            text = held + decoder.decode(block)
        except UnicodeDecodeError as problem:
            raise not_utf8(name, offset - pending, problem) from None
        offset += len(block)
        cut = _safe_cut(text, form)
        held = text[cut:]
        if len(held) > max(PIECE, rule.max_token_bytes):
            raise TokenTooLong(
                f"{name} must have no run of {len(held)} combining characters, got one that ends at byte {offset}"
            )
        if cut:
            yield unicodedata.normalize(form, text[:cut]).encode("utf-8", "surrogateescape")  # type: ignore[arg-type]
    pending = len(decoder.getstate()[0])
    try:
        text = held + decoder.decode(b"", final=True)
    except UnicodeDecodeError as problem:
        raise not_utf8(name, offset - pending, problem) from None
    if text:
        yield unicodedata.normalize(form, text).encode("utf-8", "surrogateescape")  # type: ignore[arg-type]


def _with_head(blocks: Iterable[bytes], count: int) -> Iterator[bytes]:
    """The blocks, the first of at least `count` bytes where there are so many."""
    held = b""
    more = iter(blocks)
    for block in more:
        held += block
        if len(held) >= count:
            yield held
            held = b""
            break
    if held:
        yield held
    for block in more:
        if block:
            yield block


def _safe_cut(text: str, form: str) -> int:
    """The last place before which and after which text can be normalized by itself; 0 where none is near the end."""
    for at in range(len(text) - 1, max(0, len(text) - 2**16), -1):
        letter = text[at]
        if letter < "\x80" or _starts(letter, form):
            return at
    return 0


@lru_cache(maxsize=2**12)
def _starts(letter: str, form: str) -> bool:
    """Whether nothing before this character can change with it: it decomposes to a starter that composes with none."""
    head = unicodedata.normalize("NFKD" if form == "NFKC" else "NFD", letter)[0]
    return not unicodedata.combining(head) and head not in _seconds()


@lru_cache(maxsize=1)
def _seconds() -> frozenset[str]:
    """The starters that may compose with a character before them."""
    found = {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}
    for code in range(0xC0, 0x110000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(chr(int(parts[1], 16)))
    return frozenset(found)


def _called(name: str, rule: Rule) -> str:
    """The name of a text in the errors of its counter, whose bytes are those of the normal form."""
    return name if rule.normalize is None else f"{name}, in {rule.normalize},"


def _normal(name: str, text: bytes, rule: Rule) -> bytes:
    """A whole document in normal form."""
    if rule.normalize is None or text.isascii():
        return text
    check_bom(name, text[:4])
    whole = _decoded(text, name, 0, rule.errors)
    return unicodedata.normalize(rule.normalize, whole).encode("utf-8", "surrogateescape")  # type: ignore[arg-type]


# Documents for tokenizers that are Python functions.


def str_documents(name: str, blocks: Iterable[bytes], rule: Rule, *, start: int = 0) -> Iterator[list[str]]:
    """The documents of a text whose first byte is byte `start` of its file, in batches."""
    if not rule.lines:
        blocks = iter((b"".join(blocks),))
        runs = blocks
    else:
        runs = _sources.lines(name, _with_head(blocks, 4))
    offset = start
    for run in runs:
        text = run
        if not offset:
            check_bom(name, run[:4])
            text = run.removeprefix(UTF8_BOM)
        whole = transform(_decoded(text, name, offset + len(run) - len(text), rule.errors), rule)
        offset += len(run)
        yield documents_of(whole, rule)


class _PythonCounter:
    """A counter that is fed by a Python tokenizer."""

    def __init__(self, counter: Counter, tokenizer: Tokenizer) -> None:
        self.counter = counter
        self._tokenizer = tokenizer

    def count(self, name: str, batches: Iterable[list[str]], stopped: Callable[[], None]) -> None:
        """Counts documents."""
        self.counter.name = name
        number = 0
        for batch in batches:
            for document in batch:
                number += 1
                try:
                    tokens = self._tokenizer(document)
                    if isinstance(tokens, (str, bytes)):
                        raise wrong_type("tokenizer", "a callable that returns an iterable of str", tokens)
                    listed = list(tokens)
                except Exception as problem:
                    problem.add_note(f"in the tokenizer, at document {number} of {name}")
                    raise
                self.counter.tokens(listed)
            stopped()


# Files.


def count_sources(
    files: object,
    rule: Rule,
    tokenizer: Tokenizer | None,
    options: Options,
    field: str | None = None,
    column: str | None = None,
) -> tuple[Table, Skipped]:
    """Counts files; `tokenizer` where there is one takes the place of the rule's. The table and the failed files."""
    if field is not None and column is not None:
        raise ValueError(
            "field and column must not be given together: one is of jsonl files, the other of parquet files"
        )
    found = _sources.sources(files, skip=options.skip)
    total = sum(source.size for source in found) if all(source.sized for source in found) else None
    job = _FileJob(rule, options, field, column, tokenizer)
    with _Run(options, total) as run:
        if job.tokenizer is not None and options.count > 1 and options.approx is None:
            table = _files_in_processes(found, job, run)
        else:
            table = _files_in_threads(found, job, run)
        if job.whole and not rule.lines:
            table.documents = run.completed
        return table, run.report()


@dataclass(frozen=True)
class _FileJob:
    """What is to be done with every file."""

    rule: Rule
    options: Options
    field: str | None
    column: str | None
    tokenizer: Tokenizer | None

    @property
    def whole(self) -> bool:
        """Whether the text is the file itself and not records in it."""
        return self.field is None and self.column is None

    def counter(self, workers: int = 1, share: int = 1) -> Counter:
        """A new counter; `share` of them have the memory between them."""
        limit = self.options.memory_limit
        return _backend.word_counter(
            self.rule,
            workers=workers,
            memory_limit=None if limit is None else max(limit // share, 1),
            approx=self.options.approx,
        )

    def add(self, whole: Table, table: Table) -> None:
        """Adds what one input gave; of an approximation no more is kept than was asked for."""
        whole.merge(table)
        if self.options.approx is not None:
            whole.shrink(self.options.approx)

    def count(self, counter: Counter, source: Source, run: _Run, slice_bytes: int = 0) -> None:
        """Counts a file into a counter; with `slice_bytes` a plain one is left to the counter's own reading."""
        told = _Told(run, source)
        try:
            self._count(counter, source, run, told, slice_bytes)
        except Exception:
            if self.options.skip:
                told(source.size)  # whatever became of it, the run is done with it
            raise
        run.complete()

    def _count(self, counter: Counter, source: Source, run: _Run, told: _Told, slice_bytes: int) -> None:
        with source.open(run.stop.is_set) as stream:

            def progress() -> None:
                told(stream.consumed)
                if run.stop.is_set():
                    raise Stopped

            if self.column is not None:
                for name, batch, done in _sources.parquet(source, self.column):
                    stream.consumed = done
                    self._documents(counter, name, batch, progress)
            elif self.field is not None:
                blocks = stream.blocks(self.options.max_output_bytes)
                for name, batch in _sources.jsonl(source.name, blocks, self.field, self.rule.errors):
                    self._documents(counter, name, batch, progress)
            elif self.tokenizer is not None:
                blocks = stream.blocks(self.options.max_output_bytes)
                batches = str_documents(source.name, blocks, self.rule)
                _PythonCounter(counter, self.tokenizer).count(source.name, batches, progress)
            elif slice_bytes and stream.plain and self._slices(stream):
                counter.name = source.name
                for start in range(0, stream.size, slice_bytes):
                    stop = min(start + slice_bytes, stream.size)
                    counter.file(stream.fd, start, stop)
                    stream.consumed = stop
                    progress()
            else:
                counter.name = _called(source.name, self.rule)
                pieces: Iterable[bytes] = stream.blocks(self.options.max_output_bytes)
                if self.rule.normalize is not None:
                    pieces = normalized(source.name, pieces, self.rule)
                for piece in pieces:
                    counter.feed(piece)
                    progress()
                counter.end()
            stream.check_whole()
            stream.consumed = max(stream.consumed, source.size)
            progress()

    def _slices(self, stream: Stream) -> bool:
        """Whether the file may be counted line by line in any order, and has lines to be cut at."""
        if self.rule.normalize is not None or (self.rule.documents_matter and not self.rule.lines):
            return False
        return b"\n" in os.pread(stream.fd, PIECE, 0)

    def _documents(self, counter: Counter, name: str, batch: list[bytes], progress: Callable[[], None]) -> None:
        """Documents that are texts by themselves."""
        if self.tokenizer is not None:
            batches = (part for text in batch for part in str_documents(name, (text,), self.rule))
            _PythonCounter(counter, self.tokenizer).count(name, batches, progress)
            return
        _count_documents(counter, name, batch, self.rule)
        progress()


def _count_documents(counter: Counter, name: str, batch: list[bytes], rule: Rule) -> None:
    counter.name = _called(name, rule)
    if rule.normalize is not None:
        batch = [_normal(name, text, rule) for text in batch]
    if batch:
        counter.documents(batch)


def count_parts(job: _FileJob, parts: list[tuple[int, Source, int, int | None]]) -> tuple[Table, int, list[Any]]:
    """Counts files, or spans of plain ones, somewhere else: the table, how many files were whole, and what was skipped.

    A part is the file's number, the file, and the span of bytes in which lines begin; no end means the whole file.
    """
    run = _Run(job.options, None)
    numbered = [(order, source) for order, source, _, stop in parts if stop is None]
    tables = [_file_loop(iter(numbered), job, run, job.options.count)] if numbered else []
    counter = run.watch(job.counter(job.options.count))
    for _, source, start, stop in parts:
        if stop is None:
            continue
        with source.open() as stream:
            counter.name = source.name
            if job.tokenizer is not None:
                batches = str_documents(source.name, span_blocks(stream.fd, start, stop), job.rule, start=start)
                _PythonCounter(counter, job.tokenizer).count(source.name, batches, _nothing)
            elif job.rule.normalize is not None:
                counter.name = _called(source.name, job.rule)
                if start:
                    # One is taken for that of the beginning, which this is not.
                    counter.feed(UTF8_BOM)
                for piece in normalized(source.name, span_blocks(stream.fd, start, stop), job.rule, start=start):
                    counter.feed(piece)
                counter.end()
            else:
                counter.file(stream.fd, start, stop)
            _sources.check_size(source.name, stream.fd, stop)
        # The file's first span stands for the file.
        run.completed += start == 0
    tables.append(counter.finish())
    return _merged(tables, job.rule), run.completed, run.skipped


def _slice_bytes(workers: int) -> int:
    return _SLICE * workers if _backend.__name__.endswith("native") else _PYTHON_SLICE


def _files_in_threads(found: list[Source], job: _FileJob, run: _Run) -> Table:
    """Large plain files one after another with native threads each; the others side by side."""
    options = job.options
    workers = options.count
    numbered = list(enumerate(found))
    native_threads = 1 if options.approx is not None else workers
    tables: list[Table] = []
    if options.one_counter:
        works = [lambda: _file_loop(iter(numbered), job, run, native_threads)]
        return _merged(_in_threads(run, works), job.rule)
    large = [
        pair
        for pair in numbered
        if workers > 1 and job.whole and job.tokenizer is None and pair[1].by_path and pair[1].size >= _LARGE
    ]
    if large and not _several(large, workers):
        plain = [pair for pair in large if _is_plain(pair[1], job)]
        if plain:
            tables += _in_threads(run, [lambda: _file_loop(iter(plain), job, run, workers)])
            taken = {i for i, _ in plain}
            numbered = [pair for pair in numbered if pair[0] not in taken]
    if numbered:
        # Large files first: none is left for the end, when the other threads have nothing to do.
        order = _Shared(sorted(numbered, key=lambda pair: -pair[1].size))
        count = min(workers, len(numbered))
        tables += _in_threads(run, [lambda: _file_loop(order, job, run, 1)] * count)
    return _merged(tables, job.rule)


def _several(large: list[tuple[int, Source]], workers: int) -> bool:
    """Whether whole files keep all workers busy about as well as slices do."""
    return len(large) >= 8 * workers


def _is_plain(source: Source, job: _FileJob) -> bool:
    """Whether a file can be counted in slices; an error shows later, where the file is counted."""
    try:
        with source.open() as stream:
            return stream.plain and job._slices(stream)
    except (OSError, ValueError):
        return False


class _Shared:
    """An iterator for several threads."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()

    def __iter__(self) -> _Shared:
        return self

    def __next__(self) -> Any:
        with self._lock:
            return next(self._items)


def _file_loop(numbered: Iterator[tuple[int, Source]], job: _FileJob, run: _Run, native_threads: int) -> Table:
    """Counts the files that come; with on_error="skip" each by itself, so that a failed one leaves nothing behind."""
    slice_bytes = _slice_bytes(native_threads)
    whole = _backend.word_table(docs=job.rule.doc_freq) if job.options.skip else None
    counter = run.watch(job.counter(native_threads))
    for order, source in numbered:
        if run.stop.is_set():
            raise Stopped
        if whole is None:
            job.count(counter, source, run, slice_bytes)
            continue
        try:
            job.count(counter, source, run, slice_bytes)
            job.add(whole, counter.finish())
        except Exception as problem:
            if not _may_skip(problem):
                raise
            run.skip(order, source.name, problem)
            counter = run.watch(job.counter(native_threads))
    return counter.finish() if whole is None else whole


# Texts.


def count_texts(texts: object, rule: Rule, tokenizer: Tokenizer | None, options: Options) -> tuple[Table, Skipped]:
    """Counts texts in memory; `tokenizer` where there is one takes the place of the rule's."""
    job = _FileJob(rule, options, None, None, tokenizer)
    array = _arrow(texts)
    with _Run(options, _size(texts, array) if options.progress else None) as run:
        batches = _batches(texts, array, job, run)
        if options.max_output_bytes is not None:
            batches = _bounded(batches, options.max_output_bytes)
        if tokenizer is not None and options.count > 1 and options.approx is None:
            table = _texts_in_processes(batches, job, run)
        elif options.count == 1 or options.one_counter:
            table = _text_loop(_watched(batches, run), job, run)
        else:
            table = _texts_in_threads(batches, job, run)
        if isinstance(texts, (str, bytes, bytearray, memoryview)) and not rule.lines and not run.skipped:
            table.documents = 1
        return table, run.report()


@dataclass(frozen=True)
class _Batch:
    """Texts of the input from number `first` on; with `start` the lines of one text from that byte (of a str: character) on."""

    first: int
    texts: list[bytes]
    start: int = 0

    @property
    def name(self) -> str:
        if self.start:
            return f"text {self.first}, from {self.start} on,"
        last = self.first + len(self.texts) - 1
        return f"text {self.first}" if last <= self.first else f"texts {self.first} to {last}"

    @property
    def size(self) -> int:
        return sum(map(len, self.texts))


def _size(texts: object, array: Any) -> int | None:
    """The bytes of the texts; None where it takes a pass over them all to know."""
    if array is not None:
        return _sources.arrow_bytes(array)
    if isinstance(texts, str):
        return sum(len(encoded(texts[at : at + PIECE])) for at in range(0, len(texts), PIECE))
    return len(texts) if isinstance(texts, (bytes, bytearray, memoryview)) else None


def _batches(texts: object, array: Any, job: _FileJob, run: _Run) -> Iterator[_Batch]:
    """The texts in batches of about 1 MiB."""
    if array is not None:
        return _arrow_batches(array)
    if isinstance(texts, (str, bytes, bytearray, memoryview)):
        # A tokenizer gets whole documents, and a text that fails is left out as a whole.
        by_lines = job.rule.lines or not (job.rule.documents_matter or job.tokenizer is not None)
        return _pieces(texts, by_lines and not job.options.skip)
    check_texts("texts", texts)
    return _iterable_batches(column_of(texts), run.check if run.timed else _nothing)


def _arrow(texts: Any) -> Any:
    """A pyarrow array of what has Arrow's form; None for what has not, and for columns of polars where there is no pyarrow."""
    module = type(texts).__module__.partition(".")[0]
    if module not in ("pyarrow", "polars") or isinstance(texts, Iterator) or not _backends.installed("pyarrow"):
        return None
    import pyarrow as pa

    if isinstance(texts, (pa.Array, pa.ChunkedArray)):
        return texts
    if hasattr(texts, "__arrow_c_stream__") and not hasattr(type(texts), "columns"):
        return pa.chunked_array(texts)
    return None


def _arrow_batches(array: Any) -> Iterator[_Batch]:
    first = 0
    for batch in _sources.arrow_documents(array):
        yield _Batch(first, batch)
        first += len(batch)


def _iterable_batches(texts: Iterable[object], check: Callable[[], None]) -> Iterator[_Batch]:
    batch: list[bytes] = []
    first = size = 0
    for number, text in enumerate(texts):
        # The next text may have been long in coming.
        check()
        if isinstance(text, str):
            data = encoded(text)
        elif isinstance(text, bytes):
            data = text
        elif isinstance(text, (bytearray, memoryview)):
            data = bytes(text)
        else:
            raise wrong_type(f"texts[{number}]", "str or bytes", text)
        batch.append(data)
        size += len(data)
        if size >= PIECE or len(batch) >= 2**16:
            yield _Batch(first, batch)
            batch, first, size = [], number + 1, 0
    check()
    if batch:
        yield _Batch(first, batch)


def _pieces(text: str | bytes | bytearray | memoryview, apart: bool) -> Iterator[_Batch]:
    """One text, in runs of lines where these can be counted `apart`."""
    if isinstance(text, memoryview):
        text = bytes(text)
    newline = "\n" if isinstance(text, str) else b"\n"
    # What a text must not begin with, because it would be taken for a mark of the encoding.
    marks = ("\ufeff", "\udcff", "\udcfe", "\0") if isinstance(text, str) else (b"\xef", b"\xff", b"\xfe", b"\0")
    start = 0
    while start < len(text) or start == 0:
        stop = len(text)
        if apart and len(text) - start > 2 * PIECE:
            stop = start + PIECE
            while True:
                stop = text.find(newline, stop) + 1  # type: ignore[arg-type]
                if not stop or not text.startswith(marks, stop):  # type: ignore[arg-type]
                    break
            stop = stop or len(text)
        piece = text[start:stop]
        yield _Batch(0, [encoded(piece) if isinstance(piece, str) else bytes(piece)], start=start)
        start = stop
        if not len(text):
            return


def _bounded(batches: Iterator[_Batch], most: int) -> Iterator[_Batch]:
    size = 0
    for batch in batches:
        size += batch.size
        if size > most:
            raise ValueError(f"texts must have at most {most} bytes (max_output_bytes), got more")
        yield batch


def _watched(batches: Iterator[_Batch], run: _Run) -> Iterator[_Batch]:
    for batch in batches:
        run.check()
        yield batch


def _text_loop(batches: Iterator[_Batch], job: _FileJob, run: _Run) -> Table:
    """Counts the batches that come."""
    rule = job.rule
    whole = _backend.word_table(docs=rule.doc_freq) if job.options.skip else None
    counter = run.watch(job.counter())
    for batch in batches:
        if run.stop.is_set():
            raise Stopped
        failed = False
        try:
            _count_batch(counter, batch, job, run)
            if whole is not None:
                job.add(whole, counter.finish())
        except (OSError, ValueError) as problem:
            if not _may_skip(problem):
                raise
            failed = True
        if failed:
            counter = run.watch(job.counter())
            _halved(batch, job, run, whole)
    return counter.finish() if whole is None else whole


def _count_batch(counter: Counter, batch: _Batch, job: _FileJob, run: _Run) -> None:
    if job.tokenizer is not None:
        documents = (part for text in batch.texts for part in str_documents(batch.name, (text,), job.rule))
        _PythonCounter(counter, job.tokenizer).count(batch.name, documents, run.check)
    elif len(batch.texts) == 1 and len(batch.texts[0]) > 4 * PIECE:
        # In pieces, between which Ctrl-C and the clock are heard.
        counter.name = _called(batch.name, job.rule)
        view = memoryview(batch.texts[0])
        pieces: Iterable[Any] = (view[at : at + PIECE] for at in range(0, len(view), PIECE))
        if job.rule.normalize is not None:
            pieces = normalized(batch.name, map(bytes, pieces), job.rule)
        for piece in pieces:
            if run.stop.is_set():
                raise Stopped
            if threading.current_thread() is threading.main_thread():
                run.check()
            counter.feed(piece)
        counter.end()
    else:
        _count_documents(counter, batch.name, batch.texts, job.rule)
    run.add(batch.size)


def _nothing() -> None:
    pass


def _halved(batch: _Batch, job: _FileJob, run: _Run, whole: Table | None) -> None:
    """A batch that failed, again in halves: in the end the error names the text, or the text alone is skipped."""
    if len(batch.texts) == 1:
        parts = [batch]
    else:
        middle = len(batch.texts) // 2
        parts = [
            _Batch(batch.first, batch.texts[:middle]),
            _Batch(batch.first + middle, batch.texts[middle:]),
        ]
    for part in parts:
        counter = job.counter()
        try:
            _count_batch(counter, part, job, run)
            if whole is not None:
                job.add(whole, counter.finish())
            continue
        except (OSError, ValueError) as problem:
            if not _may_skip(problem):
                raise
            if len(part.texts) == 1:
                if whole is None:
                    raise
                run.skip(part.first, part.name, problem)
                run.add(part.size)
                continue
        # Not in the handler: the errors of larger parts would hang on that of the text.
        _halved(part, job, run, whole)
    if whole is None:
        raise RuntimeError(f"{batch.name} failed once and not again")


def _texts_in_threads(batches: Iterator[_Batch], job: _FileJob, run: _Run) -> Table:
    """Batches from this thread to counters in others; little text is counted in this one."""
    workers = job.options.count
    first = next(batches, None)
    second = next(batches, None) if first is not None else None
    if first is None or second is None:
        return _text_loop(iter(() if first is None else (first,)), job, run)
    import queue

    waiting: queue.Queue[_Batch | None] = queue.Queue(maxsize=workers + 1)

    def put(batch: _Batch | None) -> None:
        while True:
            if run.stop.is_set():
                raise Stopped
            run.check()
            try:
                waiting.put(batch, timeout=_TICK)
                return
            except queue.Full:
                pass

    def produce() -> None:
        put(first)
        put(second)
        for batch in batches:
            put(batch)
        for _ in range(workers):
            put(None)

    def taken() -> Iterator[_Batch]:
        while True:
            try:
                batch = waiting.get(timeout=_TICK)
            except queue.Empty:
                if run.stop.is_set():
                    raise Stopped from None
                continue
            if batch is None:
                return
            yield batch

    return _merged(_in_threads(run, [lambda: _text_loop(taken(), job, run)] * workers, produce), job.rule)


# Worker processes, for tokenizers that are Python functions.


class _CountJob:
    """What a worker process does: counts what it is given into its own table, and hands that over at the end."""

    def __init__(self, job: _FileJob) -> None:
        self._job = job
        self._backend = _backend.__name__.rpartition(".")[2]
        self._counter: Counter = None
        self._whole: Table = None
        self._run: _Run | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_job": self._job, "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        global _backend
        self.__dict__.update(state)
        _backend = _backends.load(self._backend)
        self._counter = self._new()
        self._whole = _backend.word_table(docs=self._job.rule.doc_freq)
        self._run = _Run(Options(), None)

    def _new(self) -> Counter:
        return self._job.counter(1, self._job.options.count)

    def __call__(self, message: bytes) -> bytes:
        job, run, item = self._job, self._run, pickle.loads(message)
        assert run is not None
        assert job.tokenizer is not None
        run.done = run.completed = 0
        run.skipped = []
        if isinstance(item, _Batch):
            if job.options.skip:
                for number, text in enumerate(item.texts, item.first):
                    single = _Batch(number, [text])
                    skipped = len(run.skipped)
                    self._apart(
                        run,
                        number,
                        single.name,
                        lambda single=single: _count_batch(self._counter, single, job, run),  # type: ignore[misc]
                    )
                    if len(run.skipped) > skipped:
                        run.add(single.size)
            else:
                _count_batch(self._counter, item, job, run)
        elif isinstance(item, _Block):
            documents: Iterator[list[str]]
            if item.records:
                documents = (part for text in item.records for part in str_documents(item.name, (text,), job.rule))
            else:
                documents = str_documents(item.name, item.blocks(), job.rule, start=item.start)
            _PythonCounter(self._counter, job.tokenizer).count(item.name, documents, _nothing)
            if item.path is not None:
                run.add(item.stop - item.start)
        elif job.options.skip:
            order, source = item
            self._apart(run, order, source.name, lambda: job.count(self._counter, source, run))
        else:
            job.count(self._counter, item[1], run)
        return pickle.dumps((run.done, run.completed, run.skipped))

    def _apart(self, run: _Run, order: int, name: str, count: Callable[[], None]) -> None:
        try:
            count()
            self._whole.merge(self._counter.finish())
        except Exception as problem:
            if not _may_skip(problem):
                raise
            run.skip(order, name, problem)
            self._counter = self._new()

    def finish(self) -> bytes:
        """The worker's table."""
        table = self._counter.finish()
        if self._job.options.skip:
            table = self._whole
        data: bytes = table.to_bytes()
        return data


@dataclass(frozen=True)
class _Block:
    """A part of a file: lines that begin in [start, stop) of a plain one, or bytes that were read already, or records."""

    name: str
    start: int
    stop: int
    path: str | bytes | None = None
    data: bytes = b""
    records: tuple[bytes, ...] = ()

    def blocks(self) -> Iterator[bytes]:
        """The bytes of the lines that begin in the span."""
        if self.path is None:
            yield self.data
            return
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield from span_blocks(fd, self.start, self.stop)
            _sources.check_size(self.name, fd, self.stop)
        finally:
            os.close(fd)


def span_blocks(fd: int, start: int, stop: int) -> Iterator[bytes]:
    """The lines of a plain file that begin in [start, stop)."""
    at = start
    if start:
        # The line that begins before is another's, to its end.
        at = start - 1
        while True:
            block = os.pread(fd, PIECE, at)
            if not block:
                return
            found = block.find(b"\n")
            if found >= 0:
                at += found + 1
                break
            at += len(block)
    while at < stop:
        block = os.pread(fd, min(PIECE, stop - at), at)
        if not block:
            return
        yield block
        at += len(block)
        ended = block.endswith(b"\n")
        if at >= stop and not ended:
            while block := os.pread(fd, 2**16, at):
                end = block.find(b"\n") + 1
                yield block[:end] if end else block
                at += len(block)
                if end:
                    return


def _crew(job: _FileJob, run: _Run) -> _workers.Crew:
    from . import _workers  # and with it multiprocessing, of which threads have no use

    _workers.pickled("tokenizer", job.tokenizer)
    options = Options(
        workers=job.options.count,
        memory_limit=job.options.memory_limit,
        max_output_bytes=job.options.max_output_bytes,
        on_error=job.options.on_error,
    )
    sent = _FileJob(job.rule, options, job.field, job.column, job.tokenizer)
    packed = _workers.pickled("tokenizer", _CountJob(sent))
    return _workers.Crew(packed, job.options.count, tables=True, deadline=run.deadline, tick=run.check)


def _collect(crew: _workers.Crew, items: Iterator[tuple[str, bytes]], run: _Run, rule: Rule) -> Table:
    """Runs the items and merges the workers' tables."""
    with crew:
        for _, answer in crew.run(items):
            done, completed, skipped = pickle.loads(answer)
            run.done += done
            run.completed += completed
            run.skipped += skipped
        tables = (_backend.table_from_bytes(memory) for memory in crew.tables())
        whole = None
        for table in tables:
            if whole is None:
                whole = table
            elif len(table) > len(whole):
                table.merge(whole)
                whole = table
            else:
                whole.merge(table)
        crew.close()
    return whole if whole is not None else _backend.word_table(docs=rule.doc_freq)


def _texts_in_processes(batches: Iterator[_Batch], job: _FileJob, run: _Run) -> Table:
    items = ((batch.name, pickle.dumps(batch)) for batch in batches)
    return _collect(_crew(job, run), items, run, job.rule)


def _files_in_processes(found: list[Source], job: _FileJob, run: _Run) -> Table:
    """Files by their paths, cut into spans where they are large; what only this process can read is read here."""
    here = [pair for pair in enumerate(found) if not pair[1].by_path and job.options.skip]
    there = [pair for pair in enumerate(found) if pair[1].by_path or not job.options.skip]
    tables = []
    if there:
        tables.append(_collect(_crew(job, run), _file_items(there, job, run), run, job.rule))
    if here:
        tables += _in_threads(run, [lambda: _file_loop(iter(here), job, run, 1)])
    return _merged(tables, job.rule)


def _file_items(numbered: list[tuple[int, Source]], job: _FileJob, run: _Run) -> Iterator[tuple[str, bytes]]:
    workers = job.options.count
    for order, source in numbered:
        cut = job.rule.lines if job.whole else True
        few = source.size >= 2 * PIECE and len(numbered) < 4 * workers
        if source.by_path and (job.options.skip or not cut or not few):
            yield source.name, pickle.dumps((order, source))
            continue
        with source.open(run.stopped) as stream:
            if stream.plain and job.whole and cut:
                # Several spans for each worker, of 1 MiB to 16 MiB.
                step = min(max(stream.size // (8 * workers), PIECE), 16 * PIECE)
                for start in range(0, stream.size, step):
                    stop = min(start + step, stream.size)
                    name = f"{source.name}, bytes {start} to {stop}"
                    yield name, pickle.dumps(_Block(name, start, stop, source.path))
            else:
                yield from _read_here(source, stream, job, _Told(run, source))
        run.complete()


def _read_here(source: Source, stream: Stream, job: _FileJob, told: _Told) -> Iterator[tuple[str, bytes]]:
    """The parts of a file that is decompressed or read in this process."""
    for item in _parts_here(source, stream, job):
        told(stream.consumed)
        yield item
    told(max(stream.consumed, source.size))


def _parts_here(source: Source, stream: Stream, job: _FileJob) -> Iterator[tuple[str, bytes]]:
    if job.column is not None:
        for name, batch, done in _sources.parquet(source, job.column):
            stream.consumed = done
            yield name, pickle.dumps(_Block(name, 0, 0, records=tuple(batch)))
        return
    blocks = stream.blocks(job.options.max_output_bytes)
    if job.field is not None:
        for name, batch in _sources.jsonl(source.name, blocks, job.field, job.rule.errors):
            yield name, pickle.dumps(_Block(name, 0, 0, records=tuple(batch)))
        return
    offset = 0
    runs = _sources.lines(source.name, _with_head(blocks, 4)) if job.rule.lines else iter((b"".join(blocks),))
    for data in runs:
        name = f"{source.name}, bytes {offset} to {offset + len(data)}"
        yield name, pickle.dumps(_Block(name, offset, offset + len(data), data=data))
        offset += len(data)
