"""A scatter plot of predicted against measured on logarithmic axes. Knows no planner: it is given points."""

from collections.abc import Sequence
from pathlib import Path

Point = tuple[str, float, float]
"""Label of its group, measured, predicted."""


def scatter(path: Path, points: Sequence[Point], *, title: str, unit: str) -> None:
    """Write the picture, PNG or SVG by its suffix: one colour a group, the diagonal, and ±20 % around it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    groups: dict[str, list[tuple[float, float]]] = {}
    for label, *pair in points:
        groups.setdefault(label, []).append((pair[0], pair[1]))
    low = min(min(m, p) for _, m, p in points) / 1.5
    high = max(max(m, p) for _, m, p in points) * 1.5
    axes.fill_between([low, high], [0.8 * low, 0.8 * high], [1.2 * low, 1.2 * high], color="0.9", label="±20 %")
    axes.plot([low, high], [low, high], color="0.5", linewidth=1)
    for label, pairs in groups.items():
        measured, predicted = zip(*pairs, strict=True)
        axes.scatter(measured, predicted, s=12, alpha=0.7, label=f"{label} ({len(pairs)})")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), title=title)
    axes.set(xlabel=f"measured, {unit}", ylabel=f"predicted, {unit}", aspect="equal")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
