"""Processor time of whole processes, for promises of speed on machines whose speed nobody knows."""

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SMALLEST = (sys.executable, str(Path(__file__).with_name("smallest_program.py")), "--help")
"""The help of a program with one option, by the command line's library: an eighth of a second where promises are kept,
more on slower machines."""


def processor_seconds(*commands: Sequence[str], tries: int = 5) -> list[float]:
    """Each command's best try, since other work may hold the machine; they take turns, so that all meet the same."""
    best = [float("inf")] * len(commands)
    for _ in range(tries):
        for at, command in enumerate(commands):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            best[at] = min(best[at], after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best
