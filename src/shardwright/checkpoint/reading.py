"""From the bytes of a file to values, a chunk at a time.

Decides how much is in memory at once: never a whole tensor of which only a part is owned. Which bytes hold a box is
`extents`' to say, and what they mean `dequantise`'s.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from shardwright.checkpoint.dequantise import decode
from shardwright.checkpoint.entry import Entry
from shardwright.checkpoint.extents import Box, chunks, covering, runs, volume
from shardwright.checkpoint.file import File

CHUNK = 1 << 18
"""Bytes of file read and decoded at a time: with the values they become (7 times as much for q4_0, 12 times for q2_k),
few enough to stay in cache."""


def chunked(file: File, entry: Entry, box: Box) -> Iterator[tuple[Box, Tensor]]:
    """The values of `box` in boxes of at most `CHUNK` bytes.

    Raises:
        FileError: the file was written to since it was opened.
    """
    for chunk in chunks(covering(box, entry.block), max(1, CHUNK // entry.block.nbytes)):
        yield _read(file, entry, chunk, box)


def joined(parts: Iterable[tuple[Box, Tensor]], box: Box) -> Tensor:
    """Boxes that tile `box` as one tensor; float32 where there are none."""
    out: Tensor | None = None
    for taken, values in parts:
        if out is None:
            out = torch.empty([stop - start for start, stop in box], dtype=values.dtype)
        target = out
        for dim, ((start, stop), (first, _)) in enumerate(zip(taken, box, strict=True)):
            target = target.narrow(dim, start - first, stop - start)
        target.copy_(values)
    return torch.empty([stop - start for start, stop in box]) if out is None else out


def _read(file: File, entry: Entry, chunk: Box, source: Box) -> tuple[Box, Tensor]:
    """The box of a chunk (counted in blocks) less what of its blocks lies outside `source`, and its values."""
    block = entry.block
    raw = torch.empty(volume(chunk) * block.nbytes, dtype=torch.uint8)
    view, at = raw.numpy().data, 0
    for start, stop in runs(entry, chunk):
        file.read_into(start, view[at : at + stop - start])
        at += stop - start
    file.check_unchanged()
    values = decode(raw, entry.dtype)
    if not chunk:
        return (), values.view(())
    first, last = (at * block.elements for at in chunk[-1])
    low, high = max(first, source[-1][0]), min(last, source[-1][1])
    values = values.view(*(stop - start for start, stop in chunk[:-1]), last - first)
    return (*chunk[:-1], (low, high)), values[..., low - first : high - first]
