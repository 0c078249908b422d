"""Greedy generation by transformers, timed. Run by `peers.py`."""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

work = json.loads(sys.argv[1])
torch.set_num_threads(work["threads"])
model = AutoModelForCausalLM.from_pretrained(work["path"], dtype=getattr(torch, work["dtype"]))
ids = torch.tensor([work["prompt"]] * work["sequences"])


def seconds(tokens: int) -> float:
    """Of generating that many."""
    start = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )
    return time.perf_counter() - start


for _ in range(work["repeat"] + 1):
    print(json.dumps({"first_s": seconds(1), "all_s": seconds(work["tokens"])}), flush=True)
