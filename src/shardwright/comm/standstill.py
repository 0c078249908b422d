"""`Standstill`: how ranks that wait for each other find out, though each of them alone sees only a slow peer.

Every wait that lasts says so in the job's first segment, and counts its fruitless turns; whatever moves anything counts
a move. If all ranks wait, and each has looked twice more without anything having moved, nothing ever will: the first of
them to move would have needed a move before it. A rank that waits inside compiled code counts as computing.
"""

from typing import final

from shardwright.comm.atomics import read_word, write_word
from shardwright.comm.segment import MOVES, TURNS, WAITING, Segment, put_text, text_of
from shardwright.errors import CommError


@final
class Standstill:
    """One rank's view. segment: the one that all ranks of the job share · rank: in it."""

    def __init__(self, segment: Segment, rank: int) -> None:
        self._segment, self._rank = segment, rank
        self._seen: list[tuple[int, int]] = []

    def moved(self) -> None:
        """Count that this rank went on, or let another go on."""
        self._segment.words(self._rank)[MOVES] += 1

    def turn(self, waiting_for: object) -> None:
        """Count a fruitless look at all that this rank has under way.

        Raises:
            CommError: every rank waits for another.
        """
        words = self._segment.words(self._rank)
        if not words[WAITING]:
            put_text(self._segment.text(self._rank), str(waiting_for))
            self._seen = []
        words[TURNS] += 1
        write_word(self._segment.word(self._rank, WAITING), 1)
        if read_word(self._segment.stuck) or self._nothing_moves():
            write_word(self._segment.stuck, 1)
            calls = ", ".join(
                f"rank {rank} in {text_of(self._segment.text(rank))}" for rank in range(self._segment.ranks)
            )
            raise CommError(f"ranks wait for each other: {calls}; all ranks make the same calls in one order")

    def over(self) -> None:
        """The wait has ended, well or not."""
        if self._segment.words(self._rank)[WAITING] and not read_word(self._segment.stuck):
            self.moved()
            write_word(self._segment.word(self._rank, WAITING), 0)

    def _nothing_moves(self) -> bool:
        """Whether all have waited, and looked twice, since `_seen`, which is begun anew whenever one has not."""
        ranks = range(self._segment.ranks)
        waiting = [read_word(self._segment.word(rank, WAITING)) for rank in ranks]
        found = [tuple(read_word(self._segment.word(rank, which)) for which in (MOVES, TURNS)) for rank in ranks]
        if not all(waiting):
            self._seen = []
        elif not self._seen or any(moves != before for (moves, _), (before, _) in zip(found, self._seen, strict=True)):
            self._seen = [(moves, turns) for moves, turns in found]
        else:
            return all(turns >= before + 2 for (_, turns), (_, before) in zip(found, self._seen, strict=True))
        return False
