# SPDX-License-Identifier: BSD-3-Clause
"""Counting on Dask and Spark: a real local cluster of two worker processes, one of which is killed in the middle."""

from __future__ import annotations

import gzip
import io
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parallel
import pytest

import fastops
from fastops import DecodeError, TokenTooLong, WordCounts, WorkerDied, distributed
from fastops.distributed import count_files

# pandas, Dask and Spark warn of one another.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    rng = random.Random(3)
    words = [f"word{i}" for i in range(3000)] + ["é", "字", "The"]
    paths = []
    for i, lines in enumerate([3000, 3000, 100, 1, 0]):
        text = "".join(" ".join(rng.choices(words, k=rng.randrange(20))) + "\n" for _ in range(lines)).encode()
        path = folder / f"file{i}"
        path.write_bytes(gzip.compress(text) if i == 1 else text)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def dask() -> Iterator[Any]:
    module = pytest.importorskip("distributed", reason="distributed is not installed")
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        module.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as cluster,
        module.Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    sql = pytest.importorskip("pyspark.sql", reason="pyspark is not installed")
    pytest.importorskip("pandas", reason="pandas is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = os.pathsep.join([str(HERE), str(Path(fastops.__file__).parent.parent)])
    # Two executors, each a process with a core.
    builder = sql.SparkSession.builder.master("local-cluster[2,1,1024]").appName("fastops")
    for name, value in {
        "spark.ui.enabled": "false",
        "spark.executorEnv.PYTHONPATH": path,
        "spark.executorEnv.FASTOPS_BACKEND": os.environ.get("FASTOPS_BACKEND", ""),
        "spark.executor.memory": "1g",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.log.level": "OFF",
        "spark.ui.showConsoleProgress": "false",
        "spark.task.maxFailures": "2",
    }.items():
        builder = builder.config(name, value)
    before = os.environ.get("PYSPARK_PYTHON")
    os.environ["PYSPARK_PYTHON"] = sys.executable
    try:
        session = builder.getOrCreate()
    except Exception as problem:  # noqa: BLE001 (whatever Java says)
        pytest.skip(f"Spark does not start here: {str(problem)[:200]}")
    yield session
    session.stop()
    if before is None:
        del os.environ["PYSPARK_PYTHON"]


@pytest.fixture(params=["dask", "spark"])
def engine(request: pytest.FixtureRequest) -> dict[str, Any]:
    client = request.getfixturevalue(request.param)
    if request.param == "dask":
        # An earlier test may have killed some.
        client.wait_for_workers(2, timeout=120)
    return {"engine": request.param, "client": client}


def same(got: WordCounts, want: WordCounts) -> None:
    assert got == want
    assert got.documents == want.documents


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokenizer": "word", "ngrams": (1, 2), "doc_freq": True, "min_count": 2},
        {"document": "file", "doc_freq": True},
        {"normalize": "NFC", "lowercase": "unicode", "stop_words": ["the"]},
        {"tokenizer": parallel.split_words},
    ],
)
def test_counts_are_those_of_one_machine(engine: dict[str, Any], options: dict[str, Any], files: list[Path]) -> None:
    want = fastops.count_files(files, workers=1, **options)
    for span in (1 << 28, 30_000):
        got = count_files(files, span_bytes=span, **engine, **options)
        same(got, want)
        if options.get("doc_freq"):
            assert dict(got.doc_freq) == dict(want.doc_freq)
    assert got.skipped == []


def test_nothing_to_count(engine: dict[str, Any], tmp_path: Path) -> None:
    same(count_files([], **engine), WordCounts())
    (tmp_path / "empty").write_bytes(b"")
    same(count_files(tmp_path / "empty", **engine), WordCounts())


def test_errors_arrive_as_they_are(engine: dict[str, Any], files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(TokenTooLong, match="file0 must have no token of more than 6 bytes"):
        count_files(files, max_token_bytes=6, span_bytes=30_000, **engine)
    (tmp_path / "bad").write_bytes(b"good\nbad \xff\n")
    with pytest.raises(DecodeError, match="bad must be UTF-8"):
        count_files([tmp_path / "bad"], errors="strict", **engine)
    with pytest.raises(FileNotFoundError):
        count_files([tmp_path / "none"], **engine)
    got = count_files([*files, tmp_path / "bad", tmp_path / "none"], errors="strict", on_error="skip", **engine)
    same(got, fastops.count_files(files))
    assert [name for name, _ in got.skipped] == [str(tmp_path / "bad"), str(tmp_path / "none")]


def test_timeout_cancels_the_work(engine: dict[str, Any], files: list[Path]) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="timeout=1 s"):
        count_files(files, tokenizer=parallel.slow_split, span_bytes=10_000, timeout=1, **engine)
    assert time.monotonic() - start < 30


def test_a_worker_killed_in_the_middle_changes_nothing(engine: dict[str, Any], files: list[Path]) -> None:
    want = fastops.count_files(files)
    got: list[Any] = []

    def count() -> None:
        try:
            got.append(count_files(files, tokenizer=parallel.slow_split, span_bytes=10_000, **engine))
        except BaseException as problem:  # noqa: BLE001 (looked at below)
            got.append(problem)

    if engine["engine"] == "dask":
        victims = list(engine["client"].run(os.getpid).values())
    else:
        frame = engine["client"].sparkContext.parallelize(range(20), 20).map(lambda _: os.getppid())
        victims = sorted(set(frame.collect()))
    thread = threading.Thread(target=count)
    thread.start()
    time.sleep(1.5)
    assert thread.is_alive()
    # A worker of Dask; the process of Spark that keeps an executor's Python workers.
    os.kill(victims[0], signal.SIGKILL)
    thread.join(120)
    assert not thread.is_alive()
    if isinstance(got[0], WorkerDied):
        return
    if isinstance(got[0], BaseException):
        raise got[0]
    same(got[0], want)


def test_a_part_that_kills_its_workers_is_an_error(engine: dict[str, Any], files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "deadly").write_text("life\ndeath\n")
    with pytest.raises(WorkerDied, match="the workers that ran a part of the work died"):
        count_files([tmp_path / "deadly"], tokenizer=parallel.killed_at_death, **engine)
    if engine["engine"] == "dask":
        engine["client"].wait_for_workers(1, timeout=120)
    same(count_files(files, **engine), fastops.count_files(files))


def test_no_worker_is_an_error(monkeypatch: pytest.MonkeyPatch, files: list[Path]) -> None:
    module = pytest.importorskip("distributed", reason="distributed is not installed")
    monkeypatch.setattr(distributed, "_PATIENCE", 1.0)
    with (
        module.LocalCluster(n_workers=0, processes=False, dashboard_address=None, silence_logs=50) as cluster,
        module.Client(cluster, set_as_default=False) as client,
        pytest.raises(WorkerDied, match="no worker for 1 s"),
    ):
        count_files(files, client=client)


def test_an_address_is_a_client(dask: Any, files: list[Path]) -> None:
    dask.wait_for_workers(1, timeout=120)
    same(count_files(files, client=dask.scheduler.address), fastops.count_files(files))


def test_progress_is_told(dask: Any, files: list[Path]) -> None:
    told: list[Any] = []
    dask.wait_for_workers(1, timeout=120)
    count_files(files, client=dask, span_bytes=30_000, progress=lambda *numbers: told.append(numbers))
    total = sum(path.stat().st_size for path in files)
    assert told[-1] == (total, total)


def test_arguments_are_checked(files: list[Path]) -> None:
    with pytest.raises(ValueError, match="engine must be 'dask' or 'spark', got 'ray'"):
        count_files(files, engine="ray")
    with pytest.raises(ValueError, match="span_bytes must be an integer >= 1"):
        count_files(files, span_bytes=0)
    with pytest.raises(TypeError, match=r"files\[0\] must be a path, which workers can open"):
        count_files(io.BytesIO(b"a"))
    with pytest.raises(ValueError, match="column must be None with field"):
        count_files(files, field="a", column="b")


def test_a_client_is_asked_for(files: list[Path]) -> None:
    pytest.importorskip("distributed", reason="distributed is not installed")
    with pytest.raises(ValueError, match=r"client must be a distributed\.Client"):
        count_files(files)
    with pytest.raises(TypeError, match="client must be a synchronous"):
        count_files(files, client=3)


def test_missing_engines_are_named(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed._backends, "installed", lambda name: False)
    for engine, extra in (("dask", r"fastops\[dask\]"), ("spark", r"fastops\[spark\]")):
        with pytest.raises(ImportError, match=extra):
            count_files(files, engine=engine)


def test_large_tables_go_in_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = fastops.count_words([f"word{i} word" for i in range(5000)], doc_freq=True)
    monkeypatch.setattr(distributed, "_CELL", counts.nbytes // 7)
    cells = distributed._cells(counts._table)
    assert len(cells) > 5
    merged, completed, skipped = distributed._merge([(cells, 3, [(0, "a", "b")]), (cells, 4, [])])
    assert (completed, skipped) == (7, [(0, "a", "b")])
    total = sum((WordCounts.from_bytes(cell) for cell in merged), WordCounts.from_bytes(merged[0]).filter(words=[]))
    assert total == counts + counts
    assert total.documents == 10_000 + WordCounts.from_bytes(merged[0]).documents
