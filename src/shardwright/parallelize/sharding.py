"""What a split model remembers: which places of which dim of each parameter each rank holds; it is `model.sharding`.

Gathering and cutting state dicts, gradients of places with several holders, and the table of `TensorSpec`s all read it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from shardwright.comm.group import Group, name_of
from shardwright.errors import UnsupportedError, UsageError
from shardwright.layout.partition import Range
from shardwright.layout.spec import Piece, Specs, TensorSpec
from shardwright.parallelize.plan import Cut, Plan

ATTRIBUTE = "sharding"


@dataclass(frozen=True)
class Sharding:
    """The plan a model was split by, the group it runs on, and tied names: name → the name the plan has."""

    plan: Plan
    group: Group
    names: Mapping[str, str]

    def cut(self, name: str) -> Cut | None:
        """How a parameter is cut; None: whole."""
        first = self.names.get(name, name)
        return next((cut for cut in self.plan.cuts if cut.parameter == first), None)

    def specs(self, parameters: Mapping[str, Tensor], rank: int) -> Specs:
        """What a rank holds of each parameter; gradients are whole everywhere after backward."""
        everyone = tuple(range(self.group.size))
        found: Specs = {}
        for name, tensor in parameters.items():
            cut = self.cut(name)
            dtype = name_of(tensor.dtype)
            if cut is None:
                shape = tuple(tensor.shape)
                piece = Piece(name, shape, tuple(((0, n),) for n in shape), tuple((0, n) for n in shape), everyone)
                found[name] = TensorSpec(shape, dtype, (piece,))
                continue
            pieces, at = [], 0
            for start, stop in _by_holders(cut, rank):
                source = tuple(((start, stop),) if d == cut.dim else ((0, n),) for d, n in enumerate(cut.shape))
                local = tuple((at, at + stop - start) if d == cut.dim else (0, n) for d, n in enumerate(cut.shape))
                pieces.append(Piece(name, cut.shape, source, local, _holders(cut, start)))
                at += stop - start
            shape = tuple(at if d == cut.dim else n for d, n in enumerate(cut.shape))
            found[name] = TensorSpec(shape, dtype, tuple(pieces))
        return found


def sharding_of(model: nn.Module) -> Sharding:
    """A split model's sharding."""
    found = getattr(model, ATTRIBUTE, None)
    if not isinstance(found, Sharding):
        raise UsageError("model", type(model).__name__, "it is not split", "pass what parallelize_model returned")
    return found


def refuse_split(model: nn.Module) -> None:
    """Refuse to split a model twice."""
    for path, module in model.named_modules():
        if isinstance(getattr(module, ATTRIBUTE, None), Sharding):
            raise UnsupportedError(
                f"{path or type(model).__name__}: this module is split already; build the model anew, or put "
                "full_state_dict(model) into a fresh one, and split that"
            )


def rows(cut: Cut, rank: int) -> Tensor:
    """The places a rank holds, in its order."""
    return torch.tensor([at for start, stop in cut.ranges[rank] for at in range(start, stop)], dtype=torch.int64)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the unsplit model, whole on every rank; every rank calls it."""
    sharding = sharding_of(model)
    full: dict[str, Tensor] = {}
    done: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        cut = sharding.cut(name)
        if cut is None:
            full[name] = tensor
            continue
        if cut.parameter not in done:
            held = [rows(cut, rank) for rank in range(sharding.group.size)]
            joined = sharding.group.all_gather(tensor.contiguous(), cut.dim, [len(x) for x in held], tag=name)
            whole = joined.new_empty(cut.shape)
            done[cut.parameter] = whole.index_copy_(cut.dim, torch.cat(held).to(whole.device), joined)
        full[name] = done[cut.parameter]
    return full


def load_full_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a split model from a whole state dict: each rank takes its own part.

    Raises:
        UsageError: a name is missing or unknown, or a shape differs.
    """
    sharding = sharding_of(model)
    own = model.state_dict()
    if unlike := sorted(own.keys() ^ state.keys()):
        remedy = "pass the unsplit model's state_dict()"
        raise UsageError("state", unlike[0], "it is missing there or unknown here", remedy)
    with torch.no_grad():
        for name, tensor in own.items():
            cut, given = sharding.cut(name), state[name]
            shape = tuple(tensor.shape) if cut is None else cut.shape
            if tuple(given.shape) != shape:
                raise UsageError(name, list(given.shape), f"the model has {list(shape)}", "pass the whole tensor")
            local = (
                given if cut is None else given.index_select(cut.dim, rows(cut, sharding.group.rank).to(given.device))
            )
            tensor.copy_(local)


def _by_holders(cut: Cut, rank: int) -> list[Range]:
    found: list[Range] = []
    for start, stop in cut.ranges[rank]:
        for _, places in groupby(range(start, stop), lambda at: _holders(cut, at)):
            run = list(places)
            found.append((run[0], run[-1] + 1))
    return found


def _holders(cut: Cut, at: int) -> tuple[int, ...]:
    return tuple(r for r, mine in enumerate(cut.ranges) if any(start <= at < stop for start, stop in mine))
