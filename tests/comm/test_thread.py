"""`ThreadGroup` beyond the sums: handles, disagreements, failures, splits, letters, modes, and many tiny calls."""

import gc
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.comm.thread import ThreadGroup
from shardwright.errors import AbortedError, CommError, UsageError
from shardwright.testing.ranks import on_threads

Body = Callable[[Group], Any]
X = torch.ones(2, 3)
SOON = 5.0
"""Seconds in which anything that must not hang has to be over; it takes milliseconds."""


def ranks_do(*bodies: Body) -> list[Any]:
    """A different body for each rank."""
    return ThreadGroup.run(len(bodies), lambda group: bodies[group.rank](group))


# ---- handles


def test_a_handle_is_done_when_the_last_rank_has_come() -> None:
    issued = threading.Event()

    def early(group: Group) -> Tensor:
        handle = group.all_reduce_async(X, tag="soon")
        assert not handle.done()
        issued.set()
        while not handle.done():
            time.sleep(0.001)
        return handle.wait()

    def late(group: Group) -> Tensor:
        assert issued.wait(SOON), "issuing waits for nobody"
        return group.all_reduce(X, tag="soon")

    assert [y.tolist() for y in ranks_do(early, late)] == [(2 * X).tolist()] * 2


def test_handles_may_be_waited_for_in_any_order() -> None:
    def body(group: Group) -> list[float]:
        handles = [group.all_reduce_async(torch.tensor(float(i)), tag=str(i)) for i in range(20)]
        order = list(range(20))
        random.Random(group.rank).shuffle(order)
        found = {i: handles[i].wait().item() for i in order}
        return [found[i] for i in range(20)]

    assert on_threads(4, body) == [[4.0 * i for i in range(20)]] * 4


def test_polling_a_handle_ends_when_a_rank_fails() -> None:
    """`done` means that `wait` ends at once, also with an error: a loop around it is not a hang."""

    def polls(group: Group) -> None:
        handles = group.all_reduce_async(X), group.recv_async((1,), torch.float32, 1)
        while not all(handle.done() for handle in handles):
            time.sleep(0.001)
        for handle in handles:
            with pytest.raises(AbortedError, match="rank 1 failed first: KeyError: 'gone'"):
                handle.wait()

    def fails(group: Group) -> None:
        time.sleep(0.02)
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        ranks_do(polls, fails)


@pytest.mark.parametrize("inside", [lambda g: g, lambda g: g.split([0, 1])], ids=["group", "split"])
def test_a_handle_never_waited_for_is_an_error_at_the_end(inside: Callable[[Group], Group]) -> None:
    def forgets(group: Group) -> None:
        handle = inside(group).all_reduce_async(X, tag="mlp")
        if group.rank == 0:
            handle.wait()

    with pytest.raises(CommError, match=r"rank 1 ended its step without waiting for all_reduce 'mlp' of float32"):
        on_threads(2, forgets)


# ---- disagreements


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        (lambda g: g.all_reduce(X), lambda g: g.barrier(), ["all_reduce of float32", "barrier of int8"]),
        (lambda g: g.all_reduce(X), lambda g: g.all_reduce(X.T), [r"shape \[2, 3\]", r"shape \[3, 2\]"]),
        (lambda g: g.all_reduce(X), lambda g: g.all_reduce(X.double()), ["of float32", "of float64"]),
        (lambda g: g.all_reduce(X, tag="up"), lambda g: g.all_reduce(X, tag="down"), ["'up'", "'down'"]),
        (lambda g: g.broadcast(X, 0), lambda g: g.broadcast(X, 1), ["root 0", "root 1"]),
        (lambda g: g.all_gather(X, 0, [2, 2]), lambda g: g.all_gather(X, 1, [3, 3]), [r"2\+2", r"3\+3"]),
        (lambda g: g.split([0, 1]), lambda g: g.all_reduce(X), ["all_gather 'split'", "all_reduce"]),
    ],
)
def test_calls_that_differ_are_refused_on_all_ranks(one: Body, other: Body, named: list[str]) -> None:
    """Whoever comes second finds out; every rank raises the same message, naming both calls and both ranks."""
    seen = {}

    def body(group: Group) -> None:
        try:
            (one if group.rank == 0 else other)(group)
        except CommError as error:
            seen[group.rank] = str(error)
            raise

    with pytest.raises(CommError, match=r"rank 0 called .*rank 1 called |rank 1 called .*rank 0 called ") as raised:
        on_threads(2, body)
    assert seen == {0: str(raised.value), 1: str(raised.value)}
    for name in named:
        raised.match(name)


def test_row_counts_that_do_not_match_are_refused() -> None:
    """Rank 0 sends one row to each; rank 1 expects two from it."""
    with pytest.raises(CommError, match=r"all_to_all 'experts' .*: rank 1 expects \[2, 1\] rows, .* send it \[1, 1\]"):
        ranks_do(
            lambda g: g.all_to_all(X, [1, 1], [1, 1], tag="experts"),
            lambda g: g.all_to_all(X, [1, 1], [2, 1], tag="experts"),
        )


def test_ranks_that_wait_for_each_other_are_told_so() -> None:
    with pytest.raises(CommError, match=r"wait for each other: rank 0 in recv 'a' .*, rank 1 in recv 'b' of float32"):
        ranks_do(
            lambda g: g.recv((1,), torch.float32, 1, tag="a"),
            lambda g: g.recv((1,), torch.float32, 0, tag="b"),
        )


def test_two_groups_entered_in_different_orders_are_told_so() -> None:
    """Each rank is in a collective that exists, so that no two calls differ; rank 2 has already left."""

    def body(group: Group) -> None:
        if group.rank == 2:
            group.split([2])
            return
        pair = group.split([0, 1])
        again = pair.split([0, 1])
        for each in (pair, again) if group.rank == 0 else (again, pair):
            each.barrier(tag="outer" if each is pair else "inner")

    with pytest.raises(CommError, match="rank 0 in barrier 'outer' of int8, rank 1 in barrier 'inner' of int8"):
        on_threads(3, body)


# ---- failures


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3), UsageError("tp", 0, "too few", "more")])
def test_the_exception_of_the_rank_that_failed_is_raised_as_it_was(error: BaseException) -> None:
    """The very object; the others break out of whatever they wait for, and what they raise is not shown."""
    seen: dict[int, str] = {}

    def body(group: Group) -> None:
        pair = group.split([rank for rank in range(4) if rank // 2 == group.rank // 2])
        if group.rank == 2:
            time.sleep(0.01)
            raise error
        waits: list[Body] = [lambda g: g.all_reduce(X), lambda g: g.recv((1,), torch.float32, 2), lambda g: g.barrier()]
        try:
            waits[min(group.rank, 2)](pair if group.rank == 3 else group)
        except AbortedError as aborted:
            seen[group.rank] = str(aborted)
            raise

    with pytest.raises(type(error)) as raised:
        on_threads(4, body)
    assert raised.value is error
    assert set(seen) == {0, 1, 3}
    assert set(seen.values()) == {f"rank 2 failed first: {type(error).__name__}: {error}"}


def test_a_rank_that_returns_early_is_named() -> None:
    def waits(group: Group) -> None:
        group.all_reduce(X, tag="logits")

    with pytest.raises(CommError, match=r"rank 1 ended without entering all_reduce 'logits' of float32 \(shape"):
        ranks_do(waits, lambda group: None, waits)


def test_a_letter_from_a_rank_that_has_left_is_read_and_the_next_one_is_an_error() -> None:
    def reads(group: Group) -> float:
        time.sleep(0.02)
        first = group.recv((1,), torch.float32, 1).item()
        with pytest.raises(CommError, match="rank 1 ended without entering recv"):
            group.recv((1,), torch.float32, 1)
        return first

    assert ranks_do(reads, lambda group: group.send(torch.tensor([7.0]), 0) and None) == [7.0, None]


def test_ctrl_c_ends_a_run() -> None:
    """The interrupt reaches the thread that called `run`; ranks that wait, or look, stop.

    Python handles no interrupts where it was started in a shell's background.
    """

    def looks(group: Group) -> None:
        handle = group.all_reduce_async(X)
        while not handle.done():
            time.sleep(0.001)
        handle.wait()

    def interrupts(group: Group) -> None:
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, signal.SIGINT)
        group.recv((1,), torch.float32, 0)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            ranks_do(looks, interrupts)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_needs_a_rank() -> None:
    with pytest.raises(UsageError, match="n=0: a run needs at least one rank; pass 1 or more"):
        ThreadGroup.run(0, lambda group: None)


# ---- splits


def test_splits_are_disjoint_nested_and_in_rank_order() -> None:
    def body(group: Group) -> tuple[int, int, list[float]]:
        evens = [4, 0, 2] if group.rank == 4 else [0, 2, 4]  # the order in which a caller lists them is no matter
        mine = group.split([1, 3, 5] if group.rank % 2 else evens)
        inner = mine.split([mine.rank])
        outer = mine.all_gather(torch.tensor([float(group.rank)]), 0, [1] * 3)
        assert inner.all_reduce(torch.tensor(1.0)).item() == 1
        pair = mine.split([0, 2]) if mine.rank != 1 else mine.split([1])
        total = pair.all_reduce(torch.tensor([float(group.rank)]))
        return mine.rank, mine.size, [*outer.tolist(), *total.tolist()]

    assert on_threads(6, body) == [
        (rank // 2, 3, [rank % 2, rank % 2 + 2, rank % 2 + 4, rank if rank in (2, 3) else 4 + 2 * (rank % 2)])
        for rank in range(6)
    ]


def test_groups_that_overlap_in_time_do_not_meet() -> None:
    """The same members twice are two groups: what is said in one is not heard in the other."""

    def body(group: Group) -> list[float]:
        a, b = group.split([0, 1]), group.split([1, 0])
        first = a.all_reduce_async(torch.tensor(1.0), tag="same")
        second = b.all_reduce_async(torch.tensor(10.0), tag="same")
        b.send(torch.tensor(5.0 + group.rank), 1 - group.rank)
        a.send(torch.tensor(7.0 + group.rank), 1 - group.rank)
        letters = [g.recv((), torch.float32, 1 - group.rank).item() for g in (a, b)]
        return [second.wait().item(), first.wait().item(), *letters]

    assert on_threads(2, body) == [[20, 2, 8, 6], [20, 2, 7, 5]]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[0, 1], [1], [2]], r"rank 0 names \[0, 1\], rank 1 names \[1\]"),
        ([[0, 1], [0, 1], [1, 2]], r"rank 2 names \[1, 2\], rank 1 names \[0, 1\]"),
        ([[0], [0, 1, 2], [0, 1, 2]], r"rank 1 names \[0, 1, 2\], rank 0 names \[0\]"),
    ],
)
def test_lists_that_disagree_are_refused_on_all_ranks(lists: list[list[int]], message: str) -> None:
    refused = set()

    def body(group: Group) -> None:
        try:
            group.split(lists[group.rank])
        except CommError:
            refused.add(group.rank)
            raise

    with pytest.raises(CommError, match=f"split: {message}; the ranks of a group all pass the same list"):
        on_threads(3, body)
    assert refused == {0, 1, 2}


# ---- letters


def test_letters_arrive_in_the_order_sent_however_they_are_waited_for() -> None:
    def sends(group: Group) -> None:
        for i in range(5):
            x = torch.tensor([float(i)])
            group.send(x, 1)
            x.fill_(-1)  # may be overwritten once sent

    def receives(group: Group) -> list[float]:
        handles = [group.recv_async((1,), torch.float32, 0) for _ in range(5)]
        return [handle.wait().item() for handle in reversed(handles)]

    assert ranks_do(sends, receives)[1] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("shape", "dtype", "tag", "sent"),
    [
        ((3, 2), torch.float32, "x", r"shape \[2, 3\], to rank 1"),
        ((2, 3), torch.float64, "x", "send 'x' of float32"),
        ((2, 3), torch.float32, "y", "send 'x'"),
    ],
)
def test_a_letter_that_is_not_the_one_expected_is_refused(
    shape: tuple[int, ...], dtype: torch.dtype, tag: str, sent: str
) -> None:
    with pytest.raises(CommError, match=rf"rank 0 called .*{sent}.* where recv '{tag}' of .* waits"):
        ranks_do(lambda g: g.send(X, 1, tag="x"), lambda g: g.recv(shape, dtype, 0, tag=tag))


# ---- modes and threads


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_grad_and_inference_modes_are_the_callers(inference: bool, grad: bool) -> None:
    def body(group: Group) -> tuple[bool, bool, bool]:
        y = group.all_reduce(torch.ones(1))
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), y.is_inference()

    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        assert on_threads(2, body) == [(inference, grad, inference)] * 2


def test_each_rank_computes_on_one_core_and_the_caller_on_its_own_again() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert on_threads(3, lambda group: torch.get_num_threads()) == [1, 1, 1]
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="x"):
            on_threads(2, lambda group: int("x"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_runs_nest() -> None:
    """Two runs of three ranks inside the ranks of a run of two: each has its own board."""

    def inner(group: Group, start: float) -> float:
        return group.all_reduce(torch.tensor(start)).item()

    def outer(group: Group) -> float:
        inside = on_threads(3, inner, 10.0 * group.rank + 1)
        return group.all_reduce(torch.tensor(sum(inside))).item()

    assert on_threads(2, outer) == [9.0 + 99.0] * 2


def test_every_rank_has_a_tensor_of_its_own() -> None:
    """What one rank does to its result, or to its input afterwards, no other rank sees."""

    def body(group: Group) -> list[float]:
        x = torch.full((2,), float(group.rank))
        results = [
            group.all_reduce(x),
            group.all_gather(x, 0, [2, 2]),
            group.broadcast(x, 0),
            group.reduce_scatter(x, 0, [1, 1]),
        ]
        handle = group.all_reduce_async(x, tag="after")
        x.fill_(100)
        for y in results:
            y.fill_(-1)
        return handle.wait().tolist()

    assert on_threads(2, body) == [[1, 1]] * 2


# ---- many


def check_storm(group: Group, seed: int) -> Any:
    """Random collectives in one order on all ranks, some asynchronous; each result checked against arithmetic."""
    plan, mine = random.Random(seed), random.Random(1000 + group.rank)
    total = sum(range(group.size))
    pair = group.split([group.rank ^ 1, group.rank])
    under_way = []
    for step in range(400):
        op = plan.randrange(6)
        if op == 0:
            assert group.all_reduce(torch.tensor(group.rank + step)).item() == total + step * group.size
        elif op == 1:
            under_way.append((step, group.all_reduce_async(torch.tensor(group.rank + step), tag=str(step))))
        elif op == 2:
            sizes = [plan.randrange(3) for _ in range(group.size)]
            whole = group.all_gather(torch.full((sizes[group.rank],), group.rank), 0, sizes)
            assert whole.tolist() == [rank for rank, size in enumerate(sizes) for _ in range(size)]
        elif op == 3:
            pair.send(torch.tensor([step, group.rank]), 1 - pair.rank)
            assert pair.recv((2,), torch.int64, 1 - pair.rank).tolist() == [step, group.rank ^ 1]
        elif op == 4:
            group.barrier()
        else:
            half = group.split([r for r in range(group.size) if r % 2 == group.rank % 2])
            assert half.all_reduce(torch.tensor(1)).item() == group.size // 2
        while under_way and mine.random() < 0.3:
            when, handle = under_way.pop(mine.randrange(len(under_way)))
            assert handle.wait().item() == total + when * group.size
    for when, handle in under_way:
        assert handle.wait().item() == total + when * group.size
    return group


@pytest.mark.parametrize("seed", [1, 2])
def test_thousands_of_tiny_collectives_leave_nothing_behind(seed: int) -> None:
    """16 threads on whatever cores there are; afterwards the board that they met at is empty."""
    (group, *_) = on_threads(16, check_storm, seed)
    board = group._board
    assert (board.rounds, board.mail, board.children) == ({}, {}, {})


def test_a_long_run_does_not_grow() -> None:
    """Live tensors in the middle of 600 collectives, splits and letters: those of the ranks' own, no more."""

    def body(group: Group) -> int:
        for _ in range(600):
            child = group.split(range(group.size))
            child.send(child.all_reduce(X), child.rank)
            child.recv(X.shape, X.dtype, child.rank)
        group.barrier()
        if group.rank:
            group.barrier()
            return 0
        gc.collect()
        alive = sum(type(thing) is Tensor for thing in gc.get_objects())
        group.barrier()
        return alive

    before = sum(type(thing) is Tensor for thing in gc.get_objects())
    assert on_threads(2, body)[0] < before + 20
