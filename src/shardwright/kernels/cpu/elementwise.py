"""What lies between a layer's products, compiled: RMSNorm, rotation, SwiGLU and the loss, each way in one pass.

For float32 rows, contiguous unless said otherwise, given by their addresses. torch makes each operation a pass over
memory, and a fresh tensor; here a row is read once, stays in the first cache while all is done to it, and is written
once. Sums may be reordered, but numbers that are none stay so (`blocks.reordered`): a run's guards look for them.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types

from shardwright.comm.atomics import pointer_to
from shardwright.comm.compiled import compiled
from shardwright.kernels.cpu.blocks import norm_row, reordered, swiglu_row
from shardwright.kernels.cpu.vectors import exp32, largest

STRETCH = 32
"""Rows whose sums are added up before they join the others': float32 loses less so."""

_floats_at = pointer_to(types.float32, ir.FloatType())
_words_at = pointer_to(types.int64, ir.IntType(64))


@reordered
def _norm_row_back(x: Any, scale: Any, weight: Any, dy: Any, dx: Any, sums: Any) -> None:
    along = types.float32(0)
    for i in range(x.size):
        along += dy[i] * weight[i] * x[i]
    along *= scale * scale * scale / types.float32(x.size)
    for i in range(x.size):
        through = dy[i] * scale
        dx[i] = through * weight[i] - x[i] * along
        sums[i] += through * x[i]


@reordered
def _swiglu_row_back(gate: Any, up: Any, dy: Any, dgate: Any, dup: Any) -> None:
    one = types.float32(1)
    for i in range(dy.size):
        share = one / (one + exp32(-gate[i]))
        silu = gate[i] * share
        dgate[i] = dy[i] * up[i] * (share + silu * (one - share))
        dup[i] = dy[i] * silu


@reordered
def _turn(first: Any, second: Any, cos: Any, sin: Any, sign: Any, y: Any, z: Any) -> None:
    for i in range(cos.size):
        y[i] = first[i] * cos[i] - second[i] * (sign * sin[i])
        z[i] = second[i] * cos[i] + first[i] * (sign * sin[i])


@reordered
def _exponentials(row: Any, top: Any) -> Any:
    total = types.float32(0)
    for i in range(row.size):
        total += exp32(row[i] - top)
    return total


@reordered
def _shares(row: Any, top: Any, factor: Any, drow: Any) -> None:
    for i in range(row.size):
        drow[i] = exp32(row[i] - top) * factor


@compiled("void(int64, int64, float64, int64, int64, int64, int64)")
def rms_norm(x: int, weight: int, eps: float, rows: int, width: int, y: int, scales: int) -> None:
    """`y [rows, width]`, and `scales [rows]`: what each row was multiplied by."""
    weights, found = carray(_floats_at(weight), (width,)), carray(_floats_at(scales), (rows,))
    for b in range(rows):
        at = 4 * width * b
        row, out = carray(_floats_at(x + at), (width,)), carray(_floats_at(y + at), (width,))
        found[b] = norm_row(row, weights, eps, out)


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def rms_norm_backward(x: int, scales: int, weight: int, dy: int, rows: int, width: int, dx: int, dweight: int) -> None:
    """`dx [rows, width]` and `dweight [width]`."""
    weights, found = carray(_floats_at(weight), (width,)), carray(_floats_at(scales), (rows,))
    total, sums = carray(_floats_at(dweight), (width,)), np.zeros(width, np.float32)
    total[:] = 0
    for b in range(rows):
        at = 4 * width * b
        row, through = carray(_floats_at(x + at), (width,)), carray(_floats_at(dy + at), (width,))
        _norm_row_back(row, found[b], weights, through, carray(_floats_at(dx + at), (width,)), sums)
        if b % STRETCH == STRETCH - 1 or b == rows - 1:
            for i in range(width):
                total[i] += sums[i]
                sums[i] = 0


@compiled("void(int64, int64, int64, int64)")
def swiglu(gate_up: int, rows: int, width: int, y: int) -> None:
    """`y [rows, width]` of `gate_up [rows, 2 width]`."""
    for b in range(rows):
        at = gate_up + 8 * width * b
        gate, up = carray(_floats_at(at), (width,)), carray(_floats_at(at + 4 * width), (width,))
        swiglu_row(gate, up, carray(_floats_at(y + 4 * width * b), (width,)))


@compiled("void(int64, int64, int64, int64, int64)")
def swiglu_backward(gate_up: int, dy: int, rows: int, width: int, grad: int) -> None:
    """`grad [rows, 2 width]` of `dy [rows, width]`."""
    for b in range(rows):
        at, to = gate_up + 8 * width * b, grad + 8 * width * b
        gate, up = carray(_floats_at(at), (width,)), carray(_floats_at(at + 4 * width), (width,))
        dgate, dup = carray(_floats_at(to), (width,)), carray(_floats_at(to + 4 * width), (width,))
        _swiglu_row_back(gate, up, carray(_floats_at(dy + 4 * width * b), (width,)), dgate, dup)


@compiled("void(int64, int64, int64, int64, float64, int64, int64, int64, int64)")
def rotary(x: int, stride: int, cos: int, sin: int, sign: float, tokens: int, heads: int, half: int, y: int) -> None:
    """`y [tokens, heads, 2 half]` of an x whose tokens are `stride` bytes apart; sign: -1 turns back."""
    way = types.float32(sign)
    for t in range(tokens):
        angle = 4 * half * t
        c, s = carray(_floats_at(cos + angle), (half,)), carray(_floats_at(sin + angle), (half,))
        for h in range(heads):
            at, to = x + stride * t + 8 * half * h, y + 8 * half * (heads * t + h)
            first, second = carray(_floats_at(at), (half,)), carray(_floats_at(at + 4 * half), (half,))
            _turn(first, second, c, s, way, carray(_floats_at(to), (half,)), carray(_floats_at(to + 4 * half), (half,)))


@compiled("void(int64, int64, int64, int64)")
def softmax_parts(logits: int, rows: int, width: int, parts: int) -> None:
    """`parts [2, rows]`: each row's largest logit, and its sum of exponentials less that; width: above 0."""
    found = carray(_floats_at(parts), (2, rows))
    for b in range(rows):
        row = carray(_floats_at(logits + 4 * width * b), (width,))
        found[0, b] = largest(row)  # where a logit is no number, nor is the sum
        found[1, b] = _exponentials(row, found[0, b])


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def cross_entropy_backward(
    logits: int, tops: int, factors: int, columns: int, less: int, rows: int, width: int, dlogits: int
) -> None:
    """`dlogits [rows, width] = exp(logits - top) * factor`, and in each row's column `less` of it is taken off."""
    top, factor = carray(_floats_at(tops), (rows,)), carray(_floats_at(factors), (rows,))
    column, off = carray(_words_at(columns), (rows,)), carray(_floats_at(less), (rows,))
    for b in range(rows):
        at = 4 * width * b
        found = carray(_floats_at(dlogits + at), (width,))
        _shares(carray(_floats_at(logits + at), (width,)), top[b], factor[b], found)
        found[column[b]] -= off[b]
