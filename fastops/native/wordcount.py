# SPDX-License-Identifier: BSD-3-Clause
"""Thin typed access to the compiled word counter."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from .. import _core, _rule, _unicode
from .._rule import Rule

Table = _core.WordTable
table_from_bytes = _core.table_from_bytes

# In the order of the enumerations in fastops.h.
_TOKENIZERS = ("whitespace", "word", "char", "unicode", "zh")
_CASES = (None, "ascii", "unicode", "casefold")
_ERRORS = _rule.ERRORS


@lru_cache(maxsize=8)
def native_rule(rule: Rule) -> _core.WordRule:
    """The rule with the tables that it needs."""
    tables: dict[str, Any] = {}
    maps_case = rule.lowercase in ("unicode", "casefold")
    letters = rule.tokenizer not in ("whitespace", "char")
    tables["class_pages"], tables["classes"] = _unicode.classes(letters, rule.lowercase == "unicode")
    if maps_case:
        tables["case_pages"], tables["cases"], tables["case_several"] = _unicode.cases(rule.lowercase == "casefold")
    if rule.tokenizer == "unicode":
        from .. import _word_break

        tables["break_pages"], tables["break_classes"] = _word_break.table()
    if rule.tokenizer == "zh" and rule.zh is not None:
        from .. import _zh

        tables["zh"] = _zh.native_model(rule.zh)
    stop_words = _core.WordTable()
    for word in rule.stop_words:
        stop_words.add(word, 1)
    return _core.WordRule(
        _TOKENIZERS.index(rule.tokenizer),
        _CASES.index(rule.lowercase),
        _ERRORS.index(rule.errors),
        rule.lines,
        rule.doc_freq,
        rule.ngrams,
        rule.max_token_bytes,
        stop_words if rule.stop_words else None,
        tables,
    )


class Counter(_core.WordCounter):
    """A counter of bytes; `rule.normalize` is the caller's to apply."""

    def __init__(self, rule: Rule, workers: int, memory_limit: int | None, approx: int | None) -> None:
        super().__init__(native_rule(rule), workers, memory_limit or 0, approx or 0)


def word_counter(
    rule: Rule, *, workers: int = 1, memory_limit: int | None = None, approx: int | None = None
) -> Counter:
    """A counter of what `rule` says, by at most `workers` threads, whose tables go to a temporary file beyond `memory_limit` bytes."""
    return Counter(rule, workers, memory_limit, approx)


def word_table(docs: bool = False) -> Table:
    """An empty table."""
    return Table(docs)
