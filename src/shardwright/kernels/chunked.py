"""The fused matmuls cut into pieces: while a piece is on its way between the ranks, the next one multiplies.

Decides into how many pieces a product is cut, along which dim, and in which order collectives begin and are waited for;
all of it follows from what is alike on every rank, so that all enter the same collectives. What a piece computes is
`fused_reference`'s business, how it travels the group's.

Integers and what follows them are the reference's bits in any cut. A floating piece is the reference's to rounding: a
BLAS may pick another kernel for fewer columns. Where its bits are the same, so are those of the sum, on groups that sum
in rank order.
"""

from collections.abc import Generator, Iterable, Iterator
from math import prod

from torch import Tensor

from shardwright.comm.group import Group, Handle
from shardwright.kernels import fused_reference, quant
from shardwright.kernels.operands import Operands
from shardwright.kernels.quant import NIBBLES, FullQuant, WeightQuant
from shardwright.kernels.sibling_operands import NormOperands
from shardwright.layout.partition import Partition, Range

BLOCK = 16
"""Columns, or rows, at whose multiples pieces end where there are enough: a BLAS computes by blocks, and gives a block
mostly the same bits wherever it lies. Of 360 float32 products cut so, 356 had the whole's bits; of those cut anywhere,
307 (MKL)."""

PIECE = 4 << 20
"""Bytes of a piece of the rule. Two ranks on two Xeon cores: gloo sums 1.0 GB/s of tensors up to 4 MiB, 0.6 of larger
ones, and a piece costs 0.5 ms beside its bytes, which smaller ones do not win back (benchmarks/NOTES.md)."""

Journey = Generator[Handle, Tensor, None]
"""A piece from its product to its place in the output. Yields each collective once it has begun, is sent its result."""

Piece = tuple[Operands, tuple[int, int, int]]
"""A call of its own, and its place in the output `[m, n]`: dim, start, width."""


def matmul_all_reduce(operands: Operands, group: Group) -> Tensor:
    """As the reference, in `operands.turns` pieces, fewer where the dim cut is shorter; 0: as many as the rule says."""
    y = operands.x1.new_empty(operands.shape, dtype=operands.dtype)
    places = y.flatten(0, -2)
    _overlapped(_journey(piece, places.narrow(*where), group) for piece, where in _pieces(operands))
    return y


def matmul_all_reduce_add_rms_norm(operands: NormOperands, group: Group) -> tuple[Tensor, Tensor]:
    """As the reference, with a chunked `matmul_all_reduce`."""
    return fused_reference.normed(matmul_all_reduce(operands.product, group), operands)


# ---- the order of things


def _overlapped(journeys: Iterable[Journey]) -> None:
    """Begin each journey, and only then take those before it one leg further, the oldest first.

    So a leg has the next piece's product to hide behind, and no more pieces are under way than a journey has legs and
    one.
    """
    under_way: list[tuple[Journey, Handle]] = []
    for journey in journeys:
        begun = journey, next(journey)
        under_way = [*_advanced(under_way), begun]
    while under_way:
        under_way = _advanced(under_way)


def _advanced(under_way: list[tuple[Journey, Handle]]) -> list[tuple[Journey, Handle]]:
    going = []
    for journey, handle in under_way:
        try:
            going.append((journey, journey.send(handle.wait())))
        except StopIteration:
            continue
    return going


# ---- how a piece travels


def _journey(piece: Operands, place: Tensor, group: Group) -> Journey:
    match piece.quant:
        case FullQuant(wire=(_, _) as wire) as full:
            return _over_int8(piece, full, wire, place, group)
        case _:
            return _summed(piece, place, group)


def _summed(piece: Operands, place: Tensor, group: Group) -> Journey:
    partial = fused_reference.partial(piece)
    out = place if place.is_contiguous() else partial  # a group would give another layout one more copy
    total = yield group.all_reduce_async(partial, out=out, tag=piece.tag)
    if out is partial:
        place.copy_(total)


def _over_int8(piece: Operands, full: FullQuant, wire: tuple[Tensor, Tensor], place: Tensor, group: Group) -> Journey:
    first, second = (scale.float().flatten() for scale in wire)
    rows = fused_reference.leaving(fused_reference.dequantised(piece, full), first, group.size)
    even = [len(rows) // group.size] * group.size
    parts = yield group.all_to_all_async(rows, even, even, tag=piece.tag)
    mine = fused_reference.returning(parts, first / second, group.size)
    whole = yield group.all_gather_async(mine, 0, even, tag=piece.tag)
    place.copy_(fused_reference.arrived(whole, second, place.shape))


# ---- cuts


def turns_for(operands: Operands) -> int:
    """The cost rule: as many pieces as the output has `PIECE`s.

    It does not look at k, of which each rank has a share of its own: all have to come to one number.
    """
    wide = 1 if operands.mode == "int8-wire" else operands.dtype.itemsize
    return max(1, operands.elements * wide // PIECE)


def _pieces(operands: Operands) -> Iterator[Piece]:
    """The call cut along the longer of m and n, so that what is packed or read again for each piece is the shorter.

    int8 on the wire is cut along n alone: its rows are dealt out, and padded for that.
    """
    flat, count = _flat(operands), operands.turns or turns_for(operands)
    m, n = flat.shape
    return _by_rows(flat, count) if m > n and flat.mode != "int8-wire" else _by_columns(flat, count)


def _flat(operands: Operands) -> Operands:
    """The same call with x1 `[m, k_r]`."""
    x3 = operands.x3 if operands.x3 is None else operands.x3.flatten(0, -2)
    shape = prod(operands.shape[:-1]), operands.shape[-1]
    return operands._replace(x1=operands.x1.flatten(0, -2), x3=x3, shape=shape)


def _by_columns(flat: Operands, count: int) -> Iterator[Piece]:
    """A weight is packed, and made floating, a piece at a time; an int8 x1 is widened once for all."""
    x1 = flat.x1.double() if isinstance(flat.quant, FullQuant) else flat.x1
    per_word = NIBBLES if isinstance(flat.quant, WeightQuant) and flat.quant.packed == "n" else 1
    for start, stop in _cuts(flat.shape[1], count, per_word):
        bias, x3 = (None if x is None else x[..., start:stop] for x in (flat.bias, flat.x3))
        x2 = flat.x2[:, start // per_word : stop // per_word]
        columns = flat.quant and flat.quant.columns(start, stop)
        shape = len(x1), stop - start
        yield flat._replace(x1=x1, x2=x2, bias=bias, x3=x3, quant=columns, shape=shape), (1, start, stop - start)


def _by_rows(flat: Operands, count: int) -> Iterator[Piece]:
    """The weight is widened, or made floating, once for all; a BLAS packs it once a piece."""
    match flat.quant:
        case FullQuant():
            x2 = flat.x2.double()
        case weight:
            x2 = quant.floating_weight(flat.x2, weight)
    for start, stop in _cuts(flat.shape[0], count):
        x3 = None if flat.x3 is None else flat.x3[start:stop]
        rows = flat.quant.rows(start, stop) if isinstance(flat.quant, FullQuant) else None
        shape = stop - start, flat.shape[1]
        yield flat._replace(x1=flat.x1[start:stop], x2=x2, x3=x3, quant=rows, shape=shape), (0, start, stop - start)


def _cuts(size: int, count: int, granule: int = 1) -> list[Range]:
    """`count` ranges of `size`, or as many as it has granules; one of nothing. At whole blocks, if it has as many."""
    granule = BLOCK if size >= count * BLOCK else granule
    parts = Partition.balanced(size, max(1, min(count, size // granule)), granule)
    return [parts.range(i) for i in range(parts.ranks)]
