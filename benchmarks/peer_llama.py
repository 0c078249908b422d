"""Greedy generation by llama.cpp of a GGUF file at its own 4 bits, timed. Run by `peers.py`."""

import json
import sys
import time

from llama_cpp import Llama

work = json.loads(sys.argv[1])
model = Llama(
    work["path"], n_threads=work["threads"], n_threads_batch=work["threads"], n_ctx=2048, n_batch=512, verbose=False
)


def seconds(tokens: int) -> float:
    """Of generating that many."""
    model.reset()
    start = time.perf_counter()
    for count, _ in enumerate(model.generate(work["prompt"], temp=0.0, reset=True), start=1):
        if count == tokens:
            break
    return time.perf_counter() - start


for _ in range(work["repeat"] + 1):
    print(json.dumps({"first_s": seconds(1), "all_s": seconds(work["tokens"])}), flush=True)
