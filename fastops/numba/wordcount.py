# SPDX-License-Identifier: BSD-3-Clause
"""Word counting with Numba: ASCII lines under the whitespace tokenizer go through a compiled loop, all else as in the reference."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .._rule import Rule
from ..reference import wordcount as reference
from ..reference.wordcount import Table, Text, table_from_bytes, word_table
from ._wordcount_kernels import count_ascii, rehash

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["table_from_bytes", "word_counter", "word_table"]

_SLOTS = 1 << 12
_KEYS = 1 << 16
_BLOCK = 1 << 20
_LINE = re.compile(rb"[^\n]*\n|[^\n]+")
_Slots = tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


class _Words:
    """The compiled loop's table."""

    def __init__(self) -> None:
        self._slots = self._empty(_SLOTS)
        self._keys = np.empty(_KEYS, np.uint8)
        self._used = np.zeros(2, np.int64)

    @staticmethod
    def _empty(size: int) -> _Slots:
        return np.empty(size, np.uint64), np.zeros(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)

    def count(self, data: bytes, lower: bool, longest: int) -> bool:
        """Counts ASCII text; False where a word is too long."""
        text = np.frombuffer(data, np.uint8)
        at = 0
        while (at := count_ascii(text, at, lower, longest, *self._slots, self._keys, self._used)) < len(data):
            if at < 0:
                return False
            entries, filled = self._used.tolist()
            if 2 * entries >= len(self._slots[1]):
                larger = self._empty(2 * len(self._slots[1]))
                rehash(*self._slots, *larger)
                self._slots = larger
            else:
                keys = np.empty(2 * len(self._keys) + longest, np.uint8)
                keys[:filled] = self._keys[:filled]
                self._keys = keys
        return True

    def add_to(self, table: Table, rule: Rule) -> None:
        """Puts the words into a table, without stop words."""
        _, counts, begins, lengths = self._slots
        full = np.flatnonzero(counts)
        keys = self._keys.tobytes()
        for begin, length, count in zip(
            begins[full].tolist(), lengths[full].tolist(), counts[full].tolist(), strict=True
        ):
            key = keys[begin : begin + length]
            if key not in rule.stop_words:
                table.add(key, count)


class Counter(reference.Counter):
    """`reference.Counter`, faster over plain lines."""

    def __init__(self, rule: Rule, approx: int | None = None) -> None:
        super().__init__(rule, approx)
        # Without documents and n-grams the order of lines does not matter, and in ASCII all ways to lower are one.
        self._plain = rule.tokenizer == "whitespace" and not rule.documents_matter and approx is None
        self._lower = rule.lowercase is not None
        self._words = _Words()

    def documents(self, texts: Iterable[bytes]) -> None:
        """Texts that are whole, one after another."""
        together: list[bytes] = []
        size = 0
        for text in texts:
            if not (self._plain and text.isascii()):
                super().documents([text])
                continue
            together.append(text)
            size += len(text) + 1
            self._table.documents += _lines(text) if self._rule.lines else 1
            if size >= _BLOCK:
                self._count_whole(together)
                together, size = [], 0
        self._count_whole(together)

    def finish(self) -> Table:
        """What was counted; the counter is empty again."""
        result = super().finish()
        words, self._words = self._words, _Words()
        words.add_to(result, self._rule)
        return result

    def _count(self, text: Text, data: Buffer, last: bool = False) -> None:
        if not self._plain:
            super()._count(text, data, last)
            return
        ready, begin = text.ready(data, last)
        if ready is None:
            return
        whole = ready.isascii()
        for is_ascii, lines in [(True, [ready])] if whole else groupby(_LINE.findall(ready), bytes.isascii):
            part = b"".join(lines)
            if is_ascii and self._words.count(part, self._lower, self._rule.max_token_bytes):
                if self._rule.lines:
                    self._table.documents += _lines(part)
            else:
                # With what is no ASCII, or to say where the word is that is too long.
                for keys in text.keys(part, begin):
                    self._count_document(keys)
                    self._table.documents += self._rule.lines
            begin += len(part)

    def _count_whole(self, texts: list[bytes]) -> None:
        """Counts the words of ASCII texts."""
        if not self._words.count(b"\n".join(texts), self._lower, self._rule.max_token_bytes):
            super().documents(texts)


def _lines(text: bytes) -> int:
    """How many documents its lines are."""
    return text.count(b"\n") + (not text.endswith(b"\n") and text != b"")


def word_counter(
    rule: Rule, *, workers: int = 1, memory_limit: int | None = None, approx: int | None = None
) -> Counter:
    """A counter of what `rule` says. It works in one thread and keeps the whole table in memory."""
    del workers, memory_limit
    return Counter(rule, approx)
