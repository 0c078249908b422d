"""`shardwright parallelize`: how `parallelize_model` would split a Hugging Face model; nothing of it runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardwright.cli.options import with_options
from shardwright.errors import FileError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class ParallelizeOptions:
    """The command line of `parallelize`."""

    model: Annotated[Path, typer.Option(help="A Hugging Face directory; its config.json is enough.")]
    tp: Annotated[int, typer.Option(help="Ranks to split the model over; any number.")]
    batch: Annotated[int, typer.Option(help="Sequences of the forward whose bytes are counted.")] = 1
    sequence: Annotated[int, typer.Option(help="Tokens of each.")] = 16
    rules: Annotated[str | None, typer.Option(help="'classical': the field's simple rule instead of the flow.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")] = False


@with_options(ParallelizeOptions)
def parallelize(options: ParallelizeOptions) -> None:
    """Print what would be split, what would move in a forward, and why the rest stays whole.

    Example:  shardwright parallelize --model path/to/model --tp 3
    """
    from shardwright.comm.launch import check_ranks

    check_ranks(options.tp)
    for name, value in (("batch", options.batch), ("sequence", options.sequence)):
        if value < 1:
            raise UsageError(name, value, "a forward has at least one", "pass 1 or more")
    from shardwright.parallelize.model import make_plan
    from shardwright.parallelize.trace import trace

    model = _model(options.model)
    traced = trace(model, _ids(model, options.batch, options.sequence))
    plan = make_plan(model, traced, options.tp, rules=options.rules)
    print(plan.to_json() if options.as_json else plan)


def _model(path: Path) -> "nn.Module":
    """The model of a directory on the meta device: no weight is read."""
    import torch

    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
    except ImportError as error:
        raise UnsupportedError("this command builds the model with transformers; pip install transformers") from error

    if not (path / "config.json").is_file():
        raise FileError(path, "there is no config.json", "pass a Hugging Face directory")
    try:
        config: Any = AutoConfig.from_pretrained(path)
    except (ValueError, OSError, KeyError) as error:
        raise FileError(
            path / "config.json", str(error).splitlines()[0], "see which models transformers knows"
        ) from error
    kinds = [AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForMaskedLM]
    kind = next((one for one in kinds if type(config) in one._model_mapping), None)
    if kind is None:
        raise FileError(
            path / "config.json", f"{config.model_type} is no language model", "pass one, or use the Python API"
        )
    with torch.device("meta"):
        return kind.from_config(config).train(False)  # type: ignore[no-any-return]


def _ids(model: "nn.Module", batch: int, sequence: int) -> dict[str, Any]:
    import inspect

    import torch

    ids = torch.ones(batch, sequence, dtype=torch.int64)
    taken = inspect.signature(model.forward).parameters
    return {name: ids for name in ("input_ids", "decoder_input_ids") if name in taken}
