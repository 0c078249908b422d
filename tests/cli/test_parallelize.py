"""`shardwright parallelize`: a plan from a config alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.parallelize.zoo import build


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardwright", "parallelize", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build("llama")[0].config.save_pretrained(path)
    return path


def test_the_plan_of_a_directory_as_one_object(llama: Path) -> None:
    """Two ranks of a model of which there is only a config: no weight is read, nothing runs."""
    done = run("--model", str(llama), "--tp", "2", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["ranks"] == 2
    assert plan["runs"] == "modules"
    assert len(plan["moves"]) == 5


def test_wrong_arguments_are_named(llama: Path, tmp_path: Path) -> None:
    assert "tp=0" in run("--model", str(llama), "--tp", "0").stderr
    missing = run("--model", str(tmp_path), "--tp", "2")
    assert (missing.returncode, "no config.json" in missing.stderr) == (3, True)
