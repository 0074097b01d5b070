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

UTF8_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {b"\xff\xfe": "UTF-16 or UTF-32", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}


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


def check_bom(name: str, head: bytes) -> None:
    """Refuses a text whose first bytes say that it is UTF-16 or UTF-32."""
    for mark, encoding in _OTHER_BOMS.items():
        if head.startswith(mark):
            raise DecodeError(f"{name} must be UTF-8, got a byte order mark of {encoding} at byte 0")


def not_utf8(name: str, offset: int, problem: UnicodeDecodeError) -> DecodeError:
    """The error for bytes of which the first is byte `offset` of its text."""
    got = f"0x{problem.object[problem.start]:02x} at byte {offset + problem.start} ({problem.reason})"
    return DecodeError(f"{name} must be UTF-8, got {got}")


class TokenTooLong(ValueError):
    """A token of more than `max_token_bytes` bytes; names the file and the byte where it begins."""


class WorkerDied(RuntimeError):
    """A worker process that ended without an answer; names the part of the input that it was working on."""
