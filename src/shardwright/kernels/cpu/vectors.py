"""The product of two rows, spelled out in vectors.

Left to itself the compiler widens bfloat16 weights in a loop too long to keep enough of the memory's answers under way:
21 GB/s on one core where this gives 24 to 27, and the memory 28 (see `benchmarks/NOTES.md`). One row is read at a time:
two or four at once are two to three times slower here.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES, CHAINS = 16, 2
"""Elements of a vector, and sums under way beside each other, so that an addition need not wait for the one before."""

STEP = LANES * CHAINS

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
def dot(typing: Any, row: Any, x: Any, stop: Any) -> Any:
    """`sum row[i] * x[i]` over i < stop, a multiple of `STEP` above 0; row holds float32 or the bits of bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, xs = (
            context.make_array(kind)(context, builder, array).data
            for kind, array in zip(signature.args[:2], arguments[:2], strict=True)
        )
        before, loop, after = builder.block, builder.append_basic_block("steps"), builder.append_basic_block("sum")
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(_INDEX)
        at.add_incoming(_INDEX(0), before)
        chains = []
        for chain in range(CHAINS):
            total = builder.phi(_FLOATS)
            total.add_incoming(ir.Constant(_FLOATS, None), before)
            chains.append((chain * LANES, total))
        sums = []
        for offset, total in chains:
            place = builder.add(at, _INDEX(offset))
            product = builder.fmul(_load(builder, rows, place), _load(builder, xs, place), flags=["fast"])
            sums.append(builder.fadd(total, product, flags=["fast"]))
            total.add_incoming(sums[-1], loop)
        following = builder.add(at, _INDEX(STEP))
        at.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, arguments[2]), loop, after)
        builder.position_at_end(after)
        total = sums[0]
        for other in sums[1:]:
            total = builder.fadd(total, other, flags=["fast"])
        return _across(builder, total)

    return types.float32(row, x, types.int64), generate


def _load(builder: Any, data: Any, place: Any) -> Any:
    """A vector of float32 from an array of them, or of bfloat16's bits, whatever its alignment."""
    half = data.type.pointee == ir.IntType(16)
    pointer = builder.bitcast(builder.gep(data, [place]), (_HALVES if half else _FLOATS).as_pointer())
    vector = builder.load(pointer, align=2 if half else 4)
    if not half:
        return vector
    bits = builder.shl(builder.zext(vector, _WORDS), ir.Constant(_WORDS, [16] * LANES))
    return builder.bitcast(bits, _FLOATS)


def _across(builder: Any, vector: Any) -> Any:
    """The sum of a vector's elements: halves are added until one is left."""
    width = LANES
    while width > 1:
        width //= 2
        pick = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [(lane + width) % LANES for lane in range(LANES)])
        vector = builder.fadd(vector, builder.shuffle_vector(vector, vector, pick), flags=["fast"])
    return builder.extract_element(vector, ir.IntType(32)(0))
