"""Modules that are nobody's: torch's own transformer, a mixer, a branch, a linear used twice, an attention by hand."""

from typing import Any

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Grouped-query attention with its head counts in its own attributes: 6 query heads over 2 KV heads."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.k = 6, 2
        self.q, self.kv, self.o = nn.Linear(24, 24), nn.Linear(24, 16), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, self.n, 4).transpose(1, 2)
        k, v = self.kv(x).view(b, s, self.k, 2, 4).permute(3, 0, 2, 1, 4)
        times = self.n // self.k
        k, v = (y.repeat_interleave(times, 1) for y in (k, v))
        p = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.o((p @ v).transpose(1, 2).flatten(2))


class Uneven(nn.Module):
    """Nine query heads over three KV heads, keys and values of a head side by side, repeated by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.k = 9, 3
        self.q, self.kv, self.o = nn.Linear(24, 36), nn.Linear(24, 24), nn.Linear(36, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, self.n, 4).transpose(1, 2)
        k, v = self.kv(x).view(b, s, self.k, 2, 4).permute(3, 0, 2, 1, 4)
        k, v = (y[:, :, None].expand(b, self.k, self.n // self.k, s, 4).reshape(b, self.n, s, 4) for y in (k, v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """An MLP over tokens, then one over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(12), nn.LayerNorm(12)
        self.tokens = nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 7))
        self.channels = nn.Sequential(nn.Linear(12, 17), nn.GELU(), nn.Linear(17, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.before(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.between(x))


class Branching(nn.Module):
    """A branch in Python, decided by a shape and by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = True
        self.up, self.down = nn.Linear(12, 19), nn.Linear(19, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x)))
        return y + x if self.deep and x.shape[1] > 3 else y


class Twice(nn.Module):
    """One linear used for two inputs, and a block used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.down, self.norm = nn.Linear(12, 23), nn.Linear(23, 12), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.norm(x + self.down(torch.tanh(self.shared(x)) * self.shared(-x)))
        return x


class Chained(nn.Module):
    """A linear whose output feeds itself: it cannot be cut along both dims."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.relu(self.again(x)))


class Interleaved(nn.Module):
    """Gate and up side by side, one row each in turn; convolutions of width 1."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(12, 26), nn.Linear(13, 12)
        self.wide, self.narrow = nn.Conv1d(12, 15, 1), nn.Conv1d(15, 12, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pair = self.both(x).view(*x.shape[:-1], 13, 2)
        y = self.down(pair[..., 0].sigmoid() * pair[..., 1])
        return self.narrow(self.wide(y.transpose(1, 2)).relu()).transpose(1, 2)


class Telling(nn.Module):
    """It returns its hidden layer too, and logits by head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(12, 19), nn.Linear(19, 12), nn.Linear(12, 20)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.up(x).relu()
        return self.out(self.down(hidden)).unflatten(-1, (5, 4)), hidden


def encoder(dropout: float = 0.0) -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 6, 44, dropout=dropout, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def build(name: str) -> tuple[nn.Module, Any]:
    """A module in float64 and its inputs, the same on every call."""
    torch.manual_seed(1)
    wide, narrow = torch.randn(2, 7, 24, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    modules: dict[str, tuple[nn.Module, Any]] = {
        "encoder": (encoder(), (wide,)),
        "decoder": (nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 6, 44, dropout=0.0), 2), (wide, wide[:1] + 1)),
        "attention": (Attention(), (wide,)),
        "uneven": (Uneven(), (wide,)),
        "mixer": (Mixer(), (narrow,)),
        "branching": (Branching(), (narrow,)),
        "twice": (Twice(), (narrow,)),
        "chained": (Chained(), (narrow,)),
        "interleaved": (Interleaved(), (narrow,)),
        "telling": (Telling(), (narrow,)),
        "headed": (nn.Sequential(nn.Linear(12, 19), nn.ReLU(), nn.LayerNorm(19), nn.Linear(19, 20)), (narrow,)),
    }
    module, inputs = modules[name]
    return module.double(), inputs


FOREIGN = (
    "encoder",
    "decoder",
    "attention",
    "uneven",
    "mixer",
    "branching",
    "twice",
    "chained",
    "interleaved",
    "telling",
    "headed",
)
