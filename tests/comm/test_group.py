"""What every group does before and after bytes move: argument checks, handles, the ledger of a step."""

from collections.abc import Callable

import pytest
import torch

from shardwright.comm.group import Call, Group
from shardwright.comm.planned import PlannedGroup
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.errors import CommError, UnsupportedError, UsageError
from shardwright.testing.ranks import on_threads

X = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.all_reduce(X, out=torch.zeros(6, 4)), r"out=float32 \[6, 4\]: the result is float32 \[4, 6\]"),
        (lambda g: g.all_reduce(X, out=X.double()), r"out=float64 \[4, 6\]: the result is float32 \[4, 6\]; pass"),
        (lambda g: g.all_gather(X, 2, [4, 4, 4]), r"dim=2: x is float32 \[4, 6\]; use 0…1"),
        (lambda g: g.all_gather(X, -3, [4, 4, 4]), "dim=-3"),
        (lambda g: g.all_gather(torch.tensor(1.0), 0, [1, 1, 1]), r"dim=0: x is float32 \[\]; pass a tensor with dims"),
        (lambda g: g.all_gather(X, 0, [4, 4]), r"sizes=\[4, 4\]: one width, not negative, for each of 3 ranks"),
        (lambda g: g.all_gather(X, 0, [5, -1, 0]), r"sizes=\[5, -1, 0\]: one width, not negative"),
        (lambda g: g.all_gather(X, 1, [6, 5, 6]), r"x=float32 \[4, 6\]: rank 1 hands over 5 along dim 1"),
        (lambda g: g.reduce_scatter(X, 0, [1, 1, 1]), r"x=float32 \[4, 6\]: the shares along dim 0 sum to 3"),
        (lambda g: g.all_to_all(X, [1, 1, 1], [1, 1, 1]), r"send=\[1, 1, 1\]: x has 4 rows; deal out each row once"),
        (lambda g: g.all_to_all(X, [4, 0, 0], [1, 1]), r"sizes=\[1, 1\]"),
        (lambda g: g.broadcast(X, 3), "root=3: the group has ranks 0…2; pass one of them"),
        (lambda g: g.send(X, -1), "destination=-1: the group has ranks 0…2"),
        (lambda g: g.recv((2,), torch.float32, 5), "source=5: the group has ranks 0…2"),
        (lambda g: g.split([0, 2]), r"ranks=\[0, 2\]: no rank twice, and rank 1 among them"),
        (lambda g: g.split([1, 1]), r"ranks=\[1, 1\]: no rank twice"),
        (lambda g: g.split([1, 7]), "ranks=7: the group has ranks 0…2"),
        (lambda g: PlannedGroup(3, 3), "rank=3: a group of 3 has ranks 0…2; pass a rank of the group"),
        (lambda g: PlannedGroup(0, 0), "rank=0: a group of 0"),
    ],
)
def test_wrong_arguments_are_named_before_anything_moves(call: Callable[[Group], object], message: str) -> None:
    group = PlannedGroup(1, 3)
    with pytest.raises(UsageError, match=message):
        call(group)
    group.end_step()


@pytest.mark.parametrize("make", [lambda: PlannedGroup(1, 3), SingleGroup])
def test_what_torch_does_not_add_is_not_summed(make: Callable[[], Group]) -> None:
    """Ranks would find out one by one, and over shared memory the group would be lost."""
    group = make()
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"):
        x = X.to(getattr(torch, name))
        for call in (group.all_reduce, lambda x: group.reduce_scatter(x, 0, [4, 0, 0][: group.size])):
            with pytest.raises(UnsupportedError, match=rf"x={name} \[4, 6\]: torch does not add {name}; convert"):
                call(x)
        assert group.broadcast(x, 0).dtype == x.dtype
    group.end_step()


@pytest.mark.parametrize(
    "call", [lambda g: g.send(X, 0), lambda g: g.recv((2,), torch.float32, 0)], ids=["send", "recv"]
)
def test_a_group_of_one_has_nobody_to_send_to(call: Callable[[Group], object]) -> None:
    with pytest.raises(UsageError, match=r"size=1: a group of one has nobody to (send|recv) with; leave the call out"):
        call(SingleGroup())


def test_a_call_says_what_it_is() -> None:
    assert str(Call("all_reduce", 96, "float32", "mlp", "shape [4, 6]")) == "all_reduce 'mlp' of float32 (shape [4, 6])"
    assert str(Call("barrier", 0, "int8", "")) == "barrier of int8"


@pytest.mark.parametrize("make", [SingleGroup, lambda: PlannedGroup(1, 3), lambda: RecordingGroup(SingleGroup())])
def test_a_handle_never_waited_for_is_named_at_the_end_of_the_step(make: Callable[[], Group]) -> None:
    group = make()
    group.all_reduce_async(X, tag="mlp.down")
    group.barrier_async(tag="later").wait()
    with pytest.raises(
        CommError, match=rf"rank {group.rank} ended its step .* all_reduce 'mlp.down' of float32 .shape"
    ):
        group.end_step()
    group.end_step()


def test_a_second_wait_gives_the_same_tensor() -> None:
    group = SingleGroup()
    handle = group.all_reduce_async(X)
    assert handle.done()
    assert handle.wait() is handle.wait()
    group.end_step()


@pytest.mark.parametrize("make", [SingleGroup, lambda: PlannedGroup(0, 1), lambda: RecordingGroup(SingleGroup())])
def test_handles_of_splits_and_of_wrapped_groups_belong_to_the_step(make: Callable[[], Group]) -> None:
    """Whoever ends the step need not know who was split from it, or what is wrapped around it."""
    group = make()
    group.split([0]).split([0]).all_reduce_async(X, tag="inner")
    with pytest.raises(CommError, match="'inner'"):
        group.end_step()


def test_a_wrapped_group_hears_of_handles_issued_through_the_wrapper() -> None:
    inner = SingleGroup()
    RecordingGroup(inner).broadcast_async(X, 0, tag="outer")
    with pytest.raises(CommError, match="'outer'"):
        inner.end_step()


def check_waiting_time(group: Group) -> None:
    """Rank 1 comes late by a twentieth of a second; the others, and only they, wait that long, in a split too."""
    from time import sleep

    pair = group.split(range(group.size))
    for each in (group, pair):
        before = group.waited_s
        if group.rank == 1:
            sleep(0.05)
        each.barrier()
        waited = group.waited_s - before
        assert waited > 0.04 or group.rank == 1
    assert pair.waited_s == group.waited_s


def test_time_spent_waiting_is_counted() -> None:
    on_threads(3, check_waiting_time)
