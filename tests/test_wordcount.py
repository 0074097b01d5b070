# SPDX-License-Identifier: BSD-3-Clause
"""What is counted: every backend against expressions of Python's own, on hostile bytes, cut anywhere, by any number of workers."""

from __future__ import annotations

import inspect
import io
import itertools
import os
import pathlib
import random
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastops
import fastops.distributed
from fastops import _counting
from fastops.__main__ import parser
from fastops._rule import DecodeError, Rule, TokenTooLong
from fastops.wordcount import rule_of

DATA = pathlib.Path(os.environ.get("FASTOPS_TEST_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))

TOKENIZERS = ("whitespace", "word", "char")
LOWERCASE = (None, "ascii", "unicode", "casefold")
NORMALIZE = (None, "NFC", "NFKC")
ERRORS = ("replace", "strict", "ignore", "surrogateescape")
NGRAMS = ((1, 1), (2, 2), (1, 3))

# Every kind of white space, and what looks like it and is none.
SPACES = "a\tb\nc\vd\fe\rf\x1cg\x1dh\x1ei\x1fj\x85k\xa0l\u1680m\u2000n\u200ao\u2028p\u2029q\u202fr\u205fs\u3000t"
NO_SPACES = "a\u200bb\u200cc\u200dd\u2060e\ufefff\x00g\x01h\x1bi\x7fj\u180ek\xadl"
# Lower and folded case that changes lengths or looks around: final sigma, also across an apostrophe and marks, dotted I.
CASES = "ΑΣ ΑΣ' ΑΣ'Β Α\u0301Σ\u0301 ΑΣ\u0301Β Σ 'Σ ΣΣ İ I\u0307 ẞ ß ŉ ǰ ΐ և ﬁ ﬃ Ǆ ǅ K Å Ⴀ ა Ꭰ ꭰ ᏸ \U00010400 \U0001e900 ΑΣ\n ΑΣ\r\nΣ"
FORMS = "e\u0301 é \u1e9b\u0323 \uac00 \u1100\u1161 \u1100\u1161\u11a8 ﬁ ² ½ ㎏ \u2126 \u212b A\u030a \u0344 \u0958 \ufb1d \U0001d15e q\u0323\u0307 q\u0307\u0323 \xa0x\u2003y\u3000z ｱﾞ"
EMOJI = "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ☝️ 1️⃣ 🏴\U000e0067\U000e0062\U000e007f x👩‍🚀y"
SCRIPTS = "don't 3.14 x_y a-b 中文字 かな カナ 한국어 हिन्दी ไทย עברית العربية ٣٤ ⅷ ①"
BROKEN = (
    b"\x80",
    b"a\xffb",
    b"\xc0\x80",
    b"\xc1\xbf",
    b"\xc3",
    b"\xc3 \xa9",
    b"\xe0\x80\x80",
    b"\xe0\xa0",
    b"\xe2\x82",
    b"\xe2\x82\xe2\x82\xac",
    b"\xed\xa0\x80",
    b"\xed\xbf\xbf",
    b"\xed\x9f\xbf",
    b"\xef\xbf",
    b"\xf0\x80\x80\x80",
    b"\xf0\x90\x80",
    b"\xf0\x9f\x98",
    b"\xf0\x9f\x98\x80\x80",
    b"\xf4\x8f\xbf\xbf",
    b"\xf4\x90\x80\x80",
    b"\xf5\x80\x80\x80",
    b"\xf8\x88\x80\x80\x80",
    b"\xfe\xfe\xff\xff",
    b"x\xe2\x82y\xe2z",
    b"\r\xff\n\xc2",
)
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "spaces alone": b" \n\t\r\n \n",
    "one word": b"word",
    "lines": b"one\ntwo words\r\n\r\n\nthree\rfour\r\r\nlast without an end\r",
    "one end": b"\n",
    "cr": b"\r",
    "crlf": b"\r\n",
    "bom": b"\xef\xbb\xbfbom \xef\xbb\xbfmore\n\xef\xbb\xbf",
    "bom alone": b"\xef\xbb\xbf",
    "half a bom": b"\xef\xbb",
    "bom, end": b"\xef\xbb\xbf\n",
    "nul": b"a\x00b \x00 \x00\x00\na\x00\x00b",
    "spaces": SPACES.encode(),
    "no spaces": NO_SPACES.encode(),
    "cases": CASES.encode(),
    "forms": FORMS.encode(),
    "emoji": EMOJI.encode(),
    "scripts": SCRIPTS.encode(),
    "broken": b" ".join(BROKEN) + b"\n" + b"".join(BROKEN) + b"\n" + b"w".join(BROKEN),
    "broken lines": b"\n".join(BROKEN),
    "broken crlf": b"\r\n".join(BROKEN),
    "cut": "ok é".encode()[:-1],
    "ends in an invalid byte": b"a\n\xff",
    "all bytes": bytes(range(256)),
    "mixed": b"The the THE tHe " + CASES.encode() + b"\n" + FORMS.encode() + b" \xff the\n" + SPACES.encode(),
}
OTHER_ENCODINGS = (
    "a\n".encode("utf-16-le"),
    "a\n".encode("utf-16-be"),
    "a\n".encode("utf-32-le"),
    "a\n".encode("utf-32-be"),
)
MARKS = (b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")


def lowered(text: str, lowercase: str | None) -> str:
    if lowercase == "ascii":
        return re.sub("[A-Z]", lambda letter: chr(ord(letter[0]) + 32), text)
    return {None: text, "unicode": text.lower(), "casefold": text.casefold()}[lowercase]


def tokens(document: str, tokenizer: str) -> list[str]:
    return {"whitespace": str.split, "word": re.compile(r"\w+").findall, "char": list}[tokenizer](document)


def expected(data: bytes, rule: Rule) -> tuple[Counter[bytes], Counter[bytes], int]:
    """Counts, documents of each and documents in all, from nothing but Python's own functions."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", rule.errors)
    if rule.normalize is not None:
        text = unicodedata.normalize(rule.normalize, text)
    text = lowered(text, rule.lowercase)
    documents = [text]
    if rule.lines:
        documents = [re.sub(r"\r?\n\Z", "", line) for line in re.findall(r"[^\n]*\n|[^\n]+", text)]
    counts: Counter[bytes] = Counter()
    frequencies: Counter[bytes] = Counter()
    for document in documents:
        words = [word.encode("utf-8", "surrogateescape") for word in tokens(document, rule.tokenizer)]
        words = [word for word in words if word not in rule.stop_words]
        space = b"" if rule.tokenizer == "char" else b" "
        low, high = rule.ngrams
        keys = [
            space.join(gram) for n in range(low, high + 1) for gram in zip(*(words[i:] for i in range(n)), strict=False)
        ]
        counts.update(keys)
        frequencies.update(set(keys))
    return counts, frequencies, len(documents)


def entries(table: Any) -> dict[bytes, tuple[int, int]]:
    blob, offsets, counts, docs = table.top()
    bounds = offsets.tolist()
    keys = [blob[a:b] for a, b in itertools.pairwise(bounds)]
    return dict(
        zip(
            keys, zip(counts.tolist(), docs.tolist() if docs is not None else [0] * len(keys), strict=True), strict=True
        )
    )


def check(table: Any, data: Iterable[bytes], rule: Rule) -> None:
    """The table holds what Python counts in these texts."""
    counts: Counter[bytes] = Counter()
    frequencies: Counter[bytes] = Counter()
    documents = 0
    for text in data:
        more = expected(text, rule)
        counts += more[0]
        frequencies += more[1]
        documents += more[2]
    wanted = {key: (count, frequencies[key] if rule.doc_freq else 0) for key, count in counts.items()}
    assert entries(table) == wanted
    assert table.documents == documents
    assert table.total() == sum(counts.values())
    assert len(table) == len(counts)


def feed(counter: Any, *blocks: bytes) -> None:
    for block in blocks:
        counter.feed(block)
    counter.end()


def count(backend: ModuleType, data: bytes, rule: Rule, *cuts: int, workers: int = 1) -> Any:
    """One text in blocks that end at the cuts."""
    counter = backend.word_counter(rule, workers=workers)
    blocks: Iterable[bytes] = (data[begin:end] for begin, end in itertools.pairwise((0, *sorted(cuts), len(data))))
    if rule.normalize is not None and backend.__name__ == "fastops.native":
        # It counts text in normal form, which is made on the way to it.
        blocks = _counting.normalized("<text>", blocks, rule)
    feed(counter, *blocks)
    return counter.finish()


def count_whole(backend: ModuleType, texts: list[bytes], rule: Rule) -> Any:
    """Texts by themselves."""
    counter = backend.word_counter(rule)
    _counting._count_documents(counter, "<text>", texts, rule)
    return counter.finish()


def some(backend: ModuleType, points: Iterable[int]) -> list[str]:
    """Code points without surrogates: those with a case or a space, and a few of the others."""
    letters = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    step = 8 if backend.__name__ == "fastops.native" else 64
    return [c for i, c in enumerate(letters) if i % step == 0 or c.isspace() or c.lower() != c or c.casefold() != c]


@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize("lines", [True, False], ids=["line", "file"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_count_is_what_python_counts(backend: ModuleType, tokenizer: str, lines: bool, errors: str) -> None:
    for lowercase, normalize, ngrams, doc_freq in itertools.product(LOWERCASE, NORMALIZE, NGRAMS, (False, True)):
        rule = Rule(tokenizer, lowercase, normalize, ngrams, lines, errors, doc_freq=doc_freq)
        texts = []
        for text in TEXTS.values():
            try:
                text.decode("utf-8", errors)
            except UnicodeDecodeError:
                continue
            texts.append(text)
        check(count_whole(backend, texts, rule), texts, rule)


@pytest.mark.parametrize("name", TEXTS)
def test_each_text_by_itself(backend: ModuleType, name: str) -> None:
    for tokenizer, lines, lowercase in itertools.product(TOKENIZERS, (True, False), LOWERCASE):
        rule = Rule(tokenizer, lowercase, lines=lines, doc_freq=True)
        check(count(backend, TEXTS[name], rule), [TEXTS[name]], rule)


@pytest.mark.parametrize("tokenizer", ["unicode", "zh"])
def test_other_tokenizers_see_documents_in_the_same_way(backend: ModuleType, tokenizer: str) -> None:
    if tokenizer == "zh":
        pytest.importorskip("jieba", reason="jieba, whose dictionary is used, is not installed")
    from fastops.wordcount import rule_of

    options: dict[str, Any]
    for options in (
        {"document": "line", "doc_freq": True},
        {"document": "file", "ngrams": (1, 2)},
        {"document": "line", "lowercase": "casefold", "normalize": "NFKC"},
        {"document": "file", "errors": "surrogateescape"},
    ):
        rule, _ = rule_of(tokenizer=tokenizer, **options)
        plain = fastops.reference.word_counter(rule)
        plain.documents(TEXTS.values())
        table, wanted = count_whole(backend, list(TEXTS.values()), rule), plain.finish()
        assert entries(table) == entries(wanted)
        assert table.documents == wanted.documents


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(
    "name", ["lines", "bom", "spaces", "cases", "forms", "emoji", "broken", "all bytes", "crlf", "bom, end"]
)
def test_blocks_may_end_anywhere(backend: ModuleType, name: str, tokenizer: str) -> None:
    data = TEXTS[name]
    rules = [
        Rule(tokenizer),
        Rule(tokenizer, lines=False, doc_freq=True, ngrams=(1, 2), lowercase="unicode"),
        Rule(tokenizer, lines=True, doc_freq=True, errors="surrogateescape", normalize="NFC"),
        Rule(tokenizer, lines=False, errors="ignore", lowercase="casefold"),
    ]
    for rule in rules:
        whole = count(backend, data, rule)
        check(whole, [data], rule)
        for cut in range(len(data) + 1):
            parts = count(backend, data, rule, cut)
            assert entries(parts) == entries(whole), cut
            assert parts.documents == whole.documents, cut
        every = count(backend, data, rule, *range(len(data)))
        assert entries(every) == entries(whole)


PIECES = st.sampled_from(
    [
        *BROKEN,
        *(
            character.encode()
            for character in SPACES + NO_SPACES + "ΣσςİẞﬁÅé\u0301\u0307'’.:_-09AZaz👩🏽\u200d\U00010400中"
        ),
        b"\r\n",
        b"\xef\xbb\xbf",
        b"word",
        b"Word",
    ]
)
RULES = st.builds(
    Rule,
    tokenizer=st.sampled_from(TOKENIZERS),
    lowercase=st.sampled_from(LOWERCASE),
    normalize=st.sampled_from(NORMALIZE),
    ngrams=st.sampled_from([*NGRAMS, (3, 5)]),
    lines=st.booleans(),
    errors=st.sampled_from(["replace", "ignore", "surrogateescape"]),
    stop_words=st.sampled_from([frozenset(), frozenset([b"a", b"word", b"\xef\xbf\xbd"])]),
    doc_freq=st.booleans(),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES, max_size=60).map(b"".join), RULES, st.data())
def test_any_text_in_any_blocks(backend: ModuleType, data: bytes, rule: Rule, draw: st.DataObject) -> None:
    if data.startswith(MARKS):
        data = b" " + data
    cuts = draw.draw(st.lists(st.integers(0, len(data)), max_size=4))
    check(count(backend, data, rule, *cuts), [data], rule)
    check(count_whole(backend, [data, b"", data], rule), [data, b"", data], rule)


@pytest.mark.parametrize("lines", [True, False], ids=["line", "file"])
def test_a_file_in_spans(backend: ModuleType, lines: bool, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "text"
    for name, rule in itertools.product(
        ("lines", "bom", "broken lines", "crlf", "mixed", "empty", "one word", "bom, end"),
        (Rule(lines=lines), Rule("word", "unicode", lines=lines), Rule("char", lines=lines, errors="ignore")),
    ):
        data = TEXTS[name]
        path.write_bytes(data)
        with path.open("rb") as file:
            for cut in range(len(data) + 1):
                counter = backend.word_counter(rule)
                counter.file(file.fileno(), 0, cut)
                counter.file(file.fileno(), cut, len(data))
                table = counter.finish()
                if not lines:
                    # Which of the spans is the document is not said.
                    table.documents = 1
                check(table, [data], rule)
            # The place of the file stays what it was, and a span may end beyond the file.
            assert file.tell() == 0
            counter = backend.word_counter(rule)
            counter.file(file.fileno(), 0, len(data) + 100)
            check(counter.finish(), [data], rule)


def test_one_file_that_is_one_document(backend: ModuleType, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "text"
    for data in (TEXTS["lines"], TEXTS["mixed"], b""):
        path.write_bytes(data)
        rule = Rule(lines=False, doc_freq=True, ngrams=(1, 2))
        with path.open("rb") as file:
            counter = backend.word_counter(rule, workers=4)
            counter.file(file.fileno(), 0, len(data))
            check(counter.finish(), [data], rule)


def test_a_file_that_cannot_be_read(backend: ModuleType) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    counter = backend.word_counter(Rule())
    counter.name = "the name"
    try:
        with pytest.raises(OSError, match="the name"):
            counter.file(reading, 0, 10)
    finally:
        os.close(reading)


SIZES = (
    1,
    7,
    8,
    15,
    16,
    17,
    23,
    24,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    128,
    255,
    256,
    257,
    4095,
    4096,
    65535,
    65536,
    65537,
    70_000,
)


@pytest.mark.parametrize("tokenizer", ["whitespace", "word"])
def test_tokens_around_the_sizes_of_registers_and_buffers(backend: ModuleType, tokenizer: str) -> None:
    words = []
    for size in SIZES:
        # Words that differ in their last or first byte, or by one byte of length.
        words += [b"x" * size, b"x" * (size - 1) + b"y", b"y" + b"x" * (size - 1)]
        words += [("é" * (size // 2)).encode() + b"z" * (size % 2), ("\U00020000" * max(1, size // 4)).encode()]
    rng = random.Random(0)
    for separator in (b" ", b"\n", b"\r\n", "\u2003".encode()):
        rng.shuffle(words)
        data = separator.join([*words, *words[::3]])
        for rule in (Rule(tokenizer), Rule(tokenizer, "unicode", lines=False)):
            for before in (b"", b" ", b"  " * 7 + b" ", b"a" * 13 + b" "):
                check(count(backend, before + data, rule), [before + data], rule)
            check(count(backend, data, rule, 1, 65536, 131072), [data], rule)


def test_words_of_every_length_at_every_place(backend: ModuleType) -> None:
    for size in range(1, 70):
        word = (b"abcdefghijklmnopqrstuvwxyz0123456789" * 2)[:size]
        data = b"".join(b" " * place + word + b"\n" for place in range(1, 34))
        rule = Rule()
        check(count(backend, data, rule), [data], rule)


@pytest.mark.parametrize("lowercase", LOWERCASE)
def test_every_code_point(backend: ModuleType, lowercase: str | None) -> None:
    data = "".join(f"Ab{point}cD " for point in some(backend, range(0x110000))).encode()
    for tokenizer in TOKENIZERS[:2]:
        rule = Rule(tokenizer, lowercase, lines=False)
        check(count(backend, data, rule), [data], rule)


@pytest.mark.parametrize("normalize", NORMALIZE[1:])
def test_every_code_point_normalized(backend: ModuleType, normalize: str) -> None:
    data = "".join(f"e{point}\u0301 " for point in some(backend, range(0x30000))).encode()
    rule = Rule("whitespace", "casefold", normalize, lines=False)
    check(count(backend, data, rule), [data], rule)


def test_a_final_sigma_looks_far(backend: ModuleType) -> None:
    rule = Rule(lowercase="unicode", lines=False)
    # Apostrophes, dots and marks are passed over in both directions, however many there are.
    for between in ("'", "’", ".", "\u0301", "\u00ad", "\u200d", ":", "·", "ʼ", "ͺ"):
        for far in (1, 2, 30, 5000):
            for before, after in itertools.product(("", "Α", "1"), ("", "Β", "2", " ", "\n", "'")):
                data = (before + between * far + "Σ" + between * far + after).encode()
                assert entries(count(backend, data, rule)) == {
                    key: (number, 0) for key, number in expected(data, rule)[0].items()
                }, (before, between, far, after)


@pytest.mark.parametrize("lines", [True, False], ids=["line", "file"])
@pytest.mark.parametrize("mark", MARKS)
def test_other_encodings_are_refused(backend: ModuleType, mark: bytes, lines: bool) -> None:
    for errors in ERRORS:
        for cut in range(6):
            counter = backend.word_counter(Rule(lines=lines, errors=errors))
            counter.name = "that.txt"
            data = mark + b"a b\n"
            with pytest.raises(DecodeError, match=r"that\.txt.*UTF-(16|32)"):
                feed(counter, data[:cut], data[cut:])
        counter = backend.word_counter(Rule(lines=lines, errors=errors))
        with pytest.raises(DecodeError, match="UTF-"):
            counter.documents([b"fine", mark + b"a"])
    for late in (b" " + mark, b"a\n" + mark):
        rule = Rule(lines=lines)
        check(count(backend, late, rule), [late], rule)


@pytest.mark.parametrize("how", ["file", "feed"])
def test_the_first_error_of_a_text_is_named_by_any_number_of_workers(
    backend: ModuleType, how: str, tmp_path: pathlib.Path
) -> None:
    """Also where a worker is sooner at a later one."""
    data = bytearray((b"words " * 10 + b"end\n") * (2**23 // 64))
    data[2**20 - 30] = 0xFF
    for begin in range(2**20, len(data), 2**18):
        data[begin + 3] = 0xFE
    path = tmp_path / "text"
    path.write_bytes(data)
    for _ in range(3):
        counter = backend.word_counter(Rule(errors="strict"), workers=4)
        with path.open("rb") as file, pytest.raises(DecodeError, match=f"0xff at byte {2**20 - 30} "):
            counter.file(file.fileno(), 0, len(data)) if how == "file" else feed(counter, bytes(data))


@pytest.mark.parametrize("lines", [True, False], ids=["line", "file"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_strict_names_the_byte(backend: ModuleType, tokenizer: str, lines: bool) -> None:
    for broken in (item for item in BROKEN if item not in (b"\xed\x9f\xbf", b"\xf4\x8f\xbf\xbf")):
        for before in (b"", b"fine ", "é\n".encode() * 40, b"\xef\xbb\xbfa\r\n", b"x" * 70_000 + b"\n"):
            data = before + broken + b" rest\nof it\n"
            with pytest.raises(UnicodeDecodeError) as wanted:
                data.decode("utf-8")
            offset = wanted.value.start
            for cut in (0, len(before), len(before) + 1, len(data)):
                counter = backend.word_counter(Rule(tokenizer, lines=lines, errors="strict"))
                counter.name = "that.txt"
                with pytest.raises(DecodeError) as caught:
                    feed(counter, data[:cut], data[cut:])
                assert "that.txt" in str(caught.value)
                assert re.search(rf"\b{offset}\b", str(caught.value)), (str(caught.value), offset)


def test_strict_accepts_what_is_right(backend: ModuleType) -> None:
    data = (SPACES + NO_SPACES + CASES + FORMS + EMOJI + "\ud7ff\ue000\uffff\U0010ffff").encode()
    rule = Rule(errors="strict", lowercase="casefold")
    check(count(backend, data, rule), [data], rule)
    for cut in range(0, len(data), 3):
        assert entries(count(backend, data, rule, cut)) == entries(count(backend, data, rule))


@pytest.mark.parametrize("lowercase", LOWERCASE)
@pytest.mark.parametrize("tokenizer", ["whitespace", "word"])
def test_a_token_that_is_too_long_is_named(backend: ModuleType, tokenizer: str, lowercase: str | None) -> None:
    for most in (1, 15, 16, 17, 64, 65_536):
        fits = b"\xef\xbb\xbfok\n".replace(b"ok", b"k") + b"a" * most + b" " + b"b" * most + b"\n"
        rule = Rule(tokenizer, lowercase, max_token_bytes=most)
        check(count(backend, fits, rule), [fits], rule)
        long = fits + b"\n" + b" " * 3 + b"c" * (most + 1) + b" d\n"
        for cut in (0, len(fits) + 5, len(long) - 4):
            counter = backend.word_counter(rule)
            counter.name = "that.txt"
            with pytest.raises(TokenTooLong) as caught:
                feed(counter, long[:cut], long[cut:])
            assert "that.txt" in str(caught.value)
            assert re.search(rf"\b{len(fits) + 4}\b", str(caught.value)), str(caught.value)
            assert re.search(rf"\b{most}\b", str(caught.value))


@pytest.mark.parametrize(
    ("before", "errors"),
    [
        ("İ É ﬀ\n", "replace"),  # they become longer, stay, become shorter or longer
        ("İİİ É", "replace"),
        (b"\xff\xff \xc3\xa9", "replace"),
        (b"\xff\xff \xc3\xa9", "ignore"),
        (b"\xff\xff \xc3\xa9", "surrogateescape"),
        ("ẞ" * 30 + " ΑΣ", "strict"),
    ],
)
@pytest.mark.parametrize("lowercase", LOWERCASE)
@pytest.mark.parametrize("tokenizer", ["whitespace", "word"])
def test_a_long_token_is_at_the_byte_where_it_was_read(
    backend: ModuleType, tokenizer: str, lowercase: str | None, before: str | bytes, errors: str
) -> None:
    head = (before.encode() if isinstance(before, str) else before) + b" ok "
    for word in ("ÀB" + "x" * 200, "x" * 200):
        counter = backend.word_counter(Rule(tokenizer, lowercase, errors=errors, max_token_bytes=150))
        with pytest.raises(TokenTooLong, match=rf"begins at byte {len(head)}$"):
            feed(counter, head + word.encode() + b" more")


def test_strict_says_what_python_says(backend: ModuleType) -> None:
    for broken in (item for item in BROKEN if item not in (b"\xed\x9f\xbf", b"\xf4\x8f\xbf\xbf")):
        for data in (b"a " + broken, b"a " + broken + b" b", broken + b"\n", "é ".encode() + broken + "é".encode()):
            with pytest.raises(UnicodeDecodeError) as wanted:
                data.decode("utf-8")
            problem = wanted.value
            for lowercase in (None, "unicode"):
                counter = backend.word_counter(Rule(lowercase=lowercase, errors="strict"))
                with pytest.raises(DecodeError) as caught:
                    feed(counter, data)
                place = f"got 0x{data[problem.start]:02x} at byte {problem.start} ({problem.reason})"
                assert str(caught.value).endswith(place), (data, str(caught.value))


def test_the_length_of_a_token_is_that_of_its_key(backend: ModuleType) -> None:
    # Each rule makes one byte sequence longer or shorter than it came.
    for data, rule, size in (
        ("İ", Rule(lowercase="unicode"), 3),
        ("ẞ", Rule(lowercase="casefold"), 2),
        ("ﬃ", Rule(normalize="NFKC"), 3),
        ("ﷺ", Rule(normalize="NFKC", tokenizer="char"), 2),
        ("ΐ", Rule(lowercase="casefold"), 6),
        ("Å", Rule(lowercase="unicode"), 2),
        (b"\xff", Rule(), 3),
        (b"\xff", Rule(errors="surrogateescape"), 1),
        (b"a\xffb", Rule(errors="ignore"), 2),
        ("é", Rule("char"), 2),
    ):
        text = data.encode() if isinstance(data, str) else data
        changed = {name: getattr(rule, name) for name in ("tokenizer", "lowercase", "normalize", "errors")}
        check(count(backend, text, Rule(**changed, max_token_bytes=size)), [text], rule)
        if size > 1:
            with pytest.raises(TokenTooLong):
                count(backend, text, Rule(**changed, max_token_bytes=size - 1))


def test_stop_words_and_ngrams(backend: ModuleType) -> None:
    data = b"The cat and the dog\nand the cat"
    for tokenizer, lines, doc_freq in itertools.product(TOKENIZERS, (True, False), (True, False)):
        stops = frozenset([b"the", b"t", b" ", b"absent", b""])
        for ngrams in (*NGRAMS, (2, 4), (7, 9)):
            rule = Rule(tokenizer, "ascii", None, ngrams, lines, stop_words=stops, doc_freq=doc_freq)
            check(count(backend, data, rule), [data], rule)
    # They are compared after lowering, and as they are.
    assert entries(count(backend, b"The THE the", Rule(lowercase="ascii", stop_words=frozenset([b"The"])))) == {
        b"the": (3, 0)
    }


def test_tokens_made_elsewhere(backend: ModuleType) -> None:
    counter = backend.word_counter(Rule(ngrams=(1, 2), doc_freq=True, stop_words=frozenset([b"s"])))
    counter.tokens(["a b", "", "A", "s", "\udcff", "é", "a b"])
    counter.tokens([])
    counter.tokens(["a b"])
    table = counter.finish()
    assert table.documents == 3
    assert entries(table) == {
        b"a b": (3, 2),
        b"": (1, 1),
        b"A": (1, 1),
        b"\xff": (1, 1),
        "é".encode(): (1, 1),
        b"a b ": (1, 1),
        b" A": (1, 1),
        b"A \xff": (1, 1),
        "\udcff é".encode("utf-8", "surrogateescape"): (1, 1),
        "é a b".encode(): (1, 1),
    }
    counter = backend.word_counter(Rule(max_token_bytes=3))
    with pytest.raises(TokenTooLong):
        counter.tokens(["abc", "abcd"])
    with pytest.raises(UnicodeEncodeError):
        backend.word_counter(Rule()).tokens(["\ud800"])


def test_a_counter_begins_anew(backend: ModuleType) -> None:
    counter = backend.word_counter(Rule(doc_freq=True))
    assert counter.name == "<text>"
    for _ in range(3):
        counter.documents([b"a b\nc", b"a"])
        table = counter.finish()
        check(table, [b"a b\nc", b"a"], Rule(doc_freq=True))
    assert len(counter.finish()) == 0
    counter.feed(bytearray(b"x "))
    counter.feed(memoryview(b"yx z"))
    counter.end()
    counter.end()
    assert entries(counter.finish()) == {b"x": (1, 1), b"yx": (1, 1), b"z": (1, 1)}
    assert len(table) == 3


def test_rough_counts_are_too_low_by_the_bound_at_most(backend: ModuleType) -> None:
    rng = random.Random(1)
    words = [b"w%d" % min(int(rng.paretovariate(0.7)), 5000) for _ in range(20_000)]
    data = b" ".join(words)
    exact = Counter(words)
    for k in (1, 2, 10, 100, 1000, 10_000):
        counter = backend.word_counter(Rule(), approx=k)
        for begin in range(0, len(data), 4096):
            counter.feed(data[begin : begin + 4096])
        counter.end()
        table = counter.finish()
        assert len(table) <= k
        assert table.error_bound <= len(words) // (k + 1)
        found = entries(table)
        for word, number in exact.items():
            assert number - table.error_bound <= found.get(word, (0, 0))[0] <= number
        assert set(found) <= set(exact)
        if k >= len(exact):
            assert table.error_bound == 0


@pytest.mark.parametrize("ngrams", [(1, 1), (1, 2)])
def test_rough_counts_do_not_depend_on_how_a_text_is_cut(
    backend: ModuleType, ngrams: tuple[int, int], tmp_path: pathlib.Path
) -> None:
    rng = random.Random(2)
    # More words than the smallest table holds, long ones among them, lines of any length.
    words = [b"w%d" % min(int(rng.paretovariate(0.1)), 10**12) * (1 + (i % 50 == 0) * 5) for i in range(15_000)]
    data = b"".join(word + rng.choice([b" ", b" ", b"\n"]) for word in words)
    path = tmp_path / "text"
    path.write_bytes(data)
    rule = Rule(ngrams=ngrams, stop_words=frozenset([b"w1"]))
    for k in (3, 700, 3000):
        found = []
        for size in (len(data), 50_001, 4096, 17):
            counter = backend.word_counter(rule, approx=k)
            feed(counter, *(data[at : at + size] for at in range(0, len(data), size)))
            table = counter.finish()
            found.append((entries(table), table.error_bound))
        counter = backend.word_counter(rule, approx=k)
        fd = os.open(path, os.O_RDONLY)
        for at in range(0, len(data), 30_000):
            counter.file(fd, at, min(at + 30_000, len(data)))
        os.close(fd)
        table = counter.finish()
        found.append((entries(table), table.error_bound))
        assert table.error_bound > 0
        assert all(item == found[0] for item in found), (k, [bound for _, bound in found])


def test_a_smaller_table(backend: ModuleType) -> None:
    table = backend.word_table()
    for key, count in ((b"a", 5), (b"b", 3), (b"c" * 20, 3), (b"d" * 20, 9), (b"e", 1)):
        table.add(key, count)
    table.error_bound = 2
    table.shrink(5)
    assert (len(table), table.error_bound, table.total()) == (5, 2, 21)
    table.shrink(3)
    assert entries(table) == {b"a": (2, 0), b"d" * 20: (6, 0)}
    assert (table.error_bound, table.total()) == (5, 8)
    with pytest.raises(ValueError, match=r"."):
        backend.word_table(True).shrink(1)


def test_table(backend: ModuleType) -> None:
    table = backend.word_table(True)
    assert (len(table), table.total(), table.has_docs, table.documents, table.error_bound) == (0, 0, True, 0, 0)
    table.add(b"b", 2, 1)
    table.add(b"a", 2, 2)
    table.add(b"b", 1, 1)
    table.add(b"", 1)
    assert table.nbytes > 0
    assert table.get(b"b") == (3, 2)
    assert table.get(b"x") == (0, 0)
    table.documents, table.error_bound = 7, 2
    other = table.copy()
    other.add(b"new", 5, 1)
    assert len(table) == 3
    table.merge(other)
    assert entries(table) == {b"b": (6, 4), b"new": (5, 1), b"a": (4, 4), b"": (2, 0)}
    assert (table.documents, table.error_bound, other.documents) == (14, 4, 7)
    assert entries(other) == {b"new": (5, 1), b"b": (3, 2), b"a": (2, 2), b"": (1, 0)}
    assert set(entries(table.select(5))) == {b"b", b"new"}
    assert set(entries(table.select(3, 5))) == {b"new", b"a"}
    assert set(entries(table.select(min_docs=1, max_docs=1))) == {b"new"}
    assert set(entries(table.without([b"b", b"none"]))) == {b"new", b"a", b""}
    for part in (table.select(2), table.without([b"b"]), table.copy()):
        assert (part.documents, part.error_bound, part.has_docs) == (14, 4, True)
    blob, offsets, counts, docs = table.top(2)
    assert (blob, offsets.tolist(), counts.tolist(), docs.tolist()) == (b"bnew", [0, 1, 4], [6, 5], [4, 1])
    assert [array.dtype.name for array in (offsets, counts, docs)] == ["uint64"] * 3
    assert table.top(0)[1].tolist() == [0]
    assert backend.word_table().top()[3] is None
    assert len(table.top(100)[2]) == 4
    with pytest.raises(OverflowError):
        table.add(b"b", 2**63 - 1)
    table.add(b"most", 2**63 - 1)
    assert table.get(b"most")[0] == 2**63 - 1
    assert table.total() == 2**63 - 1 + 17
    table.add(b"more", 2**63 - 1)
    assert table.total() == 2**64 - 2 + 17


def test_table_order_is_by_count_and_then_bytes(backend: ModuleType) -> None:
    rng = random.Random(3)
    keys = {bytes(rng.choices(b"ab\x00\xff", k=rng.randrange(20))) for _ in range(3000)}
    table = backend.word_table()
    for key in keys:
        table.add(key, rng.choice([1, 2, 2**40]))
    found = entries(table)
    assert list(found) == sorted(found, key=lambda key: (-found[key][0], key))
    for k in (1, 5, 100, len(keys) - 1, len(keys), len(keys) + 5):
        assert list(entries_of(table, k)) == list(found)[:k]
    for k in (1, 2, 5):
        parts = table.split(k)
        again = backend.word_table()
        for i, part in enumerate(parts):
            assert all(fastops.reference.wordcount.fnv1a(key) % k == i for key in entries(part))
            again.merge(part)
        assert entries(again) == found


def entries_of(table: Any, k: int) -> list[bytes]:
    blob, offsets, *_ = table.top(k)
    return [blob[a:b] for a, b in itertools.pairwise(offsets.tolist())]


def test_many_distinct_words(backend: ModuleType) -> None:
    rng = random.Random(4)
    words = [b"%x" % rng.getrandbits(rng.choice([20, 60, 130])) for _ in range(60_000)]
    data = b" ".join(words)
    table = count(backend, data, Rule())
    assert entries(table) == {key: (number, 0) for key, number in Counter(words).items()}
    other = count(backend, data, Rule(), 1000, 200_000)
    other.merge(table)
    assert entries(other) == {key: (2 * number, 0) for key, number in Counter(words).items()}
    assert entries(backend.table_from_bytes(table.to_bytes())) == entries(table)


def test_encode_finds_what_counting_counted(backend: ModuleType) -> None:
    for tokenizer, lines, ngrams in itertools.product(TOKENIZERS, (True, False), NGRAMS):
        rule = Rule(tokenizer, "unicode", None, ngrams, lines, stop_words=frozenset([b"the"]))
        texts = [text for name, text in TEXTS.items() if name not in ("all bytes",)]
        counter = backend.word_counter(rule)
        counter.documents(texts)
        table = counter.finish()
        keys = list(entries(table))
        ids, offsets = table.encode(rule, texts)
        assert (ids.dtype.name, offsets.dtype.name, len(offsets)) == ("int64", "int64", len(texts) + 1)
        for i, text in enumerate(texts):
            row = ids[offsets[i] : offsets[i + 1]].tolist()
            assert Counter(keys[number] for number in row) == expected(text, rule)[0]
        # In the order of the text, and without what is not there.
        small = table.select(min_count=2)
        rank = {key: number for number, key in enumerate(entries(small))}
        ids, offsets = small.encode(rule, texts)
        for i, text in enumerate(texts):
            row = ids[offsets[i] : offsets[i + 1]].tolist()
            plain = fastops.reference.word_table()
            for key, (number, _) in entries(small).items():
                plain.add(key, number)
            wanted, ends = plain.encode(rule, [text])
            assert row == wanted.tolist()
            assert len(row) == ends[-1]
            assert all(number in rank.values() for number in row)


# The public functions.


@pytest.mark.usefixtures("over_backend")
@pytest.mark.parametrize("workers", range(1, 17))
def test_any_number_of_workers_gives_the_same(workers: int, tmp_path: pathlib.Path) -> None:
    rng = random.Random(5)
    lines = [
        " ".join(rng.choices(CASES.split() + SCRIPTS.split() + EMOJI.split(), k=rng.randrange(12))) for _ in range(3000)
    ]
    path = tmp_path / "text"
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    for tokenizer, lowercase, ngrams in (
        ("whitespace", None, (1, 1)),
        ("word", "casefold", (1, 2)),
        ("char", None, (1, 1)),
    ):
        rule = Rule(tokenizer, lowercase, None, ngrams, lines=True, doc_freq=True)
        wanted = expected(path.read_bytes(), rule)
        options: dict[str, Any] = {"tokenizer": tokenizer, "lowercase": lowercase, "ngrams": ngrams, "doc_freq": True}
        counts = fastops.count_files(path, workers=workers, **options)
        assert {word.encode(): number for word, number in counts.items()} == wanted[0]
        assert {word.encode(): number for word, number in counts.doc_freq.items()} == wanted[1]
        assert counts.documents == wanted[2]
        texts = fastops.count_words((line for line in lines), workers=workers, document="line", **options)
        assert texts == counts
        assert dict(texts.doc_freq) == dict(counts.doc_freq)


@pytest.mark.usefixtures("over_backend")
def test_texts_of_every_kind() -> None:
    wanted = {"a": 2, "b": 1}
    for texts in (
        "a b a",
        b"a b a",
        bytearray(b"a b a"),
        memoryview(b"a b a"),
        ["a", b"b", bytearray(b"a")],
        ("a b", "a"),
        iter(["a b a"]),
    ):
        assert fastops.count_words(texts) == wanted
    assert fastops.count_words({"a": 1, "b": 2}) == {"a": 1, "b": 1}
    assert fastops.count_words([]) == {}
    assert fastops.count_words("") == {}
    assert fastops.count_words(["x\ny", "x"], doc_freq=True).doc_freq["x"] == 2
    assert fastops.count_words("x\nx", doc_freq=True).doc_freq["x"] == 1
    assert fastops.count_words("x\nx", doc_freq=True, document="line").doc_freq["x"] == 2
    # Surrogates that stand for bytes are these bytes again; others become the bytes that no UTF-8 has.
    assert fastops.count_words("a\udcff", errors="surrogateescape") == {"a\udcff": 1}
    assert fastops.count_words(["a", "\ud800"]) == {"a": 1, "\ufffd" * 3: 1}
    with pytest.raises(fastops.DecodeError, match="text 1"):
        fastops.count_words(["a", "\ud800"], errors="strict")


@pytest.mark.usefixtures("over_backend")
def test_arrow_texts() -> None:
    pa = pytest.importorskip("pyarrow")
    words = ["a b", "", None, "é a", "x" * 100]
    for kind in (pa.string(), pa.large_string()):
        array = pa.array(words, kind)
        assert fastops.count_words(array) == {"a": 2, "b": 1, "é": 1, "x" * 100: 1}
        assert fastops.count_words(pa.chunked_array([array, array[1:3], array[3:]])) == {
            "a": 3,
            "b": 1,
            "é": 2,
            "x" * 100: 2,
        }
        counts = fastops.count_words(array)
        assert [row.tolist() for row in counts.encode(array)] == [[0, 1], [], [], [3, 0], [2]]


@pytest.mark.usefixtures("over_backend")
def test_options_reach_the_counter(tmp_path: pathlib.Path) -> None:
    text = "The cat. THE Cat\nthe ﬁn \n"
    assert fastops.count_words(text, tokenizer="word", lowercase="ascii", min_count=2).to_dict() == {"the": 3, "cat": 2}
    assert fastops.count_words(text, normalize="NFKC", stop_words=["The", b"THE", "the"]) == {
        "cat.": 1,
        "Cat": 1,
        "fin": 1,
    }
    assert fastops.count_words(text, ngrams=(2, 2), document="line") == {
        "The cat.": 1,
        "cat. THE": 1,
        "THE Cat": 1,
        "the ﬁn": 1,
    }
    assert fastops.count_words(b"a\xffb", errors="ignore") == {"ab": 1}
    with pytest.raises(fastops.DecodeError, match=r"\b1\b"):
        fastops.count_words(b"a\xffb", errors="strict")
    with pytest.raises(fastops.TokenTooLong, match=r"\b2\b"):
        fastops.count_words("a bcd", max_token_bytes=2)
    rough = fastops.count_words("a b c d e f", approx=2)
    assert len(rough) <= 2
    assert rough.error_bound <= 2
    path = tmp_path / "text"
    path.write_text(text, encoding="utf-8")
    by_line = fastops.count_files(path, ngrams=(2, 2))
    assert by_line.documents == 2
    assert "Cat the" not in by_line
    by_file = fastops.count_files([path], ngrams=(2, 2), document="file")
    assert by_file.documents == 1
    assert by_file["Cat the"] == 1
    assert fastops.count_words(text, memory_limit=2**20) == fastops.count_words(text)


@pytest.mark.usefixtures("over_backend")
def test_a_callable_sees_documents_as_text() -> None:
    seen = []

    def tokenizer(document: str) -> list[str]:
        seen.append(document)
        return document.split("|")

    texts = [b"\xef\xbb\xbfA|B\r\n\xef\xac\x81|\xff", "X"]
    counts = fastops.count_words(
        texts, tokenizer=tokenizer, workers=1, lowercase="ascii", normalize="NFKC", document="line"
    )
    assert seen == ["a|b", "fi|\ufffd", "x"]
    assert counts == {"a": 1, "b": 1, "fi": 1, "\ufffd": 1, "x": 1}
    assert counts.documents == 3


REAL = ("kjv.txt", "udhr_multi.txt", "zh_classics_crlf.txt")


def real_text(name: str, most: int) -> bytes:
    """The first lines of a file, `most` bytes at most."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {name} in FASTOPS_TEST_DATA or ../shared/data")
    data = path.read_bytes()
    return data if len(data) <= most else data[: data.rindex(b"\n", 0, most) + 1]


def check_real_text(path: pathlib.Path, data: bytes) -> None:
    path.write_bytes(data)
    text = data.decode("utf-8-sig")
    for workers, (tokenizer, lowercase, words) in itertools.product(
        (1, 3),
        (
            ("whitespace", None, text.split()),
            ("whitespace", "unicode", text.lower().split()),
            ("word", "casefold", re.findall(r"\w+", text.casefold())),
            ("char", None, list(text.replace("\r\n", "\n").replace("\n", ""))),
        ),
    ):
        counts = fastops.count_files(path, tokenizer=tokenizer, lowercase=lowercase, workers=workers)
        wanted = Counter(words)
        assert counts == wanted
        assert counts.total() == len(words)
        best = sorted(wanted.items(), key=lambda pair: (-pair[1], pair[0].encode()))
        assert counts.most_common(100) == best[:100]


@pytest.mark.usefixtures("over_backend")
@pytest.mark.parametrize("name", REAL)
def test_real_texts(backend: ModuleType, name: str, tmp_path: pathlib.Path) -> None:
    check_real_text(tmp_path / name, real_text(name, 2_000_000 if backend.__name__ == "fastops.native" else 300_000))


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.usefixtures("over_backend")
@pytest.mark.parametrize("name", REAL)
def test_real_texts_as_a_whole(name: str, tmp_path: pathlib.Path) -> None:
    check_real_text(tmp_path / name, real_text(name, 2**63))


@pytest.mark.usefixtures("over_backend")
def test_temporary_files_are_not_left() -> None:
    before = set(os.listdir(tempfile.gettempdir()))
    fastops.count_words(" ".join(map(str, range(20_000))), memory_limit=2**20)
    assert {name for name in set(os.listdir(tempfile.gettempdir())) - before if "fastops" in name.lower()} == set()


@pytest.mark.usefixtures("over_backend")
def test_records_are_documents() -> None:
    data = b'{"t": "x\\nx"}\n{"t": "a"}\n{"t": ""}\n'
    counts = fastops.count_files(io.BytesIO(data), field="t", doc_freq=True, ngrams=(1, 2))
    assert (counts.documents, counts.doc_freq["x"], counts["x x"]) == (3, 1, 1)


def test_a_table_is_no_iterable_of_texts() -> None:
    class Table(dict[str, list[str]]):
        columns = ("a",)

    with pytest.raises(TypeError, match="texts must be a str"):
        fastops.count_words(Table(a=["x y"]))


def test_the_calls_that_count_have_the_same_options() -> None:
    """Written out in each for the reader and the editor; here they are held together."""
    texts, files, cluster = (
        inspect.signature(call).parameters
        for call in (fastops.count_words, fastops.count_files, fastops.distributed.count_files)
    )
    options = list(texts)[1:]
    assert list(files) == ["files", "field", "column", *options]
    extra = ["engine", "client", "span_bytes"]
    assert list(cluster) == ["files", *extra, "field", "column", *(name for name in options if name != "approx")]
    differ = {
        name
        for name in options
        for other in (files, cluster)
        if name in other and other[name].default != texts[name].default
    }
    assert differ == {"document", "workers"}
    assert set(inspect.signature(rule_of).parameters) <= set(options)
    # On the command line with the same defaults; two have another name there, and progress is always shown.
    said = vars(parser().parse_args(["count", "x"]))
    names = {"workers": "jobs", "on_error": "skip_errors"}
    for name in [*options, "field", "column"]:
        if name not in ("progress", "on_error"):
            assert said[names.get(name, name)] == files[name].default, name
    assert said["skip_errors"] is False
