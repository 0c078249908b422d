"""`shardwright reshard` and `shardwright export`: training checkpoints cut for other ranks, or for transformers."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardwright.cli.options import with_options

if TYPE_CHECKING:
    from shardwright.train.convert import Converted


@dataclass(frozen=True, kw_only=True)
class ReshardOptions:
    """The command line of `reshard`."""

    source: Annotated[Path, typer.Argument(help="A run's output directory, or one of its checkpoints.")]
    target: Annotated[Path, typer.Argument(help="The output directory of a run that goes on from it.")]
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks to cut it for; any number.")]
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")] = False


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The command line of `export`."""

    source: Annotated[Path, typer.Argument(help="A run's output directory, or one of its checkpoints.")]
    target: Annotated[Path, typer.Argument(help="A new directory, for transformers and for --model.")]
    dtype: Annotated[str | None, typer.Option(help="Of the weights; by default the model's own.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")] = False


@with_options(ReshardOptions)
def reshard(options: ReshardOptions) -> None:
    """Cut a training checkpoint for other ranks, in bounded memory. Runs do not need it: they resume at any split.

    Example:  shardwright reshard runs/small resharded --tp 3
    """
    from shardwright.train import convert

    _told(convert.reshard(options.source, options.target, options.tp), as_json=options.as_json)


@with_options(ExportOptions)
def export(options: ExportOptions) -> None:
    """Write a training checkpoint as a Hugging Face directory.

    Example:  shardwright export runs/small exported
    """
    from shardwright.train import convert

    _told(convert.export(options.source, options.target, options.dtype), as_json=options.as_json)


def _told(done: "Converted", *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(done)))
        return
    print(f"step {done.step}: {done.files} file(s), {done.bytes / 1e6:,.1f} MB, in {done.path}")
