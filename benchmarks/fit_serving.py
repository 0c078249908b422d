"""Fit the serving profiles' three constants on published times per token; print them and the errors per framework.

`python -m benchmarks.fit_serving`. What it prints is in `plan/data/serving.toml`, rounded.
"""

import numpy as np
from benchmarks.descent import Constants, descend
from benchmarks.fit_runs import DATA, say

from shardwright.plan.row_cells import Row
from shardwright.plan.rows import read_rows
from shardwright.plan.serve_rows import price_serving
from shardwright.plan.serving import Server

FRAMEWORKS = ("trtllm", "vllm", "sglang")


def logs(rows: list[Row], constants: Constants) -> np.ndarray:
    """log(predicted / measured) of every row that can be priced."""
    servers = {
        name: Server(step=constants[f"{name}.step"], waits=constants[f"{name}.waits"], launches=constants["launches"])
        for name in FRAMEWORKS
    }
    _, _, predicted, measured, _ = price_serving(rows, servers)
    return np.log(np.array(predicted) / np.array(measured))


def main() -> None:
    """Fit on the three frameworks with more than a handful of rows."""
    table = read_rows(DATA / "published_infer.csv")
    rows: list[Row] = [row for row in table if row["framework"].split()[0].lower() in FRAMEWORKS]
    start = {"launches": 0.5}
    for name in FRAMEWORKS:
        start |= {f"{name}.step": 0.5e-3, f"{name}.waits": 0.8}

    def loss(constants: Constants) -> float:
        return float(np.mean(np.minimum(np.abs(logs(rows, constants)), 0.7)))

    constants = descend(loss, start, step=0.3)
    for name, value in constants.items():
        print(f"{name:16} {value:.4g}")
    for name in FRAMEWORKS:
        say(name, logs([row for row in rows if row["framework"].lower().startswith(name)], constants))
    say("all", logs(rows, constants))


if __name__ == "__main__":
    main()
