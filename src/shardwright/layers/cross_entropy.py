"""Next-token loss from logits that lie cut by vocabulary: they are never gathered.

Per row each rank tells three numbers: its largest logit, its sum of exponentials, the target's logit where it holds it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.comm.group import Group
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
    """Keeps the exponentials less each row's largest logit here, in place of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, words: tuple[int, int], group: Group, tag: str) -> Tensor:
        wide = _wide(logits)
        here, column = _mine(targets, words)
        told = wide.new_empty(1, 3, len(wide))
        if words[0] == words[1]:  # no words: nothing to the maximum, nothing to the sums
            told.copy_(torch.tensor([-torch.inf, 0, 0])[None, :, None])
            powers = wide
        else:
            told[0, 0] = wide.amax(1)
            told[0, 2] = wide.gather(1, column[:, None])[:, 0].masked_fill(~here, 0)
            powers = (wide - told[0, 0][:, None]).exp_()
            told[0, 1] = powers.sum(1)
        parts = group.all_gather(told, 0, [1] * group.size, tag=tag)
        largest = parts[:, 0].amax(0)
        total = (parts[:, 1] * (parts[:, 0] - largest).exp()).sum(0)
        ctx.save_for_backward(powers, targets, (told[0, 0] - largest).exp() / total)
        ctx.words, ctx.dtype = words, logits.dtype
        return (total.log() + largest - parts[:, 2].sum(0)).masked_fill(targets < 0, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        powers, targets, share = ctx.saved_tensors
        here, column = _mine(targets, ctx.words)
        dloss = dloss.masked_fill(targets < 0, 0)
        dlogits = powers * (share * dloss)[:, None]
        if dlogits.shape[1]:
            dlogits.scatter_add_(1, column[:, None], (-dloss).masked_fill(~here, 0)[:, None])
        return dlogits.to(ctx.dtype), None, None, None, None


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _mine(targets: Tensor, words: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which targets this rank holds, and their columns here (0 for the others)."""
    here = (targets >= words[0]) & (targets < words[1])
    return here, (targets - words[0]).masked_fill(~here, 0)
