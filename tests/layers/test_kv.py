"""Pages: what is written where, and what is read back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.layers.batch import Batch
from shardwright.layers.kv import FreshKV, PagedKV

NONE = torch.empty(0, dtype=torch.int64)


def batch_of(lengths: tuple[int, ...], held: tuple[int, ...], tables: tuple[tuple[int, ...], ...] = ()) -> Batch:
    """Pages read lengths and tables only."""
    return Batch(NONE, NONE, lengths, held, tables)


def test_fresh_gives_each_sequence_its_own_rows() -> None:
    k, v = torch.randn(2, 5, 1, 2)
    parts = FreshKV().extend(batch_of((2, 0, 3), (2, 0, 3)), k, v)
    assert [len(keys) for keys, _ in parts] == [2, 0, 3]
    assert torch.equal(torch.cat([keys for keys, _ in parts]), k)
    assert torch.equal(torch.cat([values for _, values in parts]), v)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    page=st.integers(1, 7),
    steps=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=5),
    kv_heads=st.integers(0, 2),
)
def test_pages_give_back_all_that_was_written(page: int, steps: list[list[int]], kv_heads: int) -> None:
    """Three sequences growing side by side, against plain concatenation; bit for bit, since nothing is computed.

    Pages are given out as they are needed, so that neighbours in a text lie apart, and the store grows as it goes.
    """
    store = PagedKV(page, kv_heads, 2, torch.float32)
    tables: list[list[int]] = [[], [], []]
    written: list[tuple[torch.Tensor, torch.Tensor]] = [(torch.empty(0, kv_heads, 2),) * 2] * 3
    pages = value = 0
    for lengths in steps:
        k = torch.arange(value, value + sum(lengths)).float()[:, None, None].expand(-1, kv_heads, 2)
        value += sum(lengths)
        at = 0
        for i, length in enumerate(lengths):
            new = k[at : at + length]
            written[i] = torch.cat((written[i][0], new)), torch.cat((written[i][1], -new))
            at += length
            while len(tables[i]) * page < len(written[i][0]):
                tables[i].append(pages)
                pages += 1
        store.grow(pages)
        held = tuple(len(keys) for keys, _ in written)
        found = store.extend(batch_of(tuple(lengths), held, tuple(map(tuple, tables))), k, -k)
        each = [pair for ks, vs in found for pair in (zip(ks, vs, strict=True) if ks.dim() == 4 else [(ks, vs)])]
        for ours, theirs in zip(each, written, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])


def test_one_page_a_sequence_is_read_in_place() -> None:
    store = PagedKV(4, 1, 2, torch.float32, pages=2)
    [(keys, _)] = store.extend(batch_of((3,), (3,), ((1,),)), torch.ones(3, 1, 2), torch.ones(3, 1, 2))
    assert keys.data_ptr() == store.k[1].data_ptr()
    assert keys.shape == (3, 1, 2)


def test_growing_keeps_what_is_there_and_at_least_doubles() -> None:
    store = PagedKV(1, 1, 1, torch.float32, pages=3)
    store.k.fill_(7)
    store.grow(3)
    assert len(store.k) == 3
    store.grow(4)
    assert len(store.k) == len(store.v) == 6
    assert bool((store.k[:3] == 7).all())
    store.grow(50)
    assert len(store.k) == 50
