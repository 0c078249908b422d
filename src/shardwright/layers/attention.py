"""Grouped-query attention over a flat batch, this rank's heads only."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from shardwright.kernels.attention import attention
from shardwright.kernels.reference import Drop
from shardwright.kernels.rotary import rotary
from shardwright.layers.batch import Batch
from shardwright.layers.dropout import Dropout
from shardwright.layers.flow import DEFAULT, Flow
from shardwright.layers.kv import KVStore
from shardwright.layers.linear import QKVParallelLinear, RowParallelLinear
from shardwright.layers.norm import Norm, QKNorm
from shardwright.layers.rotary import Rope

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""How heads `[T, heads, D]` take their positions from cos and sin."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How scores come about. scale: of q k.T · window: tokens looked back over, 0: all · cap: by tanh, 0: none ·
    slopes: of all query heads, where positions are biases of scores.
    """

    scale: float
    window: int = 0
    cap: float = 0.0
    slopes: tuple[float, ...] = ()


class GroupedAttention(nn.Module, ABC):
    """Each rank computes its query heads over the KV heads they need, and `out` sums over the ranks."""

    def __init__(
        self, qkv: QKVParallelLinear, out: RowParallelLinear, scoring: Scoring | None = None, turn: Turn = rotary
    ) -> None:
        super().__init__()
        self.qkv, self.out, self.turn = qkv, out, turn
        rank = qkv.group.rank
        self.head_size = qkv.head_size
        self.heads, self.kv_heads = qkv.heads.query.widths[rank], qkv.heads.kv_width(rank)
        self.kv_index = qkv.heads.kv_index(rank)
        self.scoring = scoring or Scoring(scale=self.head_size**-0.5)
        self.mine = qkv.heads.query.range(rank)
        self.slopes = self.scoring.slopes[slice(*self.mine)]

    def forward(self, x: Tensor, rope: Rope, batch: Batch, kv: KVStore, flow: Flow = DEFAULT) -> Tensor:
        """`x [T, H]` → `[T, H]`, both alike on every rank, or both this rank's rows."""
        y: Tensor = self.out(self.between(self.qkv(x, flow.rows), rope, batch, kv, flow), flow.rows)
        return y

    def between(self, qkv: Tensor, rope: Rope, batch: Batch, kv: KVStore, flow: Flow) -> Tensor:
        """From the first product to the second, `[T, (N_r + 2 K_r) D]` → `[T, N_r D]`: nothing moves."""
        return flow.keep.core(lambda qkv: self._core(qkv, rope, batch, kv, flow.dropout), qkv)

    def _core(self, qkv: Tensor, rope: Rope, batch: Batch, kv: KVStore, dropout: Dropout | None) -> Tensor:
        """`[T, (N_r + 2 K_r) D]` → `[T, N_r D]`: all that lies between the two products."""
        heads = qkv.view(len(qkv), self.heads + 2 * self.kv_heads, self.head_size)
        q, k, v = torch.split(heads, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = self._normed(q, k)
        q, k = self.turn(q, *rope), self.turn(k, *rope)
        how, width = self.scoring, self.heads * self.head_size
        found = [
            attention(
                queries,
                *past,
                self.kv_index,
                how.scale,
                how.window,
                how.cap,
                self.slopes,
                self._drop(dropout, start),
            ).reshape(stop - start, width)
            for queries, past, (start, stop) in zip(batch.split(q), kv.extend(batch, k, v), batch.parts, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found or [q.reshape(0, width)])

    def _drop(self, dropout: Dropout | None, start: int) -> Drop | None:
        """What becomes of the weights of the sequence, or the sequences alike, whose first row is that one."""
        if dropout is None or not dropout.attention:
            return None
        heads = self.qkv.heads.query
        return partial(dropout.weights, name=self.qkv.name, offset=start, heads=self.mine, of=heads.size)

    @abstractmethod
    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Q and k before they are turned."""


@final
class Attention(GroupedAttention):
    """`out(softmax(q k.T * scale) v)`, causal, cut by heads: one all-reduce of T x H forward, one backward."""

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


@final
class HeadNormAttention(GroupedAttention):
    """The same where `q_norm` and `k_norm` act on each head before rotation (Qwen3, Gemma 3)."""

    def __init__(
        self,
        qkv: QKVParallelLinear,
        out: RowParallelLinear,
        q_norm: Norm,
        k_norm: Norm,
        scoring: Scoring | None = None,
        turn: Turn = rotary,
    ) -> None:
        super().__init__(qkv, out, scoring, turn)
        self.q_norm, self.k_norm = q_norm, k_norm

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)


@final
class JointNormAttention(GroupedAttention):
    """The same where one module norms q and k, as it knows which heads these are."""

    def __init__(
        self,
        qkv: QKVParallelLinear,
        out: RowParallelLinear,
        qk_norm: QKNorm,
        scoring: Scoring | None = None,
        turn: Turn = rotary,
    ) -> None:
        super().__init__(qkv, out, scoring, turn)
        self.qk_norm = qk_norm

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        normed: tuple[Tensor, Tensor] = self.qk_norm(q, k)
        return normed
