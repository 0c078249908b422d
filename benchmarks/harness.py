"""What every benchmark shares: its options, the machine it ran on, and how it prints. Not a benchmark itself.

A benchmark asks one question and yields its cases; each case has medians of both sides, measured in turn in one run.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PEERS = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
"""The environment of the peers, built by `make bench-peers`."""


@dataclass
class Case:
    """One measured case. values: medians by side (`ours`, a peer, `limit`) · ratios: ours to each, larger is better."""

    case: str
    unit: str
    values: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def compare(self, *, smaller_is_better: bool) -> "Case":
        """Fill in the ratios."""
        ours = self.values["ours"]
        for name, value in self.values.items():
            if name != "ours":
                self.ratios[name] = value / ours if smaller_is_better else ours / value
        return self


@dataclass(frozen=True)
class Options:
    """What the caller asked for. case: a part of the names wanted · peer: the only peer wanted, or None for all."""

    case: str
    peer: str | None
    repeat: int
    json: bool

    def wants(self, case: str) -> bool:
        """Whether a case was asked for."""
        return self.case in case

    def wants_peer(self, peer: str) -> bool:
        """Whether a peer was asked for."""
        return self.peer in (None, peer)


def main(name: str, question: str, cases: Callable[[Options], Iterator[Case]]) -> None:
    """Run a benchmark and print it, as a table or as one JSON object."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--case", default="", metavar="SUBSTRING", help="only the cases whose name contains this")
    parser.add_argument("--peer", default=None, metavar="NAME", help="only this peer")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each side; medians are printed")
    parser.add_argument("--json", action="store_true", help="one object on stdout, and nothing else")
    options = Options(**vars(parser.parse_args()))
    with Bandwidth(2) as bandwidth:
        ceilings = {"read_gb_s_2": round(bandwidth.read() / 1e9, 1)}
    if not options.json:
        print(f"{question}\n{machine()}\n{versions()}  commit {commit()}\nceilings {ceilings}")
    found = []
    for case in cases(options):
        found.append(case)
        if not options.json:
            values = "  ".join(f"{side} {value:.4g}" for side, value in case.values.items())
            ratios = "  ".join(f"{ratio:.2f}x {side}" for side, ratio in case.ratios.items())
            print(f"{case.case:32} {case.unit:9} {values}   {ratios}", flush=True)
    if options.json:
        report = {"benchmark": name, "machine": machine(), "versions": versions(), "commit": commit()}
        print(json.dumps({**report, "ceilings": ceilings, "cases": [asdict(case) for case in found]}))


def machine() -> str:
    """The processor and how many cores of it there are."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Of what decides the figures, in this environment."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numba", "numpy", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured, with a + where the tree differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


class Bandwidth:
    """That many processes which read memory by a plain compiled sum, all at once, whenever they are asked to.

    Each reads an array of its own, far larger than any cache.
    """

    PROGRAM = """
import sys, time, numpy as np
from numba import njit
@njit(fastmath=True)
def total(x):
    s = np.float32(0)
    for i in range(x.size): s += x[i]
    return s
x = np.ones(64_000_000, np.float32); total(x[:10]); total(x)
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(6):
        t = time.perf_counter(); total(x); print(x.nbytes / (time.perf_counter() - t), flush=True)
"""

    def __init__(self, processes: int) -> None:
        command = [sys.executable, "-c", self.PROGRAM]
        self._readers = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(processes)]
        for reader in self._readers:
            reader.stdout.readline()

    def read(self) -> float:
        """Bytes a second of all together: the best of six passes."""
        for reader in self._readers:
            reader.stdin.write("\n")
            reader.stdin.flush()
        rates = [[float(reader.stdout.readline()) for _ in range(6)] for reader in self._readers]
        return max(map(sum, zip(*rates, strict=True)))

    def __enter__(self) -> "Bandwidth":
        return self

    def __exit__(self, *error: object) -> None:
        for reader in self._readers:
            reader.kill()
            reader.wait()
            reader.stdin.close()
            reader.stdout.close()


def median_seconds(run: Callable[[], object], times: int) -> float:
    """Median duration of a call."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
