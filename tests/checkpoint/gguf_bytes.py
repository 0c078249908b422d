"""GGUF files put together by hand, sound and unsound, from the format's description alone."""

import struct
from pathlib import Path
from typing import Any


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ALIGNED = pair("general.alignment", 4, struct.pack("<I", 32))
A = tensor("a", (3, 2), 0, 0)
"""24 bytes of data; with what follows it aligned, 32."""


def gguf_bytes(
    pairs: list[bytes], tensors: list[bytes], *, data: int = 32, start: bytes = b"", counts: int = 0
) -> bytes:
    """A file of these parts. `start` replaces magic and version; `counts` is added to the number of metadata pairs."""
    head = start or b"GGUF" + struct.pack("<I", 3)
    header = head + struct.pack("<QQ", len(tensors), len(pairs) + counts) + b"".join(pairs + tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


def written(folder: Path, pairs: list[bytes], tensors: list[bytes], **how: Any) -> Path:
    """The same on disk."""
    path = folder / "x.gguf"
    path.write_bytes(gguf_bytes(pairs, tensors, **how))
    return path
