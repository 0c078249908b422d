"""The systems we are compared with, each run as a process of its own environment, at one and two threads.

Knows how each is started and where its model comes from; what it measures is in the `peer_*.py` script of its name, all
of which print the same JSON lines: `{"loaded": …}` once, then `{"first_s": …, "all_s": …}` for each repeat.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shardwright.models.embedded import embedded_model

HERE = Path(__file__).parent
PYTHON = {
    "transformers": HERE.parent / ".venv-peers" / "bin" / "python",
    "llama.cpp": HERE.parent / ".venv-peers" / "bin" / "python",
    "vllm": HERE.parent / ".venv-vllm" / "bin" / "python",
}
"""Environments built by `make bench-peers`."""

MODULE = {"transformers": "transformers", "llama.cpp": "llama_cpp", "vllm": "vllm"}
THREADS = (1, 2)
MODELS = ("smollm2", "qwen3-0.6b")


@dataclass(frozen=True)
class Work:
    """What a peer does. model: one of `MODELS` · dtype: by torch's name · prompt: token ids · tokens: to generate."""

    model: str
    dtype: str
    prompt: tuple[int, ...]
    tokens: int
    sequences: int = 1
    repeat: int = 3


@dataclass(frozen=True)
class Result:
    """Medians. start_s: process start to first token · first_s: request to first token · rate: tokens/s after it."""

    threads: int
    start_s: float
    first_s: float
    rate: float


@cache
def installed(peer: str) -> bool:
    """Whether a peer can be run; says on stderr if not."""
    python = PYTHON[peer]
    probe = [python, "-c", f"import {MODULE[peer]}"]
    found = python.exists() and subprocess.run(probe, capture_output=True).returncode == 0
    if not found:
        print(f"{peer}: not installed; run make bench-peers", file=sys.stderr)
    return found


def directory(model: str) -> Path:
    """A Hugging Face directory of a model, made once by transformers: the embedded one, or random weights."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardwright" / "benchmarks" / model
    if not (home / "config.json").exists():
        gguf = embedded_model()
        command = [PYTHON["transformers"], HERE / "make_model.py", model, home, gguf.parent, gguf.name]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return home


class PeerError(Exception):
    """A peer is installed, and does not run here."""


@cache
def measured(peer: str, work: Work, threads: int) -> Result:
    """One process of a peer."""
    path = embedded_model() if peer == "llama.cpp" else directory(work.model)
    name = peer.replace(".cpp", "")
    said = {"path": str(path), "dtype": work.dtype, "prompt": work.prompt, "tokens": work.tokens}
    said |= {"sequences": work.sequences, "repeat": work.repeat, "threads": threads}
    start = time.perf_counter()
    command = [PYTHON[peer], HERE / f"peer_{name}.py", json.dumps(said)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stdout=-1, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
        lines, start_s = [], 0.0
        for line in process.stdout:
            if line.startswith('{"first_s"'):
                start_s = start_s or time.perf_counter() - start - json.loads(line)["all_s"]
                lines.append(json.loads(line))
    if process.returncode or len(lines) != work.repeat + 1:
        raise PeerError(
            f"{peer} failed with code {process.returncode}; run {' '.join(map(str, command[:2]))} to see why"
        )
    first = statistics.median(line["first_s"] for line in lines[1:])
    rates = [(work.tokens - 1) * work.sequences / (line["all_s"] - line["first_s"]) for line in lines[1:]]
    return Result(threads, start_s + lines[0]["first_s"], first, statistics.median(rates))


def best(peer: str, work: Work, key: str = "rate") -> float | None:
    """The better figure of one and two threads (rate: larger, seconds: smaller); None: it is not there, or fails."""
    if not installed(peer) or (peer == "llama.cpp" and (work.model != "smollm2" or work.sequences > 1)):
        return None
    try:
        found = {threads: getattr(measured(peer, work, threads), key) for threads in THREADS}
    except PeerError as error:
        print(error, file=sys.stderr)
        return None
    shown = ", ".join(f"{value:.4g} with {threads} thread(s)" for threads, value in found.items())
    print(f"{peer} {work.model} {work.dtype} {key}: {shown}", file=sys.stderr)
    return max(found.values()) if key == "rate" else min(found.values())
