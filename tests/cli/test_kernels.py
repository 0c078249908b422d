"""`shardwright kernels` as its users meet it: a process, its two streams, its exit code."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from shardwright.kernels.select import TABLE

SHARDWRIGHT = str(Path(sys.executable).with_name("shardwright"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [SHARDWRIGHT, "kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_the_table_has_a_line_for_every_row_and_its_reason() -> None:
    """In a table of 80 columns names stay whole, conditions and reasons wrap, and nothing is left out."""
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert [line[0] for line in cells if line[0]] == [row.kernel for row in TABLE]
    assert "comm_turn1ormore" in re.sub(r"\s", "", "".join(line[2] for line in cells))
    said = re.sub(r"\s", "", "".join(line[3] for line in cells))
    assert said == re.sub(r"\s", "", "".join(row.reason for row in TABLE))


def test_json_is_one_object_and_nothing_else() -> None:
    done = run("--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"kernels": [asdict(row) for row in TABLE]}


def test_help_shows_an_example() -> None:
    assert "shardwright kernels --json" in run("--help").stdout


def test_an_unknown_option_is_refused() -> None:
    done = run("--bogus")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "shardwright: No such option: --bogus; see shardwright kernels --help\n"
