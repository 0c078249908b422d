"""`ThreadGroup`: N ranks as threads of one process, for tests, notebooks and verification.

Ranks meet at a board: each posts a copy of what it hands over under the number of the collective, and waits until all
have. Posting never blocks, so every collective is asynchronous by itself. No processes, no torch.distributed.
"""

from abc import abstractmethod
from collections import Counter
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
    """What all boards of one run share: the lock, the first failure, who waits and who has left."""

    size: int
    changed: Condition = field(default_factory=Condition)
    failure: tuple[str, BaseException] | None = None
    waiting: "dict[int, _Waiting]" = field(default_factory=dict)
    left: set[int] = field(default_factory=set)

    def fail(self, who: str, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or (who, error)
            self.changed.notify_all()

    def leave(self, rank: int, future: "Future[Any]") -> None:
        with self.changed:
            error = future.exception()
            if error:
                self.fail(f"rank {rank}", error)
            self.left.add(rank)
            self.changed.notify_all()

    def hopeless(self, handle: "_Waiting") -> ShardwrightError | None:
        """Why this handle will never be ready: a rank failed, or one that it needs has left."""
        if self.failure:
            return _secondary(*self.failure)
        gone = sorted(self.left.intersection(handle.missing()))
        if gone:
            return CommError(f"rank {gone[0]} ended without entering {handle.call}; every rank enters every collective")
        return None

    def wait_for(self, handle: "_Waiting") -> None:
        """Wait, holding the lock, until the handle is ready; raise when it never will be."""
        while not handle.ready():
            error = self.hopeless(handle)
            if error:
                raise error
            self.waiting[handle.rank] = handle
            if len(self.waiting) + len(self.left) == self.size and not any(h.ready() for h in self.waiting.values()):
                names = ", ".join(f"rank {rank} in {h.call}" for rank, h in sorted(self.waiting.items()))
                deadlock = CommError(f"ranks wait for each other: {names}; all ranks make the same calls in one order")
                self.fail(f"rank {handle.rank}", deadlock)
                raise deadlock
            self.changed.wait()
            self.waiting.pop(handle.rank, None)


@dataclass
class _Round:
    """One collective: who called what, and what each rank handed over."""

    caller: int
    call: Call
    parts: dict[int, Tensor] = field(default_factory=dict)


class _Board:
    """Where the ranks of one group meet; `members` are their ranks in the whole run.

    rounds: collectives that not all have entered yet · mail: letters by source, destination and number · children:
    boards of splits that not all members have come to yet. Each is dropped by the last rank that needs it here.
    """

    def __init__(self, crew: _Crew, members: tuple[int, ...]) -> None:
        self.crew = crew
        self.members = members
        self.joined = 0
        self.rounds: dict[int, _Round] = {}
        self.mail: dict[tuple[int, int, int], tuple[Call, Tensor]] = {}
        self.children: dict[tuple[int, ...], _Board] = {}

    def post(self, number: int, rank: int, call: Call, part: Tensor) -> _Round:
        with self.crew.changed:
            meeting = self.rounds.setdefault(number, _Round(rank, call))
            if _agreed(call) != _agreed(meeting.call):
                error = CommError(
                    f"collective {number}: rank {meeting.caller} called {meeting.call}, rank {rank} called {call}; "
                    "all ranks make the same calls in the same order"
                )
                self.crew.fail(f"rank {self.members[rank]}", error)
                raise error
            meeting.parts[rank] = part
            if len(meeting.parts) == len(self.members):
                del self.rounds[number]
                self.crew.changed.notify_all()
            return meeting

    def child(self, number: int, members: tuple[int, ...]) -> "_Board":
        """The board of a split: the first member to come makes it, the last takes it away from here."""
        with self.crew.changed:
            whole = tuple(self.members[rank] for rank in members)
            board = self.children.setdefault((number, *members), _Board(self.crew, whole))
            board.joined += 1
            if board.joined == len(members):
                del self.children[(number, *members)]
            return board


class _Waiting(Handle):
    """Something that other ranks have to do first."""

    def __init__(self, call: Call, board: _Board, rank: int) -> None:
        super().__init__(call)
        self._board = board
        self.rank = board.members[rank]

    def done(self) -> bool:
        """Whether the others have done it, or never will."""
        with self._board.crew.changed:
            return self._result is not None or self.ready() or self._board.crew.hopeless(self) is not None

    @abstractmethod
    def ready(self) -> bool: ...

    @abstractmethod
    def missing(self) -> list[int]:
        """The ranks of the whole run that it needs and that have not come."""


@final
class _Meeting(_Waiting):
    """A collective posted on the board; `combine` makes this rank's result of all parts."""

    def __init__(
        self, call: Call, board: _Board, rank: int, meeting: _Round, combine: Callable[[list[Tensor]], Tensor]
    ) -> None:
        super().__init__(call, board, rank)
        self._round = meeting
        self._combine = combine

    def ready(self) -> bool:
        return len(self._round.parts) == len(self._board.members)

    def missing(self) -> list[int]:
        return [whole for rank, whole in enumerate(self._board.members) if rank not in self._round.parts]

    def _finish(self) -> Tensor:
        with self._board.crew.changed:
            self._board.crew.wait_for(self)
        return self._combine([self._round.parts[rank] for rank in range(len(self._board.members))])


@final
class _Letter(_Waiting):
    """The n-th tensor that one rank expects from another."""

    def __init__(self, call: Call, board: _Board, source: int, rank: int, number: int) -> None:
        super().__init__(call, board, rank)
        self._source = source
        self._key = source, rank, number

    def ready(self) -> bool:
        return self._key in self._board.mail

    def missing(self) -> list[int]:
        return [self._board.members[self._source]]

    def _finish(self) -> Tensor:
        with self._board.crew.changed:
            self._board.crew.wait_for(self)
            sent, x = self._board.mail.pop(self._key)
        shapes = sent.detail.split(", to")[0], self.call.detail.split(", from")[0]
        if (sent.dtype, sent.tag) != (self.call.dtype, self.call.tag) or shapes[0] != shapes[1]:
            raise CommError(
                f"rank {self._source} called {sent} where {self.call} waits; both sides name the same tensor"
            )
        return x


@final
class ThreadGroup(Group):
    """One of N threads. Made by `ThreadGroup.run(n, body)`, never by hand.

    Sums in rank order: all ranks and all runs hold the same bits. A disagreement, a rank that ends early and ranks that
    wait for each other are errors on all ranks.
    """

    def __init__(self, rank: int, board: _Board, parent: Group | None = None) -> None:
        super().__init__(rank, len(board.members), parent)
        self._board = board
        self._number = 0
        self._sent: Counter[int] = Counter()
        self._expected: Counter[int] = Counter()

    @staticmethod
    def run(n: int, body: "Callable[[ThreadGroup], T]") -> list[T]:
        """Run `body(group)` on n threads and return what each gave, in rank order.

        The caller's grad and inference modes hold inside; each thread computes on one core. When a rank raises, all
        waits break and its exception is raised here; the others' consequent `AbortedError`s are not.
        """
        if n < 1:
            raise UsageError("n", n, "a run needs at least one rank", "pass 1 or more")
        crew = _Crew(n)
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
                try:
                    futures = [pool.submit(rank_main, rank) for rank in range(n)]
                    for rank, future in enumerate(futures):
                        future.add_done_callback(partial(crew.leave, rank))
                    wait(futures)
                except (KeyboardInterrupt, RuntimeError) as error:  # Ctrl-C; no more threads
                    crew.fail("the caller", error)  # inside the pool, which else would wait for ranks that wait
                    raise
        finally:
            torch.set_num_threads(threads_before)
        if crew.failure:
            raise crew.failure[1]
        return [future.result() for future in futures]

    def split(self, ranks: Sequence[int]) -> "ThreadGroup":
        """The group of those ranks; checks that all ranks' lists fit together."""
        members = self.agree_on_members(ranks)
        return ThreadGroup(members.index(self.rank), self._board.child(self._number, members), self)

    def _all_reduce(self, x: Tensor, out: Tensor | None, call: Call) -> Handle:
        return self._post(x, call, lambda parts: put(sum_in_rank_order(parts), out))

    def _all_gather(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        return self._post(x, call, lambda parts: torch.cat(parts, dim))

    def _reduce_scatter(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        start, width = sum(sizes[: self.rank]), sizes[self.rank]
        return self._post(x, call, lambda parts: sum_in_rank_order([p.narrow(dim, start, width) for p in parts]))

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int], call: Call) -> Handle:
        counts = self._post(
            torch.tensor([send], device="cpu"), Call("all_to_all", 0, "int64", call.tag, "row counts"), torch.cat
        )

        def mine(parts: list[Tensor]) -> Tensor:
            table = counts.wait().tolist()
            coming = [row[self.rank] for row in table]
            if coming != receive:
                raise CommError(f"{call}: rank {self.rank} expects {receive} rows, the ranks send it {coming}")
            return torch.cat(
                [p.narrow(0, sum(row[: self.rank]), row[self.rank]) for p, row in zip(parts, table, strict=True)]
            )

        return self._post(x, call, mine)

    def _broadcast(self, x: Tensor, root: int, call: Call) -> Handle:
        return self._post(x, call, lambda parts: parts[root].clone())

    def _send(self, x: Tensor, destination: int, call: Call) -> Handle:
        board, number = self._board, self._sent[destination]
        self._sent[destination] += 1
        with board.crew.changed:
            board.mail[self.rank, destination, number] = call, x.clone()
            board.crew.changed.notify_all()
        return Done(call, x)

    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, call: Call) -> Handle:
        self._expected[source] += 1
        return _Letter(call, self._board, source, self.rank, self._expected[source] - 1)

    def _barrier(self, call: Call) -> Handle:
        return self._post(torch.empty(0), call, lambda parts: torch.empty(0))

    def _post(self, x: Tensor, call: Call, combine: Callable[[list[Tensor]], Tensor]) -> Handle:
        self._number += 1
        meeting = self._board.post(self._number, self.rank, call, x.clone())
        return _Meeting(call, self._board, self.rank, meeting, combine)


def _agreed(call: Call) -> tuple[str, str, str, str]:
    """What all ranks must say alike; the bytes may differ."""
    return call.op, call.dtype, call.detail, call.tag


def _secondary(who: str, error: BaseException) -> ShardwrightError:
    """What the other ranks raise: the same disagreement, or that they stopped because of it."""
    if isinstance(error, CommError):
        return CommError(str(error))
    return AbortedError(f"{who} failed first: {type(error).__name__}: {error}")
