"""Fit the shape constants of `plan/curves.py` on measured kernel latencies: GEMM, attention, collectives.

`python -m benchmarks.fit_curves DIRECTORY` takes the directory with AIConfigurator's tables (Apache-2.0) as CSV:
aic_gemm_bf16.csv.gz, aic_gemm_fp8.csv.gz (device, m, n, k, latency_ms), aic_context_attention.csv.gz, aic_nccl.csv.gz.
They are megabytes, and so not part of this repository. What it prints is in `plan/data/curves.toml`, rounded.
"""

import csv
import gzip
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from benchmarks.descent import Constants, descend

from shardwright.plan import curves
from shardwright.plan.curves import Machine
from shardwright.plan.hardware import machine

DEVICES = {
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA L40S": "l40s",
}
SYSTEMS = {"a100_sxm": "a100-80", "h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200", "gb200": "gb200"}
SAMPLE = 4000
"""Rows of a table that are fitted on, drawn with a fixed seed."""

Rows = list[dict[str, str]]


def grouped(path: Path, key: Callable[[dict[str, str]], str | None]) -> Iterator[tuple[str, Rows]]:
    """The rows of a table by device, those without a key left out."""
    groups: dict[str, Rows] = {}
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            name = key(row)
            if name is not None:
                groups.setdefault(name, []).append(row)
    yield from groups.items()


def columns(rows: Rows, *names: str) -> list[np.ndarray]:
    """Columns of numbers of a sample of the rows."""
    order = np.random.default_rng(0).permutation(len(rows))[:SAMPLE]
    return [np.array([float(rows[at][name]) for at in order]) for name in names]


def fitted(label: str, priced: Callable[[Constants], np.ndarray], seconds: np.ndarray, start: Constants) -> None:
    """Fit, and print constants and mean error."""

    def loss(constants: Constants) -> float:
        return float(np.mean(np.abs(np.log(priced(constants) / seconds))))

    constants = descend(loss, start, step=0.3)
    said = "  ".join(f"{name} {value:.4g}" for name, value in constants.items())
    print(f"{label:28} {len(seconds):5} rows  mean error {loss(constants):6.1%}  {said}", flush=True)


def unsustained(name: str) -> Machine:
    """A device as a benchmark of seconds sees it."""
    return replace(machine(name), sustained=1.0)


def gemms(directory: Path, precision: str) -> None:
    """Products of at least 256 rows and columns."""
    fp8 = float(precision == "fp8")
    start = {f"gemm_{precision}": 0.8, "ramp_fp8" if fp8 else "ramp": 100.0, "tail": 0.1, "launch": 4e-6}
    start |= {"quantise": 2.0} if fp8 else {"memory_share": 0.75, "sharpness": 4.0}
    for device, rows in grouped(directory / f"aic_gemm_{precision}.csv.gz", lambda row: row["device"]):
        large = [row for row in rows if min(int(row["m"]), int(row["n"])) >= 256 and int(row["k"]) >= 128]
        m, n, k, latency = columns(large, "m", "n", "k", "latency_ms")
        base = unsustained(DEVICES[device])

        def priced(c: Constants, base: Machine = base, m: object = m, n: object = n, k: object = k) -> np.ndarray:
            return np.asarray(curves.product(replace(base, **c), m, n, k, fp8))

        fitted(f"gemm {precision} {device}", priced, latency / 1e3, start)


def attentions(directory: Path) -> None:
    """Causal prefill of 512 tokens and more, heads of 64 to 256 together."""

    def key(row: dict[str, str]) -> str | None:
        plain = row["window_size"] == row["step"] == "0" and int(row["isl"]) >= 512
        return row["device"] if plain and int(row["head_dim"]) <= 256 else None

    for device, rows in grouped(directory / "aic_context_attention.csv.gz", key):
        batch, length, heads, size, latency = columns(rows, "batch_size", "isl", "num_heads", "head_dim", "latency_ms")
        base = unsustained(DEVICES[device])
        pairs = batch * heads * length * length / 2

        def priced(
            c: Constants,
            base: Machine = base,
            p: object = pairs,
            s: object = length,
            n: object = heads,
            d: object = size,
        ) -> np.ndarray:
            return np.asarray(curves.attention(replace(base, **c), p, s, n, d))

        start = {"attention": 0.6, "attention_ramp": 800.0, "attention_tail": 1.0, "attention_head": 20.0}
        fitted(f"attention {device}", priced, latency / 1e3, start)


def collectives(directory: Path) -> None:
    """All-reduce and all-gather in one node; sizes are in elements of two bytes."""

    def key(row: dict[str, str]) -> str | None:
        kind = row["op_name"] if row["op_name"] in ("all_reduce", "all_gather") else None
        return f"{row['file'].split('/')[0]} {kind}" if kind and row["nccl_dtype"] == "half" else None

    for name, rows in grouped(directory / "aic_nccl.csv.gz", key):
        system, kind = name.split()
        ranks, elements, latency = columns(rows, "num_gpus", "message_size", "latency_ms")
        base = unsustained(SYSTEMS[system])
        time = curves.all_reduce if kind == "all_reduce" else curves.gather

        def priced(
            c: Constants, base: Machine = base, n: np.ndarray = ranks, e: np.ndarray = elements, time: object = time
        ) -> np.ndarray:
            there = replace(base, **c)
            return np.asarray(time(there, curves.links(there, n, np.ones_like(n)), 2 * e))  # type: ignore[operator]

        fitted(name, priced, latency / 1e3, {"wire": 0.8, "latency": 6e-6, "hop": 1e-6, "root": 8e-9})


def main() -> None:
    """Fit all tables of a directory."""
    directory = Path(sys.argv[1])
    for precision in ("bf16", "fp8"):
        gemms(directory, precision)
    attentions(directory)
    collectives(directory)


if __name__ == "__main__":
    main()
