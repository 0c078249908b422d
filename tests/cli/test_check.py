"""`shardwright check` and `shardwright explain`: what they print, how fast, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.processor_time import processor_seconds

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from shardwright.cli.main import main; main()"
COMMAND = (sys.executable, "-c", WITHOUT_TORCH)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process that cannot import torch."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)


def parsed(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_check_answers_within_a_second() -> None:
    """In processor time; the largest config shipped."""
    largest = ("check", "--model", str(CONFIGS / "llama-3.1-405b.json"))
    assert "supported: yes · family llama · 405,853,388,800 parameters" in run(*largest).stdout
    assert processor_seconds([*COMMAND, *largest], promised=1) < 1


def test_check_of_the_embedded_model() -> None:
    found = parsed("check")
    assert (found["supported"], found["family"], found["quantisation_group"]) == (True, "llama", 32)
    assert [degree["tp"] for degree in found["degrees"]] == list(range(1, 17))
    two = found["degrees"][1]
    assert [rank["query_heads"] for rank in two["ranks"]] == [5, 4]
    assert two["shared_kv_heads"] == {"1": [0, 1]}
    assert two["quantised"]["same"]


def test_check_says_what_is_not_supported(tmp_path: Path) -> None:
    """Exit code 4 in both forms; with --json the reason is in the object."""
    (tmp_path / "mamba.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    path = str(tmp_path / "mamba.json")
    plain, structured = run("check", "--model", path), run("check", "--model", path, "--json")
    assert (plain.returncode, structured.returncode) == (4, 4)
    assert "architecture 'MambaForCausalLM' is not supported; supported are FalconForCausalLM, GPT2" in plain.stderr
    found = json.loads(structured.stdout)
    assert not found["supported"]
    assert "MambaForCausalLM" in found["reason"]


def test_check_says_where_torch_decodes() -> None:
    assert parsed("check", "--model", str(CONFIGS / "qwen2.5-72b.json"))["decoded_by_torch_because"] is None


def test_explain_shows_a_shared_head(tmp_path: Path) -> None:
    """The middle one of 3 KV heads at TP 2: in the table, in the terminal's picture, and in the file."""
    svg = tmp_path / "k.svg"
    done = run("explain", "--tp", "2", "--tensor", "blk.7.attn_k.weight", "--svg", str(svg))
    assert done.returncode == 0, done.stderr
    assert "blk.7.attn_k.weight [192, 576], cut along dim 0" in done.stdout
    assert f"[{'0' * 16}{'*' * 16}{'1' * 16}]" in done.stdout
    assert svg.read_text().startswith("<?xml")


def test_explain_as_json_lists_both_ends_and_a_layer() -> None:
    found = parsed("explain", "--tp", "3", "--model", str(CONFIGS / "qwen1.5-72b.json"))
    names = [tensor["tensor"] for tensor in found["tensors"]]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"} <= set(names)
    assert not [name for name in names if "layers.1." in name]
    assert (found["tp"], found["layers"], found["layer_shown"]) == (3, 80, 0)
    down = next(t for t in found["tensors"] if t["tensor"].endswith("down_proj.weight"))
    assert [piece["ranges"][1] for piece in down["slices"]] == [[[0, 8192]], [[8192, 16384]], [[16384, 24576]]]


@pytest.mark.parametrize(("arguments", "words"), [
    (("--tp", "0"), "tp=0: tensor parallelism needs at least one rank"),
    (("--tp", "2", "--tensor", "blk.0.attn_z.weight"), "the model has none of that name; did you mean blk.0.attn_"),
    (("--tp", "2", "--tensor", "blk.77.attn_k.weight"), "tensor=blk.77.attn_k.weight: the model has 30 layers"),
    (("--tp", "2", "--svg", "picture.gif"), "svg=picture.gif: it is written as .svg or .png"),
    (("--tp", "2", "--svg", "no/such/x.svg"), "svg=no/such/x.svg: there is no such directory"),
])  # fmt: skip
def test_explain_refuses(arguments: tuple[str, ...], words: str) -> None:
    done = run("explain", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
