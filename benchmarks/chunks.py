"""Does a matmul with its all-reduce end sooner when it is cut into pieces, each summed while the next one multiplies?

python benchmarks/chunks.py [--case SUBSTRING] [--peer whole|matmul] [--repeat N] [--json]

Two ranks of one thread each, float32. ours: as many pieces as the case says, or the cost rule's own number · whole: one
matmul, then its all-reduce · matmul: the product alone.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import Case, Options, main

from shardwright.comm.channel import Channel
from shardwright.comm.group import Group
from shardwright.comm.spawn import SpawnedJob

SHAPES = [(m, k, 8192) for k in (1024, 2732) for m in (1, 8, 64, 256, 512, 1024, 2048)]
PIECES = [0, 2, 4, 8, 16]
BACKENDS = ["gloo", "shared_memory"]


def serve(group: Group, channel: Channel) -> None:
    """A rank: for each shape it is told, every side in turn, each turn begun together."""
    import torch

    from shardwright.kernels import chunked, fused_reference
    from shardwright.kernels.operands import Antiquant, Dequant, Given, check

    while (message := channel.receive()) is not None:
        m, k, n = message["shape"]
        x1, x2 = torch.randn(m, k), torch.randn(n, k).T
        given = Given(x1, x2, None, None, Antiquant(), Dequant(), "sum", 0, "x")
        sides: dict[str, Callable[[], object]] = {"matmul": partial(torch.matmul, x1, x2)}
        sides["whole"] = partial(fused_reference.matmul_all_reduce, check(given), group)
        for pieces in message["pieces"]:
            sides[str(pieces)] = partial(chunked.matmul_all_reduce, check(replace(given, comm_turn=pieces)), group)
        seconds = {side: [] for side in sides}
        for turn in range(message["times"] + 1):
            for side, run in sides.items():
                group.barrier()
                start = time.perf_counter()
                run()
                took = time.perf_counter() - start
                if turn:  # the first of all is to warm up
                    seconds[side].append(took)
        channel.send({"seconds": {side: statistics.median(each) for side, each in seconds.items()}})


def cases(options: Options) -> Iterator[Case]:
    """Ranks stay alive over all shapes; of each side, the slower rank's median."""
    target = f"benchmarks.{Path(__file__).stem}:serve"
    for backend in BACKENDS:
        names = {shape: f"{backend} {'x'.join(map(str, shape))}" for shape in SHAPES}
        wanted = {shape: name for shape, name in names.items() if options.wants(name)}
        if not wanted:
            continue
        with SpawnedJob(2, target, backend=backend) as job:
            for shape, name in wanted.items():
                times = max(options.repeat, min(60, int(5e9 / (shape[0] * shape[1] * shape[2]))))
                job.send({"shape": shape, "pieces": PIECES, "times": times})
                found = [job.receive()["seconds"] for _ in range(2)]
                slower = {side: 1e3 * max(each[side] for each in found) for side in found[0]}
                for pieces in PIECES:
                    values = {"ours": slower[str(pieces)], "whole": slower["whole"], "matmul": slower["matmul"]}
                    sides = {side: ms for side, ms in values.items() if side == "ours" or options.wants_peer(side)}
                    cut = f"{pieces} pieces" if pieces else "rule"
                    yield Case(f"{name}, {cut}", "ms", sides).compare(smaller_is_better=True)


if __name__ == "__main__":
    main("chunks", __doc__.splitlines()[0], cases)
