"""How forked ranks find each other: something made before the fork, which each of them joins after it."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, Protocol, final

from shardwright.comm.group import Group
from shardwright.comm.segment import Segment
from shardwright.comm.watch import AbortWord

Backend = Literal["shared_memory", "gloo"]


class Meeting(Protocol):
    """Made by the process that forks; nothing of it has a name or outlives the ranks."""

    def join(self, rank: int, abort: AbortWord) -> Group:
        """In a rank: its group."""

    def close(self) -> None:
        """In the forking process: let go of what only the ranks need."""


@final
class SharedMemoryMeeting:
    """Memory that the ranks inherit."""

    def __init__(self, n: int) -> None:
        # imported, and so compiled or loaded, once for all ranks
        from shardwright.comm import shared_memory  # noqa: F401

        self._segment = Segment(n)

    def join(self, rank: int, abort: AbortWord) -> Group:
        """A group over that memory."""
        from shardwright.comm.shared_memory import SharedMemoryGroup

        return SharedMemoryGroup(self._segment, rank, abort)

    def close(self) -> None:
        """The memory lives as long as a rank does."""
        os.close(self._segment.fd)


@final
class GlooMeeting:
    """A store for gloo that is no file: the ranks open inherited memory by its name in /proc, and nothing listens."""

    def __init__(self, n: int) -> None:
        self._size = n
        self._store = os.memfd_create("shardwright-store")

    def join(self, rank: int, abort: AbortWord) -> Group:
        """A group connected over loopback."""
        from torch.distributed import FileStore  # type: ignore[attr-defined]

        from shardwright.comm.torch_group import TorchGroup

        store = FileStore(f"/proc/self/fd/{self._store}", self._size)
        return TorchGroup.join(store, rank, self._size, abort)

    def close(self) -> None:
        """The ranks have inherited it."""
        os.close(self._store)


def default_backend() -> Backend:
    """Shared memory, whose words and sums are compiled; gloo where numba is not there to compile them."""
    return "shared_memory" if find_spec("numba") else "gloo"


MEETINGS: dict[Backend, Callable[[int], Meeting]] = {"shared_memory": SharedMemoryMeeting, "gloo": GlooMeeting}
