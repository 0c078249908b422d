"""Rows of a table of serving measurements, as one stage of arrays.

Decides which columns are inputs and which rows cannot be priced. `model` is an input here: sizes are the built-in
model's of that name.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from shardwright.errors import UsageError
from shardwright.plan.blocks import Blocks, built_in
from shardwright.plan.curves import Machine
from shardwright.plan.hardware import machine
from shardwright.plan.quantities import stacked
from shardwright.plan.row_cells import Row, Skipped, UnpricedError, number, optional, text
from shardwright.plan.serving import Load, Server, Stage, server, service

PRECISIONS = {"": 0.0, "bf16": 0.0, "fp16": 0.0, "fp8": 1.0}
"""Whether weights and products are fp8; a row that says nothing is bf16."""

Labels = tuple[str, str]


def is_serving(row: Row) -> bool:
    """Whether a table has the columns of serving measurements."""
    return {"isl", "osl", "tpot_ms"} <= set(row)


def price_serving(
    rows: Sequence[Row], servers: Mapping[str, Server] | None = None
) -> tuple[list[int], list[Labels], list[float], list[float], list[Skipped]]:
    """Row numbers, labels (family, device), seconds per token predicted and measured, and the rows that are skipped.

    servers: profiles by framework in place of the shipped ones (to fit them).
    """
    kept: list[int] = []
    records: list[tuple[Blocks, Machine, Server, Load]] = []
    splits: list[tuple[float, float]] = []
    measured: list[float] = []
    skipped: list[Skipped] = []
    for at, row in enumerate(rows, 1):
        try:
            seconds, record, split = number(row, "tpot_ms") / 1e3, _record(row, servers or {}), _split(row)
        except (UsageError, UnpricedError) as error:
            skipped.append(Skipped(at, str(error)))
            continue
        kept.append(at)
        measured.append(seconds)
        records.append(record)
        splits.append(split)
    if not records:
        raise UsageError("rows", len(rows), "none can be priced", skipped[0].reason)
    blocks, machines, profiles, load = (stacked(column) for column in zip(*records, strict=True))
    tp, pp = np.array(splits).T
    priced = service(Stage(blocks=blocks, machine=machines, server=profiles, tp=tp, pp=pp), load)
    labels = [(rows[at - 1]["model"], rows[at - 1]["device"]) for at in kept]
    return kept, labels, [float(s) for s in priced.per_token], measured, skipped


def _record(row: Row, servers: Mapping[str, Server]) -> tuple[Blocks, Machine, Server, Load]:
    precision = row.get("precision", "").lower()
    if precision not in PRECISIONS:
        raise UnpricedError(f"precision {precision}: curves cover bf16, fp16 and fp8")
    if PRECISIONS[precision] and not machine(text(row, "device")).fp8:
        raise UnpricedError(f"precision fp8: {row['device']} has no such products")
    load = Load(
        input=number(row, "isl"),
        output=number(row, "osl"),
        batch=number(row, "batch_or_concurrency"),
        fp8=PRECISIONS[precision],
    )
    framework = text(row, "framework").split()[0].lower()
    number(row, "devices")
    return (
        built_in(text(row, "model"))[1],
        machine(text(row, "device")),
        servers.get(framework) or server(framework),
        load,
    )


def _split(row: Row) -> tuple[float, float]:
    return number(row, "tp"), optional(row, "pp") or 1.0
