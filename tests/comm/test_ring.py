"""The ring against the group's own collectives, and its cost: what is sent is counted, steps and bytes."""

from typing import Any

import pytest
import torch

from shardwright.comm.group import Group
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.ring import ring_all_gather, ring_reduce_scatter
from shardwright.comm.thread import ThreadGroup
from shardwright.layout.partition import Partition
from shardwright.testing.ranks import on_processes, on_threads

WIDTHS = [0, 1, 7, 40]


def check_ring(group: Group) -> None:
    """Whole numbers, so that every order of summation gives the same bits; gathering moves no arithmetic at all."""
    for width in WIDTHS:
        for dim in (0, 1, -1):
            sizes = Partition.remainder_last(width, group.size).widths
            whole = (torch.arange(width * 3.0) % 11).view((width, 3) if dim == 0 else (3, width))
            part = whole.narrow(dim, sum(sizes[: group.rank]), sizes[group.rank])
            assert torch.equal(ring_all_gather(group, part, dim, sizes), whole)
            mine = whole * (group.rank + 1)
            expected = group.reduce_scatter(mine, dim, sizes)
            assert torch.equal(ring_reduce_scatter(group, mine, dim, sizes), expected)
            assert torch.equal(mine, whole * (group.rank + 1)), "inputs are left untouched"
    group.end_step()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_threads(ranks: int) -> None:
    on_threads(ranks, check_ring)


def test_processes() -> None:
    on_processes(3, check_ring)


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("collective", [ring_all_gather, ring_reduce_scatter])
def test_a_rank_sends_every_share_but_one_in_one_step_each(ranks: int, collective: Any) -> None:
    """Uneven shares of 17 rows: R - 1 sends, and in all the bytes of 17 rows less one share a rank."""
    sizes = Partition.balanced(17, ranks).widths

    def sent(group: ThreadGroup) -> list[int]:
        recorder = RecordingGroup(group)
        rows = sizes[group.rank] if collective is ring_all_gather else 17
        collective(recorder, torch.ones(rows, 2), 0, sizes, tag="ring")
        assert {call.op for call in recorder.calls} == {"send", "recv"}
        assert {call.tag for call in recorder.calls} == {"ring"}
        return [call.bytes for call in recorder.calls if call.op == "send"]

    for rank, payloads in enumerate(ThreadGroup.run(ranks, sent)):
        left_out = (rank + 1) % ranks if collective is ring_all_gather else rank
        assert len(payloads) == ranks - 1
        assert sum(payloads) == (17 - sizes[left_out]) * 2 * 4
