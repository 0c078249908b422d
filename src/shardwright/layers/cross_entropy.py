"""Next-token loss from logits that lie cut by vocabulary: they are never gathered.

Per row each rank tells three numbers: its largest logit, its sum of exponentials, the target's logit where it holds it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.comm.group import Group
from shardwright.kernels.cross_entropy import implementation
from shardwright.layout.partition import Partition

IGNORED = -1
"""The target of a row that counts for nothing: its loss is 0, and its gradient."""


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, vocabulary: Partition, group: Group, tag: str = "loss"
) -> Tensor:
    """`-log softmax(logits)[target]` of each row, `[T]`, alike on every rank, in float32 for half types.

    logits `[T, V_r]`, this rank's words · targets `[T]` int64, alike on every rank; a negative one is ignored.

    forward:   one all-gather of 3 x T numbers a rank, combined in rank order
    backward:  `dlogits_r = (softmax_r - onehot_r) * dloss`        nothing moves
    """
    loss: Tensor = _CrossEntropy.apply(logits, targets, vocabulary.range(group.rank), group, tag)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Keeps one tensor of the logits' size: which one is the kernel's business."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, words: tuple[int, int], group: Group, tag: str) -> Tensor:
        wide = _wide(logits)
        here, column = _mine(targets, words)
        told, kept = wide.new_empty(1, 3, len(wide)), wide
        if words[0] == words[1]:  # no words: nothing to the maximum, nothing to the sums
            told.copy_(torch.tensor([-torch.inf, 0, 0])[None, :, None])
        else:
            ctx.chosen = implementation(wide)
            told[0, :2], kept = ctx.chosen.forward(wide)
            told[0, 2] = wide.gather(1, column[:, None])[:, 0].masked_fill(~here, 0)
        parts = group.all_gather(told, 0, [1] * group.size, tag=tag)
        largest = parts[:, 0].amax(0)
        total = (parts[:, 1] * (parts[:, 0] - largest).exp()).sum(0)
        ctx.save_for_backward(kept, targets, told[0, :2], (told[0, 0] - largest).exp() / total)
        ctx.words, ctx.dtype = words, logits.dtype
        return (total.log() + largest - parts[:, 2].sum(0)).masked_fill(targets < 0, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        kept, targets, parts, share = ctx.saved_tensors
        here, column = _mine(targets, ctx.words)
        dloss = dloss.masked_fill(targets < 0, 0)
        if ctx.words[0] == ctx.words[1]:
            return torch.zeros_like(kept, dtype=ctx.dtype), None, None, None, None
        dlogits = ctx.chosen.backward(kept, parts, share * dloss, column, dloss.masked_fill(~here, 0))
        return dlogits.to(ctx.dtype), None, None, None, None


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _mine(targets: Tensor, words: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which targets this rank holds, and their columns here (0 for the others)."""
    here = (targets >= words[0]) & (targets < words[1])
    return here, (targets - words[0]).masked_fill(~here, 0)
