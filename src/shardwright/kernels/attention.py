"""Attention over a flat batch of sequences: which tokens see which keys. The arithmetic of one sequence is a kernel."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.kernels import reference
from shardwright.kernels.select import select


def attention(q: Tensor, k: Tensor, v: Tensor, kv_index: Sequence[int], scale: float) -> Tensor:
    """Causal attention of one sequence: `q [S, N_r, D]`, the last S of L positions, over `k, v [L, K_r, D]`."""
    return IMPLEMENTATIONS[select("attention", q.device.type, q.dtype)](q, k, v, kv_index, scale)


def _fused(q: Tensor, k: Tensor, v: Tensor, kv_index: Sequence[int], scale: float) -> Tensor:
    index = torch.tensor(kv_index, dtype=torch.int64, device=q.device)
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k.index_select(1, index), v.index_select(1, index)))
    length, held = q.shape[0], k.shape[0]
    whole = length == held
    mask = None
    if not whole and length > 1:
        mask = torch.ones(length, held, dtype=torch.bool, device=q.device).tril(held - length)
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=whole, scale=scale)
    return y[0].transpose(0, 1)


IMPLEMENTATIONS = {"reference": reference.attention, "fused": _fused}
