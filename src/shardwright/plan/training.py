"""What a training run asks for, and how it is split. Plain records of arrays."""

from dataclasses import dataclass

from shardwright.plan.quantities import Floats

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Training:
    """The job: tokens a sequence, sequences a step, 1 for fp8 products, 1 for fused attention, bytes of a weight."""

    sequence: Floats
    global_batch: Floats
    fp8: Floats
    flash: Floats


@dataclass(frozen=True, kw_only=True)
class Split:
    """How it is cut. recompute: index in `RECOMPUTE` · zero: 0, 1, 2 or 3 · sp: 1 for sequence parallel."""

    tp: Floats
    pp: Floats
    vpp: Floats
    dp: Floats
    cp: Floats
    sp: Floats
    micro_batch: Floats
    recompute: Floats
    zero: Floats
