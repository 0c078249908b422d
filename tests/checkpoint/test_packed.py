"""GPTQ and AWQ weights: any box of them, against the values they were packed from, bit for bit.

One product of float32 numbers on either side, so nothing is rounded twice.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.checkpoint.packing import awq, gptq, quantised
from torch import Tensor

from shardwright.checkpoint import reading
from shardwright.checkpoint.opening import open_checkpoint
from shardwright.checkpoint.source import Checkpoint
from shardwright.errors import FileError, ShardwrightError, UnsupportedError
from shardwright.layout.partition import Partition
from shardwright.layout.spec import Piece

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
OUT, IN = 48, 72
"""72 inputs are four groups of 16 and one of 8; rank boundaries of 3, 5 and 7 lie inside words and inside groups."""


def saved(folder: Path, config: dict[str, Any] | None, tensors: dict[str, Tensor]) -> Checkpoint:
    said = {} if config is None else {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(said))
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def piece(box: tuple[tuple[int, int], ...], shape: tuple[int, ...] = (OUT, IN), name: str = "a.weight") -> Piece:
    local = tuple((0, stop - start) for start, stop in box)
    return Piece(name, shape, tuple((span,) for span in box), local, (0,))


def read(checkpoint: Checkpoint, box: tuple[tuple[int, int], ...], **options: Any) -> Tensor:
    out = torch.full([stop - start for start, stop in box], torch.nan)
    checkpoint.read(piece(box, **options), out)
    return out


def cases() -> dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """The config, how the weight was quantised, how it is written."""
    eight = {**GPTQ, "bits": 8}
    return {
        "gptq": (GPTQ, {}, {}),
        "gptq without g_idx": (GPTQ, {}, {"with_order": False}),
        "gptq act-order": ({**GPTQ, "desc_act": True}, {"act_order": True}, {}),
        "gptq version 2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, {}, {"version": 2}),
        "gptq one group": ({**GPTQ, "group_size": -1}, {"group": -1}, {}),
        "gptq 8 bit": (eight, {"bits": 8}, {"bits": 8}),
        "gptq 2 bit": ({**GPTQ, "bits": 2, "group_size": 8}, {"bits": 2, "group": 8}, {"bits": 2}),
        "awq": (AWQ, {}, {}),
        "awq one group": ({**AWQ, "group_size": -1}, {"group": -1}, {}),
    }


@pytest.fixture(scope="module", params=cases())
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    config, how, written = cases()[request.param]
    inputs = IN if how.get("bits", 4) != 2 else 64
    full = torch.randn(OUT, inputs, generator=torch.Generator().manual_seed(3))
    weight = quantised(full, how.pop("group", 16), **how)
    tensors = awq("a", weight) if config is AWQ or config["quant_method"] == "awq" else gptq("a", weight, **written)
    checkpoint = saved(tmp_path_factory.mktemp("packed"), config, tensors)
    return checkpoint, weight.weight, full


def test_whole(stored: Any) -> None:
    """And near what was quantised, so that the oracle itself is no nonsense: half a step, 2 / 3 for two bits."""
    checkpoint, weight, full = stored
    assert list(checkpoint.entries) == ["a.weight"]
    entry = checkpoint.entries["a.weight"]
    assert (entry.shape, entry.floating) == (tuple(weight.shape), True)
    assert read(checkpoint, ((0, OUT), (0, weight.shape[1])), shape=tuple(weight.shape)).equal(weight)
    assert (weight - full).abs().max() < 1.3


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_box(stored: Any, data: st.DataObject) -> None:
    checkpoint, weight, _ = stored
    box = tuple(
        tuple(sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size))))) for size in weight.shape
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK", data.draw(st.sampled_from([4, 100, 1 << 18])))
        found = read(checkpoint, box, shape=tuple(weight.shape))
    assert found.equal(weight[slice(*box[0]), slice(*box[1])])


@pytest.mark.parametrize("ranks", [3, 5, 7, 50])
def test_uneven_cuts_read_what_covers_them(stored: Any, ranks: int) -> None:
    """Both ways of cutting; a rank reads its words and tables and little beside: never the whole weight."""
    checkpoint, weight, _ = stored
    for dim in (0, 1):
        cut = Partition.balanced(weight.shape[dim], ranks)
        parts = []
        for rank in range(ranks):
            box = [(0, weight.shape[0]), (0, weight.shape[1])]
            box[dim] = cut.range(rank)
            before = checkpoint.bytes_read
            parts.append(read(checkpoint, tuple(box), shape=tuple(weight.shape)))
            if ranks == 7:
                assert checkpoint.bytes_read - before < 0.7 * checkpoint.entries["a.weight"].words.entry.nbytes + 1_000
        assert torch.cat(parts, dim).equal(weight)


def test_a_zero_point_of_nothing_borrows_from_its_neighbour(tmp_path: Path) -> None:
    """Version 1 stores zero - 1 of the word as one number: 0 next to 5 becomes 15 next to 3."""
    weight = quantised(torch.rand(8, 8), 8)  # nothing below 0: every zero point is 0
    assert not weight.zeros.any()
    weight.zeros[0, 3:5] = 5
    stored = gptq("a", weight)
    assert int(stored["a.qzeros"][0, 0]) & 0xFFFFFFFF == 0x00055000 - 0x11111111 + (1 << 32)
    with saved(tmp_path, {**GPTQ, "group_size": 8}, stored) as checkpoint:
        assert read(checkpoint, ((0, 8), (0, 8)), shape=(8, 8)).equal(weight.weight)


def changed(how: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, tensors = dict(GPTQ), gptq("a", quantised(torch.randn(OUT, IN), 16))
    match how:
        case "no scales":
            del tensors["a.scales"]
        case "no zeros":
            del tensors["a.qzeros"]
        case "both":
            tensors["a.weight"] = torch.zeros(OUT, IN)
        case "scales":
            tensors["a.scales"] = tensors["a.scales"][:-1].clone()
        case "zeros":
            tensors["a.qzeros"] = tensors["a.qzeros"].float()
        case "g_idx":
            tensors["a.g_idx"] = tensors["a.g_idx"][:-1].clone()
        case "vector":
            tensors["a.qweight"] = tensors["a.qweight"][0].clone()
        case "group":
            config["group_size"] = 32
        case "no group":
            del config["group_size"]
        case "outputs":
            tensors = {name: t[:, :-1].clone() if t.dim() == 2 else t for name, t in tensors.items()}
    return config, tensors


@pytest.mark.parametrize(("how", "said"), [
    ("no scales", "tensor 'a.qweight' has no scales beside it"),
    ("no zeros", "tensor 'a.qweight' has no qzeros beside it"),
    ("both", "there are both a.weight and a.qweight"),
    ("scales", "tensor 'a.scales' is float16 [4, 48] where 72 inputs in groups of 16 and 48 outputs want float16 [5,"),
    ("zeros", "tensor 'a.qzeros' is float32 [5, 6] where 72 inputs in groups of 16 and 48 outputs want int32 [5, 6]"),
    ("g_idx", "tensor 'a.g_idx' is int32 [71] where"),
    ("vector", "tensor 'a.qweight', its qzeros or its scales are no matrix"),
    ("group", "tensor 'a.qzeros' is int32 [5, 6] where 72 inputs in groups of 32 and 48 outputs want int32 [3, 6]"),
    ("no group", "quantization_config.group_size is None, neither -1 nor a size"),
    ("outputs", "47 outputs want int32"),
])  # fmt: skip
def test_parts_that_do_not_fit(tmp_path: Path, how: str, said: str) -> None:
    with pytest.raises(FileError) as caught:
        saved(tmp_path, *changed(how))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("group", [-1, 5])
def test_an_order_that_leaves_the_groups(tmp_path: Path, group: int) -> None:
    config, tensors = changed("")
    tensors["a.g_idx"][70] = group
    with saved(tmp_path, config, tensors) as checkpoint:
        for box in (((0, OUT), (0, IN)), ((0, 8), (0, 8))):
            with pytest.raises(FileError, match=f"tensor 'a.g_idx' puts input 70 into group {group} of 5"):
                read(checkpoint, box)


@pytest.mark.parametrize(("config", "kind", "said"), [
    ({"bits": 4}, UnsupportedError, "quantization_config.quant_method None is not supported; supported are gptq, awq"),
    ({"quant_method": "bitsandbytes"}, UnsupportedError, "quant_method 'bitsandbytes' is not supported"),
    ([], FileError, "quantization_config is no object"),
    ({**GPTQ, "bits": 3}, UnsupportedError, "quantization_config.bits 3 is not supported with gptq; supported: 2, 4,"),
    ({**GPTQ, "bits": [4]}, UnsupportedError, "quantization_config.bits '[4]' is not supported"),
    ({**GPTQ, "bits": 4.0}, UnsupportedError, "quantization_config.bits '4.0' is not supported"),
    ({**GPTQ, "checkpoint_format": "marlin"}, UnsupportedError, "checkpoint_format 'marlin' is not supported"),
    ({**GPTQ, "dynamic": {"x": {}}}, UnsupportedError, "quantization_config.dynamic"),
    ({**AWQ, "version": "gemv"}, UnsupportedError, "version 'gemv' is not supported with awq; supported: gemm"),
    ({**AWQ, "zero_point": False}, UnsupportedError, "zero_point False is not supported with awq"),
    ({**GPTQ, "group_size": 0}, FileError, "group_size is 0, neither -1 nor a size"),
    ({**GPTQ, "group_size": True}, FileError, "group_size is True, neither"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, UnsupportedError, "format 'pack-quantized'"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, UnsupportedError, "quant_algo 'NVFP4' is not supported"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, FileError, "weight_block_size is [128], no [rows, columns]"),
])  # fmt: skip
def test_configs_that_are_refused(tmp_path: Path, config: Any, kind: type[ShardwrightError], said: str) -> None:
    with pytest.raises(kind) as caught:
        saved(tmp_path, config, {"a.weight": torch.zeros(1)})
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_what_is_not_packed_stays_as_it_is(tmp_path: Path) -> None:
    config, tensors = changed("")
    tensors |= {"a.bias": torch.ones(OUT), "norm.weight": torch.ones(3), "scales": torch.ones(2)}
    with saved(tmp_path, config, tensors) as checkpoint:
        assert set(checkpoint.entries) == {"a.weight", "a.bias", "norm.weight", "scales"}
        assert np.all(read(checkpoint, ((1, 3),), shape=(3,), name="norm.weight").numpy() == 1)
