"""Bytes a rank holds at the worst moment of a training step, by kind and by pipeline stage.

Decides what lives at once. Formulas of activations: Korthikanti et al. 2022, with the pieces named. Knows no device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shardwright.plan import work
from shardwright.plan.blocks import Blocks
from shardwright.plan.quantities import Floats
from shardwright.plan.step import Job, micro_batches

LOGIT_BYTES = 12
"""Of one logit while the loss is taken: bf16, its float32 copy, and a gradient of each."""

SCORE_BYTES = 5
"""Of one score of unfused attention: softmax in, out, and a dropout mask (Korthikanti et al. 2022, section 4.1)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by kind on one rank."""

    weights: Floats
    gradients: Floats
    optimiser: Floats
    activations: Floats
    logits: Floats
    buffers: Floats
    slack: Floats

    @property
    def total(self) -> Floats:
        """All kinds together."""
        return sum(self.__dict__.values())


def held(job: Job, stage: Floats) -> Memory:
    """What a rank of that pipeline stage holds, 0 the first."""
    split, software = job.split, job.software
    share = work.busiest(job.blocks, split.tp)
    parameters, layers = stage_parameters(job.blocks, share, split.pp, stage)
    everyone = split.dp * split.cp
    of_weights = np.where(split.zero >= 3, everyone, 1)
    of_gradients = np.where(split.zero >= 2, everyone, 1)
    of_optimiser = np.where(split.zero >= 1, everyone, 1)
    tokens = split.micro_batch * job.training.sequence / split.cp
    activations = _activations(job, share, tokens, layers, stage)
    last = stage == split.pp - 1
    return Memory(
        weights=software.weight_bytes * parameters / of_weights,
        gradients=software.held_gradient_bytes * parameters / of_gradients,
        optimiser=software.optimiser_bytes * parameters / of_optimiser,
        activations=activations,
        logits=np.where(last, LOGIT_BYTES * tokens * share.vocabulary, 0.0),
        buffers=software.reserved + _gathered(job),
        slack=software.slack * activations,
    )


def worst(job: Job) -> Memory:
    """The fullest stage's."""
    return fullest(lambda stage: held(job, stage), job.split.pp)[0]


def fullest(of_stage: Callable[[Floats], Memory], pp: Floats) -> tuple[Memory, Floats]:
    """What a rank of the fullest stage holds, and which stage that is.

    The first holds most activations and the last the logits; where stages cannot be equal these ends are the shorter
    ones, and of those between, the second holds most.
    """
    most, where = of_stage(0 * pp), 0 * pp
    for stage in (np.minimum(1, pp - 1), pp - 1):
        other = of_stage(stage)
        fuller = other.total > most.total
        kinds = most.__dict__.items()
        most = Memory(**{kind: np.where(fuller, other.__dict__[kind], value) for kind, value in kinds})
        where = np.where(fuller, stage, where)
    return most, where


def stage_parameters(blocks: Blocks, share: work.Share, pp: Floats, stage: Floats) -> tuple[Floats, Floats]:
    """Parameters of one rank of a stage, and its layers; stages that cannot be equal leave the ends shorter."""
    base, extra = blocks.layers // pp, blocks.layers % pp
    inner = (stage > 0) & (stage < pp - 1)
    room = np.maximum(pp - 2, 0)
    middle = base + np.where(extra >= room, 1, (stage <= extra) * 1) * (extra > 0)
    ends = base + np.where((stage == 0) & (extra > room), 1, 0) + np.where((stage == pp - 1) & (extra > room + 1), 1, 0)
    layers = np.where(pp == 1, blocks.layers, np.where(inner, middle, ends))
    table = work.table_parameters(share)
    small = np.where(stage == pp - 1, blocks.holds.ends, 0)
    ends_held = np.where(pp == 1, (2 - blocks.tied) * table, np.where(inner, 0, table)) + small
    return layers * work.layer_parameters(blocks, share) + ends_held, layers


def layer_activations(job: Job, share: work.Share, fused: Floats) -> tuple[Floats, Floats, Floats]:
    """Bytes a layer keeps of a token for its backward: in all, where all is computed again, and unfused scores.

    Of H features: what enters each block, and what enters or leaves each norm. fused: see `Software`.
    """
    split, software, blocks, width = job.split, job.software, job.blocks, job.software.activation_bytes
    sharded = np.where(split.sp > 0, split.tp, 1)
    whole = (width * (blocks.parts + blocks.norms * blocks.norm_kept) + 2 * software.dropout) * share.hidden / sharded
    qkv, qk = share.heads + 2 * share.kv_heads, share.heads + share.kv_heads
    grouped = share.heads % np.maximum(share.kv_heads, 1) == 0  # else KV heads are copied for each query head
    normed = blocks.head_norms * ((1 - grouped) * qkv + (blocks.head_kept - 1) * qk)
    apart = (blocks.turned > 0) | (blocks.head_norms > 0)  # q and k, from what the product gave
    views = np.where(grouped, qkv + apart * qk, 3 * share.heads + (1 - apart) * 2 * share.kv_heads)
    views = np.where(blocks.scores_kept > 0, 3 * share.heads, views)  # nothing flash: copies by head, joined again
    heads = np.where(fused > 0, qkv + share.heads, views + share.heads + normed)
    wide = np.where(fused > 0, 2 + share.gated, 1 + 2 * share.gated + blocks.activation_kept) * share.feed_forward
    of_score = np.where(blocks.scores_kept > 0, blocks.scores_kept * width, SCORE_BYTES * (job.training.flash == 0))
    scores = of_score * share.heads * job.training.sequence
    begun = np.where(software.blockwise > 0, blocks.parts + blocks.behind * blocks.norm_kept, 1)
    entries = begun * width * share.hidden / sharded
    return whole + width * (heads * share.head_size + wide) + scores, entries, scores


def _activations(job: Job, share: work.Share, tokens: Floats, layers: Floats, stage: Floats) -> Floats:
    split, software = job.split, job.software
    kept, entries, _ = layer_activations(job, share, software.fused)
    cores, _, scores = layer_activations(job, share, 1)  # what lies between products, and no more
    by_software = (software.fused > 0) & (job.training.flash > 0)
    selective = np.where(by_software, kept * software.kept, cores - scores)
    one = np.where(split.recompute == 2, entries, np.where(split.recompute == 1, selective, kept))
    working = np.where(split.recompute > 0, kept, 0.0)  # the layer that is being computed again
    return tokens * (in_flight(job, stage) * layers * one + working)


def in_flight(job: Job, stage: Floats) -> Floats:
    """Micro-batches whose activations a stage holds at once: 1F1B, or interleaved (Narayanan et al. 2021)."""
    split = job.split
    rounds = micro_batches(job)
    plain = np.minimum(split.pp - stage, rounds)
    chunks = 2 * (split.pp - 1 - stage) + (split.vpp - 1) * split.pp + 1
    return np.where(split.vpp > 1, np.minimum(chunks / split.vpp, rounds), plain)


def _gathered(job: Job) -> Floats:
    """ZeRO-3 holds two layers' weights and one's gradients whole, while one is used and the next arrives."""
    layer = work.layer_parameters(job.blocks, work.busiest(job.blocks, job.split.tp))
    return np.where(job.split.zero >= 3, 2 * (2 + 1) * layer, 0.0)
