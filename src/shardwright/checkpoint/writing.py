"""A safetensors file as a stream of bytes: its header, then tensors made one at a time while the file is written.

Decides that nothing but the chunk at hand is in memory. How bytes get onto a disk is `durable`'s business.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwright.checkpoint.entry import stored_size
from shardwright.checkpoint.safetensors import DTYPES

CODES = {ours: theirs for theirs, ours in DTYPES.items()}
ALIGNED = 8
"""The header ends at a multiple of that many bytes, as the format's own writer has it."""


@dataclass(frozen=True)
class Planned:
    """A tensor to be written. dtype: by torch's name · values: its elements in row-major order, in any chunks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return stored_size(self.dtype, self.shape)


def safetensors_chunks(
    planned: Sequence[Planned], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The whole file, chunk by chunk."""
    table: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for tensor in planned:
        span = [at, at + tensor.nbytes]
        table[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        at = span[1]
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNED)
    yield len(header).to_bytes(8, "little") + header
    for tensor in planned:
        written = 0
        for chunk in tensor.values():
            data = bytes_of(chunk)
            written += data.nbytes
            yield data
        if written != tensor.nbytes:
            raise AssertionError(f"{tensor.name} was planned with {tensor.nbytes} bytes and has {written}")


def bytes_of(x: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it is contiguous."""
    flat = x.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
