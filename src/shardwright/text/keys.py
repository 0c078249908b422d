"""The `tokenizer.*` keys of a GGUF file, each with the type it must have. Decides nothing about what they mean."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path

from shardwright.errors import FileError
from shardwright.text.parts import REMEDY, one_line


class Keys:
    """Looks keys up; every method raises `FileError` where a value is not what its key says."""

    def __init__(self, metadata: Mapping[str, object], path: Path) -> None:
        self.metadata = metadata
        self.path = path

    def get(self, key: str) -> object:
        """Whatever the file says."""
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def wrong(self, key: str, problem: str) -> FileError:
        """The error about a key."""
        return FileError(self.path, f"tokenizer.ggml.{key} {problem}", REMEDY)

    def strings(self, key: str) -> list[str]:
        """A list of strings."""
        value = self.get(key)
        if not isinstance(value, list | tuple) or not set(map(type, value)) <= {str}:
            raise self.wrong(key, "is missing" if value is None else "is no list of strings")
        return list(value)

    def ids(self, tokens: list[str]) -> dict[str, int]:
        """The id of each token."""
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(ids) != len(tokens):
            raise self.wrong("tokens", "has the same token twice")
        return ids

    def kinds(self, size: int) -> list[int]:
        """The type of each token; ordinary ones where the file has no such list."""
        value = self.get("token_type")
        if value is None:
            return [1] * size
        if not isinstance(value, list | tuple) or not set(map(type, value)) <= {int} or len(value) != size:
            raise self.wrong("token_type", f"is no list of {size} integers, one a token")
        return list(value)

    def scores(self, size: int) -> list[float]:
        """The score of each token."""
        value = self.get("scores")
        if not isinstance(value, list | tuple) or not set(map(type, value)) <= {float} or len(value) != size:
            missing = "is missing" if value is None else f"is no list of {size} numbers, one a token"
            raise self.wrong("scores", missing)
        if not all(map(isfinite, value)):
            raise self.wrong("scores", "has one that is not finite")
        return list(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, f"is {one_line(repr(value))}, not true or false")
        return default if value is None else value

    def token(self, key: str, size: int) -> int | None:
        """One of `size` token ids."""
        value = self.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < size):
            raise self.wrong(key, f"is {one_line(repr(value))}, not one of the {size} tokens")
        return value

    def chat_template(self) -> str | None:
        """The chat template."""
        value = self.metadata.get("tokenizer.chat_template")
        if value is not None and not isinstance(value, str):
            raise FileError(self.path, "tokenizer.chat_template is no string", REMEDY)
        return value
