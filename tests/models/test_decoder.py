"""The decoder's communication budget, and uses that a module must survive: copies, casts, empty ranks and sequences."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.comm import regions
from shardwright.comm.group import Call, Group
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.errors import UsageError
from shardwright.layers.batch import Batch
from shardwright.models.decoder import Decoder
from shardwright.models.specs import Cuts
from shardwright.testing.models import largest_difference, tiny_config, whole_tensors
from shardwright.testing.ranks import on_threads

SEQUENCES = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3]]
TOKENS = 10
ONE = [[11]]
NO_CHANGES: Mapping[str, Any] = MappingProxyType({})


def logits_of(
    group: Group, sequences: list[list[int]], dtype: torch.dtype, changes: Mapping[str, Any] = NO_CHANGES
) -> Tensor:
    model = Decoder(tiny_config(**changes), group).to(dtype)
    with torch.no_grad():
        return regions.gather(model(Batch.whole(sequences)), 1, model.cuts.vocabulary.widths, group)


def step(group: Group) -> list[Call]:
    recording = RecordingGroup(group)
    model = Decoder(tiny_config(), recording)
    model(Batch.whole(SEQUENCES)).sum().backward()
    return recording.calls


def test_a_step_moves_the_embedding_and_twice_each_layer() -> None:
    """All-reduces of T x H float32 only: 1 + 2 a layer forward; 1 + 2 a layer backward, whose one is the head's."""
    budget = TOKENS * tiny_config().hidden * 4
    for calls in on_threads(4, step):
        assert {(call.op, call.bytes) for call in calls} == {("all_reduce", budget)}
        forward = [call.tag for call in calls if not call.tag.endswith("/grad")]
        inner = [f"layers.{layer}.{part}" for layer in range(2) for part in ("attention.out", "mlp.down")]
        assert forward == ["embedding", *inner]
        inner = [f"layers.{layer}.{part}/grad" for layer in (1, 0) for part in ("mlp.gate_up", "attention.qkv")]
        assert [call.tag for call in calls][len(forward) :] == ["head.logits/grad", *inner]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sequences", [SEQUENCES, ONE, [[], [5], []], [[]], []])
@pytest.mark.parametrize("tp", [2, 7, 24])
def test_ranks_with_nothing_in_any_type(tp: int, sequences: list[list[int]], dtype: torch.dtype) -> None:
    """7 ranks leave one without heads, 24 leave the last without heads, features and words; T may be 1 or 0.

    float64 to 1e-12: another order of summation is 1e-15. Half types to 4 units in the last place of the largest logit:
    each rank rounds its part of each of five sums.
    """
    expected = logits_of(SingleGroup(), sequences, dtype)
    assert expected.shape == (sum(map(len, sequences)), 23)
    tolerance = max(1e-12, 4 * torch.finfo(dtype).eps)
    for logits in on_threads(tp, logits_of, sequences, dtype):
        assert logits.dtype == dtype
        scale = expected.abs().max() if expected.numel() else 1
        torch.testing.assert_close(logits, expected, rtol=0, atol=float(tolerance * scale))


@pytest.mark.parametrize("changes", [{"tied": True}, {"vocabulary": 3}, {"tied": True, "vocabulary": 3}])
def test_more_ranks_than_words(changes: dict[str, Any]) -> None:
    """5 ranks over 3 words, tied or not; float64 to another order of summation."""
    sequences = [[0, 2, 1], [2]]
    expected = logits_of(SingleGroup(), sequences, torch.float64, changes)
    for logits in on_threads(5, logits_of, sequences, torch.float64, changes):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_rows_choose_logits() -> None:
    """Bit for bit the rows of all logits: nothing after the choice mixes rows. Float64, so that a matmul of fewer rows,
    which may sum in another order, still agrees to 1e-15.
    """
    model = Decoder(tiny_config(), SingleGroup()).double()
    batch = Batch.whole(SEQUENCES)
    rows = torch.tensor([6, 9])
    some = model(Batch(batch.tokens, batch.positions, batch.lengths, batch.held, rows=rows))
    torch.testing.assert_close(some, model(batch)[rows], rtol=0, atol=1e-15)


def test_sequences_do_not_see_each_other() -> None:
    """Alone or in company, the same logits to another order of summation in float64."""
    model = Decoder(tiny_config(), SingleGroup()).double()
    together = model(Batch.whole(SEQUENCES))
    alone = torch.cat([model(Batch.whole([sequence])) for sequence in SEQUENCES])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-14)


def test_positions_at_the_end_of_the_context() -> None:
    """Rotary embedding is relative: shifted to the context's end, a sequence has the same logits.

    To 1e-3 of the largest logit: float32 holds angles of 1,311 to 6e-5. Positions in another order change it wholly.
    """
    model = Decoder(tiny_config(context=131_072), SingleGroup()).double()
    for layer in model.layers:
        layer.attention.qkv.weight.data.mul_(10)  # so that attention is far from uniform
    batch = Batch.whole([SEQUENCES[0]])
    shifted = Batch(batch.tokens, batch.positions + 131_072 - 7, batch.lengths, batch.held)
    start, end = model(batch), model(shifted)
    assert (start - end).abs().max() <= 1e-3 * start.abs().max()
    backwards = Batch(batch.tokens, batch.positions.flip(0), batch.lengths, batch.held)
    assert (start - model(backwards)).abs().max() > 0.1 * start.abs().max()


def test_copies_and_saved_states_compute_the_same() -> None:
    """Bit for bit: the same arithmetic on the same weights."""
    model = Decoder(tiny_config(qkv_bias=True), SingleGroup())
    model.reset(seed=7)
    expected = model(Batch.whole(SEQUENCES))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(Batch.whole(SEQUENCES)), expected)
    twin.reset(seed=8)
    assert not torch.equal(twin(Batch.whole(SEQUENCES)), expected)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(Batch.whole(SEQUENCES)), expected)
    assert torch.equal(model(Batch.whole(SEQUENCES)), expected)


def test_tables_follow_the_dtype() -> None:
    model = Decoder(tiny_config(), SingleGroup())
    assert {spec.dtype for spec in model.specs().values()} == {"float32"}
    model.to(torch.bfloat16)
    assert {spec.dtype for spec in model.specs().values()} == {"bfloat16"}
    assert model.layers[0].mlp.down.specs()["weight"].dtype == "bfloat16"


def test_inference_mode_holds_on_all_ranks() -> None:
    """Built and run inside it: nothing writes to what it may not."""
    with torch.inference_mode():
        for logits in on_threads(3, logits_of, SEQUENCES, torch.float32):
            assert logits.is_inference()


def test_initial_values_do_not_depend_on_the_split() -> None:
    """Every parameter's pieces are bit for bit those of the unsharded model; norms are 1 and biases 0."""
    changes = {"family": "qwen3", "qk_norm": True, "qkv_bias": True}

    def difference(group: Group) -> float:
        twin, model = (Decoder(tiny_config(**changes), g) for g in (SingleGroup(), group))
        model.reset(3)
        twin.reset(3)
        whole = whole_tensors(dict(twin.named_parameters()), twin.specs())
        assert bool((model.norm.weight == 1).all())
        assert not model.layers[0].attention.qkv.bias.any()
        return largest_difference(dict(model.named_parameters()), model.specs(), whole)

    for tp in (2, 4, 7):
        assert on_threads(tp, difference) == [0.0] * tp


def test_a_value_that_is_no_number_is_no_agreement() -> None:
    """The comparison that all these tests rest on: a NaN on either side differs infinitely."""
    model = Decoder(tiny_config(), SingleGroup())
    held = {name: parameter.detach() for name, parameter in model.named_parameters()}
    whole = whole_tensors(held, model.specs())
    assert largest_difference(held, model.specs(), whole) == 0
    bad = held | {"norm.weight": held["norm.weight"].clone().index_fill(0, torch.tensor([3]), float("nan"))}
    assert largest_difference(bad, model.specs(), whole) == float("inf")


def test_cuts_of_another_number_of_ranks_are_refused() -> None:
    config = tiny_config()
    with pytest.raises(UsageError, match=r"partition=\(8, 8, 7\): embedding runs on 1 ranks; give one width"):
        Decoder(config, SingleGroup(), Cuts.balanced(config, 3))
