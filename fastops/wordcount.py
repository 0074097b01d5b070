# SPDX-License-Identifier: BSD-3-Clause
"""Word counting: texts or files in, `WordCounts` out, by rules that are written down for every byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from . import _validate
from ._counts import Tokenizer, WordCounts, keys_of
from ._rule import DOCUMENTS, ERRORS, LOWERCASE, NORMALIZE, TOKENIZERS, DecodeError, Rule, TokenTooLong, WorkerDied
from ._validate import Text

__all__ = ["DecodeError", "TokenTooLong", "WordCounts", "WorkerDied", "count_files", "count_words"]

Progress = bool | Callable[[int, int | None], object]

ON_ERROR = ("raise", "skip")
MAX_NGRAM = 1024
MAX_TOKEN_BYTES = 2**30
MIN_MEMORY = 2**20


def _ngrams(ngrams: object) -> tuple[int, int]:
    if not isinstance(ngrams, (tuple, list)):
        raise _validate.wrong_type("ngrams", "a pair of integers, the smallest and the largest n", ngrams)
    if len(ngrams) != 2:
        raise _validate.wrong_value("ngrams", "a pair of integers", Text(f"{len(ngrams)} items"))
    low = _validate.integer("ngrams[0]", ngrams[0], 1, MAX_NGRAM)
    return low, _validate.integer("ngrams[1]", ngrams[1], low, MAX_NGRAM)


def rule_of(
    *,
    tokenizer: Any = "whitespace",
    lowercase: object = None,
    normalize: object = None,
    ngrams: object = (1, 1),
    document: object = "file",
    stop_words: object = None,
    errors: object = "replace",
    doc_freq: object = False,
    max_token_bytes: object = 2**20,
) -> tuple[Rule, Tokenizer | None]:
    """The rule that the options describe, checked, and the tokenizer where it is a callable."""
    name, function, chinese = "whitespace", None, None
    if isinstance(tokenizer, str) or not callable(tokenizer):
        if hasattr(tokenizer, "cut_reference"):
            name, chinese = "zh", tokenizer
        elif not isinstance(tokenizer, str):
            wanted = " or ".join(repr(item) for item in TOKENIZERS)
            raise _validate.wrong_type("tokenizer", f"{wanted} or a callable", tokenizer)
        else:
            name = _validate.choice("tokenizer", tokenizer, TOKENIZERS)
    else:
        function = tokenizer
    lower = None if lowercase is None else _validate.choice("lowercase", lowercase, LOWERCASE)
    form = None if normalize is None else _validate.choice("normalize", normalize, NORMALIZE)
    sizes = _ngrams(ngrams)
    lines = _validate.choice("document", document, DOCUMENTS) == "line"
    stops = frozenset() if stop_words is None else frozenset(keys_of("stop_words", stop_words))
    handler = _validate.choice("errors", errors, ERRORS)
    docs = _validate.boolean("doc_freq", doc_freq)
    longest = _validate.integer("max_token_bytes", max_token_bytes, 1, MAX_TOKEN_BYTES)
    if name == "zh" and chinese is None:
        from ._zh import default_tokenizer

        chinese = default_tokenizer()
    return Rule(name, lower, form, sizes, lines, handler, stops, docs, longest, chinese), function


def _options(
    approx: object,
    doc_freq: object,
    max_output_bytes: object,
    memory_limit: object,
    on_error: object,
    progress: Any,
    timeout: object,
    workers: object,
) -> Any:
    """How the work is done, checked."""
    from ._counting import Options

    if approx is not None:
        approx = _validate.integer("approx", approx, 1, 2**31 - 1)
        if _validate.boolean("doc_freq", doc_freq):
            raise _validate.wrong_value("approx", "None with doc_freq=True, which needs exact counts", approx)
        if memory_limit is not None:
            raise _validate.wrong_value("memory_limit", "None with approx, which bounds the memory", memory_limit)
    if not (isinstance(progress, bool) or callable(progress)):
        raise _validate.wrong_type("progress", "True, False or a callable of (bytes done, bytes in all)", progress)
    return Options(
        workers=None if workers is None else _validate.integer("workers", workers, 1, _validate.MAX_THREADS),
        memory_limit=None if memory_limit is None else _validate.integer("memory_limit", memory_limit, MIN_MEMORY),
        approx=approx,
        max_output_bytes=None
        if max_output_bytes is None
        else _validate.integer("max_output_bytes", max_output_bytes, 1),
        on_error=_validate.choice("on_error", on_error, ON_ERROR),
        timeout=None if timeout is None else _validate.number("timeout", timeout, 0.0, open_low=True),
        progress=progress,
    )


def _is_file(value: object) -> bool:
    return isinstance(value, (str, bytes, os.PathLike)) or callable(getattr(value, "read", None))


def _files(files: object) -> object:
    """What names files, in its outer form: what stands behind the names is for the sources to say."""
    wanted = 'a path, a glob, "-", a file object, or a list of these'
    if _is_file(files):
        return files
    if isinstance(files, (bytearray, memoryview)) or not isinstance(files, Iterable):
        raise _validate.wrong_type("files", wanted, files)
    listed = list(files)
    for i, file in enumerate(listed):
        if not _is_file(file):
            raise _validate.wrong_type(f"files[{i}]", 'a path, a glob, "-" or a file object', file)
    return listed


def _column(name: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise _validate.wrong_type(name, "a str or None", value)


def _of_records(rule: Rule, field: object, column: object) -> Rule:
    """The rule for files or, where one of these is given, for the records in them, which are documents by themselves."""
    if _column("field", field) is not None and _column("column", column) is not None:
        raise _validate.wrong_value("column", "None with field", column)
    return rule if field is None and column is None else replace(rule, lines=False)


def count_words(
    texts: object,
    *,
    tokenizer: str | Tokenizer = "whitespace",
    lowercase: str | None = None,
    normalize: str | None = None,
    ngrams: tuple[int, int] = (1, 1),
    document: str = "file",
    min_count: int = 1,
    stop_words: Iterable[str | bytes] | None = None,
    errors: str = "replace",
    workers: int | None = None,
    memory_limit: int | None = None,
    approx: int | None = None,
    doc_freq: bool = False,
    max_token_bytes: int = 2**20,
    max_output_bytes: int | None = None,
    on_error: str = "raise",
    timeout: float | None = None,
    progress: Progress = False,
) -> WordCounts:
    """Count the words of texts in memory.

    Parameters
    ----------
    texts : str, bytes, iterable of these, Arrow array or column of pandas or polars of str
        Each a document; one str or bytes is one document. A missing value of an array or column (null, None, NaN, NA) is a document
        without words; in other iterables it is an error.
    tokenizer : {"whitespace", "word", "unicode", "char", "zh"} or callable, optional
        What a word is: ``str.split()``; ``re.findall(r"\\w+", ...)``; words of Unicode's UAX #29; code points; the words that jieba
        0.42.1 cuts Chinese into; or what a function from a str to an iterable of str gives.
    lowercase : {"ascii", "unicode", "casefold"}, optional
        Lower A-Z alone, or as ``str.lower()`` or ``str.casefold()`` of the whole document.
    normalize : {"NFC", "NFKC"}, optional
        Unicode normalization, before lowering.
    ngrams : (int, int), optional
        The smallest and the largest n of the sequences of n words that are counted; the words of one are joined by a space
        (``tokenizer="char"``: by nothing). No sequence crosses the end of a document.
    document : {"file", "line"}, optional
        Whether a text is one document, or each of its lines (which end in ``\\n`` or ``\\r\\n``).
    min_count : int, optional
        Words that were counted less often are left out.
    stop_words : iterable of str or bytes, optional
        Words that are not counted, as they are after lowering; n-grams are made of the words that remain.
    errors : {"replace", "strict", "ignore", "surrogateescape"}, optional
        What becomes of bytes that are no UTF-8, as in ``bytes.decode``.
    workers : int, optional
        How many threads (with a callable: processes) count; as many as there are CPUs by default. The result is the same.
    memory_limit : int, optional
        About how many bytes of memory the table may take, at least 2**20: more words go to temporary files, and counts stay exact.
        The result comes beside it, some 50 bytes for each short word. What ``on_error="skip"`` and `min_count` keep is held in
        memory all the same, and so is all by the backends without native code.
    approx : int, optional
        Keep this many words only: each count is too low by `WordCounts.error_bound` at most, which is at most the number of
        words counted over ``approx + 1``. One thread counts them, so that the result is the same for any number of workers; which
        words are kept depends on the order of the input, on `on_error` and on the backend.
    doc_freq : bool, optional
        Count for each word the documents that it is in.
    max_token_bytes : int, optional
        A longer word is an error: it is a file that is no text.
    max_output_bytes : int, optional
        The most bytes of text to count; more are an error.
    on_error : {"raise", "skip"}, optional
        Whether a text that cannot be counted ends the call or goes to `WordCounts.skipped`.
    timeout : float, optional
        Seconds after which a call that has not ended ends with TimeoutError. An iterable that waits for its next text is waited
        for: the clock is looked at before every text.
    progress : bool or callable, optional
        A bar on stderr where that is a terminal, or a function of the bytes done and all bytes (None where that is not known).

    Returns
    -------
    WordCounts
        The counts: a mapping, the most frequent word first.

    Raises
    ------
    DecodeError
        ``errors="strict"`` and bytes that are no UTF-8; a byte order mark of UTF-16 or UTF-32. A ValueError.
    TokenTooLong
        A word of more than `max_token_bytes` bytes. A ValueError.
    TypeError
        An argument of the wrong type, named; an item of `texts` that is no text; a callable that does not give str, or that cannot
        be pickled where ``workers`` is not 1.
    ValueError
        An argument out of its range or choices, named, before any work is done.
    WorkerDied
        A worker process was killed. A RuntimeError.

    Notes
    -----
    The order of the steps is fixed: decode, `normalize`, `lowercase`, cut into documents, `tokenizer`, `stop_words`, `ngrams`. A
    UTF-8 byte order mark at the beginning of a text is left out.
    All of Unicode is as in the Python that runs: what is white space, a word character, upper case; but for the words of
    ``tokenizer="unicode"``, which are those of Unicode 15.0.
    Counts are exact up to 2**63. Memory: 16 to 40 bytes a distinct word beside the word itself, a few MB a thread.

    Examples
    --------
    >>> import fastops
    >>> counts = fastops.count_words(["To be or not to be", "be quick"], lowercase="ascii", doc_freq=True)
    >>> counts.most_common(2)
    [('be', 3), ('to', 2)]
    >>> counts.doc_freq["be"], counts.documents
    (2, 2)
    >>> fastops.count_words("to be or not to be", ngrams=(2, 2)).to_dict()
    {'to be': 2, 'be or': 1, 'not to': 1, 'or not': 1}
    >>> fastops.count_words("a,b a", tokenizer=lambda text: text.split(","), workers=1).to_dict()
    {'a': 1, 'b a': 1}
    """
    rule, function = rule_of(
        tokenizer=tokenizer,
        lowercase=lowercase,
        normalize=normalize,
        ngrams=ngrams,
        document=document,
        stop_words=stop_words,
        errors=errors,
        doc_freq=doc_freq,
        max_token_bytes=max_token_bytes,
    )
    least = _validate.integer("min_count", min_count, 1)
    options = _options(approx, doc_freq, max_output_bytes, memory_limit, on_error, progress, timeout, workers)
    from ._counting import count_texts

    table, skipped = count_texts(texts, rule, function, options)
    return _result(table, skipped, least, rule, function)


def count_files(
    files: object,
    *,
    field: str | None = None,
    column: str | None = None,
    tokenizer: str | Tokenizer = "whitespace",
    lowercase: str | None = None,
    normalize: str | None = None,
    ngrams: tuple[int, int] = (1, 1),
    document: str = "line",
    min_count: int = 1,
    stop_words: Iterable[str | bytes] | None = None,
    errors: str = "replace",
    workers: int | None = None,
    memory_limit: int | None = None,
    approx: int | None = None,
    doc_freq: bool = False,
    max_token_bytes: int = 2**20,
    max_output_bytes: int | None = None,
    on_error: str = "raise",
    timeout: float | None = None,
    progress: Progress = False,
) -> WordCounts:
    """Count the words of files, compressed or not.

    Parameters
    ----------
    files : str, path, file object, or list of these
        Names, globs, ``"-"`` for the standard input (from its descriptor: what was read from ``sys.stdin`` before, and what that
        read ahead, is not counted), or objects open for reading bytes. gzip, bzip2, xz and (with the extra "zst")
        Zstandard are known by their first bytes, whatever the name.
    field : str, optional
        The files are JSON lines: count this field of each, a document by itself; a null is a document without words.
    column : str, optional
        The files are Parquet: count this column, each value a document by itself, nulls too. Needs pyarrow.
    tokenizer : {"whitespace", "word", "unicode", "char", "zh"} or callable, optional
        What a word is; see `count_words`.
    lowercase : {"ascii", "unicode", "casefold"}, optional
        Lower A-Z alone, or as ``str.lower()`` or ``str.casefold()``.
    normalize : {"NFC", "NFKC"}, optional
        Unicode normalization, before lowering.
    ngrams : (int, int), optional
        The smallest and the largest n of the sequences of n words that are counted, within a document.
    document : {"line", "file"}, optional
        Whether a document is a line (which ends in ``\\n`` or ``\\r\\n``) or a file.
    min_count : int, optional
        Words that were counted less often are left out.
    stop_words : iterable of str or bytes, optional
        Words that are not counted, as they are after lowering.
    errors : {"replace", "strict", "ignore", "surrogateescape"}, optional
        What becomes of bytes that are no UTF-8, as in ``bytes.decode``.
    workers : int, optional
        How many threads (with a callable: processes) count; as many as there are CPUs by default. The result is the same.
    memory_limit : int, optional
        About how many bytes of memory the table may take, at least 2**20: more words go to temporary files, and counts stay exact.
        The result comes beside it, some 50 bytes for each short word. What ``on_error="skip"`` and `min_count` keep is held in
        memory all the same, and so is all by the backends without native code.
    approx : int, optional
        Keep this many words only; see `count_words`.
    doc_freq : bool, optional
        Count for each word the documents that it is in.
    max_token_bytes : int, optional
        A longer word is an error: it is a file that is no text.
    max_output_bytes : int, optional
        The most bytes that one compressed file may become; more are an error.
    on_error : {"raise", "skip"}, optional
        Whether a file that cannot be counted ends the call or goes to `WordCounts.skipped`, without any of its words.
    timeout : float, optional
        Seconds after which a call that has not ended ends with TimeoutError. Pipes are not waited for longer, but with a callable
        and several workers the `read` of an object that Python's own ``open`` did not make is.
    progress : bool or callable, optional
        A bar on stderr where that is a terminal, or a function of the bytes done and all bytes (None where that is not known).

    Returns
    -------
    WordCounts
        The counts: a mapping, the most frequent word first.

    Raises
    ------
    DecodeError
        ``errors="strict"`` and bytes that are no UTF-8; a byte order mark of UTF-16 or UTF-32. Names the file and the byte.
    OSError
        A file that is missing (before any work is done) or cannot be read; names it.
    TokenTooLong
        A word of more than `max_token_bytes` bytes. Names the file and the byte (with `normalize`: of the text in normal form).
    TypeError
        An argument of the wrong type, named; a callable that does not give str, or that cannot be pickled where ``workers`` is
        not 1.
    ValueError
        An argument out of its range or choices, named, before any work is done; a compressed file that is damaged or cut; a file
        that became shorter while it was read.
    WorkerDied
        A worker process was killed; names the part of the input. A RuntimeError.

    Notes
    -----
    The steps and their order are those of `count_words`. Plain files are cut at line ends and read by all workers at once.

    Examples
    --------
    >>> import fastops, gzip, os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "lines")
    ...     with gzip.open(path, "wt") as file:
    ...         _ = file.write("to be or\\nnot to be\\n")
    ...     counts = fastops.count_files(path)
    >>> counts.most_common(1), counts.documents
    ([('be', 2)], 2)
    """
    rule, function = rule_of(
        tokenizer=tokenizer,
        lowercase=lowercase,
        normalize=normalize,
        ngrams=ngrams,
        document=document,
        stop_words=stop_words,
        errors=errors,
        doc_freq=doc_freq,
        max_token_bytes=max_token_bytes,
    )
    least = _validate.integer("min_count", min_count, 1)
    options = _options(approx, doc_freq, max_output_bytes, memory_limit, on_error, progress, timeout, workers)
    sources = _files(files)
    rule = _of_records(rule, field, column)
    from ._counting import count_sources

    table, skipped = count_sources(sources, rule, function, options, field, _column("column", column))
    return _result(table, skipped, least, rule, function)


def _result(
    table: Any, skipped: Sequence[tuple[str, str]], min_count: int, rule: Rule, function: Tokenizer | None
) -> WordCounts:
    if min_count > 1:
        table = table.select(min_count=min_count)
    return WordCounts._of(table, rule, function, skipped)
