"""Every way to cut a job over a number of devices: the candidates that a search scores.

Decides what is tried. Knows no times and no memory.
"""

from collections.abc import Iterator

import numpy as np

from shardwright.errors import UsageError
from shardwright.plan.training import Split

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
NODES_OF_TP = 2
"""Tensor parallelism is tried over at most so many nodes: beyond, two all-reduces a layer cross the network."""

MOST_CHUNKS = 12
"""Virtual pipeline stages tried of one rank."""


def divisors(n: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def none_at_all(devices: int, per_node: int, layers: int, replicas: int) -> UsageError:
    """What to say where no candidate uses all devices. replicas: the most there may be."""
    most = f"tensor parallelism {NODES_OF_TP * per_node}, pipelines {layers}, replicas {replicas:,} ranks at most"
    return UsageError(
        "cluster", f"<{devices:,} devices>", f"no split uses them all: {most}", "use another number of them"
    )


def training_splits(devices: int, per_node: int, layers: int, global_batch: int) -> Split:
    """Tp x pp x dp over all devices, with every vpp, micro-batch, sp, recomputation and ZeRO that goes with them.

    A stage holds a layer at least, a data-parallel rank a sequence. Interleaving needs equal chunks; ZeRO 2 and 3
    gather and scatter in every micro-batch, and go with no pipeline.
    """
    table = np.array(list(_rows(devices, per_node, layers, global_batch)), dtype=float).reshape(-1, 8)
    tp, pp, vpp, dp, sp, micro_batch, recompute, zero = table.T
    return Split(
        tp=tp,
        pp=pp,
        vpp=vpp,
        dp=dp,
        cp=np.ones_like(tp),
        sp=sp,
        micro_batch=micro_batch,
        recompute=recompute,
        zero=zero,
    )


def _rows(devices: int, per_node: int, layers: int, global_batch: int) -> Iterator[tuple[int, ...]]:
    for tp in divisors(devices):
        if tp > NODES_OF_TP * per_node:
            break
        for pp in divisors(devices // tp):
            dp = devices // tp // pp
            if pp > layers or dp > global_batch:
                continue
            sequences = -(-global_batch // dp)
            for micro_batch in (b for b in MICRO_BATCHES if b <= sequences):
                for vpp in _chunks(layers, pp, -(-sequences // micro_batch)):
                    yield from _variants(tp, pp, vpp, dp, micro_batch)


def _chunks(layers: int, pp: int, rounds: int) -> list[int]:
    if pp == 1 or layers % pp or rounds % pp:
        return [1]
    return [v for v in divisors(layers // pp) if v <= MOST_CHUNKS]


def _variants(tp: int, pp: int, vpp: int, dp: int, micro_batch: int) -> Iterator[tuple[int, ...]]:
    zeros = (0,) if dp == 1 else (0, 1) if pp > 1 else (0, 1, 2, 3)
    for sp in (0, 1) if tp > 1 else (0,):
        for recompute in range(3):
            for zero in zeros:
                yield tp, pp, vpp, dp, sp, micro_batch, recompute, zero


def serving_splits(devices: int, per_node: int, layers: int, batches: tuple[int, ...]) -> np.ndarray:
    """Columns tp, pp, replicas, batch: requests under way at each replica."""
    rows = [
        (tp, pp, devices // tp // pp, batch)
        for tp in divisors(devices)
        if tp <= NODES_OF_TP * per_node
        for pp in divisors(devices // tp)
        if pp <= layers
        for batch in batches
    ]
    return np.array(rows, dtype=float).T
