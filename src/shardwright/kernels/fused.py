"""What a fused operator of a device does outside its limits: what the caller left it to do instead, or nothing."""

import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from shardwright.errors import UnsupportedError

P = ParamSpec("P")
T = TypeVar("T")


def instead(kernel: str, reason: str, unfused: Callable[P, T] | None) -> Callable[P, T]:
    """`unfused`, with a warning that says why; `UnsupportedError` if the caller wants this kernel or none."""
    if unfused is None:
        raise UnsupportedError(f"{kernel}: {reason}; leave the choice of the kernel open, or pass unfused=")
    warnings.warn(f"{kernel}: {reason}; multiplying and communicating one after the other", stacklevel=3)
    return unfused
