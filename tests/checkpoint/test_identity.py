"""What ranks compare: alike for copies, another for another config, header, size or weights."""

import json
from pathlib import Path
from shutil import copytree

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from shardwright.checkpoint.opening import open_checkpoint


def identity(path: Path) -> dict[str, int]:
    with open_checkpoint(path) as checkpoint:
        before = checkpoint.bytes_read
        found = checkpoint.identity()
        assert checkpoint.bytes_read == before == 0
        return found


def different(one: Path, other: Path) -> set[str]:
    return {key for key, value in identity(one).items() if identity(other)[key] != value}


def written(folder: Path, weight: torch.Tensor, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": weight}, folder / "model.safetensors")
    return folder


def test_directories(tmp_path: Path) -> None:
    weight = torch.arange(5000.0)
    one = written(tmp_path / "one", weight, a=1, b=2)
    copytree(one, tmp_path / "copy")
    assert not different(one, tmp_path / "copy")
    assert not different(one, written(tmp_path / "spelled otherwise", weight, b=2, a=1))
    assert different(one, written(tmp_path / "config", weight, a=1, b=3)) == {"configs"}
    assert different(one, written(tmp_path / "weights", weight + 1, a=1, b=2)) == {"weights"}
    assert "headers" in different(one, written(tmp_path / "shape", weight[:-1], a=1, b=2))


def test_gguf_files_have_their_config_in_the_header(tmp_path: Path) -> None:
    for name, size, value in (("one", 8, 1.0), ("same", 8, 1.0), ("key", 9, 1.0), ("weights", 8, 2.0)):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.add_embedding_length(size)
        writer.add_tensor("w", np.full(3000, value, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    one, same, key, weights = (tmp_path / f"{name}.gguf" for name in ("one", "same", "key", "weights"))
    assert not different(one, same)
    assert different(one, key) == {"headers"}
    assert different(one, weights) == {"weights"}


def test_files_too_small_for_a_sample(tmp_path: Path) -> None:
    assert not different(written(tmp_path / "a", torch.zeros(0)), written(tmp_path / "b", torch.zeros(0)))
    assert different(written(tmp_path / "c", torch.zeros(3)), written(tmp_path / "d", torch.ones(3))) == {"weights"}
