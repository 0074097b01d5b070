# SPDX-License-Identifier: BSD-3-Clause
"""Measures groups of implementations: one process each, rounds interleaved, the oracle asked first, noise known."""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib
import json
import os
import platform
import selectors
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fastops._config import affinity
from fastops.bench.case import PEERS, Case, Implementation, Machine

# Two runs of the same code may differ by this much before verdicts are withheld.
NOISE_LIMIT = 0.03
Progress = Callable[[float, str], None]


def ratio_text(ratio: float | None) -> str:
    """Three digits or whole numbers, nothing for None."""
    if ratio is None:
        return ""
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


class WorkerDied(Exception):
    """A worker ended, or did not answer in time."""


class Worker:
    """One competitor's process."""

    def __init__(self, row: Implementation) -> None:
        self.row = row
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fastops.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=_worker_environment(row),
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.buffer = b""
        self.answered = False

    def send(self, **request: Any) -> None:
        """Hand over one request."""
        try:
            self.stdin.write(json.dumps(request).encode() + b"\n")
            self.stdin.flush()
        except OSError as problem:
            raise WorkerDied(self.obituary()) from problem

    def receive(self, seconds: float) -> dict[str, Any]:
        """The answer to the last request; WorkerDied when there is none within `seconds`."""
        seconds = max(seconds, 0.05)
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                left = end - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise WorkerDied(f"no answer within {seconds:.3g} s")
                data = os.read(self.stdout.fileno(), 1 << 16)
                if not data:
                    raise WorkerDied(self.obituary())
                self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        self.answered = True
        return answer

    def ask(self, wait: float, /, **request: Any) -> dict[str, Any]:
        """Send and receive."""
        self.send(**request)
        return self.receive(wait)

    def obituary(self) -> str:
        """How the process ended, with the last line that it printed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1][:150]}" if lines else ""
        return f"process ended with status {self.process.returncode}{last}"

    def close(self) -> None:
        """End the process, at once."""
        self.process.kill()
        self.process.wait()
        for stream in (self.stdin, self.stdout, self.errors):
            with contextlib.suppress(OSError):
                stream.close()


def _worker_environment(row: Implementation) -> dict[str, str]:
    import fastops

    environment = {k: v for k, v in os.environ.items() if k not in ("FASTOPS_TARGET", "OPENBLAS_CORETYPE")}
    environment |= row.environment()
    # The worker must import the package that this process runs, also from a source tree.
    root = str(Path(fastops.__file__).resolve().parents[1])
    if root not in {str(Path(sysconfig.get_path(name)).resolve()) for name in ("purelib", "platlib")}:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return environment


@dataclass
class Measurement:
    """One row's figures: the seconds a call of each round, a call being `work` of the problem's `whole` units.

    `memory`: bytes that a call takes at its peak, its result among them; None where that was not measured.
    """

    row: Implementation
    work: float = 0.0
    whole: float = 0.0
    error: float | None = None
    calls: int = 0
    seconds: list[float] = field(default_factory=list)
    note: str = ""
    memory: float | None = None
    failed: str = ""
    wrong: bool = False

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the seconds a call."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(low), float(high)

    @property
    def scale(self) -> float:
        """How many calls the whole problem is: 1 unless the row is slow and was timed on a part."""
        return self.whole / self.work

    @property
    def rate(self) -> float:
        """Units of work a second."""
        return self.work / self.median


@dataclass
class Group:
    """A case's rows and the difference of its A/A run; `noise` is None where there was none."""

    case: Case
    measurements: list[Measurement]
    noise: float | None = None

    @property
    def yardstick(self) -> Measurement | None:
        """The row that ratios are taken to: by the case's preference, among those that were timed."""
        for prefix in self.case.yardsticks:
            for measurement in self.measurements:
                if measurement.seconds and measurement.row.name.startswith(prefix):
                    return measurement
        return None

    @property
    def reference(self) -> Measurement | None:
        """The plain NumPy row, when it was timed."""
        return next((m for m in self.measurements if m.row.name == "reference" and m.seconds), None)

    @property
    def noisy(self) -> bool:
        """Whether verdicts are withheld."""
        return self.noise is None or self.noise > NOISE_LIMIT

    def ratio(self, measurement: Measurement, base: Measurement | None) -> float | None:
        """How many times the rate of `base`."""
        if base is None or not measurement.seconds:
            return None
        return measurement.rate / base.rate

    def verdict(self, measurement: Measurement) -> str:
        """In words, against the yardstick; withheld where the A/A run differed too much."""
        base = self.yardstick
        ratio = self.ratio(measurement, base)
        if measurement.failed:
            return measurement.failed
        if ratio is None or base is None:
            return ""
        if base is measurement:
            return "yardstick"
        if self.noisy:
            return "noise too high"
        ours = [seconds / measurement.work for seconds in measurement.quartiles]
        theirs = [seconds / base.work for seconds in base.quartiles]
        overlap = ours[0] <= theirs[1] and theirs[0] <= ours[1]
        if abs(ratio - 1) <= NOISE_LIMIT or overlap:
            return "same"
        return f"{ratio_text(ratio)}x faster" if ratio > 1 else f"{ratio_text(1 / ratio)}x slower"


@dataclass
class Run:
    """Everything that one call of `fastops bench` measured."""

    groups: list[Group]
    machine: dict[str, Any]
    started: str
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """Rows whose result was not the oracle's."""
        return [f"{g.case.group}, {m.row.name}" for g in self.groups for m in g.measurements if m.wrong]


@dataclass(frozen=True)
class Settings:
    """How long to measure, in seconds (run, batch, wait for a compilation), and how many rounds a group gets.

    `grace` is what may be waited for beyond the budget before every wait ends: then the run is over.
    """

    budget: float
    batch: float
    rounds: int
    patience: float
    grace: float = 10.0

    @staticmethod
    def of(quick: bool, budget: float | None = None) -> Settings:
        """The quick or the full setting; `budget` replaces its seconds."""
        if quick:
            return Settings(budget or 42.0, 0.004, 15, 15.0, 8.0)
        return Settings(budget or 300.0, 0.02, 31, 60.0)


class Workers:
    """Processes by key, started when first wanted."""

    def __init__(self, settings: Settings, end: float) -> None:
        self.settings, self.end = settings, end
        self.running: dict[str, Worker] = {}
        self.broken: dict[str, str] = {}

    def get(self, key: str, row: Implementation) -> Worker:
        """The running worker of a key, or a new one; WorkerDied again where it could not even start."""
        if key in self.broken:
            raise WorkerDied(self.broken[key])
        if key not in self.running:
            self.running[key] = Worker(row)
        return self.running[key]

    def wait(self) -> float:
        """Seconds that an answer may take."""
        return min(self.settings.patience, self.end - time.monotonic())

    def drop(self, key: str) -> None:
        """End one worker."""
        self.running.pop(key).close()

    def keep(self, keys: Iterable[str]) -> None:
        """End the workers that no later group wants."""
        for key in set(self.running) - set(keys):
            self.drop(key)


@contextlib.contextmanager
def _workers(settings: Settings, end: float) -> Iterator[Workers]:
    workers = Workers(settings, end)
    try:
        yield workers
    finally:
        workers.keep(())


@dataclass
class _Entry:
    """A row on its way through a group: the measurement, and the key of its process ("|twin" at its end: of the A/A run)."""

    measurement: Measurement
    key: str


def run(
    cases: Sequence[Case],
    machine: Machine,
    settings: Settings,
    progress: Progress = lambda fraction, text: None,
) -> Run:
    """Measure every case within the settings' budget, the later groups left out when it is used up."""
    begin = time.monotonic()
    started = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    end = begin + settings.budget
    plan = []
    for case in cases:
        rows = importlib.import_module(f"fastops.bench.{case.family}").implementations(case, machine)
        if rows:
            plan.append((case, rows))
    result = Run([], describe(machine), started)
    left_out = []
    with _workers(settings, end + settings.grace) as workers:
        for index, (case, rows) in enumerate(plan):
            if index and time.monotonic() > end:
                left_out.append(case.group)
                continue
            share = (end - time.monotonic()) / (len(plan) - index)
            report = _part_of(progress, index / len(plan), 1 / len(plan), case.group)
            group, libraries = _measure(case, rows, machine, share, workers, report)
            result.groups.append(group)
            result.machine["libraries"] |= libraries
            later = {row.process for _, future in plan[index + 1 :] for row in future}
            workers.keep(key for key in workers.running if key.removesuffix("|twin") in later)
    if left_out:
        result.notes.append(f"left out, the {settings.budget:.0f} s were used up: {', '.join(left_out)}")
    result.seconds = time.monotonic() - begin
    progress(1.0, "")
    return result


def _part_of(progress: Progress, start: float, width: float, group: str) -> Callable[[float, str], None]:
    return lambda fraction, text: progress(start + width * min(fraction, 1.0), f"{group}: {text}")


def _measure(
    case: Case,
    rows: Sequence[Implementation],
    machine: Machine,
    share: float,
    workers: Workers,
    report: Progress,
) -> tuple[Group, dict[str, str]]:
    begin = time.monotonic()
    entries = [_Entry(Measurement(row), row.process) for row in rows]
    subject = _subject(entries, machine)
    twin = _twin(subject)
    report(0.0, "prepares")
    libraries = _prepare(case, [*entries, twin], workers)
    if subject.measurement.failed and any(not entry.measurement.failed for entry in entries):
        subject = _subject([entry for entry in entries if not entry.measurement.failed], machine)
        twin = _twin(subject)
        libraries |= _prepare(case, [twin], workers)
    for entry in [*entries, twin]:
        _calibrate(entry, workers)
    report(0.2, "A/A run")
    noise = _noise(subject, twin, begin + share / 2, workers)
    subject.measurement.seconds.clear()
    alive = entries
    end = begin + share
    rounds = workers.settings.rounds
    for number in range(rounds):
        alive = [entry for entry in alive if not entry.measurement.failed]
        if not alive or (number >= 3 and time.monotonic() > end):
            break
        report(0.3 + 0.7 * number / rounds, f"round {number + 1}")
        turn = number % len(alive)
        for entry in alive[turn:] + alive[:turn]:
            # A row too slow for its share gives three rounds, the others go on.
            if number < 3 or entry.measurement.median * entry.measurement.calls < share / 20:
                _batch(entry, workers)
    for entry in [*entries, twin]:
        worker = workers.running.get(entry.key)
        if worker is not None:
            with contextlib.suppress(WorkerDied):
                worker.ask(10, action="release")
    return Group(case, [entry.measurement for entry in entries], noise), libraries


def _subject(entries: Sequence[_Entry], machine: Machine) -> _Entry:
    """The row that the A/A run repeats: our best backend and level among `entries`, on one thread."""

    def rank(entry: _Entry) -> tuple[bool, int, int]:
        row = entry.measurement.row
        level = machine.targets.index(row.target) if row.target in machine.targets else len(machine.targets)
        backend = machine.backends.index(row.backend) if row.backend in machine.backends else len(machine.backends)
        return row.recipe != "fastops" or row.threads != 1, backend, level

    return min(entries, key=rank)


def _twin(subject: _Entry) -> _Entry:
    return _Entry(Measurement(subject.measurement.row), subject.key + "|twin")


def _fail(entry: _Entry, workers: Workers, problem: WorkerDied) -> None:
    entry.measurement.failed = str(problem)
    if entry.key in workers.running:
        if not workers.running[entry.key].answered and workers.running[entry.key].process.poll() is not None:
            workers.broken[entry.key] = str(problem)
        workers.drop(entry.key)


def _prepare(case: Case, entries: Sequence[_Entry], workers: Workers) -> dict[str, str]:
    """Inputs, compilation and the check against the oracle, in all processes at once: nothing is timed here."""
    end = time.monotonic() + workers.wait()
    for entry in entries:
        try:
            worker = workers.get(entry.key, entry.measurement.row)
            row = asdict(entry.measurement.row)
            worker.send(action="prepare", family=case.family, group=case.group, row=row)
        except WorkerDied as problem:
            _fail(entry, workers, problem)
    libraries: dict[str, str] = {}
    for entry in entries:
        measurement = entry.measurement
        if measurement.failed:
            continue
        try:
            answer = workers.running[entry.key].receive(end - time.monotonic())
        except WorkerDied as problem:
            _fail(entry, workers, problem)
            continue
        if "failed" in answer:
            measurement.failed = answer["failed"]
            measurement.wrong = answer["failed"].startswith("WrongResult")
            continue
        measurement.error, measurement.note = answer["error"], answer["note"]
        measurement.work, measurement.whole = answer["work"], answer["whole"]
        measurement.memory = answer["memory"]
        for name, version in answer["libraries"].items():
            libraries[f"blas ({measurement.row.name})" if name == "blas" else name] = version
    return libraries


def _calibrate(entry: _Entry, workers: Workers) -> None:
    if entry.measurement.failed:
        return
    try:
        answer = workers.running[entry.key].ask(workers.wait(), action="calibrate", seconds=workers.settings.batch)
        entry.measurement.calls = answer["calls"]
    except WorkerDied as problem:
        _fail(entry, workers, problem)


def _batch(entry: _Entry, workers: Workers) -> None:
    if entry.measurement.failed:
        return
    try:
        worker = workers.running[entry.key]
        answer = worker.ask(workers.wait(), action="batch", calls=entry.measurement.calls)
        entry.measurement.seconds.append(answer["seconds"])
    except WorkerDied as problem:
        _fail(entry, workers, problem)


def _noise(subject: _Entry, twin: _Entry, end: float, workers: Workers) -> float | None:
    """Relative difference of two processes' medians that do the same; more rounds until `end` where it is high."""
    if subject.measurement.failed or twin.measurement.failed:
        return None
    twin.measurement.calls = subject.measurement.calls
    difference = None
    most = workers.settings.rounds
    for number in range(2 * most):
        for entry in (subject, twin) if number % 2 else (twin, subject):
            _batch(entry, workers)
        if len(subject.measurement.seconds) <= number or len(twin.measurement.seconds) <= number:
            return None
        medians = subject.measurement.median, twin.measurement.median
        difference = max(medians) / min(medians) - 1
        if number >= 4 and (time.monotonic() > end or (number >= most // 2 and difference <= NOISE_LIMIT)):
            break
    return difference


def describe(machine: Machine) -> dict[str, Any]:
    """Versions, machine, levels and threads; no host name."""
    import fastops

    config = fastops.show_config("dict")
    libraries = {}
    for name in ("fastops", "numpy", *PEERS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            libraries[name] = metadata.version(name)
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "cpu": _cpu(config),
        "cpus": affinity(),
        "python_version": platform.python_version(),
        "python_implementation": platform.python_implementation(),
        "backends": list(machine.backends),
        "targets": list(machine.targets),
        "threads": machine.threads,
        "libraries": libraries,
        "fastops_config": config,
    }


def _cpu(config: dict[str, Any]) -> str:
    """The CPU's name from the package's own probe, else from Linux."""
    name: str = config["cpu"]
    if not name.startswith("unknown"):
        return name
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
