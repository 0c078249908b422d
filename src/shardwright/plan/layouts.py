"""`plan_layout`: a plan from names, as the command line and Python call it."""

from dataclasses import replace

from shardwright.errors import UsageError
from shardwright.plan.blocks import Blocks
from shardwright.plan.catalogue import read, resolve
from shardwright.plan.found import Found
from shardwright.plan.hardware import Cluster, parse_cluster
from shardwright.plan.search import plan_training
from shardwright.plan.serve_search import plan_serving
from shardwright.plan.serving import Load, server
from shardwright.plan.software import profile
from shardwright.plan.sources import open_model
from shardwright.plan.training import Training

MOST = 1 << 40
"""Sequences of a step, tokens of one."""


def plan_layout(
    model: str,
    cluster: str | Cluster,
    *,
    train: tuple[int, int] | None = None,
    serve: tuple[int, int] = (1024, 256),
    latency_s: float | None = None,
    software: str = "generic",
    precision: str = "bf16",
) -> Found:
    """The split of a model over a cluster that is fastest, and why the others lost.

    model: built-in name, Hugging Face directory, config.json or GGUF · cluster: `8xh100`, `4x8xa100-80`, a TOML file ·
    train: sequences a step and tokens of each; without it the model is served · serve: tokens in and out of a request
    · latency_s: most seconds a token may take when served · software: a profile of `plan/data`'s `software.toml`, or
    `serving.toml` · precision: bf16 or fp8.

    Raises:
        UsageError: a name is unknown (the near ones are listed), a number makes no sense, or a device has no fp8.
    """
    if precision not in ("bf16", "fp8"):
        raise UsageError("precision", precision, "plans are for bf16 and fp8", "use one of them")
    counts = dict(zip(("input", "output") if train is None else ("global_batch", "seq"), train or serve, strict=True))
    for name, value in counts.items():
        if not 1 <= value <= MOST:
            raise UsageError(name, value, f"sequences and tokens are between 1 and {MOST:,}", "give such a number")
    if latency_s is not None and train is not None:
        raise UsageError("latency", f"{1e3 * latency_s:g} ms", "a training step gives no tokens one by one", "drop it")
    if latency_s is not None and not latency_s > 0:
        raise UsageError(
            "latency", f"{1e3 * latency_s:g} ms", "a token takes more than no time", "give a positive number"
        )
    software = resolve(read("serving" if train is None else "software"), software, "software")
    fp8 = float(precision == "fp8")
    name, blocks = open_model(model)
    where = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    lacking = sorted({name for name, device in zip(where.names, where.machines, strict=True) if not device.fp8})
    if fp8 and lacking:
        raise UsageError("precision", precision, f"{lacking[0]} has no fp8 products", "plan with bf16")
    if train is not None:
        batch, sequence = train
        job = Training(sequence=float(sequence), global_batch=float(batch), fp8=fp8, flash=1.0)
        found = plan_training(name, blocks, where, job, profile(software, precision))
        return _noted(found, blocks, sequence)
    load = Load(input=float(serve[0]), output=float(serve[1]), batch=1, fp8=fp8)
    return _noted(plan_serving(name, blocks, where, load, server(software), latency_s), blocks, sum(serve))


def _noted(found: Found, blocks: Blocks, longest: int) -> Found:
    """With a note where sequences are longer than the model is for."""
    if not blocks.context or longest <= blocks.context:
        return found
    note = f"sequences of {longest:,} tokens; the model's context is {int(blocks.context):,}"
    return replace(found, warnings=(*found.warnings, note))
