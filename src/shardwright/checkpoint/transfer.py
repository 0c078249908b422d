"""From a stored tensor into a piece of a parameter.

Decides where each value goes, whatever the transform. Knows no file format and no way of storing.
"""

from torch import Tensor

from shardwright.checkpoint.entry import quoted
from shardwright.checkpoint.stored import Stored
from shardwright.errors import UnsupportedError, UsageError
from shardwright.layout.partition import Range
from shardwright.layout.spec import Piece, Transform, boxes


def transfer(stored: Stored, piece: Piece, out: Tensor) -> None:
    """Read the source boxes of `piece`, and no other byte but their blocks', into `out`, the view they fill.

    Raises:
        FileError: the file was written to since it was opened.
        UnsupportedError: the file holds integers and `out` does not, or the other way round.
        UsageError: `out` has no storage or another shape than the piece, or the piece leaves its source.
    """
    _check(stored, piece, out)
    target = out.detach()
    if piece.transform == "transpose":
        target = target.permute(tuple(reversed(range(target.dim()))))
    elif piece.transform == "flatten":
        target = target[None]
    for source, local in boxes(piece.source_ranges):
        for taken, values in stored.values(source):
            # `local` is where `source` goes; the chunk is as far into the one as into the other.
            place = [
                (to + low - start, to + high - start)
                for (to, _), (start, _), (low, high) in zip(local, source, taken, strict=True)
            ]
            _place(values, target, place, piece.transform)


def _place(values: Tensor, target: Tensor, place: list[Range], transform: Transform) -> None:
    """Copy `values` to where they go, counted in the order of the source."""
    rotary = transform == "rope_unpermute"
    for dim, (start, stop) in enumerate(place):
        if dim or not rotary:
            target = target.narrow(dim, start, stop - start)
    if not rotary:
        target.copy_(values.float() - 1 if transform == "less_one" else values)
        return
    half, start = len(target) // 2, place[0][0]
    for parity in (0, 1):
        # Source rows of one parity are neighbours in one half of the head.
        skip = (start + parity) % 2
        rows = values[skip::2]
        target.narrow(0, parity * half + (start + skip) // 2, len(rows)).copy_(rows)


def _check(stored: Stored, piece: Piece, out: Tensor) -> None:
    for dim, (ranges, size) in enumerate(zip(piece.source_ranges, stored.shape, strict=True)):
        if any(not 0 <= start <= stop <= size for start, stop in ranges):
            raise UsageError("source_ranges", ranges, f"dim {dim} of {piece.source} has {size}", "stay within it")
    taken = tuple(sum(stop - start for start, stop in ranges) for ranges in piece.source_ranges)
    local = taken[::-1] if piece.transform == "transpose" else taken[1:] if piece.transform == "flatten" else taken
    if tuple(out.shape) != local or out.is_meta:
        shape = f"a tensor with storage of shape {list(local)}"
        raise UsageError("out", list(out.shape), f"{piece.source} fills {shape}", "pass the view of its local ranges")
    if piece.transform == "rope_unpermute" and (not local or local[0] % 2):
        raise UsageError(
            "local_ranges", piece.local_ranges, "a rotary head has an even number of rows", "pass one head"
        )
    if f"torch.{stored.dtype}" != str(out.dtype) and not (stored.floating and out.dtype.is_floating_point):
        tensor = f"tensor {quoted(stored.name)} holds {stored.dtype}"
        raise UnsupportedError(f"{stored.path}: {tensor} and the model wants {out.dtype}; only floats are converted")
