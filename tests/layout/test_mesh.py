"""The mesh: every rank has one place, lines partition the ranks, tensor neighbours are adjacent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.errors import UsageError
from shardwright.layout.mesh import AXES, Mesh, Place

AXIS = st.integers(1, 5)


@given(AXIS, AXIS, AXIS)
def test_places_and_ranks_are_inverse_and_lines_partition(tensor: int, pipeline: int, data: int) -> None:
    mesh = Mesh(tensor, pipeline, data)
    assert [mesh.rank(mesh.place(rank)) for rank in range(mesh.size)] == list(range(mesh.size))
    for axis in AXES:
        lines = {mesh.line(axis, rank) for rank in range(mesh.size)}
        assert sorted(rank for line in lines for rank in line) == list(range(mesh.size))
        assert {len(line) for line in lines} == {mesh.along(axis)}


def test_tensor_runs_fastest_and_data_slowest() -> None:
    mesh = Mesh(tensor=2, pipeline=3, data=4)
    assert mesh.line("tensor", 9) == (8, 9)
    assert mesh.line("pipeline", 9) == (7, 9, 11)
    assert mesh.line("data", 9) == (3, 9, 15, 21)
    assert mesh.place(9) == Place(tensor=1, pipeline=1, data=1)


def test_a_missing_axis_or_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="data=0: an axis of the mesh has at least one rank"):
        Mesh(2, 1, 0)
    with pytest.raises(UsageError, match="rank=4: the mesh has ranks 0…3"):
        Mesh(4).place(4)
