"""Gradients with fewer bits on the wire, and what that costs them: bfloat16, int8, or the sign alone.

Decides the formats. What was lost can be kept and added to the next gradient (error feedback, Seide et al. 2014), so
that over many steps nothing is. Sums are of what every rank sent, in rank order, the same bits on all ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from shardwright.comm.group import Group, Handle, sum_in_rank_order
from shardwright.errors import UsageError

Method = Literal["bf16", "int8", "1bit"]
METHODS: tuple[Method, ...] = ("bf16", "int8", "1bit")

BLOCK = 256
"""Elements that share one float32 scale: 1/256 of an uncompressed gradient's bytes."""


@dataclass(frozen=True)
class CompressedGradient:
    """A gradient's elements as bytes, and one scale a block of `BLOCK` (none for bfloat16).

    shape: of the gradient · payload `[bytes]` uint8 · scales `[blocks]` float32.
    """

    method: Method
    shape: tuple[int, ...]
    payload: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.payload.nbytes + self.scales.nbytes


def compress_gradient(gradient: Tensor, method: Method) -> CompressedGradient:
    """A floating gradient in fewer bits.

    ======  ==========================================  ===================
    method  each element                                bytes an element
    ======  ==========================================  ===================
    bf16    rounded to bfloat16                         2
    int8    a 127th of its block's largest, rounded     1 + 4 / 256
    1bit    plus or minus its block's mean magnitude    1/8 + 4 / 256
    ======  ==========================================  ===================

    Raises:
        UsageError: an unknown method, or a gradient that is not floating.
    """
    if method not in METHODS:
        raise UsageError("method", method, "there is no such compression", f"use one of {', '.join(METHODS)}")
    if not gradient.is_floating_point():
        raise UsageError("gradient", gradient.dtype, "only floating gradients are compressed", "pass one")
    shape = tuple(gradient.shape)
    flat = gradient.detach().reshape(-1).float()
    none = flat.new_empty(0)
    if method == "bf16":
        return CompressedGradient(method, shape, flat.bfloat16().view(torch.uint8), none)
    if method == "int8":
        scales = _by_block(flat.abs(), lambda blocks: blocks.amax(1)) / 127
        whole = (flat / _spread(scales, len(flat)).clamp_min(torch.finfo(torch.float32).tiny)).round()
        return CompressedGradient(method, shape, whole.to(torch.int8).view(torch.uint8), scales)
    scales = _by_block(flat.abs(), lambda blocks: blocks.sum(1)) / _counts(len(flat))
    signs = torch.from_numpy(np.packbits((flat >= 0).numpy()))
    return CompressedGradient(method, shape, signs, scales)


def decompress_gradient(compressed: CompressedGradient) -> Tensor:
    """What a compressed gradient stands for, float32, in the gradient's shape."""
    numel = int(np.prod(compressed.shape))
    if compressed.method == "bf16":
        flat = compressed.payload.view(torch.bfloat16).float()
    elif compressed.method == "int8":
        flat = compressed.payload.view(torch.int8).float() * _spread(compressed.scales, numel)
    else:
        signs = torch.from_numpy(np.unpackbits(compressed.payload.numpy(), count=numel))
        flat = (signs.float() * 2 - 1) * _spread(compressed.scales, numel)
    return flat.view(compressed.shape)


def all_reduce_compressed(
    gradient: Tensor, group: Group, method: Method, *, residual: Tensor | None = None, tag: str = ""
) -> Tensor:
    """The sum over ranks of what each rank's gradient is compressed to; of the gradient's shape and dtype.

    residual: float32 like the gradient, kept from call to call and changed here: what compression lost so far is added
    before, and what it loses now is left in it. One all-gather of the compressed bytes.
    """
    return all_reduce_compressed_async(gradient, group, method, residual=residual, tag=tag).wait()


def all_reduce_compressed_async(
    gradient: Tensor, group: Group, method: Method, *, residual: Tensor | None = None, tag: str = ""
) -> Handle:
    """`all_reduce_compressed` under way."""
    wanted = gradient.detach().float()
    if residual is not None:
        wanted = wanted + residual
    mine = compress_gradient(wanted, method)
    if residual is not None:
        residual.copy_(wanted - decompress_gradient(mine))
    message = torch.cat((mine.scales.view(torch.uint8), mine.payload))
    under_way = group.all_gather_async(message, 0, [len(message)] * group.size, tag=tag)

    def total(parts: Tensor) -> Tensor:
        split = mine.scales.nbytes
        each = [
            CompressedGradient(method, mine.shape, part[split:].clone(), part[:split].clone().view(torch.float32))
            for part in parts.view(group.size, -1)
        ]
        return sum_in_rank_order([decompress_gradient(part) for part in each]).to(gradient.dtype)

    return _Then(under_way, total)


@final
class _Then(Handle):
    """What comes of another handle's result."""

    def __init__(self, inner: Handle, finish: Callable[[Tensor], Tensor]) -> None:
        super().__init__(inner.call)
        self._inner, self._last = inner, finish

    def done(self) -> bool:
        """As the other."""
        return self._inner.done()

    def _finish(self) -> Tensor:
        return self._last(self._inner.wait())


def _counts(numel: int) -> Tensor:
    return torch.tensor([min(BLOCK, numel - start) for start in range(0, numel, BLOCK)], dtype=torch.float32)


def _by_block(flat: Tensor, reduced: Callable[[Tensor], Tensor]) -> Tensor:
    """`[numel]` of magnitudes → `[blocks]`; the last block may be short, and zeros change neither sum nor maximum."""
    blocks = -(-len(flat) // BLOCK)
    return reduced(torch.nn.functional.pad(flat, (0, blocks * BLOCK - len(flat))).view(blocks, BLOCK))


def _spread(scales: Tensor, numel: int) -> Tensor:
    return scales.repeat_interleave(BLOCK)[:numel]
