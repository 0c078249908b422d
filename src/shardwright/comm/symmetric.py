"""Torch's symmetric memory: whether its operators can reach the ranks of a group.

Unproven: never run on devices that have it.
"""

from importlib import import_module

import torch

from shardwright.comm.group import Group
from shardwright.comm.torch_group import TorchGroup


def why_not_symmetric(group: Group) -> str | None:
    """What stands in the way. After None `torch.ops.symm_mem` is registered and knows the group by its `name`.

    Ranks of one host whose devices reach each other's memory are served; rank i need not sit on device i.
    """
    if not isinstance(group, TorchGroup):
        return f"a {type(group).__name__} has no process group"
    if not group.is_named():
        return "torch.distributed does not know its process group by name"
    if not torch.cuda.is_available():
        return "this process sees no CUDA device"
    devices = torch.cuda.device_count()
    if group.size > devices:
        return f"{group.size} ranks are not on the {devices} devices that this process sees"
    here = torch.cuda.current_device()
    if not all(torch.cuda.can_device_access_peer(here, there) for there in range(devices) if there != here):
        return f"device {here} does not reach the memory of all others"
    import_module("torch.distributed._symmetric_memory")  # which registers the operators
    return None
