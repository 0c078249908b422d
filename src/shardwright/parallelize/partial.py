"""Gradients of places that several ranks hold, or one rank twice: summed as backward reaches the parameter."""

from typing import final

import torch
from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.parallelize.plan import Cut
from shardwright.parallelize.sharding import rows


@final
class SumWhole:
    """A parameter that every rank holds whole and sees only its share of."""

    def __init__(self, group: Group, name: str) -> None:
        self.group, self.name = group, name

    def __call__(self, gradient: Tensor) -> Tensor:
        """The sum of all ranks' gradients."""
        return self.group.all_reduce(gradient.contiguous(), tag=f"{self.name}/grad")


@final
class SumShared:
    """A cut parameter of which places have several holders: one all-reduce of a zero-filled buffer of those places.

    Every rank enters, one without such a place too; a place held twice on a rank gets the same sum both times.
    """

    def __init__(self, group: Group, cut: Cut) -> None:
        self.group, self.cut = group, cut
        held = [rows(cut, rank) for rank in range(group.size)]
        times = torch.zeros(cut.shape[cut.dim], dtype=torch.int64).index_add_(
            0, torch.cat(held), torch.ones(sum(map(len, held)), dtype=torch.int64)
        )
        place = torch.cumsum(times > 1, 0) - 1
        mine = held[group.rank]
        self.local = (times[mine] > 1).nonzero()[:, 0]
        self.places = place[mine[self.local]]
        self.count = int((times > 1).sum())

    def __call__(self, gradient: Tensor) -> Tensor:
        """The gradient with each shared place summed over all that hold it."""
        dim = self.cut.dim
        local, places = self.local.to(gradient.device), self.places.to(gradient.device)
        shape = [self.count if d == dim else n for d, n in enumerate(gradient.shape)]
        buffer = gradient.new_zeros(shape).index_add_(dim, places, gradient.index_select(dim, local))
        buffer = self.group.all_reduce(buffer, out=buffer, tag=f"{self.cut.parameter}/grad")
        return gradient.index_copy(dim, local, buffer.index_select(dim, places))


def watch_gradients(model: nn.Module, cuts: dict[str, Cut], shared: frozenset[str], group: Group) -> None:
    """Register the sums on a split model's parameters."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or group.size == 1:
            continue
        if name in cuts:
            held = [at for rank in range(group.size) for at in rows(cuts[name], rank).tolist()]
            if len(set(held)) < len(held):
                parameter.register_hook(SumShared(group, cuts[name]))  # type: ignore[no-untyped-call]
        elif name in shared:
            parameter.register_hook(SumWhole(group, name))  # type: ignore[no-untyped-call]
