"""Rows of a table of measured training runs, as one scene of arrays.

Decides which columns are inputs, and which rows cannot be priced. Labels (source, title, model, family, notes) and
measurements never reach the scene.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shardwright.errors import FileError, UsageError
from shardwright.plan.blocks import Blocks, of_sizes
from shardwright.plan.curves import Machine
from shardwright.plan.hardware import machine
from shardwright.plan.quantities import stacked
from shardwright.plan.row_cells import Row, Skipped, UnpricedError, choice, number, optional, text
from shardwright.plan.software import Software, profile
from shardwright.plan.step import Scene
from shardwright.plan.training import RECOMPUTE, Split, Training

PRECISIONS = ("bf16", "fp16", "fp8")

VTRAIN = {
    "# GPUs": "devices",
    "global batch": "global_batch",
    "micro batch": "micro_batch",
    "hidden size": "hidden",
    "attention heads": "heads",
    "# layers": "layers",
    "sequence length": "seq",
    "tensor parallelism": "tp",
    "data parallelism": "dp",
    "pipeline parallelism": "pp",
}
"""vTrain's columns and ours; what it lacks is in `_from_vtrain`."""


@dataclass(frozen=True)
class Priced:
    """The rows that can be priced: their numbers, labels and measurements, and the scene they make."""

    numbers: tuple[int, ...]
    rows: tuple[Row, ...]
    scene: Scene
    skipped: tuple[Skipped, ...]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; vTrain's form is brought to the common one.

    Raises:
        FileError: it cannot be read or has no rows.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(path, f"it cannot be read: {error}", "pass a CSV file with a header") from None
    if not rows:
        raise FileError(path, "it has no rows", "pass a CSV file with a header and runs")
    return [_from_vtrain(row) for row in rows] if "# GPUs" in rows[0] else rows


def price_rows(rows: Sequence[Row]) -> Priced:
    """One scene of all rows that can be priced, and the others with their reasons."""
    records: list[tuple[Blocks, Training, Split, Machine, Software]] = []
    kept: list[int] = []
    skipped: list[Skipped] = []
    for at, row in enumerate(rows, 1):
        try:
            records.append(_record(row))
            kept.append(at)
        except (UsageError, UnpricedError) as error:
            skipped.append(Skipped(at, str(error)))
    if not records:
        raise UsageError("rows", len(rows), "none can be priced", skipped[0].reason)
    blocks, training, split, machines, software = (stacked(column) for column in zip(*records, strict=True))
    scene = Scene(blocks=blocks, training=training, split=split, machine=machines, software=software)
    return Priced(tuple(kept), tuple(rows[at - 1] for at in kept), scene, tuple(skipped))


def _record(row: Row) -> tuple[Blocks, Training, Split, Machine, Software]:
    if any(optional(row, name) > 1 for name in ("ep", "experts", "num_experts")):
        raise UnpricedError("mixture of experts: the cost model covers dense models")
    if choice(row, "precision", (*PRECISIONS, "fp4", "fp32", "tf32")) not in PRECISIONS:
        raise UnpricedError(f"precision {row['precision']}: curves cover {', '.join(PRECISIONS)}")
    if row["precision"].lower() == "fp8" and not machine(text(row, "device")).fp8:
        raise UnpricedError(f"precision fp8: {row['device']} has no such products")
    device = replace(
        machine(text(row, "device")),
        intra=number(row, "intra_node_gbs") * 1e9,
        inter=number(row, "inter_node_gbs") * 1e9,
        per_node=number(row, "devices_per_node"),
    )
    return _blocks(row), _training(row), _split(row), device, profile(text(row, "framework"), row["precision"].lower())


def _blocks(row: Row) -> Blocks:
    return of_sizes(
        layers=number(row, "layers"),
        hidden=number(row, "hidden"),
        feed_forward=number(row, "ffn"),
        heads=number(row, "heads"),
        kv_heads=number(row, "kv_heads"),
        head_size=number(row, "head_dim"),
        vocabulary=number(row, "vocab"),
        gated=number(row, "gated", least=0),
        tied=0,
        window=number(row, "window", least=0),
    )


def _training(row: Row) -> Training:
    return Training(
        sequence=number(row, "seq"),
        global_batch=number(row, "global_batch"),
        fp8=float(row["precision"].lower() == "fp8"),
        flash=number(row, "flash_attention", least=0),
    )


def _split(row: Row) -> Split:
    return Split(
        tp=number(row, "tp"),
        pp=number(row, "pp"),
        vpp=number(row, "vpp"),
        dp=number(row, "dp"),
        cp=number(row, "cp"),
        sp=number(row, "sp", least=0),
        micro_batch=number(row, "micro_batch"),
        recompute=float(RECOMPUTE.index(choice(row, "recompute", RECOMPUTE))),
        zero=number(row, "zero", least=0),
    )


def _from_vtrain(row: Row) -> dict[str, str]:
    """VTrain's single-node runs: A100-80, vocabulary 51 200, F = 4 H, full recomputation, Megatron-DeepSpeed."""
    ours = {VTRAIN[name]: value for name, value in row.items() if name in VTRAIN}
    hidden, heads = float(ours["hidden"] or 0), float(ours["heads"] or 1)
    seconds = row.get("iteration time (ms)", "")
    return (
        ours
        | {
            "device": "a100-80",
            "framework": "megatron-deepspeed",
            "precision": "fp16",
            "ffn": f"{4 * hidden:g}",
            "kv_heads": ours["heads"],
            "head_dim": f"{hidden / heads:g}",
            "vocab": "51200",
            "recompute": "full",
            "devices_per_node": "8",
            "inter_node_gbs": "25",
            "intra_node_gbs": "300",
            "step_time_s": f"{float(seconds) / 1e3}" if seconds else "",
        }
        | dict.fromkeys(("vpp", "cp"), "1")
        | dict.fromkeys(("gated", "window", "sp", "zero", "flash_attention"), "0")
    )
