"""A command line of one option: what the library takes that ours are made with."""

from pathlib import Path

import typer


def main(path: Path = Path()) -> None:
    """Do nothing."""


typer.run(main)
