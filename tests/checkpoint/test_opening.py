"""From a path to a checkpoint: what is opened, and what each kind of wrong path is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shardwright.checkpoint.opening import open_checkpoint
from shardwright.errors import FileError, ShardwrightError, UnsupportedError
from shardwright.layout.spec import Piece, TensorSpec

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4000000\n"


def whole(name: str, *shape: int) -> TensorSpec:
    box = tuple((0, size) for size in shape)
    return TensorSpec(shape, "float32", (Piece(name, shape, tuple((span,) for span in box), box, (0,)),))


def directory(folder: Path, **files: object) -> Path:
    """A model directory; `__` in a name is a dot."""
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(content, dict) and path.suffix == ".safetensors":
            save_file(content, path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_directory(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    where = directory(tmp_path, config__json={"model_type": "llama"}, model__safetensors={"w": weight})
    with open_checkpoint(where) as checkpoint:
        assert checkpoint.path == str(where)
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.header_bytes == checkpoint.entries["w"].entry.offset
        assert checkpoint.bytes_read == 0
        checkpoint.will_need()
        parameter = torch.nn.Parameter(torch.empty(4, 6))
        checkpoint.fill(parameter, whole("w", 4, 6))
        assert parameter.equal(weight)
        assert checkpoint.bytes_read == 4 * 6 * 4


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", np.ones((2, 3), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config == {"general.architecture": "llama"}
        out = torch.empty(2, 3)
        checkpoint.fill(out, whole("w", 2, 3))
        assert out.equal(torch.ones(2, 3))


def sharded(folder: Path, weight_map: object) -> Path:
    parts = {"a__safetensors": {"x": torch.ones(2), "y": torch.ones(3)}, "b__safetensors": {"z": torch.zeros(2)}}
    index = {"metadata": {}, "weight_map": weight_map}
    return directory(folder, config__json={}, model__safetensors__index__json=index, **parts)


def test_a_sharded_directory_takes_each_tensor_from_the_file_its_index_says(tmp_path: Path) -> None:
    where = sharded(tmp_path, {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"})
    with open_checkpoint(where) as checkpoint:
        assert checkpoint.entries.keys() == {"x", "y", "z"}
        out = torch.ones(2)
        checkpoint.fill(out, whole("z", 2))
        assert out.equal(torch.zeros(2))


def test_refuses_a_part_that_the_index_does_not_name(tmp_path: Path) -> None:
    """Other files may lie beside the weights: another program's, an adapter."""
    where = sharded(tmp_path, {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"})
    (where / "adapter.safetensors").touch()
    open_checkpoint(where).close()
    (where / "model-00003-of-00003.safetensors").touch()
    with pytest.raises(FileError, match=r"model-00003-of-00003.safetensors: the index does not name this part; remove"):
        open_checkpoint(where)


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        (None, "it has no object 'weight_map'; download it again"),
        ({"x": 3}, "tensor 'x' is said to be in '3', no safetensors file beside it"),
        ({"x": "../a.safetensors"}, "tensor 'x' is said to be in '../a.safetensors', no safetensors file beside it"),
        ({"x": "pytorch_model.bin"}, "tensor 'x' is said to be in 'pytorch_model.bin', no safetensors file beside it"),
        ({"y": "b.safetensors"}, "b.safetensors: the index promises tensor 'y' in it; download both again"),
        (
            {"y": "a.safetensors"},
            "a.safetensors: the index does not place tensor 'x' in it (1 such); download both again",
        ),
        ({"x": "c.safetensors"}, "c.safetensors: it cannot be opened: No such file or directory"),
    ],
)
def test_refuses_a_damaged_index(tmp_path: Path, weight_map: object, problem: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileError) as refusal:
        open_checkpoint(sharded(tmp_path, weight_map))
    assert problem in str(refusal.value)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("files", "kind", "problem"),
    [
        (
            {},
            FileError,
            "the directory has no config.json; pass a directory written by save_pretrained, or a .gguf file",
        ),
        ({"m__gguf": ""}, FileError, "the directory has no config.json; pass {where}/m.gguf"),
        (
            {"config__json": {}},
            FileError,
            "the directory has neither model.safetensors nor model.safetensors.index.json",
        ),
        ({"config__json": {}, "m__gguf": ""}, FileError, "nor model.safetensors.index.json; pass {where}/m.gguf"),
        (
            {"config__json": {}, "model__safetensors": POINTER},
            FileError,
            "it is a Git LFS pointer, not the file itself",
        ),
        ({"adapter_config__json": {}}, UnsupportedError, "{where}: an adapter is no model; merge it into its own"),
        ({"config__json": "{"}, FileError, "it is not valid JSON"),
        ({"config__json": '{"a": 1, "a": 2}'}, FileError, "the key 'a' occurs twice"),
        ({"config__json": "[]"}, FileError, "it is a JSON list, not an object"),
        ({"config__json": "[" * 100_000}, FileError, "it is nested too deeply"),
        (
            {"config__json": {}, "pytorch_model__bin": "", "training_args__bin": ""},
            UnsupportedError,
            "{where}/pytorch_model.bin: a pickle can run any code and is never opened; convert it with transformers",
        ),
    ],
)
def test_refuses_an_incomplete_directory(
    tmp_path: Path, files: dict[str, object], kind: type[ShardwrightError], problem: str
) -> None:
    with pytest.raises(kind) as refusal:
        open_checkpoint(directory(tmp_path, **files))
    assert problem.format(where=tmp_path) in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("none", FileError, "none: there is no such file or directory; check the path; a model of a hub is downloaded"),
        ("none.gguf", FileError, "none.gguf: there is no such file or directory; check the path"),
        (
            "x.safetensors",
            UnsupportedError,
            "weights alone have no config; pass the directory that holds its config.json",
        ),
        ("x.pt", UnsupportedError, "x.pt: a pickle can run any code and is never opened"),
        ("pointer.gguf", FileError, "pointer.gguf: it is a Git LFS pointer, not the file itself; run git lfs pull"),
        ("notes.txt", FileError, "notes.txt: it does not start with 'GGUF' and a header; pass a .gguf file"),
    ],
)
def test_refuses_other_paths(tmp_path: Path, name: str, kind: type[ShardwrightError], problem: str) -> None:
    (tmp_path / "notes.txt").write_text("a file of some other kind")
    (tmp_path / "pointer.gguf").write_text(POINTER)
    for empty in ("x.safetensors", "x.pt"):
        (tmp_path / empty).touch()
    with pytest.raises(kind) as refusal:
        open_checkpoint(tmp_path / name)
    assert problem in str(refusal.value)


def test_refuses_one_of_several_gguf_files(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="one of several GGUF files; join them with llama-gguf-split --merge"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_config_too_long_to_be_one(tmp_path: Path) -> None:
    where = directory(tmp_path, config__json={})
    os.truncate(where / "config.json", 20_000_001)  # sparse: takes no disk
    with pytest.raises(FileError, match="it has 20,000,001 bytes and at most 20,000,000 are allowed"):
        open_checkpoint(where)


def test_opening_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    where = directory(tmp_path, config__json={}, model__safetensors={"w": torch.ones(2)})
    code = (
        "import sys; from shardwright.checkpoint.opening import open_checkpoint; "
        f"open_checkpoint({str(where)!r}); print({{'torch', 'numpy'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
