"""The decoder, top to bottom. Every family is this one; what differs is in its `ModelConfig`."""

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.layers.attention import Attention
from shardwright.layers.batch import Batch
from shardwright.layers.gradients import reduce_partial_gradients
from shardwright.layers.kv import FreshKV, KVStore
from shardwright.layers.layer import ParallelLayer
from shardwright.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from shardwright.layers.mlp import SwiGLU
from shardwright.layers.norm import RMSNorm
from shardwright.layers.rotary import Rope, Rotary
from shardwright.layers.vocab import VocabParallelEmbedding, VocabParallelHead
from shardwright.layout.spec import Specs
from shardwright.models.config import ModelConfig
from shardwright.models.families import by_name
from shardwright.models.specs import Cuts, model_specs


@final
class DecoderLayer(nn.Module):
    """Attention, then the MLP, each behind its norm and added to its input: two all-reduces of T x H."""

    def __init__(self, config: ModelConfig, cuts: Cuts, group: Group, name: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, group, eps=config.norm_eps, name=f"{name}.attention_norm")
        self.attention = _attention(config, cuts, group, f"{name}.attention")
        self.mlp_norm = RMSNorm(config.hidden, group, eps=config.norm_eps, name=f"{name}.mlp_norm")
        ff, bias = cuts.feed_forward, config.mlp_bias
        self.mlp = SwiGLU(
            MergedColumnParallelLinear(config.hidden, (ff, ff), group, bias=bias, name=f"{name}.mlp.gate_up"),
            RowParallelLinear(ff, config.hidden, group, bias=bias, name=f"{name}.mlp.down"),
        )

    def forward(self, x: Tensor, rope: Rope, batch: Batch, kv: KVStore) -> Tensor:
        """`x [T, H]` → `[T, H]`."""
        x = x + self.attention(self.attention_norm(x), rope, batch, kv)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


@final
class Decoder(nn.Module):
    """Token ids to this rank's logits. Every rank enters with the same batch."""

    def __init__(self, config: ModelConfig, group: Group, cuts: Cuts | None = None) -> None:
        super().__init__()
        self.config, self.group, self.cuts = config, group, cuts or Cuts.balanced(config, group.size)
        self.embedding = VocabParallelEmbedding(self.cuts.vocabulary, config.hidden, group, name="embedding")
        self.rotary = Rotary(config.rope_frequencies())
        self.layers = nn.ModuleList(
            DecoderLayer(config, self.cuts, group, f"layers.{layer}") for layer in range(config.layers)
        )
        self.norm = RMSNorm(config.hidden, group, eps=config.norm_eps, name="norm")
        self.head = None if config.tied else VocabParallelHead(self.cuts.vocabulary, config.hidden, group, name="head")

    def forward(self, batch: Batch, kv: Sequence[KVStore] | None = None) -> Tensor:
        """Logits of the batch's rows over this rank's vocabulary, `[rows, V_r]`; one store a layer, or none kept."""
        x: Tensor = self.embedding(batch.tokens)
        rope = self.rotary(batch.positions, x.dtype)
        for layer, store in zip(self.layers, kv or [FreshKV()] * len(self.layers), strict=True):
            x = layer(x, rope, batch, store)
        x = self.norm(x if batch.rows is None else x[batch.rows])
        return self.embedding.logits(x) if self.head is None else self.head.logits(x)

    def specs(self, rank: int | None = None) -> Specs:
        """What a rank (this one by default) holds of each parameter; sources are Hugging Face's names."""
        dtype = str(self.embedding.weight.dtype).removeprefix("torch.")
        naming = by_name(self.config.family).huggingface
        return model_specs(self.config, self.cuts, self.group.rank if rank is None else rank, naming, dtype=dtype)

    def reset(self, seed: int = 0) -> None:
        """Initial values, the same whatever the split."""
        for module in self.modules():
            if isinstance(module, ParallelLayer):
                module.reset(seed)

    def reduce_gradients(self) -> None:
        """Sum the gradients that each rank sees only in part; call it once after backward."""
        tables = [self.specs(rank) for rank in range(self.group.size)]
        reduce_partial_gradients(dict(self.named_parameters()), tables, self.group)


def _attention(config: ModelConfig, cuts: Cuts, group: Group, name: str) -> Attention:
    def head_norm(part: str) -> nn.Module:
        if not config.qk_norm:
            return nn.Identity()
        eps = config.norm_eps
        return RMSNorm(config.head_size, group, eps=eps, gradient="partial", name=f"{name}.{part}")

    qkv = QKVParallelLinear(
        config.hidden, cuts.heads, config.head_size, group, bias=config.qkv_bias, name=f"{name}.qkv"
    )
    inner = cuts.heads.query.times(config.head_size)
    out = RowParallelLinear(inner, config.hidden, group, bias=config.out_bias, name=f"{name}.out")
    return Attention(qkv, out, head_norm("q_norm"), head_norm("k_norm"))
