"""Cells of a row of measurements: read, checked, or refused with the reason that a report lists."""

from collections.abc import Mapping
from dataclasses import dataclass

Row = Mapping[str, str]


@dataclass(frozen=True)
class Skipped:
    """A row that is not priced: its number in the file, from 1, and why."""

    row: int
    reason: str


class UnpricedError(Exception):
    """A row lacks something, or asks for what no curve covers."""


def text(row: Row, name: str) -> str:
    """The cell, or `UnpricedError` where it is empty."""
    value = row.get(name, "")
    if not value:
        raise UnpricedError(f"{name} is not given")
    return value


def choice(row: Row, name: str, known: tuple[str, ...]) -> str:
    """The cell, one of the known words."""
    value = text(row, name).lower()
    if value not in known:
        raise UnpricedError(f"{name} is {value!r:.40}, not one of {', '.join(known)}")
    return value


def number(row: Row, name: str, *, least: float = 1e-9) -> float:
    """The cell as a number, at least `least`."""
    cell = text(row, name)
    try:
        value = float(cell)
    except ValueError:
        raise UnpricedError(f"{name} is {cell!r:.40}, not a number") from None
    if not least <= value < 1e15:
        raise UnpricedError(f"{name} is {cell}, out of range")
    return value


def optional(row: Row, name: str) -> float:
    """The cell as a number, or 0 where it is empty."""
    return number(row, name, least=0) if row.get(name) else 0.0
