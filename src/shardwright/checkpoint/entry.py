"""One tensor of a file: its name, type and shape, and the bytes that hold it.

Decides which element types are read at all, and how many values a block of each holds. Knows no file format and no
torch.
"""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Block:
    """The smallest part of a row that can be read alone: `elements` neighbours in `nbytes` bytes."""

    elements: int
    nbytes: int


BLOCKS = {
    "float64": Block(1, 8),
    "float32": Block(1, 4),
    "float16": Block(1, 2),
    "bfloat16": Block(1, 2),
    "float8_e4m3fn": Block(1, 1),
    "float8_e5m2": Block(1, 1),
    "int64": Block(1, 8),
    "int32": Block(1, 4),
    "int16": Block(1, 2),
    "int8": Block(1, 1),
    "uint8": Block(1, 1),
    "bool": Block(1, 1),
    "q4_0": Block(32, 18),
    "q4_1": Block(32, 20),
    "q5_0": Block(32, 22),
    "q5_1": Block(32, 24),
    "q8_0": Block(32, 34),
    "q2_k": Block(256, 84),
    "q3_k": Block(256, 110),
    "q4_k": Block(256, 144),
    "q5_k": Block(256, 176),
    "q6_k": Block(256, 210),
    "q8_k": Block(256, 292),
    "iq4_nl": Block(32, 18),
    "iq4_xs": Block(256, 136),
}
"""Types by torch's name, block-quantised ones by GGUF's."""

MAX_ELEMENTS = 2**63 - 1
"""What torch can index."""

MAX_DIMS = 64


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. `shape` is row-major, `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def block(self) -> Block:
        """Geometry of its type."""
        return BLOCKS[self.dtype]

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.nbytes


def is_shape(value: object) -> bool:
    """Whether it is a list or tuple of sizes whose product, zeros aside, no index overflows."""
    if not isinstance(value, list | tuple) or len(value) > MAX_DIMS:
        return False
    # A bool is an int, and no size.
    sizes = all(type(size) is int and 0 <= size <= MAX_ELEMENTS for size in value)
    return sizes and prod(size or 1 for size in value) <= MAX_ELEMENTS


def stored_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor whose rows are whole blocks."""
    block = BLOCKS[dtype]
    return prod(shape) // block.elements * block.nbytes


def quoted(name: str) -> str:
    """A name out of a file, fit for one line of an error message however long or strange it is."""
    return repr(name if len(name) <= 120 else f"{name[:119]}…")
