"""How many tokens a second does greedy decoding of one sequence give, and how near is that to the memory's own speed?

python benchmarks/decode.py [--case SUBSTRING] [--peer transformers|limit] [--repeat N] [--json]

`limit` is the two-process read bandwidth measured in this run over the bytes of weights that the ranks read for a token
(a tied table once). Cases are `MODEL DTYPE TP N`.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import PEERS, Case, Options, main, read_bandwidth

from shardwright import LLM, SamplingParams
from shardwright.models.embedded import embedded_model

TOKENS = 96
PROMPT = "Tell me a long story about a dragon."
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
CASES = [("smollm2", dtype, tp) for dtype in DTYPES for tp in (1, 2, 3)]

TRANSFORMERS = """
import sys, time, torch
from transformers import AutoModelForCausalLM
path, file, dtype, threads, tokens, repeat, *prompt = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype=getattr(torch, dtype))
ids = torch.tensor([list(map(int, prompt))])
for _ in range(int(repeat) + 1):
    marks = []
    class Clock:
        def put(self, value): marks.append(time.perf_counter())
        def end(self): pass
    model.generate(ids, max_new_tokens=int(tokens), min_new_tokens=int(tokens), do_sample=False, streamer=Clock())
    print((len(marks) - 2) / (marks[-1] - marks[1]), flush=True)
"""


def ours(llm: LLM, repeat: int) -> list[float]:
    """Tokens a second after the first token, of each run; one more run goes before them."""
    rates = []
    for _ in range(repeat + 1):
        llm.generate(PROMPT, SamplingParams(max_tokens=TOKENS))
        rates.append(llm.report.tokens_per_s)
    return rates[1:]


def transformers(dtype: str, prompt: list[int], repeat: int) -> float | None:
    """The same by transformers, the better of one and two threads; None where it is not installed."""
    if not PEERS.exists():
        print("transformers: not installed; run make bench-peers", file=sys.stderr)
        return None
    path, best = embedded_model(), 0.0
    for threads in (1, 2):
        arguments = [str(path.parent), path.name, dtype, str(threads), str(TOKENS), str(repeat), *map(str, prompt)]
        done = subprocess.run([PEERS, "-c", TRANSFORMERS, *arguments], capture_output=True, text=True, check=True)
        rate = statistics.median(list(map(float, done.stdout.split()))[1:])
        print(f"transformers {dtype}: {rate:.1f} tokens/s with {threads} thread(s)", file=sys.stderr)
        best = max(best, rate)
    return best


def cases(options: Options, bandwidth: Callable[[], float]) -> Iterator[Case]:
    """Our ranks live as long as their case; the bandwidth is read before and after."""
    peers: dict[str, float | None] = {}
    for model, short, tp in CASES:
        name, dtype = f"{model} {short} TP {tp}", DTYPES[short]
        if not options.wants(name):
            continue
        before = bandwidth()
        with LLM(tp=tp, dtype=dtype) as llm:
            values = {"ours": statistics.median(ours(llm, options.repeat))}
            prompt = llm.source.encode(PROMPT, raw=False)
            held = sum(rank.weight_bytes for rank in llm.report.ranks)
        if options.wants_peer("limit"):
            values["limit"] = max(before, bandwidth()) * 1e9 / held
        if options.wants_peer("transformers"):
            if dtype not in peers:
                peers[dtype] = transformers(dtype, prompt, options.repeat)
            if peers[dtype]:
                values["transformers"] = peers[dtype]
        yield Case(name, "tokens/s", values).compare(smaller_is_better=False)


if __name__ == "__main__":
    question = __doc__.splitlines()[0]
    ceilings = {"read_gb_s_2": round(read_bandwidth(2), 1)}
    main("decode", question, ceilings, lambda options: cases(options, lambda: read_bandwidth(2)))
