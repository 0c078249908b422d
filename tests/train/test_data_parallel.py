"""Gradients over data-parallel ranks: sums, buckets, windows, shares, late ones, ranks that have nothing to add."""

import pytest
import torch
from torch import Tensor, nn

from shardwright import synchronize_gradients
from shardwright.comm.compression import Method
from shardwright.comm.group import Call, Group
from shardwright.comm.recording import RecordingGroup
from shardwright.kernels import gradients
from shardwright.layout.partition import Partition
from shardwright.testing.ranks import on_processes, on_threads
from shardwright.train.data_parallel import GradientSynchroniser
from shardwright.train.flat import FlatParameters


def model_of(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three linears whose values do not depend on any generator."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    for at, parameter in enumerate(model.parameters()):
        parameter.data.copy_((torch.arange(parameter.numel()) + at).double().sin().view_as(parameter))
    return model


def loss_of(model: nn.Module, rows: range, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.stack([(torch.arange(6) * (row + 1)).double().cos() for row in rows]).to(dtype)
    y: Tensor = model(x)
    return y.square().sum()


def whole(windows: int = 1) -> dict[str, Tensor]:
    model = model_of()
    for window in range(windows):
        loss_of(model, range(window * 6, window * 6 + 6)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def rows_of(group: Group, window: int = 0) -> range:
    start, stop = Partition.balanced(6, group.size).range(group.rank)
    return range(window * 6 + start, window * 6 + stop)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_become_the_sum_or_the_mean(ranks: int) -> None:
    """float64 to another order of summation. A frozen parameter is left out; one without a gradient counts as zeros."""

    def body(group: Group) -> None:
        for op in ("sum", "mean"):
            model = model_of()
            loss_of(model, rows_of(group)).backward()
            if group.rank == 1:
                model[0].weight.grad = None
            expected = whole()
            synchronize_gradients(model, group, op=op)  # type: ignore[arg-type]
            for name, parameter in model.named_parameters():
                if name != "0.weight" or group.size == 1:
                    scale = 1 if op == "sum" else group.size
                    assert parameter.grad is not None
                    torch.testing.assert_close(parameter.grad * scale, expected[name], rtol=1e-12, atol=1e-12)

    on_threads(ranks, body)


def synchronised(
    group: Group, shares: bool, bucket: int, method: Method | None = None, windows: int = 1
) -> tuple[FlatParameters, list[Call], Partition]:
    recording = RecordingGroup(group)
    model = model_of()
    flat = FlatParameters(dict(model.named_parameters()), late={"2.bias"})
    partition = flat.shares(group.size)
    synchroniser = GradientSynchroniser(
        flat, recording, shares=partition if shares else None, compression=method, bucket=bucket
    )
    for window in range(windows):
        if window == windows - 1:
            synchroniser.begin()
        loss_of(model, rows_of(group, window)).backward()
    early = len(recording.calls)
    synchroniser.finish()
    assert early == len(recording.calls) - 1, "all but the late bucket leave during the last backward"
    return flat, recording.calls, partition


@pytest.mark.parametrize("bucket", [1, 200, 1 << 20])
@pytest.mark.parametrize("ranks", [2, 3])
def test_buckets_leave_during_backward_and_hold_the_sum(ranks: int, bucket: int) -> None:
    def body(group: Group) -> int:
        flat, calls, _ = synchronised(group, False, bucket)
        for name, expected in whole().items():
            torch.testing.assert_close(flat.view(flat.grad, name), expected, rtol=1e-12, atol=1e-12)
        assert sum(call.bytes for call in calls) == flat.grad.nbytes
        return len(calls)

    assert on_threads(ranks, body) == [{1: 6, 200: 3, 1 << 20: 2}[bucket]] * ranks


def test_a_window_communicates_once() -> None:
    """Three backwards, one sum of all of them: as many bytes as for one."""

    def body(group: Group) -> None:
        flat, calls, _ = synchronised(group, False, 200, windows=3)
        assert sum(call.bytes for call in calls) == flat.grad.nbytes
        for name, expected in whole(3).items():
            torch.testing.assert_close(flat.view(flat.grad, name), expected, rtol=1e-12, atol=1e-12)

    on_threads(2, body)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_shares_are_whole_rows_and_each_owner_has_the_sum(ranks: int) -> None:
    def body(group: Group) -> None:
        flat, calls, shares = synchronised(group, True, 200)
        assert {call.op for call in calls} == {"reduce_scatter"}
        assert shares.size == flat.numel
        for offset in shares.offsets:
            slot = next(slot for slot in flat.slots.values() if slot.start <= offset < slot.stop)
            assert (offset - slot.start) % slot.row == 0
        expected = torch.empty_like(flat.grad)
        for name, gradient in whole().items():
            flat.view(expected, name).copy_(gradient)
        start, stop = shares.range(group.rank)
        torch.testing.assert_close(flat.grad[start:stop], expected[start:stop], rtol=1e-12, atol=1e-12)

    on_threads(ranks, body)


def test_compressed_buckets_leave_too() -> None:
    """int8 of the values at hand to half a step of the largest."""

    def body(group: Group) -> None:
        flat, calls, _ = synchronised(group, False, 200, method="int8")
        assert {call.op for call in calls} == {"all_gather"}
        assert sum(call.bytes for call in calls) < 0.3 * flat.grad.nbytes
        largest = max(float(gradient.abs().max()) for gradient in whole().values())
        for name, expected in whole().items():
            torch.testing.assert_close(flat.view(flat.grad, name), expected, rtol=0, atol=group.size * largest / 127)

    on_threads(2, body)


def test_a_rank_without_a_batch_sends_zeros() -> None:
    """Two rows over three ranks: the third has no backward, and its buckets leave at the end."""

    def body(group: Group) -> None:
        model = model_of()
        flat = FlatParameters(dict(model.named_parameters()))
        synchroniser = GradientSynchroniser(flat, group, bucket=200)
        synchroniser.begin()
        if group.rank < 2:
            loss_of(model, range(group.rank, group.rank + 1)).backward()
        synchroniser.finish()
        twin = model_of()
        loss_of(twin, range(2)).backward()
        for name, parameter in twin.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(flat.view(flat.grad, name), parameter.grad, rtol=1e-12, atol=1e-12)

    on_threads(3, body)


def test_half_precision_gradients_add_up_wide() -> None:
    """bfloat16 parameters, 64 windows of one row each: summed in float32, not lost to 8 bits."""
    model = model_of(torch.bfloat16)
    flat = FlatParameters(dict(model.named_parameters()))
    one = None
    for _ in range(64):
        loss_of(model, range(1), torch.bfloat16).backward()
        one = flat.grad.clone() if one is None else one
    assert flat.grad.dtype == torch.float32
    assert one is not None
    torch.testing.assert_close(flat.grad, one * 64, rtol=1e-6, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_begins_by_writing(dtype: torch.dtype) -> None:
    """`clear`, two backwards, `complete`: what was there is gone, what none reached is zero, as with zeros first.

    torch's own linears make their gradients elsewhere.
    """
    model, twin = model_of(dtype), model_of(dtype)
    for each in (model, twin):
        each.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=dtype)))
    ours, theirs = (FlatParameters(dict(each.named_parameters())) for each in (model, twin))
    ours.grad.fill_(float("nan"))
    ours.clear()
    for row in (1, 2):
        loss_of(model, range(row, row + 1), dtype).backward()
        loss_of(twin, range(row, row + 1), dtype).backward()
    ours.complete()
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(ours.view(ours.grad, "unused"), torch.zeros(3))
    for name, parameter in model.named_parameters():
        if dtype == torch.float32:
            assert parameter.grad is not None
            assert parameter.grad.data_ptr() == ours.view(ours.grad, name).data_ptr()
        else:
            assert parameter.grad is None
    assert gradients.withdraw(model.unused) is None  # type: ignore[arg-type]  # nothing is on offer any more


def buckets_over_processes(group: Group) -> int:
    flat, calls, _ = synchronised(group, False, 200)
    for name, expected in whole().items():
        torch.testing.assert_close(flat.view(flat.grad, name), expected, rtol=1e-12, atol=1e-12)
    return len(calls)


def test_over_processes() -> None:
    assert on_processes(2, buckets_over_processes) == [3, 3]
