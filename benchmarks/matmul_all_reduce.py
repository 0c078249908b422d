"""How long does `matmul_all_reduce` of two ranks take, against the bare matmul, and against matmul then gloo?

python benchmarks/matmul_all_reduce.py [--case SUBSTRING] [--peer gloo|limit|fp32] [--repeat N] [--json]

The shapes are GPT3-65B's as the operator's documentation has them: x1 of S or B rows, K columns, x2 `[K, 8192]`.
`limit`: the matmul alone, of the slower rank, in turn with the operator in the same processes. `fp32`, of the cases
with an int8 weight: the operator over a float32 weight of the same shape.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import Case, Options, main

from shardwright.comm.channel import Channel
from shardwright.comm.group import Group
from shardwright.comm.spawn import SpawnedJob

COLUMNS = 8192
ROWS = {"S": (1, 8, 64, 256, 1024, 4096, 8192), "B": (1, 8, 24)}
INNER = (1024, 2732)
CASES = {
    f"{letter}={rows} K={inner} {kind}": (rows, inner, kind)
    for kind in ("fp32", "int8 weight")
    for letter, numbers in ROWS.items()
    for rows in numbers
    for inner in INNER
}


def sides(group: Group, rows: int, inner: int, kind: str) -> dict[str, Callable[[], object]]:
    """What a rank measures."""
    import torch

    from shardwright import matmul_all_reduce

    x, weight = torch.randn(rows, inner), torch.randn(inner, COLUMNS)
    found: dict[str, Callable[[], object]] = {
        "ours": lambda: matmul_all_reduce(x, weight, group, tag="x"),
        "limit": lambda: x @ weight,
    }
    if kind == "int8 weight":
        small, scale = torch.randint(-127, 128, (inner, COLUMNS), dtype=torch.int8), torch.rand(COLUMNS)
        whole = weight.clone()  # so that no side finds what another one has just brought into the cache
        found["fp32"] = lambda: matmul_all_reduce(x, whole, group, tag="x")
        found["ours"] = lambda: matmul_all_reduce(x, small, group, antiquant_scale=scale, tag="x")
    return found


def serve(group: Group, channel: Channel) -> None:
    """A rank: for each case that it is told, the median time of each side, measured in turn."""
    import torch

    torch.set_grad_enabled(False)
    while (message := channel.receive()) is not None:
        measured = sides(group, *CASES[message["case"]])
        seconds: dict[str, list[float]] = {side: [] for side in measured}
        for turn in range(message["times"] + 1):
            for side, run in measured.items():
                group.barrier()
                start = time.perf_counter()
                run()
                if turn:  # the first one warms up
                    seconds[side].append(time.perf_counter() - start)
        channel.send({side: statistics.median(taken) for side, taken in seconds.items()})


def slower(job: SpawnedJob, case: str) -> dict[str, float]:
    """The slower rank's medians, in seconds."""
    rows, inner, _ = CASES[case]
    job.send({"case": case, "times": max(3, min(100, 2_000_000 // (rows * inner)))})
    ranks = [job.receive() for _ in range(2)]
    return {side: max(rank[side] for rank in ranks) for side in ranks[0] if side != "rank"}


def cases(options: Options) -> Iterator[Case]:
    """Both jobs stay alive and are measured in turn."""
    target = f"benchmarks.{Path(__file__).stem}:serve"
    with SpawnedJob(2, target) as ours, SpawnedJob(2, target, backend="gloo") as gloo:
        for name in filter(options.wants, CASES):
            runs: dict[str, list[float]] = {}
            for _ in range(options.repeat):
                found = slower(ours, name)
                if options.wants_peer("gloo"):
                    found["gloo"] = slower(gloo, name)["ours"]
                for side, seconds in found.items():
                    if side == "ours" or options.wants_peer(side):
                        runs.setdefault(side, []).append(seconds)
            values = {side: 1e3 * statistics.median(seconds) for side, seconds in runs.items()}
            yield Case(name, "ms", values).compare(smaller_is_better=True)


if __name__ == "__main__":
    main("matmul_all_reduce", __doc__.splitlines()[0], cases)
