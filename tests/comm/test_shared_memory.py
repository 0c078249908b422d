"""`SharedMemoryGroup` on processes. A launch costs seconds, so one body checks much; references are plain loops.

Sums are in rank order by definition, so nothing here needs a tolerance, and threads give the same bits. Random cases
come from a seed, so that every rank draws the same ones. Ranks that die or stop for good are in `test_watch.py`.
"""

import gc
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.comm.test_collectives import part, same_bits, sum_by_loop
from torch import Tensor

from shardwright.comm import regions
from shardwright.comm.exchanges import ONE_SHOT
from shardwright.comm.group import Group
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.segment import MAILBOX, PID, SLOT
from shardwright.comm.shared_memory import SharedMemoryGroup, alone
from shardwright.errors import CommError
from shardwright.testing.ranks import on_processes, on_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32, torch.int64]
LARGE = 3 * SLOT // 4 + 20
"""Elements of a float32 tensor that takes several slots."""

# ---- every collective against a plain loop


def drawn_elements(draw: random.Random, ranks: int, itemsize: int) -> int:
    """Nothing, a little, or what lies at an edge: of one round, of a slot, of a rank's part of a slot, of several."""
    edges = [min(SLOT, ONE_SHOT // ranks), SLOT, SLOT // ranks, 2 * SLOT]
    if draw.random() < 0.5:
        return draw.choice([0, 1, 2, 15, 16, 17, ranks - 1, ranks + 1, 1000])
    return draw.choice(edges) // itemsize + draw.choice([-1, 0, 1])


def drawn_cut(draw: random.Random, ranks: int, elements: int) -> tuple[list[int], int]:
    """Uneven widths, zeros among them, and what lies behind each, so that the widest has about that many elements."""
    widths = [draw.choice([0, 1, 2, 3]) for _ in range(ranks)]
    return widths, max(1, elements // max(1, *widths))


def laid(x: Tensor, dim: int) -> Tensor:
    """`[W, inner]` with its widths along `dim` of two, contiguous or not."""
    return x if dim == 0 else x.T


def check_case(group: Group, draw: random.Random, seed: int) -> None:
    """One draw of shapes through every collective."""
    n, me = group.size, group.rank
    dtype, dim = draw.choice(DTYPES), draw.choice([0, 1])
    layout = draw.choice(["plain", "transposed", "strided"])
    elements = drawn_elements(draw, n, dtype.itemsize)
    widths, inner = drawn_cut(draw, n, elements)
    root, kind = draw.randrange(n), draw.choice(["sum", "gather", "scatter", "deal", "spread"])
    if kind in ("sum", "spread"):
        parts = [part(seed, rank, [elements], dtype, layout) for rank in range(n)]
        before = parts[me].clone()
        result = group.all_reduce(parts[me]) if kind == "sum" else group.broadcast(parts[me], root)
        expected = sum_by_loop(parts) if kind == "sum" else parts[root]
        assert same_bits(parts[me], before)
    elif kind == "gather":
        parts = [laid(part(seed, rank, [widths[rank], inner], dtype, layout), dim) for rank in range(n)]
        result, expected = group.all_gather(parts[me], dim, widths), torch.cat(parts, dim)
    elif kind == "scatter":
        parts = [laid(part(seed, rank, [sum(widths), inner // n + 1], dtype, layout), dim) for rank in range(n)]
        result = group.reduce_scatter(parts[me], dim - 2, widths)
        expected = sum_by_loop(parts).split(widths, dim)[me]
    else:
        table = [[draw.choice([0, 1, 3]) for _ in range(n)] for _ in range(n)]
        parts = [part(seed, rank, [sum(table[rank]), inner // n + 1], dtype, layout) for rank in range(n)]
        result = group.all_to_all(parts[me], table[me], [row[me] for row in table])
        expected = torch.cat([x.split(row)[me] for x, row in zip(parts, table, strict=True)])
    assert same_bits(result, expected), f"{kind} of {dtype}, {elements} elements, {widths}, {layout}, seed {seed}"
    assert result.data_ptr() != parts[me].data_ptr() or not result.numel()


def check_cases(group: Group, seed: int, count: int) -> None:
    for i in range(count):
        check_case(group, random.Random(1000 * seed + i), i)


def check_all_reduce_at_edges(group: Group) -> None:
    """Both compiled ways and torch's, a hair to either side of every edge; `out` strided, a parameter, x itself."""
    n, me = group.size, group.rank
    for elements in {edge // 4 + off for edge in (ONE_SHOT // n, SLOT, 2 * SLOT, 64 * n) for off in (-1, 0, 1, 17)}:
        parts = [part(3, rank, [elements], torch.float32, "plain") for rank in range(n)]
        expected, x = sum_by_loop(parts), parts[me].clone()
        assert same_bits(group.all_reduce(x), expected)
        strided = torch.empty(elements, 2)[:, 1]
        assert group.all_reduce(x, out=strided) is strided
        assert same_bits(strided, expected)
        weight = torch.nn.Parameter(x.clone())
        assert group.all_reduce(weight, out=weight) is weight
        assert weight.is_leaf
        assert same_bits(weight.detach(), expected)
        assert group.all_reduce(x, out=x) is x
        assert same_bits(x, expected)
        x = torch.stack([parts[0]] * 2, 1)[:, 0] if me == 0 else parts[me]  # ranks may hold theirs differently
        assert same_bits(group.all_reduce_async(x, out=x).wait(), expected)


def check_special_values(group: Group) -> None:
    """−0.0, infinities, NaN and the smallest numbers come through, small and large."""
    values = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3.4e38])
    for repeats in (1, SLOT // 16):
        x = values.repeat(repeats)
        assert torch.equal(group.all_reduce(x).isnan(), sum_by_loop([x] * group.size).isnan())
        assert same_bits(group.all_reduce(x).nan_to_num(7), sum_by_loop([x] * group.size).nan_to_num(7))
        assert same_bits(group.broadcast(x, 0), x)


def check_lazy_values(group: Group) -> None:
    """Conjugates and negatives, which torch marks and does not compute, are what they say."""
    n, me = group.size, group.rank
    z = torch.tensor([[1 + 2j, 3 - 1j], [5 + 4j, 0.5j]])
    minus, lazy = z.conj()[0, 0].imag, z.conj()
    assert minus.is_neg()
    assert lazy.is_conj()
    assert group.all_reduce(minus).item() == -2 * n
    assert group.all_reduce(torch.ones_like(minus), out=minus).item() == n == minus.item()
    assert z[0, 0].item() == complex(1, -n)
    for x, plain in ((lazy, lazy.resolve_conj()), (lazy.imag, lazy.imag.resolve_neg())):
        assert torch.equal(group.all_reduce(x), plain * n)
        assert torch.equal(group.all_gather(x, 0, [2] * n), torch.cat([plain] * n))
        assert torch.equal(group.reduce_scatter(x, 0, [2] + [0] * (n - 1)), (plain * n)[: 0 if me else 2])
        assert torch.equal(
            group.all_to_all(x, [2] + [0] * (n - 1), [0 if me else 2] * n), plain.repeat(0 if me else n, 1)
        )
        assert torch.equal(group.broadcast(x, 0), plain)
        sent = group.send_async(x, (me + 1) % n)
        assert torch.equal(group.recv([2, 2], x.dtype, (me - 1) % n), plain)
        sent.wait()


def check_alone(group: Group) -> None:
    """A group of one, by a split or by itself, small and large."""
    single = group.split([group.rank])
    assert single.size == 1
    for one in [single, alone()] if isinstance(group, SharedMemoryGroup) else [single]:
        for elements in (0, 5, 40_000, LARGE):
            x = part(1, group.rank, [elements], torch.float32, "plain")
            assert same_bits(one.all_reduce(x), x)
            assert same_bits(one.all_gather(x, 0, [elements]), x)
            assert same_bits(one.reduce_scatter(x, 0, [elements]), x)
            assert same_bits(one.all_to_all(x, [elements], [elements]), x)
            assert same_bits(one.broadcast(x, 0), x)
        one.barrier()


def check_inference_mode(group: Group) -> None:
    with torch.inference_mode():
        x = torch.ones(3)
        assert group.all_reduce(x).tolist() == [group.size] * 3
        assert group.all_gather(x, 0, [3] * group.size).tolist() == [1] * 3 * group.size
        assert group.broadcast(x, 0).is_inference()


def check_collectives(group: Group, seed: int, count: int) -> None:
    check_cases(group, seed, count)
    check_cases(group, seed, count // 4)  # once more: the same bits
    check_all_reduce_at_edges(group)
    check_special_values(group)
    check_lazy_values(group)
    check_alone(group)
    check_inference_mode(group)
    group.barrier()
    group.end_step()


@pytest.mark.parametrize(("ranks", "count"), [(2, 100), (3, 60), (8, 12)])
def test_collectives(ranks: int, count: int) -> None:
    on_processes(ranks, check_collectives, 0, count)


def test_threads_give_the_same_bits() -> None:
    """One seam: the reference both are held to is the same, bit for bit."""
    on_threads(3, check_collectives, 0, 120)


@pytest.mark.long
@pytest.mark.parametrize("ranks", range(2, 9))
def test_many_collectives(ranks: int) -> None:
    on_processes(ranks, check_collectives, ranks, 500)


# ---- several under way


def is_late(group: Group) -> bool:
    return group.rank == group.size - 1


def check_any_order(group: Group) -> None:
    """Handles of all kinds, small and large, waited for in an order of each rank's own, with sync calls between."""
    n, me = group.size, group.rank
    for turn in range(6):
        expected: list[Tensor] = []
        handles = []
        for i in range(8):
            elements = [3, 1000, LARGE][(turn + i) % 3]
            parts = [torch.full((elements,), float(rank + i)) for rank in range(n)]
            if i % 4 == 0:
                handles.append(group.all_gather_async(parts[me], 0, [elements] * n))
                expected.append(torch.cat(parts))
            elif i % 4 == 1:
                handles.append(group.broadcast_async(parts[me], i % n))
                expected.append(parts[i % n])
            else:
                handles.append(group.all_reduce_async(parts[me]))
                expected.append(sum_by_loop(parts))
        order = list(range(len(handles)))
        random.Random(me + turn).shuffle(order)
        for i in order[:4]:
            assert torch.equal(handles[i].wait(), expected[i])
        assert group.all_reduce(torch.ones(4)).tolist() == [n] * 4
        for i in order[4:]:
            assert torch.equal(handles[i].wait(), expected[i])
            assert handles[i].wait() is handles[i].wait()
    group.end_step()


def check_done(group: Group) -> None:
    """`done()` never blocks, and becomes true though the others only wait, each for something else."""
    handle = group.all_reduce_async(torch.ones(LARGE))
    if is_late(group):
        time.sleep(0.05)
    else:
        start = time.perf_counter()
        assert not handle.done()
        assert time.perf_counter() - start < 0.04
    while not handle.done():
        time.sleep(0)
    assert handle.done()
    assert handle.wait()[-1] == group.size
    assert handle.done()


def check_forgotten(group: Group) -> None:
    handle = group.all_reduce_async(torch.ones(2), tag="forgotten")
    with pytest.raises(CommError, match="'forgotten'"):
        group.end_step()
    assert group.all_reduce(torch.ones(1)).item() == group.size
    assert handle.wait().tolist() == [group.size] * 2
    group.end_step()


def check_letters(group: Group) -> None:
    """Larger than a box both ways at once; many in order; to oneself; beside collectives that the peer waits for."""
    n, me = group.size, group.rank
    right, left = (me + 1) % n, (me - 1) % n
    for elements in (0, 1, MAILBOX // 4, MAILBOX // 4 + 1, LARGE):
        parts = [part(5, rank, [elements], torch.float32, "strided") for rank in range(n)]
        sent = group.send_async(parts[me], right, tag="ring")
        assert same_bits(group.recv((elements,), torch.float32, left, tag="ring"), parts[left])
        assert sent.wait() is not None
    parts = [part(5, rank, [LARGE], torch.bfloat16, "plain") for rank in range(n)]
    outgoing, incoming = group.send_async(parts[me], left), group.recv_async((LARGE,), torch.bfloat16, right)
    start = time.perf_counter()
    assert group.all_reduce(torch.ones(2)).tolist() == [n] * 2
    assert same_bits(group.all_gather(parts[me], 0, [LARGE] * n), torch.cat(parts))
    assert same_bits(incoming.wait(), parts[right])
    outgoing.wait()
    assert time.perf_counter() - start < 1.0, f"{LARGE * 2 // MAILBOX} chunks do not take 100 ms each"
    handles = [group.send_async(torch.tensor([i, me]), right, tag=str(i % 3)) for i in range(100)]
    came = [group.recv_async((2,), torch.int64, left, tag=str(i % 3)) for i in range(100)]
    assert [came[i].wait().tolist() for i in reversed(range(100))] == [[i, left] for i in reversed(range(100))]
    for handle in handles:
        while not handle.done():
            time.sleep(0)
        handle.wait()
    to_me = group.send_async(torch.tensor([7.0]), me)
    assert group.recv((1,), torch.float32, me).item() == 7
    to_me.wait()
    group.end_step()


def check_crossed_waits(group: Group) -> None:
    """Ranks that wait for the same things in opposite orders: whoever waits for one advances the others."""
    n, me, child = group.size, group.rank, group.split(range(group.size))
    large = torch.ones(LARGE)
    letter = (
        group.send_async(large, 1) if me == 0 else group.recv_async((LARGE,), torch.float32, 0) if me == 1 else None
    )
    first, second = group.all_reduce_async(large), child.all_reduce_async(large)
    for handle in (first, second, letter) if me % 2 else (letter, second, first):
        if handle is not None:
            assert handle.wait()[-1].item() in (1, n)
    whole = group.all_reduce_async(large)
    if me % 2:
        assert whole.wait()[0] == n
    assert child.all_reduce(torch.ones(1)).item() == n
    assert whole.wait()[0] == n
    polled = group.all_reduce_async(large)
    if me == 0:
        child.barrier()
    else:
        inner = child.barrier_async()
        while not inner.done():
            pass
        inner.wait()
    polled.wait()
    group.end_step()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def segments() -> int:
    """How many mappings of segments this process holds."""
    return Path("/proc/self/maps").read_text().count("memfd:shardwright-segment")


def check_splits(group: SharedMemoryGroup) -> None:
    """Nested, uneven, of one; listed in any order; and collectives on children between the parent's."""
    n, me = group.size, group.rank
    sides = [[rank for rank in range(n) if rank % 2 == 0], [rank for rank in range(n) if rank % 2]]
    uneven = [[0], list(range(1, n))]
    for cut in (sides, uneven):
        members = next(ranks for ranks in cut if me in ranks)
        child = group.split(members[::-1])
        assert (child.rank, child.size) == (members.index(me), len(members))
        inner = child.split([child.rank]) if child.rank else child.split([0])
        for elements in (1, LARGE):
            mine = child.all_reduce_async(torch.full((elements,), float(me)))
            whole = group.all_reduce_async(torch.ones(elements))
            again = child.all_gather_async(torch.tensor([me]), 0, [1] * child.size)
            assert inner.all_reduce(torch.full((elements,), 2.0))[0] == 2
            assert whole.wait()[-1] == n
            assert again.wait().tolist() == members
            assert mine.wait()[-1] == sum(members)
        child.end_step()
    with pytest.raises(CommError, match=r"split: rank 0 names \[0, 1\], rank 1 names \[1\]"):
        group.split([0, 1] if me == 0 else [me])


def check_leaks(group: SharedMemoryGroup) -> None:
    """A child leaves neither descriptor nor memory behind when it is dropped, its finished handles included."""
    gc.collect()
    group.barrier()
    files, maps = open_files(), segments()
    for _ in range(5):
        child = group.split(range(group.size))
        handle = child.all_reduce_async(torch.ones(LARGE))
        child.split([child.rank]).barrier()
        handle.wait()
        child.send_async(torch.ones(1), child.rank)
        child.recv(torch.Size([1]), torch.float32, child.rank)
        with pytest.raises(CommError, match="send"):
            child.end_step()
        assert segments() > maps
        del child, handle
        assert (open_files(), segments()) == (files, maps)


def check_handles(group: SharedMemoryGroup) -> None:
    check_any_order(group)
    check_done(group)
    check_forgotten(group)
    check_letters(group)
    check_crossed_waits(group)
    check_splits(group)
    check_leaks(group)
    group.barrier()


@pytest.mark.parametrize("ranks", [2, 5])
def test_handles_letters_and_splits(ranks: int) -> None:
    on_processes(ranks, check_handles)


# ---- slots are used again and again


def one_of_many(group: Group, draw: random.Random, i: int) -> tuple[Any, float]:
    """Begin a random collective; its handle, and the one value that all of its result has."""
    n, elements = group.size, draw.choice([0, 1, 100, 5000, draw.choice([SLOT // 4, SLOT // 4 + 1, LARGE])])
    dtype = draw.choice([torch.float32, torch.float32, torch.float64])
    x = torch.full((elements,), float(group.rank + i % 100), dtype=dtype)
    kind, root = draw.randrange(5), draw.randrange(n)
    total = float(n * (i % 100) + n * (n - 1) // 2)
    if kind == 0:
        return group.broadcast_async(x, root), float(root + i % 100)
    if kind == 1:
        return group.barrier_async(), 0.0
    if kind == 2:
        return group.reduce_scatter_async(x, 0, [0] * (n - 1) + [elements]), total
    if kind == 3:
        same = torch.full((elements,), float(i), dtype=dtype)
        return group.all_gather_async(same, 0, [elements] * n), float(i)
    return group.all_reduce_async(x), total


def check_rounds(group: Group, seed: int, count: int) -> None:
    """Random collectives, up to five under way, each rank now and then asleep at a moment of its own."""
    draw, own = random.Random(seed), random.Random(seed * 100 + group.rank)
    under_way: list[tuple[Any, float]] = []
    for i in range(count):
        under_way.append(one_of_many(group, draw, i))
        if own.random() < 0.02:
            time.sleep(own.random() * 0.003)
        while len(under_way) > 5 or (under_way and own.random() < 0.5):
            handle, value = under_way.pop(own.randrange(len(under_way)))
            assert (handle.wait() == value).all(), f"collective {i}, seed {seed}"
        if draw.random() < 0.3:
            n, elements = group.size, draw.choice([1, 300, SLOT // 8])
            x = torch.full((elements,), float(group.rank + i))
            assert (group.all_reduce(x) == float(n * i + n * (n - 1) // 2)).all(), f"sync {i}, seed {seed}"
    for handle, value in under_way:
        assert (handle.wait() == value).all()
    group.end_step()


@pytest.mark.parametrize(("ranks", "count"), [(2, 2000), (3, 1200), (8, 150)])
def test_slots_are_not_overwritten_before_all_have_read_them(ranks: int, count: int) -> None:
    on_processes(ranks, check_rounds, ranks, count)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_slots_for_long(ranks: int) -> None:
    on_processes(ranks, check_rounds, 17, 20_000)


# ---- calls that do not fit each other


def disagreements(group: Group) -> dict[str, tuple[Callable[[Group], Any], Callable[[Group], Any]]]:
    """What rank 1 calls, and what the others call."""
    n, ones = group.size, torch.ones
    return {
        "op": (lambda g: g.broadcast(ones(4), 0, tag="a"), lambda g: g.all_reduce(ones(4), tag="a")),
        "barrier": (lambda g: g.barrier(), lambda g: g.all_reduce(ones(LARGE))),
        "shape": (lambda g: g.all_reduce(ones(4)), lambda g: g.all_reduce(ones(2, 2))),
        "size": (lambda g: g.all_reduce(ones(LARGE)), lambda g: g.all_reduce(ones(4))),
        "dtype": (lambda g: g.all_reduce(ones(4).double()), lambda g: g.all_reduce(ones(4))),
        "root": (lambda g: g.broadcast(ones(4), 0), lambda g: g.broadcast(ones(4), 1)),
        "tag": (lambda g: g.all_reduce(ones(4), tag="a"), lambda g: g.all_reduce(ones(4), tag="b")),
        "sizes": (
            lambda g: g.reduce_scatter(ones(n), 0, [n] + [0] * (n - 1)),
            lambda g: g.reduce_scatter(ones(n), 0, [1] * n),
        ),
        "order": (
            lambda g: (g.all_reduce(ones(1), tag="second"), g.all_reduce(ones(1), tag="first")),
            lambda g: (g.all_reduce(ones(1), tag="first"), g.all_reduce(ones(1), tag="second")),
        ),
        "async": (lambda g: g.all_reduce_async(ones(4), tag="a").wait(), lambda g: g.barrier_async(tag="b").wait()),
    }


def check_disagreements(group: Group) -> None:
    """Refused on every rank, before data is used, both calls named; and that group is of no more use."""
    me = group.rank
    for name, (one, others) in disagreements(group).items():
        child, out = group.split(range(group.size)), torch.full((4,), 7.0)
        with pytest.raises(
            CommError, match=rf"collective \d+: rank {me} called .*, rank \d called .*same order"
        ) as told:
            (one if me == 1 else others)(child)
        assert "something else" not in str(told.value), name
        assert f"rank {0 if me == 1 else 1} called" in str(told.value), name
        with pytest.raises(CommError, match="failed before it; end this rank"):
            child.all_reduce(torch.ones(4), out=out)
        assert out.tolist() == [7.0] * 4


def check_wrong_rows(group: Group) -> None:
    n = group.size
    expected = [2] + [1] * (n - 1) if group.rank == 1 else [1] * n
    with pytest.raises(CommError, match="rank 0 sends 1 rows to rank 1, which expects 2"):
        group.split(range(n)).all_to_all(torch.ones(n), [1] * n, expected)


def check_wrong_letters(group: Group) -> None:
    """Only who receives can tell; whatever else it was waiting for, it says so."""
    for wrong in (
        lambda child: child.recv((2,), torch.float32, 0, tag="a"),
        lambda child: child.recv((1,), torch.float64, 0, tag="a"),
        lambda child: child.recv((1,), torch.float32, 0, tag="b"),
    ):
        child = group.split(range(group.size))
        if group.rank == 0:
            child.send(torch.ones(1), 1, tag="a")
        if group.rank == 1:
            with pytest.raises(CommError, match=r"rank 0 called send 'a' of float32 \(shape \[1\], to rank 1\) where"):
                wrong(child)


def check_a_step_that_raises(group: Group) -> None:
    """A collective that raises inside on this rank alone: the next one says so, and does not wait for ever."""
    child = group.split([group.rank])
    handle = child.all_to_all_async(torch.ones(1), [1], [0])
    assert isinstance(child, SharedMemoryGroup)
    with pytest.raises(CommError, match="sends 1 rows to rank 0, which expects 0"):
        handle.wait()
    with pytest.raises(CommError, match="failed before it"):
        child.barrier()


def check_refusals(group: Group) -> None:
    check_disagreements(group)
    check_wrong_rows(group)
    check_wrong_letters(group)
    check_a_step_that_raises(group)
    group.end_step()


@pytest.mark.parametrize("ranks", [2, 3])
def test_disagreements(ranks: int) -> None:
    on_processes(ranks, check_refusals)


# ---- ranks that are slow, stopped for a while, or many


def check_slow(group: SharedMemoryGroup) -> None:
    """Rank 1 computes for four times as long as a rank without life would be waited for: no verdict."""
    group.timeout_s = 0.6
    if group.rank == 1:
        end = time.monotonic() + 2.4
        while time.monotonic() < end:
            pass
        group.send(torch.ones(1), 0)
    if group.rank == 0:
        assert group.recv((1,), torch.float32, 1).item() == 1
    assert group.all_reduce(torch.ones(1)).item() == group.size


def check_stopped_for_a_while(group: SharedMemoryGroup) -> None:
    """Rank 1 stops in the middle of a large sum; rank 0 lets it go on before anyone's patience is at an end."""
    parts = [part(2, rank, [LARGE], torch.float32, "plain") for rank in range(group.size)]
    handle = group.all_reduce_async(parts[group.rank])
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if group.rank == 0:
        time.sleep(0.5)
        os.kill(int(group.segment.words(1)[PID]), signal.SIGCONT)
    assert same_bits(handle.wait(), sum_by_loop(parts))


def check_patience(group: SharedMemoryGroup) -> None:
    check_stopped_for_a_while(group)
    check_slow(group)


def test_slow_or_stopped_for_a_while_is_not_failed() -> None:
    on_processes(3, check_patience)


def check_crowd(group: Group) -> float:
    start = time.perf_counter()
    for _ in range(300):
        group.all_reduce(torch.ones(100))
    return time.perf_counter() - start


def test_more_ranks_than_cores() -> None:
    """2400 turns of eight ranks; where ranks spin instead of yielding each takes a time slice of milliseconds."""
    assert max(on_processes(8, check_crowd)) < 6.0


# ---- autograd


def check_regions(group: Group) -> list[float]:
    """Widths that are uneven, and one empty."""
    recorder, sizes = RecordingGroup(group), [40_000, 0, 30_000]
    x = part(1, 0, [70_000], torch.float32, "plain").requires_grad_()
    share = regions.scatter(regions.copy(x, recorder, "c"), 0, sizes, recorder, "s").sin() * (group.rank + 0.1)
    whole = regions.reduce(regions.gather(share, 0, sizes, recorder, "g"), recorder, "r")
    whole.square().sum().backward()
    assert [call.tag for call in recorder.calls] == ["g", "r", "s/grad", "c/grad"]
    assert x.grad is not None
    bits = x.grad.view(torch.int32).long()
    return [int((bits * torch.arange(1, 70_001)).sum()), int(bits.sum()), x.grad[12345].item()]


def test_one_backward_equals_that_on_threads() -> None:
    """The same bits, as both sum in rank order; told by two checksums of them."""
    assert on_processes(3, check_regions) == on_threads(3, check_regions)
