"""Ways for rank 1 of three to fall silent while the others wait, and a program that lets each happen.

`python -m tests.comm.deaths FOLDER` prints what the driver of the ranks saw as JSON; each rank that lives writes what
it was told, and when, into the folder. `Job` forks, so it needs a process in which torch has not computed: this one.
"""

import gc
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
from shardwright.comm.segment import SLOT
from shardwright.comm.shared_memory import SharedMemoryGroup
from shardwright.errors import ShardwrightError

RANKS = 3
LARGE = SLOT
"""Elements: several slots of any type."""

TIMEOUT = 0.7


def letters_to_rank_1(group: Group) -> None:
    group.send(torch.ones(LARGE), 1, tag="unread")


def letters_to_rank_0(group: Group) -> None:
    group.send(torch.ones(LARGE), 0, tag="unread")


OPERATIONS: dict[str, Callable[[Group], object]] = {
    "all_reduce small": lambda group: group.all_reduce(torch.ones(3)),
    "all_reduce large": lambda group: group.all_reduce(torch.ones(LARGE)),
    "all_gather": lambda group: group.all_gather(torch.ones(LARGE), 0, [LARGE] * RANKS),
    "reduce_scatter": lambda group: group.reduce_scatter(torch.ones(LARGE), 0, [0, 0, LARGE]),
    "all_to_all": lambda group: group.all_to_all(torch.ones(RANKS), [1] * RANKS, [1] * RANKS),
    "broadcast": lambda group: group.broadcast(torch.ones(LARGE), 1),
    "barrier": lambda group: group.barrier(),
    "recv": lambda group: group.recv((3,), torch.float32, 1),
    "send": letters_to_rank_1,
}


def dies(group: Group, operation: str, folder: Path) -> None:
    """Before it enters."""
    if group.rank == 1:
        time.sleep(0.1)  # until the others sleep in their waits
        (folder / "died").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    OPERATIONS[operation](group)


def dies_midway(group: Group, operation: str, folder: Path) -> None:
    """After its first round, which the others have seen."""
    handle = group.all_reduce_async(torch.ones(LARGE))
    if group.rank == 1:
        time.sleep(0.1)
        (folder / "died").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    handle.wait()


def stops(group: Group, operation: str, folder: Path) -> None:
    assert isinstance(group, SharedMemoryGroup)
    group.timeout_s = TIMEOUT
    if group.rank == 1:
        (folder / "died").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGSTOP)
    OPERATIONS[operation](group)


def leaves(group: Group, operation: str, folder: Path) -> None:
    """Returns, as if it had nothing more to do."""
    if group.rank == 1:
        (folder / "died").write_text(str(time.monotonic()))
    else:
        OPERATIONS[operation](group)


def wait_for_each_other(group: Group, operation: str, folder: Path) -> None:
    """Rank 1 calls what nobody else does, and everyone waits for ever."""
    if group.rank == 1:
        (folder / "died").write_text(str(time.monotonic()))
        MISTAKES[operation](group)
    else:
        OPERATIONS["all_reduce large"](group)


def others_in_a_split(group: Group, operation: str, folder: Path) -> None:
    """Ranks 0 and 1 meet in a group of their own, where rank 1 waits for a letter from outside it."""
    pair = group.split([0, 1] if group.rank < 2 else [2])
    if group.rank == 1:
        (folder / "died").write_text(str(time.monotonic()))
        group.recv((3,), torch.float32, 2, tag="never sent")
    pair.barrier(tag="pair")
    group.barrier(tag="all")


def with_much_under_way(group: Group, operation: str, folder: Path) -> None:
    """All have letters and a collective open beside the circle they wait in."""
    following = (group.rank + 1) % RANKS
    group.send_async(torch.ones(LARGE), following, tag="unread")
    group.all_reduce_async(torch.ones(LARGE), tag="fine")
    if group.rank == 1:
        (folder / "died").write_text(str(time.monotonic()))
    group.recv((3,), torch.float32, following, tag="never sent")


MISTAKES: dict[str, Callable[[Group], object]] = {
    "recv": lambda group: group.recv((3,), torch.float32, 0, tag="never sent"),
    "send": letters_to_rank_0,
}

BODIES = {
    "dies": dies,
    "dies midway": dies_midway,
    "stops": stops,
    "leaves": leaves,
    "circle": wait_for_each_other,
    "circle split": others_in_a_split,
    "circle busy": with_much_under_way,
}

CASES = [
    *(("dies", operation) for operation in OPERATIONS),
    ("dies midway", "all_reduce large"),
    ("stops", "all_reduce small"),
    ("stops", "recv"),
    ("leaves", "recv"),
    ("circle", "recv"),
    ("circle", "send"),
    ("circle split", "recv"),
    ("circle busy", "recv"),
]


def rank_main(group: Group, channel: Channel, case: tuple[str, str], folder: Path) -> None:
    channel.send({"pid": os.getpid()})
    group.barrier()
    try:
        BODIES[case[0]](group, case[1], folder)
    except ShardwrightError as error:
        told = {"type": type(error).__name__, "message": str(error), "at": time.monotonic()}
        (folder / str(group.rank)).write_text(json.dumps(told))
        raise


def outcome(case: tuple[str, str], folder: Path) -> dict[str, Any]:
    """What the driver saw, what the living ranks were told and how soon, and who is left."""
    folder.mkdir()
    pids: dict[int, int] = {}
    found: dict[str, Any] = {}
    try:
        with Job(RANKS, lambda group, channel: rank_main(group, channel, case, folder)) as job:
            while (message := job.receive()) is not None:
                pids[message["rank"]] = message["pid"]
    except ShardwrightError as error:
        found = {"type": type(error).__name__, "message": str(error)}
    died = float((folder / "died").read_text())
    found["seconds"] = time.monotonic() - died
    found["told"] = [json.loads((folder / rank).read_text()) for rank in "02" if (folder / rank).exists()]
    found["soon"] = max([told["at"] - died for told in found["told"]], default=0.0)
    found["left"] = [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]
    return found | {"pid": pids.get(1)}


def kept() -> list[int]:
    """Open files, and mappings of segments, of this process."""
    gc.collect()
    return [len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("memfd:shardwright")]


def main(folder: Path) -> None:
    before = kept()
    report: dict[str, Any] = {" ".join(case): outcome(case, folder / " ".join(case)) for case in CASES}
    report["kept"] = [after - more for after, more in zip(kept(), before, strict=True)]
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
