"""Every family against transformers: logits, greedy texts and gradients, at sizes that divide nothing, on any split.

Float32 logits to 1e-4 of the largest, as in `test_transformers`. Gradients to 5e-4 of each tensor's largest value: of
float64 models, but transformers computes norms, softmax and angles in float32, and some of these softmaxes are steep; a
wrong cut moves a gradient by a tenth and more. Splits among each other agree to 1e-12 (`test_seams`). Texts are longer
than every window and than what rotary scalings were trained on.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.test_transformers import (
    FLOAT32,
    check_logits,
    gathered,
    greedy,
    loaded_logits,
    reference_greedy,
    reference_logits,
)
from torch import Tensor
from transformers import GPTNeoXForCausalLM, PreTrainedModel

from shardwright.comm.group import Group
from shardwright.layers.batch import Batch
from shardwright.layout.spec import Specs
from shardwright.models.families import FAMILIES
from shardwright.models.load import load
from shardwright.testing.models import largest_difference, loss_of
from shardwright.testing.ranks import Processes, on_threads

SMALL: dict[str, Any] = {
    "hidden_size": 30,
    "intermediate_size": 11,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "vocab_size": 23,
    "max_position_embeddings": 64,
    "pad_token_id": 22,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 36}
WIDE = SMALL | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
"""Head sizes that follow from the hidden size."""
TEXTS = [[(7 * i * i + 3 * i + 1) % 22 for i in range(17)], [21], [0, 7]]
"""Without the padding token: transformers gives its embedding no gradient."""
FALCON = {key: SMALL[key] for key in SMALL.keys() - {"num_key_value_heads", "head_dim", "intermediate_size"}}
GROUPED_FALCON = {"new_decoder_architecture": True, "hidden_size": 36, "num_attention_heads": 6, "num_kv_heads": 2}
ALIBI = {"alibi": True, "attn_implementation": "sdpa"}
"""Eager, transformers adds the biases twice: to the mask, and to the scores."""
GPT2 = {
    "n_embd": 35,
    "n_head": 5,
    "n_layer": 3,
    "n_inner": 11,
    "n_positions": 64,
    **{key: SMALL[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 30.0}
    | {"original_max_position_embeddings": 12},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12, "rope_theta": 30.0},
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 12}
    | {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 3.0, 9.0]},
]
"""The first text goes beyond 12 tokens, the others never."""
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 9.0], "rope_theta": 50.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "mistral": ("mistral", GROUPED | {"sliding_window": 4}),
    "mistral without a window": ("mistral", SMALL | {"sliding_window": None}),
    "qwen2": ("qwen2", SMALL),
    "qwen2 with windows": (
        "qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", GROUPED),
    "phi3": ("phi3", SMALL | {"sliding_window": 5}),
    "gemma": ("gemma", SMALL),
    "gemma2": ("gemma2", GROUPED | {"sliding_window": 4, "query_pre_attn_scalar": 13}),
    "gemma2 uncapped": ("gemma2", SMALL | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3", SMALL | {"sliding_window": 3, "sliding_window_pattern": 2, "query_pre_attn_scalar": 13}),
    "olmo2": ("olmo2", GROUPED),
    "olmo2 with one KV head": ("olmo2", SMALL),
    "stablelm": ("stablelm", WIDE | {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "stablelm side by side": ("stablelm", WIDE | {"use_parallel_residual": True}),
    "stablelm with a norm for each head": ("stablelm", WIDE | {"use_parallel_residual": True, "qk_layernorm": True}),
    "gpt_neox": ("gpt_neox", SMALL | {"rope_parameters": {"rope_theta": 99.0, "partial_rotary_factor": 0.7}}),
    "gpt_neox in turn": ("gpt_neox", WIDE | {"use_parallel_residual": False, "attention_bias": False}),
    "falcon 7b": ("falcon", FALCON),
    "falcon 40b": (
        "falcon",
        FALCON | GROUPED_FALCON,
    ),
    "falcon 11b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "bias": True}),
    "falcon in turn": ("falcon", FALCON | {"multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon with ALiBi": ("falcon", FALCON | ALIBI | {"multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon 40b with ALiBi": ("falcon", FALCON | GROUPED_FALCON | ALIBI),
    "gpt2": ("gpt2", GPT2),
    "opt": ("opt", SMALL | {"ffn_dim": 11}),
    **{
        f"llama, {rope['rope_type']}": ("llama", SMALL | {"max_position_embeddings": 12, "rope_parameters": rope})
        for rope in SCALINGS
    },
    "phi3, longrope over half a head": (
        "phi3",
        WIDE | {"original_max_position_embeddings": 12, "partial_rotary_factor": 0.5, "rope_parameters": LONGROPE},
    ),
    "gemma3, linear": (
        "gemma3",
        GROUPED
        | {"sliding_window": 3, "sliding_window_pattern": 2}
        | {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}},
    ),
    "opt without biases": ("opt", SMALL | {"ffn_dim": 11, "enable_bias": False, "activation_function": "gelu"}),
}


@dataclass(frozen=True)
class Twin:
    """A model as transformers has it, where it is saved, and what it computes."""

    model: PreTrainedModel
    path: str
    logits: Tensor
    texts: list[list[int]]


@pytest.fixture(scope="session", params=VARIANTS.values(), ids=VARIANTS)
def twin(request: pytest.FixtureRequest, saved: Any) -> Twin:
    family, sizes = request.param
    model, path = saved(family, **sizes)
    # The model of this kind that remembers its keys does not turn them again when the text grows: nor may its twin.
    dynamic = sizes.get("rope_parameters", {}).get("rope_type") == "dynamic"
    texts = (cached_greedy if dynamic else reference_greedy)(model, TEXTS, steps=8)
    return Twin(model, str(path), reference_logits(model, TEXTS), texts)


def cached_greedy(model: PreTrainedModel, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """As `reference_greedy`, with keys and values remembered from step to step."""
    written = []
    for prompt in prompts:
        text, past, new = list(prompt), None, list(prompt)
        for _ in range(steps):
            with torch.no_grad():
                step = model(torch.tensor([new]), past_key_values=past, use_cache=True)
            new, past = [int(step.logits[0, -1].argmax())], step.past_key_values
            text += new
        written.append(text)
    return written


def check_everything(group: Group, twin: Twin, gradients: dict[str, Tensor], loss: float) -> None:
    model = load(twin.path, group).model
    with torch.no_grad():
        logits = gathered(model, model(Batch.whole(TEXTS)))
    assert (logits - twin.logits).abs().max() <= FLOAT32 * twin.logits.abs().max()
    assert greedy(group, twin.path, TEXTS, 4, 8) == twin.texts
    model = model.double()
    ours = loss_of(model, TEXTS)
    ours.backward()
    model.reduce_gradients()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    assert abs(ours.item() - loss) < 1e-6 * loss
    assert largest_difference(found, mattering(model.specs(), gradients), gradients) < 5e-4


def mattering(specs: Specs, gradients: dict[str, Tensor]) -> Specs:
    """Less the key biases of models without rotation: each adds the same to all scores of a query, so that its gradient
    is zero but for rounding.
    """
    none = {name for name, gradient in gradients.items() if gradient.abs().max() < 1e-5}
    assert all(name.endswith("k_proj.bias") for name in none)
    return {
        name: replace(spec, pieces=tuple(piece for piece in spec.pieces if piece.source not in none))
        for name, spec in specs.items()
    }


def check_all_logits(group: Group, saved: list[tuple[str, list[list[float]]]]) -> None:
    for path, expected in saved:
        check_logits(group, path, TEXTS, expected)


def test_logits_equal_on_processes(saved: Any, three_processes: Processes) -> None:
    """Over shared memory: the all-reduce of T x 2, blocks side by side, norms around."""
    models = [saved(*VARIANTS[name][:1], **VARIANTS[name][1]) for name in ("olmo2", "falcon 40b", "gemma2", "gpt2")]
    expected = [(str(path), reference_logits(model, TEXTS).tolist()) for model, path in models]
    three_processes.run(check_all_logits, expected)


def test_files_of_the_bare_model_load_too(saved: Any, tmp_path: Path) -> None:
    """As the published GPT-2 files are: names without `transformer.`, and buffers that nothing reads."""
    model, path = saved("gpt2", **GPT2)
    tensors = load_file(path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.1.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    save_file(bare, tmp_path / "model.safetensors")
    expected = reference_logits(model, TEXTS)
    for logits in on_threads(3, loaded_logits, str(tmp_path), TEXTS):
        assert (logits - expected).abs().max() <= FLOAT32 * expected.abs().max()


def test_every_family_is_here() -> None:
    assert {family for family, _ in VARIANTS.values()} == {family.name for family in FAMILIES}


def test_logits_texts_and_gradients_equal(twin: Twin) -> None:
    """At TP 1, 2, 3 and 5: heads, features and words divide by none of the last three in all variants."""
    wide = twin.model.double()
    wide.zero_grad()
    logits = torch.cat([wide(torch.tensor([text])).logits[0, :-1] for text in TEXTS])
    targets = torch.tensor([token for text in TEXTS for token in text[1:]])
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in wide.named_parameters() if parameter.grad is not None}
    if isinstance(wide, GPTNeoXForCausalLM):  # named so in memory, and otherwise in files
        gradients["embed_out.weight"] = gradients.pop("lm_head.weight")
    for tp in (1, 2, 3, 5):
        on_threads(tp, check_everything, twin, gradients, loss.item())
