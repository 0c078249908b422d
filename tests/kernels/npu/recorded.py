"""A `torch_npu` that is not there: `npu_mm_all_reduce_base` as op-plugin documents it, computed with plain torch.

It refuses what the operator's wrapper and the device refuse, so that a caller that is laxer than they are is found out.
Nothing here was seen on a device.
"""

from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from shardwright.comm.group import Group

FLOATS = (torch.float16, torch.bfloat16)


class RecordedTorchNpu(ModuleType):
    """calls: the communicator and the keywords of each call · groups: the ranks behind a communicator's name."""

    def __init__(self, groups: dict[str, Group], device: str = "Ascend910B2") -> None:
        super().__init__("torch_npu")
        self.__spec__ = ModuleSpec("torch_npu", None)
        self.groups = groups
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.npu = SimpleNamespace(get_device_name=lambda: device)

    def npu_mm_all_reduce_base(
        self,
        x1: Tensor,
        x2: Tensor,
        hcom: str,
        *,
        reduce_op: str = "sum",
        bias: Tensor | None = None,
        antiquant_scale: Tensor | None = None,
        antiquant_offset: Tensor | None = None,
        x3: Tensor | None = None,
        dequant_scale: Tensor | None = None,
        pertoken_scale: Tensor | None = None,
        comm_quant_scale_1: Tensor | None = None,
        comm_quant_scale_2: Tensor | None = None,
        comm_turn: int = 0,
        antiquant_group_size: int = 0,
    ) -> Tensor:
        given = {name: value for name, value in locals().items() if name not in ("self", "x1", "x2", "hcom")}
        group = self.groups[hcom]
        refuse(x1, x2, group.size, given)
        self.calls.append((hcom, given))
        if antiquant_scale is not None:
            y = wide(x1) @ dequantised(wide(x2), antiquant_scale, antiquant_offset, antiquant_group_size)
            dtype = x1.dtype
        elif x1.dtype == torch.int8:
            y = wide(x1) @ wide(x2)
            dtype = (
                torch.bfloat16 if dequant_scale is not None and dequant_scale.dtype == torch.bfloat16 else torch.float16
            )
        else:
            y, dtype = wide(x1) @ wide(x2), x1.dtype
        y = y if bias is None else y + wide(bias)
        if dequant_scale is not None:
            y = y * unpacked(dequant_scale)
        if pertoken_scale is not None:
            y = y * wide(pertoken_scale).view(*x1.shape[:-1], 1)
        y = y if x3 is None else y + wide(x3)
        if comm_quant_scale_1 is None or comm_quant_scale_2 is None:
            return group.all_reduce(y).to(dtype)
        first, second = wide(comm_quant_scale_1), wide(comm_quant_scale_2)
        summed = group.all_reduce((y / first).round().clamp(-128, 127))
        return ((summed * first / second).round().clamp(-128, 127) * second).to(dtype)


def wide(x: Tensor) -> Tensor:
    return x.double()


def dequantised(x2: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    """Offset first, then scale; per tensor, per channel, or per group of rows."""
    parts = [wide(part) for part in (scale, offset) if part is not None]
    if group_size:
        parts = [part.repeat_interleave(group_size, 0)[: len(x2)] for part in parts]
    return (x2 + parts[1] if len(parts) > 1 else x2) * parts[0]


def unpacked(scale: Tensor) -> Tensor:
    """A 64-bit scale holds the upper bits of a float32 in its lower half."""
    if scale.dtype != torch.int64:
        return wide(scale)
    return wide((scale & 0xFFFFE000).to(torch.int32).view(torch.float32))


def refuse(x1: Tensor, x2: Tensor, cards: int, given: dict[str, Any]) -> None:
    """Raise as the operator's wrapper does: a RuntimeError."""
    weight, full = given["antiquant_scale"] is not None, given["dequant_scale"] is not None
    output = (*x1.shape[:-1], x2.shape[-1])
    quantising = [name for name in given if "scale" in name or name == "antiquant_offset"]
    floats = x1.dtype.is_floating_point and x2.dtype.is_floating_point
    ends = [given[name] is None for name in ("comm_quant_scale_1", "comm_quant_scale_2")]
    x3 = given["x3"]
    for wrong, said in (
        (x2.dim() != 2, "x2 is 2-D"),
        (x1.dim() not in (2, 3) or x1.shape[-1] != x2.shape[0], "k differs"),
        (not x1.numel(), "x1 is empty"),
        (x1.dtype not in (*FLOATS, torch.int8), "x1 is of another type"),
        (given["reduce_op"] != "sum", "only sum"),
        (weight and not x1.dtype.is_floating_point, "antiquant with int8 x int8"),
        (full and x1.dtype.is_floating_point, "dequant_scale with a float x1"),
        (floats and any(given[name] is not None for name in quantising), "quantised inputs with float x float"),
        (x3 is not None and tuple(x3.shape) != output, "x3 of another shape"),
        (x3 is not None and x1.dtype.is_floating_point and x3.dtype != x1.dtype, "x3 of another type"),
        (given["pertoken_scale"] is not None and not full, "pertoken_scale without dequant_scale"),
        (ends[0] != ends[1], "one of the two comm scales alone"),
        (not ends[0] and not full, "comm scales without full quantisation"),
        (given["comm_turn"] != 0, "comm_turn"),
        (cards not in (1, 2, 4, 8), "cards"),
        (x1.shape[-1] > 65535 and (weight or full), "k above 65535"),
        (x2.shape[-1] > 65535 and weight, "n above 65535"),
    ):
        if wrong:
            raise RuntimeError(f"npu_mm_all_reduce_base: {said}")
