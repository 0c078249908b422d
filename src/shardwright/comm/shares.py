"""The large all-reduce, compiled: pieces on their way through the slots, each rank summing its share of every piece.

One round a piece. Between two of them a rank copies out what the others summed of the piece before the last, sums its
share of the last one, and lays the next one out. A rank's two slots are four buffers in turn: who writes to one again
has seen all ranks post a round after their last look at it.
"""

from typing import Any

from shardwright.comm.atomics import LINE
from shardwright.comm.compiled import compiled
from shardwright.comm.rounds import (
    AGAIN,
    DONE,
    EXCHANGE,
    RANK,
    RANKS,
    SLOTS,
    STEP,
    add,
    add_to,
    await_all,
    copy,
    post,
)
from shardwright.comm.segment import SLOT

FLOATS, BLOCK = LINE // 4, 1024
"""Floats of a cache line, and of what is summed at a time."""

PIECE = SLOT // 2 // 4
"""Floats of a piece: half a slot."""


@compiled("void(int64[::1])")
def begin(state: Any) -> None:
    """Begin an exchange, of as many pieces as it will take."""
    state[EXCHANGE] += 1
    state[STEP] = 0


@compiled("int64(int64[::1], int64)")
def _buffer(state: Any, piece: int) -> int:
    """Which of four: the first lies in the slot whose turn it is."""
    return (2 * (state[EXCHANGE] & 1) + piece) & 3


@compiled("int64(int64[::1], int64, int64)")
def _place(state: Any, rank: int, piece: int) -> int:
    """Where a piece lies in a rank's slots."""
    return state[SLOTS] + 2 * rank * SLOT + 4 * PIECE * _buffer(state, piece)


@compiled("int64(int64, int64, int64)")
def _edge(n: int, rank: int, ranks: int) -> int:
    """Where a rank's share of n floats begins: at a whole cache line."""
    return n if rank == ranks else n * rank // ranks // FLOATS * FLOATS


@compiled("void(int64[::1], int64, int64, int64)")
def _share(state: Any, x: int, piece: int, n: int) -> None:
    """Lay out what the others sum."""
    rank, ranks, mine = state[RANK], state[RANKS], _place(state, state[RANK], piece)
    width, at = min(PIECE, n - piece * PIECE), x + 4 * PIECE * piece
    low, high = _edge(width, rank, ranks), _edge(width, rank + 1, ranks)
    copy(mine, at, low)
    copy(mine + 4 * high, at + 4 * high, width - high)


@compiled("void(int64[::1], int64, int64, int64, int64)")
def _sum(state: Any, x: int, out: int, piece: int, n: int) -> None:
    """Sum this rank's share of all slots, and of x in place of its own, in rank order, into its slot and `out`.

    By blocks that stay in the first cache; `out` is written when a block's sum is complete.
    """
    rank, ranks, mine = state[RANK], state[RANKS], _place(state, state[RANK], piece)
    width, offset = min(PIECE, n - piece * PIECE), 4 * PIECE * piece
    low, high = _edge(width, rank, ranks), _edge(width, rank + 1, ranks)
    first = x + offset if rank == 0 else _place(state, 0, piece)
    second = x + offset if rank == 1 else _place(state, 1, piece)
    for start in range(low, high, BLOCK):
        size, at = min(BLOCK, high - start), 4 * start
        add(mine + at, first + at, second + at, size)
        for other in range(2, ranks):
            part = x + offset if rank == other else _place(state, other, piece)
            add_to(mine + at, part + at, size)
        copy(out + offset + at, mine + at, size)


@compiled("void(int64[::1], int64, int64, int64)")
def _collect(state: Any, out: int, piece: int, n: int) -> None:
    """Copy the shares that the other ranks summed out of their slots."""
    ranks, width, to = state[RANKS], min(PIECE, n - piece * PIECE), out + 4 * PIECE * piece
    for other in range(ranks):
        if other != state[RANK]:
            low, high = 4 * _edge(width, other, ranks), 4 * _edge(width, other + 1, ranks)
            copy(to + low, _place(state, other, piece) + low, (high - low) // 4)


@compiled("int64(int64[::1], int64, int64, int64, int64)")
def advance(state: Any, fingerprint: int, x: int, out: int, n: int) -> int:
    """Sum the n floats at `x` into `out`, which may be `x`: `DONE`, or `AGAIN` where others are to be waited for."""
    pieces = -(-n // PIECE)
    while True:
        step = state[STEP]
        if step > 1:
            _collect(state, out, step - 2, n)
        if step > pieces:
            state[EXCHANGE] += (_buffer(state, pieces - 1) >> 1) ^ (
                state[EXCHANGE] & 1
            )  # the next takes the other slot
            return DONE
        if step > 0:
            _sum(state, x, out, step - 1, n)
        if step < pieces:
            _share(state, x, step, n)
        post(state, fingerprint)
        state[STEP] = step + 1
        if step == 0 or await_all(state, fingerprint, 0) != DONE:
            return AGAIN
