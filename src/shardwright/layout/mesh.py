"""`Mesh`: the ranks of a job as a box of tensor × pipeline × data coordinates. No torch, no groups.

Decides the order: tensor runs fastest, so that the ranks that talk most are neighbours, then pipeline, then data.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from shardwright.errors import UsageError

Axis = Literal["tensor", "pipeline", "data"]
AXES: tuple[Axis, ...] = ("tensor", "pipeline", "data")


class Place(NamedTuple):
    """A rank's coordinates."""

    tensor: int
    pipeline: int
    data: int


@dataclass(frozen=True)
class Mesh:
    """How many ranks lie along each axis."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.along(axis) < 1:
                raise UsageError(axis, self.along(axis), "an axis of the mesh has at least one rank", "pass 1 or more")

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.tensor * self.pipeline * self.data

    def along(self, axis: Axis) -> int:
        """How many ranks lie along an axis."""
        return {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data}[axis]

    def place(self, rank: int) -> Place:
        """The coordinates of a rank."""
        if not 0 <= rank < self.size:
            raise UsageError("rank", rank, f"the mesh has ranks 0…{self.size - 1}", "pass one of them")
        rest, tensor = divmod(rank, self.tensor)
        data, pipeline = divmod(rest, self.pipeline)
        return Place(tensor, pipeline, data)

    def rank(self, place: Place) -> int:
        """The rank at some coordinates."""
        return (place.data * self.pipeline + place.pipeline) * self.tensor + place.tensor

    def line(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """The ranks that differ from this one along `axis` only, itself included, in order."""
        place = self.place(rank)
        return tuple(self.rank(place._replace(**{axis: at})) for at in range(self.along(axis)))
