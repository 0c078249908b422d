"""How much of its speed does decoding keep when another process takes one of the two cores?

python benchmarks/crowded.py [--case SUBSTRING] [--peer alone] [--repeat N] [--json]

`alone`: the same ranks with both cores to themselves, in turn with the crowded runs.
"""

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import Case, Options, main

from shardwright import LLM, SamplingParams

PROMPT = "Tell me a long story about a dragon."


def rate(llm: LLM) -> float:
    """Tokens a second of one run."""
    llm.generate(PROMPT, SamplingParams(max_tokens=96))
    return llm.report.tokens_per_s


def cases(options: Options) -> Iterator[Case]:
    """A busy process is one that counts."""
    for tp in (1, 2, 3):
        if not options.wants(name := f"smollm2 fp32 TP {tp} beside a busy process"):
            continue
        runs: dict[str, list[float]] = {"ours": [], "alone": []}
        with LLM(tp=tp) as llm:
            rate(llm)
            for _ in range(options.repeat):
                runs["alone"].append(rate(llm))
                busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                runs["ours"].append(rate(llm))
                busy.kill()
                busy.wait()
        values = {side: statistics.median(rates) for side, rates in runs.items()}
        yield Case(name, "tokens/s", values).compare(smaller_is_better=False)


if __name__ == "__main__":
    main("crowded", __doc__.splitlines()[0], cases)
