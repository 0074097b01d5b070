# SPDX-License-Identifier: BSD-3-Clause
"""The container of word counts: what is written to files, and sent between processes and machines."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

MAGIC = b"FOWC\r\n\x1a\n"
VERSION = 1
HAS_DOCS = 1
# Magic, version, flags, entries, bytes of keys, error bound, documents, 0; then the checksum of these and of the rest, and 0.
HEAD = struct.Struct("<8sIIQQQQQ")
CHECK = struct.Struct("<II")
HEADER_BYTES = HEAD.size + CHECK.size


def packed(table: Any) -> bytes:
    """The container of a table, its entries in the order of `top`: equal tables are equal bytes."""
    keys, offsets, counts, docs = table.top()
    numbers = [counts] if docs is None else [counts, docs]
    sizes = np.diff(offsets).astype("<u4")
    body = b"".join((*(column.astype("<u8").tobytes() for column in numbers), sizes.tobytes(), keys))
    flags = 0 if docs is None else HAS_DOCS
    head = HEAD.pack(MAGIC, VERSION, flags, len(counts), len(keys), table.error_bound, table.documents, 0)
    return head + CHECK.pack(zlib.crc32(body, zlib.crc32(head)), 0) + body
