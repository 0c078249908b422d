"""Decoding by a whole decoder, compiled: from B tokens to logits and to the tokens that follow, collectives included.

It is the blocks in the decoder's order, over addresses that `models.compiled` collects from the layers. Weights are
float32, or bfloat16 as its bits; values, norms, biases and KV pages are float32 in both.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types

from shardwright.comm.atomics import pointer_to
from shardwright.comm.compiled import compiled
from shardwright.comm.rounds import DONE, RANKS, begin, finish, finish_adding_float32, now, slot_of
from shardwright.kernels.cpu.blocks import add_row, argmax, attend, copy_row, matvec, rms_norm, rotate, swiglu

LAYERS, HIDDEN, HEADS, KV_HEADS, SIZE, FEED_FORWARD, FIRST_WORD, WORDS, PAGE, HALF, KV_INDEX = range(11)
"""Places in `dims`: layers · H · N_r · K_r · D · F_r · first of the words this rank holds · V_r · tokens in a KV page ·
1 where weights are bfloat16 · then, for each query head, the KV head it reads."""

NORM, QKV, QKV_BIAS, Q_NORM, K_NORM, OUT, OUT_BIAS, KEYS, VALUES = range(9)
MLP_NORM, GATE_UP, GATE_UP_BIAS, DOWN, DOWN_BIAS, ATTENTION_CALL, MLP_CALL, WINDOW, FIELDS = range(9, 18)
"""Columns of `plan`, a row a layer: addresses of its tensors (0 where it has none), the fingerprints of its two
all-reduces, and how many tokens it looks back over (0 for all). The row behind the last layer holds what no layer does,
under `FINAL_NORM` and so on."""

FINAL_NORM, LOGITS, EMBEDDING, EMBEDDING_CALL, TOKEN_CALL = range(5)
"""Columns of that row: the last norm, the table of logits, that of embeddings, and the fingerprints of the exchanges
that fetch embeddings and find the likeliest tokens."""

SIGNATURE = (
    "int64(int64[::1], int64[:, ::1], int64[::1], float64, float32[:, :, ::1], int64[:, ::1], int64[::1], "
    "int64[::1], int64, float32[::1], float32[:, ::1], int64[:, ::1])"
)
"""Given beforehand, so that importing this file compiles the loop, or loads it, and no rank ever does."""

PATIENCE = 300
"""Waits of a tenth of a second before a step gives up, and Python looks at who is missing."""


_float64_at = pointer_to(types.float64, ir.DoubleType())
_float32_at = pointer_to(types.float32, ir.FloatType())
_uint16_at = pointer_to(types.uint16, ir.IntType(16))


@njit(nogil=True)
def _project(dims: Any, weight: int, x: Any, y: Any) -> None:
    """`y [B, O] = x [B, I] @ w.T`, whichever dtype the weight at that address has."""
    shape = (y.shape[1], x.shape[1])
    if dims[HALF]:
        matvec(carray(_uint16_at(weight), shape), x, y)
    else:
        matvec(carray(_float32_at(weight), shape), x, y)


@njit(nogil=True)
def _with_bias(address: int, y: Any) -> None:
    if address:
        add_row(carray(_float32_at(address), (y.shape[1],)), y)


@njit(nogil=True)
def _normed(address: int, eps: float, x: Any, y: Any) -> None:
    rms_norm(x, carray(_float32_at(address), (x.shape[1],)), eps, y)


@njit(nogil=True)
def _heads(row: Any, dims: Any, eps: float, angles: Any, table: Any, held: int, qkv: Any, scores: Any, y: Any) -> None:
    """One sequence's token, the last of `held`: norms and turns q and k, stores k and v in its pages, attends."""
    n, k, size, page = dims[HEADS], dims[KV_HEADS], dims[SIZE], dims[PAGE]
    heads, at, place = qkv.reshape((n + 2 * k, size)), table[(held - 1) // page], (held - 1) % page
    if row[Q_NORM]:
        _normed(row[Q_NORM], eps, heads[:n], heads[:n])
        _normed(row[K_NORM], eps, heads[n : n + k], heads[n : n + k])
    rotate(angles[held - 1, 0], angles[held - 1, 1], heads[: n + k])
    pages = (1 << 40) // (page * k * size + 1)  # carray wants a length; the table keeps to the pages there are
    keys = carray(_float32_at(row[KEYS]), (pages, page, k, size))
    values = carray(_float32_at(row[VALUES]), (pages, page, k, size))
    keys[at, place] = heads[n : n + k]
    values[at, place] = heads[n + k :]
    first = max(held - row[WINDOW], 0) if row[WINDOW] else 0
    attend(heads[:n], keys, values, table, first, held, dims[KV_INDEX:], scores, y.reshape((n, size)))


@njit(nogil=True)
def _embed(state: Any, last: Any, dims: Any, tokens: Any, x: Any) -> int:
    """`x [B, H]` = the tokens' rows, each of which one rank has."""
    slot, shape = carray(_float32_at(begin(state)), x.shape), (dims[WORDS], dims[HIDDEN])
    for s in range(len(tokens)):
        word = tokens[s] - dims[FIRST_WORD]
        if word < 0 or word >= dims[WORDS]:
            slot[s] = 0
        elif dims[HALF]:
            copy_row(carray(_uint16_at(last[EMBEDDING]), shape)[word], slot[s])
        else:
            copy_row(carray(_float32_at(last[EMBEDDING]), shape)[word], slot[s])
    x[:] = 0
    return finish_adding_float32(state, last[EMBEDDING_CALL] + x.size, x.ctypes.data, x.size, PATIENCE)


@njit(nogil=True)
def _add_reduced(state: Any, fingerprint: int, weight: int, bias: int, dims: Any, part: Any, x: Any) -> int:
    """`x += all_reduce(part @ w.T) + bias`: the product goes straight into the shared slot."""
    y = carray(_float32_at(begin(state)), x.shape)
    _project(dims, weight, part, y)
    code = finish_adding_float32(state, fingerprint + x.size, x.ctypes.data, x.size, PATIENCE)
    _with_bias(bias, x)
    return code


@njit(nogil=True)
def _likeliest(state: Any, last: Any, dims: Any, logits: Any, over: bool, tokens: Any) -> Any:
    """`tokens [B]` = the words of the largest logits of all ranks, the lowest of equal ones, or -1 where there is none.

    Gives a wait's code, and whether rank 0 found that it is `over`: all ranks go by one clock.
    """
    count = len(tokens)
    mine = carray(_float64_at(begin(state)), (count + 1, 2))
    mine[count, 0] = over
    for s in range(count):
        mine[s, 0] = -np.inf
        if dims[WORDS]:
            place = argmax(logits[s])
            mine[s, 0], mine[s, 1] = logits[s, place], dims[FIRST_WORD] + place
    code = finish(state, last[TOKEN_CALL] + count, PATIENCE)
    if code != DONE:
        return code, True
    for s in range(count):
        top, tokens[s] = -np.inf, -1
        for rank in range(state[RANKS]):
            offer = carray(_float64_at(slot_of(state, rank)), (count, 2))[s]
            if offer[0] > top:
                top, tokens[s] = offer[0], int(offer[1])
    return DONE, carray(_float64_at(slot_of(state, 0)), (count + 1, 2))[count, 0] != 0


@njit(nogil=True)
def _step(
    state: Any,
    plan: Any,
    dims: Any,
    eps: float,
    angles: Any,
    tables: Any,
    held: Any,
    room: Any,
    logits: Any,
    tokens: Any,
) -> int:
    """One token of each sequence, the last that it holds: `tokens [B]` → `logits [B, V_r]`; a wait's code."""
    b, n, size, f = len(tokens), dims[HEADS], dims[SIZE], dims[FEED_FORWARD]
    h, wide, last = dims[HIDDEN], (dims[HEADS] + 2 * dims[KV_HEADS]) * dims[SIZE], plan[dims[LAYERS]]
    x, room = room[: b * h].reshape((b, h)), room[b * h :]
    normed, room = room[: b * h].reshape((b, h)), room[b * h :]
    qkv, room = room[: b * wide].reshape((b, wide)), room[b * wide :]
    seen, room = room[: b * n * size].reshape((b, n * size)), room[b * n * size :]
    gate_up, room = room[: b * 2 * f].reshape((b, 2 * f)), room[b * 2 * f :]
    inner, scores = room[: b * f].reshape((b, f)), room[b * f :]
    code = _embed(state, last, dims, tokens, x)
    if code != DONE:
        return code
    for layer in range(dims[LAYERS]):
        row = plan[layer]
        _normed(row[NORM], eps, x, normed)
        _project(dims, row[QKV], normed, qkv)
        _with_bias(row[QKV_BIAS], qkv)
        for s in range(b):
            _heads(row, dims, eps, angles, tables[s], held[s], qkv[s], scores, seen[s])
        code = _add_reduced(state, row[ATTENTION_CALL], row[OUT], row[OUT_BIAS], dims, seen, x)
        if code != DONE:
            return code
        _normed(row[MLP_NORM], eps, x, normed)
        _project(dims, row[GATE_UP], normed, gate_up)
        _with_bias(row[GATE_UP_BIAS], gate_up)
        swiglu(gate_up, inner)
        code = _add_reduced(state, row[MLP_CALL], row[DOWN], row[DOWN_BIAS], dims, inner, x)
        if code != DONE:
            return code
    _normed(last[FINAL_NORM], eps, x, normed)
    _project(dims, last[LOGITS], normed, logits)
    return DONE


@compiled(SIGNATURE)
def decode(
    state: Any,
    plan: Any,
    dims: Any,
    eps: float,
    angles: Any,
    tables: Any,
    held: Any,
    stops: Any,
    piece: int,
    room: Any,
    logits: Any,
    tokens: Any,
) -> int:
    """Advance B sequences by their likeliest tokens, `tokens [0]` → `tokens [1]` and so on, one or more of each.

    It ends where `tokens [1 + most, B]` is full, behind one of `stops` or a -1, or where the next token would come
    later than `piece` nanoseconds from now. state: the group's (see `comm.rounds`) · angles `[positions, 2, D/2]` cos
    and sin · tables `[B, pages]` · held `[B]`: tokens in the pages with the first new one, advanced by what was made ·
    room: float32 to work in, see `room_needed` · logits `[B, V_r]`: the last ones. Gives `DONE`, or a wait's code where
    a rank is missing or differs.
    """
    made, over, start = 0, False, now(state)
    while not over:
        code = _step(state, plan, dims, eps, angles, tables, held, room, logits, tokens[made])
        if code != DONE:
            return code
        made += 1
        late = (now(state) - start) * (made + 1) > piece * made
        code, over = _likeliest(state, plan[dims[LAYERS]], dims, logits, late, tokens[made])
        if code != DONE:
            return code
        held += 1
        over = over or made + 1 == len(tokens)
        for token in tokens[made]:
            over = over or token < 0
            for stop in stops:
                over = over or token == stop
    return DONE


def room_needed(dims: Any, sequences: int, held: int) -> int:
    """Floats that a step needs to work in, for that many sequences, the longest holding `held` tokens."""
    wide = (dims[HEADS] + 2 * dims[KV_HEADS]) * dims[SIZE]
    per_sequence = 2 * dims[HIDDEN] + wide + dims[HEADS] * dims[SIZE] + 3 * dims[FEED_FORWARD]
    return int(sequences * per_sequence + held)
