"""Shared by the whole suite: the embedded model and its oracle, loaded once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from shardwright.engine.source import ModelSource
from shardwright.models.embedded import embedded_model

settings.register_profile("suite", deadline=None)  # a busy machine's milliseconds are no failure
settings.load_profile("suite")

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about uneven partitions, then explain each line.",
    "def fibonacci(n):",
]
TOKENS = 64
CLOSE = 1e-3
"""Between two words whose logits differ by less, another order of summation may choose either."""


@dataclass(frozen=True)
class Continuation:
    """A prompt, the oracle's greedy continuation, and how many of its tokens are beyond doubt."""

    prompt: list[int]
    tokens: list[int]
    certain: int


@pytest.fixture(scope="session")
def embedded() -> Path:
    return embedded_model()


@pytest.fixture(scope="session")
def oracle(embedded: Path) -> Any:
    """transformers, loading the same file with its own dequantisation, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded.parent, gguf_file=embedded.name, dtype=torch.float32)


@pytest.fixture(scope="session")
def continuations(embedded: Path, oracle: Any) -> list[Continuation]:
    """The oracle's greedy continuations, one prompt at a time."""
    source = ModelSource.open(embedded)
    found = []
    for text in PROMPTS:
        prompt = source.encode(text, raw=False)
        with torch.inference_mode():
            run = oracle.generate(
                torch.tensor([prompt]),
                do_sample=False,
                max_new_tokens=TOKENS,
                output_logits=True,
                return_dict_in_generate=True,
                eos_token_id=sorted(source.tokenizer.stop_ids),
                pad_token_id=0,
            )
        best = torch.cat(run.logits).topk(2, -1).values
        doubtful = ((best[:, 0] - best[:, 1]) < CLOSE).nonzero()
        tokens = run.sequences[0, len(prompt) :].tolist()
        found.append(Continuation(prompt, tokens, int(doubtful[0]) if len(doubtful) else len(tokens)))
    return found
