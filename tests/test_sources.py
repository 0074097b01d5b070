# SPDX-License-Identifier: BSD-3-Clause
"""Files, globs and objects as sources of text; decompression by first bytes, in bounded pieces, to the end mark."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import mmap
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastops import _sources
from fastops._rule import DecodeError
from fastops._sources import DamagedFile, Source, sources

TEXT = b"".join(b"line %d with some words\n" % i for i in range(300)) + "Ünïcode 字 no newline".encode()


def zstd(data: bytes, **options: Any) -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    options = {"write_checksum": True} | options
    return bytes(zstandard.ZstdCompressor(**options).compress(data))


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}


def content(path: Any, **options: Any) -> bytes:
    (source,) = sources(path)
    with source.open() as stream:
        return b"".join(stream.blocks(**options))


def packed(folder: Path, data: bytes, name: str = "file") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", PACK)
def test_kind_is_known_by_the_first_bytes(kind: str, tmp_path: Path) -> None:
    for name in ("plain.txt", f"right.{kind}", "wrong.gz", "wrong.zst"):
        assert content(packed(tmp_path, PACK[kind](TEXT), name)) == TEXT


@pytest.mark.parametrize("kind", PACK)
def test_parts_one_after_another_are_one_text(kind: str, tmp_path: Path) -> None:
    pack = PACK[kind]
    assert content(packed(tmp_path, pack(TEXT) + pack(b"") + pack(b"more") + pack(TEXT))) == TEXT + b"more" + TEXT


def test_padding(tmp_path: Path) -> None:
    data = gzip.compress(TEXT)
    assert content(packed(tmp_path, data + bytes(1000))) == TEXT
    assert content(packed(tmp_path, data + bytes(5) + data + bytes(1))) == TEXT * 2
    data = lzma.compress(TEXT)
    assert content(packed(tmp_path, data + bytes(8) + data + bytes(4))) == TEXT * 2
    with pytest.raises(DamagedFile, match="followed by something else"):
        content(packed(tmp_path, data + bytes(3)))
    frame = zstd(TEXT)
    skipped = b"\x53\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"1234567"
    assert content(packed(tmp_path, skipped + frame + skipped)) == TEXT


@pytest.mark.parametrize("tail", [b"x", b"garbage after the end", b"\0\0x", b"\x1f", b"\x28\xb5", b"BZ", b"\n"])
@pytest.mark.parametrize("kind", PACK)
def test_something_else_after_the_end_is_an_error(kind: str, tail: bytes, tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match=r"file: \w+ data"):
        content(packed(tmp_path, PACK[kind](TEXT) + tail))


@pytest.mark.parametrize("kind", PACK)
def test_every_cut_is_an_error(kind: str, tmp_path: Path) -> None:
    """But that to nothing, which is an empty text, and under a name that says nothing those that leave no mark."""
    data = PACK[kind](b"some few words, some few words")
    for end in range(len(data)):
        with pytest.raises(DamagedFile, match=rf"cut\.{kind}: "):
            content(packed(tmp_path, data[:end], f"cut.{kind}"))
        if end >= 6:
            with pytest.raises(DamagedFile, match="end before the end mark"):
                content(packed(tmp_path, data[:end], "cut"))


@pytest.mark.parametrize("kind", PACK)
def test_a_cut_between_reads_is_an_error(kind: str, tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(700_000)
    data = PACK[kind](noise)
    for end in (2**18 - 1, 2**18, 2**18 + 1, 2**19, len(data) - 9, len(data) - 1):
        with pytest.raises(DamagedFile, match="end before the end mark"):
            content(packed(tmp_path, data[:end], "cut"))
    assert content(packed(tmp_path, data)) == noise


@pytest.mark.parametrize("kind", PACK)
def test_plain_text_under_the_name_of_compressed_text(kind: str, tmp_path: Path) -> None:
    for text in (b"plain text\n", TEXT, TEXT * 100, "é".encode() * 200_001):
        assert content(packed(tmp_path, text, f"plain.{kind}")) == text
    for text in (b"", b"\0binary", b"\xff\xfe\xfd", "é".encode()[:1]):
        with pytest.raises(DamagedFile):
            content(packed(tmp_path, text, f"plain.{kind}"))


@pytest.mark.parametrize("kind", PACK)
def test_pieces_stay_small_whatever_the_ratio(kind: str, tmp_path: Path) -> None:
    path = packed(tmp_path, PACK[kind](bytes(50_000_000)))
    (source,) = sources(path)
    with source.open() as stream:
        sizes = [len(piece) for piece in stream.blocks()]
        assert stream.consumed == path.stat().st_size
    assert sum(sizes) == 50_000_000
    assert max(sizes) <= _sources.PIECE


@pytest.mark.parametrize("kind", PACK)
def test_max_output_bytes(kind: str, tmp_path: Path) -> None:
    path = packed(tmp_path, PACK[kind](bytes(3_000_000)))
    assert len(content(path, max_output_bytes=3_000_000)) == 3_000_000
    with pytest.raises(
        ValueError, match=r"file must decompress to at most 2999999 bytes \(max_output_bytes\), got more"
    ):
        content(path, max_output_bytes=2_999_999)


def test_zstd_windows_are_limited(tmp_path: Path) -> None:
    pytest.importorskip("zstandard", reason="zstandard is not installed")
    # A raw block of one byte in a frame with a window of 2^(10 + exponent).
    for exponent, allowed in ((17, True), (18, False), (31, False)):
        frame = b"\x28\xb5\x2f\xfd\x00" + bytes([exponent << 3]) + (1 | 1 << 3).to_bytes(3, "little") + b"a"
        path = packed(tmp_path, frame)
        if allowed:
            assert content(path) == b"a"
        else:
            with pytest.raises(DamagedFile, match="too much memory"):
                content(path)


def test_zstd_without_a_checksum_still_ends_by_its_last_block(tmp_path: Path) -> None:
    data = zstd(TEXT, write_checksum=False, write_content_size=False)
    assert content(packed(tmp_path, data)) == TEXT
    for end in range(4, len(data)):
        with pytest.raises(DamagedFile, match="end before"):
            content(packed(tmp_path, data[:end]))


def test_xz_dictionaries_are_limited(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**29}]
    path = packed(tmp_path, lzma.compress(b"a", filters=filters))
    with pytest.raises(DamagedFile, match="Memory usage limit"):
        content(path)


def test_paths_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(tmp_path, TEXT, "a.txt")
    for item in (path, str(path), os.fsencode(path)):
        assert [source.name for source in sources(item)] == [str(path)]
    packed(tmp_path, b"b", "b.txt")
    packed(tmp_path, b"c", "c.md")
    (tmp_path / "folder.txt").mkdir()
    assert [Path(source.name).name for source in sources(str(tmp_path / "*.txt"))] == ["a.txt", "b.txt"]
    assert [Path(source.name).name for source in sources([tmp_path / "c.md", f"{tmp_path}/[ab].*"])] == [
        "c.md",
        "a.txt",
        "b.txt",
    ]
    # A name that is there is no pattern.
    packed(tmp_path, b"literal", "[ab].txt")
    assert content(str(tmp_path / "[ab].txt")) == b"literal"
    monkeypatch.chdir(tmp_path)
    assert [source.name for source in sources("*.md")] == ["c.md"]
    assert sources([]) == []
    assert sources(iter(["c.md"]))[0].size == 1


def test_what_is_missing_is_named_before_any_work(tmp_path: Path) -> None:
    path = packed(tmp_path, b"a", "a.txt")
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        sources([path, tmp_path / "missing.txt"])
    with pytest.raises(FileNotFoundError, match=r"No file matches.*\*\.none"):
        sources([path, f"{tmp_path}/*.none"])
    with pytest.raises(IsADirectoryError, match=r"Is a directory"):
        sources([path, tmp_path])
    with pytest.raises(FileNotFoundError):
        # A path object is no pattern.
        sources(tmp_path / "*.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = packed(tmp_path, b"a")
    path.chmod(0)
    with pytest.raises(PermissionError, match="file"):
        sources(path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "files must be a path, a glob, '-', a binary file object, or a list of these, got None"),
        (3, "files must be a path"),
        (["a", 3], r"files\[1\] must be a path, a glob, '-' or a binary file object, got 3"),
        (io.StringIO("text"), "files must be a binary file object .*, got a text file object"),
    ],
)
def test_what_is_no_file_is_a_type_error(
    files: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packed(tmp_path, b"", "a")
    with pytest.raises(TypeError, match=words):
        sources(files)


def test_file_objects(tmp_path: Path) -> None:
    assert content(io.BytesIO(TEXT)) == TEXT
    assert content(io.BytesIO(lzma.compress(TEXT))) == TEXT
    path = packed(tmp_path, TEXT)
    with open(path, "rb") as file:
        file.read(10)
        assert content(file) == TEXT[10:]
        assert not file.closed
    with pytest.raises(ValueError, match="files must be open"):
        sources(file)
    with open(path, "rb", buffering=0) as raw:
        assert content([raw]) == TEXT
    with gzip.open(packed(tmp_path, gzip.compress(TEXT))) as unpacked:
        assert content(unpacked) == TEXT

    class Strings:
        def read(self, count: int) -> str:
            return "text"

    with pytest.raises(TypeError, match="got one that reads str"):
        content(Strings())

    class Trickle:
        def __init__(self, data: bytes) -> None:
            self.data = iter(data)

        def read(self, count: int) -> bytes:
            return bytes([byte]) if (byte := next(self.data, None)) is not None else b""

    assert content(Trickle(gzip.compress(TEXT))) == TEXT
    assert content(Trickle(zstd(TEXT))) == TEXT


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bz2.compress(TEXT))))
    assert content("-") == TEXT
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(OSError, match="standard input is closed"):
        sources("-")
    near, far = os.pipe()
    with open(near) as stdin, open(far, "wb") as write:
        monkeypatch.setattr(sys, "stdin", stdin)
        writer = threading.Thread(target=lambda: (write.write(TEXT * 50), write.close()))
        writer.start()
        assert content("-") == TEXT * 50
        writer.join()


def test_fifo(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(gzip.compress(TEXT)))
    writer.start()
    assert content(path) == TEXT
    writer.join()


def test_files_of_proc_have_no_size() -> None:
    assert content("/proc/self/status").startswith(b"Name:")


def test_names_are_printable(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    with open(folder + b"/\xff\n\x1b.gz", "wb") as file:
        file.write(gzip.compress(TEXT)[:-1])
    (source,) = sources(folder + b"/\xff*")
    assert source.name.endswith(r"/\xff\n\x1b.gz")
    source.name.encode()
    with pytest.raises(DamagedFile, match=r"\\xff\\n\\x1b\.gz"), source.open() as stream:
        list(stream.blocks())
    assert content(os.fsdecode(packed(tmp_path, b"x", "日本語 é"))) == b"x"
    assert _sources.printable("日本語 é") == "日本語 é"


def test_read_errors_name_the_file(tmp_path: Path) -> None:
    source = Source("folder", path=str(tmp_path))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        source.open()
    # The descriptor went with the error.
    assert os.listdir("/proc/self/fd") == before


@given(st.lists(st.binary(max_size=12).map(lambda data: data.replace(b"\x00", b"\n"))))
def test_lines_are_whole(blocks: list[bytes]) -> None:
    runs = list(_sources.lines("x", blocks))
    assert b"".join(runs) == b"".join(blocks)
    assert all(run.endswith(b"\n") for run in runs[:-1])
    assert all(runs)


def test_a_line_has_an_end() -> None:
    with pytest.raises(ValueError, match="x: a line must have at most 100 bytes"):
        list(_sources.lines("x", [b"a" * 40] * 3, most=100))


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": None, "other": 1}, {"text": 'zwei 字\n\t"'}, {"text": "\ud800\udc80"}]
    data = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in rows) + b"\n  \n\n"
    batches = list(_sources.jsonl("f", [data[:7], data[7:30], data[30:]], "text", "replace"))
    assert [text for _, batch in batches for text in batch] == [
        b"one",
        b"",
        'zwei 字\n\t"'.encode(),
        "\U00010080".encode(),
    ]
    assert batches[0][0].startswith("f, lines 1 to ")
    assert batches[-1][0].endswith(" to 6")


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        (b"{", ValueError, "f, line 2: invalid JSON"),
        (b"[1]", ValueError, "f, line 2: a record must be a JSON object, got list"),
        (b'{"other": 1}', ValueError, "f, line 2: no field 'text'"),
        (b'{"text": 1}', ValueError, "f, line 2: field 'text' must be a string, got int"),
        (b"[" * 100_000, ValueError, "f, line 2: (JSON nested too deeply|invalid JSON)"),
        (b'{"text": "\xff"}', DecodeError, "f, line 2 must be UTF-8, got 0xff at byte 24 of the file"),
    ],
)
def test_jsonl_errors_name_the_line(line: bytes, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        list(_sources.jsonl("f", [b'{"text": "a"}\n' + line + b"\n"], "text", "strict"))


def test_surrogates_are_bytes_each_by_itself() -> None:
    texts = ["a\udcffé", "\udcff\ud800\udcff", "\ud800", "\udc7f\udc80\udd00", "é\udfff"]
    assert [_sources.encoded(text) for text in texts[:2]] == [b"a\xff\xc3\xa9", b"\xff\xed\xa0\x80\xff"]
    assert _sources.encoded("".join(texts)) == b"".join(map(_sources.encoded, texts))


def test_jsonl_takes_invalid_utf8_by_the_rule() -> None:
    line = [b'{"text": "a\xffb"}']
    for errors, wanted in (("replace", "a\ufffdb".encode()), ("ignore", b"ab"), ("surrogateescape", b"a\xffb")):
        assert [text for _, batch in _sources.jsonl("f", line, "text", errors) for text in batch] == [wanted]


def test_arrow_arrays_give_their_bytes() -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    texts = ["one", "", None, "zwei 字", "a" * 3_000_000, "x", None, "last"]
    wanted = [(text or "").encode() for text in texts]
    arrays = [pa.array(texts, kind) for kind in (pa.string(), pa.large_string(), pa.string_view())]
    arrays.append(pa.array(texts).dictionary_encode())
    arrays.append(pa.chunked_array([texts[:3], [], texts[3:]], pa.string()))
    for array in arrays:
        assert [text for batch in _sources.arrow_documents(array) for text in batch] == wanted
        assert [text for batch in _sources.arrow_documents(array.slice(2, 4)) for text in batch] == wanted[2:6]
    assert list(_sources.arrow_documents(pa.array([], pa.string()))) == []
    assert [len(batch) for batch in _sources.arrow_documents(arrays[0])] == [4, 1, 3]
    with pytest.raises(TypeError, match="texts must be an Arrow array of strings, got one of int64"):
        list(_sources.arrow_documents(pa.array([1])))


def test_arrow_offsets_may_come_near_to_32_bits() -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    # Pages that nobody reads take no memory.
    data = mmap.mmap(-1, 2**31)
    words = [b"near", b"the", b"end"]
    first = 2**31 - 1 - sum(map(len, words))
    data[first : 2**31 - 1] = b"".join(words)
    offsets = np.cumsum([first, *map(len, words)]).astype(np.int32)
    array = pa.Array.from_buffers(pa.binary(), len(words), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    assert list(_sources.arrow_documents(array)) == [words]


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    texts = [f"row {i} 字" for i in range(100)] + [None, ""]
    path = tmp_path / "table"
    pq.write_table(pa.table({"text": texts, "n": range(102)}), path, row_group_size=30)
    (source,) = sources(path)
    batches = list(_sources.parquet(source, "text"))
    assert [text for _, batch, _ in batches for text in batch] == [(text or "").encode() for text in texts]
    assert [name for name, _, _ in batches] == [f"{path}, row group {i}" for i in range(4)]
    with open(path, "rb") as file:
        assert len(list(_sources.parquet(sources(file)[0], "text"))) == 4
    with pytest.raises(ValueError, match="no column 'txt', only 'text', 'n'"):
        list(_sources.parquet(source, "txt"))
    with pytest.raises(ValueError, match="column 'n' must be of strings, got int64"):
        list(_sources.parquet(source, "n"))
    (source,) = sources(packed(tmp_path, path.read_bytes()[:-1]))
    with pytest.raises(DamagedFile, match="file: parquet data are damaged"):
        list(_sources.parquet(source, "text"))


def test_a_pattern_with_skipping(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    pattern = str(tmp_path / "*.txt")
    with pytest.raises(FileNotFoundError):
        _sources.sources(pattern)
    assert [source.name for source in _sources.sources(pattern, skip=True)] == sorted(map(str, tmp_path.iterdir()))
    assert [source.name for source in _sources.sources(f"{pattern}x", skip=True)] == [f"{pattern}x"]
