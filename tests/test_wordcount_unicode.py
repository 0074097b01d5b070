# SPDX-License-Identifier: BSD-3-Clause
"""Words by UAX #29: the rules in Python against Unicode's own cases and cases by hand, the native code against the rules."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastops import _word_break
from fastops._rule import Rule
from fastops.reference import _breaks

UCD = Path("/usr/share/unicode/auxiliary/WordBreakTest.txt")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Segments, "|" between them.
SEGMENTS = [
    "",
    "a",
    "ab|,| |cd|.",
    "can't| |stop",
    "'|tis| |o'clock|'",
    "e.g|.|,| |U.S.A|.",
    "a:b|:| |:|c",
    "a|,|b",
    "a|;|b",
    "3.14|,| |1,000.5|;| |1;2|.",
    "1|:|2",
    "1'000",
    "a1b2| |3rd",
    "1|.|a",
    "a|.|1",
    "snake_case| |_x_| |__|-|__",
    "x_|.|_y",
    "1_000",
    "a|-|b|+|c",
    "a|  |b",
    "a|\t|\t|b",
    "a|\r\n|\n|\r|b",
    "a|\x85|\u2028|\u2029|\x0b|\x0c|b",
    "don\u2019t| |stop",
    "a\u00b7b",
    "a\u2027b|\u2027",
    "a\uff0eb| |1\uff0c2",
    "na\u00efve| |\u00e9t\u00e9",
    "e\u0301t\u0301e",
    "\u0301|a",
    "a|\n|\u0301|b",
    "a\u00adb| |1\u200d2",
    "a.\u0301b",
    "a\u0301'\u0301b| |a|'\u0301| |b",
    "1.\u03012",
    "\u05d0'| |\u05d0\"\u05d1|\"| |\u05d0'\u05d1",
    '\u05d0|"|a',
    'a|"|\u05d0',
    "a\u05d0b1\u05d1",
    "\u4e2d|\u6587|ab|\u5b57",
    "\u3042|\u3044|\u30ab\u30bf\u30ab\u30ca|\u3093",
    "\u30a2_\u30a2| |_\u30a2",
    "\u30a2|a",
    "\uac00\ub098| |\uac00\u1161",
    "\u0e01|\u0e02\u0e31|\u0e03",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629| |\u0661\u066b\u0662",
    "\u0661\u066c\u0662",
    "\U0001f1e9\U0001f1ea|\U0001f1eb\U0001f1f7|\U0001f1e9",
    "a|\U0001f1e9\U0001f1ea|a",
    "\U0001f1e9\u0301\U0001f1ea|\U0001f1eb",
    "\U0001f469\u200d\U0001f52c|\U0001f469",
    "\u2764\ufe0f\u200d\U0001f525|a",
    "a\u200d\u24c2b",
    "\u200d\U0001f525",
    "\U0001f469\U0001f3fd| |x",
    " \u0301| |a",
    "  \u200d| |a",
    "\u3000 \u2003|a",
    "\ufeff|a\ufeffb",
    "\U00010400\U00010428| |\U000104a0\U000104a1",
    "\udc80|\udcff|a|\udc80|b",
    "\ue000|\ue000",
    "  \uff9e|a",
    "\u24b6\u24b7| |\u2160\u2161",
    "a|\u0589|b",
    "1\u05892| |1\u20442",
]

# Words alone: segments with a letter or a digit.
WORDS = [
    ("Don't stop, it's 3.14!", ["Don't", "stop", "it's", "3.14"]),
    ("__ _ -- ' . \u0301 \U0001f469", []),
    ("_a_ __1", ["_a_", "__1"]),
    ("\u4e2d\u6587 \u304b\u306a", ["\u4e2d", "\u6587", "\u304b", "\u306a"]),
    ("  \uff9e", ["  \uff9e"]),
    ("\u00bd \u2460 \u02c2", ["\u00bd", "\u2460"]),
]


@pytest.fixture(scope="module")
def native() -> Callable[[bytes], list[bytes]]:
    """The compiled words of UTF-8, in their order."""
    try:
        backend: Any = importlib.import_module("fastops.native.wordcount")
    except ImportError as error:
        pytest.skip(f"fastops._core: {error}")
    rule = Rule("unicode", lines=False, errors="surrogateescape")

    def words(text: bytes) -> list[bytes]:
        text = b"\n" + text  # what comes first may be a mark of the encoding
        counter = backend.word_counter(rule)
        counter.documents([text])
        table = counter.finish()
        blob, offsets, *_ = table.top()
        keys = [blob[a:b] for a, b in pairwise(offsets.tolist())]
        ids, _ = table.encode(rule, [text])
        return [keys[i] for i in ids.tolist()]

    return words


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def expected(text: bytes) -> list[bytes]:
    return [encode(word) for word in _breaks.words(text.decode("utf-8", "surrogateescape"))]


@pytest.mark.parametrize("text", SEGMENTS)
def test_segments_by_hand(text: str) -> None:
    segments = text.split("|") if text else []
    assert _breaks.segments("".join(segments)) == segments


@pytest.mark.parametrize("text", SEGMENTS)
def test_words_native_equals_rules_by_hand(text: str, native: Callable[[bytes], list[bytes]]) -> None:
    text = text.replace("|", "")
    # At every distance from a block's end.
    for padding in [*range(70), 127, 128]:
        padded = encode("x" * padding + " " * (padding > 0) + text + " y" * (padding % 40))
        assert native(padded) == expected(padded)


@pytest.mark.parametrize(("text", "words"), WORDS)
def test_words_hold_a_letter_or_digit(text: str, words: list[str], native: Callable[[bytes], list[bytes]]) -> None:
    assert _breaks.words(text) == words
    assert native(encode(text)) == list(map(encode, words))


def test_segments_pass_unicodes_own_cases(native: Callable[[bytes], list[bytes]]) -> None:
    if not UCD.is_file():
        pytest.skip(f"{UCD} is not there (Debian: apt-get install unicode-data)")
    count = 0
    lines = UCD.read_text(encoding="utf-8").splitlines()
    if _word_break.UNICODE_VERSION not in lines[0]:
        pytest.skip(f"{lines[0]} is not of the tables' version {_word_break.UNICODE_VERSION}")
    for line in lines:
        case = line.partition("#")[0].strip(" \t\u00f7")
        if not case:
            continue
        segments = [
            "".join(chr(int(code, 16)) for code in part.replace("\u00d7", " ").split()) for part in case.split("\u00f7")
        ]
        text = "".join(segments)
        assert _breaks.segments(text) == segments
        assert native(encode(text)) == expected(encode(text))
        count += 1
    assert count > 1500


def test_table_knows_every_letter_of_this_python() -> None:
    pages, classes = _word_break.table()
    assert pages.shape == (0x1100,)
    for page in range(0x1100):
        bits = classes[int(pages[page]) * 256 :][:256]
        assert [bool(b & _word_break.ALNUM_BIT) for b in bits] == [chr(page * 256 + i).isalnum() for i in range(256)]


# One code point of every class and combination that the table has, ASCII by itself, and bytes that are no UTF-8.
def _alphabet() -> list[str]:
    pages, classes = _word_break.table()
    found: dict[int, list[int]] = {}
    for code in range(0x20000):
        if not 0xD800 <= code < 0xE000:
            found.setdefault(int(classes[int(pages[code >> 8]) * 256 + (code & 255)]), []).append(code)
    return [chr(code) for codes in found.values() for code in {codes[0], codes[len(codes) // 2], codes[-1]}]


ANY = st.sampled_from(_alphabet())
ASCII = st.sampled_from(list("abzAZ019__  .,:;'\"-\r\n"))
TEXTS = st.lists(st.one_of(ASCII, ASCII, ANY, st.sampled_from(["\udc80", "\udce4", "\u00e9"])), max_size=150).map(
    "".join
)


@given(TEXTS)
@example("  \uff9e" + "a" * 70)
def test_words_native_equals_rules(native: Callable[[bytes], list[bytes]], text: str) -> None:
    # Once more through bytes: escaped bytes may have come to stand side by side as a code point.
    assert native(encode(text)) == expected(encode(text))


@given(st.lists(ASCII, max_size=300).map("".join))
def test_ascii_words_native_equals_rules(native: Callable[[bytes], list[bytes]], text: str) -> None:
    assert native(encode(text)) == expected(encode(text))


@given(st.binary(max_size=200))
def test_words_of_any_bytes(native: Callable[[bytes], list[bytes]], text: bytes) -> None:
    assert native(text) == expected(text)


@given(TEXTS, TEXTS)
def test_words_may_be_cut_at_line_feeds(native: Callable[[bytes], list[bytes]], first: str, second: str) -> None:
    assert native(encode(f"{first}\n{second}")) == native(encode(first + "\n")) + native(encode(second))


@pytest.mark.parametrize("name", ["kjv.txt", "udhr_multi.txt"])
def test_words_of_real_text(name: str, native: Callable[[bytes], list[bytes]]) -> None:
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not there")
    text = (DATA / name).read_bytes()
    lines = text.splitlines(keepends=True)
    part = b"".join(lines[:: max(len(lines) // 4000, 1)])
    assert native(part) == expected(part)
    assert native(text) == [word for line in text.split(b"\n") for word in native(line)]


@pytest.mark.parametrize("module", ["uniseg.wordbreak", "regex"])
def test_segments_agree_with_peers(module: str) -> None:
    peer = pytest.importorskip(module)
    if not (DATA / "udhr_multi.txt").is_file():
        pytest.skip("udhr_multi.txt is not there")
    lines = (DATA / "udhr_multi.txt").read_text(encoding="utf-8").splitlines()
    for line in lines[:: max(len(lines) // 1500, 1)]:
        got = peer.words(line) if module != "regex" else filter(None, peer.split(r"(?w)\b", line))
        assert list(got) == _breaks.segments(line)
