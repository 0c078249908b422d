"""Where everything in a segment lies, that processes see each other's writes, and words that wait.

Two mappings of one descriptor stand for two processes: nothing tells them apart.
"""

import gc
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from shardwright.comm.atomics import FUTEX, SLEEPS, await_word, publish, read_word, write_word
from shardwright.comm.segment import (
    MAILBOX,
    PID,
    POSTED,
    SLEEPERS,
    SLOT,
    TOLD,
    Segment,
    bytes_of,
    put_text,
    text_of,
)
from shardwright.errors import CommError

CALL = FUTEX[os.uname().machine]


@pytest.mark.parametrize("ranks", range(1, 9))
def test_nothing_overlaps(ranks: int) -> None:
    """Fill every part with a number of its own; all are found again through another mapping."""
    segment = Segment(ranks)
    other = Segment(ranks, segment.fd)

    def parts(of: Segment) -> list[np.ndarray]:
        own = [of.words(rank).view(np.uint8) for rank in range(ranks)]
        own += [of.text(rank) for rank in range(ranks)]
        own += [of.slot(rank, buffer).numpy() for rank in range(ranks) for buffer in (0, 1)]
        for source in range(ranks):
            for destination in range(ranks):
                _, text, room = of.mailbox(source, destination)
                own += [text, room.numpy()]
        return own

    for i, place in enumerate(parts(segment)):
        place[:] = i % 251 + 1
    for i, place in enumerate(parts(other)):
        assert (place == i % 251 + 1).all()
    assert read_word(segment.nap) == 0, "the timespec lies apart from all"
    assert read_word(segment.nap + 8) == 1_000_000
    assert {len(place) for place in parts(segment)} >= {SLOT, MAILBOX}
    os.close(segment.fd)


def test_addresses_are_those_of_the_views() -> None:
    """Compiled code goes by address, Python by views."""
    segment = Segment(3)
    for rank in range(3):
        for which in (POSTED, SLEEPERS, PID, TOLD):
            write_word(segment.word(rank, which), 100 * rank + which)
            assert segment.words(rank)[which] == 100 * rank + which
        for buffer in (0, 1):
            assert segment.slot(rank, buffer).data_ptr() == segment.slots + (2 * rank + buffer) * SLOT
            assert segment.slot(rank, buffer).data_ptr() % 4096 == 0
    address, text, room = segment.mailbox(2, 1)
    assert text.ctypes.data - address == 24
    assert room.data_ptr() == address + 128
    os.close(segment.fd)


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:shardwright-segment")


def test_memory_lives_as_long_as_a_view_of_it() -> None:
    gc.collect()
    files, before = len(os.listdir("/proc/self/fd")), mapped()
    segment = Segment(2)
    os.close(segment.fd)
    slot = segment.slot(1, 1)
    del segment
    slot.fill_(7)
    assert mapped() == before + 1
    del slot
    assert (len(os.listdir("/proc/self/fd")), mapped()) == (files, before)


def test_a_shortage_is_told_with_both_numbers() -> None:
    """The mailboxes of that many ranks take 65 TB."""
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CommError, match=r"needs [\d,]{15,} bytes and [\d,]+ are available; use fewer ranks"):
        Segment(1_000_000)
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("text", ["", "all_reduce 'x'", "ü" * 100, "x" * 1000])
def test_text_is_cut_where_the_room_ends(text: str) -> None:
    place = np.full(33, 255, np.uint8)
    put_text(place, text)
    assert text_of(place).rstrip("�") == text.encode()[:33].decode(errors="ignore")


def test_bytes_of_any_contiguous_tensor() -> None:
    """One element counts as contiguous whatever its stride, and so does none."""
    for x in (torch.ones(4, 2)[:1, 1], torch.ones(4, 2)[:0, 1], torch.ones(()), torch.ones(2, 3), torch.ones(6)[2:]):
        assert bytes_of(x).numel() == x.nbytes
        assert bytes_of(x).data_ptr() == x.data_ptr()


# ---- words


def wait(segment: Segment, wanted: int, abort: int, sleeps: int = SLEEPS) -> int:
    word, sleepers = segment.word(0, POSTED), segment.word(0, SLEEPERS)
    return await_word(word, wanted, sleepers, abort, 10, CALL, segment.nap, sleeps)


def test_a_wait_ends_with_the_word_the_job_or_its_time() -> None:
    segment = Segment(2)
    abort = segment.word(1, TOLD)
    write_word(segment.word(0, POSTED), 5)
    assert wait(segment, 5, abort) == 0
    assert wait(segment, 4, abort) == 0
    start = time.perf_counter()
    assert wait(segment, 6, abort, sleeps=0) == 1
    assert wait(segment, 6, abort, sleeps=30) == 1
    assert time.perf_counter() - start > 0.03
    write_word(abort, 1)
    assert wait(segment, 6, abort) == -1
    assert wait(segment, 5, abort) == 0, "what has come is taken, whoever failed"
    assert read_word(segment.word(0, SLEEPERS)) == 0
    os.close(segment.fd)


@pytest.mark.parametrize("start", [0, 2**31 - 3, 2**32 - 3])
def test_sleepers_are_woken_where_the_low_half_of_the_word_wraps(start: int) -> None:
    """A futex compares 32 bits. Each thread waits for the other's word in turn, asleep at once."""
    segment = Segment(2)
    write_word(segment.word(0, POSTED), start)
    write_word(segment.word(1, POSTED), start)
    codes: list[int] = []

    def play(me: int) -> None:
        other, mine = segment.word(1 - me, POSTED), segment.word(me, POSTED)
        theirs, own = segment.word(1 - me, SLEEPERS), segment.word(me, SLEEPERS)
        for turn in range(start + 1, start + 300):
            if turn % 2 == me:
                publish(mine, turn, own, CALL)
            else:
                code = 1
                while code == 1:
                    code = await_word(other, turn, theirs, segment.word(0, TOLD), 0, CALL, segment.nap, SLEEPS)
                codes.append(code)

    threads = [threading.Thread(target=play, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert codes == [0] * 299
    os.close(segment.fd)
