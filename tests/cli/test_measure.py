"""`measure` keeps figures, `plan` and `--tp auto` use them; a cache that makes no sense is measured anew."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardwright.cli import measure
from shardwright.cli.main import app
from shardwright.errors import FileError
from shardwright.plan import work
from shardwright.plan.blocks import built_in
from shardwright.plan.memory import stage_parameters

ROW = {
    "rank": 0,
    "bandwidth": 15e9,
    "gemm": 1e11,
    "narrow_gemm": 1e11,
    "small_s": 1e-5,
    "piece_s": 2e-4,
    "paced_s": 2.1e-4,
    "large_s": 1e-3,
    "dealt_s": 4e-2,
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cores = len(os.sched_getaffinity(0))
    rows = {str(n): [{**ROW, "rank": rank} for rank in range(n)] for n in sorted({1, 2, cores})}
    path = measure.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"cores": cores, "memory": 16 << 30, "ranks": rows}))
    return path


def test_what_is_kept_is_shown(cache: Path) -> None:
    done = CliRunner().invoke(app, ["measure", "--show", "--json"])
    assert json.loads(done.stdout) == json.loads(cache.read_text())
    assert "15.0" in CliRunner().invoke(app, ["measure", "--show"]).stdout


def test_a_plan_without_a_cluster_is_for_this_machine(cache: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "smollm2-135m", "--json"])
    said = json.loads(done.stdout)
    assert said["cluster"] == "this machine"
    assert said["best"]["tp"] * said["best"]["pp"] * said["best"]["dp"] == len(os.sched_getaffinity(0))
    for software in ("shardwright", "generic"):
        other = CliRunner().invoke(app, ["plan", "smollm2-135m", "--json", "--software", software])
        assert (json.loads(other.stdout)["best"] == said["best"]) == (software == "shardwright")


@pytest.mark.parametrize("text", ["", "{}", '{"cores": 1000, "memory": 1, "ranks": {}}', "[1]"])
def test_a_cache_that_makes_no_sense_is_not_used(cache: Path, text: str) -> None:
    cache.write_text(text)
    assert measure.kept() is None
    assert isinstance(CliRunner().invoke(app, ["measure", "--show"]).exception, FileError)


def test_the_counts_reach_the_cores_and_one_beyond_few() -> None:
    assert measure.counts(1) == [1, 2]
    assert measure.counts(2) == [1, 2, 3]
    assert measure.counts(64) == [1, 2, 3, 4, 5, 6, 8, 16, 32, 64]


def test_tp_auto_runs_what_was_planned_and_says_how_it_went(cache: Path) -> None:
    """The cache says that two ranks are twice as fast as one."""
    command = [sys.executable, "-m", "shardwright", "generate", "--tp", "auto", "--max-tokens", "4", "--raw", "Hello"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    assert re.search(r"tp auto chose 2: predicted \d+\.\d tokens/s, measured \d+\.\d", done.stderr)


def test_bytes_of_weights_are_what_ranks_report() -> None:
    """Of the embedded model on three ranks, in float32: the planner's parameters of each rank's share, exactly."""
    command = [
        sys.executable,
        "-m",
        "shardwright",
        "generate",
        "--tp",
        "3",
        "--max-tokens",
        "1",
        "--raw",
        "--json",
        "A",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    blocks = built_in("smollm2-135m")[1]
    planned = stage_parameters(blocks, work.busiest(blocks, 3), 1, 0)[0]
    assert 4 * planned == max(rank["weight_bytes"] for rank in json.loads(done.stdout)["ranks"])


def test_it_measures_and_keeps(tmp_path: Path) -> None:
    """In a process of its own, which has imported torch and computed nothing."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "shardwright", "measure", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240, env=environment)
    said = json.loads(done.stdout)
    assert said == json.loads((tmp_path / "shardwright" / "machine.json").read_text())
    for n, rows in said["ranks"].items():
        assert [row["rank"] for row in rows] == list(range(int(n)))
