"""Seconds of serving: one decode step, one prefill, and what requests see when both share the devices.

Decides how prefills of newcomers delay tokens of the others. Products, attention and collectives come from `curves`.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from shardwright.plan import catalogue, curves, work
from shardwright.plan.blocks import Blocks
from shardwright.plan.curves import Machine
from shardwright.plan.quantities import Floats

KERNELS = 6
"""Elementwise and attention kernels of a layer that each cost a launch: norms, rotation, cache write, activation."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked: tokens in and out of a request, requests under way at once, 1 for fp8 weights and products."""

    input: Floats
    output: Floats
    batch: Floats
    fp8: Floats


@dataclass(frozen=True, kw_only=True)
class Server:
    """A serving profile.

    step: seconds of a step that no rank shares · waits: share of the others' prefills that a token waits for ·
    launches: of a kernel in a decode step, over the curve's (CUDA graphs shorten them).
    """

    step: Floats
    waits: Floats
    launches: Floats


@cache
def server(name: str) -> Server:
    """A serving framework's profile; one that has none is taken for the generic one."""
    tables = catalogue.read("serving")
    return Server(**(tables["generic"] | tables.get(name.lower(), {})))


@dataclass(frozen=True, kw_only=True)
class Service:
    """Seconds to the first token, of each one after it and of a decode step; tokens a second over all requests; share
    of a decode step in communication.
    """

    first_token: Floats
    per_token: Floats
    decode_step: Floats
    throughput: Floats
    communication: Floats


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where and how it is served."""

    blocks: Blocks
    machine: Machine
    server: Server
    tp: Floats
    pp: Floats


def service(stage: Stage, load: Load) -> Service:
    """What requests see when `load.batch` of them are always under way, prefills between the others' steps."""
    step, spoken = _decode(stage, load)
    prefill = _prefill(stage, load) + stage.server.step
    per_token = step + stage.server.waits * (load.batch - 1) * prefill / stage.pp / load.output
    return Service(
        first_token=prefill,
        per_token=per_token,
        decode_step=step,
        throughput=load.batch * load.output / (prefill + load.output * per_token),
        communication=spoken / step,
    )


def _decode(stage: Stage, load: Load) -> tuple[Floats, Floats]:
    """Seconds of a decode step through all pipeline stages, and of its communication."""
    blocks, machine, server, tp, pp = stage.blocks, stage.machine, stage.server, stage.tp, stage.pp
    rows, share = np.maximum(load.batch / pp, 1), work.busiest(blocks, tp)  # requests in each stage at a time
    seconds = KERNELS * machine.launch * server.launches + 0.0 * rows
    for m, n, k in work.products(share, rows):
        seconds = seconds + curves.product(machine, m, n, k, load.fp8) - machine.launch * (1 - server.launches)
    held = load.input + load.output / 2
    cache = 2 * machine.width * rows * held * share.kv_heads * share.head_size
    seconds = seconds + curves.moved(machine, cache)
    spoken = _sums(stage, share, rows, seconds)
    head = curves.product(machine, *work.head_product(share, rows))
    letters = (pp - 1) * curves.letter(
        machine, work.activation_bytes(share, rows, machine.width), pp * tp > machine.per_node
    )
    return blocks.layers * (seconds + spoken) + head + letters + server.step, blocks.layers * spoken + letters


def _prefill(stage: Stage, load: Load) -> Floats:
    """Seconds of one request's prompt."""
    blocks, machine, tp = stage.blocks, stage.machine, stage.tp
    tokens, share = load.input, work.busiest(blocks, tp)
    seconds = KERNELS * machine.launch + 0.0 * tokens
    for product in work.products(share, tokens):
        seconds = seconds + curves.product(machine, *product, load.fp8)
    seen = share.heads * work.pairs(blocks, tokens)
    seconds = seconds + curves.attention(machine, seen, tokens, share.heads, share.head_size)
    seconds = seconds + curves.moved(machine, work.elementwise(blocks, share, tokens, 1 + 0 * tp, machine.width)[0])
    spoken = _sums(stage, share, tokens, seconds)
    return blocks.layers * (seconds + spoken) + curves.product(machine, *work.head_product(share, 1 + 0 * tokens))


def _sums(stage: Stage, share: work.Share, tokens: Floats, busy: Floats) -> Floats:
    """Seconds of a layer's all-reduces forward, and of waiting in them after `busy` seconds of work."""
    machine, blocks = stage.machine, stage.blocks
    wired = curves.links(machine, stage.tp, np.ones_like(stage.tp))
    summed = curves.all_reduce(machine, wired, work.activation_bytes(share, tokens, machine.width))
    queued = np.where(stage.tp > 1, curves.queued(machine, busy / blocks.sums), 0.0)
    of_norms = curves.all_reduce(machine, wired, work.norm_bytes(tokens))
    return blocks.sums * (summed + queued) + blocks.norm_sums * of_norms
