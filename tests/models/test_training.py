"""Training on the decoder: sequence parallelism, recomputation, dropout, the cut loss, against the unsharded twin."""

from threading import get_ident
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.comm.group import Call, Group
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.kernels import column_linear
from shardwright.layers.batch import Batch
from shardwright.layers.cross_entropy import vocab_parallel_cross_entropy
from shardwright.layers.dropout import Dropout
from shardwright.layers.flow import Flow
from shardwright.layers.recompute import Keep, KeepAll, RecomputeBlocks, RecomputeCores
from shardwright.models.decoder import Decoder
from shardwright.models.specs import Cuts
from shardwright.testing.models import largest_difference, loss_of, tiny_config, whole_tensors
from shardwright.testing.ranks import Processes, on_threads

SEQUENCES = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [22, 0, 8, 9]]
"""14 tokens: a multiple of 2 and 7 only."""
KEEPS: dict[str, Keep] = {"all": KeepAll(), "selective": RecomputeCores(), "full": RecomputeBlocks()}
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "qwen3": {"family": "qwen3", "qk_norm": True, "tied": True},
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
}

BLOCKS: dict[str, dict[str, Any]] = {
    "post": {"family": "olmo2", "block": "post", "norm": "rms_once", "wide_qk_norm": True},
    "sandwich": {
        "family": "gemma2",
        "block": "sandwich",
        "norm": "rms_plus_one",
        "activation": "gelu_tanh",
        "tied": True,
        "embedding_scale": 4.5,
        "windows": (3, 0),
        "score_cap": 5.0,
        "logit_cap": 3.0,
    },
    "parallel": {
        "family": "gpt_neox",
        "block": "parallel",
        "kv_heads": 6,
        "rotary_size": 2,
        "activation": "gelu",
        "gated": False,
        "norm": "layer",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    "shared norm": {
        "family": "falcon",
        "block": "parallel_shared",
        "kv_heads": 1,
        "activation": "gelu",
        "gated": False,
        "norm": "layer",
        "tied": True,
    },
    "learned positions": {
        "family": "gpt2",
        "kv_heads": 6,
        "learned_positions": 64,
        "activation": "gelu_tanh",
        "gated": False,
        "norm": "layer",
        "tied": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
}
"""One of each kind of layer, beside Llama's."""


def model_of(group: Group, changes: dict[str, Any], sequence: bool) -> Decoder:
    config = tiny_config(**changes)
    model = Decoder(config, group, Cuts.balanced(config, group.size, sequence=sequence)).double()
    for layer in model.layers:
        if config.out_bias:
            layer.attention.out.bias.data.copy_(torch.arange(20.0).sin())
            layer.mlp.down.bias.data.copy_(torch.arange(20.0).cos())
    return model


def loss_over(model: Decoder, flow: Flow, sequences: list[list[int]]) -> Tensor:
    """Mean loss by the cut loss."""
    batch = Batch.whole(sequences)
    targets = batch.tokens.roll(-1)
    targets[[stop - 1 for _, stop in batch.ranges if stop]] = -1
    losses = vocab_parallel_cross_entropy(model(batch, flow=flow), targets, model.cuts.vocabulary, model.group)
    return losses.sum() / (targets >= 0).sum()


def gradients(model: Decoder) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def check(
    group: Group,
    changes: dict[str, Any],
    sequence: bool,
    keep: str,
    p: float = 0.0,
    sequences: Any = SEQUENCES,
    weights: float = 0.0,
) -> float:
    """Loss and every gradient; without dropout the twin's loss is torch's over gathered logits.

    float64: 1e-12 lies far above another order of summation (1e-15) and far below anything wrong.
    """
    dropout = Dropout(p, seed=5, step=2, attention=weights) if p else None
    twin = model_of(SingleGroup(), changes, sequence=False)
    expected = loss_over(twin, Flow(dropout=dropout), sequences) if p else loss_of(twin, sequences)
    expected.backward()
    model = model_of(group, changes, sequence)
    loss = loss_over(model, Flow(keep=KEEPS[keep], dropout=dropout), sequences)
    loss.backward()
    model.reduce_gradients()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    assert abs(loss.item() - expected.item()) < 1e-12
    assert largest_difference(gradients(model), model.specs(), whole_tensors(gradients(twin), twin.specs())) < 1e-12
    return loss.item()


@pytest.mark.parametrize("tp", [1, 2, 3, 5])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
def test_gradients_equal_the_twin(tp: int, changes: dict[str, Any], sequence: bool) -> None:
    """14 rows over 3 and 5 ranks are uneven; at 5 ranks both KV heads straddle."""
    on_threads(tp, check, changes, sequence, "all")


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("keep", ["selective", "full"])
def test_recomputation_has_the_same_gradients(keep: str, sequence: bool) -> None:
    for tp in (1, 3):
        on_threads(tp, check, VARIANTS["biases"] | VARIANTS["qwen3"], sequence, keep)


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("changes", BLOCKS.values(), ids=BLOCKS)
def test_every_kind_of_layer_deals_out_rows_and_recomputes(changes: dict[str, Any], sequence: bool) -> None:
    for keep in KEEPS:
        on_threads(3, check, changes, sequence, keep)


@pytest.mark.parametrize("keep", KEEPS)
def test_dropout_is_the_same_at_every_split(keep: str) -> None:
    for tp, sequence in ((2, False), (3, True)):
        on_threads(tp, check, VARIANTS["tied"], sequence, keep, 0.3)
        on_threads(tp, check, VARIANTS["qwen3"], sequence, keep, 0.3, SEQUENCES, 0.2)
    losses = [
        on_threads(1, check, VARIANTS["qwen3"], False, keep, 0.3, SEQUENCES, weights)[0] for weights in (0.0, 0.2)
    ]
    assert losses[0] != losses[1]


def test_more_ranks_than_rows_heads_features_and_words() -> None:
    """24 ranks over 3 rows: most hold no row at all, and the last holds nothing of anything."""
    on_threads(24, check, {}, True, "full", 0.0, [[3, 1, 4]])


def test_sequence_parallelism_over_processes(three_processes: Processes) -> None:
    three_processes.run(check, {"tied": True}, True, "full")


def test_norms_under_sequence_parallelism_are_reduced_exactly_once() -> None:
    """Planted: norms taken for whole have a share of the gradient each; the comparison above must see it."""

    def body(group: Group) -> None:
        twin = model_of(SingleGroup(), {}, sequence=False)
        loss_of(twin, SEQUENCES).backward()
        model = model_of(group, {}, sequence=True)
        loss_over(model, Flow(), SEQUENCES).backward()
        whole = whole_tensors(gradients(twin), twin.specs())
        for reductions, right in ((0, False), (1, True), (2, False)):
            if reductions:
                model.reduce_gradients()
            assert (largest_difference(gradients(model), model.specs(), whole) < 1e-12) == right, reductions

    on_threads(3, body)


def step(group: Group, sequence: bool, keep: str, changes: dict[str, Any] | None = None) -> list[Call]:
    recording = RecordingGroup(group)
    model = model_of(recording, changes or {}, sequence)
    loss_over(model, Flow(keep=KEEPS[keep]), SEQUENCES).backward()
    return recording.calls


def names(calls: list[Call]) -> list[tuple[str, str]]:
    return [(call.op, call.tag) for call in calls]


@pytest.mark.parametrize("keep", ["selective", "full"])
def test_recomputation_repeats_no_collective(keep: str) -> None:
    """Whole rows: the same calls as without. The forward's all-reduce is in no backward."""
    again, once = (on_threads(3, step, False, kind)[0] for kind in (keep, "all"))
    assert sorted(names(again)) == sorted(names(once))
    assert len([call for call in again if not call.tag.endswith("/grad")]) == 1 + 2 * 2 + 1


def test_sequence_parallelism_replaces_all_reduces() -> None:
    """Each all-reduce of T x H becomes a reduce-scatter on leaving and an all-gather on entering; the rows that entered
    are gathered again for the weight's gradient, as only a rank's own were kept.
    """
    calls = on_threads(3, step, True, "all")[0]
    blocks = [f"layers.{layer}.{part}" for layer in range(2) for part in ("attention.qkv", "mlp.gate_up")]
    out = [f"layers.{layer}.{part}" for layer in range(2) for part in ("attention.out", "mlp.down")]
    entering = [*blocks, "head.logits"]
    expected = [("reduce_scatter", "embedding"), *(("reduce_scatter", tag) for tag in out)]
    expected += [("all_gather", tag) for tag in (*entering, "loss")]
    expected += [("reduce_scatter", f"{tag}/grad") for tag in entering]
    expected += [("all_gather", f"{tag}/again") for tag in entering]
    expected += [("all_gather", f"{tag}/grad") for tag in ("embedding", *out)]
    assert sorted(names(calls)) == sorted(expected)
    whole = 14 * 20 * 8
    assert {call.bytes for call in calls if call.op == "reduce_scatter"} == {whole}
    assert {call.bytes for call in calls if call.op == "all_gather" and call.tag != "loss"} == {5 * 20 * 8}


@pytest.mark.parametrize("kind", ["parallel", "shared norm"])
@pytest.mark.parametrize("keep", KEEPS)
def test_layers_side_by_side_move_once_each_way(kind: str, keep: str) -> None:
    """Where others move twice; dealt out by rows, they enter once too. Full recomputation enters again, as it must."""
    wide = 2 if kind == "parallel" else 1
    shares, whole = 5 * 20 * 8, 14 * 20 * 8
    entered, left = "layers.1.attention.qkv", "layers.1.attention.out"
    expected = {
        False: [("all_reduce", left, whole), ("all_reduce", f"{entered}/grad", wide * whole)],
        True: [
            *[("all_gather", entered, wide * shares)] * (2 if keep == "full" else 1),
            ("reduce_scatter", left, whole),
            ("all_gather", f"{left}/grad", shares),
            ("reduce_scatter", f"{entered}/grad", wide * whole),
            ("all_gather", f"{entered}/again", wide * shares),
        ],
    }
    for sequence, calls in expected.items():
        made = on_threads(3, step, sequence, keep, BLOCKS[kind])[0]
        found = [(call.op, call.tag, call.bytes) for call in made if call.tag.startswith("layers.1.")]
        assert sorted(found) == sorted(calls)


def test_the_weight_gradient_is_computed_while_the_input_gradient_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The all-reduce of dx has begun, and is not waited for, when dw's product runs."""
    groups: dict[int, Group] = {}
    under_way: list[int] = []
    real = column_linear.of_weight

    def spy(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        under_way.append(len(groups[get_ident()]._ledger.open))
        return real(dy, x, weight)

    def body(group: Group) -> None:
        groups[get_ident()] = group
        loss_over(model_of(group, {}, sequence=False), Flow(), SEQUENCES).backward()

    monkeypatch.setattr(column_linear, "of_weight", spy)
    on_threads(2, body)
    assert under_way == [1] * (2 * 5)


def test_a_bias_of_a_row_parallel_layer_is_added_once() -> None:
    """Planted: a bias of R times its value, as if added before the reduce, is a loss that `check` would refuse."""

    def body(group: Group) -> float:
        model = model_of(group, VARIANTS["biases"], sequence=False)
        right = loss_over(model, Flow(), SEQUENCES).item()
        for layer in model.layers:
            layer.mlp.down.bias.data.mul_(group.size)
        return abs(loss_over(model, Flow(), SEQUENCES).item() - right)

    on_threads(3, check, VARIANTS["biases"], False, "all")
    assert min(on_threads(3, body)) > 1e-9


def test_recomputation_keeps_less() -> None:
    """Bytes that autograd saves, by its own hooks: selective below all, full below selective."""
    kept = {}
    for name, keep in KEEPS.items():
        model = model_of(SingleGroup(), {}, sequence=False)
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        saved: dict[int, int] = {}

        def pack(x: Tensor, saved: dict[int, int] = saved, parameters: set[int] = parameters) -> Tensor:
            if x.data_ptr() not in parameters:
                saved[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss_over(model, Flow(keep=keep), SEQUENCES)
        kept[name] = sum(saved.values())
    assert kept["full"] < kept["selective"] < kept["all"]
