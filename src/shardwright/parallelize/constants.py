"""Integers that a traced graph has in reshapes, slices and splits, and what they must be on a rank.

A constant's place is its position among all integers of the call's arguments; what it must be follows from the labels
of what the call reads and makes.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Node

from shardwright.parallelize.flow import Flow, named, shape_of
from shardwright.parallelize.labels import Parameter
from shardwright.parallelize.placement import Placement, only
from shardwright.parallelize.record import END

Wanted = Callable[[Placement, int], int]


def constants(flow: Flow, node: Node) -> dict[int, tuple[int, Wanted]]:
    """Position → (value, what it is to be on a rank) of each constant of this call that a split may change."""
    found: dict[int, tuple[int, Wanted]] = {}
    name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""
    read, made = _of(flow, node.args[0] if node.args else None), _of(flow, node)
    given: Any = node.args
    if name in ("view", "reshape", "_unsafe_view", "expand", "zeros", "ones", "full") and made is not None:
        sizes = given[0] if name in ("zeros", "ones", "full") else given[1]
        return {at: (n, _size(made, at)) for at, n in enumerate(sizes) if n != -1}
    if name == "unflatten" and made is not None:
        dim = given[1] % len(shape_of(given[0]))
        return {1 + at: (n, _size(made, dim + at)) for at, n in enumerate(given[2]) if n != -1}
    if name == "repeat_interleave" and made is not None and read is not None and isinstance(given[1], int):
        dim = given[2] % made.dim()
        return {0: (given[1], lambda p, r: p.size(made, r)[dim] // max(1, p.size(read, r)[dim]))}
    if name in ("split", "split_with_sizes"):
        outs = flow.values[node]
        if outs is None or outs[0] is None:
            return {}
        dim = (named(node).get("dim", 0)) % len(shape_of(given[0]))
        parts = [_plain(x) for x in outs]
        if isinstance(given[1], int):
            return {0: (given[1], lambda p, r: only({p.size(x, r)[dim] for x in parts if x is not None}, node.name))}
        return {at: (n, _size(x, dim)) for at, (n, x) in enumerate(zip(given[1], parts, strict=True)) if x is not None}
    if name in ("slice", "select") and read is not None:
        dim = (given[1] if len(given) > 1 else 0) % read.dim()
        bounds = given[2:]
        for at, bound in enumerate(bounds[:2] if name == "slice" else bounds[:1]):
            if isinstance(bound, int) and bound < END and bound != 0:
                found[1 + at] = (bound, _bound(read, dim, bound))
    return found


def _of(flow: Flow, node: object) -> Tensor | None:
    return _plain(flow.values.get(node)) if isinstance(node, Node) else None


def _plain(value: Any) -> Tensor | None:
    """Labels of an activation, or of a view of a parameter that is cut along one dim."""
    if isinstance(value, Parameter):
        layers = [x for x in value.layers if x is not None]
        return layers[0] if len(layers) == 1 else None
    return value if isinstance(value, Tensor) else None


def _size(labels: Tensor, dim: int) -> Wanted:
    return lambda placement, rank: placement.size(labels, rank)[dim]


def _bound(labels: Tensor, dim: int, bound: int) -> Wanted:
    def wanted(placement: Placement, rank: int) -> int:
        size = labels.shape[dim]
        if bound < 0:  # from the end
            return placement.before(labels, dim, max(size + bound, 0), rank) - placement.size(labels, rank)[dim]
        return placement.before(labels, dim, min(bound, size), rank)

    return wanted
