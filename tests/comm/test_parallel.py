"""Groups along the axes of a mesh: on threads, on processes, and as the field writes it under torchrun."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardwright import initialize_model_parallel
from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.errors import UsageError
from shardwright.testing.ranks import on_processes, on_threads


def sums(group: Group) -> list[int]:
    """World ranks summed along each axis of 2 x 1 x 3."""
    made = initialize_model_parallel(2, 1, 3, world=group)
    mine = torch.tensor([group.rank])
    return [int(g.all_reduce(mine)) for g in (made.tensor, made.pipeline, made.data, made.world)]


@pytest.mark.parametrize("run", [on_threads, on_processes])
def test_each_axis_sums_its_own_line(run: object) -> None:
    assert callable(run)
    expected = [[4 * (rank // 2) + 1, rank, 6 + 3 * (rank % 2), 15] for rank in range(6)]
    assert run(6, sums) == expected


def test_axes_that_do_not_fill_the_job_are_refused() -> None:
    with pytest.raises(UsageError, match=r"8 x 1 x 1: the job has 1 ranks; start 8 ranks: torchrun --nproc-per-node 8"):
        initialize_model_parallel(8)
    with pytest.raises(UsageError, match="tensor=0: an axis"):
        initialize_model_parallel(0, world=SingleGroup())


SCRIPT = """
import torch
from shardwright import initialize_model_parallel

groups = initialize_model_parallel(3)
total = groups.tensor.all_reduce(torch.tensor([groups.tensor.rank + 1]))
print(f"total {int(total)} of {groups.tensor.size}", flush=True)
groups.world.barrier()
"""


def test_a_script_under_torchrun_has_its_groups(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("total 6 of 3") == 3
