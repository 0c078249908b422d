"""Which of its two executions a decoder takes at decode: the compiled step, or torch, and then why. Needs no numba."""

from importlib.util import find_spec

import torch

from shardwright.comm.group import name_of
from shardwright.comm.single import SingleGroup
from shardwright.models.compilable import lacking_in_compiled
from shardwright.models.decoder import Decoder


def obstacle(model: Decoder) -> str | None:
    """Why this model has no compiled step here, in a few words for people; None where it has one."""
    weight = model.embedding.weight
    if find_spec("numba") is None:
        return "numba is not installed"
    if weight.device.type != "cpu":
        return f"ranks on {weight.device.type}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"{name_of(weight.dtype)} weights"
    lacking = lacking_in_compiled(model.config)
    if lacking:
        return lacking
    return None if _shares_memory(model) else f"ranks talk through {type(model.group).__name__}"


def _shares_memory(model: Decoder) -> bool:
    if isinstance(model.group, SingleGroup):
        return True
    from shardwright.comm.shared_memory import SharedMemoryGroup  # imports numba

    return isinstance(model.group, SharedMemoryGroup)
