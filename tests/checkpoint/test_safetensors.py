"""The safetensors header: every kind of damage has its message, and the oracle is the safetensors library."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shardwright.checkpoint.entry import Entry
from shardwright.checkpoint.safetensors import read_header
from shardwright.errors import FileError, UnsupportedError

A = '"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}'
B = '"b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]}'


def written(folder: Path, header: str | bytes, data: int = 34, length: int | None = None) -> Path:
    text = header.encode() if isinstance(header, str) else header
    path = folder / "x.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


def tensor(dtype: str = '"F32"', shape: str = "[2, 3]", span: str = "[0, 24]") -> str:
    return f'{{"a": {{"dtype": {dtype}, "shape": {shape}, "data_offsets": {span}}}, {B}}}'


def test_equals_the_library_on_every_dtype(tmp_path: Path) -> None:
    dtypes = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    dtypes += ("float8_e4m3fn", "float8_e5m2")
    tensors = {name: torch.zeros(3, 5, dtype=getattr(torch, name)) for name in dtypes}
    tensors |= {"scalar": torch.zeros(()), "empty": torch.zeros(0, 7)}
    path = tmp_path / "all.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})

    entries = read_header(path)

    with safe_open(path, "pt") as oracle:
        assert entries.keys() == set(oracle.keys())
        for name, entry in entries.items():
            assert entry.shape == tuple(oracle.get_slice(name).get_shape())
            assert entry.dtype == str(oracle.get_tensor(name).dtype).removeprefix("torch.")
    assert max(entry.end for entry in entries.values()) == path.stat().st_size


def test_offsets_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, f"{{{A}, {B}}}")
    start = path.stat().st_size - 34
    assert read_header(path) == {
        "a": Entry("a", "float32", (2, 3), start, 24),
        "b": Entry("b", "bfloat16", (5,), start + 24, 10),
    }


def test_a_file_without_tensors_is_sound(tmp_path: Path) -> None:
    assert read_header(written(tmp_path, '{"__metadata__": {"format": "pt"}}  ', data=0)) == {}


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b'{"\xff": 1}', "its header is not valid UTF-8 at byte 2"),
        ("{", "its header is not valid JSON: Expecting property name"),
        ("[]", "its header is a JSON list, not an object"),
        ("[" * 100_000, "its header is nested too deeply"),
        ('{"a": ' * 100_000, "its header is nested too deeply"),
        ('{"a": ' + "9" * 5_000 + "}", "its header is not valid JSON: Exceeds the limit"),
        (f"{{{A}, {A}}}", "its header is not valid JSON: the key 'a' occurs twice"),
        ('{"a": {"dtype": "F32", "dtype": "F16"}}', "the key 'dtype' occurs twice"),
        ('{"__metadata__": {"format": 1}}', "its '__metadata__' is not an object of strings"),
        ('{"__metadata__": []}', "its '__metadata__' is not an object of strings"),
        ('{"a": 1}', "tensor 'a' is not described by dtype, shape and data_offsets"),
        ('{"a": {"dtype": "F32", "shape": []}}', "tensor 'a' is not described by dtype, shape and data_offsets"),
        (tensor(shape="[true, 3]"), "tensor 'a' has a shape that is not a list of sizes"),
        (tensor(shape="[-2, -3]"), "tensor 'a' has a shape that is not a list of sizes"),
        (tensor(shape="[2.0, 3]"), "tensor 'a' has a shape that is not a list of sizes"),
        (tensor(shape='"23"'), "tensor 'a' has a shape that is not a list of sizes"),
        (tensor(shape="[4294967296, 4294967296, 0]"), "tensor 'a' has a shape that is not a list of sizes"),
        (tensor(shape=str([1] * 65)), "tensor 'a' has a shape that is not a list of sizes"),
        (tensor(span="[0]"), "tensor 'a' has data_offsets that are not [begin, end]"),
        (tensor(span="[24, 0]"), "tensor 'a' has data_offsets that are not [begin, end]"),
        (tensor(span="[0, true]"), "tensor 'a' has data_offsets that are not [begin, end]"),
        (tensor(shape="[2, 4]"), "tensor 'a' takes 24 bytes but F32 [2, 4] is 32"),
        (tensor(shape="[2, 2]", span="[0, 16]"), "before tensor 'b', belong to no tensor"),
        (tensor(shape="[2, 2]", span="[8, 24]"), "before tensor 'a', belong to no tensor"),
        (tensor(shape="[2, 4]", span="[0, 32]"), "inside tensor 'a'"),
        (f"{{{A}}}", "its last tensor ends at byte 97 but the file has 107"),
    ],
)
def test_refuses_a_damaged_header(tmp_path: Path, header: str | bytes, problem: str) -> None:
    path = written(tmp_path, header)
    with pytest.raises(FileError) as refusal:
        read_header(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert message.endswith("; download it again")
    assert "\n" not in message


def test_names_the_tensor_that_a_cut_takes(tmp_path: Path) -> None:
    path = written(tmp_path, f"{{{A}, {B}}}", data=30)
    size = path.stat().st_size
    with pytest.raises(FileError) as refusal:
        read_header(path)
    assert (
        str(refusal.value) == f"{path}: tensor 'b' ends at byte {size + 4} but the file has {size}; download it again"
    )


@pytest.mark.parametrize("dtype", ['"F8_E8M0"', '"f32"', "null", "[]"])
def test_refuses_other_dtypes_and_lists_its_own(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(UnsupportedError, match=r"tensor 'a' has dtype .*convert it to one of F64, F32, F16, BF16"):
        read_header(written(tmp_path, tensor(dtype=dtype)))


@pytest.mark.parametrize("length", [35, 20_000_001, 2**64 - 1])
def test_believes_no_length_it_cannot_hold(tmp_path: Path, length: int) -> None:
    with pytest.raises(FileError, match=f"its header claims {length:,} bytes; 20,000,000 are allowed and the file has"):
        read_header(written(tmp_path, "{}", data=32, length=length))


def test_the_bound_holds_in_a_file_that_is_long_enough(tmp_path: Path) -> None:
    path = written(tmp_path, "{}", length=20_000_001)
    os.truncate(path, 200_000_000)  # sparse: takes no disk
    with pytest.raises(FileError, match="its header claims 20,000,001 bytes"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0"])
def test_refuses_a_file_too_short_to_be_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "short").write_bytes(content)
    with pytest.raises(FileError, match=f"it has {len(content)} bytes and a safetensors file at least 8"):
        read_header(tmp_path / "short")


def test_a_long_strange_name_fits_one_line(tmp_path: Path) -> None:
    header = json.dumps({"\n\ud800" * 10_000: 1})
    with pytest.raises(FileError) as refusal:
        read_header(written(tmp_path, header))
    message = str(refusal.value).removeprefix(str(tmp_path))
    assert len(message.encode()) < 1_500
    assert "\n" not in message
