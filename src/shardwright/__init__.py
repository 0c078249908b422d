"""Split any transformer over any number of devices; run it, train it, and know beforehand which split is best.

Every public name is imported when it is first used: `import shardwright` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwright.comm.compression import all_reduce_compressed, compress_gradient, decompress_gradient
    from shardwright.comm.group import Group
    from shardwright.comm.parallel import initialize_model_parallel
    from shardwright.comm.single import SingleGroup
    from shardwright.comm.thread import ThreadGroup
    from shardwright.engine.llm import LLM
    from shardwright.engine.request import SamplingParams
    from shardwright.kernels.matmul_all_reduce import matmul_all_reduce
    from shardwright.kernels.quant import pack_dequant_scale
    from shardwright.kernels.siblings import all_gather_matmul, matmul_all_reduce_add_rms_norm, matmul_reduce_scatter
    from shardwright.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        ReplicatedLinear,
        RowParallelLinear,
    )
    from shardwright.layers.vocab import VocabParallelEmbedding, VocabParallelHead
    from shardwright.layout.partition import Partition
    from shardwright.layout.tensors import merge_tensors, split_tensor
    from shardwright.parallelize.model import parallelize_model
    from shardwright.parallelize.replace import replace_matmul_all_reduce
    from shardwright.parallelize.sharding import full_state_dict, load_full_state_dict
    from shardwright.parallelize.trace import trace
    from shardwright.plan.layouts import plan_layout
    from shardwright.train.data_parallel import synchronize_gradients
    from shardwright.train.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "ColumnParallelLinear": "layers.linear",
    "Group": "comm.group",
    "LLM": "engine.llm",
    "MergedColumnParallelLinear": "layers.linear",
    "Partition": "layout.partition",
    "QKVParallelLinear": "layers.linear",
    "ReplicatedLinear": "layers.linear",
    "RowParallelLinear": "layers.linear",
    "SamplingParams": "engine.request",
    "SingleGroup": "comm.single",
    "ThreadGroup": "comm.thread",
    "Trainer": "train.trainer",
    "VocabParallelEmbedding": "layers.vocab",
    "VocabParallelHead": "layers.vocab",
    "all_gather_matmul": "kernels.siblings",
    "full_state_dict": "parallelize.sharding",
    "load_full_state_dict": "parallelize.sharding",
    "all_reduce_compressed": "comm.compression",
    "compress_gradient": "comm.compression",
    "decompress_gradient": "comm.compression",
    "initialize_model_parallel": "comm.parallel",
    "matmul_all_reduce": "kernels.matmul_all_reduce",
    "matmul_all_reduce_add_rms_norm": "kernels.siblings",
    "matmul_reduce_scatter": "kernels.siblings",
    "merge_tensors": "layout.tensors",
    "pack_dequant_scale": "kernels.quant",
    "parallelize_model": "parallelize.model",
    "plan_layout": "plan.layouts",
    "replace_matmul_all_reduce": "parallelize.replace",
    "split_tensor": "layout.tensors",
    "trace": "parallelize.trace",
    "synchronize_gradients": "train.data_parallel",
}
"""Where each public name lives."""

__all__ = [
    "LLM",
    "ColumnParallelLinear",
    "Group",
    "MergedColumnParallelLinear",
    "Partition",
    "QKVParallelLinear",
    "ReplicatedLinear",
    "RowParallelLinear",
    "SamplingParams",
    "SingleGroup",
    "ThreadGroup",
    "Trainer",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "all_gather_matmul",
    "all_reduce_compressed",
    "compress_gradient",
    "decompress_gradient",
    "full_state_dict",
    "initialize_model_parallel",
    "load_full_state_dict",
    "matmul_all_reduce",
    "matmul_all_reduce_add_rms_norm",
    "matmul_reduce_scatter",
    "merge_tensors",
    "pack_dequant_scale",
    "parallelize_model",
    "plan_layout",
    "replace_matmul_all_reduce",
    "split_tensor",
    "synchronize_gradients",
    "trace",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'shardwright' has no attribute '{name}'")
    return import_module(f"shardwright.{_HOMES[name]}").__dict__[name]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
