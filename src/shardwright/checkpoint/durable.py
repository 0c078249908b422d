"""Files that are there whole or not at all, whatever ends the process or the machine in between.

Decides the order: write beside, fsync, rename, fsync the directory. Knows no format.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from shardwright.errors import FileError

UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Written:
    """What lies on disk now."""

    nbytes: int
    sha256: str


@contextmanager
def writing(directory: Path, remedy: str) -> Iterator[None]:
    """What has to be written and cannot be is a `FileError` that names the file, or the directory."""
    try:
        yield
    except OSError as error:
        problem = f"it cannot be written: {error.strerror or error}"
        raise FileError(error.filename or directory, problem, remedy) from None


def write_file(path: Path, chunks: "Iterable[bytes | memoryview]") -> Written:
    """Put `chunks` one after another into `path`, replacing what was there only once all are on disk.

    Raises:
        OSError: the disk is full or fails; what was there before is untouched, and nothing else is left.
    """
    beside = path.with_name(path.name + UNFINISHED)
    digest, nbytes = sha256(), 0
    try:
        with open(beside, "wb", buffering=0) as file:
            for chunk in chunks:
                digest.update(chunk)
                nbytes += _write_all(file.fileno(), memoryview(chunk))
            os.fsync(file.fileno())
        os.rename(beside, path)
        sync_directory(path.parent)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
    return Written(nbytes, digest.hexdigest())


def _write_all(fd: int, chunk: memoryview) -> int:
    """One call writes at most 2 GiB, and less where the disk fills up."""
    whole = chunk.cast("B") if chunk.nbytes else chunk
    done = 0
    while done < whole.nbytes:
        done += os.write(fd, whole[done:])
    return done


def sync_directory(path: Path) -> None:
    """Have the names in a directory on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Make a directory and have its name on disk."""
    path.mkdir(parents=True, exist_ok=True)
    sync_directory(path.parent)


def digest_of(path: Path) -> str:
    """The sha256 of a file, read some MB at a time."""
    digest = sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
