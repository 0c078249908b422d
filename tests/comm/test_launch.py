"""How many ranks may run, and joining a job that somebody else started."""

import socket
import subprocess
import sys
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from shardwright.comm.launch import MOST_RANKS, check_ranks, join
from shardwright.comm.single import SingleGroup
from shardwright.errors import CommError, UsageError

JOB = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("tp", "message"),
    [
        (0, "tp=0: tensor parallelism needs at least one rank; try --tp 1"),
        (-3, "tp=-3: tensor parallelism needs at least one rank"),
        (MOST_RANKS + 1, rf"tp={MOST_RANKS + 1}: one host runs at most {MOST_RANKS} ranks; try --tp \d+"),
    ],
)
def test_a_number_of_ranks_that_cannot_be_is_refused(tp: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_ranks(tp)


def test_any_other_number_is_itself() -> None:
    assert [check_ranks(tp) for tp in (1, 3, MOST_RANKS)] == [1, 3, MOST_RANKS]


def test_alone_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in JOB:
        monkeypatch.delenv(name, raising=False)
    assert isinstance(join(), SingleGroup)
    for name, value in (JOB | {"WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    assert isinstance(join(), SingleGroup)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"MASTER_PORT": None},
            r"MASTER_PORT=\(not set\): a rank is told its job by the environment; start it with tor",
        ),
        ({"RANK": None}, r"RANK=\(not set\)"),
        ({"RANK": "one"}, "RANK=one: a whole number; start it with torchrun"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2: a whole number"),
        ({"RANK": "2"}, "RANK=2: a job of 2 has ranks 0…1"),
    ],
)
def test_an_environment_that_makes_no_job_is_named(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], message: str
) -> None:
    for name, value in (JOB | change).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        join()


MEMBER = """
import os, torch
from shardwright.comm.launch import join
from shardwright.errors import AbortedError, CommError
try:
    group = join(timeout_s=float(os.environ["PATIENCE"]))
    print(group.rank, group.size, group.all_reduce(torch.tensor([1.0 + group.rank])).item(), flush=True)
    if group.rank == 1:
        os._exit(0)
    group.all_reduce(torch.ones(1), tag="alone")
except (AbortedError, CommError) as error:
    print(f"{type(error).__name__}: {error}")
"""


def member(rank: int, port: int, patience: str) -> "subprocess.Popen[str]":
    env = JOB | {"RANK": str(rank), "MASTER_PORT": str(port), "PATIENCE": patience, "PATH": "/usr/bin:/bin"}
    return subprocess.Popen([sys.executable, "-c", MEMBER], stdout=subprocess.PIPE, text=True, env=env)


def test_two_processes_join_over_a_store_and_notice_when_one_goes() -> None:
    """No launcher of ours watches them: the one that is left finds the connection broken and ends by itself."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        "127.0.0.1", port, 2, True, timedelta(seconds=30), wait_for_workers=False, master_listen_fd=listener.detach()
    )
    members = [member(rank, port, "30") for rank in range(2)]
    first, second = (each.communicate(timeout=60)[0].splitlines() for each in members)
    assert (first[0], second) == ("0 2 3.0", ["1 2 3.0"])
    assert first[1].startswith("AbortedError: all_reduce 'alone' of float32 (shape [1]) broke off: ")
    del store


def test_nobody_at_the_address_is_an_error_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    for name, value in (JOB | {"MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CommError, match=f"rank 0 of 2 found nobody at 127.0.0.1:{port} within 0.2 s"):
        join(timeout_s=0.2)
