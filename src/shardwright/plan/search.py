"""The split that trains fastest, of all there are: every candidate priced at once, the best and why the others lost.

Decides what wins and which losers are shown. Serving is searched in `serve_search`.
"""

import time
from dataclasses import dataclass, replace

import numpy as np

from shardwright.plan import memory, work
from shardwright.plan.blocks import Blocks
from shardwright.plan.candidates import none_at_all, training_splits
from shardwright.plan.curves import Machine
from shardwright.plan.found import Found, Layout, Loser, by_kind, warnings_of
from shardwright.plan.hardware import Cluster
from shardwright.plan.memory import Memory
from shardwright.plan.quantities import picked
from shardwright.plan.reasons import waits, why_not_fitting, why_slower
from shardwright.plan.software import Software
from shardwright.plan.step import Scene, Step, step
from shardwright.plan.training import RECOMPUTE, Training
from shardwright.plan.unequal import Dealt, dealt, slowest

SHOWN = 40
"""Losers that are explained: the best of each shape tp x pp x dp, fastest first, those that do not fit last."""

COMPARED = 8
"""Shapes whose steps are drawn side by side."""


@dataclass(frozen=True, kw_only=True)
class Priced:
    """Candidates with their price. memory: of the fullest stage."""

    scene: Scene
    step: Step
    memory: Memory
    fits: np.ndarray
    dealt: Dealt

    def layout(self, at: int) -> Layout:
        """One of them, to show."""
        split, training = picked(self.scene.split, at), self.scene.training
        seconds = float(self.step.total[at])
        return Layout(
            tp=int(split.tp),
            pp=int(split.pp),
            vpp=int(split.vpp),
            dp=int(split.dp),
            sp=int(split.sp),
            micro_batch=int(split.micro_batch),
            recompute=RECOMPUTE[int(split.recompute)],
            zero=int(split.zero),
            step_s=seconds,
            memory_bytes=self.dealt.fullest(at),
            communication_share=float(self.step.communication[at]) / seconds,
            tokens_per_s=float(training.global_batch * training.sequence) / seconds,
            shares=self.dealt.shares(at),
        )


def plan_training(model: str, blocks: Blocks, cluster: Cluster, training: Training, software: Software) -> Found:
    """The fastest layout that fits, over all devices of the cluster."""
    started = time.perf_counter()
    priced = price(blocks, cluster, training, software)
    seconds = priced.step.total
    order = np.lexsort((np.where(priced.fits, seconds, priced.memory.total), ~priced.fits))
    best = int(order[0]) if priced.fits[order[0]] else None
    shapes = _shapes(priced, order)
    losers = [Loser(priced.layout(at), _reason(priced, at, best)) for at in shapes if at != best][:SHOWN]
    elapsed = time.perf_counter() - started
    winner = None if best is None else priced.layout(best)
    one = None if best is None else picked(priced.scene, best)
    return Found(
        model=model,
        cluster=cluster.name,
        mode="train",
        best=winner,
        candidates=len(seconds),
        search_s=elapsed,
        losers=tuple(losers),
        warnings=() if winner is None else warnings_of(winner, imbalance(blocks, winner), priced.dealt.alike),
        stages=() if one is None else by_kind(memory.held(one, np.arange(int(one.split.pp))), int(one.split.pp)),
        seconds=tuple(_seconds(priced, at) for at in shapes if priced.fits[at])[:COMPARED],
        frontier=tuple(_point(priced, at) for at in shapes),
    )


def price(blocks: Blocks, cluster: Cluster, training: Training, software: Software) -> Priced:
    """All candidates of a cluster."""
    machine = slowest(cluster)
    split = training_splits(cluster.size, int(machine.per_node), int(blocks.layers), int(training.global_batch))
    if not len(split.tp):
        raise none_at_all(cluster.size, int(machine.per_node), int(blocks.layers), int(training.global_batch))
    scene = Scene(blocks=blocks, training=training, split=split, machine=machine, software=software)
    held, ones = memory.worst(scene), np.ones_like(split.tp)

    def cost(machine: Machine, at: np.ndarray) -> np.ndarray:
        return np.asarray(step(replace(picked(scene, at), machine=machine)).total)

    shared = dealt(cluster, split.dp, held.total, float(software.reserved), training.fp8 > 0, cost)
    scene = replace(scene, machine=shared.machine)
    return Priced(
        scene=scene,
        step=Step(**{kind: value * ones for kind, value in step(scene).__dict__.items()}),
        memory=Memory(**{kind: value * ones for kind, value in held.__dict__.items()}),
        fits=held.total <= shared.machine.memory,
        dealt=shared,
    )


def imbalance(blocks: Blocks, layout: Layout) -> float:
    """By how much of the largest the parameters of one stage's ranks differ; unequal shares are meant to."""
    if layout.shares:
        return 0.0
    held = []
    for ranks in (work.busiest(blocks, layout.tp), work.idlest(blocks, layout.tp)):
        held.append(blocks.layers * work.layer_parameters(blocks, ranks) + work.table_parameters(ranks))
    return float(1 - held[1] / held[0])


def _shapes(priced: Priced, order: np.ndarray) -> list[int]:
    """The best candidate of each tp x pp x dp, in order."""
    split, seen, kept = priced.scene.split, set(), []
    for at in order:
        shape = (split.tp[at], split.pp[at], split.dp[at])
        if shape not in seen:
            seen.add(shape)
            kept.append(int(at))
    return kept


def _reason(priced: Priced, at: int, best: int | None) -> str:
    if not priced.fits[at] or best is None:
        return why_not_fitting(priced.scene, at)
    said, pipeline = why_slower(priced.step, at, best), waits(priced.scene, at)
    return f"{said} ({pipeline})" if "bubble" in said else said


def _seconds(priced: Priced, at: int) -> tuple[str, dict[str, float]]:
    kinds = {kind: float(value[at]) for kind, value in priced.step.__dict__.items()}
    return str(priced.layout(at)), kinds


def _point(priced: Priced, at: int) -> tuple[str, float, float, bool]:
    layout = priced.layout(at)
    return str(layout), float(layout.memory_bytes), layout.tokens_per_s, bool(priced.fits[at])
