"""The loader's books, bytes held and bytes read, and what it refuses: each with one line, a type and a remedy."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.errors import FileError, ShardwrightError, UnsupportedError, UsageError
from shardwright.layout.spec import stored_bytes
from shardwright.models.families import FAMILIES
from shardwright.models.load import Loaded, load
from shardwright.testing.models import largest_difference
from shardwright.testing.ranks import on_threads

SIZES: dict[str, Any] = {
    "hidden_size": 30,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 53,
}
ROW = "model.layers.1.self_attn.o_proj.weight"
Model = tuple[PreTrainedModel, Path]


@pytest.fixture(scope="session", params=["llama", "qwen3"])
def either(request: pytest.FixtureRequest, saved: Any) -> Model:
    model: Model = saved(request.param, **SIZES, attention_bias=True)
    return model


@pytest.fixture(scope="session")
def llama(saved: Any) -> Path:
    path: Path = saved("llama", **SIZES)[1]
    return path


def changed(source: Path, to: Path, config: dict[str, Any], tensors: dict[str, Tensor | None] | None = None) -> Path:
    """A copy with keys of its config set and tensors put or, where None, left out."""
    copytree(source, to)
    said = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(said | config))
    held = load_file(to / "model.safetensors") | (tensors or {})
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, to / "model.safetensors")
    return to


def loaded(group: Group, path: Path, **options: Any) -> Loaded:
    return load(path, group, **options)


def refusal(group: Group, path: Path) -> str:
    with pytest.raises(FileError) as caught:
        load(path, group)
    return str(caught.value)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 7])
def test_bytes_add_up(either: Model, tp: int) -> None:
    """All ranks together hold the model and its replicas, each having read what it holds and no more.

    At TP 7 a rank has no head. 1.05: where a row-parallel cut is read, gaps of a few bytes may be read over.
    """
    twin, path = either
    ranks = on_threads(tp, loaded, path)
    specs = [rank.model.specs() for rank in ranks]
    model, replicas = stored_bytes(specs)
    assert sum(rank.weight_bytes for rank in ranks) == model + replicas
    assert model == sum(parameter.nbytes for parameter in twin.parameters())
    for rank in ranks:
        assert rank.weight_bytes == sum(parameter.nbytes for parameter in rank.model.parameters())
        assert rank.bytes_read <= 1.05 * rank.weight_bytes


@pytest.mark.parametrize("tp", [1, 3, 7])
def test_every_piece_is_its_part_of_the_file(either: Model, tp: int) -> None:
    """Bit for bit: loading computes nothing."""
    twin, path = either
    whole = {name: parameter.detach() for name, parameter in twin.named_parameters()}
    for rank in on_threads(tp, loaded, path):
        held = {name: parameter.detach() for name, parameter in rank.model.named_parameters()}
        assert largest_difference(held, rank.model.specs(), whole) == 0


def test_a_sharded_checkpoint_loads_like_one_file(either: Model, tmp_path: Path) -> None:
    twin, path = either
    twin.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    parts, one = load(tmp_path, SingleGroup()).model, load(path, SingleGroup()).model
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parts.parameters(), one.parameters(), strict=True))


def test_dtype_is_the_files_or_the_callers(llama: Path) -> None:
    assert load(llama, SingleGroup()).model.embedding.weight.dtype == torch.float32
    half = load(llama, SingleGroup(), dtype="bfloat16")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.model.specs()["norm.weight"].dtype == "bfloat16"
    assert 2 * half.weight_bytes == half.bytes_read
    with pytest.raises(UsageError, match="dtype=int8: there is no such weight type; use one of float32, bfloat16"):
        load(llama, SingleGroup(), dtype="int8")


def test_progress_counts_every_parameter(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = load(llama, SingleGroup(), progress=lambda done, total: seen.append((done, total))).model
    total = len(list(model.parameters()))
    assert seen == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize(("tensors", "said"), [
    ({ROW: None}, f"tensor '{ROW}' is missing among 20 where the model's config asks for [30, 24]"),
    ({ROW: torch.zeros(30, 23)}, f"tensor '{ROW}' has shape [30, 23] where the model's config asks for [30, 24]"),
    ({"lm_head.bias": torch.zeros(53)}, "tensor 'lm_head.bias' (1 such) has no place in a llama model"),
    ({f"model.layers.2.{i}": torch.zeros(1) for i in range(9)}, "tensor 'model.layers.2.0' (9 such) has no place"),
])  # fmt: skip
def test_other_tensors_than_the_models_are_refused_on_all_ranks(
    llama: Path, tmp_path: Path, tensors: dict[str, Tensor | None], said: str
) -> None:
    """Also on the last of 7 ranks, which has no part of that tensor: else it would wait for the others for ever."""
    path = changed(llama, tmp_path / "model", {}, tensors)
    messages = set(on_threads(7, refusal, path))
    assert len(messages) == 1
    [message] = messages
    assert said in message
    assert "\n" not in message


def test_what_a_tied_model_and_old_files_hold_besides_is_passed_over(saved: Any, tmp_path: Path) -> None:
    """A tied head's copy, and the rotary frequencies that early Llama files carry."""
    _, path = saved("llama", **SIZES, tie_word_embeddings=True)
    extra: dict[str, Tensor | None] = {
        "lm_head.weight": torch.zeros(53, 30),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    }
    model = load(changed(path, tmp_path / "model", {}, extra), SingleGroup()).model
    assert model.head is None


SUPPORTED = "supported are " + ", ".join(sorted(family.architecture for family in FAMILIES))


@pytest.mark.parametrize(("config", "kind", "said"), [
    ({"architectures": ["MambaForCausalLM"]}, UnsupportedError, f"'MambaForCausalLM' is not supported; {SUPPORTED}"),
    ({"architectures": []}, UnsupportedError, f"is not supported; {SUPPORTED}"),
    ({"architectures": [["x"]]}, UnsupportedError, f"is not supported; {SUPPORTED}"),
    ({"architectures": {"a": 1}}, UnsupportedError, f"is not supported; {SUPPORTED}"),
    ({"architectures": ["a\nb"]}, UnsupportedError, f"is not supported; {SUPPORTED}"),
    ({"use_sliding_window": True}, UnsupportedError, "sliding-window attention is not supported"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, UnsupportedError, "sliding-window attention"),
    ({"hidden_act": "mish"}, UnsupportedError, "activation 'mish' is not supported; supported are silu, swish, gelu"),
    ({"hidden_act": "a\nb"}, UnsupportedError, "is not supported; supported are silu"),
    ({"partial_rotary_factor": 1.5}, FileError, "partial_rotary_factor is 1.5:"),
    ({"rope_parameters": {"partial_rotary_factor": -1.0}}, FileError, "rope_parameters.partial_rotary_factor is -1.0:"),
    ({"use_bidirectional_attention": True}, UnsupportedError, "bidirectional attention is not supported"),
    ({"quantization_config": {"bits": 4}}, UnsupportedError, "quantization_config"),
    ({"rope_parameters": {"rope_type": "spiral"}}, UnsupportedError, "rope_type 'spiral' is not supported"),
    ({"rope_parameters": {"type": "linear", "factor": -2.0}}, FileError, "rope_parameters.factor is -2.0:"),
    ({"rope_scaling": {"type": "dynamic"}}, FileError, "rope_scaling.factor field required"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0, 3.0]}}, FileError,
     "its rope has 1 short and 3 long factors for 2 rotary pairs"),
    ({"rope_scaling": {"rope_type": ["llama3"]}}, UnsupportedError, "is not supported; supported are default, linear"),
    ({"rope_scaling": {"rope_type": "llama3"}}, FileError, "rope_scaling.factor field required"),
    ({"rope_parameters": {"rope_theta": -1.0}}, FileError, "rope_parameters.rope_theta is -1.0:"),
    ({"rope_parameters": {"rope_theta": float("inf")}}, FileError, "rope_parameters.rope_theta is inf:"),
    ({"rope_parameters": 3}, FileError, "rope_parameters is 3:"),
    ({"hidden_size": "30"}, FileError, "hidden_size is '30': input should be a valid integer"),
    ({"hidden_size": 30.5}, FileError, "hidden_size is 30.5: input should be a valid integer"),
    ({"num_attention_heads": True}, FileError, "num_attention_heads is True: input should be a valid integer"),
    ({"vocab_size": 0}, FileError, "vocab_size is 0:"),
    ({"num_hidden_layers": 10**9}, FileError, "num_hidden_layers is 1000000000:"),
    ({"rms_norm_eps": float("nan")}, FileError, "rms_norm_eps is nan:"),
    ({"rms_norm_eps": float("inf")}, FileError, "rms_norm_eps is inf:"),
    ({"num_key_value_heads": 4}, FileError, "6 query heads over 4 KV heads"),
    ({"head_dim": 3}, FileError, "6 query heads over 2 KV heads of size 3, 3 of it turned"),
    ({"head_dim": None, "hidden_size": 4}, FileError, "6 query heads over 2 KV heads of size 0"),
])  # fmt: skip
def test_configs_that_would_compute_something_else_are_refused(
    llama: Path, tmp_path: Path, config: dict[str, Any], kind: type[ShardwrightError], said: str
) -> None:
    with pytest.raises(kind) as caught:
        load(changed(llama, tmp_path / "model", config), SingleGroup())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)


def test_a_missing_key_is_named(llama: Path, tmp_path: Path) -> None:
    path = changed(llama, tmp_path / "model", {})
    said = json.loads((path / "config.json").read_text())
    del said["intermediate_size"]
    (path / "config.json").write_text(json.dumps(said))
    with pytest.raises(FileError, match=r"config.json: intermediate_size field required; check the file"):
        load(path, SingleGroup())


def opened_differently(group: Group, paths: list[str]) -> str:
    try:
        load(paths[group.rank], group)
    except FileError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(("change", "differ"), [
    ({"seed": 1}, "weights"),
    ({"rms_norm_eps": 1e-3}, "configs"),
    ({"vocab_size": 40}, "configs and headers and weights"),
])  # fmt: skip
def test_ranks_that_open_different_files_refuse_before_weights_are_used(
    saved: Any, change: dict[str, Any], differ: str
) -> None:
    """As where a directory is swapped while ranks start, or hosts hold different revisions."""
    one, same, other = (str(saved("llama", **SIZES | changes)[1]) for changes in ({}, {}, change))
    assert on_threads(3, opened_differently, [one, same, one]) == ["loaded"] * 3
    said = on_threads(3, opened_differently, [one, other, same])
    for path, error in zip((one, other, same), said, strict=True):
        assert error.startswith(
            f"{path}: rank 1 and rank 0 opened different files by this name: their {differ} differ;"
        )
