# SPDX-License-Identifier: BSD-3-Clause
"""Each cell of the tables in docs/optim.md is a test, over every backend and CPU level."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from numpy.typing import NDArray
from pages import DOCS, table
from samples import assert_same_bits, bfloat16

import fastops
from fastops import averaging, optim

Array = NDArray[Any]
PAGE = DOCS / "optim.md"
ERRORS: dict[str, type[Exception]] = {"`TypeError`": TypeError, "`ValueError`": ValueError}


@pytest.fixture(autouse=True)
def _over(backend: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions on the backend under test."""
    monkeypatch.setattr(optim, "_backend", backend)
    monkeypatch.setattr(averaging, "_backend", backend)


def grid(heading: str) -> list[tuple[str, str, str]]:
    """Row, column and text of every cell."""
    head, *body = table(PAGE, heading)
    return [(row[0], column, text) for row in body for column, text in zip(head[1:], row[1:], strict=True)]


def dtype_of(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        if bfloat16 is None:
            pytest.skip("ml_dtypes is not installed")
        return np.dtype(bfloat16)
    return np.dtype(name)


DTYPES = grid("shadow of `ema_update_`")


@pytest.mark.parametrize(("row", "column", "text"), DTYPES)
def test_dtype(row: str, column: str, text: str) -> None:
    name, _, rounding = row.partition(", ")
    shadow, p = np.full(3, 1, dtype_of(name)), np.full(3, 3, dtype_of(column))
    options: dict[str, Any] = {"rounding": "stochastic", "seed": 1} if rounding else {}
    if text in ERRORS:
        with pytest.raises(ERRORS[text]):
            fastops.ema_update_([shadow], [p], 0.5, **options)
        assert (shadow == 1).all()
    else:
        assert text == "yes"
        fastops.ema_update_([shadow], [p], 0.5, **options)
        assert (shadow == 2).all()


STEPS = grid("list of a step")


@pytest.mark.parametrize(("row", "column", "text"), STEPS)
def test_dtype_of_a_step(row: str, column: str, text: str) -> None:
    main = np.dtype(column.removeprefix("with ").removesuffix(" parameters"))
    for name in ("float16", "bfloat16", "float32", "float64", "int64"):
        if name == "bfloat16" and bfloat16 is None:
            continue
        other = np.zeros(2, dtype_of(name))
        p, g, m, v = (np.zeros(2, main) for _ in range(4))
        calls: list[Callable[[], Any]] = {
            "gradients": [
                lambda p=p, g=other, m=m: fastops.sgd_step_([p], [g], [m], lr=0.1),
                lambda p=p, g=other, m=m, v=v: fastops.adamw_step_([p], [g], [m], [v], step=1, lr=0.1),
                lambda p=p, g=other: fastops.eg_step_([p], [g], lr=0.1),
            ],
            "momentum, moments, slow weights": [
                lambda p=p, g=g, m=other: fastops.sgd_step_([p], [g], [m], lr=0.1),
                lambda p=p, g=g, m=other, v=v: fastops.adamw_step_([p], [g], [m], [v], step=1, lr=0.1),
                lambda p=p, g=g, m=m, v=other: fastops.adamw_step_([p], [g], [m], [v], step=1, lr=0.1),
                lambda p=p, q=other: fastops.lookahead_sync_([q], [p]),
            ],
            "`ema`": [
                lambda p=p, g=g, s=other: fastops.sgd_step_([p], [g], None, lr=0.1, ema=[s], ema_decay=0.5),
                lambda p=p, g=g, m=m, v=v, s=other: fastops.adamw_step_(
                    [p], [g], [m], [v], step=1, lr=0.1, ema=[s], ema_decay=0.5
                ),
            ],
        }[row]
        for call in calls:
            if name in text.split(", "):
                call()
            else:
                with pytest.raises(TypeError):
                    call()
    for name in ("float16", "bfloat16", "int64"):
        if name == "bfloat16" and bfloat16 is None:
            continue
        half = [np.zeros(2, dtype_of(name))]
        with pytest.raises(TypeError):
            fastops.sgd_step_(half, [half[0].copy()], None, lr=0.1)


EMA_DTYPES = list(table(PAGE, "array of `EMA`"))[1:]


@pytest.mark.parametrize("cells", EMA_DTYPES, ids=lambda cells: cells[0])
def test_dtype_of_ema(cells: list[str]) -> None:
    name, _, option = cells[0].partition(", ")
    options = {} if not option else {"buffers": option.split('"')[1]}
    p = np.full(3, 3, dtype_of(name))
    for text, asked in ((cells[1], {}), (cells[2], {"shadow_dtype": "float64"})):
        shadows = fastops.EMA([p], 0.5, **options, **asked).shadows
        assert [str(shadow.dtype) for shadow in shadows] == ([] if text == "none" else [text])
    ema = fastops.EMA([p], 0.5, **options)
    with ema.average_parameters():
        assert p.dtype == dtype_of(name if cells[3] == "none" else cells[3])
        assert (p == 3).all()


DECAYS = grid("`decay`")


@pytest.mark.parametrize(("row", "column", "text"), DECAYS)
def test_decay(row: str, column: str, text: str) -> None:
    decay = eval(row, {"nan": np.nan, "inf": np.inf})
    special = [1.5, np.nan, np.inf, -0.0]
    shadow = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    p = np.array(special if text.endswith("exactly") else [3.0, 4.0, 5.0, 6.0], np.float32)
    if text == "s, exactly":
        shadow, p = p, shadow
    before = shadow.copy()
    if text in ERRORS:
        with pytest.raises(ERRORS[text]):
            fastops.ema_update_([shadow], [p], decay)
        assert_same_bits(shadow, before)
        return
    fastops.ema_update_([shadow], [p], decay)
    assert_same_bits(shadow, {"p, exactly": p, "s, exactly": before, "the average": before + np.float32(1)}[text])


VALUES = grid("0 < decay < 1")
NUMBERS = {"finite": (1.0, -2.5, 0.0), "±inf": (np.inf, -np.inf), "nan": (np.nan,)}


@pytest.mark.parametrize(("row", "column", "text"), VALUES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_value(row: str, column: str, text: str, dtype: str) -> None:
    first, second = (NUMBERS[name.replace("=", " ").split()[-1]] for name in (row, column))
    for s, p, decay in itertools.product(first, second, (0.25, 0.5, 0.75, 0.999)):
        shadow = np.full(5, s, dtype)
        with np.errstate(all="raise"):
            fastops.ema_update_([shadow], [np.full(5, p, dtype)], decay)
        if text == "nan":
            assert np.isnan(shadow).all()
        elif text == "not finite":
            assert not np.isfinite(shadow).any()
        else:
            assert text == "the average"
            want = s + (1 - decay) * (p - s)
            np.testing.assert_allclose(shadow, want, rtol=0, atol=tolerance.average(1, 2.5, shadow.dtype))


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def threes(*shape: int) -> Array:
    return np.full(shape, 3, np.float32)


def frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array


def twice(array: Array) -> list[Array]:
    return [array, array]


def overlapping() -> tuple[Any, Any]:
    base = ones(7)
    return [base[:4]], [base[3:]]


def itself() -> tuple[Any, Any]:
    base = ones(4)
    return [base], [base]


def strided() -> tuple[Any, Any]:
    values = np.random.default_rng(0).standard_normal((2, 8, 6, 10)).astype(np.float32)
    return [values[0, ::2, ::-1, 1::3].T], [values[1, 1::2, :, 9:0:-3].T]


# Shadows of ones and parameters of threes, unless the row wants other values.
LISTS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "lists of different lengths": lambda: ([ones(3), ones(3)], [threes(3)]),
    "a shadow of another shape": lambda: ([ones(3), ones(3)], [threes(3), threes(4)]),
    "a shadow to broadcast to": lambda: ([ones(3, 4)], [threes(4)]),
    "a read-only shadow": lambda: ([ones(3), frozen(ones(3))], [threes(3), threes(3)]),
    "a read-only parameter": lambda: ([ones(3)], [frozen(threes(3))]),
    "a shadow that is its parameter": itself,
    "a shadow that overlaps its parameter": overlapping,
    "the same shadow twice": lambda: (twice(ones(3)), [threes(3), threes(3)]),
    "the same parameter twice": lambda: ([ones(3), ones(3)], twice(threes(3))),
    "a shadow whose elements overlap": lambda: ([np.lib.stride_tricks.as_strided(ones(1), (3,), (0,))], [threes(3)]),
    "a parameter broadcast by NumPy": lambda: ([ones(3, 4)], [np.broadcast_to(threes(4), (3, 4))]),
    "strided, transposed or reversed arrays": strided,
    "swapped byte order": lambda: ([ones(3), ones(3).astype(">f4")], [threes(3), threes(3)]),
    "a masked array": lambda: ([ones(3)], [np.ma.masked_array(threes(3))]),
    "an empty list": lambda: ([], []),
    "tensors without elements": lambda: ([ones(0, 3)], [threes(0, 3)]),
    "0-d arrays": lambda: ([np.array(1.0)], [np.array(3.0)]),
    "an array in place of a list": lambda: (ones(3), threes(3)),
    "a list of numbers": lambda: ([ones(3)], [3.0]),
}
ROWS = list(table(PAGE, "`ema_update_` with"))[1:]


def test_every_row_has_a_case() -> None:
    assert [row[0] for row in ROWS] == list(LISTS)


@pytest.mark.parametrize(("row", "text"), ROWS)
def test_list(row: str, text: str) -> None:
    shadows, params = LISTS[row]()
    if text in ERRORS:
        with pytest.raises(ERRORS[text]):
            fastops.ema_update_(shadows, params, 0.5)
        assert all((shadow == 1).all() for shadow in shadows)
    elif text == "right":
        fastops.ema_update_(shadows, params, 0.5)
        assert all((shadow == 2).all() for shadow in shadows)
    else:
        assert text == "right, the bits of contiguous ones"
        want = [np.ascontiguousarray(shadow) for shadow in shadows]
        fastops.ema_update_(want, [np.ascontiguousarray(p) for p in params], 0.9)
        fastops.ema_update_(shadows, params, 0.9)
        for got, plain in zip(shadows, want, strict=True):
            assert_same_bits(got, plain)


SCHEDULES = list(table(PAGE, "`EMA` | decay"))


@pytest.mark.parametrize("cells", SCHEDULES[1:], ids=lambda cells: cells[0])
def test_schedule(cells: list[str]) -> None:
    options = eval(f"dict({cells[0].strip('`')})")
    ema, late = fastops.EMA([], **options), fastops.EMA([], **options, update_after_step=5)
    assert late.decay_at(5) == 0.0
    for head, text in zip(SCHEDULES[0][2:], cells[2:], strict=True):
        t = int(head.removeprefix("t = "))
        assert abs(ema.decay_at(t + 1) - float(text)) <= tolerance.printed(6)
        assert late.decay_at(t + 6) == ema.decay_at(t + 1)


def test_tables_are_complete() -> None:
    counts = [len(found) for found in (DTYPES, STEPS, EMA_DTYPES, DECAYS, VALUES, ROWS, SCHEDULES)]
    assert counts == [42, 6, 7, 11, 9, 19, 8]
