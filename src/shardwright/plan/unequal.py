"""Unequal devices, priced as equal ones: shares by speed and memory, and the rate that the slowest share allows.

Decides who takes how much. A dimension is cut by `Partition.weighted` with these shares.
"""

from dataclasses import fields, replace

import numpy as np

from shardwright.plan.curves import Machine
from shardwright.plan.hardware import Cluster

SAFE = 0.9
"""Share of a device's memory that shared-out bytes may fill; the rest is for what every rank has whole."""

SLOWEST = ("intra", "inter", "per_node")


def shares(cluster: Cluster, nbytes: float, by: str) -> tuple[float, ...]:
    """Each device's share of the work: in proportion to the figure `by` (`bf16` or `bandwidth`), unless its memory
    is full before; then the others take the rest. Where the whole does not fit, by memory alone.
    """
    speed = np.array([getattr(machine, by) for machine in cluster.machines], float)
    room = SAFE * np.array([machine.memory for machine in cluster.machines], float) / max(nbytes, 1.0)
    if room.sum() <= 1:
        return tuple(room / room.sum())
    taken = np.zeros_like(speed)
    free = np.ones(len(speed), bool)
    while True:
        wanted = (1 - taken[~free].sum()) * speed * free / speed[free].sum()
        full = free & (wanted > room)
        if not full.any():
            return tuple(np.where(free, wanted, taken))
        taken, free = np.where(full, room, taken), free & ~full


def equal_machine(cluster: Cluster, share: tuple[float, ...]) -> Machine:
    """The device of which as many equal ones would take as long and fill up as early as these with their shares.

    A rank with share s does n·s times an equal rank's work: its rates and its memory count divided by that. Curve
    constants are the first device's.
    """
    stretch = len(share) * np.maximum(np.array(share), 1e-9)
    first = cluster.machines[0]

    def least(name: str, over: np.ndarray | float) -> float:
        return float(np.min(np.array([getattr(machine, name) for machine in cluster.machines]) / over))

    figures = {name: least(name, stretch) for name in ("memory", "bandwidth", "bf16", "fp8")}
    links = {name: least(name, 1.0) for name in SLOWEST if name in {f.name for f in fields(Machine)}}
    return replace(first, **figures, **links)
