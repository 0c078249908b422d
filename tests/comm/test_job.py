"""What becomes of a job when a rank fails: one cause, told once, soon, and nothing left.

The faults, in `tests.comm.faults`, run in one process of their own, since `Job` forks and this one may have computed.
"Soon" is two seconds where the system tells of a death at once (milliseconds on an idle machine), and the grace of 3 s
more where a rank has to be killed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tests.comm.faults import FAULTS, LONG, RANKS

from shardwright.comm.job import GRACE

SOON = 2.0
STOPPED = "; the other ranks were stopped; if memory ran out, use more ranks or a smaller model"


@pytest.fixture(scope="module", params=["shared_memory", "gloo"])
def told(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the program saw, after checking what it left: no line printed twice, no file."""
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-m", "tests.comm.faults", request.param],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            env={"TMPDIR": empty, "PATH": "/usr/bin:/bin"},
        )
        assert done.returncode == 0, done.stderr
        assert list(Path(empty).iterdir()) == []
    first, report = done.stdout.splitlines()
    assert first == "told once"
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(report)
    return found


@pytest.mark.parametrize(
    ("fault", "rank", "message"),
    [
        ("value", 1, ": ValueError: first line second line last"),
        ("empty", 1, ": ValueError"),
        ("key", 1, ": KeyError: 'k_proj'"),
        ("odd", 1, ": OddError: <exception str() failed>"),
        ("surrogate", 1, ": ValueError: /models/\udcff.gguf is 日本語"),
        ("system exit", 1, ": SystemExit: 5"),
        ("namesake", 1, ": UsageError: not ours"),
        ("killed", 1, " was killed by SIGKILL" + STOPPED),
        ("segmentation fault", 1, " was killed by SIGSEGV" + STOPPED),
        ("terminated", 1, " was killed by SIGTERM" + STOPPED),
        ("exit", 1, " ended with exit code 3" + STOPPED),
        ("letter", 1, " was killed by SIGKILL" + STOPPED),
        ("split", 1, " was killed by SIGKILL" + STOPPED),
    ],
)
def test_the_rank_that_failed_is_named_with_its_cause(
    told: dict[str, Any], fault: str, rank: int, message: str
) -> None:
    """While the others wait in an all-reduce; for a letter and in sending one; in making a split."""
    found = told[fault]
    assert found["message"] == f"rank {rank} (pid {found['pids'][rank]}){message}"
    assert (found["type"], found["code"], found["left"]) == ("RankError", 6, [])
    assert found["seconds"] < SOON


@pytest.mark.parametrize(
    ("fault", "kind", "code", "message"),
    [
        ("usage", "UsageError", 2, "tp=7: the model has 3 KV heads; try 3"),
        ("file", "FileError", 3, "model.gguf: ends at byte 12; download it again"),
        ("own file", "FileError", 3, "x.json: is empty; write it"),
        ("forgotten", "CommError", 5, "rank 1 ended its step without waiting for all_reduce 'forgotten' of float32 "),
    ],
)
def test_a_typed_error_comes_back_as_it_was(
    told: dict[str, Any], fault: str, kind: str, code: int, message: str
) -> None:
    found = told[fault]
    assert (found["type"], found["code"], found["left"]) == (kind, code, [])
    assert found["message"].startswith(message)
    assert found["seconds"] < SOON


@pytest.mark.parametrize("fault", ["value", "usage", "odd"])
def test_the_ranks_traceback_is_attached(told: dict[str, Any], fault: str) -> None:
    (note,) = told[fault]["notes"]
    assert note.startswith("Traceback (most recent call last)")
    assert "faults.py" in note


def test_however_much_a_rank_says_the_message_is_short(told: dict[str, Any]) -> None:
    """500 kB of message: 500 characters of it are shown, and 100 000 of its traceback kept."""
    assert len(told["long"]["message"]) < 600
    assert len(told["long"]["notes"][0]) <= 100_000


@pytest.mark.parametrize("fault", [*FAULTS, "all", "returned", "stuck"])
def test_a_message_is_one_line(told: dict[str, Any], fault: str) -> None:
    assert len(told[fault]["message"].splitlines()) == 1


def test_the_same_error_on_all_ranks_is_told_once(told: dict[str, Any]) -> None:
    found = told["all"]
    who = [f"rank {rank} (pid {pid}): ValueError: the same everywhere" for rank, pid in enumerate(found["pids"])]
    assert found["message"] in who
    assert len(found["notes"]) == 1


def test_a_rank_that_returns_while_others_wait_is_named(told: dict[str, Any]) -> None:
    """They notice the broken connection at once and give the launcher two seconds to say that somebody died."""
    found = told["returned"]
    start = f"rank 1 (pid {found['pids'][1]}) returned while others waited: all_reduce 'logits' of float32 (shape [3])"
    assert found["message"].startswith(start)
    assert found["left"] == []
    assert found["seconds"] < SOON + 2.0


@pytest.mark.parametrize("fault", ["stuck", "stopped"])
def test_a_rank_that_does_not_listen_is_killed_after_the_grace(told: dict[str, Any], fault: str) -> None:
    """In pure Python for ever, or stopped by a signal: the cause is the other rank's, and none is left."""
    found = told[fault]
    assert "ValueError: not st" in found["message"]
    assert f"rank 2 (pid {found['pids'][2]})" not in found["message"]
    assert found["left"] == []
    assert GRACE - 0.1 < found["seconds"] < GRACE + SOON


def test_long_messages_both_ways_at_once(told: dict[str, Any]) -> None:
    """Ranks meet in a barrier after each, so that one blocked on its driver would block them all."""
    assert told["both_ways"]["received"] == sorted(
        [rank, got, LONG] for rank in range(RANKS) for got in (0, *range(LONG, LONG + 4))
    )


def test_the_last_words_of_a_rank_that_has_ended_are_heard(told: dict[str, Any]) -> None:
    assert told["last_words"]["received"] == [[rank, i, 40_000] for rank in range(RANKS) for i in range(3)]


def test_an_exception_of_the_drivers_own_leaves_no_rank(told: dict[str, Any]) -> None:
    assert told["interrupted"] == {"pids": RANKS, "left": []}


def test_no_ranks_is_an_error_in_the_users_words(told: dict[str, Any]) -> None:
    assert told["no ranks"]["message"] == "tp=0: tensor parallelism needs at least one rank; try --tp 1"


def test_no_descriptor_is_left_open(told: dict[str, Any]) -> None:
    assert told["files"] == 0
