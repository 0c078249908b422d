"""A feed-forward block split over three ranks, and its proof: the same output and gradients as the unsharded block.

python examples/layers_by_hand.py
"""

import torch

from shardwright import ColumnParallelLinear, Group, Partition, RowParallelLinear, SingleGroup, ThreadGroup

HIDDEN, INNER, TOKENS = 8, 11, 5


def block(group: Group) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Output, input gradient, and the shape of this rank's part of the first weight. Initial values never depend on
    the split, so every group size builds the same block.
    """
    inner = Partition.balanced(INNER, group.size)
    up = ColumnParallelLinear(HIDDEN, inner, group, bias=True, name="up")
    down = RowParallelLinear(inner, HIDDEN, group, bias=True, name="down")
    x = torch.linspace(-1, 1, TOKENS * HIDDEN).view(TOKENS, HIDDEN).requires_grad_()
    y = down(torch.nn.functional.gelu(up(x)))
    y.square().sum().backward()
    return y.detach(), x.grad, tuple(up.weight.shape)


whole, gradient, _ = block(SingleGroup())
for rank, (y, dx, shape) in enumerate(ThreadGroup.run(3, block)):
    torch.testing.assert_close(y, whole)
    torch.testing.assert_close(dx, gradient)
    print(f"rank {rank}: holds {list(shape)} of [{INNER}, {HIDDEN}]; output and input gradient equal the whole block's")
