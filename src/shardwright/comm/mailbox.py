"""Sends and receives between two ranks that share memory: one box for each ordered pair, a chunk at a time.

A letter advances whenever its owner waits for anything, so that a large send does not block the receive behind it.
"""

from collections import deque
from hashlib import blake2b
from typing import final

import torch
from torch import Tensor

from shardwright.comm.atomics import read_word, write_word
from shardwright.comm.group import Call, Handle
from shardwright.comm.segment import MAILBOX, Segment
from shardwright.comm.watch import AbortWord, poll
from shardwright.errors import CommError

WRITTEN, READ, NAME = 0, 8, 16
"""Where a box keeps its counters, chunks written and chunks read, and the fingerprint of the letter in it."""


@final
class _Letter(Handle):
    """One tensor on its way out of this rank or into it; `move` advances it by a chunk, if the box allows."""

    def __init__(self, call: Call, x: Tensor, box: tuple[int, Tensor], mail: "Mailboxes", *, outgoing: bool) -> None:
        super().__init__(call)
        self._x, self._mail, self._outgoing = x, mail, outgoing
        self._address, self._room = box
        self._bytes = x.contiguous().view(-1).view(torch.uint8)
        self._moved = 0
        self.ended = False

    def done(self) -> bool:
        """Whether all of it has moved."""
        self._mail.progress()
        return self.ended

    def move(self) -> bool:
        """Write or read the next chunk; whether that was possible."""
        written, read = read_word(self._address + WRITTEN), read_word(self._address + READ)
        if (written == read) != self._outgoing:
            return False
        chunk = self._bytes[self._moved : self._moved + MAILBOX]
        room = self._room[: chunk.numel()]
        if self._outgoing:
            room.copy_(chunk)
            write_word(self._address + NAME, _name(self.call))
            write_word(self._address + WRITTEN, written + 1)
        else:
            if read_word(self._address + NAME) != _name(self.call):
                raise CommError(f"another tensor came where {self.call} waits; both sides name the same one")
            chunk.copy_(room)
            write_word(self._address + READ, read + 1)
        self._moved += MAILBOX
        self.ended = self._moved >= self._bytes.numel()
        return True

    def _finish(self) -> Tensor:
        poll(self.done, self._mail.abort, self.call)
        return self._x


@final
class Mailboxes:
    """All letters of one rank that have not arrived yet, in the order they were given, a queue for each box."""

    def __init__(self, segment: Segment, rank: int, abort: AbortWord) -> None:
        self.segment, self.rank, self.abort = segment, rank, abort
        self._queues: dict[tuple[int, int], deque[_Letter]] = {}

    def send(self, x: Tensor, destination: int, call: Call) -> Handle:
        """Hand over `x`; what fits the box is on its way at once."""
        return self._queued(x, (self.rank, destination), call, outgoing=True)

    def recv(self, x: Tensor, source: int, call: Call) -> Handle:
        """Fill `x`, which is contiguous."""
        return self._queued(x, (source, self.rank), call, outgoing=False)

    def progress(self) -> None:
        """Move whatever can be moved."""
        for queue in self._queues.values():
            while queue and queue[0].move():
                if queue[0].ended:
                    queue.popleft()

    def _queued(self, x: Tensor, pair: tuple[int, int], call: Call, *, outgoing: bool) -> Handle:
        letter = _Letter(call, x, self.segment.mailbox(*pair), self, outgoing=outgoing)
        self._queues.setdefault(pair, deque()).append(letter)
        self.progress()
        return letter


def _name(call: Call) -> int:
    shape = call.detail.split(", to rank")[0].split(", from rank")[0]
    digest = blake2b(f"{call.dtype}/{shape}/{call.tag}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
