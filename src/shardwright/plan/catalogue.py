"""Tables of names: how one is found, and what is said of a name that is not there. The data is TOML files."""

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from shardwright.errors import UsageError

Table = Mapping[str, Mapping[str, Any]]


def read(name: str) -> dict[str, dict[str, Any]]:
    """The tables of one of this package's data files."""
    return tomllib.loads(files("shardwright.plan").joinpath("data", f"{name}.toml").read_text("utf-8"))


def resolve(table: Table, wanted: str, what: str) -> str:
    """The key of a name or one of its aliases; case does not matter, and blanks and underscores are dashes.

    Raises:
        UsageError: there is none; the near ones are listed.
    """
    names = {_plain(alias): key for key, row in table.items() for alias in (key, *row.get("aliases", ()))}
    found = names.get(_plain(wanted))
    if found is None:
        near = get_close_matches(_plain(wanted), names, n=4, cutoff=0.45)
        remedy = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(sorted(table))}"
        raise UsageError(what, wanted, f"there is no such {what}", remedy)
    return found


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "-").replace("_", "-")
