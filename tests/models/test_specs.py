"""Seam 2 of whole models: computed without torch, equal to what the decoder builds, and adding up to the model."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from shardwright.comm.planned import PlannedGroup
from shardwright.layout.partition import Partition
from shardwright.layout.spec import boxes, stored_bytes
from shardwright.models.config import ModelConfig
from shardwright.models.decoder import Decoder
from shardwright.models.families import FAMILIES, by_name
from shardwright.models.specs import Cuts, model_specs
from shardwright.testing.models import SHAPES, tiny_config

LLAMA_405B: dict[str, Any] = {
    "family": "llama",
    "hidden": 16_384,
    "feed_forward": 53_248,
    "layers": 126,
    "heads": 128,
    "kv_heads": 8,
    "head_size": 128,
    "vocabulary": 128_256,
    "context": 131_072,
    "norm_eps": 1e-5,
    "rope_theta": 5e5,
    "dtype": "bfloat16",
}
WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None
from shardwright.layout.spec import boxes, stored_bytes
from shardwright.models.config import ModelConfig
from shardwright.models.families import by_name
from shardwright.models.specs import Cuts, model_specs

config = ModelConfig(**json.loads(sys.argv[1]))
naming = by_name(config.family).huggingface
tables = [model_specs(config, Cuts.balanced(config, 8), rank, naming) for rank in range(8)]
print(json.dumps({"stored": stored_bytes(tables), "ranks": [sum(s.nbytes for s in t.values()) for t in tables]}))
"""


def test_the_tables_of_a_405b_model_need_no_torch() -> None:
    """405,853,388,800 parameters, as published; at TP 8 each rank has one KV head, and the norms are the replicas."""
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(LLAMA_405B)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(run.stdout)
    model, replicas = found["stored"]
    assert model == 2 * 405_853_388_800
    assert replicas == 7 * 2 * 16_384 * (2 * 126 + 1)
    assert sum(found["ranks"]) == model + replicas
    assert len(set(found["ranks"])) == 1


@pytest.mark.parametrize("tp", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_decoder_builds_what_the_tables_say(shape: dict[str, Any], tp: int) -> None:
    """Names, shapes and dtypes, on every rank, with and without every kind of bias and a head."""
    flags = ("tied", "qkv_bias", "out_bias", "mlp_bias")
    for values in ((False,) * 4, (True, False, True, False), (False, True, False, True)):
        config = tiny_config(**(shape | dict(zip(flags, values, strict=True))))
        naming = by_name(config.family).naming(config)
        for rank in range(tp):
            with torch.device("meta"):
                model = Decoder(config, PlannedGroup(rank, tp)).bfloat16()
            table = model_specs(config, Cuts.balanced(config, tp), rank, naming, dtype="bfloat16")
            built = [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()]
            said = {name: (name, spec.shape, getattr(torch, spec.dtype)) for name, spec in table.items()}
            assert sorted(built) == sorted(said.values())
            assert model.specs() == table


@pytest.mark.parametrize("tp", [1, 2, 4, 6, 24])
@pytest.mark.parametrize("cut", [Partition.balanced, Partition.remainder_last])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pieces_cover_every_source_once(shape: dict[str, Any], tp: int, cut: Any) -> None:
    """By holders: the pieces of the lowest holders tile each source tensor, so that saving writes every value once.

    Fused ones too: their parts fill one tensor among them.
    """
    config = tiny_config(**(shape | {"qkv_bias": True}))
    plain = Cuts.balanced(config, tp)
    cuts = Cuts(plain.heads, cut(config.feed_forward, tp), cut(config.vocabulary, tp))
    naming = by_name(config.family).naming(config)
    tables = [model_specs(config, cuts, rank, naming) for rank in range(tp)]
    count: dict[str, torch.Tensor] = {}
    for rank, table in enumerate(tables):
        for spec in table.values():
            for piece in spec.pieces:
                assert rank in piece.holders
                if piece.holders[0] == rank:
                    seen = count.setdefault(piece.source, torch.zeros(piece.source_shape, dtype=torch.int64))
                    for box, _ in boxes(piece.source_ranges):
                        seen[tuple(slice(*span) for span in box)] += 1
    assert all(bool((seen == 1).all()) for seen in count.values())
    assert sum(seen.numel() for seen in count.values()) * 4 == stored_bytes(tables)[0]


def test_every_family_has_its_shape() -> None:
    assert {tiny_config(**shape).family for shape in SHAPES.values()} == {family.name for family in FAMILIES}


def test_unequal_devices_are_cuts_like_any_other() -> None:
    """Shares 3 : 1 of F and V: the tables follow the cuts they are given, not a rule of their own."""
    config = ModelConfig(**LLAMA_405B)
    plain = Cuts.balanced(config, 2)
    cuts = Cuts(plain.heads, Partition.weighted(53_248, [3, 1]), Partition.weighted(128_256, [3, 1]))
    table = model_specs(config, cuts, 0, by_name("llama").huggingface)
    assert table["layers.0.mlp.down.weight"].shape == (16_384, 39_936)
    assert table["head.weight"].shape == (96_192, 16_384)
