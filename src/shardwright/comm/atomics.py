"""Compiled words that ranks share: loads and stores with order, and waiting that spins, yields, then sleeps.

Everything here is numba, compiled once and cached, and takes addresses as integers, so that a compiled step can inline
it. Knows one word and who sleeps on it; nothing of slots or collectives. The first import compiles, later ones load.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shardwright.comm.compiled import compiled

WORD, LINE = 8, 64
"""Bytes of a shared word, and of a cache line."""

YIELDS, SLEEPS = 200, 100
"""Looks at a word between spinning and sleeping, and the most sleeps before a wait gives its caller a turn."""

FUTEX = {"x86_64": 202, "aarch64": 98}
"""The system call's number, by machine."""

_WAIT, _WAKE, _EVERYONE = 0, 1, 0x7FFFFFFF

_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def load_acquire(typing: Any, address: Any) -> Any:
    """The int64 at an address: nothing after it is read before it, and it is not read before a store ahead of it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0]), "seq_cst", WORD)

    return types.int64(types.int64), generate


@intrinsic
def store_release(typing: Any, address: Any, value: Any) -> Any:
    """Write an int64: who sees it sees everything written before. Ordered before the `load_acquire`s that follow."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _pointer(builder, arguments[0]), "seq_cst", WORD)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def fetch_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to an int64 in one step; what it held before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def claim(typing: Any, address: Any) -> Any:
    """Ask for the line at an address, any address, in order to write to it; waits for nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        to_write, first_cache, data = flag(1), flag(3), flag(1)
        builder.call(prefetch, [builder.inttoptr(arguments[0], byte), to_write, first_cache, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def pointer_to(numba_type: Any, bits: Any) -> Any:
    """For compiled code: a function from an address to a pointer of that type; `bits` is its LLVM type."""

    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], bits.as_pointer())

        return types.CPointer(numba_type)(types.int64), generate

    return pointer


@compiled("void(int64, int64, int64, int64)")
def publish(word: int, value: int, sleepers: int, futex: int) -> None:
    """Store a word and wake whoever sleeps on it. sleepers: address of their count · futex: the system call."""
    store_release(word, value)
    if load_acquire(sleepers) > 0:
        _syscall(futex, word, _WAKE, _EVERYONE, 0, 0, 0)


@compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def await_word(word: int, wanted: int, sleepers: int, abort: int, spins: int, futex: int, nap: int, sleeps: int) -> int:
    """Wait until a word is at least `wanted`: 0; or give up: -1 as a rank has failed, 1 as time has passed.

    sleepers: address of the count that tells the word's writer to wake us · abort: address of the job's abort word ·
    spins: looks before the first yield · nap: address of a timespec, how long to sleep at most: a lost wake-up costs no
    more than that · sleeps: how often. Who gets 1 sees to signals and time limits, and calls again.
    """
    looks = 0
    while load_acquire(word) < wanted:
        looks += 1
        if looks <= spins:
            continue
        if load_acquire(abort) != 0:
            return -1
        if looks <= spins + YIELDS:
            _sched_yield()
            continue
        if looks > spins + YIELDS + sleeps:
            return 1
        fetch_add(sleepers, 1)
        seen = load_acquire(word)
        if seen < wanted:
            _syscall(futex, word, _WAIT, seen & 0xFFFFFFFF, nap, 0, 0)
        fetch_add(sleepers, -1)
    return 0


@compiled("int64(int64)")
def read_word(address: int) -> int:
    """`load_acquire`, from Python."""
    return load_acquire(address)


@compiled("void(int64, int64)")
def write_word(address: int, value: int) -> None:
    """`store_release`, from Python."""
    store_release(address, value)
