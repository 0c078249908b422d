"""`ThreadGroup`: N ranks as threads of one process, for tests, notebooks and verification.

Ranks meet at a board: each posts a copy of what it hands over under the number of the collective, and waits until all
have. Posting never blocks, so every collective is asynchronous by itself. No processes, no torch.distributed.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from threading import Condition
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from shardwright.comm.group import Call, Done, Group, Handle, put, sum_in_rank_order
from shardwright.errors import AbortedError, CommError, ShardwrightError, UsageError

T = TypeVar("T")


@dataclass
class _Crew:
    """What all boards of one run share: the lock, the first failure, and who has left."""

    changed: Condition = field(default_factory=Condition)
    failure: tuple[int, BaseException] | None = None
    left: set[int] = field(default_factory=set)

    def fail(self, rank: int, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or (rank, error)
            self.changed.notify_all()

    def leave(self, rank: int, future: "Future[Any]") -> None:
        with self.changed:
            error = future.exception()
            if error:
                self.failure = self.failure or (rank, error)
            self.left.add(rank)
            self.changed.notify_all()

    def wait_for(self, ready: Callable[[], bool], missing: Callable[[], list[int]], call: Call) -> None:
        """Wait, holding the lock, until ready; raise if a rank failed, or one that is missed has left."""
        while not ready():
            if self.failure:
                raise _secondary(*self.failure)
            gone = sorted(self.left.intersection(missing()))
            if gone:
                raise CommError(f"rank {gone[0]} ended without entering {call}; every rank enters every collective")
            self.changed.wait()


@dataclass
class _Round:
    """One collective: who called what, and what each rank handed over."""

    caller: int
    call: Call
    parts: dict[int, Tensor] = field(default_factory=dict)
    readers: int = 0


class _Board:
    """Where the ranks of one group meet; `members` are their ranks in the whole run."""

    def __init__(self, crew: _Crew, members: tuple[int, ...]) -> None:
        self.crew = crew
        self.members = members
        self.rounds: dict[int, _Round] = {}
        self.mail: dict[tuple[int, int], deque[tuple[Call, Tensor]]] = {}
        self.children: dict[tuple[int, ...], _Board] = {}

    def post(self, number: int, rank: int, call: Call, part: Tensor) -> None:
        with self.crew.changed:
            meeting = self.rounds.setdefault(number, _Round(rank, call))
            if (call.op, call.dtype, call.detail, call.tag) != (
                meeting.call.op,
                meeting.call.dtype,
                meeting.call.detail,
                meeting.call.tag,
            ):
                error = CommError(
                    f"collective {number}: rank {meeting.caller} called {meeting.call}, rank {rank} called {call}; "
                    "all ranks make the same calls in the same order"
                )
                self.crew.fail(self.members[rank], error)
                raise error
            meeting.parts[rank] = part
            self.crew.changed.notify_all()

    def collect(self, number: int, call: Call) -> list[Tensor]:
        """Every rank's part, in rank order; the last reader clears the round."""
        with self.crew.changed:
            meeting = self.rounds[number]
            self.crew.wait_for(
                lambda: len(meeting.parts) == len(self.members),
                lambda: [whole for rank, whole in enumerate(self.members) if rank not in meeting.parts],
                call,
            )
            meeting.readers += 1
            if meeting.readers == len(self.members):
                del self.rounds[number]
            return [meeting.parts[rank] for rank in range(len(self.members))]

    def complete(self, number: int) -> bool:
        with self.crew.changed:
            return len(self.rounds[number].parts) == len(self.members)


class _Meeting(Handle):
    """A collective posted on the board; `combine` makes this rank's result of all parts."""

    def __init__(self, call: Call, board: _Board, number: int, combine: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__(call)
        self._board = board
        self._number = number
        self._combine = combine

    def done(self) -> bool:
        """Whether all ranks have posted."""
        return self._result is not None or self._board.complete(self._number)

    def _finish(self) -> Tensor:
        return self._combine(self._board.collect(self._number, self.call))


class _Letter(Handle):
    """A tensor that one rank expects from another."""

    def __init__(self, call: Call, board: _Board, source: int, rank: int) -> None:
        super().__init__(call)
        self._board = board
        self._source = source
        self._box = board.mail.setdefault((source, rank), deque())

    def done(self) -> bool:
        """Whether the letter has come."""
        return self._result is not None or bool(self._box)

    def _finish(self) -> Tensor:
        crew = self._board.crew
        with crew.changed:
            crew.wait_for(lambda: bool(self._box), lambda: [self._board.members[self._source]], self.call)
            sent, x = self._box.popleft()
        if (sent.dtype, sent.tag, sent.detail.split(", to")[0]) != (
            self.call.dtype,
            self.call.tag,
            self.call.detail.split(", from")[0],
        ):
            raise CommError(
                f"rank {self._source} called {sent} where {self.call} waits; both sides name the same tensor"
            )
        return x


@final
class ThreadGroup(Group):
    """One of N threads. Made by `ThreadGroup.run(n, body)`, never by hand.

    Sums in rank order: all ranks and all runs hold the same bits.
    """

    def __init__(self, rank: int, board: _Board) -> None:
        super().__init__(rank, len(board.members))
        self._board = board
        self._number = 0

    @staticmethod
    def run(n: int, body: "Callable[[ThreadGroup], T]") -> list[T]:
        """Run `body(group)` on n threads and return what each gave, in rank order.

        The caller's grad and inference modes hold inside; each thread computes on one core. When a rank raises, all
        waits break and its exception is raised here; the others' consequent `AbortedError`s are not.
        """
        if n < 1:
            raise UsageError("n", n, "a run needs at least one rank", "pass 1 or more")
        crew = _Crew()
        board = _Board(crew, tuple(range(n)))
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        threads_before = torch.get_num_threads()

        def rank_main(rank: int) -> T:
            torch.set_num_threads(1)
            group = ThreadGroup(rank, board)
            with torch.inference_mode(modes[1]), torch.set_grad_enabled(modes[0]):
                result = body(group)
            group.end_step()
            return result

        try:
            with ThreadPoolExecutor(n, thread_name_prefix="rank") as pool:
                futures = [pool.submit(rank_main, rank) for rank in range(n)]
                for rank, future in enumerate(futures):
                    future.add_done_callback(partial(crew.leave, rank))
                wait(futures)
        except KeyboardInterrupt as interrupt:
            crew.fail(-1, interrupt)
            raise
        finally:
            torch.set_num_threads(threads_before)
        if crew.failure:
            raise crew.failure[1]
        return [future.result() for future in futures]

    def split(self, ranks: Sequence[int]) -> "ThreadGroup":
        """The group of those ranks; checks that all ranks' lists fit together."""
        members = self.check_members(ranks)
        mask = torch.zeros(self.size, dtype=torch.int64)
        mask[list(members)] = 1
        lists = self.all_gather(mask[None], 0, [1] * self.size, tag="split")
        for rank in members:
            if not torch.equal(lists[rank], mask):
                raise CommError(
                    f"split: rank {self.rank} names {list(members)}, rank {rank} another list; they must agree"
                )
        with self._board.crew.changed:
            whole = tuple(self._board.members[rank] for rank in members)
            key = (self._number, *members)
            child = self._board.children.setdefault(key, _Board(self._board.crew, whole))
        return ThreadGroup(members.index(self.rank), child)

    def _all_reduce(self, x: Tensor, out: Tensor | None, call: Call) -> Handle:
        return self._post(x, call, lambda parts: put(sum_in_rank_order(parts), out))

    def _all_gather(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        return self._post(x, call, lambda parts: torch.cat(parts, dim))

    def _reduce_scatter(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        start, width = sum(sizes[: self.rank]), sizes[self.rank]
        return self._post(x, call, lambda parts: sum_in_rank_order([p.narrow(dim, start, width) for p in parts]))

    def _broadcast(self, x: Tensor, root: int, call: Call) -> Handle:
        return self._post(x, call, lambda parts: parts[root].clone())

    def _send(self, x: Tensor, destination: int, call: Call) -> Handle:
        with self._board.crew.changed:
            self._board.mail.setdefault((self.rank, destination), deque()).append((call, x.clone()))
            self._board.crew.changed.notify_all()
        return Done(call, x)

    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, call: Call) -> Handle:
        return _Letter(call, self._board, source, self.rank)

    def _barrier(self, call: Call) -> Handle:
        return self._post(torch.empty(0), call, lambda parts: torch.empty(0))

    def _post(self, x: Tensor, call: Call, combine: Callable[[list[Tensor]], Tensor]) -> Handle:
        self._number += 1
        self._board.post(self._number, self.rank, call, x.clone())
        return _Meeting(call, self._board, self._number, combine)


def _secondary(rank: int, error: BaseException) -> ShardwrightError:
    """What the other ranks raise: the same disagreement, or that they stopped because of it."""
    if isinstance(error, CommError):
        return CommError(str(error))
    return AbortedError(f"rank {rank} failed first: {type(error).__name__}: {error}")
