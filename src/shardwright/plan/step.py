"""Seconds of one training step, by kind, from work and curves.

Decides how the parts of a step follow, hide and wait for each other. Knows no catalogue and no file.
"""

from dataclasses import dataclass

import numpy as np

from shardwright.plan import curves, work
from shardwright.plan.blocks import Blocks
from shardwright.plan.curves import Machine
from shardwright.plan.quantities import Floats, ceil_div
from shardwright.plan.software import Software
from shardwright.plan.training import Split, Training

HOST_JOIN = 4
"""How host and device limit a layer together: p of a p-norm, since neither is steady from layer to layer."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that memory depends on."""

    blocks: Blocks
    training: Training
    split: Split
    software: Software


@dataclass(frozen=True, kw_only=True)
class Scene(Job):
    """Everything that a step's time depends on."""

    machine: Machine


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step by kind; `total` is their sum. Communication is what is not hidden."""

    products: Floats
    attention: Floats
    elementwise: Floats
    recompute: Floats
    head: Floats
    tensor_parallel: Floats
    data_parallel: Floats
    pipeline: Floats
    bubble: Floats
    host: Floats
    optimiser: Floats

    @property
    def total(self) -> Floats:
        """The whole step."""
        return sum(self.__dict__.values())

    @property
    def communication(self) -> Floats:
        """What is not hidden of it, the bubble left out."""
        return self.tensor_parallel + self.data_parallel + self.pipeline


@dataclass(frozen=True)
class _Layer:
    """One layer, one micro-batch: seconds forward and backward of each part."""

    products: tuple[Floats, Floats]
    attention: tuple[Floats, Floats]
    elementwise: tuple[Floats, Floats]
    tensor_parallel: tuple[Floats, Floats]


def step(scene: Scene) -> Step:
    """Seconds of a step of every candidate, on the pipeline's slowest stage."""
    split, software = scene.split, scene.software
    tokens = split.micro_batch * scene.training.sequence / split.cp
    share = work.busiest(scene.blocks, split.tp)
    layer, head = _layer(scene, share, tokens), _head(scene, share, tokens)
    repeated, again = _recompute(scene, layer)
    spoken = layer.tensor_parallel[0] * (1 + again) + layer.tensor_parallel[1]
    spoken = spoken * (1 - software.tp_overlap)
    busy = sum(layer.products) + sum(layer.attention) + sum(layer.elementwise) + repeated + spoken
    launched = software.host * (2 + again) * (1 + software.straggle * np.log2(split.tp))
    waited = (launched**HOST_JOIN + busy**HOST_JOIN) ** (1 / HOST_JOIN) - busy
    gathered = _fsdp(scene, busy + waited)
    each = busy + waited + gathered

    rounds = micro_batches(scene)
    layers, slowest, whole = _stages(scene, each, head)
    n = rounds * layers
    return Step(
        products=n * sum(layer.products),
        attention=n * sum(layer.attention),
        elementwise=n * sum(layer.elementwise),
        recompute=n * repeated,
        head=rounds * (slowest - layers * each),
        tensor_parallel=n * spoken,
        data_parallel=n * gathered + _sync(scene, rounds * slowest),
        pipeline=rounds * _letters(scene, tokens),
        bubble=(whole - slowest) / split.vpp,
        host=n * waited + software.step,
        optimiser=_optimiser(scene),
    )


def micro_batches(job: Job) -> Floats:
    """Micro-batches that each data-parallel rank runs in a step; the last may be short."""
    split = job.split
    return np.maximum(np.ceil(job.training.global_batch / (split.dp * split.micro_batch) - 1e-9), 1)


def _recompute(scene: Scene, layer: _Layer) -> tuple[Floats, Floats]:
    """Seconds of work done again in the backward, and the share of the forward's communication with it.

    Selective recomputation repeats attention's core where attention is unfused (Korthikanti et al. 2022), else a share
    of the layer that the software decides.
    """
    chosen = scene.split.recompute
    forward = layer.products[0] + layer.attention[0] + layer.elementwise[0]
    selective = np.where(scene.training.flash > 0, scene.software.selective * forward, layer.attention[0])
    return np.where(chosen == 2, forward, np.where(chosen == 1, selective, 0.0)), 1.0 * (chosen == 2)


def _layer(scene: Scene, share: work.Share, tokens: Floats) -> _Layer:
    machine, software, split = scene.machine, scene.software, scene.split
    fp8 = scene.training.fp8
    forward = back = 0.0 * tokens
    for product in work.products(share, tokens):
        forward = forward + curves.product(machine, *product, fp8)
        of_input, of_weight = work.backward(product)
        back = back + curves.product(machine, *of_input, fp8) + curves.product(machine, *of_weight, fp8, casts=0)
    sharded = np.where(split.sp > 0, split.tp, 1)
    bytes_forward, bytes_back = work.elementwise(scene.blocks, share, tokens, sharded, machine.width)
    moved = tuple(curves.moved(machine, software.elementwise * n) for n in (bytes_forward, bytes_back))
    attention = _attention(scene, share, tokens)
    busy = (forward + attention[0] + moved[0], back + attention[1] + moved[1])
    return _Layer((forward, back), attention, moved, _tensor_parallel(scene, share, tokens, busy))


def _attention(scene: Scene, share: work.Share, tokens: Floats) -> tuple[Floats, Floats]:
    machine, software, training = scene.machine, scene.software, scene.training
    sequences = tokens * scene.split.cp / training.sequence
    seen = sequences * share.heads * work.pairs(scene.blocks, training.sequence) / scene.split.cp
    seen = seen * np.where(software.balanced > 0, 1, 2 - 1 / scene.split.cp)  # the last rank sees all keys before it
    fused = curves.attention(machine, seen, training.sequence, share.heads, share.head_size)
    fused = fused / (software.flash * np.where(software.native > 0, 1, machine.attention_ported))
    rows, scores = tokens * share.heads, tokens * share.heads * training.sequence
    plain = curves.product(machine, rows, training.sequence, share.head_size)
    plain = plain + curves.product(machine, rows, share.head_size, training.sequence)
    softmax = curves.moved(machine, software.softmax * scores)
    flash = training.flash > 0
    return (
        np.where(flash, fused, plain + softmax),
        np.where(flash, fused * 2.5 * machine.attention_backward, 2 * plain + softmax),
    )


def _tensor_parallel(
    scene: Scene, share: work.Share, tokens: Floats, busy: tuple[Floats, Floats]
) -> tuple[Floats, Floats]:
    """All-reduces where rows are whole; a gather and a scatter for each where they are shared. busy: between sums."""
    machine, split, blocks = scene.machine, scene.split, scene.blocks
    wired = curves.links(machine, split.tp, np.ones_like(split.tp))
    nbytes = work.activation_bytes(share, tokens, machine.width)
    summed, gathered = curves.all_reduce(machine, wired, nbytes), 2 * curves.gather(machine, wired, nbytes)
    each = np.where(split.sp > 0, gathered, summed)
    of_norms = blocks.norm_sums * curves.all_reduce(machine, wired, work.norm_bytes(tokens))
    met = [
        n * np.where(split.tp > 1, each + curves.queued(machine, seconds / n), 0.0) + of_norms
        for n, seconds in zip((blocks.sums, blocks.sums_back), busy, strict=True)
    ]
    ring = curves.links(machine, split.cp, split.tp)
    kv = 2 * machine.width * tokens * split.cp * share.kv_heads * share.head_size
    context = curves.gather(machine, ring, kv)
    return met[0] + context, met[1] + 2 * context


def _head(scene: Scene, share: work.Share, tokens: Floats) -> Floats:
    """Logits forward and backward, and the loss over them: read and written in float32 some three times."""
    logits = work.head_product(share, tokens)
    seconds = sum(curves.product(scene.machine, *p) for p in (logits, *work.backward(logits)))
    return seconds + curves.moved(scene.machine, scene.software.elementwise * 20 * tokens * share.vocabulary)


def _stages(scene: Scene, per_layer: Floats, head: Floats) -> tuple[Floats, Floats, Floats]:
    """Layers of the fullest stage; seconds of one micro-batch in the slowest stage and in all of them."""
    layers, pp = scene.blocks.layers, scene.split.pp
    most = ceil_div(layers, pp)
    last = np.where(layers % pp == 0, most, most - 1)
    slowest = np.maximum(most * per_layer, last * per_layer + head)
    return most, slowest, layers * per_layer + head


def _letters(scene: Scene, tokens: Floats) -> Floats:
    """Seconds a micro-batch loses to passing activations down and gradients up, for each of its virtual stages."""
    split, machine = scene.split, scene.machine
    share = work.busiest(scene.blocks, split.tp)
    nbytes = work.activation_bytes(share, tokens, machine.width) / np.where(split.sp > 0, split.tp, 1)
    across = split.pp * split.tp * split.cp * split.dp > machine.per_node
    each = curves.letter(machine, nbytes, across)
    return np.where(split.pp > 1, 2 * split.vpp * each * (1 - scene.software.pp_overlap), 0.0)


def _parameters(scene: Scene) -> Floats:
    """Parameters of the fullest rank, before data-parallel ranks share them."""
    blocks, split = scene.blocks, scene.split
    share = work.busiest(blocks, split.tp)
    ends = np.where(split.pp == 1, 2 - blocks.tied, 1) * work.table_parameters(share) + blocks.holds.ends
    return ceil_div(blocks.layers, split.pp) * work.layer_parameters(blocks, share) + ends


def _fsdp(scene: Scene, compute: Floats) -> Floats:
    """ZeRO-3, each layer and micro-batch: weights gathered twice, gradients scattered; what work does not hide."""
    split, machine = scene.split, scene.machine
    wired = curves.links(machine, split.dp * split.cp, split.tp, scene.software.rails)
    weights = 2 * work.layer_parameters(scene.blocks, work.busiest(scene.blocks, split.tp))
    gradients = scene.software.gradient_bytes / 2 * weights
    seconds = 2 * curves.gather(machine, wired, weights) + curves.gather(machine, wired, gradients)
    hidden = np.minimum(seconds, compute) * scene.software.fsdp_overlap
    return np.where(split.zero == 3, seconds - hidden, 0.0)


def _sync(scene: Scene, compute: Floats) -> Floats:
    """Gradients summed over data-parallel ranks once a step; under ZeRO 1 and 2 scattered, and the weights gathered."""
    split, machine = scene.split, scene.machine
    wired = curves.links(machine, split.dp * split.cp, split.tp, scene.software.rails)
    parameters = _parameters(scene)
    gradients = scene.software.gradient_bytes * parameters
    summed = curves.all_reduce(machine, wired, gradients)
    shared = curves.gather(machine, wired, gradients) + curves.gather(machine, wired, machine.width * parameters)
    seconds = np.where(split.zero == 0, summed, shared)
    exposed = seconds - np.minimum(seconds, compute) * scene.software.dp_overlap
    return np.where(split.zero == 3, 0.0, exposed)


def _optimiser(scene: Scene) -> Floats:
    """The update of what a rank owns, and what is done to all gradients it holds: once a step, and each micro-batch but
    the first.
    """
    split, software, parameters = scene.split, scene.software, _parameters(scene)
    owned = parameters / np.where(split.zero > 0, split.dp * split.cp, 1)
    everywhere = software.gradient_passes + software.accumulation * (micro_batches(scene) - 1)
    return curves.moved(scene.machine, software.update * owned + everywhere * parameters)
