"""A transformer of torch's own, split over three ranks without a word about how, trained beside its unsharded twin.

python examples/split_my_model.py
"""

import torch
from torch import Tensor, nn

from shardwright import Group, ThreadGroup, full_state_dict, parallelize_model, trace

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(d_model=24, nhead=4, dim_feedforward=50, dropout=0.0, batch_first=True)
model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(24, 10)).double()
traced = trace(model, (torch.randn(2, 7, 24, dtype=torch.float64),))  # once; knows no group
batches = [torch.randn(3, length, 24, dtype=torch.float64) for length in (5, 9, 6)]  # other lengths than the example's


def train(part: nn.Module) -> list[float]:
    """A few steps, as with any module: the loss after each."""
    optimizer, losses = torch.optim.AdamW(part.parameters(), lr=0.01), []
    for x in batches:
        loss = part(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def body(group: Group) -> tuple[list[float], dict[str, Tensor]]:
    """One rank: four heads over three ranks, 50 inner features over three, the head's 10 rows over three."""
    part = parallelize_model(model, group, traced)
    if group.rank == 0:
        print(part.sharding.plan)
    return train(part), full_state_dict(part)


ranks = ThreadGroup.run(3, body)
expected = train(model)
for losses, state in ranks:
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-9, atol=1e-9)
print("losses", *(f"{loss:.6f}" for loss in expected), "and all parameters after them: as on one rank")
