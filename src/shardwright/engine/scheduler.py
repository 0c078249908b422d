"""Which sequences advance in a step, by how many tokens, and which KV pages they own: bookkeeping without torch.

Every rank runs the same scheduler on the same requests, so that no decision is ever local to one of them.
"""

from collections import deque
from dataclasses import dataclass
from typing import final

from shardwright.engine.request import NO_TOKEN, Finish, NewToken, Request, Sequence


@dataclass(frozen=True)
class Chunk:
    """The next `length` tokens of a sequence; `complete` where they are its last, so that a new one is sampled."""

    sequence: Sequence
    length: int

    @property
    def complete(self) -> bool:
        """Whether this chunk reaches the end of the known tokens."""
        return self.sequence.computed + self.length == len(self.sequence.tokens)


@final
class Scheduler:
    """First come, first served: up to `sequences` at a time, up to `budget` tokens a step, long prompts in chunks.

    context: longest sequence · page: tokens in a KV page · restart: a sequence that grows beyond so many tokens is
    computed anew from its first, since its keys would be others now (LongRoPE). Pages are handed out as sequences grow
    and taken back at their end; `pages_needed` is how many have to exist.
    """

    def __init__(
        self, context: int, page: int, *, sequences: int = 16, budget: int = 2048, restart: int | None = None
    ) -> None:
        self.context, self.page, self.limit, self.budget, self.restart = context, page, sequences, budget, restart
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.pages_needed = 0
        self._free: list[int] = []

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(Sequence(request, list(request.tokens)))

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting or self.running)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step: what is running first, then what waits, while the budget lasts."""
        while self.waiting and len(self.running) < self.limit:
            self.running.append(self.waiting.popleft())
        chunks, left = [], self.budget
        for sequence in self.running:
            length = min(left, len(sequence.tokens) - sequence.computed)
            if length:
                chunks.append(Chunk(sequence, length))
                self._reserve(sequence, sequence.computed + length)
                left -= length
        return chunks

    def undecided(self, sequence: Sequence) -> int:
        """How many tokens it may get before there is anything to decide: a page, its end (stops apart), a restart."""
        known = len(sequence.tokens)
        room = len(sequence.pages) * self.page - sequence.computed
        left = min(self.context - known, sequence.request.params.max_tokens - sequence.generated)
        again = self.restart + 1 - known if self.restart is not None and known <= self.restart else left
        return max(1, min(room, left, again))

    def commit(self, chunks: list[Chunk], found: list[list[int]]) -> list[NewToken]:
        """Record a step: its chunks are computed, and each complete one has got its tokens, in order.

        Of several all but the last are computed too, and leave nothing to decide.
        """
        for chunk in chunks:
            chunk.sequence.computed += chunk.length
        complete = [c.sequence for c in chunks if c.sequence.computed == len(c.sequence.tokens)]
        new = []
        for sequence, tokens in zip(complete, found, strict=True):
            sequence.computed += len(tokens) - 1
            new += [self._append(sequence, token) for token in tokens]
        return new

    def _append(self, sequence: Sequence, token: int) -> NewToken:
        sequence.tokens.append(token)
        if self.restart is not None and len(sequence.tokens) == self.restart + 1:
            sequence.computed = 0
        finish = self._finish(sequence, token)
        if finish:
            self.running.remove(sequence)
            self._free.extend(reversed(sequence.pages))
            sequence.pages.clear()
        return NewToken(sequence.request.number, token, finish)

    def _finish(self, sequence: Sequence, token: int) -> Finish | None:
        if token == NO_TOKEN:
            return "nan"
        if token in sequence.request.stop:
            return "stop"
        full = len(sequence.tokens) >= self.context
        return "length" if full or sequence.generated >= sequence.request.params.max_tokens else None

    def _reserve(self, sequence: Sequence, tokens: int) -> None:
        while len(sequence.pages) * self.page < tokens:
            if not self._free:
                self._free.append(self.pages_needed)
                self.pages_needed += 1
            sequence.pages.append(self._free.pop())
