"""Sends and receives between two ranks that share memory: one box for each ordered pair, a chunk at a time.

A letter advances whenever its owner waits for anything, so that a large send does not block the receive behind it; and
all else that the owner has under way advances while it waits for a letter.
"""

from collections import deque
from hashlib import blake2b
from typing import Protocol, final
from weakref import WeakSet

from torch import Tensor

from shardwright.comm.atomics import read_word, write_word
from shardwright.comm.group import Call, Handle
from shardwright.comm.segment import (
    LETTER_NAME,
    LETTER_READ,
    LETTER_WRITTEN,
    MAILBOX,
    PID,
    Segment,
    bytes_of,
    put_text,
    text_of,
)
from shardwright.comm.standstill import Standstill
from shardwright.comm.watch import AbortWord, Patience, poll
from shardwright.errors import CommError


class Advancing(Protocol):
    """What has something under way."""

    def advance(self) -> object:
        """Go as far as goes without waiting."""


@final
class _Letter(Handle):
    """One tensor on its way out of this rank or into it; `move` advances it by a chunk, if the box allows."""

    def __init__(self, call: Call, x: Tensor, pair: tuple[int, int], mail: "Mailboxes", timeout_s: float) -> None:
        super().__init__(call)
        self._x, self._mail, self._timeout_s = x, mail, timeout_s
        self._outgoing = call.op == "send"
        self._peer = pair[self._outgoing]
        self._address, self._text, self._room = mail.segment.mailbox(*pair)
        self._bytes = bytes_of(x.contiguous())
        self._moved = 0
        self.ended = False

    def done(self) -> bool:
        """Whether all of it has moved, or never will."""
        self._mail.advance_all()
        return self.ended or self._mail.abort.failed() is not None

    def move(self) -> bool:
        """Write or read the next chunk; whether that was possible."""
        written, read = read_word(self._address + LETTER_WRITTEN), read_word(self._address + LETTER_READ)
        if (written == read) != self._outgoing:
            return False
        chunk = self._bytes[self._moved : self._moved + MAILBOX]
        room = self._room[: chunk.numel()]
        if self._outgoing:
            room.copy_(chunk)
            if not self._moved:
                put_text(self._text, str(self.call))
                write_word(self._address + LETTER_NAME, _name(self.call))
            write_word(self._address + LETTER_WRITTEN, written + 1)
        else:
            if read_word(self._address + LETTER_NAME) != _name(self.call):
                called = f"rank {self._peer} called {text_of(self._text)}"
                raise CommError(f"{called} where {self.call} waits; both sides name the same tensor")
            chunk.copy_(room)
            write_word(self._address + LETTER_READ, read + 1)
        self._moved += MAILBOX
        self._mail.circle.moved()
        self.ended = self._moved >= self._bytes.numel()
        return True

    def _finish(self) -> Tensor:
        peer = self._mail.segment.words(self._peer)
        with Patience(self._timeout_s, self._mail.circle) as patience:

            def arrived() -> bool:
                if not self.done():
                    patience.check({self._peer: int(peer[PID])}, self.call)
                return self.ended

            poll(arrived, self._mail.abort, self.call)
        return self._x


@final
class Mailboxes:
    """All letters of one rank that have not arrived yet, in the order they were given, a queue for each box.

    kin: the groups, this one among them, that advance while this rank waits for a letter · circle: told of what moves.
    """

    def __init__(
        self, segment: Segment, rank: int, abort: AbortWord, kin: "WeakSet[Advancing]", circle: Standstill
    ) -> None:
        self.segment, self.rank, self.abort, self._kin, self.circle = segment, rank, abort, kin, circle
        self._queues: dict[tuple[int, int], deque[_Letter]] = {}

    def send(self, x: Tensor, destination: int, call: Call, timeout_s: float) -> Handle:
        """Hand over `x`; what fits the box is on its way at once."""
        return self._queued(x, (self.rank, destination), call, timeout_s)

    def recv(self, x: Tensor, source: int, call: Call, timeout_s: float) -> Handle:
        """Fill `x`, which is contiguous."""
        return self._queued(x, (source, self.rank), call, timeout_s)

    def advance_all(self) -> None:
        """Advance all that this rank has under way, here and in the groups akin."""
        for group in tuple(self._kin):
            group.advance()

    def progress(self) -> None:
        """Move whatever can be moved."""
        for queue in self._queues.values():
            while queue and queue[0].move():
                if queue[0].ended:
                    queue.popleft()

    def _queued(self, x: Tensor, pair: tuple[int, int], call: Call, timeout_s: float) -> Handle:
        letter = _Letter(call, x, pair, self, timeout_s)
        self._queues.setdefault(pair, deque()).append(letter)
        self.progress()
        return letter


def _name(call: Call) -> int:
    shape = call.detail.split(", to rank")[0].split(", from rank")[0]
    digest = blake2b(f"{call.dtype}/{shape}/{call.tag}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
