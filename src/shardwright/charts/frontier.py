"""Memory against speed, one point a layout, the best of them numbered. Knows no planner: it is given points."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO

Point = tuple[str, float, float, bool]
"""Label, GiB a device, tokens a second, whether it can be used."""

NAMED = 6


def frontier(path: Path | IO[bytes], points: Sequence[Point], *, title: str, limit: float) -> None:
    """Write the picture, SVG where `path` is a stream. limit: GiB of a device, a dashed line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for usable, colour, said in ((True, "tab:blue", "possible"), (False, "tab:red", "not possible")):
        chosen = [(memory, speed) for _, memory, speed, ok in points if ok == usable]
        if chosen:
            across, up = zip(*chosen, strict=True)
            axes.scatter(across, up, s=18, color=colour, label=said)
    best = sorted((point for point in points if point[3]), key=lambda point: -point[2])[:NAMED]
    for at, (label, memory, speed, _) in enumerate(best, 1):
        axes.annotate(str(at), (memory, speed), fontsize=8, xytext=(4, 4), textcoords="offset points")
        axes.plot([], [], " ", label=f"{at}  {label}")
    axes.axvline(limit, color="black", linestyle="--", linewidth=1, label="memory of a device")
    axes.set(title=title, xlabel="GiB on the fullest device", ylabel="tokens a second")
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    figure.savefig(path, format=None if isinstance(path, Path) else "svg")
