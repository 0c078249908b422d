"""Which bytes of a tensor hold a box of it.

Decides what is read: whole blocks, nothing between them, neighbours in one go. Pure arithmetic; knows no file and no
torch. Boxes are counted in elements outside and in blocks of a row (elements, for plain types) inside.
"""

from collections.abc import Iterator
from itertools import product
from math import prod

from shardwright.checkpoint.entry import Block, Entry
from shardwright.layout.partition import Range

Box = tuple[Range, ...]


def covering(box: Box, block: Block) -> Box:
    """The smallest box of whole blocks around `box`, its last dim counted in blocks; empty around an empty one."""
    if not box:
        return box
    start, stop = box[-1]
    first = start // block.elements
    return (*box[:-1], (first, -(-stop // block.elements) if stop > start else first))


def volume(box: Box) -> int:
    """How many elements, or blocks, a box holds."""
    return prod(stop - start for start, stop in box)


def chunks(box: Box, limit: int) -> Iterator[Box]:
    """`box` cut into boxes of at most `limit`, in order, each as many whole rows as fit; none of an empty one."""
    size = volume(box)
    if size <= limit:
        if size:
            yield box
        return
    dim = next(dim for dim, (start, stop) in enumerate(box) if stop - start > 1)
    start, stop = box[dim]
    step = max(1, limit * (stop - start) // size)
    for low in range(start, stop, step):
        yield from chunks((*box[:dim], (low, min(low + step, stop)), *box[dim + 1 :]), limit)


def runs(entry: Entry, box: Box) -> Iterator[Range]:
    """The byte ranges of the file that hold a box of blocks, in order; neighbours are one range."""
    block = entry.block
    grid = (*entry.shape[:-1], entry.shape[-1] // block.elements) if entry.shape else ()
    # Behind `inner` the box takes each dim whole, so that all of it along `inner` lies in one run.
    inner = next((dim for dim in reversed(range(len(grid))) if box[dim] != (0, grid[dim])), 0)
    strides = [prod(grid[dim + 1 :]) * block.nbytes for dim in range(len(grid))]
    low, high = [box[inner][side] * strides[inner] if grid else side * block.nbytes for side in (0, 1)]
    outer = [[at * stride for at in range(*span)] for span, stride in zip(box[:inner], strides, strict=False)]
    for places in product(*outer):
        base = entry.offset + sum(places)
        yield base + low, base + high
