"""Many things priced at once: records whose fields are arrays, one element a candidate or a row.

Decides how single records become one record of arrays. Knows nothing of what the fields mean.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np

Floats = Any
"""One value for each candidate, a float64 array; a plain number is the same everywhere, and formulas take both."""

T = TypeVar("T")


def stacked(records: Sequence[T]) -> T:
    """One record whose every field is the array of the records' fields; records among the fields are stacked too."""
    kind = type(records[0])
    columns = {f.name: [getattr(record, f.name) for record in records] for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: stacked(c) if is_dataclass(c[0]) else np.array(c) for name, c in columns.items()})


def ceil_div(a: Floats, b: Floats) -> Floats:
    """The larger share of `a` things dealt out over `b` ranks."""
    return -(-a // b)


def picked(record: T, at: Any) -> T:
    """One candidate, or those of an index array, of a record of arrays or of a record of such records."""
    values: dict[str, Any] = {}
    for f in fields(type(record)):  # type: ignore[arg-type]
        value = getattr(record, f.name)
        nested = is_dataclass(value) and not isinstance(value, type)
        values[f.name] = picked(value, at) if nested else value[at] if np.ndim(value) else value
    return type(record)(**values)
