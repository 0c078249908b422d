"""Query heads that use their KV heads unequally often: transformers' attention is handed keys and values by an index.

Through its `AttentionInterface`: a module whose rank needs it gets a config of its own that names our function, which
takes for each query head the KV head it reads and leaves the rest to the implementation the model had. The cache keeps
each KV head once. transformers is imported only where a model of its is at hand.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from shardwright.parallelize.attributes import FAILURES, without_data
from shardwright.parallelize.record import on_meta
from shardwright.parallelize.trace import Trace

NAME, PROBE = "shardwright", "shardwright-probe"
CHOICE = "_attn_implementation_internal"
"""Where a config of transformers keeps the name of its attention."""


def calls_the_interface(model: nn.Module, trace: Trace, path: str) -> bool:
    """Whether a module's attention is one call through transformers' interface: seen by putting a probe there."""
    module = model.get_submodule(path)
    chosen = vars(getattr(module, "config", None) or object.__new__(_Nothing)).get(CHOICE)
    if not isinstance(chosen, str):
        return False
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if chosen not in ALL_ATTENTION_FUNCTIONS:
        return False
    seen: list[int] = []

    def probe(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append(key.shape[1])
        return ALL_ATTENTION_FUNCTIONS[chosen](module, query, key, *rest, **options)

    ALL_ATTENTION_FUNCTIONS.register(PROBE, probe)
    alone = without_data(module)
    _choose(alone, PROBE)
    call = next(one for one in trace.modules if one.path == path)
    try:
        alone(*tree_map(on_meta, call.arguments), **tree_map(on_meta, dict(call.keywords)))
    except FAILURES:
        return False
    return len(seen) == 1


def index_attention(module: nn.Module, index: tuple[int, ...]) -> None:
    """Let a module's attention read, for each of its query heads, the KV head of this index."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend_by_index)
    module.kv_index, module.attention_before = index, getattr(module.config, CHOICE)  # type: ignore[assignment]
    _choose(module, NAME)


def attend_by_index(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
    """`query [B, N_r, S, D]`, `key` and `value [B, K_r, L, D]` → what the attention it had makes of the N_r pairs."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with torch._C.DisableTorchFunction():
        index = torch.tensor(module.kv_index, device=key.device)
        key, value = key.index_select(1, index), value.index_select(1, index)
    return ALL_ATTENTION_FUNCTIONS[module.attention_before](module, query, key, value, *rest, **options)


def _choose(module: nn.Module, name: str) -> None:
    module.config = copy(module.config)
    setattr(module.config, CHOICE, name)


class _Nothing:
    """What a module without a config has in its place."""
