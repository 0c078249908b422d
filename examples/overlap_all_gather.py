"""Layers whose weights are split over two ranks: each weight is gathered while the layer before it computes.

Every other layer a rank has four times the work, as where experts or sequences are unlike; whoever is done first waits.

python examples/overlap_all_gather.py
"""

import torch

from shardwright import Group, Partition, ThreadGroup

LAYERS, FEATURES, TOKENS, RANKS = 8, 768, 256, 2
ROWS = Partition.balanced(FEATURES, RANKS)
WEIGHTS = torch.randn(LAYERS, FEATURES, FEATURES, generator=torch.Generator().manual_seed(0)) / FEATURES**0.5


def layer(x: torch.Tensor, weight: torch.Tensor, times: int) -> torch.Tensor:
    """One layer, computed so many times."""
    for _ in range(times):
        y = torch.tanh(x @ weight.T)
    return y


def in_turn(group: Group) -> tuple[torch.Tensor, float]:
    """Gather, compute, gather, compute: the output, and the seconds this rank has waited."""
    x, (start, stop) = torch.ones(TOKENS, FEATURES), ROWS.range(group.rank)
    for i in range(LAYERS):
        weight = group.all_gather(WEIGHTS[i, start:stop], 0, ROWS.widths)
        x = layer(x, weight, 4 if i % RANKS == group.rank else 1)
    return x, group.waited_s


def a_layer_ahead(group: Group) -> tuple[torch.Tensor, float]:
    """The same, each gather begun before the layer in front of it is computed."""
    x, (start, stop) = torch.ones(TOKENS, FEATURES), ROWS.range(group.rank)
    coming = group.all_gather_async(WEIGHTS[0, start:stop], 0, ROWS.widths)
    for i in range(LAYERS):
        weight = coming.wait()
        if i + 1 < LAYERS:
            coming = group.all_gather_async(WEIGHTS[i + 1, start:stop], 0, ROWS.widths)
        x = layer(x, weight, 4 if i % RANKS == group.rank else 1)
    return x, group.waited_s


ThreadGroup.run(RANKS, in_turn)  # to warm up
plain, overlapped = ThreadGroup.run(RANKS, in_turn), ThreadGroup.run(RANKS, a_layer_ahead)
for rank in range(RANKS):
    (y, waited), (ours, less) = plain[rank], overlapped[rank]
    assert torch.equal(y, ours)
    hidden = 1 - less / waited
    print(f"rank {rank}: waited {waited * 1e3:.1f} ms in turn, {less * 1e3:.1f} a layer ahead: {hidden:.0%} hidden")
