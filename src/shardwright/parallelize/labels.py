"""Labels: who must stay with whom. Each place along each dim of each parameter has one; a tensor's labels are integers.

`labels[i, j, …]` names the place of a parameter that element (i, j, …) stands or falls with: a rank that holds the
label holds the element. None: every rank holds the tensor whole. A dim along which labels do not vary is kept with
stride 0, so that a batch costs nothing. This file keeps what the rules find (`Findings`); it knows no operator.

same:   two labels have one owner, since an operator combines their elements one by one or sums over them
needs:  whoever owns the second label must hold the first too (a KV head and its query heads, a scale for all heads)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

WHOLE = 0
"""The label of what every rank must hold whole."""


@dataclass(frozen=True)
class Source:
    """The labels `start … start + size` of one dim of one parameter."""

    parameter: str
    dim: int
    start: int
    size: int


@dataclass(frozen=True)
class Parameter:
    """A parameter's value, or a view of it: labels for each of its own dims, each of the view's shape (None: uncut)."""

    name: str
    shape: tuple[int, ...]
    layers: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Edges:
    """Pairs of labels, and the node at which they met."""

    node: str
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Pick:
    """Places of one dim that a node picks by numbers known to the trace."""

    node: str
    labels: Tensor
    dim: int
    numbers: tuple[int, ...]


@dataclass
class Findings:
    """What one pass over a graph says about labels.

    copies: node → (labels before, labels after): a dim of size 1 that was repeated · consumed: node → labels summed
    over there, in order: a partial sum · exits: labels of the model's outputs · shared: parameters that are whole on
    every rank and meet what is split: their gradients are partial · picks: dims indexed by number.
    """

    size: int = 1
    sources: list[Source] = field(default_factory=list)
    same: list[Edges] = field(default_factory=list)
    needs: list[Edges] = field(default_factory=list)
    copies: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    consumed: dict[str, Tensor] = field(default_factory=dict)
    exits: dict[str, Tensor] = field(default_factory=dict)
    entries: list[tuple[str, str]] = field(default_factory=list)
    united: dict[str, Tensor] = field(default_factory=dict)
    picks: list[Pick] = field(default_factory=list)

    def fresh(self, count: int) -> Tensor:
        """New labels."""
        labels = torch.arange(self.size, self.size + count)
        self.size += count
        return labels

    def source(self, parameter: str, dim: int, shape: Sequence[int]) -> Tensor:
        """The labels of a parameter's dim, new on the first call: of the parameter's shape, varying along `dim`."""
        for known in self.sources:
            if (known.parameter, known.dim) == (parameter, dim):
                return along(torch.arange(known.start, known.start + known.size), dim, shape)
        labels = self.fresh(shape[dim])
        self.sources.append(Source(parameter, dim, int(labels[0]) if len(labels) else self.size, shape[dim]))
        return along(labels, dim, shape)

    def tie(self, node: str, a: Tensor, b: Tensor) -> None:
        """One owner for each pair of elements; the shapes broadcast."""
        self._add(self.same, node, a, b)

    def need(self, node: str, needed: Tensor, by: Tensor) -> None:
        """Owners of `by` hold `needed`."""
        self._add(self.needs, node, needed, by)

    def whole(self, node: str, labels: Tensor | None) -> None:
        """Every rank must hold all of it."""
        if labels is not None:
            self.united.setdefault(node, compact(labels))
            self.tie(node, labels, torch.full((1,), WHOLE).expand(labels.shape))

    def unite(self, node: str, labels: Tensor, dims: Iterable[int]) -> None:
        """One owner for all that differs only along `dims`."""
        small = compact(labels)
        for dim in {dim % labels.dim() for dim in dims} if labels.dim() else ():
            if small.shape[dim] > 1:
                if (small < 0).any():  # partly on every rank, partly not
                    self.whole(node, labels)
                    return
                self.united.setdefault(node, small)
                self.tie(node, small, small.narrow(dim, 0, 1).expand_as(small))

    @staticmethod
    def _add(edges: list[Edges], node: str, a: Tensor, b: Tensor) -> None:
        a, b = squeezed_together(*torch.broadcast_tensors(a, b))  # type: ignore[no-untyped-call]
        a, b = a.reshape(-1), b.reshape(-1)
        keep = (a != b) & (a >= 0) & (b >= 0)
        if keep.any():
            edges.append(Edges(node, a[keep], b[keep]))


def along(labels: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """A vector of labels as a tensor of `shape` that varies along `dim` only."""
    view = [1] * len(shape)
    view[dim] = len(labels)
    return labels.view(view).expand(tuple(shape))


def compact(labels: Tensor) -> Tensor:
    """The same labels with every dim along which they do not vary narrowed to 1."""
    return squeezed_together(labels)[0]


def squeezed_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape with each dim narrowed to 1 along which none of them varies."""
    for dim in range(tensors[0].dim()):
        if tensors[0].shape[dim] > 1 and all(_constant(x, dim) for x in tensors):
            tensors = tuple(x.narrow(dim, 0, 1) for x in tensors)
    return tensors


def varying(labels: Tensor) -> list[int]:
    """The dims along which labels vary."""
    return [dim for dim in range(labels.dim()) if labels.shape[dim] > 1 and not _constant(labels, dim)]


def spread(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Compact labels over `shape` again: a dim of size 1 is repeated without a copy."""
    return compact(labels).expand(tuple(shape)) if labels.numel() else labels.expand(tuple(shape))


def _constant(x: Tensor, dim: int) -> bool:
    if x.stride(dim) == 0:
        return True
    for other in range(x.dim()):
        if x.stride(other) == 0 and x.shape[other] > 1:
            x = x.narrow(other, 0, 1)
    return bool((x == x.narrow(dim, 0, 1)).all())
