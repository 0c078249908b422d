"""Which of its two executions a decoder takes at decode: the compiled step, or torch, and then why. Needs no numba."""

from importlib.util import find_spec

import torch

from shardwright.comm.group import name_of
from shardwright.comm.single import SingleGroup
from shardwright.models.config import ModelConfig
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
    lacking = _lacking(model.config)
    if lacking:
        return f"the compiled step has no {lacking}"
    return None if _shares_memory(model) else f"ranks talk through {type(model.group).__name__}"


def _lacking(config: ModelConfig) -> str | None:
    """What this family has and the compiled step has not."""
    scaling = config.rope_scaling
    has = {
        "LayerNorm": config.norm == "layer",
        "norms by 1 + weight": config.norm == "rms_plus_one",
        "norms behind attention and MLP": config.block in ("post", "sandwich"),
        "attention and MLP side by side": config.block in ("parallel", "parallel_shared"),
        "MLP but SwiGLU": not config.gated or config.activation != "silu",
        "norms over all heads at once": config.wide_qk_norm,
        "soft limits": bool(config.score_cap or config.logit_cap),
        "other scale of scores": config.score_scale is not None,
        "scaled embeddings": config.embedding_scale != 1,
        "learned positions": config.learned_positions > 0,
        "second rotary base": config.local_rope_theta is not None,
        "angles that follow a text's length": scaling is not None and scaling.follows_length,
    }
    return next((what for what, there in has.items() if there), None)


def _shares_memory(model: Decoder) -> bool:
    if isinstance(model.group, SingleGroup):
        return True
    from shardwright.comm.shared_memory import SharedMemoryGroup  # imports numba

    return isinstance(model.group, SharedMemoryGroup)
