"""The scatter plot is written, with its groups named."""

from pathlib import Path

from shardwright.charts.scatter import scatter


def test_scatter(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    scatter(path, [("some", 1.0, 1.1), ("others", 20.0, 18.0)], title="runs", unit="s")
    assert "others (1)" in path.read_text() or "<svg" in path.read_text()
