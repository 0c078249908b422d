"""Where a number that is none came from: the first module, in the order of the forward, and the rank.

Decides how it is looked for: the step's forward is run again with every module watched; where that is sound, the
gradients are looked through in the order in which backward made them. Every rank enters: the forward communicates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.train.stepper import Stepper
from shardwright.train.windows import Micro

NOWHERE = 1 << 40


@dataclass(frozen=True)
class Culprit:
    """What is wrong where."""

    what: str
    module: str
    rank: int

    def __str__(self) -> str:
        return f"{self.what} of {self.module} on rank {self.rank}"


@dataclass
class _Watch:
    """The calls of modules in a forward, and the first whose output is not finite."""

    calls: list[nn.Module] = field(default_factory=list)
    first: int = NOWHERE

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            self.first = min(self.first, len(self.calls))
        self.calls.append(module)


def culprit(stepper: Stepper, micros: Sequence[Micro], step: int) -> Culprit | None:
    """The first module whose output, or else parameter whose gradient, is not finite; None where all is finite now."""
    names = {module: name for name, module in stepper.model.named_modules()}
    watch = _watched(stepper, micros, step)
    call, rank = _earliest(stepper.groups.world, watch.first, lambda at: _has_bad_parameter(watch.calls[at]))
    if call != NOWHERE:
        name = names[watch.calls[call]] if call < len(watch.calls) else ""
        return Culprit("output", name or "the model", rank)
    order = list(stepper.flat.slots)
    bad = (at for at, name in enumerate(order) if not stepper.flat.view(stepper.flat.grad, name).isfinite().all())
    at, rank = _earliest(stepper.groups.world, next(bad, NOWHERE), lambda at: True)
    return None if at == NOWHERE else Culprit("gradient", order[at], rank)


def _watched(stepper: Stepper, micros: Sequence[Micro], step: int) -> _Watch:
    watch = _Watch()
    hooks = [module.register_forward_hook(watch) for module in stepper.model.modules()]
    try:
        with torch.no_grad():
            for micro in micros:
                stepper.losses(micro, step)
    finally:
        for hook in hooks:
            hook.remove()
    return watch


def _has_bad_parameter(module: nn.Module) -> bool:
    return not all(parameter.isfinite().all() for parameter in module.parameters(recurse=False))


def _earliest(world: Group, mine: int, guilty: Callable[[int], bool]) -> tuple[int, int]:
    """The earliest place on any rank, and that rank: where several have it, the one whose own doing it is."""
    told = 2 * mine + (mine == NOWHERE or not guilty(mine))
    table = world.all_gather(torch.tensor([told]), 0, [1] * world.size, tag="culprit").tolist()
    return min(table) // 2, table.index(min(table))
