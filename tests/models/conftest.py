"""Tiny random models made and saved by transformers: the oracle that shares no code with ours."""

from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

Saved = tuple[PreTrainedModel, Path]
Save = Callable[..., Saved]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """`saved(family, dtype=…, seed=…, **sizes)`: a model whose weights make every part matter; its path."""
    logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("saved")

    def save(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> Saved:
        kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
        config, model_class = kinds[family]
        model = model_class(config(attn_implementation="eager", **sizes)).to(dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.data.normal_(centre, 0.4, generator=generator)
        where = Path(mkdtemp(dir=root))
        model.save_pretrained(where)
        return model, where

    return save
