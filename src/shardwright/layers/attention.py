"""Grouped-query attention over a flat batch, this rank's heads only."""

from typing import final

import torch
from torch import Tensor, nn

from shardwright.kernels.attention import attention
from shardwright.kernels.reference import rotary
from shardwright.layers.batch import Batch
from shardwright.layers.kv import KVStore
from shardwright.layers.linear import QKVParallelLinear, RowParallelLinear
from shardwright.layers.rotary import Rope


@final
class Attention(nn.Module):
    """`out(softmax(q k.T / sqrt(D)) v)`, causal, cut by heads.

    Each rank computes its query heads over the KV heads they need, and `out` sums over the ranks: one all-reduce of
    T x H forward, one backward. `q_norm` and `k_norm` act on each head before rotation (Qwen3), or are identities.
    """

    def __init__(self, qkv: QKVParallelLinear, out: RowParallelLinear, q_norm: nn.Module, k_norm: nn.Module) -> None:
        super().__init__()
        self.qkv, self.out, self.q_norm, self.k_norm = qkv, out, q_norm, k_norm
        rank = qkv.group.rank
        self.head_size = qkv.head_size
        self.heads, self.kv_heads = qkv.heads.query.widths[rank], qkv.heads.kv_width(rank)
        self.kv_index = qkv.heads.kv_index(rank)

    def forward(self, x: Tensor, rope: Rope, batch: Batch, kv: KVStore) -> Tensor:
        """`x [T, H]` → `[T, H]`, both alike on every rank."""
        heads = self.qkv(x).view(len(x), self.heads + 2 * self.kv_heads, self.head_size)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotary(self.q_norm(q), *rope), rotary(self.k_norm(k), *rope)
        scale = self.head_size**-0.5
        sequences = zip(batch.ranges, kv.extend(batch, k, v), strict=True)
        parts = [attention(q[start:stop], *past, self.kv_index, scale) for (start, stop), past in sequences] or [q]
        y: Tensor = self.out(torch.cat(parts).reshape(len(x), self.heads * self.head_size))
        return y
