"""What a rank holds of each kind of parallel layer: the one statement of how each is sharded.

Every function takes whole sizes, the cuts and a rank, and returns that rank's `Specs`, keyed by the layer's own
parameter names. The layers are built from these tables, and the tables of whole models are joined from them. Source
names are the layer's own (`weight`, `q.weight`, `1.weight`); a model puts its checkpoint's names in their place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shardwright.layout.heads import HeadPartition
from shardwright.layout.partition import Partition, Range
from shardwright.layout.spec import Gradient, Piece, Specs, TensorSpec

DTYPE = "float32"


def replicated(
    sizes: Mapping[str, tuple[int, ...]], ranks: int, *, gradient: Gradient = "whole", dtype: str = DTYPE
) -> Specs:
    """Parameters every rank holds whole. `partial` where each rank sees only its share of what uses them."""
    everyone = tuple(range(ranks))
    if ranks == 1:
        gradient = "whole"
    return {
        name: TensorSpec(shape, dtype, (Piece(name, shape, _whole(shape), _box(shape), everyone, gradient=gradient),))
        for name, shape in sizes.items()
    }


def column_linear(in_features: int, out: Partition, rank: int, *, bias: bool, dtype: str = DTYPE) -> Specs:
    """Weight `[O, I]` cut by rows: `w_r [O_r, I]`."""
    return _rows(in_features, {"": out}, rank, bias=bias, dtype=dtype)


def merged_column_linear(
    in_features: int, outs: Sequence[Partition], rank: int, *, bias: bool, dtype: str = DTYPE
) -> Specs:
    """Several weights `[O, I]`, each cut by rows, one after another: `w_r [sum O_r, I]`; sources `0.weight`, …."""
    return _rows(in_features, {f"{index}.": out for index, out in enumerate(outs)}, rank, bias=bias, dtype=dtype)


def _rows(in_features: int, parts: dict[str, Partition], rank: int, *, bias: bool, dtype: str) -> Specs:
    widths = [out.widths[rank] for out in parts.values()]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    specs: Specs = {}
    for name, columns in (("weight", (in_features,)), *((("bias", ()),) if bias else ())):
        pieces = tuple(
            Piece(
                f"{prefix}{name}",
                (out.size, *columns),
                ((out.range(rank),), *_whole(columns)),
                ((start, start + width), *_box(columns)),
                (rank,),
            )
            for (prefix, out), start, width in zip(parts.items(), starts, widths, strict=True)
            if width
        )
        specs[name] = TensorSpec((sum(widths), *columns), dtype, pieces)
    return specs


def row_linear(
    in_features: Partition,
    out_features: int,
    rank: int,
    *,
    bias: bool,
    gradient: Gradient = "whole",
    dtype: str = DTYPE,
) -> Specs:
    """Weight `[O, I]` cut by columns: `w_r [O, I_r]`; the bias is whole on every rank and added once.

    gradient: of the bias, `partial` where each rank adds it to its own rows only.
    """
    whole = (out_features, in_features.size)
    local = (out_features, in_features.widths[rank])
    piece = Piece("weight", whole, (((0, out_features),), (in_features.range(rank),)), _box(local), (rank,))
    specs = {"weight": TensorSpec(local, dtype, (piece,) if local[1] else ())}
    if bias:
        specs |= replicated({"bias": (out_features,)}, in_features.ranks, gradient=gradient, dtype=dtype)
    return specs


def vocab_table(vocabulary: Partition, hidden: int, rank: int, *, dtype: str = DTYPE) -> Specs:
    """A table `[V, H]` (embedding or head) cut by rows of the vocabulary: `w_r [V_r, H]`."""
    return column_linear(hidden, vocabulary, rank, bias=False, dtype=dtype)


def qkv_linear(
    in_features: int, heads: HeadPartition, head_size: int, rank: int, *, bias: bool, dtype: str = DTYPE
) -> Specs:
    """Fused projections `[(N_r + 2 K_r) D, H]`: this rank's query heads, then the KV heads they need.

    One piece for the query rows and one for each KV head, of k then of v: KV heads have holders of their own. The
    gradient of a replicated KV head is partial, since each holder sees only its own query heads.
    """
    first, last = heads.kv_range(rank)
    count = last - first
    queries = heads.query.times(head_size)
    specs: Specs = {}
    for name, columns in (("weight", (in_features,)), *((("bias", ()),) if bias else ())):
        pieces = [
            Piece(
                f"q.{name}",
                (queries.size, *columns),
                ((queries.range(rank),), *_whole(columns)),
                ((0, queries.widths[rank]), *_box(columns)),
                (rank,),
            )
        ]
        at = queries.widths[rank]
        for part in ("k", "v"):
            for head in range(first, last):
                holders = heads.kv_holders(head)
                pieces.append(
                    Piece(
                        f"{part}.{name}",
                        (heads.kv_heads * head_size, *columns),
                        (((head * head_size, (head + 1) * head_size),), *_whole(columns)),
                        ((at, at + head_size), *_box(columns)),
                        holders,
                        gradient="partial" if len(holders) > 1 else "whole",
                    )
                )
                at += head_size
        rows = queries.widths[rank] + 2 * count * head_size
        specs[name] = TensorSpec((rows, *columns), dtype, tuple(pieces) if rows else ())
    return specs


def qk_norm(heads: HeadPartition, head_size: int, rank: int, *, dtype: str = DTYPE) -> Specs:
    """Norm weights of all heads, `[(N_r + K_r) D]`: this rank's query heads, then its KV heads; `q.weight`, `k.weight`.

    Pieces, holders and gradients are those of a bias of `qkv_linear`, less its v.
    """
    bias = qkv_linear(1, heads, head_size, rank, bias=True, dtype=dtype)["bias"]
    rows = (heads.query.widths[rank] + heads.kv_width(rank)) * head_size
    pieces = tuple(
        replace(piece, source=piece.source.replace("bias", "weight"))
        for piece in bias.pieces
        if not piece.source.startswith("v.")
    )
    return {"weight": TensorSpec((rows,), dtype, pieces)}


def within_fused(piece: Piece, part: int, sizes: Sequence[int], groups: int = 1) -> Piece:
    """The same rows of a tensor that holds several parts fused.

    sizes: rows of each part, in their order · part: which of them the piece is of · groups: blocks the tensor is made
    of, each with its share of every part (GPT-NeoX: one a head; Falcon: one a KV head); 1 has whole parts end to end.
    """
    shares = [size // groups for size in sizes]
    block, share, first = sum(shares), shares[part], sum(shares[:part])
    ranges: list[Range] = []
    for low, high in piece.source_ranges[0]:
        while low < high:
            group, inside = divmod(low, share)
            stop = min(high, (group + 1) * share)
            at = group * block + first + inside
            joins = ranges and ranges[-1][1] == at
            ranges[-1 if joins else len(ranges) :] = [(ranges[-1][0] if joins else at, at + stop - low)]
            low = stop
    return replace(
        piece,
        source_shape=(sum(sizes), *piece.source_shape[1:]),
        source_ranges=(tuple(ranges), *piece.source_ranges[1:]),
    )


def transposed(piece: Piece) -> Piece:
    """The same piece of a checkpoint that keeps the tensor with its dims swapped."""
    return replace(
        piece,
        source_shape=piece.source_shape[::-1],
        source_ranges=piece.source_ranges[::-1],
        transform="transpose",
    )


def _box(shape: Sequence[int]) -> tuple[Range, ...]:
    return tuple((0, size) for size in shape)


def _whole(shape: Sequence[int]) -> tuple[tuple[Range, ...], ...]:
    return tuple(((0, size),) for size in shape)
