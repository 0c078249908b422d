"""Dropout whose masks depend on (seed, name, step, global index), never on how a tensor is cut.

`Dropout` stands where a model has `nn.Dropout`. What a module draws in its own code, by `F.dropout` or inside a fused
attention, is met as it is called: `DrawnByPlace` answers those calls, in order, while that module trains.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwright.errors import UsageError
from shardwright.layers import random

Places = dict[int, tuple[Tensor, int]]
"""For each dim that is cut, counted from the end: the places this rank holds of so many, again and again."""

ANSWERED = {"dropout": F.dropout, "scaled_dot_product_attention": F.scaled_dot_product_attention}
"""Calls that draw, and can be answered by place."""

CALLS = 1 << 10
"""Calls of one dropout that a backward may repeat."""

_DROPOUT = inspect.signature(F.dropout)


@final
class Dropout(nn.Module):
    """`nn.Dropout` with the same mask at every split: an element's fate is drawn from its place in the whole tensor.

    The step counts the calls in training mode. A call that `torch.utils.checkpoint` repeats during the backward draws
    what it drew before: a checkpoint puts torch's generator back, and by its state the call is known again.
    """

    def __init__(self, p: float, name: str, *, seed: int = 0, places: Places | None = None) -> None:
        super().__init__()
        self.p, self.name, self.seed, self.step = p, name, seed, 0
        self.places = places or {}
        self.calls: dict[int, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        """`x [...]` → the same shape; in training an element is 0 with probability p, else grows by 1/(1 - p)."""
        return self.dropped(x, self.p) if self.training else x

    def dropped(self, x: Tensor, p: float) -> Tensor:
        """The same with probability p, in either mode."""
        if p == 0:
            return x
        keep = random.uniform(self.seed, self.name, self._call(), self._index(x)) >= p
        return torch.where(keep, x / (1 - p) if p < 1 else x, torch.zeros((), dtype=x.dtype, device=x.device))

    def _call(self) -> int:
        """The number of this call, or of the one that it repeats."""
        state = hash(torch.get_rng_state().numpy().tobytes())
        torch.rand(())  # the next call finds another state
        if torch._C._current_graph_task_id() < 0:
            self.step += 1
            self.calls[state] = self.step
            if len(self.calls) > CALLS:
                del self.calls[next(iter(self.calls))]
        elif state not in self.calls:
            constraint = f"{self.name} cannot tell which dropout of the forward is computed again"
            raise UsageError(
                "preserve_rng_state", "<another state>", constraint, "leave it on; with threads, use processes"
            )
        return self.calls[state]

    def _index(self, x: Tensor) -> Tensor:
        """Each element's flat index in the whole tensor."""
        index = torch.zeros((), dtype=torch.int64, device=x.device)
        stride = 1
        for dim in range(-1, -x.dim() - 1, -1):
            mine, size = x.shape[dim], x.shape[dim]
            places = torch.arange(mine)
            if dim in self.places:
                held, period = self.places[dim]
                times = mine // max(1, len(held))
                places, size = (torch.arange(times)[:, None] * period + held).reshape(-1), period * max(1, times)
            index = index + (places.to(x.device) * stride).view(-1, *[1] * (-1 - dim))
            stride *= size
        return index

    def extra_repr(self) -> str:
        """Its probability and what keys its masks."""
        return f"p={self.p}, name={self.name}"


@final
class DroppedAttention(nn.Module):
    """`scaled_dot_product_attention` of the same arguments, its weights dropped by place."""

    def __init__(self, name: str, places: Places) -> None:
        super().__init__()
        self.dropout = Dropout(0.0, name, places=places)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`query [..., N, L, D]`, `key` and `value [..., K, S, D]` → `[..., N, L, D]`; a row that sees nothing is 0."""
        if dropout_p == 0:
            options: Any = {"scale": scale, "enable_gqa": enable_gqa}
            return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, **options)
        if enable_gqa:
            times = query.shape[-3] // max(1, key.shape[-3])
            key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
        weights = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            weights = weights.masked_fill(~attn_mask, -math.inf) if hidden else weights + attn_mask
        blind = (weights == -math.inf).all(-1, keepdim=True)
        weights = weights.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
        return self.dropout.dropped(weights, dropout_p) @ value


@final
class DrawnByPlace:
    """Hooks around a module's forward: its calls that draw, in order, are answered by these."""

    def __init__(self, drawing: Sequence[Dropout | DroppedAttention]) -> None:
        self.drawing = tuple(drawing)
        self.entered: list[_Answers] = []

    def before(self, module: nn.Module, arguments: Any) -> None:
        """Begin to answer, in training only."""
        if module.training:
            self.entered.append(_Answers(self.drawing))
            self.entered[-1].__enter__()  # type: ignore[no-untyped-call]

    def after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """End, after an error too."""
        if self.entered:
            self.entered.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Answers(TorchFunctionMode):
    def __init__(self, drawing: Sequence[Dropout | DroppedAttention]) -> None:
        super().__init__()
        self.rest = list(reversed(drawing))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what draws; run all else."""
        kwargs = kwargs or {}
        if self.rest and function in ANSWERED.values():
            one = self.rest.pop()
            if isinstance(one, DroppedAttention) and function is not F.dropout:
                return one(*args, **kwargs)
            if isinstance(one, Dropout) and function is F.dropout:
                given = _DROPOUT.bind(*args, **kwargs)
                given.apply_defaults()
                x, p, training, _ = given.args
                return one.dropped(x, p) if training else x
        return function(*args, **kwargs)
