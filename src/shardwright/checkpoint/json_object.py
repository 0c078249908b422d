"""JSON that came from outside, as one plain dict.

Decides what counts as damaged: bytes that are no UTF-8, a key that occurs twice, nesting without end.
"""

import json
import os
from collections import Counter

from shardwright.checkpoint.entry import quoted
from shardwright.checkpoint.file import File
from shardwright.errors import FileError

MAX_BYTES = 100_000_000
"""Longest text that is parsed at all: the bound of the safetensors format."""

REMEDY = "download it again"


def parse_object(path: object, text: bytes, what: str) -> dict[str, object]:
    """The object that `text` spells; `what` names it in errors.

    Raises:
        FileError: it is no UTF-8, no JSON, no object, nested too deeply, or names a key twice.
    """
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


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {quoted(twice)} occurs twice")
    return table
