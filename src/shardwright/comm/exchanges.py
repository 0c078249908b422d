"""The collectives over shared memory, round by round: what a rank lays into its slots, and what it takes out of all.

Each is a generator that yields wherever all ranks must have posted a round before it goes on. Two slots a rank take
turns, so no round is needed to free one: who writes to a slot again has seen all ranks post a round after their last
look at it. Knows nothing of waiting, nor of what else is under way.
"""

from collections.abc import Generator, Iterable
from functools import lru_cache
from hashlib import blake2b
from math import prod
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwright.comm import rounds, shares
from shardwright.comm.group import Call, put, sum_in_rank_order
from shardwright.comm.segment import SLOT, Segment, bytes_of
from shardwright.errors import CommError
from shardwright.layout.partition import Partition

ONE_SHOT = 1 << 20
"""Bytes, of all ranks together and at most a slot of each, up to which every rank sums all of an all-reduce; above,
each sums its share and the others copy it."""

Rounds = Generator[None, None, Tensor]


@final
class Exchanges:
    """The collectives of one rank. state: see `comm.rounds`.

    one_shot: bytes of a tensor up to which an all-reduce takes one round.
    """

    def __init__(self, segment: Segment, rank: int, state: NDArray[np.int64]) -> None:
        self._segment, self._rank, self._size, self._state = segment, rank, segment.ranks, state
        self.one_shot = min(SLOT, ONE_SHOT // segment.ranks)

    def reduced(self, x: Tensor, out: Tensor | None, call: Call) -> Rounds:
        """The sum of all tensors, in `out` if that is given."""
        direct = out is not None and out.is_contiguous()
        y = out if out is not None and direct else torch.empty_like(x)
        flat, total = x.view(-1), y.detach().view(-1)
        if x.nbytes <= self.one_shot:
            buffer, at = self._buffer(), rounds.corner(self._state[rounds.EXCHANGE], x.nbytes)
            whole = [self._segment.slot(rank, buffer)[at:] for rank in range(self._size)]
            slots = [_typed(slot, x.dtype, flat.numel()) for slot in whole]
            slots[self._rank].copy_(flat)
            self._post(call)
            yield
            total.copy_(sum_in_rank_order(slots))
        elif is_plain(x) and is_plain(y):
            yield from self._reduced_plainly(flat, total, call)
        else:
            piece = SLOT // x.itemsize
            for start in range(0, flat.numel(), piece):
                yield from self._reduced_piece(flat[start : start + piece], total[start : start + piece], call)
        return y if direct else put(y, out)

    def _reduced_plainly(self, x: Tensor, y: Tensor, call: Call) -> Generator[None, None, None]:
        """All pieces, compiled, which comes back only where another rank is late."""
        fingerprint = fingerprint_of(call)
        shares.begin(self._state)
        while shares.advance(self._state, fingerprint, x.data_ptr(), y.data_ptr(), x.numel()) != rounds.DONE:
            yield

    def _reduced_piece(self, x: Tensor, y: Tensor, call: Call) -> Generator[None, None, None]:
        """Each rank sums its share of a piece and leaves it in its slot, from where the others copy it."""
        buffer, cut = self._buffer(), Partition.balanced(x.numel(), self._size)
        slots = [_typed(self._segment.slot(rank, buffer), x.dtype, x.numel()) for rank in range(self._size)]
        low, high = cut.range(self._rank)
        mine = slots[self._rank]
        mine[:low].copy_(x[:low])
        mine[high:].copy_(x[high:])
        self._post(call)
        yield
        parts = [x[low:high] if rank == self._rank else slots[rank][low:high] for rank in range(self._size)]
        mine[low:high] = sum_in_rank_order(parts)
        y[low:high] = mine[low:high]
        self._post(call)
        yield
        for rank in range(self._size):
            if rank != self._rank:
                start, stop = cut.range(rank)
                y[start:stop].copy_(slots[rank][start:stop])

    def gathered(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Rounds:
        """All tensors joined along their first dim, which becomes `dim`."""
        y = x.new_empty(sum(sizes), *x.shape[1:])
        places = [bytes_of(part) for part in torch.split(y, sizes)]
        source = bytes_of(x)
        for start in _pieces(max(place.numel() for place in places), SLOT):
            buffer = self._buffer()
            _copy(source[start : start + SLOT], self._segment.slot(self._rank, buffer))
            self._post(call)
            yield
            for rank, place in enumerate(places):
                _fill(place[start : start + SLOT], self._segment.slot(rank, buffer))
        return y.movedim(0, dim).contiguous()

    def scattered(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Rounds:
        """This rank's share, along the first dim, of the sum; the dim becomes `dim`."""
        shares = [part.reshape(-1) for part in torch.split(x, sizes)]
        y = torch.empty_like(shares[self._rank])
        room = SLOT // self._size // x.element_size()
        for start in _pieces(max(share.numel() for share in shares), room):
            buffer = self._buffer()
            mine = _typed(self._segment.slot(self._rank, buffer), x.dtype, room * self._size)
            for rank, share in enumerate(shares):
                _copy(share[start : start + room], mine[rank * room :])
            self._post(call)
            yield
            at, width = self._rank * room, len(y[start : start + room])
            slots = (_typed(self._segment.slot(rank, buffer), x.dtype, room * self._size) for rank in range(self._size))
            y[start : start + width] = sum_in_rank_order([slot[at : at + width] for slot in slots])
        return y.view(sizes[self._rank], *x.shape[1:]).movedim(0, dim).contiguous()

    def dealt(self, x: Tensor, send: list[int], receive: list[int], call: Call) -> Rounds:
        """The rows that all ranks send to this one."""
        longest = yield from self._longest(send, receive, call)
        y = x.new_empty(sum(receive), *x.shape[1:])
        room = SLOT // self._size
        parts, places = [bytes_of(p) for p in torch.split(x, send)], [bytes_of(p) for p in torch.split(y, receive)]
        for start in _pieces(longest * prod(x.shape[1:]) * x.itemsize, room):
            buffer = self._buffer()
            for rank, part in enumerate(parts):
                _copy(part[start : start + room], self._segment.slot(self._rank, buffer)[rank * room :])
            self._post(call)
            yield
            for rank, place in enumerate(places):
                _fill(place[start : start + room], self._segment.slot(rank, buffer)[self._rank * room :])
        return y

    def _longest(self, send: list[int], receive: list[int], call: Call) -> Generator[None, None, int]:
        """The most rows that one rank sends another, once all ranks' numbers fit each other's."""
        buffer, n = self._buffer(), self._size
        numbers = [_typed(self._segment.slot(rank, buffer), torch.int64, 2 * n).view(2, n) for rank in range(n)]
        numbers[self._rank].copy_(torch.tensor([send, receive]))
        self._post(call)
        yield
        sent, expected = torch.stack(numbers, 1)
        for source, rank in (sent != expected.T).nonzero().tolist():
            raise CommError(
                f"{call}: rank {source} sends {int(sent[source, rank])} rows to rank {rank}, which expects "
                f"{int(expected[rank, source])}; fix the counts"
            )
        return int(sent.max())

    def spread(self, x: Tensor, root: int, call: Call) -> Rounds:
        """The root's tensor."""
        y = x.clone()
        for start in _pieces(x.nbytes, SLOT):
            buffer = self._buffer()
            if self._rank == root:
                _copy(bytes_of(x)[start : start + SLOT], self._segment.slot(root, buffer))
            self._post(call)
            yield
            if self._rank != root:
                _fill(bytes_of(y)[start : start + SLOT], self._segment.slot(root, buffer))
        return y

    def met(self, call: Call) -> Rounds:
        """Nothing."""
        self._buffer()
        self._post(call)
        yield
        return torch.empty(0)

    def _post(self, call: Call) -> None:
        rounds.post(self._state, fingerprint_of(call))

    def _buffer(self) -> int:
        """The slots of a new exchange."""
        self._state[rounds.EXCHANGE] += 1
        return int(self._state[rounds.EXCHANGE]) & 1


@lru_cache(maxsize=4096)
def fingerprint_of(call: Call) -> int:
    """What all ranks must agree on about a call, in 64 bits, never 0."""
    said = f"{call.op}/{call.dtype}/{call.detail}/{call.tag}"
    return int.from_bytes(blake2b(said.encode(), digest_size=8).digest(), "little", signed=True) or 1


def is_plain(x: Tensor) -> bool:
    """Whether compiled code may read and write it by its address."""
    return x.dtype == torch.float32 and x.is_contiguous() and x.is_cpu and not x.is_neg()


def _pieces(size: int, room: int) -> Iterable[int]:
    """Where pieces of at most `room` start; one round even for nothing, so that a call is never silent."""
    return range(0, max(size, 1), room)


def _typed(slot: Tensor, dtype: torch.dtype, n: int) -> Tensor:
    return slot[: n * dtype.itemsize].view(dtype)


def _copy(part: Tensor, slot: Tensor) -> None:
    """Into a slot, whose end may lie beyond the part's."""
    slot[: part.numel()].copy_(part)


def _fill(part: Tensor, slot: Tensor) -> None:
    """Out of a slot."""
    part.copy_(slot[: part.numel()])
