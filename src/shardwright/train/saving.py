"""A run's checkpoints: which rank writes what, when one counts as complete, and reading one at another split.

Decides that of every piece its first holder writes, of every row its owner among the data ranks; that all ranks learn
of a failure and none raises it; and that old checkpoints go only when a newer one is complete. Formats are
`checkpoint`'s.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from shardwright.checkpoint.durable import make_directory, write_file
from shardwright.checkpoint.training import (
    TrainingCheckpoint,
    complete,
    directory_of,
    name_of_box,
    remove,
    write_manifest,
)
from shardwright.checkpoint.writing import Planned, safetensors_chunks
from shardwright.comm.group import Group, name_of
from shardwright.errors import FileError
from shardwright.layers.layer import narrowed
from shardwright.layout.spec import Piece, boxes, within_rows
from shardwright.train.optimizer import KINDS
from shardwright.train.stepper import Stepper

DIGEST = 32
"""Bytes of a sha256."""


@final
class Saver:
    """Writes and reads the checkpoints of one run. run: its directory · model: the model's config.json."""

    def __init__(self, stepper: Stepper, run: Path, keep: int, model: Mapping[str, Any]) -> None:
        self.stepper, self.run, self.keep, self.model = stepper, run, keep, model
        self.world = stepper.groups.world

    def save(self, step: int, state: Mapping[str, Any]) -> str | None:
        """Write the checkpoint after `step` steps; what went wrong on which rank, alike on all ranks, or None.

        After a failure the checkpoints before are as they were, and nothing of this one is left.
        """
        directory = directory_of(self.run, step)
        name = f"rank-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
        said, problem = bytes(8 + DIGEST), ""
        try:
            make_directory(directory)
            written = write_file(directory / name, safetensors_chunks(list(self._planned())))
            said = written.nbytes.to_bytes(8, "little") + bytes.fromhex(written.sha256)
        except OSError as error:
            problem = error.strerror or str(error)
        failure = _first_failure(self.world, problem)
        table = self.world.all_gather(
            torch.frombuffer(bytearray(said), dtype=torch.uint8)[None], 0, [1] * self.world.size, tag="checkpoint"
        )
        if failure is None:
            failure = _first_failure(self.world, self._complete(directory, step, state, table))
        if failure is not None:
            self._undo(directory)
        elif self.world.rank == 0:
            for old in complete(self.run)[self.keep :]:
                remove(old)
        return failure

    def _complete(self, directory: Path, step: int, state: Mapping[str, Any], table: Tensor) -> str:
        """Write the manifest, on rank 0; what went wrong, or nothing."""
        if self.world.rank:
            return ""
        mesh = self.stepper.groups.mesh
        rows = [bytes(row.tolist()) for row in table]
        files = {
            f"rank-{rank:05d}-of-{self.world.size:05d}.safetensors": (int.from_bytes(row[:8], "little"), row[8:].hex())
            for rank, row in enumerate(rows)
        }
        said = {"step": step, "model": self.model, "mesh": [mesh.tensor, mesh.pipeline, mesh.data]}
        said["state"] = {**state, "updates": self.stepper.optimizer.done}
        try:
            write_manifest(directory, said, files)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def _undo(self, directory: Path) -> None:
        self.world.barrier(tag="checkpoint")
        if self.world.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)

    def resume(self) -> dict[str, Any] | None:
        """Read the newest complete and undamaged checkpoint; its step and state, or None where there is none.

        Raises:
            FileError: it is of another model.
        """
        found = complete(self.run) if self.world.rank == 0 else []
        steps = _told(self.world, [int(path.name.removeprefix("step-")) for path in found])
        for step in steps:
            with TrainingCheckpoint(directory_of(self.run, step)) as checkpoint:
                damaged = checkpoint.damaged(self.world.rank, self.world.size)
                if _first_failure(self.world, damaged or "") is None:
                    self._check_model(checkpoint)
                    self._read(checkpoint)
                    return {"step": step, **checkpoint.manifest.state}
        return None

    def _check_model(self, checkpoint: TrainingCheckpoint) -> None:
        here, there = self.model, checkpoint.manifest.model
        for key in sorted(here.keys() | there.keys()):
            if here.get(key) != there.get(key):
                problem = f"it is of another model: {key} is {there.get(key)!r} there and {here.get(key)!r} here"
                raise FileError(checkpoint.path, problem, "use another output.directory")

    def _read(self, checkpoint: TrainingCheckpoint) -> None:
        stepper, optimizer = self.stepper, self.stepper.optimizer
        for name, spec in stepper.table.items():
            rows = optimizer.owned_rows(name)
            for piece in spec.pieces:
                checkpoint.read(
                    "weight", piece, narrowed(stepper.flat.view(stepper.flat.data, name), piece.local_ranges)
                )
                owned = within_rows(piece, *rows)
                if owned is not None:
                    for kind in KINDS:
                        checkpoint.read(kind, owned, _narrowed_rows(optimizer.rows(kind, name, *rows), owned, rows[0]))
        residual, own = stepper.synchroniser.residual, self._private()
        if residual is not None and checkpoint.has("residual", own.source):
            checkpoint.read("residual", own, residual)
        optimizer.resume(int(checkpoint.manifest.state["updates"]))
        stepper.share_parameters()

    def _planned(self) -> Iterator[Planned]:
        """The boxes this rank writes."""
        stepper, groups = self.stepper, self.stepper.groups
        share = stepper.shares.range(groups.data.rank)
        for kind in KINDS:
            for name, spec in stepper.table.items():
                rows = stepper.optimizer.owned_rows(name, share)
                for piece in spec.pieces:
                    written = within_rows(piece, *rows)
                    if written is not None and piece.holders[0] == groups.tensor.rank:
                        held = _narrowed_rows(stepper.optimizer.rows(kind, name, *rows), written, rows[0])
                        yield from _boxes_of(kind, written, held)
        if stepper.synchroniser.residual is not None:
            yield from _boxes_of("residual", self._private(), stepper.synchroniser.residual)

    def _private(self) -> Piece:
        """What error feedback keeps, which is this rank's alone, and of use only at the same split."""
        mesh, size = self.stepper.groups.mesh, self.stepper.flat.numel
        source = f"{mesh.tensor}x{mesh.pipeline}x{mesh.data}.rank-{self.world.rank}"
        return Piece(source, (size,), (((0, size),),), ((0, size),), (self.world.rank,))


def _narrowed_rows(rows: Tensor, piece: Piece, first: int) -> Tensor:
    """The view of `piece` in a tensor whose row 0 is row `first` of the parameter."""
    (start, stop), *others = piece.local_ranges
    return narrowed(rows, ((start - first, stop - first), *others))


def _boxes_of(kind: str, piece: Piece, held: Tensor) -> Iterator[Planned]:
    """A piece as entries, in the model's own orientation."""
    source = held.permute(tuple(reversed(range(held.dim())))) if piece.transform == "transpose" else held
    for there, here in boxes(piece.source_ranges):
        part = narrowed(source, here)
        name = name_of_box(kind, piece.source, there)
        yield Planned(name, name_of(part.dtype), tuple(part.shape), lambda part=part: [part])  # type: ignore[misc]


def _first_failure(world: Group, problem: str) -> str | None:
    """What the first rank with a problem says, on every rank; None where there is none. One small collective."""
    text = problem.encode()[:200]
    mine = torch.zeros(1, 201, dtype=torch.uint8)
    mine[0, 0] = len(text)
    mine[0, 1 : 1 + len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    table = world.all_gather(mine, 0, [1] * world.size, tag="outcome").tolist()
    for rank, (length, *said) in enumerate(table):
        if length:
            return f"rank {rank}: {bytes(said[:length]).decode(errors='replace')}"
    return None


def _told(world: Group, numbers: list[int]) -> list[int]:
    """Rank 0's list, on every rank."""
    count = int(world.broadcast(torch.tensor(len(numbers)), 0, tag="how many"))
    mine = torch.tensor(numbers if world.rank == 0 else [0] * count, dtype=torch.int64)
    return [int(number) for number in world.broadcast(mine, 0, tag="which")] if count else []
