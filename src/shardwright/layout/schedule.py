"""Pipeline schedules as data: for each rank the list of what it computes, in order.

Decides the order alone. The runtime executes these lists and the planner counts on them; neither times nor tensors are
known here. A virtual stage v lies on rank v % R; without interleaving there is one a rank.
"""

from dataclasses import dataclass
from typing import Literal

from shardwright.errors import UsageError

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Action:
    """One micro-batch through one virtual stage, one way."""

    stage: int
    micro_batch: int
    direction: Direction


Schedule = tuple[tuple[Action, ...], ...]
"""Each rank's actions, in its order."""


def one_forward_one_backward(ranks: int, micro_batches: int) -> Schedule:
    """1F1B (Narayanan et al. 2019): fill the pipeline, alternate, drain; rank r holds at most R − r at once."""
    return interleaved(ranks, 1, micro_batches)


def interleaved(ranks: int, chunks: int, micro_batches: int) -> Schedule:
    """Interleaved 1F1B (Narayanan et al. 2021): each rank has `chunks` virtual stages, and the bubble is that much
    smaller. One chunk is plain 1F1B.

    Raises:
        UsageError: a count is below 1, or several chunks get micro-batches that do not come in groups of `ranks`.
    """
    for name, count in (("ranks", ranks), ("chunks", chunks), ("micro_batches", micro_batches)):
        if count < 1:
            raise UsageError(name, count, "a schedule needs at least one", "pass 1 or more")
    if chunks > 1 and micro_batches % ranks:
        constraint = f"interleaving passes groups of {ranks}, one a rank"
        raise UsageError("micro_batches", micro_batches, constraint, f"use a multiple of {ranks}, or one chunk")
    return tuple(_rank(rank, ranks, chunks, micro_batches) for rank in range(ranks))


def _rank(rank: int, ranks: int, chunks: int, micro_batches: int) -> tuple[Action, ...]:
    forwards = [Action(c * ranks + rank, m, "forward") for c, m in _order(ranks, chunks, micro_batches)]
    backwards = [
        Action((chunks - 1 - c) * ranks + rank, m, "backward") for c, m in _order(ranks, chunks, micro_batches)
    ]
    filling = ranks - 1 - rank if chunks == 1 else 2 * (ranks - 1 - rank) + (chunks - 1) * ranks
    filling = min(filling, len(forwards))
    actions = forwards[:filling]
    for forward, backward in zip(forwards[filling:], backwards, strict=False):
        actions += [forward, backward]
    return tuple(actions + backwards[len(forwards) - filling :])


def _order(ranks: int, chunks: int, micro_batches: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in the order they go forward: a group of micro-batches through each chunk in turn."""
    group = ranks if chunks > 1 else micro_batches
    return [
        (chunk, micro_batch)
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for micro_batch in range(first, first + group)
    ]


def most_in_flight(actions: tuple[Action, ...]) -> int:
    """How many (stage, micro-batch) pairs a rank holds activations of at once, at most."""
    now = most = 0
    for action in actions:
        now += 1 if action.direction == "forward" else -1
        most = max(most, now)
    return most
