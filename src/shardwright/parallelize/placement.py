"""What each rank holds, once granules have owners: rows of parameters, sizes of every tensor of the graph.

The one place where labels and ranks meet. Local sizes follow from counting, whatever the layout: fused, interleaved,
repeated. Where a rank's query heads use their KV heads unequally often, a KV head's rows are held once for each of them
(`copies=True`), or the attention is given an index (`copies=False`).
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwright.errors import UnsupportedError
from shardwright.layout.partition import Partition, Range
from shardwright.parallelize.chains import Chain, Classes
from shardwright.parallelize.decide import Decision
from shardwright.parallelize.labels import Findings, Pick, Source, compact, varying


class Placement:
    """Owners of all granules over `ranks` ranks, dealt out in balance."""

    def __init__(self, decision: Decision, ranks: int, *, copies: bool = True) -> None:
        self.ranks = ranks
        self.findings: Findings = decision.flow.findings
        self.classes: Classes = decision.classes
        self.partitions = [Partition.balanced(len(chain.granules), ranks) for chain in decision.chains]
        owners: dict[int, int] = {}
        for chain, partition in zip(decision.chains, self.partitions, strict=True):
            owners |= _owners(chain, partition)
        self.held = self.classes.holders(owners, ranks)
        self._hold_scales(owners)
        self._hold_picked(owners)
        self.indexed: dict[str, tuple[tuple[int, ...], ...]] = {}
        self.times = self.held.astype(np.int64)
        for name, (before, after) in self.findings.copies.items():
            self._copy(name, before, after, copies=copies)

    def rows(self, source: Source, rank: int) -> list[int]:
        """The places of a parameter's dim that a rank holds, in order; one held twice stands twice, block by block."""
        labels = np.arange(source.start, source.start + source.size)
        held = [int(at) for at in np.flatnonzero(self.held[labels, rank])]
        if not (self.times[labels, rank] > 1).any():
            return held
        users = self._users(rank)
        rows: list[int] = []
        block: list[int] = []
        for at in [*held, None]:
            label = None if at is None else int(self.classes.of[labels[at]])
            previous = None if not block else int(self.classes.of[labels[block[-1]]])
            if block and (label is None or users.get(label) is None or users.get(label) != users.get(previous or -1)):
                rows += block * int(self.times[labels[block[0]], rank])
                block = []
            if at is not None:
                block.append(at)
        return rows

    def size(self, labels: Tensor, rank: int) -> tuple[int, ...]:
        """The local shape of a tensor with these labels."""
        small = compact(labels).numpy()
        counts = self._counts(small, rank)
        if 0 in counts:  # nothing here: only the dims that are cut elsewhere are empty
            others = [found for found in (self._counts(small, r) for r in range(self.ranks)) if 0 not in found]
            full = [all(found[dim] == n for found in others) for dim, n in enumerate(small.shape)]
            leading = next((dim for dim, n in enumerate(small.shape) if n > 1), -1)
            empty = [dim for dim, same in enumerate(full) if not same] or [leading]
            counts = [0 if dim in empty else n for dim, n in enumerate(small.shape)]
        return tuple(n if small.shape[dim] == 1 else counts[dim] for dim, n in enumerate(labels.shape))

    def _counts(self, small: NDArray[np.int64], rank: int) -> list[int]:
        times = np.where(small < 0, 1, self.times[np.maximum(small, 0), rank])
        mask = times > 0
        counts = [int(mask.any(tuple(d for d in range(mask.ndim) if d != dim)).sum()) for dim in range(mask.ndim)]
        varying = [dim for dim in range(mask.ndim) if small.shape[dim] > 1]
        if not varying or not mask.any():
            return counts
        if int(mask.sum()) != int(np.prod(counts)):  # a group of query heads begun here and ended elsewhere
            first, second, *rest = varying
            counts[first], counts[second] = int(mask.sum()) // int(np.prod([counts[dim] for dim in rest])), 1
            return counts
        where = tuple(np.argwhere(mask)[0])
        line = times[tuple(slice(None) if d == varying[0] else where[d] for d in range(times.ndim))]
        counts[varying[0]] = int(line.sum())
        return counts

    def before(self, labels: Tensor, dim: int, at: int, rank: int) -> int:
        """How many places of `dim` before `at` the rank holds."""
        if at == 0:
            return 0
        return self.size(labels.narrow(dim, 0, at), rank)[dim]

    def held_along(self, labels: Tensor, dim: int, rank: int) -> Tensor:
        """The places along one dim of which a rank holds anything."""
        small = compact(labels).numpy()
        mask = (small < 0) | (self.times[np.maximum(small, 0), rank] > 0)
        return torch.from_numpy(np.flatnonzero(mask.any(tuple(d for d in range(mask.ndim) if d != dim))))

    def holders(self, source: Source, at: int) -> tuple[int, ...]:
        """The ranks that hold one place."""
        return tuple(int(rank) for rank in np.flatnonzero(self.held[source.start + at]))

    def _hold_scales(self, owners: dict[int, int]) -> None:
        """A parameter used alike by all parts (a norm over a head) is held by ranks without a part too."""
        of = self.classes.of
        copied = [of[compact(before).reshape(-1).numpy()] for before, _ in self.findings.copies.values()]
        heads = np.concatenate([np.zeros(0, dtype=np.int64), *copied])
        for source in self.findings.sources:
            mine = of[source.start : source.start + source.size]
            held = self.held[source.start : source.start + source.size]
            if (
                (held.all(0) | ~held.any(0)).all()
                and not np.isin(mine, list(owners)).any()
                and not np.isin(mine, heads).any()
            ):
                self.held[np.isin(of, mine)] = True

    def _hold_picked(self, owners: dict[int, int]) -> None:
        """What is picked by number and has no owner (one KV head for all) is on ranks without parts too."""
        for pick in self.findings.picks:
            size = pick.labels.shape[pick.dim]
            picked = pick.labels.index_select(pick.dim, torch.tensor([n % size for n in pick.numbers]))
            classes = np.unique(self.classes.of[compact(picked).clamp(min=0).reshape(-1).numpy()])
            if not np.isin(classes, list(owners)).any():
                self.held[np.isin(self.classes.of, classes)] = True

    def part(self, labels: Tensor, rank: int) -> Tensor | None:
        """The labels that a rank holds of a tensor, in its local shape; None if it holds none, or one twice."""
        times = np.where(labels.numpy() < 0, 1, self.times[np.maximum(labels.numpy(), 0), rank])
        if not times.any() or (times > 1).any():
            return None
        return labels[torch.from_numpy(times > 0)].view(self._counts(labels.numpy(), rank))

    def lost(self) -> tuple[Pick, int] | None:
        """A pick by number that would find another place on a rank, and the rank."""
        for pick in self.findings.picks:
            size = pick.labels.shape[pick.dim]
            for rank in range(self.ranks):
                held = self.held_along(pick.labels, pick.dim, rank).tolist()
                for number in pick.numbers:
                    at = number if number >= 0 else len(held) + number
                    if not 0 <= at < len(held) or held[at] != number % size:
                        return pick, rank
        return None

    def _users(self, rank: int) -> dict[int, tuple[int, ...]]:
        users: dict[int, list[int]] = {}
        for needed, by in zip(self.classes.needed.tolist(), self.classes.by.tolist(), strict=True):
            if self.held[by, rank] and self.held[needed, rank]:
                users.setdefault(needed, []).append(by)
        return {label: tuple(sorted(set(found))) for label, found in users.items()}

    def _copy(self, name: str, before: Tensor, after: Tensor, *, copies: bool) -> None:
        """How often each rank needs what is repeated here; unequally often: once a copy, or by index."""
        first = compact(before).expand(compact(after).shape) if before.numel() else before
        old, new = first.reshape(-1).numpy(), compact(after).reshape(-1).numpy()
        index = []
        for rank in range(self.ranks):
            counts = Counter(old[self.held[new, rank]].tolist())
            regular = len(set(counts.values())) <= 1
            index.append(() if regular else self._index(before, after, rank))
            if not regular and copies:
                for label, count in counts.items():
                    self.times[self.classes.of == self.classes.of[label], rank] = count
        if any(index):
            self.indexed[name] = tuple(index)

    def _index(self, before: Tensor, after: Tensor, rank: int) -> tuple[int, ...]:
        """For each part of a rank in order, which of its places of what was repeated it needs (query → KV head)."""
        small = compact(after)
        leading, *inner = varying(before)
        for dim in inner:
            small, before = small.narrow(dim, 0, 1), before.narrow(dim, 0, 1)
        heads = compact(before).reshape(-1).numpy()
        mine = [int(at) for at in np.flatnonzero(self.held[heads, rank])]
        held = self.held[small.numpy(), rank]
        return tuple(mine.index(int(at[leading])) for at in np.argwhere(held))


def _owners(chain: Chain, partition: Partition) -> dict[int, int]:
    return {
        granule: rank for rank in range(partition.ranks) for granule in chain.granules[slice(*partition.range(rank))]
    }


def ranges(rows: Sequence[int]) -> tuple[Range, ...]:
    """Rows as ranges, in order; a row that does not follow the last one begins a new range."""
    found: list[list[int]] = []
    for row in rows:
        if found and found[-1][1] == row:
            found[-1][1] += 1
        else:
            found.append([row, row + 1])
    return tuple((start, stop) for start, stop in found)


def only(values: set[int], what: str) -> int:
    """The one value that all parts share."""
    if len(values) != 1:
        raise UnsupportedError(f"{what}: the parts have {sorted(values)}; this split has no place in the model's code")
    return values.pop()
