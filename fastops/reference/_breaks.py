# SPDX-License-Identifier: BSD-3-Clause
"""Word boundaries of UAX #29, rule by rule: the oracle of tokenizer="unicode"."""

from __future__ import annotations

from functools import lru_cache

from .. import _word_break

_NEW_LINE = {"CR", "LF", "Newline"}
_IGNORED = {"Extend", "Format", "ZWJ"}
_LETTER = {"ALetter", "Hebrew_Letter"}
_MID_LETTER = {"MidLetter", "MidNumLet", "Single_Quote"}
_MID_NUMBER = {"MidNum", "MidNumLet", "Single_Quote"}
_JOINED = _LETTER | {"Numeric", "Katakana"}


@lru_cache(4096)
def _property(character: str) -> tuple[str, bool]:
    """Word_Break and Extended_Pictographic."""
    pages, classes = _word_break.table()
    code = ord(character)
    bits = int(classes[int(pages[code >> 8]) * 256 + (code & 255)])
    return _word_break.CLASSES[bits & _word_break.CLASS_BITS], bool(bits & _word_break.EMOJI_BIT)


def _is_boundary(seen: list[str], flags: int, before: str, after: str, emoji: bool, next_: str) -> bool:
    """Whether a segment ends between `before` and `after`; WB1 and WB2, the ends of the text, are the caller's.

    `seen` holds what stands before but for the characters that WB4 skips, at least one; `flags` counts the regional
    indicators at its end. `next_` is the first character after `after` that WB4 does not skip; "" where there is none.
    """
    if before == "CR" and after == "LF":  # WB3
        return False
    if before in _NEW_LINE or after in _NEW_LINE:  # WB3a, WB3b
        return True
    if before == "ZWJ" and emoji:  # WB3c
        return False
    if before == after == "WSegSpace":  # WB3d
        return False
    if after in _IGNORED:  # WB4
        return False
    two, one = seen[-2:] if len(seen) > 1 else ("", seen[-1])
    if one in _LETTER and after in _LETTER:  # WB5
        return False
    if one in _LETTER and after in _MID_LETTER and next_ in _LETTER:  # WB6
        return False
    if two in _LETTER and one in _MID_LETTER and after in _LETTER:  # WB7
        return False
    if one == "Hebrew_Letter" and after == "Single_Quote":  # WB7a
        return False
    if one == "Hebrew_Letter" and after == "Double_Quote" and next_ == "Hebrew_Letter":  # WB7b
        return False
    if two == "Hebrew_Letter" and one == "Double_Quote" and after == "Hebrew_Letter":  # WB7c
        return False
    if one == "Numeric" and after == "Numeric":  # WB8
        return False
    if one in _LETTER and after == "Numeric":  # WB9
        return False
    if one == "Numeric" and after in _LETTER:  # WB10
        return False
    if two == "Numeric" and one in _MID_NUMBER and after == "Numeric":  # WB11
        return False
    if one == "Numeric" and after in _MID_NUMBER and next_ == "Numeric":  # WB12
        return False
    if one == "Katakana" and after == "Katakana":  # WB13
        return False
    if (one in _JOINED or one == "ExtendNumLet") and after == "ExtendNumLet":  # WB13a
        return False
    if one == "ExtendNumLet" and after in _JOINED:  # WB13b
        return False
    # WB15, WB16: flags are pairs. WB999: else a boundary.
    return not (one == after == "Regional_Indicator" and flags % 2 == 1)


def segments(text: str) -> list[str]:
    """The text cut at every word boundary."""
    values = [_property(character) for character in text]
    # next_[i]: the first value after i that WB4 does not skip.
    next_ = [""] * len(values)
    for i in range(len(values) - 2, -1, -1):
        value = values[i + 1][0]
        next_[i] = next_[i + 1] if value in _IGNORED else value
    found: list[str] = []
    seen: list[str] = []
    start = flags = 0
    for i, (after, emoji) in enumerate(values):
        before = values[i - 1][0] if i else ""
        if i and _is_boundary(seen, flags, before, after, emoji, next_[i]):
            found.append(text[start:i])
            start = i
        if after not in _IGNORED or i == 0 or before in _NEW_LINE:
            flags = flags + 1 if after == "Regional_Indicator" else 0
            seen = [*seen[-1:], after]
    return [*found, text[start:]] if text else found


def words(text: str) -> list[str]:
    """Segments that hold a letter or a digit (str.isalnum)."""
    return [segment for segment in segments(text) if any(map(str.isalnum, segment))]
