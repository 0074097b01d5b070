# SPDX-License-Identifier: BSD-3-Clause
"""pytest-benchmark over the cases of fastops.bench: group = operation and size, row = implementation.

    pytest bench --benchmark-group-by=group -k "mitchell and matmul and not 1024"

Rows share this process and one thread; `fastops bench` gives each a process of its own and is the one to quote.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import pytest

import fastops
from fastops.bench import FAMILIES
from fastops.bench.case import Case, Implementation, Machine

MACHINE = Machine.probe(threads=1)
MODULES = {family: importlib.import_module(f"fastops.bench.{family}") for family in FAMILIES}
ROWS = [
    pytest.param(case, row, id=f"{family}-{case.group}-{row.name}")
    for family, module in MODULES.items()
    for case in module.cases()
    for row in module.implementations(case, MACHINE)
    # Another BLAS kernel needs a process of its own.
    if not row.env
]


@pytest.mark.parametrize(("case", "row"), ROWS)
def bench_families(benchmark: Any, case: Case, row: Implementation) -> None:
    level = fastops.target(row.target) if row.target and fastops.show_config("dict")["backend"] == "native" else None
    with level or contextlib.nullcontext():
        task = MODULES[case.family].prepare(case, row)
        benchmark.group = case.group
        if task.work < task.whole:
            benchmark.name += f" (1/{task.whole / task.work:.0f} of the problem)"
        benchmark.extra_info.update(error=task.check(), work=task.work, unit=case.unit, note=task.note)
        benchmark(task.call, *task.args)
