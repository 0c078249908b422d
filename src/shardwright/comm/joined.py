"""Shared memory for ranks of one host that somebody else started, as `torchrun` does: found by way of its store.

Rank 0 makes the memory and hands it over a unix socket whose name is in the store, to processes of the same user. No
launcher of ours watches such ranks, so each watches the others. Nothing here has a name in the file system.
"""

import atexit
import os
import select
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from threading import Thread
from typing import TYPE_CHECKING

from torch.distributed import DistStoreError

from shardwright.comm.segment import LEFT, PID, Segment
from shardwright.comm.watch import AbortWord
from shardwright.errors import CommError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from shardwright.comm.shared_memory import SharedMemoryGroup


def joined_over_memory(store: "Store", rank: int, size: int, timeout_s: float) -> "SharedMemoryGroup | None":
    """The group of all ranks, or None, on every rank alike, where they cannot share memory: on several hosts, say.

    Raises:
        CommError: a rank has not come in time.
    """
    store.set(f"place/{rank}", _place())
    places = {_told(store, f"place/{other}", other, size, timeout_s) for other in range(size)}
    if len(places) > 1 or not find_spec("numba"):
        return None
    from shardwright.comm.shared_memory import SharedMemoryGroup  # imports numba

    if rank == 0:
        segment = Segment(size)
        _hand_over(segment, store, size, timeout_s)
    else:
        name = _told(store, "memory", 0, size, timeout_s)
        segment = Segment(size, _taken("\0" + name.decode(), timeout_s))
    group = SharedMemoryGroup(segment, rank, AbortWord(segment.abort))
    atexit.register(_leave, segment, rank)
    group.barrier(tag="join")  # all have mapped it, and said who they are
    os.close(segment.fd)
    Thread(target=_watch, args=(segment, rank, group.abort), name="peers", daemon=True).start()
    return group


def _place() -> str:
    """Where this rank is: ranks share memory if boot, namespaces and user are the same, and all can compile."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "pid")]
    return f"{boot} {spaces} {os.getuid()} {find_spec('numba') is not None}"


def _told(store: "Store", key: str, by: int, size: int, timeout_s: float) -> bytes:
    try:
        return bytes(store.get(key))
    except DistStoreError as error:
        raise CommError(f"rank {by} of {size} has not come within {timeout_s:g} s; see why it did not start") from error


def _hand_over(segment: Segment, store: "Store", size: int, timeout_s: float) -> None:
    name = f"shardwright-{token_hex(16)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, _in_time("the other ranks", timeout_s):
        listener.settimeout(timeout_s)
        listener.bind("\0" + name)
        listener.listen(size)
        store.set("memory", name)
        waiting = size - 1
        while waiting:
            peer, _ = listener.accept()
            with peer:
                if _user_of(peer) == os.getuid():
                    socket.send_fds(peer, [b"\0"], [segment.fd])
                    waiting -= 1


def _taken(name: str, timeout_s: float) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line, _in_time("rank 0", timeout_s):
        line.settimeout(timeout_s)
        line.connect(name)
        _, fds, _, _ = socket.recv_fds(line, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not fds:
        raise CommError("rank 0 hands its memory to processes of its own user only; start all ranks as one user")
    return fds[0]


@contextmanager
def _in_time(who: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommError(f"shared memory: no answer from {who} within {timeout_s:g} s ({error})") from error


def _user_of(peer: socket.socket) -> int:
    credentials = struct.Struct("3i")
    _, user, _ = credentials.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    return int(user)


def _leave(segment: Segment, rank: int) -> None:
    """Say that this rank ends having done its work: not so where an exception ends it."""
    segment.words(rank)[LEFT] = "last_value" not in vars(sys)


def _watch(segment: Segment, rank: int, abort: AbortWord) -> None:
    """Set the abort word when another rank ends without having left."""
    poller, ranks = select.poll(), {}
    for other in range(segment.ranks):
        if other != rank:
            try:
                fd = os.pidfd_open(int(segment.words(other)[PID]))
            except ProcessLookupError:
                _mourn(segment, other, abort)
                continue
            ranks[fd] = other
            poller.register(fd, select.POLLIN)
    while ranks:
        for fd, _ in poller.poll():
            poller.unregister(fd)
            os.close(fd)
            _mourn(segment, ranks.pop(fd), abort)


def _mourn(segment: Segment, rank: int, abort: AbortWord) -> None:
    if not segment.words(rank)[LEFT]:
        abort.set(rank)
