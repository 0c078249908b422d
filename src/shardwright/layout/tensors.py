"""Cutting and joining plain tensors by hand: `split_tensor`, `merge_tensors`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from shardwright.errors import UsageError
from shardwright.layout.partition import Partition

if TYPE_CHECKING:
    from torch import Tensor

Rule = Literal["remainder_last", "balanced"]


def split_tensor(
    tensor: "Tensor", split_axis: int, world_size: int, *, rule: Rule = "remainder_last"
) -> "list[Tensor]":
    """Cut a tensor along one axis into `world_size` contiguous views, one a rank; nothing is copied.

    `remainder_last` gives every rank the floor and the last rank the rest; `balanced` gives the remainder one each to
    the first ranks. More ranks than elements leaves ranks with an empty view. `split_axis` may be negative.

    Raises:
        UsageError: an axis out of range, a world size below 1, an unknown rule.
    """
    axis = _axis(split_axis, tensor.dim())
    if world_size < 1:
        raise UsageError("world_size", world_size, "a split needs at least one rank", "pass 1 or more")
    if rule not in ("remainder_last", "balanced"):
        raise UsageError("rule", rule, "there is no such rule", "use 'remainder_last' or 'balanced'")
    cut = Partition.balanced if rule == "balanced" else Partition.remainder_last
    partition = cut(tensor.shape[axis], world_size)
    return [tensor.narrow(axis, start, width) for start, width in zip(partition.offsets, partition.widths, strict=True)]


def merge_tensors(shards: "Sequence[Tensor]", split_axis: int) -> "Tensor":
    """Join shards in rank order along the axis they were cut on: the inverse of `split_tensor`.

    Raises:
        UsageError: no shards, an axis out of range, or shards that differ outside the axis or in dtype.
    """
    import torch

    if not shards:
        raise UsageError("shards", "[]", "there is nothing to join", "pass one shard a rank")
    axis = _axis(split_axis, shards[0].dim())
    kinds = {(s.dtype, *s.shape[:axis], "*", *s.shape[axis + 1 :]) for s in shards}
    if len(kinds) > 1:
        raise UsageError(
            "shards",
            [list(s.shape) for s in shards],
            f"shards share their dtype and every dim but axis {axis}",
            "pass the shards of one tensor",
        )
    return torch.cat(list(shards), axis)


def _axis(axis: int, dims: int) -> int:
    if not -dims <= axis < dims:
        remedy = f"use {-dims}…{dims - 1}" if dims else "a single number cannot be cut"
        raise UsageError("split_axis", axis, f"the tensor has {dims} axes", remedy)
    return axis % dims
