"""`shardwright measure`: what this machine can do, kept for plans.

`measured_machine` is what `plan` and `--tp auto` ask; it measures when nothing is kept.
"""

import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardwright.cli.options import with_options
from shardwright.errors import FileError

if TYPE_CHECKING:
    from shardwright.plan.measured import Measured

BEYOND = 1
"""Ranks beyond the cores that are measured too: they take turns, and a plan should know what that costs."""

MOST_COUNTS = 6
"""Numbers of ranks that are measured: all up to there, then powers of two."""

COLUMNS = {
    "read, GB/s": ("bandwidth", 1e-9),
    "fp32 GF/s": ("gemm", 1e-9),
    "bf16 GF/s": ("narrow_gemm", 1e-9),
    "sum, µs": ("small_s", 1e6),
    "read, µs": ("piece_s", 1e6),
    "and sum": ("paced_s", 1e6),
    "4 MiB, ms": ("large_s", 1e3),
    "dealt, ms": ("dealt_s", 1e3),
}
"""What is shown of a rank: heading, figure and unit."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """The command line of `measure`."""

    show: Annotated[bool, typer.Option("--show", help="Print what is kept instead of measuring.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")] = False


@with_options(MeasureOptions)
def measure(options: MeasureOptions) -> None:
    """Measure memory, products and collectives of this machine, rank by rank, and keep the figures.

    Example:  shardwright measure
    """
    said = kept() if options.show else None
    if options.show and said is None:
        raise FileError(cache_file(), "nothing is kept there", "run shardwright measure")
    said = said or measure_now()
    if options.as_json:
        print(json.dumps(said))
    else:
        _show(said)


def measured_machine() -> "Measured":
    """What is kept of this machine; measured now where nothing is."""
    from shardwright.plan.measured import Measured

    said = kept()
    if said is None:
        said = measure_now()
    return Measured.of(said)


def cache_file() -> Path:
    """Where figures are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "shardwright" / "machine.json"


def kept() -> dict[str, Any] | None:
    """The figures kept, or None where there are none, or of another number of cores, or damaged."""
    from shardwright.plan.measured import Measured

    try:
        said: dict[str, Any] = json.loads(cache_file().read_text("utf-8"))
        return said if Measured.of(said).cores == _cores() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def measure_now() -> dict[str, Any]:
    """Fork ranks, have 1, 2, … of them and one more than there are cores measure together, and keep what they find."""
    from shardwright.comm.job import Job
    from shardwright.profile.machine import measure_rank

    print("shardwright: measuring this machine, some ten seconds", file=sys.stderr)
    asked = counts(_cores())
    ranks: dict[str, list[dict[str, float]]] = {str(n): [] for n in asked}
    with Job(max(asked), partial(measure_rank, counts=asked)) as job:
        while sum(map(len, ranks.values())) < sum(asked) and (message := job.receive()) is not None:
            ranks[str(message["ranks"])].append(message["figures"])
    for rows in ranks.values():
        rows.sort(key=lambda row: row["rank"])
    said = {"cores": _cores(), "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "ranks": ranks}
    _keep(said)
    return said


def counts(cores: int) -> list[int]:
    """The numbers of ranks to measure."""
    small = list(range(1, min(cores + BEYOND, MOST_COUNTS) + 1))
    powers = [1 << i for i in range(3, 9) if MOST_COUNTS < 1 << i <= cores]
    return sorted({*small, *powers, cores})


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _keep(said: dict[str, Any]) -> None:
    """Written beside and renamed, so that no reader sees half of it; a place that cannot be written is no failure."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(said), "utf-8")
        beside.rename(path)
    except OSError as error:
        print(f"shardwright: {path} cannot be written: {error.strerror}; measured again next time", file=sys.stderr)


def _show(said: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("ranks", "rank", *COLUMNS):
        table.add_column(heading, justify="right")
    for n, rows in said["ranks"].items():
        for row in rows:
            table.add_row(n, f"{row['rank']:.0f}", *(f"{row[name] * unit:.1f}" for name, unit in COLUMNS.values()))
    Console().print(table)
    print(
        f"{said['cores']} cores, {said['memory'] / 2**30:.1f} GiB; GF are 10^9 operations; a sum is an all-reduce of "
        f"2.3 kB or 4 MiB; 64 MiB are dealt out and gathered again; kept in {cache_file()}"
    )
