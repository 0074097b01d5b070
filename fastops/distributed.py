# SPDX-License-Identifier: BSD-3-Clause
"""Word counting on several machines: Dask and Spark carry spans of files to workers and their tables back.

The engines see opaque tasks and the bytes of tables alone: each worker counts natively, and tables are merged natively in a tree.
"""

from __future__ import annotations

import itertools
import os
import pickle
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from . import _backend as _backends
from . import _counting, _sources, _validate
from ._backend import backend as _backend
from ._rule import WorkerDied
from ._validate import Text
from .wordcount import Progress, _files, _of_records, _options, _result, rule_of

if TYPE_CHECKING:
    from ._counts import Tokenizer, WordCounts

__all__ = ["count_files"]

ENGINES = ("dask", "spark")
SPAN_BYTES = 2**28
# Tables that are merged at a time.
_FAN_IN = 8
# Bytes of a table in one cell of an engine: Arrow's binary type and Spark's rows end at 2 GiB.
_CELL = 2**28
# Seconds without any worker after which there will be none.
_PATIENCE = 60.0

Part = tuple[int, _sources.Source, int, int | None]


def count_files(
    files: object,
    *,
    engine: str = "dask",
    client: Any = None,
    span_bytes: int = SPAN_BYTES,
    field: str | None = None,
    column: str | None = None,
    tokenizer: str | Tokenizer = "whitespace",
    lowercase: str | None = None,
    normalize: str | None = None,
    ngrams: tuple[int, int] = (1, 1),
    document: str = "line",
    min_count: int = 1,
    stop_words: Iterable[str | bytes] | None = None,
    errors: str = "replace",
    workers: int = 1,
    memory_limit: int | None = None,
    doc_freq: bool = False,
    max_token_bytes: int = 2**20,
    max_output_bytes: int | None = None,
    on_error: str = "raise",
    timeout: float | None = None,
    progress: Progress = False,
) -> WordCounts:
    """Count the words of files that every worker of a cluster can read.

    Parameters
    ----------
    files : str, path, or list of these
        Names and globs as for `fastops.count_files`, found on this machine and opened by the workers under the same names.
    engine : {"dask", "spark"}, optional
        What carries the work.
    client : object, optional
        A ``distributed.Client`` or the address of a scheduler; a ``SparkSession``. By default the one that is active here.
    span_bytes : int, optional
        Plain files are cut into equal spans of at most this size, at line ends; small files are put together up to it.
    field : str, optional
        The files are JSON lines: count this field of each.
    column : str, optional
        The files are Parquet: count this column.
    tokenizer : {"whitespace", "word", "unicode", "char", "zh"} or callable, optional
        What a word is; see `fastops.count_words`.
    lowercase : {"ascii", "unicode", "casefold"}, optional
        Lower A-Z alone, or as ``str.lower()`` or ``str.casefold()``.
    normalize : {"NFC", "NFKC"}, optional
        Unicode normalization, before lowering.
    ngrams : (int, int), optional
        The smallest and the largest n of the sequences of n words that are counted, within a document.
    document : {"line", "file"}, optional
        Whether a document is a line or a file.
    min_count : int, optional
        Words that were counted less often, in all files together, are left out.
    stop_words : iterable of str or bytes, optional
        Words that are not counted, as they are after lowering.
    errors : {"replace", "strict", "ignore", "surrogateescape"}, optional
        What becomes of bytes that are no UTF-8.
    workers : int, optional
        Threads of one task. A worker of Dask with as many threads runs as many tasks at once, so that 1 is right there.
    memory_limit : int, optional
        About how many bytes of memory the table of one task may take.
    doc_freq : bool, optional
        Count for each word the documents that it is in.
    max_token_bytes : int, optional
        A longer word is an error.
    max_output_bytes : int, optional
        The most bytes that one compressed file may become.
    on_error : {"raise", "skip"}, optional
        Whether a file that cannot be counted ends the call or goes to `WordCounts.skipped`; files are not cut then.
    timeout : float, optional
        Seconds after which the work is cancelled and TimeoutError raised.
    progress : bool or callable, optional
        A bar on stderr where that is a terminal, or a function of the bytes done and all bytes. Spark tells at the end only.

    Returns
    -------
    WordCounts
        The counts, equal to those of `fastops.count_files`.

    Raises
    ------
    ImportError
        The engine is not installed.
    OSError
        A file that is missing or cannot be read.
    TypeError
        An argument of the wrong type; files without a path.
    ValueError
        An argument out of its range; no `client` and none active; a damaged file, a word that is too long.
    WorkerDied
        A task whose workers died again and again, or no worker for a minute.

    Notes
    -----
    One worker that dies is no error: the engine gives its task to another, and every task counts from nothing. Workers need
    fastops installed. With whole spans of 256 MiB the engines cost nothing beside counting; their own string functions are 3 to 9
    times slower.

    Examples
    --------
    >>> from distributed import Client  # doctest: +SKIP
    >>> from fastops.distributed import count_files  # doctest: +SKIP
    >>> with Client("tcp://10.0.0.1:8786") as client:  # doctest: +SKIP
    ...     counts = count_files("/data/*.txt.zst", client=client, lowercase="unicode")
    """
    engine = _validate.choice("engine", engine, ENGINES)
    rule, function = rule_of(
        tokenizer=tokenizer,
        lowercase=lowercase,
        normalize=normalize,
        ngrams=ngrams,
        document=document,
        stop_words=stop_words,
        errors=errors,
        doc_freq=doc_freq,
        max_token_bytes=max_token_bytes,
    )
    least = _validate.integer("min_count", min_count, 1)
    options = _options(None, doc_freq, max_output_bytes, memory_limit, on_error, progress, timeout, workers)
    span = _validate.integer("span_bytes", span_bytes, 1)
    rule = _of_records(rule, field, column)
    found = _sources.sources(_files(files), skip=options.skip)
    sent = _counting.Options(
        workers=options.count,
        memory_limit=options.memory_limit,
        max_output_bytes=options.max_output_bytes,
        on_error=options.on_error,
    )
    job = _counting._FileJob(rule, sent, field, column, function)
    tasks = list(_tasks(found, job, span))
    run = _spark if engine == "spark" else _dask
    with _counting._Run(options, sum(source.size for source in found)) as state:
        table = run(client, _Task(job), tasks, state) if tasks else _backend.word_table(docs=rule.doc_freq)
    if job.whole and not rule.lines:
        table.documents = state.completed
    return _result(table, state.report(), least, rule, function)


def _tasks(found: list[_sources.Source], job: _counting._FileJob, span: int) -> Iterator[list[Part]]:
    """Parts of about `span` bytes: a piece of a large file, or several small ones."""
    group: list[Part] = []
    size = 0
    for order, source in enumerate(found):
        if source.path is None:
            raise _validate.wrong_type(f"files[{order}]", "a path, which workers can open", Text("a file object"))
        place = _sources.Source(source.name, path=os.path.abspath(source.path), size=source.size)
        if source.size > span and not job.options.skip and _may_cut(place, job):
            # Of one size: the last one finishes with the others.
            pieces = -(-source.size // span)
            cuts = [source.size * i // pieces for i in range(pieces + 1)]
            for start, stop in itertools.pairwise(cuts):
                yield [(order, place, start, stop)]
            continue
        if group and size + source.size > span:
            yield group
            group, size = [], 0
        group.append((order, place, 0, None))
        # Opening a file costs about as much as some kilobytes.
        size += source.size + 2**12
    if group:
        yield group


def _may_cut(source: _sources.Source, job: _counting._FileJob) -> bool:
    if not job.whole or (job.rule.documents_matter and not job.rule.lines) or (job.tokenizer and not job.rule.lines):
        return False
    with source.open() as stream:
        return stream.plain


class _Task:
    """What a worker runs: parts in, a table's bytes and the report of the files out."""

    def __init__(self, job: _counting._FileJob) -> None:
        self._job = job

    def __call__(self, parts: list[Part]) -> tuple[list[bytes], int, list[Any]]:
        table, completed, skipped = _counting.count_parts(self._job, parts)
        return _cells(table), completed, skipped


Result = tuple[list[bytes], int, list[Any]]


def _cells(table: Any) -> list[bytes]:
    """The table in pieces that fit into a cell."""
    count = -(-table.nbytes // _CELL)
    if count <= 1:
        return [table.to_bytes()]
    cells = []
    documents, bound = table.documents, table.error_bound
    for part in table.split(count):
        # These are of the whole: once is enough.
        part.documents, part.error_bound = documents, bound
        documents = bound = 0
        cells.append(part.to_bytes())
    return cells


def _merge(results: list[Result]) -> Result:
    """Several results as one."""
    tables = [_backend.table_from_bytes(cell) for cells, _, _ in results for cell in cells]
    table = tables[0]
    for other in tables[1:]:
        table.merge(other)
    return _cells(table), sum(result[1] for result in results), [item for result in results for item in result[2]]


def _final(result: Result, run: _counting._Run) -> Any:
    cells, run.completed, run.skipped = result
    table = _backend.table_from_bytes(cells[0])
    for cell in cells[1:]:
        table.merge(_backend.table_from_bytes(cell))
    return table


# Dask.


def _dask(client: Any, task: _Task, tasks: list[list[Part]], run: _counting._Run) -> Any:
    if not _backends.installed("distributed"):
        raise ImportError("engine='dask' needs distributed: pip install 'fastops[dask]'")
    import distributed

    own = None
    if client is None:
        try:
            client = distributed.get_client()
        except ValueError:
            wanted = "a distributed.Client or the address of a scheduler where none is active (Client() starts a local cluster)"
            raise _validate.wrong_value("client", wanted, None) from None
    elif isinstance(client, str):
        client = own = distributed.Client(client, set_as_default=False)
    elif not isinstance(client, distributed.Client) or client.asynchronous:
        raise _validate.wrong_type("client", "a synchronous distributed.Client or an address", client)
    futures: list[Any] = []
    try:
        name = f"fastops-{uuid.uuid4().hex}"
        level = [
            client.submit(task, parts, key=f"{name}-count-{i}", pure=False, retries=0) for i, parts in enumerate(tasks)
        ]
        futures += level
        sizes = {
            future.key: sum((stop or part.size) - start for _, part, start, stop in parts)
            for future, parts in zip(level, tasks, strict=True)
        }
        depth = 0
        while len(level) > 1:
            depth += 1
            groups = [level[at : at + _FAN_IN] for at in range(0, len(level), _FAN_IN)]
            level = [
                client.submit(_merge, group, key=f"{name}-merge-{depth}-{i}", pure=False)
                for i, group in enumerate(groups)
            ]
            futures += level
        _await(client, futures, sizes, run)
        return _final(level[0].result(timeout=60), run)
    finally:
        # On the way out of an error or Ctrl-C the cluster drops the work.
        with suppress(Exception):
            client.cancel(futures, force=True)
        if own is not None:
            own.close()


def _await(client: Any, futures: list[Any], sizes: dict[str, int], run: _counting._Run) -> None:
    """Waits for all futures; raises what a task raised, and an error where nobody is left to work."""
    from distributed.scheduler import KilledWorker

    waiting = {future.key: future for future in futures}
    alone: float | None = None
    asked = 0.0
    while waiting:
        for key in [key for key, future in waiting.items() if future.done()]:
            future = waiting.pop(key)
            run.done += sizes.get(key, 0)
            if future.status == "finished":
                continue
            problem = future.exception(timeout=10) if future.status == "error" else None
            if isinstance(problem, KilledWorker):
                raise WorkerDied(
                    f"the workers that ran a part of the work died, the last of them {problem.last_worker}"
                )
            if problem is not None:
                raise problem
            raise WorkerDied(f"a part of the work was {future.status}")
        run.check()
        if client.status != "running":
            raise WorkerDied(f"the connection to the scheduler is {client.status}")
        now = time.monotonic()
        if now > asked + 1:
            asked = now
            alone = None if client.nthreads() else alone or now
            if alone is not None and now - alone > _PATIENCE:
                raise WorkerDied(f"the cluster has no worker for {_PATIENCE:g} s")
        time.sleep(0.02)


# Spark.


def _spark(session: Any, task: _Task, tasks: list[list[Part]], run: _counting._Run) -> Any:
    if not _backends.installed("pyspark"):
        raise ImportError("engine='spark' needs pyspark: pip install 'fastops[spark]'")
    from pyspark.sql import SparkSession

    if session is None:
        session = SparkSession.getActiveSession()
        if session is None:
            wanted = "a SparkSession where none is active (SparkSession.builder.getOrCreate() makes one)"
            raise _validate.wrong_value("client", wanted, None)
    elif not hasattr(session, "createDataFrame"):
        raise _validate.wrong_type("client", "a SparkSession", session)
    rows = [(pickle.dumps(parts),) for parts in tasks]
    context = session.sparkContext
    group = f"fastops-{uuid.uuid4().hex}"
    answers: list[Any] = []
    errors: list[BaseException] = []

    def collect() -> None:
        try:
            context.setJobGroup(group, "fastops: word counts", interruptOnCancel=True)
            frame = session.createDataFrame(context.parallelize(rows, len(rows)), "data binary")
            frame = frame.mapInArrow(_mapper(task), "kind int, data binary")
            width = len(rows)
            while width > _FAN_IN:
                width = -(-width // _FAN_IN)
                frame = frame.repartition(width).mapInArrow(_reducer, "kind int, data binary")
            answers.extend(frame.collect())
        except BaseException as problem:  # noqa: BLE001 (raised again by the main thread)
            errors.append(problem)

    thread = threading.Thread(target=collect, name="fastops-spark", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            run.check()
            thread.join(0.05)
    except BaseException:
        context.cancelJobGroup(group)
        thread.join(5)
        raise
    if errors:
        if isinstance(errors[0], ImportError):
            raise errors[0]
        raise _of_spark(errors[0]) from errors[0]
    for row in answers:
        if row.kind:
            raise pickle.loads(row.data)
    run.done = sum(source.size for parts in tasks for _, source, start, _ in parts if not start)
    return _final(_merge([pickle.loads(row.data) for row in answers]), run)


def _of_spark(problem: BaseException) -> BaseException:
    """Spark's own error in a word: which workers died, or its first line."""
    text = str(problem)
    for mark in ("Python worker exited unexpectedly", "ExecutorLostFailure", "Python worker failed to connect back"):
        if mark in text:
            return WorkerDied(f"the workers that ran a part of the work died: Spark says {mark!r}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # After a Python worker's traceback comes Java's.
    told = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return RuntimeError(f"Spark could not do the work: {_validate.clip((told or lines or [''])[-1], 150)}")


def _mapper(task: _Task) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """What mapInArrow runs over the tasks of a partition; an error is an answer, so that it arrives as it was."""

    def count(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            for parts in batch.column(0).to_pylist():
                try:
                    yield from _rows(task(pickle.loads(parts)))
                except Exception as problem:  # noqa: BLE001 (the driver raises it)
                    yield _row(1, _packed(problem))

    return count


def _reducer(batches: Iterator[Any]) -> Iterator[Any]:
    held: list[Result] = []
    for batch in batches:
        for kind, data in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
            if kind:
                yield _row(kind, data)
                continue
            held.append(pickle.loads(data))
            if len(held) > 1:
                held = [_merge(held)]
    for result in held:
        yield from _rows(result)


def _packed(problem: Exception) -> bytes:
    try:
        data = pickle.dumps(problem)
        pickle.loads(data)
    except Exception:  # noqa: BLE001 (whatever its class does when it is pickled)
        data = pickle.dumps(RuntimeError(f"{type(problem).__name__}: {problem}"))
    return data


def _rows(result: Result) -> Iterator[Any]:
    """A row for each cell of a table."""
    cells, completed, skipped = result
    for cell in cells:
        yield _row(0, pickle.dumps(([cell], completed, skipped)))
        completed, skipped = 0, []


def _row(kind: int, data: bytes) -> Any:
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([pa.array([kind], pa.int32()), pa.array([data], pa.binary())], ["kind", "data"])
