# SPDX-License-Identifier: BSD-3-Clause
"""What is counted as a word: one `Rule` says it to every backend, and the errors that counting raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._zh import ZhTokenizer

TOKENIZERS = ("whitespace", "word", "unicode", "char", "zh")
LOWERCASE = ("ascii", "unicode", "casefold")
NORMALIZE = ("NFC", "NFKC")
ERRORS = ("replace", "strict", "ignore", "surrogateescape")
DOCUMENTS = ("line", "file")


@dataclass(frozen=True)
class Rule:
    """How bytes become counted keys; the arguments of `fastops.count_words`, checked.

    The order of the steps is fixed: decode, normalize, lowercase, cut into documents, tokenize, drop stop words, join n-grams.
    """

    tokenizer: str = "whitespace"
    lowercase: str | None = None
    normalize: str | None = None
    ngrams: tuple[int, int] = (1, 1)
    lines: bool = True
    errors: str = "replace"
    stop_words: frozenset[bytes] = frozenset()
    doc_freq: bool = False
    max_token_bytes: int = 2**20
    zh: ZhTokenizer | None = None

    @property
    def documents_matter(self) -> bool:
        """Whether a count depends on where documents begin and end."""
        return self.doc_freq or self.ngrams != (1, 1)


class DecodeError(ValueError):
    """Text that is not valid UTF-8 under errors="strict", or in another encoding; names the file and the byte."""


class TokenTooLong(ValueError):
    """A token of more than `max_token_bytes` bytes; names the file and the byte where it begins."""


class WorkerDied(RuntimeError):
    """A worker process that ended without an answer; names the part of the input that it was working on."""
