"""The small loops a decode step is made of, compiled: one new token of each of B sequences, every weight read once.

Values are float32; weights are float32, or bfloat16 as its bits, widened as they are read. Sums may be reordered
(`fastmath`), so results equal the torch path's to rounding. A function writes its result into its last argument.
"""

from math import sqrt
from typing import Any

from llvmlite.binding import get_host_cpu_features
from numba import njit, types

from shardwright.kernels.cpu.vectors import STEP, exp32, largest, products, widened

BLOCK = 1 << 17
"""Elements of the rows that every vector meets before the next rows are read: they stay in the second cache."""


def _meeting(rows: int, vectors: int, chains: int) -> Any:
    """A loop in which that many rows at a time meet that many vectors at a time."""
    product = products(rows, vectors, chains)

    @njit(fastmath=True, nogil=True)
    def meet(w: Any, x: Any, y: Any, first: int, last: int, begin: int, stop: int) -> int:
        """From `begin` on, whole groups of vectors meet the rows from `first` to `last`; the first vector left over."""
        whole = first + (last - first) // rows * rows
        end = begin + (x.shape[0] - begin) // vectors * vectors
        for b in range(begin, end, vectors):
            for o in range(first, whole, rows):
                found = product(w, o, x, b, stop)
                for r in range(rows):
                    for v in range(vectors):
                        y[b + v, o + r] = found[r * vectors + v]
            for o in range(whole, last):
                for v in range(vectors):
                    y[b + v, o] = one(w, o, x, b + v, stop)[0]
        return end

    return meet


one = products(1, 1, 2)
_meet_one, _meet_four = _meeting(1, 1, 2), _meeting(1, 4, 1)
_meet_eight = _meeting(2, 8, 1) if get_host_cpu_features().get("avx512f") else _meet_four
"""Sixteen sums take 32 registers; where there are 16, four are as good."""


@njit(fastmath=True, nogil=True)
def matvec(w: Any, x: Any, y: Any) -> None:
    """`y [B, O] = x [B, I] @ w [O, I].T`; w and x are contiguous."""
    rows, width = w.shape
    whole, step = width // STEP * STEP, BLOCK // max(width, 1) + 1
    for first in range(0, rows, step):
        last = min(first + step, rows)
        if whole:
            b = _meet_eight(w, x, y, first, last, 0, whole)
            b = _meet_four(w, x, y, first, last, b, whole)
            _meet_one(w, x, y, first, last, b, whole)
        else:
            y[:, first:last] = 0
        if whole < width:
            for b in range(x.shape[0]):
                for o in range(first, last):
                    y[b, o] += _rest(w[o], x[b], whole)


@njit(fastmath=True, nogil=True)
def _rest(row: Any, x: Any, start: int) -> Any:
    total = types.float32(0)
    for i in range(start, row.size):
        total += widened(row[i]) * x[i]
    return total


@njit(nogil=True)
def copy_row(row: Any, y: Any) -> None:
    """`y [H]` = a row of weights, in float32."""
    for i in range(row.size):
        y[i] = widened(row[i])


@njit(nogil=True)
def add_row(row: Any, y: Any) -> None:
    """Add `row [O]` to every row of `y [B, O]`."""
    for b in range(y.shape[0]):
        for i in range(y.shape[1]):
            y[b, i] += row[i]


@njit(fastmath=True, nogil=True)
def rms_norm(x: Any, weight: Any, eps: float, y: Any) -> None:
    """`y [B, H] = x / sqrt(mean(x²) + eps) * weight`; weight is float32."""
    for b in range(x.shape[0]):
        squares = types.float32(0)
        for i in range(x.shape[1]):
            squares += x[b, i] * x[b, i]
        scale = types.float32(1.0 / sqrt(squares / x.shape[1] + eps))
        for i in range(x.shape[1]):
            y[b, i] = x[b, i] * scale * weight[i]


@njit(fastmath=True, nogil=True)
def rotate(cos: Any, sin: Any, heads: Any) -> None:
    """Turn pairs (i, i + D/2) of `heads [n, D]` in place by one token's angles `[D/2]`."""
    half = cos.size
    for h in range(heads.shape[0]):
        for i in range(half):
            first, second = heads[h, i], heads[h, half + i]
            heads[h, i] = first * cos[i] - second * sin[i]
            heads[h, half + i] = second * cos[i] + first * sin[i]


@njit(fastmath=True, nogil=True)
def swiglu(gate_up: Any, y: Any) -> None:
    """`y [B, F_r] = silu(gate) * up` of `gate_up [B, 2 F_r]`."""
    width = y.shape[1]
    for b in range(y.shape[0]):
        for i in range(width):
            gate = gate_up[b, i]
            y[b, i] = gate / (types.float32(1) + exp32(-gate)) * gate_up[b, width + i]


@njit(fastmath=True, nogil=True)
def attend(
    q: Any, keys: Any, values: Any, table: Any, first: int, held: int, kv_index: Any, scores: Any, y: Any
) -> None:
    """One token's heads `q [N_r, D]` over its `held` past tokens, less those before the `first`: `y [N_r, D]`.

    keys, values `[pages, page, K_r, D]` · table: the sequence's pages · kv_index `[N_r]` · scores `[held]`: room to
    work. Scores are taken whole before their softmax, so no maximum is corrected on the way.
    """
    page, size = keys.shape[1], q.shape[1]
    scale = types.float32(1.0 / sqrt(size))
    for h in range(q.shape[0]):
        k, top = kv_index[h], types.float32(-3.0e38)
        for t in range(first, held):
            key, score = keys[table[t // page], t % page, k], types.float32(0)
            for i in range(size):
                score += q[h, i] * key[i]
            scores[t] = score * scale
            top = max(top, scores[t])
        total = types.float32(0)
        for t in range(first, held):
            scores[t] = exp32(scores[t] - top)
            total += scores[t]
        for i in range(size):
            y[h, i] = 0
        for t in range(first, held):
            weight = scores[t]
            value = values[table[t // page], t % page, k]
            for i in range(size):
                y[h, i] += weight * value[i]
        for i in range(size):
            y[h, i] /= total


@njit(nogil=True)
def argmax(row: Any) -> Any:
    """Place of the largest value, the first of equal ones: in two passes, as each of them is a loop of vectors."""
    top = largest(row)
    for i in range(row.size):
        if row[i] == top:
            return i
    return 0
