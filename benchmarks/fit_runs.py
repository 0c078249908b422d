"""Fit the planner's few constants of devices and software on published training runs; check them on families left out.

`python -m benchmarks.fit_runs [--lofo] [--ablate]` prints the constants that `plan/data/*.toml` hold (rounded there),
the errors in sample, the errors of each family with constants fitted without it, and what each term is worth.

A constant has a prior, its physical guess, and a spread; the loss is the mean error of log seconds, half over rows and
half over families, and `WEIGHT` times the squared distance from the priors. WEIGHT is the one that the errors of
families left out chose (0.01, 0.03, 0.1 and 0.3 differ by 0.2 points there).
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from benchmarks.descent import Constants, descend

from shardwright.plan import catalogue, hardware
from shardwright.plan.rows import price_rows, read_rows
from shardwright.plan.step import Scene, step

DATA = Path(__file__).parent.parent / "tests" / "data" / "planning"
WEIGHT = 0.03
ROBUST = 0.5
"""A row's error counts at most so much: what is not predictable must not bend the rest."""

PRIORS: dict[str, tuple[float, float]] = {
    "ampere.sustained": (0.9, 0.1),
    "hopper.sustained": (0.9, 0.1),
    "ascend.sustained": (0.85, 0.1),
    "h100-500w.sustained": (0.9, 0.1),
    "all.attention_backward": (1.1, 0.15),
    "all.memory_share": (0.75, 0.1),
    "all.net": (0.8, 0.1),
    "hopper.attention_ported": (0.65, 0.15),
    "soft.tp_overlap": (0.3, 0.3),
    "soft.dp_overlap": (0.5, 0.3),
    "megatron-2021.dp_overlap": (0.1, 0.3),
    "soft.fsdp_overlap": (0.85, 0.1),
    "soft.pp_overlap": (0.5, 0.3),
    "soft.elementwise": (1.5, 0.2),
    "megatron-core.elementwise": (1.3, 0.2),
    "torchtitan.elementwise": (1.3, 0.2),
    "torchtitan-eager.elementwise": (2.0, 0.2),
    "fsdp.flash": (0.9, 0.1),
    "mindspeed.flash": (0.9, 0.1),
    "soft.softmax": (16.0, 0.3),
    "soft.selective": (0.4, 0.3),
    "soft.host": (0.9e-3, 0.3),
    "soft.straggle": (0.1, 0.5),
    "soft.step": (0.01, 1.0),
}
"""Owner (architecture, device, framework, `all` devices, all `soft`ware) and constant: prior, spread of its log."""


class Runs:
    """A table of runs whose constants can be changed without reading it again."""

    def __init__(self, name: str) -> None:
        self.priced = price_rows(read_rows(DATA / name))
        rows = self.priced.rows
        self.seconds = np.array([float(row["step_time_s"]) for row in rows])
        self.family = np.array([row.get("family", "vtrain-single") for row in rows])
        table = hardware.devices()
        device = [catalogue.resolve(table, row["device"], "device") for row in rows]
        self.owners = [np.array(device), np.array([table[name]["architecture"] for name in device])]
        self.framework = np.array([row["framework"] for row in rows])

    def scene(self, constants: Constants) -> Scene:
        """The runs with these constants; general ones first, so that a device's or framework's own wins."""
        machine, software = dict(self.priced.scene.machine.__dict__), dict(self.priced.scene.software.__dict__)
        for name in sorted(constants, key=lambda name: not name.startswith(("all.", "soft."))):
            owner, _, field = name.rpartition(".")
            table = software if field in software else machine
            owned = (self.framework == owner) | np.any([column == owner for column in self.owners], axis=0)
            table[field] = np.where(owned | (owner in ("all", "soft")), constants[name], table[field])
        scene = self.priced.scene
        return replace(scene, machine=replace(scene.machine, **machine), software=replace(scene.software, **software))

    def errors(self, constants: Constants) -> np.ndarray:
        """log(predicted / measured) of every run."""
        return np.asarray(np.log(step(self.scene(constants)).total / self.seconds))


def fit(tables: list[tuple[Runs, np.ndarray]]) -> Constants:
    """The constants of those rows of each table."""

    def loss(constants: Constants) -> float:
        far = [(np.log(constants[name] / prior) / spread) ** 2 for name, (prior, spread) in PRIORS.items()]
        total = WEIGHT * float(np.mean(far))
        for runs, kept in tables:
            off = np.minimum(np.abs(runs.errors(constants)), ROBUST)[kept]
            families = runs.family[kept]
            total += 0.5 * off.mean() + 0.5 * np.mean([off[families == f].mean() for f in set(families)])
        return total

    return descend(loss, {name: prior for name, (prior, _) in PRIORS.items()})


def say(label: str, logs: np.ndarray) -> None:
    """One line of errors."""
    off = np.abs(np.expm1(logs))
    print(
        f"{label:34} {len(off):4} rows  median {np.median(off):6.1%}  mean {off.mean():6.1%}  "
        f"within 20 % {(off <= 0.2).mean():5.0%}  bias {np.median(logs):+.3f}",
        flush=True,
    )


def leave_out(runs: Runs, single: Runs) -> None:
    """Each family priced with constants that never saw it; vTrain's two tables count as one."""
    logs = np.zeros(len(runs.seconds))
    for family in dict.fromkeys(runs.family):
        others = [(runs, runs.family != family)]
        if family != "vtrain-multi":
            others.append((single, np.ones(len(single.seconds), bool)))
        held_out = runs.family == family
        logs[held_out] = runs.errors(fit(others))[held_out]
        say(f"left out: {family}", logs[held_out])
    say("left out, all", logs)


def ablate(runs: Runs, constants: Constants) -> None:
    """Errors with one term taken out of every prediction, nothing refitted."""
    parts = step(runs.scene(constants))
    for kind, seconds in parts.__dict__.items():
        say(f"without {kind}", np.log((parts.total - seconds) / runs.seconds))
    clocks = {name: 1.0 for name in PRIORS if name.endswith(".sustained")}
    say("without the sustained clock", runs.errors(constants | clocks))


def main() -> None:
    """Fit on everything and print."""
    runs, single = Runs("train_runs.csv"), Runs("vtrain_single.csv")
    constants = fit([(table, np.ones(len(table.seconds), bool)) for table in (runs, single)])
    for name, value in sorted(constants.items()):
        print(f"{name:34} {value:.4g}   (prior {PRIORS[name][0]:g})")
    for table in (runs, single):
        for family in dict.fromkeys(table.family):
            say(family, table.errors(constants)[table.family == family])
    say("train_runs, in sample", runs.errors(constants))
    say("train_runs, as shipped", runs.errors({}))
    say("vtrain_single, as shipped", single.errors({}))
    if "--ablate" in sys.argv:
        ablate(runs, {})
    if "--lofo" in sys.argv:
        leave_out(runs, single)


if __name__ == "__main__":
    main()
