"""`SharedMemoryGroup`: CPU ranks of one host, over memory they share.

Decides who waits for what: waits drive the generators of `comm.exchanges`; several under way finish in the order they
were issued, on every rank; a wait in one group also advances those split from it or with it, and letters.
"""

import os
import time
from collections import deque
from collections.abc import Sequence
from typing import final
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwright.comm import rounds
from shardwright.comm.atomics import FUTEX, SLEEPS, read_word, write_word
from shardwright.comm.exchanges import Exchanges, Rounds, fingerprint_of, is_plain
from shardwright.comm.group import Call, Done, Group, Handle, put
from shardwright.comm.mailbox import Advancing, Mailboxes
from shardwright.comm.segment import PID, POSTED, TOLD, Segment, put_text, text_of
from shardwright.comm.standstill import Standstill
from shardwright.comm.watch import AbortWord, Patience
from shardwright.errors import CommError

LIVELY = 100
"""Turns of a wait in which other things are under way before it sleeps between them: some 20 ms."""

SPINS, SPINS_CROWDED = 20_000, 50
"""Looks at a word before yielding: some 20 µs where every rank has a core, next to nothing where they share."""


class _Exchange(Handle):
    """A collective of this group under way."""

    def __init__(self, call: Call, group: "SharedMemoryGroup", steps: Rounds) -> None:
        super().__init__(call)
        self.steps, self.group, self.fingerprint = steps, group, fingerprint_of(call)
        self.result: Tensor | None = None

    def done(self) -> bool:
        """Whether it has finished, or never will, having gone as far as goes without waiting."""
        self.group.mail.advance_all()
        code = self.group.advance()
        return self.result is not None or code not in (rounds.DONE, rounds.AGAIN)

    def _finish(self) -> Tensor:
        self.group.drive(until=self)
        if self.result is None:
            raise self.group.refused(self.call)
        return self.result


@final
class SharedMemoryGroup(Group):
    """Ranks as processes of one host. Sums in rank order: all ranks and all runs hold the same bits."""

    def __init__(
        self,
        segment: Segment,
        rank: int,
        abort: AbortWord,
        parent: "SharedMemoryGroup | None" = None,
    ) -> None:
        super().__init__(rank, segment.ranks, parent)
        self.segment, self.abort = segment, abort
        self.kin: WeakSet[Advancing] = parent.kin if parent else WeakSet()
        self.kin.add(self)
        self.circle: Standstill = parent.circle if parent else Standstill(segment, rank)
        self.mail = Mailboxes(segment, rank, abort, self.kin, self.circle)
        self._queue: deque[_Exchange] = deque()
        self._stuck: Call | None = None
        self._known: dict[tuple[str, torch.Size], int] = {}
        crowded = segment.ranks > len(os.sched_getaffinity(0))
        self.state: NDArray[np.int64] = rounds.new_state()
        self.state[: rounds.ROUND] = (
            rank,
            segment.ranks,
            segment.control,
            segment.slots,
            abort.address,
            parent.state[rounds.SPINS] if parent else SPINS_CROWDED if crowded else SPINS,
            FUTEX[os.uname().machine],
            segment.nap,
        )
        self._exchanges = Exchanges(segment, rank, self.state)
        segment.words(rank)[PID] = os.getpid()

    def split(self, ranks: Sequence[int]) -> "SharedMemoryGroup":
        """The group of those ranks, over a segment of its own that the lowest of them makes."""
        members = self.agree_on_members(ranks)
        mine = Segment(len(members)) if self.rank == members[0] else None
        offer = torch.tensor([[os.getpid(), mine.fd if mine else -1]])
        offers = self.all_gather(offer, 0, [1] * self.size, tag="split")
        pid, fd = offers[members[0]].tolist()
        segment = mine or Segment(len(members), os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))
        child = SharedMemoryGroup(segment, members.index(self.rank), self.abort, self)
        self.barrier(tag="split")
        os.close(segment.fd)  # all have opened it, and the memory lives as long as one of them holds it
        return child

    def all_reduce(self, x: Tensor, *, out: Tensor | None = None, tag: str = "") -> Tensor:
        """The sum of every rank's `x`, on every rank; small float32 tensors take one compiled call."""
        small = x.nbytes <= self._exchanges.one_shot and is_plain(x)
        fits = out is None or (is_plain(out) and out.shape == x.shape)
        if not (small and fits) or self._ledger.open or self._queue or self._stuck or self.size == 1:
            return super().all_reduce(x, out=out, tag=tag)
        start = time.perf_counter()
        y = torch.empty_like(x) if out is None else out
        key = (tag, x.shape)
        fingerprint = self._known.get(key) or self._known.setdefault(key, fingerprint_of(_plain_call(x, tag)))
        code = rounds.all_reduce_float32(self.state, fingerprint, x.data_ptr(), y.data_ptr(), x.numel())
        if code != rounds.DONE:
            self._settle(code, _plain_call(x, tag), fingerprint)
            rounds.sum_float32(self.state, y.data_ptr(), x.numel())
        self.spent(time.perf_counter() - start)
        return y

    def explain(self, code: int, waiting_for: str) -> None:
        """Raise why a wait inside compiled code gave up."""
        call = Call("all_reduce", 0, "float32", waiting_for)
        if code >= rounds.DIFFERENT:
            raise self._disagreement(code - rounds.DIFFERENT, call)
        self.abort.check(waiting_for)
        raise CommError(f"rank {self.rank} waited too long in {waiting_for}; see which rank computes no longer")

    # ---- driving what is under way

    def advance(self) -> int:
        """Go as far as goes without waiting; what a wait for the rest would give."""
        self.mail.progress()
        code = rounds.FAILED if self._stuck else rounds.DONE
        while self._queue and code == rounds.DONE:
            code = rounds.look(self.state, self._queue[0].fingerprint)
            if code == rounds.DONE:
                self._step()
        return code

    def drive(self, until: _Exchange) -> None:
        """Advance the queue until this exchange has its result."""
        while until.result is None and self._queue and not self._stuck:
            first = self._queue[0]
            code = rounds.await_all(self.state, first.fingerprint, self._sleeps(0))
            self._settle(code, first.call, first.fingerprint)
            self._step()

    def refused(self, call: Call) -> CommError:
        """Why a collective will not be: one before it failed."""
        self.abort.check(call)
        return CommError(f"{call} cannot be, as {self._stuck} failed before it; end this rank")

    def _step(self) -> None:
        """Run the first exchange to its next round; where it ends, begin the one behind it."""
        self.circle.moved()
        while self._queue:
            self._stuck = self._queue[0].call  # and so it stays, if its step raises
            try:
                next(self._queue[0].steps)
            except StopIteration as end:
                self._queue.popleft().result = end.value
                self._stuck = None
            else:
                self._stuck = None
                return

    def _begin(self, call: Call, steps: Rounds) -> Handle:
        if self._stuck:
            raise self.refused(call)
        exchange = _Exchange(call, self, steps)
        self._queue.append(exchange)
        if len(self._queue) == 1:
            self._step()
        return exchange

    def _sleeps(self, turns: int) -> int:
        """How often a turn of a wait may sleep: often, seldom or, at first, not at all if more is under way."""
        return SLEEPS if len(self._ledger.open) <= 1 else int(turns > LIVELY)

    def _settle(self, code: int, call: Call, fingerprint: int) -> None:
        """See a wait through to its end, or raise why it has none."""
        if code == rounds.DONE:
            return
        self._stuck, turns = call, 0
        with Patience(self.timeout_s, self.circle) as patience:
            while code != rounds.DONE:
                if code >= rounds.DIFFERENT:
                    raise self._disagreement(code - rounds.DIFFERENT, call)
                self.abort.check(call)
                self.mail.advance_all()
                patience.check(self._missing(), call)
                turns += 1
                code = rounds.await_all(self.state, fingerprint, self._sleeps(turns))
        self._stuck = None

    def _missing(self) -> dict[int, int]:
        """The ranks, and their processes, that have not posted this round."""
        words = map(self.segment.words, range(self.size))
        return {rank: int(w[PID]) for rank, w in enumerate(words) if w[POSTED] < self.state[rounds.ROUND]}

    def _disagreement(self, other: int, call: Call) -> CommError:
        """Tell the other ranks what this one called, and what the one that differs did."""
        number = int(self.state[rounds.ROUND])
        put_text(self.segment.text(self.rank), str(call))
        write_word(self.segment.word(self.rank, TOLD), number)
        deadline = time.monotonic() + 1.0
        while read_word(self.segment.word(other, TOLD)) != number and time.monotonic() < deadline:
            time.sleep(0.001)
        theirs = text_of(self.segment.text(other)) or "something else"
        return CommError(
            f"collective {number}: rank {self.rank} called {call}, rank {other} called {theirs}; "
            "all ranks make the same calls in the same order"
        )

    # ---- the collectives

    def _all_reduce(self, x: Tensor, out: Tensor | None, call: Call) -> Handle:
        if self.size == 1:
            return Done(call, put(x.clone(), out))
        return self._begin(call, self._exchanges.reduced(x.contiguous(), out, call))

    def _all_gather(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        return self._begin(call, self._exchanges.gathered(x.movedim(dim, 0).contiguous(), dim, sizes, call))

    def _reduce_scatter(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        return self._begin(call, self._exchanges.scattered(x.movedim(dim, 0).contiguous(), dim, sizes, call))

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int], call: Call) -> Handle:
        return self._begin(call, self._exchanges.dealt(x.contiguous(), send, receive, call))

    def _broadcast(self, x: Tensor, root: int, call: Call) -> Handle:
        return self._begin(call, self._exchanges.spread(x.contiguous(), root, call))

    def _send(self, x: Tensor, destination: int, call: Call) -> Handle:
        return self.mail.send(x, destination, call, self.timeout_s)

    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, call: Call) -> Handle:
        return self.mail.recv(torch.empty(shape, dtype=dtype), source, call, self.timeout_s)

    def _barrier(self, call: Call) -> Handle:
        return self._begin(call, self._exchanges.met(call))


def tag_fingerprint(tag: str) -> int:
    """What ranks agree on about an all-reduce inside a compiled step."""
    return fingerprint_of(Call("all_reduce", 0, "float32", tag, "compiled")) >> 16


def alone() -> SharedMemoryGroup:
    """A group of one, for compiled steps, which ask for a group's state."""
    return SharedMemoryGroup(Segment(1), 0, AbortWord())


def _plain_call(x: Tensor, tag: str) -> Call:
    return Call("all_reduce", x.nbytes, "float32", tag, f"shape {list(x.shape)}")
