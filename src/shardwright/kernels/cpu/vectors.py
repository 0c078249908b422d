"""Products of a row of weights with vectors, spelled out in the processor's own vectors.

Left to itself the compiler widens bfloat16 weights in a loop too long to keep enough of the memory's answers under way,
and the processor's own prefetching ends at each page (`benchmarks/NOTES.md` has the figures). One row is read at a
time: two or four at once are two to three times slower where that was tried.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES, CHAINS = 16, 2
"""Elements of a vector, and sums under way beside each other, so that an addition need not wait for the one before."""

STEP = LANES * CHAINS

LINE = 64
"""Bytes that memory hands over at a time."""

AHEAD = 4096
"""Bytes by which a row's memory is asked for before it is used; it may lie behind the row."""

TOGETHER = 4
"""Vectors that meet a row's weights while those are in registers, where there are so many."""

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


def _dots(count: int, chains: int) -> Any:
    """For compiled code: the products of a row with that many vectors, each summed in that many chains."""

    @intrinsic
    def dots(typing: Any, row: Any, x: Any, b: Any, stop: Any) -> Any:
        """`sum row[i] * x[b + v, i]` over i < stop for each v < count; stop is a multiple of `STEP` above 0.

        row: float32, or the bits of bfloat16 · x `[B, I]`: float32, contiguous.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            rows, xs = (
                context.make_array(kind)(context, builder, array)
                for kind, array in zip(signature.args[:2], arguments[:2], strict=True)
            )
            width = builder.extract_value(xs.shape, 1)
            vectors = [
                builder.gep(xs.data, [builder.mul(width, builder.add(arguments[2], _INDEX(v)))]) for v in range(count)
            ]
            sums = _loop(builder, rows.data, vectors, chains, arguments[3])
            return context.make_tuple(builder, signature.return_type, [_across(builder, total) for total in sums])

        return types.UniTuple(types.float32, count)(row, x, types.int64, types.int64), generate

    return dots


dot, dots_together = _dots(1, CHAINS), _dots(TOGETHER, 1)


def _loop(builder: Any, row: Any, vectors: list[Any], chains: int, stop: Any) -> list[Any]:
    """A vector of partial sums for each of the vectors; leaves the builder behind the loop."""
    before, loop, after = builder.block, builder.append_basic_block("steps"), builder.append_basic_block("sum")
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(_INDEX)
    at.add_incoming(_INDEX(0), before)
    totals = [[builder.phi(_FLOATS) for _ in range(chains)] for _ in vectors]
    sums = [list(own) for own in totals]
    _ask_for(builder, row, at)
    for offset in range(0, STEP, LANES):
        place, chain = builder.add(at, _INDEX(offset)), offset // LANES % chains
        weights = _load(builder, row, place)
        for own, vector in zip(sums, vectors, strict=True):
            product = builder.fmul(weights, _load(builder, vector, place), flags=["fast"])
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
    size, byte = 2 if _is_half(data) else 4, ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, *[ir.IntType(32)] * 3])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    read, second_cache, data_not_code = (ir.IntType(32)(n) for n in (0, 2, 1))
    for line in range(0, STEP * size, LINE):
        address = builder.gep(data, [builder.add(place, _INDEX((AHEAD + line) // size))])
        builder.call(prefetch, [builder.bitcast(address, byte), read, second_cache, data_not_code])


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


def _across(builder: Any, vector: Any) -> Any:
    """The sum of a vector's elements: halves are added until one is left."""
    width = LANES
    while width > 1:
        width //= 2
        pick = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [(lane + width) % LANES for lane in range(LANES)])
        vector = builder.fadd(vector, builder.shuffle_vector(vector, vector, pick), flags=["fast"])
    return builder.extract_element(vector, ir.IntType(32)(0))
