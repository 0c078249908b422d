"""How many tokens a second does greedy decoding give, and how near is that to the memory's own speed?

python benchmarks/decode.py [--case SUBSTRING] [--peer transformers|vllm|llama.cpp|limit] [--repeat N] [--json]

`limit`: two-process read bandwidth over the bytes of weights that the ranks read for a token (a tied table once), read
in turn with our runs, as it moves by the minute. llama.cpp runs the same file at its own 4 bits.
"""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import peers
from harness import Bandwidth, Case, Options, main

from shardwright import LLM, SamplingParams
from shardwright.models.embedded import embedded_model

TOKENS = 96
PROMPT = "Tell me a long story about a dragon."
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Subject:
    """A case: what is run how. prefill: tokens of the prompt, where reading it is what is measured."""

    model: str
    short: str
    tp: int
    sequences: int = 1
    prefill: int = 0

    def __str__(self) -> str:
        what = f" {self.sequences} sequences" if self.sequences > 1 else f" prefill {self.prefill}" * bool(self.prefill)
        return f"{self.model} {self.short} TP {self.tp}{what}"


CASES = [
    *(Subject("smollm2", dtype, tp) for dtype in DTYPES for tp in (1, 2, 3, 8)),
    *(Subject("qwen3-0.6b", dtype, tp) for dtype in DTYPES for tp in (1, 2)),
    Subject("smollm2", "fp32", 2, sequences=16),
    Subject("smollm2", "fp32", 2, prefill=512),
]


def ours(llm: LLM, subject: Subject, prompt: list[int]) -> float:
    """Tokens a second of one run: after each sequence's first, or of the prompt."""
    llm.generate([prompt] * subject.sequences, SamplingParams(max_tokens=2 if subject.prefill else TOKENS))
    return len(prompt) / llm.report.ttft_s if subject.prefill else llm.report.tokens_per_s


def theirs(peer: str, subject: Subject, prompt: list[int], repeat: int) -> float | None:
    """The same of a peer."""
    tokens = 8 if subject.prefill else TOKENS
    work = peers.Work(subject.model, DTYPES[subject.short], tuple(prompt), tokens, subject.sequences, repeat)
    found = peers.best(peer, work, "first_s" if subject.prefill else "rate")
    return len(prompt) / found if found and subject.prefill else found


def cases(options: Options) -> Iterator[Case]:
    """Our ranks live as long as their case; before each of their runs the bandwidth is read."""
    with Bandwidth(2) as bandwidth:
        for subject in CASES:
            if not options.wants(str(subject)) or not (subject.model == "smollm2" or peers.installed("transformers")):
                continue  # transformers makes the other model
            path = embedded_model() if subject.model == "smollm2" else peers.directory(subject.model)
            with LLM(path, tp=subject.tp, dtype=DTYPES[subject.short]) as llm:
                prompt = llm.source.encode(PROMPT, raw=False)
                prompt = (prompt * subject.prefill)[: subject.prefill] if subject.prefill else prompt
                ours(llm, subject, prompt)
                runs = [(bandwidth.read(), ours(llm, subject, prompt)) for _ in range(options.repeat)]
                held = sum(rank.weight_bytes for rank in llm.report.ranks)
            values = {"ours": statistics.median(rate for _, rate in runs)}
            if options.wants_peer("limit") and subject.sequences == 1 and not subject.prefill:
                values["limit"] = statistics.median(rate for rate, _ in runs) / held
            for peer in peers.PYTHON:
                if options.wants_peer(peer) and (found := theirs(peer, subject, prompt, options.repeat)):
                    values[peer] = found
            yield Case(str(subject), "tokens/s", values).compare(smaller_is_better=False)


if __name__ == "__main__":
    main("decode", __doc__.splitlines()[0], cases)
