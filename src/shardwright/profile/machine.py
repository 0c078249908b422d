"""What a rank of this machine can do: how fast it reads memory, multiplies, and sums with the others.

Decides what is measured and how long. Every rank measures at the same moment, so that memory and cores are shared as
they are in use. Knows no model; what a plan makes of the figures is `plan.measured`'s business.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median

import torch

from shardwright.comm.channel import Channel
from shardwright.comm.group import Group
from shardwright.layout.partition import Partition

LONG, LEAST = 9.0, 3
"""Seconds of all rounds together, and how many there are at least. A figure is the median of its rounds, which come in
turn over these seconds: a neighbour's burst is left out, a core that stays busy is not.
"""

WINDOW = 0.1
"""Seconds that a rate is taken over."""

READ = 512 << 20
"""Bytes of the matrix that all ranks together read: beyond the caches that they share."""

PIECE = 3 << 20
"""Bytes read between two all-reduces that are measured between work: about what a layer's half of a small model is."""

PACED = 150
"""Pieces of a window."""

SIDE = 512
"""Side of the square product."""

SMALL, LARGE, DEALT = 576, 1 << 20, 1 << 24
"""Floats of the two all-reduces, a token's activations and a prompt's, and of what is scattered and gathered again."""


@dataclass(frozen=True, kw_only=True)
class RankFigures:
    """One rank's: bytes a second, operations a second in float32 and (narrow_gemm) bfloat16, seconds of a small and a
    large all-reduce, and (dealt_s) of a reduce-scatter and the all-gather of what it gives.

    piece_s: of reading a piece, the others reading theirs · paced_s: of reading one and then summing. Where ranks
    outnumber cores the rates are those of whoever had a core; only what has a sum in it is the same for all.
    """

    rank: int
    bandwidth: float
    gemm: float
    narrow_gemm: float
    small_s: float
    piece_s: float
    paced_s: float
    large_s: float
    dealt_s: float


def measure_rank(group: Group, channel: Channel, counts: Sequence[int]) -> None:
    """The life of a measuring rank: one message for each of the counts that it is among, with its figures."""
    with torch.inference_mode():
        for ranks, found in figures(group, counts).items():
            channel.send({"ranks": ranks, "figures": asdict(found)})


def figures(group: Group, counts: Sequence[int], long: float = LONG, window: float = WINDOW) -> dict[int, RankFigures]:
    """This rank's figures while so many of the first ranks take theirs, the others asleep, for each of the counts that
    it is among. Every rank calls it with the same arguments.
    """
    torch.set_num_threads(1)
    parts = {n: group.split(range(n) if group.rank < n else [group.rank]) for n in counts}
    measured = {n: _Measuring(part, window) for n, part in parts.items() if group.rank < n}
    rounds: dict[int, list[dict[str, float]]] = {n: [] for n in measured}
    started, again = time.perf_counter(), torch.ones(1)
    while again.item():
        for n in counts:
            group.barrier()
            if n in measured:
                rounds[n].append(measured[n].figures())
        done = time.perf_counter() - started > long and len(next(iter(rounds.values()))) >= LEAST
        again = group.broadcast(torch.tensor([0.0 if done else 1.0]), 0)
    names = [f.name for f in fields(RankFigures) if f.name != "rank"]
    medians = {n: {name: median(each[name] for each in found) for name in names} for n, found in rounds.items()}
    return {n: RankFigures(rank=group.rank, **found) for n, found in medians.items()}


class _Measuring:
    """What is read, multiplied and summed, made once."""

    def __init__(self, group: Group, seconds: float) -> None:
        self.group, self.seconds = group, seconds
        rows = READ // group.size // 4 // 1024
        self.matrix, self.vector = torch.ones(rows, 1024), torch.ones(1024)
        self.pieces = torch.split(self.matrix, PIECE // 4096)
        self.square, self.narrow = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE, dtype=torch.bfloat16)
        self.small, self.large, self.wide = torch.ones(SMALL), torch.ones(LARGE), torch.ones(DEALT)

    def figures(self) -> dict[str, float]:
        """Every figure once. Ranks read and multiply for about as long; what has sums in it, as often."""
        reads = self._timed(lambda i: torch.mv(self.matrix, self.vector))
        products = self._timed(lambda i: torch.mm(self.square, self.square))
        narrow = self._timed(lambda i: torch.mm(self.narrow, self.narrow))
        pieces, paced = self._counted(PACED, self._read), self._counted(PACED, self._read_and_sum)
        small = self._counted(100, lambda i: self.group.all_reduce(self.small))
        return {
            "bandwidth": self.matrix.nbytes / reads,
            "gemm": 2 * SIDE**3 / products,
            "narrow_gemm": 2 * SIDE**3 / narrow,
            "small_s": small,
            "piece_s": pieces,
            "paced_s": paced,
            "large_s": self._counted(8, lambda i: self.group.all_reduce(self.large)),
            "dealt_s": self._counted(1, self._deal),
        }

    def _read(self, i: int) -> None:
        torch.mv(self.pieces[i % len(self.pieces)], self.vector)

    def _read_and_sum(self, i: int) -> None:
        torch.mv(self.pieces[i % len(self.pieces)], self.vector)
        self.group.all_reduce(self.small)

    def _deal(self, i: int) -> None:
        sizes = list(Partition.balanced(DEALT, self.group.size).widths)
        self.group.all_gather(self.group.reduce_scatter(self.wide, 0, sizes), 0, sizes)

    def _timed(self, work: Callable[[int], object]) -> float:
        """Mean seconds of one call, over about a window, begun together."""
        work(0)
        self.group.barrier()
        started, calls = time.perf_counter(), 0
        while time.perf_counter() - started < self.seconds:
            work(calls)
            calls += 1
        return (time.perf_counter() - started) / calls

    def _counted(self, calls: int, work: Callable[[int], object]) -> float:
        """Mean seconds of one call, over so many, begun together."""
        work(0)
        self.group.barrier()
        started = time.perf_counter()
        for i in range(calls):
            work(i)
        return (time.perf_counter() - started) / calls
