"""This machine as the planner sees it: from what its ranks measured to `Machine`s, and the split it decodes fastest at.

Decides how figures become curve constants. Measures nothing (`profile.machine` does) and reads no file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

from shardwright.errors import UsageError
from shardwright.plan.blocks import Blocks
from shardwright.plan.curves import Machine
from shardwright.plan.hardware import Cluster, curve_constants
from shardwright.plan.serving import Load, Stage, server, service

ALIKE = 0.15
"""Ranks whose speeds differ by less are planned as equal: a rerun differs by as much."""

RATES = ("bandwidth", "gemm", "narrow_gemm")
"""A rank's figures that are so much a second; the others are seconds."""

LARGE_BYTES, DEALT_BYTES = 4 << 20, 64 << 20
"""Of the large all-reduce that is measured, and of what is scattered and gathered."""


@dataclass(frozen=True)
class Measured:
    """ranks: for each number of ranks that measured together, their figures (`profile.machine.RankFigures`) in rank
    order · memory: bytes of the whole machine · cores: that this process may use.
    """

    cores: int
    memory: int
    ranks: Mapping[int, Sequence[Mapping[str, float]]]

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "Measured":
        """From a cache's JSON.

        Raises:
            ValueError, KeyError, TypeError: it is not one.
        """
        table = {int(n): [{k: float(v) for k, v in row.items()} for row in rows] for n, rows in said["ranks"].items()}
        if not table or any(len(rows) != n or not all(map(_sound, rows)) for n, rows in table.items()):
            raise ValueError("figures are missing, or cannot be")
        if any(row["dealt_s"] == 0 for n, rows in table.items() if n > 1 for row in rows):
            raise ValueError("nothing is dealt out in no time")
        cores, memory = int(said["cores"]), int(said["memory"])
        if min(cores, memory) < 1:
            raise ValueError("a machine has cores and memory")
        return cls(cores, memory, table)


def _sound(row: Mapping[str, float]) -> bool:
    seconds = [row[name] for name in ("small_s", "piece_s", "paced_s", "large_s", "dealt_s")]
    return all(0 < row[name] < inf for name in RATES) and all(0 <= each < inf for each in seconds)


def machines(measured: Measured, ranks: int, width: int = 4) -> tuple[Machine, ...]:
    """Each rank's machine while so many run; the slowest one's for all where they are alike. width: bytes of a number
    that is multiplied: 4, or 2 for bfloat16.

    Raises:
        UsageError: so many have not been measured.
    """
    if ranks not in measured.ranks:
        known = ", ".join(map(str, sorted(measured.ranks)))
        raise UsageError("tp", ranks, f"this machine was measured with {known} ranks", "choose one of these")
    rows = _fair(measured, ranks)
    speeds = [row["bandwidth"] for row in rows]
    if min(speeds) > (1 - ALIKE) * max(speeds):
        rows = [{k: (max if k.endswith("_s") else min)(row[k] for row in rows) for k in rows[0]}] * ranks
    return tuple(_machine(measured, ranks, row, width) for row in rows)


def _fair(measured: Measured, ranks: int) -> Sequence[Mapping[str, float]]:
    """The figures of so many ranks. Beyond the cores a rank has a fair share of the slowest core, whatever it had for
    the moment in which it was measured; a turn of it is then what a piece takes a rank that has a core, sum included.
    """
    rows = measured.ranks[ranks]
    if ranks <= measured.cores or measured.cores not in measured.ranks:
        return rows
    each, full = ranks / measured.cores, measured.ranks[measured.cores]
    rates = {name: min(row[name] for row in full) / each for name in RATES}
    return [{**row, **rates, "piece_s": each * max(other["paced_s"] for other in full)} for row in rows]


def _machine(measured: Measured, ranks: int, row: Mapping[str, float], width: int) -> Machine:
    """Latency is what a small all-reduce between work takes beyond the work and the waiting for a core, which grows
    with the work; the links' rate is what the large one takes beyond a small one.
    """
    share, each = 2 * (ranks - 1) / ranks, max(ranks / measured.cores, 1.0)
    crowd, constants = ceil(each) / each - 1, curve_constants("cpu")
    waited = row["piece_s"] + min(crowd * row["piece_s"], constants["balance"])
    latency = max(row["small_s"], row["paced_s"] - waited)
    rate = share * LARGE_BYTES / max(row["large_s"] - row["small_s"], 1e-9) if ranks > 1 else 1e12
    products = row["gemm" if width == 4 else "narrow_gemm"]
    dealt = share * DEALT_BYTES / row["dealt_s"] if ranks > 1 else rate
    constants |= {"width": width, "latency": latency if ranks > 1 else 0.0, "crowd": crowd, "scatter": dealt / rate}
    return Machine(
        memory=measured.memory / ranks,
        bandwidth=row["bandwidth"],
        bf16=products,
        fp8=0.0,
        processors=1,
        intra=rate,
        inter=rate,
        per_node=ranks,
        **constants,
    )


def cluster(measured: Measured) -> Cluster:
    """This machine: a device for each core, in bfloat16 as plans are."""
    return Cluster("this machine", ("core",) * measured.cores, machines(measured, measured.cores, width=2))


@dataclass(frozen=True)
class Choice:
    """A number of ranks, and the tokens a second that are predicted for each number."""

    tp: int
    tokens_per_s: Mapping[int, float]


def fastest_decode(blocks: Blocks, measured: Measured, prompt: int, output: int, width: int = 4) -> Choice:
    """The tensor parallelism that decodes one request fastest here, of all measured. width: bytes of a weight."""
    speeds = {}
    for tp in sorted(measured.ranks):
        machine = slowest(measured, tp, width)
        load = Load(input=float(prompt), output=float(output), batch=1.0, fp8=0.0)
        stage = Stage(blocks=blocks, machine=machine, server=server("shardwright"), tp=float(tp), pp=1.0)
        speeds[tp] = float(1 / service(stage, load).per_token)
    return Choice(max(speeds, key=lambda tp: speeds[tp]), speeds)


def slowest(measured: Measured, ranks: int, width: int = 4) -> Machine:
    """The machine of the slowest of so many ranks, which all wait for."""
    return min(machines(measured, ranks, width), key=lambda machine: machine.bandwidth)
