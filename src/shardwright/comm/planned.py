"""`PlannedGroup`: a rank and a size without peers. Shapes flow, values do not: run it on meta tensors."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from shardwright.comm.group import Call, Done, Group, Handle


@final
class PlannedGroup(Group):
    """Any rank of any size, alone: every collective returns at once with a tensor of the right shape.

    Values of ordinary tensors would be invented, so nothing is filled in: use it to count, never to compute.
    """

    def split(self, ranks: Sequence[int]) -> "PlannedGroup":
        """The planned group of those ranks."""
        members = self.check_members(ranks)
        return PlannedGroup(members.index(self.rank), len(members), self)

    def _all_reduce(self, x: Tensor, out: Tensor | None, call: Call) -> Handle:
        return Done(call, torch.empty_like(x) if out is None else out)

    def _all_gather(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        return Done(call, _resized(x, dim, sum(sizes)))

    def _reduce_scatter(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        return Done(call, _resized(x, dim, sizes[self.rank]))

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int], call: Call) -> Handle:
        return Done(call, _resized(x, 0, sum(receive)))

    def _broadcast(self, x: Tensor, root: int, call: Call) -> Handle:
        return Done(call, torch.empty_like(x))

    def _send(self, x: Tensor, destination: int, call: Call) -> Handle:
        return Done(call, x)

    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, call: Call) -> Handle:
        return Done(call, torch.empty(shape, dtype=dtype, device="meta"))

    def _barrier(self, call: Call) -> Handle:
        return Done(call, torch.empty(0, device="meta"))


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty((*x.shape[:dim], size, *x.shape[dim + 1 :]))
