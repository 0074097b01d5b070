# SPDX-License-Identifier: BSD-3-Clause
"""The compiled loops of the Numba backend's word counting: a hash table in arrays, open addressing, keys one after another."""

from __future__ import annotations

from ._kernel import given, kernel, njit, types

# A table is (hashes, counts, begins, lengths), all of a power of two slots, where a count of 0 marks a free one.
_SLOTS = (types.uint64[::1], types.int64[::1], types.int64[::1], types.int64[::1])


@njit
def _is_space(byte):  # type: ignore[no-untyped-def]
    """The ASCII characters that `str.split` cuts at."""
    return byte == 32 or 9 <= byte <= 13 or 28 <= byte <= 31


@kernel(
    types.int64(
        given(types.uint8), types.int64, types.boolean, types.int64, *_SLOTS, types.uint8[::1], types.int64[::1]
    )
)
def count_ascii(data, at, lower, longest, hashes, counts, begins, lengths, keys, used):  # type: ignore[no-untyped-def]
    """Counts the words of ASCII text from byte `at` on; returns the text's size when all are counted.

    Before a word that needs a larger table or more room for keys it returns where that begins, and before one that is too long
    the same less the size and 1. `used` is (entries, bytes of keys).
    """
    size = data.size
    mask = counts.size - 1
    entries, filled = used[0], used[1]
    room = keys.size - filled
    while True:
        while at < size and _is_space(data[at]):
            at += 1
        if at == size:
            break
        begin = at
        h = types.uint64(0xCBF29CE484222325)
        while at < size and not _is_space(data[at]):
            c = data[at]
            if lower and 65 <= c <= 90:
                c += types.uint8(32)
            # Where no key of this size fits, the table grows before the word is counted.
            if at - begin < room:
                keys[filled + at - begin] = c
            h = (h ^ types.uint64(c)) * types.uint64(0x100000001B3)
            at += 1
        length = at - begin
        if length > longest:
            at = begin - size - 1
            break
        if length > room or 2 * entries >= counts.size:
            at = begin
            break
        h ^= h >> types.uint64(32)
        slot = types.int64(h) & mask
        while counts[slot] != 0:
            if hashes[slot] == h and lengths[slot] == length:
                old = begins[slot]
                i = 0
                while i < length and keys[old + i] == keys[filled + i]:
                    i += 1
                if i == length:
                    break
            slot = (slot + 1) & mask
        if counts[slot] == 0:
            hashes[slot] = h
            begins[slot] = filled
            lengths[slot] = length
            entries += 1
            filled += length
            room -= length
        counts[slot] += 1
    used[0], used[1] = entries, filled
    return at


@kernel(types.void(*_SLOTS, *_SLOTS))
def rehash(hashes, counts, begins, lengths, new_hashes, new_counts, new_begins, new_lengths):  # type: ignore[no-untyped-def]
    """Puts the entries of a table into an empty, larger one."""
    mask = new_counts.size - 1
    for i in range(counts.size):
        if counts[i] != 0:
            slot = types.int64(hashes[i]) & mask
            while new_counts[slot] != 0:
                slot = (slot + 1) & mask
            new_hashes[slot] = hashes[i]
            new_counts[slot] = counts[i]
            new_begins[slot] = begins[i]
            new_lengths[slot] = lengths[i]
