"""A training checkpoint: boxes of tensors in as many files as ranks wrote it, and a manifest that was written last.

Decides the format, which knows no split: an entry of a file is named after the box of the model's tensor that it holds,
`exp_avg/model.norm.weight[0:576]`, so that any rank of any split finds what overlaps its own pieces. `weight` is the
master copy; the other kinds are the optimiser's. Knows no optimiser, no rank and no torch until something is read.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shardwright.checkpoint import safetensors
from shardwright.checkpoint.durable import digest_of, sync_directory, write_file
from shardwright.checkpoint.entry import Entry, quoted
from shardwright.checkpoint.extents import Box, volume
from shardwright.checkpoint.file import File
from shardwright.checkpoint.json_object import read_object
from shardwright.checkpoint.stored import Plain
from shardwright.errors import FileError
from shardwright.layout.spec import Piece, boxes

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
VERSION = 1
STEP = re.compile(r"step-(\d{8,})")
ENTRY = re.compile(r"(\w+)/(.+)\[((?:\d+:\d+(?:,\d+:\d+)*)?)\]")
REMEDY = "resume from another checkpoint"


@dataclass(frozen=True)
class Stored:
    """A box of a tensor, and where it lies."""

    box: Box
    file: str
    entry: Entry


def name_of_box(kind: str, source: str, box: Box) -> str:
    """The name of the entry that holds it."""
    return f"{kind}/{source}[{','.join(f'{start}:{stop}' for start, stop in box)}]"


def directory_of(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def write_manifest(directory: Path, said: Mapping[str, Any], files: Mapping[str, tuple[int, str]]) -> None:
    """The last file of a checkpoint: with it, it is complete. files: name → bytes and sha256."""
    listed = {name: {"bytes": nbytes, "sha256": digest} for name, (nbytes, digest) in files.items()}
    text = json.dumps({"version": VERSION, **said, "files": listed}, indent=1, ensure_ascii=False)
    write_file(directory / MANIFEST, [text.encode()])


def complete(run: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first: with a manifest, and all it lists there in full length."""
    place = run / "checkpoints"
    names = sorted(
        (name for name in _listed(place) if STEP.fullmatch(name)), key=lambda name: int(name[5:]), reverse=True
    )
    return [place / name for name in names if _is_complete(place / name)]


def remove(directory: Path) -> None:
    """Take a checkpoint away, its manifest first, so that it is never taken for a complete one."""
    names = _listed(directory)
    for name in sorted(names, key=lambda name: name != MANIFEST):
        with suppress(FileNotFoundError):
            (directory / name).unlink()
        if name == MANIFEST:
            sync_directory(directory)
    with suppress(OSError):
        directory.rmdir()


def _listed(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _is_complete(directory: Path) -> bool:
    try:
        manifest = _manifest(directory)
        return all((directory / name).stat().st_size == size for name, (size, _) in manifest.files.items())
    except (FileError, OSError):
        return False


@dataclass(frozen=True)
class Manifest:
    """step: after which it was written · model: its config.json · state: what else a run needs to go on · files: their
    bytes and sha256.
    """

    step: int
    model: dict[str, Any]
    state: dict[str, Any]
    files: dict[str, tuple[int, str]]


def _manifest(directory: Path) -> Manifest:
    said: Any = read_object(directory / MANIFEST)
    try:
        files = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in said["files"].items()}
        found = Manifest(int(said["step"]), dict(said["model"]), dict(said["state"]), files)
        version = said["version"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FileError(directory / MANIFEST, "it is no manifest of a training checkpoint", REMEDY) from None
    if version != VERSION or any(os.path.basename(name) != name for name in files):
        raise FileError(directory / MANIFEST, f"version {version} or its file names are not read here", REMEDY)
    return found


class TrainingCheckpoint:
    """An opened checkpoint. One thread each; open it after a fork, not before."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self.manifest = _manifest(directory)
        self._files: dict[str, File] = {}
        self._stored: dict[tuple[str, str], list[Stored]] = {}
        with ExitStack() as undo:
            for name in self.manifest.files:
                file = self._files[name] = undo.enter_context(File(directory / name))
                self._index(name, safetensors.parse_header(file))
            undo.pop_all()

    @classmethod
    def find(cls, path: Path) -> Self:
        """A checkpoint's own directory, or a run's, whose newest complete one it is then.

        Raises:
            FileError: there is none.
        """
        if (path / MANIFEST).exists():
            return cls(path)
        found = complete(path)
        if not found:
            problem = "it is no training checkpoint, and holds no complete one"
            raise FileError(path, problem, "pass the output directory of shardwright train")
        return cls(found[0])

    def _index(self, name: str, entries: Mapping[str, Entry]) -> None:
        for entry in entries.values():
            parsed = ENTRY.fullmatch(entry.name)
            if parsed is None:
                raise FileError(self.path / name, f"entry {quoted(entry.name)} names no box", REMEDY)
            kind, source, spans = parsed.groups()
            ranges = [span.split(":") for span in spans.split(",")] if spans else []
            box = tuple((int(start), int(stop)) for start, stop in ranges)
            if tuple(stop - start for start, stop in box) != entry.shape:
                raise FileError(self.path / name, f"entry {quoted(entry.name)} has another shape than its box", REMEDY)
            self._stored.setdefault((kind, source), []).append(Stored(box, name, entry))

    def stored(self) -> Iterator[tuple[str, str, Stored]]:
        """Kind, source and place of every box."""
        for (kind, source), found in self._stored.items():
            for stored in found:
                yield kind, source, stored

    def has(self, kind: str, source: str) -> bool:
        """Whether there is any of it."""
        return (kind, source) in self._stored

    def dtype(self, kind: str, source: str) -> str:
        """In which it is stored, by torch's name; float32 of what is not there."""
        found = self._stored.get((kind, source))
        return found[0].entry.dtype if found else "float32"

    def read(self, kind: str, piece: Piece, out: "Tensor") -> None:
        """Fill `out`, the view of a parameter (or of an optimiser's state of one) that `piece.local_ranges` denotes.

        Raises:
            FileError: a part of it is nowhere in this checkpoint.
        """
        from shardwright.checkpoint.transfer import transfer

        target = out.permute(tuple(reversed(range(out.dim())))) if piece.transform == "transpose" else out
        for wanted, local in boxes(piece.source_ranges):
            missing = volume(wanted)
            for stored in self._stored.get((kind, piece.source), ()):
                common = _common(wanted, stored.box)
                missing -= volume(common)
                if volume(common) or not wanted:
                    view = target
                    for dim, ((low, high), (start, _), (to, _)) in enumerate(zip(common, wanted, local, strict=True)):
                        view = view.narrow(dim, to + low - start, high - low)
                    transfer(Plain(self._files[stored.file], stored.entry), _within(stored, common), view)
            if missing:
                problem = f"{missing:,} elements of {kind} {quoted(piece.source)} are not in it"
                raise FileError(self.path, problem, "check that it is of this model")

    def damaged(self, share: int = 0, of: int = 1) -> str | None:
        """The first file that does not have its sha256, of those at `share` modulo `of`; None where all have."""
        for at, (name, (_, digest)) in enumerate(self.manifest.files.items()):
            if at % of == share and digest_of(self.path / name) != digest:
                return name
        return None

    def close(self) -> None:
        """Give the files back."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _common(a: Box, b: Box) -> Box:
    if len(a) != len(b):
        return tuple((0, 0) for _ in a)
    lows = [max(x[0], y[0]) for x, y in zip(a, b, strict=True)]
    return tuple((low, max(low, min(x[1], y[1]))) for low, x, y in zip(lows, a, b, strict=True))


def _within(stored: Stored, common: Box) -> Piece:
    """The part of an entry that a box covers, counted from the entry's own start."""
    ranges = tuple(((low - start, high - start),) for (low, high), (start, _) in zip(common, stored.box, strict=True))
    local = tuple((0, high - low) for low, high in common)
    return Piece(stored.entry.name, stored.entry.shape, ranges, local, (0,))
