"""`shardwright train`, `reshard` and `export` as a user runs them: figures, resuming, one line for what is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = """
[model.config]
architectures = ["Qwen3ForCausalLM"]
hidden_size = 20
intermediate_size = 22
num_hidden_layers = 2
num_attention_heads = 6
num_key_value_heads = 2
head_dim = 4
max_position_embeddings = 64
tie_word_embeddings = true

[data]
paths = ["text.txt"]
tokenizer = 280
sequence = 16

[train]
steps = 6
batch = 4

[optimizer]
lr = 1e-2

[parallel]
tensor = 3

[output]
directory = "run"
save_every = 3
log_every = 3
sample_every = 0
sample_prompt = "one two"
sample_tokens = 4
"""


def shardwright(*arguments: object, home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardwright", *map(str, arguments)]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=240, env={**os.environ})


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 60)
    return tmp_path


def test_a_run_prints_saves_resumes_and_exports(home: Path) -> None:
    done = shardwright("train", "recipe.toml", home=home)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" · ")[0] for line in lines if line.startswith("step 6/6 · loss")] == ["step 6/6"]
    assert any(line.startswith("checkpoint of step 6 written in") for line in lines)
    progress = next(line for line in lines if line.startswith("step 3/6"))
    for part in ("loss", "tokens/s", "in communication", "MB at most by rank"):
        assert part in progress
    again = shardwright("train", "recipe.toml", "--json", home=home)
    assert json.loads(again.stdout) == {"resumed": 6}
    cut = shardwright("reshard", "run", "cut", "--tp", 2, "--json", home=home)
    assert json.loads(cut.stdout)["files"] == 2
    out = shardwright("export", "run", "out", home=home)
    assert out.returncode == 0, out.stderr
    told = shardwright("generate", "one two", "--raw", "--model", "out", "--tp", 2, "--max-tokens", 4, home=home)
    assert told.returncode == 0, told.stderr


@pytest.mark.long
def test_samples_are_generated_by_the_engine(home: Path) -> None:
    """Long: the compiled decode step may have to be compiled first."""
    (home / "recipe.toml").write_text(RECIPE.replace("sample_every = 0", "sample_every = 6"))
    done = shardwright("train", "recipe.toml", home=home)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("sample after step 6: one two") for line in done.stdout.splitlines())


def test_a_dry_run_and_the_schema_train_nothing(home: Path) -> None:
    done = shardwright("train", "recipe.toml", "--dry-run", "--json", home=home)
    found = json.loads(done.stdout)
    assert len(found["ranks"]) == 3
    assert {row["axis"] for row in found["traffic"]} == {"tensor"}
    schema = json.loads(shardwright("train", "--schema", home=home).stdout)
    assert schema["additionalProperties"] is False
    assert not (home / "run").exists()


RATES = {"bandwidth": 15e9, "gemm": 1e11, "narrow_gemm": 1e11}
ROW = {**RATES, "small_s": 1e-5, "piece_s": 2e-4, "paced_s": 2.1e-4, "large_s": 1e-3}


def test_tp_auto_trains_as_planned_and_says_how_it_went(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache says that a second core is as fast as the first and that sums cost little."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    cores = len(os.sched_getaffinity(0))
    rows = {str(n): [{**ROW, "dealt_s": 4e-2, "rank": rank} for rank in range(n)] for n in sorted({1, 2, cores})}
    (home / "cache" / "shardwright").mkdir(parents=True)
    said = json.dumps({"cores": cores, "memory": 16 << 30, "ranks": rows})
    (home / "cache" / "shardwright" / "machine.json").write_text(said)
    planned = json.loads(shardwright("train", "recipe.toml", "--tp", "auto", "--dry-run", "--json", home=home).stdout)
    done = shardwright("train", "recipe.toml", "--tp", "auto", home=home)
    assert done.returncode == 0, done.stderr
    form = r"tp auto chose tp (\d) dp (\d): predicted \d+ tokens/s, measured \d+ \([+-]\d+%\); predicted at .*"
    told = re.fullmatch(form, done.stderr.splitlines()[-1])
    assert told is not None, done.stderr
    assert int(told[1]) * int(told[2]) == len(planned["ranks"]) > 1
    assert planned["predicted_activations"] > 0


def test_tp_overrides_the_recipe(home: Path) -> None:
    done = shardwright("train", "recipe.toml", "--tp", 2, "--dry-run", "--json", home=home)
    assert len(json.loads(done.stdout)["ranks"]) == 2
    for wrong, said in (("some", "it is a number of ranks, or auto"), (0, "parallel.tensor=0")):
        done = shardwright("train", "recipe.toml", "--tp", wrong, "--dry-run", home=home)
        assert done.returncode == 2
        assert said in done.stderr


@pytest.mark.parametrize(("old", "new", "code", "message"), [
    ("steps = 6", "stepz = 6", 2, "shardwright: train.stepz=6: there is no such key; see shardwright train --schema"),
    ("tensor = 3", "tensor = 3\npipeline = 2", 2, "shardwright: parallel.pipeline=2: only one stage is trained so far"),
    ("text.txt", "gone.txt", 3, "gone.txt: there is no such file or directory; check data.paths"),
    ("sequence = 16", "sequence = 99", 2, "shardwright: data.sequence=99: the model's context is 64 tokens"),
    ('"run"', '"text.txt"', 3, "text.txt: it cannot be written: File exists; free space, or use another output.dir"),
    ("tokenizer = 280", "tokenizer = 3", 2, "shardwright: data.tokenizer=3: every byte is a word, and so is the end"),
    ("Qwen3For", "QwenXFor", 4, "architecture 'QwenXForCausalLM' is not supported"),
])  # fmt: skip
def test_what_is_wrong_is_one_line_from_one_rank(home: Path, old: str, new: str, code: int, message: str) -> None:
    (home / "recipe.toml").write_text(RECIPE.replace(old, new))
    done = shardwright("train", "recipe.toml", home=home)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
    assert subprocess.run(["pgrep", "-f", str(home)], capture_output=True).returncode == 1


def started(home: Path) -> "subprocess.Popen[str]":
    """A run of so many steps that it does not end by itself, after its first ones."""
    (home / "recipe.toml").write_text(
        RECIPE.replace("steps = 6", "steps = 100000") + "[guard]\nprogress_timeout = 1.5\n"
    )
    command = [sys.executable, "-m", "shardwright", "train", "recipe.toml"]
    process = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 9/"):
            break
    return process


def ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_rank_that_stops_is_named_when_the_recipes_patience_ends(home: Path) -> None:
    process = started(home)
    ranks = ranks_of(process)
    stopped = ranks[1]
    os.kill(stopped, signal.SIGSTOP)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 5, said
    assert f"shardwright: rank 1 (pid {stopped}) is stopped and has not entered" in said.splitlines()[-1]
    assert "for 1.5 s, the progress timeout" in said.splitlines()[-1]
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.parametrize(("signalled", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_at_once_without_a_word_and_goes_on_later(
    home: Path, signalled: signal.Signals, code: int
) -> None:
    """Within two seconds, as an idle one; what is resumed is the newest checkpoint."""
    process = started(home)
    ranks, at = ranks_of(process), time.monotonic()
    process.send_signal(signalled)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - at < 2
    assert (process.returncode, said) == (code, "")
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    (home / "recipe.toml").write_text(RECIPE.replace("steps = 6", "steps = 7"))
    newest = max(path.name for path in (home / "run" / "checkpoints").iterdir() if (path / "manifest.json").exists())
    assert int(newest.removeprefix("step-")) >= 6
    done = shardwright("train", "recipe.toml", home=home)
    assert done.stdout.splitlines()[0] == f"resumed after step {int(newest.removeprefix('step-'))}"
