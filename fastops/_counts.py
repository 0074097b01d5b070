# SPDX-License-Identifier: BSD-3-Clause
"""`WordCounts`: what was counted, as a mapping whose words become Python strings only where they are asked for."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, ValuesView
from collections.abc import ItemsView as _ItemsView
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast

import numpy as np
from numpy.typing import NDArray

from . import _validate
from ._backend import backend as _backend
from ._container import packed
from ._rule import Rule
from ._validate import Text

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["WordCounts"]

# Words of one step of an iteration.
_CHUNK = 4096
_MOST_SHOWN = 3
_TSV_BREAKS = (b"\t", b"\n")
_NO_SURROGATES = "text without lone surrogates"
Tokenizer = Callable[[str], Iterable[str]]


def key_of(word: str | bytes) -> bytes:
    """The bytes that a word is counted under; UnicodeEncodeError for a lone surrogate that stands for no byte."""
    return word.encode("utf-8", "surrogateescape") if isinstance(word, str) else bytes(word)


def keys_of(name: str, words: object) -> list[bytes]:
    """The keys of an iterable of words."""
    wanted = "an iterable of words (str or bytes)"
    if isinstance(words, (str, bytes, bytearray, memoryview)) or not isinstance(words, Iterable):
        raise _validate.wrong_type(name, wanted, words)
    keys = []
    for i, word in enumerate(words):
        # A name for each of millions would take longer than its key.
        if isinstance(word, bytes):
            keys.append(bytes(word))
        elif isinstance(word, str):
            try:
                keys.append(word.encode("utf-8", "surrogateescape"))
            except UnicodeEncodeError:
                raise _validate.wrong_value(f"{name}[{i}]", _NO_SURROGATES, word) from None
        else:
            raise _validate.wrong_type(f"{name}[{i}]", "a str or bytes", word)
    return keys


def _checked_key(name: str, word: str | bytes) -> bytes:
    try:
        return key_of(word)
    except UnicodeEncodeError:
        raise _validate.wrong_value(name, _NO_SURROGATES, word) from None


def text_bytes(name: str, text: object) -> bytes:
    """One text as bytes, as counting takes it."""
    if isinstance(text, str):
        from ._sources import encoded

        return encoded(text)
    if isinstance(text, (bytes, bytearray, memoryview)):
        return bytes(text)
    raise _validate.wrong_type(name, "a str or bytes", text)


def check_texts(name: str, texts: object) -> None:
    """Refuses what is no text and has none."""
    # Of a table the names of its columns would be taken.
    if not isinstance(texts, Iterable) or hasattr(type(texts), "columns"):
        raise _validate.wrong_type(name, "a str, bytes, an iterable of these or an Arrow string array", texts)


def texts_of(name: str, texts: object) -> Iterable[object]:
    """Texts one by one: one str or bytes is one text, and an Arrow array gives its own."""
    check_texts(name, texts)
    if isinstance(texts, (str, bytes, bytearray, memoryview)):
        return (texts,)
    return column_of(cast("Iterable[object]", texts))


def column_of(texts: Any) -> Iterable[object]:
    """The texts of an iterable. Missing values of a column of Arrow, pandas or polars are empty texts; elsewhere they are none."""
    module = type(texts).__module__.partition(".")[0]
    if hasattr(texts, "to_pylist"):
        return ("" if text is None else text for text in texts.to_pylist())
    if module == "polars":
        return ("" if text is None else text for text in texts)
    if module == "pandas" and hasattr(texts, "isna"):
        # None, NaN and NA alike.
        return ("" if missing else text for text, missing in zip(texts, texts.isna(), strict=True))
    return cast("Iterable[object]", texts)


def _strings(blob: bytes, offsets: NDArray[np.uint64]) -> list[str]:
    """The words between the offsets."""
    bounds = offsets.tolist()
    part = blob[bounds[0] : bounds[-1]]
    if part.isascii():
        text, first = part.decode("ascii"), bounds[0]
        return [text[a - first : b - first] for a, b in pairwise(bounds)]
    return [blob[a:b].decode("utf-8", "surrogateescape") for a, b in pairwise(bounds)]


def _word(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A file that takes the place of `path` when all of it has reached the disk, and leaves nothing behind otherwise.

    Symbolic links are followed and a file keeps its mode; what is no regular file, a pipe say, is written to.
    """
    target = os.path.realpath(os.fspath(path)) if os.fspath(path) else ""
    mode = None
    with contextlib.suppress(OSError):
        mode = os.stat(target).st_mode
    if mode is not None and not stat.S_ISREG(mode):
        with open(target, "wb") as file:
            yield file
        return
    # Beside the target, since a rename does not cross file systems; opened with the rights that a new file gets.
    unfinished = f"{target}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
    # The new file is in place; a folder that cannot be synchronised does not undo it.
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(target) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _path(path: object) -> str:
    """A path as str, as `open` takes it; numbers of descriptors are refused."""
    if isinstance(path, (str, os.PathLike)):
        name = os.fspath(path)
        if isinstance(name, str):
            return name
    raise _validate.wrong_type("path", "a str or a path", path)


class _Numbers(Mapping[str, int]):
    """Words and one number for each, in the order of the counts; the numbers of absent words are 0."""

    __slots__ = ()

    # The position of the number in the pairs that a table gives, and in the columns of its `top`.
    _column: int

    # Whose words they are; a property of a view.
    _table: Any

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, word: object) -> bool:
        if not isinstance(word, (str, bytes)):
            return False
        try:
            return bool(self._table.get(key_of(word))[0])
        except UnicodeEncodeError:
            return False

    def __getitem__(self, word: str | bytes) -> int:
        if not isinstance(word, (str, bytes)):
            raise _validate.wrong_type("word", "a str or bytes", word)
        try:
            return int(self._table.get(key_of(word))[self._column])
        except UnicodeEncodeError:
            return 0

    def __iter__(self) -> Iterator[str]:
        return (word for word, _ in self._pairs())

    def get(self, word: object, default: Any = None, /) -> Any:
        """The number of a word, or the default where it was not counted.

        Parameters
        ----------
        word : str or bytes
            The word.
        default : object, optional
            What an absent word gives; ``counts[word]`` gives 0.

        Returns
        -------
        int or object
            The number, or the default.

        Examples
        --------
        >>> import fastops
        >>> counts = fastops.count_words("to be or not to be")
        >>> counts.get("be"), counts.get("bee"), counts["bee"]
        (2, None, 0)
        """
        return self[word] if isinstance(word, (str, bytes)) and word in self else default

    def items(self) -> _ItemsView[str, int]:
        """Words and numbers, the most frequent first.

        Returns
        -------
        ItemsView
            A view; each iteration sorts the words once.

        Examples
        --------
        >>> import fastops
        >>> list(fastops.count_words("to be or not to be").items())
        [('be', 2), ('to', 2), ('not', 1), ('or', 1)]
        """
        return _Items(self)

    def values(self) -> ValuesView[int]:
        """The numbers, in the order of the words.

        Returns
        -------
        ValuesView
            A view; each iteration sorts the words once.

        Examples
        --------
        >>> import fastops
        >>> list(fastops.count_words("to be or not to be").values())
        [2, 2, 1, 1]
        """
        return _Values(self)

    def _pairs(self, k: int | None = None) -> Iterator[tuple[str, int]]:
        blob, offsets, *columns = self._table.top(k)
        numbers = columns[self._column]
        for begin in range(0, len(numbers), _CHUNK):
            words = _strings(blob, offsets[begin : begin + _CHUNK + 1])
            yield from zip(words, numbers[begin : begin + _CHUNK].tolist(), strict=True)


class _Items(_ItemsView[str, int]):
    _mapping: _Numbers

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return self._mapping._pairs()


class _Values(ValuesView[int]):
    _mapping: _Numbers

    def __iter__(self) -> Iterator[int]:
        return (number for _, number in self._mapping._pairs())


class DocFreq(_Numbers):
    """In how many documents each word was: a view of a `WordCounts`, in its order."""

    __slots__ = ("_counts",)

    _column = 1

    def __init__(self, counts: WordCounts) -> None:
        self._counts = counts

    @property
    def _table(self) -> Any:
        return self._counts._table

    def __repr__(self) -> str:
        return f"<doc_freq of {self._counts!r}>"


class WordCounts(_Numbers):
    """Words and how often each was counted: a mapping, the most frequent word first.

    The table stays in the backend's memory, 16 to 40 bytes a word beside the word itself; strings are made where they are asked
    for. Equal counts are in the order of the words' bytes, so that the order is the same for any number of workers.

    Parameters
    ----------
    counts : mapping of str or bytes to int, optional
        Words and counts to begin with, such as a `collections.Counter`; zeros are left out.

    Attributes
    ----------
    doc_freq : mapping of str to int
        In how many documents each word was; ValueError where counting did not say ``doc_freq=True``.
    documents : int
        How many documents were counted.
    error_bound : int
        With ``approx=k``, by how much a count may be too low at most; 0 when counts are exact.
    nbytes : int
        The memory of the table in bytes, about.
    skipped : list of (str, str)
        With ``on_error="skip"``, the inputs that were left out, and why.

    Raises
    ------
    TypeError
        `counts` that is no mapping, a word that is no str or bytes, a count that is no integer.
    ValueError
        A count that is negative, or a sum of 2**63 or more.

    Notes
    -----
    Words are `str`; ``bytes`` are accepted where a word is looked up. A word that holds bytes which are no UTF-8 (``errors=
    "surrogateescape"``) has a lone surrogate for each, as Python's file names have.
    Any number of threads may read at once. `update` and ``+=`` may go on meanwhile with the native
    backend, but not while texts are encoded. Everything else that makes
    counts makes new ones. Pickles hold the bytes of `to_bytes`, the options of counting and `skipped`, but no callable tokenizer.

    Examples
    --------
    >>> import fastops
    >>> counts = fastops.count_words(["to be or not to be", "that is the question"])
    >>> counts["be"], counts["absent"], len(counts), counts.total()
    (2, 0, 8, 10)
    >>> counts.most_common(2)
    [('be', 2), ('to', 2)]
    >>> fastops.WordCounts({"be": 1, "not": 1}) + counts
    WordCounts({'be': 3, 'not': 2, 'to': 2, ...}, 8 words, total 12)
    """

    __slots__ = ("_rule", "_table", "_tokenizer", "skipped")

    __hash__ = None  # type: ignore[assignment]
    _column = 0

    def __init__(self, counts: Mapping[Any, int] | None = None) -> None:
        self._table: Any = _backend.word_table()
        self._rule: Rule | None = None
        self._tokenizer: Tokenizer | None = None
        self.skipped: list[tuple[str, str]] = []
        if counts is not None:
            self.update(counts)

    @classmethod
    def _of(
        cls,
        table: Any,
        rule: Rule | None = None,
        tokenizer: Tokenizer | None = None,
        skipped: Iterable[tuple[str, str]] = (),
    ) -> Self:
        """Around a table, which it owns."""
        self = cls.__new__(cls)
        self._table, self._rule, self._tokenizer, self.skipped = table, rule, tokenizer, list(skipped)
        return self

    def _with(self, table: Any) -> Self:
        return self._of(table, self._rule, self._tokenizer, self.skipped)

    def __copy__(self) -> Self:
        return self.copy()

    def __deepcopy__(self, memo: object) -> Self:
        return self.copy()

    def __reduce__(self) -> tuple[Callable[..., WordCounts], tuple[Any, ...]]:
        # A callable tokenizer need not be picklable; the rule without it would mean another one.
        rule = None if self._tokenizer is not None else self._rule
        return _unpickle, (self.to_bytes(), rule, self.skipped)

    def __repr__(self) -> str:
        shown = [f"{_validate.clip(repr(word))}: {count}" for word, count in self._pairs(_MOST_SHOWN)]
        more = ", ..." if len(self) > _MOST_SHOWN else ""
        notes = f", {len(self)} words, total {self.total()}"
        if self.error_bound:
            notes += f", each at most {self.error_bound} too low"
        if self.skipped:
            notes += f", {len(self.skipped)} inputs skipped"
        return f"WordCounts({{{', '.join(shown)}{more}}}{notes})"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, WordCounts):
            if len(self) != len(other) or self.total() != other.total():
                return False
            mine, theirs = self._table.top(), other._table.top()
            return mine[0] == theirs[0] and all(np.array_equal(mine[i], theirs[i]) for i in (1, 2))
        if isinstance(other, Mapping):
            return len(self) == len(other) and all(
                isinstance(word, (str, bytes)) and word in self and self[word] == count for word, count in other.items()
            )
        return NotImplemented

    def __add__(self, other: WordCounts) -> Self:
        if not isinstance(other, WordCounts):
            return NotImplemented
        result = self.copy()
        result.update(other)
        return result

    def __iadd__(self, other: WordCounts) -> Self:
        if not isinstance(other, WordCounts):
            return NotImplemented
        self.update(other)
        return self

    @property
    def documents(self) -> int:
        """How many documents were counted."""
        return int(self._table.documents)

    @property
    def error_bound(self) -> int:
        """By how much a count may be too low at most; 0 when counts are exact."""
        return int(self._table.error_bound)

    @property
    def nbytes(self) -> int:
        """The memory of the table in bytes, about."""
        return int(self._table.nbytes)

    @property
    def doc_freq(self) -> DocFreq:
        """In how many documents each word was."""
        self._needs_docs("doc_freq")
        return DocFreq(self)

    def _needs_docs(self, name: str) -> None:
        if not self._table.has_docs:
            raise _validate.wrong_value(name, "used where counting had doc_freq=True", Text("counts without documents"))

    def total(self) -> int:
        """The sum of all counts.

        Returns
        -------
        int
            The number of words counted, repetitions included.

        Examples
        --------
        >>> import fastops
        >>> fastops.count_words("to be or not to be").total()
        6
        """
        return int(self._table.total())

    def most_common(self, k: int | None = None) -> list[tuple[str, int]]:
        """The most frequent words and their counts.

        Parameters
        ----------
        k : int, optional
            How many; all by default.

        Returns
        -------
        list of (str, int)
            By count descending, equal counts by the words' bytes ascending.

        Raises
        ------
        TypeError
            `k` that is no integer.
        ValueError
            A negative `k`.

        Notes
        -----
        With `k` the table is passed once and only the k words are sorted and decoded.

        Examples
        --------
        >>> import fastops
        >>> fastops.count_words("to be or not to be").most_common(3)
        [('be', 2), ('to', 2), ('not', 1)]
        """
        return list(self._pairs(None if k is None else _validate.integer("k", k, 0)))

    def words(self) -> list[str]:
        """The words, the most frequent first.

        Returns
        -------
        list of str
            The place of a word is its id in `encode`.

        Examples
        --------
        >>> import fastops
        >>> fastops.count_words("to be or not to be").words()
        ['be', 'to', 'not', 'or']
        """
        blob, offsets, *_ = self._table.top()
        return _strings(blob, offsets)

    def copy(self) -> Self:
        """The same counts in a table of their own.

        Returns
        -------
        WordCounts
            A change of one is none of the other.

        Examples
        --------
        >>> import fastops
        >>> counts = fastops.count_words("a b a")
        >>> other = counts.copy()
        >>> other.update({"a": 1})
        >>> counts["a"], other["a"]
        (2, 3)
        """
        return self._with(self._table.copy())

    def filter(
        self,
        min_count: int = 1,
        max_count: int | None = None,
        *,
        min_docs: int = 0,
        max_docs: int | None = None,
        max_docs_share: float | None = None,
        words: Iterable[str | bytes] | None = None,
        without: Iterable[str | bytes] | None = None,
    ) -> Self:
        """The words that meet every condition given.

        Parameters
        ----------
        min_count : int, optional
            Words that were counted less often are left out.
        max_count : int, optional
            Words that were counted more often are left out.
        min_docs : int, optional
            Words that were in fewer documents are left out.
        max_docs : int, optional
            Words that were in more documents are left out.
        max_docs_share : float, optional
            In [0, 1]: words that were in a larger share of `documents` are left out.
        words : iterable of str or bytes, optional
            All other words are left out.
        without : iterable of str or bytes, optional
            These words are left out.

        Returns
        -------
        WordCounts
            New counts, with the `documents` and the `error_bound` of these.

        Raises
        ------
        TypeError
            A number that is no integer, words that are no iterable of str or bytes.
        ValueError
            A number out of its range; conditions on documents where counting had no ``doc_freq=True``.

        Examples
        --------
        >>> import fastops
        >>> counts = fastops.count_words(["to be or not to be", "to do"], doc_freq=True)
        >>> counts.filter(min_count=2).to_dict()
        {'to': 3, 'be': 2}
        >>> counts.filter(max_docs_share=0.5, without=["or"]).to_dict()
        {'be': 2, 'do': 1, 'not': 1}
        """
        bounds: dict[str, int | None] = {
            "min_count": _validate.integer("min_count", min_count, 1),
            "max_count": None if max_count is None else _validate.integer("max_count", max_count, 0),
            "min_docs": _validate.integer("min_docs", min_docs, 0),
            "max_docs": None if max_docs is None else _validate.integer("max_docs", max_docs, 0),
        }
        if max_docs_share is not None:
            share = _validate.number("max_docs_share", max_docs_share, 0.0, 1.0)
            most = int(share * self.documents)
            # The product may have been rounded down: 0.29 of 100 are 29.
            most += self.documents > most and (most + 1) / self.documents <= share
            bounds["max_docs"] = most if bounds["max_docs"] is None else min(most, bounds["max_docs"])
        for name, value in (("min_docs", min_docs), ("max_docs", max_docs), ("max_docs_share", max_docs_share)):
            if value is not None and not (name == "min_docs" and value == 0):
                self._needs_docs(name)
        kept = None if words is None else keys_of("words", words)
        gone = None if without is None else keys_of("without", without)
        table = self._table
        if kept is not None:
            table = table.only(kept)
        if gone is not None:
            table = table.without(gone)
        return self._with(table.select(**bounds))

    def update(self, other: Mapping[Any, int]) -> None:
        """Add counts to these, in place.

        Parameters
        ----------
        other : WordCounts or mapping of str or bytes to int
            A `WordCounts` brings its `documents`, `error_bound` and `skipped` along. It is not changed.

        Raises
        ------
        TypeError
            What is no mapping, a word that is no str or bytes, a count that is no integer.
        ValueError
            A negative count, a sum of 2**63 or more, or counts of which only one side knows documents. Nothing was added.

        Examples
        --------
        >>> import fastops
        >>> counts = fastops.count_words("a b a")
        >>> counts.update({"b": 5})
        >>> counts.to_dict()
        {'b': 6, 'a': 2}
        """
        table = other._table if isinstance(other, WordCounts) else _table_of(other)
        empty = not len(self) and not self.documents
        if table.has_docs != self._table.has_docs:
            if len(table) and not empty:
                got = "with" if table.has_docs else "without"
                wanted = "counted with doc_freq as these are"
                raise _validate.wrong_value("other", wanted, Text(f"counts {got} documents"))
            # No words on one side, which then has nothing to say about their documents.
            table = table if empty else self._without_words(table)
        if empty:
            bound, self._table = self.error_bound, table.copy()
            self._table.error_bound += bound
        else:
            self._add(table)
        if isinstance(other, WordCounts):
            if empty and self._rule is None:
                self._rule, self._tokenizer = other._rule, other._tokenizer
            elif (self._rule, self._tokenizer) != (other._rule, other._tokenizer):
                self._rule = self._tokenizer = None
            self.skipped += list(other.skipped)

    def _without_words(self, table: Any) -> Any:
        """An empty table with the documents and the error bound of another, of the kind of these counts'."""
        result = _backend.word_table(self._table.has_docs)
        result.documents, result.error_bound = table.documents, table.error_bound
        return result

    def _add(self, table: Any) -> None:
        """All of a table, or nothing of it."""
        before = None if self.total() + table.total() < 2**63 else self._table.copy()
        try:
            self._table.merge(table.copy() if table is self._table else table)
        except OverflowError:
            if before is not None:
                self._table = before
            raise _validate.wrong_value("other", "such that sums stay below 2**63", Text("more")) from None

    @classmethod
    def merge(cls, parts: Iterable[WordCounts]) -> Self:
        """The sum of any number of counts, such as those of several machines.

        Parameters
        ----------
        parts : iterable of WordCounts
            None of them is changed; no two need be in memory at once.

        Returns
        -------
        WordCounts
            New counts; those of nothing are empty.

        Raises
        ------
        TypeError
            An element that is no `WordCounts`.
        ValueError
            A sum of 2**63 or more, or parts of which only some know documents.

        Notes
        -----
        The numbers of documents add up, as the counts do. The parts that `partition` makes share theirs: merge the same part of
        several counts.

        Examples
        --------
        >>> import fastops
        >>> parts = [fastops.count_words(text) for text in ("a b", "a", "a c")]
        >>> fastops.WordCounts.merge(parts).to_dict()
        {'a': 3, 'b': 1, 'c': 1}
        """
        if isinstance(parts, Mapping) or not isinstance(parts, Iterable):
            raise _validate.wrong_type("parts", "an iterable of WordCounts", parts)
        result: Self | None = None
        for i, part in enumerate(parts):
            if not isinstance(part, WordCounts):
                raise _validate.wrong_type(f"parts[{i}]", "a WordCounts", part)
            if result is None:
                result = cls._of(part._table.copy(), part._rule, part._tokenizer, part.skipped)
            else:
                result.update(part)
        return cls() if result is None else result

    def partition(self, k: int) -> list[Self]:
        """The counts cut into k parts by a hash of the words, so that k machines can each merge one part of all.

        Parameters
        ----------
        k : int
            How many parts.

        Returns
        -------
        list of WordCounts
            A word is always in the same part: FNV-1a of its bytes in 64 bits, modulo k. Each has the `documents` and the
            `error_bound` of the whole.

        Raises
        ------
        TypeError
            `k` that is no integer.
        ValueError
            `k` below 1 or above 65536.

        Examples
        --------
        >>> import fastops
        >>> one, other = fastops.count_words("in the middle of the night").partition(2)
        >>> one.words(), other.words()
        (['the', 'in', 'middle', 'of'], ['night'])
        """
        return [self._with(table) for table in self._table.split(_validate.integer("k", k, 1, 2**16))]

    def encode(
        self, texts: object, *, as_csr: bool = False, **options: Any
    ) -> list[NDArray[np.int64]] | tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Make texts numbers: a word's id is its rank, 0 for the most frequent.

        Parameters
        ----------
        texts : str, bytes, iterable of these, Arrow array or column of pandas or polars of str
            Each a row of the result; one str or bytes is one row, and a missing value an empty one.
        as_csr : bool, optional
            Count the ids of each text instead: the document-term matrix.
        **options : object
            `tokenizer`, `lowercase`, `normalize`, `ngrams`, `document`, `stop_words`, `errors` and `max_token_bytes` as
            `count_words` has them; those of counting by default. Counts from a file do not know them and need them said.

        Returns
        -------
        list of (n,) int64 array, or (indptr, indices, data)
            The ids of each text in their order, words that were not counted left out. With `as_csr`, int64 arrays for
            ``scipy.sparse.csr_array((data, indices, indptr), shape=(len(indptr) - 1, len(counts)))``; indices ascend in
            each row.

        Raises
        ------
        TypeError
            Texts or options of the wrong type.
        ValueError
            Options out of range, or none where these counts do not know theirs; text that the options refuse.

        Examples
        --------
        >>> import fastops
        >>> counts = fastops.count_words("to be or not to be")
        >>> counts.encode(["not to be", "be or not, be"])
        [array([2, 1, 0]), array([0, 3, 0])]
        >>> indptr, indices, data = counts.encode(["not to be", "be or not, be"], as_csr=True)
        >>> indptr, indices, data
        (array([0, 3, 5]), array([0, 1, 2, 0, 3]), array([1, 1, 1, 2, 1]))
        """
        csr = _validate.boolean("as_csr", as_csr)
        rule, tokenizer = self._rule, self._tokenizer
        if options:
            from .wordcount import rule_of

            rule, tokenizer = rule_of(**{**self._options(), **options})
        if rule is None:
            wanted = "given, since counts from a file or of several rules know none"
            raise _validate.wrong_value("tokenizer", wanted, Text("nothing"))
        data = [text_bytes(f"texts[{i}]", text) for i, text in enumerate(texts_of("texts", texts))]
        if tokenizer is None:
            if rule.normalize is not None:
                from ._counting import _normal

                data = [_normal(f"texts[{i}]", text, rule) for i, text in enumerate(data)]
            ids, offsets = self._table.encode(rule, data)
        else:
            ids, offsets = self._encode_by(tokenizer, rule, data)
        if csr:
            return _document_term(ids, offsets)
        return np.split(ids, offsets[1:-1]) if len(data) else []

    def _options(self) -> dict[str, Any]:
        """Those that these words were counted with, as `rule_of` takes them; none where they are not known."""
        rule = self._rule
        if rule is None:
            return {}
        return {
            "tokenizer": self._tokenizer or rule.zh or rule.tokenizer,
            "lowercase": rule.lowercase,
            "normalize": rule.normalize,
            "ngrams": rule.ngrams,
            "document": "line" if rule.lines else "file",
            "stop_words": rule.stop_words,
            "errors": rule.errors,
            "max_token_bytes": rule.max_token_bytes,
        }

    def _encode_by(
        self, tokenizer: Tokenizer, rule: Rule, data: list[bytes]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`Table.encode` with tokens from a callable."""
        from .reference.wordcount import Text as Source

        blob, offsets, *_ = self._table.top()
        bounds = offsets.tolist()
        rank = {blob[a:b]: i for i, (a, b) in enumerate(pairwise(bounds))}
        ids: list[int] = []
        ends = [0]
        for i, text in enumerate(data):
            for keys in Source(f"texts[{i}]", rule, tokenizer=tokenizer).feed(text, last=True):
                ids += [rank[key] for key in keys if key in rank]
            ends.append(len(ids))
        return np.array(ids, np.int64), np.array(ends, np.int64)

    def to_dict(self) -> dict[str, int]:
        """The counts as a dict, the most frequent word first.

        Returns
        -------
        dict of str to int
            Some 150 bytes a word.

        Examples
        --------
        >>> import fastops
        >>> fastops.count_words("a b a").to_dict()
        {'a': 2, 'b': 1}
        """
        return dict(self._pairs())

    def to_arrow(self, *, binary: bool = False) -> Any:
        """The counts as a pyarrow table, the most frequent word first; the words are not copied once more.

        Parameters
        ----------
        binary : bool, optional
            Give the words as ``large_binary``: needed where some are no UTF-8.

        Returns
        -------
        pyarrow.Table
            Columns ``word`` (large_string), ``count`` (int64) and, where documents were counted, ``docs`` (int64).

        Raises
        ------
        ImportError
            Pyarrow is not installed.
        ValueError
            A word that is no UTF-8, from ``errors="surrogateescape"``, without `binary`.

        Examples
        --------
        >>> import fastops
        >>> fastops.count_words("a b a").to_arrow().to_pydict()  # doctest: +SKIP
        {'word': ['a', 'b'], 'count': [2, 1]}
        """
        as_bytes = _validate.boolean("binary", binary)
        import pyarrow as pa

        blob, offsets, counts, docs = self._table.top()
        if not as_bytes:
            _require_utf8(blob, offsets)
        kind = pa.large_binary() if as_bytes else pa.large_string()
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(blob)]
        columns = {"word": pa.Array.from_buffers(kind, len(counts), buffers)}
        for name, numbers in (("count", counts), ("docs", docs)):
            if numbers is not None:
                # Below 2**63, so the bits of uint64 are those of int64, which more tools read.
                buffers = [None, pa.py_buffer(numbers)]
                columns[name] = pa.Array.from_buffers(pa.int64(), len(numbers), buffers)
        return pa.table(columns)

    def to_pandas(self) -> Any:
        """The counts as a pandas data frame, the most frequent word first.

        Returns
        -------
        pandas.DataFrame
            Columns ``word``, ``count`` and, where documents were counted, ``docs``.

        Raises
        ------
        ImportError
            Pandas is not installed.

        Examples
        --------
        >>> import fastops
        >>> fastops.count_words("a b a").to_pandas()  # doctest: +SKIP
          word  count
        0    a      2
        1    b      1
        """
        import pandas as pd

        blob, offsets, counts, docs = self._table.top()
        words: Any = _strings(blob, offsets)
        if not blob.isascii() and not _is_utf8(blob, offsets):
            # Strings in Arrow's form have no lone surrogates.
            words = pd.Series(words, dtype=object)
        columns = {"word": words, "count": counts.astype(np.int64)}
        if docs is not None:
            columns["docs"] = docs.astype(np.int64)
        return pd.DataFrame(columns)

    def to_bytes(self) -> bytes:
        """The counts in fastops' own container, which `from_bytes` reads.

        Returns
        -------
        bytes
            Words, counts and documents with a checksum; without the options of counting and `skipped`. Equal counts give equal
            bytes, however they were counted.

        Examples
        --------
        >>> import fastops
        >>> data = fastops.count_words("a b a").to_bytes()
        >>> data[:4], len(data)
        (b'FOWC', 90)
        """
        return packed(self._table)

    @classmethod
    def from_bytes(cls, data: Buffer) -> Self:
        """The counts of a container.

        Parameters
        ----------
        data : bytes-like
            What `to_bytes` gave.

        Returns
        -------
        WordCounts
            The same counts; they do not know how texts were made into words.

        Raises
        ------
        TypeError
            What is not bytes-like.
        ValueError
            A container that is damaged, cut or of a newer version: sizes are checked before memory is taken, and a checksum
            covers every byte.

        Examples
        --------
        >>> import fastops
        >>> fastops.WordCounts.from_bytes(fastops.count_words("a b a").to_bytes())
        WordCounts({'a': 2, 'b': 1}, 2 words, total 3)
        """
        try:
            view = memoryview(data)
        except TypeError:
            raise _validate.wrong_type("data", "bytes-like", data) from None
        with view:
            return cls._of(_backend.table_from_bytes(view))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the container of `to_bytes` to a file.

        Parameters
        ----------
        path : str or path
            Replaced at once when all is on the disk: a reader sees the old file or the new one.

        Raises
        ------
        OSError
            What the file system says; the old file is still there, and no other was left.
        TypeError
            `path` that is no str or path.

        Examples
        --------
        >>> import fastops, os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "counts.fowc")
        ...     fastops.count_words("a b a").save(path)
        ...     fastops.WordCounts.load(path)["a"]
        2
        """
        name = _path(path)
        data = packed(self._table)
        with _replacing(name) as file:
            file.write(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The counts of a file that `save` wrote.

        Parameters
        ----------
        path : str or path
            The file.

        Returns
        -------
        WordCounts
            The same counts; they do not know how texts were made into words.

        Raises
        ------
        OSError
            What the file system says.
        TypeError
            `path` that is no str or path.
        ValueError
            A file that `save` did not write, or that is damaged.

        Examples
        --------
        >>> import fastops, os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "counts.fowc")
        ...     fastops.count_words("a b a").save(path)
        ...     fastops.WordCounts.load(path)["a"]
        2
        """
        name = _path(path)
        with open(name, "rb") as file:
            data = file.read()
        try:
            return cls.from_bytes(data)
        except ValueError as error:
            error.add_note(f"while {name!r} was read")
            raise

    def to_tsv(self, path: str | os.PathLike[str], k: int | None = None) -> None:
        """Write a line ``word<TAB>count`` for each word, the most frequent first.

        Parameters
        ----------
        path : str or path
            Replaced at once when all is on the disk.
        k : int, optional
            How many words; all by default.

        Raises
        ------
        OSError
            What the file system says.
        TypeError
            `path` that is no str or path, `k` that is no integer.
        ValueError
            A negative `k`; a word that holds a tab or a line feed, which the format cannot hold: leave such words out with
            ``filter(without=...)``. Nothing was written.

        Notes
        -----
        What ``spm_train --input_format=tsv`` of sentencepiece reads. It knows no escapes, and words that are no UTF-8 are written
        as the bytes they are.

        Examples
        --------
        >>> import fastops, pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "counts.tsv")
        ...     fastops.count_words("a b a").to_tsv(path)
        ...     path.read_text()
        'a\\t2\\nb\\t1\\n'
        """
        name = _path(path)
        blob, offsets, counts, _ = self._table.top(None if k is None else _validate.integer("k", k, 0))
        for byte in _TSV_BREAKS:
            at = blob.find(byte)
            if at >= 0:
                i = int(np.searchsorted(offsets, at, "right")) - 1
                word = _word(blob[int(offsets[i]) : int(offsets[i + 1])])
                raise _validate.wrong_value("words", "free of tabs and line feeds to be written as TSV", word)
        with _replacing(name) as file:
            for begin in range(0, len(counts), _CHUNK):
                bounds = offsets[begin : begin + _CHUNK + 1].tolist()
                numbers = counts[begin : begin + _CHUNK].tolist()
                file.write(
                    b"".join(
                        b"%b\t%d\n" % (blob[a:b], count)
                        for a, b, count in zip(bounds, bounds[1:], numbers, strict=False)
                    )
                )


def _unpickle(data: bytes, rule: Rule | None, skipped: list[tuple[str, str]]) -> WordCounts:
    return WordCounts._of(_backend.table_from_bytes(data), rule, None, skipped)


def _table_of(counts: object) -> Any:
    """A table of a mapping's words and counts, all of them checked."""
    if not isinstance(counts, Mapping):
        raise _validate.wrong_type("other", "a WordCounts or a mapping of words to counts", counts)
    table = _backend.word_table()
    for word, count in counts.items():
        if not isinstance(word, (str, bytes)):
            raise _validate.wrong_type("word", "a str or bytes", word)
        number = _validate.integer(f"count of {_validate.clip(repr(word), 40)}", count, 0)
        if number:
            try:
                table.add(_checked_key("word", word), number)
            except OverflowError:
                raise _validate.wrong_value("other", "such that sums stay below 2**63", Text("more")) from None
    return table


def _is_utf8(blob: bytes, offsets: NDArray[np.uint64]) -> bool:
    """Whether each word by itself is UTF-8: two halves of a character may stand in two words."""
    try:
        blob.decode("utf-8")
    except UnicodeDecodeError:
        return False
    begins = offsets[:-1][offsets[:-1] < offsets[-1]]
    return not ((np.frombuffer(blob, np.uint8)[begins] & 0xC0) == 0x80).any()


def _require_utf8(blob: bytes, offsets: NDArray[np.uint64]) -> None:
    if blob.isascii() or _is_utf8(blob, offsets):
        return
    bounds = offsets.tolist()
    for a, b in pairwise(bounds):
        try:
            blob[a:b].decode("utf-8")
        except UnicodeDecodeError:
            _refuse_bytes(blob[a:b])


def _refuse_bytes(key: bytes) -> NoReturn:
    raise _validate.wrong_value("binary", "True where words are no UTF-8", key)


def _document_term(
    ids: NDArray[np.int64], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows of ids as a matrix in compressed rows: each id once a row, ascending, and how often it was there."""
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.lexsort((ids, rows))
    ids, rows = ids[order], rows[order]
    first = np.ones(len(ids), bool)
    first[1:] = (ids[1:] != ids[:-1]) | (rows[1:] != rows[:-1])
    begins = np.flatnonzero(first)
    indptr = np.zeros(len(offsets), np.int64)
    np.cumsum(np.bincount(rows[begins], minlength=len(offsets) - 1), out=indptr[1:])
    return indptr, ids[begins], np.diff(np.append(begins, len(ids)))
