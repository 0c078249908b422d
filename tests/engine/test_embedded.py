"""The main job: the embedded model, split over any number of ranks, says what transformers says.

9 query and 3 KV heads: no rank count above 1 but 3 and 9 divides them, and at 10 and 16 some ranks own no head.
"""

from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Continuation
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shardwright.comm.group import Group
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.thread import ThreadGroup
from shardwright.engine.engine import Engine
from shardwright.engine.llm import LLM
from shardwright.engine.request import Request, SamplingParams
from shardwright.layout.spec import stored_bytes
from shardwright.models.load import load


def agree(tokens: list[int], expected: Continuation) -> None:
    """Equal as far as the oracle is certain of its own choice."""
    certain = min(expected.certain, len(tokens))
    assert certain > 8 or certain == len(expected.tokens), "the oracle doubts too early to tell anything"
    assert tokens[:certain] == expected.tokens[:certain]


@pytest.mark.parametrize(("tp", "count"), [(1, 64), (2, 64), (3, 64), (5, 16)])
def test_processes_agree_with_transformers(tp: int, count: int, continuations: list[Continuation]) -> None:
    """All prompts in one batch, through the public class; the bytes each rank read and holds are its own."""
    with LLM(tp=tp) as llm:
        given = llm.generate([c.prompt for c in continuations], SamplingParams(max_tokens=count))
        report = llm.report
    for completion, expected in zip(given, continuations, strict=True):
        assert completion.prompt_token_ids == expected.prompt
        assert len(completion.token_ids) == min(count, len(expected.tokens)) or expected.certain < count
        agree(completion.token_ids, expected)
    assert report.tp == tp == len(report.ranks)
    assert 0 <= report.comm_share < 1
    assert report.tokens_per_s > 0


def generated(group: Group, path: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy continuations, on whatever ranks the group is of."""
    engine = Engine(load(path, group).model)
    for number, prompt in enumerate(prompts):
        engine.add(Request(number=number, tokens=tuple(prompt), params=SamplingParams(max_tokens=count)))
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.busy:
        for new in engine.step():
            tokens[new.number].append(new.token)
    return tokens


@pytest.mark.parametrize("tp", [4, 7, 9, 10, 16])
def test_threads_agree_with_transformers(tp: int, embedded: Path, continuations: list[Continuation]) -> None:
    """16 tokens at rank counts above the KV heads, equal to the query heads, and above them."""
    prompts = [c.prompt for c in continuations]
    everyone = ThreadGroup.run(tp, lambda group: generated(group, embedded, prompts, 16))
    assert all(tokens == everyone[0] for tokens in everyone), "every rank samples the same tokens"
    for tokens, expected in zip(everyone[0], continuations, strict=True):
        agree(tokens, expected)


def test_a_step_communicates_two_all_reduces_a_layer_one_for_the_embedding_and_one_exchange(embedded: Path) -> None:
    """The budget, in calls and in bytes: T x H of float32 each, and a (value, word) pair in float64 for the token."""

    def step(group: Group) -> tuple[list[tuple[str, int]], int]:
        recorder = RecordingGroup(group)
        engine = Engine(load(embedded, recorder).model)
        recorder.calls.clear()  # of loading: one exchange, of what was opened
        engine.add(Request(number=0, tokens=(1, 2, 3, 4, 5), params=SamplingParams(max_tokens=2)))
        engine.step()
        first = len(recorder.calls)
        engine.step()
        return [(call.op, call.bytes) for call in recorder.calls], first

    for calls, first in ThreadGroup.run(2, step):
        reduces = 1 + 2 * 30
        assert calls[:first] == [("all_reduce", 5 * 576 * 4)] * reduces + [("all_gather", 16)]
        assert calls[first:] == [("all_reduce", 576 * 4)] * reduces + [("all_gather", 16)]


@pytest.mark.parametrize("tp", [1, 2, 3, 7])
def test_each_rank_reads_and_holds_its_own_bytes(tp: int, embedded: Path) -> None:
    """Weights over all ranks are the model plus its replicas; the file is read once plus the replicas' share."""

    def sizes(group: Group) -> tuple[int, int, int]:
        loaded = load(embedded, group)
        tables = [loaded.model.specs(rank) for rank in range(tp)]
        held = sum(parameter.nbytes for parameter in loaded.model.parameters())
        assert held == loaded.weight_bytes
        return held, loaded.bytes_read, sum(stored_bytes(tables))

    everyone = ThreadGroup.run(tp, sizes)
    assert sum(weights for weights, _, _ in everyone) == everyone[0][2]
    whole = 96_576_768  # bytes of all tensors in the file: its length less its header
    held = 538_060_032  # the same tensors in float32
    for weights, read, _ in everyone:
        assert read <= 1.05 * whole * weights / held + 4096


def test_the_same_model_as_a_hugging_face_directory(
    embedded: Path, oracle: Any, continuations: list[Continuation], tmp_path: Path
) -> None:
    """Written by transformers as one safetensors file, with a tokenizer: other names and another order of rows."""
    config = {key: value for key, value in oracle.config.to_dict().items() if key != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(oracle.state_dict())
    plain.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(embedded.parent, gguf_file=embedded.name).save_pretrained(tmp_path)
    with LLM(tmp_path, tp=2) as llm:
        given = llm.generate([c.prompt for c in continuations], SamplingParams(max_tokens=24))
        assert llm.generate("What is the capital of France?")[0].text == "The capital of France is Paris."
        assert sum(rank.bytes_read for rank in llm.report.ranks) < 1.02 * sum(r.weight_bytes for r in llm.report.ranks)
    for completion, expected in zip(given, continuations, strict=True):
        agree(completion.token_ids, expected)
