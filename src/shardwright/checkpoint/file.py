"""A regular file opened for positional reads.

Decides that a directory, a pipe, a short read and a file that somebody writes to are errors and not surprises. Knows no
format; counts what it reads.
"""

import os
import stat
from types import TracebackType
from typing import Self

from shardwright.errors import FileError, UsageError

POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS has put in the place of a large one."""


class File:
    """Bytes of one file by position. Not shared between threads: the count would tear.

    Raises:
        FileError: it cannot be opened, or is no regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.bytes_read = 0
        self._fd = -1
        try:
            # Without O_NONBLOCK, opening a pipe waits for its writer.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self._fd)
        except (OSError, ValueError) as error:
            self.close()
            raise FileError(self.path, f"it cannot be opened: {_reason(error)}", "check the path") from None
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise FileError(self.path, "it is not a regular file", "check the path")
        self.size = status.st_size
        self._written = status.st_mtime_ns

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on."""
        data = bytearray(count)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target`, a view of bytes, from `offset` on.

        Raises:
            FileError: the file ends before that, or the device fails.
            UsageError: it is closed.
        """
        fd, done = self._open(), 0
        while done < len(target):
            try:
                # One call moves at most 2 GiB, and a signal may cut it short.
                got = os.preadv(fd, [target[done:]], offset + done)
            except OSError as error:
                raise FileError(
                    self.path, f"byte {offset + done:,} cannot be read: {_reason(error)}", "try again"
                ) from None
            if not got:
                problem = f"it ends at byte {offset + done:,} where byte {offset + len(target):,} is wanted"
                raise FileError(self.path, f"{problem} (it was shortened while open)", "download it again")
            done += got
        self.bytes_read += done

    def wrong_start(self, problem: str, remedy: str) -> FileError:
        """The error about a file that does not begin as its kind does: it may stand for one that is elsewhere."""
        if self.read(0, min(self.size, len(POINTER))) == POINTER:
            return FileError(self.path, "it is a Git LFS pointer, not the file itself", "run git lfs pull")
        return FileError(self.path, problem, remedy)

    def check_unchanged(self) -> None:
        """Refuse to go on with a file that was written to since it was opened; a second writer within the clock's tick
        is not seen.

        Raises:
            FileError: its size or the time of its last change is another.
            UsageError: it is closed.
        """
        status = os.fstat(self._open())
        if (status.st_size, status.st_mtime_ns) != (self.size, self._written):
            problem = f"it was changed while it was being read ({self.size:,} bytes then, {status.st_size:,} now)"
            raise FileError(self.path, problem, "wait until nothing writes to it, and try again")

    def will_need(self) -> None:
        """Ask the system to start reading the whole file ahead; returns at once."""
        os.posix_fadvise(self._open(), 0, 0, os.POSIX_FADV_WILLNEED)

    def _open(self) -> int:
        if self._fd < 0:
            raise UsageError("file", self.path, "it is closed", "read before leaving the `with` block")
        return self._fd

    def close(self) -> None:
        """Give the descriptor back; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
