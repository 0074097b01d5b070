# SPDX-License-Identifier: BSD-3-Clause
"""The Markdown tables of the documentation, for the tests that hold each cell to what it says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def table(page: Path, heading: str) -> Iterator[list[str]]:
    """The cells of the table whose head begins so, the head first."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} | "))
    for line in itertools.takewhile(lambda text: text.startswith("|"), lines[start:]):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not set(cells[0]) <= {"-", " "}:
            yield cells
