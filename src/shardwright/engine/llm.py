"""`LLM`: the whole of it from Python. The ranks run in processes of their own, whatever this one has done before."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self, cast, final

from shardwright.comm.spawn import SpawnedJob
from shardwright.engine.request import Finish, Request, SamplingParams
from shardwright.engine.session import RunReport, Session
from shardwright.engine.source import ModelSource
from shardwright.errors import UsageError
from shardwright.models.embedded import embedded_model

Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclass(frozen=True)
class Completion:
    """One prompt's continuation. token_ids: the generated ones, a stop token included · finish: `stop`, `length`, or
    `nan`: the model gave no numbers behind the last of them, and the prompt ends there; others of its batch do not.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish: Finish


@final
class LLM:
    """A model split over `tp` CPU ranks of this host.

    model: a Hugging Face directory or a GGUF file, by default the embedded model · dtype: `float32` or `bfloat16`; by
    default float32 for GGUF and the file's own for safetensors. Close it, or use it as a context manager. Threads may
    share it: their calls take turns.

    >>> with LLM(tp=2) as llm:
    ...     print(llm.generate(["What is the capital of France?"])[0].text)
    """

    def __init__(self, model: Path | str | None = None, *, tp: int = 1, dtype: str | None = None) -> None:
        self.source = ModelSource.open(embedded_model() if model is None else model)
        started = time.monotonic()
        with ExitStack() as stack:
            job = stack.enter_context(SpawnedJob(tp, "shardwright.engine.worker:serve", [str(self.source.path), dtype]))
            self._session = Session(job, tp, started)
            self._turn = Lock()
            self._ranks = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ranks.__exit__(kind, error, at)

    def close(self) -> None:
        """End the ranks; a second call does nothing."""
        self._ranks.close()

    @property
    def report(self) -> RunReport:
        """The figures of the last `generate`."""
        return self._session.report

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, *, raw: bool = False
    ) -> list[Completion]:
        """Continue all prompts in one batch, in their order.

        raw: without the chat template; what the tokenizer adds by itself is added. A call that is interrupted leaves
        its answers to the ranks, which finish them before those of the next call.

        Raises:
            UsageError: a prompt is empty, too long, or neither text nor token ids; params is no SamplingParams.
            RankError: a rank raised or died; this object is then closed. Or it was before.
        """
        single = isinstance(prompts, str | bytes) or (
            isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], int)
        )
        batch = cast("list[Prompt]", [prompts] if single else list(prompts))
        if not isinstance(params, SamplingParams | None):
            raise UsageError(
                "params", repr(params)[:60], "they are a SamplingParams", "pass SamplingParams(max_tokens=64)"
            )
        stop = tuple(sorted(self.source.tokenizer.stop_ids))
        requests = [
            Request(number=number, tokens=tuple(ids), params=params or SamplingParams(), stop=stop)
            for number, ids in enumerate(self.source.encode_all(batch, raw=raw))
        ]
        generated: list[list[int]] = [[] for _ in requests]
        finishes: dict[int, Finish] = {}
        with self._turn:
            for new in self._session.run(requests):
                if new.finish != "nan":
                    generated[new.number].append(new.token)
                if new.finish:
                    finishes[new.number] = new.finish
        decode = self.source.tokenizer.decode
        return [
            Completion(decode(generated[r.number]), generated[r.number], list(r.tokens), finishes[r.number])
            for r in requests
        ]
