"""`Room`: one block of memory for all of a rank's weights.

Asked for in huge pages: decoding reads every weight once a token, and with pages of 4 KiB the processor spends that
time looking addresses up (`benchmarks/NOTES.md`). It is also filled faster, as it takes fewer faults.
"""

import mmap
from math import prod
from typing import final

import torch
from torch import Tensor

LINE = 64
"""Bytes at a multiple of which each tensor begins: a cache line."""


@final
class Room:
    """Room for tensors of `nbytes` in all, and for what their alignment wastes; each lies behind the one before."""

    def __init__(self, nbytes: int, tensors: int) -> None:
        size = max(nbytes + tensors * LINE, 1)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._used = 0

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor, its values zero. It keeps the whole room alive."""
        nbytes = prod(shape) * dtype.itemsize
        start, self._used = self._used, -(-(self._used + nbytes) // LINE) * LINE
        return self._bytes[start : start + nbytes].view(dtype).view(shape)
