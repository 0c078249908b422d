"""Who holds what, as data: loading, saving, planning, printing and tests all read this one table.

A `TensorSpec` describes one parameter on one rank. Its `Piece`s say which box of which tensor of the checkpoint fills
which box of the parameter. Knows no torch, no model and no file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Literal

from shardwright.layout.partition import Range

Transform = Literal["none", "transpose", "rope_unpermute", "less_one", "flatten"]
"""What turns a source box into the local box.

`transpose`: the source has its two dims swapped (GPT-2's Conv1D). `rope_unpermute`: the rows are one head whose rotary
pairs lie side by side (GGUF's Llama: 0, D/2, 1, D/2 + 1, …) and are put back into halves. `less_one`: the source has
one more (GGUF's Gemma, whose norms multiply by 1 + weight). `flatten`: the piece is one row of a matrix (GGUF's
StableLM, which has a row a head).
"""

Gradient = Literal["whole", "partial"]
"""Whether a rank's gradient of its piece is the full one, or only its share of a sum over the holders."""

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int8": 1}
"""Size of one element of each dtype, by torch's name for it."""


@dataclass(frozen=True)
class Piece:
    """One box of a parameter and the box of the checkpoint it comes from.

    source: name of the tensor that holds it · source_shape: that tensor's whole shape · source_ranges: for each of its
    dims the ranges taken, joined in order (several where a layout interleaves) · local_ranges: for each dim of the
    parameter the one range filled · holders: the ranks that hold these same values, in order (the lowest writes them,
    and is counted in norms) · gradient: `partial` where the holders' gradients must be summed.
    """

    source: str
    source_shape: tuple[int, ...]
    source_ranges: tuple[tuple[Range, ...], ...]
    local_ranges: tuple[Range, ...]
    holders: tuple[int, ...]
    transform: Transform = "none"
    gradient: Gradient = "whole"

    @property
    def numel(self) -> int:
        """Elements in the piece."""
        return prod(stop - start for start, stop in self.local_ranges)

    @property
    def key(self) -> tuple[str, tuple[tuple[Range, ...], ...]]:
        """What makes two ranks' pieces replicas of each other."""
        return self.source, self.source_ranges


@dataclass(frozen=True)
class TensorSpec:
    """One parameter on one rank: local shape, dtype by name, and the pieces that fill it."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter on this rank."""
        return prod(self.shape) * BYTES[self.dtype]

    def renamed(self, source: str) -> "TensorSpec":
        """The same parameter with `source` put in front of every piece's source name."""
        return replace(self, pieces=tuple(replace(p, source=f"{source}{p.source}") for p in self.pieces))


Specs = dict[str, TensorSpec]
"""A module's own parameter names → what this rank holds of each."""


def stored_bytes(tables: Iterable[Mapping[str, TensorSpec]]) -> tuple[int, int]:
    """Bytes of the model itself and of its replicas, over the tables of all ranks."""
    model = replicas = 0
    for rank, table in enumerate(tables):
        for spec in table.values():
            for piece in spec.pieces:
                size = piece.numel * BYTES[spec.dtype]
                if piece.holders[0] == rank:
                    model += size
                else:
                    replicas += size
    return model, replicas


def split_rows(piece: Piece, rows: int) -> tuple[Piece, ...]:
    """A piece cut into pieces of `rows` rows each (one head, say). Each range of its dim 0 must be a multiple of it."""
    (start, _), *rest = piece.local_ranges
    starts = [at for low, high in piece.source_ranges[0] for at in range(low, high, rows)]
    return tuple(
        replace(
            piece,
            source_ranges=(((at, at + rows),), *piece.source_ranges[1:]),
            local_ranges=((start + i * rows, start + (i + 1) * rows), *rest),
        )
        for i, at in enumerate(starts)
    )


def within_rows(piece: Piece, start: int, stop: int) -> Piece | None:
    """The part of a piece that lies in rows start…stop of the parameter; None where there is none.

    A rotary head is taken whole or not at all; any other cut of it is an `AssertionError`.
    """
    (low, high), *others = piece.local_ranges
    first, last = max(low, start), min(high, stop)
    if first >= last:
        return None
    if (first, last) == (low, high):
        return piece
    if piece.transform == "rope_unpermute":
        raise AssertionError(f"rows {first}…{last} cut a rotary head of {piece.source}")
    dim = len(piece.source_ranges) - 1 if piece.transform == "transpose" else 0
    taken, at = [], low
    for begin, end in piece.source_ranges[dim]:
        here = max(first - at, 0), min(last - at, end - begin)
        if here[0] < here[1]:
            taken.append((begin + here[0], begin + here[1]))
        at += end - begin
    source = (*piece.source_ranges[:dim], tuple(taken), *piece.source_ranges[dim + 1 :])
    return replace(piece, source_ranges=source, local_ranges=((first, last), *others))


def boxes(ranges: tuple[tuple[Range, ...], ...]) -> Iterable[tuple[tuple[Range, ...], tuple[Range, ...]]]:
    """The plain boxes of a product of joined ranges: (box in the source, box in the joined result)."""
    placed: list[list[tuple[Range, Range]]] = []
    for dim in ranges:
        at, row = 0, []
        for start, stop in dim:
            row.append(((start, stop), (at, at + stop - start)))
            at += stop - start
        placed.append(row)
    for combination in product(*placed):
        yield tuple(source for source, _ in combination), tuple(local for _, local in combination)
