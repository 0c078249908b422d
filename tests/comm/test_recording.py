"""`RecordingGroup` lists what it was asked; `PlannedGroup` gives real shapes without peers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.comm.group import Call, Group
from shardwright.comm.planned import PlannedGroup
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.testing.ranks import on_threads


def everything(group: Group) -> list[Tensor]:
    """Each collective once, on uneven widths, on whatever device is the default."""
    sizes, n = [rank % 3 for rank in range(group.size)], group.size
    x = torch.ones(5, 4, dtype=torch.bfloat16)
    right, left = (group.rank + 1) % n, (group.rank - 1) % n
    results = [
        group.all_reduce(x, tag="a"),
        group.all_reduce(x, out=x, tag="a"),
        group.all_gather(x[:, : sizes[group.rank]].repeat(1, 2), -1, [2 * s for s in sizes], tag="b"),
        group.reduce_scatter(torch.ones(sum(sizes), 3), 0, sizes, tag="c"),
        group.all_to_all(x[:1].repeat(n, 1), [1] * n, [1] * n, tag="d"),
        group.broadcast(x, n - 1, tag="e"),
    ]
    if n > 1:
        results += [group.send(x, right, tag="f"), group.recv(x.shape, x.dtype, left, tag="f")]
    group.barrier(tag="g")
    half = group.split([rank for rank in range(n) if rank % 2 == group.rank % 2])
    return [*results, half.all_reduce(x.double(), tag="h")]


def shapes_and_calls(group: Group) -> Any:
    recorder = RecordingGroup(group)
    results = everything(recorder)
    return [(list(x.shape), x.dtype, x.stride()) for x in results], recorder.calls


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_planned_group_gives_the_shapes_and_calls_of_a_real_one(n: int) -> None:
    real = on_threads(n, shapes_and_calls)
    for rank in range(n):
        with torch.device("meta"):
            planned = shapes_and_calls(PlannedGroup(rank, n))
        assert planned == real[rank]


def test_results_of_a_planned_group_stay_on_meta() -> None:
    with torch.device("meta"):
        assert {x.device.type for x in everything(PlannedGroup(1, 3))} == {"meta"}


def test_a_planned_split_knows_its_place() -> None:
    child = PlannedGroup(4, 6).split([4, 0, 2])
    assert (child.rank, child.size) == (2, 3)


def test_calls_are_listed_in_order_with_payload_bytes_and_tags() -> None:
    """Rank 1 of 3: bytes are those it hands over, widths being 0, 1, 2."""
    calls = on_threads(3, shapes_and_calls)[1][1]
    assert calls == [
        Call("all_reduce", 40, "bfloat16", "a", "shape [5, 4]"),
        Call("all_reduce", 40, "bfloat16", "a", "shape [5, 4]"),
        Call("all_gather", 20, "bfloat16", "b", "shape [5, 0+2+4]"),
        Call("reduce_scatter", 36, "float32", "c", "shape [0+1+2, 3]"),
        Call("all_to_all", 24, "bfloat16", "d", "rows of [4]"),
        Call("broadcast", 40, "bfloat16", "e", "shape [5, 4], root 2"),
        Call("send", 40, "bfloat16", "f", "shape [5, 4], to rank 2"),
        Call("recv", 0, "bfloat16", "f", "shape [5, 4], from rank 0"),
        Call("barrier", 0, "int8", "g"),
        Call("all_reduce", 160, "float64", "h", "shape [5, 4]"),
    ]


def test_asynchronous_calls_are_recorded_when_issued() -> None:
    recorder = RecordingGroup(SingleGroup())
    handle = recorder.all_reduce_async(torch.ones(2), tag="soon")
    assert [call.tag for call in recorder.calls] == ["soon"]
    assert handle.wait().tolist() == [1, 1]
    assert len(recorder.calls) == 1
    recorder.end_step()
