"""Which implementation of a kernel runs: one explicit table, filled by measurement, printable with its reasons.

A row answers for a kernel, a device, a dtype, a mode, a kind of group, a size and a comm_turn; the first that matches
wins. To add an implementation: a file with a function of the kernel's checked operands and the group, its name where
the operator lists its implementations, and a row here. It only goes forward; gradients are the operator's. Every kernel
has its `reference`, and meta tensors take it unless the call says how often to cut.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from shardwright.comm.group import Group, name_of
from shardwright.errors import UnsupportedError

Kernel = Literal[
    "matmul_all_reduce",
    "all_gather_matmul",
    "matmul_reduce_scatter",
    "matmul_all_reduce_add_rms_norm",
    "attention",
    "rms_norm",
    "rotary",
    "swiglu",
    "cross_entropy",
]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One row: for this kernel, where all of the rest fits (`*` is any), take `implementation`, because of `reason`.

    dtype: of the first operand. mode: `Operands.mode` of a fused matmul. group: the class of the group. elements: the
    least elements of the output for which the row holds. turns: the least comm_turn. needs: a package without which the
    row does not hold.
    """

    kernel: Kernel
    device: str = "*"
    dtype: str = "*"
    mode: str = "*"
    group: str = "*"
    elements: int = 0
    turns: int = 0
    needs: str = ""
    implementation: str
    reason: str

    def fits(self, device: str, dtype: str, mode: str, group: str, elements: int, turns: int) -> bool:
        """Whether this row speaks of such operands."""
        asked = ((self.device, device), (self.dtype, dtype), (self.mode, mode), (self.group, group))
        enough = elements >= self.elements and turns >= self.turns and (not self.needs or find_spec(self.needs))
        return bool(enough) and all(mine in ("*", theirs) for mine, theirs in asked)


ALONE = "one thread"
"""The mode of a kernel that stays on its rank, where torch has one thread for it; with more it has none."""

META = "shapes and operation counts only"
STEPS = "one step after the other, where no row above holds: {}"
FUSED = (
    "torch's fused attention keeps no [N, S, L] scores: on one AMD EPYC core in float32, 9 heads of 64, it takes 8 ms "
    "for 512 tokens and 0.096 ms for one token over 512, the reference 11 to 26 ms and 0.11 ms"
)
UNCAPPED = "torch's fused attention caps no scores"
UNDROPPED = "torch's fused attention drops weights by its own generator, not by their place"
FORCED = "the call says how often to cut"
ASCEND = "the device's own fused operator, within its limits, else the reference; unproven: never run on such a device"
SYMMETRIC = (
    "rows are reduced as they come, where every rank reaches the others' memory, else the reference; unproven: never "
    "run on such devices"
)
CUT = (
    "pieces of 4 MiB over gloo, two ranks on two Xeon cores, float32: 1.06 to 1.23 times as fast as the reference from "
    "1024 rows of 8192 columns on; with 512 rows 0.91 to 1.05, with fewer less (benchmarks/chunks.py)"
)
STRIPS = (
    "integers become floats on their way into the product: over int8 from memory, 8192 columns, two ranks on two Xeon "
    "cores, one row takes 0.67 ms for K 1024 and 1.7 for 2728, where float32 weights take 2.2 and 5.9, and the "
    "reference 36 and 90; 64 rows and more take what they take over float32"
)
PASSED = (
    "each row is read and written once, in the first cache: on one Xeon core, 1024 rows of 512 to 4096 there and back "
    "take {} of torch's time; torch's operations use as many threads as there are, these one"
)
LOCAL = "torch's operations, one after the other, where no row above holds"


def _reference(kernel: Kernel, steps: str) -> tuple[Choice, Choice]:
    return (
        Choice(kernel=kernel, device="meta", implementation="reference", reason=META),
        Choice(kernel=kernel, implementation="reference", reason=STEPS.format(steps)),
    )


def _compiled(kernel: Kernel, part: str) -> tuple[Choice, Choice, Choice]:
    return (
        Choice(kernel=kernel, device="meta", implementation="reference", reason=META),
        Choice(
            kernel=kernel,
            device="cpu",
            dtype="float32",
            mode=ALONE,
            needs="numba",
            implementation="compiled",
            reason=PASSED.format(part),
        ),
        Choice(kernel=kernel, implementation="reference", reason=LOCAL),
    )


TABLE: tuple[Choice, ...] = (
    Choice(kernel="matmul_all_reduce", turns=1, implementation="chunked", reason=FORCED),
    Choice(kernel="matmul_all_reduce", device="npu", group="TorchGroup", implementation="npu", reason=ASCEND),
    Choice(
        kernel="matmul_all_reduce",
        device="cuda",
        mode="plain",
        group="TorchGroup",
        implementation="symmetric",
        reason=SYMMETRIC,
    ),
    Choice(
        kernel="matmul_all_reduce",
        device="cpu",
        dtype="float32",
        mode="plain",
        group="TorchGroup",
        elements=1 << 23,
        implementation="chunked",
        reason=CUT,
    ),
    Choice(
        kernel="matmul_all_reduce",
        device="cpu",
        dtype="float32",
        mode="weight-quant",
        needs="numba",
        implementation="strips",
        reason=STRIPS,
    ),
    Choice(kernel="matmul_all_reduce_add_rms_norm", turns=1, implementation="chunked", reason=FORCED),
    *_reference("matmul_all_reduce", "matmul, then the group's all-reduce"),
    *_reference("all_gather_matmul", "the group's all-gather, then matmul"),
    *_reference("matmul_reduce_scatter", "matmul, then the group's reduce-scatter"),
    *_reference("matmul_all_reduce_add_rms_norm", "matmul, the group's all-reduce, addition, norm"),
    Choice(kernel="attention", device="meta", implementation="reference", reason=META),
    Choice(kernel="attention", mode="capped", implementation="reference", reason=UNCAPPED),
    Choice(kernel="attention", mode="dropped", implementation="reference", reason=UNDROPPED),
    Choice(kernel="attention", implementation="fused", reason=FUSED),
    *_compiled("rms_norm", "0.3"),
    *_compiled("rotary", "0.25"),
    *_compiled("swiglu", "0.35"),
    *_compiled("cross_entropy", "0.7"),
)


@cache
def select(
    kernel: Kernel,
    device: str,
    dtype: torch.dtype,
    *,
    mode: str = "*",
    group: str = "*",
    elements: int = 0,
    turns: int = 0,
) -> str:
    """The name of the implementation for operands of this device type, dtype, mode and size, in such a group."""
    name = name_of(dtype)
    for row in TABLE:
        if row.kernel == kernel and row.fits(device, name, mode, group, elements, turns):
            return row.implementation
    raise UnsupportedError(f"{kernel}: nothing implements it for {name} on {device}; use float32 on cpu")


def select_for(kernel: Kernel, x: Tensor, group: Group, elements: int, mode: str = "*", turns: int = 0) -> str:
    """`select` for operands like `x` in this group, with an output of so many elements, to be cut so often."""
    kind = type(group).__name__
    return select(kernel, x.device.type, x.dtype, mode=mode, group=kind, elements=elements, turns=turns)


def select_local(kernel: Kernel, x: Tensor) -> str:
    """`select` for an operand like `x`, of a kernel in which nothing moves between ranks.

    `torch.compile` and `torch.export` are shown torch's operations: of others they would see nothing.
    """
    alone = torch.get_num_threads() == 1 and not torch.compiler.is_compiling()
    return select(kernel, x.device.type, x.dtype, mode=ALONE if alone else "*")
