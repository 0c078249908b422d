"""How long does an all-reduce of two ranks take, through `Group.all_reduce` from Python, against gloo?

python benchmarks/all_reduce.py [--case SUBSTRING] [--peer gloo] [--repeat N] [--json]
"""

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import Case, Options, main

from shardwright.comm.channel import Channel
from shardwright.comm.group import Group
from shardwright.comm.spawn import SpawnedJob

SIZES = [2048, 8192, 32768, 65536, 262144, 1048576, 4194304, 16777216]


def serve(group: Group, channel: Channel) -> None:
    """A rank: for each size it is told, the median time of many all-reduces."""
    import torch

    while (message := channel.receive()) is not None:
        x = torch.ones(message["bytes"] // 4)
        for _ in range(message["times"]):  # ranks that slept wake up, each on a core of its own
            group.all_reduce(x, tag="warm")
        seconds = []
        for _ in range(message["times"]):
            group.barrier()
            start = time.perf_counter()
            group.all_reduce(x, tag="x")
            seconds.append(time.perf_counter() - start)
        channel.send({"seconds": statistics.median(seconds), "least": min(seconds)})


def measured(job: SpawnedJob, size: int) -> float:
    """The slower rank's median, in seconds."""
    job.send({"bytes": size, "times": max(20, min(1000, 40_000_000 // size))})
    return max(job.receive()["seconds"] for _ in range(2))


def cases(options: Options) -> Iterator[Case]:
    """Both sides stay alive and are measured in turn."""
    target = f"benchmarks.{Path(__file__).stem}:serve"
    with SpawnedJob(2, target) as ours, SpawnedJob(2, target, backend="gloo") as gloo:
        for size in SIZES:
            name = f"{size} bytes"
            if not options.wants(name):
                continue
            sides = {"ours": ours, "gloo": gloo} if options.wants_peer("gloo") else {"ours": ours}
            runs = {side: [] for side in sides}
            for _ in range(options.repeat):
                for side, job in sides.items():
                    runs[side].append(measured(job, size))
            values = {side: 1e6 * statistics.median(seconds) for side, seconds in runs.items()}
            yield Case(name, "us", values).compare(smaller_is_better=True)


if __name__ == "__main__":
    main("all_reduce", __doc__.splitlines()[0], cases)
