# SPDX-License-Identifier: BSD-3-Clause
"""Word counting over damaged, hostile and too much input: an error that names the file, in bounded memory, nothing silent."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from child import once, run, unsanitized

import fastops
from fastops import DecodeError, TokenTooLong
from fastops._sources import DamagedFile

pytestmark = once

TEXT = b"".join(b"%d sheep and %d goats\n" % (i, i * i) for i in range(60))
# Every file of a flipped bit may cost a decoder's start, and there are some thousand.
FLIPS = 1000


def _zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    return bytes(zstandard.ZstdCompressor(write_checksum=True).compress(data))


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": _zstd,
}


def outcome(path: Path) -> Any:
    """The counts, or the error of a kind that is documented."""
    try:
        return fastops.count_files(path, workers=1, errors="surrogateescape")
    except (DamagedFile, DecodeError, TokenTooLong) as problem:
        if str(path) not in str(problem):
            raise AssertionError("an error names its file") from problem
        return None


@pytest.mark.parametrize("kind", PACK)
def test_no_cut_is_silent(kind: str, tmp_path: Path) -> None:
    data = PACK[kind](TEXT)
    path = tmp_path / f"cut.{kind}"
    for end in range(len(data)):
        path.write_bytes(data[:end])
        assert outcome(path) is None, end
    path.write_bytes(data)
    assert outcome(path) == fastops.count_words(TEXT)


@pytest.mark.parametrize("kind", PACK)
def test_no_flip_is_silent(kind: str, tmp_path: Path) -> None:
    """One bit: an error, or the same text (a header's time and name are in no checksum)."""
    rng = random.Random(kind)
    whole = PACK[kind](TEXT)
    want = fastops.count_words(TEXT)
    path = tmp_path / f"flip.{kind}"
    same = 0
    for _ in range(FLIPS):
        data = bytearray(whole)
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        got = outcome(path)
        assert got is None or got == want, bit
        same += got is not None
    print(f"{kind}: {same} of {FLIPS} flips left the text as it was")


@pytest.mark.parametrize("kind", PACK)
def test_no_change_of_bytes_is_silent(kind: str, tmp_path: Path) -> None:
    """Bytes overwritten, left out, put in or put elsewhere, in files of two parts."""
    rng = random.Random(kind)
    half = len(TEXT) // 2
    whole = PACK[kind](TEXT[:half]) + PACK[kind](TEXT[half:])
    want = fastops.count_words(TEXT)
    path = tmp_path / f"changed.{kind}"
    for _ in range(300):
        data = bytearray(whole)
        at, length = rng.randrange(len(data)), rng.randrange(1, 9)
        how = rng.randrange(4)
        if how == 0:
            data[at : at + length] = rng.randbytes(length)
        elif how == 1:
            del data[at : at + length]
        elif how == 2:
            data[at:at] = rng.randbytes(length)
        else:
            moved = data[at : at + length]
            del data[at : at + length]
            data += moved
        path.write_bytes(data)
        got = outcome(path)
        # The loss of a whole part could not be seen; nine bytes are none.
        assert got is None or got == want, (at, length, how)


PEAK = """
import resource
def peak():
    # What this process itself has touched, since its start.
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) / 1024
"""


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("tokenizer", ["whitespace", "word", "char"])
@pytest.mark.parametrize("size", [2**27, pytest.param(2**30, marks=pytest.mark.nightly)])
@unsanitized
def test_a_bomb_costs_little_memory(kind: str, tokenizer: str, size: int, tmp_path: Path) -> None:
    """Up to 1 GiB of one letter: the error of a token that is too long, or a table of one entry."""
    path = tmp_path / "bomb"
    _bomb(path, kind, size)
    assert path.stat().st_size < 1_200_000
    code = """
    before = peak()
    try:
        counts = fastops.count_files(sys.argv[1], tokenizer=sys.argv[2], workers=2)
        assert counts.to_dict() == {"a": int(sys.argv[3])}, counts
    except fastops.TokenTooLong as problem:
        assert sys.argv[2] != "char" and sys.argv[1] in str(problem), problem
    print(f"{peak() - before:.0f} MB above {before:.0f}")
    assert peak() - before < 64, (before, peak())
    """
    run(PEAK, code, arguments=[str(path), tokenizer, str(size)], timeout=60)


def _bomb(path: Path, kind: str, size: int) -> None:
    block = b"a" * 2**20
    with path.open("wb") as file:
        packer: Any
        if kind == "gz":
            import zlib

            packer = zlib.compressobj(9, wbits=31)
        elif kind == "zst":
            zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
            packer = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
        else:
            packer = bz2.BZ2Compressor() if kind == "bz2" else lzma.LZMACompressor(preset=1)
        for _ in range(size // len(block)):
            file.write(packer.compress(block))
        file.write(packer.flush())


@unsanitized
def test_bombs_of_other_shapes(tmp_path: Path) -> None:
    """Ten thousand members; a record without end; a line without end for a Python tokenizer; a run of combining marks."""
    members = tmp_path / "members.gz"
    members.write_bytes(gzip.compress(b"a " * 5_000) * 10_000)
    record = tmp_path / "record.gz"
    record.write_bytes(gzip.compress(b'{"text": "' + b"a" * 80_000_000))
    line = tmp_path / "line.gz"
    line.write_bytes(gzip.compress(b"a " * 40_000_000))
    marks = tmp_path / "marks.gz"
    marks.write_bytes(gzip.compress("a\u0301\u0327".encode() + "\u0301\u0327".encode() * 5_000_000))
    code = """
    members, record, line, marks = sys.argv[1:]
    before = peak()
    counts = fastops.count_files(members, workers=2)
    assert counts.to_dict() == {"a": 50_000_000}
    assert peak() - before < 64, (before, peak())
    for file, words, options in (
        (record, "a line must have at most", {"field": "text"}),
        (line, "a line must have at most", {"tokenizer": str.split, "workers": 1}),
        (marks, "combining characters", {"normalize": "NFC", "tokenizer": "word"}),
        (members, "max_output_bytes", {"max_output_bytes": 99_999_999}),
    ):
        try:
            fastops.count_files(file, **options)
            raise SystemExit(f"no error: {file}")
        except ValueError as problem:
            assert words in str(problem) and file in str(problem), problem
    print(f"{peak() - before:.0f} MB above {before:.0f}")
    # Lines are held up to 64 MiB, in pieces and then whole.
    assert peak() - before < 160, (before, peak())
    """
    run(PEAK, code, arguments=list(map(str, (members, record, line, marks))), timeout=120)


@unsanitized
def test_a_sparse_file_is_a_token_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(5 * 10**9)
    code = """
    before = peak()
    for options in ({}, {"document": "file", "ngrams": (1, 2)}, {"normalize": "NFC"}, {"workers": 1}):
        try:
            fastops.count_files(sys.argv[1], **options)
            raise SystemExit("no error")
        except fastops.TokenTooLong as problem:
            assert sys.argv[1] in str(problem), problem
    print(f"{peak() - before:.0f} MB above {before:.0f}")
    assert peak() - before < 64, (before, peak())
    """
    run(PEAK, code, arguments=[str(path)])


def test_many_files_need_few_descriptors(tmp_path: Path) -> None:
    for i in range(1000):
        data = b"some words %d\n" % i
        (tmp_path / f"{i}.txt").write_bytes(gzip.compress(data) if i % 3 == 0 else data)
    code = """
    import resource
    fastops.count_words("a b")
    resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
    before = sorted(os.listdir("/proc/self/fd"))
    for options in ({"workers": 1}, {"workers": 4}, {"workers": 4, "on_error": "skip"}):
        counts = fastops.count_files(sys.argv[1] + "/*.txt", **options)
        assert counts["some"] == 1000 and counts.skipped == []
    assert sorted(os.listdir("/proc/self/fd")) == before
    keep = []
    try:
        while True:
            keep.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        os.close(keep.pop())
    # The glob itself needs none now: one is left, and two threads.
    files = [f"{sys.argv[1]}/{i}.txt" for i in range(1000)]
    assert fastops.count_files(files, workers=1)["some"] == 1000
    keep.append(os.open("/dev/null", os.O_RDONLY))
    for workers in (1, 4):
        try:
            fastops.count_files(files, workers=workers)
            raise SystemExit("no error")
        except OSError as problem:
            assert problem.errno == 24 and ".txt" in str(problem), problem
    for fd in keep:
        os.close(fd)
    assert fastops.count_files(files)["some"] == 1000
    """
    run(code, arguments=[str(tmp_path)])


def test_a_file_that_vanishes_or_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "file"
    code = """
    import threading
    path = sys.argv[1]
    line = b"some words in a line\\n"
    stop = threading.Event()
    def change():
        while not stop.is_set():
            for size in (3_000_000, 0, 100, 1_000_000):
                with open(path, "wb") as file:
                    file.write(line * (size // len(line)))
    with open(path, "wb") as file:
        file.write(line)
    thread = threading.Thread(target=change)
    thread.start()
    end = time.monotonic() + 2
    rounds = refused = 0
    while time.monotonic() < end:
        try:
            counts = fastops.count_files(path, workers=2)
        except ValueError as problem:
            assert "became shorter" in str(problem), problem
            refused += 1
            continue
        assert set(counts) <= {"some", "words", "in", "a", "line", *(line.decode()[i:j] for i in range(20) for j in range(i, 21))}
        rounds += 1
    stop.set()
    thread.join()
    print(rounds, "counts", refused, "refused")
    """
    run(code, arguments=[str(path)])


@pytest.mark.nightly
def test_a_hundred_thousand_files(tmp_path: Path) -> None:
    for i in range(100_000):
        (tmp_path / f"{i}").write_bytes(b"some words %d\n" % (i % 1000))
    counts = fastops.count_files(f"{tmp_path}/*")
    assert (counts["some"], counts["7"], len(counts), counts.documents) == (100_000, 100, 1002, 100_000)
