"""A writer of TensorFlow's checkpoints (version 2), from the formats' descriptions and on none of this project's code:
what test_tf_bundle.py and test_tf_importers.py read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

CODES = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int64": 9, "float16": 19}
NONE, SNAPPY = 0, 1


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value) if value else b""


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def snap_literals(data: bytes) -> bytes:
    """Valid Snappy that compresses nothing, in literals of every way to write their length."""
    out, at = varint(len(data)), 0
    for length in (60, 61, 256, 257, 65_536):
        part = data[at : at + length]
        if part:
            n = len(part) - 1
            extra = b"" if n < 60 else n.to_bytes(1 if n < 256 else 2, "little")
            out += bytes([(n if n < 60 else 59 + len(extra)) << 2]) + extra + part
        at += length
    assert at >= len(data)
    return out


def block(pairs: list[tuple[bytes, bytes]], interval: int = 3) -> bytes:
    out, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + b"".join(r.to_bytes(4, "little") for r in [*restarts, len(restarts)])


def table(pairs: Mapping[bytes, bytes], per_block: int = 4, compression: int = NONE) -> bytes:
    out, index, ordered = b"", [], sorted(pairs.items())

    def put(content: bytes) -> bytes:
        nonlocal out
        content = snap_literals(content) if compression == SNAPPY else content
        handle = varint(len(out)) + varint(len(content))
        content += bytes([compression])
        out += content + masked_crc32c(content).to_bytes(4, "little")
        return handle

    for i in range(0, len(ordered), per_block):
        part = ordered[i : i + per_block]
        index.append((part[-1][0], put(block(part))))
    footer = put(block([])) + put(block(index, interval=1))
    return out + footer.ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")


def entry(array: np.ndarray, shard: int, offset: int, checksum: int, extra: bytes = b"") -> bytes:
    shape = b"".join(message(2, number(1, size)) for size in array.shape)
    fixed = varint(6 << 3 | 5) + checksum.to_bytes(4, "little")
    fields = number(1, CODES[str(array.dtype)]) + message(2, shape) + number(3, shard)
    return fields + number(4, offset) + number(5, array.nbytes) + fixed + extra


def write_bundle(
    prefix: Path,
    variables: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    per_block: int = 4,
    compression: int = NONE,
    others: Mapping[str, bytes] | None = None,
    header: bytes | None = None,
) -> None:
    """PREFIX.index and PREFIX.data-...; others: entries of the index as they are. Slow: 3 MB/s."""
    # num_shards, endianness, version.producer
    pairs = {b"": number(1, shards) + message(3, number(1, 1)) if header is None else header}
    files = [b""] * shards if shards > 1 else [bytearray()]
    for i, name in enumerate(sorted(variables)):
        array, shard = np.ascontiguousarray(variables[name]).reshape(variables[name].shape), i % shards
        data = array.tobytes()
        pairs[name.encode()] = entry(array, shard, len(files[shard]), masked_crc32c(data))
        files[shard] += data
    pairs |= {name.encode(): value for name, value in (others or {}).items()}
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.index").write_bytes(table(pairs, per_block, compression))
    for i, data in enumerate(files):
        Path(f"{prefix}.data-{i:05d}-of-{shards:05d}").write_bytes(data)
