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

reordered = njit(fastmath={"reassoc", "contract", "arcp", "nsz"}, nogil=True, error_model="numpy")
"""Sums in another order, but numbers that are none stay so, as `nnan` and `ninf` are missing; a division that is not
checked for zero, since the check would keep a loop from becoming vectors."""


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


@reordered
def norm_row(x: Any, weight: Any, eps: float, y: Any) -> Any:
    """`y [H] = x / sqrt(mean(x²) + eps) * weight`; what x was multiplied by."""
    squares = types.float32(0)
    for i in range(x.size):
        squares += x[i] * x[i]
    scale = types.float32(1.0 / sqrt(squares / x.size + eps))
    for i in range(x.size):
        y[i] = x[i] * scale * weight[i]
    return scale


@njit(nogil=True)
def rms_norm(x: Any, weight: Any, eps: float, y: Any) -> None:
    """`y [B, H] = x / sqrt(mean(x²) + eps) * weight`; weight is float32."""
    for b in range(x.shape[0]):
        norm_row(x[b], weight, eps, y[b])


@njit(fastmath=True, nogil=True)
def rotate(cos: Any, sin: Any, heads: Any) -> None:
    """Turn pairs (i, i + D/2) of `heads [n, D]` in place by one token's angles `[D/2]`."""
    half = cos.size
    for h in range(heads.shape[0]):
        for i in range(half):
            first, second = heads[h, i], heads[h, half + i]
            heads[h, i] = first * cos[i] - second * sin[i]
            heads[h, half + i] = second * cos[i] + first * sin[i]


@reordered
def swiglu_row(gate: Any, up: Any, y: Any) -> None:
    """`y [F_r] = silu(gate) * up`."""
    one = types.float32(1)
    for i in range(y.size):
        y[i] = gate[i] / (one + exp32(-gate[i])) * up[i]


@njit(nogil=True)
def swiglu(gate_up: Any, y: Any) -> None:
    """`y [B, F_r] = silu(gate) * up` of `gate_up [B, 2 F_r]`."""
    width = y.shape[1]
    for b in range(y.shape[0]):
        swiglu_row(gate_up[b, :width], gate_up[b, width:], y[b])


@njit(fastmath=True, nogil=True)
def attend(
    q: Any, keys: Any, values: Any, table: Any, first: int, held: int, kv_index: Any, scores: Any, y: Any
) -> None:
    """One token's heads `q [N_r, D]` over its `held` past tokens, less those before the `first`: `y [N_r, D]`.

    keys, values `[pages, page, K_r, D]` · table: the sequence's pages · kv_index `[N_r]` · scores `[held]`: room to
    work. Scores are taken whole before their softmax, so no maximum is corrected on the way.
    """
    page = keys.shape[1]
    y[:] = 0
    for h in range(q.shape[0]):
        k = kv_index[h]
        for p in range(first // page, -(-held // page)):
            seen, rows = scores[p * page : held], keys[table[p]]
            _score(q[h], rows, k, max(first - p * page, 0), min(seen.size, page), seen)
        _softmax(scores[first:held])
        for p in range(first // page, -(-held // page)):
            seen, rows = scores[p * page : held], values[table[p]]
            _add_weighted(seen, rows, k, max(first - p * page, 0), min(seen.size, page), y[h])


@njit(fastmath=True, nogil=True)
def _score(q: Any, keys: Any, k: int, start: int, stop: int, scores: Any) -> None:
    """`scores[t] = q [D] · keys[t, k] / sqrt(D)` for tokens of one page, `[page, K_r, D]`."""
    scale = types.float32(1.0 / sqrt(q.size))
    for t in range(start, stop):
        key, score = keys[t, k], types.float32(0)
        for i in range(q.size):
            score += q[i] * key[i]
        scores[t] = score * scale


@reordered
def _softmax(scores: Any) -> None:
    top, total = largest(scores), types.float32(0)
    for t in range(scores.size):
        scores[t] = exp32(scores[t] - top)
        total += scores[t]
    for t in range(scores.size):
        scores[t] /= total


@njit(fastmath=True, nogil=True)
def _add_weighted(weights: Any, values: Any, k: int, start: int, stop: int, y: Any) -> None:
    """`y [D] += sum weights[t] * values[t, k]` of one page's tokens, four at a time: `y` is read and written less."""
    whole = start + (stop - start) // 4 * 4
    for t in range(start, whole, 4):
        v0, v1, v2, v3 = values[t, k], values[t + 1, k], values[t + 2, k], values[t + 3, k]
        for i in range(y.size):
            first, second = weights[t] * v0[i] + weights[t + 1] * v1[i], weights[t + 2] * v2[i] + weights[t + 3] * v3[i]
            y[i] += first + second
    for t in range(whole, stop):
        value = values[t, k]
        for i in range(y.size):
            y[i] += weights[t] * value[i]


@njit(nogil=True)
def argmax(row: Any) -> Any:
    """Place of the largest value, the first of equal ones: in two passes, as each of them is a loop of vectors."""
    top = largest(row)
    for i in range(row.size):
        if row[i] == top:
            return i
    return 0
