# SPDX-License-Identifier: BSD-3-Clause
"""The tables of the native tokenizers against the running Python, for every code point there is."""

from __future__ import annotations

import re
import sys
import unicodedata
from types import ModuleType

import numpy as np
import pytest

from fastops import _unicode
from fastops._rule import Rule

EVERY = [chr(code) for code in range(sys.maxunicode + 1)]
VALID = [char for char in EVERY if not "\ud800" <= char <= "\udfff"]


def expanded(pages: np.ndarray, values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, 256)[pages].reshape(-1)


def test_classes_white_space_and_letters_are_those_of_python() -> None:
    found = expanded(*_unicode.classes(letters=True, case=False))
    spaces = [char.isspace() for char in EVERY]
    assert np.array_equal(found & _unicode.SPACE != 0, spaces)
    assert np.array_equal(expanded(*_unicode.classes(letters=False, case=False)), spaces)
    word = re.compile(r"\w")
    assert np.array_equal(found & _unicode.WORD != 0, [word.match(char) is not None for char in EVERY])


@pytest.mark.parametrize("fold", [False, True])
def test_cases_map_every_code_point_as_python_does(fold: bool) -> None:
    pages, values, several = _unicode.cases(fold)
    for code, value in enumerate(expanded(pages, values)):
        if value >= 0:
            mapped = chr(code ^ int(value))
        else:
            place = ~int(value)
            mapped = "".join(map(chr, several[place + 1 : place + 1 + several[place]]))
        assert mapped == (EVERY[code].casefold() if fold else EVERY[code].lower()), hex(code)


def test_cases_grow_no_text_beyond_what_is_reserved() -> None:
    grown = [
        char
        for char in VALID
        for mapped in (char.lower(), char.casefold())
        if len(mapped.encode()) > 3 * len(char.encode())
    ]
    assert grown == []


@pytest.mark.parametrize("frame", ["aΣ{}", "aΣ{}a", "a{}Σ b"])
def test_lower_of_a_sigma_beside_every_assigned_code_point(native: ModuleType, frame: str) -> None:
    """Whether a sigma is the last letter of its word depends on what stands on both sides."""
    texts = [frame.format(char) for char in VALID if unicodedata.category(char) not in ("Cn", "Co")]
    counter = native.word_counter(Rule(lowercase="unicode", lines=False))
    counter.documents([text.encode() for text in texts])
    table = counter.finish()
    wanted: dict[str, int] = {}
    for text in texts:
        for token in text.lower().split():
            wanted[token] = wanted.get(token, 0) + 1
    keys, offsets, counts, _ = table.top()
    found = {keys[offsets[i] : offsets[i + 1]].decode(): int(counts[i]) for i in range(len(counts))}
    assert found == wanted
