"""JSON that came from outside, as one plain dict.

Decides what counts as damaged: bytes that are no UTF-8, a key that occurs twice, nesting without end, and a text that
would take more memory than any model's.
"""

import json
import os
from collections import Counter

from shardwright.checkpoint.entry import quoted
from shardwright.checkpoint.file import File
from shardwright.errors import FileError

MAX_BYTES = 20_000_000
"""Longest text that is read at all: the index of a model of 671 billion parameters in 91 thousand tensors has 9 MB."""

MAX_MEMORY = 64_000_000
"""Bytes that a text and what is parsed from it may take."""

REMEDY = "download it again"


def parse_object(path: object, text: bytes, what: str) -> dict[str, object]:
    """The object that `text` spells; `what` names it in errors.

    Raises:
        FileError: it is no UTF-8, no JSON, no object, nested too deeply, too large in memory, or names a key twice.
    """
    if (needed := memory_of(text)) > MAX_MEMORY:
        problem = f"{what} may take {needed:,} bytes of memory where {MAX_MEMORY:,} are allowed"
        raise FileError(path, problem, REMEDY)
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise FileError(path, f"{what} is not valid UTF-8 at byte {error.start:,}", REMEDY) from None
    except RecursionError:
        raise FileError(path, f"{what} is nested too deeply", REMEDY) from None
    except ValueError as error:
        raise FileError(path, f"{what} is not valid JSON: {error}", REMEDY) from None
    if not isinstance(value, dict):
        raise FileError(path, f"{what} is a JSON {type(value).__name__}, not an object", REMEDY)
    return value


def read_object(path: str | os.PathLike[str]) -> dict[str, object]:
    """The object a JSON file holds.

    Raises:
        FileError: the file is missing, too long, or damaged.
    """
    with File(path) as file:
        if file.size > MAX_BYTES:
            raise FileError(path, f"it has {file.size:,} bytes and at most {MAX_BYTES:,} are allowed", REMEDY)
        return parse_object(path, file.read(0, file.size), "it")


def memory_of(text: bytes) -> int:
    """A bound on what parsing takes, from the counts of characters: some bytes of text make much larger objects.

    The text, itself decoded, and its strings; then what each string, pair, container and element is to CPython.
    """
    copies = 3 if text.isascii() else 9  # one wide character makes all others as wide
    made = {b'"': 30, b":": 200, b"{": 64, b"[": 72, b",": 40}
    return copies * len(text) + sum(text.count(mark) * size for mark, size in made.items())


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {quoted(twice)} occurs twice")
    return table
