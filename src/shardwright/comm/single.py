"""`SingleGroup`: one rank, so that a layer needs no branch for size 1. Nothing moves; results are still new tensors."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from shardwright.comm.group import Call, Done, Group, Handle, put
from shardwright.errors import UsageError


@final
class SingleGroup(Group):
    """A group of one."""

    def __init__(self, parent: Group | None = None) -> None:
        super().__init__(rank=0, size=1, parent=parent)

    def split(self, ranks: Sequence[int]) -> "SingleGroup":
        """Itself again, the only split there is."""
        self.check_members(ranks)
        return SingleGroup(self)

    def all_reduce(self, x: Tensor, *, out: Tensor | None = None, tag: str = "") -> Tensor:
        """`x`; where it is to stay in place, at once."""
        return x if out is x else super().all_reduce(x, out=out, tag=tag)

    def _all_reduce(self, x: Tensor, out: Tensor | None, call: Call) -> Handle:
        return Done(call, x.clone() if out is None else put(x, out))

    def _all_gather(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        return Done(call, x.clone())

    def _reduce_scatter(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        return Done(call, x.clone())

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int], call: Call) -> Handle:
        return Done(call, x.clone())

    def _broadcast(self, x: Tensor, root: int, call: Call) -> Handle:
        return Done(call, x.clone())

    def _send(self, x: Tensor, destination: int, call: Call) -> Handle:
        raise _alone(call)

    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, call: Call) -> Handle:
        raise _alone(call)

    def _barrier(self, call: Call) -> Handle:
        return Done(call, torch.empty(0))


def _alone(call: Call) -> UsageError:
    return UsageError("size", 1, f"a group of one has nobody to {call.op} with", "leave the call out at size 1")
