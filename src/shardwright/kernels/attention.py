"""Attention over a flat batch of sequences: which tokens see which keys. The arithmetic of one sequence is a kernel."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.kernels import reference
from shardwright.kernels.reference import Drop
from shardwright.kernels.select import select


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_index: Sequence[int],
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    slopes: Sequence[float] = (),
    drop: Drop | None = None,
) -> Tensor:
    """Causal attention of one sequence: `q [S, N_r, D]`, the last S of L positions, over `k, v [L, K_r, D]`; or of
    several with the same S and L, of which all tensors have one dim more in front.

    window: tokens a position looks back over, itself included; 0 for all, and wherever there are slopes · cap: of the
    scores, by tanh; 0 for none · slopes: of each query head, where positions are biases of scores (`reference.alibi`)
    · drop: what becomes of the weights `[..., N_r, S, L]`; where nobody looks back over all keys, L are those seen.
    """
    unseen = k.shape[-3] - q.shape[-3] - window + 1
    if window and unseen > 0:  # nobody looks that far back
        k, v = k[..., unseen:, :, :], v[..., unseen:, :, :]
    mode = "dropped" if drop else "capped" if cap else "plain"
    implementation = select("attention", q.device.type, q.dtype, mode=mode)
    return IMPLEMENTATIONS[implementation](q, k, v, kv_index, scale, window, cap, slopes, drop)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_index: Sequence[int],
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    slopes: Sequence[float] = (),
    drop: Drop | None = None,
) -> Tensor:
    if cap or drop:
        raise AssertionError("the fused attention caps no scores and drops no weights")
    grouped = _grouped(kv_index, k.shape[-2])
    if not grouped:
        index = torch.tensor(kv_index, dtype=torch.int64, device=q.device)
        k, v = k.index_select(-2, index), v.index_select(-2, index)
    queries, keys, values = ((x if x.dim() == 4 else x[None]).transpose(1, 2) for x in (q, k, v))
    length, held = q.shape[-3], k.shape[-3]
    windowed = 0 < window < held
    whole = length == held and not windowed and not slopes
    plain = whole or (length <= 1 and not windowed and not slopes)
    mask = None if plain else reference.visible(length, held, window, q.device)
    if mask is not None and slopes:
        mask = (reference.alibi(slopes, k) * scale).masked_fill(~mask, float("-inf"))
    y = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=grouped
    )
    return y.transpose(1, 2).reshape(q.shape)


def _grouped(kv_index: Sequence[int], kv_heads: int) -> bool:
    """Whether every KV head serves as many query heads, in order: then no copy of them is needed."""
    size = len(kv_index) // max(1, kv_heads)
    return size * kv_heads == len(kv_index) and all(kv == head // size for head, kv in enumerate(kv_index))


IMPLEMENTATIONS = {"reference": reference.attention, "fused": _fused}
