"""Products of a row of weights with vectors, spelled out in the processor's own vectors.

Left to itself the compiler widens bfloat16 weights in a loop too long to keep enough of the memory's answers under way,
and the processor's own prefetching ends at each page (`benchmarks/NOTES.md` has the figures).
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LANES = 16
"""Elements of a vector."""

STEP = 2 * LANES
"""Elements that a turn of the loops takes of each row."""

LINE = 64
"""Bytes that memory hands over at a time."""

AHEAD = 4096
"""Bytes by which a row's memory is asked for before it is used; it may lie behind the row."""

_FLOATS, _WORDS, _HALVES = (ir.VectorType(kind, LANES) for kind in (ir.FloatType(), ir.IntType(32), ir.IntType(16)))
_INDEX = ir.IntType(64)


@intrinsic
def widened(typing: Any, value: Any) -> Any:
    """A weight as float32: bfloat16, given as its bits, is the upper half of the float32 it stands for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value != types.uint16:
            return arguments[0]
        bits = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(value), generate


@intrinsic
def _float_of(typing: Any, bits: Any) -> Any:
    """The float32 that 32 bits stand for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@njit(nogil=True)
def exp32(x: Any) -> Any:
    """e^x in float32 to 2e-7 of it, within ±87; 0 below, as what a processor finds there takes it long; e^87 above.

    Plain arithmetic, so that loops of it become vectors, which loops of the C library's do not: x is n ln 2 + r, e^r a
    polynomial (Cephes' `expf`, Moshier 1992), and n goes into the exponent's bits.
    """
    least = types.float32(-87.0)
    vanishes, x = x < least, min(max(x, least), types.float32(87.0))
    n = np.floor(x * types.float32(1.44269504) + types.float32(0.5))
    r = x - n * types.float32(0.693359375) + n * types.float32(2.12194440e-4)
    p = types.float32(1.9875691500e-4)
    p = p * r + types.float32(1.3981999507e-3)
    p = p * r + types.float32(8.3334519073e-3)
    p = p * r + types.float32(4.1665795894e-2)
    p = p * r + types.float32(1.6666665459e-1)
    p = p * r + types.float32(5.0000001201e-1)
    power = (p * r * r + r + types.float32(1)) * _float_of((types.int32(n) + types.int32(127)) << types.int32(23))
    return types.float32(0) if vanishes else power


@njit(fastmath=True, nogil=True)
def largest(row: Any) -> Any:
    """The largest of a row's numbers. Lane by lane: of one running maximum the compiler makes no vectors."""
    tops, whole = np.full(LANES, row[0]), row.size // LANES * LANES
    for i in range(0, whole, LANES):
        for lane in range(LANES):
            tops[lane] = max(tops[lane], row[i + lane])
    top = tops[0]
    for lane in range(LANES):
        top = max(top, tops[lane])
    for i in range(whole, row.size):
        top = max(top, row[i])
    return top


def products(rows: int, vectors: int, chains: int) -> Any:
    """For compiled code: the products of so many rows with so many vectors, which stay in registers meanwhile.

    chains: sums under way for each product, so that an addition need not wait for the one before.
    """

    @intrinsic
    def product(typing: Any, w: Any, o: Any, x: Any, b: Any, stop: Any) -> Any:
        """`sum w[o + r, i] * x[b + v, i]` over i < stop, at place `r * vectors + v`; stop: multiple of `STEP` above 0.

        w `[O, I]`: float32, or the bits of bfloat16 · x `[B, I]`: float32; both contiguous.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, values = (
                context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 2)
            )
            width = builder.extract_value(
                context.make_array(signature.args[2])(context, builder, arguments[2]).shape, 1
            )

            def lines(data: Any, first: Any, count: int) -> list[Any]:
                return [builder.gep(data, [builder.mul(width, builder.add(first, _INDEX(i)))]) for i in range(count)]

            sums = _loop(
                builder, lines(weights, arguments[1], rows), lines(values, arguments[3], vectors), chains, arguments[4]
            )
            return context.make_tuple(builder, signature.return_type, [across(builder, total) for total in sums])

        return types.UniTuple(types.float32, rows * vectors)(w, types.int64, x, types.int64, types.int64), generate

    return product


def _loop(builder: Any, rows: list[Any], vectors: list[Any], chains: int, stop: Any) -> list[Any]:
    """A vector of partial sums for each row and vector; leaves the builder behind the loop."""
    before, loop, after = builder.block, builder.append_basic_block("steps"), builder.append_basic_block("sum")
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(_INDEX)
    at.add_incoming(_INDEX(0), before)
    totals = [[builder.phi(_FLOATS) for _ in range(chains)] for _ in rows for _ in vectors]
    sums = [list(own) for own in totals]
    for row in rows:
        _ask_for(builder, row, at)
    for offset in range(0, STEP, LANES):
        place, chain = builder.add(at, _INDEX(offset)), offset // LANES % chains
        weights = [_load(builder, row, place) for row in rows]
        for v, vector in enumerate(vectors):
            value = _load(builder, vector, place)
            for r, weight in enumerate(weights):
                own = sums[r * len(vectors) + v]
                product = builder.fmul(weight, value, flags=["fast"])
                own[chain] = builder.fadd(own[chain], product, flags=["fast"])
    for own, found in zip(totals, sums, strict=True):
        for total, new in zip(own, found, strict=True):
            total.add_incoming(ir.Constant(_FLOATS, None), before)
            total.add_incoming(new, loop)
    following = builder.add(at, _INDEX(STEP))
    at.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, stop), loop, after)
    builder.position_at_end(after)
    for own in sums:
        while len(own) > 1:
            own.append(builder.fadd(own.pop(), own.pop(), flags=["fast"]))
    return [own[0] for own in sums]


def _ask_for(builder: Any, data: Any, place: Any) -> None:
    """Have a step's memory, `AHEAD` of the place, fetched into the second cache; any address will do."""
    size = 2 if _is_half(data) else 4
    for line in range(0, STEP * size, LINE):
        ask(builder, builder.gep(data, [builder.add(place, _INDEX((AHEAD + line) // size))]))


def ask(builder: Any, pointer: Any) -> None:
    """Have the line at a pointer, valid or not, fetched into the second cache; waits for nothing."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, *[ir.IntType(32)] * 3])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    read, second_cache, data_not_code = (ir.IntType(32)(n) for n in (0, 2, 1))
    builder.call(prefetch, [builder.bitcast(pointer, byte), read, second_cache, data_not_code])


def _load(builder: Any, data: Any, place: Any) -> Any:
    """A vector of float32 from an array of them, or of bfloat16's bits, whatever its alignment."""
    half = _is_half(data)
    pointer = builder.bitcast(builder.gep(data, [place]), (_HALVES if half else _FLOATS).as_pointer())
    vector = builder.load(pointer, align=2 if half else 4)
    if not half:
        return vector
    bits = builder.shl(builder.zext(vector, _WORDS), ir.Constant(_WORDS, [16] * LANES))
    return builder.bitcast(bits, _FLOATS)


def _is_half(data: Any) -> bool:
    return bool(data.type.pointee == ir.IntType(16))


def across(builder: Any, vector: Any) -> Any:
    """The sum of a vector's elements: halves are added until one is left."""
    width = LANES
    while width > 1:
        width //= 2
        pick = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [(lane + width) % LANES for lane in range(LANES)])
        vector = builder.fadd(vector, builder.shuffle_vector(vector, vector, pick), flags=["fast"])
    return builder.extract_element(vector, ir.IntType(32)(0))
