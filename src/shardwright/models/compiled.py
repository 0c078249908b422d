"""The decode step of a decoder as one compiled call, assembled from the layers that the decoder is made of.

Each layer contributes the addresses of its tensors; the arithmetic is `kernels.cpu.decode`'s. Used where every sequence
of a batch advances by one token; anything else takes the torch path, which computes the same. `models.execution` says
which models have one.
"""

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
from shardwright.layers.batch import Batch
from shardwright.layers.kv import PagedKV
from shardwright.layers.mlp import SwiGLU
from shardwright.layers.rotary import Rotary
from shardwright.models.blocks import DecoderLayer
from shardwright.models.decoder import Decoder


@final
class CompiledStep:
    """One token of each sequence. Holds addresses of the model's tensors, so the model must not be moved or cast."""

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

    def __call__(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """Logits `[B, V_r]` and the likeliest next tokens of a batch in which every sequence has one new token.

        The next call overwrites the logits.
        """
        model, count = self.model, len(batch.tokens)
        if self._pages is not self.kv[0].k:
            self._find_pages()
        logits = count * int(self._dims[decode.WORDS])
        wanted = logits + decode.room_needed(self._dims, count, max(batch.held))
        if len(self._room) < wanted:
            self._room = np.empty(2 * wanted, np.float32)
        if len(self._angles) < max(batch.held):
            self._turn_to(2 * max(batch.held))
        tokens, positions = batch.tokens.numpy().copy(), batch.positions.numpy()
        before = int(self._group.state[WAITED])
        code = decode.decode_step(
            self._group.state,
            self._plan,
            self._dims,
            model.config.norm_eps,
            tokens,
            self._angles[positions],
            self._places(batch),
            self._room[logits:],
            self._room[:logits].reshape(count, -1),
        )
        model.group.spent(1e-9 * (int(self._group.state[WAITED]) - before))
        if code != DONE:
            self._group.explain(code, "a compiled decode step")
        return torch.from_numpy(self._room[:logits].reshape(count, -1)), tokens.tolist()

    def _turn_to(self, positions: int) -> None:
        """Know the angles of that many positions."""
        assert isinstance(self.model.rotary, Rotary)
        self._angles = torch.stack(self.model.rotary(torch.arange(positions), torch.float32), 1).numpy()

    def _find_pages(self) -> None:
        """Take the addresses of the KV pages, which stay where they are until there have to be more."""
        for row, store in zip(self._plan, self.kv, strict=False):
            row[[decode.KEYS, decode.VALUES]] = store.k.data_ptr(), store.v.data_ptr()
        self._pages = self.kv[0].k

    def fits(self, batch: Batch) -> bool:
        """Whether this is one new token of each sequence, all to be sampled from, few enough for the ranks' slots."""
        size = len(batch.tokens) * self.model.config.hidden * 4
        wanted = batch.rows is None or len(batch.rows) == len(batch.tokens)
        return wanted and size <= SLOT and all(length == 1 for length in batch.lengths)

    def _places(self, batch: Batch) -> NDArray[np.int64]:
        """For each sequence: tokens held, slot of the new one, pages."""
        page = int(self._dims[decode.PAGE])
        places = np.zeros((len(batch.tables), 2 + max(map(len, batch.tables))), np.int64)
        for row, table, held in zip(places, batch.tables, batch.held, strict=True):
            row[:2] = held, table[(held - 1) // page] * page + (held - 1) % page
            row[2 : 2 + len(table)] = table
        return places

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
