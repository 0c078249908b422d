"""Unequal devices, priced as equal ones: who takes how much, and the rates that all then keep up with.

Decides the shares; a dimension is cut by `Partition.weighted` with them. A rank with share s of n does n·s times an
equal rank's work, so equal rates and an equal need of memory are met where n·s is at most the least of memory / need,
bandwidth / rate and operations / rate, and those shares come to 1 in all. For each ratio of operations to bytes there
is thus a greatest pair of rates, which can only grow with any figure of any device. The ratios that are tried are fixed
and know no device: so the best over them grows too, which shares in proportion to one figure do not.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd

import numpy as np

from shardwright.plan.curves import Machine
from shardwright.plan.hardware import Cluster

FIGURES = ("memory", "bandwidth", "bf16", "fp8")

STEPS = 32
"""Ratios of operations to bytes in an octave: what is lost between two of them is 2 % of one rate at most."""

OCTAVES = 16
"""Ratios end at 2^16 operations a byte; devices have 5 to 600."""

FP8 = (1.0, 2.0)
"""Operations in fp8 for one in bf16 that are tried: all devices of the catalogue have one or the other."""

Cost = Callable[[Machine, np.ndarray], np.ndarray]
"""What those candidates cost on a machine whose rates are arrays `[ratio, candidate]`; the least is the best."""


def slowest(cluster: Cluster) -> Machine:
    """The device that every one is at least as good as: the least of each figure, curve constants of the first.

    Nodes count as the largest that all of them can be cut into.
    """
    least = {name: min(getattr(kind, name) for kind in cluster.kinds) for name in (*FIGURES, "intra", "inter")}
    return replace(cluster.machines[0], **least, per_node=gcd(*(int(kind.per_node) for kind in cluster.kinds)))


@dataclass(frozen=True)
class Dealt:
    """Candidates dealt out over a cluster. alike: whether all its devices are · machine: what each is priced on · need:
    bytes of an equal rank, whole: those of them that no share changes · even: which ones share evenly.
    """

    cluster: Cluster
    alike: bool
    machine: Machine
    need: np.ndarray
    whole: float
    even: np.ndarray

    def shares(self, at: int) -> tuple[float, ...]:
        """Each device's share of the work of a candidate; none where all are equal."""
        if self.even[at]:
            return ()
        memory, *rates = self._figures
        allowed = [_room(memory, self.whole) / _bounded(self.need[at], self._mean, self.whole)]
        for name, figures in zip(FIGURES[1:], rates, strict=True):
            rate = getattr(self.machine, name)[at]
            allowed += [figures / rate] if rate else []
        share = np.min(allowed, axis=0)
        return tuple((share / share.sum()).tolist())

    def fullest(self, at: int) -> int:
        """Bytes that a candidate takes of the device it fills most; of an equal rank where it does not fit at all."""
        need = float(self.need[at])
        if self.even[at] or need > self.machine.memory[at]:
            return int(need)
        return int(self.whole + (need - self.whole) * self.cluster.size * max(self.shares(at)))

    @cached_property
    def _figures(self) -> np.ndarray:
        return np.array([[getattr(machine, name) for machine in self.cluster.machines] for name in FIGURES], float)

    @cached_property
    def _mean(self) -> float:
        return float(_room(self._figures[0], self.whole).mean())


def dealt(cluster: Cluster, replicas: np.ndarray, need: np.ndarray, whole: float, fp8: bool, cost: Cost) -> Dealt:
    """Each candidate with the shares at which it costs least. Several replicas share evenly, as do devices that differ
    in their nodes and links alone.
    """
    machine, even = slowest(cluster), np.ones(len(need), bool)
    kinds: Counter[tuple[float, ...]] = Counter()
    for kind, count in cluster.kinds.items():
        kinds[kind.memory, kind.bandwidth, kind.bf16, kind.fp8 * fp8] += count
    one = np.flatnonzero(replicas == 1)
    if len(kinds) == 1 or not len(one):
        return Dealt(cluster, len(kinds) == 1, machine, need, whole, even)
    figures, counts = np.array(list(kinds)).T, np.array(list(kinds.values()))
    mean = float(counts @ _room(figures[0], whole)) / cluster.size
    rates = _greatest(figures, counts, _bounded(need[one], mean, whole), whole, fp8)
    costs = cost(replace(machine, **rates), one)
    best = costs.argmin(axis=0)
    alike = np.where(need[one] <= machine.memory, cost(machine, one), np.inf) <= costs.min(axis=0)
    even[one] = alike
    chosen = {name: np.full(len(need), float(getattr(machine, name))) for name in FIGURES}
    for name, values in rates.items():
        chosen[name][one] = np.where(alike, chosen[name][one], values[best, np.arange(len(one))])
    if machine.memory >= whole:  # else one has no room for what every rank holds, however little it takes
        chosen["memory"][one] = whole + mean
    return Dealt(cluster, False, replace(machine, **chosen), need, whole, even)


def _room(memory: np.ndarray, whole: float) -> np.ndarray:
    """Bytes of a device that may be shared out."""
    return np.maximum(memory - whole, 1.0)


def _bounded(need: np.ndarray, mean: float, whole: float) -> np.ndarray:
    """Bytes of an equal rank to share out. Where there is no room for all of them, as many as there is room for: the
    shares are those of memory alone then.
    """
    return np.clip(need - whole, 1.0, mean)


def _greatest(
    figures: np.ndarray, counts: np.ndarray, need: np.ndarray, whole: float, fp8: bool
) -> dict[str, np.ndarray]:
    """Rates `[ratio, candidate]` of the equal device, for every ratio that is not worse than another one.

    figures: of each kind of device, `[4, kind]`. With r the rate that a device allows and c what its memory does, rate
    t is the greatest where the sum of min(c, r / t) is n. That is the least of R / (n - C) over all cuts of the kinds
    into those that their rate bounds, with R in all, and those that their memory does, with C.
    """
    memory, bandwidth, bf16, in_fp8 = figures
    families = [np.minimum(bf16, in_fp8 / factor) for factor in FP8] if fp8 else [bf16]
    found: dict[str, list[np.ndarray]] = {name: [] for name in FIGURES[1:]}
    for operations, factor in zip(families, FP8, strict=False):
        ratio = _ladder(operations / bandwidth)
        rate, room = np.minimum(bandwidth, operations / ratio[:, None]), _room(memory, whole)
        order = np.argsort(rate / room, axis=1)
        bound = np.cumsum(np.take_along_axis(counts * rate, order, axis=1), axis=1)
        held = (counts * room)[order]
        held = held.sum(axis=1, keepdims=True) - np.cumsum(held, axis=1)
        greatest = np.full((len(ratio), len(need)), np.inf)
        for j in range(len(counts)):
            left = counts.sum() - held[:, j, None] / need
            bounded = bound[:, j, None] / np.where(left > 0, left, 1.0)
            greatest = np.minimum(greatest, np.where(left > 0, bounded, np.inf))
        found["bandwidth"].append(greatest)
        found["bf16"].append(greatest * ratio[:, None])
        found["fp8"].append(greatest * ratio[:, None] * factor * fp8)
    return {name: np.concatenate(values) for name, values in found.items()}


def _ladder(own: np.ndarray) -> np.ndarray:
    """The ratios from the one below the least of `own` to the one above the greatest: all others give the same of one
    rate and less of the other.
    """
    steps = STEPS * np.log2(own)
    low, high = np.clip((np.floor(steps.min()), np.ceil(steps.max())), 0, STEPS * OCTAVES)
    return 2.0 ** (np.arange(low, high + 1) / STEPS)
