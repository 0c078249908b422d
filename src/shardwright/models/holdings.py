"""Who holds which slice of what: the tables of `models.specs`, turned round to be read by a checkpoint's tensors.

No torch and no weights: names and numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from shardwright.errors import UsageError
from shardwright.layout.partition import Range
from shardwright.layout.spec import BYTES, Gradient, Transform
from shardwright.models.config import ModelConfig
from shardwright.models.family import Naming
from shardwright.models.specs import Cuts, model_specs


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What one rank holds of a tensor: these ranges of its dims, in these ranges of that parameter."""

    rank: int
    parameter: str
    ranges: tuple[tuple[Range, ...], ...]
    local: tuple[Range, ...]
    holders: tuple[int, ...]
    transform: Transform
    gradient: Gradient
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One tensor of the checkpoint. cut: the dim along which ranks differ, None where each holds all of it."""

    tensor: str
    shape: tuple[int, ...]
    cut: int | None
    slices: tuple[Slice, ...]

    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """Start and stop along the cut dim, and the rank, of every part; whole where nothing is cut."""
        dim = self.cut or 0
        return tuple(sorted((start, stop, piece.rank) for piece in self.slices for start, stop in piece.ranges[dim]))


def holdings(
    config: ModelConfig, cuts: Cuts, naming: Naming, layers: Sequence[int], tensor: str | None = None
) -> list[Holding]:
    """The tensors of these layers and of both ends, in the model's order; or the one of that name, a parameter's too.

    Raises:
        UsageError: there is no tensor of that name.
    """
    slices: dict[str, list[Slice]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank in range(cuts.ranks):
        for parameter, spec in model_specs(config, cuts, rank, naming, layers=layers).items():
            for piece in spec.pieces:
                shapes[piece.source] = piece.source_shape
                slices.setdefault(piece.source, []).append(
                    Slice(
                        rank=rank,
                        parameter=parameter,
                        ranges=piece.source_ranges,
                        local=piece.local_ranges,
                        holders=piece.holders,
                        transform=piece.transform,
                        gradient=piece.gradient,
                        bytes=piece.numel * BYTES[spec.dtype],
                    )
                )
    found = [
        Holding(tensor=name, shape=shapes[name], cut=_cut(shapes[name], held), slices=tuple(held))
        for name, held in slices.items()
    ]
    return found if tensor is None else _named(found, tensor)


def layer_of(tensor: str) -> int | None:
    """The layer a tensor's name speaks of, by its first number; None where it has none."""
    return next((int(word) for word in tensor.split(".") if word.isdecimal()), None)


def _cut(shape: tuple[int, ...], slices: Sequence[Slice]) -> int | None:
    for dim, size in enumerate(shape):
        if any(sum(stop - start for start, stop in piece.ranges[dim]) != size for piece in slices):
            return dim
    return None


def _named(found: list[Holding], tensor: str) -> list[Holding]:
    same = [h for h in found if tensor == h.tensor or any(tensor == piece.parameter for piece in h.slices)]
    if same:
        return same
    names = {h.tensor for h in found} | {piece.parameter for h in found for piece in h.slices}
    close = get_close_matches(tensor, sorted(names), 3, 0.3) or sorted(names)[:3]
    raise UsageError("tensor", tensor, "the model has none of that name", f"did you mean {', '.join(close)}")
