# SPDX-License-Identifier: BSD-3-Clause
"""What the running Python knows of characters, as tables for the native tokenizers: white space, letters, case.

A table has two stages: entry `pages[code >> 8] * 256 + (code & 255)` of its values; equal pages are stored once. Each is built
when a rule first needs it.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPACE, WORD, CASED, IGNORABLE = 1, 2, 4, 8
_PAGE = 256
_SIGMA, _FINAL = "Σ", "ς"
# Planes beyond hold ideographs, private characters and nothing, but for the tags.
_LETTERED, _TAGS = range(0x20000), range(0xE0000, 0xE1000)
# Beyond these nothing is a letter or white space.
_ASSIGNED = (range(0x40000), _TAGS)
# Code points of other categories (most of them ideographs) have no case and are not ignored.
_CASE_CATEGORIES = (
    "Lu",
    "Ll",
    "Lt",
    "Lm",
    "Nl",
    "So",
    "Mn",
    "Me",
    "Cf",
    "Sk",
    "Po",
    "Pc",
    "Pi",
    "Pf",
    "Pd",
    "Ps",
    "Pe",
)


def _two_stages(values: NDArray[Any]) -> tuple[NDArray[np.uint16], NDArray[Any]]:
    rows = values.reshape(-1, _PAGE)
    places = {bytes(rows[0].nbytes): 0}
    which = np.zeros(len(rows), np.uint16)
    for page in np.flatnonzero(rows.any(axis=1)).tolist():  # most pages are all zeros
        which[page] = places.setdefault(rows[page].tobytes(), len(places))
    return which, np.frombuffer(b"".join(places), values.dtype)


def _code_points(codes: range = range(sys.maxunicode + 1)) -> str:
    """Code points in order; in the places of surrogates another one that is no letter, no white space and has no case."""
    numbers = np.arange(codes.start, codes.stop, dtype="<u4")
    # Each surrogate would be one call of an error handler.
    numbers[slice(*(min(max(place - codes.start, 0), len(codes)) for place in (0xD800, 0xE000)))] = 0xE000
    return numbers.tobytes().decode("utf-32-le")


def _beside_sigma(cased_or_not: list[str]) -> tuple[list[int], list[int]]:
    """Which code points have a case, and which are skipped, when str.lower looks for what stands beside a sigma."""
    cased, ignored = [], []
    for char in cased_or_not:
        before_letter = ("a" + _SIGMA + char + "a").lower()[1] != _FINAL
        if before_letter and ("a" + _SIGMA + char).lower()[1] == _FINAL:
            ignored.append(ord(char))
        elif before_letter:
            cased.append(ord(char))
    return cased, ignored


@lru_cache(maxsize=4)
def classes(letters: bool, case: bool) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """White space of every code point, with `letters` these too, with `case` what stands beside a sigma."""
    values = np.zeros(sys.maxunicode + 1, np.uint8)
    for codes in _ASSIGNED:
        characters = _code_points(codes)
        # What str.split leaves lies between the white space; the characters are in order.
        place = codes.start
        for piece in characters.split():
            values[place : ord(piece[0])] = SPACE
            place = ord(piece[-1]) + 1
        values[place : codes.stop] = SPACE
        if letters:
            for match in re.finditer(r"\w+", characters):
                values[codes.start + match.start() : codes.start + match.end()] |= WORD
    if case:
        category = unicodedata.category
        lettered = _code_points(_LETTERED) + _code_points(_TAGS)
        cased, ignored = _beside_sigma([char for char in lettered if category(char) in _CASE_CATEGORIES])
        # No letter of another category has a case but the ordinal indicators.
        others, _ = _beside_sigma(["ª", "º"])
        values[cased + others] |= CASED
        values[ignored] |= IGNORABLE
    return _two_stages(values)


@lru_cache(maxsize=2)
def cases(fold: bool) -> tuple[NDArray[np.uint16], NDArray[np.int32], NDArray[np.uint32]]:
    """str.lower, or str.casefold, of every code point by itself.

    A value >= 0 is what to combine the code point with by exclusive or; one below is the complement of a place in the third array,
    where the number of code points stands, then they.
    """
    every = _code_points()
    values = np.zeros(len(every), np.int32)
    several: list[int] = []
    for first in range(0, len(every), _PAGE):
        page = every[first : first + _PAGE]
        if page == (page.casefold() if fold else page.lower()):
            continue
        for code, char in enumerate(page, first):
            mapped = char.casefold() if fold else char.lower()
            if mapped == char:
                continue
            if len(mapped) == 1:
                values[code] = code ^ ord(mapped)
            else:
                values[code] = ~len(several)
                several += [len(mapped), *map(ord, mapped)]
    pages, stored = _two_stages(values)
    return pages, stored, np.array(several or [0], np.uint32)
