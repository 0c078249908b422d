"""The plan: what is cut, what moves in a forward, what stays whole and why. Plain data, printed and saved as JSON."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from shardwright.layout.partition import Range

MODULES = "modules"


@dataclass(frozen=True)
class Cut:
    """One parameter cut along one dim. ranges: for each rank the ranges of that dim it holds, in its order; a range
    held by several ranks is a copy, and one that stands twice on a rank is held twice there.
    """

    parameter: str
    shape: tuple[int, ...]
    dim: int
    ranges: tuple[tuple[Range, ...], ...]
    bytes_each: int

    @property
    def copied_bytes(self) -> int:
        """Bytes that ranks hold beyond one copy of the parameter."""
        rows = sum(stop - start for mine in self.ranges for start, stop in mine)
        whole = self.shape[self.dim]
        size = self.bytes_each
        for n in self.shape:
            size *= n
        return (rows - whole) * size // max(1, whole)


@dataclass(frozen=True)
class Move:
    """One collective of a forward. op: all_reduce | all_gather · bytes: what each rank hands over."""

    op: str
    at: str
    bytes: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What `parallelize_model` does with a model over `ranks` ranks.

    chains: for each chain the parameters it cuts and where it ends · whole: parameter → why every rank holds all ·
    whole_bytes: its size · settings: module path → {attribute: one value a rank} · indexed: module path → each rank's
    query → KV index · runs: `modules` where the model's own forward stays, else why the traced graph runs instead ·
    notes: what to know.
    """

    ranks: int
    chains: tuple[str, ...]
    cuts: tuple[Cut, ...]
    moves: tuple[Move, ...]
    whole: Mapping[str, str]
    whole_bytes: Mapping[str, int]
    settings: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    indexed: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    runs: str = MODULES
    notes: tuple[str, ...] = ()

    def bytes_per_forward(self, rank: int) -> int:
        """What one rank hands over in a forward of the example's shapes."""
        return sum(move.bytes[rank] for move in self.moves)

    def to_json(self) -> str:
        """One JSON object."""
        totals = [self.bytes_per_forward(rank) for rank in range(self.ranks)]
        return json.dumps({**asdict(self), "bytes_per_forward": totals}, ensure_ascii=False)

    def __str__(self) -> str:
        total = [self.bytes_per_forward(rank) for rank in range(self.ranks)]
        lines = [
            f"{len(self.cuts)} parameters cut over {self.ranks} ranks in {len(self.chains)} chains, "
            f"{len(self.whole)} whole; a forward hands over {min(total):,}"
            + (f"…{max(total):,}" if min(total) != max(total) else "")
            + f" bytes a rank in {len(self.moves)} collectives"
        ]
        alike: dict[str, list[str]] = {}
        for chain in self.chains:
            alike.setdefault(re.sub(r"\d+", "*", chain), []).append(chain)
        for first, *others in alike.values():
            lines.append(f"  split   {first}" + (f"; and {len(others)} more like it" if others else ""))
        for op, count in Counter(move.op for move in self.moves).items():
            lines.append(f"  moves   {count} {op}: " + _some([move.at for move in self.moves if move.op == op]))
        for reason in dict.fromkeys(self.whole.values()):
            alike_whole = [name for name, why in self.whole.items() if why == reason]
            held = sum(self.whole_bytes[name] for name in alike_whole)
            lines.append(f"  whole   {_some(alike_whole)} ({held:,} bytes on every rank): {reason}")
        copied = sum(cut.copied_bytes for cut in self.cuts)
        if copied:
            names = [cut.parameter for cut in self.cuts if cut.copied_bytes]
            lines.append(f"  copies  {copied:,} bytes on all ranks together: {_some(names)}")
        if self.runs != MODULES:
            lines.append(f"  runs    the traced graph, without a cache: {self.runs}")
        lines += [f"  note    {note}" for note in self.notes]
        return "\n".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
