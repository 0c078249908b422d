"""Whole models against transformers, which shares no code with ours: logits, greedy texts, gradients, half types.

Tolerance of float32 logits: 1e-4 of the largest one. Two float32 summation orders differ by some 3e-7 here; a head read
from the wrong KV head, a bias added twice or a rotation by the neighbouring position moves logits by 1e-2 and more.
"""

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
from shardwright.testing.ranks import Processes, on_threads

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
SMALL: dict[str, Any] = {
    "hidden_size": 18,
    "intermediate_size": 11,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 23,
}
TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [22], [0, 7]]


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
def texts(draw: st.DrawFn, vocabulary: int) -> list[list[int]]:
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    return [[(5 * i + 3 * j * j + length) % vocabulary for j in range(length)] for i, length in enumerate(lengths)]


def reference_logits(model: PreTrainedModel, sequences: list[list[int]]) -> Tensor:
    """`[T, V]`, one sequence at a time."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([sequence])).logits[0] for sequence in sequences])


def gathered(model: Decoder, logits: Tensor) -> Tensor:
    return regions.gather(logits, 1, model.cuts.vocabulary.widths, model.group)


def loaded_logits(group: Group, path: str, sequences: list[list[int]]) -> Tensor:
    model = load(path, group).model
    with torch.no_grad():
        return gathered(model, model(Batch.whole(sequences)))


def check_logits(group: Group, path: str, sequences: list[list[int]], expected: list[list[float]]) -> None:
    """As `loaded_logits`, but of JSON and giving none back, so that processes can run it."""
    whole = torch.tensor(expected)
    assert (loaded_logits(group, path, sequences) - whole).abs().max() <= FLOAT32 * whole.abs().max()


def greedy(group: Group, path: str, prompts: list[list[int]], page: int, steps: int) -> list[list[int]]:
    """Greedy continuations through pages: the prompts in one batch, then a token of each in every batch."""
    model = load(path, group).model
    heads, size = model.cuts.heads.kv_width(group.rank), model.config.head_size
    each = -(-(max(map(len, prompts)) + steps) // page)
    kv = [PagedKV(page, heads, size, torch.float32, each * len(prompts)) for _ in model.layers]
    tables = tuple(tuple(range(i, each * len(prompts), len(prompts))) for i in range(len(prompts)))
    written = [list(prompt) for prompt in prompts]
    new = [list(prompt) for prompt in prompts]
    with torch.inference_mode():
        for _ in range(steps):
            starts = [len(text) - len(tokens) for text, tokens in zip(written, new, strict=True)]
            batch = Batch(
                tokens=torch.tensor([token for tokens in new for token in tokens]),
                positions=torch.cat([torch.arange(s, len(t)) for s, t in zip(starts, written, strict=True)]),
                lengths=tuple(map(len, new)),
                held=tuple(map(len, written)),
                tables=tables,
                rows=torch.tensor(list(map(len, new))).cumsum(0) - 1,
            )
            new = gathered(model, model(batch, kv)).argmax(1, keepdim=True).tolist()
            written = [text + tokens for text, tokens in zip(written, new, strict=True)]
    return written


def reference_greedy(model: PreTrainedModel, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """The same by computing each whole text anew at every step."""
    written = [list(prompt) for prompt in prompts]
    for _ in range(steps):
        written = [[*text, int(reference_logits(model, [text])[-1].argmax())] for text in written]
    return written


@settings(max_examples=80, deadline=None, derandomize=True)
@given(model=models(), tp=st.integers(1, 6), data=st.data())
def test_logits_equal(saved: Any, model: tuple[str, dict[str, Any]], tp: int, data: st.DataObject) -> None:
    twin, path = saved(model[0], **model[1])
    sequences = data.draw(texts(model[1]["vocab_size"]))
    expected = reference_logits(twin, sequences).tolist()
    on_threads(tp, check_logits, str(path), sequences, expected)


@pytest.mark.long
@settings(max_examples=600, deadline=None)
@given(model=models(), tp=st.integers(1, 12), data=st.data())
def test_logits_equal_on_many_more(saved: Any, model: tuple[str, dict[str, Any]], tp: int, data: st.DataObject) -> None:
    twin, path = saved(model[0], **model[1])
    sequences = data.draw(texts(model[1]["vocab_size"]))
    on_threads(tp, check_logits, str(path), sequences, reference_logits(twin, sequences).tolist())


def test_logits_equal_on_processes(saved: Any, three_processes: Processes) -> None:
    """Gloo sums in an order of its own: the same tolerance."""
    twin, path = saved("qwen3", **SMALL, attention_bias=True)
    three_processes.run(check_logits, str(path), TEXTS, reference_logits(twin, TEXTS).tolist())


@pytest.mark.parametrize(("tp", "page"), [(1, 64), (2, 1), (3, 4), (6, 7)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_texts_equal(saved: Any, family: str, tp: int, page: int) -> None:
    """Token for token: the best two logits of these weights are never as near as two orders of summation."""
    twin, path = saved(family, **SMALL)
    expected = reference_greedy(twin, TEXTS, steps=12)
    for written in on_threads(tp, greedy, str(path), TEXTS, page, 12):
        assert written == expected


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "olmo2"])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)], ids=["bfloat16", "float16"])
def test_half_types_load_as_they_are(saved: Any, family: str, dtype: torch.dtype, bits: int) -> None:
    """Logits to eight roundings of a mantissa of `bits`, of the largest logit.

    Each of 2 layers rounds some four times, and every rank rounds its part before the sum.
    """
    twin, path = saved(family, **SMALL, dtype=dtype)
    expected = reference_logits(twin, TEXTS)
    for tp in (1, 4, 6):
        for logits in on_threads(tp, loaded_logits, str(path), TEXTS):
            assert logits.dtype == dtype
            assert (logits - expected).abs().max() <= 8 * 2.0**-bits * expected.abs().max()


def check_gradients(group: Group, path: str, expected: dict[str, Tensor], loss: float) -> None:
    model = load(path, group, dtype="float64").model
    ours = loss_of(model, TEXTS)
    ours.backward()
    model.reduce_gradients()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    assert abs(ours.item() - loss) < 1e-6
    assert largest_difference(found, model.specs(), expected) < 1e-5


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_equal(saved: Any, family: str, changes: dict[str, Any], tp: int) -> None:
    """Of every parameter, of mean cross-entropy over all sequences.

    In float64, less the norms, which transformers computes in float32: hence 1e-5 of each tensor's largest value.
    """
    twin, path = saved(family, **SMALL, **changes, dtype=torch.float64)
    logits = torch.cat([twin(torch.tensor([text])).logits[0, :-1] for text in TEXTS])
    targets = torch.tensor([token for text in TEXTS for token in text[1:]])
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    on_threads(tp, check_gradients, str(path), gradients, loss.item())
