"""A tensor of a checkpoint, however it is stored.

Decides what a reader may ask: its shape, whether it holds floats, and the values of a box, piece by piece. Imports
torch when values are read and not before. `Plain` is one tensor of one file; weights that several tensors make together
are in `scaled` and `packed`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from shardwright.checkpoint.entry import Entry
from shardwright.checkpoint.extents import Box
from shardwright.checkpoint.file import File

if TYPE_CHECKING:
    from torch import Tensor


class Stored(ABC):
    """One tensor: its name, the dtype it is kept in (for messages), its row-major shape, and the file it is in."""

    @property
    @abstractmethod
    def name(self) -> str:
        """As the checkpoint calls it."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """How it is kept: torch's name, a block type's, or a word for several tensors that are one."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of its values."""

    @property
    @abstractmethod
    def path(self) -> str:
        """The file that errors name."""

    @property
    def floating(self) -> bool:
        """Whether its values are floats."""
        return not self.dtype.startswith(("int", "uint", "bool"))

    @property
    def group(self) -> int:
        """Neighbours of a row that share a scale; 1 where it has none."""
        return 1

    @abstractmethod
    def values(self, box: Box) -> "Iterator[tuple[Box, Tensor]]":
        """The values of a box: boxes that tile it and what they hold, each small; none of an empty one."""


@final
@dataclass(frozen=True)
class Plain(Stored):
    """One tensor of one file, plain or in blocks."""

    file: File
    entry: Entry

    @property
    def name(self) -> str:
        """As the file calls it."""
        return self.entry.name

    @property
    def dtype(self) -> str:
        """Torch's name, or a block type's."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its values."""
        return self.entry.shape

    @property
    def path(self) -> str:
        """The file."""
        return self.file.path

    @property
    def group(self) -> int:
        """A block's elements."""
        return self.entry.block.elements

    def values(self, box: Box) -> "Iterator[tuple[Box, Tensor]]":
        """Reads the bytes (of a block-quantised tensor: the blocks) that hold the box, and no others."""
        from shardwright.checkpoint.reading import chunked

        return chunked(self.file, self.entry, box)

    def whole(self, box: Box) -> "Tensor":
        """The values of one box in one tensor: for tables that are small beside their weights."""
        from shardwright.checkpoint.reading import joined

        return joined(self.values(box), box)
