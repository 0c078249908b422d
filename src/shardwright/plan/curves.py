"""Seconds of one kernel or one collective, as smooth functions of its size.

Decides the form of each curve; the constants are data (`data/curves.toml`, fitted by `benchmarks/fit_curves.py`).
Knows no model and no layout. All functions take arrays, one element a candidate.
"""

from dataclasses import dataclass

import numpy as np

from shardwright.plan.quantities import Floats

QUANTISE_BYTES = 3
"""Read as bf16, written as fp8: what turning one activation into fp8 moves."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One kind of device in its node and network: datasheet figures and the constants of its curves.

    Rates per second and per device; memory in bytes; width: bytes of an element of its native format; tile: rows and
    columns of the output that a processor works on, the last of which may be mostly empty. fp8: 0 where there are no
    such products · gemm_*: share of the peak that an endless product reaches · ramp: inner size at which half of it is
    reached · tail: waves of tiles lost at the end · sharpness: how compute and memory limits join · attention_*: the
    same for fused attention, head: head size at which half is reached, ported: share of it left to kernels of an
    earlier generation · sustained: clock of a run of hours over that of a benchmark · wire, net: share of the link's
    rate that collectives reach inside and across nodes · latency, hop: seconds of a collective and of each further rank
    in it · root: its slow start, seconds per square root of a byte · scatter: share of an all-reduce's rate that
    gathers and scatters reach · crowd, balance: what ranks that share cores wait for each other at a sum (`queued`).
    """

    memory: Floats
    bandwidth: Floats
    bf16: Floats
    fp8: Floats
    processors: Floats
    intra: Floats
    inter: Floats
    per_node: Floats
    width: Floats
    tile: Floats
    gemm_bf16: Floats
    gemm_fp8: Floats
    ramp: Floats
    ramp_fp8: Floats
    tail: Floats
    memory_share: Floats
    launch: Floats
    sharpness: Floats
    quantise: Floats
    attention: Floats
    attention_backward: Floats
    attention_ramp: Floats
    attention_tail: Floats
    attention_head: Floats
    attention_ported: Floats
    sustained: Floats
    wire: Floats
    net: Floats
    latency: Floats
    hop: Floats
    root: Floats
    scatter: Floats
    crowd: Floats
    balance: Floats


def product(machine: Machine, m: Floats, n: Floats, k: Floats, fp8: Floats | float = 0.0, casts: int = 1) -> Floats:
    """Seconds of `[m, k] @ [k, n]` in bf16, or in fp8 where `fp8` is 1, its first operand cast `casts` times."""
    m, n, k = np.maximum(m, 1), np.maximum(n, 1), np.maximum(k, 1)
    rows = np.ceil(m / machine.tile)
    waves = rows * np.ceil(n / machine.tile) / machine.processors
    rate = np.where(fp8, machine.fp8 * machine.gemm_fp8, machine.bf16 * machine.gemm_bf16) * machine.sustained
    ramp = np.where(fp8, machine.ramp_fp8, machine.ramp)
    compute = 2.0 * rows * machine.tile * n * k / rate * (1 + ramp / k) * (1 + machine.tail / waves)
    moved = np.where(fp8, 1, machine.width) * (m * k + n * k) + machine.width * m * n
    memory = moved / (machine.bandwidth * machine.memory_share)
    quantised = np.where(fp8, casts * machine.quantise * QUANTISE_BYTES * m * k / machine.bandwidth, 0.0)
    p = machine.sharpness
    return machine.launch + (compute**p + memory**p) ** (1 / p) + quantised


def attention(machine: Machine, pairs: Floats, sequence: Floats, heads: Floats, head_size: Floats) -> Floats:
    """Seconds of fused attention forward. pairs: query-key pairs of all heads of all sequences that are not masked."""
    blocks = pairs / np.maximum(sequence, 1) / machine.tile
    rate = machine.bf16 * machine.attention * machine.sustained * head_size / (head_size + machine.attention_head)
    compute = 4.0 * pairs * head_size / rate * (1 + machine.attention_ramp / sequence)
    return machine.launch + compute * (1 + machine.attention_tail * machine.processors / np.maximum(blocks, 1)) * (
        heads > 0
    )


def moved(machine: Machine, nbytes: Floats) -> Floats:
    """Seconds of elementwise kernels that read and write so many bytes."""
    return nbytes / (machine.bandwidth * machine.memory_share)


@dataclass(frozen=True, kw_only=True)
class Links:
    """How a group of ranks is wired: its size, and the rate of the slowest link of its ring, bytes per second."""

    ranks: Floats
    rate: Floats


def links(machine: Machine, ranks: Floats, stride: Floats, rails: Floats | float = 1.0) -> Links:
    """The ring of `ranks` ranks that lie `stride` apart in the order of devices.

    Inside a node the ring runs over the node's links. Across nodes each rank of the group in a node brings its own
    adapter, and the ring crosses by all of them: rate = adapters x the group's ranks a node, at most the inside's.
    Groups lie end to end over nodes: where their length does not divide a node, some lie across its end, and the one
    with the fewest ranks in a node is the slowest: gcd(node, length) devices of it.
    """
    length = np.asarray(ranks * stride)
    least = np.gcd(np.asarray(machine.per_node).astype(int), length.astype(int))
    together = np.where(np.asarray(rails) > 0, np.clip(least / stride, 1, ranks), 1)
    inside = machine.intra * machine.wire
    across = np.minimum(machine.inter * machine.net * together, inside)
    return Links(ranks=ranks, rate=np.where(length == least, inside, across))


def gather(machine: Machine, wired: Links, nbytes: Floats) -> Floats:
    """Seconds of an all-gather to, or a reduce-scatter of, so many bytes: (R − 1) / R of them pass each link."""
    share = (wired.ranks - 1) / wired.ranks * nbytes
    latency = machine.latency + machine.hop * (wired.ranks - 1) + machine.root * np.sqrt(share)
    return np.where(wired.ranks > 1, latency + share / (wired.rate * machine.scatter), 0.0)


def all_reduce(machine: Machine, wired: Links, nbytes: Floats) -> Floats:
    """Seconds of an all-reduce of so many bytes: a reduce-scatter and an all-gather that share their start."""
    share = 2 * (wired.ranks - 1) / wired.ranks * nbytes
    latency = machine.latency + 2 * machine.hop * (wired.ranks - 1) + machine.root * np.sqrt(share)
    return np.where(wired.ranks > 1, latency + share / wired.rate, 0.0)


def queued(machine: Machine, busy: Floats) -> Floats:
    """Seconds a sum waits for ranks that have yet to get a core, after `busy` seconds of work at a fair share of one.

    R ranks on C cores at a fair share take R / C seconds for a second of a core's work. At a sum, those that had a core
    at once wait for the others, which run after them, ceil(R / C) in all: crowd = ceil(R / C) / (R / C) - 1. Where that
    takes longer than `balance`, the system has moved a waiting rank to the idle core by then.
    """
    return np.minimum(machine.crowd * busy, machine.balance)


def letter(machine: Machine, nbytes: Floats, across: Floats) -> Floats:
    """Seconds of one message to one peer, in another node where `across`."""
    rate = np.where(across, machine.inter * machine.net, machine.intra * machine.wire)
    return machine.latency + nbytes / rate
