"""A decoder's layers: attention and MLP, and where their norms are. One class each; which one is chosen once.

Decides how a layer is put together from a `ModelConfig`. A layer's forward has no branches; what families differ in
beside the order of norms is inside the modules they are given.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.kernels.reference import unturned
from shardwright.kernels.rotary import partial_rotary, rotary
from shardwright.layers.attention import (
    Attention,
    GroupedAttention,
    HeadNormAttention,
    JointNormAttention,
    Scoring,
    Turn,
)
from shardwright.layers.batch import Batch
from shardwright.layers.flow import DEFAULT, Flow
from shardwright.layers.kv import KVStore
from shardwright.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    enter_together,
    leave_together,
)
from shardwright.layers.mlp import MLP, GatedMLP, PlainMLP, SwiGLU
from shardwright.layers.norm import LayerNorm, Norm, OnceRMSNorm, OwnQKNorm, PlusOneRMSNorm, RMSNorm, WideQKNorm
from shardwright.layers.recompute import Block as Run
from shardwright.layers.rotary import Rope
from shardwright.layers.rows import Rows
from shardwright.models import config as models
from shardwright.models.config import ModelConfig
from shardwright.models.specs import NORMS_OF, Cuts

NORMS: Mapping[models.Norm, type[Norm]] = {
    "rms": RMSNorm,
    "rms_once": OnceRMSNorm,
    "rms_plus_one": PlusOneRMSNorm,
    "layer": LayerNorm,
}


Inner = Callable[[Tensor], Tensor]
"""What stands before an attention or an MLP."""


class Block(nn.Module, ABC):
    """A layer: attention and MLP, an all-reduce of T x H each unless it says less. Its norms are `specs.NORMS_OF`'s.

    What `flow` may compute again is a block of the residual stream: it begins with a norm and ends in a row-parallel
    product, so that a norm behind that product stays outside.
    """

    attention_norm: Norm
    attention_post_norm: Norm
    mlp_norm: Norm
    mlp_post_norm: Norm

    def __init__(self, config: ModelConfig, cuts: Cuts, group: Group, layer: int) -> None:
        super().__init__()
        self.group, self.name = group, f"layers.{layer}"
        self.attention = _attention(config, cuts, group, layer)
        self.mlp = _mlp(config, cuts, group, f"{self.name}.mlp")
        for norm in NORMS_OF[config.block]:
            self.add_module(norm, norm_of(config, cuts, group, f"{self.name}.{norm}"))

    @abstractmethod
    def forward(self, x: Tensor, rope: Rope, batch: Batch, kv: KVStore, flow: Flow = DEFAULT) -> Tensor:
        """`x [T, H]` → `[T, H]`, or this rank's rows of both."""

    def _attend(self, norm: Inner, rope: Rope, batch: Batch, kv: KVStore, flow: Flow) -> Run:
        """Attention of what `norm` makes of its input."""

        def attend(x: Tensor, rows: Rows) -> Tensor:
            y: Tensor = self.attention(norm(x), rope, batch, kv, flow.spread(rows))
            return y

        return attend

    def _think(self, norm: Inner, flow: Flow) -> Run:
        """The MLP of what `norm` makes of its input."""

        def think(x: Tensor, rows: Rows) -> Tensor:
            y: Tensor = self.mlp(norm(x), flow.spread(rows))
            return y

        return think

    def _dropped(self, y: Tensor, part: str, batch: Batch, flow: Flow) -> Tensor:
        return flow.dropped(y, f"{self.name}.{part}", len(batch.tokens), self.group)


@final
class DecoderLayer(Block):
    """Attention, then the MLP, each behind its norm and added to its input (Llama)."""

    def forward(self, x: Tensor, rope: Rope, batch: Batch, kv: KVStore, flow: Flow = DEFAULT) -> Tensor:
        """`x [T, H]` → `[T, H]`, or this rank's rows of both."""
        attend, think = self._attend(self.attention_norm, rope, batch, kv, flow), self._think(self.mlp_norm, flow)
        x = x + self._dropped(flow.block(attend, x), "attention", batch, flow)
        return x + self._dropped(flow.block(think, x), "mlp", batch, flow)


@final
class PostNormLayer(Block):
    """Attention, then the MLP, each normed and then added to its input (OLMo-2)."""

    def forward(self, x: Tensor, rope: Rope, batch: Batch, kv: KVStore, flow: Flow = DEFAULT) -> Tensor:
        """`x [T, H]` → `[T, H]`, or this rank's rows of both."""
        attend, think = self._attend(_as_it_is, rope, batch, kv, flow), self._think(_as_it_is, flow)
        x = x + self._dropped(self.attention_post_norm(flow.block(attend, x)), "attention", batch, flow)
        return x + self._dropped(self.mlp_post_norm(flow.block(think, x)), "mlp", batch, flow)


@final
class SandwichLayer(Block):
    """Attention, then the MLP, each between two norms and added to its input (Gemma 2 and 3)."""

    def forward(self, x: Tensor, rope: Rope, batch: Batch, kv: KVStore, flow: Flow = DEFAULT) -> Tensor:
        """`x [T, H]` → `[T, H]`, or this rank's rows of both."""
        attend, think = self._attend(self.attention_norm, rope, batch, kv, flow), self._think(self.mlp_norm, flow)
        x = x + self._dropped(self.attention_post_norm(flow.block(attend, x)), "attention", batch, flow)
        return x + self._dropped(self.mlp_post_norm(flow.block(think, x)), "mlp", batch, flow)


class _SideBySide(Block):
    """Attention and MLP of one input, both added to it: one all-reduce of T x H forward, and one call backward."""

    def forward(self, x: Tensor, rope: Rope, batch: Batch, kv: KVStore, flow: Flow = DEFAULT) -> Tensor:
        """`x [T, H]` → `[T, H]`, or this rank's rows of both."""

        def both(x: Tensor, rows: Rows) -> Tensor:
            attention, mlp = self.attention, self.mlp
            qkv, up = enter_together(self._normed(x), (attention.qkv, mlp.begin), rows)
            heads, inner = attention.between(qkv, rope, batch, kv, flow), mlp.between(up, flow)
            return leave_together(((attention.out, heads), (mlp.down, inner)), rows)

        return x + self._dropped(flow.block(both, x), "both", batch, flow)

    @abstractmethod
    def _normed(self, x: Tensor) -> Tensor:
        """What both begin from: one `[T, H]`, or two side by side."""


@final
class ParallelBlock(_SideBySide):
    """Attention and MLP each behind its norm (GPT-NeoX, Falcon 40B); backward moves T x 2H."""

    def _normed(self, x: Tensor) -> Tensor:
        return torch.cat((self.attention_norm(x), self.mlp_norm(x)), -1)


@final
class SharedNormBlock(_SideBySide):
    """Attention and MLP behind one norm (Falcon 7B, StableLM 2 12B); backward moves T x H."""

    def _normed(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention_norm(x)
        return y


def _as_it_is(x: Tensor) -> Tensor:
    return x


BLOCKS: Mapping[models.Block, type[Block]] = {
    "pre": DecoderLayer,
    "post": PostNormLayer,
    "sandwich": SandwichLayer,
    "parallel": ParallelBlock,
    "parallel_shared": SharedNormBlock,
}


def norm_of(config: ModelConfig, cuts: Cuts, group: Group, name: str) -> Norm:
    """The norm of H features that this model has."""
    return NORMS[config.norm](config.hidden, group, eps=config.norm_eps, gradient=cuts.gradient, name=name)


def _attention(config: ModelConfig, cuts: Cuts, group: Group, layer: int) -> GroupedAttention:
    name, size, eps = f"layers.{layer}.attention", config.head_size, config.norm_eps
    qkv = QKVParallelLinear(config.hidden, cuts.heads, size, group, bias=config.qkv_bias, name=f"{name}.qkv")
    inner = cuts.heads.query.times(size)
    out = RowParallelLinear(
        inner, config.hidden, group, bias=config.out_bias, gradient=cuts.gradient, name=f"{name}.out"
    )
    slopes = alibi_slopes(config.heads) if config.alibi else ()
    scoring = Scoring(scale=config.scale, window=config.window(layer), cap=config.score_cap, slopes=slopes)
    if config.wide_qk_norm or config.own_qk_norm:
        kind = WideQKNorm if config.wide_qk_norm else OwnQKNorm
        norm = kind(cuts.heads, size, group, eps=eps, name=f"{name}.qk_norm")
        return JointNormAttention(qkv, out, norm, scoring, _turn(config))

    if not config.qk_norm:
        return Attention(qkv, out, scoring, _turn(config))

    def head_norm(part: str) -> Norm:
        return NORMS[config.norm](size, group, eps=eps, gradient="partial", name=f"{name}.{part}")

    return HeadNormAttention(qkv, out, head_norm("q_norm"), head_norm("k_norm"), scoring, _turn(config))


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Of ALiBi: powers of `2^(-8/n)` for the largest power of two n among the heads, then the odd ones of twice as many
    (Press et al. 2022, as published with the paper).
    """
    n = 1 << (heads.bit_length() - 1)
    powers = [8 * (i + 1) / n for i in range(n)] + [4 * (2 * i + 1) / n for i in range(heads - n)]
    return tuple(2.0**-power for power in powers)


def _turn(config: ModelConfig) -> Turn:
    if not config.turned:
        return unturned
    return rotary if config.turned == config.head_size else partial_rotary


def _mlp(config: ModelConfig, cuts: Cuts, group: Group, name: str) -> MLP:
    ff, bias = cuts.feed_forward, config.mlp_bias
    down = RowParallelLinear(ff, config.hidden, group, bias=bias, gradient=cuts.gradient, name=f"{name}.down")
    if not config.gated:
        up = ColumnParallelLinear(config.hidden, ff, group, bias=bias, name=f"{name}.up")
        return PlainMLP(up, down, config.activation)
    gate_up = MergedColumnParallelLinear(config.hidden, (ff, ff), group, bias=bias, name=f"{name}.gate_up")
    return SwiGLU(gate_up, down) if config.activation == "silu" else GatedMLP(gate_up, down, config.activation)
