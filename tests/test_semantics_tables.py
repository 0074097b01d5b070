# SPDX-License-Identifier: BSD-3-Clause
"""Each cell of the special-value tables in docs/mitchell.md is a test, over every backend, CPU level and float type."""

import itertools
import re
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import tolerance
from pages import DOCS, table
from samples import FLOATS

PAGE = DOCS / "mitchell.md"
VALUES = {
    "±0": (0.0, -0.0),
    "+0": (0.0,),
    "-0": (-0.0,),
    "±inf": (np.inf, -np.inf),
    "+inf": (np.inf,),
    "-inf": (-np.inf,),
    "nan": (np.nan,),
    "finite": (1.0, -1.5, 3.75, -0.0625),
    "negative": (-1.0, -2.5, -0.375),
}
FLAGS = {"invalid": "invalid value", "divide": "divide by zero"}
EXACT = {
    "mul": np.multiply,
    "div": np.divide,
    "square": np.square,
    "reciprocal": np.reciprocal,
    "exp2": np.exp2,
}


class Cell(NamedTuple):
    op: str
    operands: tuple[str, ...]
    text: str


def cells() -> list[Cell]:
    found = []
    for op in ("mul", "div"):
        head, *body = table(PAGE, f"`mitchell_{op}`")
        columns = [column.removeprefix("b = ").removeprefix("b ") for column in head[1:]]
        for row in body:
            operand = row[0].removeprefix("a = ").removeprefix("a ")
            found += [Cell(op, (operand, column), text) for column, text in zip(columns, row[1:], strict=True)]
    head, *body = table(PAGE, "function | -inf")
    for row in body:
        op = row[0].strip("`").removeprefix("mitchell_")
        found += [Cell(op, (column,), text) for column, text in zip(head[1:], row[1:], strict=True)]
    return found


CELLS = cells()


def test_tables_are_complete() -> None:
    assert len(CELLS) == 2 * 16 + 6 * 6
    assert {cell.op for cell in CELLS} == {"mul", "div", "square", "reciprocal", "sqrt", "rsqrt", "log2", "exp2"}


def expected(cell: Cell, values: tuple[float, ...]) -> float | None:
    """The value that a cell states for these operands; None where it only says that the rule gives a finite one."""
    text = re.sub(r"[,;] .*$", "", cell.text)
    if text in ("by the rule", "M(a", "D(a"):
        return None
    sign = 1.0
    for value in values:
        sign *= np.copysign(1.0, value)
    stated = {"±0": np.copysign(0.0, sign), "±inf": np.copysign(np.inf, sign)}
    return stated[text] if text in stated else float(text)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join((cell.op, *cell.operands)).replace("±", "both"))
def test_cell(backend: ModuleType, target: str, cell: Cell, dtype: str) -> None:
    raised: set[str] = set()
    flags = {name for word, name in FLAGS.items() if f"*{word}*" in cell.text}
    kind = FLOATS[dtype]
    for values in itertools.product(*(VALUES[operand] for operand in cell.operands)):
        raised.clear()
        with np.errstate(all="call", call=lambda name, _: raised.add(name)):
            result = getattr(backend, f"mitchell_{cell.op}")(*(np.array([value], kind) for value in values))
        assert result.dtype == kind
        got, want = float(result[0]), expected(cell, values)
        if want is None:
            exact = EXACT[cell.op](*values)
            assert np.isfinite(got)
            slack = tolerance.rounding(kind)
            assert 8 / 9 - slack <= got / exact <= 9 / 8 + slack, (values, got)
        elif np.isnan(want):
            assert np.isnan(got), (values, got)
        else:
            assert (got, np.signbit(got)) == (want, np.signbit(want)), (values, got)
        assert raised == flags, values
