"""TensorFlow's checkpoints, version 2 ("tensor bundle", tensorflow/core/protobuf/tensor_bundle.proto), without it.

PREFIX.index is a table of name -> entry; the values are in PREFIX.data-00000-of-00001 and its like.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ...errors import UserError
from .crc32c import crc32c, unmasked
from .sstable import MAGIC, Broken, read_table, varint

# tensorflow/core/framework/types.proto; strings and what else is not here are no weights.
DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    5: torch.int16,
    6: torch.int8,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    19: torch.float16,
}
MOST_DIMENSIONS = 254  # of TensorFlow's TensorShape
INDEX = ".index"
SHARD = re.compile(r"(.+)\.data-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Entry:
    """Where a variable is."""

    dtype: torch.dtype | None
    """None: no number"""
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    sliced: bool
    """a partitioned variable, whose parts are elsewhere"""


@dataclass(frozen=True)
class Bundle:
    """One checkpoint: what is in it, and how its files are opened."""

    prefix: str
    """path or name in the archive without .index"""
    entries: dict[str, Entry]
    shards: tuple[str, ...]
    open: Callable[[str], BinaryIO]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The variables of these names, in their own dtype and shape, each verified by its checksum.

        UserError for a variable that is partitioned, and for a shard that is missing, too short or damaged.
        """
        variables, files, taken = {}, {}, dict.fromkeys(self.shards, 0)
        with contextlib.ExitStack() as opened:
            for name in names:
                entry = self.entries[name]
                if entry.sliced:
                    raise UserError(
                        f"{self.prefix}.index: {name} is a partitioned variable, which is not read: expected "
                        "a checkpoint saved without a partitioner"
                    )
                shard = self.shards[entry.shard]
                if shard not in files:
                    files[shard] = opened.enter_context(self.open(shard))
                taken[shard] += entry.size
                variables[name] = _tensor(files[shard], shard, name, entry, taken[shard])
        return variables


def find_bundle(path: str | Path) -> Bundle | None:
    """The checkpoint that a path means; None: it is no path of TensorFlow's.

    path: PREFIX, PREFIX.index, a shard, the folder or the .tar.gz that holds them. An archive is read into memory,
    nothing of it is written. UserError for a damaged index, a missing file, and a frozen graph.
    """
    path = Path(path)
    if path.suffix == ".pb":
        raise UserError(
            f"{path}: a frozen graph, whose weights are constants between its operations: expected the checkpoint that "
            "is beside it in the archive (model.ckpt.index and model.ckpt.data-00000-of-00001)"
        )
    if path.suffix in (".gz", ".tgz", ".tar") and path.is_file():
        return _from_archive(path)
    if path.is_dir():
        return _only([str(file) for file in path.iterdir()], path, lambda name: open(name, "rb"))
    match = SHARD.fullmatch(str(path))
    prefix = match[1] if match else str(path).removesuffix(INDEX)
    if prefix == str(path) and not Path(prefix + INDEX).is_file():
        if path.is_file() and _tail(path) == MAGIC:
            raise UserError(
                f"{path}: a table on its own, such as TensorFlow's checkpoints before version 2: expected "
                "one in version 2, an .index with its .data- files beside it"
            )
        return None
    return _bundle(prefix, lambda name: open(name, "rb"))


def _tail(path: Path) -> bytes:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - len(MAGIC)))
        return file.read()
    return b""  # for torch.load to say


def _from_archive(path: Path) -> Bundle | None:
    """None: no tar, or one of something else."""
    try:
        with tarfile.open(path) as archive:
            names, contents = [], {}
            for member in archive:
                names.append(member.name)
                # A sparse file may be of any size in an archive of none.
                if (
                    member.isfile()
                    and not member.issparse()
                    and (member.name.endswith(INDEX) or SHARD.fullmatch(member.name))
                ):
                    contents[member.name] = archive.extractfile(member).read()
    except tarfile.ReadError as error:
        if path.suffix == ".tar" or "not a gzip file" in str(error):
            return None  # such as the .pth.tar that torch.save wrote
        raise UserError(f"{path}: not a readable archive ({error})") from error
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: not a readable archive ({error})") from error
    if not contents and not any(name.endswith(".pb") for name in names):
        return None
    return _only(names, path, lambda name: io.BytesIO(contents[name]), str(path) + "/")


def _only(names: list[str], where: Path, open_: Callable[[str], BinaryIO], shown: str = "") -> Bundle:
    """The one bundle among files."""
    prefixes = sorted(name.removesuffix(INDEX) for name in names if name.endswith(INDEX))
    if not prefixes:
        graph = any(name.endswith(".pb") for name in names)
        found = "only a frozen graph" if graph else "no TensorFlow checkpoint"
        raise UserError(f"{where}: holds {found}, expected an .index and its .data- files")
    if len(prefixes) > 1:
        raise UserError(f"{where}: holds the checkpoints {', '.join(prefixes)}, expected the path of one .index")
    return _bundle(prefixes[0], open_, shown)


def _bundle(prefix: str, open_: Callable[[str], BinaryIO], shown: str = "") -> Bundle:
    def opened(name: str) -> BinaryIO:
        try:
            return open_(name.removeprefix(shown))
        except (FileNotFoundError, KeyError) as error:
            raise UserError(f"{name}: no such file, which the checkpoint {shown}{prefix} needs") from error

    index = f"{shown}{prefix}{INDEX}"
    with opened(index) as file:
        data = file.read()
    try:
        table = read_table(data)
        count = _header(table.pop(b"", None))
        entries = {name.decode(errors="replace"): _entry(message) for name, message in table.items()}
        for name, entry in entries.items():
            if not entry.sliced and entry.shard >= count:
                raise Broken(f"has {name} in shard {entry.shard} of {count}")
    except Broken as error:
        raise UserError(f"{index}: {error}: expected the whole index of a TensorFlow checkpoint") from error
    shards = tuple(f"{shown}{prefix}.data-{i:05d}-of-{count:05d}" for i in range(count))
    return Bundle(shown + prefix, entries, shards, opened)


def _tensor(file: BinaryIO, path: str, name: str, entry: Entry, taken: int) -> Tensor:
    """taken: bytes of the shard's variables up to this one; more than it has would be memory without end."""
    wanted = math.prod(entry.shape) * entry.dtype.itemsize
    if entry.size != wanted:
        raise UserError(f"{path}: {name} of {entry.shape} has {entry.size} bytes, expected {wanted}")
    length = file.seek(0, io.SEEK_END)
    if entry.offset + entry.size > length:
        raise UserError(
            f"{path}: has {length} bytes, {name} ends at {entry.offset + entry.size}: expected the whole shard"
        )
    if taken > length:
        raise UserError(f"{path}: has {length} bytes, its variables up to {name} {taken}: expected none that overlap")
    file.seek(entry.offset)
    data = bytearray(entry.size)
    file.readinto(data)
    if crc32c(data) != unmasked(entry.checksum):
        raise UserError(f"{path}: {name} has another checksum than was written with it: the file is damaged")
    if not data:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)


def _header(message: bytes | None) -> int:
    """BundleHeaderProto: the number of shards."""
    if message is None:
        raise Broken("is a table without a checkpoint's header")
    fields = dict(_fields(message))
    if fields.get(2, 0):
        raise Broken("was written by a big-endian machine, which is not read")
    count = fields.get(1, 0)
    if not isinstance(count, int) or not 1 <= count <= 99_999:
        raise Broken(f"has a header of {count} shards")
    return count


def _entry(message: bytes) -> Entry:
    """BundleEntryProto."""
    fields = dict(_fields(message))
    shape = []
    for number, value in _fields(_typed(fields, 2, bytes)):
        if number == 2 and isinstance(value, bytes):
            shape.append(_typed(dict(_fields(value)), 1, int))
    if len(shape) > MOST_DIMENSIONS or math.prod(filter(None, shape)) >= 1 << 63:
        raise Broken(f"has a variable of {len(shape)} dimensions, {max(shape)} the largest")
    return Entry(
        dtype=DTYPES.get(_typed(fields, 1, int)),
        shape=tuple(shape),
        shard=_typed(fields, 3, int),
        offset=_typed(fields, 4, int),
        size=_typed(fields, 5, int),
        checksum=_typed(fields, 6, int),
        sliced=7 in fields,
    )


def _typed(fields: dict[int, int | bytes], number: int, kind: type) -> int | bytes:
    value = fields.get(number, kind())
    if not isinstance(value, kind):
        raise Broken(f"has an entry whose field {number} is of another kind")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of a Protocol Buffers message's fields: numbers, and bytes where a length is given."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = varint(message, at)
        elif kind in (1, 2, 5):
            size, at = varint(message, at) if kind == 2 else ((8, at) if kind == 1 else (4, at))
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise Broken("ends within a field")
            value = value if kind == 2 else int.from_bytes(value, "little")
        else:
            raise Broken(f"has a field of wire type {kind}")
        yield key >> 3, value
