"""Tiny random models made and saved by transformers: the oracle that shares no code with ours."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from shardwright.testing.ranks import Processes

CLASSES = {
    "falcon": "FalconForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "opt": "OPTForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
}
"""Our name of a family → transformers' class."""


@pytest.fixture(scope="session")
def three_processes() -> Iterator[Processes]:
    """One set for all tests of models that want three ranks over shared memory."""
    with closing(Processes(3)) as processes:
        yield processes


Saved = tuple[PreTrainedModel, Path]
Save = Callable[..., Saved]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """`saved(family, dtype=…, seed=…, **sizes)`: a model whose weights make every part matter; its path."""
    logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("saved")

    def save(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> Saved:
        model_class = getattr(transformers, CLASSES[family])
        model = model_class(model_class.config_class(**{"attn_implementation": "eager"} | sizes)).to(dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.data.normal_(centre, 0.4, generator=generator)
        where = Path(mkdtemp(dir=root))
        model.save_pretrained(where)
        return model, where

    return save
