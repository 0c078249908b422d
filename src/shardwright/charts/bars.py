"""Stacked horizontal bars: one bar a row, one colour a kind. Knows no planner: it is given numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

COLOURS = 10
"""Distinct ones of the default cycle; a kind beyond is grey."""


def bars(
    path: Path | IO[bytes],
    rows: Sequence[tuple[str, Mapping[str, float]]],
    *,
    title: str,
    unit: str,
    limit: float | None = None,
) -> None:
    """Write the picture, SVG where `path` is a stream. limit: a dashed line there (a device's memory, say)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.4 + 0.35 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    labels = [label for label, _ in rows]
    left = [0.0] * len(rows)
    kinds = list(dict.fromkeys(kind for _, values in rows for kind in values))
    for colour, kind in enumerate(kinds):
        widths = [values.get(kind, 0.0) for _, values in rows]
        if any(widths):
            axes.barh(labels, widths, left=left, label=kind, color=f"C{colour}" if colour < COLOURS else "0.4")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    if limit is not None:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit)
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, format=None if isinstance(path, Path) else "svg")
