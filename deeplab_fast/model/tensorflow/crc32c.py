"""CRC-32C (Castagnoli, RFC 3720 appendix B.4) of many megabytes a second, in NumPy.

A CRC is linear over GF(2): that of A followed by B is that of A, moved on by len(B) zero bytes, xor that of B. So the
words of the data are joined two by two, then the halves of that, up to one.
"""

from __future__ import annotations

from functools import cache

import numpy as np

POLYNOMIAL = 0x82F63B78  # reflected
# Bytes, as a power of 2, and words that are joined before they leave the cache.
CHUNK_POWER = 17
CHUNK = 1 << CHUNK_POWER - 2


def crc32c(data: bytes | bytearray) -> int:
    """The checksum of the bytes, 0 for none of them; "123456789" has 0xE3069283."""
    size = len(data)
    if size == 0:
        return 0
    # Zeros in front do not change the register of a CRC that starts from 0.
    words = np.frombuffer(bytes(-size % 4) + bytes(data) if size % 4 else data, "<u4")
    head = len(words) % CHUNK
    register = _folded(words[:head])
    for at in range(head, len(words), CHUNK):
        register = _moved(register, CHUNK_POWER) ^ _folded(words[at : at + CHUNK])
    register = _moved(register, 2)  # a word enters the register at once and then passes through it
    start = np.array([0xFFFFFFFF], np.uint32)
    for power in range(size.bit_length()):
        if size >> power & 1:
            start = _moved(start, power)
    return int(register[0] ^ start[0]) ^ 0xFFFFFFFF


def _folded(words: np.ndarray) -> np.ndarray:
    """uint32 (n,), at most CHUNK of them -> (1,)."""
    power = 2
    while len(words) != 1:
        if len(words) % 2 or len(words) == 0:
            words = np.concatenate([np.zeros(1, np.uint32), words])
            continue
        words = _moved(words[::2], power) ^ words[1::2]
        power += 1
    return words


def unmasked(stored: int) -> int:
    """The checksum that LevelDB and TensorFlow keep rotated by 15 bits and moved by a constant."""
    rotated = (stored - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def _moved(register: np.ndarray, power: int) -> np.ndarray:
    """uint32 (n,) registers after 2 ** power zero bytes."""
    low, high = _tables(power)
    return low[register & 0xFFFF] ^ high[register >> 16]


@cache
def _tables(power: int) -> tuple[np.ndarray, np.ndarray]:
    """Where 2 ** power zero bytes take the lower and the upper half of a register."""
    halves = np.arange(1 << 16, dtype=np.uint32), np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    if power:
        return tuple(_moved(_moved(half, power - 1), power - 1) for half in halves)
    for _ in range(8):
        halves = tuple(half >> 1 ^ (half & 1) * np.uint32(POLYNOMIAL) for half in halves)
    return halves
