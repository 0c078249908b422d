"""`Job`: the ranks of one host as processes forked from this one, watched until the last has gone.

Decides what happens when a rank raises or dies: the abort word is set, the others are given a moment and then killed,
and the one root cause is raised here. What the ranks do, and what they and their driver tell each other, is not known
here. Only a process in which torch has not computed yet may fork; see `comm.spawn` for every other.
"""

import ctypes
import gc
import os
import select
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, final

import shardwright.errors
from shardwright.comm.channel import Channel, Message
from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.comm.watch import AbortWord
from shardwright.errors import AbortedError, RankError, ShardwrightError, UsageError

GRACE = 3.0
"""Seconds the surviving ranks have to end by themselves after one has failed."""

Body = Callable[[Group, Channel], None]
"""What a rank does: gets its group and its line to the driver; returns when the driver hangs up."""


@final
class Job:
    """N forked ranks. Use it as a context manager: leaving it, by an exception too, leaves no process behind."""

    def __init__(self, n: int, body: Body) -> None:
        if n < 1:
            raise UsageError("tp", n, "tensor parallelism needs at least one rank", "try --tp 1")
        self.abort = AbortWord()
        self._inbox: deque[Message] = deque()
        self._errors: list[Message] = []
        self._channels: dict[int, Channel] = {}
        self._processes: dict[int, int] = {}
        self._watched: dict[int, int] = {}
        self._died: dict[int, int] = {}
        self._killed: set[int] = set()
        store = os.memfd_create("shardwright-store")
        gc.freeze()  # so that the children's collector does not touch, and copy, the pages shared with this process
        for rank in range(n):
            ours, theirs = Channel.pair()
            pid = os.fork()
            if not pid:
                for channel in [ours, *self._channels.values()]:
                    channel.close()
                _rank_main(rank, n, body, theirs, self.abort, store)
            theirs.close()
            self._channels[rank] = ours
            self._processes[rank] = pid
            self._watched[os.pidfd_open(pid)] = rank
        os.close(store)
        gc.unfreeze()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._stop(0.0)

    def send(self, message: Message) -> None:
        """Tell every rank."""
        for channel in list(self._channels.values()):
            channel.send(message)

    def hang_up(self) -> None:
        """Tell every rank that no message will follow, so that it ends; what it still sends can be received."""
        for channel in list(self._channels.values()):
            channel.hang_up()

    def receive(self) -> Message | None:
        """The next message of any rank, with its `rank`; None when all have ended. Raises a rank's failure."""
        while not self._inbox:
            if not self._watched:
                return None
            self._listen(None)
            self._judge()
        return self._inbox.popleft()

    def close(self) -> None:
        """Hang up, wait for the ranks to end by themselves, and raise the failure of one that did not."""
        self.hang_up()
        self._stop(GRACE)
        self._judge()

    # ---- what has happened

    def _listen(self, seconds: float | None) -> None:
        """Take in messages and deaths, waiting up to that long for the first."""
        by_fd = {channel.fileno(): rank for rank, channel in self._channels.items()}
        poller = select.poll()
        for fd in [*by_fd, *self._watched]:
            poller.register(fd, select.POLLIN)
        events = poller.poll(None if seconds is None else max(0, round(seconds * 1000)))
        for fd, _ in events:
            if fd in by_fd:
                self._take(by_fd[fd])
        for fd, _ in events:
            if fd in self._watched:
                self._bury(fd)

    def _take(self, rank: int) -> None:
        for message in self._channels[rank].ready():
            if "error" in message:
                self._errors.append({"rank": rank, **message["error"]})
            else:
                self._inbox.append({"rank": rank, **message})

    def _bury(self, fd: int) -> None:
        rank = self._watched.pop(fd)
        os.close(fd)
        if rank in self._channels:
            self._take(rank)
            self._channels.pop(rank).close()
        _, status = os.waitpid(self._processes[rank], 0)
        code = os.waitstatus_to_exitcode(status)
        if code and rank not in self._killed:
            self._died[rank] = code

    def _judge(self) -> None:
        """Raise if a rank failed, once the others have ended or been ended."""
        if not self._errors and not self._died:
            return
        self.abort.set(self._culprit())
        self._stop(GRACE)
        raise self._cause()

    def _culprit(self) -> int:
        """The rank that failed first, as far as can be told: an `AbortedError` is always another one's fault."""
        own = [error["rank"] for error in self._errors if error["kind"] != AbortedError.__name__]
        silent = self._died.keys() - {error["rank"] for error in self._errors}
        rank: int = next(iter([*own, *silent, *(error["rank"] for error in self._errors)]))
        return rank

    def _stop(self, grace: float) -> None:
        """End every rank: by itself within `grace` seconds, else by force."""
        deadline = time.monotonic() + grace
        while self._watched and time.monotonic() < deadline:
            self._listen(deadline - time.monotonic())
        self._killed.update(self._watched.values())
        for rank in self._watched.values():
            os.kill(self._processes[rank], signal.SIGKILL)
        while self._watched:
            self._listen(None)
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def _cause(self) -> ShardwrightError:
        """The one root cause, as the culprit told it; or how it ended, where it could not."""
        rank = self._culprit()
        for error in self._errors:
            if error["rank"] == rank:
                return rebuilt(error, self._processes[rank])
        return RankError(f"rank {rank} (pid {self._processes[rank]}) {_death(self._died[rank])}; {_REMEDY}")


_REMEDY = "the other ranks were stopped; if memory ran out, use more ranks or a smaller model"


def _death(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def rebuilt(error: Message, pid: int) -> ShardwrightError:
    """The error that a rank reported, as this process raises it. A rank's own typed error comes back as it was."""
    kind = shardwright.errors.__dict__.get(error["kind"])
    if kind is None:
        relayed: ShardwrightError = RankError(f"rank {error['rank']} (pid {pid}): {error['message']}")
    else:
        relayed = kind.__new__(kind)
        Exception.__init__(relayed, error["message"])
    relayed.add_note(error["traceback"])
    return relayed


# ---- in the child


@final
class _Report:
    """Tells the driver what a rank raised; nothing raised inside goes further."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        if error is not None:
            self.failed = True
            typed = isinstance(error, ShardwrightError)
            message = str(error) if typed else f"{type(error).__name__}: {error}"
            trace = "".join(traceback.format_exception(error))
            self._channel.send({"error": {"kind": type(error).__name__, "message": message, "traceback": trace}})
        return True


def _rank_main(rank: int, n: int, body: Body, channel: Channel, abort: AbortWord, store: int) -> None:
    """All of a rank's life; never returns."""
    import torch

    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole foreground; the driver decides what it means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with_parent()
    with _Report(channel) as report:
        group = _joined(rank, n, abort, store)
        body(group, channel)
        group.end_step()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(report.failed))


def _joined(rank: int, n: int, abort: AbortWord, store: int) -> Group:
    if n == 1:
        return SingleGroup()
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    from shardwright.comm.torch_group import TorchGroup

    # a file store that is no file: the ranks open the inherited memory by its name in /proc, and nothing listens
    return TorchGroup(FileStore(f"/proc/self/fd/{store}", n), tuple(range(n)), rank, abort)


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that forked it ends, however it ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
