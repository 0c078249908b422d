"""From a path to an opened checkpoint.

Decides which files make a checkpoint and where they are looked for. Pickles are never opened. Knows no torch, and of
no tensor what it is for.
"""

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from shardwright.checkpoint import gguf, safetensors
from shardwright.checkpoint.entry import Entry, quoted
from shardwright.checkpoint.file import File
from shardwright.checkpoint.json_object import read_object
from shardwright.checkpoint.source import Checkpoint
from shardwright.errors import FileError, UnsupportedError

PART = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a GGUF file, or a directory of config.json and safetensors files (one, or several with their index).

    Raises:
        FileError: there is no such thing, a part of it is missing, or a file is damaged.
        UnsupportedError: the weights are of a kind this version does not read.
    """
    where = Path(path)
    if os.path.isdir(where):
        return _open_directory(where)
    if not os.path.lexists(where):
        remedy = "check the path; a model of a hub is downloaded first (hf download NAME --local-dir DIRECTORY)"
        raise FileError(where, "there is no such file or directory", remedy)
    if where.suffix == ".safetensors":
        raise UnsupportedError(f"{path}: weights alone have no config; pass the directory that holds its config.json")
    if where.suffix in PICKLES:
        raise _pickled(where)
    with ExitStack() as stack:
        file = stack.enter_context(File(where))
        metadata, entries = gguf.parse_header(file)
        if metadata.get("split.count", 1) not in (0, 1):
            raise UnsupportedError(f"{path}: one of several GGUF files; join them with llama-gguf-split --merge")
        checkpoint = Checkpoint(path, metadata, {file: entries})
        stack.pop_all()
    return checkpoint


def _open_directory(where: Path) -> Checkpoint:
    try:
        names = sorted(os.listdir(where))
    except OSError as error:
        raise FileError(where, f"the directory cannot be read: {error.strerror}", "check its permissions") from None
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise UnsupportedError(
                f"{where}: an adapter is no model; merge it into its own with peft: merge_and_unload()"
            )
        remedy = _gguf_within(where, names) or "pass a directory written by save_pretrained, or a .gguf file"
        raise FileError(where, "the directory has no config.json", remedy)
    config = read_object(where / "config.json")
    with ExitStack() as stack:
        checkpoint = Checkpoint(where, config, _open_weights(where, names, stack))
        stack.pop_all()
    return checkpoint


def _open_weights(where: Path, names: list[str], stack: ExitStack) -> dict[File, Mapping[str, Entry]]:
    if "model.safetensors" in names:
        file = stack.enter_context(File(where / "model.safetensors"))
        return {file: safetensors.parse_header(file)}
    if "model.safetensors.index.json" in names:
        parts = read_index(where / "model.safetensors.index.json")
        for name in names:
            if PART.fullmatch(name) and name not in parts:
                raise FileError(where / name, "the index does not name this part", "remove it, or download all again")
        return dict(_open_part(where / name, tensors, stack) for name, tensors in parts.items())
    for name in names:
        if name.endswith(PICKLES):
            raise _pickled(where / name)
    problem = "the directory has neither model.safetensors nor model.safetensors.index.json"
    raise FileError(where, problem, _gguf_within(where, names) or "download the weights too")


def _gguf_within(where: Path, names: list[str]) -> str | None:
    """What to do about a directory of GGUF files."""
    return next((f"pass {where / name}" for name in names if name.endswith(".gguf")), None)


def _open_part(path: Path, tensors: list[str], stack: ExitStack) -> tuple[File, Mapping[str, Entry]]:
    file = stack.enter_context(File(path))
    header = safetensors.parse_header(file)
    for name in tensors:
        if name not in header:
            raise FileError(path, f"the index promises tensor {quoted(name)} in it", "download both again")
    if extra := sorted(header.keys() - set(tensors)):
        problem = f"the index does not place tensor {quoted(extra[0])} in it"
        raise FileError(path, f"{problem} ({len(extra)} such)", "download both again")
    return file, header


def read_index(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """The parts of a sharded checkpoint, files beside its index, and the tensors each one holds.

    Raises:
        FileError: it is damaged, or names something other than a safetensors file beside it.
    """
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FileError(path, "it has no object 'weight_map'", "download it again")
    parts: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
            problem = f"tensor {quoted(tensor)} is said to be in {quoted(str(name))}, no safetensors file beside it"
            raise FileError(path, problem, "download it again")
        parts.setdefault(name, []).append(tensor)
    return parts


def _pickled(path: Path) -> UnsupportedError:
    remedy = "convert it with transformers: save_pretrained(directory, safe_serialization=True)"
    return UnsupportedError(f"{path}: a pickle can run any code and is never opened; {remedy}")
