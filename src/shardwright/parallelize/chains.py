"""From labels to chains: what is split together, into which granules, and what cannot be.

Labels that are tied form a class. A class that is summed over, or leaves the model, is a granule; each has one owner.
Every other class is held by whoever owns what needs it. A chain is all parameters' dims that are connected; it
can be split if it has more than one granule. Knows no ranks, no costs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shardwright.parallelize.labels import WHOLE, Edges, Findings, Source, compact

Ints = NDArray[np.int64]
NOTHING = "nothing sums over it"


@dataclass(frozen=True)
class Chain:
    """Dims of parameters that are split together.

    sources: the dims, in the order of the graph · granules: the classes that have one owner each, in the order in which
    they are summed over · consumers: the nodes that sum over them · exits: outputs of the model they reach · obstacle:
    why it cannot be split.
    """

    sources: tuple[Source, ...]
    granules: tuple[int, ...]
    consumers: tuple[str, ...]
    exits: tuple[str, ...]
    obstacle: str

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters it cuts."""
        return tuple(dict.fromkeys(source.parameter for source in self.sources))


@dataclass(frozen=True)
class Classes:
    """Which labels have one owner: of[label] is the class, named by its smallest label; edges: (needed, by) classes."""

    of: Ints
    needed: Ints
    by: Ints

    def holders(self, owners: dict[int, int], ranks: int) -> NDArray[np.bool_]:
        """For each label and rank whether the rank holds it, when each granule has the owner given; [labels, ranks]."""
        held = self._spread(owners, ranks)
        held[~held.any(1)] = True  # nobody's: whole
        held[WHOLE] = True
        return held

    def split(self, granules: Iterable[int]) -> NDArray[np.bool_]:
        """For each label whether it goes with one of these granules, so that what stands there is some rank's own."""
        mine = self._spread(dict.fromkeys(granules, 0), 1)[:, 0]
        mine[WHOLE] = False
        return mine

    def _spread(self, owners: dict[int, int], ranks: int) -> NDArray[np.bool_]:
        held = np.zeros((len(self.of), ranks), dtype=bool)
        for granule, rank in owners.items():
            held[granule, rank] = True
        while True:
            before = int(held.sum())
            np.logical_or.at(held, self.needed, held[self.by])
            if int(held.sum()) == before:
                return held[self.of]


def classes_of(findings: Findings) -> Classes:
    """Join what is tied, then what is summed over with all that needs it: a granule is never copied."""
    first, second = _pairs(findings.same)
    of = _components(findings.size, first, second)
    needed, by = _pairs(findings.needs)
    fixed = [x.numpy() for x in (*findings.consumed.values(), *_flat(findings.exits))]
    while fixed:
        granules = np.unique(of[np.concatenate(fixed)])
        torn = np.isin(of[needed], granules[granules != of[WHOLE]]) & (of[needed] != of[by])
        if not torn.any():
            break
        first, second = np.concatenate([first, needed[torn]]), np.concatenate([second, by[torn]])
        of = _components(findings.size, first, second)
    keep = of[needed] != of[by]
    return Classes(of, of[needed[keep]], of[by[keep]])


def chains_of(findings: Findings, classes: Classes) -> list[Chain]:
    """All chains, in the order in which the graph meets them."""
    of = classes.of
    start = np.array([source.start for source in findings.sources], dtype=np.int64)
    size = [source.size for source in findings.sources]
    group = _groups(findings, classes, start, size)
    consumed = {name: x.numpy() for name, x in findings.consumed.items()}
    exits = dict(zip(findings.exits, (x.numpy() for x in _flat(findings.exits)), strict=True))
    found = []
    for number in dict.fromkeys(group[at] for at in start if at < len(group)):
        sources = tuple(one for one in findings.sources if one.size and group[one.start] == number)
        consumers = tuple(name for name, x in consumed.items() if len(x) and group[x[0]] == number)
        leaving = tuple(name for name, x in exits.items() if len(x) and number in group[x])
        order = [of[consumed[name]] for name in consumers] + [of[exits[name]] for name in leaving]
        granules = list(dict.fromkeys(np.concatenate(order).tolist())) if order else []
        granules = [one for one in granules if one != of[WHOLE]]
        found.append(
            Chain(sources, tuple(granules), consumers, leaving, _obstacle(findings, classes, sources, granules))
        )
    return found


def _obstacle(findings: Findings, classes: Classes, sources: tuple[Source, ...], granules: list[int]) -> str:
    dims: dict[str, set[int]] = {}
    for source in sources:
        dims.setdefault(source.parameter, set()).add(source.dim)
    twice = [name for name, cut in dims.items() if len(cut) > 1]
    if any((classes.of[one.start : one.start + one.size] == classes.of[WHOLE]).any() for one in sources):
        return f"{_blamed(findings, classes, sources) or 'the model'} needs it whole"
    if not granules:
        return NOTHING
    if len(granules) < 2:
        blamed = _blamed(findings, classes, sources)
        return f"{blamed} needs all of it at once" if blamed else "it has a single part"
    if twice:
        return f"it would cut {twice[0]} along two dims"
    return ""


def _blamed(findings: Findings, classes: Classes, sources: tuple[Source, ...]) -> str:
    """The node that first needed these labels together, or, if none did, labels of the same owner."""
    own = np.concatenate([np.arange(one.start, one.start + one.size) for one in sources])
    kin = np.unique(classes.of[own])
    related = ""
    for node, labels in findings.united.items():
        flat = labels.numpy().reshape(-1)
        flat = flat[flat >= 0]
        if np.isin(flat, own).any():
            return node
        if not related and np.isin(classes.of[flat], kin).any():
            related = node
    return related


def _groups(findings: Findings, classes: Classes, start: Ints, size: list[int]) -> Ints:
    """Connected over ties, needs and membership of one source; WHOLE connects nothing."""
    members = [(np.arange(at, at + n)[1:], np.full(max(n - 1, 0), at)) for at, n in zip(start, size, strict=True)]
    first = np.concatenate([classes.of, classes.needed, *(a for a, _ in members)])
    second = np.concatenate([np.arange(len(classes.of)), classes.by, *(b for _, b in members)])
    apart = (classes.of[first] != classes.of[WHOLE]) & (classes.of[second] != classes.of[WHOLE])
    inside = np.zeros(len(first), dtype=bool)
    inside[len(first) - sum(len(a) for a, _ in members) :] = True
    keep = apart | inside
    return _components(len(classes.of), first[keep], second[keep])


def _flat(exits: dict[str, Tensor]) -> list[Tensor]:
    flat = [compact(x).reshape(-1) for x in exits.values()]
    return [x[x >= 0] for x in flat]


def _pairs(edges: list[Edges]) -> tuple[Ints, Ints]:
    empty = np.zeros(0, dtype=np.int64)
    first = np.concatenate([empty, *(one.first.numpy() for one in edges)])
    second = np.concatenate([empty, *(one.second.numpy() for one in edges)])
    return first, second


def _components(size: int, first: Ints, second: Ints) -> Ints:
    """For each of `size` things the smallest one it is connected with."""
    parent = np.arange(size)
    while True:
        a, b = parent[first], parent[second]
        if (a == b).all():
            return parent
        low, high = np.minimum(a, b), np.maximum(a, b)
        np.minimum.at(parent, high, low)
        while True:  # to the root
            up = parent[parent]
            if (up == parent).all():
                break
            parent = up
