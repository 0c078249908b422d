"""What a model would be on any number of ranks, from its config and headers alone: how even, how big. No torch.

Sums up the tables of `models.specs`: of one layer, since all are alike, and the two ends.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from shardwright.checkpoint.json_object import read_object
from shardwright.checkpoint.opening import open_checkpoint
from shardwright.checkpoint.source import Checkpoint
from shardwright.layout.partition import Partition
from shardwright.layout.spec import BYTES, Specs, stored_bytes
from shardwright.models.compilable import kv_dtype
from shardwright.models.config import ModelConfig
from shardwright.models.family import Naming
from shardwright.models.specs import Cuts, model_specs

DEGREES = range(1, 17)


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """What one rank holds: heads and widths it was dealt, bytes of weights, bytes of KV for each 1 000 tokens."""

    query_heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    weight_bytes: int
    kv_bytes_per_1000_tokens: int


@dataclass(frozen=True, kw_only=True)
class QuantisedCut:
    """How weights that stayed quantised would have to be cut: between groups.

    same: it is how they are cut anyway. Weights made floating on load are bound by no group.
    """

    query_heads: tuple[int, ...]
    feed_forward: tuple[int, ...]
    same: bool


@dataclass(frozen=True, kw_only=True)
class Degree:
    """A model on `tp` ranks.

    balance: mean of the ranks' weights over the largest, 1 where all are alike · shared_kv_heads: KV head → the ranks
    that hold it, where they are several · replica_bytes: of weights held more than once, over all ranks.
    """

    tp: int
    ranks: tuple[RankShare, ...]
    balance: float
    shared_kv_heads: Mapping[int, tuple[int, ...]]
    replica_bytes: int
    quantised: QuantisedCut | None


def open_headers(path: str | os.PathLike[str]) -> Checkpoint:
    """A checkpoint, or a bare config.json, of which no weights are known.

    Raises:
        FileError, UnsupportedError: as `open_checkpoint`.
    """
    where = os.fspath(path)
    return Checkpoint(where, read_object(where), {}) if where.endswith(".json") else open_checkpoint(where)


def quantisation_group(checkpoint: Checkpoint) -> int:
    """How many neighbours of a row share a scale in this checkpoint, at most; 1 where its weights are plain."""
    said = checkpoint.config.get("quantization_config")
    if isinstance(said, dict):
        group = said.get("group_size", said.get("q_group_size", 1))
        return group if isinstance(group, int) and group > 1 else 1
    return max((stored.group for stored in checkpoint.entries.values()), default=1)


def parameters(config: ModelConfig, naming: Naming) -> int:
    """How many numbers the model is made of."""
    cuts = Cuts.balanced(config, 1)
    return _stored(config, [model_specs(config, cuts, 0, naming, layers=[0])])[0] // BYTES[config.dtype]


def degree(config: ModelConfig, naming: Naming, tp: int, group: int = 1) -> Degree:
    """The model on `tp` ranks, cut evenly; group: of its quantisation."""
    cuts = Cuts.balanced(config, tp)
    tables = [model_specs(config, cuts, rank, naming, layers=[0]) for rank in range(tp)]
    ranks = tuple(_share(config, cuts, rank, table) for rank, table in enumerate(tables))
    weights = [share.weight_bytes for share in ranks]
    holders = {head: cuts.heads.kv_holders(head) for head in range(config.kv_heads)}
    return Degree(
        tp=tp,
        ranks=ranks,
        balance=sum(weights) / tp / max(weights),
        shared_kv_heads={head: held for head, held in holders.items() if len(held) > 1},
        replica_bytes=_stored(config, tables)[1],
        quantised=_quantised(config, cuts, group) if group > 1 else None,
    )


def _share(config: ModelConfig, cuts: Cuts, rank: int, table: Specs) -> RankShare:
    sizes = {name: spec.nbytes * (config.layers if _in_layer(name) else 1) for name, spec in table.items()}
    kv_heads = cuts.heads.kv_width(rank)
    return RankShare(
        query_heads=cuts.heads.query.widths[rank],
        kv_heads=kv_heads,
        feed_forward=cuts.feed_forward.widths[rank],
        vocabulary=cuts.vocabulary.widths[rank],
        weight_bytes=sum(sizes.values()),
        kv_bytes_per_1000_tokens=1000 * 2 * config.layers * kv_heads * config.head_size * BYTES[kv_dtype(config)],
    )


def _stored(config: ModelConfig, tables: list[Specs]) -> tuple[int, int]:
    """Bytes of the model and of its replicas, from tables of its ends and one layer."""
    whole = stored_bytes(tables)
    layer = stored_bytes([{name: spec for name, spec in table.items() if _in_layer(name)} for table in tables])
    more = config.layers - 1
    return whole[0] + more * layer[0], whole[1] + more * layer[1]


def _in_layer(name: str) -> bool:
    return name.startswith("layers.")


def _quantised(config: ModelConfig, cuts: Cuts, group: int) -> QuantisedCut:
    heads = group // gcd(config.head_size, group)
    query = Partition.balanced(config.heads, cuts.ranks, heads).widths
    feed_forward = Partition.balanced(config.feed_forward, cuts.ranks, group).widths
    same = query == cuts.heads.query.widths and feed_forward == cuts.feed_forward.widths
    return QuantisedCut(query_heads=query, feed_forward=feed_forward, same=same)
