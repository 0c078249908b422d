"""An opened checkpoint: what it holds, what its model's config says, and the bytes of the pieces a rank owns.

Decides that a tensor is looked up by name and must have the shape the table says. Knows no file format and no model;
`opening` makes one. torch is imported by the first read, so that planners can open checkpoints without it.
"""

import os
import struct
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from shardwright.checkpoint.entry import Entry, quoted
from shardwright.checkpoint.file import File
from shardwright.checkpoint.identity import Identity, identity
from shardwright.checkpoint.packed import Packed
from shardwright.checkpoint.quantised import assemble
from shardwright.checkpoint.stored import Plain, Stored
from shardwright.errors import FileError

if TYPE_CHECKING:
    from torch import Tensor

    from shardwright.layout.spec import Piece, TensorSpec


class Checkpoint:
    """Files held open, and what their headers say. One thread each; open it after a fork, not before.

    path: as it was given · entries: tensors by name, a weight kept in several as one · config: the parsed config.json,
    or GGUF's metadata · header_bytes: what was read to learn where the tensors are.
    """

    def __init__(
        self, path: str | os.PathLike[str], config: Mapping[str, object], files: Mapping[File, Mapping[str, Entry]]
    ) -> None:
        self.path = os.fspath(path)
        self.config = config
        self._files = {file: tuple(entries.values()) for file, entries in files.items()}
        plain = {name: Plain(file, entry) for file, entries in files.items() for name, entry in entries.items()}
        self.entries = assemble(self.path, config, plain)
        self.header_bytes = sum(file.bytes_read for file in self._files)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far."""
        return sum(file.bytes_read for file in self._files) - self.header_bytes

    def read(self, piece: "Piece", out: "Tensor") -> None:
        """Fill `out`, the view of a parameter that `piece.local_ranges` denotes, cast to its dtype.

        Reads only the bytes (of a block-quantised tensor: the blocks) that hold the piece, some MB at a time.

        Raises:
            FileError: the tensor is missing or has another shape, or the file was written to since it was opened.
            UnsupportedError: the file holds integers where `out` holds floats, or the other way round.
            UsageError: `out` does not have the piece's shape, or the checkpoint is closed.
        """
        from shardwright.checkpoint.transfer import transfer

        transfer(self.expect(piece.source, piece.source_shape), piece, out)

    def expect(self, name: str, shape: tuple[int, ...]) -> Stored:
        """The tensor of that name.

        Raises:
            FileError: it is missing, or has another shape.
        """
        stored = self.entries.get(name)
        if stored is None or stored.shape != shape:
            found = f"has shape {list(stored.shape)}" if stored else f"is missing among {len(self.entries):,}"
            problem = f"tensor {quoted(name)} {found} where the model's config asks for {list(shape)}"
            raise FileError(stored.path if stored else self.path, problem, "use the config these weights came with")
        return stored

    def fill(self, parameter: "Tensor", spec: "TensorSpec") -> None:
        """Read every piece of one parameter on this rank."""
        for piece in spec.pieces:
            view = parameter.detach()
            for dim, (start, stop) in enumerate(piece.local_ranges):
                view = view.narrow(dim, start, stop - start)
            self.read(piece, view)

    def floats(self, name: str) -> tuple[float, ...]:
        """The values of a short float32 vector that a config is made of, read without torch.

        Raises:
            FileError: it is something else.
        """
        stored = self.entries[name]
        if (
            not isinstance(stored, Plain)
            or stored.dtype != "float32"
            or len(stored.shape) != 1
            or stored.shape[0] > 4096
        ):
            problem = f"tensor {quoted(name)} is {stored.dtype} {list(stored.shape)}, no short vector of float32"
            raise FileError(stored.path, problem, "convert the model again")
        raw = stored.file.read(stored.entry.offset, stored.entry.nbytes)
        return struct.unpack(f"<{stored.shape[0]}f", raw)

    def identity(self) -> Identity:
        """What ranks compare to know that all have opened the same; reads headers again, and a few bytes of weights."""
        apart = None if "general.architecture" in self.config else self.config
        before = sum(file.bytes_read for file in self._files)
        found = identity(apart, self._files)
        self.header_bytes += sum(file.bytes_read for file in self._files) - before
        return found

    def adds_nothing(self, name: str) -> bool:
        """Whether it is a bias of zeros beside a packed weight: tools write one for layers that have none."""
        bias, weight = self.entries[name], self.entries.get(f"{name.removesuffix('bias')}weight")
        if not isinstance(weight, Packed) or not isinstance(bias, Plain) or bias.shape != weight.shape[:1]:
            return False
        return not any(bias.file.read(bias.entry.offset, bias.entry.nbytes))

    def will_need(self) -> None:
        """Ask the system to start reading the files ahead; returns at once."""
        for file in self._files:
            file.will_need()

    def close(self) -> None:
        """Give the files back; a second call does nothing."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
