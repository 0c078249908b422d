"""What ranks measure: a figure for each, all above zero, alike in kind on threads as on processes."""

import pytest

from shardwright.comm.thread import ThreadGroup
from shardwright.profile import machine


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_has_its_figures(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ", 1 << 22)
    found = ThreadGroup.run(ranks, lambda group: machine.figures(group, seconds=0.01))
    assert [figures.rank for figures in found] == list(range(ranks))
    for figures in found:
        assert min(figures.bandwidth, figures.gemm, figures.small_s, figures.large_s) > 0
        assert figures.paced_s >= figures.small_s
