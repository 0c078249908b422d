"""What is asked of an engine and what it gives back. Plain data that travels as JSON; no torch."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from shardwright.errors import UsageError

Finish = Literal["stop", "length", "nan"]
"""Why a text ended: a stop token, its limit of tokens (its own or the model's context), logits that are no numbers."""

NO_TOKEN = -1
"""What follows where no logit is a number above minus infinity."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. temperature 0 takes the likeliest; above, a draw that depends on `seed` alone.

    The draw is among the words that every filter leaves, applied in this order after the temperature, as in
    transformers: top_k: that many likeliest (0: all) · top_p: the likeliest that together reach this probability ·
    min_p: those at least this fraction as likely as the likeliest.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "seed", "top_k"):
            if type(self.__dict__[name]) is not int:
                raise UsageError(name, repr(self.__dict__[name]), "it is a whole number", "give an int")
        for name in ("temperature", "top_p", "min_p"):
            if isinstance(self.__dict__[name], bool) or not isinstance(self.__dict__[name], int | float):
                raise UsageError(name, repr(self.__dict__[name]), "it is a number", "give a float")
        if self.max_tokens < 1:
            raise UsageError("max_tokens", self.max_tokens, "a text has at least one token", "try --max-tokens 64")
        if not isfinite(self.temperature) or self.temperature < 0:
            raise UsageError("temperature", self.temperature, "it is 0 or above", "use 0 for the likeliest token")
        if self.top_k < 0:
            raise UsageError("top_k", self.top_k, "it counts words", "use 0 for all of them")
        if not 0 < self.top_p <= 1:
            raise UsageError("top_p", self.top_p, "it is a probability above 0", "use 1 for no limit")
        if not 0 <= self.min_p <= 1:
            raise UsageError("min_p", self.min_p, "it is a fraction", "use 0 for no limit")

    @property
    def filtered(self) -> bool:
        """Whether the draw is from fewer words than all: then the whole distribution has to be known."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


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
    """One generated token of one request, and why the text ended with it, if it did; `NO_TOKEN` where it is `nan`."""

    number: int
    token: int
    finish: Finish | None
