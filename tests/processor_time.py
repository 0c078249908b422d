"""Processor time of whole processes, for promises of speed: other work changes it less than the clock."""

import os
import resource
import subprocess
from collections.abc import Sequence


def processor_seconds(command: Sequence[str]) -> float:
    """Of the best of five runs, with bytecode kept between them as it is for users, wherever the tests run."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, timeout=60, check=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)
