"""How long from the start of a process to its first token, and how much memory does a rank take beyond its shard?

python benchmarks/load.py [--case SUBSTRING] [--peer transformers|vllm|llama.cpp] [--repeat N] [--json]

`cached`: the files lie in the page cache. `cold`: the model's and the compiled libraries' pages are dropped before each
run. Memory is the largest resident set of any rank less the bytes of its weights.
"""

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import peers
from harness import Case, Options, main

from shardwright.models.embedded import embedded_model

PROMPT = "What is the capital of France?"
SHARDWRIGHT = Path(sys.executable).with_name("shardwright")
RANKS = (1, 2)


def command(tp: int) -> list[str]:
    """A user's own."""
    return [str(SHARDWRIGHT), "generate", "--tp", str(tp), "--max-tokens", "4"]


def seconds_to_first_token(tp: int) -> float:
    """From starting the process to the first character of its answer."""
    start = time.perf_counter()
    with subprocess.Popen([*command(tp), PROMPT], stdout=-1, stderr=subprocess.DEVNULL) as process:
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def drop_from_cache() -> None:
    """Let go of the model's pages, and of those of the compiled libraries that no running process has mapped."""
    libraries = Path(sysconfig.get_path("purelib")).rglob("*.so*")
    for path in [embedded_model(), *libraries]:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def beyond_shard(tp: int) -> float:
    """Megabytes."""
    done = subprocess.run([*command(tp), "--json", PROMPT], capture_output=True, text=True, check=True)
    return max(rank["peak_rss"] - rank["weight_bytes"] for rank in json.loads(done.stdout)["ranks"]) / 1e6


def cases(options: Options) -> Iterator[Case]:
    """One run of each goes unmeasured."""
    for tp in RANKS:
        if options.wants(name := f"smollm2 TP {tp} cached"):
            seconds_to_first_token(tp)
            case = Case(
                name, "s", {"ours": statistics.median(seconds_to_first_token(tp) for _ in range(options.repeat))}
            )
            for peer in peers.PYTHON:
                work = peers.Work("smollm2", "float32", tuple(range(20, 57)), 4, repeat=1)
                if options.wants_peer(peer) and (found := peers.best(peer, work, "start_s")):
                    case.values[peer] = found
            yield case.compare(smaller_is_better=True)
        if options.wants(name := f"smollm2 TP {tp} cold"):
            seconds = []
            for _ in range(options.repeat):
                drop_from_cache()
                seconds.append(seconds_to_first_token(tp))
            yield Case(name, "s", {"ours": statistics.median(seconds)})
        if options.wants(name := f"smollm2 TP {tp} memory beyond shard"):
            yield Case(name, "MB", {"ours": statistics.median(beyond_shard(tp) for _ in range(options.repeat))})


if __name__ == "__main__":
    main("load", __doc__.splitlines()[0], cases)
