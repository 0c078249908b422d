"""Runs killed at random steps and at every syscall of a save: what is found afterwards goes on as if nothing was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.cli.test_train import RECIPE

from shardwright.train.metrics import read

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}", "OMP_NUM_THREADS": "1"}


@pytest.mark.system
@pytest.mark.parametrize("syscall", ["write", "fsync", "rename", "unlink", "mkdir", "openat"])
def test_a_kill_at_every_syscall_of_a_save_leaves_a_complete_checkpoint(tmp_path: Path, syscall: str) -> None:
    """Strace kills at the first, the second, … call, until a save ends without one."""
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), str(tmp_path), syscall]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["killed"] for each in rounds] == [True] * (len(rounds) - 1) + [False]
    assert len(rounds) > 1 or syscall == "unlink", "strace must have killed at least once"
    for each in rounds:
        assert each["complete"], each
        assert not each["wrong"], each
    assert rounds[-1]["complete"] == ["step-00000002"]


def losses_of(home: Path) -> list[float]:
    return [line["loss"] for line in read(home / "run" / "metrics.jsonl") if "loss" in line]


def started(home: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "shardwright", "train", "recipe.toml"]
    return subprocess.Popen(
        command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )


@pytest.mark.system
@pytest.mark.parametrize("parallel", ["tensor = 2", "tensor = 2\ndata = 2"], ids=["2", "2x2"])
def test_runs_killed_at_random_steps_have_the_losses_of_one_that_was_not(tmp_path: Path, parallel: str) -> None:
    """Ten kills of the launcher, each at a random moment some steps after the last; twenty with both meshes. Over
    shared memory, which sums in rank order, so bit for bit.
    """
    recipe = RECIPE.replace("tensor = 3", parallel)
    for key, old, new in (("steps", 6, 90), ("save_every", 3, 2), ("log_every", 3, 1)):
        recipe = recipe.replace(f"{key} = {old}", f"{key} = {new}")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").write_text(recipe)
        (tmp_path / name / "text.txt").write_text("one two three four five six seven eight nine ten " * 60)
    assert started(tmp_path / "whole").wait(120) == 0
    generator = random.Random(7)
    for _ in range(10):
        killed_after(tmp_path / "killed", generator.randint(2, 8), generator.random() * 0.03)
    assert started(tmp_path / "killed").wait(120) == 0
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    assert len(losses_of(tmp_path / "whole")) == 90


def killed_after(home: Path, steps: int, seconds: float) -> None:
    """Run until so many steps are reported, and so long into the next."""
    with started(home) as process:
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            seen += line.startswith("step ") and "loss" in line
            if seen == steps:
                break
        time.sleep(seconds)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
