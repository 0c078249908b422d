"""`shardwright train`: run a recipe over ranks of this host, or say what it would take."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardwright.cli.options import ranks_or_auto, with_options
from shardwright.errors import UsageError

if TYPE_CHECKING:
    from shardwright.comm.channel import Channel
    from shardwright.comm.group import Group
    from shardwright.models.config import ModelConfig
    from shardwright.models.decoder import Decoder
    from shardwright.plan.recipes import TrainingChoice
    from shardwright.text.tokenizer import Tokenizer
    from shardwright.train.dry_run import DryRun
    from shardwright.train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The command line of `train`."""

    recipe: Annotated[Path | None, typer.Argument(help="A TOML file; see --schema, and examples/.")] = None
    tp: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="In place of the recipe's parallel.tensor; auto: tensor and data as planned for here.",
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print each rank's memory and a step's collectives; train nothing.")
    ] = False
    schema: Annotated[bool, typer.Option("--schema", help="Print what a recipe may hold, as a JSON schema.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")] = False


@with_options(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train what a recipe says; a run that was killed goes on from its newest checkpoint.

    Example:  shardwright train examples/pretrain_small.toml
    """
    from shardwright.comm.launch import check_ranks
    from shardwright.train.recipe import Recipe

    if options.schema:
        print(json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False))
        return
    if options.recipe is None:
        raise UsageError("RECIPE", "(not set)", "there is nothing to train", "pass a TOML file, or --schema")
    recipe, choice = _split(Recipe.load(options.recipe), options.tp)
    check_ranks(recipe.ranks)
    if options.dry_run:
        _show_dry_run(recipe, as_json=options.as_json)
        return
    last, speeds = _run(recipe, quiet=options.as_json)
    if options.as_json:
        last |= (
            {"predicted_tokens_per_s": {_named(*pair): s for pair, s in choice.tokens_per_s.items()}} if choice else {}
        )
        print(json.dumps(last, ensure_ascii=False))
    elif choice:
        print(_compared(choice, speeds), file=sys.stderr)


def _split(recipe: "Recipe", tp: str | None) -> "tuple[Recipe, TrainingChoice | None]":
    """The recipe with the ranks that the command line asks for, and how they were chosen where it leaves that open."""
    if tp is None:
        return recipe, None
    wanted, choice = ranks_or_auto(tp), None
    split = {"tensor": wanted}
    if wanted is None:
        from shardwright.cli.measure import measured_machine
        from shardwright.plan.recipes import fastest_training, job_of

        choice = fastest_training(job_of(recipe, _config(recipe)), measured_machine())
        split = {"tensor": choice.tensor, "data": choice.data}
    values = recipe.model_dump()
    return type(recipe).of({**values, "parallel": {**values["parallel"], **split}}), choice


def _compared(choice: "TrainingChoice", speeds: list[float]) -> str:
    """What was predicted beside what the progress lines said, the first one left out where there are others."""
    from statistics import median

    pair = choice.tensor, choice.data
    predicted = choice.tokens_per_s[pair]
    others = ", ".join(f"{_named(*other)} {s:.0f}" for other, s in choice.tokens_per_s.items() if other != pair)
    said = f"tp auto chose {_named(*pair)}: predicted {predicted:.0f} tokens/s"
    if speeds:
        measured = median(speeds[1:] or speeds)
        said += f", measured {measured:.0f} ({measured / predicted - 1:+.0%})"
    return f"{said}; predicted at {others or 'no other split, as none fits'}"


def _named(tensor: int, data: int) -> str:
    return f"tp {tensor} dp {data}"


def _run(recipe: "Recipe", *, quiet: bool) -> tuple[dict[str, Any], list[float]]:
    """Fork the ranks, which train by themselves; what rank 0 tells is printed. The last figures, and all speeds."""
    from shardwright.comm.job import Job
    from shardwright.train.origin import origin_of

    if recipe.model.path is not None:
        origin_of(recipe)  # a damaged or missing model is said before torch is loaded
    last: dict[str, Any] = {}
    speeds: list[float] = []
    with Job(recipe.ranks, _rank(recipe)) as job:
        while (event := job.receive()) is not None:
            event.pop("rank")
            last.update({} if "sample" in event else event)
            speeds += [event["tokens_per_s"]] if "tokens_per_s" in event else []
            if not quiet:
                print(_line(event, recipe.train.steps), flush=True, file=sys.stderr if "warning" in event else None)
    return last, speeds


def _rank(recipe: "Recipe") -> "Callable[[Group, Channel], None]":
    from shardwright.engine.engine import Engine  # noqa: F401  imported once, before the fork, for all ranks
    from shardwright.train.trainer import Trainer

    def body(group: "Group", channel: "Channel") -> None:
        Trainer(recipe, group, report=channel.send, sampler=_sampler(recipe)).run()

    return body


def _sampler(recipe: "Recipe") -> "Callable[[Decoder, Tokenizer], str]":
    """Continues the recipe's prompt greedily; each rank of the tensor group runs it, in step."""
    from shardwright.engine.engine import Engine
    from shardwright.engine.request import Request, SamplingParams

    def sample(model: "Decoder", tokenizer: "Tokenizer") -> str:
        engine, tokens = Engine(model), tokenizer.encode(recipe.output.sample_prompt)
        params = SamplingParams(max_tokens=recipe.output.sample_tokens)
        engine.add(Request(number=0, tokens=tuple(tokens), params=params, stop=tuple(sorted(tokenizer.stop_ids))))
        generated = []
        while engine.busy:
            generated += [new.token for new in engine.step() if new.finish != "nan"]
        return tokenizer.decode(tokens + generated)

    return sample


def _line(event: dict[str, Any], steps: int) -> str:
    """One event for people."""
    if "warning" in event:
        return f"warning: {event['warning']}"
    if "resumed" in event:
        return f"resumed after step {event['resumed']}"
    if "saved" in event:
        return f"checkpoint of step {event['saved']} written in {event['seconds']:.1f} s"
    if "sample" in event:
        return f"sample after step {event['step']}: {event['sample']}"
    if "validation" in event:
        return f"step {event['step']}/{steps} · validation loss {event['validation']:.4f}"
    memory = ", ".join(f"{each / 1e6:.0f}" for each in event["memory"])
    return (
        f"step {event['step']}/{steps} · loss {event['loss']:.4f} · norm {event['norm']:.2f} · lr {event['lr']:.2e} · "
        f"{event['tokens_per_s']:.0f} tokens/s · {event['comm_share']:.0%} of it in communication · "
        f"MB at most by rank: {memory}"
    )


def _config(recipe: "Recipe") -> "ModelConfig":
    """Of the model that a recipe names, without weights and data."""
    from shardwright.train.origin import model_path, model_tokenizer, origin_of

    wanted = recipe.data.tokenizer
    if isinstance(wanted, int):
        words: int | None = wanted
    elif recipe.model.config is not None and "vocab_size" in recipe.model.config:
        words = None
    else:
        words = model_tokenizer(model_path(recipe) if wanted == "model" else recipe.place(wanted)).vocabulary
    return origin_of(recipe, words).config


def _show_dry_run(recipe: "Recipe", *, as_json: bool) -> None:
    """What ranks would hold and move; activations as planned, since nothing is run that would keep them."""
    from shardwright.plan.memory import held
    from shardwright.plan.recipes import job_of, recut
    from shardwright.train.dry_run import dry_run

    config, parallel = _config(recipe), recipe.parallel
    job = recut(job_of(recipe, config), parallel.tensor, parallel.data)
    found, planned = dry_run(recipe, config), held(job, 0)
    activations = int(planned.activations + planned.logits)
    if as_json:
        print(json.dumps(found.as_dict() | {"predicted_activations": activations}))
    else:
        _show(found, activations)


def _show(found: "DryRun", activations: int) -> None:
    from rich.console import Console
    from rich.table import Table

    memory = Table(title=f"{found.parameters / 1e6:,.1f} M parameters; GB by rank, activations not counted")
    for heading in ("rank", "weights", "gradients", "optimiser", "total"):
        memory.add_column(heading, justify="right")
    for rank in found.ranks:
        parts = (rank.weights, rank.gradients, rank.optimizer, rank.total)
        memory.add_row(str(rank.rank), *(f"{part / 1e9:,.3f}" for part in parts))
    traffic = Table(title="collectives of a step on rank 0")
    for heading in ("among", "collective", "calls", "MB handed over"):
        traffic.add_column(heading, justify="right")
    for row in found.traffic:
        traffic.add_row(f"{row.axis} ranks", row.op, f"{row.calls:,}", f"{row.bytes / 1e6:,.1f}")
    console = Console()
    console.print(memory)
    console.print(f"activations, predicted: {activations / 1e9:,.3f} GB on the fullest rank", highlight=False)
    console.print(traffic)
