"""Tiny random models of transformers whose sizes divide nothing: 6 query heads over 2 KV heads, F 44, V 53."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

HEADS = {"num_attention_heads": 6, "vocab_size": 53}
TINY = {**HEADS, "hidden_size": 48, "intermediate_size": 44, "num_hidden_layers": 2, "num_key_value_heads": 2}
GQA = {**TINY, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

ZOO: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GQA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GQA)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GQA)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GQA)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GQA)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GQA, num_local_experts=4)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=24, n_layer=2, n_head=6, vocab_size=53, n_positions=64, embd_pdrop=0.0, attn_pdrop=0.0,
                      resid_pdrop=0.0, bos_token_id=1, eos_token_id=2)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**HEADS, hidden_size=24, ffn_dim=44, num_hidden_layers=2, max_position_embeddings=64,
                     word_embed_proj_dim=24, dropout=0.0)
    ),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**HEADS, hidden_size=24, num_hidden_layers=2, multi_query=True, parallel_attn=True, bias=False)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=24, d_kv=4, d_ff=44, num_layers=2, num_heads=6, vocab_size=53, dropout_rate=0.0,
                    decoder_start_token_id=0)
    ),
    "bert": lambda: hf.BertForMaskedLM(
        hf.BertConfig(**HEADS, **NO_DROPOUT, hidden_size=24, intermediate_size=44, num_hidden_layers=2)
    ),
}  # fmt: skip

UNEVEN = {**GQA, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}
"""Nine query heads over three KV heads: two ranks have 5 and 4, and neither has whole groups."""

ZOO_UNEVEN: dict[str, Callable[[], nn.Module]] = {
    "llama, uneven": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**UNEVEN)),
    "phi3, uneven": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**UNEVEN)),
}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in float64 (Mixtral's grouped product has no float64) and inputs for it, the same on every call."""
    torch.manual_seed(0)
    model = (ZOO | ZOO_UNEVEN)[name]()
    ids = torch.randint(3, 50, (2, 7))
    inputs: dict[str, Any] = {"input_ids": ids}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, 50, (2, 5))
    return model if name == "mixtral" else model.double(), inputs
