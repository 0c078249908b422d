"""`SharedMemoryGroup`: CPU ranks of one host, over memory they share.

A collective is a generator that yields wherever all ranks must have posted a round. Waits drive it; several under way
finish in the order they were issued, on every rank. Two slots a rank take turns, so no round is needed to free one:
who writes to a slot again has seen all ranks post a round after their last look at it.
"""

import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from math import prod
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwright.comm import rounds
from shardwright.comm.atomics import FUTEX
from shardwright.comm.group import Call, Group, Handle, put, sum_in_rank_order
from shardwright.comm.mailbox import Mailboxes
from shardwright.comm.segment import PID, POSTED, SLOT, TEXT, TOLD, Segment
from shardwright.comm.watch import AbortWord, Patience
from shardwright.errors import CommError
from shardwright.layout.partition import Partition

ONE_SHOT = 1 << 17
"""Bytes up to which every rank sums all of an all-reduce; above, each sums its share and the others copy it."""

SPINS, SPINS_CROWDED = 20_000, 50
"""Looks at a word before yielding: some 20 µs where every rank has a core, next to nothing where they share."""

Rounds = Generator[None, None, Tensor]


class _Exchange(Handle):
    """A collective of this group under way."""

    def __init__(self, call: Call, group: "SharedMemoryGroup", steps: Rounds) -> None:
        super().__init__(call)
        self.steps, self.group = steps, group
        self.result: Tensor | None = None

    def done(self) -> bool:
        """Whether it has finished, having gone as far as it can without waiting."""
        self.group.drive(until=self, wait=False)
        return self.result is not None

    def _finish(self) -> Tensor:
        self.group.drive(until=self, wait=True)
        if self.result is None:
            raise CommError(f"{self.call} was dropped as an earlier collective failed; end this rank")
        return self.result


@final
class SharedMemoryGroup(Group):
    """Ranks as processes of one host. Sums in rank order: all ranks and all runs hold the same bits.

    timeout_s: how long a rank that shows no life may keep the others waiting.
    """

    def __init__(
        self, segment: Segment, rank: int, abort: AbortWord, *, timeout_s: float = 30.0, parent: Group | None = None
    ) -> None:
        super().__init__(rank, segment.ranks, parent)
        self.segment, self.abort, self.timeout_s = segment, abort, timeout_s
        self.mail = Mailboxes(segment, rank, abort)
        self._queue: deque[_Exchange] = deque()
        self._known: dict[tuple[str, torch.Size], int] = {}
        crowded = segment.ranks > (os.cpu_count() or 1)
        self.state: NDArray[np.int64] = rounds.new_state()
        self.state[: rounds.ROUND] = (
            rank,
            segment.ranks,
            segment.control,
            segment.slots,
            abort.address,
            SPINS_CROWDED if crowded else SPINS,
            FUTEX[os.uname().machine],
            segment.nap,
        )
        segment.words(rank)[PID] = os.getpid()

    def split(self, ranks: Sequence[int]) -> "SharedMemoryGroup":
        """The group of those ranks, over a segment of its own that the lowest of them makes."""
        members = self.check_members(ranks)
        mine = Segment(len(members)) if self.rank == members[0] else None
        offer = torch.tensor([[os.getpid(), mine.fd if mine else -1]])
        offers = self.all_gather(offer, 0, [1] * self.size, tag="split")
        pid, fd = offers[members[0]].tolist()
        segment = mine or Segment(len(members), os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))
        child = SharedMemoryGroup(segment, members.index(self.rank), self.abort, timeout_s=self.timeout_s, parent=self)
        self.barrier(tag="split")
        return child

    def all_reduce(self, x: Tensor, *, out: Tensor | None = None, tag: str = "") -> Tensor:
        """The sum of every rank's `x`, on every rank; small float32 tensors take one compiled call."""
        y = torch.empty_like(x) if out is None else out
        if self._queue or not _is_small(x) or not _is_small(y) or y.shape != x.shape:
            return super().all_reduce(x, out=out, tag=tag)
        start = time.perf_counter()
        key = (tag, x.shape)
        fingerprint = self._known.get(key) or self._known.setdefault(key, _fingerprint(_small_call(x, tag)))
        code = rounds.all_reduce_float32(self.state, fingerprint, x.data_ptr(), y.data_ptr(), x.numel())
        if code != rounds.DONE:
            self._settle(code, _small_call(x, tag))
            rounds.sum_float32(self.state, y.data_ptr(), x.numel())
        self.spent(time.perf_counter() - start)
        return y

    def explain(self, code: int, waiting_for: str) -> None:
        """Raise why a wait inside compiled code gave up."""
        self.abort.check(waiting_for)
        call = Call("all_reduce", 0, "float32", waiting_for)
        if code >= rounds.DIFFERENT:
            raise self._disagreement(code - rounds.DIFFERENT, call)
        raise CommError(f"rank {self.rank} waited too long in {waiting_for}; see which rank computes no longer")

    # ---- driving what is under way

    def drive(self, until: _Exchange, *, wait: bool) -> None:
        """Advance the queue until this exchange has its result, or as far as goes without waiting."""
        while until.result is None and self._queue:
            if not wait and not rounds.all_posted(self.state):
                return
            call = self._queue[0].call
            self._settle(rounds.await_all(self.state, _fingerprint(call)), call)
            self._advance()

    def _advance(self) -> None:
        """Run the first exchange to its next round; where it ends, begin the one behind it."""
        while self._queue:
            try:
                next(self._queue[0].steps)
                return
            except StopIteration as end:
                self._queue.popleft().result = end.value

    def _begin(self, call: Call, steps: Rounds) -> Handle:
        exchange = _Exchange(call, self, steps)
        self._queue.append(exchange)
        if len(self._queue) == 1:
            self._advance()
        return exchange

    def _settle(self, code: int, call: Call) -> None:
        """See a wait through to its end, or raise why it has none."""
        patience = Patience(self.timeout_s)
        while code != rounds.DONE:
            self.abort.check(call)
            if code >= rounds.DIFFERENT:
                raise self._disagreement(code - rounds.DIFFERENT, call)
            self.mail.progress()
            number = self.state[rounds.ROUND]
            patience.check(
                {rank: int(self.segment.words(rank)[PID]) for rank in range(self.size) if self._posted(rank) < number},
                call,
            )
            code = rounds.await_all(self.state, _fingerprint(call))

    def _posted(self, rank: int) -> int:
        return int(self.segment.words(rank)[POSTED])

    def _disagreement(self, other: int, call: Call) -> CommError:
        """Tell the other ranks what this one called, and what the one that differs did."""
        number = self.state[rounds.ROUND]
        said = str(call).encode()[:TEXT].ljust(TEXT, b"\0")
        self.segment.text(self.rank)[:] = torch.frombuffer(bytearray(said), dtype=torch.uint8).numpy()
        self.segment.words(self.rank)[TOLD] = number
        deadline = time.monotonic() + 1.0
        while self.segment.words(other)[TOLD] != number and time.monotonic() < deadline:
            time.sleep(0.001)
        theirs = bytes(self.segment.text(other)).rstrip(b"\0").decode(errors="replace") or "something else"
        return CommError(
            f"collective {number}: rank {self.rank} called {call}, rank {other} called {theirs}; "
            "all ranks make the same calls in the same order"
        )

    # ---- the collectives, round by round

    def _post(self, call: Call) -> None:
        rounds.post(self.state, _fingerprint(call))

    def _buffer(self) -> int:
        """The slots of a new exchange."""
        self.state[rounds.EXCHANGE] += 1
        return int(self.state[rounds.EXCHANGE]) & 1

    def _all_reduce(self, x: Tensor, out: Tensor | None, call: Call) -> Handle:
        return self._begin(call, self._reduced(x.contiguous(), out, call))

    def _reduced(self, x: Tensor, out: Tensor | None, call: Call) -> Rounds:
        direct = out is not None and out.is_contiguous()
        y = out if out is not None and direct else torch.empty_like(x)
        flat, total = x.view(-1), y.view(-1)
        if x.nbytes <= ONE_SHOT:
            buffer = self._buffer()
            slots = [_typed(self.segment.slot(rank, buffer), x.dtype, flat.numel()) for rank in range(self.size)]
            slots[self.rank].copy_(flat)
            self._post(call)
            yield
            total.copy_(sum_in_rank_order(slots))
        else:
            piece = SLOT // x.element_size()
            for start in range(0, flat.numel(), piece):
                yield from self._reduced_piece(flat[start : start + piece], total[start : start + piece], call)
        return y if direct else put(y, out)

    def _reduced_piece(self, x: Tensor, y: Tensor, call: Call) -> Generator[None, None, None]:
        """Each rank sums its share of a piece and leaves it in its slot, from where the others copy it."""
        buffer, cut = self._buffer(), Partition.balanced(x.numel(), self.size)
        slots = [_typed(self.segment.slot(rank, buffer), x.dtype, x.numel()) for rank in range(self.size)]
        low, high = cut.range(self.rank)
        mine = slots[self.rank]
        mine[:low].copy_(x[:low])
        mine[high:].copy_(x[high:])
        self._post(call)
        yield
        parts = [x[low:high] if rank == self.rank else slots[rank][low:high] for rank in range(self.size)]
        y[low:high] = mine[low:high] = sum_in_rank_order(parts)
        self._post(call)
        yield
        for rank in range(self.size):
            if rank != self.rank:
                start, stop = cut.range(rank)
                y[start:stop].copy_(slots[rank][start:stop])

    def _all_gather(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        return self._begin(call, self._gathered(x.movedim(dim, 0).contiguous(), dim, sizes, call))

    def _gathered(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Rounds:
        y = x.new_empty(sum(sizes), *x.shape[1:])
        places = [_bytes(part) for part in torch.split(y, sizes)]
        source = _bytes(x)
        for start in _pieces(max(place.numel() for place in places), SLOT):
            buffer = self._buffer()
            _copy(source[start : start + SLOT], self.segment.slot(self.rank, buffer))
            self._post(call)
            yield
            for rank, place in enumerate(places):
                _fill(place[start : start + SLOT], self.segment.slot(rank, buffer))
        return y.movedim(0, dim).contiguous()

    def _reduce_scatter(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        return self._begin(call, self._scattered(x.movedim(dim, 0).contiguous(), dim, sizes, call))

    def _scattered(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Rounds:
        shares = [part.reshape(-1) for part in torch.split(x, sizes)]
        y = torch.empty_like(shares[self.rank])
        room = SLOT // self.size // x.element_size()
        for start in _pieces(max(share.numel() for share in shares), room):
            buffer = self._buffer()
            mine = _typed(self.segment.slot(self.rank, buffer), x.dtype, room * self.size)
            for rank, share in enumerate(shares):
                _copy(share[start : start + room], mine[rank * room :])
            self._post(call)
            yield
            at, width = self.rank * room, len(y[start : start + room])
            slots = (_typed(self.segment.slot(rank, buffer), x.dtype, room * self.size) for rank in range(self.size))
            y[start : start + width] = sum_in_rank_order([slot[at : at + width] for slot in slots])
        return y.view(sizes[self.rank], *x.shape[1:]).movedim(0, dim).contiguous()

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int], call: Call) -> Handle:
        return self._begin(call, self._dealt(x.contiguous(), send, receive, call))

    def _dealt(self, x: Tensor, send: list[int], receive: list[int], call: Call) -> Rounds:
        row = prod(x.shape[1:]) * x.element_size()
        longest = yield from self._longest(max(send) * row, call)
        y = x.new_empty(sum(receive), *x.shape[1:])
        room = SLOT // self.size
        parts, places = [_bytes(p) for p in torch.split(x, send)], [_bytes(p) for p in torch.split(y, receive)]
        for start in _pieces(longest, room):
            buffer = self._buffer()
            for rank, part in enumerate(parts):
                _copy(part[start : start + room], self.segment.slot(self.rank, buffer)[rank * room :])
            self._post(call)
            yield
            for rank, place in enumerate(places):
                _fill(place[start : start + room], self.segment.slot(rank, buffer)[self.rank * room :])
        return y

    def _longest(self, mine: int, call: Call) -> Generator[None, None, int]:
        """The largest of all ranks' numbers: how many rounds there will be."""
        buffer = self._buffer()
        _typed(self.segment.slot(self.rank, buffer), torch.int64, 1)[0] = mine
        self._post(call)
        yield
        return max(int(_typed(self.segment.slot(rank, buffer), torch.int64, 1)) for rank in range(self.size))

    def _broadcast(self, x: Tensor, root: int, call: Call) -> Handle:
        return self._begin(call, self._spread(x.contiguous(), root, call))

    def _spread(self, x: Tensor, root: int, call: Call) -> Rounds:
        y = x.clone()
        for start in _pieces(x.nbytes, SLOT):
            buffer = self._buffer()
            if self.rank == root:
                _copy(_bytes(x)[start : start + SLOT], self.segment.slot(root, buffer))
            self._post(call)
            yield
            if self.rank != root:
                _fill(_bytes(y)[start : start + SLOT], self.segment.slot(root, buffer))
        return y

    def _send(self, x: Tensor, destination: int, call: Call) -> Handle:
        return self.mail.send(x, destination, call)

    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, call: Call) -> Handle:
        return self.mail.recv(torch.empty(shape, dtype=dtype), source, call)

    def _barrier(self, call: Call) -> Handle:
        return self._begin(call, self._met(call))

    def _met(self, call: Call) -> Rounds:
        self._buffer()
        self._post(call)
        yield
        return torch.empty(0)


@lru_cache(maxsize=4096)
def _fingerprint(call: Call) -> int:
    """What all ranks must agree on about a call, in 64 bits, never 0."""
    said = f"{call.op}/{call.dtype}/{call.detail}/{call.tag}"
    return int.from_bytes(blake2b(said.encode(), digest_size=8).digest(), "little", signed=True) or 1


def tag_fingerprint(tag: str) -> int:
    """What ranks agree on about an all-reduce inside a compiled step."""
    return _fingerprint(Call("all_reduce", 0, "float32", tag, "compiled")) >> 16


def alone() -> SharedMemoryGroup:
    """A group of one, for compiled steps, which ask for a group's state."""
    return SharedMemoryGroup(Segment(1), 0, AbortWord())


def _is_small(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.nbytes <= ONE_SHOT and x.is_contiguous() and x.device.type == "cpu"


def _small_call(x: Tensor, tag: str) -> Call:
    return Call("all_reduce", x.nbytes, "float32", tag, f"shape {list(x.shape)}")


def _pieces(size: int, room: int) -> Iterable[int]:
    """Where pieces of at most `room` start; one round even for nothing, so that a call is never silent."""
    return range(0, max(size, 1), room)


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def _typed(slot: Tensor, dtype: torch.dtype, n: int) -> Tensor:
    return slot[: n * dtype.itemsize].view(dtype)


def _copy(part: Tensor, slot: Tensor) -> None:
    """Into a slot, whose end may lie beyond the part's."""
    slot[: part.numel()].copy_(part)


def _fill(part: Tensor, slot: Tensor) -> None:
    """Out of a slot."""
    part.copy_(slot[: part.numel()])
