"""Greedy generation by vLLM on CPU, timed. Run by `peers.py`."""

import json
import os
import sys
import time

work = json.loads(sys.argv[1])
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0-1" if work["threads"] == 2 else "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    model = LLM(
        work["path"],
        dtype=work["dtype"],
        max_model_len=2048,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": work["prompt"]}] * work["sequences"]

    def seconds(tokens: int) -> float:
        """Of generating that many."""
        params = SamplingParams(temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        model.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    for _ in range(work["repeat"] + 1):
        print(json.dumps({"first_s": seconds(1), "all_s": seconds(work["tokens"])}), flush=True)
