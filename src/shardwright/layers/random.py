"""Random numbers that depend on (seed, name, step, global index) and on nothing else.

Each element is hashed from its own coordinates (a counter-based generator, after Salmon et al. 2011, with splitmix64 as
the mixing function, Steele et al. 2014), so that a tensor's values do not depend on how it is cut, who draws them, or
what was drawn before. torch's global generator is never touched.
"""

from hashlib import blake2b
from math import pi, prod

import torch
from torch import Tensor

from shardwright.layout.spec import Piece

# splitmix64's constants, as the signed integers that torch's wrapping int64 arithmetic needs
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def uniform(seed: int, name: str, step: int, index: Tensor) -> Tensor:
    """Float64 values strictly between 0 and 1, one for each global index (int64, any shape)."""
    key = int.from_bytes(blake2b(f"{seed}/{name}/{step}".encode(), digest_size=8).digest(), "little", signed=True)
    bits = _shift(_mix(index * _STEP + key), 12)
    return (bits.double() + 0.5) * 2.0**-52


def normal(seed: int, name: str, step: int, index: Tensor) -> Tensor:
    """Float64 values of mean 0 and variance 1, by Box and Muller (1958)."""
    radius = (-2 * uniform(seed, name, step, 2 * index).log()).sqrt()
    return radius * (2 * pi * uniform(seed, name, step, 2 * index + 1)).cos()


def gumbel(seed: int, name: str, step: int, index: Tensor) -> Tensor:
    """Float64 Gumbel noise: the argmax of `logits + gumbel` is a draw from `softmax(logits)` (Maddison et al. 2014)."""
    return -(-uniform(seed, name, step, index).log()).log()


def global_index(piece: Piece) -> Tensor:
    """For each element of a piece, its flat index in the whole source tensor: int64, the shape of the source box."""
    strides = [prod(piece.source_shape[dim + 1 :]) for dim in range(len(piece.source_shape))]
    index = torch.zeros((), dtype=torch.int64)
    for ranges, stride in zip(piece.source_ranges, strides, strict=True):
        index = index[..., None] + stride * torch.cat([torch.arange(start, stop) for start, stop in ranges])
    return index


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift right; torch's `>>` keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
