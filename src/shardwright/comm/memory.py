"""How much memory this process has needed, as the system counts it."""

from pathlib import Path


def peak_rss() -> int:
    """Bytes of memory this process held at most: `VmHWM`, since `ru_maxrss` is inherited over a fork and exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
