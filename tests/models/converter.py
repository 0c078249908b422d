"""GGUF files of transformers' models, as llama.cpp's converter writes them.

Its facts, from ggml-org/llama.cpp's `conversion/`: names of tensors are the gguf package's own table; Gemma's norms
have one added; q and k of Llama have the halves of each head interleaved; the fused q, k, v of GPT-NeoX and Falcon lie
one after another; GPT-2's matrices are transposed. Keys are those each converter sets.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedModel

Extra = Callable[[gguf.GGUFWriter], object]
ARCHITECTURES = {"gpt_neox": "gptneox", "mistral": "llama"}


def nothing(writer: gguf.GGUFWriter) -> None:
    """No further keys."""


def write(path: Path, family: str, model: PreTrainedModel, kind: Type = Type.F32, extra: Extra = nothing) -> None:
    """A GGUF file of the model, whose own matrices become what `kind` makes of them, so that both hold the same."""
    architecture = ARCHITECTURES.get(family, family)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    DESCRIBE.get(family, describe)(writer, model.config)
    for name, parameter in joined(model).items():
        stem, _, kind_of_parameter = name.rpartition(".")
        values = parameter.detach().numpy()
        if family.startswith("gemma") and stem.endswith("norm"):
            values = values + 1
        swapped = family == "gpt2" and stem.endswith(("c_attn", "c_proj", "c_fc")) and values.ndim == 2
        stored_as = kind if values.ndim == 2 else Type.F32
        rows = gguf.quants.quantize(np.ascontiguousarray(values.T) if swapped else values, stored_as)
        if kind != Type.F32 and values.ndim == 2:
            held = torch.tensor(gguf.quants.dequantize(rows, stored_as))
            parameter.data = held.T.contiguous() if swapped else held
        order = rearranged(family, stem, len(values), model.config)
        rows = rows if order is None else rows[order]
        writer.add_tensor(f"{names.get_name(stem)}.{kind_of_parameter}", rows, raw_dtype=stored_as)
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def joined(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Its parameters, with StableLM's norms of the heads of a layer as the rows of one matrix."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        stem, norms, _ = name.partition(".norms.")
        if norms:
            rows = found.get(f"{stem}.weight", parameter.data[:0].view(0, len(parameter)))
            found[f"{stem}.weight"] = torch.cat((rows, parameter.data[None]))
        else:
            found[name] = parameter
    return found


def rearranged(family: str, stem: str, rows: int, config: Any) -> np.ndarray | None:
    """In which order the converter puts the rows of a tensor."""
    order = np.arange(rows)
    heads = config.num_attention_heads
    if family in ("llama", "mistral") and stem.endswith(("q_proj", "k_proj")):
        return permuted(order[:, None], heads if stem.endswith("q_proj") else config.num_key_value_heads)[:, 0]
    if family in ("gpt_neox", "falcon") and stem.endswith("query_key_value"):
        kv_heads = heads if family == "gpt_neox" else falcon_kv_heads(config)
        groups = order.reshape(kv_heads, heads // kv_heads + 2, -1)
        return np.concatenate([groups[:, :-2].ravel(), groups[:, -2].ravel(), groups[:, -1].ravel()])
    return None


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: the two halves of a head interleaved."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def falcon_kv_heads(config: Any) -> int:
    """The published 7B says none, which is one."""
    return int(config.num_kv_heads) if config.new_decoder_architecture else 1


def describe(writer: gguf.GGUFWriter, config: Any) -> None:
    """What the converter says of most models."""
    sizes(writer, config, config.intermediate_size, config.max_position_embeddings)
    writer.add_head_count_kv(config.num_key_value_heads)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    ropes = config.rope_parameters
    rope = ropes.get("full_attention", ropes)
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def sizes(writer: gguf.GGUFWriter, config: Any, feed_forward: int, context: int) -> None:
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(feed_forward)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)


def describe_gemma2(writer: gguf.GGUFWriter, config: Any) -> None:
    describe(writer, config)
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def describe_phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    """Nothing says that factors are LongRoPE's; those tensors do."""
    rope = config.rope_parameters
    share = rope.get("partial_rotary_factor", 1.0)
    describe(writer, config)
    writer.add_rope_dimension_count(int(share * config.hidden_size) // config.num_attention_heads)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        stretch = config.max_position_embeddings / config.original_max_position_embeddings
        attention = (1 + np.log(stretch) / np.log(config.original_max_position_embeddings)) ** 0.5
        writer.add_rope_scaling_attn_factors(float(attention))
        for length in ("long", "short"):
            factors = np.array(rope[f"{length}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)


def describe_stablelm(writer: gguf.GGUFWriter, config: Any) -> None:
    sizes(writer, config, config.intermediate_size, config.max_position_embeddings)
    writer.add_head_count_kv(config.num_key_value_heads)
    share = config.rope_parameters["partial_rotary_factor"]
    writer.add_rope_dimension_count(int(share * (config.hidden_size // config.num_attention_heads)))
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_layer_norm_eps(config.layer_norm_eps)


def describe_gpt_neox(writer: gguf.GGUFWriter, config: Any) -> None:
    sizes(writer, config, config.intermediate_size, config.max_position_embeddings)
    share = config.rope_parameters["partial_rotary_factor"]
    writer.add_rope_dimension_count(int(share * (config.hidden_size // config.num_attention_heads)))
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_layer_norm_eps(config.layer_norm_eps)


def describe_falcon(writer: gguf.GGUFWriter, config: Any) -> None:
    sizes(writer, config, 4 * config.hidden_size, 2048)
    writer.add_tensor_data_layout("jploski")
    writer.add_head_count_kv(falcon_kv_heads(config))
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def describe_gpt2(writer: gguf.GGUFWriter, config: Any) -> None:
    sizes(writer, config, 4 * config.n_embd, config.n_positions)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


DESCRIBE: dict[str, Callable[[gguf.GGUFWriter, Any], None]] = {
    "gemma2": describe_gemma2,
    "gemma3": describe_gemma2,
    "phi3": describe_phi3,
    "stablelm": describe_stablelm,
    "gpt_neox": describe_gpt_neox,
    "falcon": describe_falcon,
    "gpt2": describe_gpt2,
}
