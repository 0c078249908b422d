"""A command's options as a frozen dataclass: its fields are the command line, and the command takes one argument.

What several commands take is read here, once.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from shardwright.errors import UsageError

T = TypeVar("T")


def ranks_or_auto(said: str) -> int | None:
    """What `--tp` says: a number of ranks, or None for `auto`."""
    if said == "auto":
        return None
    try:
        return int(said)
    except ValueError:
        raise UsageError("tp", said, "it is a number of ranks, or auto", "try --tp 2") from None


PICTURES = (".svg", ".png")
"""How names of pictures end."""


def check_output(option: str, path: Path | None, endings: tuple[str, ...]) -> None:
    """Refuse a file that cannot be written there, before there is anything to write."""
    if path is None:
        return
    if path.suffix not in endings:
        raise UsageError(option, path, f"it is written as {' or '.join(endings)}", f"end the name in {endings[0]}")
    if path.is_dir():
        raise UsageError(option, path, "there is a directory of that name", "choose another one")
    if not path.parent.is_dir():
        raise UsageError(option, path, "there is no such directory", "make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(option, path, "it cannot be written", "check the permissions, or choose another place")


def with_options(kind: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Turn `command(options: kind)` into the function of keywords that Typer reads its options from.

    Fields are `Annotated[type, typer.Option(…) | typer.Argument(…)]`; one without a default is required.
    """
    hints = get_type_hints(kind, include_extras=True)

    def decorate(command: Callable[[T], None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            command(kind(**values))

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = hints
        run.__dict__["__signature__"] = inspect.Signature(
            [
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    annotation=hints[field.name],
                    default=inspect.Parameter.empty if field.default is MISSING else field.default,
                )
                for field in fields(kind)  # type: ignore[arg-type]
            ]
        )
        return run

    return decorate
