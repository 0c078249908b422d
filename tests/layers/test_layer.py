"""What all parallel layers share: loading by hand, initial values that no split changes, tables."""

from typing import Any

import pytest
import torch

from shardwright.comm.group import Group
from shardwright.comm.planned import PlannedGroup
from shardwright.comm.single import SingleGroup
from shardwright.errors import UsageError
from shardwright.layers.layer import INITIAL_STD, ParallelLayer
from shardwright.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from shardwright.layers.norm import RMSNorm
from shardwright.layers.vocab import VocabParallelEmbedding, VocabParallelHead
from shardwright.layout.heads import HeadPartition
from shardwright.layout.partition import Partition
from shardwright.testing.models import largest_difference, whole_tensors

KINDS = ["replicated", "column", "merged", "qkv", "row", "embedding", "head", "norm"]


def layer_of(kind: str, group: Group, name: str = "some", *, bias: bool = True) -> ParallelLayer:
    """One layer of each kind, sizes dividing nothing."""

    def cut(size: int) -> Partition:
        return Partition.balanced(size, group.size)

    heads = HeadPartition.balanced(6, 2, group.size)
    layers: dict[str, Any] = {
        "replicated": lambda: ReplicatedLinear(5, 7, group, bias=bias, name=name),
        "column": lambda: ColumnParallelLinear(5, cut(7), group, bias=bias, name=name),
        "merged": lambda: MergedColumnParallelLinear(5, (cut(7), cut(3)), group, bias=bias, name=name),
        "qkv": lambda: QKVParallelLinear(5, heads, 4, group, bias=bias, name=name),
        "row": lambda: RowParallelLinear(cut(7), 5, group, bias=bias, name=name),
        "embedding": lambda: VocabParallelEmbedding(cut(11), 5, group, name=name),
        "head": lambda: VocabParallelHead(cut(11), 5, group, name=name),
        "norm": lambda: RMSNorm(5, group, name=name),
    }
    layer: ParallelLayer = layers[kind]()
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 12])
def test_any_split_has_the_same_initial_values(kind: str, ranks: int) -> None:
    """Bit for bit the unsharded layer's."""
    twin = layer_of(kind, SingleGroup())
    whole = whole_tensors(dict(twin.named_parameters()), twin.specs())
    for rank in range(ranks):
        layer = layer_of(kind, PlannedGroup(rank, ranks))
        assert largest_difference(dict(layer.named_parameters()), layer.specs(), whole) == 0


def test_initial_values_depend_on_name_and_seed_only() -> None:
    weights = []
    for name, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1)):
        layer = layer_of("column", SingleGroup(), name)
        layer.reset(seed)
        weights.append(layer.weight)
        assert layer.bias is not None
        assert not layer.bias.any()
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


def test_initial_weights_are_normal_of_the_stated_deviation() -> None:
    """250,000 draws: their deviation is known to 0.14 %, their mean to 0.002 of it; the bounds are five of those."""
    weight = ReplicatedLinear(500, 500, SingleGroup()).weight.detach().double()
    assert abs(weight.std().item() / INITIAL_STD - 1) < 0.007
    assert abs(weight.mean().item() / INITIAL_STD) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_building_leaves_torchs_generator_alone(kind: str) -> None:
    before = torch.get_rng_state()
    layer_of(kind, SingleGroup()).reset(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_what_the_table_says(kind: str) -> None:
    """Of this rank and of every other one; on meta too, and after a cast."""
    for rank in range(5):
        layer = layer_of(kind, PlannedGroup(rank, 5))
        with torch.device("meta"):
            other = layer_of(kind, PlannedGroup(0, 5)).half()
        shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        assert shapes == {name: spec.shape for name, spec in other.specs(rank).items()}
        assert {spec.dtype for spec in other.specs(rank).values()} == {"float16"}


Q = torch.zeros(24, 5)
KV = torch.zeros(8, 5)


@pytest.mark.parametrize(("kind", "arguments", "said"), [
    ("column", ("wieght", KV), r"name=wieght: some has no such parameter; use one of \['weight', 'bias'\]"),
    ("embedding", ("bias", KV), r"name=bias: some has no such parameter; use one of \['weight'\]"),
    ("column", ("weight", torch.zeros(7, 4)), r"full_tensor=\[7, 4\]: 'weight' is \[7, 5\]; pass the whole tensor"),
    ("row", ("weight", torch.zeros(5, 1)), r"full_tensor=\[5, 1\]: 'weight' is \[5, 7\]; pass the whole tensor"),
    ("row", ("bias", torch.zeros(7)), r"full_tensor=\[7\]: 'bias' is \[5\]"),
    ("column", ("weight", KV, 0), "shard_id=0: some has no part '0.weight'; leave it out"),
    ("merged", ("weight", KV), "shard_id=None: some has no part 'weight'; its parts are 0, 1"),
    ("merged", ("weight", KV, 2), r"shard_id=2: some has no part '2.weight'; its parts are 0, 1"),
    ("merged", ("bias", torch.zeros(7), 1), r"full_tensor=\[7\]: '1.bias' is \[3\]"),
    ("qkv", ("weight", Q), "shard_id=None: some has no part 'weight'; its parts are q, k, v"),
    ("qkv", ("weight", Q, "o"), "shard_id=o: some has no part 'o.weight'; its parts are q, k, v"),
    ("qkv", ("weight", Q, "k"), r"full_tensor=\[24, 5\]: 'k.weight' is \[8, 5\]"),
])  # fmt: skip
@pytest.mark.parametrize("rank", [0, 7])
def test_loading_by_hand_refuses(kind: str, arguments: tuple[Any, ...], said: str, rank: int) -> None:
    """On every rank alike, one that owns nothing too."""
    layer = layer_of(kind, PlannedGroup(rank, 8))
    with pytest.raises(UsageError, match=said):
        layer.load(*arguments)


def test_loading_by_hand_fills_each_part_and_nothing_else() -> None:
    """Rank 1 of 4 has query heads 2 and 3 of 6 over KV heads 0 and 1, both held."""
    layer = QKVParallelLinear(1, HeadPartition.balanced(6, 2, 4), 2, PlannedGroup(1, 4))
    layer.weight.data.fill_(-1)
    layer.load("weight", torch.arange(12.0)[:, None], "q")
    layer.load("weight", torch.arange(100.0, 104)[:, None], "v")
    assert layer.weight.flatten().tolist() == [4, 5, 6, 7, -1, -1, -1, -1, 100, 101, 102, 103]


def test_loading_converts_to_the_layers_type() -> None:
    layer = layer_of("column", SingleGroup()).bfloat16()
    layer.load("weight", torch.full((7, 5), 1.0 + 2**-10, dtype=torch.float64))
    assert layer.weight.dtype == torch.bfloat16
    assert bool((layer.weight == 1).all())
