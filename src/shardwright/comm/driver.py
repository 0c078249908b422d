"""The driver's side of running ranks, whoever forked them. No torch."""

from typing import Protocol

from shardwright.comm.channel import Message


class Driver(Protocol):
    """Ranks seen from outside: a `Job` forked by this process, or a `SpawnedJob` behind a fresh launcher process."""

    def send(self, message: Message) -> None:
        """Tell every rank."""

    def receive(self) -> Message | None:
        """The next message of any rank, with its `rank`; None when all have ended. Raises a rank's failure."""

    def close(self) -> None:
        """Hang up and wait for the ranks to end."""
