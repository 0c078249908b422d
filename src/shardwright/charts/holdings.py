"""A picture of who holds what: a bar for each tensor, its cut dimension from left to right, a row in it for each rank.

Knows no model: it is given bars.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bar:
    """One tensor. length: of the dimension that is cut · spans: start, stop and rank of each part that a rank holds."""

    label: str
    length: int
    spans: tuple[tuple[int, int, int], ...]


def holdings(path: Path, bars: Sequence[Bar], ranks: int, *, title: str) -> None:
    """Write the picture, SVG or PNG by its suffix; a part that several ranks hold shows in the row of each."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + len(bars) * (0.25 + 0.07 * ranks)), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["turbo"]
    for place, bar in enumerate(bars):
        axes.broken_barh([(0, 1)], (place - 0.4, 0.8), facecolors="0.93")
        for start, stop, rank in bar.spans:
            row = (place - 0.4 + 0.8 * rank / ranks, 0.8 / ranks)
            colour = colours((rank + 0.5) / ranks)
            axes.broken_barh([(start / bar.length, (stop - start) / bar.length)], row, facecolors=[colour])
    for rank in range(ranks):
        axes.scatter([], [], marker="s", color=[colours((rank + 0.5) / ranks)], label=f"rank {rank}")
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=8)
    axes.set(ylim=(len(bars) - 0.5, -0.5), xlim=(0, 1), xlabel="share of the dimension that is cut", title=title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    figure.savefig(path)
