"""The tables of each kind of layer: over all ranks they tile every parameter and every source exactly once."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from shardwright.layout.heads import HeadPartition
from shardwright.layout.partition import Partition, Range
from shardwright.layout.sharding import (
    column_linear,
    merged_column_linear,
    qk_norm,
    qkv_linear,
    replicated,
    row_linear,
    transposed,
    vocab_table,
    within_fused,
)
from shardwright.layout.spec import Piece, Specs, boxes, stored_bytes

Cell = tuple[int, ...]
ranks = st.integers(1, 6)
widths = st.integers(0, 7)


def cells(box: tuple[Range, ...]) -> Iterable[Cell]:
    return product(*(range(*dim) for dim in box))


def placed(piece: Piece) -> dict[Cell, Cell]:
    """Element by element: cell of the parameter → cell of the source."""
    corner = [start for start, _ in piece.local_ranges]
    found: dict[Cell, Cell] = {}
    for there, here in boxes(piece.source_ranges):
        moved = tuple((start + at, stop + at) for (start, stop), at in zip(here, corner, strict=True))
        found.update(zip(cells(moved), cells(there), strict=True))
    return found


def contents(table: Specs, name: str) -> dict[Cell, tuple[str, Cell]]:
    """What each cell of one rank's parameter holds, by source and cell there; each cell must be filled once."""
    found: dict[Cell, tuple[str, Cell]] = {}
    for piece in table[name].pieces:
        filled = placed(piece)
        assert set(filled) == set(cells(piece.local_ranges)), "a piece fills its own box, and nothing else"
        assert piece.numel == len(filled)
        assert not found.keys() & filled.keys(), "two pieces fill the same cell"
        found.update({cell: (piece.source, source) for cell, source in filled.items()})
    return found


def check_tables(tables: list[Specs], sources: dict[str, tuple[int, ...]]) -> None:
    """All the rules of `Piece`, with nothing but loops over single elements."""
    written: Counter[tuple[str, Cell]] = Counter()
    held: dict[tuple[str, Cell], set[int]] = {}
    for rank, table in enumerate(tables):
        for name, spec in table.items():
            found = contents(table, name)
            assert set(found) == set(cells(tuple((0, size) for size in spec.shape)))
            for piece in spec.pieces:
                assert piece.source_shape == sources[piece.source]
                assert rank in piece.holders
                assert list(piece.holders) == sorted(set(piece.holders))
                elements = [(piece.source, source) for source in placed(piece).values()]
                for element in elements:
                    held.setdefault(element, set()).add(rank)
                if piece.holders[0] == rank:
                    written.update(elements)
    everything = {(name, cell) for name, shape in sources.items() for cell in cells(tuple((0, n) for n in shape))}
    assert written == Counter(everything), "the lowest holders write every element of every source once"
    for rank, table in enumerate(tables):
        for spec in table.values():
            for piece in spec.pieces:
                for source in placed(piece).values():
                    assert held[piece.source, source] == set(piece.holders), f"rank {rank}: {piece}"


@given(st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(1, 4), max_size=2).map(tuple)), ranks)
def test_replicated(shapes: dict[str, tuple[int, ...]], n: int) -> None:
    tables = [replicated(shapes, n) for _ in range(n)]
    check_tables(tables, shapes)
    assert {piece.gradient for table in tables for spec in table.values() for piece in spec.pieces} <= {"whole"}
    assert {
        piece.gradient
        for spec in replicated(shapes, n, gradient="partial", dtype="bfloat16").values()
        for piece in spec.pieces
    } <= {"partial" if n > 1 else "whole"}


@given(st.integers(1, 4), st.lists(widths, min_size=1, max_size=3), ranks, st.booleans())
def test_merged_column_linear(columns: int, outs: list[int], n: int, bias: bool) -> None:
    """Parts one after another, of which one may be all; `column_linear` is one part under plain names."""
    cuts = [Partition.balanced(out, n) for out in outs]
    tables = [merged_column_linear(columns, cuts, rank, bias=bias) for rank in range(n)]
    alone = column_linear(columns, cuts[0], 0, bias=bias)["weight"]
    assert alone.renamed("0.") == merged_column_linear(columns, cuts[:1], 0, bias=bias)["weight"]
    sources = {}
    for index, out in enumerate(outs):
        sources[f"{index}.weight"] = (out, columns)
        if bias:
            sources[f"{index}.bias"] = (out,)
    check_tables(tables, sources)
    for rank, table in enumerate(tables):
        assert table["weight"].shape == (sum(cut.widths[rank] for cut in cuts), columns)
        assert ("bias" in table) == bias
        rows = [contents(table, "weight")[row, 0] for row in range(table["weight"].shape[0])]
        assert rows == [
            (f"{index}.weight", (row, 0)) for index, cut in enumerate(cuts) for row in range(*cut.range(rank))
        ]


@given(widths, st.integers(1, 4), ranks, st.booleans())
def test_row_linear(columns: int, rows: int, n: int, bias: bool) -> None:
    """Cut by columns; the bias is whole everywhere."""
    cut = Partition.remainder_last(columns, n)
    tables = [row_linear(cut, rows, rank, bias=bias) for rank in range(n)]
    check_tables(tables, {"weight": (rows, columns)} | ({"bias": (rows,)} if bias else {}))
    for rank, table in enumerate(tables):
        assert table["weight"].shape == (rows, cut.widths[rank])
        assert not bias or table["bias"].shape == (rows,)


@given(widths, st.integers(1, 4), ranks)
def test_vocab_table(words: int, hidden: int, n: int) -> None:
    check_tables(
        [vocab_table(Partition.balanced(words, n), hidden, rank) for rank in range(n)], {"weight": (words, hidden)}
    )


heads = st.tuples(st.integers(1, 3), st.integers(1, 4)).map(lambda pair: (pair[0] * pair[1], pair[0]))


@given(heads, st.integers(1, 3), st.integers(1, 2), st.integers(1, 14), st.booleans())
def test_qkv_linear(counts: tuple[int, int], size: int, columns: int, n: int, bias: bool) -> None:
    """Also above the head count; a replicated KV head's gradient is partial, a single holder's whole."""
    cut = HeadPartition.balanced(*counts, n)
    tables = [qkv_linear(columns, cut, size, rank, bias=bias) for rank in range(n)]
    rows = {"q": counts[0] * size, "k": counts[1] * size, "v": counts[1] * size}
    sources: dict[str, tuple[int, ...]] = {f"{part}.weight": (count, columns) for part, count in rows.items()}
    check_tables(tables, sources | ({f"{part}.bias": (count,) for part, count in rows.items()} if bias else {}))
    for rank, table in enumerate(tables):
        expected = [("q", row) for row in range(*cut.query.times(size).range(rank))]
        first, last = cut.kv_range(rank)
        for part in ("k", "v"):
            expected += [(part, row) for row in range(first * size, last * size)]
        found = contents(table, "weight")
        assert [found[row, 0] for row in range(len(expected))] == [(f"{p}.weight", (row, 0)) for p, row in expected]
        for spec in table.values():
            for piece in spec.pieces:
                straddles = piece.source[0] != "q" and len(piece.holders) > 1
                assert piece.gradient == ("partial" if straddles else "whole")


def test_stored_bytes_by_hand() -> None:
    """6 heads over 2 KV heads on 4 ranks, D 2, H 3, bfloat16: query heads 2, 2, 1, 1.

    Rank 1 has query heads 2 and 3, so both KV heads; KV head 0 is on ranks 0, 1 and KV head 1 on ranks 1, 2, 3. The
    model has (6 + 2 + 2) x 2 rows; replicas are one more k and v head on rank 1 (head 0) and on ranks 2 and 3 (head 1).
    """
    cut = HeadPartition.balanced(6, 2, 4)
    tables = [qkv_linear(3, cut, 2, rank, bias=False, dtype="bfloat16") for rank in range(4)]
    row = 3 * 2
    assert stored_bytes(tables) == ((6 + 2 + 2) * 2 * row, 3 * 2 * 2 * row)
    assert sum(spec.nbytes for table in tables for spec in table.values()) == sum(stored_bytes(tables))


@given(heads, ranks)
def test_stored_bytes_of_model_and_replicas_are_what_the_ranks_hold(counts: tuple[int, int], n: int) -> None:
    tables = [
        qkv_linear(2, HeadPartition.balanced(*counts, n), 2, rank, bias=True) | replicated({"norm": (5,)}, n)
        for rank in range(n)
    ]
    model, replicas = stored_bytes(tables)
    assert (
        model
        == stored_bytes(
            [qkv_linear(2, HeadPartition.balanced(*counts, 1), 2, 0, bias=True) | replicated({"norm": (5,)}, 1)]
        )[0]
    )
    assert model + replicas == sum(spec.nbytes for table in tables for spec in table.values())


@given(cut=ranks, groups=st.integers(1, 4), shares=st.lists(st.integers(1, 3), min_size=1, max_size=3), data=st.data())
def test_fused_parts_are_found_where_they_lie(cut: int, groups: int, shares: list[int], data: st.DataObject) -> None:
    """Against the fused tensor written out row by row: for each group its share of every part, in order."""
    part = data.draw(st.integers(0, len(shares) - 1))
    rows = [(p, group * share + at) for group in range(groups) for p, share in enumerate(shares) for at in range(share)]
    sizes = [share * groups for share in shares]
    partition = Partition.balanced(sizes[part], cut)
    for rank in range(cut):
        for piece in column_linear(2, partition, rank, bias=False)["weight"].pieces:
            fused = within_fused(piece, part, sizes, groups)
            assert fused.source_shape == (len(rows), 2)
            taken = [rows[at] for start, stop in fused.source_ranges[0] for at in range(start, stop)]
            assert taken == [(part, at) for at in range(*partition.range(rank))]
            assert all(before[1] < after[0] for before, after in pairwise(fused.source_ranges[0]))
            assert (fused.local_ranges, fused.source_ranges[1]) == (piece.local_ranges, piece.source_ranges[1])


def test_a_transposed_piece_has_its_dims_swapped() -> None:
    [piece] = column_linear(5, Partition.balanced(7, 2), 1, bias=False)["weight"].pieces
    swapped = transposed(piece)
    assert (swapped.source_shape, swapped.source_ranges) == ((5, 7), (((0, 5),), ((4, 7),)))
    assert (swapped.local_ranges, swapped.transform) == (piece.local_ranges, "transpose")


@given(cut=ranks, group=st.integers(1, 3), kv_heads=st.integers(1, 4), size=st.integers(1, 3))
def test_norms_of_all_heads(cut: int, group: int, kv_heads: int, size: int) -> None:
    """Holders and gradients as of a bias of q and k."""
    heads = HeadPartition.balanced(group * kv_heads, kv_heads, cut)
    tables = [qk_norm(heads, size, rank) for rank in range(cut)]
    check_tables(tables, {"q.weight": (heads.heads * size,), "k.weight": (kv_heads * size,)})
