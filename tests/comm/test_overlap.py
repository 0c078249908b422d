"""Collectives and letters under way beside computation: on threads, over shared memory and over gloo.

Of each call the best of several times counts, as the machine may be busy with something else.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.comm.group import Group, Handle
from shardwright.comm.recording import RecordingGroup
from shardwright.layout.partition import Partition
from shardwright.testing.ranks import on_gloo, on_processes, on_threads

RUNS = pytest.mark.parametrize("run", [on_threads, on_processes, on_gloo], ids=["threads", "shared_memory", "gloo"])
LATE, AT_ONCE = 0.05, 0.005
"""Seconds by which the last rank comes late, and in which a call that waits for nobody returns."""

LARGE = 1_000_020
"""Elements of a float32 tensor that neither a slot of shared memory nor a letter box holds at once."""


def everything(group: Group, x: Tensor) -> list[Callable[[], Handle]]:
    """A beginning of each kind."""
    n = group.size
    right, left = (group.rank + 1) % n, (group.rank - 1) % n
    return [
        lambda: group.all_reduce_async(x),
        lambda: group.all_reduce_async(torch.ones(8)),
        lambda: group.all_gather_async(x, 0, [LARGE] * n),
        lambda: group.reduce_scatter_async(x, 0, [LARGE] + [0] * (n - 1)),
        lambda: group.all_to_all_async(torch.ones(n), [1] * n, [1] * n),
        lambda: group.broadcast_async(x, n - 1),
        lambda: group.send_async(x, right, tag="letter"),
        lambda: group.recv_async((LARGE,), torch.float32, left, tag="letter"),
        lambda: group.barrier_async(),
    ]


def beside_a_late_peer(group: Group) -> tuple[list[float], bool]:
    """What each `…_async` took, and whether a sum was computed before the first of them was done."""
    x = torch.ones(LARGE)
    group.barrier()
    late = group.rank == group.size - 1
    if late:
        time.sleep(LATE)
    took, handles = [], []
    for begin in everything(group, x):
        before = time.perf_counter()
        handles.append(begin())
        took.append(time.perf_counter() - before)
    assert x.sum() == LARGE
    first = late or not handles[0].done()
    sums = [handle.wait() for handle in handles[:2]]
    assert [y[-1].item() for y in sums] == [group.size] * 2
    for handle in handles[2:]:
        handle.wait()
    group.end_step()
    return took, first


def check_nothing_waits(group: Group) -> None:
    took, first = zip(*[beside_a_late_peer(group) for _ in range(20)], strict=True)
    assert max(map(min, zip(*took, strict=True))) < AT_ONCE, "each begins at once"
    assert any(first), "computes before the late peer comes"


@RUNS
@pytest.mark.parametrize("ranks", [2, 4])
def test_whatever_begins_waits_for_nobody(run: Callable[..., Any], ranks: int) -> None:
    run(ranks, check_nothing_waits)


def check_a_layer_ahead(group: Group) -> list[float]:
    """Each layer's weight, split unevenly with one share empty, is gathered while the layer before it multiplies.

    Nothing is summed between the ranks, so the result has the bits of the unsplit layers.
    """
    features, layers = 64, 4
    rows = Partition.weighted(features, [1, 0, 2])
    start, stop = rows.range(group.rank)
    weights = [torch.randn(features, features, generator=torch.Generator().manual_seed(i)) for i in range(layers)]
    recorder = RecordingGroup(group)

    def gather(i: int) -> Handle:
        return recorder.all_gather_async(weights[i][start:stop], 0, rows.widths, tag=f"layer {i}")

    x, coming = torch.linspace(-1, 1, features), gather(0)
    expected = x
    for i in range(layers):
        weight = coming.wait()
        if i + 1 < layers:
            coming = gather(i + 1)
        assert torch.equal(weight, weights[i])
        x, expected = (weight @ x).tanh(), (weights[i] @ expected).tanh()
    assert torch.equal(x, expected)
    assert [call.tag for call in recorder.calls] == [f"layer {i}" for i in range(layers)]
    group.end_step()
    return x.tolist()


@RUNS
def test_the_next_layers_weight_is_gathered_while_this_one_multiplies(run: Callable[..., Any]) -> None:
    found = run(3, check_a_layer_ahead)
    assert found == [found[0]] * 3
