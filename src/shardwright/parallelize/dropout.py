"""`Dropout` whose masks depend on (seed, name, step, global index), never on how the tensor is cut."""

from typing import final

import torch
from torch import Tensor, nn

from shardwright.layers import random


@final
class Dropout(nn.Module):
    """`nn.Dropout` with the same mask at every split: an element's fate is drawn from its place in the whole tensor.

    places: for each dim that is cut (counted from the end, negative) the places this rank holds and the whole size. The
    step counts the calls in training mode.
    """

    def __init__(
        self, p: float, name: str, *, seed: int = 0, places: dict[int, tuple[Tensor, int]] | None = None
    ) -> None:
        super().__init__()
        self.p, self.name, self.seed, self.step = p, name, seed, 0
        self.places = places or {}

    def forward(self, x: Tensor) -> Tensor:
        """`x [...]` → the same shape; in training an element is 0 with probability p, else grows by 1/(1 - p)."""
        if not self.training or self.p == 0:
            return x
        self.step += 1
        keep = random.uniform(self.seed, self.name, self.step, self._index(x)) >= self.p
        return torch.where(keep, x / (1 - self.p) if self.p < 1 else x, torch.zeros((), dtype=x.dtype, device=x.device))

    def _index(self, x: Tensor) -> Tensor:
        """Each element's flat index in the whole tensor."""
        index = torch.zeros((), dtype=torch.int64, device=x.device)
        stride = 1
        for dim in range(-1, -x.dim() - 1, -1):
            places, size = self.places.get(dim, (torch.arange(x.shape[dim]), x.shape[dim]))
            index = index + (places.to(x.device) * stride).view(-1, *[1] * (-1 - dim))
            stride *= size
        return index

    def extra_repr(self) -> str:
        """Its probability and what keys its masks."""
        return f"p={self.p}, name={self.name}"
