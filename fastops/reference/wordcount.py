# SPDX-License-Identifier: BSD-3-Clause
"""Word counting in plain Python: what each rule counts is what this file does."""

from __future__ import annotations

import os
import re
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .._container import CHECK, HAS_DOCS, HEAD, HEADER_BYTES, MAGIC, VERSION, packed
from .._rule import UTF8_BOM, Rule, TokenTooLong, check_bom, not_utf8

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_COUNT = 2**63 - 1
_MASK = 2**64 - 1
_BLOCK = 1 << 20
_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
_RUNS = {"whitespace": re.compile(r"\S+"), "word": re.compile(r"\w+")}
_LINE = re.compile(r"[^\n]*\n?")


def fnv1a(key: bytes) -> int:
    """FNV-1a of 64 bits (Fowler, Noll, Vo): which part of `Table.split` a key belongs to."""
    value = 0xCBF29CE484222325
    for byte in key:
        value = (value ^ byte) * 0x100000001B3 & _MASK
    return value


def key_of(token: str) -> bytes:
    """The bytes that a token is counted under: bytes that were no UTF-8 are themselves again."""
    return token.encode("utf-8", "surrogateescape")


def transform(text: str, rule: Rule) -> str:
    """Normalized first, then in lower case: another order would give other words."""
    if rule.normalize is not None:
        form: Any = rule.normalize
        text = unicodedata.normalize(form, text)
    if rule.lowercase == "ascii":
        return text.translate(_ASCII_LOWER)
    if rule.lowercase == "unicode":
        return text.lower()
    return text.casefold() if rule.lowercase == "casefold" else text


def documents_of(text: str, rule: Rule) -> list[str]:
    """The lines, without their ends ("\\n" or "\\r\\n"; what follows the last is one if it is not empty), or the whole text."""
    if not rule.lines:
        return [text]
    *lines, rest = text.split("\n")
    return [line.removesuffix("\r") for line in lines] + ([rest] if rest else [])


def split(document: str, rule: Rule) -> list[str]:
    """The tokens of a document."""
    if rule.tokenizer == "whitespace":
        return document.split()
    if rule.tokenizer == "word":
        return re.findall(r"\w+", document)
    if rule.tokenizer == "char":
        return list(document)
    if rule.tokenizer == "unicode":
        from ._breaks import words

        return words(document)
    assert rule.zh is not None
    return rule.zh.cut_reference(document)


def grams(tokens: Iterable[str], rule: Rule) -> list[bytes]:
    """The keys of a document's tokens: without stop words, then the n-grams that end at each token, the shortest first."""
    keys = [key_of(token) for token in tokens]
    if max(map(len, keys), default=0) > rule.max_token_bytes:
        raise TokenTooLong
    if rule.stop_words:
        keys = [key for key in keys if key not in rule.stop_words]
    low, high = rule.ngrams
    if high == 1:
        return keys
    between = b"" if rule.tokenizer == "char" else b" "
    ends = range(1, len(keys) + 1)
    return [between.join(keys[end - n : end]) for end in ends for n in range(low, min(high, end) + 1)]


class Table:
    """A multiset of byte strings: how often each was counted and, with `docs`, in how many documents it was."""

    def __init__(self, docs: bool = False) -> None:
        self._counts: dict[bytes, int] = {}
        self._docs: dict[bytes, int] | None = {} if docs else None
        self.documents = 0
        self.error_bound = 0

    def __len__(self) -> int:
        return len(self._counts)

    def __reduce__(self) -> tuple[Callable[[bytes], Table], tuple[bytes]]:
        return table_from_bytes, (self.to_bytes(),)

    @property
    def has_docs(self) -> bool:
        """Whether documents are counted for each key."""
        return self._docs is not None

    @property
    def nbytes(self) -> int:
        """About how much memory the table takes."""
        return sum(33 + len(key) + 100 for key in self._counts)

    def total(self) -> int:
        """The sum of all counts, which may exceed 64 bits."""
        return sum(self._counts.values())

    def get(self, key: bytes) -> tuple[int, int]:
        """Count and documents of a key, (0, 0) of one that is absent."""
        return self._counts.get(key, 0), 0 if self._docs is None else self._docs.get(key, 0)

    def add(self, key: bytes, count: int, docs: int = 0) -> None:
        """Counts a key `count` times more, in `docs` more documents."""
        if not 0 <= docs <= count or count < 1:
            raise ValueError(f"count must be >= 1 and >= docs >= 0, got {count} and {docs}")
        key = bytes(key)
        new = self._counts.get(key, 0) + count
        if new > MAX_COUNT:
            raise OverflowError(f"count must stay below 2**63, got {new}")
        self._counts[key] = new
        if self._docs is not None:
            self._docs[key] = self._docs.get(key, 0) + docs

    def merge(self, other: Table) -> None:
        """Adds the counts, documents and error bound of another table."""
        if self.has_docs != other.has_docs:
            raise ValueError(f"other must have has_docs={self.has_docs}, got {other.has_docs}")
        for key, count, docs in list(other._entries()):
            self.add(key, count, docs)
        self.documents += other.documents
        self.error_bound += other.error_bound

    def copy(self) -> Table:
        """A table of the same entries that changes by itself."""
        return self.select()

    def select(
        self, min_count: int = 1, max_count: int | None = None, min_docs: int = 0, max_docs: int | None = None
    ) -> Table:
        """The entries whose numbers lie within these bounds, both included."""
        return self._where(
            lambda _, count, docs: (
                min_count <= count <= (MAX_COUNT if max_count is None else max_count)
                and min_docs <= docs <= (MAX_COUNT if max_docs is None else max_docs)
            )
        )

    def only(self, keys: Iterable[bytes]) -> Table:
        """The entries of these keys."""
        wanted = set(keys)
        return self._where(lambda key, *_: key in wanted)

    def without(self, keys: Iterable[bytes]) -> Table:
        """The entries of all other keys."""
        gone = set(keys)
        return self._where(lambda key, *_: key not in gone)

    def shrink(self, kept: int) -> None:
        """Leaves the largest counts, less the next one, by which the error bound grows (Agarwal et al. 2012)."""
        if self._docs is not None:
            raise ValueError("a table that counts documents must keep its counts")
        if len(self._counts) > kept:
            less = sorted(self._counts.values(), reverse=True)[kept]
            self._counts = {key: count - less for key, count in self._counts.items() if count > less}
            self.error_bound += less

    def split(self, k: int) -> list[Table]:
        """Tables of the entries whose hash leaves 0, 1, ... k - 1."""
        parts = [Table(self.has_docs) for _ in range(k)]
        for key, count, docs in self._entries():
            parts[fnv1a(key) % k].add(key, count, docs)
        for part in parts:
            part.documents, part.error_bound = self.documents, self.error_bound
        return parts

    def _entries(self) -> Iterator[tuple[bytes, int, int]]:
        return ((key, *self.get(key)) for key in self._counts)

    def _where(self, keep: Callable[[bytes, int, int], bool]) -> Table:
        result = Table(self.has_docs)
        for entry in self._entries():
            if keep(*entry):
                result.add(*entry)
        result.documents, result.error_bound = self.documents, self.error_bound
        return result

    def _ranked(self, k: int | None = None) -> list[bytes]:
        return sorted(self._counts, key=lambda key: (-self._counts[key], key))[:k]

    def top(
        self, k: int | None = None
    ) -> tuple[bytes, NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64] | None]:
        """The k most frequent keys, equal counts by their bytes: the keys in one, their offsets, counts and documents."""
        keys = self._ranked(k)
        offsets = np.zeros(len(keys) + 1, np.uint64)
        np.cumsum([len(key) for key in keys], out=offsets[1:], dtype=np.uint64)
        counts, docs = (np.array([self.get(key)[i] for key in keys], np.uint64) for i in (0, 1))
        return b"".join(keys), offsets, counts, docs if self.has_docs else None

    def to_bytes(self) -> bytes:
        """The table as a container, which `table_from_bytes` reads; the order of its entries is not part of the format."""
        return packed(self)

    def encode(self, rule: Rule, documents: Iterable[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ranks in `top` of each text's keys, in their order and without those that are absent; and where each text's end."""
        rank = {key: i for i, key in enumerate(self._ranked())}
        ids: list[int] = []
        offsets = [0]
        for number, document in enumerate(documents):
            text = Text(f"<text {number}>", rule)
            for keys in text.feed(document, last=True):
                ids += [rank[key] for key in keys if key in rank]
            offsets.append(len(ids))
        return np.array(ids, np.int64), np.array(offsets, np.int64)


def word_table(docs: bool = False) -> Table:
    """An empty table."""
    return Table(docs)


def table_from_bytes(buffer: Buffer) -> Table:
    """The table that a container holds; ValueError for one that is damaged, found before memory is taken for it."""
    with memoryview(buffer) as given:
        data = given.cast("B") if given.contiguous else memoryview(given.tobytes())
        size = len(data)

        def refuse(what: str, got: object) -> ValueError:
            return ValueError(f"counts must be a container of fastops with {what}, got {got}")

        if size < HEADER_BYTES:
            raise refuse(f"a header of {HEADER_BYTES} bytes", f"{size} bytes")
        magic, version, flags, n, key_bytes, error_bound, documents, zero = HEAD.unpack_from(data)
        crc, other_zero = CHECK.unpack_from(data, HEAD.size)
        if magic != MAGIC:
            raise refuse(f"the magic bytes {MAGIC!r}", repr(magic))
        if version != VERSION:
            raise refuse(f"version {VERSION}", version)
        if flags & ~HAS_DOCS:
            raise refuse("known flags", hex(flags))
        if zero or other_zero:
            raise refuse("zeros where they are reserved", f"{zero} and {other_zero}")
        wide = 2 * n if flags & HAS_DOCS else n
        wanted = HEADER_BYTES + 8 * wide + 4 * n + key_bytes
        if size != wanted:
            raise refuse(f"{wanted} bytes, as its header says", f"{size} bytes")
        if crc != zlib.crc32(data[HEADER_BYTES:], zlib.crc32(data[: HEAD.size])):
            raise refuse("the checksum of its contents", "another")
        numbers = struct.unpack_from(f"<{wide}Q", data, HEADER_BYTES)
        lengths = struct.unpack_from(f"<{n}I", data, HEADER_BYTES + 8 * wide)
        if sum(lengths) != key_bytes:
            raise refuse(f"keys of {key_bytes} bytes in all", sum(lengths))
        table = Table(bool(flags & HAS_DOCS))
        begin = size - key_bytes
        for i, length in enumerate(lengths):
            key = bytes(data[begin : begin + length])
            begin += length
            count, docs = numbers[i], numbers[n + i] if flags & HAS_DOCS else 0
            if not 1 <= count <= MAX_COUNT:
                raise refuse("counts in [1, 2**63)", count)
            if docs > count:
                raise refuse("no more documents than occurrences of a key", f"{docs} of {count}")
            if key in table._counts:
                raise refuse("each key once", "one twice")
            table.add(key, count, docs)
        table.error_bound, table.documents = error_bound, documents
        return table


class Text:
    """One text, from its first byte: gives the keys of one document after another."""

    def __init__(
        self, name: str, rule: Rule, begin: int = 0, tokenizer: Callable[[str], Iterable[str]] | None = None
    ) -> None:
        self._name, self._rule = name, rule
        self._split = tokenizer or (lambda document: split(document, rule))
        self._pending = bytearray()
        self._begin = begin
        self._at_start = begin == 0
        # "\n" separates for normalization, case and every tokenizer, so that whole lines can be counted while others come.
        self._by_lines = rule.lines or not rule.documents_matter

    def feed(self, data: Buffer, last: bool = False) -> Iterator[list[bytes]]:
        """The keys of the documents, or pieces of the one document, that end within the next block."""
        return self.keys(*self.ready(data, last))

    def ready(self, data: Buffer, last: bool = False) -> tuple[bytes | None, int]:
        """What can be counted now that the next block is there, without a byte order mark; and which byte of the text it begins at."""
        block = bytes(data)
        cut = len(block) if last else block.rfind(b"\n") + 1 if self._by_lines else 0
        if not (cut or last):
            self._pending += block
            return None, self._begin
        ready = bytes(self._pending) + block[:cut]
        self._pending[:] = block[cut:]
        begin = self._begin
        self._begin += len(ready)
        if self._at_start:
            self._at_start = False
            check_bom(self._name, ready)
            if ready.startswith(UTF8_BOM):
                return ready.removeprefix(UTF8_BOM), begin + len(UTF8_BOM)
        return ready, begin

    def keys(self, ready: bytes | None, begin: int) -> Iterator[list[bytes]]:
        """The keys of what is ready, one list for each document or piece of one."""
        if ready is None:
            return
        try:
            text = ready.decode("utf-8", self._rule.errors)
        except UnicodeDecodeError as error:
            raise not_utf8(self._name, begin, error) from None
        try:
            for document in documents_of(transform(text, self._rule), self._rule):
                yield grams(self._split(document), self._rule)
        except TokenTooLong:
            wanted = f"have no token of more than {self._rule.max_token_bytes} bytes"
            where = f"byte {begin + self._first_too_long(ready)}"
            raise TokenTooLong(f"{self._name} must {wanted}, got one that begins at {where}") from None

    def _first_too_long(self, ready: bytes) -> int:
        """Where the first token that is too long begins; its line, under tokenizers whose tokens are no runs."""
        raw = ready.decode("utf-8", "surrogateescape")
        for match in _RUNS.get(self._rule.tokenizer, _LINE).finditer(raw):
            piece = transform(key_of(match[0]).decode("utf-8", self._rule.errors), self._rule)
            if any(len(key_of(token)) > self._rule.max_token_bytes for token in self._split(piece)):
                return len(key_of(raw[: match.start()]))
        return 0


def _line_begin(fd: int, offset: int) -> int:
    """Where the first line that does not begin before `offset` begins."""
    if offset == 0:
        return 0
    position = offset - 1
    while block := os.pread(fd, _BLOCK, position):
        found = block.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(block)
    return position


class Counter:
    """Counts texts that come in blocks, as whole documents, as tokens or from files."""

    def __init__(self, rule: Rule, approx: int | None = None) -> None:
        self._rule, self._approx = rule, approx
        self.name = "<text>"
        self._table = Table(rule.doc_freq)
        self._text: Text | None = None

    def feed(self, data: Buffer) -> None:
        """The next block of the text; blocks may end anywhere."""
        if self._text is None:
            self._text = Text(self.name, self._rule)
        self._count(self._text, data)

    def end(self) -> None:
        """The end of the text."""
        text, self._text = self._text or Text(self.name, self._rule), None
        self._count(text, b"", last=True)
        if not self._rule.lines:
            self._table.documents += 1

    def documents(self, texts: Iterable[bytes]) -> None:
        """Texts that are whole, one after another."""
        for text in texts:
            self.feed(text)
            self.end()

    def tokens(self, tokens: Iterable[str]) -> None:
        """The tokens of one document, made elsewhere."""
        try:
            self._count_document(grams(tokens, self._rule))
        except TokenTooLong:
            wanted = f"have no token of more than {self._rule.max_token_bytes} bytes"
            raise TokenTooLong(f"{self.name} must {wanted}, got one from the tokenizer") from None
        self._table.documents += 1

    def file(self, fd: int, start: int, stop: int) -> None:
        """The lines of a file that begin in [start, stop); a file that is one document is counted where its byte 0 is."""
        try:
            position, end = _line_begin(fd, start), _line_begin(fd, stop)
            text = Text(self.name, self._rule, position)
            while position < end and (block := os.pread(fd, min(_BLOCK, end - position), position)):
                position += len(block)
                self._count(text, block)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None
        self._count(text, b"", last=True)
        if not self._rule.lines and start == 0:
            self._table.documents += 1

    def finish(self) -> Table:
        """What was counted; the counter is empty again."""
        if self._text is not None:
            self.end()
        result, self._table = self._table, Table(self._rule.doc_freq)
        return result

    def _count(self, text: Text, data: Buffer, last: bool = False) -> None:
        for keys in text.feed(data, last):
            self._count_document(keys)
            if self._rule.lines:
                self._table.documents += 1

    def _count_document(self, keys: list[bytes]) -> None:
        if self._approx is not None:
            for key in keys:
                self._count_roughly(key, self._approx)
            return
        counts, docs = self._table._counts, self._table._docs
        for key in keys:
            counts[key] = counts.get(key, 0) + 1
        if docs is not None:
            for key in set(keys):
                docs[key] = docs.get(key, 0) + 1

    def _count_roughly(self, key: bytes, k: int) -> None:
        """Misra and Gries, "Finding repeated elements", 1982: at most k keys, each counted too low by error_bound at most."""
        counts = self._table._counts
        if key in counts or len(counts) < k:
            self._table.add(key, 1)
            return
        # With the key that finds no place, k + 1 are counted once less: at most total / (k + 1) times.
        for other in list(counts):
            counts[other] -= 1
            if not counts[other]:
                del counts[other]
        self._table.error_bound += 1


def word_counter(
    rule: Rule, *, workers: int = 1, memory_limit: int | None = None, approx: int | None = None
) -> Counter:
    """A counter of what `rule` says. This one works in one thread and keeps the whole table in memory."""
    del workers, memory_limit
    return Counter(rule, approx)
