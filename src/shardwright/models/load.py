"""The one loader: from a path to this rank's part of a model. Every rank reads only its own bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike

import torch
from torch import nn

from shardwright.checkpoint.opening import open_checkpoint
from shardwright.checkpoint.source import Checkpoint
from shardwright.comm.group import Group
from shardwright.errors import FileError, UnsupportedError, UsageError
from shardwright.layout.spec import Specs
from shardwright.models.config import ModelConfig
from shardwright.models.decoder import Decoder
from shardwright.models.family import Naming
from shardwright.models.read import read_config
from shardwright.models.room import Room
from shardwright.models.specs import Cuts, model_specs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

Progress = Callable[[int, int], None]
"""Called with the parameters filled so far and their number."""


@dataclass(frozen=True)
class Loaded:
    """A rank's part of a model. weight_bytes: in memory here · bytes_read: of tensors in the files, by this rank."""

    model: Decoder
    weight_bytes: int
    bytes_read: int


def load(
    path: str | PathLike[str],
    group: Group,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
    sequence: bool = False,
    among: Group | None = None,
) -> Loaded:
    """Load a Hugging Face directory or a GGUF file over the group's ranks.

    dtype: by name; by default the file's own, float32 for a quantised one. Every tensor of the file must have its place
    in the model, so that what is computed is what was trained. sequence: as in `Cuts`. among: the ranks that must have
    opened the same files, by default the group's.

    Raises:
        FileError, UnsupportedError: the checkpoint is damaged, or of a kind not built, or another one on some rank;
            alike on all ranks.
        UsageError: an unknown dtype.
    """
    with open_checkpoint(path) as checkpoint:
        checkpoint.will_need()
        _check_same(checkpoint, among or group)
        config, naming = read_config(checkpoint)
        dtype = dtype or config.dtype
        if dtype not in DTYPES:
            raise UsageError("dtype", dtype, "there is no such weight type", f"use one of {', '.join(DTYPES)}")
        _check_tensors(checkpoint, config, naming)  # first: of a config that lies, no table can be made
        cuts = Cuts.balanced(config, group.size, sequence=sequence)
        specs = model_specs(config, cuts, group.rank, naming, dtype=dtype)
        with torch.device("meta"):
            model = Decoder(config, group, cuts).to(DTYPES[dtype])
        _fill(model, specs, checkpoint, progress or (lambda done, total: None))
        return Loaded(model, sum(spec.nbytes for spec in specs.values()), checkpoint.bytes_read)


def _check_same(checkpoint: Checkpoint, group: Group) -> None:
    """Refuse, on every rank, files that differ between ranks: a directory swapped in between, another revision."""
    if group.size == 1:
        return
    mine = checkpoint.identity()
    numbers = torch.tensor(list(mine.values()), dtype=torch.int64)
    rows = group.all_gather(numbers, 0, [len(mine)] * group.size, tag="checkpoint").view(group.size, -1).tolist()
    what = [name for name, column in zip(mine, zip(*rows, strict=True), strict=True) if len(set(column)) > 1]
    if what:
        others = [str(rank) for rank, row in enumerate(rows) if row != rows[0]]
        said = f"rank{'s' * (len(others) > 1)} {', '.join(others)}"
        problem = f"{said} and rank 0 opened different files by this name: their {' and '.join(what)} differ"
        raise FileError(checkpoint.path, problem, "let all ranks see the same, and try again when nothing replaces it")


def _fill(model: Decoder, specs: Specs, checkpoint: Checkpoint, progress: Progress) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if expected != {name: spec.shape for name, spec in specs.items()}:
        raise AssertionError("models.specs and models.decoder disagree about the model's parameters")
    room = Room(sum(spec.nbytes for spec in specs.values()), len(specs))
    for done, (name, spec) in enumerate(specs.items(), start=1):
        weight = room.tensor(spec.shape, DTYPES[spec.dtype])
        checkpoint.fill(weight, spec)
        module, _, parameter = name.rpartition(".")
        model.get_submodule(module).register_parameter(parameter, nn.Parameter(weight))
        progress(done, len(specs))


def _check_tensors(checkpoint: Checkpoint, config: ModelConfig, naming: Naming) -> None:
    """Refuse, on every rank whatever it holds, a file that is not this model's: a tensor missing, misshapen or over.

    One that the model would not use is refused because it would compute something else than the file's authors did.
    """
    if config.layers > len(checkpoint.entries):
        problem = f"{config.layers:,} layers cannot be made of {len(checkpoint.entries):,} tensors"
        raise FileError(checkpoint.path, problem, "use the config these weights came with")
    whole = model_specs(config, Cuts.balanced(config, 1), 0, naming)
    used = {piece.source: piece.source_shape for spec in whole.values() for piece in spec.pieces}
    for name, shape in used.items():
        stored = checkpoint.expect(name, shape)
        if not stored.floating:
            raise UnsupportedError(f"{stored.path}: tensor '{name}' holds {stored.dtype}; a model's weights are floats")
    ignored = {template.format(i=layer) for template in naming.ignored for layer in range(config.layers)}
    if config.tied:
        ignored.add(f"{naming.names['head']}.weight")
    unused = checkpoint.entries.keys() - used.keys() - ignored
    extra = sorted(name for name in unused if not checkpoint.adds_nothing(name))
    if extra:
        problem = f"tensor '{extra[0]}' ({len(extra)} such) has no place in a {config.family} model"
        raise FileError(checkpoint.path, problem, "check that config and weights belong together")
