# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark harness: rows are checked before they are timed, noise withholds verdicts, reports say what was measured."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tolerance

import fastops
from fastops.bench import FAMILIES, attention, mitchell, nystrom, optim, report, runner, wordcount, worker
from fastops.bench import jax as jax_cases
from fastops.bench import torch as torch_cases
from fastops.bench.case import Case, Implementation, Machine, Task, WrongResult, aligned

PLAIN = Machine(("reference",), (), 1, frozenset())
SMALL = {"element": (300,), "MAC": (9, 8, 7)}
SETTINGS = runner.Settings(budget=4.0, batch=0.001, rounds=5, patience=60.0)
FIRST = mitchell.cases()[0]


def shrunk(case: Case) -> Case:
    """The same case at a size that the oracle does at once."""
    shape = (2, 3, 4, 6, 3) if case.op == "conv2d" else SMALL[case.unit]
    return dataclasses.replace(case, shape=shape)


def measurement(name: str, seconds: list[float], work: float = 100.0, **fields: Any) -> runner.Measurement:
    values = {"calls": 3, "error": 0.0, "whole": work} | fields
    recipe = "exact" if name.startswith("NumPy") else "fastops"
    return runner.Measurement(Implementation(name, recipe), work=work, seconds=seconds, **values)


def result(noise: float | None = 0.01, **ours: Any) -> runner.Run:
    """A run that was not run: our row takes half the yardstick's time."""
    rows = [
        measurement("NumPy exact", [2.0, 2.1, 1.9]),
        measurement("reference", [20.0, 21.0, 19.0], work=50.0, whole=100.0, note="timed on 50 of 100 elements"),
        measurement(**({"name": "native v3", "seconds": [1.0, 1.02, 0.99]} | ours)),
    ]
    machine = runner.describe(PLAIN) | {"targets": ["v3"]}
    return runner.Run([runner.Group(FIRST, rows, noise)], machine, "2026-01-02T03:04:05+00:00", 7.0)


@pytest.fixture(scope="module")
def measured() -> runner.Run:
    return runner.run([FIRST], PLAIN, SETTINGS)


# Cases.


def test_groups_have_names_of_their_own() -> None:
    families = [importlib.import_module(f"fastops.bench.{family}") for family in FAMILIES]
    groups = [case.group for family in families for case in family.cases()]
    assert len(set(groups)) == len(groups)
    assert sum(case.quick for case in optim.cases()) == 3
    assert sum(case.quick for case in attention.cases()) == 4
    assert sum(case.quick for case in mitchell.cases()) >= 6


@pytest.mark.parametrize("case", mitchell.cases(), ids=lambda case: case.group)
def test_every_row_agrees_with_the_oracle(case: Case, backend: ModuleType) -> None:
    name = backend.__name__.partition(".")[2]
    machine = dataclasses.replace(Machine.probe(threads=2), backends=(name,), targets=())
    if name == "native":
        machine = dataclasses.replace(machine, targets=(fastops._core.get_target(),))
    rows = mitchell.implementations(shrunk(case), machine)
    for row in rows:
        if row.recipe in ("torch", "triple loop", "scalar lut") or row.env or row.threads > 1:
            continue
        task = mitchell.prepare(shrunk(case), row)
        assert 0 <= task.check() < tolerance.BENCH_ROW
        assert 0 < task.work <= task.whole


def small(case: Case) -> Case:
    """The same step over a few small tensors."""
    return dataclasses.replace(case, shape=(7, 2000))


@pytest.mark.parametrize("case", optim.cases(), ids=lambda case: case.group)
def test_every_row_of_steps_agrees_with_the_oracle(case: Case, backend: ModuleType) -> None:
    name = backend.__name__.partition(".")[2]
    machine = dataclasses.replace(Machine.probe(threads=1), backends=(name, "reference"), targets=())
    if name == "native":
        machine = dataclasses.replace(machine, targets=(fastops._core.get_target(),))
    rows = optim.implementations(small(case), machine)
    assert len({row.name for row in rows}) == len(rows)
    seen = set()
    for row in rows:
        task = optim.prepare(small(case), row)
        assert 0 <= task.check() < 2e-2
        task.call(*task.args)
        assert 0 < task.work <= task.whole
        seen.add(row.recipe)
    assert "fastops" in seen
    assert "numpy" in seen or case.op == "ema stochastic"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Texts of the benchmarks in a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("texts")))
        wordcount._file.cache_clear()
        wordcount._countwords.cache_clear()
        yield
    wordcount._file.cache_clear()
    wordcount._countwords.cache_clear()


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize("case", wordcount.cases(), ids=lambda case: case.group)
def test_every_row_of_word_counts_agrees_with_the_oracle(case: Case, backend: ModuleType) -> None:
    name = backend.__name__.partition(".")[2]
    machine = dataclasses.replace(Machine.probe(threads=1), backends=(name, "reference"), targets=())
    if name == "native":
        machine = dataclasses.replace(machine, targets=(fastops._core.get_target(),))
    case = dataclasses.replace(case, shape=(20_000,))
    rows = wordcount.implementations(case, machine)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        # Peers with pools of threads of their own are for processes of their own.
        if row.recipe not in ("polars", "duckdb"):
            task = wordcount.prepare(case, row)
            assert task.check() == 0
            assert 0 < task.work <= task.whole


@pytest.mark.usefixtures("texts")
def test_a_wrong_word_count_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(wordcount.cases()[0], shape=(20_000,))
    row = Implementation(wordcount.COUNTER, "counter")
    genuine = wordcount._counter
    assert wordcount.prepare(case, row).check() == 0
    monkeypatch.setattr(wordcount, "_counter", lambda path: genuine(path) | {b"one more": 1})
    with pytest.raises(WrongResult, match="wanted"):
        wordcount.prepare(case, row).check()


def short(case: Case) -> Case:
    """The same attention over a few tokens."""
    return dataclasses.replace(case, shape=(min(case.shape[0], 96), min(case.shape[1], 2), 2, 8))


@pytest.mark.parametrize("case", attention.cases(), ids=lambda case: case.group)
def test_every_row_of_attention_agrees_with_the_oracle(case: Case, backend: ModuleType) -> None:
    name = backend.__name__.partition(".")[2]
    machine = dataclasses.replace(Machine.probe(threads=2), backends=(name, "reference"), targets=())
    if name == "native":
        machine = dataclasses.replace(machine, targets=(fastops._core.get_target(),))
    assert len({row.name for row in attention.implementations(case, machine)}) == len(
        attention.implementations(case, machine)
    )
    seen = set()
    for row in attention.implementations(short(case), machine):
        task = attention.prepare(short(case), row)
        assert 0 <= task.check() < tolerance.BENCH_ROW
        task.call(*task.args)
        assert 0 < task.work <= task.whole
        seen.add(row.recipe)
    assert "fastops" in seen


def test_slow_rows_of_attention_are_timed_on_a_part() -> None:
    for case in set(attention.cases()) - set(nystrom.cases()):
        kind = attention.Kind.of(case.op)
        part = attention._part(case, Implementation("reference", "fastops"))
        n, b, h, _ = case.shape
        taken = np.empty((b, h, n))[part].shape
        if kind.step:
            assert taken == (b, h, n)
        else:
            assert taken == (1, 1, n if kind.softmax else 256)
    long = next(case for case in attention.cases() if case.group == "linear causal float32 1x8x16384x64")
    task = attention.prepare(dataclasses.replace(long, shape=(4096, 1, 8, 4)), Implementation("x", attention.SOFTMAX))
    assert task.note == "timed on 4096 of 4096 tokens, 1 of 8 heads"
    assert task.work * 8 == task.whole


@pytest.mark.parametrize(
    "group",
    [
        case.group
        for case in attention.cases()[: -len(nystrom.cases())]
        if (case.dtype == "float32" and "1024" in case.size) or case.size[3:] == "x64"
    ],
)
def test_a_wrong_attention_is_never_timed(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(short(case) for case in attention.cases() if case.group == group)
    genuine = attention._ours
    kind = attention.Kind.of(case.op)

    def shifted(case: Case, row: Implementation, f: Any, inputs: list[Any]) -> Any:
        q, k, v, dy = inputs
        return genuine(case, row, f, [q, k, np.roll(v, 1, axis=3 if kind.step else 2), dy])

    row = Implementation("reference", "fastops")
    attention.prepare(case, row).check()
    monkeypatch.setattr(attention, "_ours", shifted)
    with pytest.raises(WrongResult, match=r"difference .* from the oracle"):
        attention.prepare(case, row).check()


def test_slow_rows_of_nystrom_attention_are_timed_on_a_head() -> None:
    (case,) = [case for case in nystrom.cases() if case.quick]
    task = attention.prepare(short(case), Implementation("reference", "fastops"))
    assert task.note == "timed on 1 of 2 heads"
    assert task.work * 2 == task.whole


@pytest.mark.parametrize("case", nystrom.cases(), ids=lambda case: case.group)
def test_a_wrong_nystrom_attention_is_never_timed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = nystrom._ours

    def other(case: Case, row: Implementation, f: Any, inputs: list[Any]) -> Any:
        # A row off: segments that begin later.
        q, k, v, dy = inputs
        return genuine(case, row, f, [q, np.roll(k, 1, axis=2), np.roll(v, 1, axis=2), dy])

    row = Implementation("reference", "fastops")
    attention.prepare(short(case), row).check()
    monkeypatch.setattr(nystrom, "_ours", other)
    with pytest.raises(WrongResult, match=r"difference .* from the oracle"):
        attention.prepare(short(case), row).check()


def test_inputs_of_nystrom_attention_have_a_structure() -> None:
    (case,) = [case for case in nystrom.cases() if case.quick]
    q, k, v, _ = (x[:, :1] for x in nystrom._inputs(case))
    exact = fastops.softmax_attention(q, k, v)
    near = fastops.nystrom_attention(q, k, v, num_landmarks=nystrom.Kind.of(case).landmarks)
    plain = np.broadcast_to(v.mean(axis=2, keepdims=True), v.shape)
    # Of random rows both are as far away.
    assert 4 * np.linalg.norm(near - exact) < np.linalg.norm(plain - exact)


def test_sets_are_those_of_the_models() -> None:
    sizes = {name: (len(shapes()), sum(int(np.prod(x)) for x in shapes())) for name, shapes in optim._SETS.items()}
    assert sizes["ResNet-50"] == (161, 25_557_032)
    assert sizes["BERT-base"] == (199, 109_482_240)
    assert sizes["5000x256"] == (5000, 1_280_000)


def test_a_part_of_the_tensors_is_said_to_be_one() -> None:
    for case in optim.cases():
        if case.size in ("ResNet-50", "5000x256") and case.dtype == "float32":
            shapes = optim._shapes(case, Implementation("reference", "fastops"))
            elements = sum(int(np.prod(shape)) for shape in shapes)
            assert 1e5 < elements < 1e7
            assert {1, 4} <= {len(shape) for shape in shapes} or case.size == "5000x256"


@pytest.mark.parametrize(
    "group", ["ema float32 5000x256", "adamw + ema float32 5000x256", "lazy rows float32 2000 of 30522x768"]
)
def test_a_wrong_step_is_never_timed(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(small(case) for case in optim.cases() if case.group == group)
    row = Implementation("numba", "numpy")
    optim.prepare(case, row).check()
    monkeypatch.setattr(
        optim, "_numpy", lambda case, lists: lambda: lists["p"][0].fill(1.5) or lists[min(lists)][-1].fill(3)
    )
    with pytest.raises(WrongResult, match=r"difference .* from the oracle"):
        optim.prepare(case, row).check()


@pytest.mark.parametrize("recipe", ["triple loop", "scalar lut"])
def test_numba_competitors_agree_with_the_oracle(recipe: str) -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    case = next(shrunk(case) for case in mitchell.cases() if case.group == "matmul float32 n=512")
    mitchell.prepare(case, Implementation(recipe, recipe)).check()


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ("mul float32 n=1e3", "relative difference"),
        ("mul uint8 n=1e5", "relative difference"),
        ("matmul float32 n=512", "sum of magnitudes"),
        ("lut_matmul uint8 n=512", "indexed table"),
    ],
)
def test_a_wrong_result_is_never_timed(group: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(shrunk(case) for case in mitchell.cases() if case.group == group)
    row = Implementation("reference", "fastops")
    mitchell.prepare(case, row).check()

    def exact_matmul(a: Any, b: Any, *rest: Any, out: Any, **options: Any) -> None:
        np.matmul(a, b, out=out, casting="unsafe")

    product = {"dtype": np.uint16} if case.dtype == "uint8" else {}
    wrong = SimpleNamespace(
        mitchell_op=lambda op, multiplier: functools.partial(np.multiply, **product),
        mitchell_matmul=exact_matmul,
        lut_matmul=exact_matmul,
    )
    monkeypatch.setattr(mitchell, "_module", lambda row: wrong)
    with pytest.raises(WrongResult, match=text):
        mitchell.prepare(case, row).check()


@pytest.mark.parametrize("group", ["mul float32 n=1e3", "matmul float32 n=512"])
def test_torch_rows_multiply_in_place(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(
        from_numpy=lambda array: array, set_num_threads=lambda n: None, mul=np.multiply, mm=np.matmul, __version__="0"
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    case = next(shrunk(case) for case in mitchell.cases() if case.group == group)
    rows = mitchell.implementations(case, dataclasses.replace(PLAIN, modules=frozenset(["torch"])))
    (row,) = [row for row in rows if row.recipe == "torch"]
    assert mitchell.prepare(case, row).check() <= tolerance.BENCH_EXACT


def test_aligned_copies_start_on_cache_lines() -> None:
    for slot in range(4):
        values = np.arange(1000, dtype=np.float32).reshape(10, 100)
        copy = aligned(values, slot)
        np.testing.assert_array_equal(copy, values)
        assert copy.ctypes.data % 64 == 0
        assert copy.ctypes.data % 4096 == slot * 17 * 64 % 4096


# Timing.


def test_batches_count_calls() -> None:
    calls: list[int] = []
    task = Task(calls.append, (1,), 1.0, 1.0, lambda: 0.0)
    assert worker.time_batch(task, 10) > 0
    # One untimed call first.
    assert len(calls) == 11


def test_calibration_fills_the_batch() -> None:
    data = np.ones(1000)
    count, once = worker.calibrate(Task(np.sum, (data,), 1.0, 1.0, lambda: 0.0), 0.01)
    assert 0.002 < count * once < 0.1


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="this system does not say")
def test_extra_memory_is_that_of_the_call() -> None:
    kept = np.ones(1 << 20)
    task = Task(lambda: (kept + 1).sum(), (), 1.0, 1.0, lambda: 0.0)
    # 8 MiB, besides what the allocator and the interpreter take.
    found = worker.extra_memory(task)
    assert found is not None
    assert 7e6 < found < 12e6
    assert (worker.extra_memory(Task(lambda: None, (), 1.0, 1.0, lambda: 0.0)) or 0.0) < 2e6


def test_worker_answers_failures_and_goes_on() -> None:
    answers = io.StringIO()
    requests = [{"action": "batch", "calls": 1}, {"action": "hello"}]
    worker.serve(iter(json.dumps(request) for request in requests), answers)
    failed, hello = map(json.loads, answers.getvalue().splitlines())
    assert failed["failed"].startswith("AssertionError")
    assert os.path.samefile(hello["file"], fastops.__file__)


def test_run_measures_and_compares(measured: runner.Run) -> None:
    (group,) = measured.groups
    exact, reference = group.measurements
    assert (exact.row.name, reference.row.name) == ("NumPy exact", "reference")
    assert len(exact.seconds) >= 3
    assert len(reference.seconds) >= 3
    ratio = group.ratio(reference, group.yardstick)
    assert ratio is not None
    assert ratio < 0.5
    assert group.noise is not None
    assert group.noise >= 0
    assert not measured.wrong
    assert measured.machine["libraries"]["numpy"] == np.__version__


class Recorded(runner.Worker):
    """A worker whose process the tests can look at."""

    everyone: list[Recorded] = []  # noqa: RUF012 (emptied by the fixture)

    def __init__(self, row: Implementation) -> None:
        super().__init__(row)
        self.everyone.append(self)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorded]]:
    Recorded.everyone.clear()
    monkeypatch.setattr(runner, "Worker", Recorded)
    yield Recorded.everyone
    Recorded.everyone.clear()


def test_every_competitor_has_its_process_and_none_is_left(recorded: list[Recorded]) -> None:
    runner.run([FIRST], PLAIN, SETTINGS)
    # Two rows and the twin of the A/A run.
    assert len({each.process.pid for each in recorded}) == 3
    assert all(each.process.poll() is not None for each in recorded)


def test_no_worker_outlives_a_failure(recorded: list[Recorded]) -> None:
    def interrupt(fraction: float, text: str) -> None:
        if "A/A" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run([FIRST], PLAIN, SETTINGS, interrupt)
    assert len(recorded) == 3
    assert all(each.process.poll() is not None for each in recorded)


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    genuine = runner._batch

    def batch(entry: Any, *rest: Any) -> None:
        order.append(entry.measurement.row.name)
        genuine(entry, *rest)

    monkeypatch.setattr(runner, "_batch", batch)
    monkeypatch.setattr(runner, "_noise", lambda *_: 0.0)
    runner.run([FIRST], PLAIN, SETTINGS)
    rounds = [set(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert len(rounds) >= 3
    assert all(names == {"NumPy exact", "reference"} for names in rounds)


def test_death_of_a_worker_costs_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = runner._batch

    def batch(entry: Any, workers: Any) -> None:
        if entry.measurement.row.name == "NumPy exact" and entry.key in workers.running:
            os.kill(workers.running[entry.key].process.pid, signal.SIGKILL)
        genuine(entry, workers)

    monkeypatch.setattr(runner, "_batch", batch)
    (group,) = runner.run([FIRST], PLAIN, SETTINGS).groups
    exact, reference = group.measurements
    assert exact.failed == "process ended with status -9"
    assert len(reference.seconds) >= 3
    assert group.yardstick is reference


def test_a_backend_that_does_not_import_costs_its_row_only() -> None:
    class Elsewhere(Implementation):
        def environment(self) -> dict[str, str]:
            return super().environment() | {"FASTOPS_BACKEND": "abacus"}

    broken = Elsewhere("broken", "fastops", "reference")
    with pytest.MonkeyPatch.context() as patch:
        rows = [broken, Implementation("reference", "fastops", threads=2)]
        patch.setattr(mitchell, "implementations", lambda case, machine: rows)
        (group,) = runner.run([FIRST], PLAIN, SETTINGS).groups
    assert re.match(r"process ended with status 1: ValueError: FASTOPS_BACKEND .*abacus", group.measurements[0].failed)
    assert group.measurements[1].seconds


def test_groups_beyond_the_budget_are_named() -> None:
    settings = dataclasses.replace(SETTINGS, budget=1e-3)
    outcome = runner.run(mitchell.cases()[:3], PLAIN, settings)
    assert len(outcome.groups) == 1
    (note,) = outcome.notes
    assert mitchell.cases()[1].group in note
    assert mitchell.cases()[2].group in note


def test_environment_keeps_pools_apart() -> None:
    env = Implementation("x", "fastops", "native", "v3", 2, (("OPENBLAS_CORETYPE", "SKYLAKEX"),)).environment()
    assert env["OMP_WAIT_POLICY"] == "passive"
    assert {env[f"{name}_NUM_THREADS"] for name in ("OMP", "OPENBLAS", "NUMBA", "FASTOPS")} == {"2"}
    assert (env["FASTOPS_TARGET"], env["FASTOPS_BACKEND"]) == ("v3", "native")
    assert env["OPENBLAS_CORETYPE"] == "SKYLAKEX"


def test_skylake_kernel_only_with_avx512() -> None:
    case = next(case for case in mitchell.cases() if case.group == "matmul float32 n=512")
    for targets, expected in ((("v3", "v2"), 0), (("v4", "v3", "v2"), 1)):
        rows = mitchell.implementations(case, Machine(("native", "reference"), targets, 1, frozenset()))
        assert sum("SkylakeX" in row.name for row in rows) == expected
        assert len({row.process for row in rows}) == len(rows)


# Verdicts.


@pytest.mark.parametrize(
    ("noise", "seconds", "expected"),
    [
        (0.01, [1.0, 1.02, 0.99], "2x faster"),
        (0.01, [4.0, 4.1, 3.9], "2x slower"),
        (0.01, [1.97, 1.98, 1.96], "same"),
        (0.01, [1.0, 3.0, 1.7], "same"),
        (0.031, [1.0, 1.02, 0.99], "noise too high"),
        (None, [1.0, 1.02, 0.99], "noise too high"),
    ],
)
def test_verdict(noise: float | None, seconds: list[float], expected: str) -> None:
    (group,) = result(noise, seconds=seconds).groups
    assert group.verdict(group.measurements[2]) == expected
    assert group.verdict(group.measurements[0]) == "yardstick"


def test_rows_timed_on_a_part_compare_by_rate() -> None:
    (group,) = result().groups
    exact, reference, ours = group.measurements
    assert group.ratio(reference, exact) == pytest.approx(0.05)
    assert group.ratio(ours, reference) == pytest.approx(40)


# Reports.


def test_table_on_a_terminal_has_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setenv("COLUMNS", "120")
    out = io.StringIO()
    report.print_table(result(), out)
    text = out.getvalue()
    for word in ("native v3", "2x", "faster", "yardstick", "same bits"):
        assert word in text


def test_tsv_has_numbers_and_one_header() -> None:
    out = io.StringIO()
    report.print_tsv(result(), out)
    header, *rows = [line.split("\t") for line in out.getvalue().splitlines()]
    assert all(len(row) == len(header) for row in rows)
    values = dict(zip(header, rows[2], strict=True))
    assert values["operation"] == FIRST.group
    assert float(values["seconds"]) == 1.0
    assert float(values["x_exact"]) == 2.0
    assert float(values["x_reference"]) == 40.0
    assert values["verdict"] == "2x faster"
    # What was timed on half of the problem is told for the whole.
    assert float(rows[1][header.index("seconds")]) == 40.0


def test_pytest_benchmark_reads_the_json(tmp_path: Path, measured: runner.Run) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(report.to_json(measured)), encoding="utf-8")
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert f"{FIRST.group}[NumPy exact]" in run.stdout


def test_json_names_no_host() -> None:
    assert os.uname().nodename not in json.dumps(report.to_json(result())) or len(os.uname().nodename) < 4


def test_compare_shows_ratios_not_times(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(report.to_json(result(seconds=[0.8, 0.8, 0.8]))), encoding="utf-8")
    old = report.read_old(str(path))
    last = [line.cells[-1] for line in report.lines(result(), old)]
    assert last == ["", "+0.0%", "-20.0%"]
    assert [line.cells[-1] for line in report.lines(result(noise=0.5), old)][2] == "noise too high"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"benchmarks": [{"group": 1}]}', "\x00"])
def test_compare_refuses_other_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"--compare: .*old\.json' is not JSON of 'fastops bench'"):
        report.read_old(str(path))


def test_html_is_self_contained_and_escaped(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    page = report.html(result(name="native <script>alert(1)</script>", seconds=[1.0, 1.02, 0.99]))
    assert page.count("<svg") == page.count("</svg>") == 1
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert len(page.encode()) < 1_000_000
    # Names of XML namespaces are no references.
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!\#)""", page)
    assert "url(http" not in page
    assert "@import" not in page
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)


def test_html_withholds_verdicts_of_noisy_groups() -> None:
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    page = report.html(result(noise=0.2))
    assert "A/A difference 20.0%: noise too high for a verdict" in page
    assert "2x faster" not in page


def test_lengths_are_drawn_where_memory_was_measured() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    outcome = result()
    with pytest.raises(ValueError, match="no operation was timed at three lengths"):
        report.lengths(outcome)
    cases = [
        case
        for case in attention.cases()
        if case.group.startswith("linear causal float32 1x8x") and case.shape[3] == 64
    ]
    assert [case.shape[0] for case in cases] == [512, 1024, 4096, 16384]
    outcome.groups = [
        runner.Group(
            case,
            [measurement(name, [1e-6 * case.shape[0]], memory=1e3 * case.shape[0]) for name in ("NumPy", "native v3")],
            0.01,
        )
        for case in reversed(cases)
    ]
    svg = report.lengths(outcome)
    for text in ("16,384", "native v3", "seconds", "MiB that a call takes"):
        assert text in svg
    (plot,) = report._size_plots(outcome)
    assert plot["title"] == "linear causal float32: time and memory over the length"
    assert report.to_json(outcome)["benchmarks"][0]["extra_info"]["memory"] == 1e3 * 16384


def test_picture_shows_times_the_rate_of_each_competitor() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    svg = report.picture(result())
    assert svg.startswith("<?xml")
    assert ">2x<" in svg
    assert ">40x<" in svg
    with pytest.raises(ValueError, match="no group has a row of ours"):
        report.picture(runner.Run([], {"cpu": "x"}, ""))


def test_markdown_has_a_column_for_each_level() -> None:
    outcome = result()
    outcome.machine["targets"] = ["v3", "v2"]
    heads, rule, row = report.markdown(outcome).splitlines()
    assert heads == "| operation | yardstick | v3 | v2 | reference | Numba | others |"
    assert rule.count("|") == heads.count("|")
    assert row == f"| {FIRST.group} | NumPy exact | 2 |  | 40 |  |  |"
    outcome.groups[0].noise = None
    assert report.markdown(outcome).splitlines()[2] == f"| {FIRST.group} | NumPy exact | ~2 |  | ~40 |  |  |"

    # A row of several threads has a column, and is compared with others of several.
    group = outcome.groups[0]
    ours = group.measurements[-1]
    for name, backend in (("native v3, 4 threads", "native"), ("peer, 4 threads", "")):
        row_of_many = dataclasses.replace(ours.row, name=name, backend=backend, threads=4)
        group.measurements.append(dataclasses.replace(ours, row=row_of_many))
    heads, _, row = report.markdown(outcome).splitlines()
    assert heads == "| operation | yardstick | v3 | v2 | v3, 4 threads | reference | Numba | others |"
    assert row == f"| {FIRST.group} | NumPy exact | ~2 |  | ~2 | ~40 |  | peer, 4 threads: ~1 |"

    # A call through a framework is one of the others.
    framework = dataclasses.replace(ours.row, name=f"{ours.row.name}, fastops.jax by ffi")
    group.measurements[:] = [*group.measurements[:-2], dataclasses.replace(ours, row=framework)]
    assert report.markdown(outcome).splitlines()[2].endswith("| fastops.jax by ffi: ~1 |")


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234e-9, "1.23 ns"), (4.5e-5, "45 us"), (0.0123, "12.3 ms"), (61.0, "61 s")]
)
def test_seconds_have_three_digits_and_a_unit(seconds: float, text: str) -> None:
    assert report.seconds_text(seconds) == text


@pytest.mark.parametrize("case", torch_cases.cases(), ids=lambda case: case.group)
def test_every_row_of_tensors_agrees_with_the_call_on_arrays(case: Case) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    machine = Machine.probe(threads=1)
    if case.unit == "token":
        case = dataclasses.replace(case, shape=(1, 2, min(case.shape[2], 96), 8))
    elif "adamw" not in case.op:
        case = dataclasses.replace(case, shape=SMALL[case.unit])
    elif case.size == "ResNet-50":
        pytest.skip("takes a second")
    rows = torch_cases.implementations(case, machine)
    assert [row.recipe for row in rows] == ["peer", "fastops", "tensors"]
    assert rows[1].name in case.yardsticks
    for row in rows:
        task = torch_cases.prepare(case, row)
        assert 0 <= task.check() < tolerance.BENCH_ROW
        task.call(*task.args)
        assert 0 < task.work <= task.whole


def test_tensors_have_no_rows_without_torch() -> None:
    assert torch_cases.implementations(torch_cases.cases()[0], PLAIN) == []


@pytest.mark.parametrize("case", jax_cases.cases(), ids=lambda case: case.group)
def test_every_row_of_jax_agrees_with_the_call_on_arrays(case: Case) -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    machine = Machine.probe(threads=1)
    small = (1, 2, min(case.shape[2], 96), 8) if case.unit == "token" else SMALL[case.unit]
    case = dataclasses.replace(case, shape=small)
    rows = jax_cases.implementations(case, machine)
    from fastops.jax import get_route, set_route

    before = get_route()
    routes = ["ffi", "callback"] if before == "ffi" else ["callback"]
    assert [row.recipe for row in rows] == ["peer", "fastops", *routes]
    assert rows[1].name in case.yardsticks
    for row in rows:
        task = jax_cases.prepare(case, row)
        assert 0 <= task.check() < tolerance.BENCH_ROW
        task.call(*task.args)
        assert 0 < task.work <= task.whole
    set_route(before)


def test_jax_has_no_rows_without_jax() -> None:
    assert jax_cases.implementations(jax_cases.cases()[0], PLAIN) == []
