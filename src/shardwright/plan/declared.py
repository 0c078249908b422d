"""A model this package runs, in the planner's terms, read off its own declarations: config, norms, sums, `specs()`.

Decides nothing of any family: a trait that adds parameters to the table is counted here without a word. No torch.
"""

from math import prod

from shardwright.layout.heads import HeadPartition
from shardwright.layout.partition import Partition
from shardwright.layout.spec import Specs
from shardwright.models.config import ModelConfig
from shardwright.models.families import by_name
from shardwright.models.specs import NORMS_OF, SIDE_BY_SIDE, SUMS_OF, Cuts, model_specs
from shardwright.plan.blocks import Blocks, Holds


def of_config(config: ModelConfig) -> Blocks:
    """The sizes of a model this package can run; what its ranks hold is read off the table they load by."""
    sums, sums_back = SUMS_OF[config.block]
    norms, normed = NORMS_OF[config.block], 2 if config.norm in ("rms_plus_one", "rms_once") else 1
    return Blocks(
        layers=config.layers,
        hidden=config.hidden,
        feed_forward=config.feed_forward,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_size=config.head_size,
        vocabulary=config.vocabulary,
        gated=int(config.gated),
        tied=int(config.tied),
        window=max(config.windows, default=0),
        windowed=sum(window > 0 for window in config.windows) / config.layers if config.windows else 1,
        parts=1 if config.block in SIDE_BY_SIDE else 2,
        norms=len(norms),
        behind=sum(name.endswith("_post_norm") for name in norms),
        norm_kept=normed,
        head_kept=2 if config.wide_qk_norm or config.own_qk_norm else normed,
        activation_kept=int((config.gated, config.activation) not in ((True, "silu"), (False, "relu"))),
        scores_kept=int(config.alibi),
        head_norms=int(config.qk_norm or config.wide_qk_norm or config.own_qk_norm),
        turned=config.turned / config.head_size,
        sums=sums,
        sums_back=sums_back,
        norm_sums=int(config.wide_qk_norm),
        context=config.context,
        holds=_holds(config),
    )


def _holds(config: ModelConfig) -> Holds:
    """From the tables of ranks with no share, one query head (and its KV head), all heads, and all features.

    What a rank holds is linear in its heads and features. Where each query head has a KV head of its own, the two
    cannot be told apart, and need not be.
    """
    heads, kv_heads = config.heads, config.kv_heads
    nothing, ends = _held(config, 0, 0)
    pair, every = _held(config, 1, 0)[0] - nothing, _held(config, heads, 0)[0] - nothing
    per_head = pair if heads == kv_heads else (every - kv_heads * pair) // (heads - kv_heads)
    features = _held(config, 0, config.feed_forward)[0] - nothing
    return Holds(
        whole=nothing,
        per_head=per_head,
        per_kv_head=pair - per_head,
        per_feature=features // config.feed_forward,
        ends=ends,
    )


def _held(config: ModelConfig, heads: int, features: int) -> tuple[int, int]:
    """Parameters of a layer, and beside all layers, on a rank with the first heads and features and no vocabulary."""
    cuts = Cuts(
        HeadPartition(Partition.explicit((heads, config.heads - heads)), config.kv_heads),
        Partition.explicit((features, config.feed_forward - features)),
        Partition.explicit((0, config.vocabulary)),
    )
    table = model_specs(config, cuts, 0, by_name(config.family).naming(config), layers=[0])
    layer: Specs = {name: spec for name, spec in table.items() if name.startswith("layers.")}
    counts = [sum(prod(spec.shape) for spec in specs.values()) for specs in (layer, table)]
    return counts[0], counts[1] - counts[0]
