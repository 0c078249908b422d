"""`matmul_all_reduce` as Ascend's one fused operator: this file knows the device's limits, not the contract's checks.

Unproven: never run on such a device; tested against a recorded contract (Ascend/op-plugin documentation).
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from shardwright.comm.group import Group, name_of
from shardwright.comm.torch_group import TorchGroup
from shardwright.kernels import fused_reference
from shardwright.kernels.fused import instead
from shardwright.kernels.operands import Operands
from shardwright.kernels.quant import FullQuant, WeightQuant

CARDS = (1, 2, 4, 8)
MOST = 65535
"""The largest k where anything is quantised, and the largest n where the weight alone is."""

MULTIPLIED = (torch.float16, torch.bfloat16, torch.int8)
DEVICE = "Ascend910B"
"""Atlas A2, as its driver says it."""


class Options(TypedDict, total=False):
    """The contract's keywords; see `kernels.matmul_all_reduce`."""

    reduce_op: str
    bias: Tensor | None
    antiquant_scale: Tensor | None
    antiquant_offset: Tensor | None
    x3: Tensor | None
    dequant_scale: Tensor | None
    pertoken_scale: Tensor | None
    comm_quant_scale_1: Tensor | None
    comm_quant_scale_2: Tensor | None
    comm_turn: int
    antiquant_group_size: int


def npu_mm_all_reduce(
    x1: Tensor,
    x2: Tensor,
    group: Group,
    *,
    tag: str = "",
    unfused: Callable[..., Tensor] | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """`all_reduce(x1 @ x2 + bias + x3)` and its quantised modes, by `torch_npu.npu_mm_all_reduce_base`.

    All such operators of a model share one communicator, so pass one group. Meant for prefill; not differentiable.

    unfused: what runs outside the device's limits, with the same arguments; a warning says why.

    Raises:
        UnsupportedError: outside the limits without `unfused`.
    """
    reason = why_not(x1, x2, group, options)
    if reason is not None:
        return instead("npu_mm_all_reduce", reason, unfused)(x1, x2, group, tag=tag, **options)
    assert isinstance(group, TorchGroup)
    torch_npu: Any = import_module("torch_npu")
    y: Tensor = torch_npu.npu_mm_all_reduce_base(x1, x2, group.hccl_name(), **options)
    return y


def matmul_all_reduce(operands: Operands, group: Group) -> Tensor:
    """A row of `select`'s table: as the reference, which runs outside the device's limits."""

    def unfused(*arguments: Any, **options: Any) -> Tensor:
        return fused_reference.matmul_all_reduce(operands, group)

    said = _options(operands)
    return npu_mm_all_reduce(operands.x1, operands.x2, group, tag=operands.tag, unfused=unfused, **said)


def _options(operands: Operands) -> Options:
    said = Options(bias=operands.bias, x3=operands.x3, comm_turn=operands.turns)
    match operands.quant:
        case WeightQuant() as weight:
            said["antiquant_scale"], said["antiquant_offset"] = weight.scale, weight.offset
            said["antiquant_group_size"] = weight.group_size
        case FullQuant() as full:
            said["dequant_scale"], said["pertoken_scale"] = full.scale, full.per_token
            if full.wire is not None:
                said["comm_quant_scale_1"], said["comm_quant_scale_2"] = full.wire
    return said


def why_not(x1: Tensor, x2: Tensor, group: Group, options: Options) -> str | None:
    """What keeps these operands from the fused operator, if anything does."""
    if not isinstance(group, TorchGroup):
        return f"a {type(group).__name__} has no HCCL communicator"
    if torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad):
        return "the fused operator has no gradient"
    return _device(group) or _sizes(x1, x2, options)


def _device(group: Group) -> str | None:
    try:
        torch_npu: Any = import_module("torch_npu")
    except ModuleNotFoundError:
        return "torch_npu is not installed"
    device = str(torch_npu.npu.get_device_name())
    if not device.startswith(DEVICE):
        return f"{device} is not of the Atlas A2 series ({DEVICE}…)"
    if group.size not in CARDS:
        return f"{group.size} cards, not one of {CARDS}"
    return None


def _sizes(x1: Tensor, x2: Tensor, options: Options) -> str | None:
    weight_quantised = options.get("antiquant_scale") is not None
    quantised = weight_quantised or x1.dtype == torch.int8
    if x1.dtype not in MULTIPLIED:
        return f"x1 is {name_of(x1.dtype)}, not one of {[name_of(dtype) for dtype in MULTIPLIED]}"
    if not x1.numel():
        return f"x1 {list(x1.shape)} is empty"
    if quantised and x1.shape[-1] > MOST:
        return f"k is {x1.shape[-1]}, above {MOST} with quantised operands"
    if weight_quantised and x2.shape[-1] > MOST:
        return f"n is {x2.shape[-1]}, above {MOST} with a quantised weight"
    if options.get("comm_turn", 0):
        return f"comm_turn is {options['comm_turn']}, and the device cuts by itself (0)"
    return None
