"""From files of text to one memory-mapped row of tokens: read, tokenised once, and never held whole.

Decides which files are read and in which order, that every text ends with the tokenizer's end token, and when a row
made earlier still fits. Knows no batches.
"""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardwright.checkpoint.durable import write_file
from shardwright.errors import FileError, UsageError
from shardwright.text.tokenizer import Tokenizer
from shardwright.train.recipe import DataPart, Recipe

STDLIB = "stdlib"

Row = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class Corpus:
    """Files in their order, each with size and time of change, which say whether a row of tokens still fits."""

    files: tuple[Path, ...]
    field: str

    @classmethod
    def of(cls, recipe: Recipe) -> "Corpus":
        """The files a recipe names.

        Raises:
            FileError: one is missing, or a directory has nothing of the wanted kinds.
        """
        return cls(tuple(file for path in recipe.data.paths for file in _files(recipe, path)), recipe.data.field)

    def texts(self) -> Iterator[str]:
        """Every text, file by file.

        Raises:
            FileError: a file vanished, is no UTF-8, or a record has no such field.
        """
        for file in self.files:
            try:
                yield from _texts(file, self.field)
            except OSError as error:
                raise _unreadable(file, error) from None
            except UnicodeDecodeError as error:
                raise FileError(
                    file, f"it is not UTF-8 at byte {error.start:,}", "convert it, or leave it out"
                ) from None

    def key(self, tokenizer: Path) -> str:
        """What a row made of these files by this tokenizer is known by."""
        said = [(str(file), *_size_and_time(file)) for file in self.files]
        digest = sha256(json.dumps([said, self.field]).encode())
        digest.update((tokenizer / "tokenizer.json").read_bytes())
        return digest.hexdigest()[:24]


def tokenised(corpus: Corpus, tokenizer: Tokenizer, directory: Path, key: str) -> Path:
    """The file with all tokens, made now unless it is there: uint16, or uint32 of larger vocabularies."""
    path = directory / f"{key}.{'u16' if tokenizer.vocabulary <= 1 << 16 else 'u32'}"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        dtype = np.uint16 if path.suffix == ".u16" else np.uint32
        ends = [] if tokenizer.end is None else [tokenizer.end]
        ids = (np.array(tokenizer.encode(text, special=False) + ends, dtype=dtype) for text in corpus.texts())
        write_file(path, (chunk.tobytes() for chunk in ids))
    return path


def opened(path: Path) -> Row:
    """The row, mapped into memory."""
    dtype = np.uint16 if path.suffix == ".u16" else np.uint32
    if not path.stat().st_size:
        raise FileError(path, "the data has no tokens at all", "add files with text")
    return np.memmap(path, dtype=dtype, mode="r")


def _files(recipe: Recipe, path: str) -> list[Path]:
    if path == STDLIB:
        library = Path(sysconfig.get_path("stdlib"))
        return sorted(library.glob("*.py")) + sorted(library.glob("asyncio/*.py"))
    place = recipe.place(path)
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise FileError(place, "there is no such file or directory", "check data.paths")
    found = sorted(file for file in place.rglob("*") if file.is_file() and file.suffix in recipe.data.suffixes)
    if not found:
        wanted = ", ".join(recipe.data.suffixes)
        raise FileError(place, f"no file in it ends with one of {wanted}", "set data.suffixes")
    return found


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from None
    return found.st_size, found.st_mtime_ns


def _unreadable(file: Path, error: OSError) -> FileError:
    return FileError(file, f"it cannot be read: {str(error.strerror or error).strip()}", "put it back")


def _texts(file: Path, field: str) -> Iterator[str]:
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8-sig") as lines:  # with or without a byte-order mark
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _field_of(file, number, line, field)
    elif file.suffix == ".parquet":
        yield from _column(file, field)
    else:
        yield file.read_text(encoding="utf-8-sig")


def _field_of(file: Path, number: int, line: str, field: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise FileError(file, f"line {number:,} is not JSON", "mend it, or leave it out") from None
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise FileError(file, f"line {number:,} has no text in {field!r}", "set data.field")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FileError(file, f"line {number:,} has half of a surrogate pair", "mend it, or leave it out") from None
    return text


def _column(file: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid, parquet, types
    except ImportError:
        raise UsageError("data.paths", file, "Parquet needs pyarrow", "pip install 'shardwright[data]'") from None
    try:
        table = parquet.ParquetFile(file)
    except ArrowInvalid as error:
        raise FileError(file, f"it is no Parquet file: {error}", "download it again") from None
    if field not in table.schema_arrow.names:
        raise FileError(file, f"it has no column {field!r}", "set data.field")
    kind = table.schema_arrow.field(field).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(values) or types.is_large_string(values)):
        raise FileError(file, f"column {field!r} holds {kind}, no text", "set data.field")
    for batch in table.iter_batches(columns=[field]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def check(data: DataPart, context: int) -> None:
    """Refuse sequences longer than the model's context."""
    if data.sequence > context:
        problem = f"the model's context is {context} tokens"
        raise UsageError("data.sequence", data.sequence, problem, f"use at most {context}")
