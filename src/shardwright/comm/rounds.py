"""Compiled rounds: post what this rank hands over, wait for all, and for small tensors sum in the same call.

A group's state is one int64 array, so that a call from Python passes four integers and a compiled step passes the same.
A round's fingerprint is compared with every rank's before its data is used.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types

from shardwright.comm.atomics import LINE, SLEEPS, await_word, claim, load_acquire, pointer_to, publish, store_release
from shardwright.comm.compiled import compiled
from shardwright.comm.segment import FINGERPRINT, SLEEPERS, SLOT, STRIDE

RANK, RANKS, CONTROL, SLOTS, ABORT, SPINS, FUTEX, NAP, ROUND, EXCHANGE, STEP, WAITED, CLOCK = range(13)
"""Places in the state: who and how many · addresses of control words, slots and abort word · looks before yielding ·
the futex call · address of the timespec · rounds posted · exchanges begun, whose parity is the buffer · steps made of
`comm.shares` · nanoseconds waited inside compiled code · two words in which it reads the clock."""

LENGTH = CLOCK + 2

STRETCH = 128
"""Floats copied at a time."""

AHEAD = 1024
"""Bytes by which a line is claimed before it is written: the other ranks' caches have to let go of it first."""

CORNER = 1 << 16
"""Bytes of a slot in which a small tensor lies; the next one lies in the next, so that its lines have left the other
ranks' caches when they are written again."""

_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))

DONE, FAILED, AGAIN, DIFFERENT = 0, -1, 1, 2
"""What a wait gives: all have posted · a rank has failed · time has passed · 2 + who called something else."""


_floats = pointer_to(types.float32, ir.FloatType())


@compiled("int64(int64[::1], int64)")
def look(state: Any, fingerprint: int) -> int:
    """What a wait for this round would give now: who has posted it has posted this fingerprint, and are they all?"""
    number, code = state[ROUND], DONE
    for other in range(state[RANKS]):
        word = state[CONTROL] + other * STRIDE
        if load_acquire(word) < number:
            code = AGAIN
        elif load_acquire(word + 8 * (FINGERPRINT + (number & 1))) != fingerprint:
            return DIFFERENT + other
    return FAILED if code == AGAIN and load_acquire(state[ABORT]) != 0 else code


@compiled("int64(int64[::1], int64, int64)")
def await_all(state: Any, fingerprint: int, sleeps: int) -> int:
    """Wait until every rank has posted this round, with this fingerprint; `AGAIN` after so many sleeps."""
    rank, number = state[RANK], state[ROUND]
    for other in range(state[RANKS]):
        if other != rank:
            word = state[CONTROL] + other * STRIDE
            sleepers, abort = word + 8 * SLEEPERS, state[ABORT]
            code = await_word(word, number, sleepers, abort, state[SPINS], state[FUTEX], state[NAP], sleeps)
            if code == AGAIN:
                return look(state, fingerprint)
            if code != DONE:
                return code
            if load_acquire(word + 8 * (FINGERPRINT + (number & 1))) != fingerprint:
                return DIFFERENT + other
    return DONE


@compiled("void(int64[::1], int64)")
def post(state: Any, fingerprint: int) -> None:
    """Say that this rank's part of the next round lies in its slot."""
    state[ROUND] += 1
    number = state[ROUND]
    word = state[CONTROL] + state[RANK] * STRIDE
    store_release(word + 8 * (FINGERPRINT + (number & 1)), fingerprint)
    publish(word, number, word + 8 * SLEEPERS, state[FUTEX])


@compiled("int64(int64[::1], int64, int64)")
def _slot(state: Any, rank: int, exchange: int) -> int:
    return state[SLOTS] + (2 * rank + (exchange & 1)) * SLOT


@compiled("int64(int64, int64)")
def corner(exchange: int, nbytes: int) -> int:
    """Where in its slot a tensor of so many bytes, a slot's at most, begins."""
    room = max(1, -(-nbytes // CORNER)) * CORNER
    return (exchange >> 1) % (SLOT // room) * room


@compiled("void(int64, int64, int64)")
def copy(target: int, source: int, n: int) -> None:
    """Floats from one address to another."""
    to, what = carray(_floats(target), (n,)), carray(_floats(source), (n,))
    whole = n // STRETCH * STRETCH
    for start in range(0, whole, STRETCH):
        for line in range(4 * start, 4 * (start + STRETCH), LINE):
            claim(target + line + AHEAD)
        for i in range(start, start + STRETCH):
            to[i] = what[i]
    for i in range(whole, n):
        to[i] = what[i]


@compiled("void(int64, int64, int64, int64)")
def add(total: int, a: int, b: int, n: int) -> None:
    """`total` = a + b, floats at three addresses."""
    to, first, second = carray(_floats(total), (n,)), carray(_floats(a), (n,)), carray(_floats(b), (n,))
    for i in range(n):
        to[i] = first[i] + second[i]


@compiled("void(int64, int64, int64)")
def add_to(total: int, part: int, n: int) -> None:
    """`total` += part."""
    to, what = carray(_floats(total), (n,)), carray(_floats(part), (n,))
    for i in range(n):
        to[i] += what[i]


@compiled("void(int64[::1], int64, int64)")
def sum_float32(state: Any, out: int, n: int) -> None:
    """`out` = the sum of all small tensors of this exchange, two or more, in rank order."""
    exchange, at = state[EXCHANGE], corner(state[EXCHANGE], 4 * n)
    add(out, _slot(state, 0, exchange) + at, _slot(state, 1, exchange) + at, n)
    for rank in range(2, state[RANKS]):
        add_to(out, _slot(state, rank, exchange) + at, n)


@compiled("int64(int64[::1], int64, int64, int64, int64)")
def all_reduce_float32(state: Any, fingerprint: int, x: int, out: int, n: int) -> int:
    """Copy x into the slot, post, wait, sum: n elements that fit a slot. Unless `DONE`, the sum is still to be made."""
    state[EXCHANGE] += 1
    copy(_slot(state, state[RANK], state[EXCHANGE]) + corner(state[EXCHANGE], 4 * n), x, n)
    post(state, fingerprint)
    code = await_all(state, fingerprint, SLEEPS)
    if code == DONE:
        sum_float32(state, out, n)
    return code


@njit("int64(int64[::1])", nogil=True)
def now(state: Any) -> int:
    """The monotonic clock, in nanoseconds."""
    _clock_gettime(1, state.ctypes.data + 8 * CLOCK)
    return state[CLOCK] * 1_000_000_000 + state[CLOCK + 1]


@compiled("int64(int64[::1])")
def begin(state: Any) -> int:
    """Begin an exchange from compiled code: the address of this rank's slot, to be filled and posted."""
    state[EXCHANGE] += 1
    return _slot(state, state[RANK], state[EXCHANGE])


@compiled("int64(int64[::1], int64, int64)")
def finish(state: Any, fingerprint: int, patience: int) -> int:
    """Post the slot that `begin` gave and wait for all others; `slot_of` then tells where they lie.

    patience: how often a wait that gives `AGAIN` is taken up again, about a tenth of a second each.
    """
    start = now(state)
    post(state, fingerprint)
    code = await_all(state, fingerprint, SLEEPS)
    while code == AGAIN and patience > 0:
        patience -= 1
        code = await_all(state, fingerprint, SLEEPS)
    state[WAITED] += now(state) - start
    return code


@compiled("int64(int64[::1], int64)")
def slot_of(state: Any, rank: int) -> int:
    """Address of a rank's slot in the exchange under way."""
    return _slot(state, rank, state[EXCHANGE])


@compiled("int64(int64[::1], int64, int64, int64, int64)")
def finish_adding_float32(state: Any, fingerprint: int, x: int, n: int, patience: int) -> int:
    """`finish`, then add the sum of all slots, in rank order, to `x`."""
    code = finish(state, fingerprint, patience)
    if code != DONE:
        return code
    total = carray(_floats(x), (n,))
    first = carray(_floats(_slot(state, 0, state[EXCHANGE])), (n,))
    if state[RANKS] == 1:
        for i in range(n):
            total[i] += first[i]
        return DONE
    if state[RANKS] == 2:
        second = carray(_floats(_slot(state, 1, state[EXCHANGE])), (n,))
        for i in range(n):
            total[i] += first[i] + second[i]
        return DONE
    for i in range(n):
        part = first[i]
        for rank in range(1, state[RANKS]):
            part += carray(_floats(_slot(state, rank, state[EXCHANGE])), (n,))[i]
        total[i] += part
    return DONE


def new_state() -> Any:
    """A group's state, all zero."""
    return np.zeros(LENGTH, np.int64)
