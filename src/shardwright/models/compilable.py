"""Which models the compiled decode step computes, by their config alone, and what follows. No torch, no numba."""

from shardwright.models.config import ModelConfig


def lacking_in_compiled(config: ModelConfig) -> str | None:
    """What this model has and the compiled step has not, in a few words for people; None where nothing is lacking."""
    scaling = config.rope_scaling
    has = {
        "LayerNorm": config.norm == "layer",
        "norms by 1 + weight": config.norm == "rms_plus_one",
        "norms behind attention and MLP": config.block in ("post", "sandwich"),
        "attention and MLP side by side": config.block in ("parallel", "parallel_shared"),
        "MLP but SwiGLU": not config.gated or config.activation != "silu",
        "norms over all heads at once": config.wide_qk_norm,
        "a norm for each head": config.own_qk_norm,
        "norms rounded once": config.norm == "rms_once",
        "soft limits": bool(config.score_cap or config.logit_cap),
        "other scale of scores": config.score_scale is not None,
        "scaled embeddings": config.embedding_scale != 1,
        "learned positions": config.learned_positions > 0,
        "positions as biases of scores": config.alibi,
        "second rotary base": config.local_rope_theta is not None,
        "angles that follow a text's length": scaling is not None and scaling.follows_length,
    }
    return next((f"the compiled step has no {what}" for what, there in has.items() if there), None)


def kv_dtype(config: ModelConfig) -> str:
    """The type of keys and values: that of the weights, but float32 for the compiled step, which rounds none."""
    compiled = config.dtype in ("float32", "bfloat16") and lacking_in_compiled(config) is None
    return "float32" if compiled else config.dtype
