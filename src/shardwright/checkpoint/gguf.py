"""Where a GGUF file keeps its metadata and its tensors: versions 2 and 3, little-endian.

Decides what a sound header is and which element types are read; shapes come out row-major, as torch has them. Reads no
tensor, knows no torch and no model.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import struct
from typing import TypeAlias

from shardwright.checkpoint.entry import BLOCKS, Entry, is_shape, quoted, stored_size
from shardwright.checkpoint.file import File
from shardwright.checkpoint.stream import SCALAR, Stream
from shardwright.errors import FileError, UnsupportedError

Value: TypeAlias = "bool | int | float | str | tuple[Value, ...]"
Metadata: TypeAlias = dict[str, Value]

REMEDY = "download it again"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Metadata types by number, as `struct` spells them."""
BOOL, STRING, ARRAY = 7, 8, 9

TYPES = {
    0: "float32", 1: "float16", 30: "bfloat16", 28: "float64", 24: "int8", 25: "int16", 26: "int32", 27: "int64",
    2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 20: "iq4_nl", 23: "iq4_xs",
    10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k", 15: "q8_k",
}  # fmt: skip
"""Tensor types by number."""
NAMES = {
    9: "Q8_1", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Types that are refused, by the name their users know."""

MAX_DEPTH = 4
MAX_DIMS = 4
MAX_TENSORS = 65_536
MAX_PAIRS = 10_000
"""Counts beyond which no model goes: some have 2,000 tensors, and 100 pairs."""

TENSOR, PAIR, NESTED = 800, 300, 1_000
"""Bytes of memory that one of each takes at most; nested arrays cost time rather."""

BATCH = 1 << 16
"""Numbers of an array that are converted at a time."""
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
LEAST_PAIR = 8 + 4 + 1
LEAST_TENSOR = 8 + 4 + 4 + 8
"""Bytes of the shortest metadata pair and tensor description there can be."""


def read_header(path: str | os.PathLike[str]) -> tuple[Metadata, dict[str, Entry]]:
    """Metadata by key (arrays as tuples) and tensors by name, in the file's order.

    Raises:
        FileError: the file is damaged, cut short, or something else altogether.
        UnsupportedError: its version, its byte order or a tensor's type is one this version does not read.
    """
    with File(path) as file:
        return parse_header(file)


def parse_header(file: File) -> tuple[Metadata, dict[str, Entry]]:
    """The same of a file already open."""
    stream = Stream(file)
    if file.size < 24 or stream.take(4, "the magic") != b"GGUF":
        raise file.wrong_start("it does not start with 'GGUF' and a header", "pass a .gguf file, or a directory")
    _check_version(file, stream.u32("the version"))
    tensors, pairs = stream.u64("the tensor count"), stream.u64("the metadata count")
    stream.check(tensors, LEAST_TENSOR, f"the table of {tensors:,} tensors")
    stream.check(pairs, LEAST_PAIR, f"the table of {pairs:,} metadata pairs")
    for count, most, what in ((tensors, MAX_TENSORS, "tensors"), (pairs, MAX_PAIRS, "metadata pairs")):
        if count > most:
            raise FileError(file.path, f"it has {count:,} {what} where {most:,} are allowed", REMEDY)
    stream.spend(tensors * TENSOR + pairs * PAIR, "the header")
    metadata = _metadata(stream, pairs)
    described = [_description(stream, index) for index in range(tensors)]
    alignment = _alignment(file, metadata)
    start = -(-stream.position // alignment) * alignment
    entries: dict[str, Entry] = {}
    for name, shape, kind, offset in described:
        if name in entries:
            raise FileError(file.path, f"tensor {quoted(name)} occurs twice", REMEDY)
        if offset % alignment:
            problem = f"tensor {quoted(name)} has offset {offset:,}, not a multiple of {alignment}"
            raise FileError(file.path, problem, REMEDY)
        entries[name] = _entry(file, name, (TYPES[kind], shape), start + offset)
    _check_cover(file, entries, start, alignment)
    file.check_unchanged()
    return metadata, entries


def _check_version(file: File, version: int) -> None:
    if version in (2, 3):
        return
    if version in (2 << 24, 3 << 24):
        raise UnsupportedError(
            f"{file.path}: a big-endian GGUF file; convert it with llama.cpp's gguf_convert_endian.py"
        )
    raise UnsupportedError(f"{file.path}: GGUF version {version}; versions 2 and 3 are read: convert the model again")


def _metadata(stream: Stream, pairs: int) -> Metadata:
    metadata: Metadata = {}
    for index in range(pairs):
        key = stream.string(f"metadata key {index}")
        what = f"metadata {quoted(key)}"
        if key in metadata:
            raise FileError(stream.file.path, f"{what} occurs twice", REMEDY)
        metadata[key] = _value(stream, stream.u32(what), what, MAX_DEPTH)
    return metadata


def _value(stream: Stream, kind: int, what: str, depth: int) -> Value:
    if kind == STRING:
        return stream.string(what)
    if kind != ARRAY:
        return _scalars(stream, kind, 1, what)[0]
    if not depth:
        raise FileError(stream.file.path, f"{what} nests arrays deeper than {MAX_DEPTH}", REMEDY)
    kind, count = stream.u32(what), stream.u64(what)
    if kind == STRING:
        return stream.strings(count, what)
    if kind != ARRAY:
        return _scalars(stream, kind, count, what)
    stream.check(count, 4 + 8, what)
    stream.spend(count * NESTED, what)
    return tuple(_value(stream, ARRAY, what, depth - 1) for _ in range(count))


def _scalars(stream: Stream, kind: int, count: int, what: str) -> tuple[Value, ...]:
    if kind not in SCALARS:
        raise FileError(stream.file.path, f"{what} has value type {kind}; types 0 to 12 exist", REMEDY)
    size = struct.calcsize(f"<{SCALARS[kind]}")
    stream.check(count, size, what)
    stream.spend(count * SCALAR, what)
    values: list[Value] = []
    while len(values) < count:
        some = min(BATCH, count - len(values))
        values += struct.unpack(f"<{some}{SCALARS[kind]}", stream.take(some * size, what))
    if kind != BOOL:
        return tuple(values)
    if not set(values) <= {0, 1}:
        raise FileError(stream.file.path, f"{what} holds a truth value that is neither 0 nor 1", REMEDY)
    return tuple(map(bool, values))


def _description(stream: Stream, index: int) -> tuple[str, tuple[int, ...], int, int]:
    """Name, row-major shape, type and offset within the data of the next tensor."""
    name = stream.string(f"the name of tensor {index}")
    what = f"tensor {quoted(name)}"
    dims = stream.u32(what)
    if dims > MAX_DIMS:
        raise FileError(stream.file.path, f"{what} has {dims:,} dims; GGUF has at most {MAX_DIMS}", REMEDY)
    shape = tuple(stream.u64(what) for _ in range(dims))[::-1]
    kind, offset = stream.u32(what), stream.u64(what)
    if kind not in TYPES:
        known = ", ".join(kind for kind in TYPES.values() if "int" not in kind)
        raise UnsupportedError(
            f"{stream.file.path}: {what} has type {NAMES.get(kind, kind)}; convert the model to one of {known}"
        )
    return name, shape, kind, offset


def _alignment(file: File, metadata: Metadata) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        problem = f"general.alignment is {quoted(str(value))}, not a power of two from 8 to {MAX_ALIGNMENT:,}"
        raise FileError(file.path, problem, REMEDY)
    return value


def _entry(file: File, name: str, layout: tuple[str, tuple[int, ...]], offset: int) -> Entry:
    dtype, shape = layout
    tensor, elements = f"tensor {quoted(name)}", BLOCKS[dtype].elements
    if not is_shape(shape):
        raise FileError(file.path, f"{tensor} has shape {list(shape)}, 2^63 elements or more", REMEDY)
    row = shape[-1] if shape else 1
    if row % elements:
        raise FileError(
            file.path, f"{tensor} has rows of {row:,}, not a multiple of {dtype}'s block of {elements}", REMEDY
        )
    entry = Entry(name, dtype, shape, offset, stored_size(dtype, shape))
    if entry.end > file.size:
        raise FileError(file.path, f"{tensor} ends at byte {entry.end:,} but the file has {file.size:,}", REMEDY)
    return entry


def _check_cover(file: File, entries: dict[str, Entry], start: int, alignment: int) -> None:
    """The tensors lie end to end from the header to the end of the file, but for what aligns them."""
    at, before = start, "the header"
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        tensor = f"tensor {quoted(entry.name)}"
        if entry.offset < at:
            raise FileError(file.path, f"{tensor} starts at byte {entry.offset:,}, inside {before}", REMEDY)
        if entry.offset - at >= alignment:
            problem = f"bytes {at:,} to {entry.offset:,}, before {tensor}, belong to no tensor"
            raise FileError(file.path, problem, REMEDY)
        at, before = entry.end, tensor
    if file.size - at >= alignment:
        raise FileError(file.path, f"its last tensor ends at byte {at:,} but the file has {file.size:,}", REMEDY)
