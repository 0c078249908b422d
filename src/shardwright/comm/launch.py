"""How ranks come to be: how many may run on one host, and joining a job that `torchrun` started.

The only place outside the command line that reads the environment. Ranks of one host are forked by `comm.job`.
"""

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from shardwright.errors import CommError, UsageError

if TYPE_CHECKING:
    from shardwright.comm.group import Group

MOST_RANKS = 256
"""Ranks on one host; each is a process that holds torch."""


def check_ranks(tp: int) -> int:
    """The number itself, or `UsageError`."""
    if tp < 1:
        raise UsageError("tp", tp, "tensor parallelism needs at least one rank", "try --tp 1")
    if tp > MOST_RANKS:
        raise UsageError("tp", tp, f"one host runs at most {MOST_RANKS} ranks", f"try --tp {os.cpu_count() or 1}")
    return tp


def join(timeout_s: float = 60.0) -> "Group":
    """This process's group in a job started by `torchrun`, from the environment that it sets; alone, a group of one.

    Ranks that are all on one host share memory; others, and those without numba, talk through gloo.

    Raises:
        UsageError: the environment names a job only in part, or not in numbers.
        CommError: nobody answers there, or a rank does not come.
    """
    from shardwright.comm.single import SingleGroup

    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ[name] for name in wanted if name in os.environ}
    if not found:
        return SingleGroup()
    for name in wanted:
        if name not in found:
            raise UsageError(name, "(not set)", "a rank is told its job by the environment", "start it with torchrun")
    rank, size, port = (_number(name, found[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= size:
        raise UsageError("RANK", rank, f"a job of {size} has ranks 0…{size - 1}", "start it with torchrun")
    if size == 1:
        return SingleGroup()
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    from shardwright.comm.joined import joined_over_memory
    from shardwright.comm.torch_group import TorchGroup
    from shardwright.comm.watch import AbortWord

    master = found["MASTER_ADDR"]
    try:
        store = TCPStore(master, port, size, False, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise CommError(f"rank {rank} of {size} found nobody at {master}:{port} within {timeout_s:g} s") from error
    ours = PrefixStore(f"shardwright/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    group = joined_over_memory(ours, rank, size, timeout_s)
    return group or TorchGroup.join(ours, rank, size, AbortWord(), _own_address(master))


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UsageError(name, text, "a whole number", "start it with torchrun")
    return int(text)


def _own_address(master: str) -> str:
    """This host's address on the road to the master; connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))
        return str(probe.getsockname()[0])
