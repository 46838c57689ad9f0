"""TensorFlow's checkpoints as files: read to the bit, or refused by a sentence."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as slow_crc32c

from deeplab_fast.errors import UserError
from deeplab_fast.model.tensorflow import find_bundle, read_variables
from deeplab_fast.model.tensorflow.crc32c import crc32c
from deeplab_fast.model.tensorflow.sstable import Broken, unsnap

from .bundles import NONE, SNAPPY, message, number, table, write_bundle

RNG = np.random.default_rng(0)
VARIABLES = {
    **{f"scope/layer_{i}/weights": RNG.standard_normal((3, 3, i, 2), np.float32) for i in range(1, 12)},
    "scope/steps": np.int64(30_000).reshape(()),
    "scope/empty": np.zeros((0, 4), np.float32),
    "scope/none": np.zeros((2, 0), np.int64),
    "scope/half": RNG.standard_normal(7).astype(np.float16),
    "other/double": RNG.standard_normal((5, 1)),
    "other/codes": np.arange(200, dtype=np.uint8),
}


def assert_read(read: dict, expected: dict = VARIABLES) -> None:
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(read[name].numpy(), value, strict=True)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "model.ckpt", VARIABLES)
    return tmp_path / "model.ckpt"


def test_crc32c_of_the_standard() -> None:
    """RFC 3720, appendix B.4, and the check value of the CRC catalogues."""
    for data, expected in (
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ):
        assert crc32c(data) == expected
    for size in (
        1,
        2,
        3,
        4,
        5,
        7,
        8,
        9,
        12,
        13,
        63,
        64,
        65,
        1000,
        4099,
        (1 << 17) - 3,
        1 << 17,
        (1 << 17) + 5,
        (1 << 18) + 4,
    ):
        data = RNG.bytes(size)
        assert crc32c(data) == crc32c(bytearray(data)) == slow_crc32c(data), size


@pytest.mark.parametrize("compression", [NONE, SNAPPY])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("per_block", [1, 4, 100])
def test_what_was_written_is_read(tmp_path: Path, compression: int, shards: int, per_block: int) -> None:
    options = {"shards": shards, "per_block": per_block, "compression": compression}
    write_bundle(tmp_path / "model.ckpt-30000", VARIABLES, **options)
    assert_read(read_variables(tmp_path / "model.ckpt-30000"))


def test_every_way_to_name_a_checkpoint(prefix: Path) -> None:
    for path in (prefix, f"{prefix}.index", f"{prefix}.data-00000-of-00001", prefix.parent):
        assert_read(read_variables(path))
    assert read_variables(prefix.parent / "model.pth") is None
    (prefix.parent / "model.pth").write_bytes(b"anything else")
    assert read_variables(prefix.parent / "model.pth") is None


def archive(path: Path, *files: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_an_archive_is_read_and_nothing_of_it_written(prefix: Path, tmp_path: Path) -> None:
    data, index = Path(f"{prefix}.data-00000-of-00001").read_bytes(), Path(f"{prefix}.index").read_bytes()
    before = sorted(tmp_path.parent.rglob("*"))
    files = (
        ("../../out/model.ckpt.data-00000-of-00001", data),
        ("a/frozen.pb", b""),
        ("../../out/model.ckpt.index", index),
    )
    path = archive(tmp_path / "model.tar.gz", *files)
    assert_read(read_variables(path))
    assert sorted(tmp_path.parent.rglob("*")) == sorted([*before, path])
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"model.tar.gz: not a readable archive"):
        read_variables(path)
    for name in ("file.pth.tar", "file.tar.gz"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
        assert read_variables(tmp_path / name) is None
    with pytest.raises(
        UserError, match=r"x.tar.gz: holds only a frozen graph, expected an .index and its .data- files"
    ):
        read_variables(archive(tmp_path / "x.tar.gz", ("a/frozen_inference_graph.pb", b"")))
    with pytest.raises(UserError, match=r"y.tgz/model.ckpt.data-00000-of-00001: no such file, which .* needs"):
        read_variables(archive(tmp_path / "y.tgz", ("model.ckpt.index", index)))


def test_an_archive_s_sparse_files_are_left_alone(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("model.ckpt.index")
        info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 60)}
        tar.addfile(info)
    assert read_variables(tmp_path / "model.tar.gz") is None


def test_variables_that_share_bytes_are_refused(tmp_path: Path) -> None:
    values = np.ones(3, np.float32)
    write_bundle(tmp_path / "model.ckpt", {"a": values, "b": values})
    bundle = find_bundle(tmp_path / "model.ckpt")
    again = {f"c{i}": bundle.entries["a"] for i in range(3)}
    with pytest.raises(UserError, match=r"has 24 bytes, its variables up to c0 36: expected none that overlap"):
        replace(bundle, entries=bundle.entries | again).read(["a", "b", "c0"])


def test_snappy_copies() -> None:
    # "ab", a copy of 9 that runs into itself, one with an offset of 2 bytes, one of 4
    packed = b"\x15\x04ab" + bytes([(9 - 4) << 2 | 1, 2]) + bytes([4 << 2 | 2, 2, 0]) + bytes([4 << 2 | 3, 1, 0, 0, 0])
    assert unsnap(packed) == b"ab" + b"ababababa" + b"babab"[:5] + b"bbbbb"
    for broken in (b"\x05\x04ab", b"\x02\x00a", b"\x09\x04ab" + bytes([1 << 2 | 1, 3]), b"\x01\x04ab", b"\xff" * 20):
        with pytest.raises(Broken):
            unsnap(broken)


def test_a_flipped_byte_of_a_shard_is_named(prefix: Path) -> None:
    shard = Path(f"{prefix}.data-00000-of-00001")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"00000-of-00001: scope/steps has another checksum than was written with it"):
        read_variables(prefix)
    # What is not asked for is not looked at.
    assert find_bundle(prefix).read(["scope/half"])


def test_any_flipped_byte_of_an_index_is_refused_or_harmless(prefix: Path) -> None:
    index = Path(f"{prefix}.index")
    data = index.read_bytes()
    refused = 0
    for at in range(len(data)):
        index.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        try:
            assert find_bundle(f"{prefix}.index").entries.keys() == VARIABLES.keys()
        except UserError as error:
            assert str(error).startswith(f"{index}: ")
            refused += 1
    assert refused >= len(data) - 40 - 5 * 2  # the footer's padding and its unused block


def test_any_truncation_is_refused(prefix: Path) -> None:
    index, shard = Path(f"{prefix}.index"), Path(f"{prefix}.data-00000-of-00001")
    data = index.read_bytes()
    for size in (0, 7, 8, 47, 48, len(data) // 2, len(data) - 1):
        index.write_bytes(data[:size])
        with pytest.raises(
            UserError, match=r"model.ckpt.index: does not end with the mark of a table: expected the whole"
        ):
            read_variables(f"{prefix}.index")
    for size in (48, len(data) // 2):  # the end is there, what it points to is not
        index.write_bytes(data[-size:])
        with pytest.raises(UserError, match=r"model.ckpt.index: has .*: expected the whole index"):
            read_variables(prefix)
    index.write_bytes(data)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"has \d+ bytes, scope/steps ends at \d+: expected the whole shard"):
        read_variables(prefix)
    shard.unlink()
    with pytest.raises(UserError, match=r"data-00000-of-00001: no such file, which the checkpoint .*model.ckpt needs"):
        read_variables(prefix)
    index.unlink()
    shard.touch()
    with pytest.raises(UserError, match=r"model.ckpt.index: no such file, which the checkpoint .*model.ckpt needs"):
        read_variables(shard)


SHAPE = message(2, message(2, number(1, 3)))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"a": number(1, 1) + SHAPE + message(7, b"")}, "a is a partitioned variable, which is not read"),
        ({"a": number(1, 1) + SHAPE + number(5, 8)}, r"a of \(3,\) has 8 bytes, expected 12"),
        ({"a": number(1, 1) + SHAPE + number(3, 1) + number(5, 12)}, "has a in shard 1 of 1: expected"),
        ({"a": number(1, 1) + number(2, 3)}, "has an entry whose field 2 is of another kind"),
        ({"a": number(1, 1) + message(2, message(2, number(1, 2**64 - 1)) + message(2, b""))}, "has a variable of 2 "),
        ({"a": number(1, 1) + message(2, message(2, number(1, 1)) * 255)}, "has a variable of 255 dimensions, 1 the"),
        ({"a": b"\x0b"}, "has a field of wire type 3"),
        ({"a": b"\x12\x05"}, "ends within a field"),
        ({"a": b"\x08\xff"}, "ends within a number"),
        ({"": number(1, 1) + number(2, 1)}, "was written by a big-endian machine"),
        ({"": b""}, "has a header of 0 shards"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_entries_that_cannot_be_read_say_why(tmp_path: Path, others: dict, expected: str) -> None:
    write_bundle(tmp_path / "model.ckpt", {}, others=others)
    with pytest.raises(UserError, match=f"model.ckpt.*: {expected}"):
        read_variables(tmp_path / "model.ckpt")


def test_strings_are_no_weights(tmp_path: Path) -> None:
    write_bundle(tmp_path / "model.ckpt", VARIABLES, others={"_CHECKPOINTABLE_OBJECT_GRAPH": number(1, 7)})
    assert_read(read_variables(tmp_path / "model.ckpt"))


def test_other_files_of_tensorflow_say_what_is_expected(prefix: Path, tmp_path: Path) -> None:
    for name, expected in (
        ("frozen_inference_graph.pb", "a frozen graph, .*: expected the checkpoint that is beside it in the archive"),
        (
            "old.ckpt",
            "a table on its own, such as TensorFlow's checkpoints before version 2: expected one in version 2",
        ),
    ):
        (tmp_path / name).write_bytes(table({b"a": b"b"}))
        with pytest.raises(UserError, match=f"{name}: {expected}"):
            read_variables(tmp_path / name)
    (tmp_path / "a.index").write_bytes(table({b"a": b"b"}))
    with pytest.raises(UserError, match=r"a.index: is a table without a checkpoint's header"):
        read_variables(tmp_path / "a")
    with pytest.raises(UserError, match=r"holds the checkpoints .*a, .*model.ckpt, expected the path of one .index"):
        read_variables(tmp_path)
    (tmp_path / "new").mkdir()
    with pytest.raises(
        UserError, match=r"new: holds no TensorFlow checkpoint, expected an .index and its .data- files"
    ):
        read_variables(tmp_path / "new")
