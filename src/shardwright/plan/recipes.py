"""A training recipe in the planner's terms, and the split at which it trains fastest here.

Decides how a recipe's keys become a job, and what is tried for it on this machine. No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

from shardwright.errors import UsageError
from shardwright.models.config import ModelConfig
from shardwright.plan import memory
from shardwright.plan.candidates import divisors
from shardwright.plan.declared import of_config
from shardwright.plan.measured import Measured, slowest
from shardwright.plan.software import profile
from shardwright.plan.step import Job, Scene, step
from shardwright.plan.training import RECOMPUTE, Split, Training
from shardwright.train.recipe import Recipe, TrainPart

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
"""Of a recipe's dtype, as software profiles call them."""


@dataclass(frozen=True)
class TrainingChoice:
    """Tensor and data parallelism, and the tokens a second that are predicted for each pair that fits."""

    tensor: int
    data: int
    tokens_per_s: Mapping[tuple[int, int], float]


def job_of(recipe: Recipe, config: ModelConfig) -> Job:
    """What a recipe asks for, by this package's own training, to be `recut`."""
    train, parallel = recipe.train, recipe.parallel
    split = Split(
        tp=parallel.tensor,
        pp=parallel.pipeline,
        vpp=1,
        dp=parallel.data,
        cp=1,
        sp=int(parallel.sequence),
        micro_batch=train.micro_batch,
        recompute=RECOMPUTE.index(train.recompute),
        zero=int(parallel.zero),
    )
    scores = _scores_kept(config, train)
    blocks = of_config(config)
    return Job(
        blocks=replace(blocks, scores_kept=scores or blocks.scores_kept),
        training=Training(sequence=recipe.data.sequence, global_batch=train.batch, fp8=0, flash=int(not scores)),
        split=split,
        software=profile("shardwright", PRECISIONS[train.dtype]),
    )


def _scores_kept(config: ModelConfig, train: TrainPart) -> int:
    """Numbers that attention keeps of each score where it is computed in single operations, 0 where it is not: what
    tanh gave, what softmax did, in float32, and what weighs, where that is another.
    """
    if not (config.score_cap or train.attention_dropout):
        return 0
    narrow = train.dtype == "bfloat16"
    return bool(config.score_cap) + (2 if narrow else 1) + (narrow or train.attention_dropout > 0)


def recut(job: Job, tensor: int, data: int) -> Job:
    """The job at this split, without what does not go with it."""
    split, sequences = job.split, ceil(job.training.global_batch / data)
    kept = {"sp": split.sp * (tensor > 1), "zero": split.zero * (data > 1)}
    micro_batch = min(split.micro_batch, sequences)
    return replace(job, split=replace(split, tp=tensor, dp=data, micro_batch=micro_batch, **kept))


def here(job: Job, measured: Measured, tensor: int, data: int) -> Scene:
    """The job at this split, on this machine's slowest rank."""
    machine = slowest(measured, tensor * data, int(job.software.activation_bytes))
    return Scene(**recut(job, tensor, data).__dict__, machine=machine)


def fastest_training(job: Job, measured: Measured) -> TrainingChoice:
    """The tensor x data parallelism that trains fastest here, of all numbers of ranks that were measured.

    Raises:
        UsageError: nothing fits this machine's memory.
    """
    speeds = {}
    for ranks in sorted(measured.ranks):
        for tensor in divisors(ranks):
            scene = here(job, measured, tensor, ranks // tensor)
            if scene.split.dp <= job.training.global_batch and memory.worst(scene).total <= scene.machine.memory:
                tokens = job.training.global_batch * job.training.sequence
                speeds[tensor, ranks // tensor] = float(tokens / step(scene).total)
    if not speeds:
        limit = f"no split fits the {measured.memory / 2**30:.1f} GiB of this machine"
        raise UsageError("tp", "auto", limit, "take a smaller train.micro_batch, or train.recompute = 'full'")
    tensor, data = max(speeds, key=lambda pair: speeds[pair])
    return TrainingChoice(tensor, data, speeds)
