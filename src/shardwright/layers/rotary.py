"""Rotary position embedding: from positions to angles, once a step; layers only apply them."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from shardwright.layers.batch import Batch

Rope = tuple[Tensor, Tensor]
"""cos and sin, each `[T, D/2]`, or narrower where only the first dims of a head are turned."""


@final
class Rotary(nn.Module):
    """The angles `position * frequency` of each rotary pair (Su et al. 2021), in float32.

    frequencies: one for each of the D/2 pairs. They are kept in Python, so that neither a dtype change nor a meta
    device touches them. magnitude: what cos and sin are multiplied by.
    """

    def __init__(self, frequencies: tuple[float, ...], magnitude: float = 1.0) -> None:
        super().__init__()
        self.frequencies, self.magnitude = frequencies, magnitude

    def of(self, batch: Batch, dtype: torch.dtype) -> Rope:
        """The angles of a batch's tokens."""
        rope: Rope = self(batch.positions, dtype)
        return rope

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """`positions [T]` int64 → cos and sin `[T, D/2]` of `dtype`."""
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=positions.device)
        return _turned(positions[:, None].float() * frequencies, self.magnitude, dtype)


@final
class LengthRotary(nn.Module):
    """Angles whose frequencies follow the sequence's length (dynamic NTK, LongRoPE).

    frequencies: of a sequence of so many known tokens. Keys computed while it was shorter keep their angles.
    """

    def __init__(self, frequencies: Callable[[int], tuple[float, ...]], magnitude: float = 1.0) -> None:
        super().__init__()
        self.frequencies, self.magnitude = frequencies, magnitude

    def of(self, batch: Batch, dtype: torch.dtype) -> Rope:
        """The angles of a batch's tokens, each by its sequence's length."""
        known = batch.known or batch.held
        rows = torch.tensor(
            [self.frequencies(length) for length in known], dtype=torch.float32, device=batch.positions.device
        ).reshape(len(known), len(self.frequencies(0)))
        lengths = torch.tensor(batch.lengths, dtype=torch.int64, device=rows.device)
        of_token = torch.repeat_interleave(rows, lengths, dim=0, output_size=len(batch.positions))
        return _turned(batch.positions[:, None].float() * of_token, self.magnitude, dtype)


def _turned(angles: Tensor, magnitude: float, dtype: torch.dtype) -> Rope:
    cos, sin = angles.cos(), angles.sin()
    if magnitude != 1:
        cos, sin = cos * magnitude, sin * magnitude
    return cos.to(dtype), sin.to(dtype)
