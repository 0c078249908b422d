"""`Piece`, `split_rows` and `boxes` on ranges of several parts."""

from hypothesis import given
from hypothesis import strategies as st

from shardwright.layout.spec import BYTES, Piece, TensorSpec, boxes, split_rows

INTERLEAVED = Piece(
    source="qkv",
    source_shape=(24, 5),
    source_ranges=(((4, 8), (16, 24)), ((1, 5),)),
    local_ranges=((6, 18), (0, 4)),
    holders=(1, 3),
    gradient="partial",
)


def test_boxes_cut_a_product_of_joined_ranges_into_plain_ones() -> None:
    assert list(boxes((((4, 8), (16, 24)), ((1, 3), (0, 1))))) == [
        (((4, 8), (1, 3)), ((0, 4), (0, 2))),
        (((4, 8), (0, 1)), ((0, 4), (2, 3))),
        (((16, 24), (1, 3)), ((4, 12), (0, 2))),
        (((16, 24), (0, 1)), ((4, 12), (2, 3))),
    ]
    assert list(boxes(())) == [((), ())]


def joined(dim: tuple[tuple[int, int], ...]) -> list[int]:
    return [index for start, stop in dim for index in range(start, stop)]


ranges = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)).map(lambda r: (r[0], r[0] + r[1])), max_size=3)


@given(st.lists(ranges.map(tuple), max_size=3).map(tuple))
def test_boxes_place_every_element_where_joining_puts_it(dims: tuple[tuple[tuple[int, int], ...], ...]) -> None:
    """Against joining each dim's ranges into one list of indices."""
    seen = set()
    for there, here in boxes(dims):
        for dim, (source, local) in enumerate(zip(there, here, strict=True)):
            assert joined(dims[dim])[slice(*local)] == list(range(*source))
        assert here not in seen or any(start == stop for start, stop in here)
        seen.add(here)


def test_split_rows_cuts_heads_that_lie_apart() -> None:
    """Twelve rows in two ranges of the source, by four: local boxes stay side by side, everything else is kept."""
    cut = split_rows(INTERLEAVED, 4)
    assert [piece.source_ranges for piece in cut] == [
        (((4, 8),), ((1, 5),)),
        (((16, 20),), ((1, 5),)),
        (((20, 24),), ((1, 5),)),
    ]
    assert [piece.local_ranges for piece in cut] == [((6, 10), (0, 4)), ((10, 14), (0, 4)), ((14, 18), (0, 4))]
    assert {(piece.holders, piece.gradient, piece.source_shape) for piece in cut} == {((1, 3), "partial", (24, 5))}
    assert sum(piece.numel for piece in cut) == INTERLEAVED.numel == 48


def test_replicas_share_a_key_and_nothing_else_does() -> None:
    first, second, third = split_rows(INTERLEAVED, 4)
    elsewhere = Piece("qkv", (24, 5), first.source_ranges, ((0, 4), (0, 4)), (1, 3))
    assert elsewhere.key == first.key
    assert len({first.key, second.key, third.key}) == 3


def test_a_spec_knows_its_bytes_and_takes_a_prefix() -> None:
    spec = TensorSpec((18, 4), "bfloat16", (INTERLEAVED,))
    assert spec.nbytes == 18 * 4 * 2
    renamed = spec.renamed("layers.0.attn.")
    assert [piece.source for piece in renamed.pieces] == ["layers.0.attn.qkv"]
    assert renamed.pieces[0].source_ranges == INTERLEAVED.source_ranges
    assert TensorSpec((0, 4), "float32", ()).nbytes == 0


def test_bytes_are_torchs() -> None:
    import torch

    assert {name: getattr(torch, name).itemsize for name in BYTES} == BYTES
