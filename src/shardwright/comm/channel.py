"""`Channel`: JSON objects, one a line, over a socket between a rank and whoever drives it. Nothing is unpickled."""

import json
import select
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, final

Message = dict[str, Any]

LONGEST = 64 * 1024 * 1024
"""Bytes in one message; a longer one is refused by its sender."""


@final
class Channel:
    """One end of a socket pair, used by one thread.

    ended: the other end has closed or hung up, and all it sent has been read.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._pending = bytearray()
        self._scanned = 0
        self._unsent = bytearray()
        self._hanging_up = False
        self.ended = False

    @classmethod
    def pair(cls) -> "tuple[Channel, Channel]":
        """Two ends that speak to each other."""
        left, right = socket.socketpair()
        return cls(left), cls(right)

    @classmethod
    def from_fd(cls, fd: int) -> "Channel":
        """The end behind an inherited descriptor."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """The descriptor, for `select`."""
        return self._socket.fileno()

    def events(self) -> int:
        """What to `poll` it for: reading until it has ended, writing while something is queued."""
        return (0 if self.ended else select.POLLIN) | (select.POLLOUT if self._unsent else 0)

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one message. A peer that has gone is not an error here: whoever watches it says so.

        Takes in what comes meanwhile, so that two ends that both send at once do not wait for each other.
        """
        self.post(message)
        while self._unsent:
            poller = select.poll()
            poller.register(self, self.events())
            poller.poll()
            self._read(socket.MSG_DONTWAIT)
            self.flush()

    def post(self, message: Mapping[str, Any]) -> None:
        """Queue one message and write what fits at once; `flush` writes the rest. Never blocks."""
        line = json.dumps(message).encode() + b"\n"
        if len(line) > LONGEST:
            raise ValueError(f"message of {len(line)} bytes; at most {LONGEST} fit")
        self._unsent += line
        self.flush()

    def flush(self) -> None:
        """Write as much of what is queued as fits. Never blocks."""
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent[: 1 << 18], socket.MSG_DONTWAIT)
                del self._unsent[:sent]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()
        if self._hanging_up:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def receive(self) -> Message | None:
        """The next message; None when the other end has closed."""
        while (message := self._pop()) is None and not self.ended:
            self._read(0)
        return message

    def ready(self) -> Iterator[Message]:
        """All messages that have come so far. Never blocks."""
        while self._read(socket.MSG_DONTWAIT):
            pass
        while (message := self._pop()) is not None:
            yield message

    def hang_up(self) -> None:
        """Say that no message will follow: the other end's `receive` gives None. What it still sends arrives."""
        self._hanging_up = True
        self.flush()

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _read(self, flags: int) -> bool:
        """Take in what has come; whether that was anything."""
        try:
            chunk = b"" if self.ended else self._socket.recv(1 << 18, flags)
        except BlockingIOError:
            return False
        except OSError:  # reset by the other end, or closed here by another thread
            chunk = b""
        self.ended = not chunk
        self._pending += chunk
        return bool(chunk)

    def _pop(self) -> Message | None:
        end = self._pending.find(b"\n", self._scanned)
        if end < 0:
            self._scanned = len(self._pending)
            return None
        message: Message = json.loads(self._pending[:end])
        del self._pending[: end + 1]
        self._scanned = 0
        return message
