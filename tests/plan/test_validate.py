"""The cost model against what others measured. Bounds are the project's aims, a little above what was reached."""

import csv
import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardwright.cli.main import app
from shardwright.errors import FileError, UsageError
from shardwright.plan import memory
from shardwright.plan.hardware import machine
from shardwright.plan.rows import price_rows, read_rows
from shardwright.plan.validate import validate


def rewritten(tmp_path: Path, rows: list[dict[str, str]]) -> Path:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_training_runs(data: Path) -> None:
    report = validate(data / "train_runs.csv")
    assert report.rows == 425
    assert not report.skipped
    assert report.median_abs_error < 0.055
    assert report.mean_abs_error < 0.07
    assert report.within_20 > 0.94
    assert report.ranking is not None
    assert report.ranking.within_3 > 0.85
    assert report.ranking.within_10 > 0.92


def test_memory_where_it_is_stated(data: Path) -> None:
    report = validate(data / "train_runs.csv").memory
    assert report is not None
    assert report.rows == 49
    assert report.median_abs_error < 0.05


def test_single_node_runs(data: Path) -> None:
    report = validate(data / "vtrain_single.csv")
    assert report.rows == 700
    assert report.median_abs_error < 0.06
    assert report.mean_abs_error < 0.08
    assert report.within_20 > 0.94


def test_time_per_token(data: Path) -> None:
    report = validate(data / "published_infer.csv")
    assert report.measured == "time per token"
    assert report.rows + len(report.skipped) == 674
    assert report.rows > 600
    assert report.median_abs_error < 0.1


def test_layouts_that_ran_out_of_memory_are_called(data: Path) -> None:
    priced = price_rows(read_rows(data / "bloom_out_of_memory.csv"))
    assert (memory.worst(priced.scene).total > machine("a100-80").memory).all()


def test_labels_move_nothing(data: Path, tmp_path: Path) -> None:
    """Labels are shuffled over the rows and measurements doubled: predictions stay, bit for bit."""
    rows = read_rows(data / "train_runs.csv")
    before = [p.predicted_s for p in validate(data / "train_runs.csv").predictions]
    draw = random.Random(0)
    for label in ("source", "title", "model", "family"):
        values = [row[label] for row in rows]
        draw.shuffle(values)
        for row, value in zip(rows, values, strict=True):
            row[label] = value
    for row in rows:
        row["step_time_s"] = str(2 * float(row["step_time_s"]))
    assert [p.predicted_s for p in validate(rewritten(tmp_path, rows)).predictions] == before


@pytest.mark.parametrize(
    ("cell", "value", "reason"),
    [
        ("hidden", "", "hidden is not given"),
        ("hidden", "many", "hidden is 'many', not a number"),
        ("tp", "0", "tp is 0, out of range"),
        ("device", "h1000", "did you mean h100"),
        ("precision", "fp4", "precision fp4: curves cover"),
        ("precision", "fp8", "has no such products"),
        ("recompute", "some", "recompute is 'some', not one of none, selective, full"),
        ("step_time_s", "", "step_time_s is not measured"),
    ],
)
def test_a_row_that_cannot_be_priced_is_skipped_and_said(
    data: Path, tmp_path: Path, cell: str, value: str, reason: str
) -> None:
    rows = read_rows(data / "train_runs.csv")[:3]
    rows[1][cell] = value
    report = validate(rewritten(tmp_path, rows))
    assert [p.row for p in report.predictions] == [1, 3]
    assert [skip.row for skip in report.skipped] == [2]
    assert reason in report.skipped[0].reason


def test_experts_are_refused(data: Path, tmp_path: Path) -> None:
    rows = [row | {"ep": "1"} for row in read_rows(data / "train_runs.csv")[:2]]
    rows[0]["ep"] = "8"
    assert "mixture of experts" in validate(rewritten(tmp_path, rows)).skipped[0].reason


def test_a_framework_nobody_described_is_the_generic_one(data: Path, tmp_path: Path) -> None:
    rows = [row | {"framework": "never-heard-of"} for row in read_rows(data / "train_runs.csv")]
    report = validate(rewritten(tmp_path, rows))
    assert report.rows == 425
    assert report.median_abs_error < 0.15


def test_nothing_to_price(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("device,step_time_s\nh100,1\n")
    with pytest.raises(UsageError, match="none can be priced"):
        validate(path)
    path.write_text("a;b\n1;2\n")
    with pytest.raises(UsageError, match="rows=1: none can be priced; no row has step_time_s"):
        validate(path)
    path.write_text("device\n")
    with pytest.raises(FileError, match="no rows"):
        validate(path)


@pytest.mark.parametrize(("picture", "said"), [("no/such/x.png", "no such directory"), ("x.gif", "as .svg or .png")])
def test_a_picture_that_cannot_be_written_is_refused(data: Path, picture: str, said: str) -> None:
    done = CliRunner().invoke(app, ["validate", str(data / "train_runs.csv"), "--png", picture])
    assert isinstance(done.exception, UsageError)
    assert str(done.exception).startswith(f"png={picture}: ")
    assert said in str(done.exception)


def test_the_command(data: Path, tmp_path: Path) -> None:
    png = tmp_path / "scatter.png"
    done = CliRunner().invoke(app, ["validate", str(data / "train_runs.csv"), "--json", "--png", str(png)])
    said = json.loads(done.stdout)
    assert {"rows", "median_abs_error", "mean_abs_error", "bias", "within_10", "within_20"} <= set(said)
    assert {row["name"] for row in said["families"]} >= {"bloom", "foundry"}
    assert said["skipped"] == []
    assert png.read_bytes().startswith(b"\x89PNG")
    shown = CliRunner().invoke(app, ["validate", str(data / "train_runs.csv")])
    assert "step time: 425 rows, median" in shown.stdout
