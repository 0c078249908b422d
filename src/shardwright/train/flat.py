"""`FlatParameters`: all of a rank's parameters in one buffer, and their gradients in another.

Decides the order: as backward fills them, last layers first, so that a stretch of the buffer is complete while the rest
is still computed; `late` ones, whose gradients are not final when backward has given them, at the end. Gradients are
wide: float32 for half types. Knows no optimiser and no rank.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from typing import final

import torch
from torch import Tensor, nn

from shardwright.kernels.gradients import offer, withdraw
from shardwright.layout.partition import Partition


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in the buffers."""

    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The first element behind it."""
        return self.start + prod(self.shape)

    @property
    def row(self) -> int:
        """Elements of one row: what ownership never cuts."""
        return max(1, prod(self.shape[1:]))


@final
class FlatParameters:
    """Buffers that a module's parameters, and their `.grad`s, become views of.

    data `[numel]`, of the parameters' dtype · grad `[numel]`, float32 (float64 for float64).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], late: Collection[str] = ()) -> None:
        early = [name for name in reversed(list(parameters)) if name not in late]
        ordered = [*early, *(name for name in parameters if name in late)]
        starts = [0, *accumulate(parameters[name].numel() for name in ordered)]
        self.slots = {
            name: Slot(start, tuple(parameters[name].shape)) for name, start in zip(ordered, starts, strict=False)
        }
        self.late = frozenset(late)
        first = next(iter(parameters.values()))
        self.data = first.new_empty(starts[-1], requires_grad=False)
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.grad = torch.zeros_like(self.data, dtype=wide)
        self._listeners: list[Callable[[str], None]] = []
        self._parameters, self._empty = dict(parameters), set(parameters)
        for name, parameter in parameters.items():
            held = self.view(self.data, name)
            held.copy_(parameter.data)
            parameter.data = held
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, name))  # type: ignore[no-untyped-call]
        self.complete()

    @property
    def numel(self) -> int:
        """Elements in all."""
        return len(self.data)

    def view(self, flat: Tensor, name: str) -> Tensor:
        """A parameter's part of a buffer laid out like these."""
        slot = self.slots[name]
        return flat[slot.start : slot.stop].view(slot.shape)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """All of them."""
        return {name: self.view(flat, name) for name in self.slots}

    def listen(self, arrived: Callable[[str], None]) -> None:
        """Have `arrived(name)` called whenever a backward has added a parameter's gradient."""
        self._listeners.append(arrived)

    def shares(self, ranks: int) -> Partition:
        """The buffer dealt out over `ranks`, nearly evenly, whole rows of parameters to each."""
        cuts = [self._row_at(self.numel * rank // ranks) for rank in range(1, ranks)]
        stops = [*cuts, self.numel]
        return Partition.explicit([stop - start for start, stop in zip([0, *cuts], stops, strict=True)])

    def _row_at(self, at: int) -> int:
        slot = next((slot for slot in self.slots.values() if slot.start <= at < slot.stop), None)
        return self.numel if slot is None else slot.start + (at - slot.start) // slot.row * slot.row

    def clear(self) -> None:
        """Forget the gradients: the next backward writes, and those after it add. Until `complete`, `grad` is scrap."""
        self._empty = set(self._parameters)
        for name, parameter in self._parameters.items():
            parameter.grad = None
            if parameter.dtype == self.grad.dtype:
                offer(parameter, self.view(self.grad, name))

    def complete(self) -> None:
        """Zeros for parameters that no backward has reached since `clear`; from now on each backward adds."""
        for name in self._empty:
            parameter = self._parameters[name]
            withdraw(parameter)
            self.view(self.grad, name).zero_()
            self._attach(name, parameter)
        self._empty = set()

    def _arrived(self, name: str, parameter: Tensor) -> None:
        """Autograd has a gradient: in its place already, or where it was made."""
        found, place = parameter.grad, self.view(self.grad, name)
        withdraw(parameter)
        if found is not None and found.data_ptr() != place.data_ptr():
            narrow = parameter.dtype != self.grad.dtype
            place.add_(found) if narrow and name not in self._empty else place.copy_(found)
        self._empty.discard(name)
        self._attach(name, parameter)
        for listener in self._listeners:
            listener(name)

    def _attach(self, name: str, parameter: Tensor) -> None:
        """Wide parameters see their gradient; others have none of their own."""
        parameter.grad = self.view(self.grad, name) if parameter.dtype == self.grad.dtype else None
