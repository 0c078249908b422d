"""Ranks for a process that must not fork: one where torch may have computed already (`LLM`, tests, notebooks).

A fresh launcher process imports torch once, forks the ranks and relays their messages. What the ranks run is named,
`module:function`, and its arguments are JSON, the first message: nothing is pickled. `python -m shardwright.comm.spawn`
is the launcher. It ends when the driver does, and its ranks with it.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType
from typing import Any, Self, cast, final

from shardwright.comm.channel import Channel, Message
from shardwright.comm.job import GRACE, Job, rebuilt
from shardwright.comm.launch import MOST_RANKS
from shardwright.comm.meeting import Backend, default_backend
from shardwright.errors import RankError, ShardwrightError, UsageError


@final
class SpawnedJob:
    """N ranks forked by a fresh launcher process; otherwise like `Job`."""

    def __init__(self, n: int, target: str, arguments: Sequence[Any] = (), backend: Backend | None = None) -> None:
        if type(n) is not int:
            raise UsageError("tp", repr(n), "it is a number of ranks", "pass tp=1")
        if n < 1:
            raise UsageError("tp", n, "tensor parallelism needs at least one rank", "pass tp=1")
        if n > MOST_RANKS:
            raise UsageError("tp", n, f"one host runs at most {MOST_RANKS} ranks", "pass fewer")
        self._channel, theirs = Channel.pair()
        fd, chosen = theirs.fileno(), backend or default_backend()
        command = [sys.executable, "-m", "shardwright.comm.spawn", str(fd), str(n), target, chosen]
        # a process group of its own: Ctrl-C reaches the driver alone, which decides what it means
        self._process = subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL, process_group=0)
        theirs.close()
        self.send({"arguments": list(arguments)})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._kill()

    def send(self, message: Message) -> None:
        """Tell every rank."""
        self._check_open()
        self._channel.send(message)

    def receive(self) -> Message | None:
        """The next message of any rank, with its `rank`; None when all have ended. Raises a rank's failure."""
        message = self._channel.receive()
        if message is None:
            self._check_open()
            code = self._process.wait()
            if code:
                raise RankError(
                    f"the ranks' launcher (pid {self._process.pid}) ended with {code}; see its output above"
                )
            return None
        if "error" in message:
            self._process.wait()
            raise rebuilt(message["error"], "the ranks' launcher")
        return message

    def close(self) -> None:
        """Hang up and wait for the ranks and their launcher to end."""
        self._channel.close()
        try:
            self._process.wait(2 * GRACE)
        except subprocess.TimeoutExpired:
            self._kill()

    def _check_open(self) -> None:
        if self._channel.fileno() < 0:
            raise RankError("the ranks were ended by close(), or by leaving their context; start new ones")

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._channel.close()


def resolve(target: str) -> Any:
    """The function named `module:function`."""
    module, _, name = target.partition(":")
    return import_module(module).__dict__[name]


def main(fd: int, n: int, target: str, backend: Backend) -> int:
    """Fork the ranks and relay, until they end or the driver hangs up."""
    import torch  # noqa: F401  once, before the fork, for all ranks

    driver = Channel.from_fd(fd)
    start = driver.receive()
    if start is None:
        return 0
    body, arguments = resolve(target), start["arguments"]
    try:
        with Job(n, lambda group, channel: body(group, channel, *arguments), backend) as job:
            job.relay(driver)
    except ShardwrightError as error:
        notes = "\n".join(getattr(error, "__notes__", ()))
        driver.send({"error": {"kind": type(error).__name__, "message": str(error), "traceback": notes}})
        return error.exit_code
    return 0


if __name__ == "__main__":
    os._exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], cast("Backend", sys.argv[4])))
