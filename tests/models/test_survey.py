"""What `check` says of a model on 1 to 16 ranks is exactly what decoder and KV pages on meta tensors report."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardwright.checkpoint.source import Checkpoint
from shardwright.comm.planned import PlannedGroup
from shardwright.layers.kv import PagedKV
from shardwright.models.compilable import kv_dtype
from shardwright.models.config import ModelConfig
from shardwright.models.decoder import Decoder
from shardwright.models.families import by_name
from shardwright.models.family import Naming
from shardwright.models.read import read_config
from shardwright.models.survey import DEGREES, Degree, degree, open_headers, parameters, quantisation_group
from shardwright.testing.models import SHAPES, tiny_config

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
PUBLISHED = {
    "llama-3.1-405b": 405_853_388_800,
    "qwen2.5-72b": 72_706_203_648,
    "qwen1.5-72b": 72_287_920_128,
}
"""Parameters, as the models' cards count them: 405 B, 72.7 B, 72 B."""


def shipped(name: str) -> tuple[ModelConfig, Naming]:
    return read_config(open_headers(CONFIGS / f"{name}.json"))


def check_rank(config: ModelConfig, found: Degree, rank: int) -> None:
    dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        model = Decoder(config, PlannedGroup(rank, found.tp)).to(dtype)
        kept = getattr(torch, kv_dtype(config))  # which is the engine's, as its tests show
        kv = PagedKV(1000, model.cuts.heads.kv_width(rank), config.head_size, kept, pages=1)
    share, attention = found.ranks[rank], model.layers[0].attention
    assert share.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert share.kv_bytes_per_1000_tokens == config.layers * (kv.k.nbytes + kv.v.nbytes)
    assert (share.query_heads, share.kv_heads) == (attention.heads, attention.kv_heads)
    assert share.feed_forward == model.layers[0].mlp.down.weight.shape[1]
    assert share.vocabulary == len(model.embedding.weight)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_configs_as_meta_tensors_report(name: str) -> None:
    """The whole model on some ranks, and three layers of it on every rank of every degree."""
    config, naming = shipped(name)
    assert parameters(config, naming) == PUBLISHED[name]
    check_rank(config, degree(config, naming, 1), 0)
    check_rank(config, degree(config, naming, 7), 3)
    short = replace(config, layers=3)
    for tp in DEGREES:
        found = degree(short, naming, tp)
        for rank in range(tp):
            check_rank(short, found, rank)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_family_as_meta_tensors_report(shape: dict[str, object]) -> None:
    config = tiny_config(**shape)
    naming = by_name(config.family).naming(config)
    for tp in (1, 4, 16):
        found = degree(config, naming, tp)
        for rank in range(tp):
            check_rank(config, found, rank)


def test_shared_heads_replicas_and_balance() -> None:
    """405B at TP 3: 43, 43, 42 of 128 query heads; of 8 KV heads the 3rd and 6th straddle ranks. At 8 all is even."""
    config, naming = shipped("llama-3.1-405b")
    three, eight = degree(config, naming, 3), degree(config, naming, 8)
    assert three.shared_kv_heads == {2: (0, 1), 5: (1, 2)}
    norms = 2 * 16_384 * (2 * 126 + 1)
    heads = 2 * 126 * 2 * 128 * 16_384
    assert three.replica_bytes == 2 * norms + 2 * heads
    assert 0.99 < three.balance < 1
    assert (eight.shared_kv_heads, eight.balance, eight.replica_bytes) == ({}, 1.0, 7 * norms)


def test_a_quantisation_group_limits_weights_that_stay_quantised() -> None:
    """Heads of 64 in groups of 128 go in pairs: 9 heads on 2 ranks would be 6 and 3, where 5 and 4 are dealt."""
    config = tiny_config(heads=9, kv_heads=3, head_size=64, feed_forward=384)
    naming = by_name("llama").huggingface
    limited = degree(config, naming, 2, group=128).quantised
    assert limited is not None
    assert (limited.query_heads, limited.feed_forward, limited.same) == ((6, 3), (256, 128), False)
    free = degree(config, naming, 2, group=32).quantised
    assert free is not None
    assert free.same
    assert degree(config, naming, 2).quantised is None


@pytest.mark.parametrize(("said", "group"), [
    ({}, 1),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, 128),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": -1}}, 1),
    ({"quantization_config": {"quant_method": "awq", "w_bit": 4, "q_group_size": 64}}, 64),
    ({"quantization_config": {"quant_method": "fp8"}}, 1),
])  # fmt: skip
def test_the_group_a_config_speaks_of(said: dict[str, object], group: int) -> None:
    assert quantisation_group(Checkpoint("there", said, {})) == group


def test_the_group_of_the_embedded_model(embedded: Path) -> None:
    with open_headers(embedded) as checkpoint:
        assert quantisation_group(checkpoint) == 32


def test_a_bare_config_says_its_dtype() -> None:
    assert shipped("qwen2.5-72b")[0].dtype == "bfloat16"
