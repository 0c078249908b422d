"""From the bytes of a file into a piece of a parameter.

Decides the order of the work and its memory: chunk by chunk, never a whole tensor of which only a part is owned. Knows
no file format; what is read is `extents`' to say, and what it means is `dequantise`'s.
"""

import torch
from torch import Tensor

from shardwright.checkpoint.blocks import QUANTISED
from shardwright.checkpoint.dequantise import PLAIN, decode
from shardwright.checkpoint.entry import Entry, quoted
from shardwright.checkpoint.extents import Box, chunks, covering, runs, volume
from shardwright.checkpoint.file import File
from shardwright.errors import UnsupportedError, UsageError
from shardwright.layout.partition import Range
from shardwright.layout.spec import Piece, Transform, boxes

CHUNK = 1 << 18
"""Bytes of file read and decoded at a time: with the values they become (7 times as much for q4_0, 12 times for q2_k),
few enough to stay in cache."""


def transfer(file: File, entry: Entry, piece: Piece, out: Tensor) -> None:
    """Read the source boxes of `piece`, and no other byte but their blocks', into `out`, the view they fill.

    Raises:
        FileError: the file was shortened since it was opened.
        UnsupportedError: the file holds integers and `out` does not, or the other way round.
        UsageError: `out` has no storage or another shape than the piece, or the piece leaves its source.
    """
    _check(file, entry, piece, out)
    target = out.detach()
    if piece.transform == "transpose":
        target = target.permute(tuple(reversed(range(target.dim()))))
    for source, local in boxes(piece.source_ranges):
        for chunk in chunks(covering(source, entry.block), max(1, CHUNK // entry.block.nbytes)):
            values, taken = _read(file, entry, chunk, source)
            # `local` is where `source` goes; the chunk is as far into the one as into the other.
            place = [
                (to + low - start, to + high - start)
                for (to, _), (start, _), (low, high) in zip(local, source, taken, strict=True)
            ]
            _place(values, target, place, piece.transform)


def _read(file: File, entry: Entry, chunk: Box, source: Box) -> tuple[Tensor, Box]:
    """Values of a chunk (counted in blocks), less what of its blocks lies outside `source`, and their box."""
    block = entry.block
    raw = torch.empty(volume(chunk) * block.nbytes, dtype=torch.uint8)
    view, at = raw.numpy().data, 0
    for start, stop in runs(entry, chunk):
        file.read_into(start, view[at : at + stop - start])
        at += stop - start
    values = decode(raw, entry.dtype)
    if not chunk:
        return values.view(()), ()
    first, last = (at * block.elements for at in chunk[-1])
    low, high = max(first, source[-1][0]), min(last, source[-1][1])
    values = values.view(*(stop - start for start, stop in chunk[:-1]), last - first)
    return values[..., low - first : high - first], (*chunk[:-1], (low, high))


def _place(values: Tensor, target: Tensor, place: list[Range], transform: Transform) -> None:
    """Copy `values` to where they go, counted in the order of the source."""
    rotary = transform == "rope_unpermute"
    for dim, (start, stop) in enumerate(place):
        if dim or not rotary:
            target = target.narrow(dim, start, stop - start)
    if not rotary:
        target.copy_(values)
        return
    half, start = len(target) // 2, place[0][0]
    for parity in (0, 1):
        # Source rows of one parity are neighbours in one half of the head.
        skip = (start + parity) % 2
        rows = values[skip::2]
        target.narrow(0, parity * half + (start + skip) // 2, len(rows)).copy_(rows)


def _check(file: File, entry: Entry, piece: Piece, out: Tensor) -> None:
    for dim, (ranges, size) in enumerate(zip(piece.source_ranges, entry.shape, strict=True)):
        if any(not 0 <= start <= stop <= size for start, stop in ranges):
            raise UsageError("source_ranges", ranges, f"dim {dim} of {piece.source} has {size}", "stay within it")
    taken = tuple(sum(stop - start for start, stop in ranges) for ranges in piece.source_ranges)
    local = taken[::-1] if piece.transform == "transpose" else taken
    if tuple(out.shape) != local or out.is_meta:
        shape = f"a tensor with storage of shape {list(local)}"
        raise UsageError("out", list(out.shape), f"{piece.source} fills {shape}", "pass the view of its local ranges")
    if piece.transform == "rope_unpermute" and (not local or local[0] % 2):
        raise UsageError(
            "local_ranges", piece.local_ranges, "a rotary head has an even number of rows", "pass one head"
        )
    floats = entry.dtype in QUANTISED or PLAIN[entry.dtype].is_floating_point
    if out.dtype != PLAIN.get(entry.dtype) and not (floats and out.dtype.is_floating_point):
        tensor = f"tensor {quoted(entry.name)} holds {entry.dtype}"
        raise UnsupportedError(f"{file.path}: {tensor} and the model wants {out.dtype}; only floats are converted")
