"""Why a layout lost, in a sentence: out of memory by how much on which stage, or what it spends more on."""

import numpy as np

from shardwright.plan import memory
from shardwright.plan.found import GIB
from shardwright.plan.memory import Memory
from shardwright.plan.quantities import picked
from shardwright.plan.step import Scene, Step, micro_batches

KINDS = {
    "products": "matrix products are slower, being smaller or less evenly shared",
    "attention": "attention takes longer on a rank",
    "elementwise": "norms and other elementwise work take longer on a rank",
    "recompute": "activations are computed twice",
    "head": "the last stage waits for the vocabulary's logits",
    "tensor_parallel": "tensor-parallel communication",
    "data_parallel": "data-parallel communication",
    "pipeline": "passing activations between stages",
    "bubble": "the pipeline's bubble",
    "host": "the host launching kernels",
    "optimiser": "the optimiser, which every data-parallel rank runs whole",
}


def why_slower(step: Step, at: int, best: int) -> str:
    """The kind of time that grew most against the winner's, and its share of the step."""
    total = float(step.total[at])
    grown = {kind: float(seconds[at] - seconds[best]) for kind, seconds in step.__dict__.items()}
    kind = max(grown, key=lambda name: grown[name])
    slower = total / float(step.total[best]) - 1
    share = float(step.__dict__[kind][at]) / total
    said = f"{100 * slower:.1f} % slower: {KINDS[kind]}, {100 * share:.0f} % of the step"
    communication = float(step.communication[at]) / total
    return said + (f"; communication {100 * communication:.0f} %" if communication > 0.5 else "")


def why_not_fitting(scene: Scene, at: int) -> str:
    """The fullest stage, what it needs over what there is, and what most of it is."""
    one = picked(scene, at)
    stages = np.arange(int(one.split.pp))
    held = memory.held(one, stages)
    totals = np.broadcast_to(held.total, stages.shape)
    stage = int(np.argmax(totals))
    need, have = float(totals[stage]), float(one.machine.memory)
    kind = largest(held, stage)
    return (
        f"out of memory by {(need - have) / GIB:.1f} GiB on stage {stage}: it needs {need / GIB:.1f} GiB of "
        f"{have / GIB:.0f}, most of it {kind}"
    )


def largest(held: Memory, stage: int) -> str:
    """The kind that takes most."""
    sizes = {
        kind: np.broadcast_to(value, stage + 1) if np.ndim(value) == 0 else value
        for kind, value in held.__dict__.items()
    }
    return max(sizes, key=lambda kind: float(sizes[kind][stage]))


def waits(scene: Scene, at: int) -> str:
    """How many micro-batches fill how many stages, where there is a pipeline."""
    one = picked(scene, at)
    return "" if one.split.pp == 1 else f"{int(micro_batches(one))} micro-batches over {int(one.split.pp)} stages"
