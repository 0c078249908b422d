"""Bars, the frontier and the page: what they are given is in what they write, and nothing is loaded."""

from io import BytesIO
from pathlib import Path

from shardwright.charts.bars import bars
from shardwright.charts.frontier import frontier
from shardwright.charts.page import Page


def test_bars_are_png_in_a_file_and_svg_in_a_stream(tmp_path: Path) -> None:
    rows = [("stage 0", {"weights": 3.0, "activations": 5.0}), ("stage 1", {"weights": 2.0})]
    bars(tmp_path / "bars.png", rows, title="memory", unit="GiB", limit=6.0)
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    stream = BytesIO()
    bars(stream, rows, title="memory", unit="GiB")
    assert b"<svg" in stream.getvalue()


def test_the_frontier_takes_shapes_that_are_not_possible(tmp_path: Path) -> None:
    points = [("tp8", 40.0, 900.0, True), ("tp1", 140.0, 60.0, False)]
    frontier(tmp_path / "frontier.png", points, title="shapes", limit=64.0)
    frontier(tmp_path / "none.png", points[1:], title="shapes", limit=64.0)
    assert (tmp_path / "none.png").stat().st_size > 1000


def test_a_page_is_one_file_that_loads_nothing_and_escapes_what_it_is_told(tmp_path: Path) -> None:
    page = Page("a <plan>")
    page.text("5 < 6 & so on")
    page.table(("layout", "why"), [("tp<2>", 3)])
    page.picture("memory", lambda stream: bars(stream, [("one", {"a": 1.0})], title="t", unit="s"))
    page.write(tmp_path / "page.html")
    said = (tmp_path / "page.html").read_text("utf-8")
    assert "a &lt;plan&gt;" in said
    assert "tp&lt;2&gt;" in said
    assert "5 &lt; 6 &amp; so on" in said
    assert said.count("<svg") == 1
    assert "<script" not in said
    assert 'src="http' not in said
