"""`shardwright plan`: which split of a model over a cluster is fastest, and why the others lost."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardwright.cli.measure import measured_machine
from shardwright.cli.options import check_output, with_options
from shardwright.errors import UsageError

if TYPE_CHECKING:
    from shardwright.plan.found import Found

SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The command line of `plan`."""

    model: Annotated[
        str,
        typer.Argument(help="A built-in name (qwen1.5-72b), a Hugging Face directory, a config.json or a GGUF file."),
    ]
    cluster: Annotated[
        str | None, typer.Option(help="8xh100, nodes x devices 4x8xa100-80, or a TOML file. By default this machine.")
    ] = None
    train: Annotated[bool, typer.Option("--train", help="Plan a training run.")] = False
    serve: Annotated[bool, typer.Option("--serve", help="Plan serving; the default.")] = False
    global_batch: Annotated[int | None, typer.Option(help="Sequences of a training step.", show_default="256")] = None
    seq: Annotated[int | None, typer.Option(help="Tokens of a training sequence.", show_default="4096")] = None
    input: Annotated[int | None, typer.Option(help="Tokens of a request.", show_default="1024")] = None
    output: Annotated[int | None, typer.Option(help="Tokens of an answer.", show_default="256")] = None
    latency: Annotated[float | None, typer.Option(help="Most milliseconds a token may take when serving.")] = None
    software: Annotated[
        str | None,
        typer.Option(
            help="A profile: megatron-core, fsdp, vllm, … (docs/planner.md).",
            show_default="generic; shardwright on this machine",
        ),
    ] = None
    precision: Annotated[str, typer.Option(help="Of the products: bf16 or fp8.")] = "bf16"
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")] = False
    html: Annotated[Path | None, typer.Option(help="Write a report with pictures there.")] = None


@with_options(PlanOptions)
def plan(options: PlanOptions) -> None:
    """Print the fastest split that fits, the runners-up, and why each of them lost.

    Exits with 2 where none fits, as for any argument that cannot be met; what the closest ones lack is printed all the
    same, and with --json best is null.

    Example:  shardwright plan qwen1.5-72b --cluster 8xh100
    """
    from shardwright.plan.hardware import parse_cluster
    from shardwright.plan.layouts import plan_layout
    from shardwright.plan.measured import cluster as cluster_of

    if options.train and options.serve:
        raise UsageError("serve", True, "a plan is for training or for serving", "drop --train or --serve")
    train, serve = _asked(options)
    check_output("html", options.html, (".html", ".htm"))
    cluster = cluster_of(measured_machine()) if options.cluster is None else parse_cluster(options.cluster)
    software = "shardwright" if options.cluster is None else "generic"
    found = plan_layout(
        options.model,
        cluster,
        train=train if options.train else None,
        serve=serve,
        latency_s=None if options.latency is None else options.latency / 1e3,
        software=software if options.software is None else options.software,
        precision=options.precision,
    )
    if options.html is not None:
        from shardwright.plan.report import write_page

        write_page(found, min(float(machine.memory) for machine in cluster.machines), options.html)
    if options.as_json:
        print(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        _show(found)
    if found.best is None:
        raise typer.Exit(UsageError.exit_code)


def _asked(options: PlanOptions) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a training step and what a request is of; one that is given and not planned is refused."""
    idle, remedy = (("input", "output"), "drop it") if options.train else (("global_batch", "seq"), "add --train")
    for name in idle:
        value = getattr(options, name)
        if value is not None:
            kind = "serving" if options.train else "training"
            raise UsageError(name, value, f"it is of a plan for {kind}", remedy)
    sizes = {"global_batch": 256, "seq": 4096, "input": 1024, "output": 256}
    said = {name: size if getattr(options, name) is None else getattr(options, name) for name, size in sizes.items()}
    return (said["global_batch"], said["seq"]), (said["input"], said["output"])


def _show(found: "Found") -> None:
    from rich.console import Console
    from rich.table import Table

    from shardwright.plan.found import GIB, summary

    console = Console()
    console.print(summary(found), highlight=False)
    for warning in found.warnings:
        console.print(f"note: {warning}", highlight=False)
    table = Table()
    for heading in ("layout", "step, s", "GiB", "why it lost"):
        table.add_column(heading, overflow="fold")
    for lost in found.losers[:SHOWN]:
        held = f"{lost.layout.memory_bytes / GIB:.1f}"
        table.add_row(str(lost.layout), f"{lost.layout.step_s:.4g}", held, lost.reason)
    console.print(table)
