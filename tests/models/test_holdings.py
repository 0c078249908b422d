"""Who holds which slice of which tensor: the slices of the lowest holders are the tensor, and names find it."""

from typing import Any

import pytest

from shardwright.errors import UsageError
from shardwright.layout.spec import stored_bytes
from shardwright.models.families import by_name
from shardwright.models.holdings import holdings, layer_of
from shardwright.models.specs import Cuts, model_specs
from shardwright.testing.models import SHAPES, tiny_config


@pytest.mark.parametrize("tp", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_slices_are_the_tables_turned_round(shape: dict[str, Any], tp: int) -> None:
    """Bytes add up to the model and its replicas; spans lie within the tensor and cover it."""
    config = tiny_config(**shape)
    naming, cuts = by_name(config.family).naming(config), Cuts.balanced(config, tp)
    found = holdings(config, cuts, naming, range(config.layers))
    tables = [model_specs(config, cuts, rank, naming) for rank in range(tp)]
    first = sum(s.bytes for h in found for s in h.slices if s.rank == s.holders[0])
    whole = sum(s.bytes for h in found for s in h.slices)
    assert (first, whole - first) == stored_bytes(tables)
    for holding in found:
        covered = {at for start, stop, _ in holding.spans() for at in range(start, stop)}
        assert covered == set(range(holding.shape[holding.cut or 0]))
        if holding.cut is None:  # by all, but for norms of single heads
            assert {s.rank for s in holding.slices} == set(holding.slices[0].holders)
            assert len(holding.slices) == tp or ".norms." in holding.tensor


def test_interleaved_parts_show_as_several_spans() -> None:
    """GPT-NeoX, 6 heads over 6 ranks: each holds one run of rows of the fused tensor, of q, k and v together."""
    config = tiny_config(**(SHAPES["gpt_neox"] | {"kv_heads": 6}))
    naming = by_name("gpt_neox").huggingface
    [weight] = holdings(
        config, Cuts.balanced(config, 6), naming, [1], "gpt_neox.layers.1.attention.query_key_value.weight"
    )
    assert [span for span in weight.spans() if span[2] == 2] == [(24, 28, 2), (28, 32, 2), (32, 36, 2)]


def test_names_of_the_checkpoint_and_of_the_decoder() -> None:
    config = tiny_config()
    naming, cuts = by_name("llama").huggingface, Cuts.balanced(config, 2)
    [one] = holdings(config, cuts, naming, [1], "model.layers.1.self_attn.k_proj.weight")
    assert (one.cut, one.shape) == (0, (8, 20))
    three = holdings(config, cuts, naming, [1], "layers.1.attention.qkv.weight")
    assert [holding.tensor.split(".")[-2] for holding in three] == ["q_proj", "k_proj", "v_proj"]
    with pytest.raises(UsageError, match=r"self_attn.k_prj: the model has none of that name; did you mean"):
        holdings(config, cuts, naming, [1], "model.layers.1.self_attn.k_prj")


@pytest.mark.parametrize(("name", "layer"), [("model.layers.12.mlp.up_proj.weight", 12), ("blk.7.attn_k.bias", 7),
                                             ("transformer.h.3.ln_1.weight", 3), ("lm_head.weight", None)])  # fmt: skip
def test_the_layer_of_a_name(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer
