"""How a framework runs the same work: what it overlaps, fuses and spends on the host. Profiles are data."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from shardwright.plan import catalogue
from shardwright.plan.quantities import Floats


@dataclass(frozen=True, kw_only=True)
class Software:
    """One software profile.

    host: seconds the host needs to launch one layer forward (and again backward) · straggle: by how much more, for each
    doubling of TP, since ranks wait for each other · step: seconds of a step that no rank shares · *_overlap: share of
    that communication hidden behind work · elementwise: bytes that elementwise kernels move over those of fused ones ·
    fused: 1 where attention keeps q, k, v and its output, and a gated activation its inputs and its output, for the
    backward; 0 where torch's single operations do, and KV heads once for each query head · blockwise: 1 where full
    recomputation starts anew at each block of the residual stream, not at each layer · flash: speed of its fused
    attention over the curve's · native: 1 where those kernels are of the device's generation · softmax: bytes an
    unfused attention moves per score, forward (and again backward) · selective: share of a layer's forward that
    selective recomputation repeats · kept: share of a layer's activations that it keeps · gradient_bytes: of one
    gradient when data-parallel ranks sum · update: bytes that updating a parameter reads and writes, on the rank that
    owns it; gradient_passes: those of each gradient beside, once a step, and accumulation, each micro-batch but the
    first · weight_, held_gradient_, optimiser_bytes: what a rank keeps for each parameter, activation_bytes: for each
    number of the activations · reserved: bytes of context and communication buffers · slack: share of the activations
    that the allocator holds beyond them · dropout: 1 where masks are kept · rails: 1 where a ring uses every adapter of
    a node, 0 for one · balanced: 1 where context-parallel ranks share the causal triangle evenly.
    """

    host: Floats
    straggle: Floats
    step: Floats
    tp_overlap: Floats
    dp_overlap: Floats
    fsdp_overlap: Floats
    pp_overlap: Floats
    elementwise: Floats
    fused: Floats
    blockwise: Floats
    flash: Floats
    native: Floats
    softmax: Floats
    selective: Floats
    kept: Floats
    gradient_bytes: Floats
    update: Floats
    gradient_passes: Floats
    accumulation: Floats
    weight_bytes: Floats
    held_gradient_bytes: Floats
    optimiser_bytes: Floats
    activation_bytes: Floats
    reserved: Floats
    slack: Floats
    dropout: Floats
    rails: Floats
    balanced: Floats


@cache
def profile(name: str, precision: str = "bf16") -> Software:
    """A framework's profile at a precision; a framework that has none is taken for the generic one."""
    tables = _tables()
    own = dict(tables.get(name.lower(), {}))
    by_precision = {kind: own.pop(kind, {}) for kind in ("bf16", "fp16", "fp8")}
    return Software(**(tables["generic"] | own | by_precision.get(precision, {})))


@cache
def _tables() -> dict[str, dict[str, Any]]:
    return catalogue.read("software")
