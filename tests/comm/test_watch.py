"""Who is alive, and what the ranks of a shared-memory group are told when one is not.

The deaths, in `tests.comm.deaths`, happen in one program of their own, since `Job` forks. "Soon" is a second where the
system tells of a death at once (milliseconds on an idle machine).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.comm.deaths import OPERATIONS, TIMEOUT

from shardwright.comm import watch
from shardwright.comm.job import GRACE
from shardwright.comm.watch import ABORT_GRACE, AbortWord, Patience, poll, state_of
from shardwright.errors import AbortedError, CommError

SOON = 1.0


@pytest.fixture
def asleep() -> Iterator[int]:
    """A process that sleeps for ever."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as process:
        yield process.pid
        process.kill()


@pytest.fixture
def computing() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        yield process.pid
        process.kill()


class NoCircle:
    """Nobody else waits."""

    def turn(self, waiting_for: object) -> None: ...

    def over(self) -> None: ...


def looked_at(pid: int, timeout_s: float, seconds: float) -> Patience:
    """The patience of a wait for that process which has gone on for some time."""
    patience, end = Patience(timeout_s, NoCircle()), time.monotonic() + seconds
    while time.monotonic() < end:
        patience.check({3: pid}, "all_reduce 'x'")
        time.sleep(0.01)
    return patience


def settled(pid: int, state: str) -> None:
    while state_of(pid)[0] != state:
        time.sleep(0.01)


def test_a_process_without_life_is_named(asleep: int) -> None:
    settled(asleep, "S")
    told = rf"rank 3 \(pid {asleep}\) shows no life \(state S\) and has not entered all_reduce 'x' for 0.3 s"
    with pytest.raises(CommError, match=told):
        looked_at(asleep, 0.3, 5.0)


def test_a_stopped_process_is_named(asleep: int) -> None:
    os.kill(asleep, signal.SIGSTOP)
    settled(asleep, "T")
    with pytest.raises(CommError, match=rf"rank 3 \(pid {asleep}\) is stopped and has not entered"):
        looked_at(asleep, 0.3, 5.0)


def test_a_computing_process_is_waited_for(computing: int) -> None:
    looked_at(computing, 0.5, 1.5)


def test_a_process_that_has_not_joined_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no pid; that it died at birth is told by the launcher."""
    monkeypatch.setattr(watch, "ABORT_GRACE", 0.2)
    looked_at(0, 60.0, 0.6)
    with pytest.raises(CommError, match=r"rank 3 \(pid 0\) shows no life \(state not joined\)"):
        looked_at(0, 0.3, 5.0)


def test_who_has_ended_is_told_once_the_launcher_had_time_to_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "ABORT_GRACE", 0.4)
    with subprocess.Popen(["true"]) as process:
        pass
    looked_at(process.pid, 60.0, 0.2)
    with pytest.raises(AbortedError, match="all_reduce 'x' broke off: rank 3 has ended"):
        looked_at(process.pid, 60.0, 5.0)


def test_a_zombie_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "ABORT_GRACE", 0.2)
    process = subprocess.Popen(["true"])
    settled(process.pid, "Z")
    with pytest.raises(AbortedError):
        looked_at(process.pid, 60.0, 5.0)
    process.wait()
    assert state_of(process.pid) == ("gone", 0.0)


def test_processes_are_looked_at_seldom(asleep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look costs a read of a file; a wait may turn thousands of times a second."""
    looks: list[int] = []
    monkeypatch.setattr(watch, "state_of", lambda pid: (looks.append(pid), ("S", 0.0))[1])
    looked_at(asleep, 60.0, 0.5)
    assert 2 <= len(looks) <= 7


def test_the_first_to_fail_is_kept() -> None:
    word = AbortWord()
    word.check("nothing")
    assert word.failed() is None
    for rank in (0, 2):
        word.set(rank)
        assert word.failed() == 0
    with pytest.raises(AbortedError, match="stopped waiting for x: rank 0 failed"):
        word.check("x")


def test_poll_ends_with_what_it_waits_for_or_the_job() -> None:
    word, looks = AbortWord(), iter([False, False, True])
    poll(lambda: next(looks), word, "x")
    word.set(2)
    with pytest.raises(AbortedError, match="rank 2 failed"):
        poll(lambda: False, word, "x")


# ---- ranks that fall silent


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program saw; and that nothing is left of it, in its own process or in shared memory by name."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.comm.deaths", str(tmp_path_factory.mktemp("told"))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in Path("/dev/shm").iterdir() if "shardwright" in path.name] == []
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["kept"] == [0, 0]
    return found


@pytest.mark.parametrize("death", [*(f"dies {operation}" for operation in OPERATIONS), "dies midway all_reduce large"])
def test_a_killed_rank_is_named_on_all_others_wherever_they_wait(deaths: dict[str, Any], death: str) -> None:
    found = deaths[death]
    assert found["message"].startswith(f"rank 1 (pid {found['pid']}) was killed by SIGKILL")
    assert found["type"] == "RankError"
    assert [verdict["type"] for verdict in found["told"]] == ["AbortedError"] * 2
    assert all("rank 1 failed" in verdict["message"] for verdict in found["told"])
    assert found["soon"] < SOON
    assert found["seconds"] < 2 * SOON
    assert found["left"] == []


@pytest.mark.parametrize("operation", ["all_reduce small", "recv"])
def test_a_stopped_rank_is_named_when_patience_ends(deaths: dict[str, Any], operation: str) -> None:
    """Two ranks lose patience at about the same time: one verdict is the cause, the other that, or its own."""
    found = deaths[f"stops {operation}"]
    assert found["type"] == "CommError"
    assert f"rank 1 (pid {found['pid']}) is stopped and has not entered {operation.split()[0]}" in found["message"]
    assert f"for {TIMEOUT:g} s, the progress timeout; continue or end it" in found["message"]
    assert {verdict["type"] for verdict in found["told"]} <= {"CommError", "AbortedError"}
    assert TIMEOUT < found["soon"] < TIMEOUT + 2 * SOON
    assert found["seconds"] < TIMEOUT + GRACE + 2 * SOON, "the stopped one is killed"
    assert found["left"] == []


def test_a_rank_that_left_is_missed_in_a_letter(deaths: dict[str, Any]) -> None:
    found = deaths["leaves recv"]
    assert found["message"].startswith(f"rank 1 (pid {found['pid']}) returned while others waited: recv")
    assert found["soon"] < ABORT_GRACE + 2 * SOON
    assert found["left"] == []


@pytest.mark.parametrize(
    ("circle", "called"),
    [
        ("circle recv", "rank 0 in all_reduce of float32 (shape [524288]), rank 1 in recv 'never sent' of float32"),
        ("circle send", "rank 0 in all_reduce of float32 (shape [524288]), rank 1 in send 'unread' of float32"),
        ("circle split recv", "rank 0 in barrier 'pair' of int8, rank 1 in recv 'never sent' of float32"),
        ("circle busy recv", "rank 0 in recv 'never sent' of float32 (shape [3], from rank 1), rank 1 in recv"),
    ],
)
def test_ranks_that_wait_for_each_other_are_told(deaths: dict[str, Any], circle: str, called: str) -> None:
    """Nobody is dead or stopped, and each alone sees a peer that is alive."""
    found = deaths[circle]
    assert found["type"] == "CommError"
    assert found["message"].startswith(f"ranks wait for each other: {called}")
    assert found["message"].endswith("all ranks make the same calls in one order")
    assert {verdict["type"] for verdict in found["told"]} <= {"CommError", "AbortedError"}
    assert len(found["told"]) == 2
    assert found["soon"] < SOON
    assert found["left"] == []
