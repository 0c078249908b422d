"""Gradients summed over data-parallel ranks: at once (`synchronize_gradients`), or in buckets while backward runs.

Decides when a bucket leaves, and in which form: whole to every rank, only to the rank that owns that part of the
optimiser (ZeRO-1, Rajbhandari et al. 2020), or compressed. Knows no model; which gradients are late the buffers say.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor, nn

from shardwright.comm.compression import Method, all_reduce_compressed_async
from shardwright.comm.group import Group, Handle
from shardwright.layout.partition import Partition, Range
from shardwright.train.flat import FlatParameters

BUCKET = 8 << 20
"""Bytes of a bucket: large enough that a collective's fixed cost is little of it, small enough to leave early."""


def synchronize_gradients(
    model: nn.Module, group: Group, *, op: Literal["mean", "sum"] = "mean", tag: str = "gradients"
) -> None:
    """Replace every parameter's `.grad` by its mean (or sum) over the group's ranks: once a step, after backward.

    A parameter without a gradient counts as zeros, and receives the sum. Buckets of some MB, all under way at once.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    under_way = []
    for bucket in _filled(parameters):
        flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in bucket])
        under_way.append((bucket, group.all_reduce_async(flat, out=flat, tag=tag)))
    for bucket, handle in under_way:
        total = handle.wait()
        if op == "mean":
            total /= group.size
        for parameter, part in zip(bucket, torch.split(total, [p.numel() for p in bucket]), strict=True):
            _gradient(parameter).copy_(part.view_as(parameter))


def _filled(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, some `BUCKET` bytes each."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and (sum(p.nbytes for p in bucket) >= BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@dataclass
class _Bucket:
    """A stretch of the buffers, the parameters whose gradients it still waits for, and its collective once begun."""

    range: Range
    names: frozenset[str]
    late: bool
    missing: set[str] = field(default_factory=set)
    handle: Handle | None = None


@final
class GradientSynchroniser:
    """Sums `flat.grad` over data-parallel ranks, once an accumulation window.

    `begin` before the window's last backward: from then on each bucket leaves as soon as its gradients are there.
    `finish` after it: what has not left leaves, and all are waited for. Buckets leave in one order on every rank.

    shares: which part of the buffer each rank updates; without them every rank all of it. With them a bucket is
    reduce-scattered, and only this rank's share of `flat.grad` is the sum afterwards. compression: instead, compressed
    bytes are gathered; `residual` is what it has lost so far.
    """

    def __init__(
        self,
        flat: FlatParameters,
        group: Group,
        *,
        shares: Partition | None = None,
        compression: Method | None = None,
        bucket: int = BUCKET,
    ) -> None:
        self.flat, self.group, self.shares, self.compression = flat, group, shares, compression
        self.residual = torch.zeros_like(flat.grad, dtype=torch.float32) if compression else None
        self._buckets = list(_cut(flat, bucket))
        self._begun, self._method = len(self._buckets), compression
        if group.size > 1:
            flat.listen(self._arrived)

    def begin(self, *, compress: bool = True) -> None:
        """The backward that comes next, if this rank has one, is the window's last. compress: False: not this time."""
        self._begun, self._method = 0, self.compression if compress else None
        for bucket in self._buckets:
            bucket.missing = set(bucket.names)

    def finish(self) -> None:
        """Send what has not left, and wait for all."""
        if self.group.size == 1:
            return
        for bucket in self._buckets:
            if bucket.handle is None:
                self._send(bucket)
        for bucket in self._buckets:
            self._receive(bucket)
        self._begun = len(self._buckets)

    def _arrived(self, name: str) -> None:
        for bucket in self._buckets[self._begun :]:
            bucket.missing.discard(name)
        while self._begun < len(self._buckets) and self._ready(self._buckets[self._begun]):
            self._send(self._buckets[self._begun])
            self._begun += 1
        under_way = next((bucket.handle for bucket in self._buckets if bucket.handle is not None), None)
        if under_way is not None:
            under_way.done()  # lets groups that have no thread of their own go on

    @staticmethod
    def _ready(bucket: _Bucket) -> bool:
        return not bucket.missing and not bucket.late

    def _send(self, bucket: _Bucket) -> None:
        start, stop = bucket.range
        gradient, tag = self.flat.grad[start:stop], "gradients"
        if self._method is not None and self.residual is not None:
            residual = self.residual[start:stop]
            bucket.handle = all_reduce_compressed_async(gradient, self.group, self._method, residual=residual, tag=tag)
        elif self.shares is None:
            bucket.handle = self.group.all_reduce_async(gradient, out=gradient, tag=tag)
        else:
            widths = [_overlap(bucket.range, self.shares.range(rank)) for rank in range(self.group.size)]
            sizes = [high - low for low, high in widths]
            bucket.handle = self.group.reduce_scatter_async(gradient, 0, sizes, tag=tag)

    def _receive(self, bucket: _Bucket) -> None:
        if bucket.handle is None:
            raise AssertionError("a bucket was waited for before it was sent")
        total, bucket.handle = bucket.handle.wait(), None
        start, stop = bucket.range
        if self.shares is not None and self._method is None:
            start, stop = _overlap(bucket.range, self.shares.range(self.group.rank))
        if self.shares is not None or self._method is not None:
            self.flat.grad[start:stop] = total


def _overlap(bucket: Range, share: Range) -> Range:
    low = max(bucket[0], share[0])
    return low, max(low, min(bucket[1], share[1]))


def _cut(flat: FlatParameters, size: int) -> Iterator[_Bucket]:
    """Consecutive slots, each bucket at least `size` bytes unless it is the last; late ones by themselves."""
    for late in (False, True):
        names: list[str] = []
        for name, slot in flat.slots.items():
            if (name in flat.late) != late:
                continue
            names.append(name)
            if (slot.stop - flat.slots[names[0]].start) * flat.grad.itemsize >= size:
                yield _bucket(flat, names, late)
                names = []
        if names:
            yield _bucket(flat, names, late)


def _bucket(flat: FlatParameters, names: list[str], late: bool) -> _Bucket:
    return _Bucket((flat.slots[names[0]].start, flat.slots[names[-1]].stop), frozenset(names), late)
