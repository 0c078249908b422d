"""Whole models against transformers, which shares no code with ours: logits, greedy texts, gradients, half types.

Tolerance of float32 logits: 1e-4 of the largest one. Two float32 summation orders differ by some 3e-7 here; a head read
from the wrong KV head, a bias added twice or a rotation by the neighbouring position moves logits by 1e-2 and more.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from shardwright.comm import regions
from shardwright.comm.group import Group
from shardwright.layers.batch import Batch
from shardwright.layers.kv import PagedKV
from shardwright.models.decoder import Decoder
from shardwright.models.load import load
from shardwright.testing.models import largest_difference, loss_of
from shardwright.testing.ranks import on_processes, on_threads

FLOAT32 = 1e-4
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 300.0,
}
"""With an original context this short, some pairs of a tiny head are kept, some stretched and some blended."""
ODD: dict[str, Any] = {
    "hidden_size": 15,
    "intermediate_size": 11,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 6,
    "vocab_size": 23,
}
SEQUENCES = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [22], [0, 7]]


@st.composite
def models(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A family and sizes for transformers' config; Llama's wants H to be a multiple of N, Qwen3's does not."""
    family = draw(st.sampled_from(("llama", "qwen3")))
    heads = draw(st.integers(1, 9))
    sizes: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        "head_dim": draw(st.sampled_from((2, 4, 6, 10))),
        "hidden_size": heads * draw(st.sampled_from((1, 3, 5))) if family == "llama" else draw(st.sampled_from(PRIMES)),
        "intermediate_size": draw(st.sampled_from(PRIMES)),
        "vocab_size": draw(st.sampled_from(PRIMES)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-2))),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from((10.0, 1e4, 1e6)))},
        "seed": draw(st.integers(0, 999)),
    }
    if family == "llama":
        sizes["mlp_bias"] = draw(st.booleans())
        if draw(st.booleans()):
            sizes["rope_parameters"] = LLAMA3
    return family, sizes


@st.composite
def batches(draw: st.DrawFn, vocabulary: int) -> list[list[int]]:
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    return [[(7 * i + 3 * j * j + number) % vocabulary for j in range(n)] for number, (i, n) in enumerate(enumerate(lengths))]


def reference_logits(model: PreTrainedModel, sequences: list[list[int]]) -> Tensor:
    """One sequence at a time, `[T, V]`."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([sequence])).logits[0] for sequence in sequences])


def gathered(model: Decoder, logits: Tensor) -> Tensor:
    return regions.gather(logits, 1, model.cuts.vocabulary.widths, model.group)


def loaded_logits(group: Group, path: str, sequences: list[list[int]]) -> list[list[float]]:
    """What the ranks compute together, as JSON has it."""
    model = load(path, group).model
    with torch.no_grad():
        values: list[list[float]] = gathered(model, model(Batch.whole(sequences))).tolist()
    return values


def check_paged_greedy(group: Group, path: str, prompts: list[list[int]], page: int, steps: int) -> list[list[int]]:
    """Greedy continuations by pages; each step's logits against those of the whole sequences recomputed.

    Sequence i joins at step i, its prompt in two chunks, so that batches mix prefill and decode; the pages of
    different sequences interleave. A chunk sums in another order than the whole: float32's tolerance.
    """
    model = load(path, group).model
    config, heads = model.config, model.cuts.heads.kv_width(group.rank)
    count = max(len(prompt) for prompt in prompts) + steps
    pages = -(-count // page) * len(prompts)
    kv = [PagedKV(page, heads, config.head_size, torch.float32, pages) for _ in range(config.layers)]
    texts, held = [list(prompt) for prompt in prompts], [0] * len(prompts)
    with torch.inference_mode():
        for step in range(steps + len(prompts)):
            chunks = []
            for i, text in enumerate(texts[: step + 1]):
                half = len(text) // 2
                stop = half if held[i] == 0 and half else len(text)
                chunks.append((i, held[i], stop))
            batch = Batch(
                tokens=torch.tensor([token for i, start, stop in chunks for token in texts[i][start:stop]]),
                positions=torch.tensor([position for _, start, stop in chunks for position in range(start, stop)]),
                lengths=tuple(stop - start for _, start, stop in chunks),
                held=tuple(stop for *_, stop in chunks),
                tables=tuple(tuple(range(i, pages, len(prompts)))[: -(-stop // page)] for i, _, stop in chunks),
            )
            logits = gathered(model, model(batch, kv))
            whole = Batch.whole([texts[i][:stop] for i, _, stop in chunks])
            expected = gathered(model, model(whole))
            for (first, last), (_, end), (i, start, stop) in zip(batch.ranges, whole.ranges, chunks, strict=True):
                fresh = expected[end - (stop - start) : end]
                assert (logits[first:last] - fresh).abs().max() <= FLOAT32 * fresh.abs().max()
                held[i] = stop
                if stop == len(texts[i]):
                    texts[i].append(int(logits[last - 1].argmax()))
    return texts


@pytest.fixture(scope="session")
def odd_path(saved: Any) -> tuple[PreTrainedModel, Path]:
    result: tuple[PreTrainedModel, Path] = saved("llama", **ODD)
    return result


class TestLogits:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(model=models(), tp=st.integers(1, 6), data=st.data())
    def test_equal_transformers(self, saved: Any, model: tuple[str, dict[str, Any]], tp: int, data: st.DataObject) -> None:
        family, sizes = model
        twin, path = saved(family, **sizes)
        sequences = data.draw(batches(sizes["vocab_size"]))
        expected = reference_logits(twin, sequences)
        for values in on_threads(tp, loaded_logits, str(path), sequences):
            assert (torch.tensor(values) - expected).abs().max() <= FLOAT32 * expected.abs().max()
