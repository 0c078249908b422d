"""`shardwright`: the commands, and what every one of them does with an error or a signal.

Each command is a file of its own that imports its domain when it runs, so that `--help` is quick.
"""

import os
import signal
import sys
from types import FrameType

import typer
from typer.exceptions import TyperException

import shardwright
from shardwright.cli import check, convert, explain, generate, kernels, measure, parallelize, plan, train, validate
from shardwright.errors import RankError, ShardwrightError, UsageError

INTERRUPTED, TERMINATED, PIPE_CLOSED = 130, 143, 141

app = typer.Typer(
    name="shardwright",
    help="Split any transformer over any number of devices; run it, train it, and know beforehand which split is best.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"default_map": {"help": False}},  # None would import pydantic, a third of a help's time
    epilog="Exit codes: 0 done · 2 wrong argument · 3 bad file · 4 not supported · 5 ranks disagree · 6 a rank failed "
    "· 130 interrupted · 143 terminated",
)
app.command()(generate.generate)
app.command()(kernels.kernels)
app.command()(check.check)
app.command()(explain.explain)
app.command()(parallelize.parallelize)
app.command()(plan.plan)
app.command()(measure.measure)
app.command()(validate.validate)
app.command()(train.train)
app.command()(convert.reshard)
app.command()(convert.export)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shardwright {shardwright.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run a command; end with a documented exit code and at most two lines about what went wrong."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(app(standalone_mode=False))
    except TyperException as error:
        said = error.format_message().rstrip(".")
        if said:  # without a command the help has been printed, and there is nothing to add
            context = vars(error).get("ctx")  # of errors in a command's own arguments
            command = f" {context.info_name}" if context and context.parent else ""
            print(f"shardwright: {said}; see shardwright{command} --help", file=sys.stderr)
        sys.exit(UsageError.exit_code)
    except ShardwrightError as error:
        if isinstance(error, RankError):
            _show_notes(error)
        print(f"shardwright: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit's flush finds no closed pipe
        sys.exit(PIPE_CLOSED)


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


def _show_notes(error: RankError) -> None:
    """The rank's traceback, for whoever mends it; the cause itself comes last."""
    for note in getattr(error, "__notes__", []):
        print(note, file=sys.stderr, end="")
