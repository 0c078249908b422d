"""Whether symmetric memory can reach a group's ranks: read off what torch says of its devices, here a recorded one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardwright.comm.single import SingleGroup
from shardwright.comm.symmetric import why_not_symmetric
from shardwright.comm.torch_group import TorchGroup


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchGroup]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield TorchGroup.of(dist.distributed_c10d._get_default_group())
    dist.destroy_process_group()


def devices(patch: pytest.MonkeyPatch, count: int, reaches: bool = True) -> None:
    said: dict[str, Any] = {
        "is_available": lambda: count > 0,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "can_device_access_peer": lambda here, there: reaches,
    }
    for name, answer in said.items():
        patch.setattr(torch.cuda, name, answer)


def test_each_thing_that_stands_in_the_way(world: TorchGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_symmetric(SingleGroup()) == "a SingleGroup has no process group"
    assert why_not_symmetric(world.split([0])) == "torch.distributed does not know its process group by name"
    devices(monkeypatch, 0)
    assert why_not_symmetric(world) == "this process sees no CUDA device"
    devices(monkeypatch, 2, reaches=False)
    assert why_not_symmetric(world) == "device 0 does not reach the memory of all others"
    devices(monkeypatch, 2)
    assert why_not_symmetric(world) is None
    world.size = 3
    assert why_not_symmetric(world) == "3 ranks are not on the 2 devices that this process sees"
