"""A training checkpoint made into another one: cut for other ranks (`reshard`), or whole for transformers (`export`).

Decides the layout of what is written; streams it, some MB of a tensor at a time, whatever the sizes.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.checkpoint.durable import make_directory, write_file, writing
from shardwright.checkpoint.extents import Box, chunks
from shardwright.checkpoint.training import (
    MANIFEST,
    TrainingCheckpoint,
    directory_of,
    name_of_box,
    write_manifest,
)
from shardwright.checkpoint.writing import Planned, safetensors_chunks
from shardwright.errors import FileError, UsageError
from shardwright.layout.spec import Piece, Specs, boxes
from shardwright.models.families import by_name
from shardwright.models.load import DTYPES
from shardwright.models.specs import Cuts, model_specs
from shardwright.train.optimizer import KINDS
from shardwright.train.origin import config_of

CHUNK = 4 << 20
"""Elements in memory at a time."""

LARGEST = 5_000_000_000
"""Bytes of a weights file, as transformers cuts them."""

TOKENIZER = "tokenizer"

ELSEWHERE = "free space, or use another directory"


@dataclass(frozen=True)
class Converted:
    """What was written: where, in how many files and bytes, of which step."""

    path: str
    step: int
    files: int
    bytes: int


def reshard(source: Path, target: Path, tensor: int) -> Converted:
    """Write the checkpoint at `source` as `tensor` ranks would have, into `target/checkpoints`, where a run goes on.

    Raises:
        FileError: there is no complete checkpoint, a part of it is missing, or `target` has one of that step or cannot
            be written.
        UsageError: fewer than one rank.
    """
    if tensor < 1:
        raise UsageError("tp", tensor, "tensor parallelism needs at least one rank", "try --tp 1")
    with TrainingCheckpoint.find(source) as checkpoint, writing(target, ELSEWHERE):
        manifest = checkpoint.manifest
        directory = directory_of(target, manifest.step)
        if (directory / MANIFEST).exists():
            raise FileError(directory, "there is a checkpoint already", "reshard to another directory")
        make_directory(directory)
        files = {}
        for rank in range(tensor):
            name = f"rank-{rank:05d}-of-{tensor:05d}.safetensors"
            planned = list(_cut_for(checkpoint, _table(manifest.model, tensor, rank), rank))
            written = write_file(directory / name, safetensors_chunks(planned))
            files[name] = (written.nbytes, written.sha256)
        said = {"step": manifest.step, "model": manifest.model, "mesh": [tensor, 1, 1], "state": manifest.state}
        write_manifest(directory, said, files)
        _copy_tokenizer(checkpoint.path, target / TOKENIZER)
        return Converted(str(directory), manifest.step, len(files), sum(nbytes for nbytes, _ in files.values()))


def export(source: Path, target: Path, dtype: str | None = None) -> Converted:
    """Write the checkpoint's weights as transformers has them: config.json, safetensors, tokenizer.

    dtype: by default the one its config.json names, else float32.

    Raises:
        FileError: there is no complete checkpoint, a part of it is missing, or `target` holds a model already or
            cannot be written.
        UsageError: an unknown dtype.
    """
    if (target / "config.json").exists():
        raise FileError(target, "there is a model already", "export to another directory")
    with TrainingCheckpoint.find(source) as checkpoint, writing(target, ELSEWHERE):
        said = checkpoint.manifest.model
        chosen = dtype or str(said.get("dtype") or said.get("torch_dtype") or "float32")
        if chosen not in DTYPES:
            raise UsageError("dtype", chosen, "there is no such weight type", f"use one of {', '.join(DTYPES)}")
        make_directory(target)
        shapes = {piece.source: piece.source_shape for spec in _table(said, 1, 0).values() for piece in spec.pieces}
        planned = [_whole(checkpoint, name, shape, chosen) for name, shape in shapes.items()]
        files, nbytes = _write_weights(target, planned)
        _copy_tokenizer(checkpoint.path, target)
        config = {key: value for key, value in said.items() if key != "torch_dtype"} | {"dtype": chosen}
        write_file(target / "config.json", [json.dumps(config, indent=2, ensure_ascii=False).encode()])
        return Converted(str(target), checkpoint.manifest.step, files, nbytes)


def _table(model: dict[str, Any], ranks: int, rank: int) -> Specs:
    config = config_of(model, "the checkpoint's model")
    return model_specs(config, Cuts.balanced(config, ranks), rank, by_name(config.family).huggingface)


def _cut_for(checkpoint: TrainingCheckpoint, table: Specs, rank: int) -> Iterator[Planned]:
    """What a rank writes of each piece that it holds first."""
    for kind in KINDS:
        for spec in table.values():
            for piece in spec.pieces:
                if piece.holders[0] == rank:
                    for box, _ in boxes(piece.source_ranges):
                        yield _planned(checkpoint, kind, piece, box)


def _whole(checkpoint: TrainingCheckpoint, source: str, shape: tuple[int, ...], dtype: str) -> Planned:
    box = tuple((0, size) for size in shape)
    return Planned(source, dtype, shape, lambda: _values(checkpoint, "weight", source, box, shape, dtype))


def _planned(checkpoint: TrainingCheckpoint, kind: str, piece: Piece, box: Box) -> Planned:
    dtype = checkpoint.dtype(kind, piece.source)
    shape = tuple(stop - start for start, stop in box)
    name = name_of_box(kind, piece.source, box)
    return Planned(name, dtype, shape, lambda: _values(checkpoint, kind, piece.source, box, piece.source_shape, dtype))


def _values(
    checkpoint: TrainingCheckpoint, kind: str, source: str, box: Box, shape: tuple[int, ...], dtype: str
) -> Iterable[Tensor]:
    """A box's values in order, a chunk at a time."""
    for part in chunks(box, CHUNK):
        local = tuple((0, stop - start) for start, stop in part)
        out = torch.empty([stop for _, stop in local], dtype=DTYPES[dtype])
        checkpoint.read(kind, Piece(source, shape, tuple((span,) for span in part), local, (0,)), out)
        yield out


def _write_weights(target: Path, planned: list[Planned]) -> tuple[int, int]:
    """One file, or several with their index; how many files and bytes."""
    parts: list[list[Planned]] = [[]]
    for tensor in planned:
        if parts[-1] and sum(one.nbytes for one in parts[-1]) + tensor.nbytes > LARGEST:
            parts.append([])
        parts[-1].append(tensor)
    names = [f"model-{at + 1:05d}-of-{len(parts):05d}.safetensors" for at in range(len(parts))]
    names = names if len(parts) > 1 else ["model.safetensors"]
    nbytes = 0
    for name, part in zip(names, parts, strict=True):
        nbytes += write_file(target / name, safetensors_chunks(part)).nbytes
    if len(parts) > 1:
        where = {tensor.name: name for name, part in zip(names, parts, strict=True) for tensor in part}
        index = {"metadata": {"total_size": sum(one.nbytes for one in planned)}, "weight_map": where}
        write_file(target / "model.safetensors.index.json", [json.dumps(index, indent=2).encode()])
    return len(parts), nbytes


def _copy_tokenizer(checkpoint: Path, target: Path) -> None:
    """The run's tokenizer, where the checkpoint still lies in its run."""
    place = checkpoint.parent.parent / TOKENIZER
    if place.is_dir() and place != target:
        target.mkdir(parents=True, exist_ok=True)
        for file in place.glob("*.json"):
            shutil.copyfile(file, target / file.name)
