"""Many things priced at once: records whose fields are arrays, one element a candidate or a row.

Decides how single records become one record of arrays. Knows nothing of what the fields mean.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

Floats = Any
"""One value for each candidate, a float64 array; a plain number is the same everywhere, and formulas take both."""

T = TypeVar("T")


def stacked(records: Sequence[T]) -> T:
    """One record whose every field is the array of the records' fields."""
    kind = type(records[0])
    columns = {f.name: np.array([getattr(record, f.name) for record in records]) for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**columns)


def broadcast(record: T, size: int) -> T:
    """The same record for each of `size` candidates."""
    kind = type(record)
    return kind(**{f.name: np.broadcast_to(getattr(record, f.name), size) for f in fields(kind)})  # type: ignore[arg-type]


def ceil_div(a: Floats, b: Floats) -> Floats:
    """The larger share of `a` things dealt out over `b` ranks."""
    return -(-a // b)
