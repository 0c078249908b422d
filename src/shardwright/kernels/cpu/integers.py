"""Integer weights in the processor's own vectors: 16 of them made floating at a time, on their way into a product.

A stored row of weights is int8, or int32 words of eight int4, the first in the lowest nibble. Words lie along the row
(`NIBBLES`), or each holds eight rows of one column (`STACKED`). Knows nothing of scales that differ within a row's
vector, nor of blocks; `kernels.cpu.strips` puts loops around this.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shardwright.kernels.cpu.vectors import AHEAD, LANES, LINE, across, ask

BYTES, NIBBLES, STACKED = range(3)
"""The formats."""

ROWS = 8
"""Stored rows that meet the vectors at a time: as many as a stacked word holds."""

_STEP = {BYTES: 2 * LANES, NIBBLES: LANES, STACKED: 8 * LANES}
"""Bytes of a stored row that a pair of vectors takes."""

_INT, _INDEX, _BYTE = ir.IntType(32), ir.IntType(64), ir.IntType(8)
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_INT, LANES)


def widening(form: int, varying: bool) -> Any:
    """For compiled code: `(w + offset) * scale` of a run of a stored row, as float32.

    varying: whether scale and offset have an element for each weight of the run, or one for all.
    """

    @intrinsic
    def widen(
        typing: Any,
        source: Any,
        target: Any,
        vectors: Any,
        scale: Any,
        offset: Any,
        shift: Any,
    ) -> Any:
        """That many vectors; the rest are addresses. shift: by how much stacked words move to the left."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, target, vectors, scale, offset, shift = arguments

            def step(at: Any) -> None:
                first = builder.mul(at, _INDEX(LANES))
                values = _floats(builder, _stored(builder, form, source, first, shift))
                factor, added = (
                    _load(builder, place, first) if varying else _everywhere(builder, _one(builder, place, _INDEX(0)))
                    for place in (scale, offset)
                )
                _store(builder, target, first, builder.fmul(builder.fadd(values, added), factor))

            _counted(builder, vectors, step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return widen


def meeting(form: int) -> Any:
    """For compiled code: `ROWS` stored rows meet some vectors of x, whose sums lie in a row each."""

    @intrinsic
    def meet(
        typing: Any,
        w: Any,
        stride: Any,
        x: Any,
        x_stride: Any,
        sums: Any,
        sums_stride: Any,
        vectors: Any,
        count: Any,
    ) -> Any:
        """`sums[b, j] += Σ w[r, j] x[b, r]` over r < `ROWS`, for j < 16 vectors, b < count. Strides in bytes."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, stride, x, x_stride, sums, sums_stride, vectors, count = arguments

            def columns(at: Any) -> None:
                first = builder.mul(at, _INDEX(LANES))
                weights = _eight(builder, form, w, stride, first)
                _ask_ahead(builder, form, w, stride, at, first)

                def row(b: Any) -> None:
                    own, place = (builder.add(y, builder.mul(b, s)) for y, s in ((x, x_stride), (sums, sums_stride)))
                    chains = [_load(builder, place, first), ir.Constant(_FLOATS, None)]
                    for r, weight in enumerate(weights):
                        value = _everywhere(builder, _one(builder, own, _INDEX(r)))
                        product = builder.fmul(weight, value, flags=["fast"])
                        chains[r % 2] = builder.fadd(chains[r % 2], product, flags=["fast"])
                    _store(builder, place, first, builder.fadd(*chains, flags=["fast"]))

                _counted(builder, count, row)

            _counted(builder, vectors, columns)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return meet


def dotting(form: int) -> Any:
    """For compiled code: the product of a run of one stored row with as much of a vector."""

    @intrinsic
    def dot(typing: Any, w: Any, x: Any, pairs: Any, shift: Any) -> Any:
        """`Σ w[i] x[i]` over that many pairs of vectors; w and x are addresses. shift: as in `widening`."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, x, pairs, shift = arguments
            chains = [builder.alloca(_FLOATS) for _ in range(2)]
            for chain in chains:
                builder.store(ir.Constant(_FLOATS, None), chain)

            def step(at: Any) -> None:
                _ask(builder, builder.add(builder.add(w, _INDEX(AHEAD)), builder.mul(at, _INDEX(_STEP[form]))))
                for i, chain in enumerate(chains):
                    first = builder.mul(builder.add(builder.mul(at, _INDEX(2)), _INDEX(i)), _INDEX(LANES))
                    values = _floats(builder, _stored(builder, form, w, first, shift))
                    product = builder.fmul(values, _load(builder, x, first), flags=["fast"])
                    builder.store(builder.fadd(builder.load(chain), product, flags=["fast"]), chain)

            _counted(builder, pairs, step)
            return across(builder, builder.fadd(*map(builder.load, chains), flags=["fast"]))

        return types.float32(*[types.int64] * 4), generate

    return dot


@intrinsic
def fetch(typing: Any, address: Any) -> Any:
    """Ask for the line at an address, any address, to be in the second cache soon; waits for nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _ask(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _ask(builder: Any, address: Any) -> None:
    ask(builder, builder.inttoptr(address, _BYTE.as_pointer()))


def _ask_ahead(builder: Any, form: int, w: Any, stride: Any, at: Any, first: Any) -> None:
    """While a line of each row is used up, ask for one of each row that follows, a few at a time.

    All at once would hold up everything else: int8 from memory took 0.98 ms then, and takes 0.61 so.
    """
    if form == STACKED:
        _ask(builder, builder.add(builder.add(w, stride), builder.mul(first, _INDEX(4))))
        return
    per_line = LINE // LANES if form == BYTES else 2 * LINE // LANES
    for i in range(ROWS // per_line):
        turn = builder.mul(builder.and_(at, _INDEX(per_line - 1)), _INDEX(ROWS // per_line))
        row = builder.add(w, builder.mul(stride, builder.add(turn, _INDEX(ROWS + i))))
        _ask(builder, builder.add(row, first if form == BYTES else builder.lshr(first, _INDEX(1))))


def _eight(builder: Any, form: int, w: Any, stride: Any, first: Any) -> list[Any]:
    """A vector of each of `ROWS` rows."""
    if form == STACKED:
        words = _stored(builder, STACKED, w, first, None)
        return [_floats(builder, _upper(builder, builder.shl(words, _INTS([28 - 4 * r] * LANES)))) for r in range(ROWS)]
    rows = [builder.add(w, builder.mul(stride, _INDEX(r))) for r in range(ROWS)]
    return [_floats(builder, _stored(builder, form, row, first, None)) for row in rows]


def _stored(builder: Any, form: int, row: Any, first: Any, shift: Any) -> Any:
    """16 integers of a row from its weight `first` on; stacked ones as they lie, or the nibble that shift brings up."""
    if form == BYTES:
        kind = ir.VectorType(_BYTE, LANES)
        address = builder.inttoptr(builder.add(row, first), kind.as_pointer())
        return builder.sext(builder.load(address, align=1), _INTS)
    if form == NIBBLES:
        kind = ir.VectorType(_INT, 2)
        address = builder.inttoptr(builder.add(row, builder.lshr(first, _INDEX(1))), kind.as_pointer())
        pair = builder.load(address, align=4)
        words = builder.shuffle_vector(pair, pair, _INTS([0] * ROWS + [1] * ROWS))
        return _upper(builder, builder.shl(words, _INTS([28 - 4 * i for i in range(ROWS)] * 2)))
    address = builder.inttoptr(builder.add(row, builder.mul(first, _INDEX(4))), _INTS.as_pointer())
    words = builder.load(address, align=4)
    if shift is None:
        return words
    return _upper(builder, builder.shl(words, _everywhere(builder, builder.trunc(shift, _INT))))


def _upper(builder: Any, words: Any) -> Any:
    """The uppermost nibble of each word, with its sign."""
    return builder.ashr(words, _INTS([28] * LANES))


def _floats(builder: Any, integers: Any) -> Any:
    return builder.sitofp(integers, _FLOATS)


def _one(builder: Any, floats: Any, place: Any) -> Any:
    """A float32 of an array, given by its address."""
    address = builder.add(floats, builder.mul(place, _INDEX(4)))
    return builder.load(builder.inttoptr(address, ir.FloatType().as_pointer()), align=4)


def _vector(builder: Any, floats: Any, place: Any) -> Any:
    address = builder.add(floats, builder.mul(place, _INDEX(4)))
    return builder.inttoptr(address, _FLOATS.as_pointer())


def _load(builder: Any, floats: Any, place: Any) -> Any:
    return builder.load(_vector(builder, floats, place), align=4)


def _store(builder: Any, floats: Any, place: Any, values: Any) -> None:
    builder.store(values, _vector(builder, floats, place), align=4)


def _everywhere(builder: Any, value: Any) -> Any:
    """A vector of one value."""
    kind = ir.VectorType(value.type, LANES)
    alone = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(alone, alone, ir.Constant(_INTS, [0] * LANES))


def _counted(builder: Any, count: Any, body: Callable[[Any], None]) -> None:
    """A loop of `count` turns, none if that is 0; leaves the builder behind it."""
    before, test, loop = builder.block, builder.append_basic_block("test"), builder.append_basic_block("turn")
    after = builder.append_basic_block("after")
    builder.branch(test)
    builder.position_at_end(test)
    at = builder.phi(_INDEX)
    at.add_incoming(_INDEX(0), before)
    builder.cbranch(builder.icmp_signed("<", at, count), loop, after)
    builder.position_at_end(loop)
    body(at)
    at.add_incoming(builder.add(at, _INDEX(1)), builder.block)
    builder.branch(test)
    builder.position_at_end(after)
