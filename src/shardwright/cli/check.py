"""`shardwright check`: whether a model is supported, and what it would be on 1 to 16 ranks."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardwright.cli.options import with_options
from shardwright.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardwright.models.survey import Degree


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """The command line of `check`."""

    model: Annotated[
        Path | None,
        typer.Option(help="A Hugging Face directory, a GGUF file or a config.json. By default the embedded model."),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")] = False


@with_options(CheckOptions)
def check(options: CheckOptions) -> None:
    """Say from config and headers alone whether a model is supported, and what each of 1 to 16 ranks would hold.

    Exits with 4 where it is not supported. Bytes are of weights as loaded and of KV as generate keeps it on ranks of
    one host: at their type, and in float32 where decoding is compiled.

    Example:  shardwright check --model examples/configs/llama-3.1-405b.json
    """
    from shardwright.models.embedded import embedded_model

    path = options.model or embedded_model()
    try:
        found = _figures(path)
    except UnsupportedError as error:
        if not options.as_json:
            raise
        print(json.dumps({"model": str(path), "supported": False, "reason": str(error)}, ensure_ascii=False))
        raise typer.Exit(UnsupportedError.exit_code) from None
    if options.as_json:
        degrees = [asdict(degree) for degree in found["degrees"]]
        print(json.dumps(found | {"degrees": degrees}, ensure_ascii=False))
    else:
        _show(found)


def _figures(path: Path) -> dict[str, Any]:
    from shardwright.models.compilable import lacking_in_compiled
    from shardwright.models.read import read_config
    from shardwright.models.survey import DEGREES, degree, open_headers, parameters, quantisation_group

    with open_headers(path) as checkpoint:
        config, naming = read_config(checkpoint)
        group = quantisation_group(checkpoint)
    return {
        "model": str(path),
        "supported": True,
        "reason": None,
        "family": config.family,
        "parameters": parameters(config, naming),
        "dtype": config.dtype,
        "context": config.context,
        "decoded_by_torch_because": lacking_in_compiled(config),
        "quantisation_group": group if group > 1 else None,
        "degrees": [degree(config, naming, tp, group) for tp in DEGREES],
    }


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    lacking = found["decoded_by_torch_because"]
    console.print(
        f"supported: yes · family {found['family']} · {found['parameters']:,} parameters · {found['dtype']} · "
        f"context {found['context']:,}" + (f" · decoded by torch: {lacking}" if lacking else ""),
        highlight=False,
    )
    table = Table(box=None, padding=(0, 1))
    table.add_column("tp", justify="right")
    for heading in ("query heads", "KV heads", "shared KV heads", "feed-forward", "weights", "KV of 1 000", "balance"):
        table.add_column(heading, overflow="fold")
    group = found["quantisation_group"]
    if group:
        table.add_column(f"cut between groups of {group}", overflow="fold")
    for degree in found["degrees"]:
        table.add_row(*_row(degree))
    console.print(table)
    print(
        "widths as width×ranks · weights and KV of the fullest rank · balance: mean of the ranks' weights over the most"
    )


def _row(degree: "Degree") -> list[str]:
    ranks = degree.ranks
    row = [
        str(degree.tp),
        _widths([rank.query_heads for rank in ranks]),
        _widths([rank.kv_heads for rank in ranks]),
        str(len(degree.shared_kv_heads) or "–"),
        _widths([rank.feed_forward for rank in ranks]),
        _size(max(rank.weight_bytes for rank in ranks)),
        _size(max(rank.kv_bytes_per_1000_tokens for rank in ranks)),
        f"{degree.balance:.1%}",
    ]
    if degree.quantised is not None:
        other = f"heads {_widths(degree.quantised.query_heads)}, ff {_widths(degree.quantised.feed_forward)}"
        row.append("the same" if degree.quantised.same else other)
    return row


def _widths(widths: "Sequence[int]") -> str:
    """`7, 6×3`."""
    counts: dict[int, int] = {}
    for width in widths:
        counts[width] = counts.get(width, 0) + 1
    return ", ".join(f"{width}×{count}" if count > 1 else str(width) for width, count in counts.items())


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
