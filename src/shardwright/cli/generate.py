"""`shardwright generate`: continue a prompt with a model split over ranks of this host."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardwright.cli.options import ranks_or_auto, with_options
from shardwright.errors import FileError, UsageError

if TYPE_CHECKING:
    from shardwright.engine.request import Request
    from shardwright.engine.session import RunReport, Session
    from shardwright.engine.source import ModelSource
    from shardwright.models.config import ModelConfig
    from shardwright.plan.measured import Choice

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The command line of `generate`."""

    prompt: Annotated[str, typer.Argument(help="What to say to the model.")]
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face directory or a GGUF file. By default the embedded SmolLM2-135M.")
    ] = None
    tp: Annotated[
        str,
        typer.Option(metavar="N|auto", help="Ranks to split the model over; auto: as planned for here."),
    ] = "1"
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16. By default float32 for GGUF, the file's own for safetensors."),
    ] = None
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0
    seed: Annotated[int, typer.Option(help="Of the draws at a temperature above 0.")] = 0
    top_k: Annotated[int, typer.Option(help="Draw among that many likeliest tokens; 0 for all.")] = 0
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest that reach this probability.")] = 1.0
    min_p: Annotated[float, typer.Option(help="Draw among those this fraction as likely as the likeliest.")] = 0.0
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the text as it stands.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")] = False


@with_options(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Continue a prompt; the text streams to stdout, one line of figures to stderr.

    Example:  shardwright generate --tp 2 "What is the capital of France?"
    """
    from shardwright.comm.launch import check_ranks
    from shardwright.engine.request import Request, SamplingParams
    from shardwright.engine.source import ModelSource
    from shardwright.models.embedded import embedded_model

    wanted = ranks_or_auto(options.tp)
    check_ranks(1 if wanted is None else wanted)
    if options.dtype not in (None, *DTYPES):
        raise UsageError("dtype", options.dtype, "there is no such weight type", f"use {' or '.join(DTYPES)}")
    params = SamplingParams(**{field.name: getattr(options, field.name) for field in fields(SamplingParams)})
    source = ModelSource.open(options.model or embedded_model())
    tokens = tuple(source.encode(options.prompt, raw=options.raw))
    request = Request(number=0, tokens=tokens, params=params, stop=tuple(sorted(source.tokenizer.stop_ids)))
    choice = _choice(source.config, len(tokens), options) if wanted is None else None
    tp = choice.tp if choice else wanted or 1
    with _session(source.path, options.dtype, tp) as session:
        generated = _streamed(session, request, source, quiet=options.as_json)
    report = session.report
    if options.as_json:
        text = source.tokenizer.decode(generated)
        figures = {"text": text, "token_ids": generated, "prompt_token_ids": list(tokens), **asdict(report)}
        figures |= {"predicted_tokens_per_s": choice.tokens_per_s} if choice else {}
        print(json.dumps(figures, ensure_ascii=False))
    else:
        print(_summary(report, len(generated)), file=sys.stderr)
        if choice:
            print(_compared(choice, report), file=sys.stderr)


def _choice(config: "ModelConfig", prompt: int, options: GenerateOptions) -> "Choice":
    """The number of ranks that should decode this fastest here."""
    from shardwright.cli.measure import measured_machine
    from shardwright.layout.spec import BYTES
    from shardwright.plan.declared import of_config
    from shardwright.plan.measured import fastest_decode

    width = BYTES[options.dtype or config.dtype]
    return fastest_decode(of_config(config), measured_machine(), prompt, options.max_tokens, width)


def _compared(choice: "Choice", report: "RunReport") -> str:
    predicted = choice.tokens_per_s[choice.tp]
    others = ", ".join(f"tp {tp} {speed:.1f}" for tp, speed in choice.tokens_per_s.items() if tp != choice.tp)
    off = report.tokens_per_s / predicted - 1
    return (
        f"tp auto chose {choice.tp}: predicted {predicted:.1f} tokens/s, measured {report.tokens_per_s:.1f} "
        f"({off:+.0%}); predicted at {others}"
    )


@contextmanager
def _session(path: Path, dtype: str | None, tp: int) -> "Iterator[Session]":
    """Ranks forked from this process, which has imported what they need and computed nothing."""
    from shardwright.comm.job import Job
    from shardwright.engine.session import Session
    from shardwright.engine.worker import serve

    started = time.monotonic()
    with Job(tp, lambda group, channel: serve(group, channel, str(path), dtype)) as job, _bar() as progress:
        yield Session(job, tp, started, progress)


def _streamed(session: "Session", request: "Request", source: "ModelSource", *, quiet: bool) -> list[int]:
    """Generate, printing text as it becomes whole; the tokens."""
    tokens, stream, finish = [], source.tokenizer.stream(), None
    for new in session.run([request]):
        finish = new.finish
        if finish != "nan":
            tokens.append(new.token)
            if not quiet:
                print(stream.step(new.token), end="", flush=True)
    if tokens and not quiet:
        print(stream.finish(), flush=True)
    if finish == "nan":
        said = f"its logits are no numbers (NaN) behind {len(tokens)} generated tokens"
        raise FileError(source.path, said, "check its weights, or try --dtype float32")
    return tokens


@contextmanager
def _bar() -> "Iterator[Callable[[int, int], None] | None]":
    """A progress bar on stderr while the weights load, gone when they are there; none where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading weights")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if done == total:
                bar.stop()

        yield show


def _summary(report: "RunReport", tokens: int) -> str:
    read = ", ".join(f"{rank.bytes_read / 1e6:.1f}" for rank in report.ranks)
    return (
        f"loaded in {report.load_s:.1f} s · first token after {report.ttft_s:.2f} s · {tokens} tokens at "
        f"{report.tokens_per_s:.1f} tokens/s · {report.comm_share:.0%} of it in communication · "
        f"MB read by rank: {read}" + (f" · decoded by torch: {report.torch_because}" if report.torch_because else "")
    )
