"""`ShardedAdamW`: AdamW over the part of the flat buffers that this rank updates, and its state as flat vectors.

Decides that matrices decay and norms and biases do not, that half types have a wide master copy, and what becomes of
the second moment when gradients are signs. The arithmetic is
torch's fused AdamW (Loshchilov & Hutter 2019), element by element, so that it does not depend on the cut. The operator
is called as such: importing `torch.optim` takes nearly two seconds.
"""

from collections.abc import Iterator
from itertools import groupby
from math import cos, pi
from typing import final

import torch
from torch import Tensor

from shardwright.layout.partition import Range
from shardwright.train.flat import FlatParameters
from shardwright.train.recipe import OptimizerPart

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""What the optimiser keeps of each element; `weight` is the master copy."""


def learning_rate(settings: OptimizerPart, step: int, steps: int) -> float:
    """Of a step counted from 0: up to `lr` linearly over `warmup` steps, then along half a cosine down to `min_lr`."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, steps - 1 - settings.warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + cos(pi * min(1.0, progress))) / 2


@final
class ShardedAdamW:
    """AdamW of elements `own` of the buffers.

    vectors: for each of `KINDS` one `[stop - start]` of the gradients' dtype · done: updates so far.

    settled: updates after which the second moment stays as it is, and no element moves by more than the learning rate
    (1-bit Adam, Tang et al. 2021): a sign says nothing of a gradient's size. None: it follows the gradients always.
    """

    def __init__(self, flat: FlatParameters, own: Range, settings: OptimizerPart, settled: int | None = None) -> None:
        self.flat, self.own, self.settled = flat, own, settled
        held, gradient = flat.data[slice(*own)], flat.grad[slice(*own)]
        self.vectors: dict[str, Tensor] = {
            "weight": held if held.dtype == gradient.dtype else held.to(gradient.dtype),
            "exp_avg": torch.zeros_like(gradient),
            "exp_avg_sq": torch.zeros_like(gradient),
        }
        self._settings = settings
        self._runs = list(self._by_decay())
        self.done = 0

    def resume(self, done: int) -> None:
        """Go on after `done` updates, with what the vectors hold now."""
        self.done = done
        self._put()

    def step(self, lr: float) -> None:
        """One update from `flat.grad`; what others own of `flat.data` is left as it is."""
        self.done += 1
        for start, stop, decay in self._runs:
            part = slice(start - self.own[0], stop - self.own[0])
            vectors = [self.vectors[kind][part] for kind in KINDS]
            if self.settled is None or self.done <= self.settled:
                self._follow(vectors, self.flat.grad[start:stop], lr, decay)
            else:
                self._keep(vectors, self.flat.grad[start:stop], lr, decay, self.settled)
        self._put()

    def _follow(self, vectors: list[Tensor], gradient: Tensor, lr: float, decay: float) -> None:
        weight, average, square = ([vector] for vector in vectors)
        torch._fused_adamw_(
            weight,
            [gradient],
            average,
            square,
            [],
            [torch.tensor(float(self.done))],
            lr=lr,
            beta1=self._settings.betas[0],
            beta2=self._settings.betas[1],
            weight_decay=decay,
            eps=self._settings.eps,
            amsgrad=False,
            maximize=False,
        )

    def _keep(self, vectors: list[Tensor], gradient: Tensor, lr: float, decay: float, settled: int) -> None:
        weight, average, square = vectors
        first, second = self._settings.betas
        average.lerp_(gradient, 1 - first)
        size = (square / (1 - second**settled)).sqrt_().add_(self._settings.eps)
        move = (average / (1 - first**self.done)).div_(size).clamp_(-1, 1)
        weight.mul_(1 - lr * decay).sub_(move, alpha=lr)

    def _put(self) -> None:
        """Round the master copy into the parameters, where they are not one."""
        if self.vectors["weight"].dtype != self.flat.data.dtype:
            self.flat.data[slice(*self.own)] = self.vectors["weight"].to(self.flat.data.dtype)

    def rows(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """The rows start…stop of a parameter, all of them owned, in one of the vectors."""
        slot = self.flat.slots[name]
        at = slot.start + start * slot.row - self.own[0]
        return self.vectors[kind][at : at + (stop - start) * slot.row].view(stop - start, *slot.shape[1:])

    def owned_rows(self, name: str, share: Range | None = None) -> Range:
        """Which rows of a parameter lie in `share`, by default in what is owned."""
        slot, (low, high) = self.flat.slots[name], share or self.own
        start, stop = max(slot.start, low), min(slot.stop, high)
        return ((start - slot.start) // slot.row, (stop - slot.start) // slot.row) if start < stop else (0, 0)

    def _by_decay(self) -> Iterator[tuple[int, int, float]]:
        """Stretches of what is owned whose parameters decay alike: start, stop, decay."""
        for matrices, slots in groupby(self.flat.slots.values(), lambda slot: len(slot.shape) > 1):
            taken = list(slots)
            start, stop = max(taken[0].start, self.own[0]), min(taken[-1].stop, self.own[1])
            if start < stop:
                yield start, stop, self._settings.weight_decay if matrices else 0.0
