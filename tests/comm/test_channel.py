"""`Channel`: long messages both ways at once, any text, and peers that go."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.comm import channel as module
from shardwright.comm.channel import Channel

LONG = "x" * 1_000_000
"""Five times what a socket holds."""
SOON = 20.0


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    left, right = Channel.pair()
    yield left, right
    left.close()
    right.close()


def together(*calls: Any) -> list[Any]:
    """Each call in a thread of its own; a hang is a TimeoutError."""
    pool = ThreadPoolExecutor(len(calls))
    try:
        return [future.result(SOON) for future in [pool.submit(call) for call in calls]]
    finally:
        pool.shutdown(wait=False)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=5))
@settings(deadline=None)
def test_messages_arrive_as_they_were(messages: list[dict[str, Any]]) -> None:
    left, right = Channel.pair()
    for message in messages:
        left.send(message)
    left.hang_up()
    assert [right.receive() for _ in messages] == messages
    assert right.receive() is None
    assert right.ended
    left.close()
    right.close()


@pytest.mark.parametrize("text", ["line\nbreak", "日本語 ⟂", "\u2028\x00\x85", "\udcff broken name", "🧵"])
def test_any_text_goes_through(ends: tuple[Channel, Channel], text: str) -> None:
    """A line break inside, and a surrogate: what Python makes of a file name that is not UTF-8."""
    ends[0].send({"text": text})
    assert ends[1].receive() == {"text": text}


def test_long_messages_both_ways_at_once(ends: tuple[Channel, Channel]) -> None:
    """Both ends send before either receives; ten times what fits in the socket."""

    def talk(end: Channel, name: str) -> list[Any]:
        for i in range(2):
            end.send({"from": name, "i": i, "text": LONG})
        received = [end.receive(), end.receive()]
        return [(message["from"], message["i"], len(message["text"])) for message in received if message]

    results = together(lambda: talk(ends[0], "a"), lambda: talk(ends[1], "b"))
    assert results == [[("b", 0, len(LONG)), ("b", 1, len(LONG))], [("a", 0, len(LONG)), ("a", 1, len(LONG))]]


def test_what_is_posted_goes_out_bit_by_bit(ends: tuple[Channel, Channel]) -> None:
    """`post` never blocks; `events` asks for writing as long as something is queued, and hanging up waits for it."""
    start = time.monotonic()
    ends[0].post({"text": LONG})
    ends[0].hang_up()
    assert time.monotonic() - start < SOON
    assert ends[0].events() & module.select.POLLOUT

    received: list[Any] = []
    while not ends[1].ended:
        ends[0].flush()
        received += ends[1].ready()
    assert received == [{"text": LONG}]
    assert not ends[0].events() & module.select.POLLOUT


def test_many_messages_in_one_read(ends: tuple[Channel, Channel]) -> None:
    """The socket of a pair holds some 270 messages, however short."""
    for i in range(200):
        ends[0].send({"i": i})
    assert [message["i"] for message in ends[1].ready()] == list(range(200))
    assert list(ends[1].ready()) == []
    assert not ends[1].ended


def test_a_long_message_takes_time_in_proportion_to_its_length(ends: tuple[Channel, Channel]) -> None:
    """32 MiB in half a second here; looking for the end from the start after each read takes 20 times that."""
    message = {"text": "y" * (32 << 20)}
    start = time.monotonic()
    together(lambda: ends[0].send(message), ends[1].receive)
    assert time.monotonic() - start < 6


def test_a_message_that_is_too_long_is_refused_by_its_sender(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST", 100)
    with pytest.raises(ValueError, match="message of 112 bytes; at most 100 fit"):
        ends[0].send({"text": "x" * 99})
    ends[0].send({"text": "short"})
    assert ends[1].receive() == {"text": "short"}


def test_hanging_up_leaves_the_other_direction_open(ends: tuple[Channel, Channel]) -> None:
    ends[0].send({"last": 1})
    ends[0].hang_up()
    assert ends[1].receive() == {"last": 1}
    assert ends[1].receive() is None
    ends[1].send({"answer": LONG[:100]})
    assert ends[0].receive() == {"answer": LONG[:100]}
    ends[0].hang_up()


def test_a_peer_that_has_gone_is_an_end_not_an_error(ends: tuple[Channel, Channel]) -> None:
    """Also while a long message is on its way, and when the peer left with unread input (a reset)."""
    ends[0].send({"never": "read"})
    ends[1].send({"before": "going"})
    ends[1].close()
    ends[0].send({"text": LONG})
    assert ends[0].receive() in ({"before": "going"}, None)
    assert ends[0].receive() is None
    ends[0].hang_up()


def test_a_message_cut_off_by_death_is_dropped() -> None:
    raw, other = socket.socketpair()
    with raw, other:
        end = Channel.from_fd(other.detach())
        raw.sendall(json.dumps({"whole": 1}).encode() + b'\n{"half": ')
        raw.shutdown(socket.SHUT_WR)
        assert [end.receive(), end.receive()] == [{"whole": 1}, None]
        end.close()
