"""Writes docs/performance.md and its picture from benchmarks/results/*.json: the last step of `make performance`.

A case is a row, a side is a column, and the picture shows the ratios. Of the benchmarks it knows one: a training step's
figures are also put side by side, data against tensor parallel.
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BENCHMARKS = {
    "all_reduce": "All-reduce of two ranks",
    "matmul_all_reduce": "Matmul and all-reduce in one call, two ranks",
    "decode": "Decoding, and reading a prompt",
    "lockstep": "Decoding, and only reading its weights",
    "load": "From the start of the process to the first token, and memory",
    "overhead": "What the layers cost at one rank",
    "crowded": "Beside a busy process",
    "train_step": "A training step",
}
"""In the page's order."""

WIDTH, ROW, LABEL, BAR = 760, 18, 300, 400
SCALE = 150.0
"""The largest ratio that the picture's logarithmic scale reaches."""


def table(cases: list[dict[str, Any]]) -> list[str]:
    """A case a row: every side's median, and how many times better ours is."""
    sides = list(dict.fromkeys(side for case in cases for side in case["values"]))
    columns = ["case", "unit", *sides, *(f"ours : {side}" for side in sides if side != "ours")]
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "--:|" * (len(columns) - 2)]
    for case in cases:
        values = [f"{case['values'][side]:,.4g}" if side in case["values"] else "–" for side in sides]
        ratios = [f"{case['ratios'][side]:.2f}" if side in case["ratios"] else "–" for side in sides if side != "ours"]
        lines.append(f"| {' | '.join([case['case'], case['unit'], *values, *ratios])} |")
    return lines


SCHEMES = {"one_process": "one process, two threads", "ddp": "dp 2, DDP", "dtensor": "tp 2, DTensor"}
"""What a peer of `train_step` is; ours go by their cases."""

FIGURES = ("tokens/s", "MB a rank", "% of a step")
"""Units of what a training step gives and takes: throughput, memory, communication."""


def schemes(cases: list[dict[str, Any]]) -> list[str]:
    """What each way to share a training step gives and costs a rank, a row each, model by model.

    A peer that was measured beside several of our cases has the median of all.
    """
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for case in cases:
        (model, _, rest), unit = case["case"].partition(" "), case["unit"]
        for side, value in case["values"].items() if unit in FIGURES else ():
            scheme = f"{rest.partition(',')[0]}, ours" if side == "ours" else SCHEMES[side]
            found.setdefault((model, scheme), {}).setdefault(unit, []).append(value)
    lines = ["| model | ranks | tokens/s | MB a rank | communication, % of a step |", "|---|---|--:|--:|--:|"]
    for (model, scheme), figures in sorted(found.items(), key=lambda row: row[0][0]):
        shown = [f"{median(figures[unit]):,.4g}" if unit in figures else "–" for unit in FIGURES]
        lines.append(f"| {model} | {scheme} | {' | '.join(shown)} |")
    return [*lines, ""]


def section(name: str, title: str) -> list[str]:
    """A benchmark's part of the page; nothing where it has not been run."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    read = found["ceilings"]["read_gb_s_2"]
    said = (
        f"`benchmarks/{name}.py` at {found['commit']} · {found['machine']} · {versions} · {read} GB/s read at its start"
    )
    beside = schemes(found["cases"]) if name == "train_step" else []
    return [f"## {title}", "", *beside, *table(found["cases"]), "", said, ""]


def picture() -> str:
    """Bars of every ratio, from 1/10 to `SCALE` on a logarithmic scale, a line at 1."""
    from math import log10

    rows = [
        (f"{case['case']}, {peer}", ratio)
        for name in BENCHMARKS
        if (RESULTS / f"{name}.json").exists()
        for case in json.loads((RESULTS / f"{name}.json").read_text())["cases"]
        for peer, ratio in case["ratios"].items()
    ]

    def at(ratio: float) -> float:
        return LABEL + BAR * (log10(max(0.1, min(ratio, SCALE))) + 1) / (log10(SCALE) + 1)

    parts = []
    for number, (label, ratio) in enumerate(rows):
        y = 30 + ROW * number
        start, stop, colour = (*sorted((at(1), at(ratio))), "#2a7f62" if ratio >= 1 else "#c0603a")
        parts.append(f'<text x="{LABEL - 8}" y="{y + 11}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{start:.0f}" y="{y}" width="{stop - start:.1f}" height="{ROW - 5}" fill="{colour}"/>')
        parts.append(f'<text x="{at(max(ratio, 1)) + 6:.0f}" y="{y + 11}">{ratio:.2f}</text>')
    height = 40 + ROW * len(rows)
    line = f'<line x1="{at(1):.0f}" x2="{at(1):.0f}" y1="24" y2="{height - 8}" stroke="#444"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif"'
    title = f'<text x="{LABEL - 8}" y="16" text-anchor="end" font-weight="bold">times as good as</text>'
    return "\n".join(
        [f'{head} font-size="11">', '<rect width="100%" height="100%" fill="white"/>', title, *parts, line]
    )


def main() -> None:
    """Write both files."""
    sections = [section(name, title) for name, title in BENCHMARKS.items()]
    page = [
        "# Performance",
        "",
        "Made by `make performance`; what was expected, tried and not reached is in `benchmarks/NOTES.md`. Medians;",
        "both sides of a ratio come from one run, and above 1 ours is the better. `limit` is what the memory's read",
        "bandwidth, read in turn with our runs, allows.",
        "",
        "![Ratios](performance.svg)",
        "",
        *(line for lines in sections for line in lines),
    ]
    (ROOT / "docs" / "performance.md").write_text("\n".join(page))
    (ROOT / "docs" / "performance.svg").write_text(picture() + "\n</svg>\n")


if __name__ == "__main__":
    main()
