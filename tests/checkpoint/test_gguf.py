"""The GGUF header: every kind of damage has its message, and the oracle is the gguf package."""

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from tests.checkpoint.blocks import random_blocks
from tests.checkpoint.gguf_bytes import ALIGNED, A, array, pair, string, tensor, written

from shardwright.checkpoint.blocks import QUANTISED
from shardwright.checkpoint.gguf import read_header
from shardwright.errors import FileError, UnsupportedError

BF16 = gguf.GGMLQuantizationType.BF16


def test_equals_the_package_on_all_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    scalars = {"uint8": 200, "int8": -3, "uint16": 60_000, "int16": -9, "uint32": 2**32 - 1, "int32": -(2**31)}
    scalars |= {"uint64": 2**64 - 1, "int64": -(2**63)}
    for kind, value in scalars.items():
        writer.add_key_value(f"k.{kind}", value, gguf.GGUFValueType[kind.upper()])
    writer.add_float32("k.float32", 0.1)
    writer.add_float64("k.float64", 0.1)
    writer.add_bool("k.bool", True)
    writer.add_string("k.text", "schön ▁")
    writer.add_array("k.words", ["", "ä", "tok" * 1_000])
    writer.add_array("k.numbers", [1, -2, 3])
    writer.add_array("k.flags", [True, False])
    rows = np.arange(6 * 64, dtype=np.float32).reshape(6, 64)
    writer.add_tensor("f32", rows.reshape(2, 3, 64))
    writer.add_tensor("f16", rows.astype(np.float16))
    writer.add_tensor("bf16", gguf.quants.quantize(rows, BF16), raw_dtype=BF16)
    for name in QUANTISED:
        raw = random_blocks(name, 6, np.random.default_rng(0))
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[name.upper()])
    for width in (8, 16, 32, 64):
        writer.add_tensor(f"int{width}", np.arange(6, dtype=f"int{width}"))
    writer.add_tensor("f64", np.arange(6, dtype=np.float64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    metadata, entries = read_header(path)

    oracle = gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
    assert metadata == {key: tuple(value) if isinstance(value, list) else value for key, value in expected.items()}
    assert metadata["k.flags"] == (True, False)
    assert type(metadata["k.bool"]) is bool
    assert list(entries) == [stored.name for stored in oracle.tensors]
    for stored in oracle.tensors:
        entry = entries[stored.name]
        assert entry.shape == tuple(int(size) for size in stored.shape[::-1])
        assert (entry.offset, entry.nbytes) == (stored.data_offset, stored.n_bytes)
    dtypes = {name: entry.dtype for name, entry in entries.items()}
    plain = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64"}
    plain |= {f"int{width}": f"int{width}" for width in (8, 16, 32, 64)}
    assert dtypes == plain | {name: name for name in QUANTISED}


@pytest.mark.parametrize("version", [2, 3])
def test_reads_both_versions_and_nested_arrays(tmp_path: Path, version: int) -> None:
    nested = array(9, 2, array(4, 1, struct.pack("<I", 7)) + array(8, 1, string("x")))
    path = written(tmp_path, [pair("n", 9, nested)], [A], start=b"GGUF" + struct.pack("<I", version))
    metadata, entries = read_header(path)
    assert metadata == {"n": ((7,), ("x",))}
    assert (entries["a"].shape, entries["a"].offset % 32) == ((2, 3), 0)


def test_strings_across_chunks(tmp_path: Path) -> None:
    """Some 3 MB of strings: they straddle the chunks that the header is read in, and one is longer than a chunk."""
    words = [f"wörd {i}" * (i % 40) for i in range(8_000)]
    words[4_000] = "x" * 1_500_000
    path = written(tmp_path, [pair("w", 9, array(8, len(words), b"".join(map(string, words))))], [A])
    metadata, entries = read_header(path)
    assert metadata["w"] == tuple(words)
    assert list(entries) == ["a"]


def test_honours_alignment(tmp_path: Path) -> None:
    path = written(tmp_path, [pair("general.alignment", 4, struct.pack("<I", 64))], [A], data=64)
    assert read_header(path)[1]["a"].offset % 64 == 0


U32 = struct.pack("<I", 1)


@pytest.mark.parametrize(
    ("pairs", "tensors", "problem"),
    [
        ([pair("k", 13, U32)], [], "metadata 'k' has value type 13; types 0 to 12 exist"),
        ([pair("k", 9, array(13, 1, U32))], [], "metadata 'k' has value type 13"),
        ([pair("k", 7, b"\x02")], [], "metadata 'k' holds a truth value that is neither 0 nor 1"),
        ([pair("k", 9, array(7, 2, b"\0\x09"))], [], "metadata 'k' holds a truth value"),
        ([pair("k", 8, string(b"\xff"))], [], "the string of metadata 'k' at byte 45 is not valid UTF-8"),
        ([pair("k", 9, array(8, 2, string("ok") + string(b"a\xff")))], [], "at byte 67 is not valid UTF-8"),
        ([pair("k", 8, struct.pack("<Q", 2**62))], [], "metadata 'k' at byte 45 needs 4,611,686,018,427,387,904 bytes"),
        ([pair("k", 9, array(8, 2**61))], [], "metadata 'k' at byte 49 needs 18,446,744,073,709,551,616 bytes"),
        ([pair("k", 9, array(8, 3, string("x") + struct.pack("<Q", 999) + bytes(8)))], [], "needs 999 bytes or more"),
        ([pair("k", 9, array(12, 2**40))], [], "metadata 'k' at byte 49 needs 8,796,093,022,208 bytes or more"),
        ([pair("k", 9, array(9, 2**40))], [], "metadata 'k' at byte 49 needs"),
        ([pair("k", 9, array(9, 1) * 9)], [], "metadata 'k' nests arrays deeper than 4"),
        ([pair("k", 4, U32)] * 2, [], "metadata 'k' occurs twice"),
        ([pair("general.alignment", 4, struct.pack("<I", 33))], [A], "general.alignment is '33', not a power of two"),
        ([pair("general.alignment", 4, struct.pack("<I", 1 << 31))], [A], "not a power of two from 8 to 65,536"),
        ([pair("general.alignment", 4, struct.pack("<I", 0))], [A], "general.alignment is '0'"),
        ([pair("general.alignment", 7, b"\x01")], [A], "general.alignment is 'True'"),
        ([], [A, A], "tensor 'a' occurs twice"),
        ([], [tensor("a", (1,) * 5, 0, 0)], "tensor 'a' has 5 dims; GGUF has at most 4"),
        (
            [],
            [tensor("a", (2**32, 2**32), 0, 0)],
            "tensor 'a' has shape [4294967296, 4294967296], 2^63 elements or more",
        ),
        ([], [tensor("a", (2**63, 0), 0, 0)], "2^63 elements or more"),
        ([], [tensor("a", (33, 32), 3, 0)], "tensor 'a' has rows of 33, not a multiple of q4_1's block of 32"),
        ([], [tensor("a", (8,), 0, 8)], "tensor 'a' has offset 8, not a multiple of 32"),
        ([], [tensor("a", (17,), 0, 0)], "tensor 'a' ends at byte 132 but the file has 96"),
        ([], [tensor("a", (8,), 0, 2**63)], "tensor 'a' ends at byte 9,223,372,036,854,775,904 but the file has"),
        ([], [tensor("b", (1,), 0, 0), tensor("a", (8,), 0, 0)], "tensor 'a' starts at byte 96, inside tensor 'b'"),
        ([], [tensor("a", (0,), 0, 32)], "bytes 64 to 96, before tensor 'a', belong to no tensor"),
    ],
)
def test_refuses_a_damaged_header(tmp_path: Path, pairs: list[bytes], tensors: list[bytes], problem: str) -> None:
    path = written(tmp_path, pairs, tensors)
    with pytest.raises(FileError) as refusal:
        read_header(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert message.endswith("; download it again")


def test_believes_no_count_the_file_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(
        FileError, match="the table of 1,000,000,001 metadata pairs at byte 24 needs 13,000,000,013 bytes"
    ):
        read_header(written(tmp_path, [ALIGNED], [], counts=10**9))
    path = written(tmp_path, [], [])
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0))
    with pytest.raises(FileError, match="the table of 1,152,921,504,606,846,976 tensors at byte 24 needs"):
        read_header(path)


def test_bounds_the_header_of_a_huge_file(tmp_path: Path) -> None:
    path = written(tmp_path, [pair("k", 8, struct.pack("<Q", 10**9))], [])
    os.truncate(path, 10**10)  # sparse: takes no disk
    with pytest.raises(
        FileError, match="metadata 'k' at byte 45 needs 1,000,000,000 bytes or more but a header 100,000,0"
    ):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + bytes(40)])
def test_refuses_what_is_no_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(FileError, match=r"it does not start with 'GGUF' and a header; pass a \.gguf file"):
        read_header(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (struct.pack("<I", 1), "GGUF version 1; versions 2 and 3 are read: convert the model again"),
        (struct.pack("<I", 4), "GGUF version 4;"),
        (struct.pack(">I", 3), "a big-endian GGUF file; convert it with"),
    ],
)
def test_refuses_other_versions(tmp_path: Path, version: bytes, problem: str) -> None:
    with pytest.raises(UnsupportedError, match=problem):
        read_header(written(tmp_path, [], [], start=b"GGUF" + version))


@pytest.mark.parametrize(("kind", "name"), [(19, "IQ1_S"), (99, "99")])
def test_names_the_type_it_does_not_read(tmp_path: Path, kind: int, name: str) -> None:
    known = "float32, float16, bfloat16, float64, q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, iq4_xs, q2_k, q3_k, q4_k, "
    with pytest.raises(UnsupportedError, match=f"tensor 'blk.0' has type {name}; convert the model to one of {known}"):
        read_header(written(tmp_path, [], [tensor("blk.0", (256,), kind, 0)]))


def test_every_prefix_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, [ALIGNED, pair("w", 9, array(8, 2, string("ab") + string("")))], [A], data=24)
    whole = path.read_bytes()
    read_header(path)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FileError):
            read_header(path)
