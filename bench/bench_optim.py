# SPDX-License-Identifier: BSD-3-Clause
"""pytest-benchmark over the cases of fastops.bench.optim: group = operation and set of tensors, row = implementation.

    pytest bench/bench_optim.py --benchmark-group-by=group -k "adamw and ResNet"

Rows share this process and one thread; `fastops bench` gives each a process of its own and is the one to quote.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

import fastops
from fastops.bench import optim
from fastops.bench.case import Case, Implementation, Machine

MACHINE = Machine.probe(threads=1)
ROWS = [
    pytest.param(case, row, id=f"{case.group}-{row.name}")
    for case in optim.cases()
    for row in optim.implementations(case, MACHINE)
]


@pytest.mark.parametrize(("case", "row"), ROWS)
def bench_optim(benchmark: Any, case: Case, row: Implementation) -> None:
    level = fastops.target(row.target) if row.target and fastops.show_config("dict")["backend"] == "native" else None
    with level or contextlib.nullcontext():
        task = optim.prepare(case, row)
        benchmark.group = case.group
        if task.work < task.whole:
            benchmark.name += f" (1/{task.whole / task.work:.0f} of the problem)"
        benchmark.extra_info.update(error=task.check(), work=task.work, unit=case.unit, note=task.note)
        benchmark(task.call, *task.args)
