"""Run one test body on any kind of ranks. A body is a plain function of `(group, *arguments)`."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any, final

from shardwright.comm.channel import Channel
from shardwright.comm.group import Group
from shardwright.comm.meeting import Backend
from shardwright.comm.spawn import SpawnedJob, resolve
from shardwright.comm.thread import ThreadGroup
from shardwright.errors import RankError

Check = Callable[..., Any]


def on_threads(n: int, body: Check, *arguments: Any) -> list[Any]:
    """`body(group, *arguments)` on n threads of this process; what each returned, in rank order."""
    return ThreadGroup.run(n, lambda group: body(group, *arguments))


def on_processes(n: int, body: Check, *arguments: Any) -> list[Any]:
    """The same on n processes over shared memory. Arguments and results are JSON, and `body` is a module's function."""
    return _on_processes(n, body, arguments, "shared_memory")


def on_gloo(n: int, body: Check, *arguments: Any) -> list[Any]:
    """The same on n processes over gloo."""
    return _on_processes(n, body, arguments, "gloo")


def _on_processes(n: int, body: Check, arguments: tuple[Any, ...], backend: Backend) -> list[Any]:
    with closing(Processes(n, backend)) as processes:
        return processes.run(body, *arguments)


@final
class Processes:
    """N processes that run one body after another, since what a fresh set costs most is to import torch.

    The first body starts them, and the first after a failure starts them anew.
    """

    def __init__(self, n: int, backend: Backend = "shared_memory") -> None:
        self.n, self.backend = n, backend
        self._job: SpawnedJob | None = None

    def run(self, body: Check, *arguments: Any) -> list[Any]:
        """What `body(group, *arguments)` returned on each; JSON, and `body` a module's function."""
        with ExitStack() as failed:
            job = failed.enter_context(self._job or SpawnedJob(self.n, f"{__name__}:run_bodies", [], self.backend))
            self._job = None
            results: dict[int, Any] = {}
            job.send({"target": f"{body.__module__}:{body.__qualname__}", "arguments": arguments})
            while len(results) < self.n:
                message = job.receive()
                if message is None:
                    raise RankError("the ranks ended before the body was done; see their output above")
                results[message["rank"]] = message["result"]
            self._job = job
            failed.pop_all()
        return [results[rank] for rank in range(self.n)]

    def close(self) -> None:
        """Let them end."""
        if self._job is not None:
            self._job.close()
        self._job = None


def run_bodies(group: Group, channel: Channel) -> None:
    """What each of `Processes` runs."""
    while (message := channel.receive()) is not None:
        channel.send({"result": resolve(message["target"])(group, *message["arguments"])})
