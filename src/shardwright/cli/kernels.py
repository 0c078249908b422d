"""`shardwright kernels`: which implementation of each kernel runs where, and why."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from shardwright.cli.options import with_options


@dataclass(frozen=True, kw_only=True)
class KernelsOptions:
    """The command line of `kernels`."""

    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")] = False


@with_options(KernelsOptions)
def kernels(options: KernelsOptions) -> None:
    """Print which implementation of each kernel runs where, and why; of a kernel's rows the first that fits holds.

    Example:  shardwright kernels --json
    """
    from shardwright.kernels.select import TABLE

    if options.as_json:
        print(json.dumps({"kernels": [asdict(row) for row in TABLE]}, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("kernel", no_wrap=True)
    for heading in ("runs", "where", "because"):
        table.add_column(heading, overflow="fold")
    for row in TABLE:
        conditions = {"device": row.device, "dtype": row.dtype, "mode": row.mode, "group": row.group}
        where = [f"{name} {value}" for name, value in conditions.items() if value != "*"]
        where += [f"{row.elements} elements or more"] if row.elements else []
        where += [f"comm_turn {row.turns} or more"] if row.turns else []
        where += [f"with {row.needs}"] if row.needs else []
        table.add_row(row.kernel, row.implementation, ", ".join(where) or "anywhere", row.reason)
    Console().print(table)
