"""Where a safetensors file keeps its tensors: eight bytes of length, a JSON header, then nothing but their bytes.

Decides what a sound header is; nothing is allocated on its word. Reads no tensor, knows no torch.
"""

import os

from shardwright.checkpoint.entry import Entry, is_shape, quoted, stored_size
from shardwright.checkpoint.file import File
from shardwright.checkpoint.json_object import MAX_BYTES, REMEDY, parse_object
from shardwright.errors import FileError, UnsupportedError

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_header(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """Every tensor of a safetensors file by name, in the header's order.

    Raises:
        FileError: the file is damaged, cut short, or something else altogether.
        UnsupportedError: a tensor has a type this version does not read.
    """
    with File(path) as file:
        return parse_header(file)


def parse_header(file: File) -> dict[str, Entry]:
    """The same of a file already open."""
    if file.size < 8:
        raise FileError(file.path, f"it has {file.size} bytes and a safetensors file at least 8", REMEDY)
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(MAX_BYTES, file.size - 8):
        problem = f"its header claims {length:,} bytes; {MAX_BYTES:,} are allowed and the file has {file.size:,}"
        raise file.wrong_start(f"{problem}, or it is no safetensors file", REMEDY)
    table = parse_object(file.path, file.read(8, length), "its header")
    _check_metadata(file, table.pop("__metadata__", {}))
    entries = {name: _entry(file, name, fields, 8 + length) for name, fields in table.items()}
    _check_cover(file, entries, 8 + length)
    file.check_unchanged()
    return entries


def _check_metadata(file: File, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileError(file.path, "its '__metadata__' is not an object of strings", REMEDY)


def _entry(file: File, name: str, fields: object, start: int) -> Entry:
    tensor = f"tensor {quoted(name)}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileError(file.path, f"{tensor} is not described by dtype, shape and data_offsets", REMEDY)
    dtype, shape, span = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise UnsupportedError(f"{file.path}: {tensor} has dtype {quoted(str(dtype))}; convert it to one of {known}")
    if not is_shape(shape):
        raise FileError(file.path, f"{tensor} has a shape that is not a list of sizes, at most 2^63 in all", REMEDY)
    if not is_shape(span) or len(span) != 2 or span[0] > span[1]:
        raise FileError(file.path, f"{tensor} has data_offsets that are not [begin, end]", REMEDY)
    begin, end = span
    if start + end > file.size:
        problem = f"{tensor} ends at byte {start + end:,} but the file has {file.size:,}"
        raise FileError(file.path, problem, REMEDY)
    expected = stored_size(DTYPES[dtype], tuple(shape))
    if end - begin != expected:
        problem = f"{tensor} takes {end - begin:,} bytes but {dtype} {shape} is {expected:,}"
        raise FileError(file.path, problem, REMEDY)
    return Entry(name, DTYPES[dtype], tuple(shape), start + begin, end - begin)


def _check_cover(file: File, entries: dict[str, Entry], start: int) -> None:
    """The tensors lie end to end from the header to the end of the file: what else could hide there has no reader."""
    at, before = start, "the header"
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        tensor = f"tensor {quoted(entry.name)}"
        if entry.offset < at:
            raise FileError(file.path, f"{tensor} starts at byte {entry.offset:,}, inside {before}", REMEDY)
        if entry.offset > at:
            problem = f"bytes {at:,} to {entry.offset:,}, before {tensor}, belong to no tensor"
            raise FileError(file.path, problem, REMEDY)
        at, before = entry.end, tensor
    if at != file.size:
        raise FileError(file.path, f"its last tensor ends at byte {at:,} but the file has {file.size:,}", REMEDY)
