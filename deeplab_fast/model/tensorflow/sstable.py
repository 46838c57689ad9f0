"""The tables of LevelDB (its doc/table_format.md), in which TensorFlow keeps the index of a checkpoint.

Blocks of key-value pairs, each followed by its compression and its checksum; the last block holds where the others are,
and a footer where that one is.
"""

from __future__ import annotations

from collections.abc import Iterator

from .crc32c import crc32c, unmasked

MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
FOOTER = 48


class Broken(ValueError):
    """What is wrong with a table or a message, without the name of its file."""


def read_table(data: bytes) -> dict[bytes, bytes]:
    """All pairs. Every block's checksum is verified; `Broken` for what is no whole table."""
    if len(data) < FOOTER or data[-8:] != MAGIC:
        raise Broken("does not end with the mark of a table")
    _, at = _handle(data[-FOOTER:], 0)
    index, _ = _handle(data[-FOOTER:], at)
    pairs: dict[bytes, bytes] = {}
    for _, handle in _pairs(_block(data, *index)):
        pairs.update(_pairs(_block(data, *_handle(handle, 0)[0])))
    return pairs


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number of 7-bit groups, lowest first, that begins at `at`, and where it ends."""
    value = shift = 0
    while at < len(data) and shift < 64:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at
    raise Broken("ends within a number")


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Offset and size of a block, and where the handle ends."""
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return (offset, size), at


def _block(data: bytes, offset: int, size: int) -> bytes:
    end = offset + size
    if end + 5 > len(data) - FOOTER:
        raise Broken(f"has a block of {size} bytes at {offset}, beyond its end")
    if crc32c(data[offset : end + 1]) != unmasked(int.from_bytes(data[end + 1 : end + 5], "little")):
        raise Broken(f"has another checksum in its block at {offset} than was written with it")
    kind = data[end]
    if kind > 1:
        raise Broken(f"has a block of compression {kind}, expected none (0) or Snappy (1)")
    return unsnap(data[offset:end]) if kind else data[offset:end]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each key is stored without what it shares with the one before it."""
    if len(block) < 4:
        raise Broken("has a block of less than 4 bytes")
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")  # the restarts are for searching
    if end < 0:
        raise Broken("has a block with more restarts than bytes")
    key, at = b"", 0
    while at < end:
        shared, at = varint(block, at)
        own, at = varint(block, at)
        length, at = varint(block, at)
        if shared > len(key) or at + own + length > end:
            raise Broken("has a pair beyond the end of its block")
        key = key[:shared] + block[at : at + own]
        at += own + length
        yield key, block[at - length : at]


def unsnap(data: bytes) -> bytes:
    """What Snappy (its format_description.txt) compressed."""
    size, at = varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag, at = data[at], at + 1
        kind, length = tag & 3, (tag >> 2) + 1
        # A literal's length from 61 on says how many bytes hold it; a copy's offset has 1, 2 or 4.
        extra = max(0, length - 60) if kind == 0 else (1, 2, 4)[kind - 1]
        number, at = int.from_bytes(data[at : at + extra], "little"), at + extra
        if kind == 0:
            length = number + 1 if extra else length
            out += data[at : at + length]
            at += length
        else:
            if kind == 1:
                length, number = (tag >> 2 & 7) + 4, tag >> 5 << 8 | number
            if not 0 < number <= len(out):
                raise Broken("has a Snappy copy from before its beginning")
            # The copy may run into what it writes.
            begin = len(out) - number
            chunk = out[begin : begin + length]
            out += (chunk * -(-length // len(chunk)))[:length]
        if at > len(data) or len(out) > size:
            raise Broken("has a Snappy block of another size than it says")
    if len(out) != size:
        raise Broken("has a Snappy block of another size than it says")
    return bytes(out)
