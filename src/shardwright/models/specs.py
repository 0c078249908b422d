"""Seam 2 for a whole model: what a rank holds, from its config alone, without torch.

Joins the tables of `layout.sharding` over the decoder's layers and puts the checkpoint's names in place of the layers'
own. `models.decoder` builds exactly these parameters; loading, saving and planning read this.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from shardwright.layout import sharding
from shardwright.layout.heads import HeadPartition
from shardwright.layout.partition import Partition
from shardwright.layout.spec import Gradient, Piece, Specs, TensorSpec, split_rows
from shardwright.models.config import Block, ModelConfig
from shardwright.models.family import Naming

NORMS_OF: Mapping[Block, tuple[str, ...]] = {
    "pre": ("attention_norm", "mlp_norm"),
    "post": ("attention_post_norm", "mlp_post_norm"),
    "sandwich": ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"),
    "parallel": ("attention_norm", "mlp_norm"),
    "parallel_shared": ("attention_norm",),
}
"""The norms of each kind of layer, by name."""

SIDE_BY_SIDE: frozenset[Block] = frozenset({"parallel", "parallel_shared"})
"""The kinds of layer in which attention and MLP are one block of the residual stream, not two."""

SUMS_OF: Mapping[Block, tuple[int, int]] = {
    "pre": (2, 2),
    "post": (2, 2),
    "sandwich": (2, 2),
    "parallel": (1, 2),
    "parallel_shared": (1, 1),
}
"""What the all-reduces of each kind of layer sum, forward and backward, in T x H; plans count on it, a test holds it.
Layers side by side make one of them each way."""


@dataclass(frozen=True)
class Cuts:
    """How a model's dimensions are cut over the ranks: query heads (KV heads follow), F, and V.

    sequence: in training the rows of the residual stream are dealt out too (sequence parallelism), so that what acts on
    them has partial gradients.
    """

    heads: HeadPartition
    feed_forward: Partition
    vocabulary: Partition
    sequence: bool = False

    @classmethod
    def balanced(cls, config: ModelConfig, ranks: int, *, sequence: bool = False) -> "Cuts":
        """Each dimension dealt out evenly, by heads or single elements."""
        return cls(
            heads=HeadPartition.balanced(config.heads, config.kv_heads, ranks),
            feed_forward=Partition.balanced(config.feed_forward, ranks),
            vocabulary=Partition.balanced(config.vocabulary, ranks),
            sequence=sequence,
        )

    @property
    def gradient(self) -> Gradient:
        """Of a parameter that acts on the residual stream."""
        return "partial" if self.sequence else "whole"

    @property
    def ranks(self) -> int:
        """How many ranks share the model."""
        return self.vocabulary.ranks


def model_specs(
    config: ModelConfig,
    cuts: Cuts,
    rank: int,
    naming: Naming,
    *,
    dtype: str | None = None,
    layers: Iterable[int] | None = None,
) -> Specs:
    """One rank's parameters by the decoder's names, their pieces by the checkpoint's.

    dtype: the config's, or this · layers: these alone, beside the two ends; by default all. They are alike.
    """
    parts = _ends(config, cuts, rank, dtype or config.dtype)
    for layer in range(config.layers) if layers is None else layers:
        parts |= _layer(config, cuts, rank, dtype or config.dtype, f"layers.{layer}.")
    return {
        f"{path}.{name}": _from_checkpoint(spec.renamed(f"{path}."), naming, config)
        for path, table in parts.items()
        for name, spec in table.items()
    }


def _ends(config: ModelConfig, cuts: Cuts, rank: int, dtype: str) -> dict[str, Specs]:
    table = sharding.vocab_table(cuts.vocabulary, config.hidden, rank, dtype=dtype)
    ends = {"embedding": table, "norm": _norm(config, config.hidden, cuts, dtype, cuts.gradient)}
    if config.learned_positions:
        sizes = {"weight": (config.learned_positions, config.hidden)}
        ends["positions"] = sharding.replicated(sizes, cuts.ranks, gradient=cuts.gradient, dtype=dtype)
    return ends if config.tied else ends | {"head": table}


def _layer(config: ModelConfig, cuts: Cuts, rank: int, dtype: str, path: str) -> dict[str, Specs]:
    ff, inner = cuts.feed_forward, cuts.heads.query.times(config.head_size)
    table = {norm: _norm(config, config.hidden, cuts, dtype, cuts.gradient) for norm in NORMS_OF[config.block]} | {
        "attention.qkv": sharding.qkv_linear(
            config.hidden, cuts.heads, config.head_size, rank, bias=config.qkv_bias, dtype=dtype
        ),
        "attention.out": sharding.row_linear(
            inner, config.hidden, rank, bias=config.out_bias, gradient=cuts.gradient, dtype=dtype
        ),
        "mlp.down": sharding.row_linear(
            ff, config.hidden, rank, bias=config.mlp_bias, gradient=cuts.gradient, dtype=dtype
        ),
    }
    if config.gated:
        both = sharding.merged_column_linear(config.hidden, (ff, ff), rank, bias=config.mlp_bias, dtype=dtype)
        table["mlp.gate_up"] = both
    else:
        table["mlp.up"] = sharding.column_linear(config.hidden, ff, rank, bias=config.mlp_bias, dtype=dtype)
    if config.wide_qk_norm or config.own_qk_norm:
        table["attention.qk_norm"] = sharding.qk_norm(cuts.heads, config.head_size, rank, dtype=dtype)
    if config.qk_norm:
        norm = _norm(config, config.head_size, cuts, dtype, "partial")
        table |= {"attention.q_norm": norm, "attention.k_norm": norm}
    return {f"{path}{name}": specs for name, specs in table.items()}


def _norm(config: ModelConfig, size: int, cuts: Cuts, dtype: str, gradient: Gradient) -> Specs:
    names = ("weight", "bias") if config.norm == "layer" else ("weight",)
    return sharding.replicated(dict.fromkeys(names, (size,)), cuts.ranks, gradient=gradient, dtype=dtype)


def _from_checkpoint(spec: TensorSpec, naming: Naming, config: ModelConfig) -> TensorSpec:
    return replace(spec, pieces=tuple(chain.from_iterable(_translated(p, naming, config) for p in spec.pieces)))


def _translated(piece: Piece, naming: Naming, config: ModelConfig) -> tuple[Piece, ...]:
    module, _, parameter = piece.source.rpartition(".")
    template, layer = _template(module)
    theirs = f"{naming.names[template]}.{parameter}"
    if "{head}" in theirs:
        return tuple(_of_head(part, theirs, layer) for part in split_rows(piece, config.head_size))
    name = theirs.format(i=layer)
    transform = naming.transforms.get(template, "none")
    parent, _, part = template.rpartition(".")
    if parent in naming.fused:
        parts, groups = _parts(naming, parent, config)
        piece = sharding.within_fused(piece, list(parts).index(part), list(parts.values()), groups)
    named = replace(piece, source=name)
    if transform == "transpose":  # of biases nothing is swapped
        return (sharding.transposed(named),) if len(piece.source_shape) == 2 else (named,)
    turned = replace(named, transform=transform)
    if transform == "flatten":
        return tuple(map(_of_matrix, split_rows(turned, config.head_size)))
    return split_rows(turned, config.head_size) if transform == "rope_unpermute" else (turned,)


def _of_head(piece: Piece, name: str, layer: str) -> Piece:
    """A head's rows of a vector that the checkpoint has in a tensor for each head."""
    ((start, stop),) = piece.source_ranges[0]
    size = stop - start
    source = name.format(i=layer, head=start // size)
    return replace(piece, source=source, source_shape=(size,), source_ranges=(((0, size),),))


def _of_matrix(piece: Piece) -> Piece:
    """A head's rows of a vector that the checkpoint has as a matrix, a row a head."""
    ((start, stop),) = piece.source_ranges[0]
    size, head = stop - start, start // (stop - start)
    shape = (piece.source_shape[0] // size, size)
    return replace(piece, source_shape=shape, source_ranges=(((head, head + 1),), ((0, size),)))


def _parts(naming: Naming, parent: str, config: ModelConfig) -> tuple[dict[str, int], int]:
    """Rows of each part of a fused tensor by our names, in its order, and in how many groups they lie."""
    if parent.endswith("gate_up"):
        return {"0": config.feed_forward, "1": config.feed_forward}, 1
    rows = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
    groups = config.kv_heads if naming.fused[parent] == "by KV head" else 1
    return {part: heads * config.head_size for part, heads in rows.items()}, groups


def _template(module: str) -> tuple[str, str]:
    """`layers.7.mlp.down` → `layers.{i}.mlp.down`, `7`."""
    words = module.split(".")
    if words[0] != "layers":
        return module, ""
    return ".".join(["layers", "{i}", *words[2:]]), words[1]
