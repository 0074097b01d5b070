# SPDX-License-Identifier: BSD-3-Clause
"""Where text comes from: files by name, glob or object, decompressed by their first bytes in pieces of bounded size.

Every decoder must reach the end mark of its format: a file that is cut, damaged or followed by something else is an error.
What few counts need is imported where it is used: a first count waits for every module.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import select
import stat
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, cast

from ._rule import UTF8_BOM, DecodeError
from ._validate import Text, wrong_type

PIECE = 2**20
# A record of a jsonl file, or a line that a Python tokenizer gets, is held whole.
MAX_RECORD = 2**26
# The largest window or dictionary that a decoder may ask memory for.
MAX_WINDOW = 2**27

_READ = 2**18
_MAGIC = {
    "gzip": (b"\x1f\x8b",),
    # The size of its blocks, and the begin of the first one or of the end.
    "bzip2": tuple(b"BZh%d" % size + rest for size in range(1, 10) for rest in (b"1A", b"\x17r")),
    "xz": (b"\xfd7zXZ\x00",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))),
}
_MAGIC_BYTES = 6
# By its number, a thread that is inside of the read() of somebody's object, and since when: none can be called back from there.
abroad: dict[int, float] = {}
_ENDINGS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_GLOB = frozenset("*?[")
# Surrogates that stand for no byte.
_NO_BYTES = re.compile("([\ud800-\udc7f\udd00-\udfff]+)")


class DamagedFile(ValueError):
    """Data that is cut, altered or followed by something else; names the file."""

    def __init__(self, name: str, kind: str, problem: str) -> None:
        super().__init__(f"{name}: {kind} data {problem}")
        self._arguments = (name, kind, problem)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


def printable(name: str | bytes) -> str:
    """A file's name for messages: control characters and bytes that are no UTF-8 escaped."""
    text = os.fsdecode(name)
    if text.isprintable():
        return text
    return "".join(_escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    if letter.isprintable():
        return letter
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")


class Source:
    """A file that is to be counted: a path, standard input, or a binary file object."""

    __slots__ = ("name", "object", "path", "size", "sized")

    def __init__(
        self, name: str, path: str | bytes | None = None, object: Any = None, size: int = 0, *, sized: bool = True
    ) -> None:
        self.name = name
        self.path = path
        self.object = object
        self.size = size
        # Whether the size is known: that of a pipe or an object is not.
        self.sized = sized and object is None

    def __reduce__(self) -> tuple[Any, ...]:
        if self.object is not None:
            raise TypeError(f"{self.name} must not be pickled: it is open in this process")
        return type(self), (self.name, self.path, None, self.size)

    @property
    def by_path(self) -> bool:
        """Whether another process or machine can open it too."""
        return self.path is not None

    def open(self, stopped: Callable[[], bool] | None = None) -> Stream:
        """Opens the file; use as a context manager. While it waits for bytes it asks `stopped` every 50 ms."""
        if self.path is not None:
            return Stream(self, _opened(self.path, may_wait=not self.size), owned=True, stopped=stopped)
        if self.object is sys.stdin:
            try:
                # Past the buffer, whose lock would stop the interpreter's end while a thread waits in it.
                return Stream(self, sys.stdin.fileno(), owned=False, stopped=stopped)
            except (OSError, AttributeError, ValueError):
                return Stream(self, None, reader=sys.stdin.buffer, stopped=stopped)
        return Stream(self, None, reader=self.object, stopped=stopped)


def _opened(path: str | bytes, *, may_wait: bool) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY
    if may_wait and sys.platform == "linux" and stat.S_ISFIFO(os.stat(path).st_mode):
        # To open a pipe is to wait for a writer, deaf to the clock; poll() waits for one too.
        fd = os.open(path, flags | os.O_NONBLOCK)
        os.set_blocking(fd, True)
        return fd
    return os.open(path, flags)


def sources(files: object, *, skip: bool = False) -> list[Source]:
    """The files, each checked to be there and readable before any work; a glob's matches sorted by name.

    With `skip` a file that is not there is a source all the same, which fails when it is opened.
    """
    found: list[Source] = []
    if isinstance(files, (str, bytes, os.PathLike)) or hasattr(files, "read"):
        _add(found, files, "files", skip)
        return found
    if not isinstance(files, Iterable):
        raise wrong_type("files", "a path, a glob, '-', a binary file object, or a list of these", files)
    for i, item in enumerate(files):
        _add(found, item, f"files[{i}]", skip)
    return found


def _add(found: list[Source], item: object, argument: str, skip: bool) -> None:
    if hasattr(item, "read") and not isinstance(item, os.PathLike):
        found.append(_of_object(item, argument))
        return
    if not isinstance(item, (str, bytes, os.PathLike)):
        raise wrong_type(argument, "a path, a glob, '-' or a binary file object", item)
    path = os.fspath(item)
    if path in ("-", b"-"):
        if sys.stdin is None:
            raise OSError(errno.EBADF, "standard input is closed", "-")
        found.append(Source("<stdin>", object=sys.stdin))
        return
    try:
        found.append(_of_path(path))
    except OSError as problem:
        pattern = not isinstance(item, os.PathLike) and _GLOB & set(os.fsdecode(path))
        if not (pattern and isinstance(problem, FileNotFoundError)):
            if not skip:
                raise
            found.append(Source(printable(path), path=path))
            return
        matches = sorted(match for match in _matches(path) if not os.path.isdir(match))
        if not matches and not skip:
            raise FileNotFoundError(errno.ENOENT, "No file matches", path) from None
        if not matches:
            found.append(Source(printable(path), path=path))
        for match in matches:
            try:
                found.append(_of_path(match))
            except OSError:
                if not skip:
                    raise
                found.append(Source(printable(match), path=match))


def _matches(path: str | bytes) -> list[str] | list[bytes]:
    import glob

    return glob.glob(cast("str", path), recursive=True)


def _of_path(path: str | bytes) -> Source:
    info = os.stat(path)
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    regular = stat.S_ISREG(info.st_mode)
    return Source(printable(path), path=path, size=info.st_size if regular else 0, sized=regular)


def _of_object(item: Any, argument: str) -> Source:
    if isinstance(item, io.TextIOBase) and item is not sys.stdin:
        raise wrong_type(argument, "a binary file object (open it with mode 'rb')", Text("a text file object"))
    if getattr(item, "closed", False):
        raise ValueError(f"{argument} must be open, got a closed file object")
    name = getattr(item, "name", None)
    named = printable(name) if isinstance(name, (str, bytes)) else "<file object>"
    return Source("<stdin>" if item is sys.stdin else named, object=item)


def check_size(name: str, fd: int, size: int) -> None:
    """Refuses an open file of less than `size` bytes, which it had before."""
    left = os.fstat(fd).st_size
    if left < size:
        raise DamagedFile(name, "file", f"became shorter while they were read: {left} of {size} bytes are left")


class Stopped(Exception):
    """The run was ended by another thread."""


def _never() -> bool:
    return False


class Stream:
    """An open file; `blocks` gives its text in pieces of 1 MiB at most, whatever the compression.

    Attributes
    ----------
    consumed : int
        Bytes read from the file so far, before decompression.
    plain : bool
        A regular file without compression: `fd` and `size` may be given to a counter.
    """

    def __init__(
        self,
        source: Source,
        fd: int | None,
        *,
        owned: bool = False,
        reader: Any = None,
        stopped: Callable[[], bool] | None = None,
    ) -> None:
        self.name = source.name
        self.consumed = 0
        self.size = source.size
        self.stopped = stopped or _never
        self._fd = fd
        self._owned = owned
        self._reader = reader
        self._poll: select.poll | None = None
        self._label = source.path if source.path is not None else source.name
        self._head = b""
        self._regular = False
        try:
            regular = False
            if fd is not None:
                info = os.fstat(fd)
                regular = stat.S_ISREG(info.st_mode)
                if regular:
                    self.size = info.st_size
            waits = _waits(reader) if fd is None else None if regular else fd
            if waits is not None:
                self._poll = select.poll()
                self._poll.register(waits, select.POLLIN)
            # A file that starts at its first byte; the size of those in /proc is said to be 0.
            regular = self._regular = regular and owned and self.size > 0
            while len(self._head) < _MAGIC_BYTES:
                piece = self._get(_MAGIC_BYTES if regular and self.size > _READ and not _said(self.name) else _READ)
                if not piece:
                    break
                self._head += piece
            self.kind = _kind(self.name, self._head)
            self.plain = regular and self.kind is None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes what this object opened."""
        if self._fd is not None and self._owned:
            os.close(self._fd)
        self._fd = None

    def check_whole(self) -> None:
        """Refuses a regular file that became shorter than it was when it was opened: a part of it was not counted."""
        if self._regular and self._fd is not None:
            check_size(self.name, self._fd, self.size)

    @property
    def fd(self) -> int:
        """The open file's descriptor."""
        if self._fd is None:
            raise ValueError(f"{self.name} has no descriptor")
        return self._fd

    def _get(self, most: int) -> bytes:
        """The next bytes of the file, b"" at its end."""
        if self.stopped():
            raise Stopped
        while self._poll is not None and not self._poll.poll(50):
            if self.stopped():
                raise Stopped
        try:
            if self._fd is not None:
                piece = os.read(self._fd, most)
            elif self._poll is not None and type(self._reader) is io.BufferedReader:
                # What has come, where read() would wait for all of it.
                piece = self._reader.read1(most)
            else:
                piece = self._foreign(most)
        except OSError as problem:
            raise OSError(problem.errno, problem.strerror or str(problem), self._label) from None
        if piece is None:
            raise BlockingIOError(errno.EAGAIN, "the file object does not block", self.name)
        if not isinstance(piece, (bytes, bytearray, memoryview)):
            raise wrong_type(self.name, "a binary file object", Text("one that reads str"))
        self.consumed += len(piece)
        return bytes(piece)

    def _foreign(self, most: int) -> Any:
        abroad[threading.get_ident()] = time.monotonic()
        try:
            return self._reader.read(most)
        finally:
            abroad.pop(threading.get_ident(), None)

    def _raw(self) -> Iterator[bytes]:
        head, self._head = self._head, b""
        if head:
            yield head
        while piece := self._get(_READ):
            yield piece

    def blocks(self, max_output_bytes: int | None = None) -> Iterator[bytes]:
        """The text in pieces; `max_output_bytes` is about what decompression gives."""
        if self.kind is None:
            yield from self._raw()
            return
        given = 0
        for piece in _DECODERS[self.kind](self.name, self._raw()):
            given += len(piece)
            if max_output_bytes is not None and given > max_output_bytes:
                raise ValueError(
                    f"{self.name} must decompress to at most {max_output_bytes} bytes (max_output_bytes), got more"
                )
            if piece:
                yield piece


def _waits(reader: Any) -> int | None:
    """The descriptor of the pipe or terminal behind a file object of Python's own, which says when the next bytes are there.

    Of another object's read() it is not known what it waits for: it may hold bytes, or end before its descriptor does.
    """
    try:
        raw = reader.raw if type(reader) is io.BufferedReader else reader
        if type(raw) is not io.FileIO:
            return None
        fd = raw.fileno()
        return fd if os.get_blocking(fd) and not stat.S_ISREG(os.fstat(fd).st_mode) else None
    except (OSError, ValueError):
        return None


def _said(name: str) -> str | None:
    """The compression by the name's ending."""
    return _ENDINGS.get(os.path.splitext(name)[1].lower())


def _kind(name: str, head: bytes) -> str | None:
    """The compression by the first bytes; None for plain text."""
    for kind, magics in _MAGIC.items():
        if head.startswith(magics):
            return kind
    said = _said(name)
    if said is not None:
        # Plain text under such a name is text, but a header that was cut or altered must not pass for it.
        if any(magic.startswith(head) for magic in _MAGIC[said]):
            raise DamagedFile(name, said, "end before the end mark")
        if b"\0" in head or not _maybe_text(head):
            raise DamagedFile(name, said, "have a damaged header")
    return None


def _maybe_text(head: bytes) -> bool:
    """Whether these first bytes of a file are UTF-8, but for a last character that is cut."""
    try:
        head.decode()
    except UnicodeDecodeError as problem:
        return problem.reason == "unexpected end of data" and problem.start > len(head) - 4 and len(head) >= _READ
    return True


def _gzip(name: str, raw: Iterator[bytes]) -> Iterator[bytes]:
    """Members one after another, zeros between and after them."""
    rest = b""
    first = True
    while True:
        rest = rest.lstrip(b"\0") if not first else rest
        while len(rest) < 2:
            piece = next(raw, b"")
            if not piece:
                break
            rest += piece
            rest = rest.lstrip(b"\0") if not first else rest
        if not rest:
            return
        if not rest.startswith(_MAGIC["gzip"]):
            raise DamagedFile(name, "gzip", "are followed by something else")
        first = False
        decoder = zlib.decompressobj(wbits=31)
        try:
            while True:
                # Data may wait inside the decoder even when all input was taken.
                piece = decoder.decompress(rest, PIECE)
                rest = decoder.unconsumed_tail
                if piece:
                    yield piece
                if decoder.eof:
                    break
                if not (piece or rest):
                    rest = next(raw, b"")
                    if not rest:
                        raise DamagedFile(name, "gzip", "end before the end mark")
        except zlib.error as problem:
            raise DamagedFile(name, "gzip", f"are damaged ({problem})") from None
        rest = decoder.unused_data


def _bzip2(name: str, raw: Iterator[bytes]) -> Iterator[bytes]:
    import bz2

    return _streams(name, "bzip2", raw, bz2.BZ2Decompressor, OSError)


def _xz(name: str, raw: Iterator[bytes]) -> Iterator[bytes]:
    import lzma

    def decoder() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MAX_WINDOW + 2**22)

    return _streams(name, "xz", raw, decoder, lzma.LZMAError)


def _streams(
    name: str, kind: str, raw: Iterator[bytes], make: Callable[[], Any], wrong: type[Exception]
) -> Iterator[bytes]:
    """Streams of bz2 or lzma one after another; xz pads them with zeros by fours."""
    rest = next(raw, b"")
    longest = max(map(len, _MAGIC[kind]))
    while True:
        decoder = make()
        while not decoder.eof:
            if decoder.needs_input and not rest:
                rest = next(raw, b"")
                if not rest:
                    raise DamagedFile(name, kind, "end before the end mark")
            try:
                piece = decoder.decompress(rest, PIECE)
            except (wrong, EOFError, ValueError) as problem:
                raise DamagedFile(name, kind, f"are damaged ({problem})") from None
            rest = b""
            if piece:
                yield piece
        rest = decoder.unused_data
        padding = 0
        while True:
            if kind == "xz":
                stripped = rest.lstrip(b"\0")
                padding += len(rest) - len(stripped)
                rest = stripped
            if len(rest) >= longest:
                break
            piece = next(raw, b"")
            if not piece:
                break
            rest += piece
        if padding % 4 or (rest and not rest.startswith(_MAGIC[kind])):
            raise DamagedFile(name, kind, "are followed by something else")
        if not rest:
            return


def _zstd_decoder() -> tuple[Any, type[Exception]]:
    """A decoder of one frame with `decompress(data)` and `eof`, and the error it raises."""
    if sys.version_info >= (3, 14):
        try:
            from compression import zstd
        except ImportError:
            pass
        else:
            options = {zstd.DecompressionParameter.window_log_max: MAX_WINDOW.bit_length() - 1}
            return zstd.ZstdDecompressor(options=options), zstd.ZstdError
    try:
        import zstandard
    except ImportError:
        raise ImportError("zstd files need zstandard: pip install 'fastops[zst]'") from None
    return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj(), zstandard.ZstdError


def _zstd(name: str, raw: Iterator[bytes]) -> Iterator[bytes]:
    """Frames one after another, cut here into blocks (RFC 8878, section 3.1).

    A block gives at most 128 KiB, so that a few at a time bound the memory; and a frame is over when its last block and its
    checksum have come, which zstandard itself does not check.
    """
    parts = _Bytes(name, raw)
    while True:
        magic = parts.take(4, last=True)
        if not magic:
            return
        if magic[1:] == b"\x2a\x4d\x18" and 0x50 <= magic[0] <= 0x5F:
            parts.skip(int.from_bytes(parts.take(4), "little"))
            continue
        if magic != _MAGIC["zstd"][0]:
            raise DamagedFile(name, "zstd", "are followed by something else")
        decoder, wrong = _zstd_decoder()
        descriptor = parts.take(1)
        flags = descriptor[0]
        single = flags >> 5 & 1
        size = (0, 2, 4, 8)[flags >> 6] or single
        head = parts.take((not single) + (0, 1, 2, 4)[flags & 3] + size)
        pending = [magic, descriptor, head]
        blocks = 0
        last = False
        while not last:
            header = parts.take(3)
            number = int.from_bytes(header, "little")
            last = bool(number & 1)
            kind, length = number >> 1 & 3, number >> 3
            if kind == 3 or length > 2**17:
                raise DamagedFile(name, "zstd", "are damaged (block header)")
            pending += (header, parts.take(1 if kind == 1 else length))
            blocks += 1
            if last and flags & 4:
                pending.append(parts.take(4))
            if last or blocks == PIECE // 2**17:
                try:
                    piece = decoder.decompress(b"".join(pending))
                except wrong as problem:
                    raise DamagedFile(name, "zstd", f"are damaged ({problem})") from None
                pending, blocks = [], 0
                yield piece
        if not decoder.eof:
            raise DamagedFile(name, "zstd", "end before the end mark")


class _Bytes:
    """Exact numbers of bytes out of pieces."""

    def __init__(self, name: str, raw: Iterator[bytes]) -> None:
        self._name = name
        self._raw = raw
        self._piece = b""
        self._at = 0

    def take(self, count: int, *, last: bool = False) -> bytes:
        """`count` bytes; with `last` the data may end here and nothing comes."""
        end = self._at + count
        if end <= len(self._piece):
            taken = self._piece[self._at : end]
            self._at = end
            return taken
        parts = [self._piece[self._at :]]
        have = len(parts[0])
        while have < count:
            piece = next(self._raw, b"")
            if not piece:
                if last and not have:
                    self._piece, self._at = b"", 0
                    return b""
                if last:
                    raise DamagedFile(self._name, "zstd", "are followed by something else")
                raise DamagedFile(self._name, "zstd", "end before the end mark")
            parts.append(piece)
            have += len(piece)
        whole = b"".join(parts)
        self._piece, self._at = whole, count
        return whole[:count]

    def skip(self, count: int) -> None:
        """Passes over `count` bytes."""
        while count:
            count -= len(self.take(min(count, _READ)))


_DECODERS: dict[str, Callable[[str, Iterator[bytes]], Iterator[bytes]]] = {
    "gzip": _gzip,
    "bzip2": _bzip2,
    "xz": _xz,
    "zstd": _zstd,
}


def lines(name: str, blocks: Iterable[bytes], most: int = MAX_RECORD) -> Iterator[bytes]:
    """Runs of whole lines, about a block each; the last one may lack its newline. A longer line than `most` is an error."""
    held: list[bytes] = []
    size = 0
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if not end:
            held.append(block)
            size += len(block)
            if size > most:
                raise ValueError(f"{name}: a line must have at most {most} bytes here, got more")
            continue
        yield b"".join((*held, block[:end]))
        held = [block[end:]] if end < len(block) else []
        size = len(block) - end
    if size:
        yield b"".join(held)


def encoded(text: str) -> bytes:
    """A str as bytes; what stands for a byte becomes that byte again, other surrogates the three bytes that no UTF-8 has."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        # Each by itself: what is cut into pieces is the same bytes as the whole.
        parts = enumerate(_NO_BYTES.split(text))
        return b"".join(part.encode("utf-8", "surrogatepass" if i % 2 else "surrogateescape") for i, part in parts)


def jsonl(name: str, blocks: Iterable[bytes], field: str, errors: str) -> Iterator[tuple[str, list[bytes]]]:
    """The documents in `field` of every line, in batches with the name of their lines; null is an empty one."""
    number = 0
    offset = 0
    for run in lines(name, blocks):
        first = number + 1
        batch = []
        for line in run.split(b"\n"):
            number += 1
            record = line.removeprefix(UTF8_BOM) if number == 1 else line
            if record and not record.isspace():
                batch.append(encoded(_field(name, number, offset, record, field, errors)))
            offset += len(line) + 1
        if run.endswith(b"\n"):
            # What split puts after the last newline is no line.
            number -= 1
            offset -= 1
        yield f"{name}, lines {first} to {number}", batch


def _field(name: str, number: int, offset: int, line: bytes, field: str, errors: str) -> str:
    try:
        text = line.decode("utf-8", errors)
    except UnicodeDecodeError as problem:
        got = f"0x{line[problem.start]:02x} at byte {offset + problem.start} of the file ({problem.reason})"
        raise DecodeError(f"{name}, line {number} must be UTF-8, got {got}") from None
    import json

    try:
        record = json.loads(text)
    except ValueError as problem:
        raise ValueError(f"{name}, line {number}: invalid JSON ({problem})") from None
    except RecursionError:
        raise ValueError(f"{name}, line {number}: JSON nested too deeply") from None
    if not isinstance(record, dict):
        got = type(record).__name__
        raise ValueError(f"{name}, line {number}: a record must be a JSON object, got {got}")  # noqa: TRY004 (content)
    if field not in record:
        raise ValueError(f"{name}, line {number}: no field {field!r}")
    value = record[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        got = type(value).__name__
        raise ValueError(f"{name}, line {number}: field {field!r} must be a string, got {got}")  # noqa: TRY004 (content)
    return value


def arrow_documents(array: Any, most: int = PIECE) -> Iterator[list[bytes]]:
    """The strings of an Arrow array in batches of about `most` bytes, out of its buffers; nulls are empty."""
    import numpy as np
    import pyarrow as pa

    for chunk in array.chunks if isinstance(array, pa.ChunkedArray) else [array]:
        if pa.types.is_dictionary(chunk.type):
            # Arrow decodes none of views, such as the categories of polars.
            chunk = _in_a_row(chunk.dictionary, wide=True).take(chunk.indices)
        chunk = _in_a_row(chunk)
        if not len(chunk):
            continue
        wide = chunk.type in (pa.large_string(), pa.large_binary())
        _, ends, data = chunk.buffers()
        offsets = np.frombuffer(ends, np.int64 if wide else np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        view = memoryview(data) if data is not None else memoryview(b"")
        valid = None if not chunk.null_count else chunk.is_valid().to_numpy(zero_copy_only=False)
        start = 0
        while start < len(chunk):
            # In the dtype of the offsets, which another one would copy, and in which the sum may overflow.
            end = offsets.dtype.type(min(int(offsets[start]) + most, int(offsets[-1])))
            stop = max(int(np.searchsorted(offsets, end, "right")) - 1, start + 1)
            stop = min(stop, start + 2**16, len(chunk))
            cuts = offsets[start : stop + 1].tolist()
            batch = [bytes(view[a:b]) for a, b in itertools.pairwise(cuts)]
            if valid is not None:
                batch = [text if there else b"" for text, there in zip(batch, valid[start:stop].tolist(), strict=True)]
            yield batch
            start = stop


def _in_a_row(array: Any, *, wide: bool = False) -> Any:
    """An array of strings whose bytes lie behind one another; `wide`: with offsets of 64 bits."""
    import pyarrow as pa

    if array.type in (pa.large_string(), pa.large_binary()) or (array.type in (pa.string(), pa.binary()) and not wide):
        return array
    if array.type in (pa.string(), pa.string_view()) or pa.types.is_null(array.type):
        return array.cast(pa.large_string())
    if array.type in (pa.binary(), pa.binary_view()):
        return array.cast(pa.large_binary())
    raise wrong_type("texts", "an Arrow array of strings", Text(f"one of {array.type}"))


def arrow_bytes(array: Any) -> int | None:
    """The bytes of an array's strings; None where Arrow does not say."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        return int(pc.sum(pc.binary_length(array)).as_py() or 0)
    except pa.ArrowException:
        return None


def parquet(source: Source, column: str) -> Iterator[tuple[str, list[bytes], int]]:
    """The documents in `column` of every row, in batches with a name and the compressed bytes of what was read so far."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError("parquet files need pyarrow: pip install pyarrow") from None
    place = os.fsdecode(source.path) if source.path is not None else source.object
    try:
        # Not mapped into memory: a file cut meanwhile would end the process.
        file = pq.ParquetFile(place, memory_map=False, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, ValueError, OSError) as problem:
        # Arrow's own OSErrors have no number.
        if isinstance(problem, OSError) and problem.errno is not None:
            raise
        raise DamagedFile(source.name, "parquet", f"are damaged ({_first_line(problem)})") from None
    with file:
        schema = file.schema_arrow
        if column not in schema.names:
            names = ", ".join(map(repr, schema.names[:8]))
            raise ValueError(f"{source.name}: no column {column!r}, only {names}")
        kind = schema.field(column).type
        texts = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
        # A column without any value is of no type.
        known = kind in texts or pa.types.is_null(kind)
        if not known and not (pa.types.is_dictionary(kind) and kind.value_type in texts):
            raise ValueError(f"{source.name}: column {column!r} must be of strings, got {kind}")
        groups = file.metadata.num_row_groups
        for group in range(groups):
            try:
                for rows in file.iter_batches(2**14, row_groups=[group], columns=[column]):
                    for batch in arrow_documents(rows.column(0)):
                        yield f"{source.name}, row group {group}", batch, source.size * group // groups
            except (pa.ArrowException, ValueError, OSError) as problem:
                raise DamagedFile(source.name, "parquet", f"are damaged ({_first_line(problem)})") from None


def _first_line(problem: Exception) -> str:
    return str(problem).partition("\n")[0][:120]
