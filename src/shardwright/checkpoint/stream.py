"""Little-endian values read one after another from the start of a file.

Decides how far a header may reach and how much it may become: nothing is read that the file does not hold, and no more
is made of it than `MAX_MEMORY`. Knows no format.
"""

from struct import Struct

from shardwright.checkpoint.file import File
from shardwright.errors import FileError

MAX_BYTES = 100_000_000
"""Longest header: a vocabulary of 256 k tokens with its merges takes some 15 MB."""

MAX_MEMORY = 90_000_000
"""Bytes of memory that what is read may take: 640 thousand words of a vocabulary and its merges take 75 million."""

MAX_STRING = 4_000_000
STRING, CHARACTER, SCALAR = 88, 4, 40
"""What a string, each of its bytes, and a number are to CPython at most, in bytes, with the pointer to it."""

CHUNK = 1 << 20
U32 = Struct("<I")
U64 = Struct("<Q")


class Stream:
    """A forward reader. `what` names, in errors, the thing being read."""

    def __init__(self, file: File) -> None:
        self.file = file
        self._limit = min(file.size, MAX_BYTES)
        self._data = b""
        self._base = 0
        self._at = 0
        self._memory = 0

    @property
    def position(self) -> int:
        """The next byte's place in the file."""
        return self._base + self._at

    def check(self, count: int, least: int, what: str) -> None:
        """Refuse `count` things of at least `least` bytes each that cannot lie ahead.

        Raises:
            FileError: they would run past the end of the file, or of what a header may take.
        """
        if count * least > self._limit - self.position:
            end = f"the file has {self.file.size:,}" if self._limit == self.file.size else f"a header {MAX_BYTES:,}"
            problem = f"{what} at byte {self.position:,} needs {count * least:,} bytes or more but {end}"
            raise FileError(self.file.path, problem, "download it again")

    def spend(self, nbytes: int, what: str) -> None:
        """Count memory that what was read takes, or what is about to be read will.

        Raises:
            FileError: it is more than a header may take.
        """
        self._memory += nbytes
        if self._memory > MAX_MEMORY:
            problem = f"{what} at byte {self.position:,} makes the header take {self._memory:,} bytes of memory"
            raise FileError(self.file.path, f"{problem} where {MAX_MEMORY:,} are allowed", "download it again")

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        if self._at + count > len(self._data):
            self.check(count, 1, what)
            rest = self._data[self._at :]
            self._base, self._at = self.position, 0
            ahead = min(max(count, CHUNK), self._limit - self._base)
            self._data = rest + self.file.read(self._base + len(rest), ahead - len(rest))
        start = self._at
        self._at += count
        return self._data[start : self._at]

    def u32(self, what: str) -> int:
        """An unsigned 32-bit integer."""
        value: int = U32.unpack(self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        """An unsigned 64-bit integer."""
        value: int = U64.unpack(self.take(8, what))[0]
        return value

    def string(self, what: str) -> str:
        """A 64-bit length, then that many bytes of UTF-8."""
        length = self.u64(what)
        self.check(length, 1, what)
        if length > MAX_STRING:
            problem = (
                f"{what} at byte {self.position:,} is a string of {length:,} bytes where {MAX_STRING:,} are allowed"
            )
            raise FileError(self.file.path, problem, "download it again")
        self.spend(STRING + length * CHARACTER, what)
        data = self.take(length, what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._not_utf8(self.position - len(data), what) from None

    def strings(self, count: int, what: str) -> tuple[str, ...]:
        """`count` strings. Those wholly in the chunk at hand, nearly all, take the tight loop."""
        self.check(count, 8, what)
        out: list[str] = []
        while len(out) < count:
            data, at, size, before = self._data, self._at, len(self._data), len(out)
            try:
                for _ in range(count - len(out)):
                    stop = at + 8 + int.from_bytes(data[at : at + 8], "little")
                    if stop > size:
                        break
                    out.append(data[at + 8 : stop].decode())
                    at = stop
            except UnicodeDecodeError:
                raise self._not_utf8(self._base + at + 8, what) from None
            made = len(out) - before
            self.spend(made * STRING + (at - self._at - 8 * made) * CHARACTER, what)
            self._at = at
            if len(out) < count:
                out.append(self.string(what))
        return tuple(out)

    def _not_utf8(self, offset: int, what: str) -> FileError:
        problem = f"the string of {what} at byte {offset:,} is not valid UTF-8"
        return FileError(self.file.path, problem, "download it again")
