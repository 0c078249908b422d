"""`RecordingGroup`: another group with a list of what was asked of it."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from shardwright.comm.group import Call, Group, Handle


@final
class RecordingGroup(Group):
    """Wraps a group; `calls` lists this rank's collectives in order, those of its splits too."""

    def __init__(self, inner: Group, calls: list[Call] | None = None) -> None:
        super().__init__(inner.rank, inner.size, inner)
        self.inner = inner
        self.calls: list[Call] = [] if calls is None else calls

    def split(self, ranks: Sequence[int]) -> "RecordingGroup":
        """The inner group's split, recorded in the same list."""
        return RecordingGroup(self.inner.split(ranks), self.calls)

    def _all_reduce(self, x: Tensor, out: Tensor | None, call: Call) -> Handle:
        return self.inner._all_reduce(x, out, self._noted(call))

    def _all_gather(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        return self.inner._all_gather(x, dim, sizes, self._noted(call))

    def _reduce_scatter(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        return self.inner._reduce_scatter(x, dim, sizes, self._noted(call))

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int], call: Call) -> Handle:
        return self.inner._all_to_all(x, send, receive, self._noted(call))

    def _broadcast(self, x: Tensor, root: int, call: Call) -> Handle:
        return self.inner._broadcast(x, root, self._noted(call))

    def _send(self, x: Tensor, destination: int, call: Call) -> Handle:
        return self.inner._send(x, destination, self._noted(call))

    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, call: Call) -> Handle:
        return self.inner._recv(shape, dtype, source, self._noted(call))

    def _barrier(self, call: Call) -> Handle:
        return self.inner._barrier(self._noted(call))

    def _noted(self, call: Call) -> Call:
        self.calls.append(call)
        return call
