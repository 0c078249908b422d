"""Products with a weight of int8 or int4, compiled: it becomes floating a strip at a time, and is whole nowhere.

A weight `[k, n]` is stored with rows along n (`across`), or transposed with rows along k (`along`), and described by
one int64 array. Few rows of x meet it as it is read; for many, a strip of its columns is laid into the cache, for a
BLAS to multiply. Sums may be reordered (`fastmath`). Values are float32.
"""

from typing import Any

from llvmlite import ir
from numba import carray, njit, types

from shardwright.comm.atomics import LINE, pointer_to
from shardwright.comm.compiled import compiled
from shardwright.kernels.cpu.blocks import matvec
from shardwright.kernels.cpu.integers import BYTES, NIBBLES, ROWS, STACKED, dotting, fetch, meeting, widening
from shardwright.kernels.cpu.vectors import LANES

ADDRESS, STRIDE, FORMAT, K, N, GROUP, SCALE, OFFSET, FIELDS = range(9)
"""What a weight's description holds: address, bytes from a stored row to the next (of words, if those are stacked), its
format · k, n · rows of the weight that share a scale · addresses of scale and offset, float32 `[⌈k / group⌉, n]`."""

WIDE = 8192
"""Sums, of all rows of x together, that stay in the first cache while `across` rows stream by."""

AHEAD = 2 * ROWS
"""Rows by which a strip's are asked for before they are used: a row's end in it is not where the next one begins."""

TALL = 8
"""Columns of an `along` weight that are floating at a time when few rows meet them."""

PAIR = 2 * LANES
"""Elements that a turn of a dot product takes."""

_floats_at = pointer_to(types.float32, ir.FloatType())
_bytes_at = pointer_to(types.int8, ir.IntType(8))
_words_at = pointer_to(types.int32, ir.IntType(32))

_meet_bytes, _meet_nibbles, _meet_stacked = (meeting(form) for form in (BYTES, NIBBLES, STACKED))
_dot_bytes, _dot_nibbles, _dot_stacked = (dotting(form) for form in (BYTES, NIBBLES, STACKED))
_vary_bytes, _vary_nibbles, _vary_stacked = (widening(form, True) for form in (BYTES, NIBBLES, STACKED))
_widen_bytes, _widen_nibbles, _widen_stacked = (widening(form, False) for form in (BYTES, NIBBLES, STACKED))


@njit(nogil=True)
def _at(weight: Any, row: int, first: int) -> int:
    """Address of a stored row from its weight `first` on, a multiple of 8 in words along the row."""
    if weight[FORMAT] == BYTES:
        return weight[ADDRESS] + weight[STRIDE] * row + first
    if weight[FORMAT] == NIBBLES:
        return weight[ADDRESS] + weight[STRIDE] * row + first // 2
    return weight[ADDRESS] + weight[STRIDE] * (row // ROWS) + 4 * first


@njit(nogil=True)
def _element(weight: Any, row: int, place: int) -> Any:
    """One weight of a stored row."""
    if weight[FORMAT] == BYTES:
        return types.float32(carray(_bytes_at(_at(weight, row, place)), (1,))[0])
    if weight[FORMAT] == NIBBLES:
        nibble = carray(_words_at(_at(weight, row, place // 8 * 8)), (1,))[0] >> 4 * (place % 8)
    else:
        nibble = carray(_words_at(_at(weight, row, place)), (1,))[0] >> 4 * (row % 8)
    return types.float32(((nibble & 15) ^ 8) - 8)


@njit(nogil=True)
def _float_at(floats: int, place: int) -> Any:
    """The float32 at a place behind an address, as an array of one."""
    return carray(_floats_at(floats + 4 * place), (1,))


@njit(fastmath=True, nogil=True)
def _sum_rest(weight: Any, x: Any, first: int, last: int, start: int, begin: int, part: Any) -> None:
    """The same, one by one, for what is left of columns or rows."""
    for i in range(first, last):
        for j in range(begin, part.shape[1]):
            value = _element(weight, i, start + j)
            for b in range(part.shape[0]):
                part[b, j] += x[b, i] * value


@njit(fastmath=True, nogil=True)
def _sum_group(weight: Any, x: Any, first: int, last: int, start: int, part: Any) -> None:
    """`part [m, width] += x[:, first…last] @ w[first…last, start…]`, without scales; first: a multiple of 8."""
    rows, width = part.shape
    vectors, whole = width // LANES, first + (last - first) // ROWS * ROWS
    x_stride, sums, sums_stride = 4 * x.shape[1], part.ctypes.data, 4 * width
    for i in range(first, whole, ROWS):
        at, values = _at(weight, i, start), x.ctypes.data + 4 * i
        if weight[FORMAT] == BYTES:
            _meet_bytes(at, weight[STRIDE], values, x_stride, sums, sums_stride, vectors, rows)
        elif weight[FORMAT] == NIBBLES:
            _meet_nibbles(at, weight[STRIDE], values, x_stride, sums, sums_stride, vectors, rows)
        else:
            _meet_stacked(at, weight[STRIDE], values, x_stride, sums, sums_stride, vectors, rows)
        _sum_rest(weight, x, i, i + ROWS, start, vectors * LANES, part)
    _sum_rest(weight, x, whole, last, start, 0, part)


@njit(fastmath=True, nogil=True)
def _dot_along(weight: Any, x: Any, y: Any) -> None:
    """`y [n] = x [k] @ w`, a stored row at a time; scales join once a group is summed."""
    k, n, group, values = weight[K], weight[N], weight[GROUP], x.ctypes.data
    for j in range(n):
        y[j] = 0
        for first in range(0, k, group):
            last, at = min(k, first + group), _at(weight, j, first)
            pairs = (last - first) // PAIR
            if weight[FORMAT] == BYTES:
                part = _dot_bytes(at, values + 4 * first, pairs, 0)
            elif weight[FORMAT] == NIBBLES:
                part = _dot_nibbles(at, values + 4 * first, pairs, 0)
            else:
                part = _dot_stacked(at, values + 4 * first, pairs, 28 - 4 * (j % ROWS))
            for i in range(first + pairs * PAIR, last):
                part += _element(weight, j, i) * x[i]
            place = 4 * (n * (first // group) + j)
            offset = _float_at(weight[OFFSET] + place, 0)[0]
            if offset != 0:
                total = types.float32(0)
                for i in range(first, last):
                    total += x[i]
                part += offset * total
            y[j] += part * _float_at(weight[SCALE] + place, 0)[0]


@compiled("void(int64[::1], int64, int64, int64)")
def strip_across(weight: Any, start: int, stop: int, out: int) -> None:
    """Columns `start…stop` as `[k, stop - start]` at `out`; start: a multiple of 8."""
    width, n, group = stop - start, weight[N], weight[GROUP]
    for i in range(weight[K]):
        place, at = 4 * (n * (i // group) + start), _at(weight, i, start)
        row, scale, offset = out + 4 * width * i, weight[SCALE] + place, weight[OFFSET] + place
        vectors = width // LANES
        if weight[FORMAT] == BYTES:
            for line in range(0, width, LINE):
                fetch(at + AHEAD * weight[STRIDE] + line)
            _vary_bytes(at, row, vectors, scale, offset, 0)
        elif weight[FORMAT] == NIBBLES:
            for line in range(0, width // 2, LINE):
                fetch(at + AHEAD * weight[STRIDE] + line)
            _vary_nibbles(at, row, vectors, scale, offset, 0)
        else:
            _vary_stacked(at, row, vectors, scale, offset, 28 - 4 * (i % ROWS))
        for j in range(vectors * LANES, width):
            _float_at(row, j)[0] = (_element(weight, i, start + j) + _float_at(offset, j)[0]) * _float_at(scale, j)[0]


@compiled("void(int64[::1], int64, int64, int64)")
def strip_along(weight: Any, start: int, stop: int, out: int) -> None:
    """Columns `start…stop` as `[stop - start, k]` at `out`."""
    k, n, group = weight[K], weight[N], weight[GROUP]
    for j in range(start, stop):
        for first in range(0, k, group):
            width, place = min(k, first + group) - first, 4 * (n * (first // group) + j)
            scale, offset, at = weight[SCALE] + place, weight[OFFSET] + place, _at(weight, j, first)
            row, vectors = out + 4 * (k * (j - start) + first), width // LANES
            if weight[FORMAT] == BYTES:
                _widen_bytes(at, row, vectors, scale, offset, 0)
            elif weight[FORMAT] == NIBBLES:
                _widen_nibbles(at, row, vectors, scale, offset, 0)
            else:
                _widen_stacked(at, row, vectors, scale, offset, 28 - 4 * (j % ROWS))
            for i in range(vectors * LANES, width):
                value = _element(weight, j, first + i) + _float_at(offset, 0)[0]
                _float_at(row, i)[0] = value * _float_at(scale, 0)[0]


@compiled("void(int64[::1], float32[:, ::1], float32[:, ::1], float32[::1])")
def multiply_across(weight: Any, x: Any, y: Any, room: Any) -> None:
    """`y [m, n] = x [m, k] @ w` for few rows; scales join once a group is summed. room: `[m * groups + WIDE]`."""
    k, n, group, rows = weight[K], weight[N], weight[GROUP], x.shape[0]
    groups, wide = -(-k // group), WIDE // rows // LINE * LINE
    totals, sums = room[: rows * groups].reshape((rows, groups)), room[rows * groups :]
    for b in range(rows):
        for g in range(groups):
            totals[b, g] = 0
            for i in range(g * group, min(k, g * group + group)):
                totals[b, g] += x[b, i]
    for start in range(0, n, wide):
        width = min(wide, n - start)
        part = sums[: rows * width].reshape((rows, width))
        y[:, start : start + width] = 0
        for g in range(groups):
            part[:] = 0
            _sum_group(weight, x, g * group, min(k, g * group + group), start, part)
            place = 4 * (n * g + start)
            scale = carray(_floats_at(weight[SCALE] + place), (width,))
            offset = carray(_floats_at(weight[OFFSET] + place), (width,))
            for b in range(rows):
                row, total = y[b, start : start + width], totals[b, g]
                for j in range(width):
                    row[j] += (part[b, j] + offset[j] * total) * scale[j]


@compiled("void(int64[::1], float32[:, ::1], float32[:, ::1], float32[::1])")
def multiply_along(weight: Any, x: Any, y: Any, room: Any) -> None:
    """`y [m, n] = x [m, k] @ w` for few rows. room: `[TALL * (k + m)]`."""
    k, n, rows = weight[K], weight[N], x.shape[0]
    if rows == 1:
        _dot_along(weight, x[0], y[0])
        return
    for start in range(0, n, TALL):
        tall = min(TALL, n - start)
        strip = room[: tall * k].reshape((tall, k))
        part = room[tall * k : tall * (k + rows)].reshape((rows, tall))
        strip_along(weight, start, start + tall, strip.ctypes.data)
        matvec(strip, x, part)
        for b in range(rows):
            for j in range(tall):
                y[b, start + j] = part[b, j]
