"""What a rank of this machine can do: how fast it reads memory, multiplies, and sums with the others.

Decides what is measured and how long. Every rank measures at the same moment, so that memory and cores are shared as
they are in use. Knows no model; what a plan makes of the figures is `plan.measured`'s business.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from shardwright.comm.channel import Channel
from shardwright.comm.group import Group

SECONDS = 0.5
"""For each figure of each number of ranks: long enough that a core's turbo and a neighbour's burst even out."""

READ = 512 << 20
"""Bytes of the matrix that all ranks together read: beyond the caches that they share."""

PIECE = 3 << 20
"""Bytes read between two all-reduces that are measured between work: about what a layer's half of a small model is."""

SIDE = 512
"""Side of the square product."""

SMALL, LARGE = 576, 1 << 20
"""Floats of the two all-reduces: a token's activations, and a prompt's."""


@dataclass(frozen=True, kw_only=True)
class RankFigures:
    """One rank's: bytes and operations a second in float32, seconds of a small and a large all-reduce.

    paced_s: what a small all-reduce adds to the reading before it. Where ranks outnumber cores that is far more than it
    takes by itself, since a rank that sleeps keeps the others waiting.
    """

    rank: int
    bandwidth: float
    gemm: float
    small_s: float
    paced_s: float
    large_s: float


PACED = 60
"""Pieces read, at most."""


def measure_rank(group: Group, channel: Channel) -> None:
    """The life of a measuring rank: one message with its figures."""
    with torch.inference_mode():
        channel.send({"figures": asdict(figures(group))})


def figures(group: Group, seconds: float = SECONDS) -> RankFigures:
    """This rank's figures while all others take theirs. Every rank calls it."""
    torch.set_num_threads(1)
    rows = READ // group.size // 4 // 1024
    matrix, vector = torch.ones(rows, 1024), torch.ones(1024)
    square = torch.ones(SIDE, SIDE)
    read = _each(group, lambda: torch.mv(matrix, vector), seconds)
    multiplied = _each(group, lambda: torch.mm(square, square), seconds)
    small, large = torch.ones(SMALL), torch.ones(LARGE)
    alone = _reduced(group, small, 400)
    return RankFigures(
        rank=group.rank,
        bandwidth=rows * 1024 * 4 / read,
        gemm=2 * SIDE**3 / multiplied,
        small_s=alone,
        paced_s=max(alone, _paced(group, matrix, vector, small) - PIECE * read / (rows * 4096)),
        large_s=_reduced(group, large, 20),
    )


def _each(group: Group, work: Callable[[], object], seconds: float) -> float:
    """Mean seconds of one call, over about `seconds`, begun together."""
    work()
    group.barrier()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        work()
        calls += 1
    return (time.perf_counter() - started) / calls


def _reduced(group: Group, x: torch.Tensor, calls: int) -> float:
    for _ in range(3):
        group.all_reduce(x)
    group.barrier()
    started = time.perf_counter()
    for _ in range(calls):
        group.all_reduce(x)
    return (time.perf_counter() - started) / calls


def _paced(group: Group, matrix: torch.Tensor, vector: torch.Tensor, small: torch.Tensor) -> float:
    """Seconds of reading a piece and summing, piece after piece through the matrix."""
    pieces = torch.split(matrix, PIECE // 4096)[:PACED]
    group.barrier()
    started = time.perf_counter()
    for piece in pieces:
        torch.mv(piece, vector)
        group.all_reduce(small)
    return (time.perf_counter() - started) / len(pieces)
