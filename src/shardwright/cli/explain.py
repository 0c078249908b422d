"""`shardwright explain`: who holds which slice of what."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardwright.cli.options import PICTURES, check_output, with_options
from shardwright.errors import UsageError

if TYPE_CHECKING:
    from shardwright.models.holdings import Holding

WIDTH = 48
"""Characters of a tensor's picture in the terminal."""


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """The command line of `explain`."""

    tp: Annotated[int, typer.Option(help="Ranks to split the model over; any number.")]
    model: Annotated[
        Path | None,
        typer.Option(help="A Hugging Face directory, a GGUF file or a config.json. By default the embedded model."),
    ] = None
    tensor: Annotated[str | None, typer.Option(help="This one alone, by the checkpoint's name or the parameter's.")] = (
        None
    )
    svg: Annotated[Path | None, typer.Option(help="Write the picture to this file too.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")] = False


@with_options(ExplainOptions)
def explain(options: ExplainOptions) -> None:
    """Say which rank holds which slice of which tensor: of both ends and the first layer, as all layers are alike.

    Example:  shardwright explain --tp 2 --tensor blk.7.attn_k.weight
    """
    from shardwright.comm.launch import check_ranks
    from shardwright.models.embedded import embedded_model
    from shardwright.models.holdings import holdings, layer_of
    from shardwright.models.read import read_config
    from shardwright.models.specs import Cuts
    from shardwright.models.survey import open_headers

    check_ranks(options.tp)
    check_output("svg", options.svg, PICTURES)
    path = options.model or embedded_model()
    with open_headers(path) as checkpoint:
        config, naming = read_config(checkpoint)
    layer = (layer_of(options.tensor) or 0) if options.tensor else 0
    if layer >= config.layers:
        raise UsageError("tensor", options.tensor, f"the model has {config.layers} layers", "count from 0")
    found = holdings(config, Cuts.balanced(config, options.tp), naming, [layer], options.tensor)
    if options.svg:
        _draw(options.svg, found, options.tp, path)
    if options.as_json:
        tensors = [asdict(holding) for holding in found]
        figures = {"model": str(path), "tp": options.tp, "layers": config.layers, "layer_shown": layer}
        print(json.dumps(figures | {"tensors": tensors}, ensure_ascii=False))
    else:
        _show(found, options.tp, layer, config.layers)


def _draw(path: Path, found: "Sequence[Holding]", ranks: int, model: Path) -> None:
    from shardwright.charts.holdings import Bar, holdings

    bars = [Bar(_label(holding, ranks), holding.shape[holding.cut or 0], holding.spans()) for holding in found]
    holdings(path, bars, ranks, title=f"{model.name} on {ranks} ranks")


def _label(holding: "Holding", ranks: int) -> str:
    holders = {piece.rank for piece in holding.slices}
    where = "everywhere" if len(holders) == ranks else f"on rank {', '.join(map(str, sorted(holders)))}"
    cut = f"whole {where}" if holding.cut is None else f"cut along dim {holding.cut}"
    return f"{holding.tensor} {list(holding.shape)}, {cut}"


def _show(found: "Sequence[Holding]", ranks: int, layer: int, layers: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for holding in found:
        console.print(f"\n{_label(holding, ranks)}", markup=False)
        console.print(f"  [{_picture(holding)}]", markup=False)
        if holding.cut is None:
            continue
        table = Table(box=None, padding=(0, 2))
        for heading in ("rank", "holds of it", "in", "with ranks", "MB"):
            table.add_column(heading, overflow="fold")
        for piece in holding.slices:
            dims = [", ".join(f"{start}:{stop}" for start, stop in ranges) for ranges in piece.ranges]
            others = ", ".join(str(rank) for rank in piece.holders if rank != piece.rank)
            partial = " (gradients summed)" if piece.gradient == "partial" else ""
            turned = "" if piece.transform == "none" else f" by {piece.transform}"
            local = ", ".join(f"{start}:{stop}" for start, stop in piece.local)
            table.add_row(
                str(piece.rank),
                " × ".join(dims),
                f"{piece.parameter} [{local}]{turned}".replace("[", "\\["),
                (others or "–") + partial,
                f"{piece.bytes / 1e6:.2f}",
            )
        console.print(table)
    if layers > 1:
        print(f"\nlayer {layer} and both ends; all {layers} layers are cut alike. * is held by several ranks")


def _picture(holding: "Holding") -> str:
    """The cut dimension from left to right: who holds each part, `*` where it is several."""
    length, spans = holding.shape[holding.cut or 0], holding.spans()
    marks = []
    for place in range(WIDTH):
        at = (2 * place + 1) * length / (2 * WIDTH)
        here = {rank for start, stop, rank in spans if start <= at < stop}
        marks.append("*" if len(here) > 1 else _mark(here.pop()) if here else " ")
    return "".join(marks)


def _mark(rank: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return digits[rank] if rank < len(digits) else "+"
