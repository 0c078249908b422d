"""The kernels that stay on one rank, each in its obviously right torch form: the oracle of every other one.

Meta tensors take them too. All are differentiable. Sizes as in `docs/notation.md`; a rank with no heads or no features
passes empty dims. The fused matmuls have theirs in `fused_reference`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Drop = Callable[[Tensor], Tensor]
"""What becomes of attention's weights before they weigh: some are zeroed, the others scaled."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dim, in float32 until the weight (Zhang & Sennrich 2019)."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def rms_norm_once(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm`, in float32 to the end, so that half types round once (OLMo-2)."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    wide, scale = (x.float(), weight.float()) if narrow else (x, weight)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * scale).to(x.dtype)


def rms_norm_plus_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * (1 + weight)`, in float32 to the end (Gemma)."""
    return rms_norm_once(x, 1 + (weight.float() if x.dtype in (torch.bfloat16, torch.float16) else weight), eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of each head of `x [T, heads, D]` by the angles of `cos, sin [T, D/2]` (Su 2021)."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def unturned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` itself, where positions are learned; `cos` and `sin` are empty."""
    return x


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of the two halves of `gate_up [T, 2 F_r]` (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


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
    """Causal attention of one sequence, `[S, N_r, D]`: its last S positions look at all L held in `k, v [L, K_r, D]`.
    Or of several with the same S and L, of which all tensors have one dim more in front.

    kv_index: for each query head the KV head it reads, so that groups of any size may straddle ranks. window: how many
    tokens a position looks back over, itself included; 0 for all. cap: scores become `cap * tanh(score / cap)`. slopes:
    see `alibi`. drop: of the weights `[..., N_r, S, L]`.
    """
    index = torch.tensor(kv_index, dtype=torch.int64, device=q.device)
    keys, values = (x.index_select(-2, index).transpose(-3, -2) for x in (k, v))
    scores = q.transpose(-3, -2) @ keys.transpose(-2, -1) * scale
    if cap:
        scores = (scores / cap).tanh() * cap
    if slopes:
        scores = scores + alibi(slopes, k) * scale
    hidden = ~visible(q.shape[-3], k.shape[-3], window, q.device)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=_wide(q)).to(q.dtype)
    weights = drop(weights) if drop else weights
    return (weights @ values).transpose(-3, -2)


def alibi(slopes: Sequence[float], k: Tensor) -> Tensor:
    """What is added to the scores of each query head, unscaled, `[N_r, 1, L]`: its slope times a key's position.

    Press et al. 2022; rounded to bfloat16, as Falcon was trained and transformers computes it.
    """
    positions = torch.arange(k.shape[-3], device=k.device)
    bias = torch.tensor(slopes, dtype=torch.bfloat16, device=k.device)[:, None, None] * positions
    return bias.to(k.dtype)


def visible(length: int, held: int, window: int, device: torch.device) -> Tensor:
    """Which of `held` positions each of the last `length` ones may look at, `[S, L]` bool."""
    seen = torch.ones(length, held, dtype=torch.bool, device=device).tril(held - length)
    return seen.triu(held - length - window + 1) if window else seen


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
