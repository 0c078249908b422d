"""Proofs of the two seams: gradients, counted collectives, empty ranks, stages, odd layouts, one body everywhere."""

from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.comm.group import Call, Group
from shardwright.comm.planned import PlannedGroup
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.comm.thread import ThreadGroup
from shardwright.layers.batch import Batch
from shardwright.layers.layer import narrowed
from shardwright.layout.heads import HeadPartition
from shardwright.layout.sharding import qkv_linear
from shardwright.layout.spec import Piece, boxes, split_rows
from shardwright.models.decoder import Decoder
from shardwright.models.rope import LongRopeScaling
from shardwright.testing.models import SHAPES, largest_difference, loss_of, tiny_config, whole_tensors
from shardwright.testing.ranks import Processes, on_processes, on_threads

SEQUENCES = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [22, 0, 8, 9]]
VARIANTS: dict[str, Any] = {
    **SHAPES,
    "tied": {"tied": True},
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
}


def gradients(model: Decoder) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad
    return found


def check_backward(group: Group, changes: dict[str, Any]) -> float:
    """Loss and every gradient against the unsharded model.

    In float64, so that 1e-12 lies far above another order of summation (1e-15) and far below anything wrong.
    """
    config = tiny_config(**changes)
    twin = Decoder(config, SingleGroup()).double()
    expected = loss_of(twin, SEQUENCES)
    expected.backward()
    model = Decoder(config, group).double()
    loss = loss_of(model, SEQUENCES)
    loss.backward()
    model.reduce_gradients()
    assert abs(loss.item() - expected.item()) < 1e-12
    assert largest_difference(gradients(model), model.specs(), whole_tensors(gradients(twin), twin.specs())) < 1e-12
    return loss.item()


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_gradients_equal_the_twin(tp: int, changes: dict[str, Any]) -> None:
    """At TP 4 both KV heads straddle ranks, one of them three."""
    on_threads(tp, check_backward, changes)


def test_a_rank_without_heads_features_or_words_takes_part() -> None:
    """24 ranks: 6 heads, 11 features and 23 words leave the last rank with nothing at all."""
    config = tiny_config()
    assert Decoder(config, PlannedGroup(23, 24)).specs()["embedding.weight"].shape == (0, config.hidden)
    on_threads(24, check_backward, {})


def test_one_body_runs_on_threads_and_on_processes(three_processes: Processes) -> None:
    """Thread groups sum in rank order and gloo in its own: the same loss to rounding in float64, not the same bits."""
    threads = on_threads(3, check_backward, {"tied": True})
    processes = three_processes.run(check_backward, {"tied": True})
    assert threads == pytest.approx(processes, rel=1e-14)


@pytest.mark.parametrize("shape", ["qwen3", "olmo2", "gpt_neox", "falcon", "gemma3"])
@pytest.mark.parametrize("tp", [2, 4, 7])
def test_a_planned_run_calls_what_a_real_run_calls(shape: str, tp: int) -> None:
    """Operation, bytes and tag of every collective, forward and backward, without peers and without values.

    A layer makes two all-reduces of T x H, and one where attention and MLP stand side by side; backward as many calls,
    of twice that width where the two have norms of their own. Norms over all heads at once add one of T x 2 a layer.
    """
    longrope = LongRopeScaling(short=(1.0,), long=(2.0,), original=3) if shape == "gpt_neox" else None
    config = tiny_config(**SHAPES[shape], rope_scaling=longrope)

    def step(group: RecordingGroup) -> list[Call]:
        model = Decoder(config, group)
        model(Batch.whole(SEQUENCES, device=model.embedding.weight.device.type)).sum().backward()
        model.reduce_gradients()
        return group.calls

    real = ThreadGroup.run(tp, lambda group: step(RecordingGroup(group)))
    for rank in range(tp):
        with torch.device("meta"):
            planned = step(RecordingGroup(PlannedGroup(rank, tp)))
        assert planned == real[rank]
    forward = [call for call in real[0] if "grad" not in call.tag]
    squares = [call for call in forward if call.tag.endswith("qk_norm")]
    assert len(squares) == config.layers * config.wide_qk_norm
    assert {call.bytes for call in squares} <= {14 * 2 * 4}
    beside = config.block in ("parallel", "parallel_shared")
    assert len(forward) - len(squares) == 1 + (1 if beside else 2) * config.layers
    assert {call.bytes for call in forward if call not in squares} == {14 * config.hidden * 4}
    backward = [call.bytes for call in real[0] if call.tag.endswith((".qkv/grad", ".up/grad", ".gate_up/grad"))]
    width = 2 if config.block == "parallel" else 1
    assert backward == [14 * width * config.hidden * 4] * (1 if beside else 2) * config.layers


def check_stages(group: Group) -> None:
    """Two pipeline stages of a tied pair of linears; activations go down, gradients come back, by send and recv."""
    first, second, x = (torch.arange(n).double().sin().view(-1, width) for n, width in ((20, 4), (15, 5), (8, 4)))
    a, b = first.clone().requires_grad_(), second.clone().requires_grad_()
    ((x @ a.T).relu() @ b.T).square().sum().backward()
    if group.rank == 0:
        mine = first.requires_grad_()
        y = (x @ mine.T).relu()
        group.send(y, 1, tag="activation")
        y.backward(group.recv(y.shape, y.dtype, 1, tag="gradient"))
        torch.testing.assert_close(mine.grad, a.grad, rtol=0, atol=0)
    else:
        mine = second.requires_grad_()
        y = group.recv((2, 5), torch.float64, 0, tag="activation").requires_grad_()
        (y @ mine.T).square().sum().backward()
        group.send(y.grad, 0, tag="gradient")
        torch.testing.assert_close(mine.grad, b.grad, rtol=0, atol=0)


@pytest.mark.parametrize("run", [on_threads, on_processes])
def test_two_stages_pass_activations_and_gradients(run: Any) -> None:
    """The same arithmetic on the same values: bit for bit."""
    run(2, check_stages)


def filled(shape: tuple[int, ...], pieces: tuple[Piece, ...], source: Tensor) -> Tensor:
    """The naive loader: box by box, `rope_unpermute` by its definition."""
    out = source.new_full(shape, float("nan"))
    for piece in pieces:
        local = narrowed(out, piece.local_ranges)
        for there, here in boxes(piece.source_ranges):
            rows = narrowed(source, there)
            if piece.transform == "rope_unpermute":
                rows = torch.cat((rows[0::2], rows[1::2]))
            narrowed(local, here).copy_(rows)
    return out


def test_an_interleaved_fused_qkv_loads_through_pieces() -> None:
    """A checkpoint that stores q, k, v of each group of heads together (GPT-NeoX's way), on 4 ranks."""
    heads, size, hidden = HeadPartition.balanced(6, 2, 4), 4, 3
    q, k, v = (torch.arange(n * size * hidden).view(n, size, hidden) + 1000 * i for i, n in enumerate((6, 2, 2)))
    fused = torch.cat([torch.cat((q[3 * g : 3 * g + 3], k[g : g + 1], v[g : g + 1])) for g in range(2)])
    source = fused.reshape(-1, hidden).double()
    for rank in range(4):
        start, stop = heads.query.range(rank)
        low, high = heads.kv_range(rank)
        rows = [5 * (head // 3) + head % 3 for head in range(start, stop)]
        rows += [5 * g + 3 for g in range(low, high)] + [5 * g + 4 for g in range(low, high)]
        ranges = tuple((row * size, (row + 1) * size) for row in rows)
        piece = Piece(
            "qkv", tuple(source.shape), (ranges, ((0, hidden),)), ((0, len(rows) * size), (0, hidden)), (rank,)
        )
        expected = torch.cat((q[start:stop], k[low:high], v[low:high])).reshape(-1, hidden).double()
        assert torch.equal(filled(tuple(expected.shape), (piece,), source), expected)


def test_a_rotary_permuted_q_loads_through_pieces() -> None:
    """GGUF's Llama stores each head's rows as 0, D/2, 1, D/2 + 1, …; 6 heads over 4 ranks."""
    heads, size, hidden = HeadPartition.balanced(6, 2, 4), 8, 3
    q = torch.arange(6 * size * hidden).view(6 * size, hidden).double()
    permuted = q.view(6, 2, size // 2, hidden).transpose(1, 2).reshape(q.shape)
    for rank in range(4):
        spec = qkv_linear(hidden, heads, size, rank, bias=False)["weight"]
        piece = Piece(
            **{**spec.pieces[0].__dict__, "transform": "rope_unpermute"},
        )
        start, stop = heads.query.times(size).range(rank)
        assert torch.equal(filled((stop - start, hidden), split_rows(piece, size), permuted), q[start:stop])
