"""What is asked of an engine and what it gives back. Plain data that travels as JSON; no torch."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from shardwright.errors import UsageError

Finish = Literal["stop", "length"]
"""Why a text ended: a stop token, or its limit of tokens (its own, or the model's context)."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. temperature 0 takes the likeliest; above, a draw that depends on `seed` alone."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError("max_tokens", self.max_tokens, "a text has at least one token", "try --max-tokens 64")
        if not isfinite(self.temperature) or self.temperature < 0:
            raise UsageError("temperature", self.temperature, "it is 0 or above", "use 0 for the likeliest token")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue. number: the caller's name for it · stop: token ids that end the text."""

    number: int
    tokens: tuple[int, ...]
    params: SamplingParams
    stop: tuple[int, ...] = ()


@dataclass
class Sequence:
    """A request under way. tokens: prompt and generated ones · computed: how many are in the KV pages."""

    request: Request
    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def generated(self) -> int:
        """How many tokens have been generated."""
        return len(self.tokens) - len(self.request.tokens)


@dataclass(frozen=True)
class NewToken:
    """One generated token of one request, and why the text ended with it, if it did."""

    number: int
    token: int
    finish: Finish | None
