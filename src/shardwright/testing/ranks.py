"""Run one test body on any kind of ranks. A body is a plain function of `(group, *arguments)`."""

from collections.abc import Callable
from typing import Any

from shardwright.comm.channel import Channel
from shardwright.comm.group import Group
from shardwright.comm.meeting import Backend
from shardwright.comm.spawn import SpawnedJob, resolve
from shardwright.comm.thread import ThreadGroup

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
    results: dict[int, Any] = {}
    target = f"{body.__module__}:{body.__qualname__}"
    with SpawnedJob(n, f"{__name__}:run_body", [target, list(arguments)], backend) as job:
        while (message := job.receive()) is not None:
            results[message["rank"]] = message["result"]
    return [results[rank] for rank in range(n)]


def run_body(group: Group, channel: Channel, target: str, arguments: list[Any]) -> None:
    """What each process runs for `on_processes`."""
    channel.send({"result": resolve(target)(group, *arguments)})
