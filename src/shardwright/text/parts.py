"""What every kind of tokenizer file is read into, and how the `tokenizers` library's refusals become errors of ours.

Decides nothing about any file's format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from shardwright.errors import FileError

if TYPE_CHECKING:
    import tokenizers

REMEDY = "download or convert it again"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A tokenizer as it stood in its file.

    `names` are the special tokens a chat template may write, by their Hugging Face names: `bos_token`, `eos_token`,
    `pad_token`, `unk_token`, each only where the file has one.
    """

    backend: tokenizers.Tokenizer
    origin: Path
    names: Mapping[str, str]
    stop_ids: frozenset[int]
    chat_template: str | None


class Refusals:
    """Within it, what `tokenizers` says against a file is a `FileError` about that file.

    The library raises a bare `Exception`, and panics as a `BaseException` of a module that cannot be imported; both are
    known by their exact class, so that everything else passes through.
    """

    def __init__(self, origin: Path) -> None:
        self.origin = origin

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is Exception or (kind is not None and kind.__name__ == "PanicException"):
            raise FileError(self.origin, f"is no usable tokenizer: {one_line(error)}", REMEDY) from error


def one_line(error: object) -> str:
    """A message on one line, of at most 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:199]}…"
