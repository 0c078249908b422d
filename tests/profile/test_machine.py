"""What ranks measure: a figure for each, all above zero, alike in kind on threads as on processes."""

import pytest

from shardwright.comm.thread import ThreadGroup
from shardwright.profile import machine


def test_every_rank_has_its_figures_of_every_count_it_is_among(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ", 1 << 22)
    monkeypatch.setattr(machine, "DEALT", 1 << 12)
    each = ThreadGroup.run(3, lambda group: machine.figures(group, [1, 2, 3], long=0.0, window=0.001))
    assert [list(found) for found in each] == [[1, 2, 3], [2, 3], [3]]
    for rank, found in enumerate(each):
        for figures in found.values():
            assert figures.rank == rank
            assert min(figures.bandwidth, figures.gemm, figures.small_s, figures.large_s) > 0
            assert figures.paced_s >= figures.small_s
