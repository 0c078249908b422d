"""How many ranks may run, and joining a job that somebody else started."""

import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

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
import os, signal, sys, torch
how = os.environ["HOW"]
if how == "without numba" and os.environ["RANK"] == "1":
    sys.modules["numba"] = None
from shardwright.comm.launch import join
from shardwright.errors import ShardwrightError
try:
    group = join(timeout_s=float(os.environ["PATIENCE"]))
    print(type(group).__name__, group.rank, group.size, group.all_reduce(torch.tensor([1.0 + group.rank])).item())
    sys.stdout.flush()
    if group.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raises":
            raise ValueError("not here")
        if how != "letter":
            sys.exit()
    if how == "letter":  # rank 2 ends first, having done its part; the others are not told that it failed
        group.barrier()
        if group.rank == 2:
            sys.exit()
        import time; time.sleep(0.4 * group.rank)
        print(group.send(torch.ones(1), 1).item() if group.rank == 0 else group.recv((1,), torch.float32, 0).item())
    else:
        group.all_reduce(torch.ones(1), tag="alone")
except ShardwrightError as error:
    print(f"{type(error).__name__}: {error}")
"""


def joined(size: int, how: str, patience: str = "30") -> list[list[str]]:
    """The lines of each of that many processes that join over a store of ours."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        "127.0.0.1", port, size, True, timedelta(seconds=30), wait_for_workers=False, master_listen_fd=listener.detach()
    )
    job = JOB | {"WORLD_SIZE": str(size), "MASTER_PORT": str(port), "PATIENCE": patience, "HOW": how}
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=job | {"RANK": str(rank), "PATH": "/usr/bin:/bin"},
        )
        for rank in range(size)
    ]
    lines = [member.communicate(timeout=60)[0].splitlines() for member in members]
    del store
    return lines


@pytest.mark.parametrize("how", ["killed", "raises", "ends"])
def test_processes_of_one_host_join_over_memory_and_notice_when_one_goes(how: str) -> None:
    """No launcher of ours watches them. That one which ended well is missed takes a moment longer to say."""
    first, second, third = joined(3, how)
    assert [lines[0] for lines in (first, second, third)] == [f"SharedMemoryGroup {rank} 3 6.0" for rank in range(3)]
    assert len(second) == 1
    call = "all_reduce 'alone' of float32 (shape [1])"
    told = f"{call} broke off: rank 1 has ended" if how == "ends" else f"stopped waiting for {call}: rank 1 failed"
    assert [lines[1:] for lines in (first, third)] == [[f"AbortedError: {told}"]] * 2
    assert not any("shardwright" in line for line in Path("/proc/net/unix").read_text().splitlines())


def test_one_that_has_done_its_part_may_leave() -> None:
    first, second, third = joined(3, "letter")
    assert [first[1:], second[1:], third[1:]] == [["1.0"], ["1.0"], []]


def test_processes_that_cannot_share_memory_join_over_gloo() -> None:
    """One has no numba, so none uses it; the one that is left finds its connection broken and ends by itself."""
    first, second = joined(2, "without numba")
    assert (first[0], second) == ("TorchGroup 0 2 3.0", ["TorchGroup 1 2 3.0"])
    assert first[1].startswith("AbortedError: all_reduce 'alone' of float32 (shape [1]) broke off: ")


def test_a_rank_that_never_comes_is_named() -> None:
    """The store is there, and one of the two ranks."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        master = TCPStore(
            "127.0.0.1",
            port,
            2,
            True,
            timedelta(seconds=30),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    environment = JOB | {"MASTER_PORT": str(port), "PATIENCE": "1", "HOW": "late", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", MEMBER], capture_output=True, text=True, timeout=60, env=environment, check=True
    )
    assert done.stdout == "CommError: rank 1 of 2 has not come within 1 s; see why it did not start\n"
    del master


def test_nobody_at_the_address_is_an_error_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    for name, value in (JOB | {"MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CommError, match=f"rank 0 of 2 found nobody at 127.0.0.1:{port} within 0.2 s"):
        join(timeout_s=0.2)
