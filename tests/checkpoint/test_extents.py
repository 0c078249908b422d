"""Which bytes hold a box: the reference is an array of byte numbers, sliced."""

from itertools import pairwise
from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardwright.checkpoint.entry import Block, Entry
from shardwright.checkpoint.extents import Box, chunks, covering, runs, volume

Case = tuple[tuple[int, ...], Box]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    starts = [draw(st.integers(0, size)) for size in shape]
    return shape, tuple((start, draw(st.integers(start, size))) for start, size in zip(starts, shape, strict=True))


@given(cases(), st.sampled_from(["float32", "int8"]))
def test_runs_are_the_box_and_never_touch(case: Case, dtype: str) -> None:
    shape, box = case
    entry = Entry("x", dtype, shape, 100, 0)
    size = entry.block.nbytes
    places = np.arange(prod(shape) * size).reshape(*shape, size) + 100
    wanted = places[tuple(slice(start, stop) for start, stop in box)].reshape(-1)
    found = list(runs(entry, box)) if volume(box) else []
    assert [at for run in found for at in range(*run)] == wanted.tolist()
    assert all(before[1] < after[0] for before, after in pairwise(found))


@given(cases(), st.integers(1, 40))
def test_chunks_tile_the_box_in_order(case: Case, limit: int) -> None:
    shape, box = case
    numbers = np.arange(prod(shape)).reshape(shape)
    parts = list(chunks(box, limit))
    assert all(0 < volume(part) <= limit for part in parts)
    found = [numbers[tuple(slice(*span) for span in part)].reshape(-1).tolist() for part in parts]
    wanted = numbers[tuple(slice(*span) for span in box)].reshape(-1).tolist()
    assert [at for part in found for at in part] == wanted


def test_covering_is_whole_blocks() -> None:
    block = Block(32, 20)
    assert covering(((3, 5), (31, 33)), block) == ((3, 5), (0, 2))
    assert covering(((3, 5), (32, 64)), block) == ((3, 5), (1, 2))
    assert covering(((3, 5), (33, 33)), block) == ((3, 5), (1, 1))
    assert covering((), block) == ()


def test_blocks_that_cover_a_row_join_into_one_run() -> None:
    """Columns 1 to 63 of 64 need every block of the row, so that the rows are neighbours."""
    entry = Entry("x", "q4_1", (4, 64), 1_000, 160)
    assert list(runs(entry, covering(((1, 4), (1, 63)), entry.block))) == [(1_040, 1_160)]
    assert list(runs(entry, covering(((1, 3), (1, 32)), entry.block))) == [(1_040, 1_060), (1_080, 1_100)]
