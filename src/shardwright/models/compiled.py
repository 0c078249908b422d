"""Decoding as one compiled call, assembled from the layers that a decoder is made of.

Each layer contributes the addresses of its tensors; the arithmetic is `kernels.cpu.decode`'s. Used where every sequence
of a batch advances token by token; anything else takes the torch path, which computes the same. `models.execution` says
which models have it.
"""

from collections.abc import Collection, Sequence
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shardwright.comm.rounds import DONE, WAITED
from shardwright.comm.segment import SLOT
from shardwright.comm.shared_memory import SharedMemoryGroup, alone, tag_fingerprint
from shardwright.kernels.cpu import decode
from shardwright.layers.attention import Attention, HeadNormAttention
from shardwright.layers.kv import PagedKV
from shardwright.layers.mlp import SwiGLU
from shardwright.layers.rotary import Rotary
from shardwright.models.blocks import DecoderLayer
from shardwright.models.decoder import Decoder

PIECE = 62_500_000
"""Nanoseconds that a call takes at most, unless a single token takes longer: text comes 16 times a second, or token by
token. What a token costs besides its step (Python whose caches the weights have swept, a message that wakes two other
processes) is nearly a millisecond, and paid once a call."""


@final
class CompiledStep:
    """New tokens of each sequence. Holds addresses of the model's tensors, so the model must not be moved or cast."""

    def __init__(self, model: Decoder, kv: list[PagedKV]) -> None:
        self.model, self.kv = model, kv
        self._packed: list[Tensor] = []
        rank = model.group.rank
        self._group = model.group if isinstance(model.group, SharedMemoryGroup) else alone()
        head = model.embedding if model.head is None else model.head
        kv_index = model.cuts.heads.kv_index(rank)
        self._dims = np.zeros(decode.KV_INDEX + len(kv_index), np.int64)
        self._dims[decode.KV_INDEX :] = kv_index
        self._dims[: decode.KV_INDEX] = (
            model.config.layers,
            model.config.hidden,
            model.cuts.heads.query.widths[rank],
            model.cuts.heads.kv_width(rank),
            model.config.head_size,
            model.cuts.feed_forward.widths[rank],
            model.cuts.vocabulary.offsets[rank],
            model.cuts.vocabulary.widths[rank],
            kv[0].k.shape[1],
            head.weight.dtype == torch.bfloat16,
        )
        self._plan = np.zeros((model.config.layers + 1, decode.FIELDS), np.int64)
        for number, (row, layer) in enumerate(zip(self._plan, model.layers, strict=False)):
            self._describe(row, layer)
            row[decode.WINDOW] = model.config.window(number)
        self._plan[-1, : decode.TOKEN_CALL + 1] = (
            self._float32(model.norm.weight),
            head.weight.data_ptr(),
            model.embedding.weight.data_ptr(),
            tag_fingerprint(model.embedding.name),
            tag_fingerprint("token"),
        )
        self._angles = np.empty((0, 2, model.config.turned // 2), np.float32)
        self._pages: Tensor | None = None
        self._room = np.empty(0, np.float32)

    def __call__(
        self,
        tokens: Sequence[int],
        held: Sequence[int],
        tables: Sequence[Sequence[int]],
        most: int = 1,
        stops: Collection[int] = (),
    ) -> tuple[Tensor, list[list[int]]]:
        """Logits `[B, V_r]` and for each sequence the tokens that follow its newest, each time the likeliest.

        tokens: the newest of each · held: how many it has with that one · tables: its KV pages, with room for `most`
        tokens from the newest on. All sequences get as many: `most`, or fewer where one of `stops` comes or time is up
        (`PIECE`). The logits are those behind the last token's; the next call overwrites them.
        """
        model, count = self.model, len(tokens)
        if self._pages is not self.kv[0].k:
            self._find_pages()
        logits, longest = count * int(self._dims[decode.WORDS]), max(held) + most
        wanted = logits + decode.room_needed(self._dims, count, longest)
        if len(self._room) < wanted:
            self._room = np.empty(2 * wanted, np.float32)
        if len(self._angles) < longest:
            self._turn_to(2 * longest)
        found, lengths = np.empty((1 + most, count), np.int64), np.array(held)
        found[0] = tokens
        before = int(self._group.state[WAITED])
        code = decode.decode(
            self._group.state,
            self._plan,
            self._dims,
            model.config.norm_eps,
            self._angles,
            _padded(tables),
            lengths,
            np.array(list(stops), np.int64),
            PIECE,
            self._room[logits:],
            self._room[:logits].reshape(count, -1),
            found,
        )
        model.group.spent(1e-9 * (int(self._group.state[WAITED]) - before))
        if code != DONE:
            self._group.explain(code, "compiled decoding")
        made = int(lengths[0]) - held[0]
        return torch.from_numpy(self._room[:logits].reshape(count, -1)), found[1 : 1 + made].T.tolist()

    def _turn_to(self, positions: int) -> None:
        """Know the angles of that many positions."""
        assert isinstance(self.model.rotary, Rotary)
        self._angles = torch.stack(self.model.rotary(torch.arange(positions), torch.float32), 1).numpy()

    def _find_pages(self) -> None:
        """Take the addresses of the KV pages, which stay where they are until there have to be more."""
        for row, store in zip(self._plan, self.kv, strict=False):
            row[[decode.KEYS, decode.VALUES]] = store.k.data_ptr(), store.v.data_ptr()
        self._pages = self.kv[0].k

    def fits(self, sequences: int) -> bool:
        """Whether so many are few enough for the ranks' slots."""
        return 4 * sequences * self.model.config.hidden <= SLOT

    def _describe(self, row: NDArray[np.int64], layer: nn.Module) -> None:
        assert isinstance(layer, DecoderLayer)
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(attention, Attention | HeadNormAttention)
        assert isinstance(mlp, SwiGLU)
        row[decode.NORM] = self._float32(layer.attention_norm.weight)
        row[decode.MLP_NORM] = self._float32(layer.mlp_norm.weight)
        for linear, weight, bias in (
            (attention.qkv, decode.QKV, decode.QKV_BIAS),
            (attention.out, decode.OUT, decode.OUT_BIAS),
            (mlp.gate_up, decode.GATE_UP, decode.GATE_UP_BIAS),
            (mlp.down, decode.DOWN, decode.DOWN_BIAS),
        ):
            row[weight] = linear.weight.data_ptr()
            row[bias] = 0 if linear.bias is None else self._float32(linear.bias)
        if isinstance(attention, HeadNormAttention):
            row[decode.Q_NORM] = self._float32(attention.q_norm.weight)
            row[decode.K_NORM] = self._float32(attention.k_norm.weight)
        row[decode.ATTENTION_CALL] = tag_fingerprint(attention.out.name)
        row[decode.MLP_CALL] = tag_fingerprint(mlp.down.name)

    def _float32(self, parameter: nn.Parameter) -> int:
        """The address of a small tensor as float32, kept alive here."""
        self._packed.append(parameter.detach().float().contiguous())
        return self._packed[-1].data_ptr()


def _padded(tables: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """One row a sequence, zeros behind the shorter ones."""
    rows = np.zeros((len(tables), max(map(len, tables))), np.int64)
    for row, table in zip(rows, tables, strict=True):
        row[: len(table)] = table
    return rows
