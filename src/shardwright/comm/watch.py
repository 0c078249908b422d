"""Who is still alive: the abort word that every wait looks at, and what a rank says when it fails."""

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, Self, final

from shardwright.errors import AbortedError, CommError

ABORT_GRACE = 2.0
"""Seconds after a peer has gone in which the launcher says which rank failed, and of what."""

GLANCE = 0.1
"""Seconds between looks at a process that keeps others waiting."""

ENDED = ("gone", "Z", "X")
"""States of a process that will never come."""


@final
class AbortWord:
    """An integer shared by the ranks of a host and their launcher: 0, or 1 + the rank that failed first.

    It lives in anonymous memory inherited at the fork, so nothing of it is left when the job ends; or in shared
    `memory` of 8 bytes, where ranks have joined. Compiled waits look at it by its address.
    """

    def __init__(self, memory: memoryview | None = None) -> None:
        room = memory if memory is not None else memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._word = room.cast("q")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(room))

    def set(self, rank: int) -> None:
        """Say that `rank` failed; the first to say so is kept."""
        if not self._word[0]:
            self._word[0] = rank + 1

    def failed(self) -> int | None:
        """The rank that failed, if one did."""
        return self._word[0] - 1 if self._word[0] else None

    def check(self, waiting_for: object) -> None:
        """Raise `AbortedError` if a rank has failed."""
        failed = self.failed()
        if failed is not None:
            raise AbortedError(f"stopped waiting for {waiting_for}: rank {failed} failed")


def poll(done: Callable[[], bool], abort: AbortWord, waiting_for: object) -> None:
    """Wait until `done()`, looking at the abort word and yielding between looks: ranks may outnumber cores."""
    looks = 0
    while not done():
        abort.check(waiting_for)
        looks += 1
        time.sleep(0 if looks < 2000 else 0.0005)


def state_of(pid: int) -> tuple[str, float]:
    """A process's state as the system names it (`T` is stopped, `gone` has ended), and the seconds it has computed."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "gone", 0.0
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Circle(Protocol):
    """What notices that ranks wait for each other; see `comm.standstill`, which needs compiled words."""

    def turn(self, waiting_for: object) -> None:
        """Count a look that found nothing, and raise if no look ever will."""

    def over(self) -> None:
        """The wait has ended."""


@final
class Patience:
    """How long one wait may go on: without end while the missing ranks compute, `timeout_s` while they show no life.

    A context, which ends with the wait. circle: told of the wait's fruitless turns, and of its end.
    """

    def __init__(self, timeout_s: float, circle: Circle) -> None:
        self.timeout_s, self._circle = timeout_s, circle
        self._last: dict[int, tuple[float, float]] = {}
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._circle.over()

    def check(self, missing: Mapping[int, int], waiting_for: object) -> None:
        """Look at the missing ranks (rank → pid, 0 of one that has not joined yet), unless that was just done.

        Raises:
            CommError: one has computed nothing for too long, or ranks wait for each other.
            AbortedError: one has ended; the launcher has had a moment to say of what.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + GLANCE
        self._circle.turn(waiting_for)
        for rank, pid in missing.items():
            state, computed = state_of(pid) if pid else ("not joined", 0.0)
            since, before = self._last.get(rank, (now, -1.0))
            if computed > before:
                self._last[rank] = now, computed
            elif state in ENDED and now - since > ABORT_GRACE:
                raise AbortedError(f"{waiting_for} broke off: rank {rank} has ended")
            elif now - since > self.timeout_s:
                shown = "is stopped" if state == "T" else f"shows no life (state {state})"
                raise CommError(
                    f"rank {rank} (pid {pid}) {shown} and has not entered {waiting_for} for {self.timeout_s:g} s, "
                    "the progress timeout; continue or end it"
                )
