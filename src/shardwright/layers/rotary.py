"""Rotary position embedding: from positions to angles, once a step; layers only apply them."""

from typing import final

import torch
from torch import Tensor, nn

Rope = tuple[Tensor, Tensor]
"""cos and sin, each `[T, D/2]`."""


@final
class Rotary(nn.Module):
    """The angles `position * frequency` of each rotary pair (Su et al. 2021), in float32.

    frequencies: one for each of the D/2 pairs. They are kept in Python, so that neither a dtype change nor a meta
    device touches them.
    """

    def __init__(self, frequencies: tuple[float, ...]) -> None:
        super().__init__()
        self.frequencies = frequencies

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """`positions [T]` int64 → cos and sin `[T, D/2]` of `dtype`."""
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=positions.device)
        angles = positions[:, None].float() * frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)
