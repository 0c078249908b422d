"""A plan as a page: the winner, its pictures, and why the others lost."""

from pathlib import Path

from shardwright.charts.bars import bars
from shardwright.charts.frontier import frontier
from shardwright.charts.page import Page
from shardwright.plan.found import GIB, Found, summary


def write_page(found: Found, memory: float, path: Path) -> None:
    """Write the HTML report. memory: bytes of a device."""
    page = Page(f"{found.model} on {found.cluster}: {found.mode}")
    page.text(summary(found))
    for warning in found.warnings:
        page.text(f"Note: {warning}.")
    if found.best is not None:
        stages = [
            (
                f"stage {at}",
                {
                    ("KV pages" if found.mode == "serve" and kind == "activations" else kind): value / GIB
                    for kind, value in held.items()
                },
            )
            for at, held in enumerate(found.stages)
        ]
        page.picture(
            "Memory of a rank, by pipeline stage",
            lambda stream: bars(stream, stages, title=str(found.best), unit="GiB", limit=memory / GIB),
        )
        page.picture(
            "Time by kind, the winner first",
            lambda stream: bars(stream, found.seconds, title=_time_of(found), unit="seconds"),
        )
    points = [(label, nbytes / GIB, speed, usable) for label, nbytes, speed, usable in found.frontier]
    page.picture(
        "Memory against speed, the best of each shape",
        lambda stream: frontier(stream, points, title="all shapes", limit=memory / GIB),
    )
    rows = [
        (str(lost.layout), f"{lost.layout.step_s:.4g}", f"{lost.layout.memory_bytes / GIB:.1f}", lost.reason)
        for lost in found.losers
    ]
    page.table(("layout", "step, s", "GiB", "why it lost"), rows)
    page.write(path)


def _time_of(found: Found) -> str:
    return "a training step" if found.mode == "train" else "a token"
