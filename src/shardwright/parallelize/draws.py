"""Where a model draws random numbers: in modules of its own for that, by function in others' code, or out of reach.

What is drawn by place (`dropout`) has a key that names it: the module, and which of its draws it is.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from shardwright.parallelize.dropout import ANSWERED, Dropout, DroppedAttention, Places
from shardwright.parallelize.flow import Flow, named
from shardwright.parallelize.labels import varying
from shardwright.parallelize.placement import Placement
from shardwright.parallelize.plan import MODULES
from shardwright.parallelize.trace import Trace, owner


@dataclass(frozen=True)
class Draw:
    """One node that draws. key: what its masks depend on · function: which of torch's it is, or the operator · called:
    which of torch's functions the model called · inside: whether an `nn.Dropout` did · labels: of what it drops, None
    if every rank has all.
    """

    node: str
    path: str
    key: str
    function: str
    called: str
    inside: bool
    labels: Tensor | None

    def by_place_in(self, runs: str) -> bool:
        """Whether it is drawn by place: in a graph at its node, in modules where the model calls it itself."""
        return self.function in ANSWERED and (runs != MODULES or self.called == self.function)

    def by_place(self, p: float, placement: Placement, rank: int) -> Dropout | DroppedAttention:
        """What draws in its stead on a rank."""
        places = places_of(self.labels, placement, rank)
        return Dropout(p, self.key, places=places) if self.function == "dropout" else DroppedAttention(self.key, places)


def draws_of(trace: Trace, flow: Flow) -> tuple[Draw, ...]:
    """All of them, in the order of the graph; those of probability 0 in training are none."""
    modules = dict(trace.model.named_modules())
    seen: Counter[str] = Counter()
    found = []
    for node, function, called, p in _drawing(trace):
        path = owner(node)
        if p == 0 and (trace.model.training or called != function):
            continue
        key = f"{path}#{seen[path]}" if seen[path] else path
        seen[path] += 1
        value = flow.values[node]
        labels = value if isinstance(value, Tensor) else None
        inside = isinstance(modules.get(path), nn.Dropout)
        found.append(Draw(node.name, path, key, function, called, inside, labels))
    return tuple(found)


def _drawing(trace: Trace) -> Iterator[tuple[Node, str, str, float]]:
    """Node, function, the function that the model called, probability."""
    for node in trace.graph.graph.nodes:
        target, call = str(node.target), node.meta.get("custom", {}).get("call")
        called = trace.functions[call] if call is not None else ""
        if target == "aten.dropout.default":
            yield node, "dropout", called, float(node.args[1])
        elif target == "aten.scaled_dot_product_attention.default":
            yield node, "scaled_dot_product_attention", called, float(named(node).get("dropout_p", 0))
        elif torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            yield node, target, called, 1.0


def places_of(labels: Any, placement: Placement, rank: int) -> Places:
    """For each dim that is cut, from the end: the places this rank holds, and after how many they come again."""
    if not isinstance(labels, Tensor):
        return {}
    found: Places = {}
    for dim in varying(labels):
        period = _period(labels.movedim(dim, 0))
        held = placement.held_along(labels, dim, rank)
        found[dim - labels.dim()] = (held[held < period], period)
    return found


def _period(labels: Tensor) -> int:
    """After how many places of dim 0 the labels come again."""
    size = len(labels)
    whole = (p for p in range(1, size) if size % p == 0)
    return next((p for p in whole if bool((labels[p:] == labels[:-p]).all())), size)
