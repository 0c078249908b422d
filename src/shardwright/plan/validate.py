"""Predictions beside measurements: the errors of a table of runs, by family and by device, of memory and of ranking.

Decides what is counted. Prices rows through `rows` and `step`; knows no curve.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardwright.errors import UsageError
from shardwright.plan import memory
from shardwright.plan.row_cells import Row, Skipped
from shardwright.plan.rows import Priced, price_rows, read_rows
from shardwright.plan.serve_rows import is_serving, price_serving
from shardwright.plan.step import step

MODEL_CELLS = (
    *("device", "framework", "precision", "layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab"),
    *("gated", "seq", "window", "global_batch", "devices", "devices_per_node", "inter_node_gbs", "intra_node_gbs"),
)
"""What runs of one group share: the model and its job, and the cluster. What differs is the layout."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Of predictions over measurements, as fractions: |p/m − 1|, and its signed mean."""

    rows: int
    median_abs_error: float
    mean_abs_error: float
    bias: float
    within_10: float
    within_20: float


@dataclass(frozen=True, kw_only=True)
class Named(Errors):
    """The errors of the rows that share a label."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One row: its number in the file, and seconds (and GiB) predicted and measured."""

    row: int
    family: str
    device: str
    predicted_s: float
    measured_s: float
    predicted_memory_gb: float | None = None
    measured_memory_gb: float | None = None


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Of groups of layouts of one model on one cluster: how often the one predicted best is near the truly best."""

    groups: int
    within_3: float
    within_10: float


@dataclass(frozen=True, kw_only=True)
class Validation(Errors):
    """All that `validate` reports."""

    measured: str
    families: tuple[Named, ...]
    devices: tuple[Named, ...]
    memory: Errors | None
    ranking: Ranking | None
    predictions: tuple[Prediction, ...] = field(repr=False)
    skipped: tuple[Skipped, ...] = ()


def validate(path: Path) -> Validation:
    """Price every row of a CSV file of training runs, vTrain's runs, or serving measurements.

    Raises:
        FileError: it cannot be read.
        UsageError: not one row can be priced.
    """
    rows = read_rows(path)
    return _of_serving(rows) if is_serving(rows[0]) else _of_training(rows)


def errors_of(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> dict[str, float | int]:
    """The fields of `Errors`."""
    signed = predicted / measured - 1
    off = np.abs(signed)
    return {
        "rows": len(off),
        "median_abs_error": float(np.median(off)),
        "mean_abs_error": float(np.mean(off)),
        "bias": float(np.mean(signed)),
        "within_10": float(np.mean(off <= 0.1)),
        "within_20": float(np.mean(off <= 0.2)),
    }


def _of_training(rows: Sequence[Row]) -> Validation:
    measured_ones = [number for number, row in enumerate(rows, 1) if _positive(row.get("step_time_s", ""))]
    if not measured_ones:
        raise UsageError(
            "rows", len(rows), "none can be priced", "no row has step_time_s; docs/planner.md has the columns"
        )
    unmeasured = [
        Skipped(n, "step_time_s is not measured") for n in range(1, len(rows) + 1) if n not in set(measured_ones)
    ]
    priced = price_rows([rows[number - 1] for number in measured_ones])
    numbers = [measured_ones[number - 1] for number in priced.numbers]
    skipped = [*unmeasured, *(Skipped(measured_ones[s.row - 1], s.reason) for s in priced.skipped)]
    seconds = np.asarray(step(priced.scene).total, float)
    gib = np.asarray(memory.worst(priced.scene).total, float) / 2**30
    predictions = [
        Prediction(
            row=number,
            family=row.get("family") or row["device"],
            device=row["device"],
            predicted_s=float(s),
            measured_s=float(row["step_time_s"]),
            predicted_memory_gb=float(g),
            measured_memory_gb=float(row["memory_gb"]) if _positive(row.get("memory_gb", "")) else None,
        )
        for number, row, s, g in zip(numbers, priced.rows, seconds, gib, strict=True)
    ]
    return _report("step time", predictions, skipped, _memory(predictions), _ranking(priced, predictions))


def _of_serving(rows: Sequence[Row]) -> Validation:
    numbers, labels, predicted, measured, skipped = price_serving(rows)
    predictions = [
        Prediction(row=n, family=family, device=device, predicted_s=p, measured_s=m)
        for n, (family, device), p, m in zip(numbers, labels, predicted, measured, strict=True)
    ]
    return _report("time per token", predictions, skipped, None, None)


def _report(
    measured: str,
    predictions: Sequence[Prediction],
    skipped: Sequence[Skipped],
    held: Errors | None,
    ranking: Ranking | None,
) -> Validation:
    return Validation(
        measured=measured,
        families=_by(predictions, lambda p: p.family),
        devices=_by(predictions, lambda p: p.device),
        memory=held,
        ranking=ranking,
        predictions=tuple(predictions),
        skipped=tuple(sorted(skipped, key=lambda s: s.row)),
        **_fields(predictions),  # type: ignore[arg-type]
    )


def _by(predictions: Sequence[Prediction], label: Callable[[Prediction], str]) -> tuple[Named, ...]:
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(label(prediction), []).append(prediction)
    return tuple(Named(name=name, **_fields(group)) for name, group in groups.items())  # type: ignore[arg-type]


def _fields(predictions: Sequence[Prediction]) -> dict[str, float | int]:
    return errors_of(np.array([p.predicted_s for p in predictions]), np.array([p.measured_s for p in predictions]))


def _memory(predictions: Sequence[Prediction]) -> Errors | None:
    stated = [p for p in predictions if p.measured_memory_gb]
    if not stated:
        return None
    predicted, measured = ([getattr(p, f"{kind}_memory_gb") for p in stated] for kind in ("predicted", "measured"))
    return Errors(**errors_of(np.array(predicted), np.array(measured)))  # type: ignore[arg-type]


def _ranking(priced: Priced, predictions: Sequence[Prediction]) -> Ranking | None:
    """Rows of one layout measured several times count by their mean."""
    groups: dict[tuple[str, ...], dict[tuple[str, ...], list[Prediction]]] = {}
    for row, prediction in zip(priced.rows, predictions, strict=True):
        layout = tuple(row[name] for name in ("micro_batch", "tp", "pp", "vpp", "dp", "cp", "sp", "recompute", "zero"))
        groups.setdefault(tuple(row[n] for n in MODEL_CELLS), {}).setdefault(layout, []).append(prediction)
    losses = []
    for layouts in groups.values():
        if len(layouts) > 1:
            scored = [
                (np.mean([p.predicted_s for p in runs]), np.mean([p.measured_s for p in runs]))
                for runs in layouts.values()
            ]
            chosen = min(scored)[1]
            losses.append(chosen / min(measured for _, measured in scored) - 1)
    if not losses:
        return None
    near = np.array(losses)
    return Ranking(groups=len(near), within_3=float(np.mean(near <= 0.03)), within_10=float(np.mean(near <= 0.1)))


def _positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False
