"""How a model's rotary angles are stretched beyond the context it was trained on. Pure numbers; no torch.

Decides the angle per position of each rotary pair. Which stretch a file asks for is `models.schema`'s to say.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import ClassVar, final

Frequencies = tuple[float, ...]


def plain(theta: float, size: int) -> Frequencies:
    """`theta^(-2i/P)` for the pairs of P rotated dims (Su et al. 2021)."""
    return tuple(theta ** (-2 * pair / size) for pair in range(size // 2))


@dataclass(frozen=True, kw_only=True)
class RopeScaling(ABC):
    """One stretch. `follows_length`: its frequencies depend on how long a sequence is.

    restart: length beyond which a sequence's keys have to be computed anew, or None.
    """

    follows_length: ClassVar[bool] = False

    @property
    def restart(self) -> int | None:
        """None, but for `LongRopeScaling`."""
        return None

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0

    @abstractmethod
    def frequencies(self, theta: float, size: int, length: int) -> Frequencies:
        """Angle per position of each pair of `size` rotated dims, in a sequence of `length` known tokens."""


@final
@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling):
    """Every pair slower by `factor` (Chen et al. 2023)."""

    factor: float

    def frequencies(self, theta: float, size: int, length: int) -> Frequencies:
        """Divided alike."""
        return tuple(frequency / self.factor for frequency in plain(theta, size))


@final
@dataclass(frozen=True, kw_only=True)
class DynamicScaling(RopeScaling):
    """The base grows with a sequence beyond `context` tokens (dynamic NTK, as transformers computes it)."""

    follows_length: ClassVar[bool] = True

    factor: float
    context: int

    def frequencies(self, theta: float, size: int, length: int) -> Frequencies:
        """Of the base that this length asks for."""
        stretch = self.factor * max(length, self.context) / self.context - (self.factor - 1)
        return plain(theta * stretch ** (size / (size - 2)), size)


@final
@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1's stretch (the reference code published with it, `apply_scaling`).

    Pairs that turn over `high` times in the `original` context are kept, those under `low` times are slowed by
    `factor`, those between are blended by their turns.
    """

    factor: float
    low: float
    high: float
    original: int

    def frequencies(self, theta: float, size: int, length: int) -> Frequencies:
        """Each by its own turns."""
        stretched = []
        for frequency in plain(theta, size):
            turns = self.original * frequency / (2 * pi)
            blend = min(max((turns - self.low) / (self.high - self.low), 0.0), 1.0)
            stretched.append(frequency * (blend + (1 - blend) / self.factor))
        return tuple(stretched)


@final
@dataclass(frozen=True, kw_only=True)
class YarnScaling(RopeScaling):
    """YaRN (Peng et al. 2023): a ramp over pairs from those that turn `fast` times in `original` to those `slow` times.

    attention: the magnitude. truncate: the ramp begins and ends at whole pairs.
    """

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    attention: float = 1.0
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        """As the file says, or by YaRN's rule."""
        return self.attention

    def frequencies(self, theta: float, size: int, length: int) -> Frequencies:
        """Kept before the ramp, slowed by `factor` behind it."""
        start, stop = (self._pair(turns, theta, size) for turns in (self.fast, self.slow))
        if self.truncate:
            start, stop = floor(start), ceil(stop)
        start, stop = max(start, 0), min(stop, size - 1)
        width = (stop - start) or 0.001
        stretched = []
        for pair, frequency in enumerate(plain(theta, size)):
            slowed = min(max((pair - start) / width, 0.0), 1.0)
            stretched.append(frequency * (1 - slowed + slowed / self.factor))
        return tuple(stretched)

    def _pair(self, turns: float, theta: float, size: int) -> float:
        return size * log(self.original / (turns * 2 * pi)) / (2 * log(theta))


@final
@dataclass(frozen=True, kw_only=True)
class LongRopeScaling(RopeScaling):
    """LongRoPE (Ding et al. 2024): a factor for each pair, `short` up to `original` tokens and `long` beyond."""

    follows_length: ClassVar[bool] = True

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    attention: float = 1.0

    @property
    def restart(self) -> int:
        """Where short factors give way to long ones, for keys too."""
        return self.original

    @property
    def magnitude(self) -> float:
        """As the file says, or by LongRoPE's rule."""
        return self.attention

    def frequencies(self, theta: float, size: int, length: int) -> Frequencies:
        """By the factors of this length."""
        factors = self.long if length > self.original else self.short
        return tuple(frequency / factor for frequency, factor in zip(plain(theta, size), factors, strict=True))
