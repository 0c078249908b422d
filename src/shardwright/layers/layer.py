"""`ParallelLayer`: what every layer that holds a shard has in common.

A layer states once, in `specs`, what each rank holds. Its parameters, its initial values and loading by hand are made
from that table here. Sizes and arithmetic are the concrete layers' business.
"""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from shardwright.comm.group import Group, name_of
from shardwright.errors import UsageError
from shardwright.layers import random
from shardwright.layout.partition import Partition, Range
from shardwright.layout.spec import Piece, Specs, boxes

INITIAL_STD = 0.02


class ParallelLayer(nn.Module, ABC):
    """A layer of which this rank holds a part. `name` tags its collectives and keys its initial values."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, group: Group, name: str, *cuts: Partition) -> None:
        super().__init__()
        for partition in cuts:
            if partition.ranks != group.size:
                constraint = f"{name} runs on {group.size} ranks"
                raise UsageError("partition", partition.widths, constraint, "give one width for each rank of the group")
        self.group = group
        self.name = name

    @final
    def specs(self, rank: int | None = None) -> Specs:
        """What this rank (or another one) holds of each parameter; sources are the layer's own names."""
        dtype = self.weight.dtype if "weight" in self._parameters else torch.get_default_dtype()
        return self._specs(self.group.rank if rank is None else rank, name_of(dtype))

    @final
    def load(self, name: str, full_tensor: Tensor, shard_id: str | int | None = None) -> None:
        """Fill this rank's part of `weight` or `bias` from the whole tensor.

        shard_id: `"q"`, `"k"` or `"v"` of a fused projection, or the index of a merged part; None elsewhere.
        """
        held = self.specs()
        if name not in held:
            raise UsageError("name", name, f"{self.name} has no such parameter", f"use one of {list(held)}")
        source = name if shard_id is None else f"{shard_id}.{name}"
        shapes = self._sources(name)
        if source not in shapes:
            parts = ", ".join(part.removesuffix(f".{name}") for part in shapes if part != name)
            remedy = f"its parts are {parts}" if parts else "leave it out"
            raise UsageError("shard_id", shard_id, f"{self.name} has no part '{source}'", remedy)
        if full_tensor.shape != shapes[source]:
            raise UsageError(
                "full_tensor", list(full_tensor.shape), f"'{source}' is {list(shapes[source])}", "pass the whole tensor"
            )
        for piece in held[name].pieces:
            if piece.source == source:
                local = narrowed(self.get_parameter(name).data, piece.local_ranges)
                for there, here in boxes(piece.source_ranges):
                    narrowed(local, here).copy_(narrowed(full_tensor, there))

    def reset(self, seed: int = 0) -> None:
        """Initial values: weights normal with deviation 0.02, biases 0, the same whatever the split."""
        for name, spec in self.specs().items():
            data = self.get_parameter(name).data
            if name == "bias":
                data.zero_()
                continue
            for piece in spec.pieces:
                values = random.normal(seed, f"{self.name}.{piece.source}", 0, random.global_index(piece))
                narrowed(data, piece.local_ranges).copy_(values * INITIAL_STD)

    @abstractmethod
    def _specs(self, rank: int, dtype: str) -> Specs: ...

    @final
    def _build(self) -> None:
        """Make the parameters the table describes; the last line of every constructor."""
        self.register_parameter("bias", None)
        for name, spec in self.specs().items():
            self.register_parameter(name, nn.Parameter(torch.empty(spec.shape)))
        if not self.weight.is_meta:
            self.reset()

    def _sources(self, name: str) -> dict[str, tuple[int, ...]]:
        """Source names of a parameter and their whole shapes, over all ranks: this one may hold none of them."""
        tables = [self.specs(rank).get(name) for rank in range(self.group.size)]
        return {piece.source: piece.source_shape for table in tables if table for piece in table.pieces}


def narrowed(x: Tensor, box: tuple[Range, ...]) -> Tensor:
    """The view of `x` that a box covers."""
    for dim, (start, stop) in enumerate(box):
        x = x.narrow(dim, start, stop - start)
    return x


def cut(full: Tensor, piece: Piece) -> Tensor:
    """A piece's values, taken from the whole source tensor; of the transforms only `transpose` is applied."""
    out = full.new_empty([sum(stop - start for start, stop in dim) for dim in piece.source_ranges])
    for there, here in boxes(piece.source_ranges):
        narrowed(out, here).copy_(narrowed(full, there))
    return out.T if piece.transform == "transpose" else out
