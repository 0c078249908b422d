"""`shardwright validate`: the planner's predictions beside what others measured."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardwright.cli.options import PICTURES, check_output, with_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardwright.plan.validate import Errors, Named, Validation


@dataclass(frozen=True, kw_only=True)
class ValidateOptions:
    """The command line of `validate`."""

    csv: Annotated[Path, typer.Argument(help="Runs: columns as in docs/planner.md, vTrain's, or serving measurements.")]
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")] = False
    png: Annotated[Path | None, typer.Option(help="Write a scatter plot of predicted against measured there.")] = None


@with_options(ValidateOptions)
def validate(options: ValidateOptions) -> None:
    """Predict every run of a table and print the errors: in all, per family, per device, and row by row.

    Example:  shardwright validate tests/data/planning/train_runs.csv
    """
    from shardwright.plan.validate import validate as validated

    check_output("png", options.png, PICTURES)
    report = validated(options.csv)
    if options.png is not None:
        from shardwright.charts.scatter import scatter

        points = [(p.family, p.measured_s, p.predicted_s) for p in report.predictions]
        scatter(options.png, points, title=f"{report.measured}: {report.rows} runs", unit="s")
    if options.as_json:
        print(json.dumps(asdict(report), ensure_ascii=False))
    else:
        _show(report)


def _show(report: "Validation") -> None:
    from rich.console import Console

    console = Console()
    for title, groups in (("family", report.families), ("device", report.devices)):
        console.print(_table(title, groups))
    worst = sorted(report.predictions, key=lambda p: -abs(p.predicted_s / p.measured_s - 1))
    for p in worst[:10]:
        off = p.predicted_s / p.measured_s - 1
        console.print(f"row {p.row} ({p.family}): {p.predicted_s:.4g} s for {p.measured_s:.4g} s, {off:+.0%}")
    console.print(f"{report.measured}: {_said(report)}", highlight=False)
    if report.memory is not None:
        console.print(f"memory: {_said(report.memory)}", highlight=False)
    if report.ranking is not None:
        near = f"{report.ranking.within_3:.0%} within 3 %, {report.ranking.within_10:.0%} within 10 %"
        console.print(f"layout predicted best, of {report.ranking.groups} groups: {near} of the truly best")
    for skip in report.skipped:
        console.print(f"skipped row {skip.row}: {skip.reason}", highlight=False)


def _said(errors: "Errors") -> str:
    return (
        f"{errors.rows} rows, median {errors.median_abs_error:.1%}, mean {errors.mean_abs_error:.1%}, "
        f"bias {errors.bias:+.1%}, within 10 %: {errors.within_10:.0%}, within 20 %: {errors.within_20:.0%}"
    )


def _table(title: str, groups: "Sequence[Named]") -> object:
    from rich.table import Table

    table = Table()
    for heading in (title, "rows", "median", "mean", "bias", "within 10 %", "within 20 %"):
        table.add_column(heading)
    for g in groups:
        figures = (g.median_abs_error, g.mean_abs_error, g.bias, g.within_10, g.within_20)
        table.add_row(g.name, str(g.rows), *(f"{figure:.1%}" for figure in figures))
    return table
