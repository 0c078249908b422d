"""Seam 2 for a whole model: what a rank holds, from its config alone, without torch.

Joins the tables of `layout.sharding` over the decoder's layers and puts the checkpoint's names in place of the layers'
own. `models.decoder` builds exactly these parameters; loading, saving and planning read this.
"""

from dataclasses import dataclass, replace
from itertools import chain

from shardwright.layout import sharding
from shardwright.layout.heads import HeadPartition
from shardwright.layout.partition import Partition
from shardwright.layout.spec import Piece, Specs, TensorSpec, split_rows
from shardwright.models.config import ModelConfig
from shardwright.models.families import Naming


@dataclass(frozen=True)
class Cuts:
    """How a model's dimensions are cut over the ranks: query heads (KV heads follow), F, and V."""

    heads: HeadPartition
    feed_forward: Partition
    vocabulary: Partition

    @classmethod
    def balanced(cls, config: ModelConfig, ranks: int) -> "Cuts":
        """Each dimension dealt out evenly, by heads or single elements."""
        return cls(
            heads=HeadPartition.balanced(config.heads, config.kv_heads, ranks),
            feed_forward=Partition.balanced(config.feed_forward, ranks),
            vocabulary=Partition.balanced(config.vocabulary, ranks),
        )

    @property
    def ranks(self) -> int:
        """How many ranks share the model."""
        return self.vocabulary.ranks


def model_specs(config: ModelConfig, cuts: Cuts, rank: int, naming: Naming, *, dtype: str | None = None) -> Specs:
    """One rank's parameters by the decoder's names, their pieces by the checkpoint's; dtype: the config's, or this."""
    parts = _ends(config, cuts, rank, dtype or config.dtype)
    for layer in range(config.layers):
        parts |= _layer(config, cuts, rank, dtype or config.dtype, f"layers.{layer}.")
    return {
        f"{path}.{name}": _from_checkpoint(spec.renamed(f"{path}."), naming, config.head_size)
        for path, table in parts.items()
        for name, spec in table.items()
    }


def _ends(config: ModelConfig, cuts: Cuts, rank: int, dtype: str) -> dict[str, Specs]:
    table = sharding.vocab_table(cuts.vocabulary, config.hidden, rank, dtype=dtype)
    ends = {"embedding": table, "norm": _norm(config.hidden, cuts, dtype)}
    return ends if config.tied else ends | {"head": table}


def _layer(config: ModelConfig, cuts: Cuts, rank: int, dtype: str, path: str) -> dict[str, Specs]:
    ff, inner = cuts.feed_forward, cuts.heads.query.times(config.head_size)
    table = {
        "attention_norm": _norm(config.hidden, cuts, dtype),
        "attention.qkv": sharding.qkv_linear(
            config.hidden, cuts.heads, config.head_size, rank, bias=config.qkv_bias, dtype=dtype
        ),
        "attention.out": sharding.row_linear(inner, config.hidden, rank, bias=config.out_bias, dtype=dtype),
        "mlp_norm": _norm(config.hidden, cuts, dtype),
        "mlp.gate_up": sharding.merged_column_linear(config.hidden, (ff, ff), rank, bias=config.mlp_bias, dtype=dtype),
        "mlp.down": sharding.row_linear(ff, config.hidden, rank, bias=config.mlp_bias, dtype=dtype),
    }
    if config.qk_norm:
        norm = sharding.replicated({"weight": (config.head_size,)}, cuts.ranks, gradient="partial", dtype=dtype)
        table |= {"attention.q_norm": norm, "attention.k_norm": norm}
    return {f"{path}{name}": specs for name, specs in table.items()}


def _norm(size: int, cuts: Cuts, dtype: str) -> Specs:
    return sharding.replicated({"weight": (size,)}, cuts.ranks, dtype=dtype)


def _from_checkpoint(spec: TensorSpec, naming: Naming, head_size: int) -> TensorSpec:
    return replace(spec, pieces=tuple(chain.from_iterable(_translated(p, naming, head_size) for p in spec.pieces)))


def _translated(piece: Piece, naming: Naming, head_size: int) -> tuple[Piece, ...]:
    module, _, parameter = piece.source.rpartition(".")
    template, layer = _template(module)
    name = f"{naming.names[template].format(i=layer)}.{parameter}"
    transform = naming.transforms.get(template, "none")
    named = replace(piece, source=name, transform=transform)
    return split_rows(named, head_size) if transform == "rope_unpermute" else (named,)


def _template(module: str) -> tuple[str, str]:
    """`layers.7.mlp.down` → `layers.{i}.mlp.down`, `7`."""
    words = module.split(".")
    if words[0] != "layers":
        return module, ""
    return ".".join(["layers", "{i}", *words[2:]]), words[1]
