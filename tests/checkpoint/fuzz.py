"""Damaged headers by the million: `python -m tests.checkpoint.fuzz gguf --mutations 500000`; or `--seconds`, or files.

Each is a sound file with a few mutations. It must be refused with an error of ours, on one line and in a second, or
still describe what the file holds; and the process may not grow by more than 100 MB, which the system enforces. The
file is memory, so that nothing touches a disk. Imports no torch.
"""

import argparse
import os
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.checkpoint.gguf_bytes import ALIGNED, A, array, gguf_bytes, pair, string, tensor

from shardwright.checkpoint import gguf, safetensors
from shardwright.checkpoint.entry import Entry, stored_size
from shardwright.checkpoint.file import File
from shardwright.errors import FileError, UnsupportedError

ALLOWANCE = 100_000_000
LONGEST = 1.0
"""Seconds of processor time over one file: other work on the machine is not its fault."""
NUMBERS = [
    0,
    1,
    2,
    7,
    8,
    9,
    31,
    32,
    33,
    255,
    256,
    65_535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**61,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
SNIPPETS = [
    b"0",
    b"9" * 20,
    b"-1",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b":",
    b"null",
    b"1e9",
    b"\\ud800",
    b"\xff",
    b"\0",
]


def sound_gguf() -> Iterator[bytes]:
    """Every kind of value, several types of tensors."""
    words = pair("w", 9, array(8, 3, string("ab") + string("ä") + string("")))
    nested = pair("n", 9, array(9, 2, array(4, 1, struct.pack("<I", 7)) + array(8, 1, string("x"))))
    scalars = [
        pair(f"k{kind}", kind, bytes(size)) for kind, size in {0: 1, 3: 2, 4: 4, 6: 4, 7: 1, 10: 8, 12: 8}.items()
    ]
    yield gguf_bytes([ALIGNED, words, nested, *scalars], [A, tensor("q", (32, 2), 3, 32)], data=96)
    yield gguf_bytes([words], [tensor("k", (256,), 12, 0), tensor("e", (0, 4), 0, 160)], data=160)
    yield gguf_bytes([pair("f", 9, array(6, 40, bytes(160))), pair("s", 8, string("x" * 300))], [A])


def sound_safetensors() -> Iterator[bytes]:
    """One tensor of each of several types, metadata, spaces at the end."""
    header = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    header += b'"b.weight":{"dtype":"F8_E4M3","shape":[5],"data_offsets":[24,29]},'
    header += b'"c":{"dtype":"BF16","shape":[],"data_offsets":[29,31]},'
    header += b'"d":{"dtype":"I64","shape":[0,9],"data_offsets":[31,31]}}  '
    yield len(header).to_bytes(8, "little") + header + bytes(31)
    yield (2).to_bytes(8, "little") + b"{}"


KINDS: dict[str, tuple[Callable[[], Iterator[bytes]], Callable[[File], Mapping[str, Entry]]]] = {
    "gguf": (sound_gguf, lambda file: gguf.parse_header(file)[1]),
    "safetensors": (sound_safetensors, safetensors.parse_header),
}


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: bits, numbers, insertions, deletions, copies of parts, an end too soon or too late."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, kind = draw.randrange(len(out) or 1), draw.randrange(9)
        width = draw.choice((1, 2, 4, 8))
        if kind == 0 and out:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and out:
            out[at] = draw.randrange(256)
        elif kind in (2, 3):
            number = draw.choice(NUMBERS) & ((1 << 8 * width) - 1)
            out[at : at + (width if kind == 2 else 0)] = number.to_bytes(width, "little")
        elif kind == 4:
            out[at : at + draw.choice((1, 2, 8, 40))] = b""
        elif kind == 5:
            start = draw.randrange(len(out) or 1)
            out[at:at] = out[start : start + draw.choice((1, 8, 40))]
        elif kind == 6:
            out[at : at + draw.choice((0, 1, 2))] = draw.choice(SNIPPETS) * draw.choice((1, 1, 1, 200))
        elif kind == 7:
            del out[at:]
        else:
            out += bytes(draw.choice((1, 8, 32, 33)))
    return bytes(out)


class Fuzz:
    """Counts what became of each case; raises where one breaks a promise."""

    def __init__(self, kind: str) -> None:
        sound, self.parse = KINDS[kind]
        self.sound = list(sound())
        self.fd = os.memfd_create("fuzz")
        self.outcomes: Counter[str] = Counter()
        self.longest = 0.0

    def check_bytes(self, data: bytes) -> None:
        """One file, given as what it holds."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, data, 0)
        self.check(f"/proc/self/fd/{self.fd}")

    def check(self, path: str) -> str:
        """One file; what was said against it."""
        message, start = "", time.process_time()
        try:
            with File(path) as file:
                entries = self.parse(file)
        except (FileError, UnsupportedError) as error:
            message = str(error)
            if "\n" in message or len(message.encode()) > 2_000:
                raise AssertionError(f"no line for people: {message!r}") from error
            self.outcomes[type(error).__name__] += 1
        else:
            for entry in entries.values():
                if not 0 <= entry.offset <= entry.end <= file.size or entry.nbytes != stored_size(
                    entry.dtype, entry.shape
                ):
                    raise AssertionError(f"not in the file: {entry}")
            self.outcomes["sound"] += 1
        self.longest = max(self.longest, time.process_time() - start)
        if self.longest > LONGEST:
            raise AssertionError(f"a header took {self.longest:.1f} s")
        return message


def started(kind: str) -> Fuzz:
    """With memory limited from here on, what the sound files took being taken already."""
    fuzz = Fuzz(kind)
    for data in fuzz.sound:
        fuzz.check_bytes(data)
    if fuzz.outcomes != {"sound": len(fuzz.sound)}:
        raise AssertionError(f"the sound files are not: {fuzz.outcomes}")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ALLOWANCE, resource.RLIM_INFINITY))
    return fuzz


def run(fuzz: Fuzz, *, mutations: int, seconds: float, seed: int) -> None:
    """Until the one or the other is used up."""
    draw, end = random.Random(seed), time.monotonic() + seconds
    for i in range(mutations):
        data = mutated(draw.choice(fuzz.sound), draw)
        try:
            fuzz.check_bytes(data)
        except BaseException:
            Path(f"fuzz-{seed}-{i}").write_bytes(data)
            raise
        if not i % 256 and time.monotonic() > end:
            break


def main() -> None:
    """Print what became of them."""
    parser = argparse.ArgumentParser(description="Feed damaged headers to a reader.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("files", nargs="*", help="check these, and say what is said against each")
    parser.add_argument("--mutations", type=int, default=10**12)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fuzz = started(options.kind)
    for path in options.files:
        sys.stdout.write(f"{fuzz.check(path)}\n")
    if not options.files:
        run(fuzz, mutations=options.mutations, seconds=options.seconds, seed=options.seed)
    figures = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(fuzz.outcomes.items()))
    sys.stdout.write(f"{options.kind}: {figures}; the longest took {fuzz.longest * 1e3:.0f} ms\n")


if __name__ == "__main__":
    main()
