"""Gradients of parameters that several ranks hold and each sees only in part: summed in one all-reduce.

Such are the KV heads whose group straddles ranks, and the q and k norms. Which they are is read from the tables of all
ranks, so that every rank lays out the same buffer, one that holds none of them too.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.layers.layer import narrowed
from shardwright.layout.spec import Specs


def reduce_partial_gradients(
    parameters: Mapping[str, nn.Parameter], tables: Sequence[Specs], group: Group, tag: str = "partial gradients"
) -> None:
    """Replace each partial `.grad` by its sum over the ranks that hold the parameter; call it once after backward.

    A parameter whose `.grad` is None counts as zeros and receives the sum. Otherwise as `sum_partial`.
    """
    partial = partial_names(tables[group.rank])
    gradients = {name: _gradient(parameter) for name, parameter in parameters.items() if name in partial}
    sum_partial(gradients, tables, group, like=next(iter(parameters.values())), tag=tag)


def partial_names(table: Specs) -> frozenset[str]:
    """The parameters of which this rank's gradient is, in some piece, only a share."""
    return frozenset(name for name, spec in table.items() if any(piece.gradient == "partial" for piece in spec.pieces))


def sum_partial(
    gradients: Mapping[str, Tensor],
    tables: Sequence[Specs],
    group: Group,
    *,
    like: Tensor,
    tag: str = "partial gradients",
) -> None:
    """Sum the partial pieces of these gradients, in place, over the ranks that hold them.

    gradients: this rank's, by name, at least of `partial_names` · tables: the `specs` of every rank, in rank order ·
    like: of the gradients' dtype, for a rank that has none. One all-reduce of a zero-filled buffer with a place for
    each piece that is partial on any rank; nothing moves where there is none.
    """
    places: dict[object, int] = {}
    size = 0
    for table in tables:
        for spec in table.values():
            for piece in spec.pieces:
                if piece.gradient == "partial" and piece.key not in places:
                    places[piece.key] = size
                    size += piece.numel
    if not size:
        return
    mine = [
        (narrowed(gradients[name], piece.local_ranges), places[piece.key])
        for name, spec in tables[group.rank].items()
        for piece in spec.pieces
        if piece.gradient == "partial"
    ]
    buffer = like.new_zeros(size, requires_grad=False)
    for gradient, at in mine:
        buffer[at : at + gradient.numel()] = gradient.reshape(-1)
    buffer = group.all_reduce(buffer, out=buffer, tag=tag)
    for gradient, at in mine:
        gradient.copy_(buffer[at : at + gradient.numel()].view_as(gradient))


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
