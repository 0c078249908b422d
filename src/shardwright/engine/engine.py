"""`Engine`: one rank's part of serving requests. Every rank runs one, in step."""

from typing import TYPE_CHECKING, final

import torch

from shardwright.engine.request import NewToken, Request, Sequence
from shardwright.engine.sampler import greedy, sample
from shardwright.engine.scheduler import Chunk, Scheduler
from shardwright.layers.batch import Batch
from shardwright.layers.kv import PagedKV
from shardwright.models.decoder import Decoder
from shardwright.models.execution import obstacle

if TYPE_CHECKING:
    from shardwright.models.compiled import CompiledStep

PAGE = 128
"""Tokens in a KV page: short texts fit one, and a single page is read in place."""


@final
class Engine:
    """Advances all requests together, one batch a step. All ranks add the same requests in the same order."""

    def __init__(self, model: Decoder, scheduler: Scheduler | None = None) -> None:
        self.model = model
        scaling = model.config.rope_scaling
        self.scheduler = scheduler or Scheduler(
            model.config.context, PAGE, restart=scaling.restart if scaling else None
        )
        page, heads = self.scheduler.page, model.cuts.heads.kv_width(model.group.rank)
        self.obstacle = obstacle(model)
        dtype = model.embedding.weight.dtype if self.obstacle else torch.float32
        self.kv = [PagedKV(page, heads, model.config.head_size, dtype) for _ in range(model.config.layers)]
        self.compiled = None if self.obstacle else _compiled_step(model, self.kv)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.scheduler.add(request)

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""
        return self.scheduler.busy

    @torch.inference_mode()
    def step(self) -> list[NewToken]:
        """Compute one batch; the new tokens, request by request: one of each, or several where decoding is compiled."""
        chunks = self.scheduler.schedule()
        if self.scheduler.pages_needed > self.kv[0].pages:
            for store in self.kv:
                store.grow(self.scheduler.pages_needed)
        tokens = self._next(chunks, [chunk.sequence for chunk in chunks if chunk.complete])
        self.model.group.end_step()
        return self.scheduler.commit(chunks, tokens)

    def _next(self, chunks: list[Chunk], complete: list[Sequence]) -> list[list[int]]:
        """Compute the chunks; the next tokens of each sequence that is complete in them."""
        if self.compiled and self.compiled.fits(len(chunks)) and all(c.complete and c.length == 1 for c in chunks):
            likeliest = greedy(complete)
            logits, found = self.compiled(
                [sequence.tokens[-1] for sequence in complete],
                [len(sequence.tokens) for sequence in complete],
                [sequence.pages for sequence in complete],
                min(map(self.scheduler.undecided, complete)) if likeliest else 1,
                {token for sequence in complete for token in sequence.request.stop},
            )
            if likeliest:
                return found
        else:
            logits = self.model(batch_of(chunks), self.kv)
        cut = self.model.cuts.vocabulary
        return [[token] for token in sample(logits, complete, cut, self.model.group)] if complete else []


def _compiled_step(model: Decoder, kv: list[PagedKV]) -> "CompiledStep":
    from shardwright.models.compiled import CompiledStep  # imports numba

    return CompiledStep(model, kv)


def batch_of(chunks: list[Chunk]) -> Batch:
    """The forward's input for these chunks: the rows that give logits are the last ones of complete sequences."""
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    for chunk in chunks:
        start, stop = chunk.sequence.computed, chunk.sequence.computed + chunk.length
        tokens += chunk.sequence.tokens[start:stop]
        positions += range(start, stop)
        if chunk.complete:
            rows.append(len(tokens) - 1)
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        lengths=tuple(chunk.length for chunk in chunks),
        held=tuple(chunk.sequence.computed + chunk.length for chunk in chunks),
        tables=tuple(tuple(chunk.sequence.pages) for chunk in chunks),
        rows=torch.tensor(rows, dtype=torch.int64),
        known=tuple(len(chunk.sequence.tokens) for chunk in chunks),
    )
