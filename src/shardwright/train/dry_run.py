"""What a run would hold and move, rank by rank, without weights, data or other ranks.

Decides nothing: memory is added up from `specs()`, and a step's collectives are those that the trainer's own code asks
of planned groups while shapes flow through it. Activations are not counted: the planner predicts them.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shardwright.comm.group import Call
from shardwright.comm.parallel import ModelParallel
from shardwright.comm.planned import PlannedGroup
from shardwright.comm.recording import RecordingGroup
from shardwright.layers.batch import Batch
from shardwright.layers.gradients import sum_partial
from shardwright.layout.mesh import AXES, Mesh
from shardwright.layout.partition import Partition
from shardwright.models.config import ModelConfig
from shardwright.models.decoder import Decoder
from shardwright.models.load import DTYPES
from shardwright.models.specs import Cuts
from shardwright.train.recipe import Recipe
from shardwright.train.stepper import Stepper
from shardwright.train.windows import Micro


@dataclass(frozen=True)
class RankMemory:
    """Bytes one rank holds: weights as computed with, wide gradients, optimiser (with masters where they are apart)."""

    rank: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind that a rank enters in a step, and the bytes it hands over in them."""

    axis: str
    op: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class DryRun:
    """parameters: of the whole model · traffic: of rank 0."""

    parameters: int
    ranks: list[RankMemory]
    traffic: list[Traffic]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def dry_run(recipe: Recipe, config: ModelConfig) -> DryRun:
    """Memory of every rank and a step's collectives of the first."""
    mesh = Mesh(recipe.parallel.tensor, recipe.parallel.pipeline, recipe.parallel.data)
    firsts = [_stepper(recipe, config, mesh, rank)[0] for rank in mesh.line("tensor", 0)]
    whole = sum(
        piece.numel
        for rank, stepper in enumerate(firsts)
        for spec in stepper.table.values()
        for piece in spec.pieces
        if piece.holders[0] == rank
    )
    ranks = [_memory(rank, mesh, firsts[mesh.place(rank).tensor]) for rank in range(mesh.size)]
    return DryRun(whole, ranks, _traffic(recipe, config, mesh))


def _stepper(recipe: Recipe, config: ModelConfig, mesh: Mesh, rank: int) -> tuple[Stepper, dict[str, list[Call]]]:
    calls: dict[str, list[Call]] = {}

    def planned(axis: str, at: int, size: int) -> RecordingGroup:
        return RecordingGroup(PlannedGroup(at, size), calls.setdefault(axis, []))

    place = mesh.place(rank)
    lines = [planned(axis, at, mesh.along(axis)) for axis, at in zip(AXES, place, strict=True)]
    groups = ModelParallel(mesh, planned("world", rank, mesh.size), *lines)
    with torch.device("meta"):
        cuts = Cuts.balanced(config, mesh.tensor, sequence=recipe.parallel.sequence)
        model = Decoder(config, groups.tensor, cuts).to(DTYPES[recipe.train.dtype])
        return Stepper(model, groups, recipe.train, recipe.optimizer, recipe.parallel), calls


def _memory(rank: int, mesh: Mesh, stepper: Stepper) -> RankMemory:
    data = mesh.place(rank).data
    owned = stepper.shares.widths[data] if stepper.zero else stepper.flat.numel
    vectors = stepper.optimizer.vectors
    apart = vectors["weight"].dtype != stepper.flat.data.dtype
    kept = [vector for kind, vector in vectors.items() if apart or kind != "weight"]
    each = sum(vector.itemsize for vector in kept)
    return RankMemory(rank, stepper.flat.data.nbytes, stepper.flat.grad.nbytes, owned * each)


def _traffic(recipe: Recipe, config: ModelConfig, mesh: Mesh) -> list[Traffic]:
    """One micro-batch of full sequences, recorded, and counted as often as a step has it on rank 0."""
    stepper, calls = _stepper(recipe, config, mesh, 0)
    train, length = recipe.train, recipe.data.sequence
    share = Partition.balanced(train.batch, mesh.data).widths[0]
    sequences = min(train.micro_batch, share)
    with torch.device("meta"):
        tokens = torch.empty(sequences * length, dtype=torch.int64)
        lengths = (length,) * sequences
        batch = Batch(tokens, torch.empty_like(tokens), lengths, held=lengths)
        stepper.losses(Micro(batch, tokens, 0)).sum().backward()  # type: ignore[no-untyped-call]
        times = -(-share // max(1, sequences))
        found = [_counted(axis, done, times) for axis, done in calls.items()]
        for done in calls.values():
            done.clear()
        partial = {name: stepper.flat.view(stepper.flat.grad, name) for name in stepper.late}
        sum_partial(partial, stepper.tables, stepper.groups.tensor, like=stepper.flat.grad)
        stepper.synchroniser.begin(compress=False)
        stepper.synchroniser.finish()
        stepper.share_parameters()
        found += [_counted(axis, done, 1) for axis, done in calls.items()]
    total: Counter[tuple[str, str]] = Counter()
    nbytes: Counter[tuple[str, str]] = Counter()
    for part in found:
        for axis, op, number, size in part:
            total[axis, op] += number
            nbytes[axis, op] += size
    alone = {axis for axis in AXES if mesh.along(axis) == 1}
    return [Traffic(axis, op, number, nbytes[axis, op]) for (axis, op), number in total.items() if axis not in alone]


def _counted(axis: str, calls: list[Call], times: int) -> list[tuple[str, str, int, int]]:
    return [(axis, call.op, times, times * call.bytes) for call in calls]
