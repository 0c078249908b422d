"""Who is still alive: the abort word that every wait looks at, and what a rank says when it fails."""

import mmap
import time
from collections.abc import Callable
from typing import final

from shardwright.errors import AbortedError


@final
class AbortWord:
    """An integer shared by the ranks of a host and their launcher: 0, or 1 + the rank that failed first.

    It lives in anonymous memory inherited at the fork, so nothing of it is left when the job ends.
    """

    def __init__(self) -> None:
        self._word = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("i")

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
