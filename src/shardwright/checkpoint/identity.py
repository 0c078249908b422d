"""What makes two openings of a checkpoint the same, in three numbers that ranks can compare.

Decides that config and headers count whole, and of the weights their size and a sample: a hash over all of them would
cost a reading of all of them. Times and inodes do not count, since hosts have files of their own.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b

from shardwright.checkpoint.entry import Entry
from shardwright.checkpoint.file import File

SAMPLES, SAMPLE = 16, 64
"""Places of each file that are looked at, evenly spread over its weights, and bytes of each."""

CHUNK = 1 << 20
"""Bytes of a header read at a time."""

Identity = dict[str, int]
"""What is compared, in words for people → its hash, a signed number of 64 bits."""


def identity(config: Mapping[str, object] | None, files: Mapping[File, Iterable[Entry]]) -> Identity:
    """Of what config.json says (None where the config is in a header), and of files in their order."""
    starts = {file: min((entry.offset for entry in entries), default=file.size) for file, entries in files.items()}
    headers = (part for file, start in starts.items() for part in _header(file, start))
    weights = (part for file, start in starts.items() for part in _sample(file, start))
    said = b"" if config is None else json.dumps(config, sort_keys=True).encode()
    return {"configs": _number([said]), "headers": _number(headers), "weights": _number(weights)}


def _header(file: File, start: int) -> Iterator[bytes]:
    yield file.size.to_bytes(8, "little")
    for at in range(0, start, CHUNK):
        yield file.read(at, min(CHUNK, start - at))


def _sample(file: File, start: int) -> Iterator[bytes]:
    for at in range(start, file.size, max(SAMPLE, (file.size - start) // SAMPLES)):
        yield file.read(at, min(SAMPLE, file.size - at))


def _number(parts: Iterable[bytes]) -> int:
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little", signed=True)
