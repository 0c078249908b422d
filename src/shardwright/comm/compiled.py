"""`compiled`: a function compiled by numba for one signature when its file is imported, or loaded from the cache.

numba keys a cached function by its own file alone, but compiled code contains what it calls and every constant it uses,
from other files too: after a change there it would go on with old offsets into shared memory. So the cache's place is
keyed by the text of all files with compiled code.
"""

import os
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from numba import config, njit

PACKAGE = Path(__file__).parent.parent
SOURCES = (
    "comm/atomics.py",
    "comm/compiled.py",
    "comm/rounds.py",
    "comm/segment.py",
    "comm/shares.py",
    "kernels/cpu/*.py",
)


def compiled(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile for this signature now, without the interpreter's lock; cached beside the package, else in the home."""

    def decorate(function: Callable[..., Any]) -> Any:
        before, config.CACHE_DIR = config.CACHE_DIR, str(cache_directory())
        try:
            return njit(signature, nogil=True, cache=True)(function)
        finally:
            config.CACHE_DIR = before

    return decorate


@cache
def cache_directory() -> Path:
    """Where compiled code of exactly these sources is kept: the package's `__pycache__`, else the home's cache."""
    text = b"".join(path.read_bytes() for pattern in SOURCES for path in sorted(PACKAGE.glob(pattern)))
    name = f"compiled-{blake2b(text, digest_size=8).hexdigest()}"
    home = Path.home() / ".cache" / "shardwright"
    for place in (PACKAGE / "__pycache__", home):
        if os.access(place if place.exists() else place.parent, os.W_OK):
            return place / name
    return home / name
