"""Ways for a rank to fail, and a program that lets a `Job` of three ranks suffer each.

`python -m tests.comm.faults BACKEND` prints what its driver saw as JSON.
`Job` forks, so it needs a process in which torch has not computed: this one.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shardwright.comm.channel import Channel
from shardwright.comm.group import Group
from shardwright.comm.job import Job
from shardwright.comm.meeting import Backend
from shardwright.errors import FileError, ShardwrightError, UsageError

RANKS = 3
LONG = 1_000_000
"""Characters: five times what a socket holds."""


class OddError(Exception):
    """Cannot be made from its message, and cannot even say it."""

    def __init__(self, *, first: int, second: int) -> None:
        super().__init__(first, second)

    def __str__(self) -> str:
        raise RuntimeError("no words")


class OwnFileError(FileError):
    """A typed error of a package above: comes back as the kind it is of."""


Namesake = type("UsageError", (Exception,), {})
"""Not one of ours, whatever it is called."""


def throw(error: BaseException) -> None:
    raise error


def die(number: int) -> None:
    os.kill(os.getpid(), number)


FAULTS: dict[str, Callable[[], object]] = {
    "value": lambda: throw(ValueError("first line\n  second line\n\nlast")),
    "long": lambda: throw(RuntimeError("word " * 100_000)),
    "empty": lambda: throw(ValueError()),
    "key": lambda: throw(KeyError("k_proj")),
    "odd": lambda: throw(OddError(first=1, second=2)),
    "surrogate": lambda: throw(ValueError("/models/\udcff.gguf is 日本語")),
    "system exit": lambda: sys.exit(5),
    "usage": lambda: throw(UsageError("tp", 7, "the model has 3 KV heads", "try 3")),
    "file": lambda: throw(FileError("model.gguf", "ends at byte 12", "download it again")),
    "own file": lambda: throw(OwnFileError("x.json", "is empty", "write it")),
    "namesake": lambda: throw(Namesake("not ours")),
    "killed": lambda: die(signal.SIGKILL),
    "segmentation fault": lambda: die(signal.SIGSEGV),
    "terminated": lambda: die(signal.SIGTERM),
    "exit": lambda: os._exit(3),
}
"""What rank 1 does while the others wait in an all-reduce."""


def fails(group: Group, channel: Channel, fault: str) -> None:
    channel.send({"pid": os.getpid()})
    group.barrier()
    if group.rank == 1:
        FAULTS[fault]()
    group.all_reduce(torch.ones(3), tag="logits")


def returns_early(group: Group, channel: Channel, fault: str) -> None:
    channel.send({"pid": os.getpid()})
    if group.rank != 1:
        group.all_reduce(torch.ones(3), tag="logits")


def all_raise(group: Group, channel: Channel, fault: str) -> None:
    channel.send({"pid": os.getpid()})
    group.barrier()
    raise ValueError("the same everywhere")


def forgets(group: Group, channel: Channel, fault: str) -> None:
    channel.send({"pid": os.getpid()})
    handle = group.all_reduce_async(torch.ones(3), tag="forgotten")
    if group.rank != 1:
        handle.wait()
    time.sleep(0.1)


def one_is_stuck(group: Group, channel: Channel, fault: str) -> None:
    """Rank 2 computes for ever and looks at nothing; it must be killed once rank 1 has failed."""
    channel.send({"pid": os.getpid()})
    group.barrier()
    while group.rank == 2:
        pass
    time.sleep(0.2)  # until rank 2 has left the barrier
    raise ValueError("not stuck")


def one_is_stopped(group: Group, channel: Channel, fault: str) -> None:
    channel.send({"pid": os.getpid()})
    group.barrier()
    if group.rank == 2:
        die(signal.SIGSTOP)
    time.sleep(0.2)
    raise ValueError("not stopped")


def dies_in_a_letter(group: Group, channel: Channel, fault: str) -> None:
    """Rank 1 dies; one peer waits for a letter from it, the other goes on sending to it."""
    channel.send({"pid": os.getpid()})
    group.barrier()
    if group.rank == 1:
        die(signal.SIGKILL)
    if group.rank == 2:
        group.recv((1,), torch.float32, 1, tag="never sent")
    while True:
        group.send(torch.ones(100_000), 1, tag="never read")


def dies_in_a_split(group: Group, channel: Channel, fault: str) -> None:
    channel.send({"pid": os.getpid()})
    group.barrier()
    if group.rank == 1:
        die(signal.SIGKILL)
    group.split([0, 1, 2]).barrier()


BODIES: dict[str, Callable[[Group, Channel, str], None]] = {
    "returned": returns_early,
    "all": all_raise,
    "forgotten": forgets,
    "stuck": one_is_stuck,
    "stopped": one_is_stopped,
    "letter": dies_in_a_letter,
    "split": dies_in_a_split,
}


def outcome(fault: str, backend: Backend) -> dict[str, Any]:
    """What the driver of three ranks sees."""
    body = BODIES.get(fault, fails)
    pids: dict[int, int] = {}
    failed = time.monotonic()
    found: dict[str, Any] = {"type": None}
    try:
        with Job(RANKS, lambda group, channel: body(group, channel, fault), backend) as job:
            while (message := job.receive()) is not None:
                pids[message["rank"]] = message["pid"]
                failed = time.monotonic()
    except ShardwrightError as error:
        notes = getattr(error, "__notes__", [])
        found = {"type": type(error).__name__, "message": str(error), "code": error.exit_code, "notes": notes}
    seconds = time.monotonic() - failed
    left = [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]
    return found | {"pids": [pids.get(rank) for rank in range(RANKS)], "seconds": seconds, "left": left}


# ---- without faults


def echoes(group: Group, channel: Channel) -> None:
    """Sends much before it reads anything, then answers each message at length."""
    channel.send({"text": "a" * LONG})
    while (message := channel.receive()) is not None:
        group.barrier()
        channel.send({"got": len(message["text"]), "text": "b" * LONG})


def both_ways(backend: Backend) -> dict[str, Any]:
    """The driver sends four long messages before it receives any."""
    received: list[list[int]] = []
    with Job(RANKS, echoes, backend) as job:
        for i in range(4):
            job.send({"text": "c" * (LONG + i)})
        job.hang_up()
        while (message := job.receive()) is not None:
            received.append([message["rank"], message.get("got", 0), len(message["text"])])
    return {"received": sorted(received)}


def tells_and_ends(group: Group, channel: Channel) -> None:
    """The last words fit in the socket; the rank is gone before anyone reads them."""
    for i in range(3):
        channel.send({"i": i, "text": "d" * 40_000})


def last_words(backend: Backend) -> dict[str, Any]:
    received: list[list[int]] = []
    with Job(RANKS, tells_and_ends, backend) as job:
        time.sleep(1.0)
        while (message := job.receive()) is not None:
            received.append([message["rank"], message["i"], len(message["text"])])
    return {"received": sorted(received)}


def listens(group: Group, channel: Channel) -> None:
    channel.send({"pid": os.getpid()})
    while channel.receive() is not None:
        pass


def interrupted(backend: Backend) -> dict[str, Any]:
    """An exception of the driver's own goes through, and no rank is left."""
    pids: list[int] = []
    try:
        with Job(RANKS, listens, backend) as job:
            pids += [(job.receive() or {})["pid"] for _ in range(RANKS)]
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return {"pids": len(pids), "left": [pid for pid in pids if Path(f"/proc/{pid}").exists()]}


def no_ranks() -> dict[str, Any]:
    try:
        Job(0, listens)
    except UsageError as error:
        return {"message": str(error)}
    return {}


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def main(backend: Backend) -> None:
    sys.stdout.write("told once\n")  # waits in a buffer while ranks are forked
    report: dict[str, Any] = {"no ranks": no_ranks()}
    before = open_files()
    for test in (both_ways, last_words, interrupted):
        report[test.__name__] = test(backend)
    for fault in [*FAULTS, *BODIES]:
        report[fault] = outcome(fault, backend)
    report["files"] = open_files() - before
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main("gloo" if sys.argv[1] == "gloo" else "shared_memory")
