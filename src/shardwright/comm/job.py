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
from contextlib import ExitStack
from types import TracebackType
from typing import Never, Self, final

import shardwright.errors
from shardwright.comm.channel import Channel, Message
from shardwright.comm.group import Group
from shardwright.comm.meeting import MEETINGS, Backend, Meeting, default_backend
from shardwright.comm.single import SingleGroup
from shardwright.comm.watch import AbortWord
from shardwright.errors import AbortedError, RankError, ShardwrightError, UsageError

GRACE = 3.0
"""Seconds the surviving ranks have to end by themselves after one has failed."""

LONGEST_MESSAGE = 500
LONGEST_TRACEBACK = 100_000
"""Characters told of what a rank raised: enough for anyone who reads it."""

Body = Callable[[Group, Channel], None]
"""What a rank does: gets its group and its line to the driver; returns when the driver hangs up."""


@final
class Job:
    """N forked ranks. Use it as a context manager: leaving it, by an exception too, leaves no process behind."""

    def __init__(self, n: int, body: Body, backend: Backend | None = None) -> None:
        if n < 1:
            raise UsageError("tp", n, "tensor parallelism needs at least one rank", "try --tp 1")
        self.abort = AbortWord()
        self._inbox: deque[Message] = deque()
        self._errors: list[Message] = []
        self._channels: dict[int, Channel] = {}
        self._processes: dict[int, int] = {}
        self._watched: dict[int, int] = {}
        self._ended: dict[int, int] = {}
        self._killed: set[int] = set()
        self._driver: Channel | None = None
        meeting = MEETINGS[backend or default_backend()](n)
        gc.freeze()  # so that the children's collector does not touch, and copy, the pages shared with this process
        sys.stdout.flush()  # or each child would print what waits there once more
        sys.stderr.flush()
        with ExitStack() as undo:
            undo.callback(self._stop, 0.0)
            for rank in range(n):
                self._fork(rank, n, body, meeting)
            undo.pop_all()
        meeting.close()
        gc.unfreeze()

    def _fork(self, rank: int, n: int, body: Body, meeting: Meeting) -> None:
        ours, theirs = Channel.pair()
        parent, pid = os.getpid(), os.fork()
        if not pid:
            try:
                _die_with(parent)
                for channel in [ours, *self._channels.values()]:
                    channel.close()
                for fd in self._watched:
                    os.close(fd)
                _rank_main(rank, n, body, theirs, self.abort, meeting)
            finally:
                os._exit(1)  # whatever happened above: a child never returns into what its parent was doing
        theirs.close()
        self._channels[rank] = ours
        self._processes[rank] = pid
        self._watched[os.pidfd_open(pid)] = rank

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._stop(0.0)

    def send(self, message: Message) -> None:
        """Tell every rank. Never blocks: what a rank cannot take yet is written while `receive` or `close` waits."""
        for channel in self._channels.values():
            channel.post(message)

    def hang_up(self) -> None:
        """Tell every rank that no message will follow, so that it ends; what it still sends can be received."""
        for channel in self._channels.values():
            channel.hang_up()

    def relay(self, driver: Channel) -> None:
        """Pass on what the driver and the ranks say, until the ranks have ended or the driver has."""
        self._driver = driver
        self._obey()  # what came together with the message before it, and so makes no further event
        while (message := self.receive()) is not None:
            driver.send(message)
            self._obey()

    def receive(self) -> Message | None:
        """The next message of any rank, with its `rank`; None when all have ended. Raises a rank's failure."""
        while not self._inbox:
            if not self._watched or (self._driver and self._driver.ended):
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
        for channel in self._channels.values():
            poller.register(channel, channel.events())
        if self._driver and not self._driver.ended:
            poller.register(self._driver, self._driver.events())
        for fd in self._watched:
            poller.register(fd, select.POLLIN)
        events = poller.poll(None if seconds is None else max(0, round(seconds * 1000)))
        for fd, _ in events:
            if fd in by_fd:
                self._take(by_fd[fd])
        for fd, _ in events:
            if fd in self._watched:
                self._bury(fd)
        self._obey()

    def _obey(self) -> None:
        """Pass on what the driver has said."""
        for message in self._driver.ready() if self._driver else ():
            self.send(message)

    def _take(self, rank: int) -> None:
        channel = self._channels[rank]
        channel.flush()
        for message in channel.ready():
            if "error" in message:
                self._errors.append({"rank": rank, **message["error"]})
            else:
                self._inbox.append({"rank": rank, **message})
        if channel.ended:
            self._channels.pop(rank).close()

    def _bury(self, fd: int) -> None:
        rank = self._watched.pop(fd)
        os.close(fd)
        if rank in self._channels:
            self._take(rank)
        if rank in self._channels:  # a process that the rank started may still hold its end
            self._channels.pop(rank).close()
        _, status = os.waitpid(self._processes[rank], 0)
        code = os.waitstatus_to_exitcode(status)
        if rank not in self._killed:
            self._ended[rank] = code

    def _judge(self) -> None:
        """Raise if a rank failed, once the others have ended or been ended."""
        if self._errors or any(self._ended.values()):
            self.abort.set(self._culprit())
            self._stop(GRACE)
            raise self._cause()

    def _culprit(self) -> int:
        """The rank that failed first, as far as can be told: an `AbortedError` is always another one's fault."""
        told = [error["rank"] for error in self._errors]
        own = [error["rank"] for error in self._errors if error["kind"] != AbortedError.__name__]
        silent = [rank for rank, code in self._ended.items() if code and rank not in told]
        deserters = [rank for rank, code in self._ended.items() if not code]
        rank: int = [*own, *silent, *deserters, *told][0]
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
        who = f"rank {rank} (pid {self._processes[rank]})"
        for error in self._errors:
            if error["rank"] == rank:
                return rebuilt(error, who)
        if self._ended[rank]:
            return RankError(f"{who} {_death(self._ended[rank])}; {_REMEDY}")
        return RankError(f"{who} returned while others waited: {self._errors[0]['message']}")


_REMEDY = "the other ranks were stopped; if memory ran out, use more ranks or a smaller model"


def _death(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def rebuilt(error: Message, who: str) -> ShardwrightError:
    """The error that a rank reported, as this process raises it. One of the package's own comes back as it was."""
    kind = shardwright.errors.__dict__.get(error["kind"])
    if kind is None:
        relayed: ShardwrightError = RankError(f"{who}: {error['message']}")
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
            own = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == shardwright.errors.__name__]
            report = {
                "kind": own[0] if own else None,
                "message": str(error) if own else _one_line(error),
                "traceback": "".join(traceback.format_exception(error))[-LONGEST_TRACEBACK:],
            }
            self._channel.send({"error": report})
        return True


def _one_line(error: BaseException) -> str:
    """Type and message of an exception whose message may be anything, or fail to be made."""
    return " ".join("".join(traceback.format_exception_only(error)).split())[:LONGEST_MESSAGE]


def _rank_main(rank: int, n: int, body: Body, channel: Channel, abort: AbortWord, meeting: Meeting) -> Never:
    """All of a rank's life."""
    with _Report(channel) as report:
        import torch

        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all in the foreground; the driver decides
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        group = SingleGroup() if n == 1 else meeting.join(rank, abort)
        body(group, channel)
        group.end_step()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(report.failed))


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the one that forked it ends, however it ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)
