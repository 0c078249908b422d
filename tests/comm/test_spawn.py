"""`SpawnedJob`: the same promises through a launcher process, which ends with its driver, and its ranks with it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwright.comm.channel import Channel
from shardwright.comm.group import Group
from shardwright.comm.job import GRACE
from shardwright.comm.spawn import SpawnedJob
from shardwright.errors import RankError, UsageError
from shardwright.testing.ranks import on_processes

SOON = 2.0
"""Seconds; what is waited for takes milliseconds on an idle machine."""
LONG = 1_000_000


def alive(pid: int) -> bool:
    """Running, that is: not ended, nor ended and waiting for whoever inherited it to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def seconds_until(done: Callable[[], bool], limit: float) -> float:
    start = time.monotonic()
    while not done():
        assert time.monotonic() - start < limit, f"not within {limit} s"
        time.sleep(0.01)
    return time.monotonic() - start


def family(group: Group, channel: Channel, fault: str = "") -> None:
    """Tells its pid and its launcher's; then, on the last rank, the fault; else listens until the driver hangs up."""
    channel.send({"pids": [os.getpid(), os.getppid()]})
    while (message := channel.receive()) is not None:
        if message.get("fault") == "killed" and group.rank == group.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if message.get("fault") == "usage" and group.rank == group.size - 1:
            raise UsageError("tp", 7, "the model has 3 KV heads", "try 3")
        if message.get("fault") == "deaf":
            while True:
                time.sleep(0.05)
        group.barrier()
        channel.send({"echo": message})


def pids_of(job: SpawnedJob, n: int) -> tuple[list[int], int]:
    """The ranks' pids in rank order, and the launcher's."""
    ranks: dict[int, int] = {}
    launcher = 0
    for _ in range(n):
        message = job.receive() or {}
        ranks[message["rank"]], launcher = message["pids"]
    return [ranks[rank] for rank in range(n)], launcher


def test_messages_go_both_ways_and_closing_ends_all() -> None:
    """Long ones before any is received, any text, and arguments longer than a command line may be."""
    with SpawnedJob(2, f"{__name__}:family", ["x" * LONG]) as job:
        texts = ["é\n\udcff" + "y" * LONG, "short", "z" * LONG]
        for text in texts:
            job.send({"text": text})
        pids, launcher = pids_of(job, 2)
        echoes: list[Any] = [job.receive() for _ in range(6)]
    for rank in range(2):
        assert [echo["echo"]["text"] for echo in echoes if echo["rank"] == rank] == texts
    assert not any(alive(pid) for pid in [*pids, launcher])


def test_a_killed_rank_is_named_and_nothing_is_left() -> None:
    with SpawnedJob(3, f"{__name__}:family") as job:
        pids, launcher = pids_of(job, 3)
        start = time.monotonic()
        job.send({"fault": "killed"})
        with pytest.raises(RankError) as raised:
            job.receive()
        assert time.monotonic() - start < SOON
    assert str(raised.value).startswith(f"rank 2 (pid {pids[2]}) was killed by SIGKILL; the other ranks were stopped")
    assert not any(alive(pid) for pid in [*pids, launcher])


def test_a_typed_error_comes_through_the_launcher_as_it_was() -> None:
    with SpawnedJob(2, f"{__name__}:family") as job:
        pids_of(job, 2)
        job.send({"fault": "usage"})
        with pytest.raises(UsageError) as raised:
            list(iter(job.receive, None))
    assert (str(raised.value), raised.value.exit_code) == ("tp=7: the model has 3 KV heads; try 3", 2)
    assert "Traceback" in raised.value.__notes__[0]


def test_ranks_end_with_their_launcher() -> None:
    job = SpawnedJob(2, f"{__name__}:family")
    pids, launcher = pids_of(job, 2)
    os.kill(launcher, signal.SIGKILL)
    seconds_until(lambda: not any(alive(pid) for pid in pids), SOON)
    with pytest.raises(RankError, match=rf"the ranks' launcher \(pid {launcher}\) ended with -9; see its output above"):
        job.receive()
    job.close()


DRIVER = f"""
import os, sys
from shardwright.comm.spawn import SpawnedJob
job = SpawnedJob(2, "{__name__}:family")
pids = set()
for _ in range(2):
    pids.update(job.receive()["pids"])
job.send({{"fault": sys.argv[1]}})
print(*pids, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("fault", "limit"), [("none", SOON), ("deaf", GRACE + SOON)])
def test_launcher_and_ranks_end_when_the_driver_is_killed(fault: str, limit: float) -> None:
    """Those that listen at once; those that do not, after the grace: 5 s in all."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, fault], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with driver:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(alive, pids))
        driver.kill()
    seconds_until(lambda: not any(map(alive, pids)), limit)


def test_a_driver_that_closes_at_once_leaves_nothing() -> None:
    """Before the launcher has imported anything."""
    job = SpawnedJob(2, f"{__name__}:family")
    launcher = job._process.pid
    job.close()
    assert not alive(launcher)


def test_a_body_that_is_not_there_is_a_rank_error(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(RankError, match=r"launcher .* ended with 1; see its output above"),
        SpawnedJob(2, "shardwright.comm.job:nobody") as job,
    ):
        job.receive()
    assert "KeyError: 'nobody'" in capfd.readouterr().err


def test_no_number_of_ranks_is_an_error() -> None:
    with pytest.raises(UsageError, match="tp=0: tensor parallelism needs at least one rank; pass tp=1"):
        SpawnedJob(0, f"{__name__}:family")
    with pytest.raises(UsageError, match="tp=257: one host runs at most 256 ranks; pass fewer"):
        SpawnedJob(257, f"{__name__}:family")
    with pytest.raises(UsageError, match="tp='auto': it is a number of ranks; pass tp=1"):
        SpawnedJob("auto", f"{__name__}:family")  # type: ignore[arg-type]


def much(group: Group, characters: int) -> str:
    return str(group.rank) * characters


def test_results_of_any_length_come_back() -> None:
    """A rank may have ended long before the last of its result is read."""
    assert on_processes(2, much, LONG) == ["0" * LONG, "1" * LONG]


def fails_oddly(group: Group) -> None:
    raise ValueError("on\ntwo lines")


def test_a_test_body_that_fails_is_a_rank_error() -> None:
    """Also on a group of one, which connects to nobody."""
    with pytest.raises(RankError) as raised:
        on_processes(1, fails_oddly)
    assert re.fullmatch(r"rank 0 \(pid \d+\): ValueError: on two lines", str(raised.value))


def answers(group: Group, channel: Channel) -> None:
    while (message := channel.receive()) is not None:
        channel.send({"answer": message["question"] + group.rank})


def test_a_message_sent_before_the_ranks_exist_arrives() -> None:
    """It reaches the launcher in one read with the arguments."""
    with SpawnedJob(2, f"{__name__}:answers") as job:
        job.send({"question": 40})
        assert sorted(job.receive()["answer"] for _ in range(2)) == [40, 41]
