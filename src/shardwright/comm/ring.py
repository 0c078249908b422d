"""Ring all-gather and reduce-scatter over `send` and `recv` alone, for groups whose links favour neighbours.

R ranks, R - 1 steps; in each, every rank sends one share to its right neighbour and receives one from its left
(Patarasuk & Yuan 2009). A rank sends all shares but one, which is the least any algorithm can. Shares may be uneven or
empty.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardwright.comm.group import Group


def ring_all_gather(group: Group, x: Tensor, dim: int, sizes: Sequence[int], *, tag: str = "") -> Tensor:
    """What `Group.all_gather` gives: every rank's `x` joined along `dim`; `sizes` are the widths of all ranks.

    Rank r sends every share but that of its right neighbour: `(R - 1) / R` of the result where shares are equal.
    """
    shares: dict[int, Tensor] = {group.rank: x.detach()}
    for step in range(group.size - 1):
        leaving, coming = (group.rank - step) % group.size, (group.rank - step - 1) % group.size
        shares[coming] = _passed(group, shares[leaving], _shape(x, dim, sizes[coming]), tag)
    return torch.cat([shares[rank] for rank in range(group.size)], dim)


def ring_reduce_scatter(group: Group, x: Tensor, dim: int, sizes: Sequence[int], *, tag: str = "") -> Tensor:
    """What `Group.reduce_scatter` gives: this rank's share, `sizes[rank]` wide along `dim`, of the sum of all `x`.

    Rank r sends the growing sum of every share but its own. Share r is summed around the ring, r + 1,
    r + 2, …, r, the same on every run, in `x`'s own dtype.
    """
    dim, sizes = group.check_whole(x, dim, sizes)
    mine = torch.split(x.detach(), sizes, dim)
    total = mine[(group.rank - 1) % group.size]
    for step in range(group.size - 1):
        coming = (group.rank - step - 2) % group.size
        total = _passed(group, total, _shape(x, dim, sizes[coming]), tag) + mine[coming]
    return total if group.size > 1 else total.clone()


def _passed(group: Group, x: Tensor, shape: list[int], tag: str) -> Tensor:
    """Send to the right while receiving from the left."""
    sent = group.send_async(x, (group.rank + 1) % group.size, tag=tag)
    received = group.recv(shape, x.dtype, (group.rank - 1) % group.size, tag=tag)
    sent.wait()
    return received


def _shape(x: Tensor, dim: int, width: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] = width
    return shape
