"""`Segment`: memory that the ranks of one host share, and where everything in it lies.

Control words of each rank, then its slots, then a mailbox for each ordered pair. It is a memfd, so nothing of it has a
name and nothing is left when the last rank ends. Knows no collective.
"""

import mmap
import os
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwright.errors import CommError

STRIDE = 128
"""Bytes of a rank's control words: a pair of cache lines, so that no two ranks write to the same."""

POSTED, FINGERPRINT, SLEEPERS, PID, TOLD, WAITING, MOVES, TURNS, LEFT = 0, 1, 3, 4, 5, 6, 7, 8, 9
"""Which control word is what: rounds posted · fingerprints of the last even and odd round · how many sleep on the first
word · the process · the round whose text lies in `text` · three of `comm.standstill` · whether a rank has left well."""

TEXT = 512
"""Bytes in which a rank says what it called, once ranks disagree, or what it waits for, once that takes long."""

SLOT = 1 << 19
"""Bytes of a slot: two of each rank stay in a core's share of the cache."""

MAILBOX = 1 << 16
"""Bytes that travel from one rank to another at a time, behind a control line of their own."""

LETTER_WRITTEN, LETTER_READ, LETTER_NAME, LETTER_TEXT = 0, 8, 16, 24
"""Where a mailbox's control line keeps the counts of chunks written and read, and of the letter in it the fingerprint,
and in what is left of the line, in words, what was called."""

NAP_NS, NAP_SIZE = 1_000_000, 16
"""The timespec in which waits sleep, at the segment's beginning."""


@final
class Segment:
    """The shared memory of a group of `ranks`, new, or another process's by its descriptor."""

    def __init__(self, ranks: int, fd: int | None = None) -> None:
        self.ranks = ranks
        texts = mmap.PAGESIZE + ranks * STRIDE
        self._texts = texts
        self._slots = -(-(texts + ranks * TEXT) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._mail = self._slots + ranks * 2 * SLOT
        size = self._mail + ranks * ranks * (MAILBOX + STRIDE)
        if fd is None:
            _check_available(size)
            fd = os.memfd_create("shardwright-segment")
            os.ftruncate(fd, size)
        self.fd = fd
        self._bytes: NDArray[np.uint8] = np.frombuffer(mmap.mmap(fd, size), np.uint8)
        self._words = self._bytes[: self._slots].view(np.int64)
        self._words[:2] = 0, NAP_NS
        self._tensor = torch.from_numpy(self._bytes)
        self.address = self._bytes.ctypes.data

    @property
    def nap(self) -> int:
        """Address of the timespec in which waits sleep."""
        return self.address

    @property
    def stuck(self) -> int:
        """Address of a word that is set once ranks are known to wait for each other."""
        return self.address + NAP_SIZE

    @property
    def abort(self) -> memoryview:
        """Room for an abort word, for ranks that have inherited none."""
        return self._bytes[NAP_SIZE + 8 : NAP_SIZE + 16].data

    @property
    def control(self) -> int:
        """Address of rank 0's control words; the others follow at `STRIDE`."""
        return self.address + mmap.PAGESIZE

    @property
    def slots(self) -> int:
        """Address of rank 0's first slot; its second follows, then the other ranks'."""
        return self.address + self._slots

    def words(self, rank: int) -> NDArray[np.int64]:
        """A rank's control words."""
        start = (mmap.PAGESIZE + rank * STRIDE) // 8
        return self._words[start : start + STRIDE // 8]

    def word(self, rank: int, which: int) -> int:
        """Address of one of a rank's control words."""
        return self.control + rank * STRIDE + 8 * which

    def text(self, rank: int) -> NDArray[np.uint8]:
        """Where a rank says what it called."""
        start = self._texts + rank * TEXT
        return self._bytes[start : start + TEXT]

    def slot(self, rank: int, buffer: int) -> Tensor:
        """One of a rank's two slots, as bytes."""
        start = self._slots + (2 * rank + buffer) * SLOT
        return self._tensor[start : start + SLOT]

    def mailbox(self, source: int, destination: int) -> tuple[int, NDArray[np.uint8], Tensor]:
        """Address of a pair's control line, the text in it, and the bytes behind it."""
        start = self._mail + (source * self.ranks + destination) * (MAILBOX + STRIDE)
        room = start + STRIDE
        return self.address + start, self._bytes[start + LETTER_TEXT : room], self._tensor[room : room + MAILBOX]


def bytes_of(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor, also of one that has a single element and some stride."""
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


def put_text(place: NDArray[np.uint8], text: str) -> None:
    """Say it there, or as much as there is room for."""
    said = text.encode()[: len(place)].ljust(len(place), b"\0")
    place[:] = np.frombuffer(said, np.uint8)


def text_of(place: NDArray[np.uint8]) -> str:
    """What `put_text` said there."""
    return place.tobytes().rstrip(b"\0").decode(errors="replace")


def _check_available(size: int) -> None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            if size > available:
                need = f"the ranks' shared memory needs {size:,} bytes and {available:,} are available"
                raise CommError(f"{need}; use fewer ranks, or free some memory")
