# SPDX-License-Identifier: BSD-3-Clause
"""Each cell of the tables in docs/wordcount.md is a test, over every backend."""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from typing import Any

import pytest
from pages import DOCS, table

from fastops import DecodeError, TokenTooLong, WordCounts, count_files, count_words

pytestmark = pytest.mark.usefixtures("over_backend")

PAGE = DOCS / "wordcount.md"
ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (DecodeError, FileNotFoundError, TokenTooLong, TypeError, ValueError)
}


def literal(cell: str) -> Any:
    return ast.literal_eval(cell.strip("`"))


def grid(heading: str, column: str) -> list[tuple[str, str, str]]:
    """Row, column and text of every cell of the table whose first two columns these are."""
    head, *body = table(PAGE, f"{heading} | {column}")
    return [(row[0], name, text) for row in body for name, text in zip(head[1:], row[1:], strict=True)]


def check(text: str, cell: str, **options: Any) -> None:
    """What the text's words are, or the error."""
    if cell.strip("`") in ERRORS:
        with pytest.raises(ERRORS[cell.strip("`")]):
            count_words(literal(text), **options)
        return
    wanted = literal(cell)
    counts = count_words(literal(text), **options)
    assert counts == Counter([wanted] if isinstance(wanted, str) else wanted)
    if isinstance(wanted, list):
        (ids,) = counts.encode(literal(text))
        assert [counts.words()[i] for i in ids] == wanted


@pytest.mark.parametrize(("text", "tokenizer", "cell"), grid("text", '`"whitespace"`'))
def test_tokenizer(text: str, tokenizer: str, cell: str) -> None:
    check(text, cell, tokenizer=literal(tokenizer))


@pytest.mark.parametrize(("text", "lowercase", "cell"), grid("text", '`None` | `"ascii"`'))
def test_lowercase(text: str, lowercase: str, cell: str) -> None:
    check(text, cell, lowercase=literal(lowercase))


@pytest.mark.parametrize(("text", "normalize", "cell"), grid("text", '`None` | `"NFC"`'))
def test_normalize(text: str, normalize: str, cell: str) -> None:
    check(text, cell, normalize=literal(normalize))


@pytest.mark.parametrize(("text", "errors", "cell"), grid("bytes", '`"replace"`'))
def test_errors(text: str, errors: str, cell: str) -> None:
    check(text, cell, errors=literal(errors))


@pytest.mark.parametrize(("text", "document", "cell"), grid("text", '`document="line"`'))
def test_documents(text: str, document: str, cell: str) -> None:
    name = document.strip("`").partition("=")[2]
    assert count_words(literal(text), document=ast.literal_eval(name), tokenizer="char").documents == int(cell)


CALLS = [(row[0].strip("`"), row[1].strip("`")) for row in itertools.islice(table(PAGE, "call"), 1, None)]


@pytest.mark.parametrize(("call", "result"), CALLS)
def test_call(call: str, result: str) -> None:
    scope = {"count_words": count_words, "count_files": count_files, "WordCounts": WordCounts}
    if result in ERRORS:
        with pytest.raises(ERRORS[result]):
            eval(call, scope)
    else:
        assert eval(call, scope) == eval(result, scope)


def test_the_tables_are_there() -> None:
    assert len(CALLS) > 25
    assert len(grid("text", '`"whitespace"`')) > 30
