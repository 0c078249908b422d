"""Reading pieces: the reference is plain slicing of the full tensor, and equality is of bits.

Nothing here has a tolerance: slicing moves no arithmetic, dequantisation is the gguf package's, and a cast rounds once
on either side.
"""

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from threading import Thread
from unittest.mock import patch

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.checkpoint.blocks import random_blocks
from torch import Tensor

from shardwright.checkpoint import reading
from shardwright.checkpoint.blocks import QUANTISED
from shardwright.checkpoint.dequantise import decode
from shardwright.checkpoint.entry import Entry, stored_size
from shardwright.checkpoint.extents import Box
from shardwright.checkpoint.file import File
from shardwright.checkpoint.opening import open_checkpoint
from shardwright.checkpoint.source import Checkpoint
from shardwright.checkpoint.stored import Plain
from shardwright.checkpoint.transfer import transfer
from shardwright.errors import FileError, UnsupportedError, UsageError
from shardwright.layout.partition import Partition, Range
from shardwright.layout.sharding import merged_column_linear
from shardwright.layout.spec import Piece, Transform, boxes

TRANSFORMS: tuple[Transform, ...] = ("none", "transpose", "rope_unpermute", "less_one")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Model:
    """No dataclass: its printed tensors would drown a failure."""

    def __init__(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
        self.checkpoint = checkpoint
        self.tensors = tensors


def hugging_face(folder: Path) -> Path:
    random = torch.Generator().manual_seed(0)
    shapes = {"cube": (4, 5, 6), "matrix": (12, 10), "vector": (16,), "scalar": (), "single": (1, 1)}
    tensors = {
        f"{name}.{kind}": torch.randn(shape, generator=random).to(kind)
        for kind in FLOATS
        for name, shape in shapes.items()
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return folder


def llama_cpp(path: Path) -> tuple[Path, dict[str, Tensor]]:
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    values = {}
    for name in ("F32", "F16", "BF16"):
        kind = gguf.GGMLQuantizationType[name]
        for shape in ((8, 96), (3, 4, 64), (128,)):
            raw = gguf.quants.quantize(random.standard_normal(shape, dtype=np.float32), kind)
            writer.add_tensor(f"{name}.{len(shape)}", raw, raw_dtype=kind)
            values[f"{name}.{len(shape)}"] = torch.from_numpy(gguf.quants.dequantize(raw, kind).copy())
    for name in QUANTISED.keys() - {"q8_k"}:
        kind = gguf.GGMLQuantizationType[name.upper()]
        for rows, blocks in (((5,), 3), ((2, 2), 2), ((), 4)):
            raw = random_blocks(name, prod(rows) * blocks, random).reshape(*rows, -1)
            writer.add_tensor(f"{name}.{len(rows)}", raw, raw_dtype=kind)
            values[f"{name}.{len(rows)}"] = torch.from_numpy(gguf.quants.dequantize(raw, kind).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, values


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Model]]:
    folder = tmp_path_factory.mktemp("models")
    where = hugging_face(folder / "hf")
    path, values = llama_cpp(folder / "m.gguf")
    with open_checkpoint(where) as one, open_checkpoint(path) as other:
        yield [Model(one, load_file(where / "model.safetensors")), Model(other, values)]


def ranges(size: int) -> st.SearchStrategy[tuple[Range, ...]]:
    """Up to three ranges of one dim, in order and apart; some are empty."""
    cuts = st.lists(st.integers(0, size), min_size=2, max_size=6)
    return cuts.map(sorted).map(lambda at: tuple(zip(at[::2], at[1::2], strict=False)))


def joined(full: Tensor, taken: tuple[tuple[Range, ...], ...]) -> Tensor:
    """The reference: each dim's ranges, one after another."""
    for dim, spans in enumerate(taken):
        full = full.index_select(dim, torch.tensor([at for span in spans for at in range(*span)], dtype=torch.long))
    return full


def unpermuted(head: Tensor) -> Tensor:
    """The inverse of what llama.cpp's converter does to the rows of one head: halves from pairs."""
    return head.reshape(len(head) // 2, 2, *head.shape[1:]).swapaxes(0, 1).reshape(head.shape)


def covering_bytes(checkpoint: Checkpoint, piece: Piece) -> int:
    """Bytes of the blocks that hold each of a piece's boxes, found by marking them one by one."""
    entry = checkpoint.entries[piece.source].entry
    marks = np.arange(prod(entry.shape)).reshape(entry.shape) // entry.block.elements
    places = [marks[tuple(slice(*span) for span in box)] for box, _ in boxes(piece.source_ranges)]
    return sum(len(np.unique(place)) for place in places) * entry.block.nbytes


def piece_of(source: str, full: Tensor, taken: tuple[tuple[Range, ...], ...], transform: Transform) -> Piece:
    shape = [sum(stop - start for start, stop in spans) for spans in taken]
    local: Box = tuple((0, size) for size in (shape[::-1] if transform == "transpose" else shape))
    return Piece(source, tuple(full.shape), taken, local, (0,), transform)


@given(data=st.data())
def test_any_piece_of_any_tensor(models: list[Model], data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(models))
    name = data.draw(st.sampled_from(sorted(model.tensors)))
    checkpoint, full = model.checkpoint, model.tensors[name]
    taken = tuple(data.draw(ranges(size)) for size in full.shape)
    expected = joined(full, taken)
    transform = data.draw(st.sampled_from(TRANSFORMS))
    if transform == "rope_unpermute" and (not full.shape or len(expected) % 2):
        transform = "none"
    if transform == "transpose":
        expected = expected.permute(tuple(reversed(range(expected.dim()))))
    if transform == "rope_unpermute":
        expected = unpermuted(expected)
    if transform == "less_one":
        expected = expected.float() - 1
    dtype = data.draw(st.sampled_from(FLOATS))
    # A view inside a larger parameter, as a fused projection has it.
    out = torch.full([size + 2 for size in expected.shape], 7.0, dtype=dtype)
    view = out
    for dim, size in enumerate(expected.shape):
        view = view.narrow(dim, 1, size)
    piece = piece_of(name, full, taken, transform)

    before = checkpoint.bytes_read
    with patch.object(reading, "CHUNK", data.draw(st.sampled_from([1, 50, 400, 1 << 20]))):
        checkpoint.read(piece, view)

    assert view.equal(expected.to(dtype))
    assert int((out != 7).sum()) <= expected.numel()
    assert checkpoint.bytes_read - before == covering_bytes(checkpoint, piece)


def saved(folder: Path, **tensors: Tensor) -> Checkpoint:
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


@pytest.mark.parametrize("columns", [(4,), ()])
def test_rope_unpermute_undoes_the_converter(tmp_path: Path, columns: tuple[int, ...]) -> None:
    """Reference: `permute` of llama.cpp's convert_hf_to_gguf.py, on a weight of 3 heads and on a bias."""
    heads, size = 3, 8
    original = torch.randn(heads * size, *columns)
    stored = original.reshape(heads, 2, size // 2, *columns).swapaxes(1, 2).reshape(original.shape)
    with saved(tmp_path, q=stored) as checkpoint:
        for head in range(heads):
            rows = (head * size, (head + 1) * size)
            taken = ((rows,), *(((0, width),) for width in columns))
            out = torch.empty(size, *columns)
            checkpoint.read(piece_of("q", original, taken, "rope_unpermute"), out)
            assert out.equal(original[slice(*rows)])


def test_fill_takes_every_piece_to_its_place(tmp_path: Path) -> None:
    """Reference: this rank's rows of both parts, concatenated. A parameter that requires grad is filled too."""
    parts = {"0.weight": torch.randn(7, 3), "1.weight": torch.randn(5, 3)}
    cuts = (Partition.balanced(7, 2), Partition.balanced(5, 2))
    with saved(tmp_path, **parts) as checkpoint:
        for rank in range(2):
            spec = merged_column_linear(3, cuts, rank, bias=False)["weight"]
            parameter = torch.nn.Parameter(torch.empty(spec.shape, dtype=torch.bfloat16))
            checkpoint.fill(parameter, spec)
            rows = [part[slice(*cut.range(rank))] for part, cut in zip(parts.values(), cuts, strict=True)]
            assert parameter.equal(torch.cat(rows).bfloat16())
        assert checkpoint.bytes_read == 12 * 3 * 4


@pytest.mark.parametrize("dtype", ["float32", "q4_1"])
@pytest.mark.parametrize("columns", [(0, 1_024), (512, 1_024)])
def test_memory_is_bounded_however_large_the_tensor(tmp_path: Path, dtype: str, columns: Range) -> None:
    """A box of a tensor of a million rows (sparse: it takes no disk): 256 KiB of file at a time, nothing beside it."""
    shape = (1_000_000, 1_024)
    entry = Entry("w", dtype, shape, 0, stored_size(dtype, shape))
    (tmp_path / "w").touch()
    os.truncate(tmp_path / "w", entry.nbytes)
    taken = (((500_000, 508_000),), (columns,))
    piece = piece_of("w", torch.empty(shape, device="meta"), taken, "none")
    out = torch.ones(8_000, columns[1] - columns[0])
    held: list[int] = []

    def spy(raw: Tensor, kind: str) -> Tensor:
        held.append(raw.numel())
        return decode(raw, kind)

    with File(tmp_path / "w") as file, patch.object(reading, "decode", spy):
        transfer(Plain(file, entry), piece, out)
        assert file.bytes_read == sum(held) == out.numel() // entry.block.elements * entry.block.nbytes
    assert max(held) <= 1 << 18
    assert not out.any()


def test_refuses_what_is_not_there_or_has_another_shape(tmp_path: Path) -> None:
    full = torch.zeros(4, 6)
    with saved(tmp_path, w=full) as checkpoint:
        with pytest.raises(FileError) as missing:
            checkpoint.read(piece_of("v", full, (((0, 4),), ((0, 6),)), "none"), full)
        problem = "tensor 'v' is missing among 1 where the model's config asks for [4, 6]; use the config these weights"
        assert str(missing.value) == f"{tmp_path}: {problem} came with"
        with pytest.raises(FileError) as other:
            checkpoint.read(piece_of("w", full.T, (((0, 6),), ((0, 4),)), "none"), full.T)
        problem = (
            "tensor 'w' has shape [4, 6] where the model's config asks for [6, 4]; use the config these weights came"
        )
        assert str(other.value) == f"{tmp_path / 'model.safetensors'}: {problem} with"
        assert checkpoint.bytes_read == 0


def test_refuses_a_piece_or_a_view_that_cannot_be_meant(tmp_path: Path) -> None:
    full = torch.zeros(4, 6)
    whole = piece_of("w", full, (((0, 4),), ((0, 6),)), "none")
    with saved(tmp_path, w=full) as checkpoint:
        with pytest.raises(
            UsageError, match=r"out=\[6, 4\]: w fills a tensor with storage of shape \[4, 6\]; pass the view"
        ):
            checkpoint.read(whole, full.T)
        with pytest.raises(UsageError, match="w fills a tensor with storage"):
            checkpoint.read(whole, full.to("meta"))
        with pytest.raises(UsageError, match=r"source_ranges=\(\(3, 5\),\): dim 0 of w has 4; stay within it"):
            checkpoint.read(piece_of("w", full, (((3, 5),), ((0, 6),)), "none"), full[:2])
        with pytest.raises(UsageError, match="a rotary head has an even number of rows; pass one head"):
            checkpoint.read(piece_of("w", full, (((0, 3),), ((0, 6),)), "rope_unpermute"), full[:3])
        checkpoint.close()
        with pytest.raises(UsageError, match="it is closed"):
            checkpoint.read(whole, full)


def test_integers_are_not_made_into_floats(tmp_path: Path) -> None:
    full = torch.arange(6, dtype=torch.int64)
    piece = piece_of("w", full, (((2, 5),),), "none")
    with saved(tmp_path, w=full) as checkpoint:
        out = torch.empty(3, dtype=torch.int64)
        checkpoint.read(piece, out)
        assert out.equal(full[2:5])
        with pytest.raises(
            UnsupportedError, match=r"tensor 'w' holds int64 and the model wants torch.float32; only floats"
        ):
            checkpoint.read(piece, torch.empty(3))


def test_a_file_shortened_while_open(tmp_path: Path) -> None:
    full = torch.zeros(4, 6)
    with saved(tmp_path, w=full) as checkpoint:
        os.truncate(tmp_path / "model.safetensors", 100)
        with pytest.raises(FileError, match=r"model\.safetensors: it ends at byte 100 where byte"):
            checkpoint.read(piece_of("w", full, (((0, 4),), ((0, 6),)), "none"), full)


def test_threads_read_one_path_each_with_its_own(tmp_path: Path) -> None:
    full = torch.randn(64, 64)
    saved(tmp_path, w=full).close()
    out = torch.empty(64, 64)

    def body(rank: int) -> None:
        rows = (rank * 16, rank * 16 + 16)
        with open_checkpoint(tmp_path) as checkpoint:
            checkpoint.read(piece_of("w", full, ((rows,), ((0, 64),)), "none"), out[slice(*rows)])

    threads = [Thread(target=body, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out.equal(full)
