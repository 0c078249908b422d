"""`Channel`: JSON objects, one a line, over a socket between a rank and whoever drives it. Nothing is unpickled."""

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, final

Message = dict[str, Any]

LONGEST = 64 * 1024 * 1024
"""Bytes in one message; a longer one is refused by its sender."""


@final
class Channel:
    """One end of a socket pair."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._pending = bytearray()

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

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one message. A peer that has gone is not an error here: whoever watches it says so."""
        line = json.dumps(message, ensure_ascii=False).encode() + b"\n"
        if len(line) > LONGEST:
            raise ValueError(f"message of {len(line)} bytes; at most {LONGEST} fit")
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(line)

    def receive(self) -> Message | None:
        """The next message; None when the other end has closed."""
        while b"\n" not in self._pending:
            if not self._read():
                return None
        return self._pop()

    def ready(self) -> Iterator[Message]:
        """The messages that have come, after one read that does not block once `select` has named this end."""
        self._read()
        while b"\n" in self._pending:
            yield self._pop()

    def hang_up(self) -> None:
        """Say that no message will follow: the other end's `receive` gives None. What it still sends arrives."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _read(self) -> bool:
        try:
            chunk = self._socket.recv(1 << 16)
        except ConnectionResetError:
            return False
        self._pending += chunk
        return bool(chunk)

    def _pop(self) -> Message:
        line, _, rest = self._pending.partition(b"\n")
        self._pending = bytearray(rest)
        message: Message = json.loads(line)
        return message
