"""The split that serves most tokens a second, under a bound on the time per token if there is one.

Decides what wins and why the others lost. Weights and KV pages must fit; replicas share nothing.
"""

import time
from dataclasses import replace

import numpy as np

from shardwright.plan import work
from shardwright.plan.blocks import Blocks
from shardwright.plan.candidates import serving_splits
from shardwright.plan.curves import Machine
from shardwright.plan.found import GIB, Found, Layout, Loser, by_kind, warnings_of
from shardwright.plan.hardware import Cluster
from shardwright.plan.memory import Memory, fullest, stage_parameters
from shardwright.plan.quantities import Floats, picked
from shardwright.plan.reasons import largest
from shardwright.plan.search import COMPARED, SHOWN, imbalance
from shardwright.plan.serving import Load, Server, Service, Stage, service
from shardwright.plan.unequal import Dealt, dealt, slowest

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RESERVED = 2e9
"""Bytes of context and communication buffers on each rank."""


def plan_serving(
    model: str, blocks: Blocks, cluster: Cluster, load: Load, server: Server, latency_s: float | None
) -> Found:
    """The layout of the highest throughput. load.batch is not read: the search tries its own.

    latency_s: the most a token may take after the first, or None.
    """
    started = time.perf_counter()
    machine = slowest(cluster)
    tp, pp, dp, batch = serving_splits(cluster.size, int(machine.per_node), int(blocks.layers), BATCHES)
    load = Load(input=load.input, output=load.output, batch=batch, fp8=load.fp8 + 0 * tp)
    stage = Stage(blocks=blocks, machine=machine, server=server, tp=tp, pp=pp)
    held, fullest_stage = fullest(lambda at: serving_memory(stage, load, at), pp)
    bound = np.inf if latency_s is None else latency_s

    def cost(machine: Machine, at: np.ndarray) -> np.ndarray:
        seen = service(replace(picked(stage, at), machine=machine), picked(load, at))
        return np.asarray(np.where(seen.per_token > bound, seen.per_token, -seen.throughput))

    shared = dealt(cluster, dp, held.total, RESERVED, bool(load.fp8.any()), cost)
    machine = shared.machine
    stage = replace(stage, machine=machine)
    seen = service(stage, load)
    late = seen.per_token > bound
    fits = held.total <= machine.memory
    good = fits & ~late
    rate = dp * seen.throughput
    order = np.lexsort((np.where(good, -rate, np.where(fits, seen.per_token, held.total)), ~fits, ~good))
    layouts = _Layouts(tp, pp, dp, load, seen, shared)
    best = int(order[0]) if good[order[0]] else None
    why = _Why(machine, seen, held, fullest_stage, fits, late, rate, latency_s)
    chosen = _shapes(layouts, order)
    losers = [Loser(layouts.at(i), why.of(i, best)) for i in chosen if i != best][:SHOWN]
    winner = None if best is None else layouts.at(best)
    stages = (
        () if winner is None else by_kind(_of_stages(picked(stage, best), picked(load, best), winner.pp), winner.pp)
    )
    return Found(
        model=model,
        cluster=cluster.name,
        mode="serve",
        best=winner,
        candidates=len(tp),
        search_s=time.perf_counter() - started,
        losers=tuple(losers),
        warnings=() if winner is None else warnings_of(winner, imbalance(blocks, winner), shared.alike),
        stages=stages,
        seconds=tuple(_seconds(seen, layouts.at(i), i) for i in chosen if good[i])[:COMPARED],
        frontier=tuple((str(layouts.at(i)), float(held.total[i]), float(rate[i]), bool(good[i])) for i in chosen),
    )


def serving_memory(stage: Stage, load: Load, at: Floats) -> Memory:
    """Bytes a rank of pipeline stage `at` holds: weights, and the KV pages of all requests at their longest."""
    share, width = work.busiest(stage.blocks, stage.tp), stage.machine.width
    parameters, layers = stage_parameters(stage.blocks, share, stage.pp, at)
    cache = load.batch * (load.input + load.output) * 2 * width * share.kv_heads * share.head_size * layers
    nothing = 0.0 * cache
    return Memory(
        weights=np.where(load.fp8 > 0, 1, width) * parameters,
        gradients=nothing,
        optimiser=nothing,
        activations=cache,
        logits=4 * load.batch * share.vocabulary,
        buffers=RESERVED + nothing,
        slack=nothing,
    )


class _Layouts:
    """The candidates, to be shown one by one."""

    def __init__(self, tp: Floats, pp: Floats, dp: Floats, load: Load, seen: Service, dealt: Dealt) -> None:
        self.tp, self.pp, self.dp, self.load, self.seen, self.dealt = tp, pp, dp, load, seen, dealt

    def at(self, i: int) -> Layout:
        seen = self.seen
        return Layout(
            tp=int(self.tp[i]),
            pp=int(self.pp[i]),
            vpp=1,
            dp=int(self.dp[i]),
            sp=0,
            micro_batch=int(self.load.batch[i]),
            recompute="none",
            zero=0,
            step_s=float(seen.decode_step[i]),
            memory_bytes=self.dealt.fullest(i),
            communication_share=float(seen.communication[i]),
            tokens_per_s=float(self.dp[i] * seen.throughput[i]),
            first_token_s=float(seen.first_token[i]),
            per_token_s=float(seen.per_token[i]),
            shares=self.dealt.shares(i),
        )


class _Why:
    """Why a candidate lost."""

    def __init__(
        self,
        machine: Machine,
        seen: Service,
        held: Memory,
        stage: Floats,
        fits: Floats,
        late: Floats,
        rate: Floats,
        latency_s: float | None,
    ) -> None:
        self.machine, self.seen, self.held, self.stage = machine, seen, held, stage
        self.fits, self.late, self.rate, self.latency_s = fits, late, rate, latency_s

    def of(self, at: int, best: int | None) -> str:
        if not self.fits[at]:
            need, have = float(self.held.total[at]), float(picked(self.machine, at).memory)
            kind = {"activations": "KV pages"}.get(largest(self.held, at), largest(self.held, at))
            return (
                f"out of memory by {(need - have) / GIB:.1f} GiB on stage {int(self.stage[at])}: it needs "
                f"{need / GIB:.1f} GiB of {have / GIB:.0f}, most of it {kind}"
            )
        if self.late[at] or best is None:
            token, bound = 1e3 * float(self.seen.per_token[at]), 1e3 * (self.latency_s or 0.0)
            return f"a token takes {token:.1f} ms, over the {bound:.1f} ms asked for"
        less = 1 - float(self.rate[at] / self.rate[best])
        spoken = 100 * float(self.seen.communication[at])
        return f"{100 * less:.1f} % fewer tokens a second; communication {spoken:.0f} % of a decode step"


def _shapes(layouts: _Layouts, order: np.ndarray) -> list[int]:
    """The best candidate of each tp x pp, in order."""
    seen: set[tuple[float, float]] = set()
    kept = []
    for at in order:
        shape = (float(layouts.tp[at]), float(layouts.pp[at]))
        if shape not in seen:
            seen.add(shape)
            kept.append(int(at))
    return kept


def _of_stages(stage: Stage, load: Load, stages: int) -> Memory:
    held = serving_memory(stage, load, np.arange(stages))
    return Memory(**{kind: np.broadcast_to(value, stages) for kind, value in held.__dict__.items()})


def _seconds(seen: Service, layout: Layout, at: int) -> tuple[str, dict[str, float]]:
    """A token's seconds by kind."""
    step = layout.step_s
    spoken = layout.communication_share * step
    waiting = float(seen.per_token[at]) - step
    return str(layout), {"decode": step - spoken, "communication": spoken, "waiting for prefills": waiting}
