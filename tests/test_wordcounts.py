# SPDX-License-Identifier: BSD-3-Clause
"""`WordCounts` over every backend: a mapping, its order, sums, parts, exports, the container and what it refuses, ids."""

from __future__ import annotations

import copy
import io
import os
import pathlib
import pickle
import random
import struct
import zlib
from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastops
from fastops import WordCounts
from fastops.reference import wordcount as plain

pytestmark = pytest.mark.usefixtures("over_backend")

TEXT = "to be or not to be that is the question whether it is nobler in the mind to suffer the slings and arrows"
WORDS = Counter(TEXT.split())
# Halves of one character, a word with a NUL, an empty one, one beyond the BMP, one of 300 bytes, one that is no UTF-8 at all.
HOSTILE = [
    b"\xe2",
    b"\x82\xac",
    b"a\x00b",
    b"",
    "\U0001f600".encode(),
    b"x" * 300,
    b"\xff\xfe",
    "é".encode(),
    b"a",
    b"ab",
]


def ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """By count descending, then by bytes."""
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0].encode("utf-8", "surrogateescape")))


def hostile(docs: bool = False) -> WordCounts:
    counts = fastops.count_words(b"", doc_freq=docs)
    for i, key in enumerate(HOSTILE):
        counts._table.add(key, 1 + i % 3, int(docs))
    return counts


def as_text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def test_a_mapping_with_the_most_frequent_first() -> None:
    counts = fastops.count_words(TEXT)
    assert len(counts) == len(WORDS)
    assert counts.total() == sum(WORDS.values())
    assert list(counts.items()) == counts.most_common() == list(counts.to_dict().items()) == ranked(WORDS)
    assert list(counts) == counts.words() == list(counts.keys()) == [word for word, _ in ranked(WORDS)]
    assert list(counts.values()) == [count for _, count in ranked(WORDS)]
    assert dict(counts) == WORDS
    for k in range(len(WORDS) + 3):
        assert counts.most_common(k) == ranked(WORDS)[:k]
    assert len(counts.items()) == len(counts.values()) == len(WORDS)
    assert ("to", 3) in counts.items()
    assert ("to", 4) not in counts.items()
    assert 3 in counts.values()
    assert 77 not in counts.values()


def test_lookups_and_absent_words() -> None:
    counts = fastops.count_words("é a \udc80 a")
    assert counts["a"] == counts[b"a"] == counts.get("a") == 2
    assert counts["é"] == counts["é".encode()] == 1
    assert "a" in counts
    assert b"a" in counts
    # The surrogate is a byte that is no UTF-8, and "replace" is the default.
    assert counts["\ufffd"] == 1
    for absent in ("b", b"\xff", "\udc80", "\ud800", ""):
        assert absent not in counts
        assert counts[absent] == 0
        assert counts.get(absent) is None
        assert counts.get(absent, 7) == 7
    assert 5 not in counts
    assert None not in counts
    with pytest.raises(TypeError, match="word must be a str or bytes, got 5"):
        counts[5]  # type: ignore[index]


def test_bytes_that_are_no_text_come_back() -> None:
    raw = b"\xff\xfea \xe2\x82 \xed\xa0\x80 ok \xff\xfea"
    counts = fastops.count_words(b"x " + raw, errors="surrogateescape")
    assert {word.encode("utf-8", "surrogateescape"): count for word, count in counts.items()} == Counter(
        (b"x " + raw).split()
    )
    assert counts[b"\xff\xfea"] == counts["\udcff\udcfea"] == 2


def test_words_are_kept_apart_by_their_bytes() -> None:
    counts = hostile()
    assert len(counts) == len(HOSTILE)
    assert set(counts) == {as_text(key) for key in HOSTILE}
    for i, key in enumerate(HOSTILE):
        assert counts[key] == counts[as_text(key)] == 1 + i % 3
    assert counts.most_common() == ranked(Counter({as_text(key): 1 + i % 3 for i, key in enumerate(HOSTILE)}))


def test_many_words_are_read_in_steps() -> None:
    wanted = Counter({f"{'é' if i % 5 == 0 else 'w'}{i}": 1 + i % 7 for i in range(10_000)})
    counts = WordCounts(wanted)
    assert counts.most_common() == ranked(wanted)
    assert counts.most_common(4097) == ranked(wanted)[:4097]
    assert counts.words() == [word for word, _ in ranked(wanted)]


def test_equality_is_that_of_words_and_counts() -> None:
    counts = fastops.count_words(TEXT)
    assert counts == WORDS
    assert counts == dict(WORDS)
    assert counts == fastops.count_words(TEXT, doc_freq=True)
    assert counts == {word.encode(): count for word, count in WORDS.items()}
    for word, count in (("to", 4), ("more", 1)):
        assert counts != {**WORDS, word: count}
        assert counts != WordCounts({**WORDS, word: count})
    assert counts != {word: count for word, count in WORDS.items() if word != "to"}
    assert counts != {**{w: c for w, c in WORDS.items() if w != "to"}, 5: 3}
    assert WordCounts({"ab": 1, "c": 1}) != WordCounts({"a": 1, "bc": 1})
    assert counts != 5
    with pytest.raises(TypeError, match="unhashable"):
        hash(counts)


def test_empty_counts() -> None:
    for counts in (WordCounts(), fastops.count_words(""), fastops.count_words([]), WordCounts({"a": 0})):
        assert not counts
        assert len(counts) == counts.total() == 0
        assert counts.words() == counts.most_common() == list(counts) == []
        assert counts == {}
        assert repr(counts) == "WordCounts({}, 0 words, total 0)"
        assert WordCounts.from_bytes(counts.to_bytes()) == counts
        assert [len(part) for part in counts.partition(3)] == [0, 0, 0]
        assert counts.filter(min_count=3) == counts
    assert WordCounts.merge([]) == {}
    assert fastops.count_words("a")
    assert fastops.count_words("").documents == 1
    assert fastops.count_words([]).documents == 0


def test_repr_is_short() -> None:
    assert repr(fastops.count_words("a b a")) == "WordCounts({'a': 2, 'b': 1}, 2 words, total 3)"
    assert len(repr(fastops.count_words(["x" * 100_000, "y", "z z", "\udcff" * 1000, "\n \t"]))) < 300
    rough = fastops.count_words("a b c d", approx=2)
    assert f"at most {rough.error_bound} too low" in repr(rough)


def test_filter() -> None:
    texts = ["a a a b b c", "a b d", "a e", "f"]
    counts = fastops.count_words(texts, doc_freq=True)
    assert counts.filter() == counts
    assert counts.filter(2).to_dict() == {"a": 5, "b": 3}
    assert counts.filter(max_count=3).to_dict() == {"b": 3, "c": 1, "d": 1, "e": 1, "f": 1}
    assert counts.filter(min_docs=2).to_dict() == {"a": 5, "b": 3}
    assert counts.filter(min_docs=2, max_docs=2).to_dict() == {"b": 3}
    assert counts.filter(max_docs_share=0.5).to_dict() == {"b": 3, "c": 1, "d": 1, "e": 1, "f": 1}
    assert counts.filter(max_docs_share=0.75).to_dict() == counts.to_dict()
    assert counts.filter(max_docs_share=0.5, max_docs=1).to_dict() == {"c": 1, "d": 1, "e": 1, "f": 1}
    assert counts.filter(words=["a", "f", "f", b"b", "absent"]).to_dict() == {"a": 5, "b": 3, "f": 1}
    assert counts.filter(without=["a", "absent"], words=["a", "f"]).to_dict() == {"f": 1}
    assert counts.filter(words=[]) == {}
    kept = counts.filter(2, words=["a"])
    assert kept.documents == 4
    assert kept.doc_freq["a"] == 3
    assert len(counts) == 6


def test_document_frequencies() -> None:
    texts = ["a a b", "a\nc", "", "c"]
    counts = fastops.count_words(texts, doc_freq=True)
    assert counts.documents == 4
    assert dict(counts.doc_freq) == {"a": 2, "c": 2, "b": 1}
    assert list(counts.doc_freq) == list(counts) == ["a", "c", "b"]
    assert counts.doc_freq[b"a"] == 2
    assert counts.doc_freq["x"] == 0
    assert "x" not in counts.doc_freq
    assert len(counts.doc_freq) == 3
    assert "doc_freq of" in repr(counts.doc_freq)
    with pytest.raises(ValueError, match="doc_freq must be used where counting had doc_freq=True"):
        _ = fastops.count_words(texts).doc_freq


def test_sums() -> None:
    one, other = fastops.count_words("a b a"), fastops.count_words(["b c", "d"])
    both = one + other
    assert both.to_dict() == {"a": 2, "b": 2, "c": 1, "d": 1}
    assert both.documents == 3
    assert one.to_dict() == {"a": 2, "b": 1}
    assert other.to_dict() == {"b": 1, "c": 1, "d": 1}
    before = one
    one += other
    assert one is before
    assert one == both
    one.update({"a": 1, b"z": 2, "none": 0})
    assert one.to_dict() == {"a": 3, "b": 2, "z": 2, "c": 1, "d": 1}
    one.update(one)
    assert one.to_dict() == {"a": 6, "b": 4, "z": 4, "c": 2, "d": 2}
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = one + {"a": 1}  # type: ignore[operator]
    with pytest.raises(TypeError, match="unsupported operand"):
        one += {"a": 1}  # type: ignore[arg-type]


def test_merge_and_documents() -> None:
    texts = ["a b", "b c", "c d a", ""]
    parts = [fastops.count_words([text], doc_freq=True) for text in texts]
    whole = fastops.count_words(texts, doc_freq=True)
    merged = WordCounts.merge(iter(parts))
    assert merged == whole
    assert dict(merged.doc_freq) == dict(whole.doc_freq)
    assert merged.documents == whole.documents == 4
    assert [len(part) for part in parts] == [2, 2, 3, 0]
    assert WordCounts.merge([WordCounts(), *parts]).doc_freq["a"] == 2
    assert WordCounts.merge([*parts, WordCounts()]).doc_freq["a"] == 2
    parts[0].skipped.append(("file", "why"))
    assert WordCounts.merge(parts).skipped == [("file", "why")]
    assert (parts[1] + parts[0]).skipped == [("file", "why")]
    assert parts[1].skipped == []
    with pytest.raises(ValueError, match="other must be counted with doc_freq as these are, got counts without"):
        _ = whole + fastops.count_words("a")
    with pytest.raises(ValueError, match="got counts with documents"):
        _ = fastops.count_words("a") + whole


def test_a_sum_beyond_63_bits_changes_nothing() -> None:
    counts = WordCounts({"a": 2**62, "b": 3, "c": 1})
    other = WordCounts({"b": 1, "a": 2**62, "z": 1})
    with pytest.raises(ValueError, match=r"other must be such that sums stay below 2\*\*63"):
        counts.update(other)
    assert counts.to_dict() == {"a": 2**62, "b": 3, "c": 1}
    with pytest.raises(ValueError, match=r"2\*\*63"):
        WordCounts({"a": 2**63})
    most = WordCounts({"a": 2**63 - 1, "b": 2**63 - 1})
    assert most["a"] == 2**63 - 1
    assert most.total() == 2**64 - 2
    assert WordCounts.from_bytes(most.to_bytes()) == most


def test_partition_by_hash() -> None:
    counts = fastops.count_words([TEXT, "to be"], doc_freq=True) + hostile(docs=True)
    for k in (1, 2, 3, 7, 64):
        parts = counts.partition(k)
        assert len(parts) == k
        for i, part in enumerate(parts):
            assert part.documents == counts.documents
            for word in part:
                assert plain.fnv1a(word.encode("utf-8", "surrogateescape")) % k == i
                assert part.doc_freq[word] == counts.doc_freq[word]
        assert WordCounts.merge(parts) == counts
        assert sum(len(part) for part in parts) == len(counts)


def test_partition_into_very_many() -> None:
    """Thousands of tables are not much larger than what is in them."""
    counts = fastops.count_words(" ".join(f"word number {i}" for i in range(5000)) + " " + "x" * 40, doc_freq=True)
    parts = counts.partition(2**12)
    assert sum(len(part) for part in parts) == len(counts)
    assert sum(part.nbytes for part in parts) < 2**26
    assert {word: part[word] for part in parts for word in part.words()} == counts
    assert parts[0].documents == 1


def test_filter_by_many_words() -> None:
    counts = fastops.count_words(["a b a", "b c", "b"], doc_freq=True)
    chosen = counts.filter(words=["b", b"a", "b", "absent", "b"])
    assert dict(chosen) == {"b": 3, "a": 2}
    assert dict(chosen.doc_freq) == {"b": 3, "a": 1}
    assert chosen.documents == 3
    assert counts.filter(words=[]) == {}
    assert dict(counts.filter(words=(str(i) for i in range(10_000)))) == {}
    assert dict(counts.filter(without=["b", "b", b"c"])) == {"a": 2}
    with pytest.raises(ValueError, match=r"words\[1\] must be text without lone surrogates"):
        counts.filter(words=["a", "\ud800"])
    with pytest.raises(TypeError, match=r"without\[1\] must be a str or bytes, got 3"):
        counts.filter(without=["a", 3])  # type: ignore[list-item]


@pytest.mark.parametrize("size", [10, 1000, 20_000])
def test_order_of_many_words(size: int) -> None:
    """Few of many, half of them and all: the same order, whatever sorts them."""
    rng = random.Random(size)
    counts = {
        f"{rng.choice(['', 'wo', 'word', 'words of one beginning '])}{i}": min(int(rng.paretovariate(0.3)), 2**39)
        for i in range(size)
    }
    counts["the most"] = 2**62
    counts["almost"] = 2**40
    counts["\x00"] = counts["\x00\x00"] = counts[""] = 3
    want = sorted(counts.items(), key=lambda item: (-item[1], item[0].encode()))
    table = WordCounts(counts)
    for k in (0, 1, 2, 9, size // 20, size // 2, size, None):
        assert table.most_common(k) == want[:k]


def test_the_hash_is_fnv_1a() -> None:
    # The examples of its authors' page.
    assert plain.fnv1a(b"") == 0xCBF29CE484222325
    assert plain.fnv1a(b"a") == 0xAF63DC4C8601EC8C
    assert plain.fnv1a(b"foobar") == 0x85944171F73967E8


def test_pickles_and_copies() -> None:
    counts = fastops.count_words(["a b a", "b"], doc_freq=True, lowercase="ascii")
    counts.skipped.append(("name", "why"))
    for again in (pickle.loads(pickle.dumps(counts)), copy.copy(counts), copy.deepcopy(counts), counts.copy()):
        assert type(again) is WordCounts
        assert again == counts
        assert dict(again.doc_freq) == dict(counts.doc_freq)
        assert again.documents == 2
        assert again.skipped == [("name", "why")]
        np.testing.assert_array_equal(again.encode("A b")[0], [0, 1])
        again.update(again)
        assert counts["a"] == 2
    by_hand = fastops.count_words("a,b", tokenizer=lambda text: text.split(","), workers=1)
    again = pickle.loads(pickle.dumps(by_hand))
    assert again == by_hand
    with pytest.raises(ValueError, match="tokenizer must be given"):
        again.encode("a,b")


def test_words_become_ids() -> None:
    counts = fastops.count_words(["B a b", "c a b"], lowercase="ascii")
    assert counts.words() == ["b", "a", "c"]
    rows = counts.encode(["a B x c", "", b"\xef\xbb\xbfc"])
    assert [row.tolist() for row in rows] == [[1, 0, 2], [], [2]]
    assert all(row.dtype == np.int64 for row in rows)
    assert [row.tolist() for row in counts.encode("a a")] == [[1, 1]]
    assert counts.encode([]) == []
    pairs = fastops.count_words(["a b c"], ngrams=(1, 2), stop_words=["b"])
    assert pairs.words() == ["a", "a c", "c"]
    assert pairs.encode(["c a b c"])[0].tolist() == [2, 0, 2, 1]
    lines = fastops.count_words("ab\nab", tokenizer="char", document="line", ngrams=(2, 2))
    assert [row.tolist() for row in lines.encode(["ab\nab\n", "b\na"])] == [[0, 0], []]
    filtered = counts.filter(min_count=2)
    assert filtered.encode("c b a")[0].tolist() == [0, 1]


def test_ids_follow_the_counts() -> None:
    """What one call of encode prepared serves the next one, unless the counts or the rule have changed."""
    counts = fastops.count_words("b a b")
    assert [counts.encode("a B b")[0].tolist() for _ in range(2)] == [[1, 0]] * 2
    counts.update({"a": 5})
    assert counts.encode("a B b")[0].tolist() == [0, 1]
    assert counts.encode("a B b", lowercase="ascii")[0].tolist() == [0, 1, 1]
    assert counts.encode("a B b")[0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="UTF-8"):
        counts.encode([b"a", b"\xff"], errors="strict")
    assert counts.encode("b a")[0].tolist() == [1, 0]


def test_ids_by_a_callable() -> None:
    def commas(text: str) -> list[str]:
        return text.split(",")

    counts = fastops.count_words(["x,y,x", "Y"], tokenizer=commas, lowercase="ascii", workers=1, ngrams=(1, 2))
    assert counts.to_dict() == {"x": 2, "y": 2, "x y": 1, "y x": 1}
    for again in (counts, copy.copy(counts), copy.deepcopy(counts)):
        assert [row.tolist() for row in again.encode(["X,Y", b"z,x"])] == [[0, 1, 2], [0]]


def test_ids_of_counts_from_a_file_need_the_options() -> None:
    counts = WordCounts.from_bytes(fastops.count_words("A b", lowercase="ascii").to_bytes())
    with pytest.raises(ValueError, match="tokenizer must be given"):
        counts.encode("A b")
    assert counts.encode("A b", lowercase="ascii")[0].tolist() == [0, 1]
    assert counts.encode("A b", tokenizer="whitespace")[0].tolist() == [1]
    with pytest.raises(TypeError, match="workers"):
        counts.encode("a", workers=3)
    with pytest.raises(ValueError, match="tokenizer must be 'whitespace' or"):
        counts.encode("a", tokenizer="white")
    mixed = fastops.count_words("a") + fastops.count_words("b", lowercase="ascii")
    with pytest.raises(ValueError, match="tokenizer must be given"):
        mixed.encode("a")
    assert (fastops.count_words("a") + fastops.count_words("b")).encode("b")[0].tolist() == [1]


def test_document_term_matrix() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefgh", k=rng.randrange(9))) for _ in range(50)] + [""]
    counts = fastops.count_words(texts)
    indptr, indices, data = counts.encode(texts, as_csr=True)
    matrix = sparse.csr_matrix((data, indices, indptr), shape=(len(texts), len(counts)))
    matrix.check_format()
    assert matrix.has_canonical_format
    wanted = [[Counter(text.split())[word] for word in counts] for text in texts]
    np.testing.assert_array_equal(matrix.toarray(), wanted)
    assert matrix.sum() == counts.total()
    empty = counts.encode([], as_csr=True)
    assert [array.tolist() for array in empty] == [[0], [], []]


def test_arrow() -> None:
    pa = pytest.importorskip("pyarrow")
    for counts in (fastops.count_words(["é a é", "a"], doc_freq=True), fastops.count_words("a é"), WordCounts()):
        table = counts.to_arrow()
        table.validate(full=True)
        assert table.schema.field("word").type == pa.large_string()
        assert table.schema.field("count").type == pa.int64()
        assert table["word"].to_pylist() == counts.words()
        assert table["count"].to_pylist() == list(counts.values())
        if counts._table.has_docs:
            assert table["docs"].to_pylist() == list(counts.doc_freq.values())
    odd = hostile()
    with pytest.raises(ValueError, match="binary must be True where words are no UTF-8"):
        odd.to_arrow()
    binary = odd.to_arrow(binary=True)
    binary.validate(full=True)
    assert set(binary["word"].to_pylist()) == set(HOSTILE)
    halves = WordCounts({b"\xe2": 1, b"\x82\xac": 2})
    for counts in (halves, WordCounts({b"\xe2": 2, b"\x82\xac": 1}), WordCounts({b"a\xe2": 1})):
        with pytest.raises(ValueError, match="binary must be True"):
            counts.to_arrow()


def test_pandas() -> None:
    pytest.importorskip("pandas")
    frame = fastops.count_words(["é a é", "a"], doc_freq=True).to_pandas()
    assert frame.columns.tolist() == ["word", "count", "docs"]
    assert frame.to_numpy().tolist() == [["a", 2, 2], ["é", 2, 1]]
    assert set(hostile().to_pandas()["word"]) == {as_text(key) for key in HOSTILE}
    assert len(WordCounts().to_pandas()) == 0


def test_tsv(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "counts.tsv"
    counts = fastops.count_words(b"b \xff a a", errors="surrogateescape")
    counts.to_tsv(path)
    assert path.read_bytes() == b"a\t2\nb\t1\n\xff\t1\n"
    counts.to_tsv(str(path), k=1)
    assert path.read_bytes() == b"a\t2\n"
    for word in ("x\ty", "\n", "\t"):
        odd = WordCounts({"a": 3, "b": 2, word: 2})
        with pytest.raises(ValueError, match="words must be free of tabs") as caught:
            odd.to_tsv(path)
        assert repr(word) in str(caught.value)
        assert path.read_bytes() == b"a\t2\n"
        odd.filter(without=[word]).to_tsv(path, k=1)
        assert path.read_bytes() == b"a\t3\n"
        path.write_bytes(b"a\t2\n")
    assert os.listdir(tmp_path) == ["counts.tsv"]


def test_save_and_load(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "counts.fowc"
    counts = fastops.count_words(TEXT, doc_freq=True)
    counts.save(path)
    again = WordCounts.load(str(path))
    assert again == counts
    assert dict(again.doc_freq) == dict(counts.doc_freq)
    assert os.listdir(tmp_path) == ["counts.fowc"]
    # The rights of a file that is made anew, not those of a secret.
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            with pytest.raises(OSError, match="No space left"):
                WordCounts({"other": 1}).save(path)
        assert sorted(os.listdir(tmp_path)) == ["counts.fowc", "plain"]
        assert WordCounts.load(path) == counts
    with pytest.raises(FileNotFoundError):
        WordCounts.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        counts.save(tmp_path / "absent" / "counts")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="container") as caught:
        WordCounts.load(path)
    assert "counts.fowc" in caught.value.__notes__[0]
    monkeypatch.chdir(tmp_path)
    counts.save("here")
    assert WordCounts.load("here") == counts


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.binary(max_size=40), st.integers(1, 2**63 - 1), max_size=20),
    st.integers(0, 2**40),
    st.booleans(),
)
def test_the_container_round_trips(backend: ModuleType, entries: dict[bytes, int], number: int, docs: bool) -> None:
    table = backend.word_table(docs)
    for i, (key, count) in enumerate(entries.items()):
        table.add(key, count, min(i, count) if docs else 0)
    table.documents, table.error_bound = number, number // 2
    for reader in (backend, fastops.reference):
        again = reader.table_from_bytes(memoryview(table.to_bytes()))
        assert {key: again.get(key) for key in entries} == {key: table.get(key) for key in entries}
        assert (len(again), again.documents, again.error_bound, again.has_docs) == (
            len(table),
            number,
            number // 2,
            docs,
        )


def container(
    counts: list[int], keys: list[bytes], docs: list[int] | None = None, lengths: list[int] | None = None, **head: Any
) -> bytes:
    """A container with a checksum that is right, whatever it says."""
    sizes = [len(key) for key in keys] if lengths is None else lengths
    body = struct.pack(f"<{len(counts)}Q", *counts)
    if docs is not None:
        body += struct.pack(f"<{len(docs)}Q", *docs)
    body += struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(keys)
    fields = {
        "magic": b"FOWC\r\n\x1a\n",
        "version": 1,
        "flags": int(docs is not None),
        "n": len(counts),
        "key_bytes": sum(map(len, keys)),
        "error_bound": 0,
        "documents": 0,
        "zero": 0,
        "other_zero": 0,
    } | head
    start = struct.pack("<8sIIQQQQQ", *list(fields.values())[:8])
    return start + struct.pack("<II", zlib.crc32(start + body), fields["other_zero"]) + body


def test_equal_counts_are_equal_bytes(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "text"
    lines = [f"{i % 1000} {i % 7} word{i % 313}\n" for i in range(100_000)]
    path.write_text("".join(lines))
    data = fastops.count_files(path, doc_freq=True, workers=1).to_bytes()
    assert fastops.count_files(path, doc_freq=True, workers=3).to_bytes() == data
    turned = fastops.count_words(reversed(lines), doc_freq=True)
    assert turned.to_bytes() == data
    turned.save(tmp_path / "saved")
    assert (tmp_path / "saved").read_bytes() == data
    assert WordCounts.from_bytes(data).to_bytes() == data


def test_the_container_is_what_is_written_down() -> None:
    counts = WordCounts.from_bytes(container([2, 1], [b"be", b"or"]))
    assert counts.to_dict() == {"be": 2, "or": 1}
    assert WordCounts.from_bytes(container([2], [b"be"], [1])).doc_freq["be"] == 1
    data = fastops.count_words("a").to_bytes()
    assert data == container([1], [b"a"], documents=1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"FOWC\r\n\x1a\n",
        container([1], [b"a"], magic=b"FOWC\n\n\x1a\n"),
        container([1], [b"a"], version=2),
        container([1], [b"a"], version=0),
        container([1], [b"a"], flags=2),
        container([1], [b"a"], flags=1),
        container([1], [b"a"], zero=1),
        container([1], [b"a"], other_zero=1),
        container([1], [b"a"]) + b"x",
        container([1], [b"a"])[:-1],
        container([1], [b"a"], n=2**62),
        container([1], [b"a"], n=2**64 - 1, key_bytes=2**64 - 1),
        container([1], [b"a"], key_bytes=2**63),
        container([1], [b"a"], lengths=[2]),
        container([1, 1], [b"a", b"b"], lengths=[2**32 - 1, 3]),
        container([0], [b"a"]),
        container([2**63], [b"a"]),
        container([1], [b"a"], [2]),
        container([1, 2], [b"a", b"a"]),
    ],
)
def test_a_container_that_lies_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="counts must be a container of fastops"):
        WordCounts.from_bytes(data)


def test_every_flipped_byte_and_every_cut_is_found() -> None:
    data = fastops.count_words(["a bb é", "a"], doc_freq=True).to_bytes()
    assert WordCounts.from_bytes(data)["a"] == 2
    for i in range(len(data)):
        for flip in (1, 0x80, 0xFF):
            with pytest.raises(ValueError, match="must be"):
                WordCounts.from_bytes(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
        with pytest.raises(ValueError, match="must be"):
            WordCounts.from_bytes(data[:i])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_noise_is_no_container(data: bytes) -> None:
    for noise in (data, b"FOWC\r\n\x1a\n\x01\x00\x00\x00\x00\x00\x00\x00" + data):
        with pytest.raises(ValueError, match="must be"):
            WordCounts.from_bytes(noise)


def test_bytes_of_any_kind_are_read() -> None:
    data = fastops.count_words("a").to_bytes()
    for kind in (
        bytearray(data),
        memoryview(data),
        np.frombuffer(data, np.uint8),
        memoryview(io.BytesIO(data).getbuffer()),
    ):
        assert WordCounts.from_bytes(kind) == {"a": 1}
    for wrong in ("text", 5, None, [1]):
        with pytest.raises(TypeError, match="data must be bytes-like"):
            WordCounts.from_bytes(wrong)  # type: ignore[arg-type]


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "counts": (lambda c: WordCounts(["a"]), TypeError, "other must be a WordCounts or a mapping"),
    "counts key": (lambda c: WordCounts({5: 1}), TypeError, "word must be a str or bytes, got 5"),
    "counts count": (lambda c: WordCounts({"a": 1.5}), TypeError, "count of 'a' must be an integer >= 0, got 1.5"),
    "counts bool": (lambda c: WordCounts({"a": True}), TypeError, "count of 'a' must be an integer"),
    "counts negative": (lambda c: WordCounts({"a": -1}), ValueError, "count of 'a' must be an integer >= 0, got -1"),
    "counts surrogate": (lambda c: WordCounts({"\ud800": 1}), ValueError, "word must be text without lone surrogates"),
    "k": (lambda c: c.most_common(-1), ValueError, "k must be an integer >= 0, got -1"),
    "k type": (lambda c: c.most_common(1.0), TypeError, "k must be an integer"),
    "min_count": (lambda c: c.filter(0), ValueError, "min_count must be an integer >= 1, got 0"),
    "max_count": (lambda c: c.filter(max_count="3"), TypeError, "max_count must be an integer"),
    "min_docs": (lambda c: c.filter(min_docs=-1), ValueError, "min_docs must be an integer >= 0, got -1"),
    "max_docs": (lambda c: c.filter(max_docs=3), ValueError, "max_docs must be used where counting had doc_freq=True"),
    "share": (lambda c: c.filter(max_docs_share=1.5), ValueError, "max_docs_share must be a finite number in"),
    "share nan": (lambda c: c.filter(max_docs_share=float("nan")), ValueError, "max_docs_share must be"),
    "words": (lambda c: c.filter(words="abc"), TypeError, "words must be an iterable of words"),
    "words item": (lambda c: c.filter(words=["a", None]), TypeError, "words[1] must be a str or bytes, got None"),
    "words surrogate": (lambda c: c.filter(words=["\ud800"]), ValueError, "words[0] must be text without lone"),
    "without": (lambda c: c.filter(without=5), TypeError, "without must be an iterable of words"),
    "update": (lambda c: c.update("abc"), TypeError, "other must be a WordCounts or a mapping"),
    "merge": (lambda c: WordCounts.merge(c), TypeError, "parts must be an iterable of WordCounts"),
    "merge item": (lambda c: WordCounts.merge([c, {}]), TypeError, "parts[1] must be a WordCounts"),
    "partition": (lambda c: c.partition(0), ValueError, "k must be an integer in [1, 65536], got 0"),
    "texts": (lambda c: c.encode(5), TypeError, "texts must be a str, bytes"),
    "texts item": (lambda c: c.encode(["a", 5]), TypeError, "texts[1] must be a str or bytes, got 5"),
    "as_csr": (lambda c: c.encode(["a"], as_csr=1), TypeError, "as_csr must be True or False, got 1"),
    "option": (lambda c: c.encode(["a"], ngrams=3), TypeError, "ngrams must be a pair of integers"),
    "path": (lambda c: c.save(5), TypeError, "path must be a str or a path, got 5"),
    "load": (lambda c: WordCounts.load(b"x"), TypeError, "path must be a str or a path"),
    "tsv": (lambda c: c.to_tsv(None), TypeError, "path must be a str or a path, got None"),
    "tsv k": (lambda c: c.to_tsv("x", k=-1), ValueError, "k must be an integer >= 0, got -1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, kind, said = WRONG[name]
    counts = fastops.count_words("a b a")
    with pytest.raises(kind) as caught:
        call(counts)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 200
    assert counts.to_dict() == {"a": 2, "b": 1}
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("over_backend")
def test_encode_leaves_stop_words_out() -> None:
    counts = WordCounts({"the": 3, "cat": 1})
    np.testing.assert_array_equal(counts.encode("the cat the", stop_words=["the"])[0], [1])


@pytest.mark.usefixtures("over_backend")
def test_stop_words_take_no_place_of_approximate_counts() -> None:
    text = " ".join(["the"] * 1000 + ["of"] * 900 + ["cat"] * 8 + ["dog"])
    counts = fastops.count_words(text, stop_words=["the", "of"], approx=2)
    assert counts.to_dict() == {"cat": 8, "dog": 1}
    assert counts.error_bound == 0


@pytest.mark.usefixtures("over_backend")
def test_encode_with_an_option_keeps_the_others() -> None:
    counts = fastops.count_words("A b,c a", tokenizer="word", lowercase="ascii")
    for options in ({}, {"errors": "strict"}, {"stop_words": ["z"]}):
        np.testing.assert_array_equal(counts.encode("A b,c", **options)[0], [0, 1, 2])
    np.testing.assert_array_equal(counts.encode("A b,c", lowercase=None)[0], [1, 2])


def test_saving_keeps_modes_links_and_devices(tmp_path: pathlib.Path) -> None:
    counts = fastops.count_words("to be or not to be")
    target, link, pipe = tmp_path / "counts", tmp_path / "link", tmp_path / "pipe"
    target.touch(mode=0o600)
    link.symlink_to(target)
    counts.save(link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    assert WordCounts.load(target) == counts
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    counts.to_tsv(pipe)
    assert os.read(reader, 100) == b"be\t2\nto\t2\nnot\t1\nor\t1\n"
    os.close(reader)
    assert pipe.is_fifo()
    assert sorted(tmp_path.iterdir()) == [target, link, pipe]
