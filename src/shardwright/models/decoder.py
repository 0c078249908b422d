"""The decoder, top to bottom. Every family is this one; what differs is in its `ModelConfig`."""

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.layers.batch import Batch
from shardwright.layers.ends import AsEmbedded, CappedLogits, LearnedPositions, ScaledEmbedding
from shardwright.layers.flow import DEFAULT, Flow
from shardwright.layers.gradients import reduce_partial_gradients
from shardwright.layers.kv import FreshKV, KVStore
from shardwright.layers.layer import ParallelLayer
from shardwright.layers.rotary import LengthRotary, Rotary
from shardwright.layers.rows import SharedRows
from shardwright.layers.vocab import VocabParallelEmbedding, VocabParallelHead
from shardwright.layout.spec import Specs
from shardwright.models.blocks import BLOCKS, norm_of
from shardwright.models.config import ModelConfig
from shardwright.models.families import by_name
from shardwright.models.rope import plain
from shardwright.models.specs import Cuts, model_specs


@final
class Decoder(nn.Module):
    """Token ids to this rank's logits. Every rank enters with the same batch."""

    def __init__(self, config: ModelConfig, group: Group, cuts: Cuts | None = None) -> None:
        super().__init__()
        self.config, self.group, self.cuts = config, group, cuts or Cuts.balanced(config, group.size)
        self.embedding = VocabParallelEmbedding(self.cuts.vocabulary, config.hidden, group, name="embedding")
        self.positions = _positions(config, self.cuts, group)
        self.rotary = rotary_of(config)
        local = [] if config.local_rope_theta is None else [Rotary(plain(config.local_rope_theta, config.turned))]
        self.rotaries = (self.rotary, *local)
        self.layers = nn.ModuleList(
            BLOCKS[config.block](config, self.cuts, group, layer) for layer in range(config.layers)
        )
        self.turned_by = tuple(len(local) if config.window(layer) else 0 for layer in range(config.layers))
        self.norm = norm_of(config, self.cuts, group, "norm")
        self.head = None if config.tied else VocabParallelHead(self.cuts.vocabulary, config.hidden, group, name="head")
        self.cap = CappedLogits(config.logit_cap) if config.logit_cap else nn.Identity()

    def forward(self, batch: Batch, kv: Sequence[KVStore] | None = None, flow: Flow = DEFAULT) -> Tensor:
        """Logits of the batch's rows over this rank's vocabulary, `[rows, V_r]`; one store a layer, or none kept.

        flow: what of a training step is recomputed and dropped; its rows follow from the cuts.
        """
        tokens = len(batch.tokens)
        if self.cuts.sequence and kv is None and batch.rows is None:
            flow = flow.spread(SharedRows.balanced(tokens, self.group.size))
        mine = slice(*flow.rows.mine(tokens, self.group.rank))
        x: Tensor = self.positions(self.embedding(batch.tokens, flow.rows), batch.positions[mine])
        x = flow.dropped(x, "embedding", tokens, self.group)
        ropes = [rotary.of(batch, x.dtype) for rotary in self.rotaries]
        stores = kv or [FreshKV()] * len(self.layers)
        for layer, by, store in zip(self.layers, self.turned_by, stores, strict=True):
            x = layer(x, ropes[by], batch, store, flow)
        x = self.norm(x if batch.rows is None else x[batch.rows])
        logits: Tensor = self.cap((self.embedding if self.head is None else self.head).logits(x, flow.rows))
        return logits

    def specs(self, rank: int | None = None) -> Specs:
        """What a rank (this one by default) holds of each parameter; sources are Hugging Face's names."""
        dtype = str(self.embedding.weight.dtype).removeprefix("torch.")
        naming = by_name(self.config.family).naming(self.config)
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


def _positions(config: ModelConfig, cuts: Cuts, group: Group) -> nn.Module:
    """What is done to embeddings before the first layer."""
    if config.learned_positions:
        rows, offset = config.learned_positions, config.position_offset
        return LearnedPositions(rows, config.hidden, group, offset=offset, gradient=cuts.gradient, name="positions")
    return AsEmbedded() if config.embedding_scale == 1 else ScaledEmbedding(config.embedding_scale)


def rotary_of(config: ModelConfig) -> Rotary | LengthRotary:
    """The angles heads are turned by, but for layers with a window that have a base of their own."""
    scaling = config.rope_scaling
    if scaling is None:
        return Rotary(config.rope_frequencies())
    if scaling.follows_length:
        return LengthRotary(config.rope_frequencies, scaling.magnitude)
    return Rotary(config.rope_frequencies(), scaling.magnitude)
